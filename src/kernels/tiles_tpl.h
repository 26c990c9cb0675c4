/* Products of attention, and those of its stages, by a unit that multiplies tiles of bfloat16: 16 rows of A, of 16 pairs of terms
 * each, times 16 rows of pairs of B, of 16 lanes each, added to 16 rows of 16 float32 sums.
 *
 * A number is the sum of TILE_PARTS parts in bfloat16: 1 where it is bfloat16; 2 for float16, which they are exactly; 3 for float32,
 * of 8 bits each, cut off, since rounding up could overflow. A product of numbers is several of parts, all but the smallest, in an
 * order in which neighbours share a factor, the largest last. Weights of float16's values are three parts: with two, or without the
 * product of both second ones, a weight is off by 2^-17 of itself and more, which shows where large values sum to a small result. What
 * is not finite has parts (x, 0, 0), which only the product of first parts may see: infinity times 0 is no part of it. So where a
 * result is not finite, a careful run makes the same sums by rows of registers and leaves these products out, and values of excluded
 * keys too.
 *
 *     Q^T   (TILE_PARTS, terms, LANES) pairs       K    (keys, TILE_PARTS, terms) pairs, where terms are multiples of 16, 0 behind d
 *     P^T   (pairs of keys, LANES) of each part       V^T  (strips, TILE_PARTS, columns, 16): pairs of 32 keys for each column
 *
 * Where there are several parts, pair t of 32 terms is of the terms t and t + 16: in Q and K alike, so sums are the same.
 */
enum { X(tile) = 16 };                /* rows of a tile, pairs in one of A, and lanes */
_Static_assert(W == 16 && STRIP == 32 && LANE_VECTORS == 2, "a strip is a tile of pairs, and two by two tiles of sums");

/* Pairs of parts of A and of B, one after the other. Whatever says how many there are counts these. Stages take scores'. */
typedef struct { unsigned char a, b; } X(parts);
#if TILE_PARTS == 1
static const X(parts) X(score_products)[] = {{0, 0}};
static const X(parts) X(value_products)[] = {{0, 0}};
#elif TILE_PARTS == 2
static const X(parts) X(score_products)[] = {{1, 1}, {0, 1}, {1, 0}, {0, 0}};
static const X(parts) X(value_products)[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}};
#else
static const X(parts) X(score_products)[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
static const X(parts) X(value_products)[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
#endif
enum { X(score_n) = sizeof X(score_products) / sizeof(X(parts)), X(value_n) = sizeof X(value_products) / sizeof(X(parts)) };
enum { X(weight_parts) = TILE_PARTS == 2 ? 3 : TILE_PARTS };

/* Where the tiles of A or B lie: from row to row, to the tile beside it, to the next 32 terms, and to the other parts; elements. */
typedef struct {
    const REAL *at;
    ptrdiff_t row, next, step, part[X(weight_parts)];
} X(tiles);

/* One step of one row of C as the unit makes it: products of even and of odd terms are two sums, each from 0, and their sum is added to
 * C. In a careful run, not `whole`: numbers that are not finite count as 0 unless these are `first` parts, and nothing is taken from
 * terms whose `seen`, of the first parts of B, is -1. */
static QKV_INLINE VEC X(tile_row)(const int whole, const int first, const REAL *a, const REAL *b, ptrdiff_t b_row,
                                  const REAL *seen, VEC c)
{
    VEC zero = X(set1)(0), sum[2] = {zero, zero};
    for (int t = 0; t < X(tile); t++, b += b_row) {
        VEC pair = X(load)(b), seen_pair = seen ? X(load)(seen) : zero, one = X(set1)(a[t]);
        QKV_UNROLL
        for (int i = 0; i < 2; i++) {
            VEC x = i ? X(odd)(one) : X(even)(one), y = i ? X(odd)(pair) : X(even)(pair), next;
            if (!whole && !first) {
                x = X(select)(X(equal)(X(sub)(x, x), zero), x, zero);
                y = X(select)(X(equal)(X(sub)(y, y), zero), y, zero);
            }
            next = X(fma)(x, y, sum[i]);
            sum[i] = !whole && seen ? X(select)(X(less)(i ? X(odd)(seen_pair) : X(even)(seen_pair), zero), sum[i], next) : next;
        }
        seen = seen ? seen + b_row : seen;
    }
    return X(add)(c, X(add)(sum[0], sum[1]));
}

/* C, na by nb tiles, <- the sum over all steps and products. */
static QKV_INLINE void X(multiply_tiles)(const int na, const int nb, const int n, const X(parts) *products, const X(tiles) *a,
                                         const X(tiles) *b, int steps, REAL *c)
{
    TILE_UNIT;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int s = 0; s < steps; s++) {
        QKV_UNROLL
        for (int i = 0; i < n; i++) {
            if (i == 0 || products[i].a != products[i - 1].a) {
                const REAL *from = a->at + s * a->step + a->part[products[i].a];
                TILE_LOAD(4, from, a->row);
                if (na > 1)
                    TILE_LOAD(5, from + a->next, a->row);
            }
            if (i == 0 || products[i].b != products[i - 1].b) {
                const REAL *from = b->at + s * b->step + b->part[products[i].b];
                TILE_LOAD(6, from, b->row);
                if (nb > 1)
                    TILE_LOAD(7, from + b->next, b->row);
            }
            TILE_MULTIPLY(0, 4, 6);
            if (nb > 1)
                TILE_MULTIPLY(1, 4, 7);
            if (na > 1)
                TILE_MULTIPLY(2, 5, 6);
            if (na > 1 && nb > 1)
                TILE_MULTIPLY(3, 5, 7);
        }
    }
    TILE_STORE(0, c, LANES);
    if (nb > 1)
        TILE_STORE(1, c + W, LANES);
    if (na > 1)
        TILE_STORE(2, c + 16 * LANES, LANES);
    if (na > 1 && nb > 1)
        TILE_STORE(3, c + 16 * LANES + W, LANES);
}

static QKV_INLINE void X(multiply_some)(int na, int nb, const int n, const X(parts) *products, const X(tiles) *a, const X(tiles) *b,
                                        int steps, REAL *c)
{
    if (na > 1 && nb > 1)
        X(multiply_tiles)(2, 2, n, products, a, b, steps, c);
    else if (na > 1)
        X(multiply_tiles)(2, 1, n, products, a, b, steps, c);
    else if (nb > 1)
        X(multiply_tiles)(1, 2, n, products, a, b, steps, c);
    else
        X(multiply_tiles)(1, 1, n, products, a, b, steps, c);
}

static QKV_NOINLINE void X(multiply_scores)(int na, int nb, const X(tiles) *a, const X(tiles) *b, int steps, REAL *c)
{
    X(multiply_some)(na, nb, X(score_n), X(score_products), a, b, steps, c);
}

/* The same sums of one row of A and one vector of lanes, in a careful run. */
static QKV_INLINE VEC X(careful_row)(const int n, const X(parts) *products, const X(tiles) *a, const X(tiles) *b, int steps, int seen)
{
    VEC c = X(set1)(0);
    for (int s = 0; s < steps; s++) {
        const REAL *from = b->at + s * b->step;
        for (int i = 0; i < n; i++)
            c = X(tile_row)(0, products[i].a + products[i].b == 0, a->at + s * a->step + a->part[products[i].a],
                            from + b->part[products[i].b], b->row, seen ? from + b->part[0] : NULL, c);
    }
    return c;
}

/* Rows of K, n long with all their parts, and Q^T of as many. */
static QKV_INLINE X(tiles) X(rows_of)(const REAL *at, ptrdiff_t row, int n)
{
    X(tiles) a = {at, row, 16 * row, 16, {0}};
    for (int p = 1; p < TILE_PARTS; p++)
        a.part[p] = p * (n / TILE_PARTS);
    return a;
}

static QKV_INLINE X(tiles) X(lanes_of)(const REAL *at, int n)
{
    X(tiles) b = {at, LANES, W, 16 * LANES, {0}};
    for (int p = 1; p < TILE_PARTS; p++)
        b.part[p] = (ptrdiff_t)p * (n / TILE_PARTS) * LANES;
    return b;
}

/* Rows first .. last of K Q^T, of one strip. Rows of K behind them are read as well, and what these give is in S, up to whole tiles. */
static QKV_NOINLINE void X(score_keys)(int nv, const qkv_tile *t, int first, int last)
{
    const int steps = t->d / TILE_PARTS / 16;
    const REAL *k = t->k, *q = t->q;
    REAL *s = (REAL *)t->s + (ptrdiff_t)first * LANES;
    if (TILE_PARTS > 1 && t->careful) {
        for (int i = first; i < last; i++, s += LANES)
            for (int j = 0; j < nv; j++) {
                X(tiles) a = X(rows_of)(k + i * t->k_row, t->k_row, t->d), b = X(lanes_of)(q + j * W, t->d);
                X(store)(s + j * W, X(careful_row)(X(score_n), X(score_products), &a, &b, steps, 0));
            }
        return;
    }
    X(tiles) a = X(rows_of)(k + first * t->k_row, t->k_row, t->d), b = X(lanes_of)(q, t->d);
    X(multiply_scores)(last - first > 16 ? 2 : 1, nv, &a, &b, steps, s);
}

/* Pairs of the n parts of x and y. Of weights all are finite, or are all NaN; others may not be. */
static QKV_INLINE void X(split)(const int n, const int weights, VEC x, VEC y, VEC pair[])
{
    VEC zero = X(set1)(0);
    if (TILE_PARTS == 3 && !weights) {     /* a NaN whose last bits are cut off would be infinity, unless it is quiet */
        x = X(add)(x, zero);
        y = X(add)(y, zero);
    }
    QKV_UNROLL
    for (int p = 0; p < n; p++) {
        pair[p] = TILE_PARTS == 3 ? X(cut)(x, y) : X(join)(x, y);
        if (p + 1 == n)
            break;
        VEC a = X(even)(pair[p]), b = X(odd)(pair[p]);
        x = X(sub)(x, a);
        y = X(sub)(y, b);
        if (!weights) {
            x = X(select)(X(equal)(X(sub)(a, a), zero), x, zero);
            y = X(select)(X(equal)(X(sub)(b, b), zero), y, zero);
        }
    }
}

/* P takes the place of S. Of several parts, the first two of a pair of keys lie where its scores were, and the third behind all. */
enum { X(weight_row) = (TILE_PARTS > 1 ? 2 : 1) * LANES };

static QKV_INLINE X(tiles) X(weights_of)(const qkv_tile *t, int j)
{
    X(tiles) b = {(const REAL *)t->s + j * W, X(weight_row), W, 16 * X(weight_row), {0}};
    for (int p = 1; p < X(weight_parts); p++)
        b.part[p] = p == 1 ? LANES : (ptrdiff_t)(t->nk + STRIP - 1) / STRIP * STRIP * LANES;
    return b;
}

/* The weights of keys i and i + 1 of vector j. */
static QKV_INLINE void X(put_weights)(const qkv_tile *t, int i, int j, VEC x, VEC y)
{
    X(tiles) b = X(weights_of)(t, j);
    REAL *to = (REAL *)b.at + i / 2 * b.row;
    VEC pair[X(weight_parts)];
    X(split)(X(weight_parts), 1, x, y, pair);
    QKV_UNROLL
    for (int p = 0; p < X(weight_parts); p++)
        X(store)(to + b.part[p], pair[p]);
}

static QKV_INLINE X(tiles) X(columns_of)(const qkv_tile *t, int i)
{
    X(tiles) a = {(const REAL *)t->v + i * 16, 16, 256, 16 * t->v_row, {0}};
    for (int p = 1; p < TILE_PARTS; p++)
        a.part[p] = p * (t->v_row / TILE_PARTS) * 16;
    return a;
}

/* Behind the last pair of keys, up to whole strips; returns how many these are. */
static QKV_INLINE int X(fill_weights)(int nv, const qkv_tile *t, REAL weight)
{
    const int strips = (t->nk + STRIP - 1) / STRIP;
    for (int i = (t->nk + 1) / 2 * 2; i < strips * STRIP; i += 2)
        for (int j = 0; j < nv; j++)
            X(put_weights)(t, i, j, X(set1)(weight), X(set1)(weight));
    return strips;
}

/* O^T <- alpha O^T + V^T P^T. */
static QKV_NOINLINE void X(value)(int nv, const qkv_tile *t, const REAL *alpha)
{
    QKV_ALIGN REAL c[2 * X(tile)][LANES];
    const int strips = X(fill_weights)(nv, t, 0);
    X(tiles) b = X(weights_of)(t, 0);
    for (int i = 0; i < t->dv; i += 2 * X(tile)) {
        X(tiles) a = X(columns_of)(t, i);
        int n = t->dv - i < 2 * X(tile) ? t->dv - i : 2 * X(tile);
        X(multiply_some)(n > X(tile) ? 2 : 1, nv, X(value_n), X(value_products), &a, &b, strips, c[0]);
        for (int j = 0; j < nv; j++) {
            VEC factor = X(load)(alpha + j * W);
            for (int r = 0; r < n; r++) {
                REAL *o = (REAL *)t->o + (ptrdiff_t)(i + r) * LANES + j * W;
                X(store)(o, X(fma)(factor, X(load)(o), X(load)(c[r] + j * W)));
            }
        }
    }
}

/* The same where V or a weight may be NaN or infinite: an excluded key's V is not multiplied at all. One vector of lanes. */
static void X(value_careful)(const qkv_tile *t, const REAL *alpha)
{
    const int strips = X(fill_weights)(1, t, -1);
    X(tiles) b = X(weights_of)(t, 0);
    for (int i = 0; i < t->dv; i++) {
        X(tiles) a = X(columns_of)(t, i);
        REAL *o = (REAL *)t->o + (ptrdiff_t)i * LANES;
        VEC c = X(careful_row)(X(value_n), X(value_products), &a, &b, strips, 1);
        X(store)(o, X(fma)(X(load)(alpha), X(load)(o), c));
    }
}

/* Products of tiles that are already there: the rate of the unit, whatever their parts are. */
static double X(tile_rounds)(int64_t rounds, double *flops)
{
    QKV_ALIGN REAL c[X(tile) * W];
    for (int i = 0; i < X(tile); i++)
        X(store)(c + i * W, X(set1)(0));
    TILE_CONFIGURE();
    TILE_UNIT;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    TILE_LOAD(4, c, W);
    TILE_LOAD(5, c, W);
    TILE_LOAD(6, c, W);
    TILE_LOAD(7, c, W);
    for (int64_t t = 0; t < rounds; t++) {
        TILE_MULTIPLY(0, 4, 6);
        TILE_MULTIPLY(1, 4, 7);
        TILE_MULTIPLY(2, 5, 6);
        TILE_MULTIPLY(3, 5, 7);
    }
    TILE_STORE(0, c, W);
    TILE_RELEASE();
    *flops = 4.0 * 2 * 16 * 16 * 32 * (double)rounds;
    return (double)c[0];
}

static void X(begin_tiles)(void) { TILE_CONFIGURE(); }
static void X(end_tiles)(void) { TILE_RELEASE(); }
