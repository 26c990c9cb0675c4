/* One query tile: some panels of query rows that share K and V, in a worker's scratch. */
#ifndef QKV_TILE_H
#define QKV_TILE_H

#include "mask.h"
#include "plan.h"

/* One panel: where its parts lie, and what its rows see. A state is O (dim_v, lanes), then m, then l. */
typedef struct {
    int64_t row;                      /* first row of the panel */
    int n, nv;                        /* rows, vectors that hold them */
    char *q, *state, *total;          /* Q^T; the state of one chunk; that of all so far */
    qkv_range *rows;                  /* (lanes): keys that each sees; not filled where all see the same */
    qkv_limits *limits;               /* of the whole panel, then of each vector */

    /* (lanes), filled if scores are adjusted: its row of the bias and of the mask at key 0, position, id and slope, and
     * its row of the mask's summary. */
    const char **bias, **mask;
    const uint8_t **summary;
    int64_t *position;
    double *slope;
    int32_t *id;
} qkv_panel;

typedef struct {
    const qkv_problem *problem;
    const qkv_plan *plan;
    int64_t sequence, head;           /* head: a key head */
    int64_t rows;                     /* of this key head */
    int64_t q_offset, k_offset, v_offset, out_offset;   /* bytes to this sequence and key head */
    qkv_panel *panel;                 /* (panels) */
    int panels;
    qkv_range any;                    /* keys that some row sees */
    const uint8_t *summary;           /* of the mask, or NULL */
    char *scratch;
    qkv_counters *counters;

    /* Scratch of elements.c: rows of bias and mask of the lanes at hand, and where they are copied to, a block of keys each. */
    int64_t block;
    const void **bias_rows;
    const uint8_t **mask_rows;
    char *bias_copies;
    uint8_t *mask_copies;
} qkv_query_tile;

/* Rows of a panel in order: row r is query r / group of the sequence, head r % group of the group. */
typedef struct { int64_t position, head, group; } qkv_row;

static inline qkv_row qkv_row_of(int64_t row, int64_t group)
{
    return (qkv_row){row / group, row % group, group};
}

static inline qkv_row qkv_first_row(const qkv_query_tile *t, const qkv_panel *x)
{
    return qkv_row_of(x->row, t->plan->group);
}

static inline void qkv_next_row(qkv_row *r)
{
    if (++r->head == r->group) {
        r->head = 0;
        r->position++;
    }
}

/* Lays out tile number `index` of a key head in scratch, finds its limits and packs its queries. */
void qkv_open_tile(qkv_query_tile *tile, const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head,
                   int64_t index, const uint8_t *summary, char *scratch, qkv_counters *counters);

/* Sets the state of a panel to that of no keys but the sinks. */
void qkv_begin_state(const qkv_query_tile *tile, const qkv_panel *panel, char *state);

/* Where a sequence begins, in bytes, by the strides of its axes. */
int64_t qkv_sequence_offset(const qkv_problem *problem, const qkv_strides *at, int64_t sequence);

/* Where the rows of a sequence begin in q and out. */
int64_t qkv_rows_offset(const qkv_problem *problem, const qkv_strides *at, int64_t sequence);

/* m and l of n rows of a key head, the first of which is `row`: those of its sinks alone, where there are any. */
void qkv_begin_sinks(const qkv_problem *problem, const qkv_plan *plan, int64_t head, int64_t row, int64_t n, void *m, void *l);

/* Writes the log-sum-exp of n rows of a key head with these m and l. */
void qkv_write_lse(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head, int64_t row, int64_t n,
                   const void *m, const void *l);

/* Tells the memory that O of this panel is written soon. */
void qkv_expect_writing(const qkv_query_tile *tile, const qkv_panel *panel);

/* Writes O and the log-sum-exp of the panels' totals. */
void qkv_write_tile(const qkv_query_tile *tile);

/* elements.c: what scores meet by element. */

/* Lays out the lanes of a panel from `at` on, QKV_LANE_BYTES each, and fills them in. */
void qkv_open_lanes(const qkv_query_tile *tile, qkv_panel *panel, char *at);

/* Rows [first, last) of a mask's summary. */
void qkv_summarise(const qkv_problem *problem, const qkv_plan *plan, int64_t first, int64_t last, uint8_t *summary);

/* The mask of the lanes [lane, lane + n) for the keys [first, last) of one block. */
void qkv_set_mask(const qkv_query_tile *tile, const qkv_panel *panel, int lane, int n, int64_t first, int64_t last,
                  qkv_changes *to);

/* What the masks of n lanes make of some of their keys, `at` and on: QKV_SEEN, QKV_HIDDEN or both. */
int qkv_look_at(const qkv_changes *changes, int n, int64_t at, int64_t keys);

/* Whether it hides all of these keys (or, with a summary, of their block), some or none; sets it if some. */
qkv_kind qkv_look(const qkv_query_tile *tile, const qkv_panel *panel, int lane, int n, int64_t first, int64_t last,
                  qkv_changes *to);

/* All else that changes these scores; after the mask, on which `adjust` depends as well. */
void qkv_set_changes(const qkv_query_tile *tile, const qkv_panel *panel, int lane, int n, int64_t first, int64_t last,
                     qkv_changes *to);

/* Of these keys, those that mask and ids let query i of a head see. */
int64_t qkv_count_seen(const qkv_problem *problem, int64_t sequence, int64_t head, int64_t i, qkv_range keys);

/* The chunk where these keys begin. */
static inline int64_t qkv_first_chunk(const qkv_plan *plan, qkv_range keys)
{
    return keys.lo < keys.hi ? keys.lo / plan->chunk : 0;
}

static inline size_t qkv_lanes_bytes(const qkv_plan *plan)
{
    return (size_t)plan->kernels->lanes * (size_t)plan->kernels->size;
}

static inline void *qkv_state_m(const qkv_plan *plan, char *state)
{
    return state + plan->state_bytes - 2 * qkv_lanes_bytes(plan);
}

static inline void *qkv_state_l(const qkv_plan *plan, char *state)
{
    return state + plan->state_bytes - qkv_lanes_bytes(plan);
}

#endif
