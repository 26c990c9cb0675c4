/* How a thread rounds, and what it makes of subnormal numbers.
 *
 * Tasks run in a mode of their own: to nearest, and with subnormal float32 and float64 as 0 where the CPU has that, in and out.
 * Products of such numbers take some CPUs 100 times as long. It also makes bits the same whatever the caller makes of them, which
 * other libraries set per thread. What converts float16 has no such mode.
 */
#ifndef QKV_FLOAT_MODE_H
#define QKV_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
typedef uint32_t qkv_float_mode;
static inline qkv_float_mode qkv_get_mode(void) { return _mm_getcsr(); }
static inline void qkv_set_mode(qkv_float_mode mode) { _mm_setcsr(mode); }
/* All exceptions masked, results and operands below the smallest normal number are 0. */
static inline void qkv_set_task_mode(void) { _mm_setcsr(0x1f80 | 0x8000 | 0x40); }
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
typedef uint64_t qkv_float_mode;
static inline qkv_float_mode qkv_get_mode(void)
{
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static inline void qkv_set_mode(qkv_float_mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
static inline void qkv_set_task_mode(void) { qkv_set_mode(1 << 24); }       /* FZ */
#else
#include <fenv.h>
typedef fenv_t qkv_float_mode;
static inline qkv_float_mode qkv_get_mode(void)
{
    fenv_t mode;
    fegetenv(&mode);
    return mode;
}
static inline void qkv_set_mode(qkv_float_mode mode) { fesetenv(&mode); }
static inline void qkv_set_task_mode(void) { fesetenv(FE_DFL_ENV); }
#endif

#endif
