/* Rows of a problem: which query and head they are, and where they lie in arrays. */
#ifndef QKV_ROWS_H
#define QKV_ROWS_H

#include "qkv.h"

/* Rows of a key head in order: of each query of the sequence those of its beams, of each of these those of the heads of the group.
 * So neighbours see nearly the same keys. */
typedef struct { int64_t position, beam, head, beams, group; } qkv_row;

static inline qkv_row qkv_row_of(int64_t row, int64_t beams, int64_t group)
{
    if (beams == 1)
        return (qkv_row){row / group, 0, row % group, 1, group};
    return (qkv_row){row / group / beams, row / group % beams, row % group, beams, group};
}

static inline void qkv_next_row(qkv_row *r)
{
    if (++r->head < r->group)
        return;
    r->head = 0;
    if (++r->beam < r->beams)
        return;
    r->beam = 0;
    r->position++;
}

/* Whether it is another query than that of the row before. */
static inline int qkv_begins_query(const qkv_row *r)
{
    return r->head == 0 && r->beam == 0;
}

/* The first of n things in cell i, of `cells` that they are shared out to. */
static inline int64_t qkv_cell_first(int64_t i, int64_t n, int64_t cells)
{
    return i * n / cells;
}

/* The cell that thing number i is in. */
static inline int64_t qkv_cell_of(int64_t i, int64_t n, int64_t cells)
{
    return ((i + 1) * cells - 1) / n;
}

/* From where the rows of a sequence and key head begin, in bytes. */
static inline int64_t qkv_row_offset(const qkv_row *r, const qkv_strides *at)
{
    return r->position * at->row + r->beam * at->beam + r->head * at->head;
}

/* Where a sequence begins, in bytes, by the strides of its axes. */
static inline int64_t qkv_sequence_offset(const qkv_problem *p, const qkv_strides *at, int64_t sequence)
{
    int64_t offset = 0;
    for (int i = p->n_axes; i-- > 0;) {
        offset += sequence % p->axes[i] * at->axis[i];
        sequence /= p->axes[i];
    }
    return offset;
}

/* Where the rows of a sequence begin in q and out. */
static inline int64_t qkv_rows_offset(const qkv_problem *p, const qkv_strides *at, int64_t sequence)
{
    return p->q_starts ? p->q_starts[sequence] * at->row : qkv_sequence_offset(p, at, sequence);
}

#endif
