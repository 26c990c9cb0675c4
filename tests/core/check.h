/* What the core's own tests share: CHECK, random numbers, and arrays that are each a block of exactly its size. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qkv.h"

static long checks;

/* The name of the CPU path that is to be tested as number isa, or NULL. QKV_TEST_PATHS is how many of the best are, for
 * emulators, where each takes minutes; without it all are. */
static inline const char *tested_path(int isa)
{
    const char *most = getenv("QKV_TEST_PATHS");
    return most && isa >= atoi(most) ? NULL : qkv_isa_name(isa);
}

/* Functions with problems of their own, which are large: together in one frame they would be too large. */
#if defined(__GNUC__)
#define APART __attribute__((noinline))
#else
#define APART
#endif

/* How many of n random problems are tried: under QKV_TEST_SHARE=3 a third, for emulators and ThreadSanitizer. */
static inline int share_of(int n)
{
    const char *share = getenv("QKV_TEST_SHARE");
    return share ? n / atoi(share) : n;
}

#define CHECK(condition, ...) \
    do { \
        checks++; \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__); \
            fprintf(stderr, "\n"); \
            exit(1); \
        } \
    } while (0)

static uint64_t state = 88172645463325252u;

static uint64_t draw(void)                              /* xorshift64 */
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static int64_t between(int64_t low, int64_t high) { return low + (int64_t)(draw() % (uint64_t)(high - low + 1)); }

static void *block(int64_t bytes)
{
    void *memory = malloc(bytes > 0 ? (size_t)bytes : 1);
    if (!memory)
        abort();
    return memory;
}

static inline double load(qkv_type type, const void *data, int64_t i)
{
    return type == QKV_F32 ? (double)((const float *)data)[i] : ((const double *)data)[i];
}

static void store(qkv_type type, void *data, int64_t i, double x)
{
    if (type == QKV_F32)
        ((float *)data)[i] = (float)x;
    else
        ((double *)data)[i] = x;
}

static int64_t size_of(qkv_type type) { return type == QKV_F32 ? 4 : 8; }

static inline void *uniform(qkv_type type, int64_t n)
{
    void *data = block(n * size_of(type));
    for (int64_t i = 0; i < n; i++)
        store(type, data, i, (double)between(-1000, 1000) / 1000);
    return data;
}
