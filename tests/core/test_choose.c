/* Keys that are left out: whatever weights are within their factors, those of all others are no more than is said. */
#include "check.h"

static float in(double low, double high) { return (float)(low + (high - low) * (double)(draw() % 1000003) / 1000003); }

static APART void check_choice(int64_t sequences, int64_t heads, int64_t rows, int64_t len, double spread, double off)
{
    int64_t all = sequences * heads * rows, bytes = between(1, 90);
    float *weights = block(all * len * 4), *given = block(all * len * 4), *reach = block(all * 4), *slack = block(all * 4);
    float *steps = block(sequences * heads * len * 4), *left = block(all * 4);
    int64_t *keys = block(sequences * heads * len * 8), *count = block(sequences * heads * 8), *length = block(sequences * 8);
    for (int64_t i = 0; i < all * len; i++)
        given[i] = weights[i] = draw() % 5 ? expf(in(-spread, 0)) : 0;
    for (int64_t i = 0; i < all; i++) {
        reach[i] = in(0, off);
        slack[i] = in(0, 0.1);
    }
    for (int64_t i = 0; i < sequences * heads * len; i++)
        steps[i] = in(0, 1);
    for (int64_t i = 0; i < sequences; i++)
        length[i] = i ? between(0, len) : len;
    qkv_choice c = {
        .sequences = sequences, .heads = heads, .rows = rows, .len_k = len, .weights = weights, .reach = reach, .slack = slack,
        .steps = steps, .steps_at = {heads * len * 4, len * 4}, .length = length, .tolerance = exp(in(-10, -0.5)),
        .keys = keys, .count = count, .left = left, .threads = 3,
    };
    qkv_trim();
    qkv_fail_allocation(0);
    CHECK(qkv_choose(&c) == (all * len > 0 ? QKV_NO_MEMORY : QKV_OK), "no memory");
    qkv_fail_allocation(-1);
    CHECK(qkv_choose(&c) == QKV_OK, "choice");
    for (int64_t head = 0; head < sequences * heads; head++) {
        int64_t n = length[head / heads];
        CHECK(0 <= count[head] && count[head] <= n, "count %lld", (long long)count[head]);
        for (int64_t r = head * rows; r < (head + 1) * rows; r++) {
            double read = 0, others = 0;                /* the worst that may be: those that are read weigh little, the others much */
            for (int64_t j = 0, next = 0; j < n; j++) {
                double factor = exp2((double)reach[r] * steps[head * len + j] + slack[r]), w = given[r * len + j];
                int chosen = next < count[head] && keys[head * len + next] == j;
                next += chosen;
                read += chosen ? w / factor : 0;
                others += chosen ? 0 : w * factor;
                CHECK(w == 0 || (weights[r * len + j] < 0) == chosen, "sign of key %lld", (long long)j);
            }
            CHECK(others <= left[r] * (read + others) * (1 + 1e-6) + 1e-30, "row %lld: %g of %g", (long long)r, others, read);
            CHECK(left[r] <= c.tolerance * (1 + 1e-6) || n == 0, "row %lld has %g left", (long long)r, left[r]);
        }
    }
    int64_t most = 0;
    for (int64_t i = 0; i < sequences * heads; i++)
        most = count[i] > most ? count[i] : most;
    char *from = block(sequences * heads * len * bytes), *to = block(sequences * heads * most * bytes);
    for (int64_t i = 0; i < sequences * heads * len * bytes; i++)
        from[i] = (char)draw();
    qkv_gathering g = {
        .sequences = sequences, .heads = heads, .most = most, .bytes = bytes, .keys_row = len, .keys = keys, .count = count,
        .from = from, .from_at = {heads * len * bytes, len * bytes, bytes}, .to = to, .threads = 2,
    };
    CHECK(qkv_gather(&g) == QKV_OK, "gathering");
    for (int64_t i = 0; i < sequences * heads * most * bytes; i++) {
        int64_t head = i / bytes / most, at = i / bytes % most;
        char is = at < count[head] ? from[(head * len + keys[head * len + at]) * bytes + i % bytes] : 0;
        CHECK(to[i] == is, "byte %lld", (long long)i);
    }
    void *owned[] = {weights, given, reach, slack, steps, left, keys, count, length, from, to};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

/* Keys are as much off as they may be, and so are bytes behind a row's. */
static APART void check_pruning(int isa, int64_t sequences, int64_t heads, int64_t rows, int64_t len, int64_t dim, double size)
{
    int64_t all = sequences * heads * rows, width = (dim + 3) / 4 * 4 + 4;
    float *queries = block(all * dim * 4), *left = block(all * 4), *steps = block(sequences * heads * len * 4);
    char *bytes = block(sequences * heads * len * width);
    double *own = block(sequences * heads * len * dim * 8), *score = block(len * 8 + 8);
    int64_t *keys = block(sequences * heads * len * 8), *count = block(sequences * heads * 8);
    int64_t *length = block(sequences * 8), *start = block(sequences * 8);
    for (int64_t i = 0; i < all * dim; i++)
        queries[i] = in(-size, size);
    for (int64_t i = 0; i < sequences * heads * len; i++) {
        float step = in(0.001, 0.03);
        memset(bytes + i * width, 0, (size_t)width);
        memcpy(bytes + i * width + width - 4, &step, 4);
        steps[i] = step;
        for (int64_t d = 0; d < dim; d++) {
            int n = (int)between(0, 254) - 127;
            bytes[i * width + d] = (char)n;
            own[i * dim + d] = (double)step * (n + (draw() % 2 ? 0.5 : -0.5));
        }
    }
    for (int64_t i = 0; i < sequences; i++) {
        length[i] = i ? between(0, len) : len;
        start[i] = draw() % 2 ? between(0, length[i]) : 0;
    }
    qkv_pruning c = {
        .sequences = sequences, .heads = heads, .rows = rows, .len_k = len, .dim = dim, .queries = queries, .keys = bytes,
        .keys_at = {heads * len * width, len * width, width}, .steps = steps, .steps_at = {heads * len * 4, len * 4},
        .start = draw() % 2 ? start : NULL, .length = length, .scale = in(-1, 1), .tolerance = exp(in(-10, -0.5)),
        .chosen = keys, .count = count, .left = left, .threads = 3, .isa = isa,
    };
    qkv_trim();
    qkv_fail_allocation(0);
    CHECK(qkv_prune(&c) == (all * len > 0 ? QKV_NO_MEMORY : QKV_OK), "no memory");
    qkv_fail_allocation(-1);
    CHECK(qkv_prune(&c) == QKV_OK, "pruning");
    for (int64_t head = 0; head < sequences * heads; head++) {
        int64_t first = c.start ? start[head / heads] : 0, n = length[head / heads];
        CHECK(-1 <= count[head] && count[head] <= n - first, "count %lld", (long long)count[head]);
        for (int64_t r = head * rows; r < (head + 1) * rows && count[head] >= 0 && first < n; r++) {
            double most = -INFINITY, read = 0, others = 0;
            for (int64_t j = first; j < n; j++) {
                score[j] = 0;
                for (int64_t d = 0; d < dim; d++)
                    score[j] += c.scale * queries[r * dim + d] * own[(head * len + j) * dim + d];
                most = score[j] > most ? score[j] : most;
            }
            for (int64_t j = first, next = 0; j < n; j++) {
                int chosen = next < count[head] && keys[head * len + next] == j;
                next += chosen;
                *(chosen ? &read : &others) += exp(score[j] - most);
            }
            CHECK(others <= left[r] * (read + others) * (1 + 1e-6), "row %lld: %g of %g", (long long)r, others, read);
            CHECK(left[r] <= c.tolerance, "row %lld has %g left", (long long)r, left[r]);
        }
    }
    void *owned[] = {queries, left, steps, bytes, own, score, keys, count, length, start};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (int i = 0; i < share_of(40); i++)
            check_pruning(isa, between(1, 3), between(1, 3), between(1, 9), between(1, 900), between(1, 150), i % 3 ? 4 : 0.2);
    check_pruning(0, 1, 1, 2, 700, 1024, 1);
    check_pruning(0, 2, 1, 0, 10, 3, 1);
    for (int i = 0; i < share_of(60); i++)
        check_choice(between(1, 3), between(1, 3), between(1, 5), between(1, 1500), i % 3 ? 60 : 4, i % 2 ? 6 : 0.2);
    check_choice(1, 2, 4, 70000, 30, 3);
    check_choice(2, 1, 0, 10, 3, 1);
    printf("test_choose: %ld checks\n", checks);
    qkv_pool_stop();
    qkv_trim();
    return 0;
}
