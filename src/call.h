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

#endif
