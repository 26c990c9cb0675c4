/* Primitives of pairs of bfloat16 in 16 lanes, and of the unit for tiles, for the file that is built with the flags of AMX. */
#include "avx512_tpl.h"
#include "avx512_pairs_tpl.h"

#define P3(a, b) a##_##b
#define P2(a, b) P3(a, b)
#define P(name) P2(name, T)

static inline P(vec) P(even)(P(vec) pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
static inline P(vec) P(odd)(P(vec) pairs)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(-0x10000)));
}
static inline P(vec) P(cut)(P(vec) x, P(vec) y)
{
    return _mm512_castsi512_ps(_mm512_mask_mov_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16), 0xaaaaaaaa, _mm512_castps_si512(y)));
}

#undef P
#undef P2
#undef P3

#ifndef TILE_UNIT
/* The compiler's loads of tiles do not say that they read memory, so what is to be stored before them is stored here. */
#define TILE_UNIT __asm__ volatile("" ::: "memory")
#define TILE_ZERO(i) _tile_zero(i)
#define TILE_LOAD(i, from, row) _tile_loadd(i, from, (row) * (ptrdiff_t)sizeof(REAL))
#define TILE_STORE(i, to, row) _tile_stored(i, to, (row) * (ptrdiff_t)sizeof(REAL))
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_CONFIGURE() _tile_loadconfig(&eight_tiles)
#define TILE_RELEASE() _tile_release()

/* All eight of 16 rows of 64 bytes. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} eight_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
#endif

#define EXP2_STEPS 8
