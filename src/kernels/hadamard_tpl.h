/* The Hadamard transform of a row of n elements, a power of two: n log n sums and differences. Which levels of these come first is
 * the same, so those between elements of one vector are done when a square of vectors is transposed. Rotations of caches
 * (cache.c) are this, after or before a factor for each element.
 */

/* The sums and differences of elements that are h apart, n of them in whole vectors. */
static QKV_INLINE void X(hadamard_level)(REAL *x, int64_t n, int64_t h)
{
    for (int64_t i = 0; i < n; i += 2 * h)
        for (int64_t j = i; j < i + h; j += W) {
            VEC a = X(loadu)(x + j), b = X(loadu)(x + j + h);
            X(storeu)(x + j, X(add)(a, b));
            X(storeu)(x + j + h, X(sub)(a, b));
        }
}

/* All levels within vectors, of at most W of them. */
static QKV_INLINE void X(hadamard_near)(REAL *x, int vectors)
{
    VEC y[W];
    QKV_UNROLL
    for (int i = 0; i < W; i++)
        y[i] = i < vectors ? X(loadu)(x + i * W) : X(set1)(0);
    X(transpose)(y);
    QKV_UNROLL
    for (int h = 1; h < W; h *= 2) {
        QKV_UNROLL
        for (int i = 0; i < W; i++)
            if (!(i & h)) {
                VEC a = y[i], b = y[i + h];
                y[i] = X(add)(a, b);
                y[i + h] = X(sub)(a, b);
            }
    }
    X(transpose)(y);
    QKV_UNROLL
    for (int i = 0; i < W; i++)
        if (i < vectors)
            X(storeu)(x + i * W, y[i]);
}

static void X(hadamard)(void *row, int64_t n)
{
    REAL *x = row;
    for (int64_t h = 1; n < W && h < n; h *= 2)
        for (int64_t j = 0; j < n; j++)
            if (!(j & h)) {
                REAL a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    for (int64_t i = 0; n >= W && i < n; i += W * W)
        X(hadamard_near)(x + i, (int)(n / W < W ? n / W : W));
    for (int64_t h = W; h < n; h *= 2)
        X(hadamard_level)(x, n, h);
}

/* x <- x times factors, n of each. */
static void X(multiply_row)(void *row, const void *factors, int64_t n)
{
    REAL *x = row;
    const REAL *factor = factors;
    for (int64_t i = 0; i < n; i++)
        x[i] *= factor[i];
}
