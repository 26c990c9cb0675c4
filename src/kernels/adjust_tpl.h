/* What becomes of scores between Q K^T and softmax: scale, softcap, ALiBi, bias and mask.
 *
 * Scores lie as S^T (keys, lanes), but a bias or a mask has a row of keys for each lane: squares of w keys and w lanes are
 * transposed in registers, and a mask becomes a bias of 0 and -inf on its way.
 */
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
    VEC e = X(exp2_one)(X(factor_of)(2 * 1.4426950408889634), y);
    VEC outer = X(sub)(one, X(div)(X(set1)(2), X(add)(e, one)));
    return X(select)(X(beyond)(z, border), outer, p);
}

/* x[l] <- what is added for n keys from i on and the lanes from j on, transposed: x[k] are the lanes of key i + k. */
static QKV_INLINE void X(element_square)(const qkv_tile *t, int i, int n, int j, VEC *x)
{
    VEC none = X(set1)(-(REAL)INFINITY);
    QKV_UNROLL
    for (int l = 0; l < W; l++) {
        x[l] = t->bias ? X(load_part)((const REAL *)t->bias[j + l] + i, n) : X(set1)(0);
        if (t->mask)
            x[l] = X(select)(X(seen)(t->mask[j + l] + i, n), x[l], none);
    }
    X(transpose)(x);
}

/* Rows first .. last of S^T, as qkv_tile says. Not inline, like weigh_rows. */
static QKV_NOINLINE void X(adjust_rows)(const qkv_tile *t, int first, int last)
{
    VEC none = X(set1)(-(REAL)INFINITY), zero = X(set1)(0);
    VEC factor = X(set1)((REAL)(t->softcap != 0 ? t->rest / t->softcap : t->rest)), cap = X(set1)((REAL)t->softcap);
    int elements = t->bias || t->mask;
    for (int j = 0; j < t->nv * W; j += W) {
        QKV_ALIGN REAL slopes[W], positions[W];
        for (int l = 0; t->slope && l < W; l++) {
            slopes[l] = -(REAL)t->slope[j + l];
            positions[l] = (REAL)(t->position[j + l] - t->key);
        }
        VEC slope = t->slope ? X(load)(slopes) : zero, position = t->slope ? X(load)(positions) : zero;
        for (int i = first; i < last; i += W) {
            int n = last - i < W ? last - i : W;
            VEC x[W];
            if (elements)
                X(element_square)(t, i, n, j, x);
            for (int r = 0; r < n; r++) {
                REAL *score = (REAL *)t->s + (ptrdiff_t)(i + r) * LANES + j;
                VEC s = X(mul)(factor, X(load)(score));
                if (t->softcap != 0)
                    s = X(mul)(cap, X(tanh)(s));
                if (t->slope) {
                    VEC ahead = X(sub)(position, X(set1)((REAL)(i + r)));
                    s = X(fma)(slope, X(max)(ahead, X(sub)(zero, ahead)), s);
                }
                if (elements)         /* what is excluded may be NaN */
                    s = X(select)(X(equal)(x[r], none), none, X(add)(s, x[r]));
                X(store)(score, s);
            }
        }
    }
}
