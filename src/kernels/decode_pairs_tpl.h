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
    X(decode_clear)(c);
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

static QKV_INLINE void X(decode_score_as)(const int as, const qkv_stack *t, const char *k, ptrdiff_t k_row, int at, int n)
{
    const ptrdiff_t ahead = X(decode_ahead)(as, t, k_row, t->d);
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
}

/* Columns e .. e + w of a row of O. */
static inline VEC X(decode_columns)(const REAL *o, int e)
{
    o += e / HALVES * HALVES;
    return X(unzip)(X(load)(o), X(load)(o + W), e % HALVES);
}

/* nc vectors of columns from column e on, or the first `some` columns of two, of the values of nr rows: n keys of one part,
 * whose first one begins it if `begins`, whose last one ends it if `ends`. If careful, excluded keys are left out. */
static QKV_INLINE void X(decode_value_tile)(const int as, const int nr, const int nc, const int careful, int some,
                                            const qkv_stack *t, int row, int e, const char *v, ptrdiff_t v_row,
                                            ptrdiff_t ahead, int at, int n, int begins, int ends)
{
    REAL *sums = (REAL *)t->sums + row * t->o_row + e, *o = (REAL *)t->o + row * t->o_row + e;
    const REAL *p = (const REAL *)t->s + row * t->s_row + at / 2;
    VEC c[SUMS];
    X(decode_take_sums)(nr, nc, t, sums, begins, c);
    v += X(decode_bytes)(as, e);
    QKV_UNROLL_2
    for (int i = 0; i < n / 2; i++, v += 2 * v_row) {
        VEC y[8];
        QKV_UNROLL
        for (int j = 0; j < nc; j += 2) {
            const char *from = v + j / 2 * (int)sizeof(VEC);
            VEC first = X(decode_halves)(from, some), second = X(decode_halves)(from + v_row, some);
            X(decode_fetch)(from, ahead);
            X(decode_fetch)(from + v_row, ahead);
            y[j] = X(zip)(first, second, 0);
            y[j + 1] = X(zip)(first, second, W);
        }
        QKV_UNROLL
        for (int r = 0; r < nr; r++) {
            VEC x = X(set1)(p[r * t->s_row + i]);
            QKV_UNROLL
            for (int j = 0; j < nc; j++)
                c[r * nc + j] = careful ? X(mad_seen)(y[j], x, c[r * nc + j]) : X(mad)(x, y[j], c[r * nc + j]);
        }
    }
    X(decode_keep_sums)(nr, nc, t, sums, o, ends, c);
}

#undef BLOCK
#undef HALVES
