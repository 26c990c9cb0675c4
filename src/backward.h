/* Gradients: what is kept of rows and of keys while they meet, and what is written of it. */
#ifndef QKV_BACKWARD_H
#define QKV_BACKWARD_H

#include "tile.h"

/* Whether the keys of a pass, which is a block, and their values, where the kernels read them, hold no NaN and no infinity. Those of a
 * range are looked at once. */
int qkv_are_finite(const qkv_query_tile *tile, qkv_range keys, const char *k, ptrdiff_t k_row, const char *v, ptrdiff_t v_row);

/* The state of every panel before the first key. */
void qkv_begin_gradients(const qkv_query_tile *tile);

/* One kernel call, as of qkv_ask; careful: its keys or values may not be finite. */
void qkv_add_gradients(const qkv_query_tile *tile, const qkv_panel *panel, int lane, int64_t key, const qkv_tile *of, int careful);

/* What the tile's rows have from a range of keys is added to their part of dQ. */
void qkv_write_query_gradients(const qkv_query_tile *tile);

/* dQ of the query heads of a key head from its parts, when all are there. */
void qkv_join_query_gradients(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head);

/* dK and dV of a range of keys: none yet, and written. */
void qkv_begin_key_gradients(const qkv_problem *problem, const qkv_plan *plan, char *scratch);
void qkv_write_key_gradients(const qkv_problem *problem, const qkv_plan *plan, int64_t sequence, int64_t head, qkv_range keys,
                             char *scratch);

#endif
