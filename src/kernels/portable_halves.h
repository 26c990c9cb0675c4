/* Numbers of 16 bits from float32, by their bits. */
#ifndef QKV_PORTABLE_HALVES_H
#define QKV_PORTABLE_HALVES_H

#include <stdint.h>
#include <string.h>

/* Rounded where the bits that are lost, and half of an even last one, carry. */
static inline uint32_t f16_of(uint32_t x)
{
    uint32_t sign = x >> 16 & 0x8000, size = x & 0x7fffffff;
    if (size > 0x7f800000)
        return sign | 0x7e00;
    if (size >= 0x47800000)           /* 2^16 */
        return sign | 0x7c00;
    if (size < 0x38800000) {          /* 2^-14: subnormal. Added to 1/2, units of 2^-24 are the last bit. */
        float half;
        memcpy(&half, &size, sizeof half);
        half += 0.5f;
        memcpy(&size, &half, sizeof half);
        return sign | (size - 0x3f000000);
    }
    return sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
}

static inline uint32_t bf16_of(uint32_t x)
{
    return ((x & 0x7fffffff) > 0x7f800000 ? x | 0x400000 : x + 0x7fff + (x >> 16 & 1)) >> 16;
}

#endif
