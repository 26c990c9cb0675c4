/* For tests and benchmarks: one primitive on its own, and the machine's limits. Nothing here is used by a call. */
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "cpu.h"
#include "qkv.h"
#include "threads.h"

int qkv_exp2(int isa, qkv_type type, const void *x, void *y, int64_t n)
{
    const qkv_isa *path = qkv_isa_at(isa);
    if (!path)
        return 0;
    qkv_kernels_at(isa, type)->exp2(x, y, n);
    return 1;
}

enum { MOST = 256 };                  /* threads measured */

typedef struct {
    double (*fma)(int64_t rounds, double *flops);
    const uint64_t *data;             /* (threads, words) */
    uint64_t *to;                     /* the same, for copies */
    size_t words;
    double seconds;
    double rate[MOST];                /* each written once */
} measurement;

/* The mean over the whole stretch: what slows a shared machine down slows calls measured beside it by as much. */
static void measure_fma(void *context, int64_t task, int worker)
{
    measurement *m = context;
    double begin = qkv_clock(), now, flops, sum = 0;
    (void)worker;
    do {
        m->fma(2000, &flops);
        sum += flops;
        now = qkv_clock();
    } while (now - begin < m->seconds);
    m->rate[task] = sum / (now - begin);
}

static void measure_read(void *context, int64_t task, int worker)
{
    measurement *m = context;
    const uint64_t *data = m->data + (size_t)task * m->words;
    double begin = qkv_clock(), now;
    size_t rounds = 0;
    (void)worker;
    do {
        uint64_t sum[8] = {0};
        for (size_t i = 0; i + 8 <= m->words; i += 8)
            for (size_t j = 0; j < 8; j++)
                sum[j] ^= data[i + j];
        volatile uint64_t keep = sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
        (void)keep;
        rounds++;
        now = qkv_clock();
    } while (now - begin < m->seconds);
    m->rate[task] = (double)(rounds * m->words) * sizeof(uint64_t) / (now - begin);
}

/* Copies of the C library, which go past the caches if the blocks are large. */
static void measure_copy(void *context, int64_t task, int worker)
{
    measurement *m = context;
    size_t bytes = m->words * sizeof(uint64_t), rounds = 0;
    double begin = qkv_clock(), now;
    (void)worker;
    do {
        memcpy(m->to + (size_t)task * m->words, m->data + (size_t)task * m->words, bytes);
        rounds++;
        now = qkv_clock();
    } while (now - begin < m->seconds);
    m->rate[task] = (double)(rounds * bytes) / (now - begin);
}

/* One task on each of `threads` workers; the sum of their rates. */
static double measure(qkv_task function, measurement m, int threads)
{
    int n = qkv_pool_acquire(threads < MOST ? threads : MOST, 0);
    qkv_pool_run(n, n, function, &m, NULL, NULL);
    qkv_pool_release(n);
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += m.rate[i];
    return sum;
}

double qkv_fma_rate(int isa, qkv_type type, int threads, double seconds)
{
    const qkv_isa *path = qkv_isa_at(isa);
    return path ? measure(measure_fma, (measurement){.fma = qkv_kernels_at(isa, type)->fma, .seconds = seconds}, threads) : 0;
}

double qkv_tile_rate(int isa, int threads, double seconds)
{
    const qkv_isa *path = qkv_isa_at(isa);
    if (!path || !qkv_may_use_tiles(path))
        return 0;
    return measure(measure_fma, (measurement){.fma = path->tiles[0]->fma, .seconds = seconds}, threads);
}

double qkv_pair_rate(int threads, double seconds)
{
    for (int isa = 0; qkv_isa_at(isa); isa++)
        if (qkv_isa_at(isa)->pairs)
            return measure(measure_fma, (measurement){.fma = qkv_isa_at(isa)->pairs->fma, .seconds = seconds}, threads);
    return 0;
}

double qkv_read_rate(const void *data, size_t bytes, int threads, double seconds)
{
    size_t words = bytes / sizeof(uint64_t) / (size_t)threads;
    return measure(measure_read, (measurement){.data = data, .words = words, .seconds = seconds}, threads);
}

double qkv_copy_rate(void *to, const void *data, size_t bytes, int threads, double seconds)
{
    size_t words = bytes / sizeof(uint64_t) / (size_t)threads;
    return measure(measure_copy, (measurement){.data = data, .to = to, .words = words, .seconds = seconds}, threads);
}

/* Each of n tasks waits until all have begun, so that every worker takes one: the caller alone would be quicker. */
typedef struct { _Atomic int begun; int n; } meeting;

static void meet(void *context, int64_t task, int worker)
{
    meeting *m = context;
    (void)task;
    (void)worker;
    atomic_fetch_add(&m->begun, 1);
    while (atomic_load(&m->begun) < m->n)
        ;
}

double qkv_fork_join(int threads, int repeats)
{
    double begin = qkv_clock();
    for (int i = 0; i < repeats; i++) {
        meeting m = {.n = qkv_pool_acquire(threads, 0)};
        qkv_pool_run(m.n, m.n, meet, &m, NULL, NULL);
        qkv_pool_release(m.n);
    }
    return (qkv_clock() - begin) / repeats;
}
