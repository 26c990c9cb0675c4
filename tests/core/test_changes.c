/* What changes scores, padding, and ragged batches, through qkv.h alone: random problems against three plain loops, on every CPU path.
 * As in test_core.c each array is a block of exactly its size. */
#include "changes.h"

/* Changes, computes and checks a problem, and frees it. Returns whether its rows were few. */
static int test_changed(problem x, int isa)
{
    qkv_report report;
    x.p.isa = isa;
    x.p.threads = (int)between(1, 3);
    random_changes(&x);
    CHECK(run(&x) == QKV_OK, "changes");
    check_result(&x, "changes");
    CHECK(qkv_explain(&x.p, &report) == QKV_OK, "no report");
    CHECK(counts_agree(&report.counts, &x.counters), "%lld, not %lld partial tiles in the report",
          (long long)report.counts.tiles_partial, (long long)x.counters.tiles_partial);
    destroy(&x);
    return report.decode != 0;
}

static void test_random(int isa, qkv_type type)
{
    for (int i = 0; i < share_of(80); i++) {
        int64_t len_k = i % 10 == 0 ? between(1000, 2500) : between(0, 300), many = i % 8 == 0;
        test_changed(make(type, between(1, 3), many ? 9 : between(1, 2), many ? 1 : between(1, 3), between(0, 70), len_k,
                          between(0, 40), between(0, 40)), isa);
    }
}

/* Some rows of each key head: at these dimensions up to 4 are few. */
static void test_few(int isa, qkv_type type)
{
    for (int i = 0; i < share_of(60); i++) {
        int64_t len_k = i % 4 == 0 ? between(1000, 3200) : between(1, 300), group = between(1, 4);
        int few = test_changed(make(type, between(1, 2), between(1, 2), group, between(1, 4 / group), len_k, between(0, 70),
                                    between(0, 70)), isa);
        CHECK(few, "%lld heads of a group are not few", (long long)group);
    }
}

/* A ragged batch gives the bits of each of its sequences alone. */
static void test_ragged(int isa, qkv_type type)
{
    enum { SEQUENCES = 5, HEADS = 2, GROUP = 2, DIM = 24 };
    for (int i = 0; i < share_of(10); i++) {
        int64_t size = size_of(type), q_starts[SEQUENCES + 1] = {0}, k_starts[SEQUENCES + 1] = {0}, most_q = 0, most_k = 0;
        int64_t run_of[SEQUENCES + 1], row_q = HEADS * GROUP * DIM * size, row_k = HEADS * DIM * size;
        for (int b = 0; b < SEQUENCES; b++) {
            int64_t queries = between(0, 120), keys = i == 0 && b == 2 ? 3000 : between(0, 300);
            q_starts[b + 1] = q_starts[b] + queries;
            k_starts[b + 1] = k_starts[b] + keys;
            most_q = queries > most_q ? queries : most_q;
            most_k = keys > most_k ? keys : most_k;
            run_of[b] = b;
        }
        run_of[SEQUENCES] = SEQUENCES;
        int64_t rows = q_starts[SEQUENCES], keys = k_starts[SEQUENCES], heads = HEADS * GROUP;
        char *q = uniform(type, rows * heads * DIM), *k = uniform(type, keys * HEADS * DIM);
        char *v = uniform(type, keys * HEADS * DIM), *out = block(rows * row_q), *lse = block(heads * rows * size);
        int64_t length[SEQUENCES];
        qkv_run runs[SEQUENCES];
        for (int b = 0; b < SEQUENCES; b++) {
            length[b] = k_starts[b + 1] - k_starts[b];
            runs[b] = (qkv_run){k + k_starts[b] * row_k, v + k_starts[b] * row_k, 0, length[b]};
        }
        qkv_problem p = {
            .type = type, .k_type = type, .v_type = type, .out_type = type, .n_axes = 1, .axes = {SEQUENCES}, .heads_q = heads, .heads_kv = HEADS,
            .len_q = most_q, .len_k = most_k, .dim = DIM, .dim_v = DIM, .q = q, .out = out, .lse = lse, .runs = runs,
            .n_runs = SEQUENCES, .run_of = run_of, .length = length, .left = QKV_OPEN, .right = i % 2 ? 0 : QKV_OPEN,
            .scale = 0.25, .threads = (int)between(1, 3), .isa = isa, .q_starts = q_starts, .k_starts = k_starts,
        };
        p.q_at = p.out_at = (qkv_strides){.head = DIM * size, .row = row_q, .dim = size};
        p.k_at = p.v_at = (qkv_strides){.head = DIM * size, .row = row_k, .dim = size};
        CHECK(qkv_forward(&p) == QKV_OK, "ragged");

        for (int b = 0; b < SEQUENCES; b++) {
            int64_t n = q_starts[b + 1] - q_starts[b];
            char *own = block(n * row_q), *own_lse = block(heads * n * size);
            qkv_problem one = p;
            one.n_axes = 0;
            one.len_q = n;
            one.len_k = length[b];
            one.q = q + q_starts[b] * row_q;
            one.out = own;
            one.lse = own_lse;
            one.runs = runs + b;
            one.n_runs = 1;
            one.run_of = one.length = one.q_starts = one.k_starts = NULL;
            CHECK(qkv_forward(&one) == QKV_OK, "alone");
            CHECK(!memcmp(own, out + q_starts[b] * row_q, (size_t)(n * row_q)), "sequence %d: other bits than alone", b);
            for (int64_t h = 0; h < heads; h++)
                CHECK(!memcmp(own_lse + h * n * size, lse + (h * rows + q_starts[b]) * size, (size_t)(n * size)),
                      "sequence %d: other bits in lse", b);
            free(own);
            free(own_lse);
        }
        void *owned[] = {q, k, v, out, lse};
        for (int j = 0; j < 5; j++)
            free(owned[j]);
    }
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F32; type <= QKV_F64; type++) {
            test_random(isa, type);
            test_few(isa, type);
            test_ragged(isa, type);
            printf("test_changes: %s, %s: %ld checks\n", qkv_isa_name(isa), type == QKV_F32 ? "float32" : "float64", checks);
        }
    qkv_pool_stop();
    qkv_trim();
    printf("test_changes: %ld checks passed\n", checks);
    return 0;
}
