/* The primitives of the portable path, for one element type, in standard C but for the vector.
 *
 * Parameters: T, REAL_TYPE, BITS_TYPE (an unsigned integer of its size), VECTOR_BYTES, MANTISSA_BITS, EXPONENT_BIAS.
 * With gcc and clang a vector is VECTOR_BYTES long and operators work on all its elements; elsewhere it is one element
 * and the same operators work on that. With FUSED, fma is one operation, which a plain target may have to call a function for.
 */
#include "portable_halves.h"

#define P3(a, b) a##_##b
#define P2(a, b) P3(a, b)
#define P(name) P2(name, T)

typedef REAL_TYPE P(real);
#if defined(__GNUC__) || defined(__clang__)
typedef REAL_TYPE P(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef BITS_TYPE P(mask) __attribute__((vector_size(VECTOR_BYTES)));
#define ALL_ONES(comparison) ((P(mask))(comparison))    /* the operators give all ones for true */
#else
typedef REAL_TYPE P(vec);
typedef BITS_TYPE P(mask);
#define ALL_ONES(comparison) ((P(mask))0 - (P(mask))(comparison))
#endif
enum { P(width) = sizeof(P(vec)) / sizeof(P(real)) };

static inline P(vec) P(load)(const P(real) *p) { P(vec) x; memcpy(&x, p, sizeof x); return x; }
static inline void P(store)(P(real) *p, P(vec) x) { memcpy(p, &x, sizeof x); }

static inline P(vec) P(loadu)(const P(real) *p) { return P(load)(p); }
static inline void P(storeu)(P(real) *p, P(vec) x) { P(store)(p, x); }
static inline void P(stream)(P(real) *p, P(vec) x) { P(store)(p, x); }
static inline void P(fence)(void) {}

static inline P(vec) P(load_part)(const P(real) *p, int n)
{
    P(real) all[P(width)] = {0};
    for (int i = 0; i < n; i++)
        all[i] = p[i];
    return P(load)(all);
}

static inline P(mask) P(seen)(const uint8_t *p, int n)
{
    BITS_TYPE lanes[P(width)] = {0};
    P(mask) seen;
    for (int i = 0; i < n; i++)
        lanes[i] = (BITS_TYPE)0 - (p[i] != 0);
    memcpy(&seen, lanes, sizeof seen);
    return seen;
}

static inline void P(store_part)(P(real) *p, P(vec) x, int n)
{
    P(real) all[P(width)];
    P(store)(all, x);
    for (int i = 0; i < n; i++)
        p[i] = all[i];
}

#if FLT_EVAL_METHOD == 0 && !FUSED    /* where pairs are set, they must not meet arithmetic */
static inline P(vec) P(set1)(P(real) a) { return a - (P(vec)){0}; }
#else                                 /* or a counts as double, which does not mix with a vector of float (s390x) */
static inline P(vec) P(set1)(P(real) a)
{
    P(real) all[P(width)];
    for (int i = 0; i < P(width); i++)
        all[i] = a;
    return P(load)(all);
}
#endif

static inline P(vec) P(add)(P(vec) x, P(vec) y) { return x + y; }
static inline P(vec) P(sub)(P(vec) x, P(vec) y) { return x - y; }
static inline P(vec) P(mul)(P(vec) x, P(vec) y) { return x * y; }
static inline P(vec) P(div)(P(vec) x, P(vec) y) { return x / y; }
#if FUSED
static inline P(vec) P(fma)(P(vec) x, P(vec) y, P(vec) z)
{
    for (int i = 0; i < P(width); i++)
        z[i] = __builtin_fmaf(x[i], y[i], z[i]);
    return z;
}
#else
static inline P(vec) P(fma)(P(vec) x, P(vec) y, P(vec) z) { return x * y + z; }
#endif

static inline P(mask) P(bits)(P(vec) x) { P(mask) b; memcpy(&b, &x, sizeof b); return b; }
static inline P(vec) P(from_bits)(P(mask) b) { P(vec) x; memcpy(&x, &b, sizeof x); return x; }
static inline P(mask) P(less)(P(vec) x, P(vec) y) { return ALL_ONES(x < y); }
static inline P(mask) P(equal)(P(vec) x, P(vec) y) { return ALL_ONES(x == y); }

static inline P(mask) P(beyond)(P(vec) x, P(vec) y) { return ~ALL_ONES(x <= y); }

static inline int P(any)(P(mask) m)
{
    BITS_TYPE lanes[P(width)], all = 0;
    memcpy(lanes, &m, sizeof lanes);
    for (int i = 0; i < P(width); i++)
        all |= lanes[i];
    return all != 0;
}

static inline P(vec) P(select)(P(mask) m, P(vec) x, P(vec) y)
{
    return P(from_bits)((m & P(bits)(x)) | (~m & P(bits)(y)));
}

/* Elements of 16 bits, a sign, an exponent and `mantissa` bits: the exponent only needs its bias exchanged, except that of
 * infinity and NaN, and that of subnormals, which are normal once 2^exponent is added, and taken away again. */
static inline P(vec) P(widen)(const void *p, int mantissa, int bias)
{
    uint16_t half[P(width)];
    BITS_TYPE lanes[P(width)];
    P(mask) bits;
    memcpy(half, p, sizeof half);
    for (int i = 0; i < P(width); i++)
        lanes[i] = half[i];
    memcpy(&bits, lanes, sizeof bits);
    const BITS_TYPE one = (BITS_TYPE)1 << MANTISSA_BITS, rebias = (BITS_TYPE)(EXPONENT_BIAS - bias) * one;
    P(mask) size = (bits & 0x7fff) << (MANTISSA_BITS - mantissa), none = bits ^ bits;
    P(mask) x = size + rebias, far = ALL_ONES(size >= (((BITS_TYPE)1 << (15 - mantissa)) - 1) * one);
    P(vec) small = P(from_bits)(x + one) - P(from_bits)(none + rebias + one);
    x += far & rebias;
    x = P(bits)(P(select)(ALL_ONES(size < one), small, P(from_bits)(x)));
    return P(from_bits)(x | (bits & 0x8000) << (8 * sizeof(P(real)) - 16));
}

static inline P(vec) P(widen_f16)(const void *p) { return P(widen)(p, 10, 15); }
static inline P(vec) P(widen_bf16)(const void *p) { return P(widen)(p, 7, 127); }

#if MANTISSA_BITS == 23
static inline void P(narrow_by)(uint32_t (*of)(uint32_t), void *p, P(vec) x)
{
    uint32_t bits[P(width)];
    uint16_t half[P(width)];
    memcpy(bits, &x, sizeof bits);
    for (int i = 0; i < P(width); i++)
        half[i] = (uint16_t)of(bits[i]);
    memcpy(p, half, sizeof half);
}

static inline void P(narrow_f16)(void *p, P(vec) x) { P(narrow_by)(f16_of, p, x); }
static inline void P(narrow_bf16)(void *p, P(vec) x) { P(narrow_by)(bf16_of, p, x); }
#endif

static inline P(vec) P(max)(P(vec) x, P(vec) y) { return P(select)(P(less)(y, x), x, y); }
static inline P(vec) P(maxnum)(P(vec) x, P(vec) y) { return P(max)(x, y); }
static inline P(vec) P(min)(P(vec) x, P(vec) y) { return P(select)(P(less)(x, y), x, y); }

static inline P(vec) P(power)(P(vec) t)
{
    return P(from_bits)((P(bits)(t) << MANTISSA_BITS) + ((BITS_TYPE)EXPONENT_BIAS << MANTISSA_BITS));
}

static inline void P(exchange)(P(vec) *x, P(vec) *y)
{
    P(real) from[2 * P(width)], to[2 * P(width)];
    P(store)(from, *x);
    P(store)(from + P(width), *y);
    for (int i = 0; i < 2 * P(width); i++)
        to[i] = from[i ^ 1];
    *x = P(load)(to);
    *y = P(load)(to + P(width));
}

static inline void P(transpose)(P(vec) *x)
{
    P(real) from[P(width)][P(width)], to[P(width)][P(width)];
    memcpy(from, x, sizeof from);
    for (int i = 0; i < P(width); i++)
        for (int j = 0; j < P(width); j++)
            to[j][i] = from[i][j];
    memcpy(x, to, sizeof to);
}

static inline P(vec) P(sum_each)(P(vec) *x)
{
    P(transpose)(x);
    for (int half = P(width) / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] = x[i] + x[i + half];
    return x[0];
}

#undef ALL_ONES
#undef P
#undef P2
#undef P3
#undef REAL_TYPE
#undef BITS_TYPE
#undef MANTISSA_BITS
#undef EXPONENT_BIAS
