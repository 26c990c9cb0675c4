/* Affinity of the pool's own threads, and whether they get on. */
#ifdef __linux__
#define _GNU_SOURCE                   /* affinity */
#endif
#include "affinity.h"

#ifdef QKV_HAS_AFFINITY
#include <time.h>

static int may_run_on(const qkv_affinity *a, cpu_set_t *set)
{
    return !pthread_getaffinity_np(a->thread, sizeof *set, set);
}

static void confine(qkv_affinity *a, const cpu_set_t *set)
{
    a->set = *set;
    a->confined = !pthread_setaffinity_np(a->thread, sizeof *set, set);
}

void qkv_affinity_begin(qkv_affinity *a)
{
    a->thread = pthread_self();
    a->confined = 0;
}

int qkv_core(void)
{
    int core = sched_getcpu();
    return core < CPU_SETSIZE ? core : -1;
}

void qkv_keep_off(qkv_affinity *a, int core)
{
    if (core < 0 || (!a->confined && !may_run_on(a, &a->usual)))
        return;
    cpu_set_t set = a->usual;
    CPU_CLR(core, &set);
    if (CPU_COUNT(&set) > 0 && !(a->confined && CPU_EQUAL(&set, &a->set)))
        confine(a, &set);
}

void qkv_bring_to(qkv_affinity *a, int core)
{
    if (core < 0 || (!a->confined && !may_run_on(a, &a->usual)) || !CPU_ISSET(core, &a->usual))
        return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    confine(a, &set);
}

void qkv_let_go(qkv_affinity *a)
{
    cpu_set_t set;
    if (a->confined && may_run_on(a, &set) && CPU_EQUAL(&set, &a->set))
        pthread_setaffinity_np(a->thread, sizeof a->usual, &a->usual);
    a->confined = 0;
}

int64_t qkv_time_run(const qkv_affinity *a)
{
    clockid_t clock;
    struct timespec t;
    if (pthread_getcpuclockid(a->thread, &clock) || clock_gettime(clock, &t))
        return -1;
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
#else
void qkv_affinity_begin(qkv_affinity *a) { a->confined = 0; }
int qkv_core(void) { return -1; }
void qkv_keep_off(qkv_affinity *a, int core) { (void)a; (void)core; }
void qkv_bring_to(qkv_affinity *a, int core) { (void)a; (void)core; }
void qkv_let_go(qkv_affinity *a) { (void)a; }
int64_t qkv_time_run(const qkv_affinity *a) { (void)a; return -1; }
#endif
