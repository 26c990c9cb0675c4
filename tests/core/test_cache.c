/* Rows of numbers to rows of a quantised cache and back, every array a block of exactly its bytes: no number is off by more
 * than its type allows. Bits are the business of tests/cache/test_cache_types.py. */
#include "check.h"

static int64_t row_bytes(qkv_type stored, int64_t dim)
{
    return stored == QKV_I8 ? (dim + 3) / 4 * 4 + 4 : (dim + 31) / 32 * 18;
}

/* The largest error of elements that share a scale with number e of a row: half a step of I8, where quotients of 127 steps
 * are rounded to 2^-18 of one, or a whole one of I4, whose scale is rounded up. */
static double allowed(qkv_type type, qkv_type stored, const void *x, int64_t row, int64_t step, int64_t e, int64_t dim)
{
    int64_t first = stored == QKV_I8 ? 0 : e / 32 * 32, end = stored == QKV_I8 || first + 32 > dim ? dim : first + 32;
    double most = 0;
    for (int64_t i = first; i < end; i++) {             /* fmax here is an internal error of gcc 12 for aarch64 */
        double size = fabs(load(type, x, row + i * step));
        most = size > most ? size : most;
    }
    return stored == QKV_I8 ? most / 254 * (1 + 0x1p-15) : most / 8 * (1 + 1.0 / 128);
}

static void test_rows(int isa, qkv_type type, qkv_type stored, int64_t heads, int64_t tokens, int64_t dim)
{
    enum { SEQUENCES = 2 };
    int64_t size = size_of(type), bytes = row_bytes(stored, dim), step = between(1, 3), rows = SEQUENCES * heads * tokens;
    int64_t x_row = (dim - 1) * step + 1;
    void *x = uniform(type, rows * x_row);
    char *made = block(rows * bytes);
    float *back = block(rows * dim * 4);
    qkv_storage s = {
        .type = type, .stored = stored, .isa = isa, .count = {SEQUENCES, heads, tokens}, .dim = dim, .x_step = step * size,
        .x_at = {heads * tokens * x_row * size, tokens * x_row * size, x_row * size},
        .rows_at = {heads * tokens * bytes, bytes, heads * bytes},             /* tokens before heads */
    };
    s.turn = -1;
    qkv_quantise(&s, x, made);
    qkv_dequantise(&s, made, back);
    for (int64_t i = 0; i < rows * dim; i++) {
        int64_t row = i / dim * x_row, e = i % dim;
        double error = fabs(back[i] - load(type, x, row + e * step)), most = allowed(type, stored, x, row, step, e, dim);
        CHECK(error <= most, "element %lld of a row of %lld is off by %g, not %g", (long long)e, (long long)dim, error, most);
    }
    free(x);
    free(made);
    free(back);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F32; type <= QKV_F64; type++)
            for (qkv_type stored = QKV_I8; stored <= QKV_I4; stored++) {
                for (int64_t dim = 1; dim <= 130; dim++)
                    test_rows(isa, type, stored, between(1, 3), between(0, 4), dim);
                test_rows(isa, type, stored, 1, 1, QKV_MAX_DIM);
            }
    printf("test_cache: %ld checks\n", checks);
    return 0;
}
