/* 2^(c x) = 2^n 2^r: n is c x rounded to a multiple of 1 / EXP2_STEPS, so that power(n) is a look-up and a shift, and 2^r
 * is a short polynomial whose constant term is exactly 1: exp2(0) == 1.
 *
 * Adding ROUND, 1.5 * 2^mantissa / EXP2_STEPS, does the rounding and leaves n in the low bits, where power finds it. The
 * sum goes back as ROUND - (n + ROUND), and where fma is one operation the fraction c x - n loses nothing: c x is not rounded on its way.
 *
 * Weights below the smallest normal number would slow every product they enter: at c x <= LOWEST they are exactly 0, and
 * in the one octave above that they are anything below that smallest number. What is too large is infinity or NaN. NaN
 * stays NaN.
 */
#define IS_F64 (sizeof(REAL) == 8)
#define LOWEST (IS_F64 ? -1023 : -127)
#define HIGHEST (IS_F64 ? 1024 : 128)
#define ROUND ((REAL)(IS_F64 ? 0x1.8p52 : 0x1.8p23) / EXP2_STEPS)

/* The factor c > 0, and the range of x outside of which 2^(c x) is 0 or infinite. */
typedef struct { VEC c, low, high; } X(factor);

static inline X(factor) X(factor_of)(double c)
{
    return (X(factor)){X(set1)((REAL)c), X(set1)(LOWEST / (REAL)c), X(set1)(HIGHEST / (REAL)c)};
}

/* x[j] <- 2^(c x[j]), j < nv <= LANE_VECTORS, step by step for all of them: alone, each would wait for itself. */
static QKV_INLINE void X(exp2)(const int nv, X(factor) f, VEC *x)
{
    const REAL *poly = QKV_JOIN(X(exp2_poly), EXP2_STEPS);
    enum { terms = sizeof QKV_JOIN(X(exp2_poly), EXP2_STEPS) / sizeof(REAL) };
    VEC round = X(set1)(ROUND), t[LANE_VECTORS], r[LANE_VECTORS], p[LANE_VECTORS];
#define EACH QKV_UNROLL for (int j = 0; j < nv; j++)
    EACH x[j] = X(max)(f.low, x[j]);
    EACH x[j] = X(min)(f.high, x[j]);
    EACH t[j] = X(fma)(f.c, x[j], round);
    EACH r[j] = X(sub)(round, t[j]);
    EACH r[j] = X(fma)(f.c, x[j], r[j]);
    EACH t[j] = X(power)(t[j]);
    EACH p[j] = X(set1)(poly[terms - 1]);
    QKV_UNROLL
    for (int i = terms - 2; i >= 0; i--)
        EACH p[j] = X(fma)(p[j], r[j], X(set1)(poly[i]));
    EACH p[j] = X(mul)(p[j], r[j]);
    EACH x[j] = X(fma)(t[j], p[j], t[j]);
#undef EACH
}

static inline VEC X(exp2_one)(X(factor) f, VEC x)
{
    X(exp2)(1, f, &x);
    return x;
}

static void X(exp2_array)(const void *x, void *y, int64_t n)
{
    const REAL *from = x;
    REAL *to = y;
    for (int64_t i = 0; i < n; i += W) {
        int part = n - i < W ? (int)(n - i) : W;
        X(store_part)(to + i, X(exp2_one)(X(factor_of)(1), X(load_part)(from + i, part)), part);
    }
}

#undef ROUND
#undef HIGHEST
#undef LOWEST
#undef IS_F64
