/* Gradients of a tile: dQ, dK and dV from Q, K, V, dO, the log-sum-exp and delta of each row. P and dS are never stored beyond it.
 *
 * Scores come from the steps of attend_tpl.h, and all five products are its form: S^T = K Q^T and dP^T = V dO^T have queries in
 * the lanes, and so has dQ^T += K^T dS^T; dV += P^T dO and dK += dS^T Q have the head dimension in the lanes, scratch as A, and
 * rows of dO and of Q in panels of columns as B.
 */

/* P = l 2^(c (S - m)) and dS = P (dP - delta) of rows first .. last, in place of S and dP. Of an excluded key, and in a lane whose
 * m is +inf, dS is 0, and P is 0 or, if careful, -1. */
static QKV_INLINE void X(slope_vectors)(const int nv, const int careful, const qkv_tile *t, const qkv_gradients *g, int first,
                                        int last)
{
    VEC none = X(set1)(-(REAL)INFINITY), endless = X(set1)((REAL)INFINITY), zero = X(set1)(0);
    VEC hidden = X(set1)(careful ? -1 : 0);
    X(factor) c = X(factor_of)(t->c);
    for (int i = first; i < last; i++) {
        REAL *s = (REAL *)t->s + (ptrdiff_t)i * LANES, *ds = (REAL *)g->ds + (ptrdiff_t)i * LANES;
        VEC p[LANE_VECTORS], x[LANE_VECTORS];
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            VEC m = X(load)((const REAL *)t->m + j * W);
            x[j] = X(select)(X(equal)(m, endless), none, X(load)(s + j * W));
            p[j] = X(sub)(x[j], m);
        }
        X(exp2)(nv, c, p);
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            VEC q = X(mul)(X(load)((const REAL *)t->l + j * W), p[j]);
            VEC y = X(mul)(q, X(sub)(X(load)(ds + j * W), X(load)((const REAL *)g->delta + j * W)));
            X(store)(s + j * W, X(select)(X(equal)(x[j], none), hidden, q));
            X(store)(ds + j * W, X(select)(X(equal)(x[j], none), zero, y));
        }
    }
}

static QKV_NOINLINE void X(slope_rows)(int nv, int careful, const qkv_tile *t, const qkv_gradients *g, int first, int last)
{
    if (careful)
        BY_VECTORS(X(slope_vectors), nv, 1, t, g, first, last);
    else
        BY_VECTORS(X(slope_vectors), nv, 0, t, g, first, last);
}

static void X(grad_scores)(const qkv_tile *t, const qkv_gradients *g)
{
    X(limits) limits;
    qkv_tile of_values = *t;
    of_values.q = g->dout;
    of_values.k = t->v;
    of_values.k_row = t->v_row;
    of_values.s = g->ds;
    of_values.d = t->dv;
    X(find_limits)(t, &limits);
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(strip_end)(t, i);
        for (int e = 0; e == 0 || e < t->d; e += QKV_TERMS)
            X(score_terms)(t->nv, t, i, end, e);
        for (int r = i; r < end && g->products; r++)
            memcpy((REAL *)g->products + (ptrdiff_t)r * LANES, (const REAL *)t->s + (ptrdiff_t)r * LANES,
                   (size_t)(t->nv * W) * sizeof(REAL));
        X(settle_rows)(t, i, end, &limits);
        for (int e = 0; e == 0 || e < t->dv; e += QKV_TERMS)
            X(score_terms)(t->nv, &of_values, i, end, e);
        X(slope_rows)(t->nv, g->careful, t, g, i, end);
    }
}

/* dS of scores before the cap: times 1 - tanh^2, but 0 stays 0 even beside NaN. */
static QKV_NOINLINE void X(uncap)(const qkv_tile *t, const qkv_gradients *g)
{
    VEC factor = X(set1)((REAL)t->changes.score_factor), one = X(set1)(1), zero = X(set1)(0);
    for (int i = 0; i < t->nk; i++) {
        for (int j = 0; j < t->nv * W; j += W) {
            REAL *ds = (REAL *)g->ds + (ptrdiff_t)i * LANES + j;
            VEC x = X(load)(ds), y = X(tanh)(X(mul)(factor, X(load)((const REAL *)g->products + (ptrdiff_t)i * LANES + j)));
            VEC z = X(mul)(x, X(mul)(X(sub)(one, y), X(add)(one, y)));
            X(store)(ds, X(select)(X(equal)(x, zero), zero, z));
        }
    }
}

/* nr rows of C, of keys, from i on, and nv vectors of columns: C += A B, of A's lanes. */
static QKV_INLINE void X(gather_rows)(const int nr, const int nv, const REAL *a, const REAL *b, int n, REAL *c, ptrdiff_t c_row)
{
    VEC sum[MOST_ROWS][LANE_VECTORS];
    X(product)(nr, nv, 1, a, LANES, b, n, NULL, sum);
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            X(store)(c + r * c_row + j * W, X(add)(X(load)(c + r * c_row + j * W), sum[r][j]));
    }
}

static QKV_INLINE int X(gather_tiles)(const int nr, const int nv, int i, int rows, const REAL *a, const REAL *b, int n, REAL *c,
                                      ptrdiff_t c_row)
{
    for (; i + nr <= rows; i += nr)
        X(gather_rows)(nr, nv, a + (ptrdiff_t)i * LANES, b, n, c + i * c_row, c_row);
    return i;
}

static QKV_INLINE void X(gather_vectors)(const int nv, int rows, const REAL *a, const REAL *b, int n, REAL *c, ptrdiff_t c_row)
{
    /* Terms are few here, so that sums have to hide the latency: two vectors of three leave registers for half a tile more. */
    const int most = nv == 2 && LANE_VECTORS == 3 && ROW_TILE == 4 && MOST_ROWS >= 6 ? 6 : ROWS(nv);
    int i = X(gather_tiles)(most, nv, 0, rows, a, b, n, c, c_row);
    if (most > ROW_TILE)
        i = X(gather_tiles)(ROW_TILE, nv, i, rows, a, b, n, c, c_row);
    i = X(gather_tiles)(ROW_TILE / 2, nv, i, rows, a, b, n, c, c_row);
    X(gather_tiles)(1, nv, i, rows, a, b, n, c, c_row);
}

/* The same sums in the same order, but a row of B whose lane has -1 in `seen` is not multiplied at all. */
static void X(gather_careful)(int nv, int rows, const REAL *a, const REAL *seen, const REAL *b, int n, REAL *c, ptrdiff_t c_row)
{
    for (int i = 0; i < rows; i++, a += LANES, seen += LANES, c += c_row) {
        for (int j = 0; j < nv * W; j += W) {
            VEC sum = X(set1)(0);
            for (int k = 0; k < n; k++)
                sum = seen[k] < 0 ? sum : X(fma)(X(set1)(a[k]), X(load)(b + (ptrdiff_t)k * LANES + j), sum);
            X(store)(c + j, X(add)(X(load)(c + j), sum));
        }
    }
}

/* C (keys, columns) += A^T B for all of a tile's lanes, panel of columns by panel of columns. */
static QKV_NOINLINE void X(gather_columns)(const qkv_tile *t, const qkv_gradients *g, const REAL *a, const REAL *b, int columns,
                                           REAL *c, ptrdiff_t c_row)
{
    for (int e = 0; e < columns; e += LANES, b += (ptrdiff_t)LANES * LANES, c += LANES) {
        int nv = (columns - e < LANES ? columns - e + W - 1 : LANES) / W;
        if (g->careful)
            X(gather_careful)(nv, t->nk, a, t->s, b, t->nv * W, c, c_row);
        else
            BY_VECTORS(X(gather_vectors), nv, t->nk, a, b, t->nv * W, c, c_row);
    }
}

/* dQ^T += K^T dS^T, the same sums in the same order, but of keys that a lane sees alone. */
static void X(turn_careful)(const qkv_tile *t, const qkv_gradients *g)
{
    for (int i = 0; i < t->d; i++) {
        for (int j = 0; j < t->nv * W; j += W) {
            REAL *o = (REAL *)t->o + (ptrdiff_t)i * LANES + j;
            VEC c = X(set1)(0);
            for (int k = 0; k < t->nk; k++) {
                VEC p = X(load)((const REAL *)t->s + (ptrdiff_t)k * LANES + j);
                VEC ds = X(load)((const REAL *)g->ds + (ptrdiff_t)k * LANES + j);
                c = X(select)(X(less)(p, X(set1)(0)), c, X(fma)(X(set1)(((const REAL *)t->k)[k * t->k_row + i]), ds, c));
            }
            X(store)(o, X(add)(X(load)(o), c));
        }
    }
}

static void X(grad_values)(const qkv_tile *t, const qkv_gradients *g)
{
    if (g->products)
        X(uncap)(t, g);
    X(gather_columns)(t, g, t->s, g->dout_rows, t->dv, g->dv, g->dv_row);
    X(gather_columns)(t, g, g->ds, g->q_rows, t->d, g->dk, g->dk_row);
    if (g->careful) {
        X(turn_careful)(t, g);
        return;
    }
    QKV_ALIGN REAL one[LANES];
    qkv_tile of_keys = *t;
    of_keys.v = t->k;
    of_keys.v_row = t->k_row;
    of_keys.dv = t->d;
    of_keys.s = g->ds;
    of_keys.ahead = NULL;
    for (int j = 0; j < LANES; j++)
        one[j] = 1;
    X(value)(t->nv, &of_keys, one);
}

static int X(finite_rows)(const void *rows, ptrdiff_t row, int64_t n, int d)
{
    VEC bad[2] = {X(set1)(0), X(set1)(0)};              /* x - x is 0 for every finite x */
    for (int64_t i = 0; i < n; i++) {
        const REAL *x = (const REAL *)rows + i * row;
        int e = 0;
        for (; e + W <= d; e += W)
            bad[i % 2] = X(add)(bad[i % 2], X(sub)(X(loadu)(x + e), X(loadu)(x + e)));
        if (e < d)
            bad[i % 2] = X(add)(bad[i % 2], X(sub)(X(load_part)(x + e, d - e), X(load_part)(x + e, d - e)));
    }
    return !X(any)(X(beyond)(X(add)(bad[0], bad[1]), X(set1)(0)));
}
