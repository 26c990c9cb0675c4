/* Rows to lanes and back: Q into a panel, O out of it, and tiles of any strides and byte order.
 *
 * A panel row is LANES elements, so element e of lane i lies at e * LANES + i. Rows move through w x w transposes in
 * registers; a single row is not worth one.
 */
static void X(pack)(void *qt, const void *const *rows, int n, int d, double scale)
{
    VEC factor = X(set1)((REAL)scale);
    for (int g = 0; g < n; g += W) {
        REAL *to = (REAL *)qt + g;
        if (n - g == 1) {
            const REAL *row = rows[g];
            for (int e = 0; e < d; e++)
                X(store)(to + (ptrdiff_t)e * LANES, X(mul)(factor, X(set1)(row[e])));
            return;
        }
        for (int e = 0; e < d; e += W) {
            VEC x[W];
            int part = d - e < W ? d - e : W;
            for (int i = 0; i < W; i++)
                x[i] = X(load_part)((const REAL *)rows[g + i < n ? g + i : n - 1] + e, part);
            X(transpose)(x);
            for (int i = 0; i < part; i++)
                X(store)(to + (ptrdiff_t)(e + i) * LANES, X(mul)(factor, x[i]));
        }
    }
}

static void X(finish)(void *const *rows, const void *o, const void *l, int n, int dv)
{
    VEC zero = X(set1)(0);
    for (int g = 0; g < n; g += W) {
        const REAL *from = (const REAL *)o + g;
        VEC sum = X(load)((const REAL *)l + g);
        VEC inverse = X(select)(X(equal)(sum, zero), zero, X(div)(X(set1)(1), sum));
        int lanes = n - g < W ? n - g : W;
        for (int e = 0; e < dv; e += W) {
            VEC x[W];
            int part = dv - e < W ? dv - e : W;
            /* Adding 0 turns -0 into 0: the sign of a zero would tell which tiles were skipped. */
            for (int i = 0; i < W; i++)
                x[i] = i < part ? X(fma)(X(load)(from + (ptrdiff_t)(e + i) * LANES), inverse, zero) : zero;
            if (lanes == 1) {
                for (int i = 0; i < part; i++)
                    X(store_part)((REAL *)rows[g] + e + i, x[i], 1);
                continue;
            }
            X(transpose)(x);
            for (int i = 0; i < lanes; i++)
                X(store_part)((REAL *)rows[g + i] + e, x[i], part);
        }
    }
}

static int X(finite)(const void *o, const void *l, int nv, int dv)
{
    VEC zero = X(set1)(0);
    VEC bad = zero;                   /* x - x is 0 for every finite x and NaN for the others */
    for (int j = 0; j < nv; j++) {
        VEC x = X(load)((const REAL *)l + j * W);
        bad = X(add)(bad, X(sub)(x, x));
        for (int i = 0; i < dv; i++) {
            x = X(load)((const REAL *)o + (ptrdiff_t)i * LANES + j * W);
            bad = X(add)(bad, X(sub)(x, x));
        }
    }
    QKV_ALIGN REAL lane[W];
    X(store)(lane, bad);
    for (int i = 0; i < W; i++)
        if (lane[i] != 0)
            return 0;
    return 1;
}

static inline void X(copy_bytes)(void *to, const void *from, size_t size, int swapped)
{
    if (swapped)
        for (size_t i = 0; i < size; i++)
            ((char *)to)[i] = ((const char *)from)[size - 1 - i];
    else
        memcpy(to, from, size);
}

static void X(gather)(void *to, ptrdiff_t to_row, const qkv_rows *from, int n, int d)
{
    for (int i = 0; i < n; i++) {
        REAL *row = (REAL *)to + i * to_row;
        const char *data = from->data + i * from->row;
        if (from->size != sizeof(REAL))
            for (int e = 0; e < d; e++) {
                float narrow;
                X(copy_bytes)(&narrow, data + e * from->col, sizeof narrow, from->swapped);
                row[e] = (REAL)narrow;
            }
        else if (from->col == sizeof(REAL) && !from->swapped)
            memcpy(row, data, (size_t)d * sizeof(REAL));
        else
            for (int e = 0; e < d; e++)
                X(copy_bytes)(row + e, data + e * from->col, sizeof(REAL), from->swapped);
    }
}

static void X(scatter)(const qkv_rows *to, const void *from, ptrdiff_t from_row, int n, int d)
{
    for (int i = 0; i < n; i++) {
        const REAL *row = (const REAL *)from + i * from_row;
        char *data = to->data + i * to->row;
        for (int e = 0; e < d; e++)
            X(copy_bytes)(data + e * to->col, row + e, sizeof(REAL), to->swapped);
    }
}
