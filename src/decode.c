/* Few query rows: those of one key head of one sequence at once, of several beams that share its keys, against its keys chunk by chunk.
 *
 * A chunk is scored piece by piece (a piece lies in one run, or was copied to scratch), its scores become weights, then
 * its values are added up by the same pieces. Between the two products the scores of a chunk lie in scratch, (rows, chunk).
 * Chunks start from an empty state and merge in order of position, whoever computed them, as in forward.c.
 * Where all weights are asked for (ROWS), those of a chunk go into the answer relative to its maximum; once all are there
 * they are taken to that of their row.
 */
#include "decode.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "elements.h"
#include "mask.h"
#include "rows.h"
#include "tile.h"
#include "types.h"

/* What scores meet by element: of all rows, and in the chunk at hand. */
typedef struct {
    qkv_elements elements;
    qkv_lanes lanes;
    qkv_changes changes;
} changes;

typedef struct {
    const qkv_problem *problem;
    const qkv_plan *plan;
    int64_t sequence, head;           /* head: a key head */
    int64_t first, count;             /* rows */
    int64_t k_offset, v_offset, q_offset, out_offset;   /* bytes to them */
    qkv_range *sees;                  /* (rows): keys */
    qkv_range any;                    /* that some row sees */
    int32_t *lo, *hi;                 /* (rows): positions in the chunk at hand */
    uint64_t hidden;                  /* blocks of it that a mask hides from all rows, a bit each */
    int64_t run;                      /* where the last piece lay */
    int64_t base;                     /* of the chunk at hand: its first key, */
    qkv_range keys;                   /* and those that some row sees */
    qkv_stack stack;
    char *scratch;
    qkv_counters *counters;
    changes *changes;                 /* filled if scores are adjusted */
} few;

static qkv_row first_row(const few *t)
{
    return qkv_row_of(t->first, t->plan->beams, t->plan->group);
}

static void find_limits(few *t)
{
    t->any = qkv_no_limits().any;
    qkv_row row = first_row(t);
    for (int64_t r = 0; r < t->count; r++, qkv_next_row(&row)) {
        t->sees[r] = r > 0 && !qkv_begins_query(&row) ? t->sees[r - 1] : qkv_visible(t->problem, t->sequence, row.position);
        if (t->sees[r].lo < t->sees[r].hi) {
            t->any.lo = qkv_min(t->any.lo, t->sees[r].lo);
            t->any.hi = qkv_max(t->any.hi, t->sees[r].hi);
        }
    }
}

static void stack_queries(few *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    const void **rows = (const void **)(t->scratch + plan->few.at_rows);
    qkv_row row = first_row(t);
    for (int64_t r = 0; r < t->count; r++, qkv_next_row(&row)) {
        char *from = (char *)p->q + t->q_offset + qkv_row_offset(&row, &p->q_at);
        rows[r] = from;
        if (plan->few.obstacles_q) {
            char *copy = t->scratch + plan->few.at_copies + (size_t)(r * p->dim) * (size_t)plan->few.kernels->size;
            qkv_rows one = {from, 0, (ptrdiff_t)p->q_at.dim, p->type, p->swapped_q};
            plan->few.kernels->gather_terms(copy, 0, &one, 1, (int)p->dim);
            rows[r] = copy;
        }
    }
    plan->few.kernels->decode_stack(t->scratch + plan->few.at_q, plan->few.q_row, rows, (int)t->count, (int)p->dim,
                                plan->q_factor);
}

/* The state whose O, m and l follow one another at `state`. */
static void use_state(few *t, char *state)
{
    t->stack.o = state;
    t->stack.m = state + t->count * t->plan->few.o_row * t->plan->few.kernels->size;
    t->stack.l = state + (int64_t)t->plan->few.state_bytes - (int64_t)t->plan->few.l_bytes;
}

/* What changes scores, row by row. */
static void open_changes(few *t)
{
    const qkv_plan *plan = t->plan;
    int64_t vector = plan->few.kernels->vector;
    changes *x = t->changes;
    x->elements = (qkv_elements){
        .problem = t->problem, .plan = plan, .sequence = t->sequence, .head = t->head, .block = plan->chunk,
        .bias_rows = (const void **)(t->scratch + plan->few.at_pointers),
        .mask_rows = (const uint8_t **)(t->scratch + plan->few.at_pointers) + t->count,
        .bias_copies = t->scratch + plan->few.at_bias, .mask_copies = t->scratch + plan->few.at_mask,
        .key_copies = t->scratch + plan->few.at_keys,
    };
    x->changes = (qkv_changes){0};
    qkv_open_lanes(&x->elements, &x->lanes, t->first, t->count, (t->count + vector - 1) / vector * vector, 0,
                   t->scratch + plan->few.at_lanes);
}

/* Number i of the key heads that are taken together, of which `head` is the first. */
static void open_rows(few *t, const qkv_call *job, int worker, int64_t sequence, int64_t head, int i, int64_t tile, changes *changes)
{
    const qkv_problem *p = job->problem;
    const qkv_plan *plan = job->plan;
    char *scratch = job->scratch[worker] + sizeof(qkv_counters) + (size_t)i * plan->few.head_bytes;
    head += i;
    *t = (few){
        .problem = p, .plan = plan, .sequence = sequence, .head = head, .first = tile * plan->few.rows,
        .count = qkv_min(plan->few.rows, qkv_queries(p, sequence) * plan->each - tile * plan->few.rows),
        .scratch = scratch, .counters = (qkv_counters *)job->scratch[worker], .changes = changes,
        .sees = (qkv_range *)(scratch + plan->few.at_limits), .run = qkv_first_run(p, sequence),
    };
    t->lo = (int32_t *)(t->sees + t->count);
    t->hi = t->lo + t->count;
    t->stack = (qkv_stack){
        .q = scratch + plan->few.at_q, .s = scratch + plan->few.at_s, .parts = scratch + plan->few.at_parts, .sums = scratch + plan->few.at_sums,
        .q_row = (ptrdiff_t)plan->few.q_row, .s_row = (ptrdiff_t)plan->few.s_row, .o_row = (ptrdiff_t)plan->few.o_row,
        .lo = t->lo, .hi = t->hi, .c = plan->c, .rows = (int)t->count, .d = (int)p->dim, .dv = (int)p->dim_v,
        .k_scales = (ptrdiff_t)qkv_scales_at(p, 0), .v_scales = (ptrdiff_t)qkv_scales_at(p, 1),
        .streams = plan->few.streams, .careful = p->question != QKV_VALUES,
    };
    t->q_offset = qkv_rows_offset(p, &p->q_at, sequence) + head * plan->group * p->q_at.head;
    t->out_offset = qkv_rows_offset(p, &p->out_at, sequence) + head * plan->group * p->out_at.head;
    t->k_offset = head * p->k_at.head + (p->run_of ? 0 : qkv_sequence_offset(p, &p->k_at, sequence));
    t->v_offset = head * p->v_at.head + (p->run_of ? 0 : qkv_sequence_offset(p, &p->v_at, sequence));
    find_limits(t);
    if (plan->adjust)
        open_changes(t);
    stack_queries(t);
}

/* K or V of the keys from `first` on, to `last` or to the end of their run, which becomes the last. */
static qkv_rows rows_from(few *t, int values, int64_t first, int64_t *last)
{
    const qkv_problem *p = t->problem;
    const qkv_strides *at = values ? &p->v_at : &p->k_at;
    while (p->runs[t->run].first > first)
        t->run--;
    while (p->runs[t->run].first + p->runs[t->run].count <= first)
        t->run++;
    const qkv_run *run = &p->runs[t->run];
    char *data = (char *)(values ? run->v : run->k) + (values ? t->v_offset : t->k_offset) + (first - run->first) * at->row;
    *last = qkv_min(*last, run->first + run->count);
    return qkv_rows_at(p, values, data);
}

/* The same, where they lie or a copy; the bytes from row to row, and the type. */
static const char *piece(few *t, int values, int64_t first, int64_t *last, ptrdiff_t *row, int *as)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    qkv_rows from = rows_from(t, values, first, last);
    if (!values && plan->few.columns) {
        *last = qkv_min(*last, first + QKV_COLUMN_KEYS);
        *row = from.col;
        *as = from.type;
        return from.data;
    }
    if (!qkv_few_obstacles(plan, values, t->count)) {
        *row = from.row;
        *as = from.type;
        return from.data;
    }
    *last = qkv_min(*last, first + plan->few.pass);
    ptrdiff_t copy_row = (ptrdiff_t)(values ? plan->few.copy_row_v : plan->few.copy_row_k);
    *row = copy_row * plan->few.kernels->size;
    *as = qkv_arithmetic(p->type);
    char *copy = t->scratch + (values ? plan->few.at_v : plan->few.at_k);
    plan->few.kernels->gather_terms(copy, copy_row, &from, (int)(*last - first), (int)(values ? p->dim_v : p->dim));
    t->counters->tiles_copied++;
    return copy;
}

/* Values of the keys from `first` on, of [begin, end) that some row sees, where pairs of keys are multiplied: from an even key
 * to an even one. Two whose runs differ, or of which one lies outside, are put side by side, with 0 for what is outside. */
static const char *even_piece(few *t, int64_t *first, int64_t *last, int64_t begin, int64_t end, ptrdiff_t *row, int *as)
{
    rows_from(t, 1, *first, last);
    if (*first % 2 == 0 && *last - *first > 1) {
        *last -= *last % 2;
        return piece(t, 1, *first, last, row, as);
    }
    char *pair = t->scratch + t->plan->few.at_pair;
    int dim = (int)t->problem->dim_v;
    *row = (dim + 1) / 2 * t->plan->few.kernels->size;
    *first -= *first % 2;
    *last = *first + 2;
    for (int64_t key = *first, one; key < *last; key++, pair += *row) {
        one = key + 1;
        if (key < begin || key >= end) {
            memset(pair, 0, (size_t)*row);
        } else {
            qkv_rows from = rows_from(t, 1, key, &one);
            t->plan->few.kernels->gather_terms(pair, 0, &from, 1, dim);
        }
    }
    return t->scratch + t->plan->few.at_pair;
}

/* No positions of a chunk at all. */
static void see_nothing(few *t)
{
    t->stack.first = t->stack.last = 0;
    t->stack.changes = NULL;
    for (int64_t r = 0; r < t->count; r++)
        t->lo[r] = t->hi[r] = 0;
}

/* What the mask makes of the keys [first, last) of a chunk, as `hidden` and for the kernels. */
static qkv_kind look_through(few *t, int64_t first, int64_t last)
{
    int64_t block = t->plan->block;
    qkv_changes *changes = &t->changes->changes;
    int count = (int)t->count, found = 0;
    t->hidden = 0;
    changes->mask = NULL;
    if (t->problem->mask_from && last <= t->problem->mask_from[t->sequence])
        return QKV_FULL;
    qkv_set_mask(&t->changes->elements, &t->changes->lanes, 0, count, first, last, changes);
    for (int64_t key = first, end; key < last; key = end) {
        end = qkv_min(last, (key / block + 1) * block);
        int here = qkv_look_at(changes, count, key - first, end - key);
        t->hidden |= (uint64_t)(here == QKV_HIDDEN) << key % t->plan->chunk / block;
        found |= here;
    }
    if (found == QKV_SEEN)
        changes->mask = NULL;
    return found == QKV_HIDDEN ? QKV_SKIP : found == QKV_SEEN ? QKV_FULL : QKV_PARTIAL;
}

/* Cuts the keys [first, last) of a chunk down to those that some row sees, and says what they are to the rows. */
static qkv_kind look(few *t, int64_t *first, int64_t *last)
{
    qkv_limits limits = qkv_no_limits();
    for (int64_t r = 0; r < t->count; r++)
        qkv_add_row(&limits, (qkv_range){qkv_max(t->sees[r].lo, *first), qkv_min(t->sees[r].hi, *last)});
    qkv_kind kind = qkv_cut(&limits, first, last);
    if (kind == QKV_SKIP || !t->plan->masked)
        return kind;
    qkv_kind masked = look_through(t, *first, *last);
    return masked == QKV_FULL ? kind : masked;
}

/* What becomes of the scores of the keys [first, last) of a chunk, after its mask. */
static void find_changes(few *t, int64_t first, int64_t last)
{
    qkv_changes *changes = &t->changes->changes;
    int64_t base = first / t->plan->chunk * t->plan->chunk;
    qkv_set_changes(&t->changes->elements, &t->changes->lanes, 0, (int)t->count, base, first, last, changes);
    t->stack.changes = changes->adjust ? changes : NULL;
}

/* What each row sees of the keys [first, last) of the chunk that begins at `base`, of which none may be left. */
static void limit_rows(few *t, int64_t base, int64_t *first, int64_t *last)
{
    if (*first < *last) {
        qkv_kind kind = look(t, first, last);
        t->counters->tiles_skipped += kind == QKV_SKIP;
        t->counters->tiles_full += kind == QKV_FULL;
        t->counters->tiles_partial += kind == QKV_PARTIAL;
        *last = kind == QKV_SKIP ? *first : *last;
    }
    if (*first >= *last) {
        see_nothing(t);
        return;
    }
    t->stack.first = (int)(*first - base);
    t->stack.last = (int)(*last - base);
    for (int64_t r = 0; r < t->count; r++) {
        t->lo[r] = (int32_t)(qkv_min(qkv_max(t->sees[r].lo, *first), *last) - base);
        t->hi[r] = (int32_t)(qkv_max(qkv_min(t->sees[r].hi, *last) - base, t->lo[r]));
    }
}

/* The first key from `key` on in a block that is hidden, or that is not; `last` if there is none. */
static int64_t next_block(const few *t, int hidden, int64_t key, int64_t last)
{
    int64_t block = t->plan->block;
    if (!t->hidden)                   /* divisions are slow where a call has few keys */
        return hidden ? last : key;
    while (key < last && (int)(t->hidden >> key % t->plan->chunk / block & 1) != hidden)
        key = (key / block + 1) * block;
    return qkv_min(key, last);
}

/* Row r of the answer to ROWS. */
static char *answer_row(const few *t, int64_t r)
{
    qkv_row row = qkv_row_of(t->first + r, t->plan->beams, t->plan->group);
    int64_t at = qkv_result_index(t->problem, t->plan, t->sequence, t->head, &row);
    return (char *)t->problem->answer + at * t->problem->answer_n * t->plan->kernels->size;
}

/* The weights of a chunk into the answer; -1 for keys that a row does not see, as kernels that are careful have it. */
static void keep_weights(few *t, int64_t base)
{
    const qkv_problem *p = t->problem;
    int64_t size = t->plan->kernels->size, n = qkv_min(t->plan->chunk, p->answer_n - base);
    for (int64_t r = 0; r < t->count && n > 0; r++) {
        char *to = answer_row(t, r) + base * size;
        for (int64_t i = 0; i < n; i++)
            if (i < t->stack.first || i >= t->stack.last)
                qkv_set_element(p, to, i, -1);
        memcpy(to + t->stack.first * size, (const char *)t->stack.s + (r * t->stack.s_row + t->stack.first) * size,
               (size_t)((t->stack.last - t->stack.first) * size));
    }
}

/* Sets out for the keys of one chunk, from an empty state that is then at `state`. */
static void begin_chunk(few *t, int64_t chunk, char *state)
{
    t->base = chunk * t->plan->chunk;
    t->keys = (qkv_range){qkv_max(t->base, t->any.lo), qkv_min(t->base + t->plan->chunk, t->any.hi)};
    limit_rows(t, t->base, &t->keys.lo, &t->keys.hi);
    use_state(t, state);
    memset(state, 0, (size_t)(t->count * t->plan->few.o_row * t->plan->few.kernels->size));
}

/* Those of the chunk's keys that lie in [first, last), piece by piece: they are scored, or their values added up. */
static void meet_keys(few *t, int values, int64_t first, int64_t last)
{
    const qkv_kernels *kernels = t->plan->few.kernels;
    void (*score)(const qkv_stack *, const void *, ptrdiff_t, int, int, int) =
        t->plan->few.columns ? kernels->decode_score_columns : kernels->decode_score;
    const char *rows;
    ptrdiff_t row;
    int as;
    first = qkv_max(first, t->keys.lo);
    last = qkv_min(last, t->keys.hi);
    for (int64_t key = next_block(t, 0, first, last), end; key < last; key = next_block(t, 0, end, last)) {
        end = next_block(t, 1, key, last);
        rows = values && kernels->pair > 1 ? even_piece(t, &key, &end, t->keys.lo, t->keys.hi, &row, &as)
                                           : piece(t, values, key, &end, &row, &as);
        (values ? kernels->decode_value : score)(&t->stack, rows, row, as, (int)(key - t->base), (int)(end - key));
    }
}

/* The same for n key heads. Where rows of one key lie side by side a few keys go through all heads before the next: memory and
 * caches like them whole. */
static void meet_chunk(few *t, int n, int values)
{
    int64_t end = t->base + t->plan->chunk, step = n > 1 ? t->plan->few.kernels->decode_keys : t->plan->chunk;
    for (int64_t key = t->base; key < end; key += step)
        for (int i = 0; i < n; i++)
            meet_keys(t + i, values, key, key + step);
}

/* The states of one chunk's keys alone, of n key heads that have begun it. */
static void attend_chunk(few *t, int n)
{
    meet_chunk(t, n, 0);
    for (int i = 0; i < n; i++) {
        if (t->plan->adjust && t[i].keys.lo < t[i].keys.hi)
            find_changes(t + i, t[i].keys.lo, t[i].keys.hi);
        t->plan->few.kernels->decode_weigh(&t[i].stack);
    }
    if (t->problem->question)
        keep_weights(t, t->base);
    else
        meet_chunk(t, n, 1);
}

/* Of ROWS: m of the state of chunk number i, which it has until that of its row is known. */
static void keep_top(few *t, int64_t i, char *state)
{
    if (!t->problem->question)
        return;
    use_state(t, state);
    memcpy(t->scratch + t->plan->few.at_tops + (size_t)i * t->plan->few.l_bytes, t->stack.m,
           (size_t)(t->count * t->plan->few.kernels->size));
}

static void merge(few *t, char *total, char *state)
{
    use_state(t, state);
    qkv_stack of = t->stack;
    use_state(t, total);
    t->plan->few.kernels->decode_merge(&t->stack, of.o, of.m, of.l);
}

/* The total of no keys: the sinks. */
static void begin_total(few *t)
{
    char *total = t->scratch + t->plan->few.at_total;
    use_state(t, total);
    memset(total, 0, (size_t)(t->count * t->plan->few.o_row * t->plan->few.kernels->size));
    see_nothing(t);
    t->plan->few.kernels->decode_weigh(&t->stack);
    qkv_begin_sinks(t->problem, t->plan, t->head, t->first, t->count, t->stack.m, t->stack.l);
}

static char *total_of(const few *t) { return t->scratch + t->plan->few.at_total; }
static char *state_of(const few *t) { return t->scratch + t->plan->few.at_state; }

/* All chunks that some row sees, into the totals of n key heads. Returns 0 if the call is given up before the last. */
static int attend_all(qkv_call *job, int worker, few *t, int n)
{
    const qkv_plan *plan = t->plan;
    int64_t first = t->any.lo / plan->chunk, chunk = first, last = (t->any.hi - 1) / plan->chunk;
    if (t->any.lo >= t->any.hi || t->problem->sinks) {
        for (int i = 0; i < n; i++)
            begin_total(t + i);
    } else {                          /* what is merged into nothing stays as it is */
        for (int i = 0; i < n; i++)
            begin_chunk(t + i, chunk, total_of(t + i));
        attend_chunk(t, n);
        keep_top(t, 0, total_of(t));
        chunk++;
    }
    for (; t->any.lo < t->any.hi && chunk <= last; chunk++) {
        for (int i = 0; i < n; i++)
            begin_chunk(t + i, chunk, state_of(t + i));
        attend_chunk(t, n);
        keep_top(t, chunk - first, state_of(t));
        for (int i = 0; i < n; i++)
            merge(t + i, total_of(t + i), state_of(t + i));
        if (chunk < last && qkv_must_stop(&job->stop, worker))
            return 0;
    }
    return 1;
}

/* Writes O and the log-sum-exp of the total. Returns whether it was finite. */
static int write_rows(few *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    void **rows = (void **)(t->scratch + plan->few.at_rows);
    use_state(t, t->scratch + plan->few.at_total);
    qkv_row row = first_row(t);
    for (int64_t r = 0; r < t->count; r++, qkv_next_row(&row))
        rows[r] = plan->direct_out
            ? p->out + t->out_offset + qkv_row_offset(&row, &p->out_at)
            : t->scratch + plan->few.at_copies + (size_t)(r * p->dim_v) * (size_t)plan->few.kernels->size;
    int finite = plan->few.kernels->decode_finish(rows, &t->stack);
    row = first_row(t);
    for (int64_t r = 0; r < t->count && !plan->direct_out; r++, qkv_next_row(&row)) {
        qkv_rows to = {p->out + t->out_offset + qkv_row_offset(&row, &p->out_at), 0, (ptrdiff_t)p->out_at.dim,
                       p->out_type, p->swapped_out};
        plan->few.kernels->scatter(&to, rows[r], 0, 1, (int)p->dim_v);
    }
    if (p->lse)
        qkv_write_lse(p, plan, t->sequence, t->head, t->first, t->count, t->stack.m, t->stack.l);
    if (p->answer)
        qkv_write_normalisers(p, plan, t->sequence, t->head, t->first, t->count, t->stack.m, t->stack.l);
    return finite;
}

/* The weights of n keys, of which those that are hidden are -1, times a factor. */
static void scale_weights(void *weights, int64_t n, double factor, int wide)
{
    float *x = weights, f = (float)factor;
    double *y = weights;
    for (int64_t i = 0; i < n && !wide; i++)
        x[i] = x[i] < 0 ? 0 : x[i] * f;
    for (int64_t i = 0; i < n && wide; i++)
        y[i] = y[i] < 0 ? 0 : y[i] * factor;
}

/* Of ROWS: every chunk's weights, from its maximum to that of the total, and divided by their sum. */
static void finish_weights(few *t)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    int64_t size = plan->kernels->size, first = 0, last = 0;
    if (t->any.lo < t->any.hi) {
        first = t->any.lo / plan->chunk * plan->chunk;
        last = qkv_min(((t->any.hi - 1) / plan->chunk + 1) * plan->chunk, p->answer_n);
    }
    use_state(t, t->scratch + plan->few.at_total);
    for (int64_t r = 0; r < t->count; r++) {
        char *row = answer_row(t, r);
        double m = qkv_element(p, t->stack.m, r), l = qkv_element(p, t->stack.l, r);
        const char *top = t->scratch + plan->few.at_tops;
        memset(row, 0, (size_t)(first * size));
        memset(row + last * size, 0, (size_t)((p->answer_n - last) * size));
        for (int64_t key = first; key < last; key += plan->chunk, top += plan->few.l_bytes) {
            double own = qkv_element(p, top, r);        /* equal ones may be infinite, and their difference NaN */
            double factor = l == 0 ? 0 : (own == m ? 1 : exp2((own - m) * plan->c)) / l;
            scale_weights(row + key * size, qkv_min(plan->chunk, last - key), factor, p->type == QKV_F64);
        }
    }
}

/* With the total computed on the assumption that V is finite: write it. If it is not finite, a hidden NaN may have met a
 * weight of 0, so the rows run again and take nothing from excluded keys. */
static void conclude(qkv_call *job, int worker, few *t)
{
    if (t->problem->question) {
        finish_weights(t);
        return;
    }
    if (write_rows(t))
        return;
    t->counters->panels_careful++;
    t->stack.careful = 1;
    if (attend_all(job, worker, t, 1))
        write_rows(t);
}

/* One chunk of a split call, counted from the first that the rows see. Whoever computes the last missing one merges them all, in order. */
static void attend_split(qkv_call *job, int worker, few *t, int n, int64_t base, int64_t chunk)
{
    const qkv_plan *plan = job->plan;
    size_t chunk_bytes = (size_t)plan->tile_panels * plan->state_bytes, head_bytes = (size_t)plan->chunks * chunk_bytes;
    char *mine = job->partials + (size_t)(base * plan->few.heads) * head_bytes;
    for (int i = 0; i < n; i++)
        begin_chunk(t + i, qkv_first_chunk(plan, t->any) + chunk, mine + (size_t)i * head_bytes + (size_t)chunk * chunk_bytes);
    attend_chunk(t, n);
    t->counters->splits++;
    if (atomic_fetch_sub(&job->pending[base], 1) != 1)
        return;
    for (int i = 0; i < n; i++, mine += head_bytes) {
        begin_total(t + i);
        for (int64_t c = 0; c < plan->chunks; c++) {
            keep_top(t, c, mine + (size_t)c * chunk_bytes);
            merge(t + i, total_of(t + i), mine + (size_t)c * chunk_bytes);
        }
        conclude(job, worker, t + i);
    }
}

void qkv_decode(qkv_call *job, int worker, int64_t sequence, int64_t head, int64_t tile, int64_t base, int64_t chunk)
{
    few t[QKV_HEADS_TOGETHER];
    changes changes[QKV_HEADS_TOGETHER];
    int n = (int)qkv_min(job->plan->few.heads, job->plan->heads - head);
    for (int i = 0; i < n; i++)
        open_rows(t + i, job, worker, sequence, head, i, tile, changes + i);
    if (job->plan->split)
        attend_split(job, worker, t, n, base, chunk);
    else if (attend_all(job, worker, t, n))
        for (int i = 0; i < n; i++)
            conclude(job, worker, t + i);
}
