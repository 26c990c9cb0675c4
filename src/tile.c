/* Query tiles: from rows of Q to panels, and from panels to rows of O.
 *
 * Rows are read and written where they lie if the kernels can, else through a row of scratch each.
 */
#include "tile.h"

#include <float.h>
#include <math.h>

_Static_assert(sizeof(qkv_panel) <= QKV_PANEL_BYTES, "panels overlap in scratch");

static void lay_out_panels(qkv_query_tile *t)
{
    const qkv_plan *plan = t->plan;
    size_t lanes = (size_t)plan->kernels->lanes, vectors = lanes / (size_t)plan->kernels->vector;
    size_t q_bytes = (size_t)plan->terms * qkv_lanes_bytes(plan);
    size_t limits_bytes = (vectors + 1) * sizeof(qkv_limits) + lanes * sizeof(qkv_range);
    size_t total = (size_t)(t->head % plan->task_heads * plan->tile_panels);
    t->panel = (qkv_panel *)(t->scratch + plan->at_panels);
    for (int i = 0; i < t->panels; i++) {
        qkv_panel *x = &t->panel[i];
        char *limits = t->scratch + plan->at_limits + (size_t)i * limits_bytes;
        x->row = t->rows.lo + i * (int64_t)lanes;
        x->n = (int)qkv_min((int64_t)lanes, t->rows.hi - x->row);
        x->nv = (x->n + plan->kernels->vector - 1) / plan->kernels->vector;
        x->q = t->scratch + plan->at_q + (size_t)i * q_bytes;
        x->state = t->scratch + plan->at_state + (size_t)i * plan->state_bytes;
        x->total = plan->merges ? t->scratch + plan->at_total + (total + (size_t)i) * plan->state_bytes : x->state;
        x->limits = (qkv_limits *)limits;
        x->without = (int64_t *)(t->scratch + plan->at_without) + i * (int64_t)lanes;
        x->rows = (qkv_range *)(limits + (vectors + 1) * sizeof(qkv_limits));
    }
}

/* What a query sees of the keys that count. */
static qkv_range visible(const qkv_query_tile *t, int64_t position, int kept)
{
    qkv_range keys = qkv_visible_part(t->problem, t->sequence, position, kept);
    keys.lo = qkv_max(keys.lo, t->keys.lo);
    keys.hi = qkv_max(keys.lo, qkv_min(keys.hi, t->keys.hi));
    return keys;
}

/* The keys that rows go without. Whole vectors of rows that have all of theirs see none: nothing is asked of them. */
static void take_without(const qkv_query_tile *t)
{
    int w = t->plan->kernels->vector;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        qkv_row r = qkv_first_row(t, x);
        int skipped = 0, all = 0;
        for (int j = 0; j < x->nv * w; j++) {
            x->without[j] = -1;
            if (j < x->n) {
                x->without[j] = t->problem->answer_keys[qkv_result_index(t->problem, t->plan, t->sequence, t->head, &r)];
                qkv_next_row(&r);
            }
            all = (j % w ? all : 0) | (x->without[j] >= 0);
            if (j % w == w - 1 && !all) {
                x->limits[1 + j / w] = (qkv_limits){{INT64_MAX, 0}, {0, 0}};
                skipped = 1;
            }
        }
        if (skipped)
            x->limits[0].all = (qkv_range){0, 0};       /* so that panels are looked at vector by vector */
    }
}

void qkv_find_limits(qkv_query_tile *t, int kept)
{
    const qkv_problem *p = t->problem;
    int w = t->plan->kernels->vector;
    int same = qkv_all_alike(p);
    t->any = qkv_no_limits().any;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        qkv_row r = qkv_first_row(t, x);
        qkv_range keys = visible(t, r.position, kept);
        for (int j = 0; j <= x->nv; j++)
            x->limits[j] = qkv_no_limits();
        for (int j = 0; same && j <= x->nv; j++)
            qkv_add_row(&x->limits[j], keys);
        for (int j = 0; !same && j < x->nv * w; j++) {
            /* Lanes without a row repeat the last one, in Q as well. */
            if (j > 0 && j < x->n) {
                qkv_next_row(&r);
                keys = qkv_begins_query(&r) ? visible(t, r.position, kept) : keys;
            }
            x->rows[j] = keys;
            qkv_add_row(&x->limits[1 + j / w], keys);
            qkv_add_row(&x->limits[0], keys);
        }
        t->any.lo = qkv_min(t->any.lo, x->limits[0].any.lo);
        t->any.hi = qkv_max(t->any.hi, x->limits[0].any.hi);
    }
}

const void **qkv_query_rows(const qkv_query_tile *t, const qkv_panel *x)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    const void **rows = (const void **)(t->scratch + plan->at_rows);
    size_t row_bytes = (size_t)plan->terms * (size_t)plan->kernels->size;
    qkv_row r = qkv_first_row(t, x);
    for (int j = 0; j < x->n; j++, qkv_next_row(&r)) {
        char *from = (char *)p->q + t->q_offset + qkv_row_offset(&r, &p->q_at);
        rows[j] = from;
        if (!plan->direct_q) {
            char *copy = t->scratch + plan->at_tile + (size_t)j * row_bytes;
            qkv_rows one = {from, 0, (ptrdiff_t)p->q_at.dim, p->type, p->swapped_q};
            plan->kernels->gather_terms(copy, (ptrdiff_t)plan->terms, &one, 1, (int)p->dim);
            rows[j] = copy;
        }
    }
    return rows;
}

static void pack_queries(const qkv_query_tile *t)
{
    const qkv_plan *plan = t->plan;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        plan->kernels->pack(x->q, qkv_query_rows(t, x), x->n, (int)plan->terms, plan->q_factor);
    }
}

/* A row of out where the kernels can read it: in place, or a copy that `room` has room for. */
static const void *output_row(const qkv_query_tile *t, const qkv_row *r, char *room)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    char *from = p->out + t->out_offset + qkv_row_offset(r, &p->out_at);
    if (plan->direct_out)
        return from;
    qkv_rows one = {from, 0, (ptrdiff_t)p->out_at.dim, p->out_type, p->swapped_out};
    plan->kernels->gather(room, 0, &one, 1, (int)p->dim_v);
    return room;
}

const void *qkv_output_row(const qkv_query_tile *t, const qkv_row *r)
{
    size_t row_bytes = (size_t)t->problem->dim_v * (size_t)t->plan->kernels->size;
    return output_row(t, r, t->scratch + t->plan->at_tile + (size_t)t->plan->kernels->lanes * row_bytes);
}

const void **qkv_output_rows(const qkv_query_tile *t, const qkv_panel *x)
{
    const void **rows = (const void **)(t->scratch + t->plan->at_rows);
    size_t row_bytes = (size_t)t->problem->dim_v * (size_t)t->plan->kernels->size;
    qkv_row r = qkv_first_row(t, x);
    for (int j = 0; j < x->n; j++, qkv_next_row(&r))
        rows[j] = output_row(t, &r, t->scratch + t->plan->at_tile + (size_t)j * row_bytes);
    return rows;
}

void qkv_pack_outputs(const qkv_query_tile *t, const qkv_panel *x, char *to, double factor)
{
    t->plan->kernels->pack(to, qkv_output_rows(t, x), x->n, (int)t->problem->dim_v, factor);
}

void qkv_open_tile(qkv_query_tile *t, const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t head,
                   qkv_range rows, qkv_range keys, const uint8_t *summary, char *scratch, qkv_counters *counters)
{
    int64_t lanes = plan->kernels->lanes;
    *t = (qkv_query_tile){
        .problem = p, .plan = plan, .sequence = sequence, .head = head, .rows = rows, .keys = keys,
        .panels = (int)((rows.hi - rows.lo + lanes - 1) / lanes),
        .peaked = (int *)(scratch + plan->at_peaked), .scratch = scratch, .counters = counters,
    };
    *t->peaked = 0;
    t->elements = (qkv_elements){
        .problem = p, .plan = plan, .sequence = sequence, .head = head, .block = plan->block, .summary = summary,
        .bias_rows = (const void **)(scratch + plan->at_pointers),
        .mask_rows = (const uint8_t **)(scratch + plan->at_pointers) + lanes,
        .bias_copies = scratch + plan->at_bias, .mask_copies = scratch + plan->at_mask,
        .kept = (int64_t *)(scratch + plan->at_kept), .key_copies = scratch + plan->at_keys,
    };
    if (plan->kept_bias.heads && !p->bias_at.head)
        t->elements.ends = (qkv_bias_seen *)(t->elements.kept + 2 * plan->tile_panels * plan->places);
    t->q_offset = qkv_rows_offset(p, &p->q_at, sequence) + head * plan->group * p->q_at.head;
    t->out_offset = qkv_rows_offset(p, &p->out_at, sequence) + head * plan->group * p->out_at.head;
    t->k_offset = head / plan->sharing * p->k_at.head + (p->run_of ? 0 : qkv_sequence_offset(p, &p->k_at, sequence));
    t->v_offset = head / plan->sharing * p->v_at.head + (p->run_of ? 0 : qkv_sequence_offset(p, &p->v_at, sequence));
    lay_out_panels(t);
    qkv_find_limits(t, 0);
    if (p->question == QKV_MOVED)
        take_without(t);
    for (int i = 0; plan->adjust && i < t->panels; i++) {
        qkv_panel *x = &t->panel[i];
        qkv_open_lanes(&t->elements, &x->lanes, x->row, x->n, x->nv * plan->kernels->vector, i,
                       scratch + plan->at_lanes + i * lanes * QKV_LANE_BYTES);
    }
    pack_queries(t);
}

void qkv_take_range(qkv_query_tile *t, qkv_range keys)
{
    t->keys = keys;
    qkv_find_limits(t, 0);
}

/* A sink as a maximum of the kernels: in units of what is left of the scale, and within the type. */
static double sink_of(const qkv_problem *p, const qkv_plan *plan, int64_t head)
{
    double sink = p->sinks[head] / plan->rest, most = p->type == QKV_F64 ? DBL_MAX : FLT_MAX;
    sink = sink == -INFINITY ? sink : fmin(fmax(sink, -most), most);
    return p->type == QKV_F64 ? sink : (float)sink;
}

void qkv_begin_sinks(const qkv_problem *p, const qkv_plan *plan, int64_t head, int64_t row, int64_t n, void *m, void *l)
{
    qkv_row r = qkv_row_of(row, plan->beams, plan->group);
    for (int64_t j = 0; p->sinks && j < n; j++, qkv_next_row(&r)) {
        double sink = sink_of(p, plan, head * plan->group + r.head);
        if (sink == -INFINITY)
            continue;
        if (p->type == QKV_F64) {
            ((double *)m)[j] = sink;
            ((double *)l)[j] = 1;
        } else {
            ((float *)m)[j] = (float)sink;
            ((float *)l)[j] = 1;
        }
    }
}

void qkv_begin_state(const qkv_query_tile *t, const qkv_panel *x, char *state)
{
    const qkv_plan *plan = t->plan;
    void *m = qkv_state_m(plan, state), *l = qkv_state_l(plan, state);
    plan->kernels->reset(state, m, l, x->nv, (int)t->problem->dim_v);
    qkv_begin_sinks(t->problem, plan, t->head, x->row, x->n, m, l);
}

int64_t qkv_result_index(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t head, const qkv_row *r)
{
    int64_t query_head = head * plan->group + r->head;
    if (p->q_starts)
        return query_head * p->q_starts[plan->sequences] + p->q_starts[sequence] + r->position;
    return (qkv_given(p, sequence, r->beam) * p->heads_q + query_head) * p->len_q + r->position;
}

void qkv_write_lse(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t head, int64_t row, int64_t n,
                   const void *m, const void *l)
{
    qkv_row r = qkv_row_of(row, plan->beams, plan->group);
    for (int64_t j = 0; j < n; j++, qkv_next_row(&r)) {
        int64_t at = qkv_result_index(p, plan, sequence, head, &r);
        int wide = p->type == QKV_F64;
        double top = wide ? ((const double *)m)[j] : ((const float *)m)[j];
        double sum = wide ? ((const double *)l)[j] : ((const float *)l)[j];
        double lse = sum == 0 ? -INFINITY : top * plan->rest + log(sum);
        int64_t query_head = head * plan->group + r.head;
        if (p->sinks && sum == 1 && top == sink_of(p, plan, query_head))
            lse = p->sinks[query_head];                 /* as it was given, if nothing else weighs */
        if (wide)
            ((double *)p->lse)[at] = lse;
        else
            ((float *)p->lse)[at] = (float)lse;
    }
}

void qkv_write_normalisers(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t head, int64_t row, int64_t n,
                           const void *m, const void *l)
{
    qkv_row r = qkv_row_of(row, plan->beams, plan->group);
    for (int64_t j = 0; j < n; j++, qkv_next_row(&r)) {
        int64_t at = 2 * qkv_result_index(p, plan, sequence, head, &r);
        int wide = p->type == QKV_F64;
        double sum = wide ? ((const double *)l)[j] : ((const float *)l)[j], factor = sum == 0 ? 0 : 1 / sum;
        double top = wide ? ((const double *)m)[j] : ((const float *)m)[j];
        if (isnan(sum))
            top = sum;                                  /* else a row that sees NaN alone would seem to see nothing */
        if (wide) {
            ((double *)p->answer)[at] = top;
            ((double *)p->answer)[at + 1] = factor;
        } else {
            ((float *)p->answer)[at] = (float)top;
            ((float *)p->answer)[at + 1] = (float)factor;
        }
    }
}

/* Where the rows of O are written: in place if the kernels can, else in scratch. */
static void **output_rows(const qkv_query_tile *t, const qkv_panel *x, int direct)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    void **rows = (void **)(t->scratch + plan->at_rows);
    char *copies = t->scratch + plan->at_tile;
    size_t row_bytes = (size_t)p->dim_v * (size_t)plan->kernels->size;
    qkv_row r = qkv_first_row(t, x);
    for (int j = 0; j < x->n; j++, qkv_next_row(&r))
        rows[j] = direct ? p->out + t->out_offset + qkv_row_offset(&r, &p->out_at) : copies + (size_t)j * row_bytes;
    return rows;
}

void *const *qkv_finish_rows(const qkv_query_tile *t, const qkv_panel *x)
{
    void **rows = output_rows(t, x, 0);
    t->plan->kernels->finish(rows, x->total, qkv_state_l(t->plan, x->total), x->n, (int)t->problem->dim_v);
    return rows;
}

void qkv_expect_writing(const qkv_query_tile *t, const qkv_panel *x)
{
    if (t->plan->direct_out)
        t->plan->kernels->expect(output_rows(t, x, 1), x->n, (int)t->problem->dim_v);
}

void qkv_write_tile(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        void **rows = output_rows(t, x, plan->direct_out);
        plan->kernels->finish(rows, x->total, qkv_state_l(plan, x->total), x->n, (int)p->dim_v);
        qkv_row r = qkv_first_row(t, x);
        for (int j = 0; j < x->n && !plan->direct_out; j++, qkv_next_row(&r)) {
            qkv_rows to = {p->out + t->out_offset + qkv_row_offset(&r, &p->out_at), 0,
                           (ptrdiff_t)p->out_at.dim, p->out_type, p->swapped_out};
            plan->kernels->scatter(&to, rows[j], 0, 1, (int)p->dim_v);
        }
        if (p->lse)
            qkv_write_lse(p, plan, t->sequence, t->head, x->row, x->n, qkv_state_m(plan, x->total),
                          qkv_state_l(plan, x->total));
        if (p->answer)
            qkv_write_normalisers(p, plan, t->sequence, t->head, x->row, x->n, qkv_state_m(plan, x->total),
                                  qkv_state_l(plan, x->total));
    }
}
