/* The dialect that the kernels are written in: what C11 lacks, once per compiler. */
#ifndef QKV_COMPILER_H
#define QKV_COMPILER_H

#if defined(__GNUC__) || defined(__clang__)
#define QKV_INLINE inline __attribute__((always_inline))
#define QKV_NOINLINE __attribute__((noinline))
/* Small arrays of vectors stay in registers only if every loop over them is unrolled: gcc needs to be told. Not under
 * sanitizers: clang then takes minutes for a path. */
#ifdef QKV_SANITIZED
#define QKV_UNROLL
#define QKV_UNROLL_2
#define QKV_UNROLL_4
#else
#define QKV_UNROLL _Pragma("GCC unroll 16")
#define QKV_UNROLL_2 _Pragma("GCC unroll 2")
#define QKV_UNROLL_4 _Pragma("GCC unroll 4")
#endif
#define QKV_PREFETCH(p) __builtin_prefetch(p)
#define QKV_PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)       /* not into the nearest cache */
#define QKV_PREFETCH_WRITE(p) __builtin_prefetch(p, 1)
#define QKV_IN_REGISTER(p) __asm__("" : "+r"(p))             /* so that what is at a distance from p is addressed by it */
#elif defined(_MSC_VER)
#define QKV_INLINE __forceinline
#define QKV_NOINLINE __declspec(noinline)
#define QKV_UNROLL
#define QKV_UNROLL_2
#define QKV_UNROLL_4
#define QKV_PREFETCH(p) ((void)(p))
#define QKV_PREFETCH_L2(p) ((void)(p))
#define QKV_PREFETCH_WRITE(p) ((void)(p))
#define QKV_IN_REGISTER(p) ((void)(p))
#else
#define QKV_INLINE inline
#define QKV_NOINLINE
#define QKV_UNROLL
#define QKV_UNROLL_2
#define QKV_UNROLL_4
#define QKV_PREFETCH(p) ((void)(p))
#define QKV_PREFETCH_L2(p) ((void)(p))
#define QKV_PREFETCH_WRITE(p) ((void)(p))
#define QKV_IN_REGISTER(p) ((void)(p))
#endif

#define QKV_ALIGN _Alignas(64)

#endif
