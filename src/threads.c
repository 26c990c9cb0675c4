/* The thread pool.
 *
 * A job is published by one store to `gate`, which holds the job's number, whether it is open, and how many workers
 * have joined. A worker joins by a compare-and-swap, so one that wakes late finds the gate shut and the caller never
 * waits for it. Joined workers draw tasks from one counter; the caller draws too, shuts the gate when none are left, and
 * waits for those that joined.
 *
 * Between jobs a worker spins for SPIN_SECONDS and then sleeps. To wake it costs more than a small job is worth, unless
 * others follow at once.
 *
 * Threads of other libraries may spin on our cores for some 0.1 s after their own jobs. Then a worker must not share the
 * caller's core, which would halve both, nor wait on another core with a task in hand while the caller's idles. So a worker
 * that is woken is kept off the caller's core until its job is done, and one that the caller waits for and that does not get
 * on is brought to the caller's core, until it is. The caller itself is never moved, and who sleeps may run where it might
 * before: a user may change that meanwhile.
 *
 * After a fork the child has no workers: its handler only forgets the pool (no lock, no join, no free), and the next call
 * makes a new one.
 */
#ifdef __linux__
#define _GNU_SOURCE                   /* sched_getaffinity */
#endif
#include "threads.h"

#include <stdatomic.h>

#include "affinity.h"
#include "memory.h"
#include "qkv.h"
#include "system.h"

enum { STACK_BYTES = 512 << 10 };     /* kernels need little, but a C library's default may be less still */
static const double SPIN_SECONDS = 20e-6;
static const double CHECK_SECONDS = 60e-3;
static const double LOOK_SECONDS = 0.3e-3;              /* between looks whether workers get on */

#ifdef _WIN32
double qkv_clock(void)
{
    LARGE_INTEGER now, rate;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&rate);
    return (double)now.QuadPart / (double)rate.QuadPart;
}
static void watch_forks(void) {}
#else
double qkv_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
static void watch_forks(void);
#endif

/* gate: bits 0..11 workers joined, 12..23 workers wanted, 24 open, 25 stop, 26.. the job's number. */
enum { JOINED = 0xfff, WANTED_SHIFT = 12, OPEN = 1 << 24, STOP = 1 << 25, NUMBER_SHIFT = 26 };
static int joined_of(uint64_t gate) { return (int)(gate & JOINED); }
static int wanted_of(uint64_t gate) { return (int)(gate >> WANTED_SHIFT & JOINED); }
static uint64_t number_of(uint64_t gate) { return gate >> NUMBER_SHIFT; }

typedef struct pool_state pool_state;

typedef struct {
    pool_state *pool;
    thread thread;
    atomic_int working;               /* on a task of the job at hand */
    atomic_int core;                  /* where its last job ended */
    atomic_int confined;              /* until its next job is done */
    int64_t run;                      /* time that it had run when the caller last looked */
    int asleep;                       /* read and written with the pool's lock */
    mutex moving;                     /* for the affinity; taken after the pool's lock, if both are */
    qkv_affinity affinity;
} worker;

struct pool_state {
    _Alignas(64) _Atomic uint64_t gate;
    _Atomic int finished;             /* joined workers that have left this job */
    _Alignas(64) _Atomic int64_t next;                  /* the task to draw */
    _Alignas(64) atomic_int busy;     /* held by a caller */
    atomic_int sleepers, caller_sleeps, started, spin, core;     /* core: of the last caller */
    int cores;
    _Atomic double released;          /* when the last call was done */

    qkv_task function;                /* written by the caller while the gate is shut, read only after joining */
    void *context;
    int64_t tasks;

    mutex lock;
    condition wake, done;
    worker workers[QKV_MAX_THREADS];
};

static _Atomic(pool_state *) the_pool;

#ifndef _WIN32
static void forget_pool(void) { atomic_store(&the_pool, NULL); }
static void register_handler(void) { pthread_atfork(NULL, NULL, forget_pool); }
static void watch_forks(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_handler);
}
#endif

static void draw_tasks(pool_state *pool, int worker)
{
    int64_t task;
    while ((task = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed)) < pool->tasks)
        pool->function(pool->context, task, worker);
}

static void keep_off(worker *w, int core)
{
    mutex_lock(&w->moving);
    qkv_keep_off(&w->affinity, core);
    atomic_store(&w->confined, w->affinity.confined);
    mutex_unlock(&w->moving);
}

static void bring_to(worker *w, int core)
{
    mutex_lock(&w->moving);
    qkv_bring_to(&w->affinity, core);
    atomic_store(&w->confined, w->affinity.confined);
    mutex_unlock(&w->moving);
}

static void let_go(worker *w)
{
    mutex_lock(&w->moving);
    qkv_let_go(&w->affinity);
    atomic_store(&w->confined, 0);
    mutex_unlock(&w->moving);
}

/* Spins until gate holds another job than `number`, then sleeps; returns the gate. */
static uint64_t await_job(worker *w, uint64_t number)
{
    pool_state *pool = w->pool;
    uint64_t gate;
    double until = pool->spin ? qkv_clock() + SPIN_SECONDS : 0;
    do {
        for (int i = 0; i < 16; i++) {
            gate = atomic_load(&pool->gate);
            if (number_of(gate) != number)
                return gate;
            pause_core();
        }
    } while (until && qkv_clock() < until);

    mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    w->asleep = 1;
    if (atomic_load(&w->confined))
        let_go(w);                    /* who sleeps may run where its user says */
    while (number_of(gate = atomic_load(&pool->gate)) == number)
        condition_wait(&pool->wake, &pool->lock);
    w->asleep = 0;
    atomic_fetch_sub(&pool->sleepers, 1);
    mutex_unlock(&pool->lock);
    return gate;
}

static void work(worker *w)
{
    pool_state *pool = w->pool;
    qkv_affinity_begin(&w->affinity);
    qkv_set_task_mode();
    uint64_t gate = atomic_load(&pool->gate);
    while (!(gate & STOP)) {
        if (gate & OPEN && joined_of(gate) < wanted_of(gate)) {
            if (!atomic_compare_exchange_weak(&pool->gate, &gate, gate + 1))
                continue;             /* gate has been read again */
            atomic_store(&w->working, 1);
            draw_tasks(pool, joined_of(gate) + 1);
            atomic_store(&w->working, 0);
            atomic_store(&w->core, qkv_core());
            atomic_fetch_add(&pool->finished, 1);
            if (atomic_load(&pool->caller_sleeps)) {
                mutex_lock(&pool->lock);
                condition_signal(&pool->done);
                mutex_unlock(&pool->lock);
            }
        }
        if (atomic_load(&w->confined))
            let_go(w);
        gate = await_job(w, number_of(gate));
    }
}

#ifdef _WIN32
static unsigned __stdcall enter(void *w) { work(w); return 0; }
static int start_thread(worker *w)
{
    w->thread = (HANDLE)_beginthreadex(NULL, STACK_BYTES, enter, w, 0, NULL);
    return w->thread != 0;
}
static void join_thread(thread t) { WaitForSingleObject(t, INFINITE); CloseHandle(t); }
#else
static void *enter(void *w) { work(w); return NULL; }
static int start_thread(worker *w)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);        /* signals belong to the program's own threads */
    int failed = pthread_create(&w->thread, &attributes, enter, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return !failed;
}
static void join_thread(thread t) { pthread_join(t, NULL); }
#endif

/* The pool, made at first use; NULL if it is busy or memory is short. */
static pool_state *take_pool(void)
{
    pool_state *pool = atomic_load(&the_pool);
    if (!pool) {
        pool = qkv_scratch_take(sizeof *pool, 0);
        if (!pool)
            return NULL;
        atomic_init(&pool->gate, 0);
        atomic_init(&pool->finished, 0);
        atomic_init(&pool->next, 0);
        atomic_init(&pool->busy, 0);
        atomic_init(&pool->sleepers, 0);
        atomic_init(&pool->caller_sleeps, 0);
        atomic_init(&pool->started, 0);
        atomic_init(&pool->spin, 0);
        atomic_init(&pool->core, -1);
        atomic_init(&pool->released, 0);
        pool->cores = cores();
        mutex_init(&pool->lock);
        condition_init(&pool->wake);
        condition_init(&pool->done);
        watch_forks();
        pool_state *first = NULL;
        if (!atomic_compare_exchange_strong(&the_pool, &first, pool)) {
            qkv_scratch_put(pool, 0); /* another thread was quicker */
            pool = first;
        }
    }
    return atomic_exchange(&pool->busy, 1) ? NULL : pool;
}

static int grow(pool_state *pool, int wanted)
{
    int started = atomic_load(&pool->started);
    while (started < wanted - 1) {
        worker *w = &pool->workers[started];
        w->pool = pool;
        w->run = w->asleep = 0;
        atomic_init(&w->working, 0);
        atomic_init(&w->core, -1);
        atomic_init(&w->confined, 0);
        mutex_init(&w->moving);
        if (!start_thread(w))
            break;
        atomic_store(&pool->started, ++started);
    }
    return wanted < started + 1 ? wanted : started + 1;
}

int qkv_pool_acquire(int threads, int small)
{
    if (threads <= 1)
        return 1;
    pool_state *pool = take_pool();
    if (!pool)
        return 1;
    int wanted = threads < QKV_MAX_THREADS ? threads : QKV_MAX_THREADS;
    int awake = atomic_load(&pool->started) - atomic_load(&pool->sleepers);
    if (small && awake < wanted - 1 && qkv_clock() - atomic_load(&pool->released) > SPIN_SECONDS)
        wanted = awake + 1;
    int n = grow(pool, wanted);
    if (n == 1)
        atomic_store(&pool->busy, 0);
    else
        atomic_store(&pool->spin, n <= pool->cores);
    return n;
}

void qkv_pool_release(int n)
{
    pool_state *pool = atomic_load(&the_pool);
    if (!pool)
        return;
    atomic_store(&pool->released, qkv_clock());
    if (n > 1)
        atomic_store(&pool->busy, 0);
}

static int check_in_time(double *last, int (*check)(void *), void *arg)
{
    if (!check)
        return 0;
    double now = qkv_clock();
    if (*last == 0)
        *last = now;
    if (now - *last < CHECK_SECONDS)
        return 0;
    *last = now;
    return check(arg);
}

qkv_stop qkv_stop_if(int (*check)(void *), void *arg)
{
    return (qkv_stop){.check = check, .arg = arg, .mode = qkv_get_mode()};
}

int qkv_ask_to_stop(void *arg)
{
    qkv_stop *stop = arg;
    qkv_float_mode mode = qkv_get_mode();
    qkv_set_mode(stop->mode);         /* the check may run anything */
    if (!atomic_load(&stop->stop) && stop->check && stop->check(stop->arg))
        atomic_store(&stop->stop, 1);
    qkv_set_mode(mode);
    return atomic_load(&stop->stop);
}

int qkv_must_stop(qkv_stop *stop, int worker)
{
    if (worker == 0)
        check_in_time(&stop->asked, stop->check ? qkv_ask_to_stop : NULL, stop);
    return atomic_load_explicit(&stop->stop, memory_order_relaxed);
}

/* The caller's share: tasks one by one, with a look at the clock in between. */
static int draw_and_check(_Atomic int64_t *next, int64_t tasks, qkv_task function, void *context,
                          int (*check)(void *), void *arg)
{
    int64_t task;
    int stopped = 0;
    double last = 0;
    qkv_float_mode mode = qkv_get_mode();
    qkv_set_task_mode();
    while (!stopped && (task = atomic_fetch_add_explicit(next, 1, memory_order_relaxed)) < tasks) {
        function(context, task, 0);
        stopped = task + 1 < tasks && check_in_time(&last, check, arg);
    }
    if (stopped)
        atomic_store(next, tasks);
    qkv_set_mode(mode);
    return stopped;
}

/* 1 as soon as all who joined have finished, 0 if that takes more than `seconds`. */
static int spin_until_done(pool_state *pool, int joined, double seconds)
{
    double until = seconds > 0 ? qkv_clock() + seconds : 0;
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load(&pool->finished) == joined)
                return 1;
            pause_core();
        }
    } while (until && qkv_clock() < until);
    return 0;
}

/* Looks how long each worker at work has run: one that has not since the last look is put off its core, with a task in hand
 * for which the caller waits. Returns the first such worker, or NULL. */
static worker *look_for_stuck(pool_state *pool)
{
    worker *stuck = NULL;
    int started = atomic_load(&pool->started);
    for (int i = 0; i < started; i++) {
        worker *w = &pool->workers[i];
        if (!atomic_load(&w->working))
            continue;
        int64_t run = qkv_time_run(&w->affinity);
        if (!stuck && run >= 0 && run == w->run)
            stuck = w;
        w->run = run;
    }
    return stuck;
}

/* Waits until those who joined have finished; returns 1 if `check` said stop meanwhile, or has forked. */
static int await_workers(pool_state *pool, int joined, int (*check)(void *), void *arg)
{
    int stopped = 0, core = qkv_core(), look = pool->spin && core >= 0;
    double spin = pool->spin ? SPIN_SECONDS : 0, last = 0;
    if (spin_until_done(pool, joined, spin / 2))
        return 0;
    if (look)
        look_for_stuck(pool);
    if (spin_until_done(pool, joined, spin / 2))
        return 0;

    worker *brought = NULL;           /* one at a time: they would share the core */
    mutex_lock(&pool->lock);
    atomic_store(&pool->caller_sleeps, 1);
    /* By the standard it says nothing new, but QEMU lets a load overtake such a store of Arm (findings/). */
    atomic_thread_fence(memory_order_seq_cst);
    while (atomic_load(&pool->finished) != joined) {
        if (brought && !atomic_load(&brought->working))
            brought = NULL;           /* it lets itself go */
        worker *stuck = look ? look_for_stuck(pool) : NULL;
        if (stuck && !brought) {
            brought = stuck;
            bring_to(brought, core);
        }
        if (look)
            condition_wait_for(&pool->done, &pool->lock, LOOK_SECONDS);
        else if (check && !stopped)
            condition_wait_for(&pool->done, &pool->lock, CHECK_SECONDS / 4);
        else
            condition_wait(&pool->done, &pool->lock);
        if (!check || stopped)
            continue;
        mutex_unlock(&pool->lock);    /* `check` may take its time, or fork */
        stopped = check_in_time(&last, check, arg);
        if (atomic_load(&the_pool) != pool)
            return 1;
        mutex_lock(&pool->lock);
    }
    /* Who ended on this core gives way to the caller now, and would be found here, without a turn, by the next job. */
    core = qkv_core();
    for (int i = 0; look && i < atomic_load(&pool->started); i++)
        if (!pool->workers[i].asleep && atomic_load(&pool->workers[i].core) == core)
            keep_off(&pool->workers[i], core);
    atomic_store(&pool->caller_sleeps, 0);
    mutex_unlock(&pool->lock);
    return stopped;
}

/* Puts up the next job's gate and wakes as many sleepers as it wants. */
static void publish(pool_state *pool, uint64_t flags, int wanted)
{
    uint64_t number = number_of(atomic_load(&pool->gate)) + 1;
    atomic_store(&pool->gate, number << NUMBER_SHIFT | (uint64_t)wanted << WANTED_SHIFT | flags);
    if (!atomic_load(&pool->sleepers))
        return;
    mutex_lock(&pool->lock);
    int sleepers = atomic_load(&pool->sleepers), core = atomic_load(&pool->core);
    for (int i = 0; pool->spin && i < atomic_load(&pool->started); i++)
        if (pool->workers[i].asleep)
            keep_off(&pool->workers[i], core);
    for (int i = 0; i < wanted && i < sleepers; i++)
        condition_signal(&pool->wake);
    mutex_unlock(&pool->lock);
}

int qkv_pool_run(int n, int64_t tasks, qkv_task function, void *context, int (*check)(void *), void *arg)
{
    if (n <= 1) {
        _Atomic int64_t next = 0;
        return draw_and_check(&next, tasks, function, context, check, arg);
    }
    pool_state *pool = atomic_load(&the_pool);
    pool->function = function;
    pool->context = context;
    pool->tasks = tasks;
    atomic_store(&pool->core, qkv_core());
    atomic_store(&pool->finished, 0);
    atomic_store(&pool->next, 0);
    publish(pool, OPEN, n - 1);
    int stopped = draw_and_check(&pool->next, tasks, function, context, check, arg);
    if (atomic_load(&the_pool) != pool)
        return 1;                     /* `check` has forked and this is the child, whose workers are gone */
    uint64_t gate = atomic_fetch_and(&pool->gate, ~(uint64_t)OPEN);
    return await_workers(pool, joined_of(gate), stopped ? NULL : check, arg) || stopped;
}

int qkv_pool_threads(void)
{
    pool_state *pool = atomic_load(&the_pool);
    return pool ? atomic_load(&pool->started) : 0;
}

void qkv_pool_stop(void)
{
    pool_state *pool = atomic_load(&the_pool);
    if (!pool || atomic_exchange(&pool->busy, 1))
        return;
    int started = atomic_load(&pool->started);
    publish(pool, STOP, started);
    for (int i = 0; i < started; i++)
        join_thread(pool->workers[i].thread);
    publish(pool, 0, 0);              /* later workers must not see the stop */
    atomic_store(&pool->started, 0);
    atomic_store(&pool->busy, 0);
}
