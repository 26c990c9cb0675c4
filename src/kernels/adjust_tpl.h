/* What becomes of scores between Q K^T and softmax: scale, softcap, ALiBi, bias and mask.
 *
 * Scores lie as S^T (keys, lanes), but a bias or a mask has a row of keys for each lane: squares of w keys and w lanes are
 * transposed in registers, and a mask becomes a bias of 0 and -inf on its way. Scores of few rows (decode_tpl.h) lie as those
 * of a bias do.
 */
/* Keys between those that are adjusted and those whose bias is fetched: some strips. At 64 to 256 a bias costs within 1 % of
 * the same, into the nearest cache or without fetching 2 to 5 % more. */
#define BIAS_AHEAD 160

static QKV_INLINE VEC X(tanh)(VEC y)
{
    enum { terms = sizeof X(tanh_poly) / sizeof(REAL) };
    VEC one = X(set1)(1), z = X(mul)(y, y), p = X(set1)(X(tanh_poly)[terms - 1]);
    QKV_UNROLL
    for (int i = terms - 2; i >= 0; i--)
        p = X(fma)(p, z, X(set1)(X(tanh_poly)[i]));
    p = X(fma)(X(mul)(y, z), p, y);
    VEC border = X(set1)((REAL)TANH_NEAR);
    if (!X(any)(X(beyond)(z, border)))  /* as always where a cap only guards against the exceptional score */
        return p;
    y = X(min)(X(set1)(30), X(max)(X(set1)(-30), y));   /* tanh is ±1 there, and e^2y within any type */
    VEC e = X(exp2_one)(X(factor_of)(2 * 1.4426950408889634), y);
    VEC outer = X(sub)(one, X(div)(X(set1)(2), X(add)(e, one)));
    return X(select)(X(beyond)(z, border), outer, p);
}

/* x[l] <- what bias and mask add for n keys from i on and the lanes from j on, transposed: x[r] are the lanes of key i + r. */
static QKV_INLINE void X(element_square)(const qkv_tile *t, int i, int j, int n, VEC *x)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0);
    QKV_UNROLL
    for (int l = 0; l < W; l++)
        x[l] = t->changes.bias ? X(load_part)((const REAL *)t->changes.bias[j + l] + i, n) : zero;
    if (t->changes.mask)
        QKV_UNROLL
        for (int l = 0; l < W; l++)
            x[l] = X(select)(X(seen)(t->changes.mask[j + l] + i, n), x[l], none);
    X(transpose)(x);
    for (int r = 0; t->changes.hides && r < W; r++)
        x[r] = X(select)(X(equal)(x[r], none), none, zero);
}

/* Lanes of ALiBi: -slope, and the position counted from the block's first key. */
typedef struct { VEC slope, position; } X(alibi);

static inline X(alibi) X(alibi_of)(const qkv_tile *t, int j)
{
    QKV_ALIGN REAL slope[W], position[W];
    for (int l = 0; l < W; l++) {
        slope[l] = -(REAL)t->changes.slope[j + l];
        position[l] = (REAL)(t->changes.position[j + l] - t->changes.key);
    }
    return (X(alibi)){X(load)(slope), X(load)(position)};
}

/* x and what ALiBi adds for the keys `at`. */
static QKV_INLINE VEC X(add_alibi)(const X(alibi) *alibi, VEC at, VEC x)
{
    VEC distance = X(max)(X(sub)(alibi->position, at), X(sub)(at, alibi->position));
    return X(fma)(alibi->slope, distance, x);
}

/* A square of S^T: n <= W keys from i on, the lanes from j on. */
static QKV_INLINE void X(adjust_square)(const qkv_tile *t, int i, int j, const int n, VEC factor, const X(alibi) *alibi)
{
    REAL *s = (REAL *)t->s + (ptrdiff_t)i * LANES + j;
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0), x[W];
#define EACH QKV_UNROLL for (int r = 0; r < W; r++) if (r < n)
    if (t->changes.bias || t->changes.mask)
        X(element_square)(t, i, j, n, x);
    else
        QKV_UNROLL
        for (int r = 0; r < W; r++)
            x[r] = zero;
    if (t->changes.slope) {
        VEC from = X(set1)((REAL)(t->skew + i));        /* counted from the block, wherever the tile begins in it */
        const REAL *own = t->changes.key_position ? (const REAL *)t->changes.key_position + i : NULL;
        EACH x[r] = X(add_alibi)(alibi, own ? X(set1)(own[r]) : X(add)(from, X(set1)((REAL)r)), x[r]);
    }
    if (t->careful)                   /* what is excluded may be NaN, and NaN - inf is NaN; else that shows in the result */
        EACH X(store)(s + r * LANES, X(select)(X(equal)(x[r], none), zero, X(load)(s + r * LANES)));
    if (t->changes.softcap != 0) {
        VEC cap = X(set1)((REAL)t->changes.softcap);
        for (int r = 0; r < n; r++) {
            VEC y = X(tanh)(X(mul)(factor, X(load)(s + r * LANES)));
            X(store)(s + r * LANES, X(mul)(cap, y));
        }
        factor = X(set1)(1);
    }
    EACH X(store)(s + r * LANES, X(fma)(factor, X(load)(s + r * LANES), x[r]));
#undef EACH
}

/* Rows first .. last of S^T, as qkv_tile says. Not inline, like weigh_rows. */
static QKV_NOINLINE void X(adjust_rows)(const qkv_tile *t, int first, int last)
{
    VEC factor = X(set1)((REAL)t->changes.score_factor);
    for (int j = 0; j < t->nv * W; j += W) {
        X(alibi) alibi = {factor, factor};
        if (t->changes.slope)
            alibi = X(alibi_of)(t, j);
        int i = first;
        for (; i + W <= last; i += W)
            X(adjust_square)(t, i, j, W, factor, &alibi);
        if (i < last)
            X(adjust_square)(t, i, j, last - i, factor, &alibi);
        if (t->changes.bias)          /* rows of a matrix lie too far apart for the CPU to see what comes next */
            for (int l = j; l < j + W; l++)
                for (int k = first; k < last; k += 64 / (int)sizeof(REAL))
                    QKV_PREFETCH_L2((const void *)((uintptr_t)t->changes.bias[l] + (uintptr_t)(k + BIAS_AHEAD) * sizeof(REAL)));
    }
}

/* n scores of one of few rows, which lie side by side, of the keys from `at` on; bias and mask have `skip` keys before them. A
 * score that is excluded may be NaN. */
static QKV_INLINE void X(adjust_row)(const qkv_changes *t, int row, REAL *s, int at, int skip, int n)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0), width = X(set1)(W), cap = X(set1)((REAL)t->softcap);
    VEC before = X(set1)((REAL)t->score_factor), after = t->softcap != 0 ? X(set1)(1) : before;
    const REAL *bias = t->bias ? (const REAL *)t->bias[row] + skip : NULL;
    const uint8_t *mask = t->mask ? t->mask[row] + skip : NULL;
    const REAL *own = t->key_position ? (const REAL *)t->key_position + skip : NULL;
    X(alibi) alibi = {zero, zero};
    if (t->slope)
        alibi = (X(alibi)){X(set1)(-(REAL)t->slope[row]), X(set1)((REAL)(t->position[row] - t->key))};
    QKV_ALIGN REAL keys[W];
    for (int j = 0; j < W; j++)
        keys[j] = (REAL)(at + j);
    VEC key = X(load)(keys);
    for (int i = 0; i < n; i += W, key = X(add)(key, width)) {
        int part = n - i < W ? n - i : W;
        VEC y = part == W ? X(loadu)(s + i) : X(load_part)(s + i, part), x = zero;
        if (bias)
            x = part == W ? X(loadu)(bias + i) : X(load_part)(bias + i, part);
        if (mask)
            x = X(select)(X(seen)(mask + i, part), x, none);
        if (t->slope)
            x = X(add_alibi)(&alibi, own ? X(load_part)(own + i, part) : key, x);
        if (t->softcap != 0)
            y = X(mul)(cap, X(tanh)(X(mul)(before, y)));
        y = X(select)(X(equal)(x, none), none, X(fma)(after, y, x));
        if (part == W)
            X(storeu)(s + i, y);
        else
            X(store_part)(s + i, y, part);
    }
}

#undef BIAS_AHEAD
