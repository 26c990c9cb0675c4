/* One function run over many tasks by a pool of threads.
 *
 *     int n = qkv_pool_acquire(threads);          // workers granted, 1 if the pool is busy or cannot grow
 *     qkv_pool_run(n, tasks, function, context, check, arg);
 *     qkv_pool_release(n);
 *
 * The pool starts threads when they are first needed and keeps them. The caller is worker 0. Tasks are handed out one
 * by one in order. A call from inside a task, or while another thread holds the pool, is granted one worker and runs in
 * its own thread.
 */
#ifndef QKV_THREADS_H
#define QKV_THREADS_H

#include <stdint.h>

typedef void (*qkv_task)(void *context, int64_t task, int worker);      /* 0 <= worker < n */

int qkv_pool_acquire(int threads);
void qkv_pool_release(int n);

/* Returns 1 if `check` (may be NULL) said stop: tasks not yet begun are then left out. The caller's thread asks it every
 * 50 to 100 ms, between its tasks and while it waits for those of others. */
int qkv_pool_run(int n, int64_t tasks, qkv_task function, void *context, int (*check)(void *), void *arg);

/* Asks `check` (may be NULL) if it is time, and returns its answer; else 0. For worker 0 in a long task; `last`, from 0
 * on, holds when it was asked. */
int qkv_check(double *last, int (*check)(void *), void *arg);

double qkv_clock(void);                                /* seconds from a fixed moment */

#endif
