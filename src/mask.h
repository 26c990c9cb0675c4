/* Which keys a query sees, from positions alone: causal order, windows, offsets, lengths and the spans of segments are one
 * interval per row.
 *
 * Query i of sequence b sits at i + offset_b, or where it is told to, and sees the keys [position - left, position + right]
 * that are not before start_b, and below length_b. Over a group of rows the intervals give two more: the keys that some row sees (union) and those that every
 * row sees (common). A tile outside the union is skipped; one inside the common range needs no mask at all.
 */
#ifndef QKV_MASK_H
#define QKV_MASK_H

#include "qkv.h"

typedef struct { int64_t lo, hi; } qkv_range;          /* keys lo <= i < hi; empty if lo >= hi */

typedef struct { qkv_range any, all; } qkv_limits;     /* union and common range of some rows */

typedef enum { QKV_SKIP, QKV_FULL, QKV_PARTIAL } qkv_kind;

static inline int64_t qkv_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t qkv_max(int64_t a, int64_t b) { return a > b ? a : b; }

/* The number by which the caller knows a sequence: that of one of its beams, which share their limits. */
static inline int64_t qkv_given(const qkv_problem *p, int64_t sequence, int64_t beam)
{
    if (p->beams <= 1)
        return sequence;
    return (sequence / p->beam_step * p->beams + beam) * p->beam_step + sequence % p->beam_step;
}

/* The number of a sequence's first run. */
static inline int64_t qkv_first_run(const qkv_problem *p, int64_t sequence)
{
    return p->run_of ? p->run_of[qkv_given(p, sequence, 0)] : 0;
}

static inline int64_t qkv_length(const qkv_problem *p, int64_t sequence)
{
    return p->length ? p->length[qkv_given(p, sequence, 0)] : p->len_k;
}

static inline int64_t qkv_queries(const qkv_problem *p, int64_t sequence)
{
    if (p->queries)
        return p->queries[sequence];
    return p->q_starts ? p->q_starts[sequence + 1] - p->q_starts[sequence] : p->len_q;
}

/* Whether sequences may have different numbers of queries. */
static inline int qkv_is_uneven(const qkv_problem *p)
{
    return p->q_starts || p->queries;
}

/* Where query i of a sequence stands in what has a row for each query of all sequences. */
static inline int64_t qkv_query_index(const qkv_problem *p, int64_t sequence, int64_t i)
{
    return (p->q_starts ? p->q_starts[sequence] : qkv_given(p, sequence, 0) * p->len_q) + i;
}

static inline int64_t qkv_offset(const qkv_problem *p, int64_t sequence)
{
    return p->offset ? p->offset[qkv_given(p, sequence, 0)] : qkv_length(p, sequence) - qkv_queries(p, sequence);
}

static inline int64_t qkv_start(const qkv_problem *p, int64_t sequence)
{
    return p->start ? p->start[qkv_given(p, sequence, 0)] : 0;
}

/* Where the queries first .. last of a sequence sit: the least and the largest of their positions. */
static inline qkv_range qkv_positions(const qkv_problem *p, int64_t sequence, int64_t first, int64_t last)
{
    int64_t offset = qkv_offset(p, sequence);
    if (!p->positions)
        return (qkv_range){first + offset, last + offset};
    qkv_range at = {(int64_t)1 << 62, -((int64_t)1 << 62)};         /* out of all reach, where there are none */
    const int64_t *positions = p->positions + qkv_query_index(p, sequence, 0);
    for (int64_t i = first; i <= last; i++) {
        at.lo = qkv_min(at.lo, positions[i]);
        at.hi = qkv_max(at.hi, positions[i]);
    }
    return at;
}

/* The keys within reach of some of the queries first .. last of a sequence, spans apart. May be empty. */
static inline qkv_range qkv_reach(const qkv_problem *p, int64_t sequence, int64_t first, int64_t last)
{
    qkv_range keys = {qkv_start(p, sequence), qkv_length(p, sequence)};
    if (p->left == QKV_OPEN && p->right == QKV_OPEN)
        return keys;
    qkv_range at = qkv_positions(p, sequence, first, last);
    if (p->left != QKV_OPEN)
        keys.lo = qkv_max(keys.lo, p->mask_from ? qkv_min(at.lo - p->left, p->mask_from[sequence]) : at.lo - p->left);
    if (p->right != QKV_OPEN)
        keys.hi = qkv_min(keys.hi, at.hi + p->right + 1);
    return keys;
}

/* Of the keys that query i sees, those that no window hides, or all others. */
static inline qkv_range qkv_visible_part(const qkv_problem *p, int64_t sequence, int64_t i, int kept)
{
    qkv_range keys = qkv_reach(p, sequence, i, i);
    keys.lo = kept ? qkv_start(p, sequence) : qkv_max(keys.lo, p->kept);
    keys.hi = kept ? qkv_min(keys.hi, p->kept) : keys.hi;
    if (i >= qkv_queries(p, sequence))
        keys.hi = 0;
    if (p->spans) {
        const int64_t *span = p->spans + 2 * qkv_query_index(p, sequence, i);
        keys.lo = qkv_max(keys.lo, span[0]);
        keys.hi = qkv_min(keys.hi, span[1]);
    }
    if (keys.lo >= keys.hi)
        keys.lo = keys.hi = 0;
    return keys;
}

static inline qkv_range qkv_visible(const qkv_problem *p, int64_t sequence, int64_t i)
{
    return qkv_visible_part(p, sequence, i, 0);
}

/* Whether all queries of a sequence see the same keys, as far as positions say. */
static inline int qkv_all_alike(const qkv_problem *p)
{
    return p->left == QKV_OPEN && p->right == QKV_OPEN && !p->spans && !p->queries;
}

static inline qkv_limits qkv_no_limits(void)
{
    return (qkv_limits){{INT64_MAX, 0}, {0, INT64_MAX}};
}

static inline void qkv_add_row(qkv_limits *limits, qkv_range row)
{
    if (row.lo < row.hi) {                              /* an empty interval says nothing about the union */
        limits->any.lo = qkv_min(limits->any.lo, row.lo);
        limits->any.hi = qkv_max(limits->any.hi, row.hi);
    }
    limits->all.lo = qkv_max(limits->all.lo, row.lo);
    limits->all.hi = qkv_min(limits->all.hi, row.hi);
}

/* Cuts the tile [first, last) down to what some row sees, and says what is left. */
static inline qkv_kind qkv_cut(const qkv_limits *limits, int64_t *first, int64_t *last)
{
    *first = qkv_max(*first, limits->any.lo);
    *last = qkv_min(*last, limits->any.hi);
    if (*first >= *last)
        return QKV_SKIP;
    return limits->all.lo <= *first && *last <= limits->all.hi ? QKV_FULL : QKV_PARTIAL;
}

#endif
