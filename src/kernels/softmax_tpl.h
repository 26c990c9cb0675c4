/* Softmax of rows, and of columns: y = 2^(c (x - m)) / l with m the maximum and l the sum.
 *
 * Three passes, of which only the first reads far memory: the maximum; the exponentials into a buffer that stays in cache,
 * and their sum; the quotients. An element that does not take part becomes -inf in the buffer before anything looks at it.
 *
 * Rows have the axis in the lanes, columns run down it with a column in each lane. Both give the same bits: the sum has W
 * parts, by index mod W, of BLOCK elements at a time, added up in one order.
 */

/* Rows between a row of columns and the one that is fetched meanwhile: rows may lie in a page each. */
#define AHEAD 8

/* Elements of one sum: the parts of longer rows are sums of such sums, with what each addition lost (Kahan). */
#define BLOCK 1024

static inline X(factor) X(log2e)(void) { return X(factor_of)(1.44269504088896340736); }

/* The exponentials of rows with a larger maximum are scaled to it; one without any has nothing to subtract. */
static inline VEC X(shift_of)(VEC top)
{
    return X(select)(X(equal)(top, X(set1)(-(REAL)INFINITY)), X(set1)(0), top);
}

static inline VEC X(inverse_of)(VEC sum)
{
    VEC zero = X(set1)(0);
    return X(select)(X(equal)(sum, zero), zero, X(div)(X(set1)(1), sum));
}

static inline VEC X(add_block)(VEC total, VEC part, VEC *lost)
{
    VEC x = X(sub)(part, *lost), sum = X(add)(total, x);
    *lost = X(sub)(X(sub)(sum, total), x);
    return sum;
}

/* e <- x, but -inf where the mask is 0. */
static void X(hide)(REAL *e, const REAL *x, const uint8_t *mask, ptrdiff_t step, int64_t n)
{
    const REAL hidden = -(REAL)INFINITY;
    if (step == 1)
        for (int64_t i = 0; i < n; i++)
            e[i] = mask[i] ? x[i] : hidden;
    else
        for (int64_t i = 0; i < n; i++)
            e[i] = mask[i * step] ? x[i] : hidden;
}

/* The last n < W elements, and -inf behind them. */
static inline VEC X(load_tail)(const REAL *x, int n)
{
    QKV_ALIGN REAL all[W];
    X(store)(all, X(set1)(-(REAL)INFINITY));
    X(store_part)(all, X(load_part)(x, n), n);
    return X(load)(all);
}

static REAL X(row_max)(const REAL *x, int64_t n)
{
    VEC m[4];
    QKV_ALIGN REAL lane[W];
    for (int j = 0; j < 4; j++)
        m[j] = X(set1)(-(REAL)INFINITY);
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        QKV_UNROLL
        for (int j = 0; j < 4; j++)
            m[j] = X(max)(X(loadu)(x + i + j * W), m[j]);
    }
    for (; i + W <= n; i += W)
        m[0] = X(max)(X(loadu)(x + i), m[0]);
    if (i < n)
        m[1] = X(max)(X(load_tail)(x + i, (int)(n - i)), m[1]);
    X(store)(lane, X(max)(X(max)(m[0], m[1]), X(max)(m[2], m[3])));
    for (int j = 1; j < W; j++)
        lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
    return lane[0];
}

/* e <- 2^(c (x - shift)); returns the sum. Meanwhile the row at `next` is fetched. */
static REAL X(row_exp)(REAL *e, const REAL *x, int64_t n, VEC shift, const REAL *next)
{
    X(factor) c = X(log2e)();
    VEC total = X(set1)(0), lost = total;
    QKV_ALIGN REAL lane[W];
    for (int64_t i = 0; i < n;) {
        int64_t last = n - i < BLOCK ? n : i + BLOCK;
        VEC sum = X(set1)(0);
        for (; i + W <= last; i += W) {
            VEC p = X(exp2_one)(c, X(sub)(X(loadu)(x + i), shift));
            sum = X(add)(sum, p);
            X(storeu)(e + i, p);
            QKV_PREFETCH(next + i);
        }
        if (i < last) {
            VEC p = X(exp2_one)(c, X(sub)(X(load_tail)(x + i, (int)(last - i)), shift));
            sum = X(add)(sum, p);
            X(store_part)(e + i, p, (int)(last - i));
            i = last;
        }
        total = X(add_block)(total, sum, &lost);
    }
    X(store)(lane, total);
    for (int half = W / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return lane[0];
}

/* out <- e * inverse. Streamed, whole vectors bypass the caches. */
static void X(row_scale)(REAL *out, const REAL *e, int64_t n, VEC inverse, int stream)
{
    int64_t i = 0;
    if (stream) {
        int64_t head = (int64_t)(-(uintptr_t)out % sizeof(VEC) / sizeof(REAL));
        i = head < n ? head : n;
        X(store_part)(out, X(mul)(X(load_part)(e, (int)i), inverse), (int)i);
        for (; i + W <= n; i += W)
            X(stream)(out + i, X(mul)(X(loadu)(e + i), inverse));
    }
    for (; i + W <= n; i += W)
        X(storeu)(out + i, X(mul)(X(loadu)(e + i), inverse));
    if (i < n)
        X(store_part)(out + i, X(mul)(X(load_part)(e + i, (int)(n - i)), inverse), (int)(n - i));
}

static void X(softmax_rows)(const qkv_softmax_tile *t)
{
    REAL *e = t->e;
    for (int64_t i = 0; i < t->count; i++) {
        const REAL *x = (const REAL *)t->x + i * t->x_row, *next = i + 1 < t->count ? x + t->x_row : x;
        if (t->mask) {
            X(hide)(e, x, t->mask + i * t->mask_run, t->mask_axis, t->n);
            x = e;
        }
        VEC shift = X(shift_of)(X(set1)(X(row_max)(x, t->n)));
        REAL sum = X(row_exp)(e, x, t->n, shift, next);
        X(row_scale)((REAL *)t->out + i * t->out_row, e, t->n, X(inverse_of)(X(set1)(sum)), t->stream);
    }
    if (t->stream)
        X(fence)();
}

/* The state of `width` columns: a row of maxima; W rows each of the parts of a block, of all blocks, and of what they lost. */
typedef struct { REAL *top, *part, *total, *lost; } X(columns);

/* Rows of e that are summed into `part` are added to `total`. */
static void X(end_block)(const X(columns) *s, int64_t width)
{
    for (int64_t j = 0; j < width * W; j += W) {
        VEC lost = X(load)(s->lost + j);
        X(store)(s->total + j, X(add_block)(X(load)(s->total + j), X(load)(s->part + j), &lost));
        X(store)(s->lost + j, lost);
        X(store)(s->part + j, X(set1)(0));
    }
}

/* The `count` columns at x and out. Meanwhile `next` columns behind them are fetched. */
static void X(softmax_strip)(const qkv_softmax_tile *t, const REAL *x, REAL *out, const uint8_t *mask, int64_t count,
                             int64_t next)
{
    const int64_t width = (count + W - 1) / W * W, n = t->n, line = 64 / (int64_t)sizeof(REAL);
    REAL *state = t->state;
    X(columns) s = {state, state + width, state + width * (W + 1), state + width * (2 * W + 1)};
    X(factor) c = X(log2e)();
    VEC none = X(set1)(-(REAL)INFINITY);
    for (int64_t j = 0; j < width; j += W)
        X(store)(s.top + j, none);
    for (int64_t j = 0; j < width * 3 * W; j += W)
        X(store)(s.part + j, X(set1)(0));
    for (int64_t i = 0; i < n; i++) {
        const REAL *from = x + i * t->x_row;
        REAL *e = (REAL *)t->e + i * width;
        for (int64_t j = 0; i + AHEAD < n && j < count; j += line)
            QKV_PREFETCH(from + AHEAD * t->x_row + j);
        for (int64_t j = 0; j < width; j += W)
            X(store)(e + j, j + W <= count ? X(loadu)(from + j) : X(load_tail)(from + j, (int)(count - j)));
        if (mask)
            X(hide)(e, e, mask + i * t->mask_axis, t->mask_run, count);
        for (int64_t j = 0; j < width; j += W)
            X(store)(s.top + j, X(max)(X(load)(e + j), X(load)(s.top + j)));
    }
    for (int64_t j = 0; j < width; j += W)
        X(store)(s.top + j, X(shift_of)(X(load)(s.top + j)));
    for (int64_t i = 0; i < n; i++) {
        REAL *e = (REAL *)t->e + i * width, *part = s.part + i % W * width;
        for (int64_t j = 0; j < next; j += line)
            QKV_PREFETCH(x + i * t->x_row + count + j);
        for (int64_t j = 0; j < width; j += W) {
            VEC p = X(exp2_one)(c, X(sub)(X(load)(e + j), X(load)(s.top + j)));
            X(store)(part + j, X(add)(X(load)(part + j), p));
            X(store)(e + j, p);
        }
        if (i + 1 == n || (i + 1) % BLOCK == 0)
            X(end_block)(&s, width);
    }
    for (int64_t half = W / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half * width; j += W)
            X(store)(s.total + j, X(add)(X(load)(s.total + j), X(load)(s.total + half * width + j)));
    for (int64_t j = 0; j < width; j += W)
        X(store)(s.total + j, X(inverse_of)(X(load)(s.total + j)));
    const int stream = t->stream && (uintptr_t)out % sizeof(VEC) == 0 && t->out_row % W == 0;
    for (int64_t i = 0; i < n; i++) {
        const REAL *e = (const REAL *)t->e + i * width;
        REAL *to = out + i * t->out_row;
        for (int64_t j = 0; !stream && i + AHEAD < n && j < count; j += line)
            QKV_PREFETCH_WRITE(to + AHEAD * t->out_row + j);
        int64_t j = 0;
        for (; stream && j + W <= count; j += W)
            X(stream)(to + j, X(mul)(X(load)(e + j), X(load)(s.total + j)));
        for (; j + W <= count; j += W)
            X(storeu)(to + j, X(mul)(X(load)(e + j), X(load)(s.total + j)));
        if (j < count)
            X(store_part)(to + j, X(mul)(X(load)(e + j), X(load)(s.total + j)), (int)(count - j));
    }
}

static void X(softmax_columns)(const qkv_softmax_tile *t)
{
    /* A shorter first strip leaves the others aligned. */
    int64_t width = t->strip - (int64_t)((uintptr_t)t->out % sizeof(VEC) / sizeof(REAL));
    for (int64_t j = 0; j < t->count; j += width, width = t->strip) {
        width = width < t->count - j ? width : t->count - j;
        int64_t left = t->count - j - width;
        X(softmax_strip)(t, (const REAL *)t->x + j, (REAL *)t->out + j, t->mask ? t->mask + j * t->mask_run : NULL, width,
                         left < t->strip ? left : t->strip);
    }
    if (t->stream)
        X(fence)();
}

#undef BLOCK
#undef AHEAD
