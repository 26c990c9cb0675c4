/* Rotary positions: pairs (a, b) of a row become (a cos - b sin, b cos + a sin), products rounded before they are added.
 *
 * A pair is two elements that are half of what is turned apart, or two neighbours. Whatever the row's length, every pair takes
 * the same four products and two sums, so bits do not depend on where it lies. A pair is read before it is written: out may
 * be x.
 */

static QKV_INLINE void X(rotate_halves)(const REAL *x, REAL *out, const REAL *cos, const REAL *sin, int pairs,
                                      ptrdiff_t ahead)
{
    int i = 0;
    for (; i + W <= pairs; i += W) {
        QKV_PREFETCH(x + ahead + 2 * i);
        VEC a = X(loadu)(x + i), b = X(loadu)(x + pairs + i), c = X(loadu)(cos + i), s = X(loadu)(sin + i);
        X(storeu)(out + i, X(sub)(X(mul)(a, c), X(mul)(b, s)));
        X(storeu)(out + pairs + i, X(add)(X(mul)(b, c), X(mul)(a, s)));
    }
    if (i < pairs) {
        int n = pairs - i;
        VEC a = X(load_part)(x + i, n), b = X(load_part)(x + pairs + i, n);
        VEC c = X(load_part)(cos + i, n), s = X(load_part)(sin + i, n);
        X(store_part)(out + i, X(sub)(X(mul)(a, c), X(mul)(b, s)), n);
        X(store_part)(out + pairs + i, X(add)(X(mul)(b, c), X(mul)(a, s)), n);
    }
}

/* x c + y s, where y are the neighbours of x and the first s of a pair has the other sign: the bits of the difference. */
static QKV_INLINE void X(rotate_neighbours)(const REAL *x, REAL *out, const REAL *cos, const REAL *sin, int pairs,
                                      ptrdiff_t ahead)
{
    int i = 0;
    for (; i + 2 * W <= 2 * pairs; i += 2 * W) {
        QKV_PREFETCH(x + ahead + i);
        VEC a = X(loadu)(x + i), b = X(loadu)(x + i + W), y = a, z = b;
        X(exchange)(&y, &z);
        X(storeu)(out + i, X(add)(X(mul)(a, X(loadu)(cos + i)), X(mul)(y, X(loadu)(sin + i))));
        X(storeu)(out + i + W, X(add)(X(mul)(b, X(loadu)(cos + i + W)), X(mul)(z, X(loadu)(sin + i + W))));
    }
    if (i < 2 * pairs) {
        int n = 2 * pairs - i < W ? 2 * pairs - i : W, m = 2 * pairs - i - n;
        VEC a = X(load_part)(x + i, n), b = X(load_part)(x + i + n, m), y = a, z = b;
        X(exchange)(&y, &z);
        VEC c = X(load_part)(cos + i, n), d = X(load_part)(cos + i + n, m);
        VEC s = X(load_part)(sin + i, n), t = X(load_part)(sin + i + n, m);
        X(store_part)(out + i, X(add)(X(mul)(a, c), X(mul)(y, s)), n);
        X(store_part)(out + i + n, X(add)(X(mul)(b, d), X(mul)(z, t)), m);
    }
}

/* Rows r .. r + n, the first to `out`. Meanwhile rows that come later are fetched. */
static void X(rotate_rows)(const qkv_rotation_tile *t, int r, int n, REAL *out, ptrdiff_t out_row)
{
    for (; n-- > 0; r++, out += out_row) {
        const REAL *x = (const REAL *)t->x + r * t->x_row;
        const REAL *cos = (const REAL *)t->cos + r * t->table_row, *sin = (const REAL *)t->sin + r * t->table_row;
        if (t->neighbours)
            X(rotate_neighbours)(x, out, cos, sin, t->pairs, t->ahead);
        else
            X(rotate_halves)(x, out, cos, sin, t->pairs, t->ahead);
        int i = 2 * t->pairs;
        for (; x != out && i + W <= t->dim; i += W)
            X(storeu)(out + i, X(loadu)(x + i));
        if (x != out && i < t->dim)
            X(store_part)(out + i, X(load_part)(x + i, t->dim - i), t->dim - i);
    }
}

/* Some rows at a time go to a buffer, and from there whole lines past the caches: rows need not begin at lines. */
static void X(rotate_past)(const qkv_rotation_tile *t)
{
    const ptrdiff_t line = QKV_LINE / sizeof(REAL);
    REAL *out = t->out, *buffer = t->buffer;
    ptrdiff_t held = 0, head = (ptrdiff_t)(-(uintptr_t)out % QKV_LINE / sizeof(REAL));
    for (int r = 0, n; r < t->n; r += n) {
        n = t->n - r < t->buffer_rows ? t->n - r : t->buffer_rows;
        X(rotate_rows)(t, r, n, buffer + held, t->dim);
        held += (ptrdiff_t)n * t->dim;
        ptrdiff_t i = head < held ? head : held;
        memcpy(out, buffer, (size_t)i * sizeof(REAL));
        head -= i;
        out += i;
        for (; i + line <= held; i += line, out += line) {
            QKV_UNROLL
            for (int j = 0; j < line; j += W)
                X(stream)(out + j, X(loadu)(buffer + i + j));
        }
        held -= i;
        memmove(buffer, buffer + i, (size_t)held * sizeof(REAL));
    }
    memcpy(out, buffer, (size_t)held * sizeof(REAL));
}

static void X(rotate)(const qkv_rotation_tile *t)
{
    if (t->buffer)
        X(rotate_past)(t);
    else
        X(rotate_rows)(t, 0, t->n, t->out, t->out_row);
}
