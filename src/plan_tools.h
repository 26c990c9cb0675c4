/* What both planners need, and the numbers that they share. Of plans it knows nothing. */
#ifndef QKV_PLAN_TOOLS_H
#define QKV_PLAN_TOOLS_H

#include <math.h>
#include <stdlib.h>

#include "cpu.h"
#include "mask.h"
#include "types.h"

enum {
    COPY_PAD = 16,                    /* elements between copied rows, which would fight for cache sets */
    ALIGNMENT = 64
};
static const double SERIAL_FLOPS = 3e6;                 /* about 30 us of one core: not worth waking another */
static const double TASK_FLOPS = 2e9;                   /* about 20 ms, so that an interrupt is seen between tasks */

static inline const qkv_kernels *kernels_of(int isa, qkv_type type) { return qkv_kernels_at(isa, (int)qkv_arithmetic(type)); }
static inline size_t align(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

static inline int multiply(int64_t a, int64_t b, int64_t *product)
{
    if (b != 0 && a > INT64_MAX / b)
        return 0;
    *product = a * b;
    return 1;
}

/* A number that is a multiple of a power of two if all addresses of rows are. */
static inline int64_t places(const void *data, int n_axes, const qkv_strides *at)
{
    int64_t bits = (int64_t)(uintptr_t)data | at->head | at->row | at->beam;
    for (int i = 0; i < n_axes; i++)
        bits |= at->axis[i];
    return bits;
}

/* What keeps a row of elements from being used where it lies; 0 if nothing does. */
static inline int obstacles(const void *data, int n_axes, const qkv_strides *at, int swapped, int size)
{
    int64_t bits = places(data, n_axes, at);
    return (swapped ? QKV_SWAPPED : 0) | (at->dim != size ? QKV_STRIDED : 0) | (bits % size ? QKV_UNALIGNED : 0);
}

/* The scale as two factors. Q takes the sign (and with it a scale of 0: -inf * 0 would be NaN) and, of a scale near the
 * ends of the type, a power of two, which is exact and keeps c and 1/c within the type. The rest stays out of Q, where
 * rounding it would show in large scores. */
static inline void split_scale(double scale, int wide, double *factor, double *rest)
{
    int exponent, plain = wide ? 1000 : 120;            /* exponents: the types end at 1023 and 127 */
    frexp(scale, &exponent);
    int shift = abs(exponent) <= plain ? 0
        : exponent > 0 ? (int)qkv_min(exponent - plain, plain) : (int)qkv_max(exponent + plain, -plain);
    *factor = scale == 0 ? 0 : copysign(ldexp(1, shift), scale);
    *rest = scale == 0 ? 1 : ldexp(fabs(scale), -shift);
}

/* The table of tiles for numbers of these types, whose widest is the first, or NULL. Parts of numbers hold them exactly, but for what
 * is below the smallest normal one; a factor can only be their sign. */
static inline const qkv_kernels *tiles_of(int isa, const qkv_type *types, int n, double factor)
{
    const qkv_isa *path = qkv_isa_at(isa);
    int parts = 1;
    for (int i = 0; i < n; i++)
        parts = types[i] == QKV_BF16 ? parts : types[i] == QKV_F16 ? (int)qkv_max(parts, 2) : 3;
    return types[0] == QKV_F64 || fabs(factor) != 1 || !qkv_may_use_tiles(path) ? NULL : path->tiles[parts - 1];
}

#endif
