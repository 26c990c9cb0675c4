/* One function run over many tasks by a pool of threads.
 *
 *     int n = qkv_pool_acquire(threads, small);   // workers granted, 1 if the pool is busy or cannot grow
 *     qkv_pool_run(n, tasks, function, context, check, arg);
 *     qkv_pool_release(n);
 *
 * The pool starts threads when they are first needed and keeps them. The caller is worker 0. Tasks are handed out one
 * by one in order. A call from inside a task, or while another thread holds the pool, is granted one worker and runs in
 * its own thread. Tasks run in the mode of float_mode.h, and the caller's is back when qkv_pool_run returns.
 */
#ifndef QKV_THREADS_H
#define QKV_THREADS_H

#include <stdatomic.h>
#include <stdint.h>

#include "float_mode.h"

typedef void (*qkv_task)(void *context, int64_t task, int worker);      /* 0 <= worker < n */

/* A small job is not worth waking anybody for: it gets those who are awake, and all only if the last job was just now. */
int qkv_pool_acquire(int threads, int small);
void qkv_pool_release(int n);

/* Returns 1 if `check` (may be NULL) said stop: tasks not yet begun are then left out. The caller's thread asks it every
 * 50 to 100 ms, between its tasks and while it waits for those of others. */
int qkv_pool_run(int n, int64_t tasks, qkv_task function, void *context, int (*check)(void *), void *arg);

/* Whether a call is to be given up, for tasks that take long themselves. */
typedef struct {
    int (*check)(void *);             /* or NULL */
    void *arg;
    double asked;                     /* when worker 0 last asked within a task */
    atomic_int stop;                  /* the answer was yes */
    qkv_float_mode mode;              /* the caller's, in which `check` runs */
} qkv_stop;

/* That of a call whose caller this is. */
qkv_stop qkv_stop_if(int (*check)(void *), void *arg);

/* Worker 0 asks if it is time, the others look whether it was told to stop. */
int qkv_must_stop(qkv_stop *stop, int worker);

/* The `check` of such a call's qkv_pool_run, `arg` being the qkv_stop. */
int qkv_ask_to_stop(void *stop);

double qkv_clock(void);                                /* seconds from a fixed moment */

#endif
