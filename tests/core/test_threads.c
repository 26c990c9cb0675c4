/* The pool of threads.h: from one thread and from several, nested, growing, stopped and started again.
 *
 * Meant for ThreadSanitizer: what a task wrote must be visible to the caller when qkv_pool_run returns, and what the
 * caller wrote before must be visible to every task, by the pool's own synchronisation. Nothing here adds any: shared
 * results are plain memory.
 */
#ifndef _WIN32
#ifdef __linux__
#define _GNU_SOURCE                   /* affinity */
#else
#define _POSIX_C_SOURCE 200809L       /* nanosleep */
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "qkv.h"
#include "threads.h"

static void require(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "test_threads: %s\n", what);
        exit(1);
    }
}

enum { MOST = 600, CALLERS = 6 };

typedef struct {
    const int *input;                 /* written before the job, read by its tasks */
    int output[MOST];                 /* one task each */
    int count[64];                    /* one worker each: how many tasks it drew */
    int workers, nested;
} job;

static int square_all(int threads, int tasks, int nested);

static void square(void *context, int64_t task, int worker)
{
    job *j = context;
    require(worker >= 0 && worker < j->workers, "a worker's number is out of range");
    j->output[task] = j->input[task] * j->input[task];
    j->count[worker]++;               /* a worker runs its tasks one after the other */
    if (j->nested && j->workers > 1)  /* alone, a task does not hold the pool */
        require(square_all(3, 5, 0) == 1, "a nested call was given other workers than its own thread");
}

/* Squares `tasks` numbers on at most `threads` workers; returns how many workers it was granted. */
static int square_all(int threads, int tasks, int nested)
{
    int input[MOST];
    for (int i = 0; i < tasks; i++)
        input[i] = i + tasks;
    job j = {.input = input, .nested = nested};
    int n = qkv_pool_acquire(threads, 0);
    require(n >= 1 && n <= (threads > 1 ? threads : 1), "more workers granted than asked for");
    j.workers = n;
    require(!qkv_pool_run(n, tasks, square, &j, NULL, NULL), "stopped without a check");
    qkv_pool_release(n);
    int sum = 0;
    for (int i = 0; i < tasks; i++)
        require(j.output[i] == (i + tasks) * (i + tasks), "a task was not run, or not seen");
    for (int i = 0; i < n; i++)
        sum += j.count[i];
    require(sum == tasks, "a task was run twice");
    return n;
}

static void test_one_caller(void)
{
    for (int round = 0; round < 200; round++)
        for (int threads = 1; threads <= 5; threads++)
            require(square_all(threads, round % 40, 0) == threads, "fewer workers than asked for, with nobody else");
    require(qkv_pool_threads() == 4, "the pool has other threads than it was asked for");
    require(square_all(0, 3, 0) == 1 && square_all(-5, 3, 0) == 1, "no threads means the caller");
}

static void test_grows_and_shrinks(void)
{
    for (int round = 0; round < 20; round++) {
        require(square_all(2 + round % 15, 100, 0) == 2 + round % 15, "the pool did not grow");
        require(square_all(2, 100, 0) == 2, "a small job on a large pool");
        if (round % 5 == 4) {
            qkv_pool_stop();
            require(qkv_pool_threads() == 0, "threads left after stop");
            qkv_pool_stop();          /* twice is fine */
        }
    }
}

static void test_nested(void)
{
    for (int round = 0; round < 50; round++)
        square_all(4, 30, 1);
}

static void *call_often(void *arg)
{
    int seed = *(int *)arg;
    for (int round = 0; round < 150; round++)
        square_all(1 + (seed + round) % 4, (seed * 31 + round * 7) % MOST, round % 10 == 0);
    return NULL;
}

static void test_many_callers(int stop_meanwhile)
{
    pthread_t threads[CALLERS];
    int seeds[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        seeds[i] = i;
        require(!pthread_create(&threads[i], NULL, call_often, &seeds[i]), "pthread_create");
    }
    for (int i = 0; i < 100 && stop_meanwhile; i++) {
        struct timespec pause = {0, 200000};
        nanosleep(&pause, NULL);
        qkv_pool_stop();              /* leaves a busy pool alone */
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
}

/* With time between the jobs the workers have gone to sleep; without, they are spinning still. */
static void test_sleepers(void)
{
    for (int round = 0; round < 60; round++) {
        struct timespec pause = {0, round % 3 * 400000};
        nanosleep(&pause, NULL);
        square_all(2 + round % 3, 50, 0);
    }
}

static void slow(void *context, int64_t task, int worker)
{
    struct timespec pause = {0, 5000000};
    (void)worker;
    nanosleep(&pause, NULL);
    ((char *)context)[task] = 1;
}

static int third_look(void *count) { return ++*(int *)count >= 3; }

static void test_stopped_by_the_check(void)
{
    for (int threads = 1; threads <= 3; threads += 2) {
        enum { TASKS = 5000 };
        char *done = calloc(TASKS, 1);
        int looks = 0, ran = 0;
        int n = qkv_pool_acquire(threads, 0);
        double begin = qkv_clock();
        require(qkv_pool_run(n, TASKS, slow, done, third_look, &looks), "not stopped");
        double seconds = qkv_clock() - begin;
        qkv_pool_release(n);
        for (int i = 0; i < TASKS; i++)
            ran += done[i];
        require(looks == 3 && ran > 0 && ran < TASKS, "stopped at another moment than it was told");
        require(seconds >= 0.1 && seconds < 5, "the looks are not 50 to 100 ms apart");
        free(done);
        square_all(3, 100, 0);        /* and the pool is as good as before */
    }
}

typedef struct { _Atomic int begun, stop; } long_job;

/* Two tasks, one on each worker; the caller's ends at once, the other only when it is told. */
static void run_until_told(void *context, int64_t task, int worker)
{
    long_job *j = context;
    (void)task;
    atomic_fetch_add(&j->begun, 1);
    while (atomic_load(&j->begun) < 2 || (worker > 0 && !atomic_load(&j->stop))) {
        struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
    }
}

static int tell(void *context)
{
    atomic_store(&((long_job *)context)->stop, 1);
    return 1;
}

static void test_asked_while_waiting(void)
{
    long_job j = {0};
    int n = qkv_pool_acquire(2, 0);
    require(n == 2, "fewer workers than asked for");
    require(qkv_pool_run(n, 2, run_until_told, &j, tell, &j), "not stopped");
    qkv_pool_release(n);
    square_all(3, 100, 0);
}

#if defined(__SANITIZE_THREAD__)
enum { FORKS = 0 };
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
enum { FORKS = 0 };
#else
enum { FORKS = 20 };
#endif
#else
enum { FORKS = 20 };
#endif

/* A child has the memory of the pool and none of its threads. ThreadSanitizer lets no such child start threads. */
static void test_fork(void)
{
    for (int i = 0; i < FORKS; i++) {
        square_all(4, 50, 0);
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            alarm(20);                /* a hang becomes a signal */
            _exit(qkv_pool_threads() == 0 && square_all(4, 50, 0) == 4 ? 0 : 1);
        }
        int status = -1;
        require(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a forked child hangs or is wrong");
    }
}

#ifdef __linux__
typedef struct {
    cpu_set_t both, caller, seen;     /* seen by worker 1 when its task ended */
    _Atomic int begun, stop, brought;
} crowd;

static void *burn(void *stop)
{
    while (!atomic_load((_Atomic int *)stop))
        ;
    return NULL;
}

/* The caller's task ends once the other has begun, which goes on until it is on the caller's core (10 s at most). */
static void wait_to_be_brought(void *context, int64_t task, int worker)
{
    crowd *c = context;
    double begin = qkv_clock();
    (void)task;
    atomic_fetch_add(&c->begun, 1);
    while (atomic_load(&c->begun) < 2)
        ;
    while (worker == 1 && !atomic_load(&c->brought) && qkv_clock() - begin < 10) {
        pthread_getaffinity_np(pthread_self(), sizeof c->seen, &c->seen);
        atomic_store(&c->brought, CPU_EQUAL(&c->seen, &c->caller));
    }
}

static void see_affinity(void *context, int64_t task, int worker)
{
    crowd *c = context;
    (void)task;
    atomic_fetch_add(&c->begun, 1);
    while (atomic_load(&c->begun) < 2)
        ;
    if (worker == 1)
        pthread_getaffinity_np(pthread_self(), sizeof c->seen, &c->seen);
}

static void run_crowd(crowd *c, qkv_task task)
{
    atomic_store(&c->begun, 0);
    int n = qkv_pool_acquire(2, 0);
    require(n == 2, "fewer workers than asked for");
    require(!qkv_pool_run(n, 2, task, c, NULL, NULL), "stopped without a check");
    qkv_pool_release(n);
}

/* Two cores, another thread that burns one of them: a worker that is put off there is brought to the caller's, and may run
 * where it did before once the job is done, or, if it slept since, anywhere but where the caller is. */
static void test_a_core_that_is_taken(void)
{
    cpu_set_t before, now, burned;
    crowd c = {0};
    sched_getaffinity(0, sizeof before, &before);
    if (CPU_COUNT(&before) < 2)
        return;
    CPU_ZERO(&c.both);
    for (int i = 0; CPU_COUNT(&c.both) < 2; i++) {
        if (!CPU_ISSET(i, &before))
            continue;
        burned = c.both;
        CPU_SET(i, &c.both);
    }
    c.caller = burned;                /* the first of both; the second is burned */
    CPU_XOR(&burned, &c.both, &c.caller);
    qkv_pool_stop();
    sched_setaffinity(0, sizeof c.both, &c.both);       /* inherited by the worker */
    square_all(2, 10, 0);
    sched_setaffinity(0, sizeof c.caller, &c.caller);
    pthread_t other;
    require(!pthread_create(&other, NULL, burn, &c.stop), "pthread_create");
    pthread_setaffinity_np(other, sizeof burned, &burned);
    for (int round = 0; round < 5; round++) {
        struct timespec pause = {0, round * 300000};
        atomic_store(&c.brought, 0);
        run_crowd(&c, wait_to_be_brought);
        require(c.brought, "a worker that waits for its core was left there");
        nanosleep(&pause, NULL);
        run_crowd(&c, see_affinity);
        require(CPU_EQUAL(&c.seen, &c.both) || CPU_EQUAL(&c.seen, &burned), "a worker was not let go");
        sched_getaffinity(0, sizeof now, &now);
        require(CPU_EQUAL(&now, &c.caller), "the caller was moved");
    }
    atomic_store(&c.stop, 1);
    pthread_join(other, NULL);
    sched_setaffinity(0, sizeof before, &before);
    qkv_pool_stop();
}
#else
static void test_a_core_that_is_taken(void) {}
#endif

static void test_small_jobs_wake_nobody(void)
{
    struct timespec pause = {0, 30000000};
    square_all(3, 10, 0);
    nanosleep(&pause, NULL);          /* all sleep */
    int n = qkv_pool_acquire(3, 1);
    require(n == 1, "a small job wakes sleepers");
    qkv_pool_release(n);
    for (int i = 0; i < 1000000 && n < 3; i++) {        /* on a busy machine some calls come late */
        n = qkv_pool_acquire(3, 1);
        qkv_pool_release(n);
    }
    require(n == 3, "small jobs one after the other wake nobody");
}

int main(void)
{
    test_one_caller();
    test_grows_and_shrinks();
    test_nested();
    test_many_callers(0);
    test_many_callers(1);
    test_sleepers();
    test_stopped_by_the_check();
    test_asked_while_waiting();
    test_small_jobs_wake_nobody();
    test_a_core_that_is_taken();
    test_fork();
    qkv_pool_stop();
    require(qkv_pool_threads() == 0, "threads left at the end");
    puts("test_threads: passed");
    return 0;
}
#else
int main(void) { return 0; }          /* pthreads and fork make this test; Windows runs the Python tests */
#endif
