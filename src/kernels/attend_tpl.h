/* One tile of attention: O, m, l <- merge(O, m, l, Q K^T, V). S is never stored beyond the tile.
 *
 * Every product here is one form: C[i][lane] = sum over t of A[i * row + t * step] (a scalar, broadcast from where it
 * lies) times B[t][lane] (contiguous). Scores are S^T = K Q^T with rows of keys; values are O^T += V^T P^T with rows of
 * output columns. A block of ROW_TILE rows times nv vectors stays in registers while t runs.
 *
 * The values of a tile are summed from zero and then added to alpha * O: over long sequences that keeps the error near
 * that of a pairwise sum, and alpha (1 unless the maximum moved) costs nothing there.
 */

/* Weights of a tile may sum to this before a lane needs a new maximum: far from overflow for any number of keys, and
 * rarely reached. */
#define P_LIMIT 8192

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

/* Rows i .. i + nr of S^T in units of log2, excluded scores as -inf. */
static QKV_INLINE void X(score_rows)(const int nr, const int nv, const qkv_tile *t, int i, const REAL *lo,
                                     const REAL *hi)
{
    VEC c[ROW_TILE][LANE_VECTORS];
    X(product)(nr, nv, (const REAL *)t->k + i * t->k_row, t->k_row, 1, t->q, t->d, c);
    REAL *s = (REAL *)t->s + (ptrdiff_t)i * LANES;
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            X(store)(s + r * LANES + j * W, c[r][j]);
    }
    if (t->c == 1 && !t->lo)
        return;
    VEC factor = X(set1)((REAL)t->c), hidden = X(set1)(-(REAL)INFINITY);
    for (int r = 0; r < nr; r++) {
        VEC at = X(set1)((REAL)(i + r));
        for (int j = 0; j < nv; j++) {
            REAL *score = s + r * LANES + j * W;
            VEC x = X(mul)(factor, X(load)(score));
            if (t->lo) {
                x = X(select)(X(less)(at, X(load)(hi + j * W)), x, hidden);
                x = X(select)(X(less)(at, X(load)(lo + j * W)), hidden, x);
            }
            X(store)(score, x);
        }
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

/* Rows first .. last of S^T -> P^T = 2^(S - m) in place, added to sum. If careful, P of an excluded key is -1. */
static QKV_INLINE void X(weigh_rows)(const int nv, const int careful, const qkv_tile *t, int first, int last,
                                     const REAL *shift, REAL *sum)
{
    VEC none = X(set1)(-(REAL)INFINITY);
    VEC m[LANE_VECTORS], l[LANE_VECTORS];
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        m[j] = X(load)(shift + j * W);
        l[j] = X(load)(sum + j * W);
    }
    for (int i = first; i < last; i++) {
        REAL *s = (REAL *)t->s + (ptrdiff_t)i * LANES;
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            VEC score = X(load)(s + j * W);
            VEC p = X(exp2)(X(sub)(score, m[j]));
            l[j] = X(add)(l[j], p);
            X(store)(s + j * W, careful ? X(select)(X(equal)(score, none), X(set1)(-1), p) : p);
        }
    }
    QKV_UNROLL
    for (int j = 0; j < nv; j++)
        X(store)(sum + j * W, l[j]);
}

/* All scores, ROW_TILE keys at a time; with `weigh`, each row tile becomes weights while it is still in L1. */
static QKV_INLINE void X(score)(const int nv, const int weigh, const int careful, const qkv_tile *t, const REAL *lo,
                                const REAL *hi, const REAL *shift, REAL *sum)
{
    int i = 0;
    for (; i + ROW_TILE <= t->nk; i += ROW_TILE) {
        X(score_rows)(ROW_TILE, nv, t, i, lo, hi);
        if (weigh)
            X(weigh_rows)(nv, careful, t, i, i + ROW_TILE, shift, sum);
    }
    for (; i + ROW_TILE / 2 <= t->nk; i += ROW_TILE / 2) {
        X(score_rows)(ROW_TILE / 2, nv, t, i, lo, hi);
        if (weigh)
            X(weigh_rows)(nv, careful, t, i, i + ROW_TILE / 2, shift, sum);
    }
    for (; i < t->nk; i++) {
        X(score_rows)(1, nv, t, i, lo, hi);
        if (weigh)
            X(weigh_rows)(nv, careful, t, i, i + 1, shift, sum);
    }
}

/* Maxima for the lanes that have none or whose sum is not within P_LIMIT (or NaN); alpha is what O and l shrink by. */
static QKV_INLINE void X(raise_maxima)(const int nv, const qkv_tile *t, REAL *shift, REAL *sum, REAL *alpha)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0);
    for (int j = 0; j < nv; j++) {
        REAL *at = (REAL *)t->m + j * W;
        VEC m = X(load)(at), top = m;
        for (int i = 0; i < t->nk; i++)
            top = X(max)(X(load)((const REAL *)t->s + (ptrdiff_t)i * LANES + j * W), top);
        VEC limit = X(select)(X(equal)(m, none), none, X(set1)(P_LIMIT));
        top = X(select)(X(beyond)(X(load)(sum + j * W), limit), top, m);
        X(store)(at, top);
        X(store)(sum + j * W, zero);
        /* Equal maxima may be infinite, and their difference NaN. */
        X(store)(alpha + j * W, X(select)(X(equal)(m, top), X(set1)(1), X(exp2)(X(sub)(m, top))));
        X(store)(shift + j * W, X(select)(X(equal)(top, none), zero, top));
    }
}

/* S and P of a tile, and the state's m, l and alpha.
 *
 * Most tiles need no new maximum, so the weights are first computed with the one there is, each row tile while its
 * scores are still in L1. A lane whose weights then sum to more than P_LIMIT gets a new maximum, and the tile is scored
 * again. The decision is a lane's own: neighbours never change its bits. */
static QKV_INLINE void X(weigh)(const int nv, const int careful, const qkv_tile *t, REAL *alpha)
{
    QKV_ALIGN REAL shift[LANES];
    QKV_ALIGN REAL sum[LANES];
    QKV_ALIGN REAL lo[LANES];
    QKV_ALIGN REAL hi[LANES];
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0), one = X(set1)(1);
    int fresh = 1, raise = 0;
    for (int j = 0; t->lo && j < nv * W; j++) {
        lo[j] = (REAL)t->lo[j];
        hi[j] = (REAL)t->hi[j];
    }
    for (int j = 0; j < nv; j++) {
        VEC m = X(load)((const REAL *)t->m + j * W);
        fresh &= !X(any)(X(less)(none, m));
        X(store)(shift + j * W, X(select)(X(equal)(m, none), zero, m));
        X(store)(sum + j * W, zero);
        X(store)(alpha + j * W, one);
    }
    if (!fresh) {
        X(score)(nv, 1, careful, t, lo, hi, shift, sum);
        for (int j = 0; j < nv; j++) {
            VEC m = X(load)((const REAL *)t->m + j * W), l = X(load)(sum + j * W);
            raise |= X(any)(X(equal)(m, none)) | X(any)(X(beyond)(l, X(set1)(P_LIMIT)));
        }
    }
    if (fresh | raise) {
        X(score)(nv, 0, careful, t, lo, hi, shift, sum);
        X(raise_maxima)(nv, t, shift, sum, alpha);
        X(weigh_rows)(nv, careful, t, 0, t->nk, shift, sum);
    }
    for (int j = 0; j < nv; j++) {
        REAL *l = (REAL *)t->l + j * W;
        X(store)(l, X(fma)(X(load)(alpha + j * W), X(load)(l), X(load)(sum + j * W)));
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
    QKV_ALIGN REAL alpha[LANES];
    X(weigh)(nv, careful, t, alpha);
    if (careful) {
        X(value_careful)(t, alpha);
        return;
    }
    int i = 0;
    for (; i + ROW_TILE <= t->dv; i += ROW_TILE)
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

static void X(merge)(void *o, void *m, void *l, const void *o2, const void *m2, const void *l2, int dv)
{
    VEC one = X(set1)(1);
    for (int j = 0; j < LANES; j += W) {
        VEC ma = X(load)((REAL *)m + j), mb = X(load)((const REAL *)m2 + j);
        VEC top = X(max)(ma, mb);
        /* Equal maxima have weight 1, infinite ones too: the difference would be NaN. */
        VEC wa = X(select)(X(equal)(ma, top), one, X(exp2)(X(sub)(ma, top)));
        VEC wb = X(select)(X(equal)(mb, top), one, X(exp2)(X(sub)(mb, top)));
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

#undef P_LIMIT
