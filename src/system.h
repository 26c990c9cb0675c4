/* What differs between systems: a mutex, a condition, a thread, the number of cores, a pause. Whoever includes it defines
 * _GNU_SOURCE first (on Linux, for sched_getaffinity). */
#ifndef QKV_SYSTEM_H
#define QKV_SYSTEM_H

#include <stdint.h>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <process.h>
typedef SRWLOCK mutex;
typedef CONDITION_VARIABLE condition;
typedef HANDLE thread;
static inline void mutex_init(mutex *m) { InitializeSRWLock(m); }
static inline void mutex_lock(mutex *m) { AcquireSRWLockExclusive(m); }
static inline void mutex_unlock(mutex *m) { ReleaseSRWLockExclusive(m); }
static inline void condition_init(condition *c) { InitializeConditionVariable(c); }
static inline void condition_wait(condition *c, mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static inline void condition_wait_for(condition *c, mutex *m, double seconds)
{
    SleepConditionVariableSRW(c, m, (DWORD)(seconds * 1e3), 0);
}
static inline void condition_signal(condition *c) { WakeConditionVariable(c); }
static inline int cores(void) { SYSTEM_INFO info; GetSystemInfo(&info); return (int)info.dwNumberOfProcessors; }
#else
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
typedef pthread_mutex_t mutex;
typedef pthread_cond_t condition;
typedef pthread_t thread;
static inline void mutex_init(mutex *m) { pthread_mutex_init(m, NULL); }
static inline void mutex_lock(mutex *m) { pthread_mutex_lock(m); }
static inline void mutex_unlock(mutex *m) { pthread_mutex_unlock(m); }
static inline void condition_init(condition *c) { pthread_cond_init(c, NULL); }
static inline void condition_wait(condition *c, mutex *m) { pthread_cond_wait(c, m); }
static inline void condition_wait_for(condition *c, mutex *m, double seconds)
{
    struct timespec until;
    timespec_get(&until, TIME_UTC);   /* the clock of conditions on every system */
    int64_t ns = until.tv_nsec + (int64_t)(seconds * 1e9);
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    pthread_cond_timedwait(c, m, &until);
}
static inline void condition_signal(condition *c) { pthread_cond_signal(c); }
#ifdef __linux__
#include <sched.h>
static inline int cores(void)
{
    cpu_set_t allowed;
    return sched_getaffinity(0, sizeof allowed, &allowed) ? 1 : CPU_COUNT(&allowed);
}
#else
static inline int cores(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
#endif
#endif

static inline void pause_core(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(_MSC_VER) && defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

#endif
