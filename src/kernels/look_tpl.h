/* Questions about the scores of a tile: what attention does with them, but for the values.
 *
 * Scores come strip by strip from the same steps as in attend_tpl.h. Then they are reduced per lane, which is a query, or per
 * key. Nothing here depends on the tile's other lanes, so answers have the same bits wherever a row lies.
 */

/* Maxima of rows first .. last of S^T, into top; NaN stays NaN. */
static QKV_INLINE void X(largest_vectors)(const int nv, const qkv_tile *t, int first, int last, REAL *top)
{
    VEC m[LANE_VECTORS], nan[LANE_VECTORS];
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        m[j] = X(load)(top + j * W);
        nan[j] = X(set1)(0);
    }
    for (int i = first; i < last; i++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            VEC s = X(load)((const REAL *)t->s + (ptrdiff_t)i * LANES + j * W);
            m[j] = X(maxnum)(s, m[j]);
            nan[j] = X(select)(X(equal)(s, s), nan[j], s);
        }
    }
    QKV_UNROLL
    for (int j = 0; j < nv; j++)
        X(store)(top + j * W, X(select)(X(equal)(nan[j], nan[j]), m[j], nan[j]));
}

static QKV_NOINLINE void X(largest_rows)(int nv, const qkv_tile *t, int first, int last, REAL *top)
{
    BY_VECTORS(X(largest_vectors), nv, t, first, last, top);
}

static void X(look_largest)(const qkv_tile *t)
{
    X(limits) limits;
    X(find_limits)(t, &limits);
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(score_strip)(t->nv, t, i, &limits);
        X(largest_rows)(t->nv, t, i, end, t->m);
    }
}

/* Sums of P and of P (S - m) of rows first .. last, added to sum and moment. */
static QKV_INLINE void X(moment_vectors)(const int nv, const qkv_tile *t, int first, int last, const REAL *shift, REAL *sum,
                                         REAL *moment)
{
    X(factor) c = X(factor_of)(t->c);
    VEC m[LANE_VECTORS], l[LANE_VECTORS], e[LANE_VECTORS];
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        m[j] = X(load)(shift + j * W);
        l[j] = e[j] = X(set1)(0);
    }
    for (int i = first; i < last; i++) {
        const REAL *s = (const REAL *)t->s + (ptrdiff_t)i * LANES;
        VEC p[LANE_VECTORS], x[LANE_VECTORS];
        /* Not below where P is 0: 0 * -inf would be NaN. */
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            p[j] = x[j] = X(max)(c.low, X(sub)(X(load)(s + j * W), m[j]));
        X(exp2)(nv, c, p);
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            l[j] = X(add)(l[j], p[j]);
            e[j] = X(fma)(p[j], x[j], e[j]);
        }
    }
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        X(store)(sum + j * W, X(add)(X(load)(sum + j * W), l[j]));
        X(store)(moment + j * W, X(add)(X(load)(moment + j * W), e[j]));
    }
}

static QKV_NOINLINE void X(moment_rows)(int nv, const qkv_tile *t, int first, int last, const REAL *shift, REAL *sum,
                                        REAL *moment)
{
    BY_VECTORS(X(moment_vectors), nv, t, first, last, shift, sum, moment);
}

static void X(look_entropy)(const qkv_tile *t)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0);
    X(limits) limits;
    X(lanes) lanes;
    QKV_ALIGN REAL before[LANES], moment[LANES];
    X(find_limits)(t, &limits);
    for (int j = 0; j < t->nv * W; j += W) {
        X(store)(before + j, X(load)((const REAL *)t->m + j));
        X(store)(lanes.top + j, none);
        X(store)(moment + j, zero);
    }
    X(score)(t->nv, 0, 0, t, &limits, &lanes);
    X(raise_maxima)(t->nv, t, &lanes);
    for (int i = 0, end; i < t->nk; i = end)
        X(moment_rows)(t->nv, t, i, end = X(strip_end)(t, i), lanes.shift, lanes.sum, moment);
    for (int j = 0; j < t->nv * W; j += W) {
        REAL *l = (REAL *)t->l + j, *o = (REAL *)t->o + j;
        VEC was = X(load)(before + j), m = X(load)((const REAL *)t->m + j), alpha = X(load)(lanes.alpha + j);
        /* What was summed from the maximum before counts from the one that is now. */
        VEC down = X(select)(X(equal)(was, none), zero, X(select)(X(equal)(was, m), zero, X(sub)(was, m)));
        VEC e = X(fma)(X(max)(X(factor_of)(t->c).low, down), X(load)(l), X(load)(o));
        X(store)(o, X(fma)(alpha, e, X(load)(moment + j)));
        X(store)(l, X(fma)(alpha, X(load)(l), X(load)(lanes.sum + j)));
    }
}

/* A key's number as the bits of an element, which select leaves as they are. */
static inline REAL X(key_bits)(int64_t key)
{
    uint32_t low = (uint32_t)key;
    REAL bits;
    memcpy(&bits, sizeof(REAL) == 4 ? (const void *)&low : (const void *)&key, sizeof bits);
    return bits;
}

/* The lists of the lanes from j on, a vector of them, meet rows first .. last of S^T: a score goes where smaller ones begin, and
 * these go one place down. Lanes whose list it does not enter are left alone by that. */
static QKV_NOINLINE void X(keep_rows)(const qkv_tile *t, int first, int last, int j, const qkv_heaviest *list)
{
    REAL *scores = (REAL *)list->score + j, *keys = (REAL *)list->key + j, *least = scores + (list->n - 1) * LANES;
    for (int i = first; i < last; i++) {
        VEC s = X(load)((const REAL *)t->s + (ptrdiff_t)i * LANES + j), x = s, key = X(set1)(X(key_bits)(list->first + i));
        if (!X(any)(X(less)(X(load)(least), s)))
            continue;
        for (REAL *score = scores, *at = keys; score <= least; score += LANES, at += LANES) {
            VEC y = X(load)(score), other = X(load)(at);
            X(mask) heavier = X(less)(y, s);            /* from its place on, all are */
            X(store)(score, X(select)(heavier, x, y));
            X(store)(at, X(select)(heavier, key, other));
            x = X(select)(heavier, y, x);
            key = X(select)(heavier, other, key);
        }
    }
}

/* m and l of a tile whose scores are there, and whose maxima are known. */
static QKV_INLINE void X(normalise_scores)(const qkv_tile *t, X(lanes) *lanes)
{
    X(raise_maxima)(t->nv, t, lanes);
    for (int i = 0, end; i < t->nk; i = end)
        X(weigh_rows)(t->nv, 0, t, i, end = X(strip_end)(t, i), lanes->shift, lanes->sum);
    for (int j = 0; j < t->nv * W; j += W) {
        REAL *l = (REAL *)t->l + j;
        X(store)(l, X(fma)(X(load)(lanes->alpha + j), X(load)(l), X(load)(lanes->sum + j)));
    }
}

static void X(look_heaviest)(const qkv_tile *t, const qkv_heaviest *list)
{
    VEC none = X(set1)(-(REAL)INFINITY);
    X(limits) limits;
    X(lanes) lanes;
    QKV_ALIGN REAL top[LANES];        /* of a strip: most have nothing for the list */
    const REAL *least = (const REAL *)list->score + (list->n - 1) * LANES;
    X(find_limits)(t, &limits);
    for (int j = 0; j < t->nv * W; j += W)
        X(store)(lanes.top + j, none);
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(score_strip)(t->nv, t, i, &limits);
        for (int j = 0; j < t->nv * W; j += W)
            X(store)(top + j, none);
        X(top_rows)(t->nv, t, i, end, top);
        for (int j = 0; j < t->nv * W; j += W) {
            if (X(any)(X(less)(X(load)(least + j), X(load)(top + j))))
                X(keep_rows)(t, i, end, j, list);
            X(store)(lanes.top + j, X(maxnum)(X(load)(top + j), X(load)(lanes.top + j)));
        }
    }
    X(normalise_scores)(t, &lanes);
}

static QKV_INLINE void X(normalise_vectors)(const int nv, const qkv_tile *t)
{
    X(lanes) lanes;
    X(weigh)(nv, 0, t, &lanes);
}

static void X(look_normalisers)(const qkv_tile *t)
{
    BY_VECTORS(X(normalise_vectors), t->nv, t);
}

/* l P of rows first .. last, added to the sums of their keys. Many queries alike would all round the same way, so what an addition
 * loses is summed too (D. Knuth's two-sum; infinite sums are taken as they are). With `nan` some m or l is NaN, for visible keys alone. */
static QKV_INLINE void X(receive_vectors)(const int nv, const int nan, const qkv_tile *t, int first, int last, REAL *sums,
                                          REAL *lost)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0);
    X(factor) c = X(factor_of)(t->c);
    VEC m[LANE_VECTORS], l[LANE_VECTORS];
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        m[j] = X(load)((const REAL *)t->m + j * W);
        l[j] = X(load)((const REAL *)t->l + j * W);
    }
    for (int i = first; i < last; i++) {
        const REAL *s = (const REAL *)t->s + (ptrdiff_t)i * LANES;
        VEC p[LANE_VECTORS], more = zero, before = X(load)(sums + (ptrdiff_t)i * W);
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            p[j] = X(sub)(X(load)(s + j * W), m[j]);
        X(exp2)(nv, c, p);
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            VEC q = X(mul)(l[j], p[j]);
            more = X(add)(more, nan ? X(select)(X(equal)(X(load)(s + j * W), none), zero, q) : q);
        }
        VEC sum = X(add)(before, more), added = X(sub)(sum, before);
        VEC less = X(add)(X(sub)(before, X(sub)(sum, added)), X(sub)(more, added));
        X(store)(sums + (ptrdiff_t)i * W, sum);
        X(store)(lost + (ptrdiff_t)i * W, X(add)(X(load)(lost + (ptrdiff_t)i * W), less));
    }
}

static QKV_NOINLINE void X(receive_rows)(int nv, int nan, const qkv_tile *t, int first, int last, REAL *sums, REAL *lost)
{
    if (nan)
        BY_VECTORS(X(receive_vectors), nv, 1, t, first, last, sums, lost);
    else
        BY_VECTORS(X(receive_vectors), nv, 0, t, first, last, sums, lost);
}

static void X(look_received)(const qkv_tile *t, void *sums, void *lost)
{
    X(limits) limits;
    int nan = 0;
    X(find_limits)(t, &limits);
    for (int j = 0; j < t->nv * W; j += W) {
        VEC m = X(load)((const REAL *)t->m + j), l = X(load)((const REAL *)t->l + j);
        nan |= X(any)(X(beyond)(m, X(set1)((REAL)INFINITY))) | X(any)(X(beyond)(l, X(set1)((REAL)INFINITY)));
    }
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(score_strip)(t->nv, t, i, &limits);
        X(receive_rows)(t->nv, nan, t, i, end, sums, lost);
    }
}

/* S, or l P and 0 where a key is excluded, of n <= W keys from i on and the lanes from j on, to the rows of these lanes. */
static QKV_INLINE void X(write_square)(const int weigh, const qkv_tile *t, int i, const int n, int j, const qkv_weights *to)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0), x[W];
    VEC m = X(load)((const REAL *)t->m + j), l = X(load)((const REAL *)t->l + j);
    X(factor) c = X(factor_of)(t->c);
    QKV_UNROLL
    for (int r = 0; r < W; r++) {
        x[r] = zero;
        if (r < n) {
            VEC s = X(load)((const REAL *)t->s + (ptrdiff_t)(i + r) * LANES + j);
            x[r] = weigh ? X(select)(X(equal)(s, none), zero, X(mul)(l, X(exp2_one)(c, X(sub)(s, m)))) : s;
        }
    }
    X(transpose)(x);
    for (int r = 0; r < W; r++) {
        REAL *row = to->row[j + r];
        if (!row)
            continue;
        if (n == W)
            X(storeu)(row + i - to->first, x[r]);
        else
            X(store_part)(row + i - to->first, x[r], n);
    }
}

static QKV_INLINE void X(write_squares)(const int weigh, const qkv_tile *t, int first, int last, const qkv_weights *to)
{
    for (int j = 0; j < t->nv * W; j += W) {
        int i = first > to->first ? first : to->first;
        for (; i + W <= last; i += W)
            X(write_square)(weigh, t, i, W, j, to);
        if (i < last)
            X(write_square)(weigh, t, i, last - i, j, to);
    }
}

static QKV_NOINLINE void X(write_weights)(const qkv_tile *t, int first, int last, const qkv_weights *to)
{
    X(write_squares)(1, t, first, last, to);
}

static QKV_NOINLINE void X(write_scores)(const qkv_tile *t, int first, int last, const qkv_weights *to)
{
    X(write_squares)(0, t, first, last, to);
}

static void X(look_weights)(const qkv_tile *t, const qkv_weights *to)
{
    X(limits) limits;
    X(find_limits)(t, &limits);
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(score_strip)(t->nv, t, i, &limits);
        X(write_weights)(t, i, end, to);
    }
}

static void X(look_rows)(const qkv_tile *t, const qkv_weights *to)
{
    X(limits) limits;
    X(lanes) lanes;
    X(find_limits)(t, &limits);
    for (int j = 0; j < t->nv * W; j += W)
        X(store)(lanes.top + j, X(set1)(-(REAL)INFINITY));
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(score_strip)(t->nv, t, i, &limits);
        X(top_rows)(t->nv, t, i, end, lanes.top);
        X(write_scores)(t, i, end, to);
    }
    X(normalise_scores)(t, &lanes);
}

static void X(weigh_row)(void *row, int64_t n, double m, double l, double scale)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0), shift = X(set1)((REAL)m), factor = X(set1)((REAL)l);
    X(factor) c = X(factor_of)(scale);
    REAL *x = row;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        VEC p[LANE_VECTORS];
        QKV_UNROLL
        for (int j = 0; j < LANE_VECTORS; j++)
            p[j] = X(sub)(X(loadu)(x + i + j * W), shift);
        X(exp2)(LANE_VECTORS, c, p);
        QKV_UNROLL
        for (int j = 0; j < LANE_VECTORS; j++)
            X(storeu)(x + i + j * W, X(select)(X(equal)(X(loadu)(x + i + j * W), none), zero, X(mul)(factor, p[j])));
    }
    for (; i < n; i += W) {
        int part = n - i < W ? (int)(n - i) : W;
        VEC s = X(load_part)(x + i, part), p = X(mul)(factor, X(exp2_one)(c, X(sub)(s, shift)));
        X(store_part)(x + i, X(select)(X(equal)(s, none), zero, p), part);
    }
}

/* Rows first .. last of S^T become NaN in the lanes whose m is NaN, but for excluded keys. */
static QKV_NOINLINE void X(spread_nan)(const qkv_tile *t, int first, int last)
{
    VEC none = X(set1)(-(REAL)INFINITY);
    for (int i = first; i < last; i++) {
        for (int j = 0; j < t->nv * W; j += W) {
            REAL *score = (REAL *)t->s + (ptrdiff_t)i * LANES + j;
            VEC s = X(load)(score), m = X(load)((const REAL *)t->m + j);
            X(store)(score, X(select)(X(equal)(s, none), s, X(select)(X(equal)(m, m), s, m)));
        }
    }
}

/* The largest P of rows first .. last of S^T: that of the largest score. */
static QKV_INLINE void X(maximum_rows)(const qkv_tile *t, int first, int last, const REAL *shift, REAL *part)
{
    QKV_ALIGN REAL top[LANES];
    X(factor) c = X(factor_of)(t->c);
    for (int j = 0; j < t->nv * W; j += W)
        X(store)(top + j, X(set1)(-(REAL)INFINITY));
    X(largest_rows)(t->nv, t, first, last, top);
    for (int j = 0; j < t->nv * W; j += W) {
        VEC was = X(load)(part + j), p = X(exp2_one)(c, X(sub)(X(load)(top + j), X(load)(shift + j)));
        X(store)(part + j, X(select)(X(equal)(was, was), X(max)(was, p), was));     /* p where it is NaN */
    }
}

static QKV_INLINE void X(look_parts)(const int largest, const qkv_tile *t, const qkv_parts *parts)
{
    X(limits) limits;
    QKV_ALIGN REAL shift[LANES];
    const int64_t *bound = parts->bound;
    REAL *part = parts->part;
    int nan = 0;
    X(find_limits)(t, &limits);
    for (int j = 0; j < t->nv * W; j += W) {
        VEC m = X(load)((const REAL *)t->m + j);
        X(store)(shift + j, X(select)(X(equal)(m, m), m, X(set1)(0)));
        nan |= X(any)(X(beyond)(m, X(set1)((REAL)INFINITY)));
    }
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(score_strip)(t->nv, t, i, &limits);
        if (nan)
            X(spread_nan)(t, i, end);
        int stop = end < parts->end ? end : parts->end;
        for (int first = i > parts->begin ? i : parts->begin, last; first < stop; first = last) {
            for (; bound[1] <= parts->first + first; bound++)
                part += LANES;
            last = bound[1] < parts->first + stop ? (int)(bound[1] - parts->first) : stop;
            if (largest)
                X(maximum_rows)(t, first, last, shift, part);
            else
                X(weigh_rows)(t->nv, 0, t, first, last, shift, part);
        }
    }
}

static void X(look_sums)(const qkv_tile *t, const qkv_parts *parts)
{
    X(look_parts)(0, t, parts);
}

static void X(look_maxima)(const qkv_tile *t, const qkv_parts *parts)
{
    X(look_parts)(1, t, parts);
}

static void X(pour_sums)(double *cell, int64_t cells, const void *part, int64_t n, const void *factor, int lanes)
{
    const REAL *p = part, *f = factor;
    for (int64_t i = 0; i < cells; i++, p += n * LANES) {
        double sum = cell[i];
        for (int lane = 0; lane < lanes; lane++) {
            for (int64_t j = 0; j < n; j++)
                sum += (double)f[lane] * (double)p[j * LANES + lane];
        }
        cell[i] = sum;
    }
}

static void X(pour_maxima)(double *cell, int64_t cells, const void *part, int64_t n, const void *factor, int lanes)
{
    const REAL *p = part, *f = factor;
    for (int64_t i = 0; i < cells; i++, p += n * LANES) {
        double top = cell[i];
        int nan = isnan(top);
        for (int lane = 0; lane < lanes; lane++) {
            for (int64_t j = 0; j < n; j++) {
                double x = (double)f[lane] * (double)p[j * LANES + lane];
                nan |= isnan(x);
                top = x > top ? x : top;
            }
        }
        cell[i] = nan ? NAN : top;
    }
}

static int X(centre_values)(void *values, ptrdiff_t row, const void *centre, void *sizes, int n, int d)
{
    int finite = 1;
    for (int i = 0; i < n; i++) {
        REAL *v = (REAL *)values + i * row, parts[W], size = 0;
        const REAL *c = centre;
        VEC squares = X(set1)(0);
        int e = 0;
        for (; e + W <= d; e += W) {
            VEC x = X(sub)(X(loadu)(v + e), X(loadu)(c + e));
            X(storeu)(v + e, x);
            squares = X(fma)(x, x, squares);
        }
        X(storeu)(parts, squares);
        for (int j = 0; j < W; j++)
            size += parts[j];
        for (; e < d; e++) {
            v[e] -= c[e];
            size += v[e] * v[e];
        }
        ((REAL *)sizes)[i] = size;
        finite &= size - size == 0;
    }
    return finite;
}

static void X(centre_outputs)(void *outputs, const void *centre, void *sizes, int nv, int d)
{
    for (int j = 0; j < nv * W; j += W) {
        VEC squares = X(set1)(0);
        for (int e = 0; e < d; e++) {
            REAL *o = (REAL *)outputs + (ptrdiff_t)e * LANES + j;
            VEC x = X(add)(X(load)(o), X(set1)(2 * ((const REAL *)centre)[e]));
            X(store)(o, x);
            squares = X(fma)(x, x, squares);
        }
        X(store)((REAL *)sizes + j, X(mul)(X(set1)((REAL)0.25), squares));
    }
}

/* What rows first .. last of S^T make of the outputs, added to the sums of their keys; their rows of -2 V O^T are the first of t.
 * With `some` there may be heavy ones, or numbers that are not finite, which count where a key is visible. */
static QKV_INLINE void X(influence_vectors)(const int nv, const int some, const qkv_tile *t, int first, int last,
                                            const qkv_influence *of)
{
    const VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0), one = X(set1)(1);
    REAL *size = (REAL *)t->o + (ptrdiff_t)t->dv * LANES, *keys = size + LANES;
    X(factor) c = X(factor_of)(t->c);
    VEC m[LANE_VECTORS], l[LANE_VECTORS], o[LANE_VECTORS];
    QKV_UNROLL
    for (int j = 0; j < nv; j++) {
        m[j] = X(load)((const REAL *)t->m + j * W);
        l[j] = X(load)((const REAL *)t->l + j * W);
        o[j] = X(load)(size + j * W);
    }
    for (int i = first; i < last; i++) {
        const REAL *s = (const REAL *)t->s + (ptrdiff_t)i * LANES;
        const REAL *product = (const REAL *)of->t + (ptrdiff_t)(i - first) * LANES;
        REAL *sums = (REAL *)of->sums + (ptrdiff_t)i * W;
        VEC v = X(set1)(((const REAL *)of->v_size)[i]), sum = X(load)(sums), p[LANE_VECTORS];
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            p[j] = X(sub)(X(load)(s + j * W), m[j]);
        X(exp2)(nv, c, p);
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            VEC weight = X(mul)(l[j], p[j]), w = X(div)(weight, X(sub)(one, weight));
            VEC apart = X(max)(zero, X(add)(X(load)(product + j * W), X(add)(o[j], v)));      /* NaN stays */
            VEC moved = X(mul)(X(mul)(w, w), apart);
            if (some) {
                VEC score = X(load)(s + j * W);
                moved = X(select)(X(equal)(score, none), zero, moved);
                moved = X(select)(X(equal)(l[j], zero), zero, moved);
                X(mask) heavy = X(less)(X(set1)((REAL)QKV_HEAVY), weight);
                if (X(any)(heavy)) {
                    VEC key = X(set1)(X(key_bits)(of->first + i));
                    X(store)(keys + j * W, X(select)(heavy, key, X(load)(keys + j * W)));
                    moved = X(select)(heavy, zero, moved);
                }
            }
            sum = X(add)(sum, moved);
        }
        X(store)(sums, sum);
    }
}

static QKV_NOINLINE void X(influence_rows)(int nv, int some, const qkv_tile *t, int first, int last, const qkv_influence *of)
{
    if (some)
        BY_VECTORS(X(influence_vectors), nv, 1, t, first, last, of);
    else
        BY_VECTORS(X(influence_vectors), nv, 0, t, first, last, of);
}

/* Whether rows first .. last of S^T may have a heavy weight. */
static QKV_INLINE int X(may_be_heavy)(const qkv_tile *t, int first, int last)
{
    QKV_ALIGN REAL top[LANES];
    X(factor) c = X(factor_of)(t->c);
    int found = 0;
    for (int j = 0; j < t->nv * W; j += W)
        X(store)(top + j, X(set1)(-(REAL)INFINITY));
    X(top_rows)(t->nv, t, first, last, top);
    for (int j = 0; j < t->nv * W; j += W) {
        VEC p = X(exp2_one)(c, X(sub)(X(load)(top + j), X(load)((const REAL *)t->m + j)));
        found |= X(any)(X(less)(X(set1)((REAL)0.5), X(mul)(X(load)((const REAL *)t->l + j), p)));
    }
    return found;
}

static void X(look_influence)(const qkv_tile *t, const qkv_influence *of)
{
    const REAL *size = (const REAL *)t->o + (ptrdiff_t)t->dv * LANES;
    VEC infinite = X(set1)((REAL)INFINITY), zero = X(set1)(0);
    X(limits) limits;
    qkv_tile values = {.q = t->o, .s = of->t, .k_row = of->v_row, .d = t->dv, .nv = t->nv};
    int not_finite = of->not_finite;
    X(find_limits)(t, &limits);
    for (int j = 0; j < t->nv * W; j += W) {
        VEC m = X(load)((const REAL *)t->m + j), l = X(load)((const REAL *)t->l + j), o = X(load)(size + j);
        /* Infinite is what lanes without a row have for m; x - x is 0 for finite x alone. */
        not_finite |= X(any)(X(beyond)(m, infinite)) | X(any)(X(beyond)(l, infinite)) | X(any)(X(beyond)(X(sub)(o, o), zero));
    }
    for (int i = 0, end; i < t->nk; i = end) {
        end = X(score_strip)(t->nv, t, i, &limits);
        int some = not_finite || X(may_be_heavy)(t, i, end);
        values.k = (const REAL *)of->v + i * of->v_row;
        for (int e = 0; e == 0 || e < t->dv; e += QKV_TERMS)
            X(score_terms)(t->nv, &values, 0, end - i, e);
        X(influence_rows)(t->nv, some, t, i, end, of);
    }
}

static void X(distance)(void *squares, const void *a, const void *o, const void *l, int nv, int dv)
{
    VEC zero = X(set1)(0);
    for (int j = 0; j < nv * W; j += W) {
        VEC sum = X(load)((const REAL *)l + j), square = zero;
        VEC inverse = X(select)(X(equal)(sum, zero), zero, X(div)(X(set1)(1), sum));
        for (int e = 0; e < dv; e++) {
            ptrdiff_t at = (ptrdiff_t)e * LANES + j;
            VEC x = X(sub)(X(load)((const REAL *)a + at), X(mul)(X(load)((const REAL *)o + at), inverse));
            square = X(fma)(x, x, square);
        }
        X(store)((REAL *)squares + j, square);
    }
}

#undef BY_VECTORS
#undef STRIP
#undef P_SAFE
#undef P_LIMIT
