/* One query tile: some panels of query rows that share K and V, in a worker's scratch. */
#ifndef QKV_TILE_H
#define QKV_TILE_H

#include "elements.h"
#include "mask.h"
#include "plan.h"
#include "rows.h"

/* One panel: where its parts lie, and what its rows see. A state is O (dim_v, lanes), then m, then l. */
typedef struct {
    int64_t row;                      /* first row of the panel */
    int n, nv;                        /* rows, vectors that hold them */
    int careful;                      /* of gradients: Q or dO is not finite */
    char *q, *state, *total;          /* Q^T; the state of one chunk; that of all so far */
    qkv_range *rows;                  /* (lanes): keys that each sees; not filled where all see the same */
    qkv_limits *limits;               /* of the whole panel, then of each vector */
    int64_t *without;                 /* (lanes): of MOVED, the key that each row goes without, or -1 */
    qkv_lanes lanes;                  /* filled if scores are adjusted */
} qkv_panel;

typedef struct {
    const qkv_problem *problem;
    const qkv_plan *plan;
    int64_t sequence, head;           /* head: one of plan->heads */
    qkv_range rows;                   /* of this head */
    qkv_range keys;                   /* that count */
    int64_t q_offset, k_offset, v_offset, out_offset;   /* bytes to this sequence and key head */
    qkv_panel *panel;                 /* (panels) */
    int panels;
    qkv_range any;                    /* keys that some row sees */
    int64_t first;                    /* of the keys, or of the columns of cells, whose sums over queries lie in scratch */
    int *peaked;                      /* what its panels tell each other: see qkv_tile */
    int not_finite;                   /* their values, as far as they are squared */
    char *scratch;
    qkv_counters *counters;
    qkv_elements elements;
} qkv_query_tile;

/* Element i of what is of the arithmetic's type, wherever no kernel is worth it. */
static inline double qkv_element(const qkv_problem *p, const void *x, int64_t i)
{
    return p->type == QKV_F64 ? ((const double *)x)[i] : (double)((const float *)x)[i];
}

static inline void qkv_set_element(const qkv_problem *p, void *x, int64_t i, double value)
{
    if (p->type == QKV_F64)
        ((double *)x)[i] = value;
    else
        ((float *)x)[i] = (float)value;
}

static inline qkv_row qkv_first_row(const qkv_query_tile *t, const qkv_panel *x)
{
    return qkv_row_of(x->row, t->plan->beams, t->plan->group);
}

/* Lays out the tile of some rows of a key head in scratch, no more than its panels hold, finds its limits within `keys`, and
 * packs its queries. */
void qkv_open_tile(qkv_query_tile *tile, const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head,
                   qkv_range rows, qkv_range keys, const uint8_t *summary, char *scratch, qkv_counters *counters);

/* A panel's rows of Q, and of out, where the kernels can read them: in place or in scratch, until other rows are. */
const void **qkv_query_rows(const qkv_query_tile *tile, const qkv_panel *panel);
const void **qkv_output_rows(const qkv_query_tile *tile, const qkv_panel *panel);

/* The rows of tile number `index` of a head. */
static inline qkv_range qkv_tile_rows(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, int64_t index)
{
    int64_t rows = plan->tile_panels * plan->kernels->lanes;
    return (qkv_range){index * rows, qkv_min((index + 1) * rows, qkv_queries(p, sequence) * plan->each)};
}

/* What the rows see: of the keys that no window hides, or of all others, as qkv_open_tile has it. */
void qkv_find_limits(qkv_query_tile *tile, int kept);

/* From here on the rows see no other keys than these. */
void qkv_take_range(qkv_query_tile *tile, qkv_range keys);

/* O^T <- factor * rows of out, (dim_v, lanes). */
void qkv_pack_outputs(const qkv_query_tile *tile, const qkv_panel *panel, char *to, double factor);

/* A row of out, where it lies or in scratch. */
const void *qkv_output_row(const qkv_query_tile *tile, const qkv_row *row);

/* Rows of the totals, O / l, in scratch. */
void *const *qkv_finish_rows(const qkv_query_tile *tile, const qkv_panel *panel);

/* Sets the state of a panel to that of no keys but the sinks. */
void qkv_begin_state(const qkv_query_tile *tile, const qkv_panel *panel, char *state);

/* m and l of n rows of a key head, the first of which is `row`: those of its sinks alone, where there are any. */
void qkv_begin_sinks(const qkv_problem *problem, const qkv_plan *plan, int64_t head, int64_t row, int64_t n, void *m, void *l);

/* Where a row of a head stands in what has a number for each: (sequences, query heads, queries), or (query heads, queries of
 * all sequences). */
int64_t qkv_result_index(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head, const qkv_row *row);

/* Writes the log-sum-exp of n rows of a key head with these m and l. */
void qkv_write_lse(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head, int64_t row, int64_t n,
                   const void *m, const void *l);

/* Writes what makes weights of their scores, likewise. */
void qkv_write_normalisers(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head, int64_t row, int64_t n,
                           const void *m, const void *l);

/* Tells the memory that O of this panel is written soon. */
void qkv_expect_writing(const qkv_query_tile *tile, const qkv_panel *panel);

/* Writes O and the log-sum-exp of the panels' totals. */
void qkv_write_tile(const qkv_query_tile *tile);

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
