/* Rows to lanes and back: Q into a panel, O out of it, and tiles of any strides, byte order and type.
 *
 * A panel row is LANES elements, so element e of lane i lies at e * LANES + i. Rows move through w x w transposes in
 * registers; a single row is not worth one.
 */
#if PAIR == 1
static inline VEC X(turn)(VEC factor, VEC x) { return X(mul)(factor, x); }
#endif

static QKV_INLINE void X(prefetch_each)(const void *const *rows, int n, int d)
{
    for (int i = 0; i < n; i++)
        for (int e = 0; e < d; e += QKV_LINE / (int)sizeof(REAL))
            QKV_PREFETCH((const REAL *)rows[i] + e);
}

static void X(expect)(void *const *rows, int n, int dv) { X(prefetch_each)((const void *const *)rows, n, dv); }

/* Columns e .. e + part of the w lanes that begin at rows[0]; of n rows, lanes without one repeat the last. */
static QKV_INLINE void X(pack_square)(REAL *to, const void *const *rows, int n, int e, int part, VEC scale)
{
    VEC x[W];
    QKV_UNROLL
    for (int i = 0; i < W; i++)
        x[i] = X(load_part)((const REAL *)rows[i < n ? i : n - 1] + e, part);
    X(transpose)(x);
    QKV_UNROLL
    for (int i = 0; i < W; i++)
        if (i < part)
            X(store)(to + (ptrdiff_t)(e + i) * LANES, X(turn)(scale, x[i]));
}

static void X(pack)(void *qt, const void *const *rows, int n, int d, double factor)
{
    VEC scale = X(set1)((REAL)factor);
    X(prefetch_each)(rows, n < W ? n : W, d);
    for (int g = 0; g < n; g += W) {
        REAL *to = (REAL *)qt + g;
        int e = 0;
        if (g + W < n)
            X(prefetch_each)(rows + g + W, n - g < 2 * W ? n - g - W : W, d);
        if (n - g == 1) {
            const REAL *row = rows[g];
            for (; e < d; e++)
                X(store)(to + (ptrdiff_t)e * LANES, X(turn)(scale, X(set1)(row[e])));
            return;
        }
        for (; e + W <= d; e += W)
            X(pack_square)(to, rows + g, n - g, e, W, scale);
        if (e < d)
            X(pack_square)(to, rows + g, n - g, e, d - e, scale);
    }
}

static QKV_INLINE void X(finish_square)(void *const *rows, const REAL *from, int n, int e, int part, VEC inverse)
{
    VEC x[W], zero = X(set1)(0);
    /* Adding 0 turns -0 into 0: the sign of a zero would tell which tiles were skipped. */
    QKV_UNROLL
    for (int i = 0; i < W; i++)
        x[i] = i < part ? X(add)(X(mul)(X(load)(from + (ptrdiff_t)(e + i) * LANES), inverse), zero) : zero;
    X(transpose)(x);
    QKV_UNROLL
    for (int i = 0; i < W; i++)
        if (i < n)
            X(store_part)((REAL *)rows[i] + e, x[i], part);
}

static void X(finish)(void *const *rows, const void *o, const void *l, int n, int dv)
{
    VEC zero = X(set1)(0);
    for (int g = 0; g < n; g += W) {
        const REAL *from = (const REAL *)o + g;
        VEC sum = X(load)((const REAL *)l + g);
        VEC inverse = X(select)(X(equal)(sum, zero), zero, X(div)(X(set1)(1), sum));
        int e = 0;
        if (n - g == 1) {
            QKV_ALIGN REAL lane[W];
            X(store)(lane, inverse);
            for (; e < dv; e++)
                ((REAL *)rows[g])[e] = from[(ptrdiff_t)e * LANES] * lane[0] + 0;
            return;
        }
        for (; e + W <= dv && n - g >= W; e += W)
            X(finish_square)(rows + g, from, W, e, W, inverse);
        for (; e < dv; e += W)
            X(finish_square)(rows + g, from, n - g, e, dv - e < W ? dv - e : W, inverse);
    }
}

static int X(finite)(const void *o, const void *l, int nv, int dv)
{
    /* x - x is 0 for every finite x and NaN for the others. Four sums, since one would wait for itself. */
    VEC bad[4];
    for (int j = 0; j < 4; j++)
        bad[j] = X(set1)(0);
    for (int j = 0; j < nv; j++) {
        VEC x = X(load)((const REAL *)l + j * W);
        bad[0] = X(add)(bad[0], X(sub)(x, x));
        int i = 0;
        for (; i + 4 <= dv; i += 4) {
            QKV_UNROLL
            for (int r = 0; r < 4; r++) {
                x = X(load)((const REAL *)o + (ptrdiff_t)(i + r) * LANES + j * W);
                bad[r] = X(add)(bad[r], X(sub)(x, x));
            }
        }
        for (; i < dv; i++) {
            x = X(load)((const REAL *)o + (ptrdiff_t)i * LANES + j * W);
            bad[0] = X(add)(bad[0], X(sub)(x, x));
        }
    }
    VEC sum = X(add)(X(add)(bad[0], bad[1]), X(add)(bad[2], bad[3]));
    return !X(any)(X(beyond)(sum, X(set1)(0)));
}

static inline void X(copy_bytes)(void *to, const void *from, size_t size, int swapped)
{
    if (swapped)
        for (size_t i = 0; i < size; i++)
            ((char *)to)[i] = ((const char *)from)[size - 1 - i];
    else
        memcpy(to, from, size);
}

/* Whole vectors of d elements of 16 bits. Returns how many elements these are. */
static QKV_INLINE int X(widen_side_by_side)(const int as, REAL *to, const char *data, int d)
{
    ptrdiff_t whole = d / W * W;
    QKV_UNROLL_4
    for (ptrdiff_t e = 0; e < whole; e += W)
        X(storeu)(to + e, as == QKV_AS_F16 ? X(widen_f16)(data + 2 * e) : X(widen_bf16)(data + 2 * e));
    return (int)whole;
}

/* d elements of 16 bits, W at a time; those that do not lie side by side are put there first. */
static void X(widen_row)(REAL *to, const char *data, const qkv_rows *from, int d)
{
    int plain = from->col == sizeof(uint16_t) && !from->swapped, e = 0;
    if (plain && from->type == QKV_AS_F16)
        e = X(widen_side_by_side)(QKV_AS_F16, to, data, d);
    else if (plain)
        e = X(widen_side_by_side)(QKV_AS_BF16, to, data, d);
    for (; e < d; e += W) {
        uint16_t some[W] = {0};
        int n = d - e < W ? d - e : W;
        for (int i = 0; i < n; i++)
            X(copy_bytes)(some + i, data + (e + i) * from->col, sizeof(uint16_t), from->swapped);
        VEC x = from->type == QKV_AS_F16 ? X(widen_f16)(some) : X(widen_bf16)(some);
        if (n < W)
            X(store_part)(to + e, x, n);
        else
            X(storeu)(to + e, x);
    }
}

/* Elements that lie side by side, in the other byte order. */
static void X(swap_row)(REAL *to, const char *data, int d)
{
    for (int e = 0; e < d; e++) {     /* which compilers turn into vectors */
        uint32_t x[sizeof(REAL) / 4], y[sizeof(REAL) / 4];
        memcpy(x, data + e * (ptrdiff_t)sizeof(REAL), sizeof x);
        for (size_t i = 0; i < sizeof(REAL) / 4; i++) {
            uint32_t word = x[sizeof(REAL) / 4 - 1 - i];
            y[i] = word << 24 | (word << 8 & 0xff0000) | (word >> 8 & 0xff00) | word >> 24;
        }
        memcpy(to + e, y, sizeof y);
    }
}

/* What is finite stays so: a bias that averages excludes nothing. */
static inline REAL X(narrow)(double x)
{
    const double most = (double)REAL_LARGEST;
    double y = x > most ? most : x;
    y = y < -most ? -most : y;
    return (REAL)(x - x == 0 ? y : x);
}

/* d <= W columns of n <= W rows whose columns lie in memory as rows do elsewhere. */
static QKV_INLINE void X(gather_square)(REAL *to, ptrdiff_t to_row, const char *data, ptrdiff_t col, int n, int d)
{
    VEC x[W];
    QKV_UNROLL
    for (int j = 0; j < W; j++)
        x[j] = j >= d ? X(set1)(0) : n == W ? X(loadu)((const REAL *)(data + j * col)) : X(load_part)((const REAL *)(data + j * col), n);
    X(transpose)(x);
    QKV_UNROLL
    for (int j = 0; j < W; j++)
        if (j < n)
            X(store_part)(to + j * to_row, x[j], d);
}

/* Such rows, some columns from end to end: memory likes what lies side by side. Meanwhile the next ones are fetched. */
static void X(gather_turned)(REAL *to, ptrdiff_t to_row, const char *data, ptrdiff_t col, int n, int d)
{
    for (int e = 0; e < d; e += W)
        for (int i = 0; i < n; i += W) {
            const char *from = data + e * col + i * (ptrdiff_t)sizeof(REAL);
            REAL *square = to + i * to_row + e;
            for (int j = W; j < 2 * W && i * (int)sizeof(REAL) % QKV_LINE == 0; j++)
                QKV_PREFETCH_L2((const void *)((uintptr_t)from + (uintptr_t)(j * col)));
            if (n - i >= W && d - e >= W)
                X(gather_square)(square, to_row, from, col, W, W);
            else
                X(gather_square)(square, to_row, from, col, n - i < W ? n - i : W, d - e < W ? d - e : W);
        }
}

/* Rows of bytes with their scales (qkv.h). The product is exact but for that of int8 in float32, which is rounded. */
static void X(dequantise_row)(REAL *to, const char *data, const char *scales, int type, int d)
{
    if (type == QKV_AS_I8) {
        float scale;
        memcpy(&scale, scales, sizeof scale);
        int e = 0;
#if WIDENS
        for (VEC factor = X(set1)((REAL)scale); e + W <= d; e += W)
            X(storeu)(to + e, X(mul)(factor, X(widen_i8)(data + e)));
#endif
        for (; e < d; e++)
            to[e] = (REAL)scale * (REAL)((const signed char *)data)[e];
        return;
    }
    int e = 0;
#if WIDENS
    for (; d >= 32; d -= 32, to += 32, data += 16, scales += 2) {
        VEC x[32 / W];                                      /* what is stored could be the scale, as far as compilers know */
        QKV_UNROLL
        for (int i = 0; i < 32 / W; i++)
            x[i] = X(widen_i4)(data, i * W, scales);
        QKV_UNROLL
        for (int i = 0; i < 32 / W; i++)
            X(storeu)(to + i * W, x[i]);
    }
    for (; e + W <= d; e += W)
        X(storeu)(to + e, X(widen_i4)(data, e, scales));
#endif
    for (; e < d; e++) {
        uint16_t half;
        memcpy(&half, scales + e / 32 * 2, sizeof half);
        uint32_t bits = (uint32_t)half << 16;
        float scale;
        memcpy(&scale, &bits, sizeof scale);
        to[e] = (REAL)scale * (REAL)((((const unsigned char *)data)[e / 32 * 16 + e % 16] >> e % 32 / 16 * 4 & 15) - 8);
    }
}

static void X(gather)(void *to, ptrdiff_t to_row, const qkv_rows *from, int n, int d)
{
    const int own = sizeof(REAL) == 4 ? QKV_AS_F32 : QKV_AS_F64;
    if (n > 1 && from->type == own && !from->swapped && from->row == sizeof(REAL) && from->col != sizeof(REAL)
        && ((uintptr_t)from->data | (uintptr_t)from->col) % sizeof(REAL) == 0) {
        X(gather_turned)(to, to_row, from->data, from->col, n, d);
        return;
    }
    for (int i = 0; i < n; i++) {
        REAL *row = (REAL *)to + i * to_row;
        const char *data = from->data + i * from->row;
        if (from->type == own && from->col == sizeof(REAL) && !from->swapped)
            memcpy(row, data, (size_t)d * sizeof(REAL));
        else if (from->type == own && from->col == sizeof(REAL))
            X(swap_row)(row, data, d);
        else if (from->type == own)
            for (int e = 0; e < d; e++)
                X(copy_bytes)(row + e, data + e * from->col, sizeof(REAL), from->swapped);
        else if (from->type == QKV_AS_F32)
            for (int e = 0; e < d; e++) {
                float x;
                X(copy_bytes)(&x, data + e * from->col, sizeof x, from->swapped);
                row[e] = (REAL)x;
            }
        else if (from->type == QKV_AS_F64 && from->col == sizeof(double) && !from->swapped)
            for (int e = 0; e < d; e++) {                   /* which compilers turn into vectors */
                double x;
                memcpy(&x, data + e * sizeof x, sizeof x);
                row[e] = X(narrow)(x);
            }
        else if (from->type == QKV_AS_F64)
            for (int e = 0; e < d; e++) {
                double x;
                X(copy_bytes)(&x, data + e * from->col, sizeof x, from->swapped);
                row[e] = X(narrow)(x);
            }
        else if (from->type >= QKV_AS_I8)
            X(dequantise_row)(row, data, data + from->col, from->type, d);
        else
            X(widen_row)(row, data, from, d);
    }
}

#if PAIR == 1
static void X(gather_terms)(void *to, ptrdiff_t to_row, const qkv_rows *from, int n, int d)
{
    X(gather)(to, to_row, from, n, d);
}

static void X(gather_values)(void *to, ptrdiff_t to_row, const qkv_rows *from, int at, int n, int d)
{
    X(gather)((REAL *)to + at * to_row, to_row, from, n, d);
}
#else
/* count elements of 16 bits from any strides and byte order, side by side. */
static inline void X(collect)(uint16_t *to, const char *data, const qkv_rows *from, int count)
{
    if (from->col == sizeof(uint16_t) && !from->swapped)
        memcpy(to, data, (size_t)count * sizeof(uint16_t));
    else
        for (int e = 0; e < count; e++)
            X(copy_bytes)(to + e, data + e * from->col, sizeof(uint16_t), from->swapped);
}

#if !TILE_PARTS
static void X(gather_terms)(void *to, ptrdiff_t to_row, const qkv_rows *from, int n, int d)
{
    for (int i = 0; i < n; i++) {
        uint16_t *row = (uint16_t *)((REAL *)to + i * to_row);
        X(collect)(row, from->data + i * from->row, from, d);
        if (d % 2)
            row[d] = 0;
    }
}

static void X(gather_values)(void *to, ptrdiff_t to_row, const qkv_rows *from, int at, int n, int d)
{
    int plain = from->col == sizeof(uint16_t) && !from->swapped;
    for (int i = 0; i < n; i += 2) {
        REAL *row = (REAL *)to + (at + i) / 2 * to_row;
        const char *a = from->data + i * from->row, *b = a + from->row;
        for (int e = 0; e < d; e += W) {
            int part = d - e < W ? d - e : W;
            if (plain && part == W && i + 1 < n) {
                X(storeu)(row + e, X(interleave)(a + e * from->col, b + e * from->col));
                continue;
            }
            uint16_t first[W] = {0}, second[W] = {0};
            X(collect)(first, a + e * from->col, from, part);
            if (i + 1 < n)
                X(collect)(second, b + e * from->col, from, part);
            X(store_part)(row + e, X(interleave)(first, second), part);
        }
    }
}
#endif
#endif

#if NARROWS
static void X(narrow_row)(char *data, const qkv_rows *to, const REAL *from, int d)
{
    for (int e = 0; e < d; e += W) {
        uint16_t some[W];
        int n = d - e < W ? d - e : W, direct = n == W && to->col == sizeof(uint16_t) && !to->swapped;
        VEC x = n < W ? X(load_part)(from + e, n) : X(loadu)(from + e);
        void *at = direct ? data + e * to->col : (char *)some;
        if (to->type == QKV_AS_F16)
            X(narrow_f16)(at, x);
        else
            X(narrow_bf16)(at, x);
        for (int i = 0; i < n && !direct; i++)
            X(copy_bytes)(data + (e + i) * to->col, some + i, sizeof(uint16_t), to->swapped);
    }
}
#endif

static void X(scatter)(const qkv_rows *to, const void *from, ptrdiff_t from_row, int n, int d)
{
    for (int i = 0; i < n; i++) {
        const REAL *row = (const REAL *)from + i * from_row;
        char *data = to->data + i * to->row;
#if NARROWS
        if (to->type != QKV_AS_F32) {
            X(narrow_row)(data, to, row, d);
            continue;
        }
#endif
        for (int e = 0; e < d; e++)
            X(copy_bytes)(data + e * to->col, row + e, sizeof(REAL), to->swapped);
    }
}
