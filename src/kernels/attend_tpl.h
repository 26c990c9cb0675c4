/* One tile of attention: O, m, l <- merge(O, m, l, Q K^T, V). S is never stored beyond the tile.
 *
 * Every product here is one form: C[i][lane] = sum over t of A[i * row + t * step] (a scalar, broadcast from where it
 * lies) times B[t][lane] (contiguous). Scores are S^T = K Q^T with rows of keys; values are O^T += V^T P^T with rows of
 * output columns. A block of ROW_TILE rows times nv vectors stays in registers while t runs.
 *
 * The values of a tile are summed from zero and then added to alpha * O: over long sequences that keeps the error near
 * that of a pairwise sum, and alpha (1 unless the maximum moved) costs nothing there.
 */

/* nr rows of C, all of it in registers: nr and nv are compile-time constants wherever this is inlined. */
static QKV_INLINE void X(product)(const int nr, const int nv, const REAL *a, ptrdiff_t row, ptrdiff_t step,
                                  const REAL *b, int n, VEC c[ROW_TILE][LANE_VECTORS])
{
    QKV_UNROLL
    for (int i = 0; i < nr; i++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            c[i][j] = X(set1)(0);
    }
    for (int t = 0; t < n; t++, a += step, b += LANES) {
        VEC x[LANE_VECTORS];
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            x[j] = X(load)(b + j * W);
        QKV_UNROLL
        for (int i = 0; i < nr; i++) {
            VEC y = X(set1)(a[i * row]);
            QKV_UNROLL
            for (int j = 0; j < nv; j++)
                c[i][j] = X(fma)(y, x[j], c[i][j]);
        }
    }
}

/* Rows i .. i + nr of S^T, excluded scores as -inf, and the maximum of each lane so far in top (nv vectors). */
static QKV_INLINE void X(score_rows)(const int nr, const int nv, const qkv_tile *t, int i, const REAL *lo,
                                     const REAL *hi, REAL *top)
{
    VEC c[ROW_TILE][LANE_VECTORS];
    X(product)(nr, nv, (const REAL *)t->k + i * t->k_row, t->k_row, 1, t->q, t->d, c);
    if (t->lo) {
        QKV_UNROLL
        for (int r = 0; r < nr; r++) {
            VEC at = X(set1)((REAL)(i + r));
            QKV_UNROLL
            for (int j = 0; j < nv; j++) {
                VEC hidden = X(set1)(-(REAL)INFINITY);
                VEC s = X(select)(X(less)(at, X(load)(hi + j * W)), c[r][j], hidden);
                c[r][j] = X(select)(X(less)(at, X(load)(lo + j * W)), hidden, s);
            }
        }
    }
    REAL *s = (REAL *)t->s + (ptrdiff_t)i * LANES;
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        VEC m = X(load)(top + j * W);
        QKV_UNROLL
        for (int r = 0; r < nr; r++) {
            X(store)(s + r * LANES + j * W, c[r][j]);
            m = X(max)(c[r][j], m);
        }
        X(store)(top + j * W, m);
    }
}

/* Columns i .. i + nr of O: O^T <- alpha O^T + V^T P^T. */
static QKV_INLINE void X(value_rows)(const int nr, const int nv, const qkv_tile *t, int i, const REAL *alpha)
{
    VEC c[ROW_TILE][LANE_VECTORS];
    X(product)(nr, nv, (const REAL *)t->v + i, 1, t->v_row, t->s, t->nk, c);
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

/* S^T -> P^T in place and, with alpha, the state's rescaling. A lane's maximum follows only when it has grown by more
 * than 8 in log2: P stays below 2^8, and most tiles leave O alone. If careful, P of an excluded key is -1. */
static QKV_INLINE void X(softmax)(const int nv, const int careful, const qkv_tile *t, const REAL *top, REAL *alpha)
{
    VEC c = X(set1)((REAL)t->c), none = X(set1)(-(REAL)INFINITY), one = X(set1)(1);
    VEC shift[LANE_VECTORS], sum[LANE_VECTORS];
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        VEC m = X(load)((REAL *)t->m + j * W), now = X(load)(top + j * W);
        X(mask) grown = X(less)(X(set1)(8), X(mul)(c, X(sub)(now, m)));
        now = X(select)(grown, now, m);
        X(store)((REAL *)t->m + j * W, now);
        X(store)(alpha + j * W, X(select)(grown, X(exp2)(X(mul)(c, X(sub)(m, now))), one));
        /* A lane that has seen nothing: subtract 0, since -inf - -inf would be NaN. */
        shift[j] = X(select)(X(equal)(now, none), X(set1)(0), now);
        sum[j] = X(set1)(0);
    }
    for (int i = 0; i < t->nk; i++) {
        REAL *s = (REAL *)t->s + (ptrdiff_t)i * LANES;
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            VEC score = X(load)(s + j * W);
            /* The maximum is subtracted first: c * s alone may overflow, or lose the difference. */
            VEC p = X(exp2)(X(mul)(c, X(sub)(score, shift[j])));
            sum[j] = X(add)(sum[j], p);
            X(store)(s + j * W, careful ? X(select)(X(equal)(score, none), X(set1)(-1), p) : p);
        }
    }
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        REAL *l = (REAL *)t->l + j * W;
        X(store)(l, X(fma)(X(load)(alpha + j * W), X(load)(l), sum[j]));
    }
}

/* The values of a tile where V or a weight may be NaN or infinite: the same sums in the same order, but an excluded
 * key's V is not multiplied at all. */
static void X(value_careful)(const qkv_tile *t, const REAL *alpha)
{
    for (int i = 0; i < t->dv; i++)
        for (int j = 0; j < t->nv; j++) {
            REAL *o = (REAL *)t->o + (ptrdiff_t)i * LANES + j * W;
            VEC c = X(set1)(0);
            for (int k = 0; k < t->nk; k++) {
                VEC p = X(load)((REAL *)t->s + (ptrdiff_t)k * LANES + j * W);
                VEC v = X(set1)(((const REAL *)t->v)[k * t->v_row + i]);
                c = X(select)(X(less)(p, X(set1)(0)), c, X(fma)(v, p, c));
            }
            X(store)(o, X(fma)(X(load)(alpha + j * W), X(load)(o), c));
        }
}

static QKV_INLINE void X(attend_vectors)(const int nv, const int careful, const qkv_tile *t)
{
    QKV_ALIGN REAL top[LANES];
    QKV_ALIGN REAL alpha[LANES];
    QKV_ALIGN REAL lo[LANES];
    QKV_ALIGN REAL hi[LANES];
    for (int j = 0; j < nv; j++)
        X(store)(top + j * W, X(set1)(-(REAL)INFINITY));
    for (int j = 0; t->lo && j < nv * W; j++) {
        lo[j] = (REAL)t->lo[j];
        hi[j] = (REAL)t->hi[j];
    }

    int i = 0;
    for (; i + ROW_TILE <= t->nk; i += ROW_TILE)
        X(score_rows)(ROW_TILE, nv, t, i, lo, hi, top);
    for (; i + ROW_TILE / 2 <= t->nk; i += ROW_TILE / 2)
        X(score_rows)(ROW_TILE / 2, nv, t, i, lo, hi, top);
    for (; i < t->nk; i++)
        X(score_rows)(1, nv, t, i, lo, hi, top);

    X(softmax)(nv, careful, t, top, alpha);

    if (careful) {
        X(value_careful)(t, alpha);
        return;
    }
    for (i = 0; i + ROW_TILE <= t->dv; i += ROW_TILE)
        X(value_rows)(ROW_TILE, nv, t, i, alpha);
    for (; i + ROW_TILE / 2 <= t->dv; i += ROW_TILE / 2)
        X(value_rows)(ROW_TILE / 2, nv, t, i, alpha);
    for (; i < t->dv; i++)
        X(value_rows)(1, nv, t, i, alpha);
}

static void X(attend)(const qkv_tile *t)
{
    if (t->careful)
        X(attend_vectors)(t->nv, 1, t);
    else if (t->nv == 1)
        X(attend_vectors)(1, 0, t);
    else if (t->nv == 2)
        X(attend_vectors)(2, 0, t);
    else
        X(attend_vectors)(LANE_VECTORS, 0, t);
}

static void X(reset)(void *o, void *m, void *l, int dv)
{
    for (int j = 0; j < LANES; j += W) {
        X(store)((REAL *)m + j, X(set1)(-(REAL)INFINITY));
        X(store)((REAL *)l + j, X(set1)(0));
    }
    for (ptrdiff_t i = 0; i < (ptrdiff_t)dv * LANES; i += W)
        X(store)((REAL *)o + i, X(set1)(0));
}

static void X(merge)(void *o, void *m, void *l, const void *o2, const void *m2, const void *l2, int dv, double scale)
{
    VEC c = X(set1)((REAL)scale), one = X(set1)(1);
    for (int j = 0; j < LANES; j += W) {
        VEC ma = X(load)((REAL *)m + j), mb = X(load)((const REAL *)m2 + j);
        VEC top = X(max)(ma, mb);
        /* Equal maxima have weight 1, infinite ones too: the difference would be NaN. */
        VEC wa = X(select)(X(equal)(ma, top), one, X(exp2)(X(mul)(c, X(sub)(ma, top))));
        VEC wb = X(select)(X(equal)(mb, top), one, X(exp2)(X(mul)(c, X(sub)(mb, top))));
        VEC la = X(load)((REAL *)l + j), lb = X(load)((const REAL *)l2 + j);
        X(store)((REAL *)m + j, top);
        X(store)((REAL *)l + j, X(fma)(wa, la, X(mul)(wb, lb)));
        for (int i = 0; i < dv; i++) {
            REAL *oa = (REAL *)o + (ptrdiff_t)i * LANES + j;
            const REAL *ob = (const REAL *)o2 + (ptrdiff_t)i * LANES + j;
            X(store)(oa, X(fma)(wa, X(load)(oa), X(mul)(wb, X(load)(ob))));
        }
    }
}
