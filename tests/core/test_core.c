/* The core through qkv.h alone: problems of random shapes against three plain loops, on every CPU path.
 *
 * Every array is a block of exactly its size from malloc, so that AddressSanitizer sees each byte read or written
 * beside it. How exact results are is the Python tests' business (tests/test_accuracy.py); here a result is right or
 * wrong: the bound is what a wrong key, a lost tail or a stale block cannot stay within.
 */
#include "problem.h"

#include "allocator.h"

static void random_limits(problem *x)
{
    qkv_problem *p = &x->p;
    int64_t bytes = x->sequences * (int64_t)sizeof(int64_t);
    if (draw() % 2) {
        x->length = block(bytes);
        for (int64_t b = 0; b < x->sequences; b++)
            x->length[b] = between(0, p->len_k);
    }
    if (draw() % 2) {
        x->offset = block(bytes);
        for (int64_t b = 0; b < x->sequences; b++)
            x->offset[b] = between(-10, p->len_k + 10);
    }
    p->left = draw() % 2 ? QKV_OPEN : between(0, 150);
    p->right = draw() % 2 ? QKV_OPEN : between(0, 150);
}

/* What qkv_explain says of a problem is what the counters then say. */
static void check_report(const problem *x)
{
    qkv_report report;
    CHECK(qkv_explain(&x->p, &report) == QKV_OK, "no report");
    CHECK(counts_agree(&report.counts, &x->counters), "%lld full, %lld partial, %lld skipped in the report",
          (long long)report.counts.tiles_full, (long long)report.counts.tiles_partial,
          (long long)report.counts.tiles_skipped);
}

static void test_random(int isa, qkv_type type)
{
    for (int i = 0; i < share_of(60); i++) {
        int64_t len_k = i % 10 == 0 ? between(1000, 2500) : between(0, 200), len_q = between(0, 70);
        problem x = make(type, i % 7 == 0 ? 30 : between(1, 3), between(1, 2), between(1, 3), len_q, len_k, between(0, 70),
                         between(0, 70));
        x.p.isa = isa;
        x.p.threads = (int)between(1, 3);
        x.shared = draw() % 3 == 0;
        if (x.shared)
            x.p.k_at.axis[0] = x.p.v_at.axis[0] = 0;
        if (i % 4)
            random_limits(&x);
        CHECK(run(&x) == QKV_OK, "random problem %d", i);
        check_result(&x, "random");
        check_report(&x);
        destroy(&x);
    }
}

/* Every length and dimension about a register tile, at the exact ends of its blocks. */
static void test_tails(int isa, qkv_type type)
{
    for (int64_t n = 1; n <= 130; n++) {
        int64_t other = n * 37 % 131;                   /* 37 generates: each of 1..130 once */
        problem x = make(type, 1, 1, 1, other, n, other, n);
        x.p.isa = isa;
        x.p.right = n % 2 ? 0 : QKV_OPEN;
        CHECK(run(&x) == QKV_OK, "tail %lld", (long long)n);
        check_result(&x, "tail");
        destroy(&x);
    }
}

static void test_threads_and_chunks(int isa, qkv_type type)
{
    problem x = make(type, 1, 1, 4, 3, 6000, 32, 24);
    x.p.isa = isa;
    CHECK(run(&x) == QKV_OK, "one thread");
    check_result(&x, "chunks");
    void *out = block(x.out_bytes), *lse = block(x.lse_bytes);
    memcpy(out, x.out, (size_t)x.out_bytes);
    memcpy(lse, x.lse, (size_t)x.lse_bytes);
    for (x.p.threads = 2; x.p.threads <= 5; x.p.threads++) {
        CHECK(run(&x) == QKV_OK, "%d threads", x.p.threads);
        CHECK(x.counters.splits > 0, "%d threads: the keys were not split", x.p.threads);
        CHECK(!memcmp(out, x.out, (size_t)x.out_bytes), "%d threads: other bits", x.p.threads);
        CHECK(!memcmp(lse, x.lse, (size_t)x.lse_bytes), "%d threads: other bits in lse", x.p.threads);
    }
    free(out);
    free(lse);
    destroy(&x);
}

/* (rows, heads, dim): the head stride does not depend on how many rows a run has. */
static void blhd(qkv_strides *at, int64_t heads, int64_t dim, int64_t size)
{
    at->dim = size;
    at->head = dim * size;
    at->row = heads * at->head;
}

static char *piece(const problem *x, const void *data, int64_t sequence, int64_t first, int64_t count, int64_t dim)
{
    int64_t size = size_of(x->p.k_type), heads = x->p.heads_kv;
    char *copy = block(count * heads * dim * size);
    for (int64_t j = 0; j < count; j++)
        for (int64_t h = 0; h < heads; h++)
            memcpy(copy + (j * heads + h) * dim * size,
                   (const char *)data + ((sequence * heads + h) * x->p.len_k + first + j) * dim * size,
                   (size_t)(dim * size));
    return copy;
}

/* Keys in several blocks of memory, cut anywhere and differently in each sequence, give the bits of one slab. */
static void test_runs(int isa, qkv_type type)
{
    enum { SEQUENCES = 3, MOST = 8 };
    for (int i = 0; i < share_of(20); i++) {
        problem x = make(type, SEQUENCES, 2, 2, between(1, 60), i % 5 ? between(5, 300) : 2500, between(1, 40),
                         between(1, 40));
        qkv_problem *p = &x.p;
        p->isa = isa;
        random_limits(&x);
        CHECK(run(&x) == QKV_OK, "slab");
        check_result(&x, "slab");
        void *out = block(x.out_bytes), *lse = block(x.lse_bytes);
        memcpy(out, x.out, (size_t)x.out_bytes);
        memcpy(lse, x.lse, (size_t)x.lse_bytes);

        qkv_run runs[SEQUENCES * MOST];
        int64_t run_of[SEQUENCES + 1], n = 0;
        for (int b = 0; b < SEQUENCES; b++) {
            run_of[b] = n;
            int64_t first = 0;
            for (int r = 0; first < p->len_k; r++) {
                int64_t count = r == MOST - 1 ? p->len_k - first : between(1, p->len_k - first);
                runs[n].k = piece(&x, x.k, b, first, count, p->dim);
                runs[n].v = piece(&x, x.v, b, first, count, p->dim_v);
                runs[n].first = first;
                runs[n++].count = count;
                first += count;
            }
        }
        run_of[SEQUENCES] = n;
        p->runs = runs;
        p->n_runs = n;
        p->run_of = run_of;
        blhd(&p->k_at, p->heads_kv, p->dim, size_of(type));
        blhd(&p->v_at, p->heads_kv, p->dim_v, size_of(type));
        for (p->threads = 1; p->threads <= 3; p->threads++) {
            CHECK(run(&x) == QKV_OK, "runs");
            CHECK(!memcmp(out, x.out, (size_t)x.out_bytes), "runs: other bits than one slab");
            CHECK(!memcmp(lse, x.lse, (size_t)x.lse_bytes), "runs: other bits in lse");
        }
        for (int64_t r = 0; r < n; r++) {
            free((void *)runs[r].k);
            free((void *)runs[r].v);
        }
        free(out);
        free(lse);
        destroy(&x);
    }
}

/* K and V backwards or byte-swapped: the bits of the plain arrays. */
static void test_forms(int isa, qkv_type type)
{
    problem x = make(type, 1, 1, 2, 30, 200, 17, 33);
    qkv_problem *p = &x.p;
    p->isa = isa;
    int64_t size = size_of(type), k_bytes = p->len_k * p->dim * size, v_bytes = p->len_k * p->dim_v * size;
    CHECK(run(&x) == QKV_OK, "plain");
    void *out = block(x.out_bytes);
    memcpy(out, x.out, (size_t)x.out_bytes);

    char *k = block(k_bytes), *v = block(v_bytes);
    for (int64_t j = 0; j < p->len_k; j++) {            /* rows in reverse order */
        memcpy(k + j * p->k_at.row, (char *)x.k + (p->len_k - 1 - j) * p->k_at.row, (size_t)p->k_at.row);
        memcpy(v + j * p->v_at.row, (char *)x.v + (p->len_k - 1 - j) * p->v_at.row, (size_t)p->v_at.row);
    }
    x.run = (qkv_run){k + (p->len_k - 1) * p->k_at.row, v + (p->len_k - 1) * p->v_at.row, 0, p->len_k};
    p->k_at.row = -p->k_at.row;
    p->v_at.row = -p->v_at.row;
    CHECK(run(&x) == QKV_OK && !memcmp(out, x.out, (size_t)x.out_bytes), "backwards: other bits");

    p->k_at.row = -p->k_at.row;
    p->v_at.row = -p->v_at.row;
    for (int64_t i = 0; i < k_bytes; i++)               /* bytes of each element in reverse order */
        k[i] = ((char *)x.k)[i / size * size + size - 1 - i % size];
    for (int64_t i = 0; i < v_bytes; i++)
        v[i] = ((char *)x.v)[i / size * size + size - 1 - i % size];
    x.run = (qkv_run){k, v, 0, p->len_k};
    p->swapped_k = p->swapped_v = 1;
    CHECK(run(&x) == QKV_OK && !memcmp(out, x.out, (size_t)x.out_bytes), "byte-swapped: other bits");
    free(k);
    free(v);
    free(out);
    destroy(&x);
}

static void test_failing_allocations(int isa, qkv_type type)
{
    problem x = make(type, 1, 1, 1, 4, 20000, 32, 32);
    x.p.isa = isa;
    x.p.threads = 3;
    qkv_set_allocator(count_allocate, count_release, NULL);
    qkv_status status = QKV_NO_MEMORY;
    int64_t k = 0;
    for (; status != QKV_OK; k++) {
        qkv_trim();
        CHECK(live == 0, "%lld blocks are kept after trim", (long long)live);
        asked = 0;
        failing = k;
        status = run(&x);
        CHECK(status == (asked > k ? QKV_NO_MEMORY : QKV_OK), "allocation %lld: status %d", (long long)k, status);
    }
    CHECK(k >= 4, "three workers and a split: %lld allocations", (long long)k - 1);
    check_result(&x, "after failures");
    failing = -1;
    int64_t before = asked;
    CHECK(run(&x) == QKV_OK && x.counters.splits > 0, "warm");
    CHECK(asked == before, "a warm call allocates");
    qkv_set_allocator(NULL, NULL, NULL);
    CHECK(live == 0, "%lld blocks leaked", (long long)live);
    destroy(&x);
}

static int interrupt(void *count) { return ++*(int *)count >= 2; }

static void test_interrupt(void)
{
    problem x = make(QKV_F32, 1, 8, 1, 3000, 3000, 64, 64);
    int count = 0;
    while (qkv_isa_name(x.p.isa + 1))
        x.p.isa++;                                      /* the slowest: long enough for two looks */
    x.p.interrupted = interrupt;
    x.p.interrupted_arg = &count;
    for (x.p.threads = 1; x.p.threads <= 2; x.p.threads++, count = 0) {
        CHECK(run(&x) == QKV_INTERRUPTED, "not interrupted");
        CHECK(count == 2, "%d looks", count);
    }
    destroy(&x);
}

/* One row against keys that take seconds: one task, whose chunks the calling thread looks up between, or waits for. */
static void test_interrupt_within_a_task(void)
{
    problem x = make(QKV_F32, 1, 1, 1, 1, 1, 64, 64);
    qkv_run keys = {x.k, x.v, 0, (int64_t)1 << 32};
    int count = 0;
    x.p.len_k = keys.count;
    x.p.runs = &keys;
    x.p.n_runs = 1;
    x.p.k_at.row = x.p.v_at.row = 0;
    x.p.interrupted = interrupt;
    x.p.interrupted_arg = &count;
    for (x.p.threads = 1; x.p.threads <= 2; x.p.threads++, count = 0) {
        CHECK(run(&x) == QKV_INTERRUPTED, "not interrupted");
        CHECK(count == 2, "%d looks", count);
    }
    destroy(&x);
}

static void test_overflow(void)
{
    problem x = make(QKV_F32, 1, 1, 1, 1, 1, 1, 1);
    x.p.n_axes = 2;
    x.p.axes[0] = x.p.axes[1] = (int64_t)1 << 40;
    CHECK(run(&x) == QKV_OVERFLOW, "2^80 sequences");
    x.p.n_axes = 0;
    x.p.heads_q = (int64_t)1 << 40;
    x.p.len_q = (int64_t)1 << 40;
    CHECK(run(&x) == QKV_OVERFLOW, "2^80 rows");
    destroy(&x);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F32; type <= QKV_F64; type++) {
            test_random(isa, type);
            test_tails(isa, type);
            test_threads_and_chunks(isa, type);
            test_runs(isa, type);
            test_forms(isa, type);
            test_failing_allocations(isa, type);
            printf("test_core: %s, %s: %ld checks\n", qkv_isa_name(isa), type == QKV_F32 ? "float32" : "float64", checks);
        }
    test_interrupt();
    test_interrupt_within_a_task();
    test_overflow();
    qkv_pool_stop();
    qkv_trim();
    printf("test_core: %ld checks passed\n", checks);
    return 0;
}
