/* The avx512 path: primitives for 16 floats or 8 doubles, 32 registers. Built with the flags of AVX-512 F, VL, DQ, BW
 * and CD, so nothing of this file may run before cpu.c has seen all of them. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "compiler.h"

/* float32 */

#define T f32
#include "avx512_tpl.h"

static inline vec_f32 widen_i8_f32(const void *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}
/* A table of what each n means. Indices are the low four bits. */
static inline vec_f32 widen_i4_f32(const void *p, int at, const char *scale)
{
    const vec_f32 plain = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    int32_t bits;
    memcpy(&bits, scale - 2, sizeof bits);
    __m512i both = _mm512_and_si512(_mm512_set1_epi32(bits), _mm512_set1_epi32(-0x10000));
    __m512i n = _mm512_cvtepu8_epi32(_mm_loadu_si128(p));
    return _mm512_permutexvar_ps(at < 16 ? n : _mm512_srli_epi32(n, 4), _mm512_mul_ps(plain, _mm512_castsi512_ps(both)));
}

#define LANE_VECTORS 3
#define ROW_TILE 8
#define ROW_TILE_1 8
#define LANE_MADS 0
#define SUMS 16
#define PAIR 1
#define NARROWS 1
#define WIDENS 1
#define HALVES_AHEAD 20480
#define HALVES_SHARED 1
#define EXP2_STEPS 8
#include "kernel_tpl.h"

/* float64 */

typedef double real_f64;
typedef __m512d vec_f64;
typedef __mmask8 mask_f64;
enum { width_f64 = 8 };

static inline __mmask8 first_f64(int n) { return (__mmask8)((1u << n) - 1); }
static inline vec_f64 load_f64(const double *p) { return _mm512_load_pd(p); }
static inline void store_f64(double *p, vec_f64 x) { _mm512_store_pd(p, x); }
static inline vec_f64 loadu_f64(const double *p) { return _mm512_loadu_pd(p); }
static inline void storeu_f64(double *p, vec_f64 x) { _mm512_storeu_pd(p, x); }
static inline void stream_f64(double *p, vec_f64 x) { _mm512_stream_pd(p, x); }
static inline void fence_f64(void) { _mm_sfence(); }
static inline vec_f64 load_part_f64(const double *p, int n) { return _mm512_maskz_loadu_pd(first_f64(n), p); }
static inline void store_part_f64(double *p, vec_f64 x, int n) { _mm512_mask_storeu_pd(p, first_f64(n), x); }
static inline mask_f64 seen_f64(const uint8_t *p, int n)
{
    __m128i bytes = _mm_maskz_loadu_epi8(first_f64(n), p);
    return (__mmask8)_mm_test_epi8_mask(bytes, bytes);
}
static inline vec_f64 widen_f16_f64(const void *p) { return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(p))); }
static inline vec_f64 widen_bf16_f64(const void *p)
{
    __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
    return _mm512_cvtps_pd(_mm256_castsi256_ps(bits));
}
static inline vec_f64 set1_f64(double a) { return _mm512_set1_pd(a); }
static inline vec_f64 add_f64(vec_f64 x, vec_f64 y) { return _mm512_add_pd(x, y); }
static inline vec_f64 sub_f64(vec_f64 x, vec_f64 y) { return _mm512_sub_pd(x, y); }
static inline vec_f64 mul_f64(vec_f64 x, vec_f64 y) { return _mm512_mul_pd(x, y); }
static inline vec_f64 div_f64(vec_f64 x, vec_f64 y) { return _mm512_div_pd(x, y); }
static inline vec_f64 fma_f64(vec_f64 x, vec_f64 y, vec_f64 z) { return _mm512_fmadd_pd(x, y, z); }
static inline vec_f64 min_f64(vec_f64 x, vec_f64 y) { return _mm512_min_pd(x, y); }
static inline vec_f64 max_f64(vec_f64 x, vec_f64 y) { return _mm512_max_pd(x, y); }
static inline vec_f64 maxnum_f64(vec_f64 x, vec_f64 y) { return _mm512_max_pd(x, y); }
static inline mask_f64 less_f64(vec_f64 x, vec_f64 y) { return _mm512_cmp_pd_mask(x, y, _CMP_LT_OQ); }
static inline mask_f64 equal_f64(vec_f64 x, vec_f64 y) { return _mm512_cmp_pd_mask(x, y, _CMP_EQ_OQ); }
static inline mask_f64 beyond_f64(vec_f64 x, vec_f64 y) { return _mm512_cmp_pd_mask(x, y, _CMP_NLE_UQ); }
static inline int any_f64(mask_f64 m) { return m != 0; }
static inline vec_f64 select_f64(mask_f64 m, vec_f64 x, vec_f64 y) { return _mm512_mask_blend_pd(m, y, x); }

static inline vec_f64 power_f64(vec_f64 t)
{
    const __m512i fraction = _mm512_setr_epi64(
        0x3ff0000000000000, 0x3ff172b83c7d517b - (1LL << 49), 0x3ff306fe0a31b715 - (2LL << 49),
        0x3ff4bfdad5362a27 - (3LL << 49), 0x3ff6a09e667f3bcd - (4LL << 49), 0x3ff8ace5422aa0db - (5LL << 49),
        0x3ffae89f995ad3ad - (6LL << 49), 0x3ffd5818dcfba487 - (7LL << 49));
    __m512i n = _mm512_castpd_si512(t);
    return _mm512_castsi512_pd(_mm512_add_epi64(_mm512_permutexvar_epi64(n, fraction), _mm512_slli_epi64(n, 49)));
}

static inline void exchange_f64(vec_f64 *x, vec_f64 *y)
{
    *x = _mm512_permute_pd(*x, 0x55);
    *y = _mm512_permute_pd(*y, 0x55);
}

static inline void transpose_f64(vec_f64 x[8])
{
    vec_f64 y[8];
    QKV_UNROLL
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm512_unpacklo_pd(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_pd(x[i], x[i + 1]);
    }
    /* y[2 * i + c] holds column 2 * q + c of rows 2 * i, 2 * i + 1 in its quarter q. */
    QKV_UNROLL
    for (int c = 0; c < 2; c++) {
        vec_f64 a = _mm512_shuffle_f64x2(y[c], y[2 + c], 0x88), b = _mm512_shuffle_f64x2(y[4 + c], y[6 + c], 0x88);
        vec_f64 d = _mm512_shuffle_f64x2(y[c], y[2 + c], 0xdd), e = _mm512_shuffle_f64x2(y[4 + c], y[6 + c], 0xdd);
        x[c] = _mm512_shuffle_f64x2(a, b, 0x88);
        x[4 + c] = _mm512_shuffle_f64x2(a, b, 0xdd);
        x[2 + c] = _mm512_shuffle_f64x2(d, e, 0x88);
        x[6 + c] = _mm512_shuffle_f64x2(d, e, 0xdd);
    }
}

static inline vec_f64 sum_each_f64(vec_f64 x[8])
{
    vec_f64 y[4], z[2];
    QKV_UNROLL
    for (int i = 0; i < 4; i++) {
        vec_f64 a = x[i % 2 + i / 2 * 4], b = x[i % 2 + i / 2 * 4 + 2];
        y[i] = _mm512_add_pd(_mm512_mask_blend_pd(0xf0, a, b), _mm512_shuffle_f64x2(a, b, 0x4e));
    }
    QKV_UNROLL
    for (int i = 0; i < 2; i++)
        z[i] = _mm512_add_pd(_mm512_shuffle_f64x2(y[i], y[i + 2], 0x88), _mm512_shuffle_f64x2(y[i], y[i + 2], 0xdd));
    return _mm512_add_pd(_mm512_unpacklo_pd(z[0], z[1]), _mm512_unpackhi_pd(z[0], z[1]));
}

#define T f64
#define LANE_VECTORS 3
#define ROW_TILE 8
#define ROW_TILE_1 8
#define LANE_MADS 0
#define SUMS 16
#define PAIR 1
#define NARROWS 0
#define WIDENS 0
#define EXP2_STEPS 8
#include "kernel_tpl.h"

const qkv_isa qkv_avx512 = {
    .name = "avx512",
    .needs = QKV_CPU_AVX512,
    .type = {&kernels_f32, &kernels_f64},
};
