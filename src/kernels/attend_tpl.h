/* One tile of attention: O, m, l <- merge(O, m, l, Q K^T, V). S is never stored beyond the tile.
 *
 * Two files know how to multiply, one by rows of registers and one by a unit for tiles. What they give:
 *   score_keys(nv, t, first, last)      rows of S^T <- K Q^T
 *   value(nv, t, alpha)                 O^T <- alpha O^T + V^T P^T
 *   value_careful(t, alpha)             the same, but an excluded key's V is not multiplied at all; one vector
 *   put_weights(t, i, j, x, y)          weights of the keys i and i + 1, of vector j, where pairs are multiplied
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

#if TILE_PARTS
#include "tiles_tpl.h"
#else
#include "registers_tpl.h"
#endif

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

/* Rows first .. last of S^T -> P^T = 2^(c (S - m)) in place, added to sum. If careful, P of an excluded key is -1.
 * Of pairs, rows i and i + 1 are joined; a last row without another is joined with what an excluded key has. */
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
        if (i % 2) {
            QKV_UNROLL
            for (int j = 0; j < nv; j++)
                X(put_weights)(t, i - 1, j, even[j], p[j]);
        } else {
            QKV_UNROLL
            for (int j = 0; j < nv; j++)
                even[j] = p[j];
            for (int j = 0; i + 1 == last && j < nv; j++)
                X(put_weights)(t, i, j, p[j], X(set1)(careful ? -1 : 0));
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

/* S of the strip that begins at row i, as softmax takes it; returns the first row behind it. */
static QKV_INLINE int X(score_strip)(int nv, const qkv_tile *t, int i, const X(limits) *limits)
{
    int end = X(strip_end)(t, i);
    X(score_keys)(nv, t, i, end);
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

