/* Primitives of 16 floats and of pairs of bfloat16, and of a unit for tiles, in standard C but for the vector. */
#define REAL_TYPE float
#define BITS_TYPE uint32_t
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#include "portable_tpl.h"

#define P3(a, b) a##_##b
#define P2(a, b) P3(a, b)
#define P(name) P2(name, T)

static inline P(vec) P(even)(P(vec) pairs) { return P(from_bits)(P(bits)(pairs) << 16); }
static inline P(vec) P(odd)(P(vec) pairs) { return P(from_bits)(P(bits)(pairs) & 0xffff0000); }
static inline P(vec) P(cut)(P(vec) x, P(vec) y) { return P(from_bits)(P(bits)(x) >> 16 | (P(bits)(y) & 0xffff0000)); }

static inline P(vec) P(interleave)(const void *a, const void *b)
{
    uint16_t low[P(width)], high[P(width)];
    uint32_t pairs[P(width)];
    P(vec) x;
    memcpy(low, a, sizeof low);
    memcpy(high, b, sizeof high);
    for (int i = 0; i < P(width); i++)
        pairs[i] = low[i] | (uint32_t)high[i] << 16;
    memcpy(&x, pairs, sizeof x);
    return x;
}

static inline P(vec) P(join)(P(vec) x, P(vec) y)
{
    uint16_t low[P(width)], high[P(width)];
    P(narrow_bf16)(low, x);
    P(narrow_bf16)(high, y);
    return P(interleave)(low, high);
}

static inline P(vec) P(turn)(P(vec) factor, P(vec) x)
{
    P(mask) sign = P(bits)(factor) & 0x80000000;
    return P(from_bits)(P(bits)(x) ^ (sign | sign >> 16));
}

#undef P
#undef P2
#undef P3

#ifndef TILE_UNIT
#define TILE_UNIT QKV_ALIGN REAL tiles[8][16][16]
#define TILE_ZERO(i) memset(tiles[i], 0, sizeof tiles[i])
#define TILE_LOAD(i, from, row) \
    for (int r_ = 0; r_ < 16; r_++) \
        memcpy(tiles[i][r_], (from) + r_ * (row), sizeof tiles[i][r_])
#define TILE_STORE(i, to, row) \
    for (int r_ = 0; r_ < 16; r_++) \
        memcpy((to) + r_ * (row), tiles[i][r_], sizeof tiles[i][r_])
#define TILE_MULTIPLY(c, a, b) \
    for (int r_ = 0; r_ < 16; r_++) \
        X(store)(tiles[c][r_], X(tile_row)(1, 1, tiles[a][r_], tiles[b][0], W, NULL, X(load)(tiles[c][r_])))
#define TILE_CONFIGURE() ((void)0)
#define TILE_RELEASE() ((void)0)
#endif

#define EXP2_STEPS 1
