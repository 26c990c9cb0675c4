/* Primitives for 16 floats in 32 registers, for the files that are built with the flags of AVX-512. Their names end in _##T. */
#define P3(a, b) a##_##b
#define P2(a, b) P3(a, b)
#define P(name) P2(name, T)

typedef float P(real);
typedef __m512 P(vec);
typedef __mmask16 P(mask);
enum { P(width) = 16 };

static inline __mmask16 P(first)(int n) { return (__mmask16)((1u << n) - 1); }
static inline P(vec) P(load)(const float *p) { return _mm512_load_ps(p); }
static inline void P(store)(float *p, P(vec) x) { _mm512_store_ps(p, x); }
static inline P(vec) P(loadu)(const float *p) { return _mm512_loadu_ps(p); }
static inline void P(storeu)(float *p, P(vec) x) { _mm512_storeu_ps(p, x); }
static inline void P(stream)(float *p, P(vec) x) { _mm512_stream_ps(p, x); }
static inline void P(fence)(void) { _mm_sfence(); }
static inline P(vec) P(load_part)(const float *p, int n) { return _mm512_maskz_loadu_ps(P(first)(n), p); }
static inline void P(store_part)(float *p, P(vec) x, int n) { _mm512_mask_storeu_ps(p, P(first)(n), x); }
static inline P(mask) P(seen)(const uint8_t *p, int n)
{
    __m128i bytes = _mm_maskz_loadu_epi8(P(first)(n), p);
    return _mm_test_epi8_mask(bytes, bytes);
}
static inline P(vec) P(widen_f16)(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static inline P(vec) P(widen_bf16)(const void *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
static inline void P(narrow_f16)(void *p, P(vec) x)
{
    _mm256_storeu_si256(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* A NaN may lose all its bits but this one. */
static inline void P(narrow_bf16)(void *p, P(vec) x)
{
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
static inline P(vec) P(set1)(float a) { return _mm512_set1_ps(a); }
static inline P(vec) P(add)(P(vec) x, P(vec) y) { return _mm512_add_ps(x, y); }
static inline P(vec) P(sub)(P(vec) x, P(vec) y) { return _mm512_sub_ps(x, y); }
static inline P(vec) P(mul)(P(vec) x, P(vec) y) { return _mm512_mul_ps(x, y); }
static inline P(vec) P(div)(P(vec) x, P(vec) y) { return _mm512_div_ps(x, y); }
static inline P(vec) P(fma)(P(vec) x, P(vec) y, P(vec) z) { return _mm512_fmadd_ps(x, y, z); }
static inline P(vec) P(min)(P(vec) x, P(vec) y) { return _mm512_min_ps(x, y); }
static inline P(vec) P(max)(P(vec) x, P(vec) y) { return _mm512_max_ps(x, y); }
static inline P(vec) P(maxnum)(P(vec) x, P(vec) y) { return _mm512_max_ps(x, y); }
static inline P(mask) P(less)(P(vec) x, P(vec) y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
static inline P(mask) P(equal)(P(vec) x, P(vec) y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
static inline P(mask) P(beyond)(P(vec) x, P(vec) y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLE_UQ); }
static inline int P(any)(P(mask) m) { return m != 0; }
static inline P(vec) P(select)(P(mask) m, P(vec) x, P(vec) y) { return _mm512_mask_blend_ps(m, y, x); }

/* 2^(i/8) less what the shifted n adds to it. Sixteen, since the index is n's low four bits. */
static inline P(vec) P(power)(P(vec) t)
{
    const __m512i fraction = _mm512_broadcast_i64x4(_mm256_setr_epi32(
        0x3f800000, 0x3f8b95c2 - (1 << 20), 0x3f9837f0 - (2 << 20), 0x3fa5fed7 - (3 << 20),
        0x3fb504f3 - (4 << 20), 0x3fc5672a - (5 << 20), 0x3fd744fd - (6 << 20), 0x3feac0c7 - (7 << 20)));
    __m512i n = _mm512_castps_si512(t);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutexvar_epi32(n, fraction), _mm512_slli_epi32(n, 20)));
}

static inline void P(exchange)(P(vec) *x, P(vec) *y)
{
    *x = _mm512_permute_ps(*x, 0xb1);
    *y = _mm512_permute_ps(*y, 0xb1);
}

static inline void P(transpose)(P(vec) x[16])
{
    P(vec) y[16];
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
        P(vec) a = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x88), b = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x88);
        P(vec) d = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xdd), e = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xdd);
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
static inline P(vec) P(sum_each)(P(vec) x[16])
{
    P(vec) y[8], z[4];
    QKV_UNROLL
    for (int i = 0; i < 8; i++) {
        P(vec) a = x[i % 4 + i / 4 * 8], b = x[i % 4 + i / 4 * 8 + 4];
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

#undef P
#undef P2
#undef P3
