/* The stages in every CPU path, against plain loops in double: products, softmax and rotary positions of random shapes and
 * strides, one thread against three, an interrupt, failing allocations. Run under the sanitizers: every array is a block of exactly its size. */
#include "check.h"

static double tolerance(qkv_type type) { return type == QKV_F32 ? 1e-5 : 1e-13; }

/* A (heads, rows, terms) * B (heads_b, terms, columns) or its transpose, with random gaps between rows of A. */
static void test_product(int isa, qkv_type type, int64_t heads_b, int64_t group, int64_t rows, int64_t terms, int64_t columns,
                         int transposed)
{
    int64_t size = size_of(type), gap = between(0, 3), heads = heads_b * group, n = heads * rows * columns;
    int64_t a_row = terms + gap, b_rows = transposed ? columns : terms, b_dim = transposed ? terms : columns;
    void *a = uniform(type, heads * rows * a_row), *b = uniform(type, heads_b * b_rows * b_dim), *c = block(n * size);
    void *again = block(n * size);
    const double scale = (double[]){-0.5, 0.5, 1}[between(0, 2)];      /* few rows of some are planned otherwise */
    qkv_counters counters = {0};
    qkv_product_problem p = {
        .type = type, .b_type = type, .c_type = type, .transposed = transposed, .heads = heads, .heads_b = heads_b, .rows = rows,
        .terms = terms, .columns = columns, .a = a, .b = b, .c = c, .scale = scale, .tiles = 1, .threads = 1, .isa = isa,
        .a_at = {.head = rows * a_row * size, .row = a_row * size, .dim = size},
        .b_at = {.head = b_rows * b_dim * size, .row = b_dim * size, .dim = size},
        .c_at = {.head = rows * columns * size, .row = columns * size, .dim = size}, .counters = &counters,
    };
    CHECK(qkv_product(&p) == QKV_OK, "product");
    for (int64_t i = 0; i < n; i++) {
        int64_t column = i % columns, row = i / columns % rows, head = i / columns / rows;
        double sum = 0;
        for (int64_t e = 0; e < terms; e++) {
            int64_t at = head / group * b_rows * b_dim + (transposed ? column * b_dim + e : e * b_dim + column);
            sum += load(type, a, (head * rows + row) * a_row + e) * load(type, b, at);
        }
        double error = fabs(load(type, c, i) - scale * sum);
        CHECK(error <= tolerance(type) * (double)(terms + 1), "element %lld is off by %g", (long long)i, error);
    }
    p.threads = 3;
    p.c = again;
    counters.tiles_copied = 0;
    CHECK(qkv_product(&p) == QKV_OK && !memcmp(c, again, (size_t)(n * size)), "three threads: other bits");
    qkv_stage_report report;
    CHECK(qkv_explain_product(&p, &report) == QKV_OK, "report");
    CHECK(report.parts || counters.tiles_copied == 0, "rows with gaps were copied");
    CHECK(report.counts.tiles_copied == counters.tiles_copied, "%lld copies", (long long)counters.tiles_copied);
    free(a);
    free(b);
    free(c);
    free(again);
}

/* Room for b as it is packed, from a cache line on. */
static char *packed_room(const qkv_product_problem *p, void **memory)
{
    int64_t bytes = -1;
    CHECK(qkv_packed_bytes(p, &bytes) == QKV_OK && bytes >= 0, "packed bytes");
    *memory = block(bytes + 64);
    return (char *)*memory + (64 - (uintptr_t)*memory % 64) % 64;
}

/* A linear layer: X (rows, terms) * W (columns, terms) transposed + b, the same for each row; then of packed weights. */
static APART void test_layer(int isa, qkv_type type, int64_t rows, int64_t terms, int64_t columns)
{
    int64_t size = size_of(type), n = rows * columns;
    void *x = uniform(type, rows * terms), *w = uniform(type, columns * terms), *b = uniform(type, columns), *memory;
    void *y = block(n * size), *again = block(n * size);
    qkv_product_problem p = {
        .type = type, .b_type = type, .c_type = type, .added_type = type, .transposed = 1, .heads = 1, .heads_b = 1, .rows = rows,
        .terms = terms, .columns = columns, .a = x, .b = w, .c = y, .added = b, .scale = 1, .threads = 1, .isa = isa,
        .a_at = {.row = terms * size, .dim = size}, .b_at = {.row = terms * size, .dim = size},
        .c_at = {.row = columns * size, .dim = size}, .added_at = {.dim = size},
    };
    CHECK(qkv_product(&p) == QKV_OK, "linear");
    for (int64_t i = 0; i < n; i++) {
        double sum = load(type, b, i % columns);
        for (int64_t e = 0; e < terms; e++)
            sum += load(type, x, i / columns * terms + e) * load(type, w, i % columns * terms + e);
        double error = fabs(load(type, y, i) - sum);
        CHECK(error <= tolerance(type) * (double)(terms + 1), "element %lld is off by %g", (long long)i, error);
    }
    for (p.threads = 1; p.threads <= 3; p.threads += 2) {
        char *packed = packed_room(&p, &memory);
        CHECK(qkv_pack(&p, packed) == QKV_OK, "pack");
        p.packed = packed;
        p.b = NULL;
        p.c = again;
        CHECK(qkv_product(&p) == QKV_OK && !memcmp(y, again, (size_t)(n * size)), "packed, %d threads: other bits", p.threads);
        p.packed = NULL;
        p.b = w;
        free(memory);
    }
    free(x);
    free(w);
    free(b);
    free(y);
    free(again);
}

static void test_layers(int isa, qkv_type type)
{
    for (int i = 0; i < share_of(20); i++)
        test_layer(isa, type, between(1, 40), between(0, 40), between(1, 110));
    test_layer(isa, type, 3, 1100, 130);
}

/* The middle axis of (outer, n, inner), with a mask, or without and in place. */
static void test_softmax(int isa, qkv_type type, int64_t outer, int64_t n, int64_t inner, int masked)
{
    int64_t size = size_of(type), total = outer * n * inner;
    void *x = uniform(type, total), *out = masked ? block(total * size) : x, *before = block(total * size);
    char *mask = block(total);
    memcpy(before, x, (size_t)(total * size));
    for (int64_t i = 0; i < total; i++)
        mask[i] = masked ? (char)between(0, 1) : 1;
    qkv_softmax_problem p = {
        .type = type, .out_type = type, .n_axes = 2, .axes = {outer, inner}, .x_at = {n * inner * size, size}, .with_at = {n * inner, 1},
        .out_at = {n * inner * size, size}, .n = n, .x_step = inner * size, .with_step = inner, .out_step = inner * size,
        .x = x, .mask = masked ? mask : NULL, .out = out, .threads = 1, .isa = isa,
    };
    CHECK(qkv_softmax(&p) == QKV_OK, "softmax");
    for (int64_t i = 0; i < total; i++) {
        int64_t first = i / inner / n * n * inner + i % inner;
        double sum = 0;
        for (int64_t e = 0; e < n; e++)
            sum += mask[first + e * inner] ? exp(load(type, before, first + e * inner)) : 0;
        double error = fabs(load(type, out, i) - (mask[i] ? exp(load(type, before, i)) / sum : 0));
        CHECK(error <= tolerance(type), "element %lld is off by %g", (long long)i, error);
    }
    void *again = block(total * size);
    p.x = before;
    p.out = again;
    p.threads = 3;
    CHECK(qkv_softmax(&p) == QKV_OK && !memcmp(out, again, (size_t)(total * size)), "three threads: other bits");
    if (!masked) {                    /* the gradient for dP = `before`, whose weights lie in `out`: in place of one and of the other */
        void *weights = block(total * size);
        memcpy(weights, out, (size_t)(total * size));
        p.p = p.out = weights;
        p.p_type = type;
        p.with_at[0] = p.x_at[0];
        p.with_at[1] = p.x_at[1];
        p.with_step = p.x_step;
        CHECK(qkv_softmax(&p) == QKV_OK, "softmax_grad");
        for (int64_t i = 0; i < total; i++) {
            int64_t first = i / inner / n * n * inner + i % inner;
            double sum = 0;
            for (int64_t e = 0; e < n; e++)
                sum += load(type, out, first + e * inner) * load(type, before, first + e * inner);
            double error = fabs(load(type, weights, i) - load(type, out, i) * (load(type, before, i) - sum));
            CHECK(error <= tolerance(type), "element %lld of the gradient is off by %g", (long long)i, error);
        }
        memcpy(again, before, (size_t)(total * size));
        p.x = p.out = again;
        p.p = out;
        p.threads = 1;
        CHECK(qkv_softmax(&p) == QKV_OK && !memcmp(weights, again, (size_t)(total * size)), "one thread: other bits");
        free(weights);
    }
    if (masked)
        free(out);
    free(x);
    free(before);
    free(again);
    free(mask);
}

/* (2, heads, rows, dim), or with heads and rows exchanged in memory, random gaps between rows of x; positions of both sequences. */
static APART void test_rotation(int isa, qkv_type type, int64_t heads, int64_t rows, int64_t dim, int64_t pairs, int neighbours,
                                int by_token, int in_place)
{
    int64_t size = size_of(type), row = dim + (in_place ? 0 : between(0, 3)), n = 2 * heads * rows, tables = 2 * rows * pairs;
    int64_t head_at = by_token ? 1 : rows, row_at = by_token ? heads : 1;
    void *x = uniform(type, n * row), *out = in_place ? x : block(n * dim * size), *before = block(n * row * size);
    void *cosines = block(tables * size), *sines = block(tables * size), *again = block(n * dim * size);
    int64_t *positions = block(2 * rows * 8);
    double *frequencies = block(pairs * 8);
    memcpy(before, x, (size_t)(n * row * size));
    for (int64_t i = 0; i < 2 * rows; i++)
        positions[i] = between(-1000000, 1000000);
    for (int64_t i = 0; i < pairs; i++)
        frequencies[i] = (double)between(1, 1000) / 1000;
    qkv_angles_problem angles = {
        .type = type, .rows = 2 * rows, .pairs = pairs, .positions = positions, .frequencies = frequencies, .factor = 0.5,
        .cos = cosines, .sin = sines, .threads = 2,
    };
    CHECK(qkv_angles(&angles) == QKV_OK, "angles");
    for (int64_t i = 0; i < tables; i++) {
        double angle = (double)positions[i / pairs] * frequencies[i % pairs], eps = type == QKV_F32 ? 4e-8 : 1e-16;
        CHECK(fabs(load(type, cosines, i) - cos(angle) / 2) <= eps && fabs(load(type, sines, i) - sin(angle) / 2) <= eps, "angle %g", angle);
    }
    qkv_counters counters = {0};
    qkv_rotation_problem p = {
        .type = type, .out_type = type, .neighbours = neighbours, .n_axes = 1, .axes = {2}, .heads = heads, .rows = rows, .dim = dim,
        .pairs = pairs, .x = x, .out = out, .cos = cosines, .sin = sines, .threads = 1, .isa = isa, .counters = &counters,
        .x_at = {.axis = {heads * rows * row * size}, .head = head_at * row * size, .row = row_at * row * size, .dim = size},
        .out_at = {.axis = {heads * rows * dim * size}, .head = head_at * dim * size, .row = row_at * dim * size, .dim = size},
        .table_at = {.axis = {rows * pairs * size}, .row = pairs * size, .dim = size},
    };
    CHECK(qkv_rotate(&p) == QKV_OK && counters.tiles_copied == 0, "rotate");
    for (int64_t i = 0; i < n * dim; i += n > 50000 ? 7 : 1) {
        int64_t e = i % dim, r = i / dim, in_sequence = r % (heads * rows);
        int64_t token = r / (heads * rows) * rows + (by_token ? in_sequence / heads : in_sequence % rows);
        double expected = load(type, before, r * row + e);
        if (e < 2 * pairs) {
            int64_t pair = neighbours ? e / 2 : e % pairs, second = neighbours ? e % 2 : e >= pairs, apart = neighbours ? 1 : pairs;
            double other = load(type, before, r * row + (second ? e - apart : e + apart)), c = load(type, cosines, token * pairs + pair);
            double s = load(type, sines, token * pairs + pair);
            expected = expected * c + (second ? other * s : -other * s);
        }
        double error = fabs(load(type, out, i) - expected);
        CHECK(e < 2 * pairs ? error <= tolerance(type) : error == 0, "element %lld is off by %g", (long long)i, error);
    }
    p.x = before;
    p.out = again;
    p.threads = 3;
    CHECK(qkv_rotate(&p) == QKV_OK && !memcmp(out, again, (size_t)(n * dim * size)), "three threads: other bits");
    p.dim = INT32_MAX;
    CHECK(qkv_rotate(&p) == QKV_OVERFLOW, "a row too long");
    if (!in_place)
        free(out);
    free(x);
    free(before);
    free(again);
    free(cosines);
    free(sines);
    free(positions);
    free(frequencies);
}

static void test_random(int isa, qkv_type type)
{
    for (int i = 0; i < share_of(60); i++) {
        test_product(isa, type, between(1, 2), between(1, 3), between(1, 40), between(0, 40), between(1, 110), i % 2);
        if (i % 6 < 2)                /* more rows than few: tiles, where there are some */
            test_product(isa, type, 1, between(1, 2), between(65, 140), between(0, 70), between(1, 110), i % 2);
        test_softmax(isa, type, between(1, 3), between(1, 70), between(1, 70), i % 2);
        test_softmax(isa, type, between(1, 20), between(1, 150), 1, i % 2);
        int64_t pairs = between(0, 40);
        test_rotation(isa, type, between(1, 5), between(1, 60), 2 * pairs + between(i % 3 == 0, 9), pairs, i % 2, i / 2 % 2, i / 4 % 2);
    }
    for (int transposed = 0; transposed < 2; transposed++)
        test_product(isa, type, 3, 1, 90, 1100, 130, transposed);
    test_softmax(isa, type, 1, 2100, 20, 0);
    for (int by_token = 0; by_token < share_of(2) && type == QKV_F32; by_token++)
        test_rotation(isa, type, 3, 11000, 128, 60, by_token, by_token, 0);      /* whose result goes past the caches */
}

static int interrupt(void *count) { return ++*(int *)count >= 2; }

static void test_interrupt(void)
{
    int64_t n = 4096;
    int count = 0, isa = 0;
    while (qkv_isa_name(isa + 1))
        isa++;                                          /* the slowest: long enough for two looks */
    void *a = calloc((size_t)(n * n), 8), *c = block(n * n * 8);     /* 16 million random numbers take an emulator half a minute */
    qkv_product_problem p = {
        .type = QKV_F64, .b_type = QKV_F64, .c_type = QKV_F64, .heads = 1, .heads_b = 1, .rows = n, .terms = n, .columns = n, .a = a, .b = a,
        .c = c, .scale = 1, .threads = 2, .isa = isa, .interrupted = interrupt, .interrupted_arg = &count,
        .a_at = {.row = n * 8, .dim = 8}, .b_at = {.row = n * 8, .dim = 8}, .c_at = {.row = n * 8, .dim = 8},
    };
    CHECK(qkv_product(&p) == QKV_INTERRUPTED && count == 2, "%d looks", count);
    free(a);
    free(c);
}

static APART void test_failing_allocations(void)
{
    void *x = uniform(QKV_F32, 400 * 400);
    qkv_softmax_problem p = {
        .type = QKV_F32, .n_axes = 1, .axes = {400}, .x_at = {1600}, .out_at = {1600}, .n = 400, .x_step = 4, .out_step = 4,
        .x = x, .out = x, .threads = 3,
    };
    qkv_status status = QKV_NO_MEMORY;
    int64_t k = 0;
    for (; status != QKV_OK; k++) {
        qkv_trim();
        qkv_fail_allocation(k);
        status = qkv_softmax(&p);
        CHECK(status == (qkv_allocations() > k ? QKV_NO_MEMORY : QKV_OK), "allocation %lld: %d", (long long)k, status);
    }
    CHECK(k >= 4, "three workers: %lld allocations", (long long)k - 1);
    qkv_fail_allocation(-1);
    free(x);
}

/* Packing, and a product of packed weights: three workers each. */
static APART void test_failing_allocations_of_layers(void)
{
    int64_t n = 600;
    void *x = uniform(QKV_F32, n * n), *y = block(n * n * 4), *memory;
    qkv_product_problem p = {
        .type = QKV_F32, .b_type = QKV_F32, .c_type = QKV_F32, .transposed = 1, .heads = 1, .heads_b = 1, .rows = n, .terms = n,
        .columns = n, .a = x, .b = x, .c = y, .scale = 1, .threads = 3, .a_at = {.row = n * 4, .dim = 4},
        .b_at = {.row = n * 4, .dim = 4}, .c_at = {.row = n * 4, .dim = 4},
    };
    char *packed = packed_room(&p, &memory);
    for (int apply = 0; apply < 2; apply++) {
        qkv_status status = QKV_NO_MEMORY;
        int64_t k = 0;
        p.packed = apply ? packed : NULL;
        for (; status != QKV_OK; k++) {
            qkv_trim();
            qkv_fail_allocation(k);
            status = apply ? qkv_product(&p) : qkv_pack(&p, packed);
            CHECK(status == (qkv_allocations() > k ? QKV_NO_MEMORY : QKV_OK), "allocation %lld: %d", (long long)k, status);
        }
        CHECK(k >= 2, "%lld allocations", (long long)k - 1);
    }
    qkv_fail_allocation(-1);
    free(x);
    free(y);
    free(memory);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F32; type <= QKV_F64; type++)
            test_random(isa, type);
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F32; type <= QKV_F64; type++)
            test_layers(isa, type);
    test_interrupt();
    test_failing_allocations();
    test_failing_allocations_of_layers();
    qkv_pool_stop();
    qkv_trim();
    printf("test_stages: %ld checks passed\n", checks);
    return 0;
}
