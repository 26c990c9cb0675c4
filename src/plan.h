/* How a problem will be computed: kernels, tile sizes, chunks, tasks, scratch. */
#ifndef QKV_PLAN_H
#define QKV_PLAN_H

#include "kernels/kernels.h"
#include "qkv.h"

enum { QKV_PANEL_BYTES = 192 };       /* room for a qkv_panel of tile.h */
enum { QKV_SHARE_BYTES = 48 };        /* room for a qkv_share of spotlight.c */
enum { QKV_HEADS_TOGETHER = 16 };     /* most key heads whose few rows a task takes together */
enum { QKV_LANE_BYTES = 48 };         /* room for what a lane has in qkv_lanes of elements.h */
enum { QKV_END_BYTES = 24 };          /* room for a qkv_bias_seen of elements.h */

/* Few rows: those of a sequence and key head, of some of its beams, are a tile of their own kind (decode.c), and a chunk is its block. */
typedef struct {
    const qkv_kernels *kernels;       /* the table of pairs where these are multiplied */
    int copy_k, copy_v, obstacles_q;
    int64_t once_k, once_v;           /* tiles of so many rows copy them even if they could be widened as they are loaded */
    int columns;                      /* keys lie side by side, and lanes are keys in K Q^T */
    int streams;                      /* the CPU has QKV_CPU_STREAMS */
    int64_t most;                     /* rows of one beam that are few */
    int64_t rows;                     /* in a tile */
    int64_t heads;                    /* key heads that a task takes together: their keys lie side by side */
    int64_t pass;                     /* keys that are copied at a time */
    int64_t copy_row_k, copy_row_v;   /* elements per row of copied K and V */
    int64_t q_row, s_row, o_row;      /* elements per row of Q, S and O, whole vectors; of pairs those of Q, and two vectors of O */
    size_t l_bytes, state_bytes;      /* l, as m; O, m and l */
    /* Scratch of one worker, where that of tiles is otherwise. */
    size_t at_limits, at_rows, at_q, at_state, at_total, at_s, at_parts, at_sums, at_k, at_v, at_pair, at_copies;
    size_t at_lanes, at_pointers, at_bias, at_mask, at_keys;
    size_t at_tops;                   /* of ROWS: m of each chunk */
    size_t head_bytes;                /* of one key head */
    size_t scratch_bytes;
} qkv_few_plan;

/* What a task of some heads keeps of a bias or mask that is not read where it lies: copies of a block of keys, once for all of its
 * heads. Heads are those whose copies differ, at least 1; 0: copies are made anew for every head. */
typedef struct {
    int64_t heads;
    size_t size, row_bytes, head_bytes;                 /* of an element, of a row of a block, and of those of a panel */
} qkv_kept;

/* The work is a grid: sequences x key heads x query tiles, and, if split, x chunks of keys. A query tile is some panels
 * of one (sequence, key head); its rows are those of rows.h. Where sums over
 * queries are asked for, it is sequences x query heads x ranges of keys; of cells, x rows of these x ranges of columns. */
typedef struct {
    const qkv_kernels *kernels;
    /* The scale is the product of what goes into Q^T, of what multiplies scores before anything is added to them, and of
     * what multiplies them in softmax. */
    double q_factor, score_factor, rest;
    double c;                         /* log2(e) * rest, within the type */
    double softcap;                   /* within the type */
    int by_key;                       /* sums over queries are asked for: tasks are ranges of keys */
    int values;                       /* tiles weigh V: attention, or attention without some keys */
    int adjust;                       /* scores need a step between K Q^T and softmax */
    int masked;                       /* by element: a mask, or segments in any order */

    int64_t terms;                    /* of a score: dim, or pairs of them; of tiles those of all parts, up to whole tiles */
    /* Rows that share their keys are those of all query heads of a key head, or of one query head where it is asked what each
     * of these gives. `heads` are what rows are of, `group` query heads in each, and so many of them share a key head. */
    int64_t sequences, heads, group, sharing;
    int64_t head_tasks, task_heads;   /* that heads are shared out to, and what each has: one, or some together */
    int64_t beams, each;              /* of a sequence, at least 1, and rows of one query: beams * group */
    int64_t rows;                     /* of one head: len_q * each; in ragged batches, at most */
    int decode;                       /* all sequences have few rows */
    qkv_few_plan few;
    int64_t tile_panels;              /* panels in a query tile */
    int64_t tiles;                    /* query tiles of one head; in ragged batches, at most */
    int heads_inner;                  /* the tiles of all heads follow one another: they read the same lines of a bias or mask */

    int64_t block;                    /* keys of one kernel call; bounds are multiples of it */
    int64_t chunk;                    /* keys summed apart and then merged; a multiple of block */
    int64_t reach, chunks;            /* keys within reach of a sequence's queries, and chunks that they lie in, at most */
    int merges;                       /* chunks into a total of their own */
    int64_t pass;                     /* keys that all panels of a tile see before the next; a multiple of block, at most chunk */
    int split;                        /* chunks are tasks of their own */
    int copy_k, copy_v;               /* passes are copied to scratch first, because of these obstacles */
    int one;                          /* V is the beginning of K's rows, also where these are copies */
    int cold;                         /* the first panel of a pass asks for its K and V ahead */
    int direct_q, direct_out;         /* rows can be read and written where they lie: there are no */
    int obstacles_q, obstacles_out;
    int direct_bias, direct_mask;     /* likewise */
    qkv_kept kept_bias, kept_mask;
    int64_t places;                   /* of blocks of keys whose copies a panel keeps at once: those of a chunk */
    char hidden[sizeof(double)];      /* -inf as a bias has it */
    /* What each row of the mask makes of each block of keys, seen once for all that share the row: bytes of QKV_SEEN and
     * QKV_HIDDEN, with strides like the mask's. 0 bytes: tiles look for themselves. */
    size_t summary_bytes;
    qkv_strides summary_at;
    int64_t summary_rows, summary_task, summary_keys;   /* that it has, that a task makes of them, and that it covers */

    int64_t tasks;
    int64_t bases;                    /* so many results have several tasks, of which the last to end does the rest */
    int threads;
    int64_t range, ranges;            /* keys of a task that sums over queries, or columns of cells, and such tasks of a head */
    int64_t share;                    /* of gradients: keys of a part, some ranges */
    int in_turn;                      /* of gradients: a task has all parts, one after the other, each added to dQ itself */
    int together;                     /* a task has all heads of its keys, since what scores meet is theirs in common */
    int64_t cell_rows, parts;         /* of cells: rows in a task, and parts of a column, whose keys are summed apart */
    int small;                        /* worth a thread that spins, but not to wake one */

    /* Scratch of one worker: byte offsets from its beginning. */
    size_t state_bytes;               /* O, m, l of one panel, or what a question keeps, m and l */
    size_t at_panels, at_limits, at_rows, at_q, at_state, at_total, at_s, at_k, at_v, at_tile, at_peaked;
    size_t at_lanes, at_pointers, at_bias, at_mask, at_kept, at_keys;   /* what elements.c needs */
    size_t kept_bytes;
    size_t at_sums;                   /* (2, range, vector), the second of what rounding loses; of gradients (range, columns of Q and of dO); of cells: (range) doubles, */
    size_t at_finite;                 /* of gradients: how many keys of each block of a range are known to be finite */
    size_t at_bounds;                 /* and the keys where their parts begin (range * parts + 1) */
    size_t at_sizes, at_products, at_centre;            /* (range), (block, lanes), (dim_v): of INFLUENCE */
    size_t at_without;                /* (panels, lanes) of keys: of MOVED */
    size_t at_best, at_rest, at_outputs, at_shares;     /* of GROUPS: two states, O^T and (lanes) of qkv_share, for every panel */
    int64_t copy_row_k, copy_row_v;   /* elements per row of copied K and V, or of V's pairs of rows */
    size_t scratch_bytes;
    size_t partial_bytes;             /* all partial states of a split problem */
    size_t shared_bytes;              /* those, what counts them, first tiles of ragged batches, and the summary */
} qkv_plan;

qkv_status qkv_make_plan(const qkv_problem *problem, qkv_plan *plan);

/* Whether the answer is a map in cells. */
static inline int qkv_asks_cells(const qkv_problem *problem)
{
    return problem->question == QKV_MEANS || problem->question == QKV_MAXIMA;
}

/* Columns in whole panels of them, as many as lanes. */
static inline int64_t qkv_columns(const qkv_plan *plan, int64_t dim)
{
    return (dim + plan->kernels->lanes - 1) / plan->kernels->lanes * plan->kernels->lanes;
}

/* Whether a sequence has few rows. */
int qkv_has_few(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence);

/* Why a tile of so many few rows copies K or V. */
int qkv_few_obstacles(const qkv_plan *plan, int values, int64_t rows);

/* Query tiles of one head of a sequence. */
int64_t qkv_tiles_of(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence);

#endif
