/* The portable path: no intrinsics, whatever the baseline of the target is. 16-byte vectors fit every one of them. */
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "compiler.h"

#define VECTOR_BYTES 16

#define T f32
#define REAL_TYPE float
#define BITS_TYPE uint32_t
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#include "portable_tpl.h"

/* Rounded where the bits that are lost, and half of an even last one, carry. */
static inline uint32_t f16_of(uint32_t x)
{
    uint32_t sign = x >> 16 & 0x8000, size = x & 0x7fffffff;
    if (size > 0x7f800000)
        return sign | 0x7e00;
    if (size >= 0x47800000)           /* 2^16 */
        return sign | 0x7c00;
    if (size < 0x38800000) {          /* 2^-14: subnormal. Added to 1/2, units of 2^-24 are the last bit. */
        float half;
        memcpy(&half, &size, sizeof half);
        half += 0.5f;
        memcpy(&size, &half, sizeof half);
        return sign | (size - 0x3f000000);
    }
    return sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
}

static inline uint32_t bf16_of(uint32_t x)
{
    return ((x & 0x7fffffff) > 0x7f800000 ? x | 0x400000 : x + 0x7fff + (x >> 16 & 1)) >> 16;
}

static inline void narrow_by(uint32_t (*of)(uint32_t), void *p, vec_f32 x)
{
    uint32_t bits[width_f32];
    uint16_t half[width_f32];
    memcpy(bits, &x, sizeof bits);
    for (int i = 0; i < width_f32; i++)
        half[i] = (uint16_t)of(bits[i]);
    memcpy(p, half, sizeof half);
}

static inline void narrow_f16_f32(void *p, vec_f32 x) { narrow_by(f16_of, p, x); }
static inline void narrow_bf16_f32(void *p, vec_f32 x) { narrow_by(bf16_of, p, x); }

#define LANE_VECTORS 3
#define ROW_TILE 4
#define ROW_TILE_1 4
#define LANE_MADS 0
#define SUMS 8
#define PAIR 1
#define NARROWS 1
#define WIDENS 0
#define EXP2_STEPS 1
#include "kernel_tpl.h"

#define T f64
#define REAL_TYPE double
#define BITS_TYPE uint64_t
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#include "portable_tpl.h"
#define LANE_VECTORS 3
#define ROW_TILE 4
#define ROW_TILE_1 4
#define LANE_MADS 0
#define SUMS 8
#define PAIR 1
#define NARROWS 0
#define WIDENS 0
#define EXP2_STEPS 1
#include "kernel_tpl.h"

const qkv_isa qkv_portable = {
    .name = "portable",
    .needs = 0,
    .type = {&kernels_f32, &kernels_f64},
};
