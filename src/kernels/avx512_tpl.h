/* Primitives for 16 floats in 32 registers, for the two files that are built with the flags of AVX-512. */

typedef float real_f32;
typedef __m512 vec_f32;
typedef __mmask16 mask_f32;
enum { width_f32 = 16 };

static inline __mmask16 first_f32(int n) { return (__mmask16)((1u << n) - 1); }
static inline vec_f32 load_f32(const float *p) { return _mm512_load_ps(p); }
static inline void store_f32(float *p, vec_f32 x) { _mm512_store_ps(p, x); }
static inline vec_f32 loadu_f32(const float *p) { return _mm512_loadu_ps(p); }
static inline void storeu_f32(float *p, vec_f32 x) { _mm512_storeu_ps(p, x); }
static inline void stream_f32(float *p, vec_f32 x) { _mm512_stream_ps(p, x); }
static inline void fence_f32(void) { _mm_sfence(); }
static inline vec_f32 load_part_f32(const float *p, int n) { return _mm512_maskz_loadu_ps(first_f32(n), p); }
static inline void store_part_f32(float *p, vec_f32 x, int n) { _mm512_mask_storeu_ps(p, first_f32(n), x); }
static inline mask_f32 seen_f32(const uint8_t *p, int n)
{
    __m128i bytes = _mm_maskz_loadu_epi8(first_f32(n), p);
    return _mm_test_epi8_mask(bytes, bytes);
}
static inline vec_f32 widen_f16_f32(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static inline vec_f32 widen_bf16_f32(const void *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
static inline void narrow_f16_f32(void *p, vec_f32 x)
{
    _mm256_storeu_si256(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* A NaN may lose all its bits but this one. */
static inline void narrow_bf16_f32(void *p, vec_f32 x)
{
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
static inline vec_f32 set1_f32(float a) { return _mm512_set1_ps(a); }
static inline vec_f32 add_f32(vec_f32 x, vec_f32 y) { return _mm512_add_ps(x, y); }
static inline vec_f32 sub_f32(vec_f32 x, vec_f32 y) { return _mm512_sub_ps(x, y); }
static inline vec_f32 mul_f32(vec_f32 x, vec_f32 y) { return _mm512_mul_ps(x, y); }
static inline vec_f32 div_f32(vec_f32 x, vec_f32 y) { return _mm512_div_ps(x, y); }
static inline vec_f32 fma_f32(vec_f32 x, vec_f32 y, vec_f32 z) { return _mm512_fmadd_ps(x, y, z); }
static inline vec_f32 min_f32(vec_f32 x, vec_f32 y) { return _mm512_min_ps(x, y); }
static inline vec_f32 max_f32(vec_f32 x, vec_f32 y) { return _mm512_max_ps(x, y); }
static inline vec_f32 maxnum_f32(vec_f32 x, vec_f32 y) { return _mm512_max_ps(x, y); }
static inline mask_f32 less_f32(vec_f32 x, vec_f32 y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
static inline mask_f32 equal_f32(vec_f32 x, vec_f32 y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
static inline mask_f32 beyond_f32(vec_f32 x, vec_f32 y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLE_UQ); }
static inline int any_f32(mask_f32 m) { return m != 0; }
static inline vec_f32 select_f32(mask_f32 m, vec_f32 x, vec_f32 y) { return _mm512_mask_blend_ps(m, y, x); }

/* 2^(i/8) less what the shifted n adds to it. Sixteen, since the index is n's low four bits. */
static inline vec_f32 power_f32(vec_f32 t)
{
    const __m512i fraction = _mm512_broadcast_i64x4(_mm256_setr_epi32(
        0x3f800000, 0x3f8b95c2 - (1 << 20), 0x3f9837f0 - (2 << 20), 0x3fa5fed7 - (3 << 20),
        0x3fb504f3 - (4 << 20), 0x3fc5672a - (5 << 20), 0x3fd744fd - (6 << 20), 0x3feac0c7 - (7 << 20)));
    __m512i n = _mm512_castps_si512(t);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutexvar_epi32(n, fraction), _mm512_slli_epi32(n, 20)));
}

static inline void exchange_f32(vec_f32 *x, vec_f32 *y)
{
    *x = _mm512_permute_ps(*x, 0xb1);
    *y = _mm512_permute_ps(*y, 0xb1);
}

static inline void transpose_f32(vec_f32 x[16])
{
    vec_f32 y[16];
    QKV_UNROLL
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    QKV_UNROLL
    for (int i = 0; i < 16; i += 4) {
        QKV_UNROLL
        for (int j = 0; j < 2; j++) {
            __m512d lo = _mm512_castps_pd(y[i + j]), hi = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
    }
    /* x[4 * i + c] now holds column 4 * q + c of rows 4 * i ... in its quarter q. */
    QKV_UNROLL
    for (int c = 0; c < 4; c++) {
        vec_f32 a = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x88), b = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x88);
        vec_f32 d = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xdd), e = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_f32x4(a, b, 0x88);
        y[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
        y[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
        y[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
    }
    QKV_UNROLL
    for (int i = 0; i < 16; i++)
        x[i] = y[i];
}

/* Halves, then quarters, then within quarters; the pairs are chosen so that sums end up in order. */
static inline vec_f32 sum_each_f32(vec_f32 x[16])
{
    vec_f32 y[8], z[4];
    QKV_UNROLL
    for (int i = 0; i < 8; i++) {
        vec_f32 a = x[i % 4 + i / 4 * 8], b = x[i % 4 + i / 4 * 8 + 4];
        y[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
    }
    QKV_UNROLL
    for (int i = 0; i < 4; i++)
        z[i] = _mm512_add_ps(_mm512_shuffle_f32x4(y[i], y[i + 4], 0x88), _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd));
    QKV_UNROLL
    for (int i = 0; i < 4; i += 2)
        z[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, z[i], z[i + 1]), _mm512_shuffle_ps(z[i], z[i + 1], 0x4e));
    return _mm512_add_ps(_mm512_shuffle_ps(z[0], z[2], 0x88), _mm512_shuffle_ps(z[0], z[2], 0xdd));
}
