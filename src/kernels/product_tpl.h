/* Products of matrices and softmax on their own, for those who want the matrix.
 *
 * A product here is row-major: C (m, columns) <- factor * A B, with A broadcast from where its rows lie and B a panel of
 * up to LANES columns, so the loop is `product` of registers_tpl.h and C leaves the registers as rows of the result; or A and B are
 * what tiles are made of, and sums leave these.
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

#if TILE_PARTS
/* Two by two tiles at a time. Where a sum is not finite it is made again, without what an infinity does to parts of 0. */
static void X(multiply)(const qkv_product_tile *t)
{
    QKV_ALIGN REAL c[2 * X(tile)][LANES];
    VEC sums[MOST_ROWS][LANE_VECTORS], zero = X(set1)(0);
    const int nv = t->columns > W ? 2 : 1, all = t->n / TILE_PARTS / 16;
    for (int i = 0; i < t->m; i += 2 * X(tile)) {
        const int rows = t->m - i < 2 * X(tile) ? t->m - i : 2 * X(tile);
        int s = 0;
        do {
            const int steps = all - s < QKV_TERMS / STRIP ? all - s : QKV_TERMS / STRIP;
            const REAL *from = (const REAL *)t->a + i * t->a_row + s * 16, *panel = (const REAL *)t->b + (ptrdiff_t)s * 16 * LANES;
            X(tiles) a = X(rows_of)(from, t->a_row, t->n), b = X(lanes_of)(panel, t->n);
            X(multiply_scores)(rows > X(tile) ? 2 : 1, nv, &a, &b, steps, c[0]);
            for (int r = 0; r < rows; r++) {
                for (int j = 0; j < nv; j++) {
                    VEC x = sums[0][j] = X(load)(c[r] + j * W);
                    if (TILE_PARTS == 1 || !X(any)(X(beyond)(X(sub)(x, x), zero)))
                        continue;
                    a = X(rows_of)(from + r * t->a_row, t->a_row, t->n);
                    b = X(lanes_of)(panel + j * W, t->n);
                    sums[0][j] = X(careful_row)(X(score_n), X(score_products), &a, &b, steps, 0);
                }
                if (nv > 1)
                    X(put_sums)(1, 2, t, i + r, t->add | (s > 0), sums);
                else
                    X(put_sums)(1, 1, t, i + r, t->add | (s > 0), sums);
            }
            s += steps;
        } while (s < all);
    }
}
#else
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
 * are those of panels. A sum waits for itself, so several take turns, line by line: of few rows those of `ne` parts of terms, or of nv
 * vectors of columns. Parts come first: columns a power of two apart share a set of the nearest cache, which holds one vector of them.
 * Meanwhile as many lines are fetched of the columns that come next, in memory's order: a column may be a page, behind whose end no
 * CPU fetches by itself. */
static QKV_INLINE void X(turned_terms)(const int nr, const REAL *a, ptrdiff_t a_row, const void *const *columns, int k, int part,
                                       const int v, VEC c[MOST_ROWS][LANE_VECTORS])
{
    VEC x[W];
    QKV_UNROLL
    for (int j = 0; j < W; j++) {
        const REAL *from = (const REAL *)columns[v * W + j] + k;
        x[j] = part < W ? X(load_part)(from, part) : X(loadu)(from);
    }
    X(transpose)(x);
#if LANE_MADS
    VEC y[ROW_TILE];
    QKV_UNROLL
    for (int r = 0; r < nr; r++)
        y[r] = part < W ? X(load_part)(a + r * a_row + k, part) : X(loadu)(a + r * a_row + k);
#endif
    QKV_UNROLL
    for (int j = 0; j < W; j++) {
        if (j >= part)
            break;
        QKV_UNROLL
        for (int r = 0; r < nr; r++)
#if LANE_MADS
            c[r][v] = X(mad_lane)(y[r], j, x[j], c[r][v]);
#else
            c[r][v] = X(mad)(X(set1)(a[r * a_row + k + j]), x[j], c[r][v]);
#endif
    }
}

/* Rows i .. i + nr of C, terms from e on: ne parts of QKV_TERMS, or one of n. */
static QKV_INLINE void X(turned_rows)(const int nr, const int nv, const int ne, const qkv_product_tile *t, int i, int e, int n)
{
    const int line = QKV_LINE / (int)sizeof(REAL);
    const REAL *a = (const REAL *)t->a + i * t->a_row;
    const void *const *columns = t->b;
    const ptrdiff_t step = (const char *)columns[1] - (const char *)columns[0];
    const ptrdiff_t bytes = (ptrdiff_t)(ne > 1 ? ne * QKV_TERMS : n) * (ptrdiff_t)sizeof(REAL);
    const char *next = (const char *)((const REAL *)columns[0] + e) + step * nv * W;
    ptrdiff_t at = 0;
    VEC c[4][MOST_ROWS][LANE_VECTORS];
    QKV_UNROLL
    for (int p = 0; p < ne; p++) {
        QKV_UNROLL
        for (int r = 0; r < nr; r++) {
            QKV_UNROLL
            for (int v = 0; v < nv; v++)
                c[p][r][v] = X(set1)(0);
        }
    }
    int k = e, last = e + (ne > 1 ? QKV_TERMS : n);
    for (; k + line <= last; k += line) {
        QKV_UNROLL
        for (int p = 0; p < ne; p++) {
            QKV_UNROLL
            for (int v = 0; v < nv; v++) {
                if (at >= bytes) {
                    at = 0;
                    next += step;
                }
                QKV_UNROLL
                for (int j = 0; j < W; j++, at += QKV_LINE)
                    QKV_PREFETCH_L2(next + at);
                QKV_UNROLL
                for (int j = 0; j < line; j += W)
                    X(turned_terms)(nr, a, t->a_row, columns, k + p * QKV_TERMS + j, W, v, c[p]);
            }
        }
    }
    for (; ne == 1 && k < last; k += W) {
        QKV_UNROLL
        for (int v = 0; v < nv; v++)
            X(turned_terms)(nr, a, t->a_row, columns, k, last - k < W ? last - k : W, v, c[0]);
    }
    QKV_UNROLL
    for (int p = 0; p < ne; p++)
        X(put_sums)(nr, nv, t, i, t->add | (e + p > 0), c[p]);
}

/* Rows i .. i + nr, for columns of up to nv vectors. */
static QKV_INLINE void X(turned_columns)(const int nr, const int nv, const int ne, const qkv_product_tile *t, int i, int e, int n)
{
    qkv_product_tile some = *t;
    for (int j = 0; j < t->columns; j += some.columns) {
        some.columns = t->columns - j < nv * W ? t->columns - j : nv * W;
        some.b = (const void *const *)t->b + j;
        some.c = (REAL *)t->c + j;
        if (some.columns > (nv - 1) * W)
            X(turned_rows)(nr, nv, ne, &some, i, e, n);
        else
            for (int v = 0; v < some.columns; v += W) {
                qkv_product_tile one = some;
                one.columns = some.columns - v < W ? some.columns - v : W;
                one.b = (const void *const *)some.b + v;
                one.c = (REAL *)some.c + v;
                X(turned_rows)(nr, 1, ne, &one, i, e, n);
            }
    }
}

static QKV_INLINE void X(turned_parts)(const int nr, const int nv, const int ne, const qkv_product_tile *t, int i)
{
    int e = 0;
    for (; ne > 1 && e + ne * QKV_TERMS <= t->n; e += ne * QKV_TERMS)
        X(turned_columns)(nr, 1, ne, t, i, e, 0);
    if (ne > 3 && e + 3 * QKV_TERMS <= t->n) {
        X(turned_columns)(nr, 1, 3, t, i, e, 0);
        e += 3 * QKV_TERMS;
    } else if (ne > 2 && e + 2 * QKV_TERMS <= t->n) {
        X(turned_columns)(nr, 1, 2, t, i, e, 0);
        e += 2 * QKV_TERMS;
    }
    for (; e == 0 || e < t->n; e += QKV_TERMS)
        X(turned_columns)(nr, nv, 1, t, i, e, t->n - e < QKV_TERMS ? t->n - e : QKV_TERMS);
}

static void X(multiply_turned)(const qkv_product_tile *t)
{
    int i = 0;
    for (; i + ROW_TILE <= t->m; i += ROW_TILE)
        X(turned_parts)(ROW_TILE, 1, 1, t, i);
    for (; i + 2 <= t->m; i += 2)
        X(turned_parts)(2, LANE_VECTORS > 1 ? 2 : 1, 2, t, i);
    for (; i < t->m; i++)
        X(turned_parts)(1, LANE_VECTORS, 4, t, i);
}
#endif
