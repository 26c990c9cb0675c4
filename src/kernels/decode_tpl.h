/* Few query rows against the keys of one chunk: S = Q K^T, P = 2^(c (S - m)), O = P V, each K and V row read once.
 *
 * Here a SIMD lane is an element of the head dimension, and a row of the state is a query row: with a handful of rows,
 * rows in the lanes (attend_tpl.h) would leave most of each vector idle. A score is a sum across lanes; SUMS of them are
 * kept as vectors and summed by one transposing tree. Scores of the chunk lie row by row in a buffer, (rows, s_row), by
 * position in the chunk, so that what becomes of a score between product and weights needs no kernel of its own. It loses
 * to rows in the lanes once these fill most of a vector: the trees are work that attend has not.
 *
 * Rows of K and V are of the table's own type, or, if WIDENS, of a narrower one that is widened in registers as it is loaded:
 * `as`, a constant of each tile. They have whole vectors then. The scale of a row of int8 multiplies scores and weights.
 * The products are those of elements (decode_elements_tpl.h) or of pairs (decode_pairs_tpl.h); both have the functions
 * decode_stack, decode_score_as, decode_value_tile and decode_columns.
 *
 * What a row computes depends on its own data and on positions in the chunk alone: not on other rows, on where the keys
 * that are seen begin or end, or on the pieces in which K and V are handed over.
 */

/* Keys whose values, or weights, are summed from zero before they are added to those of the others. */
#define PART 32

/* Bytes of K or V between what is read and what is fetched, into L2: fetching into L1 holds up the loads that are due.
 * One row alone is read so fast that more would come too early. */
#define AHEAD_ONE 4096
#define AHEAD_MORE 16384
#define AHEAD_WIDENED 9216

static QKV_INLINE void X(decode_fetch)(const char *from, ptrdiff_t ahead)
{
    QKV_PREFETCH_L2((const void *)((uintptr_t)from + (uintptr_t)ahead));
}

/* The type of K and V that products take as it lies. */
#define OWN (PAIR == 2 ? QKV_AS_BF16 : sizeof(REAL) == 4 ? QKV_AS_F32 : QKV_AS_F64)

/* Bytes of e elements of a row, its scales apart. */
static QKV_INLINE ptrdiff_t X(decode_bytes)(const int as, int e)
{
    const int wide = as == QKV_AS_F32 || as == QKV_AS_F64;
    return wide ? e * (ptrdiff_t)sizeof(REAL) : as == QKV_AS_I8 ? e : as == QKV_AS_I4 ? qkv_i4_bytes(e) : e * 2;
}

/* And where they end in a row of d, or its scales begin. */
static QKV_INLINE ptrdiff_t X(decode_end)(const int as, int d, ptrdiff_t scales)
{
    return as == QKV_AS_I8 || as == QKV_AS_I4 ? scales : X(decode_bytes)(as, d);
}

/* Bytes from where rows of d elements are read to where they are fetched. Of 16 bits, where one row meets them, or two whose
 * pairs are multiplied, that is just the next row if the CPU itself is far ahead of what they need. */
static QKV_INLINE ptrdiff_t X(decode_ahead)(const int as, const qkv_stack *t, ptrdiff_t row, int d)
{
    ptrdiff_t far = as != OWN ? AHEAD_WIDENED : t->rows == 1 ? AHEAD_ONE : AHEAD_MORE;
#if WIDENS || PAIR == 2
    if (as == QKV_AS_F16 || as == QKV_AS_BF16)
        far = t->rows > PAIR ? HALVES_AHEAD : t->streams ? 0 : AHEAD_ONE;
#endif
    ptrdiff_t rows = far / (X(decode_bytes)(as, d) + 1);
    return (rows > 1 ? rows : 1) * row;
}

static QKV_INLINE void X(decode_clear)(VEC *c)
{
    QKV_UNROLL
    for (int i = 0; i < SUMS; i++)
        c[i] = X(set1)(0);
}

/* S of nr rows and nk keys, or, of one row, of the first n of them, from sums across lanes. */
static QKV_INLINE void X(decode_keep_scores)(const int nr, const int nk, int n, const qkv_stack *t, int row, int at, VEC *c)
{
    QKV_ALIGN REAL sums[SUMS];
    QKV_UNROLL
    for (int i = 0; i < SUMS; i += W)
        X(store)(sums + i, X(sum_each)(c + i));
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        REAL *s = (REAL *)t->s + (row + r) * t->s_row + at;
        if (nr > 1)
            memcpy(s, sums + r * nk, (size_t)nk * sizeof(REAL));
        else
            for (int i = 0; i < n; i += W)
                X(store_part)(s + i, X(load)(sums + i), n - i < W ? n - i : W);
    }
}

/* Sums of nr rows and nc vectors of columns, from those that a call hands on to the next: all 0 where a part begins. */
static QKV_INLINE void X(decode_take_sums)(const int nr, const int nc, const qkv_stack *t, const REAL *sums, int begins,
                                           VEC *c)
{
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < nc; j++)
            c[r * nc + j] = begins ? X(set1)(0) : X(load)(sums + r * t->o_row + j * W);
    }
}

/* And back; or, where a part ends, added to O. */
static QKV_INLINE void X(decode_keep_sums)(const int nr, const int nc, const qkv_stack *t, REAL *sums, REAL *o, int ends,
                                           const VEC *c)
{
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < nc; j++) {
            REAL *to = (ends ? o : sums) + r * t->o_row + j * W;
            X(store)(to, ends ? X(add)(X(load)(to), c[r * nc + j]) : c[r * nc + j]);
        }
    }
}

#if PAIR == 2
#include "decode_pairs_tpl.h"
#else
#include "decode_elements_tpl.h"
#endif

/* Calls the kind of function that reads rows as they are stored. */
#if WIDENS
#define BY_TYPE(function, as, ...) \
    switch (as) { \
    case QKV_AS_F16: function(QKV_AS_F16, __VA_ARGS__); break; \
    case QKV_AS_BF16: function(QKV_AS_BF16, __VA_ARGS__); break; \
    case QKV_AS_I8: function(QKV_AS_I8, __VA_ARGS__); break; \
    case QKV_AS_I4: function(QKV_AS_I4, __VA_ARGS__); break; \
    default: function(OWN, __VA_ARGS__); \
    }
#else
#define BY_TYPE(function, as, ...) ((void)as, function(OWN, __VA_ARGS__))
#endif

static void X(decode_score)(const qkv_stack *t, const void *k, ptrdiff_t k_row, int as, int at, int n)
{
    BY_TYPE(X(decode_score_as), as, t, k, k_row, at, n);
}

/* The largest of s[begin .. end), whole pairs of vectors. NaN does not count. */
static REAL X(decode_top)(const REAL *s, int begin, int end)
{
    VEC m[2] = {X(set1)(-(REAL)INFINITY), X(set1)(-(REAL)INFINITY)};
    QKV_ALIGN REAL lane[W];
    for (int i = begin; i < end; i += 2 * W) {
        m[0] = X(maxnum)(X(load)(s + i), m[0]);
        m[1] = X(maxnum)(X(load)(s + i + W), m[1]);
    }
    X(store)(lane, X(maxnum)(m[0], m[1]));
    for (int half = W / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] = lane[j + half] > lane[j] ? lane[j + half] : lane[j];
    return lane[0];
}

/* s[begin .. end) -> weights; returns their sum. If careful, the weight of an excluded key is -1. Of pairs, those of keys 2 i
 * and 2 i + 1 are joined in element i. */
static REAL X(decode_exp)(REAL *s, int begin, int end, REAL top, double factor, int careful)
{
    VEC none = X(set1)(-(REAL)INFINITY), shift = X(set1)(top == -(REAL)INFINITY ? 0 : top), total = X(set1)(0);
    X(factor) c = X(factor_of)(factor);
    QKV_ALIGN REAL lane[W];
    for (int i = begin; i < end;) {
        int last = (i / PART + 1) * PART < end ? (i / PART + 1) * PART : end;
        VEC sum = X(set1)(0);
        for (; i < last; i += 2 * W) {
            VEC x[2] = {X(load)(s + i), X(load)(s + i + W)};
            VEC p[2] = {X(sub)(x[0], shift), X(sub)(x[1], shift)};
            X(exp2)(2, c, p);
            QKV_UNROLL
            for (int j = 0; j < 2; j++) {
                sum = X(add)(sum, p[j]);
                if (careful)
                    p[j] = X(select)(X(equal)(x[j], none), X(set1)(-1), p[j]);
#if PAIR == 1
                X(store)(s + i + j * W, p[j]);
#endif
            }
#if PAIR == 2
            X(store)(s + i / 2, X(append)(p[0], p[1]));
#endif
        }
        total = X(add)(total, sum);
    }
    X(store)(lane, total);
    for (int half = W / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return lane[0];
}

/* S -> P, m and l of the positions first .. last. */
static void X(decode_weigh)(const qkv_stack *t)
{
    int begin = t->first / (2 * W) * (2 * W), end = (t->last + 2 * W - 1) / (2 * W) * (2 * W);
    for (int r = 0; r < t->rows; r++) {
        REAL *s = (REAL *)t->s + r * t->s_row;
        for (int i = begin; i < t->lo[r]; i++)
            s[i] = -(REAL)INFINITY;
        for (int i = t->hi[r]; i < end; i++)
            s[i] = -(REAL)INFINITY;
        if (t->changes)
            X(adjust_row)(t->changes, r, s + t->lo[r], t->lo[r], t->lo[r] - t->first, t->hi[r] - t->lo[r]);
        REAL top = X(decode_top)(s, begin, end);
        ((REAL *)t->m)[r] = top;
        ((REAL *)t->l)[r] = X(decode_exp)(s, begin, end, top, t->c, t->careful);
    }
}

/* Tiles of nc vectors of sums, as wide as registers hold, and of what is left. */
static QKV_INLINE void X(decode_value_rows)(const int as, const int nr, const int careful, const qkv_stack *t, int row,
                                            const char *v, ptrdiff_t v_row, ptrdiff_t ahead, int at, int n, int begins,
                                            int ends)
{
    int e = 0;
#define TILE(nc, some) X(decode_value_tile)(as, nr, nc, careful, some, t, row, e, v, v_row, ahead, at, n, begins, ends)
    if (!careful && SUMS / nr >= 8)
        for (; e + 8 * W <= t->dv; e += 8 * W)
            TILE(8, PAIR * W);
    if (!careful && SUMS / nr >= 4)
        for (; e + 4 * W <= t->dv; e += 4 * W)
            TILE(4, PAIR * W);
    if (PAIR == 2 || (!careful && SUMS / nr == 2))
        for (; e + 2 * W <= t->dv; e += 2 * W)
            TILE(2, PAIR * W);
    for (; PAIR == 1 && e < t->dv; e += W)
        TILE(1, as == OWN && t->dv - e < W ? t->dv - e : W);
    if (PAIR == 2 && e < t->dv)
        TILE(2, t->dv - e);
#undef TILE
}

/* Whether two rows share a read of V. */
static QKV_INLINE int X(decode_shares)(const int as)
{
#if WIDENS
    if (as == QKV_AS_F16 || as == QKV_AS_BF16)
        return HALVES_SHARED;
#endif
    return as == OWN;
}

/* O += P V for the positions at .. at + n. V goes through a part at a time: it stays in L1 while all rows meet it. All of
 * them fetch: twice as fast as if the first alone did. */
static QKV_INLINE void X(decode_value_as)(const int as, const qkv_stack *t, const char *v, ptrdiff_t v_row, int at, int n)
{
    const ptrdiff_t ahead = X(decode_ahead)(as, t, v_row, t->dv);
    /* Four rows only if their registers hold all columns: memory likes whole rows of V; or if these are far apart, where lines that
     * come a second time are no longer in L1; or if they are to be widened, int4 a group at a time. */
    const int twos = X(decode_shares)(as);
    const int whole = as != QKV_AS_I4 || SUMS / 4 * W >= 32, apart = v_row >= 4 * t->dv * (ptrdiff_t)sizeof(REAL);
    const int four = as == OWN ? apart || t->dv <= SUMS / 4 * W : whole;
    for (int some; n > 0; at += some, n -= some, v += some * v_row) {
        some = PART - at % PART < n ? PART - at % PART : n;
        int begins = at % PART == 0 || at == t->first / PAIR * PAIR, row = 0;
        int ends = (at + some) % PART == 0 || at + some == (t->last + PAIR - 1) / PAIR * PAIR;
#define TILES(nr, careful) (X(decode_value_rows)(as, nr, careful, t, row, v, v_row, ahead, at, some, begins, ends), row += nr)
#if WIDENS
        if (as == QKV_AS_I8)
            X(decode_scale)(t, v + t->v_scales, v_row, at, some, t->careful);
#endif
        while (t->careful && row < t->rows)
            TILES(1, 1);
        while (row + 4 <= t->rows && four)
            TILES(4, 0);
        while (row + 2 <= t->rows && (twos || !whole))
            TILES(2, 0);
        while (row < t->rows)
            TILES(1, 0);
#undef TILES
    }
}

static void X(decode_value)(const qkv_stack *t, const void *v, ptrdiff_t v_row, int as, int at, int n)
{
    BY_TYPE(X(decode_value_as), as, t, v, v_row, at, n);
}

/* O, m, l <- those of the keys before, then those of `o2 m2 l2`. */
static void X(decode_merge)(const qkv_stack *t, const void *o2, const void *m2, const void *l2)
{
    VEC one = X(set1)(1);
    X(factor) c = X(factor_of)(t->c);
    for (int r = 0; r < t->rows; r++) {
        REAL *m = (REAL *)t->m + r, *l = (REAL *)t->l + r, *o = (REAL *)t->o + r * t->o_row;
        const REAL *from = (const REAL *)o2 + r * t->o_row;
        VEC ma = X(set1)(*m), mb = X(set1)(((const REAL *)m2)[r]), top = X(maxnum)(ma, mb);
        /* Equal maxima have weight 1, infinite ones too: the difference would be NaN. */
        VEC wa = X(select)(X(equal)(ma, top), one, X(exp2_one)(c, X(sub)(ma, top)));
        VEC wb = X(select)(X(equal)(mb, top), one, X(exp2_one)(c, X(sub)(mb, top)));
        VEC sum = X(fma)(wa, X(set1)(*l), X(mul)(wb, X(set1)(((const REAL *)l2)[r])));
        X(store_part)(m, top, 1);
        X(store_part)(l, sum, 1);
        for (ptrdiff_t e = 0; e < t->o_row; e += W)
            X(store)(o + e, X(fma)(wa, X(load)(o + e), X(mul)(wb, X(load)(from + e))));
    }
}

/* rows <- O / l (0 where l = 0). Returns whether O and l held no NaN and no infinity. */
static int X(decode_finish)(void *const *rows, const qkv_stack *t)
{
    VEC bad = X(set1)(0), zero = bad;
    for (int r = 0; r < t->rows; r++) {
        const REAL *o = (const REAL *)t->o + r * t->o_row;
        REAL *to = rows[r];
        VEC sum = X(set1)(((const REAL *)t->l)[r]);
        VEC inverse = X(select)(X(equal)(sum, zero), zero, X(div)(X(set1)(1), sum));
        /* x - x is 0 for every finite x and NaN for the others. */
        bad = X(add)(bad, X(sub)(sum, sum));
        for (int e = 0; e < t->dv; e += W) {
            VEC x = X(decode_columns)(o, e);
            bad = X(add)(bad, X(sub)(x, x));
            /* Adding 0 turns -0 into 0: the sign of a zero would tell which keys were skipped. */
            x = X(add)(X(mul)(x, inverse), zero);
            if (e + W <= t->dv)
                X(storeu)(to + e, x);
            else
                X(store_part)(to + e, x, t->dv - e);
        }
    }
    return !X(any)(X(beyond)(bad, zero));
}

#undef BY_TYPE
#undef OWN
#undef AHEAD_WIDENED
#undef AHEAD_MORE
#undef AHEAD_ONE
#undef PART
