/* How a problem will be computed: kernels, tile sizes, chunks, tasks, scratch. */
#ifndef QKV_PLAN_H
#define QKV_PLAN_H

#include "kernels/kernels.h"
#include "qkv.h"

/* Bytes of an element in memory, 1 where rows are bytes, and the type that it is computed in. */
static inline int qkv_size(qkv_type type) { return type == QKV_F64 ? 8 : type == QKV_F32 ? 4 : type < QKV_I8 ? 2 : 1; }
static inline int64_t qkv_row_bytes(qkv_type type, int64_t dim)
{
    return type == QKV_I8 ? qkv_i8_bytes(dim) + 4 : type == QKV_I4 ? qkv_i4_bytes(dim) / 8 * 9 : dim * qkv_size(type);
}
static inline qkv_type qkv_arithmetic(qkv_type type) { return type == QKV_F64 ? QKV_F64 : QKV_F32; }

enum { QKV_PANEL_BYTES = 128 };       /* room for a qkv_panel of tile.h */
enum { QKV_SEEN = 1, QKV_HIDDEN = 2 };                  /* of a mask's elements: some are */
enum { QKV_LANE_BYTES = 48 };         /* room for what one lane has in a qkv_panel's arrays by element */

/* Few rows: all those of a sequence and key head are a tile of their own kind (decode.c), and a chunk is its block. */
typedef struct {
    const qkv_kernels *kernels;       /* the table of pairs where these are multiplied */
    int copy_k, copy_v, obstacles_q;
    int streams;                      /* the CPU has QKV_CPU_STREAMS */
    int64_t most;                     /* rows that are few */
    int64_t pass;                     /* keys that are copied at a time */
    int64_t q_row, o_row;             /* elements per row of Q and O, whole vectors; of pairs those of Q, and two vectors of O */
    size_t l_bytes, state_bytes;      /* l, as m; O, m and l */
    /* Scratch of one worker, where that of tiles is otherwise. */
    size_t at_limits, at_rows, at_q, at_state, at_total, at_s, at_sums, at_k, at_v, at_pair, at_copies;
    size_t at_lanes, at_pointers, at_bias, at_mask;
    size_t scratch_bytes;
} qkv_few_plan;

/* The work is a grid: sequences x key heads x query tiles, and, if split, x chunks of keys. A query tile is some panels
 * of one (sequence, key head); its rows are (position, head of the group) pairs, the head running fastest. */
typedef struct {
    const qkv_kernels *kernels;
    /* The scale is the product of what goes into Q^T, of what multiplies scores before anything is added to them, and of
     * what multiplies them in softmax. */
    double q_factor, score_factor, rest;
    double c;                         /* log2(e) * rest, within the type */
    double softcap;                   /* within the type */
    int adjust;                       /* scores need a step between K Q^T and softmax */
    int masked;                       /* by element: a mask, or segments in any order */

    int64_t terms;                    /* of a score: dim, or pairs of them */
    int64_t sequences, group;         /* query heads per key head */
    int64_t rows;                     /* of one key head: len_q * group; in ragged batches, at most */
    int decode;                       /* all sequences have few rows */
    qkv_few_plan few;
    int64_t tile_panels;              /* panels in a query tile */
    int64_t tiles;                    /* query tiles of one key head; in ragged batches, at most */

    int64_t block;                    /* keys of one kernel call; bounds are multiples of it */
    int64_t chunk;                    /* keys summed apart and then merged; a multiple of block */
    int64_t reach, chunks;            /* keys within reach of a sequence's queries, and chunks that they lie in, at most */
    int merges;                       /* chunks into a total of their own */
    int64_t pass;                     /* keys that all panels of a tile see before the next; a multiple of block, at most chunk */
    int split;                        /* chunks are tasks of their own */
    int copy_k, copy_v;               /* passes are copied to scratch first, because of these obstacles */
    int cold;                         /* the first panel of a pass asks for its K and V ahead */
    int direct_q, direct_out;         /* rows can be read and written where they lie: there are no */
    int obstacles_q, obstacles_out;
    int direct_bias, direct_mask;     /* likewise */
    /* What each row of the mask makes of each block of keys, seen once for all that share the row: bytes of QKV_SEEN and
     * QKV_HIDDEN, with strides like the mask's. 0 bytes: tiles look for themselves. */
    size_t summary_bytes;
    qkv_strides summary_at;
    int64_t summary_rows, summary_task, summary_keys;   /* that it has, that a task makes of them, and that it covers */

    int64_t tasks;
    int threads;
    int small;                        /* worth a thread that spins, but not to wake one */

    /* Scratch of one worker: byte offsets from its beginning. */
    size_t state_bytes;               /* O, m, l of one panel */
    size_t at_panels, at_limits, at_rows, at_q, at_state, at_total, at_s, at_k, at_v, at_tile;
    size_t at_lanes, at_pointers, at_bias, at_mask;     /* what elements.c needs */
    int64_t copy_row_k, copy_row_v;   /* elements per row of copied K and V */
    size_t scratch_bytes;
    size_t partial_bytes;             /* all partial states of a split problem */
    size_t shared_bytes;              /* those, what counts them, first tiles of ragged batches, and the summary */
} qkv_plan;

qkv_status qkv_make_plan(const qkv_problem *problem, qkv_plan *plan);

/* Whether a sequence has few rows. */
int qkv_has_few(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence);

/* Query tiles of one key head of a sequence. */
int64_t qkv_tiles_of(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence);

/* Carries out a plan with tasks (forward.c). */
qkv_status qkv_run_plan(const qkv_problem *problem, const qkv_plan *plan);

/* A product: a grid of sequences x heads of B x row tiles x column tiles. A row is a (head of the group, row) pair, the row
 * running fastest. A task prepares B a pass of terms at a time, as panels, and runs `group_rows` rows of A over them. */
typedef struct {
    const qkv_kernels *kernels;
    double b_factor, factor;          /* the scale: what goes into a transposed B, and what multiplies sums */
    int64_t sequences, group, length; /* heads of C per head of B; rows of one head */
    int64_t a_head, a_row, c_head, c_row;               /* byte strides of heads and rows */
    int64_t tile_rows, row_tiles, tile_columns, column_tiles;
    int64_t pass, group_rows;
    int direct_a, direct_b, direct_c;                   /* rows can be used where they lie */
    int stream;                       /* C is written past the caches */
    int64_t tasks;
    int threads;
    size_t at_b, at_rows, at_columns, at_a, at_c;       /* scratch of one worker */
    int64_t copy_row_b, copy_row_a;                     /* elements */
    size_t scratch_bytes;
} qkv_product_plan;

qkv_status qkv_plan_product(const qkv_product_problem *problem, qkv_product_plan *plan);

/* A softmax: a grid of outer axes x pieces of the innermost one, the run. Its elements are columns, worked on in strips, if
 * the axis lies across them; else they are rows. */
typedef struct {
    const qkv_kernels *kernels;
    int across;                       /* the run is contiguous, the axis is not */
    int n_axes;                       /* outer axes, as in the problem, after merging */
    int64_t axes[QKV_MAX_AXES], x_at[QKV_MAX_AXES], mask_at[QKV_MAX_AXES], out_at[QKV_MAX_AXES];
    int64_t run, x_run, mask_run, out_run;
    int64_t piece, pieces, strip;
    int direct_x, direct_out;         /* a row can be used where it lies */
    int in_out;                       /* rows too long for a cache: exponentials go to `out` at once */
    int stream;
    int64_t tasks;
    int threads;
    size_t at_state, scratch_bytes;   /* the exponentials come first */
} qkv_softmax_plan;

qkv_status qkv_plan_softmax(const qkv_softmax_problem *problem, qkv_softmax_plan *plan);

#endif
