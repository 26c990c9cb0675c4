/* Questions about where attention falls: what is kept of a panel's rows while they meet their keys, and what is written of it. */
#ifndef QKV_SPOTLIGHT_H
#define QKV_SPOTLIGHT_H

#include "tile.h"

/* The state of every panel before the first key. */
void qkv_begin_answer(const qkv_query_tile *tile);

/* One kernel call: the lanes from `lane` on of a panel against the tile's keys, the first of which is `key`. */
void qkv_ask(const qkv_query_tile *tile, const qkv_panel *panel, int lane, int64_t key, const qkv_tile *of);

/* Writes what was asked of the tile's rows. */
void qkv_write_answer(const qkv_query_tile *tile);

/* A task's columns of cells: they are divided into parts, and no query has been counted; the queries of a tile, which come in
 * order, are counted, and rows of cells that have all of theirs are written. */
void qkv_begin_cells(const qkv_problem *problem, const qkv_plan *plan, qkv_range columns, char *scratch);
void qkv_count_cells(const qkv_query_tile *tile, qkv_range columns);

/* Of INFLUENCE: the values of keys, counted from the tile's first, less the centre that they and the outputs of this head have from
 * here on; returns whether they are finite. The keys that rows have met with more than half their weight. */
int qkv_centre_values(const qkv_query_tile *tile, qkv_range keys);
void qkv_write_heavy(const qkv_query_tile *tile);

/* Of GROUPS: a tile's rows before the first group. Their state is then that of a group, from no keys on; with all of its keys it is
 * settled, what is less than another group's weight added to the sums of its group; in the end so is the heaviest. */
void qkv_begin_groups(const qkv_query_tile *tile);
void qkv_begin_group(const qkv_query_tile *tile, uint64_t chosen);
void qkv_settle_group(const qkv_query_tile *tile, int64_t group, double *sums);
void qkv_end_groups(const qkv_query_tile *tile, double *sums);

/* Of MOVED: whether rows of a tile have such a key; how far these rows move, from their totals without it. */
int qkv_has_heavy(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head, int64_t tile);
void qkv_write_moved(const qkv_query_tile *tile);

/* Sums over queries of a range of keys: none yet, and written. */
void qkv_begin_sums(const qkv_plan *plan, char *scratch);
void qkv_write_sums(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head, qkv_range keys,
                    const char *scratch);

#endif
