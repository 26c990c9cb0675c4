/* The avx2 path: primitives for 8 floats or 4 doubles, 16 registers, fused multiply-add. Built with the flags of AVX2,
 * FMA and F16C, so nothing of this file may run before cpu.c has seen all of them. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "compiler.h"

/* float32 */

typedef float real_f32;
typedef __m256 vec_f32;
typedef __m256 mask_f32;
enum { width_f32 = 8 };

static inline __m256i first_f32(int n)
{
    static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ones + 8 - n));
}

static inline vec_f32 load_f32(const float *p) { return _mm256_load_ps(p); }
static inline void store_f32(float *p, vec_f32 x) { _mm256_store_ps(p, x); }
static inline vec_f32 loadu_f32(const float *p) { return _mm256_loadu_ps(p); }
static inline void storeu_f32(float *p, vec_f32 x) { _mm256_storeu_ps(p, x); }
static inline void stream_f32(float *p, vec_f32 x) { _mm256_stream_ps(p, x); }
static inline void fence_f32(void) { _mm_sfence(); }
static inline vec_f32 load_part_f32(const float *p, int n) { return _mm256_maskload_ps(p, first_f32(n)); }
/* AMD takes ten times as long over a store under a mask. */
static inline void store_part_f32(float *p, vec_f32 x, int n)
{
    if (n == 8)
        _mm256_storeu_ps(p, x);
    else
        _mm256_maskstore_ps(p, first_f32(n), x);
}
static inline mask_f32 seen_f32(const uint8_t *p, int n)
{
    uint64_t bytes = 0;
    memcpy(&bytes, p, (size_t)n);
    __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
}
static inline vec_f32 widen_f16_f32(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline vec_f32 widen_bf16_f32(const void *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
static inline vec_f32 widen_i8_f32(const void *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
static inline vec_f32 widen_i4_f32(const void *p, int at, const char *scale)
{
    int32_t bits;
    memcpy(&bits, scale - 2, sizeof bits);
    vec_f32 factor = _mm256_castsi256_ps(_mm256_set1_epi32(bits & -0x10000));
    __m256i n = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)((const char *)p + at % 16)));
    n = at < 16 ? _mm256_and_si256(n, _mm256_set1_epi32(15)) : _mm256_srli_epi32(n, 4);
    return _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_sub_epi32(n, _mm256_set1_epi32(8))));
}
static inline void narrow_f16_f32(void *p, vec_f32 x)
{
    _mm_storeu_si128(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
/* A NaN may lose all its bits but this one. */
static inline void narrow_bf16_f32(void *p, vec_f32 x)
{
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    up = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    up = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08);
    _mm_storeu_si128(p, _mm256_castsi256_si128(up));
}
static inline vec_f32 set1_f32(float a) { return _mm256_set1_ps(a); }
static inline vec_f32 add_f32(vec_f32 x, vec_f32 y) { return _mm256_add_ps(x, y); }
static inline vec_f32 sub_f32(vec_f32 x, vec_f32 y) { return _mm256_sub_ps(x, y); }
static inline vec_f32 mul_f32(vec_f32 x, vec_f32 y) { return _mm256_mul_ps(x, y); }
static inline vec_f32 div_f32(vec_f32 x, vec_f32 y) { return _mm256_div_ps(x, y); }
static inline vec_f32 fma_f32(vec_f32 x, vec_f32 y, vec_f32 z) { return _mm256_fmadd_ps(x, y, z); }
static inline vec_f32 min_f32(vec_f32 x, vec_f32 y) { return _mm256_min_ps(x, y); }
static inline vec_f32 max_f32(vec_f32 x, vec_f32 y) { return _mm256_max_ps(x, y); }
static inline vec_f32 maxnum_f32(vec_f32 x, vec_f32 y) { return _mm256_max_ps(x, y); }
static inline mask_f32 less_f32(vec_f32 x, vec_f32 y) { return _mm256_cmp_ps(x, y, _CMP_LT_OQ); }
static inline mask_f32 equal_f32(vec_f32 x, vec_f32 y) { return _mm256_cmp_ps(x, y, _CMP_EQ_OQ); }
static inline mask_f32 beyond_f32(vec_f32 x, vec_f32 y) { return _mm256_cmp_ps(x, y, _CMP_NLE_UQ); }
static inline int any_f32(mask_f32 m) { return _mm256_movemask_ps(m) != 0; }
static inline vec_f32 select_f32(mask_f32 m, vec_f32 x, vec_f32 y) { return _mm256_blendv_ps(y, x, m); }

/* 2^(i/8) less what the shifted n adds to it. */
static inline vec_f32 power_f32(vec_f32 t)
{
    const __m256i fraction = _mm256_setr_epi32(
        0x3f800000, 0x3f8b95c2 - (1 << 20), 0x3f9837f0 - (2 << 20), 0x3fa5fed7 - (3 << 20),
        0x3fb504f3 - (4 << 20), 0x3fc5672a - (5 << 20), 0x3fd744fd - (6 << 20), 0x3feac0c7 - (7 << 20));
    __m256i n = _mm256_castps_si256(t);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(fraction, n), _mm256_slli_epi32(n, 20)));
}

/* Compilers add up the lanes of one sum at a time, which is a third of all: here those of four. */
static inline void dot_two_f32(const int8_t *key, ptrdiff_t key_row, const int16_t *q, ptrdiff_t dim, int32_t *to)
{
    __m256i sum[2][4] = {{_mm256_setzero_si256()}};
    ptrdiff_t whole = dim / 16 * 16;
    for (ptrdiff_t d = 0; d < whole; d += 16) {
        __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(key + d)));
        __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(key + key_row + d)));
        QKV_UNROLL
        for (int r = 0; r < 4; r++) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(q + r * dim + d));
            sum[0][r] = _mm256_add_epi32(sum[0][r], _mm256_madd_epi16(a, x));
            sum[1][r] = _mm256_add_epi32(sum[1][r], _mm256_madd_epi16(b, x));
        }
    }
    QKV_UNROLL
    for (int r = 0; r < 4; r += 2) {
        __m256i some = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0][r], sum[1][r]),
                                         _mm256_hadd_epi32(sum[0][r + 1], sum[1][r + 1]));
        __m128i all = _mm_add_epi32(_mm256_castsi256_si128(some), _mm256_extracti128_si256(some, 1));
        _mm_storel_epi64((__m128i *)(to + r * QKV_BYTES_GROUP), all);
        _mm_storel_epi64((__m128i *)(to + (r + 1) * QKV_BYTES_GROUP), _mm_unpackhi_epi64(all, all));
    }
    for (int r = 0; r < 4 && whole < dim; r++)
        for (ptrdiff_t d = whole; d < dim; d++) {
            to[r * QKV_BYTES_GROUP] += q[r * dim + d] * key[d];
            to[r * QKV_BYTES_GROUP + 1] += q[r * dim + d] * key[key_row + d];
        }
}

static inline void exchange_f32(vec_f32 *x, vec_f32 *y)
{
    *x = _mm256_permute_ps(*x, 0xb1);
    *y = _mm256_permute_ps(*y, 0xb1);
}

static inline void transpose_f32(vec_f32 x[8])
{
    vec_f32 y[8];
    QKV_UNROLL
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    QKV_UNROLL
    for (int i = 0; i < 8; i += 4) {
        x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    /* x[4 * i + c] now holds column 4 * h + c of rows 4 * i ... in its half h. */
    QKV_UNROLL
    for (int c = 0; c < 4; c++) {
        y[c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x20);
        y[4 + c] = _mm256_permute2f128_ps(x[c], x[4 + c], 0x31);
    }
    QKV_UNROLL
    for (int i = 0; i < 8; i++)
        x[i] = y[i];
}

/* Halves, then within halves; the pairs are chosen so that sums end up in order. */
static inline vec_f32 sum_each_f32(vec_f32 x[8])
{
    vec_f32 y[4];
    QKV_UNROLL
    for (int i = 0; i < 4; i++)
        y[i] = _mm256_add_ps(_mm256_blend_ps(x[i], x[i + 4], 0xf0), _mm256_permute2f128_ps(x[i], x[i + 4], 0x21));
    QKV_UNROLL
    for (int i = 0; i < 4; i += 2)
        y[i] = _mm256_add_ps(_mm256_blend_ps(y[i], y[i + 1], 0xcc), _mm256_shuffle_ps(y[i], y[i + 1], 0x4e));
    return _mm256_add_ps(_mm256_shuffle_ps(y[0], y[2], 0x88), _mm256_shuffle_ps(y[0], y[2], 0xdd));
}

#define T f32
#define LANE_VECTORS 3
#define ROW_TILE 4
#define ROW_TILE_1 8
#define LANE_MADS 0
#define SUMS 8
#define PAIR 1
#define NARROWS 1
#define WIDENS 1
#define HALVES_AHEAD 9216
#define HALVES_SHARED 0
#define BYTES_BY_PAIRS 1
#define EXP2_STEPS 8
#include "kernel_tpl.h"

/* float64 */

typedef double real_f64;
typedef __m256d vec_f64;
typedef __m256d mask_f64;
enum { width_f64 = 4 };

static inline __m256i first_f64(int n)
{
    static const int64_t ones[8] = {-1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ones + 4 - n));
}

static inline vec_f64 load_f64(const double *p) { return _mm256_load_pd(p); }
static inline void store_f64(double *p, vec_f64 x) { _mm256_store_pd(p, x); }
static inline vec_f64 loadu_f64(const double *p) { return _mm256_loadu_pd(p); }
static inline void storeu_f64(double *p, vec_f64 x) { _mm256_storeu_pd(p, x); }
static inline void stream_f64(double *p, vec_f64 x) { _mm256_stream_pd(p, x); }
static inline void fence_f64(void) { _mm_sfence(); }
static inline vec_f64 load_part_f64(const double *p, int n) { return _mm256_maskload_pd(p, first_f64(n)); }
static inline void store_part_f64(double *p, vec_f64 x, int n)
{
    if (n == 4)
        _mm256_storeu_pd(p, x);
    else
        _mm256_maskstore_pd(p, first_f64(n), x);
}
static inline mask_f64 seen_f64(const uint8_t *p, int n)
{
    uint32_t bytes = 0;
    memcpy(&bytes, p, (size_t)n);
    __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int32_t)bytes));
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(wide, _mm256_setzero_si256()));
}
static inline vec_f64 widen_f16_f64(const void *p) { return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(p))); }
static inline vec_f64 widen_bf16_f64(const void *p)
{
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(p)), 16)));
}
static inline vec_f64 set1_f64(double a) { return _mm256_set1_pd(a); }
static inline vec_f64 add_f64(vec_f64 x, vec_f64 y) { return _mm256_add_pd(x, y); }
static inline vec_f64 sub_f64(vec_f64 x, vec_f64 y) { return _mm256_sub_pd(x, y); }
static inline vec_f64 mul_f64(vec_f64 x, vec_f64 y) { return _mm256_mul_pd(x, y); }
static inline vec_f64 div_f64(vec_f64 x, vec_f64 y) { return _mm256_div_pd(x, y); }
static inline vec_f64 fma_f64(vec_f64 x, vec_f64 y, vec_f64 z) { return _mm256_fmadd_pd(x, y, z); }
static inline vec_f64 min_f64(vec_f64 x, vec_f64 y) { return _mm256_min_pd(x, y); }
static inline vec_f64 max_f64(vec_f64 x, vec_f64 y) { return _mm256_max_pd(x, y); }
static inline vec_f64 maxnum_f64(vec_f64 x, vec_f64 y) { return _mm256_max_pd(x, y); }
static inline mask_f64 less_f64(vec_f64 x, vec_f64 y) { return _mm256_cmp_pd(x, y, _CMP_LT_OQ); }
static inline mask_f64 equal_f64(vec_f64 x, vec_f64 y) { return _mm256_cmp_pd(x, y, _CMP_EQ_OQ); }
static inline mask_f64 beyond_f64(vec_f64 x, vec_f64 y) { return _mm256_cmp_pd(x, y, _CMP_NLE_UQ); }
static inline int any_f64(mask_f64 m) { return _mm256_movemask_pd(m) != 0; }
static inline vec_f64 select_f64(mask_f64 m, vec_f64 x, vec_f64 y) { return _mm256_blendv_pd(y, x, m); }

/* AVX2 looks up no 64-bit elements. */
static inline vec_f64 power_f64(vec_f64 t)
{
    __m256i bits = _mm256_slli_epi64(_mm256_castpd_si256(t), 52);
    return _mm256_castsi256_pd(_mm256_add_epi64(bits, _mm256_set1_epi64x((int64_t)1023 << 52)));
}

static inline void exchange_f64(vec_f64 *x, vec_f64 *y)
{
    *x = _mm256_permute_pd(*x, 0x5);
    *y = _mm256_permute_pd(*y, 0x5);
}

static inline void transpose_f64(vec_f64 x[4])
{
    vec_f64 a = _mm256_unpacklo_pd(x[0], x[1]), b = _mm256_unpackhi_pd(x[0], x[1]);
    vec_f64 c = _mm256_unpacklo_pd(x[2], x[3]), d = _mm256_unpackhi_pd(x[2], x[3]);
    x[0] = _mm256_permute2f128_pd(a, c, 0x20);
    x[1] = _mm256_permute2f128_pd(b, d, 0x20);
    x[2] = _mm256_permute2f128_pd(a, c, 0x31);
    x[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

static inline vec_f64 sum_each_f64(vec_f64 x[4])
{
    vec_f64 a = _mm256_add_pd(_mm256_blend_pd(x[0], x[2], 0xc), _mm256_permute2f128_pd(x[0], x[2], 0x21));
    vec_f64 b = _mm256_add_pd(_mm256_blend_pd(x[1], x[3], 0xc), _mm256_permute2f128_pd(x[1], x[3], 0x21));
    return _mm256_add_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
}

#define T f64
#define LANE_VECTORS 3
#define ROW_TILE 4
#define ROW_TILE_1 8
#define LANE_MADS 0
#define SUMS 8
#define PAIR 1
#define NARROWS 0
#define WIDENS 0
#define EXP2_STEPS 1
#include "kernel_tpl.h"

const qkv_isa qkv_avx2 = {
    .name = "avx2",
    .needs = QKV_CPU_AVX2 | QKV_CPU_FMA | QKV_CPU_F16C,
    .type = {&kernels_f32, &kernels_f64},
};
