/* Questions about where attention falls. The walk over tiles is that of attention; what is kept of a row instead of O is one
 * sum, a list of keys or nothing, before m and l. It goes through all chunks of keys in order: no state is merged.
 *
 * Sums over queries are kept for a range of keys, (range, vector): each element has the queries of its lane, and the queries
 * come in order. m and l of each row are then what makes weights of its scores.
 *
 * A map in cells is made of sums, or maxima, over parts of columns, (parts, lanes), of one tile after the other. Each query is
 * then counted in its row of cells, which is kept in double precision until it is whole: one row, as queries come in order.
 * How far outputs move without a key takes a second product, of values and outputs. Both are taken from a centre, and their
 * distance is |o|^2 - 2 o v + |v|^2. The centre is a mean of some outputs, which know nothing of hidden values.
 */
#include "spotlight.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum { CENTRE_ROWS = 64 };            /* outputs that the centre is the mean of, at most */

/* The lists of a panel from a lane on; no longer than there are keys. */
static qkv_heaviest list_of(const qkv_query_tile *t, const qkv_panel *x, int lane)
{
    int64_t n = qkv_max(1, qkv_min(t->problem->answer_n, t->problem->len_k));
    char *scores = x->state + lane * t->plan->kernels->size;
    return (qkv_heaviest){.score = scores, .key = scores + n * (int64_t)qkv_lanes_bytes(t->plan), .n = n};
}

static void begin_lists(const qkv_query_tile *t, const qkv_panel *x)
{
    qkv_heaviest list = list_of(t, x, 0);
    for (int64_t i = 0; i < t->plan->kernels->lanes * list.n; i++)
        qkv_set_element(t->problem, list.score, i, -INFINITY);
}

/* What weights of a row are taken with, as it is given: they are factor * 2^(c (S - m)). */
static double normaliser_of(const qkv_query_tile *t, const qkv_row *r, double *factor)
{
    const qkv_problem *p = t->problem;
    int64_t at = qkv_result_index(p, t->plan, t->sequence, t->head, r);
    *factor = p->lse ? 1 : qkv_element(p, p->normalisers, 2 * at + 1);
    return p->lse ? qkv_element(p, p->lse, at) / t->plan->rest : qkv_element(p, p->normalisers, 2 * at);
}

/* A row that sees nothing counts for nothing. Of a row with NaN m is NaN, and the factor 1: it also multiplies the 0 of hidden
 * keys. */
static void make_usable(double *m, double *factor)
{
    if (*m == -INFINITY) {
        *m = INFINITY;
        *factor = 0;
    } else if (isnan(*factor)) {
        *m = *factor;
        *factor = 1;
    }
}

/* Those of a panel, into m and l. Lanes without a row count for nothing, too. */
static void take_normalisers(const qkv_query_tile *t, const qkv_panel *x)
{
    const qkv_problem *p = t->problem;
    qkv_row r = qkv_first_row(t, x);
    for (int j = 0; j < x->nv * t->plan->kernels->vector; j++) {
        double m = -INFINITY, factor = 1;
        if (j < x->n) {
            m = normaliser_of(t, &r, &factor);
            qkv_next_row(&r);
        }
        make_usable(&m, &factor);
        qkv_set_element(p, qkv_state_m(t->plan, x->state), j, m);
        qkv_set_element(p, qkv_state_l(t->plan, x->state), j, factor);
    }
}

/* Rows of a state behind O: the squares of the outputs' lengths, and keys with more than half the weight. */
static char *row_of_state(const qkv_query_tile *t, char *state, int i)
{
    return state + (t->problem->dim_v + i) * (int64_t)qkv_lanes_bytes(t->plan);
}

static void begin_influence(const qkv_query_tile *t, const qkv_panel *x)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    qkv_pack_outputs(t, x, x->state, -2);
    plan->kernels->centre_outputs(x->state, t->scratch + plan->at_centre, row_of_state(t, x->state, 0), x->nv, (int)p->dim_v);
    memset(row_of_state(t, x->state, 1), 0xff, qkv_lanes_bytes(plan));
}

/* The key that a lane has met with more than half its weight, or -1. */
static int64_t heavy_of(const qkv_query_tile *t, const qkv_panel *x, int lane)
{
    const char *keys = row_of_state(t, x->state, 1);
    if (t->problem->type == QKV_F64)
        return ((const int64_t *)keys)[lane];
    uint32_t key = ((const uint32_t *)keys)[lane];
    return key == UINT32_MAX ? -1 : (int64_t)key;
}

/* A row of the answer to ROWS. */
static void *answer_row(const qkv_query_tile *t, const qkv_row *r)
{
    const qkv_problem *p = t->problem;
    return (char *)p->answer + qkv_result_index(p, t->plan, t->sequence, t->head, r) * p->answer_n * t->plan->kernels->size;
}

/* Scores of keys that no tile may have, for the rows of a panel. */
static void begin_rows(const qkv_query_tile *t, const qkv_panel *x)
{
    const qkv_problem *p = t->problem;
    int hidden = t->plan->masked || p->bias || p->kept;                 /* some tile may be, as a whole */
    qkv_range seen = hidden ? (qkv_range){0, 0} : x->limits[0].all;
    qkv_row r = qkv_first_row(t, x);
    seen.lo = qkv_min(seen.lo, p->answer_n);
    for (int j = 0; j < x->n; j++, qkv_next_row(&r)) {
        void *row = answer_row(t, &r);
        for (int64_t key = 0; key < seen.lo; key++)
            qkv_set_element(p, row, key, -INFINITY);
        for (int64_t key = qkv_max(seen.lo, seen.hi); key < p->answer_n; key++)
            qkv_set_element(p, row, key, -INFINITY);
    }
}

void qkv_begin_answer(const qkv_query_tile *t)
{
    const qkv_plan *plan = t->plan;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        int rows = t->problem->question == QKV_ENTROPY ? 1 : (int)(qkv_asks_cells(t->problem) ? plan->range * plan->parts : 0);
        plan->kernels->reset(x->state, qkv_state_m(plan, x->state), qkv_state_l(plan, x->state), x->nv, rows);
        if (t->problem->question == QKV_TOP_KEYS)
            begin_lists(t, x);
        if (t->problem->question == QKV_ROWS)
            begin_rows(t, x);
        if (plan->by_key || t->problem->question == QKV_WEIGHTS || qkv_asks_cells(t->problem))
            take_normalisers(t, x);
        if (t->problem->question == QKV_INFLUENCE)
            begin_influence(t, x);
    }
}

/* Where the weights of the panel's rows from a lane on go, for keys from `key` on: of those before the first that some row of the
 * tile sees, there may be some already. */
static qkv_weights rows_of(const qkv_query_tile *t, const qkv_panel *x, int lane, int nv, int64_t key)
{
    const qkv_problem *p = t->problem;
    int64_t before = qkv_max(0, qkv_max(p->answer_first, t->any.lo) - key), size = t->plan->kernels->size;
    qkv_weights to = {.row = (void **)(t->scratch + t->plan->at_rows), .first = (int)before};
    qkv_row r = qkv_row_of(x->row + lane, 1, t->plan->group);
    for (int j = 0; j < nv * t->plan->kernels->vector; j++, qkv_next_row(&r)) {
        int64_t at = lane + j < x->n ? qkv_result_index(p, t->plan, t->sequence, t->head, &r) : -1;
        to.row[j] = at < 0 ? NULL : (char *)p->answer + (at * p->answer_n + key + before - p->answer_first) * size;
    }
    return to;
}

/* Parts of all columns of a problem: more columns, of up to as many keys as are summed apart. */
static int64_t all_parts(const qkv_problem *p, const qkv_plan *plan)
{
    return p->answer_n * plan->parts;
}

/* The parts of the panel's lanes from a lane on, for n keys from `key` on: of whole row tiles, so some may lie outside. */
static qkv_parts parts_of(const qkv_query_tile *t, const qkv_panel *x, int lane, int64_t key, int n)
{
    const qkv_kernels *kernels = t->plan->kernels;
    int64_t begin = qkv_max(key, t->keys.lo), end = qkv_min(key + n, t->keys.hi);
    int64_t part = qkv_cell_of(begin, t->problem->len_k, all_parts(t->problem, t->plan)) - t->first * t->plan->parts;
    return (qkv_parts){
        .part = x->state + (part * kernels->lanes + lane) * kernels->size,
        .bound = (const int64_t *)(t->scratch + t->plan->at_bounds) + part, .first = key,
        .begin = (int)(begin - key), .end = (int)(end - key),
    };
}

/* The values of the keys from `key` on. */
static qkv_influence values_of(const qkv_query_tile *t, int64_t key, char *sums)
{
    const qkv_plan *plan = t->plan;
    int64_t size = plan->kernels->size, at = key - t->first;
    return (qkv_influence){
        .v = t->scratch + plan->at_v + at * plan->copy_row_v * size, .v_row = (ptrdiff_t)plan->copy_row_v,
        .v_size = t->scratch + plan->at_sizes + at * size, .not_finite = t->not_finite, .first = key,
        .t = t->scratch + plan->at_products, .sums = sums,
    };
}

void qkv_ask(const qkv_query_tile *t, const qkv_panel *x, int lane, int64_t key, const qkv_tile *tile)
{
    const qkv_kernels *kernels = t->plan->kernels;
    int64_t lanes_bytes = kernels->vector * kernels->size;
    char *sums = t->scratch + t->plan->at_sums + (key - t->first) * lanes_bytes;
    qkv_heaviest list;
    qkv_weights to;
    qkv_parts parts;
    qkv_influence of;
    switch (t->problem->question) {
    case QKV_VALUES:
    case QKV_MOVED:
    case QKV_GROUPS:
    case QKV_GRADIENTS:
        break;
    case QKV_LARGEST:
        kernels->look_largest(tile);
        break;
    case QKV_ENTROPY:
        kernels->look_entropy(tile);
        break;
    case QKV_TOP_KEYS:
        list = list_of(t, x, lane);
        list.first = key;
        kernels->look_heaviest(tile, &list);
        break;
    case QKV_NORMALISERS:
        kernels->look_normalisers(tile);
        break;
    case QKV_WEIGHTS:
    case QKV_ROWS:
        to = rows_of(t, x, lane, tile->nv, key);
        (t->problem->question == QKV_WEIGHTS ? kernels->look_weights : kernels->look_rows)(tile, &to);
        break;
    case QKV_MEANS:
    case QKV_MAXIMA:
        parts = parts_of(t, x, lane, key, tile->nk);
        (t->problem->question == QKV_MEANS ? kernels->look_sums : kernels->look_maxima)(tile, &parts);
        break;
    case QKV_RECEIVED:
        kernels->look_received(tile, sums, sums + t->plan->range * lanes_bytes);
        break;
    case QKV_INFLUENCE:
        of = values_of(t, key, sums);
        kernels->look_influence(tile, &of);
        break;
    }
}

/* What softmax makes of a row: its maximum, the factor of weights relative to it, and their log-sum-exp less the maximum. */
typedef struct { double m, factor, lse; } softmax_row;

static softmax_row finish_softmax(const qkv_problem *p, const qkv_plan *plan, double m, double l, int64_t query_head)
{
    softmax_row row = {m * plan->rest, 0, 0};
    double sink = p->sinks ? p->sinks[query_head] : -INFINITY, top = sink > row.m ? sink : row.m;
    double part = exp(row.m - top), sum = l * part + (sink == -INFINITY ? 0 : exp(sink - top));
    row.factor = part / sum;
    row.lse = top - row.m + log(sum);
    return row;
}

static void write_keys(const qkv_query_tile *t, const qkv_heaviest *list, int lane, const softmax_row *row, double l, int64_t at)
{
    const qkv_problem *p = t->problem;
    int64_t *keys = p->answer_keys + at * p->answer_n;
    for (int64_t i = 0; i < p->answer_n; i++) {
        int64_t place = i * t->plan->kernels->lanes + lane, key = -1;
        double score = i < list->n ? qkv_element(p, list->score, place) : -INFINITY, weight = 0;
        if (isnan(l)) {
            weight = NAN;
        } else if (score != -INFINITY) {
            key = p->type == QKV_F64 ? ((const int64_t *)list->key)[place] : ((const uint32_t *)list->key)[place];
            weight = exp(score * t->plan->rest - row->m) * row->factor;
        }
        keys[i] = key;
        qkv_set_element(p, p->answer, at * p->answer_n + i, weight);
    }
}

/* -sum p log p, where p = factor * 2^(c (S - m)), from the sums of these and of their product with S - m. */
static double entropy_of(const softmax_row *row, double l, double moment, double rest)
{
    double entropy = l == 0 ? 0 : row->factor * (l * row->lse - moment * rest);
    return entropy < 0 ? 0 : entropy;
}

void qkv_write_answer(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    for (int i = 0; i < t->panels && p->question != QKV_WEIGHTS; i++) {
        const qkv_panel *x = &t->panel[i];
        const void *ms = qkv_state_m(plan, x->state), *ls = qkv_state_l(plan, x->state);
        qkv_heaviest list = list_of(t, x, 0);
        qkv_row r = qkv_first_row(t, x);
        for (int j = 0; j < x->n; j++, qkv_next_row(&r)) {
            int64_t at = qkv_result_index(p, plan, t->sequence, t->head, &r);
            double m = qkv_element(p, ms, j), l = qkv_element(p, ls, j);
            softmax_row row = finish_softmax(p, plan, m, l, t->head * plan->group + r.head);
            if (p->question == QKV_LARGEST) {
                qkv_set_element(p, p->answer, at, m * plan->rest);
            } else if (p->question == QKV_ENTROPY) {
                qkv_set_element(p, p->answer, at, entropy_of(&row, l, qkv_element(p, x->state, j), plan->rest));
            } else if (p->question == QKV_NORMALISERS) {
                qkv_set_element(p, p->answer, 2 * at, m);
                qkv_set_element(p, p->answer, 2 * at + 1, row.factor);
            } else if (p->question == QKV_ROWS) {
                make_usable(&m, &row.factor);
                plan->kernels->weigh_row(answer_row(t, &r), p->answer_n, m, row.factor, plan->c);
            } else {
                write_keys(t, &list, j, &row, l, at);
            }
        }
    }
}

void qkv_begin_sums(const qkv_plan *plan, char *scratch)
{
    memset(scratch + plan->at_sums, 0, (size_t)(2 * plan->range * plan->kernels->vector * plan->kernels->size));
}

void qkv_write_sums(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t head, qkv_range keys,
                    const char *scratch)
{
    const char *sums = scratch + plan->at_sums;
    int64_t all = p->len_k, first = (sequence * p->heads_q + head) * all;
    if (p->k_starts) {
        all = p->k_starts[plan->sequences];
        first = head * all + p->k_starts[sequence];
        keys.hi = qkv_min(keys.hi, p->k_starts[sequence + 1] - p->k_starts[sequence]);
    }
    int w = plan->kernels->vector;
    for (int64_t i = keys.lo; i < keys.hi; i++) {
        double sum = 0, lost = 0;
        for (int j = 0; j < w; j++) {
            sum += qkv_element(p, sums, (i - keys.lo) * w + j);
            lost += qkv_element(p, sums, (plan->range + i - keys.lo) * w + j);
        }
        qkv_set_element(p, p->answer, first + i, isfinite(sum) ? sum + lost : sum);
    }
}

void qkv_begin_cells(const qkv_problem *p, const qkv_plan *plan, qkv_range columns, char *scratch)
{
    int64_t *bound = (int64_t *)(scratch + plan->at_bounds), first = columns.lo * plan->parts;
    memset(scratch + plan->at_sums, 0, (size_t)plan->range * sizeof(double));
    for (int64_t i = first; i <= columns.hi * plan->parts; i++)
        *bound++ = qkv_cell_first(i, p->len_k, all_parts(p, plan));
}

/* The row of cells of what has been counted, which then begins again. */
static void write_cells(const qkv_query_tile *t, qkv_range columns, int64_t row)
{
    const qkv_problem *p = t->problem;
    double *cell = (double *)(t->scratch + t->plan->at_sums);
    int64_t to = ((t->sequence * p->heads_q + t->head) * p->answer_rows + row) * p->answer_n;
    int64_t queries = qkv_cell_first(row + 1, p->len_q, p->answer_rows) - qkv_cell_first(row, p->len_q, p->answer_rows);
    const int64_t *bound = (const int64_t *)(t->scratch + t->plan->at_bounds);
    for (int64_t c = columns.lo; c < columns.hi; c++, bound += t->plan->parts) {
        double n = p->question == QKV_MEANS ? (double)queries * (double)(bound[t->plan->parts] - bound[0]) : 1;
        qkv_set_element(p, p->answer, to + c, *cell / n);
        *cell++ = 0;
    }
}

void qkv_count_cells(const qkv_query_tile *t, qkv_range columns)
{
    const qkv_problem *p = t->problem;
    const qkv_kernels *kernels = t->plan->kernels;
    double *cell = (double *)(t->scratch + t->plan->at_sums);
    int64_t row = qkv_cell_of(t->rows.lo, p->len_q, p->answer_rows);
    qkv_range seen = {0, 0};          /* of the task's columns */
    if (p->kept)                      /* the limits at hand are those of other keys */
        seen.hi = columns.hi - columns.lo;
    else if (t->any.lo < t->any.hi)
        seen = (qkv_range){qkv_cell_of(t->any.lo, p->len_k, p->answer_n) - columns.lo,
                           qkv_cell_of(t->any.hi - 1, p->len_k, p->answer_n) - columns.lo + 1};
    for (int64_t query = t->rows.lo, end, last; query < t->rows.hi; query = last) {
        const qkv_panel *x = &t->panel[(query - t->rows.lo) / kernels->lanes];
        int64_t lane = query - x->row;
        const char *factors = qkv_state_l(t->plan, x->state);
        end = qkv_cell_first(row + 1, p->len_q, p->answer_rows);
        last = qkv_min(end, x->row + x->n);
        (p->question == QKV_MEANS ? kernels->pour_sums : kernels->pour_maxima)(
            cell + seen.lo, seen.hi - seen.lo, x->state + (seen.lo * t->plan->parts * kernels->lanes + lane) * kernels->size,
            t->plan->parts, factors + lane * kernels->size, (int)(last - query));
        if (last == end)
            write_cells(t, columns, row++);
    }
}

/* The mean of some outputs of the tile's head, of those that are finite and not all 0, which say nothing of values. */
static void find_centre(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    char *centre = t->scratch + t->plan->at_centre;
    int64_t queries = qkv_queries(p, t->sequence), step = (queries + CENTRE_ROWS - 1) / CENTRE_ROWS;
    int rows = 0;
    for (int64_t d = 0; d < p->dim_v; d++)
        qkv_set_element(p, centre, d, 0);
    for (int64_t i = 0; i < queries; i += step) {
        qkv_row r = {.position = i, .beams = 1, .group = 1};
        const void *o = qkv_output_row(t, &r);
        double sum = 0;
        for (int64_t d = 0; d < p->dim_v; d++)
            sum += fabs(qkv_element(p, o, d));
        if (sum == 0 || !isfinite(sum))
            continue;
        rows++;
        for (int64_t d = 0; d < p->dim_v; d++)
            qkv_set_element(p, centre, d, qkv_element(p, centre, d) + (qkv_element(p, o, d) - qkv_element(p, centre, d))
                            / rows);
    }
}

int qkv_centre_values(const qkv_query_tile *t, qkv_range keys)
{
    const qkv_plan *plan = t->plan;
    int64_t size = plan->kernels->size;
    find_centre(t);
    return plan->kernels->centre_values(t->scratch + plan->at_v + keys.lo * plan->copy_row_v * size, (ptrdiff_t)plan->copy_row_v,
                                        t->scratch + plan->at_centre, t->scratch + plan->at_sizes + keys.lo * size,
                                        (int)(keys.hi - keys.lo), (int)t->problem->dim_v);
}

void qkv_write_heavy(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        qkv_row r = qkv_first_row(t, x);
        for (int j = 0; j < x->n; j++, qkv_next_row(&r)) {
            int64_t key = heavy_of(t, x, j);
            if (key < 0)
                continue;
            /* A log-sum-exp that is not theirs may make several keys heavy, in several tasks: the last one counts. */
            /* An array of int64_t is shared as atomic ones, which have its size and alignment where they need no lock. */
            _Atomic int64_t *to = (_Atomic int64_t *)p->answer_keys + qkv_result_index(p, t->plan, t->sequence, t->head, &r);
            int64_t was = atomic_load_explicit(to, memory_order_relaxed);
            while (was < key && !atomic_compare_exchange_weak(to, &was, key))
                continue;
        }
    }
}

int qkv_has_heavy(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t head, int64_t tile)
{
    int64_t rows = plan->tile_panels * plan->kernels->lanes;
    int64_t last = qkv_min((tile + 1) * rows, qkv_queries(p, sequence) * plan->group);
    qkv_row r = qkv_row_of(tile * rows, 1, plan->group);
    for (int64_t i = tile * rows; i < last; i++, qkv_next_row(&r))
        if (p->answer_keys[qkv_result_index(p, plan, sequence, head, &r)] >= 0)
            return 1;
    return 0;
}

void qkv_write_moved(const qkv_query_tile *t)
{
    const qkv_problem *p = t->problem;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        void *const *without = qkv_finish_rows(t, x);
        qkv_row r = qkv_first_row(t, x);
        for (int j = 0; j < x->n; j++, qkv_next_row(&r)) {
            int64_t at = qkv_result_index(p, t->plan, t->sequence, t->head, &r);
            if (p->answer_keys[at] < 0)
                continue;
            const void *o = qkv_output_row(t, &r);
            double sum = 0;
            for (int64_t d = 0; d < p->dim_v; d++) {
                double moved = qkv_element(p, o, d) - qkv_element(p, without[j], d);
                sum += moved * moved;
            }
            qkv_set_element(p, p->answer, at, sum);
        }
    }
}

/* Of a row: its heaviest group so far and the weight of that; the group that is less, and is merged with the rest; what makes weights
 * of its scores. */
typedef struct {
    int64_t group, lesser;
    double weight, lesser_weight, m, factor;
} qkv_share;

_Static_assert(sizeof(qkv_share) <= QKV_SHARE_BYTES, "shares overlap in scratch");

static char *group_state(const qkv_query_tile *t, size_t at, int panel)
{
    return t->scratch + at + (size_t)panel * t->plan->state_bytes;
}

static qkv_share *shares_of(const qkv_query_tile *t, int panel)
{
    return (qkv_share *)(t->scratch + t->plan->at_shares) + (size_t)panel * (size_t)t->plan->kernels->lanes;
}

static void empty_state(const qkv_query_tile *t, int panel, char *state)
{
    const qkv_plan *plan = t->plan;
    plan->kernels->reset(state, qkv_state_m(plan, state), qkv_state_l(plan, state), t->panel[panel].nv, (int)t->problem->dim_v);
}

/* Squares of the distances of a panel's outputs from what a state says: element j is that of lane j. */
static const void *distances(const qkv_query_tile *t, int panel, char *state)
{
    const qkv_plan *plan = t->plan;
    char *squares = t->scratch + plan->at_s, *outputs = t->scratch + plan->at_outputs;
    size_t bytes = (size_t)t->problem->dim_v * qkv_lanes_bytes(plan);
    plan->kernels->distance(squares, outputs + (size_t)panel * bytes, state, qkv_state_l(plan, state), t->panel[panel].nv,
                            (int)t->problem->dim_v);
    return squares;
}

void qkv_begin_groups(const qkv_query_tile *t)
{
    const qkv_plan *plan = t->plan;
    size_t bytes = (size_t)t->problem->dim_v * qkv_lanes_bytes(plan);
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        qkv_share *share = shares_of(t, i);
        qkv_row r = qkv_first_row(t, x);
        qkv_pack_outputs(t, x, t->scratch + plan->at_outputs + (size_t)i * bytes, 1);
        qkv_begin_state(t, x, group_state(t, plan->at_rest, i));
        empty_state(t, i, group_state(t, plan->at_best, i));
        for (int j = 0; j < x->n; j++, qkv_next_row(&r)) {
            share[j] = (qkv_share){.group = -1};
            share[j].m = normaliser_of(t, &r, &share[j].factor);
        }
    }
}

void qkv_begin_group(const qkv_query_tile *t, uint64_t chosen)
{
    for (int i = 0; i < t->panels; i++)
        if (chosen >> i & 1)
            empty_state(t, i, t->panel[i].total);
}

/* Lane j of two states, the other way round. */
static void exchange(const qkv_query_tile *t, char *a, char *b, int j)
{
    size_t size = (size_t)t->plan->kernels->size, row = qkv_lanes_bytes(t->plan);
    char *m = qkv_state_m(t->plan, a), kept[sizeof(double)];
    for (int64_t e = 0; e < t->problem->dim_v + 2; e++) {
        size_t at = (size_t)j * size + (e < t->problem->dim_v ? (size_t)e * row : (size_t)(m - a) + (size_t)(e - t->problem->dim_v) * row);
        memcpy(kept, a + at, size);
        memcpy(a + at, b + at, size);
        memcpy(b + at, kept, size);
    }
}

void qkv_settle_group(const qkv_query_tile *t, int64_t group, double *sums)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        char *own = x->total, *best = group_state(t, plan->at_best, i), *rest = group_state(t, plan->at_rest, i);
        qkv_share *share = shares_of(t, i);
        for (int j = 0; j < x->n; j++) {
            double m = qkv_element(p, qkv_state_m(plan, own), j), l = qkv_element(p, qkv_state_l(plan, own), j);
            /* Equal maxima may be infinite, and their difference NaN. */
            double part = m == share[j].m ? 1 : exp((m - share[j].m) * plan->rest);
            double weight = l == 0 ? 0 : l * part * share[j].factor;
            share[j].lesser = l == 0 ? -1 : group;
            share[j].lesser_weight = weight;
            if (group >= 0 && l != 0 && (share[j].group < 0 || weight > share[j].weight)) {
                share[j].lesser = share[j].group;
                share[j].lesser_weight = share[j].weight;
                share[j].group = group;
                share[j].weight = weight;
                exchange(t, own, best, j);
            }
        }
        const void *apart = distances(t, i, own);
        for (int j = 0; j < x->n; j++) {
            double w = share[j].lesser_weight / (1 - share[j].lesser_weight);
            if (share[j].lesser >= 0)
                sums[share[j].lesser] += w * w * qkv_element(p, apart, j);
        }
        plan->kernels->merge(rest, qkv_state_m(plan, rest), qkv_state_l(plan, rest), own, qkv_state_m(plan, own),
                             qkv_state_l(plan, own), x->nv, (int)p->dim_v, plan->c);
    }
}

void qkv_end_groups(const qkv_query_tile *t, double *sums)
{
    const qkv_problem *p = t->problem;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        const qkv_share *share = shares_of(t, i);
        for (int whole = 0; whole < 2; whole++) {       /* groups that have more than half: all others are the output without */
            const void *apart = distances(t, i, group_state(t, whole ? t->plan->at_rest : t->plan->at_best, i));
            for (int j = 0; j < x->n; j++) {
                double w = whole ? 1 : share[j].weight / (1 - share[j].weight);
                if (share[j].group >= 0 && (share[j].weight > 0.5) == whole)
                    sums[share[j].group] += w * w * qkv_element(p, apart, j);
            }
        }
    }
}
