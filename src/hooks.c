/* For tests and benchmarks: one primitive on its own, and the machine's limits. Nothing here is used by a call. */
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "cpu.h"
#include "memory.h"
#include "qkv.h"
#include "threads.h"

int qkv_exp2(int isa, qkv_type type, const void *x, void *y, int64_t n)
{
    const qkv_isa *path = qkv_isa_at(isa);
    if (!path)
        return 0;
    path->type[type]->exp2(x, y, n);
    return 1;
}

enum { MOST = 256, APART = 16 };      /* threads measured; doubles between two threads' results */

typedef struct {
    const qkv_kernels *kernels;
    uint64_t *data;                   /* (threads, words) */
    size_t words;
    double seconds;
    double rate[MOST * APART];
} measurement;

/* The mean over the whole stretch: what slows a shared machine down slows calls measured beside it by as much. */
static void measure_fma(void *context, int64_t task, int worker)
{
    measurement *m = context;
    double begin = qkv_clock(), now, flops, sum = 0;
    (void)worker;
    do {
        m->kernels->fma(2000, &flops);
        sum += flops;
        now = qkv_clock();
    } while (now - begin < m->seconds);
    m->rate[task * APART] = sum / (now - begin);
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
    m->rate[task * APART] = (double)(rounds * m->words) * sizeof(uint64_t) / (now - begin);
}

/* Copies of the C library, which go past the caches for blocks this large. */
static void measure_copy(void *context, int64_t task, int worker)
{
    measurement *m = context;
    char *data = (char *)(m->data + (size_t)task * m->words);
    size_t half = m->words / 2 * sizeof(uint64_t), rounds = 0;
    double begin = qkv_clock(), now;
    (void)worker;
    do {
        memcpy(rounds % 2 ? data : data + half, rounds % 2 ? data + half : data, half);
        rounds++;
        now = qkv_clock();
    } while (now - begin < m->seconds);
    m->rate[task * APART] = (double)(rounds * half) / (now - begin);
}

/* One task on each of `threads` workers; the sum of their rates. */
static double measure(qkv_task function, measurement *m, int threads)
{
    int n = qkv_pool_acquire(threads);
    qkv_pool_run(n, n, function, m, NULL, NULL);
    qkv_pool_release(n);
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += m->rate[i * APART];
    return sum;
}

double qkv_fma_rate(int isa, qkv_type type, int threads, double seconds)
{
    const qkv_isa *path = qkv_isa_at(isa);
    measurement *m = path ? qkv_scratch_take(sizeof *m, 0) : NULL;
    if (!m)
        return 0;
    m->kernels = path->type[type];
    m->seconds = seconds;
    double rate = measure(measure_fma, m, threads < MOST ? threads : MOST);
    qkv_scratch_put(m, 0);
    return rate;
}

static double memory_rate(qkv_task function, int threads, size_t bytes, double seconds)
{
    double rate = 0;
    measurement *m = qkv_scratch_take(sizeof *m, 0);
    uint64_t *data = qkv_scratch_take(bytes, 1);
    if (m && data) {
        threads = threads < MOST ? threads : MOST;
        memset(data, 1, bytes);
        m->data = data;
        m->words = bytes / sizeof *data / (size_t)threads;
        m->seconds = seconds;
        rate = measure(function, m, threads);
    }
    qkv_scratch_put(data, 1);
    qkv_scratch_put(m, 0);
    return rate;
}

double qkv_read_rate(int threads, size_t bytes, double seconds)
{
    return memory_rate(measure_read, threads, bytes, seconds);
}

double qkv_copy_rate(int threads, size_t bytes, double seconds)
{
    return memory_rate(measure_copy, threads, 2 * bytes, seconds);
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
        meeting m = {.n = qkv_pool_acquire(threads)};
        qkv_pool_run(m.n, m.n, meet, &m, NULL, NULL);
        qkv_pool_release(m.n);
    }
    return (qkv_clock() - begin) / repeats;
}
