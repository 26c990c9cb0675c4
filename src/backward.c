/* The backward pass: the walk of forward.c, whose tasks have a part of the keys of a key head, and meet all its queries range by
 * range. A range of keys, its K, V, dK and dV, stays in L2 meanwhile; dQ of a tile is added to the part of its own behind each
 * range, and who ends the last part of a head adds these up; or a task has all parts, and adds them to dQ in turn. Each number is
 * owned by one task, which adds up in a fixed order: the same bits for any number of threads.
 *
 * A panel keeps dQ^T (d, lanes), delta (lanes), dO^T (dv, lanes), columns of Q and of dO (columns, lanes), m and l.
 */
#include "backward.h"

#include <math.h>
#include <string.h>

#include "types.h"

/* What lies in a panel's state beside dQ^T. */
typedef struct { char *delta, *dout, *q_rows, *dout_rows; } parts;

static parts parts_of(const qkv_query_tile *t, const qkv_panel *x)
{
    int64_t lanes_bytes = (int64_t)qkv_lanes_bytes(t->plan);
    parts at;
    at.delta = x->state + t->problem->dim * lanes_bytes;
    at.dout = at.delta + lanes_bytes;
    at.q_rows = at.dout + t->problem->dim_v * lanes_bytes;
    at.dout_rows = at.q_rows + qkv_columns(t->plan, t->problem->dim) * lanes_bytes;
    return at;
}

int qkv_are_finite(const qkv_query_tile *t, qkv_range keys, const char *k, ptrdiff_t k_row, const char *v, ptrdiff_t v_row)
{
    const qkv_kernels *kernels = t->plan->kernels;
    int64_t *known = (int64_t *)(t->scratch + t->plan->at_finite) + (keys.lo - t->first) / t->plan->block, n = keys.hi - keys.lo;
    if (n > *known && kernels->finite_rows(k, k_row, n, (int)t->problem->dim)
        && kernels->finite_rows(v, v_row, n, (int)t->problem->dim_v))
        *known = n;
    return n <= *known;
}

/* m, l and delta of a panel's lanes, m as c has it, which is not the scale where that is very small. A row that sees nothing, and a
 * lane without a row, have m = +inf. */
static void take_rows(const qkv_query_tile *t, const qkv_panel *x, void *delta)
{
    const qkv_problem *p = t->problem;
    qkv_row r = qkv_first_row(t, x);
    for (int j = 0; j < x->nv * t->plan->kernels->vector; j++) {
        double lse = -INFINITY, sum = 0;
        if (j < x->n) {
            int64_t at = qkv_result_index(p, t->plan, t->sequence, t->head, &r);
            lse = qkv_element(p, p->lse, at) * (1.4426950408889634 / t->plan->c);
            sum = qkv_element(p, p->delta, at);
            qkv_next_row(&r);
        }
        int sees = lse != -INFINITY;
        qkv_set_element(p, qkv_state_m(t->plan, x->state), j, sees ? lse == INFINITY ? NAN : lse : INFINITY);
        qkv_set_element(p, qkv_state_l(t->plan, x->state), j, sees ? 1 : 0);
        qkv_set_element(p, delta, j, sees ? sum : 0);
    }
}

/* Rows of dim elements as panels of columns, and 0 where there is nothing. */
static void lay_columns(const qkv_query_tile *t, const qkv_panel *x, const void *const *rows, int64_t dim, char *to)
{
    int64_t lanes = t->plan->kernels->lanes, size = t->plan->kernels->size;
    memset(to, 0, (size_t)(qkv_columns(t->plan, dim) * lanes * size));
    for (int64_t e = 0; e < dim; e += lanes, to += lanes * lanes * size)
        for (int j = 0; j < x->n; j++)
            memcpy(to + j * lanes * size, (const char *)rows[j] + e * size, (size_t)(qkv_min(lanes, dim - e) * size));
}

void qkv_begin_gradients(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    const qkv_kernels *kernels = plan->kernels;
    for (int i = 0; i < t->panels; i++) {
        qkv_panel *x = &t->panel[i];
        parts at = parts_of(t, x);
        void *m = qkv_state_m(plan, x->state), *l = qkv_state_l(plan, x->state);
        kernels->reset(x->state, m, l, x->nv, (int)p->dim);
        take_rows(t, x, at.delta);
        lay_columns(t, x, qkv_query_rows(t, x), p->dim, at.q_rows);
        const void **rows = qkv_output_rows(t, x);
        kernels->pack(at.dout, rows, x->n, (int)p->dim_v, 1);
        lay_columns(t, x, rows, p->dim_v, at.dout_rows);
        x->careful = !kernels->finite(x->q, l, x->nv, (int)p->dim) || !kernels->finite(at.dout, l, x->nv, (int)p->dim_v);
    }
}

/* What scores met by element: dS (keys, lanes) of some rows, for the keys from `key` on, added to the gradients of bias and slopes. */
static void add_changes(const qkv_query_tile *t, const qkv_panel *x, int lane, int64_t key, const qkv_tile *of, const void *ds)
{
    const qkv_problem *p = t->problem;
    int64_t lanes = t->plan->kernels->lanes, part = t->first / t->plan->share;
    qkv_row r = qkv_row_of(x->row + lane, 1, t->plan->group);
    int64_t head = t->head * t->plan->group;
    char *bias = p->dbias;
    if (bias)
        bias += qkv_sequence_offset(p, &p->dbias_at, t->sequence) + head * p->dbias_at.head + part * p->dbias_part
            + key * p->dbias_at.dim;
    for (int64_t j = 0; j < of->nv * t->plan->kernels->vector && lane + j < x->n; j++, qkv_next_row(&r)) {
        char *row = bias ? bias + qkv_row_offset(&r, &p->dbias_at) : NULL;
        double distances = 0;
        for (int64_t i = 0; i < of->nk; i++) {
            double value = qkv_element(p, ds, i * lanes + j);
            char *to = row ? row + i * p->dbias_at.dim : NULL;
            if (to)
                qkv_set_element(p, to, 0, qkv_element(p, to, 0) + value);
            if (p->dslopes && value != 0)
                distances += value * fabs((double)(x->lanes.position[lane + j] - key - i));
        }
        if (p->dslopes)
            p->dslopes[(part * t->plan->sequences + t->sequence) * p->heads_q + head + r.head] -= distances;
    }
}

void qkv_add_gradients(const qkv_query_tile *t, const qkv_panel *x, int lane, int64_t key, const qkv_tile *of, int careful)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    int64_t size = plan->kernels->size, lanes = plan->kernels->lanes, shift = lane * size;
    int64_t s_bytes = plan->block * lanes * size, dk_row = qkv_columns(plan, p->dim), dv_row = qkv_columns(plan, p->dim_v);
    char *sums = t->scratch + plan->at_sums;
    parts at = parts_of(t, x);
    qkv_gradients g = {
        .dout = at.dout + shift, .delta = at.delta + shift, .ds = (char *)of->s + s_bytes,
        .products = plan->softcap != 0 ? (char *)of->s + 2 * s_bytes : NULL,
        .q_rows = at.q_rows + shift * lanes, .dout_rows = at.dout_rows + shift * lanes,
        .dk = sums + (key - t->first) * dk_row * size, .dv = sums + (plan->range * dk_row + (key - t->first) * dv_row) * size,
        .dk_row = (ptrdiff_t)dk_row, .dv_row = (ptrdiff_t)dv_row, .careful = careful || x->careful,
    };
    plan->kernels->grad_scores(of, &g);
    if (p->dbias || p->dslopes)
        add_changes(t, x, lane, key, of, g.ds);
    plan->kernels->grad_values(of, &g);
}

/* Whether dQ itself is the first of its parts, and part n. */
static int is_own(const qkv_problem *p) { return p->dq_type == qkv_arithmetic(p->type); }

static char *part_of(const qkv_problem *p, int64_t n)
{
    return n == 0 && is_own(p) ? p->dq : p->dq_parts + (n - is_own(p)) * p->dq_part;
}

/* Where dQ of a query head begins, in elements: it has no gaps, and neither have its parts. */
static int64_t head_at(const qkv_problem *p, int64_t sequence, int64_t head)
{
    return (qkv_rows_offset(p, &p->dq_at, sequence) + head * p->dq_at.head) / qkv_size(p->dq_type);
}

/* to += factor * from */
static void add_row(const qkv_problem *p, void *to, const void *from, int64_t n, double factor)
{
    if (p->type == QKV_F64)
        for (int64_t e = 0; e < n; e++)
            ((double *)to)[e] += factor * ((const double *)from)[e];
    else
        for (int64_t e = 0; e < n; e++)
            ((float *)to)[e] += (float)(factor * (double)((const float *)from)[e]);
}

void qkv_write_query_gradients(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    void **rows = (void **)(t->scratch + plan->at_rows);
    int64_t size = plan->kernels->size, bytes = qkv_size(p->dq_type);
    char *dq = part_of(p, plan->in_turn ? 0 : t->first / plan->share) + head_at(p, t->sequence, t->head * plan->group) * size;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        void *l = qkv_state_l(plan, x->state);
        for (int j = 0; j < x->nv * plan->kernels->vector; j++)
            qkv_set_element(p, l, j, 1);
        for (int j = 0; j < x->n; j++)
            rows[j] = t->scratch + plan->at_tile + j * p->dim * size;
        plan->kernels->finish(rows, x->state, l, x->n, (int)p->dim);
        qkv_row r = qkv_first_row(t, x);
        for (int j = 0; j < x->n; j++, qkv_next_row(&r))
            add_row(p, dq + qkv_row_offset(&r, &p->dq_at) / bytes * size, rows[j], p->dim, p->scale);
    }
}

void qkv_join_query_gradients(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t head)
{
    int64_t size = plan->kernels->size, bytes = qkv_size(p->dq_type);
    int64_t rows = p->q_starts ? p->q_starts[sequence + 1] - p->q_starts[sequence] : p->len_q;
    for (int64_t h = head * plan->group; h < (head + 1) * plan->group; h++) {
        for (int64_t i = 0; i < rows; i++) {
            int64_t at = head_at(p, sequence, h) + i * p->dq_at.row / bytes;
            char *sum = part_of(p, 0) + at * size;
            for (int64_t n = 1; n < plan->ranges && !plan->in_turn; n++)
                add_row(p, sum, part_of(p, n) + at * size, p->dim, 1);
            qkv_rows to = {p->dq + at * bytes, 0, (ptrdiff_t)bytes, p->dq_type, 0};
            if (!is_own(p))
                plan->kernels->scatter(&to, sum, 0, 1, (int)p->dim);
        }
    }
}

void qkv_begin_key_gradients(const qkv_problem *p, const qkv_plan *plan, char *scratch)
{
    int64_t columns = qkv_columns(plan, p->dim) + qkv_columns(plan, p->dim_v);
    memset(scratch + plan->at_sums, 0, (size_t)(plan->range * columns * plan->kernels->size));
    memset(scratch + plan->at_finite, 0, (size_t)(plan->range / plan->block) * sizeof(int64_t));
}

/* x *= factor */
static void scale(const qkv_problem *p, void *x, int64_t n, double factor)
{
    if (p->type == QKV_F64)
        for (int64_t e = 0; e < n; e++)
            ((double *)x)[e] *= factor;
    else
        for (int64_t e = 0; e < n; e++)
            ((float *)x)[e] = (float)(factor * (double)((float *)x)[e]);
}

void qkv_write_key_gradients(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t head, qkv_range keys, char *scratch)
{
    int64_t size = plan->kernels->size, dk_row = qkv_columns(plan, p->dim) * size, dv_row = qkv_columns(plan, p->dim_v) * size;
    int64_t before = p->k_starts ? p->k_starts[sequence] : 0, end = p->k_starts ? p->k_starts[sequence + 1] - before : p->len_k;
    char *dk = scratch + plan->at_sums, *dv = dk + plan->range * dk_row;
    char *to_k = p->dk + (before + keys.lo) * p->dk_at.row + head * p->dk_at.head;
    char *to_v = p->dv + (before + keys.lo) * p->dv_at.row + head * p->dv_at.head;
    if (!p->k_starts) {
        to_k += qkv_sequence_offset(p, &p->dk_at, sequence);
        to_v += qkv_sequence_offset(p, &p->dv_at, sequence);
    }
    int64_t n = qkv_min(keys.hi, end) - keys.lo;
    qkv_rows to_dk = {to_k, (ptrdiff_t)p->dk_at.row, (ptrdiff_t)qkv_size(p->dk_type), p->dk_type, 0};
    qkv_rows to_dv = {to_v, (ptrdiff_t)p->dv_at.row, (ptrdiff_t)qkv_size(p->dv_type), p->dv_type, 0};
    scale(p, dk, n * dk_row / size, p->scale);
    plan->kernels->scatter(&to_dk, dk, (ptrdiff_t)(dk_row / size), (int)n, (int)p->dim);
    plan->kernels->scatter(&to_dv, dv, (ptrdiff_t)(dv_row / size), (int)n, (int)p->dim_v);
}
