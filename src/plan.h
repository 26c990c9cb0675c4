/* How a problem will be computed: kernels, tile sizes, chunks, tasks, scratch. */
#ifndef QKV_PLAN_H
#define QKV_PLAN_H

#include "kernels/kernels.h"
#include "qkv.h"

enum { QKV_PANEL_BYTES = 64 };        /* room for a qkv_panel of tile.h */

/* The work is a grid: sequences x key heads x query tiles, and, if split, x chunks of keys. A query tile is some panels
 * of one (sequence, key head); its rows are (position, head of the group) pairs, the head running fastest. */
typedef struct {
    const qkv_kernels *kernels;
    double q_factor, rest;            /* their product is the scale: what goes into Q^T, and what multiplies scores */
    double c;                         /* log2(e) * rest, within the type */

    int64_t sequences, group;         /* query heads per key head */
    int64_t rows;                     /* of one key head: len_q * group */
    int64_t tile_panels;              /* panels in a query tile */
    int64_t tiles;                    /* query tiles of one key head */

    int64_t block;                    /* keys of one kernel call; bounds are multiples of it */
    int64_t chunk;                    /* keys summed apart and then merged; a multiple of block */
    int64_t chunks;
    int64_t pass;                     /* keys that all panels of a tile see before the next; a multiple of block, at most chunk */
    int split;                        /* chunks are tasks of their own */
    int copy_k, copy_v;               /* passes are copied to scratch first, because of these obstacles */
    int cold;                         /* the first panel of a pass fetches its K and V ahead */
    int direct_q, direct_out;         /* rows can be read and written where they lie: there are no */
    int obstacles_q, obstacles_out;

    int64_t tasks;
    int threads;

    /* Scratch of one worker: byte offsets from its beginning. */
    size_t state_bytes;               /* O, m, l of one panel */
    size_t at_panels, at_limits, at_rows, at_q, at_state, at_total, at_s, at_k, at_v, at_tile;
    int64_t copy_row_k, copy_row_v;   /* elements per row of copied K and V */
    size_t scratch_bytes;
    size_t partial_bytes;             /* all partial states of a split problem */
} qkv_plan;

qkv_status qkv_make_plan(const qkv_problem *problem, qkv_plan *plan);

#endif
