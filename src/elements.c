/* What scores meet by element: rows of a bias and of a mask, and what follows from a row's position, id and head.
 *
 * A kernel wants a row of adjacent elements for every lane. Rows that lie so are used where they are; of others, and of
 * segments in any order, the keys of a block are copied to scratch, once for lanes that share a row.
 */
#include "elements.h"

#include <stdlib.h>
#include <string.h>

#include "rows.h"
#include "types.h"

enum { MAX_LANES = 256 };

_Static_assert(QKV_LANE_BYTES >= 3 * sizeof(char *) + sizeof(int64_t) + sizeof(double) + sizeof(int32_t), "lanes overlap in scratch");

_Static_assert(QKV_END_BYTES >= sizeof(qkv_bias_seen), "ends overlap in scratch");

static const char *row_at(const char *data, const qkv_strides *at, int64_t offset, const qkv_row *r)
{
    return data ? data + offset + qkv_row_offset(r, at) : NULL;
}

void qkv_open_lanes(const qkv_elements *e, qkv_lanes *x, int64_t row, int64_t n, int64_t lanes, int64_t place, char *at)
{
    const qkv_problem *p = e->problem;
    x->n = n;
    x->place = place;
    x->bias = (const char **)at;
    x->mask = x->bias + lanes;
    x->summary = (const uint8_t **)(x->mask + lanes);
    x->position = (int64_t *)(x->summary + lanes);
    x->slope = (double *)(x->position + lanes);
    x->id = (int32_t *)(x->slope + lanes);
    int64_t head = e->head * e->plan->group;
    int64_t bias_offset = p->bias ? qkv_sequence_offset(p, &p->bias_at, e->sequence) + head * p->bias_at.head : 0;
    int64_t mask_offset = p->mask ? qkv_sequence_offset(p, &p->mask_at, e->sequence) + head * p->mask_at.head : 0;
    const qkv_strides *summary_at = &e->plan->summary_at;
    int64_t summary_offset = e->summary ? qkv_sequence_offset(p, summary_at, e->sequence) + head * summary_at->head : 0;
    int64_t position = qkv_offset(p, e->sequence), query = qkv_query_index(p, e->sequence, 0);
    qkv_row r = qkv_row_of(row, e->plan->beams, e->plan->group);
    for (int64_t j = 0; j < lanes; j++) {
        if (j > 0 && j < n)           /* lanes without a row repeat the last one, as in Q */
            qkv_next_row(&r);
        x->bias[j] = row_at(p->bias, &p->bias_at, bias_offset, &r);
        x->mask[j] = row_at(p->mask, &p->mask_at, mask_offset, &r);
        x->summary[j] = e->summary ? (const uint8_t *)row_at((const char *)e->summary, summary_at, summary_offset, &r) : NULL;
        x->position[j] = p->positions ? p->positions[query + r.position] : r.position + position;
        x->id[j] = p->q_ids ? p->q_ids[query + r.position] : 0;
        x->slope[j] = p->slopes ? p->slopes[head + r.head] : 0;
    }
}

/* Where a run of lanes ends that begins at j and whose rows lie `step` bytes one after the other. */
static int end_of_run(const char *const *rows, int j, int n, ptrdiff_t *step)
{
    int end = j + 1;
    *step = end < n ? (ptrdiff_t)((uintptr_t)rows[end] - (uintptr_t)rows[j]) : 0;
    while (end < n && (uintptr_t)rows[end] - (uintptr_t)rows[end - 1] == (uintptr_t)*step)
        end++;
    return end;
}

enum { SIDE = 8 };                    /* bytes of a word, and words of a square */

/* Of words `apart` from each other, the high bytes of one and the low ones of the other change places. */
static inline void exchange(uint64_t *x, int apart, uint64_t low)
{
    for (int i = 0; i < SIDE; i++)
        if (!(i & apart)) {
            uint64_t moved = (x[i] >> 8 * apart ^ x[i + apart]) & low;
            x[i + apart] ^= moved;
            x[i] ^= moved << 8 * apart;
        }
}

/* Eight lanes of eight keys whose lanes lie side by side. In words whose first byte is the highest, all is in the opposite order. */
static void copy_square(uint8_t *to, int64_t to_row, const char *from, ptrdiff_t key)
{
    const uint16_t one = 1;
    uint64_t x[SIDE];
    int last = *(const uint8_t *)&one ? 0 : SIDE - 1;
    for (int i = 0; i < SIDE; i++)
        memcpy(&x[i ^ last], from + i * key, SIDE);
    exchange(x, 4, 0x00000000ffffffff);
    exchange(x, 2, 0x0000ffff0000ffff);
    exchange(x, 1, 0x00ff00ff00ff00ff);
    for (int j = 0; j < SIDE; j++)
        memcpy(to + j * to_row, &x[j ^ last], SIDE);
}

/* Lanes of a mask, `lane` bytes apart, to rows of copies. Where lanes lie side by side, square by square: the last ones of an edge
 * are copied again. */
static void copy_mask(uint8_t *to, int64_t to_row, const char *from, ptrdiff_t lane, ptrdiff_t key, int lanes, int64_t keys)
{
    int64_t squares = lane == 1 && lanes >= SIDE && keys >= SIDE ? keys : 0;
    for (int64_t i = 0; i < squares; i += SIDE) {
        i = qkv_min(i, keys - SIDE);
        for (int j = 0; j < lanes; j += SIDE) {
            j = (int)qkv_min(j, lanes - SIDE);
            copy_square(to + j * to_row + i, to_row, from + i * key + j, key);
        }
    }
    for (int j = 0; j < lanes && !squares; j++)
        for (int64_t i = 0; i < keys; i++)
            to[j * to_row + i] = (uint8_t)from[i * key + j * lane];
}

/* n rows of a bias or mask, `step` bytes apart, to copies that are `to_row` bytes apart. */
static void copy_rows(const qkv_elements *e, int masks, char *to, size_t to_row, const char *from, ptrdiff_t step, int n, int64_t keys)
{
    const qkv_problem *p = e->problem;
    qkv_rows some = {(char *)from, step, (ptrdiff_t)p->bias_at.dim, p->bias_type, p->swapped_bias};
    if (masks)
        copy_mask((uint8_t *)to, (int64_t)to_row, from, step, p->mask_at.dim, n, keys);
    else
        e->plan->kernels->gather(to, (ptrdiff_t)to_row / e->plan->kernels->size, &some, n, (int)keys);
}

/* Copies that a task keeps of the rows of some lanes for a block of keys: where those of its head are. They are made for all of its heads
 * when the first of these needs them. */
static const char *kept_copies(const qkv_elements *e, const qkv_lanes *x, int masks, int64_t first)
{
    const qkv_problem *p = e->problem;
    const qkv_plan *plan = e->plan;
    const qkv_strides *at = masks ? &p->mask_at : &p->bias_at;
    const char *const *rows = masks ? x->mask : x->bias;
    const qkv_kept *kept = masks ? &plan->kept_mask : &plan->kept_bias;
    int64_t block = first / e->block, place = x->place * plan->places + block % plan->places, head = e->head % plan->task_heads;
    int64_t begin = block * e->block, keys = qkv_min(e->block, p->len_k - begin);
    int64_t *there = e->kept + (masks ? plan->tile_panels * plan->places : 0) + place;
    int heads = (int)qkv_min(kept->heads, plan->heads - (e->head - head));
    ptrdiff_t of_head = (ptrdiff_t)(plan->group * at->head), step;
    char *copies = (masks ? e->mask_copies : e->bias_copies) + (size_t)(place * kept->heads) * kept->head_bytes;
    for (int j = 0, end; j < x->n && *there != block + 1; j = end) {
        const char *from = rows[j] - head * of_head + begin * at->dim;
        end = end_of_run(rows, j, (int)x->n, &step);
        char *to = copies + (size_t)j * kept->row_bytes;
        if (heads > 1 && llabs(of_head) < llabs(step)) {
            copy_rows(e, masks, to, kept->head_bytes, from, of_head, heads, keys);
            end = j + 1;
        } else {
            for (int h = 0; h < heads; h++)
                copy_rows(e, masks, to + (size_t)h * kept->head_bytes, kept->row_bytes, from + h * of_head, step, step ? end - j : 1, keys);
        }
    }
    *there = block + 1;
    return copies + (size_t)(kept->heads > 1 ? head : 0) * kept->head_bytes + (size_t)(first - begin) * kept->size;
}

/* The lane whose copy a lane uses: the first of those next to it that have the same row. */
static int lane_of_copy(const char *const *rows, int lane)
{
    while (lane > 0 && rows[lane] == rows[lane - 1])
        lane--;
    return lane;
}

/* Rows of the bias at key `first`, for n lanes. */
static const void *const *bias_rows(const qkv_elements *e, const qkv_lanes *x, int lane, int n, int64_t first,
                                    int64_t last)
{
    const qkv_problem *p = e->problem;
    const qkv_plan *plan = e->plan;
    const void **rows = e->bias_rows;
    size_t row_bytes = (size_t)e->block * (size_t)plan->kernels->size;
    if (plan->kept_bias.heads) {
        const char *copies = kept_copies(e, x, 0, first);
        for (int j = 0; j < n; j++)
            rows[j] = copies + (size_t)lane_of_copy(x->bias, lane + j) * row_bytes;
        return rows;
    }
    for (int j = 0, end; j < n; j = end) {
        ptrdiff_t step;
        end = end_of_run(x->bias + lane, j, n, &step);
        char *from = (char *)x->bias[lane + j] + first * p->bias_at.dim, *copy = e->bias_copies + (size_t)j * row_bytes;
        if (!plan->direct_bias)
            copy_rows(e, 0, copy, row_bytes, from, step, step ? end - j : 1, last - first);
        for (int i = 0; i < end - j; i++)
            rows[j + i] = plan->direct_bias ? from + i * step : step ? copy + (size_t)i * row_bytes : copy;
    }
    return rows;
}

/* The first key of a sequence that the mask speaks of. */
static int64_t mask_from(const qkv_problem *p, int64_t sequence)
{
    return p->mask_from ? p->mask_from[sequence] : 0;
}

/* The ids of a sequence's keys. */
static const int32_t *key_ids(const qkv_problem *p, int64_t sequence)
{
    return p->k_ids + (p->k_starts ? p->k_starts[sequence] : sequence * p->len_k);
}

int64_t qkv_count_seen(const qkv_problem *p, int64_t sequence, int64_t beam, int64_t head, int64_t i, qkv_range keys)
{
    const char *mask = p->mask;
    int64_t before = mask ? qkv_max(0, qkv_min(keys.hi, mask_from(p, sequence)) - keys.lo) : 0;
    const int32_t *ids = p->q_ids ? key_ids(p, sequence) : NULL, id = p->q_ids ? p->q_ids[qkv_query_index(p, sequence, i)] : 0;
    int64_t seen = 0;
    if (mask)
        mask += qkv_sequence_offset(p, &p->mask_at, sequence) + beam * p->mask_at.beam + head * p->mask_at.head + i * p->mask_at.row
            - mask_from(p, sequence) * p->mask_at.dim;
    seen += before;
    keys.lo += before;
    if (!ids && p->mask_at.dim == 1)
        for (int64_t j = keys.lo, end; j < keys.hi; j = end) {
            uint8_t some = 0;         /* the compiler counts as many at a time as a vector has bytes */
            end = qkv_min(keys.hi, j + UINT8_MAX);
            for (int64_t k = j; k < end; k++)
                some += mask[k] != 0;
            seen += some;
        }
    else
        for (int64_t j = keys.lo; j < keys.hi; j++)
            seen += (!mask || mask[j * p->mask_at.dim]) && (!ids || ids[j] == id);
    return seen;
}

void qkv_set_mask(const qkv_elements *e, const qkv_lanes *x, int lane, int n, int64_t first, int64_t last, qkv_changes *to)
{
    const qkv_problem *p = e->problem;
    const uint8_t **rows = e->mask_rows;
    int64_t block = e->block, from = mask_from(p, e->sequence), begin = qkv_min(qkv_max(first, from), last);
    uint8_t *copies = (uint8_t *)e->mask_copies;
    int own[MAX_LANES], count = 0;    /* lanes that do not share the row of the one before */
    to->mask = rows;
    if (e->plan->kept_mask.heads) {
        const char *kept = kept_copies(e, x, 1, first);
        for (int j = 0; j < n; j++)
            rows[j] = (const uint8_t *)kept + lane_of_copy(x->mask, lane + j) * block;
        return;
    }
    for (int j = 0; j < n; j++) {
        if (e->plan->direct_mask) {
            rows[j] = (const uint8_t *)x->mask[lane + j] + first;
        } else if (j > 0 && x->mask[lane + j] == x->mask[lane + j - 1] && x->id[lane + j] == x->id[lane + j - 1]) {
            rows[j] = rows[j - 1];
        } else {
            own[count++] = j;
            rows[j] = copies + j * block;
        }
    }
    for (int k = 0; k < count && begin > first; k++)
        memset(copies + own[k] * block, 1, (size_t)(begin - first));
    for (int k = 0, end; k < count && p->mask; k = end) {
        const char *const *some = x->mask + lane + own[k];
        ptrdiff_t step;
        for (end = k + 1; end < count && own[end] == own[end - 1] + 1;)
            end++;
        end = k + end_of_run(some, 0, end - k, &step);
        copy_rows(e, 1, (char *)copies + own[k] * block + (begin - first), (size_t)block, some[0] + (begin - from) * p->mask_at.dim,
                  step, end - k, last - begin);
    }
    for (int k = 0; k < count && p->q_ids; k++) {
        const int32_t *ids = key_ids(p, e->sequence) + first, id = x->id[lane + own[k]];
        uint8_t *copy = copies + own[k] * block;
        for (int64_t i = 0; i < last - first && !p->mask; i++)
            copy[i] = ids[i] == id;
        for (int64_t i = 0; i < last - first && p->mask; i++)
            copy[i] = copy[i] && ids[i] == id;
    }
}

/* What n bytes of a mask make of their keys; eight at a time, of which those that are 0 show in their highest bits. */
static int look_at(const uint8_t *bytes, int64_t n)
{
    const uint64_t ones = UINT64_MAX / 255;
    uint64_t hidden = 0, seen = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t x;
        memcpy(&x, bytes + i, 8);
        hidden |= (x - ones) & ~x & ones << 7;
        seen |= x;
    }
    for (; i < n; i++) {
        hidden |= bytes[i] == 0;
        seen |= bytes[i];
    }
    return (seen ? QKV_SEEN : 0) | (hidden ? QKV_HIDDEN : 0);
}

int qkv_look_at(const qkv_changes *changes, int n, int64_t at, int64_t keys)
{
    int found = 0;
    for (int j = 0; j < n && found != (QKV_SEEN | QKV_HIDDEN); j++)
        if (j == 0 || changes->mask[j] != changes->mask[j - 1])
            found |= look_at(changes->mask[j] + at, keys);
    return found;
}

/* Row `index` of the summary is the element (axes..., head, row) of a mask without its broadcast axes. */
static const char *summarised_row(const qkv_problem *p, int64_t index)
{
    const qkv_strides *at = &p->mask_at;
    const char *row = p->mask;
    if (at->row) {
        row += index % p->len_q * at->row;
        index /= p->len_q;
    }
    if (at->head) {
        row += index % p->heads_q * at->head;
        index /= p->heads_q;
    }
    if (at->beam) {
        row += index % p->beams * at->beam;
        index /= p->beams;
    }
    for (int i = p->n_axes; i-- > 0;) {
        if (at->axis[i]) {
            row += index % p->axes[i] * at->axis[i];
            index /= p->axes[i];
        }
    }
    return row;
}

void qkv_summarise(const qkv_problem *p, const qkv_plan *plan, int64_t first, int64_t last, uint8_t *summary)
{
    int64_t blocks = (int64_t)plan->summary_bytes / plan->summary_rows;
    for (int64_t i = first; i < last; i++) {
        const uint8_t *row = (const uint8_t *)summarised_row(p, i);
        for (int64_t b = 0; b < blocks; b++) {
            int64_t begin = b * plan->block, n = qkv_min(plan->block, plan->summary_keys - begin);
            summary[i * blocks + b] = (uint8_t)look_at(row + begin, n);
        }
    }
}

/* What segments make of the keys [first, last), if these have one id. */
static int look_at_ids(const qkv_elements *e, const qkv_lanes *x, int lane, int n, int64_t first, int64_t last)
{
    const int32_t *ids = key_ids(e->problem, e->sequence) + first;
    int found = 0;
    if (memcmp(ids, ids + 1, (size_t)(last - first - 1) * sizeof *ids) != 0)
        return QKV_SEEN | QKV_HIDDEN;
    for (int j = 0; j < n; j++)
        found |= x->id[lane + j] == ids[0] ? QKV_SEEN : QKV_HIDDEN;
    return found;
}

qkv_kind qkv_look(const qkv_elements *e, const qkv_lanes *x, int lane, int n, int64_t first, int64_t last,
                  qkv_changes *to)
{
    const int both = QKV_SEEN | QKV_HIDDEN;
    int found = QKV_SEEN;
    if (last > mask_from(e->problem, e->sequence)) {
        found = 0;
        if (e->summary) {
            int64_t block = first / e->plan->block * e->plan->summary_at.dim;
            for (int j = 0; j < n; j++)
                found |= x->summary[lane + j][block];
        } else if (!e->problem->mask) {
            found = look_at_ids(e, x, lane, n, first, last);
        }
        int looks = !e->summary && (e->problem->mask || found == both);
        if (!to->mask && (looks || found == both))
            qkv_set_mask(e, x, lane, n, first, last, to);
        if (looks)
            found = qkv_look_at(to, n, 0, last - first);
    }
    if (found != both)
        to->mask = NULL;
    return found == both ? QKV_PARTIAL : found == QKV_HIDDEN ? QKV_SKIP : QKV_FULL;
}

/* Whether n elements are all as the one at `one`. */
static int are_all(const char *x, int64_t step, int64_t n, const char *one, int64_t size)
{
    if (memcmp(x, one, (size_t)size))
        return 0;
    if (step == size)                 /* each is as the one before it */
        return !memcmp(x, x + size, (size_t)((n - 1) * size));
    for (int64_t i = 1; i < n && step; i++)
        if (memcmp(x + i * step, one, (size_t)size))
            return 0;
    return 1;
}

static int bias_hides(const qkv_elements *e, const qkv_lanes *x, int lane, int n, int64_t first, int64_t last)
{
    const qkv_problem *p = e->problem;
    for (int j = 0; j < n; j++)
        if ((j == 0 || x->bias[lane + j] != x->bias[lane + j - 1])
            && !are_all(x->bias[lane + j] + first * p->bias_at.dim, p->bias_at.dim, last - first, e->plan->hidden,
                        qkv_size(p->bias_type)))
            return 0;
    return 1;
}

int64_t qkv_bias_end(const qkv_elements *e, const qkv_lanes *x, int lane, int n, int64_t first, int64_t last)
{
    enum { STRIP = 32 };
    int64_t places = e->plan->places, vectors = e->plan->kernels->lanes / e->plan->kernels->vector, end = last;
    qkv_bias_seen *known = e->ends ? e->ends + (x->place * places + first / e->block % places) * vectors + lane / n : NULL;
    if (known && known->first == first && known->last == last)
        return known->end;
    if (bias_hides(e, x, lane, n, first, last))
        end = first;
    for (int64_t begin; end > first && bias_hides(e, x, lane, n, begin = qkv_max(first, (end - 1) / STRIP * STRIP), end);)
        end = begin;
    if (known)
        *known = (qkv_bias_seen){first, last, end};
    return end;
}

/* Whether some of these keys have positions of their own. */
static int have_positions(const qkv_problem *p, int64_t sequence, int64_t last)
{
    return p->slopes && p->positions && p->mask_from && last > p->mask_from[sequence];
}

/* Positions of the keys [first, last), counted from `base`. */
static const void *key_positions(const qkv_elements *e, int64_t base, int64_t first, int64_t last)
{
    const qkv_problem *p = e->problem;
    int64_t from = p->mask_from[e->sequence], end = from + qkv_queries(p, e->sequence);
    const int64_t *own = p->positions + qkv_query_index(p, e->sequence, 0);
    for (int64_t j = first; j < last; j++) {
        int64_t at = (j >= from && j < end ? own[j - from] : j) - base;
        if (e->plan->kernels->size == sizeof(double))
            ((double *)e->key_copies)[j - first] = (double)at;
        else
            ((float *)e->key_copies)[j - first] = (float)at;
    }
    return e->key_copies;
}

void qkv_set_changes(const qkv_elements *e, const qkv_lanes *x, int lane, int n, int64_t base, int64_t first,
                     int64_t last, qkv_changes *to)
{
    const qkv_plan *plan = e->plan;
    if (e->problem->bias)
        to->bias = bias_rows(e, x, lane, n, first, last);
    to->hides = e->problem->question == QKV_LARGEST;
    if (e->problem->slopes) {
        to->slope = x->slope + lane;
        to->key = base;
        to->position = x->position + lane;
        to->key_position = have_positions(e->problem, e->sequence, last) ? key_positions(e, base, first, last) : NULL;
    }
    to->score_factor = plan->score_factor;
    to->softcap = plan->softcap;
    to->adjust = plan->score_factor != 1 || plan->softcap != 0 || to->mask || to->bias || to->slope;
}
