/* One call of qkv_forward, as its tasks see it. */
#ifndef QKV_CALL_H
#define QKV_CALL_H

#include "plan.h"
#include "threads.h"

typedef struct {
    const qkv_problem *problem;
    const qkv_plan *plan;
    char *partials;                   /* (tasks / chunks, chunks, tile_panels) states, if split */
    _Atomic int64_t *pending;         /* (tasks / chunks): chunks not yet computed, if split */
    const int64_t *first_tile;        /* (sequences + 1): query tiles before each sequence, or NULL: all have as many */
    uint8_t *summary;                 /* of the mask, or NULL */
    char **scratch;                   /* one per worker: its counters, then scratch of the plan */
    qkv_stop stop;
} qkv_call;

/* A worker's counters lie before its scratch, which stays aligned. */
_Static_assert(sizeof(qkv_counters) % 64 == 0, "counters misalign scratch");

/* Tile number `base`, the few rows of this key head, against all its keys, or one chunk of them if the call is split. */
void qkv_decode(qkv_call *call, int worker, int64_t sequence, int64_t head, int64_t base, int64_t chunk);

#endif
