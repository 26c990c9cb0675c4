/* Scratch memory. Blocks up to some size are kept between calls, so that most calls allocate nothing. */
#ifndef QKV_MEMORY_H
#define QKV_MEMORY_H

#include <stddef.h>

/* A block of at least `bytes` bytes, aligned to 64; NULL if memory cannot be had. `slot` (a worker's number) is where a
 * kept block is looked for first, so that a worker tends to get memory that its core has in cache. */
void *qkv_scratch_take(size_t bytes, int slot);
void qkv_scratch_put(void *scratch, int slot);           /* NULL is fine */

#endif
