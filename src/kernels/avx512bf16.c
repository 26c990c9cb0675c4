/* The multiply-add of bfloat16 pairs, VDPBF16PS: two products to a float32 lane. Built with the flags of the avx512 path
 * and AVX512_BF16, so nothing of this file may run before cpu.c has seen both. */
#include <immintrin.h>

#include "kernels.h"
#include "compiler.h"

/* Elements are pairs' halves, 32 to a vector; what they are summed into is 16 floats. Both are kept as __m512. */

typedef float real_bf16;
typedef __m512 vec_bf16;
enum { width_bf16 = 32 };

static inline vec_bf16 set1_bf16(float a) { return _mm512_set1_ps(a); }
static inline vec_bf16 add_bf16(vec_bf16 x, vec_bf16 y) { return _mm512_add_ps(x, y); }
static inline void store_bf16(float *p, vec_bf16 x) { _mm512_store_ps(p, x); }
static inline vec_bf16 fma_bf16(vec_bf16 x, vec_bf16 y, vec_bf16 z)
{
    return _mm512_dpbf16_ps(z, (__m512bh)x, (__m512bh)y);
}

#define X(name) name##_bf16
#define REAL real_bf16
#define VEC vec_bf16
#define W width_bf16
#define LANE_VECTORS 3
#define ROW_TILE 8
#include "peak_tpl.h"

const qkv_pairs qkv_avx512bf16 = {
    .needs = QKV_CPU_AVX512 | QKV_CPU_AVX512BF16,
    .fma = fma_rounds_bf16,
};
