/* How the stages will be computed: a product, the softmax of an axis, a rotation. */
#ifndef QKV_PLAN_STAGES_H
#define QKV_PLAN_STAGES_H

#include "kernels/kernels.h"
#include "qkv.h"

/* A product: a grid of sequences x heads of B x row tiles x column tiles. A row is a (head of the group, row) pair, the row
 * running fastest. A task prepares B a pass of terms at a time, as panels, and runs `group_rows` rows of A over them. */
typedef struct {
    /* What is computed: what is asked or, of few rows, its transpose, whose rows are the columns. The bits are the same. */
    const qkv_product_problem *problem;
    qkv_product_problem turned;
    const qkv_kernels *kernels;
    double b_factor, factor;          /* the scale: what goes into a transposed B, and what multiplies sums */
    int64_t sequences, group, length; /* heads of C per head of B; rows of one head */
    int64_t a_head, a_row, c_head, c_row;               /* byte strides of heads and rows */
    int64_t added_head, added_row;
    int64_t tile_rows, row_tiles, tile_columns, column_tiles;
    int64_t pass, passes, group_rows;
    int64_t copy_rows;                /* of C in scratch: all of a task, unless a single pass is all of their sums */
    int copy_a, copy_b, copy_c;       /* rows go through scratch, because of these obstacles */
    int stream;                       /* C is written past the caches */
    int turned_columns;               /* of a transposed B: few rows meet its columns as they are read, without panels */
    int64_t tasks;
    int threads;
    size_t at_b, at_rows, at_columns, at_a, at_c;       /* scratch of one worker */
    int64_t copy_row;                 /* elements of a copied row of A or column of B, but in tiles */
    size_t scratch_bytes;
} qkv_product_plan;

qkv_status qkv_plan_product(const qkv_product_problem *problem, qkv_product_plan *plan);

/* Rows of lanes of a panel of B that n terms are: in tiles pairs of parts. */
static inline int64_t qkv_panel_rows(const qkv_product_plan *plan, int64_t n)
{
    return plan->kernels->parts ? plan->kernels->parts * ((n + 31) / 32 * 16) : n;
}

static inline int64_t qkv_copy_row(const qkv_product_plan *plan, int64_t n)
{
    return plan->kernels->parts ? qkv_panel_rows(plan, n) : plan->copy_row;
}

/* B that is packed: a pass after the other, of each the panels of all column tiles. Where the panels of a column tile begin, in bytes, for `n` terms from `first` on. */
static inline int64_t qkv_packed_at(const qkv_product_plan *plan, int64_t first, int64_t n, int64_t tile)
{
    return (first * plan->column_tiles + n * tile) * plan->tile_columns * plan->kernels->size;
}

/* A softmax, or its gradient: a grid of outer axes x pieces of the innermost one, the run. Its elements are columns, worked on in strips, if
 * the axis lies across them; else they are rows. */
typedef struct {
    const qkv_kernels *kernels;
    int across;                       /* the run is contiguous, the axis is not */
    int n_axes;                       /* outer axes, as in the problem, after merging */
    int64_t axes[QKV_MAX_AXES], x_at[QKV_MAX_AXES], with_at[QKV_MAX_AXES], out_at[QKV_MAX_AXES];
    int64_t run, x_run, with_run, out_run;
    int64_t piece, pieces, strip;
    int copy_x, copy_p, copy_out;     /* rows go through scratch, because of these obstacles */
    int half_x, half_out;             /* the type of 16 bits that x and out are read and written in; else 0 */
    int in_out;                       /* rows too long for a cache: exponentials go to `out` at once */
    int stream;
    int64_t tasks;
    int threads;
    size_t at_state, at_p, scratch_bytes;               /* the exponentials, or a copy of x, come first */
} qkv_softmax_plan;

qkv_status qkv_plan_softmax(const qkv_softmax_problem *problem, qkv_softmax_plan *plan);

/* Of angles, in a task. */
int64_t qkv_angles_rows(const qkv_angles_problem *problem);

/* A rotation: a grid of sequences x blocks of tokens x blocks of heads. */
typedef struct {
    const qkv_kernels *kernels;
    int64_t sequences;
    int64_t block, blocks;            /* tokens */
    int64_t heads, head_blocks;       /* query heads of a task */
    int by_token;                     /* the heads of a token are nearer to each other than the tokens of a head */
    int copy_x, copy_out;             /* rows go through scratch, because of these obstacles */
    int64_t group_rows;               /* of them at a time */
    int64_t ahead;                    /* elements between what is read and what is fetched */
    int stream;
    int64_t tasks;
    int threads;
    size_t at_sin, at_rows, scratch_bytes;              /* of neighbours, a block's cosines come first */
} qkv_rotation_plan;

qkv_status qkv_plan_rotation(const qkv_rotation_problem *problem, qkv_rotation_plan *plan);

#endif
