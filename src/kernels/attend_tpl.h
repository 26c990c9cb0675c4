/* One tile of attention: O, m, l <- merge(O, m, l, Q K^T, V). S is never stored beyond the tile.
 *
 * Every product here is one form: C[i][lane] = sum over t of A[i * row + t * step] (a scalar, broadcast from where it
 * lies, or an element of a vector) times B[t][lane] (contiguous). Scores are S^T = K Q^T with rows of keys; values are
 * O^T += V^T P^T with rows of output columns. A block of rows times nv vectors stays in registers while t runs.
 *
 * The values of a tile are summed from zero and then added to alpha * O: over long sequences that keeps the error near
 * that of a pairwise sum, and alpha (1 unless the maximum moved) costs nothing there.
 */

/* A weight may be 2^P_LIMIT before its lane needs a new maximum: far from overflow for any number of keys, and S - m keeps the
 * digits of S. So no lane needs one while its weights in a tile sum to no more than P_SAFE, whatever the rounding. */
#define P_LIMIT 9
#define P_SAFE 256

/* Keys scored before their weights are taken: the call is shared, and their scores are still in L1. Weights are summed
 * strip by strip: equal ones would all be rounded the same way in one long sum. Strips begin at multiples of this in the
 * block, wherever the tile does. */
#define STRIP 32

/* Calls what has the number of vectors as a constant. Each step of a tile is a function of its own around such a call: inlined
 * where it is used, its loop would share registers with all that is around, and its sums or pointers would live on the stack. */
#define BY_VECTORS(function, nv, ...) \
    ((nv) == 1 ? function(1, __VA_ARGS__) : (nv) == 2 ? function(2, __VA_ARGS__) \
     : LANE_VECTORS > 3 && (nv) == 3 ? function(3, __VA_ARGS__) : function(LANE_VECTORS, __VA_ARGS__))

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

/* Key limits of a tile's lanes as elements, and the rows of keys that every lane sees. */
typedef struct {
    QKV_ALIGN REAL lo[LANES];
    QKV_ALIGN REAL hi[LANES];
    int first, last;
} X(limits);

static void X(find_limits)(const qkv_tile *t, X(limits) *limits)
{
    limits->first = 0;
    limits->last = t->nk;
    for (int j = 0; t->lo && j < t->nv * W; j++) {
        limits->lo[j] = (REAL)t->lo[j];
        limits->hi[j] = (REAL)t->hi[j];
        limits->first = t->lo[j] > limits->first ? t->lo[j] : limits->first;
        limits->last = t->hi[j] < limits->last ? t->hi[j] : limits->last;
    }
}

/* Rows first .. last of S^T become -inf where the key is excluded. */
static QKV_NOINLINE void X(exclude_rows)(const qkv_tile *t, int first, int last, const X(limits) *limits)
{
    VEC hidden = X(set1)(-(REAL)INFINITY);
    for (int i = first; i < last; i++) {
        VEC at = X(set1)((REAL)i);
        for (int j = 0; j < t->nv * W; j += W) {
            REAL *score = (REAL *)t->s + (ptrdiff_t)i * LANES + j;
            VEC x = X(select)(X(less)(at, X(load)(limits->hi + j)), X(load)(score), hidden);
            X(store)(score, X(select)(X(less)(at, X(load)(limits->lo + j)), hidden, x));
        }
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

/* Rows first .. last of S^T, from products to what softmax takes. */
static QKV_INLINE void X(settle_rows)(const qkv_tile *t, int first, int last, const X(limits) *limits)
{
    if (t->changes.adjust)
        X(adjust_rows)(t, first, last);
    if (first < limits->first)
        X(exclude_rows)(t, first, last < limits->first ? last : limits->first, limits);
    if (limits->last < last)
        X(exclude_rows)(t, first > limits->last ? first : limits->last, last, limits);
    for (int j = 0; t->without && j < t->nv * W; j++)
        if (first <= t->without[j] && t->without[j] < last)
            ((REAL *)t->s)[(ptrdiff_t)t->without[j] * LANES + j] = -(REAL)INFINITY;
}

/* The maximum of rows first .. last of S^T in each lane, into top. */
static QKV_INLINE void X(top_vectors)(const int nv, const qkv_tile *t, int first, int last, REAL *top)
{
    VEC m[LANE_VECTORS];
    QKV_UNROLL
    for (int j = 0; j < nv; j++)
        m[j] = X(load)(top + j * W);
    for (int i = first; i < last; i++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            m[j] = X(maxnum)(X(load)((const REAL *)t->s + (ptrdiff_t)i * LANES + j * W), m[j]);
    }
    QKV_UNROLL
    for (int j = 0; j < nv; j++)
        X(store)(top + j * W, m[j]);
}

static QKV_NOINLINE void X(top_rows)(int nv, const qkv_tile *t, int first, int last, REAL *top)
{
    BY_VECTORS(X(top_vectors), nv, t, first, last, top);
}

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

/* Rows first .. last of S^T -> P^T = 2^(c (S - m)) in place, added to sum. If careful, P of an excluded key is -1.
 * Of pairs, rows i and i + 1 are joined in row i / 2; a last row without another is joined with what an excluded key has. */
static QKV_INLINE void X(weigh_vectors)(const int nv, const int careful, const qkv_tile *t, int first, int last,
                                        const REAL *shift, REAL *sum)
{
    VEC none = X(set1)(-(REAL)INFINITY);
    X(factor) c = X(factor_of)(t->c);
    VEC m[LANE_VECTORS], l[LANE_VECTORS];
#if PAIR == 2
    VEC even[LANE_VECTORS];
#endif
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        m[j] = X(load)(shift + j * W);
        l[j] = X(set1)(0);
#if PAIR == 2
        even[j] = X(set1)(0);         /* for compilers that do not see that i begins even */
#endif
    }
    for (int i = first; i < last; i++) {
        REAL *s = (REAL *)t->s + (ptrdiff_t)i * LANES;
        VEC p[LANE_VECTORS];
        /* First the difference, which is exact where it matters, then the factor: scores may be large. */
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            p[j] = X(sub)(X(load)(s + j * W), m[j]);
        X(exp2)(nv, c, p);
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            l[j] = X(add)(l[j], p[j]);
            if (careful)
                p[j] = X(select)(X(equal)(X(load)(s + j * W), none), X(set1)(-1), p[j]);
#if PAIR == 1
            X(store)(s + j * W, p[j]);
        }
#else
        }
        REAL *to = (REAL *)t->s + (ptrdiff_t)(i / 2) * LANES;
        if (i % 2) {
            QKV_UNROLL
            for (int j = 0; j < nv; j++)
                X(store)(to + j * W, X(join)(even[j], p[j]));
        } else {
            QKV_UNROLL
            for (int j = 0; j < nv; j++)
                even[j] = p[j];
            for (int j = 0; i + 1 == last && j < nv; j++)
                X(store)(to + j * W, X(join)(p[j], X(set1)(careful ? -1 : 0)));
        }
#endif
    }
    QKV_UNROLL
    for (int j = 0; j < nv; j++)
        X(store)(sum + j * W, X(add)(X(load)(sum + j * W), l[j]));
}

static QKV_NOINLINE void X(weigh_rows)(int nv, int careful, const qkv_tile *t, int first, int last, const REAL *shift,
                                       REAL *sum)
{
    if (careful)
        X(weigh_vectors)(1, 1, t, first, last, shift, sum);
    else
        BY_VECTORS(X(weigh_vectors), nv, 0, t, first, last, shift, sum);
}

/* What softmax keeps per lane while it works on a tile. */
typedef struct {
    QKV_ALIGN REAL shift[LANES];      /* what to subtract: m, but 0 where a lane has seen nothing (-inf - -inf is NaN) */
    QKV_ALIGN REAL sum[LANES];        /* of P */
    QKV_ALIGN REAL top[LANES];        /* maximum of S */
    QKV_ALIGN REAL alpha[LANES];      /* what O and l of earlier tiles are multiplied by */
} X(lanes);

/* First row behind the strip that row i is in. */
static inline int X(strip_end)(const qkv_tile *t, int i)
{
    int end = (i + t->skew) / STRIP * STRIP + STRIP - t->skew;
    return end < t->nk ? end : t->nk;
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

/* S of the strip that begins at row i, as softmax takes it; returns the first row behind it. */
static QKV_INLINE int X(score_strip)(int nv, const qkv_tile *t, int i, const X(limits) *limits)
{
    int end = X(strip_end)(t, i);
    for (int e = 0; e == 0 || e < t->d; e += QKV_TERMS)
        X(score_terms)(nv, t, i, end, e);
    X(settle_rows)(t, i, end, limits);
    return end;
}

/* All scores, strip by strip. Each is finished while it is still in L1: with `weigh` it becomes weights, else only its
 * maximum is taken. */
static QKV_INLINE void X(score)(const int nv, const int weigh, const int careful, const qkv_tile *t,
                                const X(limits) *limits, X(lanes) *lanes)
{
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(score_strip)(nv, t, i, limits);
        if (weigh)
            X(weigh_rows)(nv, careful, t, i, end, lanes->shift, lanes->sum);
        else
            X(top_rows)(nv, t, i, end, lanes->top);
    }
}

/* New maxima for the lanes that have none, and for those whose largest weight would be beyond the limit. */
static QKV_INLINE void X(raise_maxima)(const int nv, const qkv_tile *t, X(lanes) *lanes)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0), one = X(set1)(1), most = X(set1)((REAL)(P_LIMIT / t->c));
    X(factor) c = X(factor_of)(t->c);
    for (int j = 0; j < nv * W; j += W) {
        VEC m = X(load)((REAL *)t->m + j), top = X(maxnum)(X(load)(lanes->top + j), m);
        top = X(select)(X(beyond)(X(sub)(top, m), most), top, m);               /* NaN where both are infinite */
        X(store)((REAL *)t->m + j, top);
        X(store)(lanes->sum + j, zero);
        /* Equal maxima may be infinite, and their difference NaN. */
        X(store)(lanes->alpha + j, X(select)(X(equal)(m, top), one, X(exp2_one)(c, X(sub)(m, top))));
        X(store)(lanes->shift + j, X(select)(X(equal)(top, none), zero, top));
    }
}

static QKV_INLINE int X(sums_are_safe)(const int nv, const X(lanes) *lanes)
{
    int large = 0;
    for (int j = 0; j < nv * W; j += W)
        large |= X(any)(X(beyond)(X(load)(lanes->sum + j), X(set1)(P_SAFE)));
    return !large;
}

/* S and P of a tile, and the state's m and l.
 *
 * Most tiles need no new maximum, so the weights are first taken with the one there is. Where these may be too large, the tile is
 * scored again, and the lanes that need it get a new maximum. Then the scores are peaked, so from there on maxima come first, as
 * they do where a lane has none yet, and with ALiBi, which lets them grow from tile to tile. Either way a lane's maximum is the
 * same: neighbours never change its bits. */
static QKV_INLINE void X(weigh)(const int nv, const int careful, const qkv_tile *t, X(lanes) *lanes)
{
    X(limits) limits;
    X(find_limits)(t, &limits);
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0), one = X(set1)(1);
    int first = t->changes.slope || *t->peaked;
    for (int j = 0; j < nv * W; j += W) {
        VEC m = X(load)((const REAL *)t->m + j);
        first |= X(any)(X(equal)(m, none));
        X(store)(lanes->shift + j, m);
        X(store)(lanes->sum + j, zero);
        X(store)(lanes->top + j, none);
        X(store)(lanes->alpha + j, one);
    }
    if (!first) {
        X(score)(nv, 1, careful, t, &limits, lanes);
        first = *t->peaked = !X(sums_are_safe)(nv, lanes);
    }
    if (first) {
        X(score)(nv, 0, careful, t, &limits, lanes);
        X(raise_maxima)(nv, t, lanes);
        for (int i = 0, end; i < t->nk; i = end)
            X(weigh_rows)(nv, careful, t, i, end = X(strip_end)(t, i), lanes->shift, lanes->sum);
    }
    for (int j = 0; j < nv * W; j += W) {
        REAL *l = (REAL *)t->l + j;
        X(store)(l, X(fma)(X(load)(lanes->alpha + j), X(load)(l), X(load)(lanes->sum + j)));
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

static QKV_INLINE void X(attend_vectors)(const int nv, const int careful, const qkv_tile *t)
{
    X(lanes) lanes;
    X(weigh)(nv, careful, t, &lanes);
    if (careful)
        X(value_careful)(t, lanes.alpha);
    else
        X(value)(nv, t, lanes.alpha);
}

static void X(attend)(const qkv_tile *t)
{
    if (t->careful)
        X(attend_vectors)(1, 1, t);
    else
        BY_VECTORS(X(attend_vectors), t->nv, 0, t);
}

static void X(reset)(void *o, void *m, void *l, int nv, int dv)
{
    for (int j = 0; j < nv * W; j += W) {
        X(store)((REAL *)m + j, X(set1)(-(REAL)INFINITY));
        X(store)((REAL *)l + j, X(set1)(0));
        for (int i = 0; i < dv; i++)
            X(store)((REAL *)o + (ptrdiff_t)i * LANES + j, X(set1)(0));
    }
}

static void X(merge)(void *o, void *m, void *l, const void *o2, const void *m2, const void *l2, int nv, int dv,
                     double scale)
{
    VEC one = X(set1)(1);
    X(factor) c = X(factor_of)(scale);
    for (int j = 0; j < nv * W; j += W) {
        VEC ma = X(load)((REAL *)m + j), mb = X(load)((const REAL *)m2 + j);
        VEC top = X(maxnum)(ma, mb);
        /* Equal maxima have weight 1, infinite ones too: the difference would be NaN. */
        VEC wa = X(select)(X(equal)(ma, top), one, X(exp2_one)(c, X(sub)(ma, top)));
        VEC wb = X(select)(X(equal)(mb, top), one, X(exp2_one)(c, X(sub)(mb, top)));
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

