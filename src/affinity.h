/* Which cores a worker of the pool may run on. Where the system does not let us say so, nothing here does anything. */
#ifndef QKV_AFFINITY_H
#define QKV_AFFINITY_H

#include <stdint.h>

#if defined(__linux__) && !defined(__ANDROID__)
#define QKV_HAS_AFFINITY 1
#include <pthread.h>
#include <sched.h>
typedef struct {
    pthread_t thread;
    int confined;                     /* to `set`; before, it was allowed `usual` */
    cpu_set_t usual, set;
} qkv_affinity;
#else
typedef struct { int confined; } qkv_affinity;
#endif

/* For the calling thread, which others then may confine as well, one at a time. */
void qkv_affinity_begin(qkv_affinity *affinity);

/* The calling thread's core, or -1 if that is not known. */
int qkv_core(void);

/* Lets it run anywhere but on this core, if it has another. */
void qkv_keep_off(qkv_affinity *affinity, int core);

/* Lets it run on this core alone, if it may run there. */
void qkv_bring_to(qkv_affinity *affinity, int core);

/* Gives back what it was allowed before, unless somebody else has changed that meanwhile. */
void qkv_let_go(qkv_affinity *affinity);

/* Nanoseconds for which it has run, or -1 if that is not known. */
int64_t qkv_time_run(const qkv_affinity *affinity);

#endif
