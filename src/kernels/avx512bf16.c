/* The avx512bf16 path: VDPBF16PS multiplies pairs of bfloat16 and adds both products to a float32 lane, at twice the rate of
 * multiply-adds. Attention of bfloat16 arrays alone; all else is the avx512 path's. Built with its flags and AVX512_BF16, so
 * nothing of this file may run before cpu.c has seen them.
 *
 * A pair is 32 bits, so what moves elements of a float moves pairs. Only where they are multiplied do they differ.
 */
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"
#include "compiler.h"
#define T f32
#include "avx512_tpl.h"
#include "avx512_pairs_tpl.h"

static inline __m512bh pairs_of(vec_f32 x) { return (__m512bh)x; }

static inline vec_f32 mad_f32(vec_f32 y, vec_f32 x, vec_f32 z) { return _mm512_dpbf16_ps(z, pairs_of(y), pairs_of(x)); }

/* Where a weight is -1, neither it nor its value takes part. */
static inline vec_f32 mad_seen_f32(vec_f32 v, vec_f32 p, vec_f32 z)
{
    __m512i weights = _mm512_castps_si512(p), values = _mm512_castps_si512(v);
    __mmask32 seen = _mm512_cmpneq_epi16_mask(weights, _mm512_set1_epi16((short)0xbf80));
    weights = _mm512_maskz_mov_epi16(seen, weights);
    values = _mm512_maskz_mov_epi16(seen, values);
    return mad_f32(_mm512_castsi512_ps(values), _mm512_castsi512_ps(weights), z);
}

static inline vec_f32 load_halves_f32(const void *p, int n)
{
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((__mmask32)(0xffffffffu >> (32 - n)), p));
}

/* Pairs of the first four elements of each quarter, and of the last four. */
static inline vec_f32 zip_f32(vec_f32 x, vec_f32 y, const int at)
{
    __m512i a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
    return _mm512_castsi512_ps(at ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
}
static inline vec_f32 unzip_f32(vec_f32 x, vec_f32 y, int at)
{
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    return _mm512_permutex2var_ps(x, _mm512_add_epi32(order, _mm512_set1_epi32(at / 2)), y);
}

#define LANE_VECTORS 3
#define ROW_TILE 8
#define ROW_TILE_1 8
#define LANE_MADS 0
#define SUMS 16
#define PAIR 2
#define NARROWS 1
#define WIDENS 0
#define HALVES_AHEAD 20480
#define EXP2_STEPS 8
#include "kernel_tpl.h"

const qkv_isa qkv_avx512bf16 = {
    .name = "avx512bf16",
    .needs = QKV_CPU_AVX512 | QKV_CPU_AVX512BF16 | QKV_CPU_FAST_PAIRS,
    .pairs = &kernels_f32,
};
