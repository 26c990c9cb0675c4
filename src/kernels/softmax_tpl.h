/* Softmax of rows, and of columns: y = 2^(c (x - m)) / l with m the maximum and l the sum.
 *
 * Three passes, of which only the first reads far memory: the maximum; the exponentials into a buffer that stays in cache,
 * and their sum; the quotients. An element that does not take part becomes -inf in a buffer before anything looks at it.
 *
 * Rows have the axis in the lanes, columns run down it with a column in each lane. Both give the same bits: the sum has W
 * parts, by index mod W, of BLOCK elements at a time, added up in one order.
 */

/* Rows between a row of columns and the one that is fetched meanwhile: rows may lie in a page each. From memory into L2, and
 * from there, or from L3 where rows share cache sets, into L1. */
#define AHEAD 48
#define NEAR 8

/* Elements of one sum, 32 in each of its parts: those of longer rows are sums of such sums, with what each addition lost
 * (Kahan). Of 64 and more small weights beside a large one, all rounded the same way, the error was that of NumPy 4 times. */
#define BLOCK (32 * W)

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

/* Some columns of x and out, all their rows; none before the first and behind the last. */
typedef struct {
    const REAL *x;
    REAL *out;
    const uint8_t *mask;
    int64_t count;
} X(strip);

/* The state of a strip, rows of its width: of maxima and of inverse sums one; W each of the parts of a block, of all blocks,
 * and of what they lost. */
typedef struct { REAL *top, *inverse, *part, *total, *lost; } X(columns);

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

static void X(end_strip)(const X(columns) *s, int64_t width)
{
    for (int64_t half = W / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half * width; j += W)
            X(store)(s->total + j, X(add)(X(load)(s->total + j), X(load)(s->total + half * width + j)));
    for (int64_t j = 0; j < width; j += W)
        X(store)(s->inverse + j, X(inverse_of)(X(load)(s->total + j)));
}

/* Row i of the strip, in `row` where a mask hides some of it. */
static QKV_INLINE const REAL *X(strip_row)(const qkv_softmax_tile *t, X(strip) s, int64_t i, REAL *row)
{
    const REAL *x = s.x + i * t->x_row;
    if (!s.mask || !s.count)
        return x;
    X(hide)(row, x, s.mask + i * t->mask_axis, t->mask_run, s.count);
    return row;
}

/* Asks for the row that the maxima need AHEAD rows later: of this strip, or of the one behind it. */
static QKV_INLINE void X(expect_row)(const qkv_softmax_tile *t, X(strip) s, int64_t i, int64_t behind)
{
    int64_t row = i + AHEAD, count = row < t->n ? s.count : behind;
    const REAL *x = row < t->n ? s.x + row * t->x_row : s.x + s.count + (row - t->n) * t->x_row;
    for (int64_t j = 0; row < 2 * t->n && j < count; j += 64 / (int64_t)sizeof(REAL))
        QKV_PREFETCH_L2(x + j);
}

static QKV_INLINE void X(max_row)(const REAL *x, int64_t count, REAL *top)
{
    int64_t j = 0;
    for (; j + W <= count; j += W)
        X(store)(top + j, X(max)(X(loadu)(x + j), X(load)(top + j)));
    if (j < count)
        X(store)(top + j, X(max)(X(load_tail)(x + j, (int)(count - j)), X(load)(top + j)));
}

static QKV_INLINE void X(exp_vector)(X(factor) c, REAL *e, VEC x, const REAL *top, REAL *part)
{
    VEC p = X(exp2_one)(c, X(sub)(x, X(load)(top)));
    X(store)(part, X(add)(X(load)(part), p));
    X(store)(e, p);
}

static QKV_INLINE void X(exp_row)(X(factor) c, REAL *e, const REAL *x, int64_t count, const REAL *top, REAL *part)
{
    int64_t j = 0;
    for (; j + W <= count; j += W)
        X(exp_vector)(c, e + j, X(loadu)(x + j), top + j, part + j);
    if (j < count)
        X(exp_vector)(c, e + j, X(load_tail)(x + j, (int)(count - j)), top + j, part + j);
}

static QKV_INLINE void X(scale_row)(REAL *out, const REAL *e, int64_t count, const REAL *inverse, int stream)
{
    int64_t j = 0;
    for (; stream && j + W <= count; j += W)
        X(stream)(out + j, X(mul)(X(load)(e + j), X(load)(inverse + j)));
    for (; j + W <= count; j += W)
        X(storeu)(out + j, X(mul)(X(load)(e + j), X(load)(inverse + j)));
    if (j < count)
        X(store_part)(out + j, X(mul)(X(load)(e + j), X(load)(inverse + j)), (int)(count - j));
}

/* Three strips at a time, so that memory is read and written while there is something to compute: row by row, what is left
 * of the strip before goes out and makes room in e for the exponentials of this one, and the maxima of the next are taken. */
static void X(softmax_columns)(const qkv_softmax_tile *t)
{
    const int64_t width = t->strip, line = 64 / (int64_t)sizeof(REAL);
    const X(factor) c = X(log2e)();
    REAL *state = t->state, *row = state, *next_top = state + width;
    X(columns) s = {state + 2 * width, state + 3 * width, state + 4 * width, state + (4 + W) * width,
                    state + (4 + 2 * W) * width};
    X(strip) before, now = {t->x, t->out, t->mask, 0}, next = now;
    /* A short first strip leaves the others aligned, the last takes what is left of a vector. */
    int64_t left = t->count, first = (int64_t)(-(uintptr_t)t->out % sizeof(VEC) / sizeof(REAL));
    int64_t wanted = first ? first : width - W;
    do {
        before = now;
        now = next;
        next.x += now.count;
        next.out += now.count;
        next.mask = now.mask ? now.mask + now.count * t->mask_run : NULL;
        next.count = left <= width ? left : wanted;
        wanted = width - W;
        left -= next.count;
        REAL *top = s.top;
        s.top = next_top;
        next_top = top;
        for (int64_t j = 0; j < next.count; j += W)
            X(store)(next_top + j, X(set1)(-(REAL)INFINITY));
        for (int64_t j = 0; j < now.count; j += W)
            X(store)(s.top + j, X(shift_of)(X(load)(s.top + j)));
        for (int64_t j = 0; now.count && j < width * 3 * W; j += W)
            X(store)(s.part + j, X(set1)(0));
        const int stream = t->stream && (uintptr_t)before.out % sizeof(VEC) == 0 && t->out_row % W == 0;
        for (int64_t i = 0; i < t->n; i++) {
            REAL *e = (REAL *)t->e + i * width;
            for (int64_t j = 0; !stream && i + NEAR < t->n && j < before.count; j += line)
                QKV_PREFETCH_WRITE(before.out + (i + NEAR) * t->out_row + j);
            X(scale_row)(before.out + i * t->out_row, e, before.count, s.inverse, stream);
            X(expect_row)(t, next, i, left < width ? left : width);
            X(max_row)(X(strip_row)(t, next, i, row), next.count, next_top);
            for (int64_t j = 0; i + NEAR < t->n && j < now.count; j += line)
                QKV_PREFETCH(now.x + (i + NEAR) * t->x_row + j);
            X(exp_row)(c, e, X(strip_row)(t, now, i, row), now.count, s.top, s.part + i % W * width);
            if (now.count && (i + 1 == t->n || (i + 1) % BLOCK == 0))
                X(end_block)(&s, width);
        }
        if (now.count)
            X(end_strip)(&s, width);
    } while (now.count || next.count);
    if (t->stream)
        X(fence)();
}

#undef BLOCK
#undef NEAR
#undef AHEAD
