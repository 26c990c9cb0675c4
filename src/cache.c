/* Rows of a quantised cache, from numbers and back. What the bytes of a row mean stands at qkv_type in qkv.h; how n and the
 * scales are chosen, here:
 *
 *   I8   scale = max |x| / 127, n = x / scale, rounded to nearest even
 *   I4   scale = -1/8 of the element of largest magnitude (of two, the positive one), rounded to bfloat16 away from zero, so
 *        that this element is not cut off; n = 8 + x / scale, rounded to nearest even, and at most 15: the opposite of the
 *        largest element is one step short
 *
 * Rotations follow S. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, section 3.
 *
 * All in float32. Scales stop where the largest element would read as infinite; n is limited then. Where an element is NaN or
 * infinite, the scale is NaN and n that of zeros. A row first goes into a buffer
 * of float32, through the copies that kernels make, which know every type, stride and byte order. Loops are written so that
 * compilers vectorise them: integers are compared instead of magnitudes, and the sum with 1.5 * 2^23 rounds.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu.h"
#include "qkv.h"

enum { GROUP = 32 };                  /* elements of an I4 scale */
enum { INFINITE = 0x7f800000, NAN_BITS = 0x7fc00000 };         /* of float32 */
static const float rounding = 0x1.8p23f;                /* in whose binade neighbours are 1 apart */
static const float largest_i8 = 0x1.020406p121f;        /* the largest scales that 127 and, as bfloat16, 8 times are finite */
enum { LARGEST_I4 = 0x7dff };

static int32_t bits_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The bits of max |x|, at least INFINITE if an element is not finite, and of the largest x if it is not below 0. */
static int32_t largest(const float *x, int64_t n, int32_t *positive)
{
    int32_t most = 0, most_positive = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits = bits_of(x[i]), magnitude = bits & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
        most_positive = bits > most_positive ? bits : most_positive;
    }
    *positive = most_positive;
    return most;
}

/* middle + x / scale, rounded to nearest even and limited. */
static inline int32_t steps(float x, float scale, int32_t middle, int32_t low, int32_t high)
{
    int32_t n = bits_of(x / scale + rounding) - bits_of(rounding) + middle;
    return n < low ? low : n > high ? high : n;
}

static void store_i8(char *row, const float *x, int64_t d)
{
    int32_t positive, most = largest(x, d, &positive);
    int64_t at = qkv_i8_bytes(d);
    float scale = most >= INFINITE ? float_of(NAN_BITS) : float_of(most) / 127;
    scale = scale > largest_i8 ? largest_i8 : scale;
    memset(row, 0, (size_t)at);
    memcpy(row + at, &scale, sizeof scale);
    if (scale > 0)
        for (int64_t i = 0; i < d; i++)
            row[i] = (char)steps(x[i], scale, 0, -127, 127);
}

static void store_i4(char *bytes, char *to_scale, const float *x)
{
    int32_t positive, most = largest(x, GROUP, &positive), n[GROUP];
    uint16_t half = NAN_BITS >> 16;
    float scale = 0;
    if (most < INFINITE) {
        scale = float_of(most) / (most == positive ? -8 : 8);
        half = (uint16_t)(scale == 0 ? 0 : ((uint32_t)bits_of(scale) + 0xffff) >> 16);
        half = (uint16_t)((half & 0x7fff) > LARGEST_I4 ? half - 1 : half);
        scale = float_of((int32_t)((uint32_t)half << 16));
    }
    memcpy(to_scale, &half, sizeof half);
    for (int i = 0; i < GROUP; i++)
        n[i] = scale == 0 ? 8 : steps(x[i], scale, 8, 0, 15);
    for (int i = 0; i < GROUP / 2; i++)
        bytes[i] = (char)(n[i] | n[i + GROUP / 2] << 4);
}

/* The address of row t of head h of sequence b. */
static const char *row_at(const char *data, const int64_t *step, int64_t b, int64_t h, int64_t t)
{
    return data + b * step[0] + h * step[1] + t * step[2];
}

/* How rows are rotated, or that they are not. */
typedef struct {
    const qkv_kernels *kernels;
    int64_t turn, dim;
    _Alignas(64) double factors[QKV_MAX_DIM];           /* (dim), of the kernels' type */
} rotation;

/* The largest block of a part with n elements left. */
static int64_t block_of(int64_t n)
{
    int64_t block = QKV_MAX_DIM;
    while (block > n)
        block /= 2;
    return block;
}

/* The end of the part that an element belongs to. */
static int64_t part_end(const rotation *r, int64_t e) { return e < r->turn ? r->turn : r->dim; }

static void open_rotation(rotation *r, const qkv_storage *s, const qkv_kernels *kernels)
{
    r->kernels = kernels;
    r->turn = s->turn;
    r->dim = s->dim;
    for (int64_t e = 0, block; r->turn >= 0 && e < r->dim; e += block) {
        block = block_of(part_end(r, e) - e);
        for (uint32_t i = 0; i < (uint32_t)block; i++) {
            uint32_t mixed = i * 0x9e3779b1u;
            mixed = (mixed ^ mixed >> 15) * 0x85ebca77u;
            double factor = (mixed >> 31 ? -1 : 1) / sqrt((double)block);
            if (kernels->size == sizeof(double))
                r->factors[e + i] = factor;
            else
                ((float *)r->factors)[e + i] = (float)factor;
        }
    }
}

/* One row, or back. */
static void rotate(const rotation *r, void *x, int back)
{
    if (r->turn < 0)
        return;
    if (!back)
        r->kernels->multiply_row(x, r->factors, r->dim);
    for (int64_t e = 0, block; e < r->dim; e += block) {
        block = block_of(part_end(r, e) - e);
        r->kernels->hadamard((char *)x + e * r->kernels->size, block);
    }
    if (back)
        r->kernels->multiply_row(x, r->factors, r->dim);
}

void qkv_turn_rows(const qkv_storage *s, const char *x, void *rotated, int back)
{
    const qkv_kernels *kernels = qkv_kernels_at(s->isa, s->type == QKV_F64 ? QKV_F64 : QKV_F32);
    char *to = rotated;
    rotation r;
    open_rotation(&r, s, kernels);
    for (int64_t b = 0; b < s->count[0]; b++)
        for (int64_t h = 0; h < s->count[1]; h++)
            for (int64_t t = 0; t < s->count[2]; t++, to += s->dim * kernels->size) {
                qkv_rows from = {.data = (char *)row_at(x, s->x_at, b, h, t), .col = s->x_step, .type = (int)s->type};
                from.swapped = s->swapped;
                if (x != rotated)
                    kernels->gather(to, s->dim, &from, 1, (int)s->dim);
                rotate(&r, to, back);
            }
}

void qkv_quantise(const qkv_storage *s, const char *x, char *rows)
{
    const qkv_kernels *kernels = qkv_kernels_at(s->isa, QKV_F32);
    _Alignas(64) float row[QKV_MAX_DIM] = {0};          /* zeros behind the last element */
    int64_t groups = (s->dim + GROUP - 1) / GROUP;
    rotation r;
    open_rotation(&r, s, kernels);
    for (int64_t b = 0; b < s->count[0]; b++)
        for (int64_t h = 0; h < s->count[1]; h++)
            for (int64_t t = 0; t < s->count[2]; t++) {
                qkv_rows from = {.data = (char *)row_at(x, s->x_at, b, h, t), .col = s->x_step, .type = (int)s->type};
                char *to = (char *)row_at(rows, s->rows_at, b, h, t);
                from.swapped = s->swapped;
                kernels->gather(row, s->dim, &from, 1, (int)s->dim);
                rotate(&r, row, 0);
                if (s->stored == QKV_I8)
                    store_i8(to, row, s->dim);
                else
                    for (int64_t g = 0; g < groups; g++)
                        store_i4(to + g * GROUP / 2, to + qkv_i4_bytes(s->dim) + 2 * g, row + g * GROUP);
            }
}

void qkv_dequantise(const qkv_storage *s, const char *rows, float *x)
{
    const qkv_kernels *kernels = qkv_kernels_at(s->isa, QKV_F32);
    int64_t at = s->stored == QKV_I8 ? qkv_i8_bytes(s->dim) : qkv_i4_bytes(s->dim);
    rotation r;
    open_rotation(&r, s, kernels);
    for (int64_t b = 0; b < s->count[0]; b++)
        for (int64_t h = 0; h < s->count[1]; h++)
            for (int64_t t = 0; t < s->count[2]; t++, x += s->dim) {
                qkv_rows from = {.data = (char *)row_at(rows, s->rows_at, b, h, t), .col = (ptrdiff_t)at, .type = (int)s->stored};
                kernels->gather(x, s->dim, &from, 1, (int)s->dim);
                rotate(&r, x, 1);
            }
}
