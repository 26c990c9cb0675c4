/* Query tiles: from rows of Q to panels, and from panels to rows of O.
 *
 * A row is a (position, head of the group) pair, the head running fastest, so that neighbours in a panel see nearly the
 * same keys. Rows are read and written where they lie if the kernels can, else through a row of scratch each.
 */
#include "tile.h"

#include <math.h>

_Static_assert(sizeof(qkv_panel) <= QKV_PANEL_BYTES, "panels overlap in scratch");

static int64_t sequence_offset(const qkv_problem *p, const qkv_strides *at, int64_t sequence)
{
    int64_t offset = 0;
    for (int i = p->n_axes; i-- > 0;) {
        offset += sequence % p->axes[i] * at->axis[i];
        sequence /= p->axes[i];
    }
    return offset;
}

/* Rows of a panel in order: row r is position r / group, query head head * group + r % group. */
typedef struct { int64_t position, head, group; } row_of;

static row_of first_row(const qkv_query_tile *t, const qkv_panel *x)
{
    int64_t group = t->plan->group;
    return (row_of){x->row / group, x->row % group, group};
}

static void next_row(row_of *r)
{
    if (++r->head == r->group) {
        r->head = 0;
        r->position++;
    }
}

static int64_t row_offset(const row_of *r, const qkv_strides *at)
{
    return r->position * at->row + r->head * at->head;
}

static void lay_out_panels(qkv_query_tile *t, int64_t first)
{
    const qkv_plan *plan = t->plan;
    size_t lanes = (size_t)plan->kernels->lanes, vectors = lanes / (size_t)plan->kernels->vector;
    size_t q_bytes = (size_t)t->problem->dim * qkv_lanes_bytes(plan);
    size_t limits_bytes = (vectors + 1) * sizeof(qkv_limits) + lanes * sizeof(qkv_range);
    t->panel = (qkv_panel *)(t->scratch + plan->at_panels);
    for (int i = 0; i < t->panels; i++) {
        qkv_panel *x = &t->panel[i];
        char *limits = t->scratch + plan->at_limits + (size_t)i * limits_bytes;
        x->row = (first + i) * (int64_t)lanes;
        x->n = (int)qkv_min((int64_t)lanes, plan->rows - x->row);
        x->nv = (x->n + plan->kernels->vector - 1) / plan->kernels->vector;
        x->q = t->scratch + plan->at_q + (size_t)i * q_bytes;
        x->state = t->scratch + plan->at_state + (size_t)i * plan->state_bytes;
        x->total = plan->chunks > 1 ? t->scratch + plan->at_total + (size_t)i * plan->state_bytes : x->state;
        x->limits = (qkv_limits *)limits;
        x->rows = (qkv_range *)(limits + (vectors + 1) * sizeof(qkv_limits));
    }
}

static void find_limits(qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    int w = t->plan->kernels->vector;
    int same = p->left == QKV_OPEN && p->right == QKV_OPEN;        /* all rows of a sequence */
    t->any = qkv_no_limits().any;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        row_of r = first_row(t, x);
        qkv_range keys = qkv_visible(p, t->sequence, r.position);
        for (int j = 0; j <= x->nv; j++)
            x->limits[j] = qkv_no_limits();
        for (int j = 0; same && j <= x->nv; j++)
            qkv_add_row(&x->limits[j], keys);
        for (int j = 0; !same && j < x->nv * w; j++) {
            /* Lanes without a row repeat the last one, in Q as well. */
            if (j > 0 && j < x->n) {
                next_row(&r);
                keys = r.head ? keys : qkv_visible(p, t->sequence, r.position);
            }
            x->rows[j] = keys;
            qkv_add_row(&x->limits[1 + j / w], keys);
            qkv_add_row(&x->limits[0], keys);
        }
        t->any.lo = qkv_min(t->any.lo, x->limits[0].any.lo);
        t->any.hi = qkv_max(t->any.hi, x->limits[0].any.hi);
    }
}

static void pack_queries(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    const void **rows = (const void **)(t->scratch + plan->at_rows);
    size_t row_bytes = (size_t)p->dim * (size_t)plan->kernels->size;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        row_of r = first_row(t, x);
        for (int j = 0; j < x->n; j++, next_row(&r)) {
            char *from = (char *)p->q + t->q_offset + row_offset(&r, &p->q_at);
            rows[j] = from;
            if (!plan->direct_q) {
                char *copy = t->scratch + plan->at_tile + (size_t)j * row_bytes;
                qkv_rows one = {from, 0, (ptrdiff_t)p->q_at.dim, plan->kernels->size, p->swapped_q};
                plan->kernels->gather(copy, 0, &one, 1, (int)p->dim);
                rows[j] = copy;
            }
        }
        plan->kernels->pack(x->q, rows, x->n, (int)p->dim, plan->q_factor);
    }
}

void qkv_open_tile(qkv_query_tile *t, const qkv_problem *p, const qkv_plan *plan, int64_t index, char *scratch,
                   qkv_counters *counters)
{
    int64_t head = index / plan->tiles, panels = (plan->rows + plan->kernels->lanes - 1) / plan->kernels->lanes;
    /* Late rows first: under a causal mask they are the heavy ones. */
    int64_t first_panel = (plan->tiles - 1 - index % plan->tiles) * plan->tile_panels;
    *t = (qkv_query_tile){
        .problem = p, .plan = plan, .sequence = head / p->heads_kv, .head = head % p->heads_kv,
        .panels = (int)qkv_min(plan->tile_panels, panels - first_panel), .scratch = scratch, .counters = counters,
    };
    t->q_offset = sequence_offset(p, &p->q_at, t->sequence) + t->head * plan->group * p->q_at.head;
    t->out_offset = sequence_offset(p, &p->out_at, t->sequence) + t->head * plan->group * p->out_at.head;
    t->k_offset = t->head * p->k_at.head + (p->run_of ? 0 : sequence_offset(p, &p->k_at, t->sequence));
    t->v_offset = t->head * p->v_at.head + (p->run_of ? 0 : sequence_offset(p, &p->v_at, t->sequence));
    lay_out_panels(t, first_panel);
    find_limits(t);
    pack_queries(t);
}

static void write_lse(const qkv_query_tile *t, const qkv_panel *x)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    const void *m = qkv_state_m(plan, x->total), *l = qkv_state_l(plan, x->total);
    int64_t first_head = (t->sequence * p->heads_kv + t->head) * plan->group;
    row_of r = first_row(t, x);
    for (int j = 0; j < x->n; j++, next_row(&r)) {
        int64_t at = (first_head + r.head) * p->len_q + r.position;
        int wide = p->type == QKV_F64;
        double top = wide ? ((const double *)m)[j] : ((const float *)m)[j];
        double sum = wide ? ((const double *)l)[j] : ((const float *)l)[j];
        double lse = sum == 0 ? -INFINITY : top * plan->rest + log(sum);
        if (wide)
            ((double *)p->lse)[at] = lse;
        else
            ((float *)p->lse)[at] = (float)lse;
    }
}

/* Where the rows of O are written: in place if the kernels can, else in scratch. */
static void **output_rows(const qkv_query_tile *t, const qkv_panel *x)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    void **rows = (void **)(t->scratch + plan->at_rows);
    char *copies = t->scratch + plan->at_tile;
    size_t row_bytes = (size_t)p->dim_v * (size_t)plan->kernels->size;
    row_of r = first_row(t, x);
    for (int j = 0; j < x->n; j++, next_row(&r))
        rows[j] = plan->direct_out ? p->out + t->out_offset + row_offset(&r, &p->out_at)
                                   : copies + (size_t)j * row_bytes;
    return rows;
}

void qkv_expect_writing(const qkv_query_tile *t, const qkv_panel *x)
{
    if (t->plan->direct_out)
        t->plan->kernels->expect(output_rows(t, x), x->n, (int)t->problem->dim_v);
}

void qkv_write_tile(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        void **rows = output_rows(t, x);
        plan->kernels->finish(rows, x->total, qkv_state_l(plan, x->total), x->n, (int)p->dim_v);
        row_of r = first_row(t, x);
        for (int j = 0; j < x->n && !plan->direct_out; j++, next_row(&r)) {
            qkv_rows to = {p->out + t->out_offset + row_offset(&r, &p->out_at), 0,
                           (ptrdiff_t)p->out_at.dim, plan->kernels->size, p->swapped_out};
            plan->kernels->scatter(&to, rows[j], 0, 1, (int)p->dim_v);
        }
        if (p->lse)
            write_lse(t, x);
    }
}
