/* Products of matrices and softmax on their own, for those who want the matrix.
 *
 * A product here is row-major: C (m, columns) <- factor * A B, with A broadcast from where its rows lie and B a panel of
 * up to LANES columns, so the loop is `product` of attend_tpl.h and C leaves the registers as rows of the result.
 */

/* Rows i .. i + nr of C, terms e .. e + n. */
static QKV_INLINE void X(product_rows)(const int nr, const int nv, const qkv_product_tile *t, int i, int e, int n)
{
    /* Stores wait for their lines one after the other, so they are fetched together while the sums run. */
    REAL *to = (REAL *)t->c + i * t->c_row;
    for (int r = 0; r < nr && !t->stream; r++)
        for (int j = 0; j < t->columns; j += 64 / (int)sizeof(REAL))
            QKV_PREFETCH_WRITE(to + r * t->c_row + j);
    VEC c[MOST_ROWS][LANE_VECTORS];
    X(product)(nr, nv, 1, (const REAL *)t->a + i * t->a_row + e, t->a_row, (const REAL *)t->b + (ptrdiff_t)e * LANES, n,
               NULL, c);
    VEC factor = X(set1)((REAL)t->factor);
    const int add = t->add | (e > 0), part = t->columns - (nv - 1) * W;
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            REAL *at = to + r * t->c_row + j * W;
            VEC x = c[r][j];
            if (t->stream && (j + 1 < nv || part == W))
                X(stream)(at, X(mul)(factor, x));
            else if (j + 1 < nv || part == W)
                X(storeu)(at, add ? X(fma)(factor, x, X(loadu)(at)) : X(mul)(factor, x));
            else
                X(store_part)(at, add ? X(fma)(factor, x, X(load_part)(at, part)) : X(mul)(factor, x), part);
        }
    }
}

static QKV_INLINE void X(product_vectors)(const int nv, const qkv_product_tile *t)
{
    int e = 0;
    do {
        int n = t->n - e < QKV_TERMS ? t->n - e : QKV_TERMS, i = 0;
        for (; i + ROWS(nv) <= t->m; i += ROWS(nv))
            X(product_rows)(ROWS(nv), nv, t, i, e, n);
        for (; ROWS(nv) > ROW_TILE && i + ROW_TILE <= t->m; i += ROW_TILE)
            X(product_rows)(ROW_TILE, nv, t, i, e, n);
        for (; i + ROW_TILE / 2 <= t->m; i += ROW_TILE / 2)
            X(product_rows)(ROW_TILE / 2, nv, t, i, e, n);
        for (; i < t->m; i++)
            X(product_rows)(1, nv, t, i, e, n);
        e += QKV_TERMS;
    } while (e < t->n);
}

static void X(multiply)(const qkv_product_tile *t)
{
    if (t->columns <= W)
        X(product_vectors)(1, t);
    else if (t->columns <= 2 * W)
        X(product_vectors)(2, t);
    else if (LANE_VECTORS > 3 && t->columns <= 3 * W)
        X(product_vectors)(3, t);
    else
        X(product_vectors)(LANE_VECTORS, t);
}
