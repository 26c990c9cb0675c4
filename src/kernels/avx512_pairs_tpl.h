/* Primitives of pairs of bfloat16 in 16 lanes, for the files that are built with the flags of AVX512_BF16. */
#define P3(a, b) a##_##b
#define P2(a, b) P3(a, b)
#define P(name) P2(name, T)

static inline P(vec) P(append)(P(vec) x, P(vec) y) { return (P(vec))_mm512_cvtne2ps_pbh(y, x); }

static inline P(vec) P(join)(P(vec) x, P(vec) y)
{
    const __m512i order = _mm512_add_epi32(                 /* halves 0, 16, 1, 17 ... */
        _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
        _mm512_set1_epi32(0x00100000));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(P(append)(x, y))));
}

static inline P(vec) P(interleave)(const void *a, const void *b)
{
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a)), high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(b));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

static inline P(vec) P(turn)(P(vec) factor, P(vec) x)
{
    __m512i sign = _mm512_and_si512(_mm512_castps_si512(factor), _mm512_set1_epi32(INT32_MIN));
    sign = _mm512_or_si512(sign, _mm512_srli_epi32(sign, 16));
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), sign));
}

#undef P
#undef P2
#undef P3
