/* The products of few query rows, S = Q K^T and O = P V, where elements are multiplied: rows of K and V are of the
 * table's own type or, if WIDENS, widened in registers as they are loaded. Included by decode_tpl.h.
 */

#if WIDENS
_Static_assert(32 % W == 0, "a vector of int4 lies in one group");
#endif

/* q (n, q_row) <- factor * rows, 0 behind each. */
static void X(decode_stack)(void *q, ptrdiff_t q_row, const void *const *rows, int n, int d, double factor)
{
    VEC scale = X(set1)((REAL)factor);
    for (int i = 0; i < n; i++) {
        REAL *to = (REAL *)q + i * q_row;
        const REAL *from = rows[i];
        for (int e = 0; e < d; e += W)
            X(store)(to + e, X(mul)(scale, e + W <= d ? X(loadu)(from + e) : X(load_part)(from + e, d - e)));
    }
}

/* Elements of a cache line. */
static QKV_INLINE int X(decode_line)(const int as) { return as == QKV_AS_I4 ? 128 : as == QKV_AS_I8 ? 64 : 32; }

/* w elements from number e on, or, of the own type, the first `some` of them, with 0 behind. Of int4 `scale` is that of the
 * group in which `from` lies. */
static QKV_INLINE VEC X(decode_load)(const int as, const char *from, const char *scale, const int e, int some)
{
#if WIDENS
    if (as == QKV_AS_I4)
        return X(widen_i4)(from + e / 32 * 16, e % 32, scale + e / 32 * 2);
    if (as == QKV_AS_I8)
        return X(widen_i8)(from + e);
    if (as != OWN)
        return as == QKV_AS_F16 ? X(widen_f16)(from + 2 * e) : X(widen_bf16)(from + 2 * e);
#endif
    (void)as, (void)scale;
    return some == W ? X(loadu)((const REAL *)from + e) : X(load_part)((const REAL *)from + e, some);
}

#if WIDENS
/* Positions at .. at + n of S take the scales of n rows of int8, of which the first is `scales`; if `keep`, not where they are negative. */
static void X(decode_scale)(const qkv_stack *t, const char *scales, ptrdiff_t row, int at, int n, int keep)
{
    REAL scale[PART];
    for (int i = 0; i < n; i++) {
        float x;
        memcpy(&x, scales + i * row, sizeof x);
        scale[i] = (REAL)x;
    }
    for (int r = 0; r < t->rows; r++) {
        REAL *s = (REAL *)t->s + r * t->s_row + at;
        for (int i = 0; i < n; i++)
            s[i] = keep && s[i] < 0 ? s[i] : s[i] * scale[i];
    }
}
#endif

/* Adds the products of `some` elements, from number e of those at `k`, of nr rows and `few` keys to c, whose rows have nk sums. */
static QKV_INLINE void X(decode_score_step)(const int as, const int nr, const int nk, const int few, const REAL *q,
                                            ptrdiff_t q_row, const char *k, const char *scale, const ptrdiff_t *key,
                                            const int e, int some, VEC *c)
{
    VEC x[4];
    QKV_UNROLL
    for (int r = 0; r < nr; r++)
        x[r] = X(load)(q + r * q_row + e);
    QKV_UNROLL
    for (int i = 0; i < few; i++) {
        VEC y = X(decode_load)(as, k + key[i], scale + key[i], e, some);
        QKV_UNROLL
        for (int r = 0; r < nr; r++)
            c[r * nk + i] = X(fma)(x[r], y, c[r * nk + i]);
    }
}

/* S of nr rows and nk = SUMS / nr keys, or, of one row, of the first n of them, the others repeating the last. The first rows to meet
 * the keys read them one by one, in the order that suits memory, and fetch; the others find them in L1. */
static QKV_INLINE void X(decode_score_tile)(const int as, const int nr, const int nk, const int fetch, const int n,
                                            const qkv_stack *t, int row, const char *k, ptrdiff_t k_row, ptrdiff_t ahead,
                                            int at)
{
    const int halves = as == QKV_AS_F16 || as == QKV_AS_BF16;
    const int few = fetch && (as == OWN || halves) ? 1 : nk < 4 ? nk : 4, step = as == QKV_AS_I4 ? 32 : 2 * W;
    VEC c[SUMS];
    X(decode_clear)(c);
    QKV_UNROLL
    for (int i = 0; i < nk; i += few) {
        const char *first = k + (i < n ? i : n - 1) * k_row, *from = first, *scale = first + X(decode_end)(as, t->d, t->k_scales);
        const REAL *first_q = (const REAL *)t->q + row * t->q_row, *q = first_q;
        ptrdiff_t key[4];
        int e = 0;
        QKV_UNROLL
        for (int j = 0; j < few; j++)
            key[j] = (i + j < n ? j : i < n ? n - 1 - i : 0) * k_row;
        QKV_UNROLL_2
        for (; e + step <= t->d; e += step) {
            if (as != OWN && e % X(decode_line)(as) == 0) {
                QKV_UNROLL
                for (int j = 0; j < few; j++)
                    X(decode_fetch)(from + key[j], ahead);
            }
            QKV_UNROLL
            for (int more = 0; more < step; more += W) {
                X(decode_score_step)(as, nr, nk, few, q, t->q_row, from, scale, key, more, W, c + i);
                if (as == OWN && fetch)
                    X(decode_fetch)(from + X(decode_bytes)(as, more), ahead);
            }
            /* Of several keys, pointers that move on: with an index gcc adds up every address, 1.06 of the time. Of one, where
             * memory sets the pace, pointers take 1.04 (float16 1.1). */
            from = few > 1 ? from + X(decode_bytes)(as, step) : first + X(decode_bytes)(as, e + step);
            q = few > 1 ? q + step : first_q + e + step;
            scale += as == QKV_AS_I4 ? step / 16 : 0;
        }
        QKV_UNROLL
        for (int more = 0; more < step; more += W)
            if (e + more < t->d) {
                X(decode_score_step)(as, nr, nk, few, q, t->q_row, from, scale, key, more,
                                     as == OWN && t->d - e - more < W ? t->d - e - more : W, c + i);
                if (as == OWN && fetch)
                    X(decode_fetch)(from + X(decode_bytes)(as, more), ahead);
            }
        if (as == QKV_AS_I8 || as == QKV_AS_I4) {
            QKV_UNROLL
            for (int j = 0; j < few; j++)
                X(decode_fetch)(scale + key[j], ahead);
        }
    }
    X(decode_keep_scores)(nr, nk, n, t, row, at, c);
}

/* Positions at .. at + n of S. K goes through SUMS keys at a time: they stay in L1 while all rows meet them. Rows are taken in
 * fours and singly, the last keys singly: each kind of tile is thousands of instructions. */
static QKV_INLINE void X(decode_score_as)(const int as, const qkv_stack *t, const char *k, ptrdiff_t k_row, int at, int n)
{
    const ptrdiff_t ahead = X(decode_ahead)(as, t, k_row, t->d);
    for (; n > 0; n -= SUMS, at += SUMS, k += SUMS * k_row) {
        int row = 0, some = n < SUMS ? n : SUMS;
#define TILES(nr, fetch) \
    for (int i = 0; i < SUMS; i += SUMS / nr) \
        X(decode_score_tile)(as, nr, SUMS / nr, fetch, SUMS / nr, t, row, k + i * k_row, k_row, ahead, at + i); \
    row += nr
        if (as == OWN && n >= SUMS) {
            if (t->rows >= 4) {
                TILES(4, 1);
            } else {
                TILES(1, 1);
            }
        }
        while (row + 4 <= t->rows && n >= SUMS) {
            TILES(4, 0);
        }
        while (row < t->rows && n >= SUMS && as == OWN) {
            TILES(1, 0);
        }
        if (t->rows == 1 && (as == QKV_AS_F16 || as == QKV_AS_BF16)) {
            X(decode_score_tile)(as, 1, SUMS, 1, some, t, row, k, k_row, ahead, at);
            row++;
        }
        for (; row < t->rows; row++)
            X(decode_score_tile)(as, 1, SUMS, 0, some, t, row, k, k_row, ahead, at);
#undef TILES
#if WIDENS
        if (as == QKV_AS_I8)
            X(decode_scale)(t, k + t->k_scales, k_row, at, some, 0);
#endif
    }
}

/* What elements of K give to the scores of nr rows and nv vectors of keys, if these lie side by side: here a lane is a key. The sums are
 * those that decode_score has in its lanes, one for each element of a vector: `parts` (rows, W, QKV_COLUMN_KEYS). Of element e and
 * every W-th behind it, n of them; the sums begin at 0, or with what is there. Of the last vector the first `some` keys. */
static QKV_INLINE void X(decode_columns_tile)(const int nr, const int nv, const qkv_stack *t, const char *k, ptrdiff_t k_col, int e,
                                              int n, int begins, REAL *parts, int some)
{
    const REAL *q = (const REAL *)t->q + e;
    VEC c[SUMS];
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            c[r * nv + j] = begins ? X(set1)(0) : X(load)(parts + r * W * QKV_COLUMN_KEYS + j * W);
    }
    for (int i = 0; i < n; i++, k += W * k_col, q += W) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++) {
            const REAL *from = (const REAL *)k + j * W;
            VEC y = some < W ? X(load_part)(from, some) : X(loadu)(from);
            QKV_UNROLL
            for (int r = 0; r < nr; r++)
                c[r * nv + j] = X(fma)(X(set1)(q[r * t->q_row]), y, c[r * nv + j]);
        }
    }
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < nv; j++)
            X(store)(parts + r * W * QKV_COLUMN_KEYS + j * W, c[r * nv + j]);
    }
}

/* Of nr rows: elements a few at a time, along all keys. More would come from memory at once than sets of a cache have room for. */
static QKV_INLINE void X(decode_columns_rows)(const int nr, const qkv_stack *t, const char *k, ptrdiff_t k_col, int at, int n)
{
    enum { ELEMENTS = 8 };
    const int nv = SUMS / (nr == 3 ? 4 : nr);
    for (int j = 0; j < W; j++) {
        int e = j;
        do {
            int left = e < t->d ? (t->d - e + W - 1) / W : 0, count = left < ELEMENTS ? left : ELEMENTS, i = 0;
            const char *from = k + e * k_col;
            REAL *parts = (REAL *)t->parts + j * QKV_COLUMN_KEYS;
            for (; i + nv * W <= n; i += nv * W)
                X(decode_columns_tile)(nr, nv, t, from + i * (ptrdiff_t)sizeof(REAL), k_col, e, count, e == j, parts + i, W);
            for (; i < n; i += W)
                X(decode_columns_tile)(nr, 1, t, from + i * (ptrdiff_t)sizeof(REAL), k_col, e, count, e == j, parts + i,
                                       n - i < W ? n - i : W);
            e += ELEMENTS * W;
        } while (e < t->d);
    }
    for (int r = 0; r < nr; r++)
        for (int i = 0; i < n; i += W) {
            VEC x[W];
            QKV_UNROLL
            for (int j = 0; j < W; j++)
                x[j] = X(load)((const REAL *)t->parts + (r * W + j) * QKV_COLUMN_KEYS + i);
            X(transpose)(x);
            X(store_part)((REAL *)t->s + r * t->s_row + at + i, X(sum_each)(x), n - i < W ? n - i : W);
        }
}

static void X(decode_score_columns)(const qkv_stack *t, const void *k, ptrdiff_t k_col, int as, int at, int n)
{
    (void)as;
    if (t->rows == 1)
        X(decode_columns_rows)(1, t, k, k_col, at, n);
    else if (t->rows == 2)
        X(decode_columns_rows)(2, t, k, k_col, at, n);
    else if (t->rows == 3)
        X(decode_columns_rows)(3, t, k, k_col, at, n);
    else
        X(decode_columns_rows)(4, t, k, k_col, at, n);
}

static inline VEC X(decode_columns)(const REAL *o, int e) { return X(load)(o + e); }

/* nc vectors of columns from column e on, or the first `some` elements of one, of the values of nr rows: n keys of one
 * part, whose first one begins it if `begins`, whose last one ends it if `ends`. If careful, excluded keys are left out. */
static QKV_INLINE void X(decode_value_tile)(const int as, const int nr, const int nc, const int careful, int some,
                                            const qkv_stack *t, int row, int e, const char *v, ptrdiff_t v_row,
                                            ptrdiff_t ahead, int at, int n, int begins, int ends)
{
    REAL *sums = (REAL *)t->sums + row * t->o_row + e, *o = (REAL *)t->o + row * t->o_row + e;
    const REAL *p = (const REAL *)t->s + row * t->s_row + at;
    VEC c[SUMS];
    X(decode_take_sums)(nr, nc, t, sums, begins, c);
    /* Of int4 only tiles of whole groups know their elements' numbers at compile time. */
    const int known = as != QKV_AS_I4 || nc * W % 32 == 0, group = known ? e : e / 32 * 32;
    const char *scale = v + X(decode_end)(as, t->dv, t->v_scales) + e / 32 * 2;
    /* Tiles narrower than a cache line fetch it once: the first in it, and the last of a row its scales. */
    const int line = X(decode_line)(as), narrow = as != OWN && nc * W < line;
    ptrdiff_t fetch = e % line == 0 ? ahead : 0;
    if (e + nc * W >= t->dv && fetch == 0)
        fetch = ahead + (scale - v) - X(decode_bytes)(as, group);
    v += X(decode_bytes)(as, group);
    QKV_UNROLL_2
    for (int i = 0; i < n; i++, v += v_row, scale += v_row) {
        if (careful && p[i] < 0)
            continue;
        VEC y[8];
        QKV_UNROLL
        for (int j = 0; j < nc; j++) {
            y[j] = X(decode_load)(as, v, scale, known ? j * W : e - group + j * W, some);
            if (!careful && !narrow && (as == OWN || j * W % line == 0))
                X(decode_fetch)(v + X(decode_bytes)(as, j * W), ahead);
        }
        if (!careful && narrow)
            X(decode_fetch)(v, fetch);
        else if (!careful && (as == QKV_AS_I8 || as == QKV_AS_I4))
            X(decode_fetch)(scale, ahead);
        QKV_UNROLL
        for (int r = 0; r < nr; r++) {
            VEC x = X(set1)(p[r * t->s_row + i]);
            QKV_UNROLL
            for (int j = 0; j < nc; j++)
                c[r * nc + j] = X(fma)(x, y[j], c[r * nc + j]);
        }
    }
    X(decode_keep_sums)(nr, nc, t, sums, o, ends, c);
}
