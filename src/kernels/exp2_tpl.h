/* 2^x = 2^n * 2^r with n = round(x), |r| <= 1/2, and a polynomial (exp2_poly.h) whose constant term is exactly 1, so
 * that exp2(0) == 1. What would fall below the smallest normal number is exactly 0: subnormal weights would slow every
 * product they enter. -inf gives 0, what is too large infinity, and NaN stays NaN.
 */
static inline VEC X(exp2_fraction)(VEC r, VEC n, VEC x)
{
    enum { degree = sizeof X(exp2_poly) / sizeof X(exp2_poly)[0] - 1 };
    VEC p = X(set1)(X(exp2_poly)[degree]);
    QKV_UNROLL
    for (int i = degree - 1; i >= 0; i--)
        p = X(fma)(p, r, X(set1)(X(exp2_poly)[i]));
    return X(ldexp)(p, n, x);
}

static inline VEC X(exp2)(VEC x)
{
    VEC n, r = X(exponent)(x, &n);
    return X(exp2_fraction)(r, n, x);
}

/* 2^(c d). In float64 what rounding c d has lost goes back into the fraction: NumPy, the measure of our error there, has
 * an exp that is right to the last bit. In float32 the sums around it lose more than that. */
static inline VEC X(exp2_product)(VEC c, VEC d)
{
    VEC n, x = X(mul)(c, d), r = X(exponent)(x, &n);
    if (sizeof(REAL) > sizeof(float)) {
        VEC lost = X(fma)(c, d, X(sub)(X(set1)(0), x));
        /* Not for an x that overflows: the fraction must stay one. Where x underflows ldexp does not look at it. */
        r = X(add)(r, X(select)(X(less)(x, X(set1)(64)), lost, X(set1)(0)));
    }
    return X(exp2_fraction)(r, n, x);
}

static void X(exp2_array)(const void *x, void *y, int64_t n)
{
    const REAL *from = x;
    REAL *to = y;
    for (int64_t i = 0; i < n; i += W) {
        int part = n - i < W ? (int)(n - i) : W;
        X(store_part)(to + i, X(exp2)(X(load_part)(from + i, part)), part);
    }
}
