/* Products of matrices and softmax on their own, for those who want the matrix.
 *
 * A product here is row-major: C (m, columns) <- factor * A B, with A broadcast from where its rows lie and B a panel of
 * up to LANES columns, so the loop is `product` of attend_tpl.h and C leaves the registers as rows of the result.
 */

/* Rows i .. i + nr of C <- factor * sums, or added to what they hold. */
static QKV_INLINE void X(put_sums)(const int nr, const int nv, const qkv_product_tile *t, int i, const int add,
                                   VEC c[MOST_ROWS][LANE_VECTORS])
{
    VEC factor = X(set1)((REAL)t->factor);
    REAL *to = (REAL *)t->c + i * t->c_row;
    const int part = t->columns - (nv - 1) * W;
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
    X(put_sums)(nr, nv, t, i, t->add | (e > 0), c);
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

/* The same for columns of B that are rows in memory: squares of them are turned in registers on their way into the sums, which
 * are those of panels. A sum waits for itself, so of few rows two vectors of columns take turns, line by line. Meanwhile
 * the same lines of the next columns are fetched: a column may be a page, behind whose end no CPU fetches by itself. */
static QKV_INLINE void X(turned_terms)(const int nr, const int v, const REAL *a, ptrdiff_t a_row, const void *const *columns, int e,
                                       int part, VEC c[MOST_ROWS][LANE_VECTORS])
{
    VEC x[W];
    QKV_UNROLL
    for (int j = 0; j < W; j++) {
        const REAL *from = (const REAL *)columns[v * W + j] + e;
        x[j] = part < W ? X(load_part)(from, part) : X(loadu)(from);
    }
    X(transpose)(x);
    QKV_UNROLL
    for (int j = 0; j < W; j++) {
        if (j >= part)
            break;
        QKV_UNROLL
        for (int r = 0; r < nr; r++)
            c[r][v] = X(mad)(X(set1)(a[r * a_row + e + j]), x[j], c[r][v]);
    }
}

static QKV_INLINE void X(turned_rows)(const int nr, const int nv, const qkv_product_tile *t, int i, int e, int n)
{
    const int line = QKV_LINE / (int)sizeof(REAL);
    const REAL *a = (const REAL *)t->a + i * t->a_row;
    const void *const *columns = t->b;
    const ptrdiff_t ahead = ((const char *)columns[1] - (const char *)columns[0]) * nv * W;
    VEC c[MOST_ROWS][LANE_VECTORS];
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int v = 0; v < nv; v++)
            c[r][v] = X(set1)(0);
    }
    int k = e, last = e + n;
    for (; k + line <= last; k += line) {
        QKV_UNROLL
        for (int v = 0; v < nv; v++) {
            for (int j = 0; j < W; j++)
                QKV_PREFETCH_L2((const char *)((const REAL *)columns[v * W + j] + k) + ahead);
            QKV_UNROLL
            for (int j = 0; j < line; j += W)
                X(turned_terms)(nr, v, a, t->a_row, columns, k + j, W, c);
        }
    }
    for (; k < last; k += W) {
        QKV_UNROLL
        for (int v = 0; v < nv; v++)
            X(turned_terms)(nr, v, a, t->a_row, columns, k, last - k < W ? last - k : W, c);
    }
    X(put_sums)(nr, nv, t, i, t->add | (e > 0), c);
}

static QKV_INLINE void X(turned_vectors)(const int nv, const qkv_product_tile *t)
{
    int e = 0;
    do {
        int n = t->n - e < QKV_TERMS ? t->n - e : QKV_TERMS, i = 0;
        for (; nv == 1 && i + ROW_TILE <= t->m; i += ROW_TILE)
            X(turned_rows)(ROW_TILE, 1, t, i, e, n);
        for (; i + 2 <= t->m; i += 2)
            X(turned_rows)(2, nv, t, i, e, n);
        for (; i < t->m; i++)
            X(turned_rows)(1, nv, t, i, e, n);
        e += QKV_TERMS;
    } while (e < t->n);
}

static void X(multiply_turned)(const qkv_product_tile *t)
{
    const int most = t->m < ROW_TILE && LANE_VECTORS > 1 ? 2 * W : W;
    qkv_product_tile some = *t;
    for (int j = 0; j < t->columns; j += some.columns) {
        some.columns = t->columns - j < most ? t->columns - j : most;
        some.b = (const void *const *)t->b + j;
        some.c = (REAL *)t->c + j;
        if (some.columns > W)
            X(turned_vectors)(LANE_VECTORS > 1 ? 2 : 1, &some);
        else
            X(turned_vectors)(1, &some);
    }
}
