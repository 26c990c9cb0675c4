/* What bounds scores of keys of signed bytes and queries of int16. Plain loops: what they become is the compiler's business,
 * which knows the pairs of products that the path has, and takes a third of the instructions that floats would. Indices are as
 * wide as addresses: where ints may wrap (Python is built with -fwrapv) compilers do not see that elements lie side by side.
 */
enum { X(bytes_rows) = 4 };              /* that meet a row of bytes while it is in registers */

static QKV_INLINE void X(dot_bytes)(const int8_t *key, const int16_t *q, ptrdiff_t dim, const int rows, int32_t *to)
{
    int32_t sum[X(bytes_rows)] = {0};
    for (ptrdiff_t d = 0; d < dim; d++) {
        int16_t k = key[d];
        sum[0] += q[d] * k;
        if (rows > 1) {
            sum[1] += q[dim + d] * k;
            sum[2] += q[2 * dim + d] * k;
            sum[3] += q[3 * dim + d] * k;
        }
    }
    for (int r = 0; r < rows; r++)
        to[r * QKV_BYTES_GROUP] = sum[r];
}

/* The largest of a group, which is overwritten. */
static QKV_INLINE float X(largest_bytes)(float *x)
{
    for (int i = 0; i < 16; i++)
        x[i] = x[i] > x[i + 16] ? x[i] : x[i + 16];
    for (int i = 0; i < 8; i++)
        x[i] = x[i] > x[i + 8] ? x[i] : x[i + 8];
    for (int i = 0; i < 4; i++)
        x[i] = x[i] > x[i + 4] ? x[i] : x[i + 4];
    float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}

static QKV_INLINE void X(bound_group)(const qkv_bytes *c, const int8_t *keys, const float *step, int count, ptrdiff_t group,
                                      ptrdiff_t row, const int rows)
{
    int32_t product[X(bytes_rows) * QKV_BYTES_GROUP];
    float scale[QKV_BYTES_GROUP];
    if (count < QKV_BYTES_GROUP) {    /* only then: it takes as long as some keys */
        memset(product, 0, sizeof product);
        memset(scale, 0, sizeof scale);
    }
    int done = 0;
#if BYTES_BY_PAIRS
    for (; rows == X(bytes_rows) && done + 2 <= count; done += 2)
        X(dot_two)(keys + done * c->key_row, c->key_row, c->queries + row * c->dim, c->dim, product + done);
#endif
    for (int i = done; i < count; i++)
        X(dot_bytes)(keys + i * c->key_row, c->queries + row * c->dim, c->dim, rows, product + i);
    for (int i = 0; i < count; i++)   /* last, as they lie in memory */
        memcpy(&scale[i], keys + i * c->key_row + c->at_scale, sizeof *scale);
    for (int r = 0; r < rows; r++) {
        const int32_t *of = product + r * QKV_BYTES_GROUP;
        float factor = c->factor[row + r], reach = c->reach[row + r], low[QKV_BYTES_GROUP], high[QKV_BYTES_GROUP];
        float *up = c->up + (row + r) * c->up_row + group * QKV_BYTES_GROUP;
        for (int i = 0; i < QKV_BYTES_GROUP; i++) {
            float x = (float)of[i] * (scale[i] * factor), off = step[i] * reach;
            high[i] = x + off;
            low[i] = x - off;
        }
        for (int i = count; i < QKV_BYTES_GROUP; i++)
            high[i] = low[i] = -INFINITY;
        memcpy(up, high, sizeof high);
        float least = X(largest_bytes)(low);
        c->top[(row + r) * (c->up_row / QKV_BYTES_GROUP) + group] = X(largest_bytes)(high);
        c->low[row + r] = least > c->low[row + r] ? least : c->low[row + r];
    }
}

/* Sums do not overflow. */
static QKV_NOINLINE void X(bound_bytes)(const qkv_bytes *c)
{
    for (ptrdiff_t group = 0; group * QKV_BYTES_GROUP < c->n; group++) {
        ptrdiff_t first = group * QKV_BYTES_GROUP, row = 0;
        int count = (int)(c->n - first < QKV_BYTES_GROUP ? c->n - first : QKV_BYTES_GROUP);
        const int8_t *keys = c->keys + first * c->key_row;
        float step[QKV_BYTES_GROUP];
        if (count < QKV_BYTES_GROUP)
            memset(step, 0, sizeof step);
        memcpy(step, c->step + first, (size_t)count * sizeof *step);
        for (; row + X(bytes_rows) <= c->rows; row += X(bytes_rows))
            X(bound_group)(c, keys, step, count, group, row, X(bytes_rows));
        for (; row < c->rows; row++)
            X(bound_group)(c, keys, step, count, group, row, 1);
    }
}
