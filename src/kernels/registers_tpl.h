/* Products of attention, and of all else, by rows of registers.
 *
 * Every product here is one form: C[i][lane] = sum over t of A[i * row + t * step] (a scalar, broadcast from where it
 * lies, or an element of a vector) times B[t][lane] (contiguous). Scores are S^T = K Q^T with rows of keys; values are
 * O^T += V^T P^T with rows of output columns. A block of rows times nv vectors stays in registers while t runs.
 */
#if PAIR == 1
static inline VEC X(mad)(VEC x, VEC y, VEC z) { return X(fma)(x, y, z); }
static inline VEC X(mad_seen)(VEC v, VEC p, VEC z) { return X(select)(X(less)(p, X(set1)(0)), z, X(fma)(v, p, z)); }
#endif

/* Asks for the next n lines. */
static QKV_INLINE void X(fetch_lines)(qkv_ahead *ahead, const int n)
{
    qkv_span *s = &ahead->span[ahead->next];
    if (s->at + n * QKV_LINE < s->bytes) {
        const char *from = s->row + s->at;
        QKV_UNROLL
        for (int i = 0; i < n; i++)
            QKV_PREFETCH(from + i * QKV_LINE);
        s->at += n * QKV_LINE;
        return;
    }
    for (int i = 0; i < n && s->rows > 0; i++) {
        QKV_PREFETCH(s->row + s->at);
        s->at += QKV_LINE;
        if (s->at < s->bytes)
            continue;
        s->at = 0;
        if (--s->rows > 0)
            s->row += s->step;
        else
            s = &ahead->span[++ahead->next];
    }
}

#if LANE_MADS
/* Adds groups of so many terms of n, and returns how many terms these are in all. A is loaded as vectors, of terms of a row if
 * `along`, else of rows. Where few vectors are at work B stays in registers for all rows, and A is there for few of them. */
static QKV_INLINE int X(lane_terms)(const int nr, const int nv, const int along, const int terms, const REAL *a,
                                    ptrdiff_t stride, const REAL *b, int n, VEC c[MOST_ROWS][LANE_VECTORS])
{
    const int of_row = terms / W, most = !along ? 4 * W : nv > 2 ? 4 : 4 / of_row, rows = nr < most ? nr : most;
    const REAL *at[MOST_ROWS];
    QKV_IN_REGISTER(stride);                            /* where multiples of it would be as well, for the next rows */
    QKV_UNROLL
    for (int i = 0; i < nr; i++)
        at[i] = a + i * (along ? stride : 1);
    for (int left = n / terms; left != 0; left--, b += terms * LANES) {
        QKV_IN_REGISTER(left);                          /* the end of b would be on the stack */
        QKV_UNROLL
        for (int i = 0; i < nr; i += rows) {
            VEC x[LANE_VECTORS], y[8];
            QKV_UNROLL
            for (int r = 0; along && r < rows; r++)
                X(load_on)(&at[i + r], terms, y + r * of_row, of_row);
            QKV_UNROLL
            for (int e = 0; e < terms; e++) {
                if (!along)
                    X(load_on)(&at[i], stride, y, rows / W);
                QKV_UNROLL
                for (int j = 0; j < nv; j++)
                    x[j] = X(load)(b + e * LANES + j * W);
                QKV_UNROLL
                for (int r = 0; r < rows; r++) {
                    QKV_UNROLL
                    for (int j = 0; j < nv; j++)
                        c[i + r][j] = along ? X(mad_lane)(y[r * of_row + e / W], e % W, x[j], c[i + r][j])
                                            : X(mad_lane)(y[r / W], r % W, x[j], c[i + r][j]);
                }
            }
        }
    }
    return n - n % terms;
}
#endif

/* nr rows of C, all of it in registers: nr, nv and `along`, whether A has unit stride along terms (else along rows), are
 * compile-time constants wherever this is inlined. Lines are asked for a
 * few at a time, as many as A has been read: more than the CPU has buffers for would hold up the products. */
static QKV_INLINE void X(product)(const int nr, const int nv, const int along, const REAL *a, ptrdiff_t stride,
                                  const REAL *b, int n, qkv_ahead *ahead, VEC c[MOST_ROWS][LANE_VECTORS])
{
    const ptrdiff_t row = along ? stride : 1, step = along ? 1 : stride;
    const int piece = ahead ? QKV_LINE / (int)sizeof(REAL) : n;
    QKV_UNROLL
    for (int i = 0; i < nr; i++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            c[i][j] = X(set1)(0);
    }
    for (; n > 0; n -= piece) {
        int terms = n < piece ? n : piece;
#if LANE_MADS
        const int group = along && nv == 1 ? 8 : 4;
        const int done = along || nr % W == 0 ? X(lane_terms)(nr, nv, along, group, a, stride, b, terms, c) : 0;
        a += done * step;
        b += (ptrdiff_t)done * LANES;
        terms -= done;
#endif
        QKV_UNROLL_4
        for (int t = 0; t < terms; t++, a += step, b += LANES) {
            VEC x[LANE_VECTORS];
            QKV_UNROLL
            for (int j = 0; j < nv; j++)
                x[j] = X(load)(b + j * W);
            QKV_UNROLL
            for (int i = 0; i < nr; i++) {
                VEC y = X(set1)(a[i * row]);
                QKV_UNROLL
                for (int j = 0; j < nv; j++)
                    c[i][j] = X(mad)(y, x[j], c[i][j]);
            }
        }
        for (int i = 0; ahead && i < ahead->rate; i++)
            X(fetch_lines)(ahead, nr);
    }
}

/* Rows i .. i + nr of K Q^T, the terms from e on: stored, or added to those before. */
static QKV_INLINE void X(score_rows)(const int nr, const int nv, const qkv_tile *t, int i, int e)
{
    VEC c[MOST_ROWS][LANE_VECTORS];
    REAL *s = (REAL *)t->s + (ptrdiff_t)i * LANES;
    X(product)(nr, nv, 1, (const REAL *)t->k + i * t->k_row + e, t->k_row, (const REAL *)t->q + (ptrdiff_t)e * LANES,
               t->d - e < QKV_TERMS ? t->d - e : QKV_TERMS, t->ahead, c);
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            X(store)(s + r * LANES + j * W, e ? X(add)(X(load)(s + r * LANES + j * W), c[r][j]) : c[r][j]);
    }
}

static QKV_INLINE int X(score_tiles)(const int nr, const int nv, const qkv_tile *t, int i, int last, int e)
{
    for (; i + nr <= last; i += nr)
        X(score_rows)(nr, nv, t, i, e);
    return i;
}

static QKV_INLINE void X(score_vectors)(const int nv, const qkv_tile *t, int i, int last, int e)
{
    i = X(score_tiles)(ROWS(nv), nv, t, i, last, e);
    if (ROWS(nv) > ROW_TILE)
        i = X(score_tiles)(ROW_TILE, nv, t, i, last, e);
    i = X(score_tiles)(ROW_TILE / 2, nv, t, i, last, e);
    X(score_tiles)(1, nv, t, i, last, e);
}

/* Rows first .. last of K Q^T, up to QKV_TERMS terms from e on: long scalar products are sums of shorter ones, as in a BLAS. */
static QKV_NOINLINE void X(score_terms)(int nv, const qkv_tile *t, int first, int last, int e)
{
    BY_VECTORS(X(score_vectors), nv, t, first, last, e);
}

/* The same of all terms. */
static QKV_INLINE void X(score_keys)(int nv, const qkv_tile *t, int first, int last)
{
    for (int e = 0; e == 0 || e < t->d; e += QKV_TERMS)
        X(score_terms)(nv, t, first, last, e);
}

#if PAIR == 2
static QKV_INLINE void X(put_weights)(const qkv_tile *t, int i, int j, VEC x, VEC y)
{
    X(store)((REAL *)t->s + (ptrdiff_t)(i / 2) * LANES + j * W, X(join)(x, y));
}
#endif

/* Columns i .. i + nr of O: O^T <- alpha O^T + V^T P^T. */
static QKV_INLINE void X(value_rows)(const int nr, const int nv, const qkv_tile *t, int i, const REAL *alpha)
{
    VEC c[MOST_ROWS][LANE_VECTORS];
    X(product)(nr, nv, 0, (const REAL *)t->v + i, t->v_row, t->s, (t->nk + PAIR - 1) / PAIR, t->ahead, c);
    REAL *o = (REAL *)t->o + (ptrdiff_t)i * LANES;
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        VEC a = X(load)(alpha + j * W);
        QKV_UNROLL
        for (int r = 0; r < nr; r++) {
            REAL *at = o + r * LANES + j * W;
            X(store)(at, X(fma)(a, X(load)(at), c[r][j]));
        }
    }
}

/* The values of a tile where V or a weight may be NaN or infinite: the same sums in the same order, but an excluded
 * key's V is not multiplied at all. One vector of lanes. */
static void X(value_careful)(const qkv_tile *t, const REAL *alpha)
{
    for (int i = 0; i < t->dv; i++) {
        REAL *o = (REAL *)t->o + (ptrdiff_t)i * LANES;
        VEC c = X(set1)(0);
        for (int k = 0; k < (t->nk + PAIR - 1) / PAIR; k++) {
            VEC p = X(load)((const REAL *)t->s + (ptrdiff_t)k * LANES);
            VEC v = X(set1)(((const REAL *)t->v)[k * t->v_row + i]);
            c = X(mad_seen)(v, p, c);
        }
        X(store)(o, X(fma)(X(load)(alpha), X(load)(o), c));
    }
}

static QKV_INLINE void X(value_vectors)(const int nv, const qkv_tile *t, const REAL *alpha)
{
    int i = 0;
    for (; i + ROWS(nv) <= t->dv; i += ROWS(nv))
        X(value_rows)(ROWS(nv), nv, t, i, alpha);
    for (; ROWS(nv) > ROW_TILE && i + ROW_TILE <= t->dv; i += ROW_TILE)
        X(value_rows)(ROW_TILE, nv, t, i, alpha);
    for (; i + ROW_TILE / 2 <= t->dv; i += ROW_TILE / 2)
        X(value_rows)(ROW_TILE / 2, nv, t, i, alpha);
    for (; i < t->dv; i++)
        X(value_rows)(1, nv, t, i, alpha);
}

static QKV_NOINLINE void X(value)(int nv, const qkv_tile *t, const REAL *alpha)
{
    BY_VECTORS(X(value_vectors), nv, t, alpha);
}
