/* Few query rows: what forward.c hands over. */
#ifndef QKV_DECODE_H
#define QKV_DECODE_H

#include "call.h"

/* Tile number `base`, number `tile` of the few rows of this key head, against all their keys, or one chunk of them if the call is split. */
void qkv_decode(qkv_call *call, int worker, int64_t sequence, int64_t head, int64_t tile, int64_t base, int64_t chunk);

#endif
