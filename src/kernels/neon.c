/* The neon path: primitives for 4 floats or 2 doubles in 32 registers, and multiply-adds that take one factor from an element
 * of a register. Every 64-bit Arm has them. */
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "compiler.h"

/* z <- z + y * x[lane]. Of a chain of the intrinsic gcc puts every step into a register of its own, and has to move some (1.25
 * times the instructions of a product); an operand that is read and written keeps one. */
#if defined(__GNUC__) && !defined(__clang__)
#define MAD_LANE(z, kind, y, x, element, lane, intrinsic) \
    __asm__("fmla %0." kind ", %1." kind ", %2." element "[" #lane "]" : "+w"(z) : "w"(y), "w"(x))
#else
#define MAD_LANE(z, kind, y, x, element, lane, intrinsic) (z = intrinsic(z, y, x, lane))
#endif

/* float32 */

#include "neon_tpl.h"

static inline vec_f32 mad_lane_f32(vec_f32 x, int lane, vec_f32 y, vec_f32 z)
{
    switch (lane) {
    case 0: MAD_LANE(z, "4s", y, x, "s", 0, vfmaq_laneq_f32); break;
    case 1: MAD_LANE(z, "4s", y, x, "s", 1, vfmaq_laneq_f32); break;
    case 2: MAD_LANE(z, "4s", y, x, "s", 2, vfmaq_laneq_f32); break;
    default: MAD_LANE(z, "4s", y, x, "s", 3, vfmaq_laneq_f32);
    }
    return z;
}
static inline uint32x4_t four_bytes(const void *p)
{
    uint32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)))));
}
static inline vec_f32 widen_i8_f32(const void *p)
{
    int32x4_t high = vreinterpretq_s32_u32(vshlq_n_u32(four_bytes(p), 24));
    return vcvtq_n_f32_s32(high, 24);                   /* n 2^24 / 2^24 */
}
static inline vec_f32 widen_i4_f32(const void *p, int at, const char *scale)
{
    uint16_t half;
    memcpy(&half, scale, sizeof half);
    vec_f32 factor = vreinterpretq_f32_u32(vdupq_n_u32((uint32_t)half << 16));
    uint32x4_t n = four_bytes((const char *)p + at % 16);
    n = at < 16 ? vandq_u32(n, vdupq_n_u32(15)) : vshrq_n_u32(n, 4);
    return vmulq_f32(factor, vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(n), vdupq_n_s32(8))));
}

#define T f32
#define LANE_VECTORS 4
#define ROW_TILE 4
#define ROW_TILE_1 16
#define LANE_MADS 1
#define SUMS 16
#define PAIR 1
#define NARROWS 1
#define WIDENS 1
#define HALVES_AHEAD 9216
#define HALVES_SHARED 1
#define EXP2_STEPS 1
#include "kernel_tpl.h"

/* float64 */

typedef double real_f64;
typedef float64x2_t vec_f64;
typedef uint64x2_t mask_f64;
enum { width_f64 = 2 };

static inline vec_f64 load_f64(const double *p) { return vld1q_f64(p); }
static inline void store_f64(double *p, vec_f64 x) { vst1q_f64(p, x); }
static inline vec_f64 loadu_f64(const double *p) { return vld1q_f64(p); }
LOAD_ON(f64, float64x2x2_t, float64x2x4_t)
static inline void storeu_f64(double *p, vec_f64 x) { vst1q_f64(p, x); }
static inline void stream_f64(double *p, vec_f64 x) { vst1q_f64(p, x); }
static inline void fence_f64(void) {}
static inline vec_f64 load_part_f64(const double *p, int n)
{
    vec_f64 none = vdupq_n_f64(0);
    return n == 2 ? vld1q_f64(p) : n == 1 ? vld1q_lane_f64(p, none, 0) : none;
}
static inline void store_part_f64(double *p, vec_f64 x, int n)
{
    if (n == 2)
        vst1q_f64(p, x);
    if (n == 1)
        vst1q_lane_f64(p, x, 0);
}
static inline mask_f64 seen_f64(const uint8_t *p, int n)
{
    uint64x2_t wide = vdupq_n_u64(n > 0 ? p[0] : 0);
    wide = vsetq_lane_u64(n > 1 ? p[1] : 0, wide, 1);
    return vtstq_u64(wide, wide);
}
static inline float32x2_t two_halves(const void *p, int bfloat)
{
    uint32_t bits;
    memcpy(&bits, p, sizeof bits);
    uint16x4_t halves = vreinterpret_u16_u32(vdup_n_u32(bits));
    return vget_low_f32(bfloat ? vreinterpretq_f32_u32(vshll_n_u16(halves, 16)) : vcvt_f32_f16(vreinterpret_f16_u16(halves)));
}
static inline vec_f64 widen_f16_f64(const void *p) { return vcvt_f64_f32(two_halves(p, 0)); }
static inline vec_f64 widen_bf16_f64(const void *p) { return vcvt_f64_f32(two_halves(p, 1)); }
static inline vec_f64 set1_f64(double a) { return vdupq_n_f64(a); }
static inline vec_f64 add_f64(vec_f64 x, vec_f64 y) { return vaddq_f64(x, y); }
static inline vec_f64 sub_f64(vec_f64 x, vec_f64 y) { return vsubq_f64(x, y); }
static inline vec_f64 mul_f64(vec_f64 x, vec_f64 y) { return vmulq_f64(x, y); }
static inline vec_f64 div_f64(vec_f64 x, vec_f64 y) { return vdivq_f64(x, y); }
static inline vec_f64 fma_f64(vec_f64 x, vec_f64 y, vec_f64 z) { return vfmaq_f64(z, x, y); }
static inline vec_f64 mad_lane_f64(vec_f64 x, int lane, vec_f64 y, vec_f64 z)
{
    if (lane)
        MAD_LANE(z, "2d", y, x, "d", 1, vfmaq_laneq_f64);
    else
        MAD_LANE(z, "2d", y, x, "d", 0, vfmaq_laneq_f64);
    return z;
}
static inline vec_f64 min_f64(vec_f64 x, vec_f64 y) { return vminq_f64(x, y); }
static inline vec_f64 max_f64(vec_f64 x, vec_f64 y) { return vmaxq_f64(x, y); }
static inline vec_f64 maxnum_f64(vec_f64 x, vec_f64 y) { return vmaxnmq_f64(x, y); }
static inline mask_f64 less_f64(vec_f64 x, vec_f64 y) { return vcltq_f64(x, y); }
static inline mask_f64 equal_f64(vec_f64 x, vec_f64 y) { return vceqq_f64(x, y); }
static inline mask_f64 beyond_f64(vec_f64 x, vec_f64 y)
{
    return vreinterpretq_u64_u32(vmvnq_u32(vreinterpretq_u32_u64(vcleq_f64(x, y))));
}
static inline int any_f64(mask_f64 m) { return vmaxvq_u32(vreinterpretq_u32_u64(m)) != 0; }
static inline vec_f64 select_f64(mask_f64 m, vec_f64 x, vec_f64 y) { return vbslq_f64(m, x, y); }

static inline vec_f64 power_f64(vec_f64 t)
{
    return vreinterpretq_f64_s64(vaddq_s64(vshlq_n_s64(vreinterpretq_s64_f64(t), 52), vdupq_n_s64((int64_t)1023 << 52)));
}

static inline void exchange_f64(vec_f64 *x, vec_f64 *y)
{
    *x = vextq_f64(*x, *x, 1);
    *y = vextq_f64(*y, *y, 1);
}

static inline void transpose_f64(vec_f64 x[2])
{
    vec_f64 first = vzip1q_f64(x[0], x[1]);
    x[1] = vzip2q_f64(x[0], x[1]);
    x[0] = first;
}

static inline vec_f64 sum_each_f64(vec_f64 x[2]) { return vpaddq_f64(x[0], x[1]); }

#define T f64
#define LANE_VECTORS 4
#define ROW_TILE 4
#define ROW_TILE_1 16
#define LANE_MADS 1
#define SUMS 16
#define PAIR 1
#define NARROWS 0
#define WIDENS 0
#define EXP2_STEPS 1
#include "kernel_tpl.h"

const qkv_isa qkv_neon = {
    .name = "neon",
    .needs = 0,
    .type = {&kernels_f32, &kernels_f64},
};
