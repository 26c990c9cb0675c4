/* Softmax of rows, and of columns: y = 2^(c (x - m)) / l with m the maximum and l the sum.
 *
 * Three passes, of which only the first reads far memory: the maximum; the exponentials into a buffer that stays in cache,
 * and their sum; the quotients. An element that does not take part becomes -inf in a buffer before anything looks at it.
 *
 * Rows have the axis in the lanes, columns run down it with a column in each lane. Both give the same bits: the sum has W
 * parts, by index mod W, of BLOCK elements at a time, added up in one order.
 *
 * The gradient, p (x - sum of p x), has its sum in that order too, and needs no buffer: each element is looked at twice.
 */

/* Rows of columns that are worked on at a time, for each part of a sum. 4 take 1.06 times as long where all is in L3, 1 with
 * AVX2 1.2 times from memory. */
#define RUN 2

/* Elements of a cache line. */
#define LINE (QKV_LINE / (int64_t)sizeof(REAL))

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
    VEC x = X(sub)(part, *lost), sum = X(add)(total, x), zero = X(set1)(0);
    VEC left = X(sub)(X(sub)(sum, total), x);
    *lost = X(select)(X(equal)(X(sub)(sum, sum), zero), left, zero);      /* what is infinite has lost nothing */
    return sum;
}

/* The sum of the parts. */
static inline REAL X(fold)(VEC parts)
{
    QKV_ALIGN REAL lane[W];
    X(store)(lane, parts);
    for (int half = W / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return lane[0];
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

/* The last n < W elements, and -inf behind them. Not through memory, which would wait for its own stores. */
static inline VEC X(load_tail)(const REAL *x, int n)
{
#define HIDDEN -(REAL)INFINITY
    static const REAL behind[32] = {[16] = HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN,
                                    HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN};
#undef HIDDEN
    return X(add)(X(load_part)(x, n), X(loadu)(behind + 16 - n));
}

/* Elements of x and of out: of 16 bits if `half`, which is 0, QKV_AS_F16 or QKV_AS_BF16, and a constant wherever these are
 * inlined. */
#define BYTES(half) ((half) ? 2 : (ptrdiff_t)sizeof(REAL))

#if NARROWS
#define BY_HALF(function, half, ...) \
    ((half) == QKV_AS_F16 ? function(QKV_AS_F16, __VA_ARGS__) : (half) == QKV_AS_BF16 ? function(QKV_AS_BF16, __VA_ARGS__) \
     : function(0, __VA_ARGS__))
#else
#define BY_HALF(function, half, ...) ((void)(half), function(0, __VA_ARGS__))
#endif

static QKV_INLINE VEC X(take)(const int half, const char *x)
{
    return half == QKV_AS_F16 ? X(widen_f16)(x) : half == QKV_AS_BF16 ? X(widen_bf16)(x) : X(loadu)((const REAL *)x);
}

/* The last n < W elements, and -inf behind them. */
static QKV_INLINE VEC X(take_tail)(const int half, const char *x, int n)
{
    if (!half)
        return X(load_tail)((const REAL *)x, n);
    uint16_t some[W];
    for (int i = 0; i < W; i++)
        some[i] = half == QKV_AS_F16 ? 0xfc00 : 0xff80;
    memcpy(some, x, (size_t)n * sizeof *some);
    return X(take)(half, (const char *)some);
}

static QKV_INLINE void X(give)(const int half, char *out, VEC y)
{
#if NARROWS
    if (half) {
        (half == QKV_AS_F16 ? X(narrow_f16) : X(narrow_bf16))(out, y);
        return;
    }
#else
    (void)half;
#endif
    X(storeu)((REAL *)out, y);
}

static QKV_INLINE void X(give_tail)(const int half, char *out, VEC y, int n)
{
    if (!half) {
        X(store_part)((REAL *)out, y, n);
        return;
    }
    uint16_t some[W];
    X(give)(half, (char *)some, y);
    memcpy(out, some, (size_t)n * sizeof *some);
}

/* The maximum of a row, which is widened into e if `half`. */
static QKV_INLINE REAL X(find_max)(const int half, REAL *e, const char *x, int64_t n)
{
    VEC m[4];
    QKV_ALIGN REAL lane[W];
    for (int j = 0; j < 4; j++)
        m[j] = X(set1)(-(REAL)INFINITY);
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        QKV_UNROLL
        for (int j = 0; j < 4; j++) {
            VEC v = X(take)(half, x + (i + j * W) * BYTES(half));
            if (half)
                X(storeu)(e + i + j * W, v);
            m[j] = X(maxnum)(v, m[j]);
        }
    }
    for (int part; i < n; i += W) {
        part = n - i < W ? (int)(n - i) : W;
        VEC v = part < W ? X(take_tail)(half, x + i * BYTES(half), part) : X(take)(half, x + i * BYTES(half));
        if (half)
            X(store_part)(e + i, v, part);
        m[0] = X(maxnum)(v, m[0]);
    }
    X(store)(lane, X(maxnum)(X(maxnum)(m[0], m[1]), X(maxnum)(m[2], m[3])));
    for (int j = 1; j < W; j++)
        lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
    return lane[0];
}

static REAL X(row_max)(int half, REAL *e, const char *x, int64_t n) { return BY_HALF(X(find_max), half, e, x, n); }

/* e <- 2^(c (x - shift)); returns the sum. Meanwhile what is at `next` is fetched, `bytes` for each element. */
static REAL X(row_exp)(REAL *e, const REAL *x, int64_t n, VEC shift, const char *next, ptrdiff_t bytes)
{
    X(factor) c = X(log2e)();
    VEC total = X(set1)(0), lost = total;
    for (int64_t i = 0; i < n;) {
        int64_t last = n - i < BLOCK ? n : i + BLOCK;
        VEC sum = X(set1)(0);
        for (; i + W <= last; i += W) {
            VEC p = X(exp2_one)(c, X(sub)(X(loadu)(x + i), shift));
            sum = X(add)(sum, p);
            X(storeu)(e + i, p);
            QKV_PREFETCH(next + i * bytes);
        }
        if (i < last) {
            VEC p = X(exp2_one)(c, X(sub)(X(load_tail)(x + i, (int)(last - i)), shift));
            sum = X(add)(sum, p);
            X(store_part)(e + i, p, (int)(last - i));
            i = last;
        }
        total = X(add_block)(total, sum, &lost);
    }
    return X(fold)(total);
}

/* Elements of out from i on. */
static QKV_INLINE void X(scale_from)(const int half, char *out, const REAL *e, int64_t i, int64_t n, VEC inverse)
{
    for (; i + W <= n; i += W)
        X(give)(half, out + i * BYTES(half), X(mul)(X(loadu)(e + i), inverse));
    if (i < n)
        X(give_tail)(half, out + i * BYTES(half), X(mul)(X(load_part)(e + i, (int)(n - i)), inverse), (int)(n - i));
}

/* out <- e * inverse. Streamed, whole vectors bypass the caches. */
static void X(row_scale)(int half, char *out, const REAL *e, int64_t n, VEC inverse, int stream)
{
    int64_t i = 0;
    if (stream) {
        REAL *to = (REAL *)out;
        int64_t head = (int64_t)(-(uintptr_t)out % sizeof(VEC) / sizeof(REAL));
        i = head < n ? head : n;
        X(store_part)(to, X(mul)(X(load_part)(e, (int)i), inverse), (int)i);
        for (; i + W <= n; i += W)
            X(stream)(to + i, X(mul)(X(loadu)(e + i), inverse));
    }
    BY_HALF(X(scale_from), half, out, e, i, n, inverse);
}

static void X(softmax_rows)(const qkv_softmax_tile *t)
{
    REAL *e = t->e, top = 0;
    ptrdiff_t x_bytes = BYTES(t->half_x), out_bytes = BYTES(t->half_out);
    for (int64_t i = 0; i < t->count; i++) {
        const char *row = (const char *)t->x + i * t->x_row * x_bytes, *next = i + 1 < t->count ? row + t->x_row * x_bytes : row;
        const REAL *x = t->half_x ? e : (const REAL *)row;
        char *out = (char *)t->out + i * t->out_row * out_bytes;
        if (t->half_x)
            top = X(row_max)(t->half_x, e, row, t->n);
        if (t->mask) {
            X(hide)(e, x, t->mask + i * t->mask_run, t->mask_axis, t->n);
            x = e;
        }
        if (t->mask || !t->half_x)
            top = X(row_max)(0, NULL, (const char *)x, t->n);
        if (t->stream) {              /* the lines that are written in part */
            QKV_PREFETCH_WRITE(out);
            QKV_PREFETCH_WRITE(out + (t->n - 1) * out_bytes);
        }
        REAL sum = X(row_exp)(e, x, t->n, X(shift_of)(X(set1)(top)), next, x_bytes);
        X(row_scale)(t->half_out, out, e, t->n, X(inverse_of)(X(set1)(sum)), t->stream);
    }
    if (t->stream)
        X(fence)();
}

/* Some columns of x and out, all their rows: none before the first and behind the last. And a copy of them, (n, strip): first
 * of x, -inf where a mask hides it and in the rest of a vector, then of the exponentials. */
typedef struct {
    const char *x;
    char *out;
    REAL *e;
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

static void X(fold_columns)(const X(columns) *s, int64_t width)
{
    for (int64_t half = W / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half * width; j += W)
            X(store)(s->total + j, X(add)(X(load)(s->total + j), X(load)(s->total + half * width + j)));
}

static void X(end_strip)(const X(columns) *s, int64_t width)
{
    X(fold_columns)(s, width);
    for (int64_t j = 0; j < width; j += W)
        X(store)(s->inverse + j, X(inverse_of)(X(load)(s->total + j)));
}

#define EACH QKV_UNROLL for (int j = 0; j < nv; j++)

/* e <- x, nv vectors of some rows; the only one is the tail of n elements unless that is 0. */
static QKV_INLINE void X(take_vectors)(const int half, const int nv, REAL *e, int64_t width, const char *x, ptrdiff_t x_row,
                                       int64_t rows, int n, REAL *top)
{
    VEC m[4];
    EACH m[j] = X(load)(top + j * W);
    for (int64_t i = 0; i < rows; i++, x += x_row * BYTES(half), e += width) {
        EACH {
            VEC v = n ? X(take_tail)(half, x, n) : X(take)(half, x + j * W * BYTES(half));
            m[j] = X(maxnum)(v, m[j]);
            X(store)(e + j * W, v);
        }
    }
    EACH X(store)(top + j * W, m[j]);
}

static QKV_INLINE void X(take_columns)(const int half, REAL *e, int64_t width, const char *x, ptrdiff_t x_row, int64_t rows,
                                       int64_t count, REAL *top)
{
    int64_t j = 0;
    for (; j + 4 * W <= count; j += 4 * W)
        X(take_vectors)(half, 4, e + j, width, x + j * BYTES(half), x_row, rows, 0, top + j);
    for (; j + W <= count; j += W)
        X(take_vectors)(half, 1, e + j, width, x + j * BYTES(half), x_row, rows, 0, top + j);
    if (j < count)
        X(take_vectors)(half, 1, e + j, width, x + j * BYTES(half), x_row, rows, (int)(count - j), top + j);
}

/* Rows i .. i + rows of a strip, and their maxima: of what a mask leaves, if there is one. */
static void X(take_rows)(const qkv_softmax_tile *t, X(strip) s, int64_t i, int64_t rows, REAL *top)
{
    const int64_t width = t->strip;
    const char *x = s.x + i * t->x_row * BYTES(t->half_x);
    REAL *e = s.e + i * width;
    if (!s.mask) {
        BY_HALF(X(take_columns), t->half_x, e, width, x, t->x_row, rows, s.count, top);
        return;
    }
    for (int64_t r = 0; s.count && r < rows; r++, x += t->x_row * BYTES(t->half_x)) {
        REAL *row = e + r * width;
        if (t->half_x)
            X(row_max)(t->half_x, row, x, s.count);
        X(hide)(row, t->half_x ? row : (const REAL *)x, s.mask + (i + r) * t->mask_axis, t->mask_run, s.count);
    }
    X(take_columns)(0, e, width, (const char *)e, width, rows, s.count, top);
}

/* e <- 2^(c (e - top)): some rows, of which those W apart are summed in one register. Meanwhile the lines of as many rows at
 * `next`, next_row bytes apart, are fetched; where these do not begin at lines, the strip before them had their first ones. */
static QKV_INLINE void X(exp_rows)(int64_t rows, X(factor) c, REAL *e, int64_t width, int64_t count, const REAL *top,
                                   REAL *part, const char *next, ptrdiff_t next_row, int64_t next_count, ptrdiff_t bytes)
{
    for (int64_t r = 0; r < W && r < rows; r++, next += RUN * next_row) {
        for (int64_t j = 0; j < count; j += W) {
            VEC shift = X(load)(top + j), sum = X(load)(part + r * width + j);
            QKV_UNROLL
            for (int64_t i = r; i < rows; i += W) {
                VEC p = X(exp2_one)(c, X(sub)(X(load)(e + i * width + j), shift));
                sum = X(add)(sum, p);
                X(store)(e + i * width + j, p);
            }
            X(store)(part + r * width + j, sum);
            if (j % LINE == 0 && j < next_count) {
                QKV_UNROLL
                for (int i = 0; i < RUN; i++)
                    QKV_PREFETCH_L2(next + i * next_row + j * bytes + QKV_LINE - bytes);
            }
        }
    }
}

/* out <- e * inverse, nv vectors of some rows */
static QKV_INLINE void X(give_vectors)(const int half, const int nv, const int stream, char *out, ptrdiff_t out_row, const REAL *e,
                                       int64_t width, int64_t rows, const REAL *inverse)
{
    VEC f[4];
    EACH f[j] = X(load)(inverse + j * W);
    for (int64_t i = 0; i < rows; i++, out += out_row * BYTES(half), e += width) {
        EACH {
            VEC y = X(mul)(X(load)(e + j * W), f[j]);
            if (stream)
                X(stream)((REAL *)out + j * W, y);
            else
                X(give)(half, out + j * W * BYTES(half), y);
        }
    }
}

/* Columns from j on. */
static QKV_INLINE void X(give_columns)(const int half, int64_t j, char *out, ptrdiff_t out_row, const REAL *e, int64_t width,
                                       int64_t rows, int64_t count, const REAL *inverse)
{
    for (; j + 4 * W <= count; j += 4 * W)
        X(give_vectors)(half, 4, 0, out + j * BYTES(half), out_row, e + j, width, rows, inverse + j);
    for (; j + W <= count; j += W)
        X(give_vectors)(half, 1, 0, out + j * BYTES(half), out_row, e + j, width, rows, inverse + j);
    for (int64_t r = 0; j < count && r < rows; r++)
        X(give_tail)(half, out + (r * out_row + j) * BYTES(half), X(mul)(X(load)(e + r * width + j), X(load)(inverse + j)),
                     (int)(count - j));
}

/* Rows i .. i + rows of a strip. Lines are streamed whole where rows are whole lines apart, else vectors. */
static void X(give_rows)(const qkv_softmax_tile *t, X(strip) s, int64_t i, int64_t rows, const REAL *inverse)
{
    const int stream = t->stream && (uintptr_t)s.out % sizeof(VEC) == 0 && t->out_row % W == 0;
    char *out = s.out + i * t->out_row * BYTES(t->half_out);
    const REAL *e = s.e + i * t->strip;
    int64_t j = 0;
    for (; stream && j + 4 * W <= s.count; j += 4 * W)
        X(give_vectors)(0, 4, 1, out + j * BYTES(0), t->out_row, e + j, t->strip, rows, inverse + j);
    for (; stream && j + LINE <= s.count; j += LINE)
        X(give_vectors)(0, LINE / W < 4 ? (int)(LINE / W) : 4, 1, out + j * BYTES(0), t->out_row, e + j, t->strip, rows, inverse + j);
    BY_HALF(X(give_columns), t->half_out, j, out, t->out_row, e, t->strip, rows, s.count, inverse);
}

/* Three strips at a time, so that memory is read and written while there is something to compute: some rows at a time, what
 * is left of the strip before goes out and makes room for the next, and exponentials replace this one. */
static void X(softmax_columns)(const qkv_softmax_tile *t)
{
    const int64_t width = t->strip;
    const ptrdiff_t x_bytes = BYTES(t->half_x), out_bytes = BYTES(t->half_out), line = QKV_LINE / out_bytes;
    const X(factor) c = X(log2e)();
    REAL *state = t->state, *next_top = state;
    X(columns) s = {state + width, state + 2 * width, state + 3 * width, state + (3 + W) * width, state + (3 + 2 * W) * width};
    X(strip) before, now = {t->x, t->out, (REAL *)t->e + t->n * width, t->mask, 0}, next = now;
    next.e = t->e;
    /* A short first strip leaves the others at lines, the last takes what is left of one. */
    int64_t left = t->count, first = (int64_t)(-(uintptr_t)t->out % QKV_LINE) / out_bytes;
    int64_t wanted = first ? first : width - line;
    do {
        before = now;
        now = next;
        next.x += now.count * x_bytes;
        next.out += now.count * out_bytes;
        next.e = before.e;
        next.mask = now.mask ? now.mask + now.count * t->mask_run : NULL;
        next.count = left <= width ? left : wanted;
        wanted = width - line;
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
        for (int64_t i = 0, then; i < t->n; i = then) {
            then = t->n - i < RUN * W ? t->n : i + RUN * W;
            X(give_rows)(t, before, i, then - i, s.inverse);
            X(take_rows)(t, next, i, then - i, next_top);
            REAL *e = now.e + i * width;
            if (then - i < RUN * W)
                X(exp_rows)(then - i, c, e, width, now.count, s.top, s.part, next.x, 0, 0, x_bytes);
            else if (then + RUN * W <= t->n)
                X(exp_rows)(RUN * W, c, e, width, now.count, s.top, s.part, next.x + then * t->x_row * x_bytes,
                            t->x_row * x_bytes, next.count, x_bytes);
            else
                X(exp_rows)(RUN * W, c, e, width, now.count, s.top, s.part, next.x + next.count * x_bytes,
                            t->x_row * x_bytes, left < width ? left : width, x_bytes);
            if (now.count && (then == t->n || then % BLOCK == 0))
                X(end_block)(&s, width);
        }
        if (now.count)
            X(end_strip)(&s, width);
    } while (now.count || next.count);
    if (t->stream)
        X(fence)();
}

/* One term of the sum of p x, and of the gradient. */
static inline VEC X(share_of)(VEC p, VEC x)
{
    VEC zero = X(set1)(0);
    return X(select)(X(equal)(p, zero), zero, X(mul)(p, x));
}

static REAL X(row_shares)(const REAL *p, const REAL *x, int64_t n)
{
    VEC total = X(set1)(0), lost = total;
    for (int64_t i = 0; i < n;) {
        int64_t last = n - i < BLOCK ? n : i + BLOCK;
        VEC sum = X(set1)(0);
        for (; i + W <= last; i += W)
            sum = X(add)(sum, X(share_of)(X(loadu)(p + i), X(loadu)(x + i)));
        if (i < last) {
            int m = (int)(last - i);
            sum = X(add)(sum, X(share_of)(X(load_part)(p + i, m), X(load_part)(x + i, m)));
            i = last;
        }
        total = X(add_block)(total, sum, &lost);
    }
    return X(fold)(total);
}

static void X(softmax_grad_rows)(const qkv_softmax_tile *t)
{
    for (int64_t r = 0, i; r < t->count; r++) {
        const REAL *x = (const REAL *)t->x + r * t->x_row, *p = (const REAL *)t->p + r * t->p_row;
        REAL *out = (REAL *)t->out + r * t->out_row;
        VEC sum = X(set1)(X(row_shares)(p, x, t->n));
        for (i = 0; i + W <= t->n; i += W)
            X(storeu)(out + i, X(share_of)(X(loadu)(p + i), X(sub)(X(loadu)(x + i), sum)));
        if (i < t->n) {
            int m = (int)(t->n - i);
            X(store_part)(out + i, X(share_of)(X(load_part)(p + i, m), X(sub)(X(load_part)(x + i, m), sum)), m);
        }
    }
}

/* A strip of columns after the other, its lines twice. */
static void X(softmax_grad_columns)(const qkv_softmax_tile *t)
{
    const int64_t width = t->strip;
    REAL *state = t->state;
    X(columns) s = {.part = state, .total = state + W * width, .lost = state + 2 * W * width};
    for (int64_t first = 0, count; first < t->count; first += count) {
        const REAL *x = (const REAL *)t->x + first, *p = (const REAL *)t->p + first;
        REAL *out = (REAL *)t->out + first;
        count = t->count - first < width ? t->count - first : width;
        for (int64_t j = 0; j < 3 * W * width; j += W)
            X(store)(state + j, X(set1)(0));
        for (int64_t i = 0; i < t->n; i++, x += t->x_row, p += t->p_row) {
            REAL *part = s.part + i % W * width;
            int64_t j = 0;
            for (; j + W <= count; j += W)
                X(store)(part + j, X(add)(X(load)(part + j), X(share_of)(X(loadu)(p + j), X(loadu)(x + j))));
            if (j < count) {
                int m = (int)(count - j);
                VEC share = X(share_of)(X(load_part)(p + j, m), X(load_part)(x + j, m));
                X(store)(part + j, X(add)(X(load)(part + j), share));
            }
            if ((i + 1) % BLOCK == 0 || i + 1 == t->n)
                X(end_block)(&s, width);
        }
        X(fold_columns)(&s, width);
        x = (const REAL *)t->x + first;
        p = (const REAL *)t->p + first;
        for (int64_t i = 0; i < t->n; i++, x += t->x_row, p += t->p_row, out += t->out_row) {
            int64_t j = 0;
            for (; j + W <= count; j += W)
                X(storeu)(out + j, X(share_of)(X(loadu)(p + j), X(sub)(X(loadu)(x + j), X(load)(s.total + j))));
            if (j < count) {
                int m = (int)(count - j);
                VEC rest = X(sub)(X(load_part)(x + j, m), X(load)(s.total + j));
                X(store_part)(out + j, X(share_of)(X(load_part)(p + j, m), rest), m);
            }
        }
    }
}

#undef EACH
#undef BY_HALF
#undef BYTES
#undef BLOCK
#undef LINE
#undef RUN
