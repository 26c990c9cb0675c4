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
} qkv_panel;

typedef struct {
    const qkv_problem *problem;
    const qkv_plan *plan;
    int64_t sequence, head;           /* head: a key head */
    int64_t q_offset, k_offset, v_offset, out_offset;   /* bytes to this sequence and key head */
    qkv_panel *panel;                 /* (panels) */
    int panels;
    qkv_range any;                    /* keys that some row sees */
    char *scratch;
    qkv_counters *counters;
} qkv_query_tile;

/* Lays out tile number `index` in scratch, finds its limits and packs its queries. */
void qkv_open_tile(qkv_query_tile *tile, const qkv_problem *problem, const qkv_plan *plan, int64_t index, char *scratch,
                   qkv_counters *counters);

/* Tells the memory that O of this panel is written soon. */
void qkv_expect_writing(const qkv_query_tile *tile, const qkv_panel *panel);

/* Writes O and the log-sum-exp of the panels' totals. */
void qkv_write_tile(const qkv_query_tile *tile);

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
