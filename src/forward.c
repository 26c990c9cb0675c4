/* The forward pass: walk the grid of query tiles, feed key tiles to the kernel, write O and the log-sum-exp.
 *
 * A task is one query tile (some panels of rows that share K and V) against all its keys, or against one chunk of them
 * if the problem is split. Order within a task: chunk -> pass -> panel -> block, so that the K and V of a pass stay in
 * L2 while every panel sees them, and a panel's Q^T, S^T and O^T stay in L1 while it walks the pass's blocks.
 *
 * Chunks always start from an empty state and merge in order of position, whoever computed them: that keeps the error
 * of long sums small, and the result the same bits for any number of threads.
 */
#include "forward.h"

#include <stdatomic.h>
#include <string.h>

#include "backward.h"
#include "beams.h"
#include "call.h"
#include "decode.h"
#include "elements.h"
#include "mask.h"
#include "memory.h"
#include "spotlight.h"
#include "tile.h"
#include "types.h"

enum { MAX_VECTOR = 64 };             /* elements of a vector */
enum { MAX_LANES = 4 * MAX_VECTOR };  /* and of a panel's row */

/* The keys [first, last) of one pass, and their K and V. */
typedef struct {
    int64_t first, last;
    const qkv_run *run;               /* that has the first of them */
    const char *k, *v;                /* NULL: not yet needed */
    int careful;                      /* of gradients: they are not finite */
    ptrdiff_t k_row, v_row;           /* elements */
    qkv_ahead ahead;                  /* of the block at hand, for the first panel of the pass */
} pass_rows;

static void reset(const qkv_query_tile *t, char *state, int nv)
{
    const qkv_plan *plan = t->plan;
    plan->kernels->reset(state, qkv_state_m(plan, state), qkv_state_l(plan, state), nv, (int)t->problem->dim_v);
}

static void merge(const qkv_query_tile *t, char *total, char *state, int nv)
{
    const qkv_plan *plan = t->plan;
    plan->kernels->merge(total, qkv_state_m(plan, total), qkv_state_l(plan, total), state, qkv_state_m(plan, state),
                         qkv_state_l(plan, state), nv, (int)t->problem->dim_v, plan->c);
}

/* The run that has a key, of those from r on. */
static const qkv_run *run_with(const qkv_run *r, int64_t key)
{
    while (r->first + r->count <= key)
        r++;
    return r;
}

/* Its row of K or V, of the first head and sequence. */
static const char *row_of(const qkv_run *r, int values, int64_t key, const qkv_strides *at)
{
    return (values ? r->v : r->k) + (key - r->first) * at->row;
}

/* K or V of a pass, in scratch from `copy` on. */
static void copy_rows(const qkv_query_tile *t, const pass_rows *kv, int values, char *copy)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    const qkv_strides *at = values ? &p->v_at : &p->k_at;
    int64_t first = kv->first, last = kv->last;
    int64_t offset = values ? t->v_offset : t->k_offset;
    int64_t d = values ? p->dim_v : p->dim, copy_row = values ? plan->copy_row_v : plan->copy_row_k;
    const qkv_run *r = kv->run;
    int pair = values ? plan->kernels->pair : 1;
    t->counters->tiles_copied++;
    for (int64_t key = first, n; key < last; key += n) {
        r = run_with(r, key);
        int64_t end = qkv_min(last, r->first + r->count);
        char *data = (char *)row_of(r, values, key, at) + offset;
        qkv_rows from = qkv_rows_at(p, values, data);
        n = end - key;
        if (end < last && n > pair) {
            n -= n % pair;
        } else if (end < last && n < pair) {            /* a pair whose keys lie in two runs */
            from.row = (ptrdiff_t)((uintptr_t)row_of(run_with(r, end), values, end, at) - (uintptr_t)data) + offset;
            n = pair;
        }
        if (values)
            plan->kernels->gather_values(copy, copy_row, &from, (int)(key - first), (int)n, (int)d);
        else
            plan->kernels->gather_terms(copy + (key - first) * copy_row * plan->kernels->size, copy_row, &from, (int)n, (int)d);
    }
}

/* K or V of a pass: where they lie if one run holds them all as the kernels want them, else a copy. */
static const char *fetch(const qkv_query_tile *t, const pass_rows *kv, int values, ptrdiff_t *row)
{
    const qkv_plan *plan = t->plan;
    const qkv_strides *at = values ? &t->problem->v_at : &t->problem->k_at;
    if (!(values ? plan->copy_v : plan->copy_k) && kv->last <= kv->run->first + kv->run->count) {
        *row = (ptrdiff_t)(at->row / plan->kernels->size);
        return row_of(kv->run, values, kv->first, at) + (values ? t->v_offset : t->k_offset);
    }
    char *copy = t->scratch + (values ? plan->at_v : plan->at_k);
    copy_rows(t, kv, values, copy);
    *row = (ptrdiff_t)(values ? plan->copy_row_v : plan->copy_row_k);
    return copy;
}

/* The K and V of a pass, fetched when the first tile needs them: a mask may hide them all. */
static void need(const qkv_query_tile *t, pass_rows *kv)
{
    if (!kv->k) {
        kv->k = fetch(t, kv, 0, &kv->k_row);
        kv->v = kv->k;
        kv->v_row = kv->k_row;
        if ((t->plan->values || t->problem->question == QKV_GRADIENTS) && !t->plan->one)
            kv->v = fetch(t, kv, 1, &kv->v_row);
        kv->careful = t->problem->question == QKV_GRADIENTS
            && !qkv_are_finite(t, (qkv_range){kv->first, kv->last}, kv->k, kv->k_row, kv->v, kv->v_row);
    }
}

/* One more of n spans: K or V of the keys [first, last) that lie in the run. Returns how many there are then. */
static int add_span(const qkv_query_tile *t, pass_rows *kv, int n, int values, int64_t first, int64_t last)
{
    const qkv_problem *p = t->problem;
    const qkv_strides *at = values ? &p->v_at : &p->k_at;
    int64_t bytes = values ? qkv_row_bytes(p->v_type, p->dim_v) : qkv_row_bytes(p->k_type, p->dim);
    int64_t rows = qkv_min(last, kv->run->first + kv->run->count) - first;
    if (rows <= 0)
        return n;
    const char *data = row_of(kv->run, values, first, at) + (values ? t->v_offset : t->k_offset);
    int whole = at->row == bytes;     /* one long row */
    kv->ahead.span[n] = whole ? (qkv_span){data, 0, 1, rows * bytes, 0} : (qkv_span){data, (ptrdiff_t)at->row, rows, bytes, 0};
    return n + 1;
}

/* What to ask for while the first panel of a pass is at work on the block [first, last): its K, unless it is not the chunk's
 * first (then the block before has asked), its V, and the K of the block behind it, of those before `end`. Where passes are copied
 * it is what lies as far into the next. NULL: nothing, runs meet in the pass. */
static qkv_ahead *look_ahead(const qkv_query_tile *t, pass_rows *kv, int64_t first, int64_t last, int64_t end, int begun)
{
    const qkv_plan *plan = t->plan;
    if (kv->last > kv->run->first + kv->run->count)
        return NULL;
    int n = 0, soon = 2 * plan->kernels->row_tile;      /* keys that are read before what is asked for could come */
    kv->ahead = (qkv_ahead){.rate = begun ? 1 : 2};
    if (plan->copy_k | plan->copy_v) {
        first += kv->last - kv->first;
        last = qkv_min(first + plan->block, end);
        n = add_span(t, kv, n, 0, first, last);
        if (plan->values && !plan->one)
            add_span(t, kv, n, 1, first, last);
        return &kv->ahead;
    }
    if (!begun)
        n = add_span(t, kv, n, 0, first + soon, last);
    if (t->plan->values && !t->plan->one)
        n = add_span(t, kv, n, 1, first, last);
    add_span(t, kv, n, 0, last, qkv_min(last + plan->block, end));
    return &kv->ahead;
}

/* One kernel call: `tile`, the lanes of a panel from `lane` on, against the keys [first, last) of a pass, in the block that
 * begins at block_first. What is done with them is values, or what is asked instead. */
static void attend_keys(const qkv_query_tile *t, const qkv_panel *x, int lane, pass_rows *kv, int64_t block_first,
                        int64_t first, int64_t last, qkv_tile *tile)
{
    const qkv_kernels *kernels = t->plan->kernels;
    need(t, kv);
    tile->k_row = kv->k_row;
    tile->v_row = kv->v_row;
    tile->k = kv->k + (first - kv->first) * kv->k_row * (int64_t)kernels->size;
    tile->v = kv->v + (first - kv->first) / kernels->pair * kv->v_row * (int64_t)kernels->size;
    tile->nk = (int)(last - first);
    tile->skew = (int)(first - block_first);
    int32_t without[MAX_LANES];
    if (t->problem->question == QKV_MOVED) {
        for (int j = 0; j < tile->nv * kernels->vector; j++) {
            int64_t key = x->without[lane + j];
            without[j] = first <= key && key < last ? (int32_t)(key - first) : -1;
        }
        tile->without = without;
    }
    if (t->problem->question == QKV_GRADIENTS)
        qkv_add_gradients(t, x, lane, first, tile, kv->careful);
    else if (t->plan->values)
        kernels->attend(tile);
    else
        qkv_ask(t, x, lane, first, tile);
}

/* What the mask and the bias make of the keys [first, *last) for a vector of lanes; sets the mask where it hides some, and cuts off
 * last keys that the bias hides from all. */
static qkv_kind look(const qkv_query_tile *t, const qkv_panel *x, int lane, int64_t first, int64_t *last, qkv_changes *changes)
{
    int w = t->plan->kernels->vector;
    qkv_kind kind = t->plan->masked ? qkv_look(&t->elements, &x->lanes, lane, w, first, *last, changes) : QKV_FULL;
    if (kind != QKV_SKIP && t->problem->bias)
        *last = qkv_bias_end(&t->elements, &x->lanes, lane, w, first, *last);
    return *last == first ? QKV_SKIP : kind;
}

/* A whole panel whose rows all see the keys [first, last) as far as positions say, or up to `whole.lo` and `whole.hi`; 0 if the
 * mask leaves vectors out. */
static int attend_full(const qkv_query_tile *t, const qkv_panel *x, pass_rows *kv, int64_t block_first, int64_t first,
                       int64_t last, qkv_tile whole)
{
    int w = t->plan->kernels->vector, n = x->nv * w, partial = 0, skipped = 0;
    int64_t end = t->problem->bias ? first : last;
    const uint8_t *const *mask = NULL;
    if (t->problem->mask && !t->elements.summary) {
        qkv_set_mask(&t->elements, &x->lanes, 0, n, first, last, &whole.changes);
        mask = whole.changes.mask;
    }
    for (int i = 0; (t->plan->masked || t->problem->bias) && i < n; i += w) {
        int64_t seen = last;
        whole.changes.mask = mask ? mask + i : NULL;
        qkv_kind kind = look(t, x, i, first, &seen, &whole.changes);
        partial += kind == QKV_PARTIAL;
        skipped += kind == QKV_SKIP;
        end = qkv_max(end, seen);
    }
    if (skipped > 0 && skipped < x->nv)
        return 0;
    last = end;
    whole.changes.mask = partial ? mask : NULL;
    if (partial && !mask)
        qkv_set_mask(&t->elements, &x->lanes, 0, n, first, last, &whole.changes);
    partial = whole.lo ? x->nv - skipped : partial;
    t->counters->tiles_full += x->nv - partial - skipped;
    t->counters->tiles_partial += partial;
    t->counters->tiles_skipped += skipped;
    if (skipped)
        return 1;
    if (t->plan->adjust)
        qkv_set_changes(&t->elements, &x->lanes, 0, n, block_first, first, last, &whole.changes);
    attend_keys(t, x, 0, kv, block_first, first, last, &whole);
    return 1;
}

/* Whole row tiles of the block: a hidden key more is cheaper than a row by itself. */
static void round_out(const qkv_plan *plan, int64_t block_first, int64_t block_last, int64_t *first, int64_t *last)
{
    int64_t rows = plan->kernels->row_tile;
    *first = block_first + (*first - block_first) / rows * rows;
    *last = qkv_min(block_last, *last + (rows - (*last - block_first) % rows) % rows);
}

/* Which of the keys [first, last) lanes see, from lane `from` on, as a kernel takes it. */
static void set_limits(const qkv_panel *x, int from, int n, int64_t first, int64_t last, int32_t *lo, int32_t *hi)
{
    for (int j = 0; j < n; j++) {
        qkv_range keys = x->rows[from + j];
        lo[j] = (int32_t)(qkv_min(qkv_max(keys.lo, first), last) - first);
        hi[j] = (int32_t)(qkv_min(qkv_max(keys.hi, first), last) - first);
    }
}

/* Whether the panel's vectors see so many of the keys [first, last) that gradients take all of them at once: a product of the lanes
 * of a vector is short, and takes longer by half than its share of a panel's. */
static int is_mostly_seen(const qkv_panel *x, int64_t first, int64_t last)
{
    int64_t seen = 0;
    for (int i = 0; i < x->nv; i++) {
        int64_t lo = first, hi = last;
        if (qkv_cut(&x->limits[1 + i], &lo, &hi) != QKV_SKIP)
            seen += hi - lo;
    }
    return 3 * seen >= 2 * x->nv * (last - first);
}

/* One panel against the keys [first, last) of one block. */
static void attend_block(const qkv_query_tile *t, const qkv_panel *x, pass_rows *kv, int64_t first, int64_t last,
                         qkv_ahead *ahead, int careful)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    const qkv_kernels *kernels = plan->kernels;
    size_t size = (size_t)kernels->size;
    int64_t block_first = first, block_last = last;
    int w = kernels->vector;
    qkv_tile whole = {
        .q = x->q, .s = t->scratch + plan->at_s,
        .o = x->state, .m = qkv_state_m(plan, x->state), .l = qkv_state_l(plan, x->state), .c = plan->c,
        .d = (int)plan->terms, .dv = (int)p->dim_v, .nv = x->nv, .ahead = ahead,
        .careful = careful || !plan->values,            /* no second look at a question about scores */
        .peaked = t->peaked,
    };
    qkv_kind kind = qkv_cut(&x->limits[0], &first, &last);
    if (kind == QKV_SKIP) {
        t->counters->tiles_skipped += x->nv;
        return;
    }
    int aligned = (first - block_first) % kernels->aligned == 0;
    if (kind == QKV_FULL && !careful && aligned && attend_full(t, x, kv, block_first, first, last, whole))
        return;
    int32_t lo[MAX_LANES], hi[MAX_LANES];
    if (kind == QKV_PARTIAL && p->question == QKV_GRADIENTS && is_mostly_seen(x, first, last)) {
        round_out(plan, block_first, block_last, &first, &last);
        set_limits(x, 0, x->nv * w, first, last, lo, hi);
        whole.lo = lo;
        whole.hi = hi;
        if (attend_full(t, x, kv, block_first, first, last, whole))
            return;
    }
    /* Rows of the panel see different keys: vector by vector, each cut down to its own, wastes least. */
    for (int i = 0; i < x->nv; i++) {
        first = block_first;
        last = block_last;
        kind = qkv_cut(&x->limits[1 + i], &first, &last);
        if (kind == QKV_PARTIAL)
            round_out(plan, block_first, block_last, &first, &last);
        qkv_tile one = whole;
        int64_t more = kind == QKV_FULL ? (first - block_first) % kernels->aligned : 0;
        int limited = kind == QKV_PARTIAL || more;
        first -= more;
        if (kind != QKV_SKIP) {
            qkv_kind seen = look(t, x, i * w, first, &last, &one.changes);
            kind = seen == QKV_FULL ? kind : seen;
        }
        if (kind == QKV_SKIP) {
            t->counters->tiles_skipped++;
            continue;
        }
        if (plan->adjust)
            qkv_set_changes(&t->elements, &x->lanes, i * w, w, block_first, first, last, &one.changes);
        size_t shift = (size_t)i * (size_t)w * size;
        one.q = (const char *)whole.q + shift;
        one.s = (char *)whole.s + shift;
        one.o = (char *)whole.o + shift;
        one.m = (char *)whole.m + shift;
        one.l = (char *)whole.l + shift;
        one.nv = 1;
        if (limited)
            set_limits(x, i * w, w, first, last, lo, hi);
        one.lo = limited ? lo : NULL;
        one.hi = limited ? hi : NULL;
        if (kind == QKV_PARTIAL)
            t->counters->tiles_partial++;
        else
            t->counters->tiles_full++;
        attend_keys(t, x, i * w, kv, block_first, first, last, &one);
    }
}

/* Every chosen panel against the keys [begin, end), which begin at a block, as far as some row sees them. What comes before a
 * sequence's start is not read, so a block may begin there: by itself, for pairs of keys are counted from where a pass begins. */
static void walk_keys(const qkv_query_tile *t, int64_t begin, int64_t end, uint64_t chosen, int careful)
{
    const qkv_plan *plan = t->plan;
    begin = qkv_max(qkv_max(begin, t->any.lo / plan->block * plan->block), qkv_start(t->problem, t->sequence));
    end = qkv_min(end, t->any.hi);
    const qkv_run *run = t->problem->runs + qkv_first_run(t->problem, t->sequence);
    for (int64_t first = begin, last; first < end; first = last) {
        int64_t cut = first % plan->block;                              /* by the sequence's start */
        last = qkv_min(cut ? first + plan->block - cut : first + plan->pass, end);
        int cold = plan->cold;        /* for the first panel that walks this pass */
        run = run_with(run, first);
        pass_rows kv = {.first = first, .last = last, .run = run};
        for (int i = 0; i < t->panels; i++) {
            if (!(chosen >> i & 1))
                continue;
            const qkv_panel *x = &t->panel[i];
            if (last == t->any.hi && !t->problem->question)
                qkv_expect_writing(t, x);
            for (int64_t key = first; key < last; key += plan->block) {
                int64_t next = qkv_min(key + plan->block, last);
                qkv_ahead *ahead = cold ? look_ahead(t, &kv, key, next, end, key > begin) : NULL;
                attend_block(t, x, &kv, key, next, ahead, careful);
            }
            cold = 0;
        }
    }
}

/* Every chosen panel against the keys of one chunk; leaves the chunk's own state in each panel's `state`. */
static void attend_chunk(const qkv_query_tile *t, int64_t chunk, uint64_t chosen, int careful)
{
    const qkv_plan *plan = t->plan;
    for (int i = 0; i < t->panels; i++)
        if (chosen >> i & 1)
            reset(t, t->panel[i].state, t->panel[i].nv);
    if (plan->kernels->begin)         /* a chunk at a time: Python may run between them */
        plan->kernels->begin();
    walk_keys(t, chunk * plan->chunk, (chunk + 1) * plan->chunk, chosen, careful);
    if (plan->kernels->end)
        plan->kernels->end();
}

/* The totals of the chosen panels before the first key. */
static void begin_totals(const qkv_query_tile *t, uint64_t chosen)
{
    for (int i = 0; i < t->panels; i++)
        if (chosen >> i & 1)
            qkv_begin_state(t, &t->panel[i], t->panel[i].total);
}

/* The chunks that have what some row sees. */
static qkv_range chunks_of(const qkv_query_tile *t)
{
    int64_t first = qkv_first_chunk(t->plan, t->any);
    return (qkv_range){first, t->any.lo < t->any.hi ? (t->any.hi - 1) / t->plan->chunk + 1 : first};
}

/* One chunk of the chosen panels merged into `total`. */
static void merge_chunk(const qkv_query_tile *t, int64_t chunk, uint64_t chosen, int careful)
{
    attend_chunk(t, chunk, chosen, careful);
    for (int i = 0; i < t->panels; i++)
        if (chosen >> i & 1)
            merge(t, t->panel[i].total, t->panel[i].state, t->panel[i].nv);
}

/* All of them. Returns 0 if the call is given up before the last. */
static int merge_chunks(qkv_call *job, int worker, const qkv_query_tile *t, uint64_t chosen, int careful)
{
    qkv_range chunks = chunks_of(t);
    for (int64_t chunk = chunks.lo; chunk < chunks.hi; chunk++) {
        merge_chunk(t, chunk, chosen, careful);
        if (chunk + 1 < chunks.hi && qkv_must_stop(&job->stop, worker))
            return 0;
    }
    return 1;
}

/* The chosen panels' `total`. Returns 0 if the call is given up. */
static int attend_tile(qkv_call *job, int worker, const qkv_query_tile *t, uint64_t chosen, int careful)
{
    if (!t->plan->merges) {
        attend_chunk(t, 0, chosen, careful);
        return 1;
    }
    begin_totals(t, chosen);
    return merge_chunks(job, worker, t, chosen, careful);
}

/* The panels whose result is not finite. */
static uint64_t not_finite(const qkv_query_tile *t)
{
    const qkv_plan *plan = t->plan;
    uint64_t found = 0;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        if (!plan->kernels->finite(x->total, qkv_state_l(plan, x->total), x->nv, (int)t->problem->dim_v))
            found |= (uint64_t)1 << i;
    }
    return found;
}

/* With `total` of every panel computed on the assumption that V is finite: the panels that run again and take nothing from
 * excluded keys. Their result is not finite, so a hidden NaN may have met a weight of 0. */
static uint64_t to_repeat(const qkv_query_tile *t)
{
    uint64_t again = not_finite(t);
    for (uint64_t bits = again; bits; bits &= bits - 1)
        t->counters->panels_careful++;
    return again;
}

static void conclude(qkv_call *job, int worker, const qkv_query_tile *t)
{
    uint64_t again = to_repeat(t);
    if (!again || attend_tile(job, worker, t, again, 1))
        qkv_write_tile(t);
}

/* One chunk of a split tile, counted from the first that it sees. Whoever computes a tile's last missing chunk merges them
 * all, in order. */
static void attend_split(qkv_call *job, int worker, const qkv_query_tile *t, int64_t base, int64_t chunk)
{
    const qkv_plan *plan = job->plan;
    uint64_t all = ~(uint64_t)0;
    char *mine = job->partials + (size_t)(base * plan->chunks) * (size_t)plan->tile_panels * plan->state_bytes;
    size_t chunk_bytes = (size_t)plan->tile_panels * plan->state_bytes;
    attend_chunk(t, qkv_first_chunk(plan, t->any) + chunk, all, 0);
    memcpy(mine + (size_t)chunk * chunk_bytes, t->panel[0].state, (size_t)t->panels * plan->state_bytes);
    t->counters->splits++;
    if (atomic_fetch_sub(&job->pending[base], 1) != 1)
        return;
    for (int i = 0; i < t->panels; i++) {
        const qkv_panel *x = &t->panel[i];
        qkv_begin_state(t, x, x->total);
        for (int64_t c = 0; c < plan->chunks; c++)
            merge(t, x->total, mine + (size_t)c * chunk_bytes + (size_t)i * plan->state_bytes, x->nv);
    }
    conclude(job, worker, t);
}

/* Every panel asks what it sees of some keys, in order: first of those that no window hides. A state goes through all of them.
 * Returns 0 if the call is given up before the last. */
static int ask_keys(qkv_call *job, int worker, qkv_query_tile *t, qkv_range keys)
{
    const qkv_plan *plan = t->plan;
    for (int kept = t->problem->kept > 0; kept >= 0; kept--) {
        if (t->problem->kept)
            qkv_find_limits(t, kept);
        int64_t lo = qkv_max(keys.lo, t->any.lo), hi = qkv_min(keys.hi, t->any.hi);
        for (int64_t first = lo / plan->block * plan->block, next; first < hi; first = next) {
            next = t->problem->question == QKV_GRADIENTS ? hi : qkv_min((first / plan->chunk + 1) * plan->chunk, hi);
            walk_keys(t, first, next, ~(uint64_t)0, 0);
            if ((next < hi || kept) && qkv_must_stop(&job->stop, worker))
                return 0;
        }
    }
    return 1;
}

/* The answer to what is asked of each query. */
static void answer_queries(qkv_call *job, int worker, qkv_query_tile *t)
{
    const qkv_problem *p = job->problem;
    qkv_range keys = {0, INT64_MAX};
    if (p->question == QKV_WEIGHTS)
        keys = (qkv_range){p->answer_first, p->answer_first + p->answer_n};
    qkv_begin_answer(t);
    if (ask_keys(job, worker, t, keys))
        qkv_write_answer(t);
}

/* Number `index` of the ranges of `size` that n things are shared out to. */
static qkv_range task_range(int64_t index, int64_t size, int64_t n)
{
    return (qkv_range){index * size, qkv_min((index + 1) * size, n)};
}

/* How far rows move without a key of theirs; most have all. */
static void answer_moved(qkv_call *job, int worker, const qkv_query_tile *t)
{
    if (!attend_tile(job, worker, t, ~(uint64_t)0, 0))
        return;
    uint64_t again = to_repeat(t);
    if (!again || attend_tile(job, worker, t, again, 1))
        qkv_write_moved(t);
}

/* The chosen panels' state of one group, from its runs of keys. */
static int attend_group(qkv_call *job, int worker, qkv_query_tile *t, const qkv_members *run, const qkv_members *end, uint64_t chosen,
                        int careful)
{
    qkv_begin_group(t, chosen);
    for (; run < end; run++) {
        qkv_take_range(t, (qkv_range){run->first, run->last});
        if (!merge_chunks(job, worker, t, chosen, careful))
            return 0;
    }
    return 1;
}

/* How far a part of the queries of a head move without each group: all groups in order, the heaviest of each row kept apart. */
static void answer_groups(qkv_call *job, int64_t task, int worker)
{
    const qkv_problem *p = job->problem;
    const qkv_plan *plan = job->plan;
    int64_t sequence = task / QKV_PARTS / plan->heads, head = task / QKV_PARTS % plan->heads, part = task % QKV_PARTS;
    /* Its tiles are those that the sequence has alone, however long others are: in this order its queries are summed. */
    int64_t queries = qkv_queries(p, sequence), panels = (queries + plan->kernels->lanes - 1) / plan->kernels->lanes;
    int64_t rows = qkv_max(1, qkv_min(plan->tile_panels, (panels + QKV_PARTS - 1) / QKV_PARTS)) * plan->kernels->lanes;
    int64_t tiles = (queries + rows - 1) / rows, each = (tiles + QKV_PARTS - 1) / QKV_PARTS;
    const qkv_members *first = p->members + (p->members_of ? p->members_of[sequence] : 0);
    const qkv_members *last = p->members + (p->members_of ? p->members_of[sequence + 1] : p->n_members);
    double *sums = (double *)p->answer + task * p->answer_n;
    for (int64_t tile = part * each; tile < qkv_min(tiles, (part + 1) * each); tile++) {
        qkv_query_tile t;
        qkv_open_tile(&t, p, plan, sequence, head, (qkv_range){tile * rows, qkv_min((tile + 1) * rows, queries)},
                      (qkv_range){0, p->len_k}, job->summary, job->scratch[worker] + sizeof(qkv_counters),
                      (qkv_counters *)job->scratch[worker]);
        qkv_begin_groups(&t);
        for (const qkv_members *run = first, *end; run < last; run = end) {
            for (end = run + 1; end < last && end->group == run->group;)
                end++;
            if (!attend_group(job, worker, &t, run, end, ~(uint64_t)0, 0))
                return;
            uint64_t again = to_repeat(&t);
            if (again && !attend_group(job, worker, &t, run, end, again, 1))
                return;
            qkv_settle_group(&t, run->group, sums);
            if (qkv_must_stop(&job->stop, worker))
                return;
        }
        qkv_end_groups(&t, sums);
    }
}

/* The values of a range of keys, as far as some query can see them, less their centre; returns whether they are finite. */
static int prepare_values(const qkv_query_tile *t, qkv_range keys)
{
    const qkv_problem *p = t->problem;
    const qkv_plan *plan = t->plan;
    qkv_range seen = qkv_reach(p, t->sequence, 0, qkv_queries(p, t->sequence) - 1);
    pass_rows kv = {.first = qkv_max(keys.lo, seen.lo), .last = qkv_min(keys.hi, seen.hi)};
    kv.last = qkv_max(kv.first, kv.last);
    /* Hidden keys beside them are in the kernels' row tiles, with weights of 0. */
    int64_t size = plan->kernels->size, row = plan->copy_row_v * size, n = keys.hi - keys.lo;
    memset(t->scratch + plan->at_v, 0, (size_t)(n * row));
    memset(t->scratch + plan->at_sizes, 0, (size_t)(n * size));
    if (kv.first < kv.last) {
        kv.run = run_with(p->runs + qkv_first_run(p, t->sequence), kv.first);
        copy_rows(t, &kv, 1, t->scratch + plan->at_v + (kv.first - keys.lo) * row);
    }
    return qkv_centre_values(t, (qkv_range){kv.first - keys.lo, kv.last - keys.lo});
}

/* All queries of a head, in order, meet a range of keys. Returns 0 if the call is given up before the last. */
static int meet_keys(qkv_call *job, int worker, int64_t sequence, int64_t head, qkv_range keys)
{
    const qkv_problem *p = job->problem;
    const qkv_plan *plan = job->plan;
    char *scratch = job->scratch[worker] + sizeof(qkv_counters);
    int64_t tiles = qkv_tiles_of(p, plan, sequence);
    int prepared = p->question != QKV_INFLUENCE, finite = 1, gradients = p->question == QKV_GRADIENTS;
    for (int64_t tile = 0; tile < tiles; tile++) {
        qkv_range rows = qkv_tile_rows(p, plan, sequence, tile);
        qkv_range seen = qkv_reach(p, sequence, rows.lo / plan->group, (rows.hi - 1) / plan->group);
        if ((seen.lo >= keys.hi && p->kept <= keys.lo) || seen.hi <= keys.lo)
            continue;
        qkv_query_tile t;
        qkv_open_tile(&t, p, plan, sequence, head, rows, keys, job->summary, scratch, (qkv_counters *)job->scratch[worker]);
        t.first = keys.lo;
        if (!prepared)
            finite = prepare_values(&t, keys);
        prepared = 1;
        t.not_finite = !finite;
        (gradients ? qkv_begin_gradients : qkv_begin_answer)(&t);
        if (!ask_keys(job, worker, &t, keys))
            return 0;
        if (p->question == QKV_INFLUENCE)
            qkv_write_heavy(&t);
        if (gradients)
            qkv_write_query_gradients(&t);
        if (qkv_must_stop(&job->stop, worker))
            return 0;
    }
    return 1;
}

/* The answer to what is asked of each key of a range. */
static void answer_keys(qkv_call *job, int64_t task, int worker)
{
    const qkv_problem *p = job->problem;
    const qkv_plan *plan = job->plan;
    int64_t sequence = task / plan->ranges / plan->heads, head = task / plan->ranges % plan->heads;
    char *scratch = job->scratch[worker] + sizeof(qkv_counters);
    qkv_range keys = task_range(task % plan->ranges, plan->range, p->len_k);
    qkv_begin_sums(plan, scratch);
    if (meet_keys(job, worker, sequence, head, keys))
        qkv_write_sums(p, plan, sequence, head, keys, scratch);
}

/* The gradients of a part of the keys, range by range, and what they give to those of queries. Parts of the first keys come first:
 * under a causal mask they are the heavy ones. */
static void answer_gradients(qkv_call *job, int64_t task, int worker)
{
    const qkv_problem *p = job->problem;
    const qkv_plan *plan = job->plan;
    char *scratch = job->scratch[worker] + sizeof(qkv_counters);
    int64_t all = plan->sequences * plan->heads, tasks = plan->together ? 1 : all, part = task / tasks;
    qkv_range heads = plan->together ? (qkv_range){0, all} : (qkv_range){task % tasks, task % tasks + 1};
    qkv_range keys = plan->in_turn ? (qkv_range){0, p->len_k} : task_range(part, plan->share, p->len_k);
    int64_t i;
    for (i = heads.lo; i < heads.hi; i++) {
        for (int64_t first = keys.lo; first < keys.hi; first += plan->range) {
            qkv_range some = {first, qkv_min(first + plan->range, keys.hi)};
            qkv_begin_key_gradients(p, plan, scratch);
            if (!meet_keys(job, worker, i / plan->heads, i % plan->heads, some))
                return;
            qkv_write_key_gradients(p, plan, i / plan->heads, i % plan->heads, some, scratch);
        }
    }
    if (p->dq_parts && atomic_fetch_sub(&job->pending[task % tasks], 1) == 1)
        for (i = heads.lo; i < heads.hi; i++)
            qkv_join_query_gradients(p, plan, i / plan->heads, i % plan->heads);
}

/* The answer to what is asked of some rows and columns of cells: the queries of these rows in order. */
static void answer_cells(qkv_call *job, int64_t task, int worker)
{
    const qkv_problem *p = job->problem;
    const qkv_plan *plan = job->plan;
    char *scratch = job->scratch[worker] + sizeof(qkv_counters);
    int64_t tasks = (p->answer_rows + plan->cell_rows - 1) / plan->cell_rows, head = task / plan->ranges / tasks;
    qkv_range rows = task_range(tasks - 1 - task / plan->ranges % tasks, plan->cell_rows, p->answer_rows);
    qkv_range columns = task_range(task % plan->ranges, plan->range, p->answer_n);
    qkv_range queries = {qkv_cell_first(rows.lo, p->len_q, p->answer_rows), qkv_cell_first(rows.hi, p->len_q, p->answer_rows)};
    qkv_range keys = {qkv_cell_first(columns.lo, p->len_k, p->answer_n), qkv_cell_first(columns.hi, p->len_k, p->answer_n)};
    qkv_range seen = qkv_reach(p, head / plan->heads, queries.lo, queries.hi - 1);
    if ((seen.lo >= keys.hi && p->kept <= keys.lo) || seen.hi <= keys.lo)
        return;
    qkv_begin_cells(p, plan, columns, scratch);
    int64_t most = plan->tile_panels * plan->kernels->lanes;
    for (int64_t first = queries.lo; first < queries.hi; first += most) {
        qkv_range some = {first, qkv_min(first + most, queries.hi)};
        qkv_query_tile t;
        qkv_open_tile(&t, p, plan, head / plan->heads, head % plan->heads, some, keys, job->summary, scratch,
                      (qkv_counters *)job->scratch[worker]);
        t.first = columns.lo;
        qkv_begin_answer(&t);
        if (!ask_keys(job, worker, &t, keys) || qkv_must_stop(&job->stop, worker))
            return;
        qkv_count_cells(&t, columns);
    }
}

/* Query tile number `index` of the grid: sequences x key heads x tiles, of which each sequence may have its own number. */
typedef struct { int64_t sequence, head, tile; } place;

static place find_tile(const qkv_call *job, int64_t index)
{
    int64_t sequence, tiles = job->plan->tiles, heads = job->plan->head_tasks, each = job->plan->task_heads;
    if (job->first_tile) {
        int64_t past = job->plan->sequences;            /* first_tile[sequence] <= index < first_tile[past] */
        for (sequence = 0; past - sequence > 1;) {
            int64_t middle = (sequence + past) / 2;
            if (job->first_tile[middle] <= index)
                sequence = middle;
            else
                past = middle;
        }
        index -= job->first_tile[sequence];
        tiles = (job->first_tile[sequence + 1] - job->first_tile[sequence]) / heads;
    } else {
        sequence = index / tiles / heads;
        index -= sequence * heads * tiles;
    }
    /* Late rows first: under a causal mask they are the heavy ones. */
    if (job->plan->heads_inner)
        return (place){sequence, index % heads * each, tiles - 1 - index / heads};
    return (place){sequence, index / tiles * each, tiles - 1 - index % tiles};
}

static void open_place(const qkv_call *job, int worker, place at, qkv_query_tile *t)
{
    const qkv_problem *p = job->problem;
    qkv_open_tile(t, p, job->plan, at.sequence, at.head, qkv_tile_rows(p, job->plan, at.sequence, at.tile), (qkv_range){0, p->len_k},
                  job->summary, job->scratch[worker] + sizeof(qkv_counters), (qkv_counters *)job->scratch[worker]);
}

/* Some heads that share copies of a bias or mask: all of them meet a chunk before the next. */
static void attend_heads(qkv_call *job, int worker, place at)
{
    const qkv_plan *plan = job->plan;
    const uint64_t all = ~(uint64_t)0;
    int64_t end = qkv_min(at.head + plan->task_heads, plan->heads);
    memset(job->scratch[worker] + sizeof(qkv_counters) + plan->at_kept, 0, plan->kept_bytes);
    for (int64_t n = 0, last = 0; n <= last; n++)
        for (place one = at; one.head < end; one.head++) {
            qkv_query_tile t;
            open_place(job, worker, one, &t);
            qkv_range chunks = chunks_of(&t);
            last = qkv_max(0, chunks.hi - chunks.lo - 1);
            if (plan->merges && n == 0)
                begin_totals(&t, all);
            if (!plan->merges)
                attend_chunk(&t, 0, all, 0);
            else if (chunks.lo + n < chunks.hi)
                merge_chunk(&t, chunks.lo + n, all, 0);
            if (n == last)
                conclude(job, worker, &t);
            if ((n < last || one.head + 1 < end) && qkv_must_stop(&job->stop, worker))
                return;
        }
}

static void run_task(void *context, int64_t task, int worker)
{
    qkv_call *job = context;
    const qkv_plan *plan = job->plan;
    qkv_counters *counters = (qkv_counters *)job->scratch[worker];
    int64_t base = plan->split ? task / plan->chunks : task, chunk = plan->split ? task % plan->chunks : 0;
    if (atomic_load_explicit(&job->stop.stop, memory_order_relaxed))
        return;
    counters->tasks++;
    if (plan->by_key) {
        answer_keys(job, task, worker);
        return;
    }
    if (job->problem->question == QKV_GRADIENTS) {
        answer_gradients(job, task, worker);
        return;
    }
    if (qkv_asks_cells(job->problem)) {
        answer_cells(job, task, worker);
        return;
    }
    if (job->problem->question == QKV_GROUPS) {
        answer_groups(job, task, worker);
        return;
    }
    place at = find_tile(job, base);
    if (qkv_has_few(job->problem, plan, at.sequence)) {
        qkv_decode(job, worker, at.sequence, at.head, at.tile, base, chunk);
        return;
    }
    if (job->problem->question == QKV_MOVED && !qkv_has_heavy(job->problem, plan, at.sequence, at.head, at.tile))
        return;
    if (plan->task_heads > 1) {
        attend_heads(job, worker, at);
        return;
    }
    qkv_query_tile t;
    open_place(job, worker, at, &t);
    if (job->problem->question == QKV_MOVED)
        answer_moved(job, worker, &t);
    else if (job->problem->question)
        answer_queries(job, worker, &t);
    else if (plan->split)
        attend_split(job, worker, &t, base, chunk);
    else if (attend_tile(job, worker, &t, ~(uint64_t)0, 0))
        conclude(job, worker, &t);
}

static void summarise_task(void *context, int64_t task, int worker)
{
    qkv_call *job = context;
    int64_t rows = job->plan->summary_task, first = task * rows;
    (void)worker;
    qkv_summarise(job->problem, job->plan, first, qkv_min(first + rows, job->plan->summary_rows), job->summary);
}

static void add_counters(qkv_counters *to, const qkv_counters *from)
{
    to->tiles_full += from->tiles_full;
    to->tiles_partial += from->tiles_partial;
    to->tiles_skipped += from->tiles_skipped;
    to->tiles_copied += from->tiles_copied;
    to->panels_careful += from->panels_careful;
    to->splits += from->splits;
    to->tasks += from->tasks;
}

/* What all workers share: partial states, first tiles and the mask's summary, in one block. Returns 0 without memory. */
static int take_shared(qkv_call *job, int slot, char **block)
{
    const qkv_plan *plan = job->plan;
    const qkv_problem *p = job->problem;
    size_t bases = (size_t)plan->bases, partials = plan->split ? plan->partial_bytes : 0;
    *block = NULL;
    if (!plan->shared_bytes)
        return 1;
    *block = qkv_scratch_take(plan->shared_bytes, slot);
    if (!*block)
        return 0;
    job->partials = *block;
    job->pending = (_Atomic int64_t *)(*block + partials);
    for (size_t i = 0; i < bases; i++)
        atomic_init(&job->pending[i], plan->tasks / plan->bases);
    if (plan->summary_bytes)
        job->summary = (uint8_t *)*block + plan->shared_bytes - plan->summary_bytes;
    if (qkv_is_uneven(p)) {
        int64_t *first = (int64_t *)(job->pending + bases);
        job->first_tile = first;
        first[0] = 0;
        for (int64_t b = 0; b < plan->sequences; b++)
            first[b + 1] = first[b] + plan->head_tasks * qkv_tiles_of(p, plan, b);
    }
    return 1;
}

qkv_status qkv_run_plan(const qkv_problem *p, const qkv_plan *plan)
{
    char *scratch[QKV_MAX_THREADS] = {0}, *shared = NULL;
    qkv_call job = {.problem = p, .plan = plan, .scratch = scratch, .stop = qkv_stop_if(p->interrupted, p->interrupted_arg)};
    int workers = qkv_pool_acquire((int)qkv_min(plan->threads, QKV_MAX_THREADS), plan->small);
    qkv_status status = QKV_NO_MEMORY;
    for (int i = 0; i < workers; i++) {
        scratch[i] = qkv_scratch_take(sizeof(qkv_counters) + plan->scratch_bytes, i);
        if (!scratch[i])
            goto done;
        memset(scratch[i], 0, sizeof(qkv_counters));
    }
    if (!take_shared(&job, workers, &shared))
        goto done;
    int (*check)(void *) = p->interrupted ? qkv_ask_to_stop : NULL;
    int64_t pieces = job.summary ? (plan->summary_rows + plan->summary_task - 1) / plan->summary_task : 0;
    int stopped = pieces && qkv_pool_run(workers, pieces, summarise_task, &job, check, &job.stop);
    stopped = stopped || qkv_pool_run(workers, plan->tasks, run_task, &job, check, &job.stop);
    status = stopped || job.stop.stop ? QKV_INTERRUPTED : QKV_OK;
    for (int i = 0; i < workers && p->counters; i++)
        add_counters(p->counters, (const qkv_counters *)scratch[i]);
    if (p->counters)
        p->counters->threads = qkv_max(p->counters->threads, workers);

done:
    for (int i = 0; i < workers; i++)
        qkv_scratch_put(scratch[i], i);
    qkv_scratch_put(shared, workers);
    if (plan->threads > 1)            /* else no pool was asked for, and its clock need not be read */
        qkv_pool_release(workers);
    return status;
}

qkv_status qkv_forward(const qkv_problem *p)
{
    qkv_plan plan;
    qkv_problem folded;
    p = qkv_fold(p, &folded);
    qkv_status status = qkv_make_plan(p, &plan);
    if (status != QKV_OK || plan.tasks == 0 || (p->dim_v == 0 && !p->lse && !p->answer))
        return status;
    return qkv_run_plan(p, &plan);
}
