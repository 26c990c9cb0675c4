/* The neonbf16 path: BFDOT multiplies pairs of bfloat16 and adds both products to a float32 lane, at twice the rate of
 * multiply-adds. Attention of bfloat16 arrays alone; all else is the neon path's. Built with the flags of BF16, so nothing of
 * this file may run before cpu.c has seen it.
 *
 * A pair is 32 bits, so what moves elements of a float moves pairs. Only where they are multiplied do they differ.
 */
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "compiler.h"
#include "neon_tpl.h"

static inline bfloat16x8_t pairs_of(vec_f32 x) { return vreinterpretq_bf16_f32(x); }
static inline uint16x8_t halves_of(vec_f32 x) { return vreinterpretq_u16_f32(x); }

static inline vec_f32 mad_f32(vec_f32 x, vec_f32 y, vec_f32 z) { return vbfdotq_f32(z, pairs_of(x), pairs_of(y)); }

/* As in neon.c. */
#if defined(__GNUC__) && !defined(__clang__)
#define MAD_LANE(lane) __asm__("bfdot %0.4s, %1.8h, %2.2h[" #lane "]" : "+w"(z) : "w"(y), "w"(x))
#else
#define MAD_LANE(lane) (z = vbfdotq_laneq_f32(z, pairs_of(y), pairs_of(x), lane))
#endif
static inline vec_f32 mad_lane_f32(vec_f32 x, int lane, vec_f32 y, vec_f32 z)
{
    switch (lane) {
    case 0: MAD_LANE(0); break;
    case 1: MAD_LANE(1); break;
    case 2: MAD_LANE(2); break;
    default: MAD_LANE(3);
    }
    return z;
}

/* Where a weight is -1, neither it nor its value takes part. */
static inline vec_f32 mad_seen_f32(vec_f32 v, vec_f32 p, vec_f32 z)
{
    uint16x8_t hidden = vceqq_u16(halves_of(p), vdupq_n_u16(0xbf80));
    vec_f32 weights = vreinterpretq_f32_u16(vbicq_u16(halves_of(p), hidden));
    vec_f32 values = vreinterpretq_f32_u16(vbicq_u16(halves_of(v), hidden));
    return mad_f32(values, weights, z);
}

static inline vec_f32 append_f32(vec_f32 x, vec_f32 y)
{
    return vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(x), y));
}
static inline vec_f32 join_f32(vec_f32 x, vec_f32 y)
{
    uint16x8_t even = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(x)), odd = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(y));
    return vreinterpretq_f32_u16(vzip1q_u16(even, odd));
}
static inline vec_f32 interleave_f32(const void *a, const void *b)
{
    uint8x8_t none = vdup_n_u8(0);
    uint16x8_t low = vreinterpretq_u16_u8(vcombine_u8(vld1_u8(a), none));
    uint16x8_t high = vreinterpretq_u16_u8(vcombine_u8(vld1_u8(b), none));
    return vreinterpretq_f32_u16(vzip1q_u16(low, high));
}
static inline vec_f32 turn_f32(vec_f32 factor, vec_f32 x)
{
    uint32x4_t sign = vandq_u32(vreinterpretq_u32_f32(factor), vdupq_n_u32(0x80000000u));
    sign = vorrq_u32(sign, vshrq_n_u32(sign, 16));
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), sign));
}
static inline vec_f32 load_halves_f32(const void *p, int n)
{
    uint16_t some[8] = {0};
    if (n == 8)
        return vreinterpretq_f32_u8(vld1q_u8(p));
    memcpy(some, p, (size_t)n * sizeof *some);
    return vreinterpretq_f32_u16(vld1q_u16(some));
}

/* Their own order is the first. */
static inline vec_f32 zip_f32(vec_f32 x, vec_f32 y, const int at)
{
    uint16x8_t a = halves_of(x), b = halves_of(y);
    return vreinterpretq_f32_u16(at ? vzip2q_u16(a, b) : vzip1q_u16(a, b));
}
static inline vec_f32 unzip_f32(vec_f32 x, vec_f32 y, int at) { return at ? y : x; }

#define T f32
#define LANE_VECTORS 4
#define ROW_TILE 4
#define ROW_TILE_1 16
#define LANE_MADS 1
#define SUMS 16
#define PAIR 2
#define NARROWS 1
#define WIDENS 0
#define HALVES_AHEAD 9216
#define EXP2_STEPS 1
#include "kernel_tpl.h"

const qkv_isa qkv_neonbf16 = {
    .name = "neonbf16",
    .needs = QKV_CPU_BF16,
    .pairs = &kernels_f32,
};
