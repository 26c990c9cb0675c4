/* The products of few query rows where pairs of 16 bits are multiplied: of S = Q K^T a lane is two elements of the head
 * dimension, of O = P V two keys. A vector of K or V, 2 w elements, is read as it lies, whatever its alignment, and a cache
 * line of them is a vector. Two rows of V are zipped in registers; columns of O stay in the order which that gives until
 * decode_finish. Included by decode_tpl.h.
 */

/* Elements of a vector, and vectors that are read from one row before the next. */
#define HALVES (2 * W)
#define BLOCK 4

/* q (n, q_row) <- rows of pairs with the sign of the factor, 0 behind each. */
static void X(decode_stack)(void *q, ptrdiff_t q_row, const void *const *rows, int n, int d, double factor)
{
    VEC sign = X(set1)((REAL)factor);
    for (int i = 0; i < n; i++) {
        const char *from = rows[i];
        for (int e = 0; e < d; e += HALVES)
            X(store)((REAL *)q + i * q_row + e / 2,
                     X(turn)(sign, X(load_halves)(from + 2 * e, d - e < HALVES ? d - e : HALVES)));
    }
}

static QKV_INLINE VEC X(decode_halves)(const char *from, int some)
{
    return some == HALVES ? X(loadu)((const REAL *)(const void *)from) : X(load_halves)(from, some);
}

/* Adds the products of `some` elements, from number e on, of nr rows and `few` keys to c, whose rows have nk sums. */
static QKV_INLINE void X(decode_score_step)(const int nr, const int nk, const int few, const REAL *q, ptrdiff_t q_row,
                                            const char *k, ptrdiff_t k_row, ptrdiff_t ahead, int last, int some, VEC *c)
{
    QKV_UNROLL
    for (int i = 0; i < few; i++) {
        const char *from = k + (i < last ? i : last) * k_row;
        VEC y = X(decode_halves)(from, some);
        X(decode_fetch)(from, ahead);
        QKV_UNROLL
        for (int r = 0; r < nr; r++)
            c[r * nk + i] = X(mad)(X(load)(q + r * q_row), y, c[r * nk + i]);
    }
}

/* S of nr rows and nk = SUMS / nr keys, or, of one row, of the first n of them, the others repeating the last. */
static QKV_INLINE void X(decode_score_tile)(const int nr, const int nk, int n, const qkv_stack *t, int row, const char *k,
                                            ptrdiff_t k_row, ptrdiff_t ahead, int at)
{
    const int few = nr <= 2 ? 1 : 4;
    const REAL *q = (const REAL *)t->q + row * t->q_row;
    VEC c[SUMS];
    QKV_UNROLL
    for (int i = 0; i < SUMS; i++)
        c[i] = X(set1)(0);
    QKV_UNROLL
    for (int i = 0; i < nk; i += few) {
        const char *from = k + (i < n ? i : n - 1) * k_row;
        const REAL *terms = q;
        int last = n - 1 - i > 0 ? n - 1 - i : 0, left = t->d;
        for (; left >= BLOCK * HALVES; left -= BLOCK * HALVES, terms += BLOCK * W, from += BLOCK * sizeof(VEC)) {
            QKV_UNROLL
            for (int j = 0; j < BLOCK; j++)
                X(decode_score_step)(nr, nk, few, terms + j * W, t->q_row, from + j * (int)sizeof(VEC), k_row, ahead, last,
                                     HALVES, c + i);
        }
        for (; left >= HALVES; left -= HALVES, terms += W, from += sizeof(VEC))
            X(decode_score_step)(nr, nk, few, terms, t->q_row, from, k_row, ahead, last, HALVES, c + i);
        if (left)
            X(decode_score_step)(nr, nk, few, terms, t->q_row, from, k_row, ahead, last, left, c + i);
    }
    X(decode_keep_scores)(nr, nk, n, t, row, at, c);
}

static void X(decode_score)(const qkv_stack *t, const void *keys, ptrdiff_t k_row, int as, int at, int n)
{
    const char *k = keys;
    const ptrdiff_t ahead = X(decode_ahead_halves)(t, k_row, t->d);
    for (; n > 0; n -= SUMS, at += SUMS, k += SUMS * k_row) {
        int row = 0;
        for (; row + 4 <= t->rows && n >= SUMS; row += 4)
            for (int i = 0; i < SUMS; i += SUMS / 4)
                X(decode_score_tile)(4, SUMS / 4, SUMS / 4, t, row, k + i * k_row, k_row, ahead, at + i);
        for (; row + 2 <= t->rows && n >= SUMS; row += 2)
            for (int i = 0; i < SUMS; i += SUMS / 2)
                X(decode_score_tile)(2, SUMS / 2, SUMS / 2, t, row, k + i * k_row, k_row, ahead, at + i);
        for (; row < t->rows; row++)
            X(decode_score_tile)(1, SUMS, n < SUMS ? n : SUMS, t, row, k, k_row, ahead, at);
    }
    (void)as;
}

/* Columns e .. e + w of a row of O. */
static inline VEC X(decode_columns)(const REAL *o, int e)
{
    o += e / HALVES * HALVES;
    return X(unzip)(X(load)(o), X(load)(o + W), e % HALVES);
}

/* nc vectors of columns from column e on, or the first `some` columns of one, of the values of nr rows: n keys of one part,
 * whose first one begins it if `begins`, whose last one ends it if `ends`. If careful, excluded keys are left out. */
static QKV_INLINE void X(decode_value_tile)(const int nr, const int nc, const int careful, int some, const qkv_stack *t,
                                            int row, int e, const char *v, ptrdiff_t v_row, ptrdiff_t ahead, int at, int n,
                                            int begins, int ends)
{
    REAL *sums = (REAL *)t->sums + row * t->o_row + e, *o = (REAL *)t->o + row * t->o_row + e;
    const REAL *p = (const REAL *)t->s + row * t->s_row + at / 2;
    VEC c[SUMS];
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < 2 * nc; j++)
            c[r * 2 * nc + j] = begins ? X(set1)(0) : X(load)(sums + r * t->o_row + j * W);
    }
    v += 2 * e;
    QKV_UNROLL_2
    for (int i = 0; i < n / 2; i++, v += 2 * v_row) {
        VEC y[8];
        QKV_UNROLL
        for (int j = 0; j < nc; j++) {
            const char *from = v + j * HALVES * 2;
            VEC first = X(decode_halves)(from, some), second = X(decode_halves)(from + v_row, some);
            X(decode_fetch)(from, ahead);
            X(decode_fetch)(from + v_row, ahead);
            y[2 * j] = X(zip)(first, second, 0);
            y[2 * j + 1] = X(zip)(first, second, W);
        }
        QKV_UNROLL
        for (int r = 0; r < nr; r++) {
            VEC x = X(set1)(p[r * t->s_row + i]);
            QKV_UNROLL
            for (int j = 0; j < 2 * nc; j++)
                c[r * 2 * nc + j] = careful ? X(mad_seen)(y[j], x, c[r * 2 * nc + j]) : X(mad)(x, y[j], c[r * 2 * nc + j]);
        }
    }
    QKV_UNROLL
    for (int r = 0; r < nr; r++) {
        QKV_UNROLL
        for (int j = 0; j < 2 * nc; j++) {
            REAL *to = (ends ? o : sums) + r * t->o_row + j * W;
            X(store)(to, ends ? X(add)(X(load)(to), c[r * 2 * nc + j]) : c[r * 2 * nc + j]);
        }
    }
}

static QKV_INLINE void X(decode_value_rows)(const int nr, const int careful, const qkv_stack *t, int row, const char *v,
                                            ptrdiff_t v_row, ptrdiff_t ahead, int at, int n, int begins, int ends)
{
    int e = 0;
#define TILE(nc, some) X(decode_value_tile)(nr, nc, careful, some, t, row, e, v, v_row, ahead, at, n, begins, ends)
    if (!careful && nr <= 2)
        for (; e + 4 * HALVES <= t->dv; e += 4 * HALVES)
            TILE(4, HALVES);
    if (!careful)
        for (; e + 2 * HALVES <= t->dv; e += 2 * HALVES)
            TILE(2, HALVES);
    for (; e + HALVES <= t->dv; e += HALVES)
        TILE(1, HALVES);
    if (e < t->dv)
        TILE(1, t->dv - e);
#undef TILE
}

/* O += P V for the positions at .. at + n, both even. V goes through a part at a time: it stays in L1 while all rows meet it.
 * Four rows only if their registers hold all columns: memory likes whole rows of V. */
static void X(decode_value)(const qkv_stack *t, const void *values, ptrdiff_t v_row, int as, int at, int n)
{
    const char *v = values;
    const ptrdiff_t ahead = X(decode_ahead_halves)(t, v_row, t->dv);
    for (int some; n > 0; at += some, n -= some, v += some * v_row) {
        some = PART - at % PART < n ? PART - at % PART : n;
        int begins = at % PART == 0 || at == t->first / 2 * 2, row = 0;
        int ends = (at + some) % PART == 0 || at + some == (t->last + 1) / 2 * 2;
#define TILES(nr, careful) (X(decode_value_rows)(nr, careful, t, row, v, v_row, ahead, at, some, begins, ends), row += nr)
        while (t->careful && row < t->rows)
            TILES(1, 1);
        while (row + 4 <= t->rows && t->dv <= 2 * HALVES)
            TILES(4, 0);
        while (row + 2 <= t->rows)
            TILES(2, 0);
        while (row < t->rows)
            TILES(1, 0);
#undef TILES
    }
    (void)as;
}

#undef BLOCK
#undef HALVES
