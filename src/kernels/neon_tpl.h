/* Primitives for 4 floats in 32 registers, for the two files that are built for Arm. */

/* Loads n vectors, 1, 2 or 4, and moves on, in one instruction, which gcc does not make of two. Registers of the first kind of
 * load follow one another, so that some of two vectors would be copied; the second kind moves by its own size alone. */
#if defined(__GNUC__) && !defined(__clang__)
#define LOAD_NEXT(bytes, registers, y) \
    __asm__("ld1 {" registers "}, [%1], %2" : "=w"(y), "+r"(*p) \
            : "r"(step * (ptrdiff_t)sizeof **p), "m"(*(const char (*)[bytes])*p))
#define LOAD_ON(T, x2, x4) \
    static QKV_INLINE void load_on_##T(const real_##T **p, ptrdiff_t step, vec_##T *x, const int n) \
    { \
        if (n == 4) { \
            x4 y; \
            LOAD_NEXT(64, "%S0.16b - %V0.16b", y); \
            x[0] = y.val[0], x[1] = y.val[1], x[2] = y.val[2], x[3] = y.val[3]; \
        } else if (n == 1) { \
            LOAD_NEXT(16, "%0.16b", x[0]); \
        } else if (__builtin_constant_p(step) && step == 2 * width_##T) { \
            __asm__("ldp %q0, %q1, [%2], #32" : "=w"(x[0]), "=w"(x[1]), "+r"(*p) : "m"(*(const char (*)[32])*p)); \
        } else { \
            x2 y; \
            LOAD_NEXT(32, "%S0.16b - %T0.16b", y); \
            x[0] = y.val[0], x[1] = y.val[1]; \
        } \
    }
#else
#define LOAD_ON(T, x2, x4) \
    static QKV_INLINE void load_on_##T(const real_##T **p, ptrdiff_t step, vec_##T *x, const int n) \
    { \
        for (int i = 0; i < n; i++) \
            x[i] = loadu_##T(*p + i * width_##T); \
        *p += step; \
    }
#endif

typedef float real_f32;
typedef float32x4_t vec_f32;
typedef uint32x4_t mask_f32;
enum { width_f32 = 4 };

static inline vec_f32 load_f32(const float *p) { return vld1q_f32(p); }
static inline void store_f32(float *p, vec_f32 x) { vst1q_f32(p, x); }
/* Pairs may lie at any even address, and vld1q_f32 is for those of floats. */
static inline vec_f32 loadu_f32(const void *p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
LOAD_ON(f32, float32x4x2_t, float32x4x4_t)
static inline void storeu_f32(float *p, vec_f32 x) { vst1q_f32(p, x); }
static inline void stream_f32(float *p, vec_f32 x) { vst1q_f32(p, x); }
static inline void fence_f32(void) {}
static inline vec_f32 load_part_f32(const float *p, int n)
{
    vec_f32 x = vdupq_n_f32(0);
    switch (n) {
    case 1: return vld1q_lane_f32(p, x, 0);
    case 2: return vcombine_f32(vld1_f32(p), vget_low_f32(x));
    case 3: return vld1q_lane_f32(p + 2, vcombine_f32(vld1_f32(p), vget_low_f32(x)), 2);
    case 4: return vld1q_f32(p);
    default: return x;
    }
}
static inline void store_part_f32(float *p, vec_f32 x, int n)
{
    if (n == 4) {
        vst1q_f32(p, x);
        return;
    }
    if (n & 2)
        vst1_f32(p, vget_low_f32(x));
    if (n == 3)
        vst1q_lane_f32(p + 2, x, 2);
    if (n == 1)
        vst1q_lane_f32(p, x, 0);
}
static inline mask_f32 seen_f32(const uint8_t *p, int n)
{
    uint32_t bytes = 0;
    memcpy(&bytes, p, (size_t)n);
    uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)))));
    return vtstq_u32(wide, wide);
}
static inline vec_f32 widen_f16_f32(const void *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
static inline vec_f32 widen_bf16_f32(const void *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
static inline void narrow_f16_f32(void *p, vec_f32 x) { vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32(x))); }
/* A NaN may lose all its bits but this one. */
static inline void narrow_bf16_f32(void *p, vec_f32 x)
{
    uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u8(p, vreinterpret_u8_u16(vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), up, quiet), 16)));
}
static inline vec_f32 set1_f32(float a) { return vdupq_n_f32(a); }
static inline vec_f32 add_f32(vec_f32 x, vec_f32 y) { return vaddq_f32(x, y); }
static inline vec_f32 sub_f32(vec_f32 x, vec_f32 y) { return vsubq_f32(x, y); }
static inline vec_f32 mul_f32(vec_f32 x, vec_f32 y) { return vmulq_f32(x, y); }
static inline vec_f32 div_f32(vec_f32 x, vec_f32 y) { return vdivq_f32(x, y); }
static inline vec_f32 fma_f32(vec_f32 x, vec_f32 y, vec_f32 z) { return vfmaq_f32(z, x, y); }
static inline vec_f32 min_f32(vec_f32 x, vec_f32 y) { return vminq_f32(x, y); }
static inline vec_f32 max_f32(vec_f32 x, vec_f32 y) { return vmaxq_f32(x, y); }
static inline vec_f32 maxnum_f32(vec_f32 x, vec_f32 y) { return vmaxnmq_f32(x, y); }
static inline mask_f32 less_f32(vec_f32 x, vec_f32 y) { return vcltq_f32(x, y); }
static inline mask_f32 equal_f32(vec_f32 x, vec_f32 y) { return vceqq_f32(x, y); }
static inline mask_f32 beyond_f32(vec_f32 x, vec_f32 y) { return vmvnq_u32(vcleq_f32(x, y)); }
static inline int any_f32(mask_f32 m) { return vmaxvq_u32(m) != 0; }
static inline vec_f32 select_f32(mask_f32 m, vec_f32 x, vec_f32 y) { return vbslq_f32(m, x, y); }

/* A look-up takes five instructions, as many as the three terms that it saves. */
static inline vec_f32 power_f32(vec_f32 t)
{
    return vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(t), 23), vdupq_n_s32(127 << 23)));
}

static inline void exchange_f32(vec_f32 *x, vec_f32 *y)
{
    *x = vrev64q_f32(*x);
    *y = vrev64q_f32(*y);
}

static inline void transpose_f32(vec_f32 x[4])
{
    float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(x[0], x[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(x[0], x[1]));
    float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(x[2], x[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(x[2], x[3]));
    x[0] = vreinterpretq_f32_f64(vzip1q_f64(a, c));
    x[1] = vreinterpretq_f32_f64(vzip1q_f64(b, d));
    x[2] = vreinterpretq_f32_f64(vzip2q_f64(a, c));
    x[3] = vreinterpretq_f32_f64(vzip2q_f64(b, d));
}

static inline vec_f32 sum_each_f32(vec_f32 x[4])
{
    return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
}
