/* Scratch memory and the allocation hook.
 *
 * Kept blocks live in a small array of atomic pointers. Taking one is an exchange with NULL, giving it back a
 * compare-and-swap: no lock that a fork could leave held. A block in use at a fork is merely lost to the child.
 */
#include "memory.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "qkv.h"

enum { SLOTS = 64, ALIGNMENT = 64 };
enum { KEEP = 4 << 20 };              /* larger blocks go back to the system at once */

typedef struct {
    size_t bytes;
    void *block;                      /* what the allocator returned */
} header;                             /* lies in the ALIGNMENT bytes before the scratch */

static void *system_allocate(size_t bytes, void *arg) { (void)arg; return malloc(bytes); }
static void system_release(void *block, void *arg) { (void)arg; free(block); }

static struct {
    void *(*allocate)(size_t, void *);
    void (*release)(void *, void *);
    void *arg;
} hook = {system_allocate, system_release, NULL};

static _Atomic(void *) kept[SLOTS];
static _Atomic int64_t countdown = -1, seen;

void qkv_set_allocator(void *(*allocate)(size_t, void *), void (*release)(void *, void *), void *arg)
{
    qkv_trim();
    hook.allocate = allocate ? allocate : system_allocate;
    hook.release = release ? release : system_release;
    hook.arg = arg;
}

void qkv_fail_allocation(int64_t k)
{
    atomic_store(&seen, 0);
    atomic_store(&countdown, k);
}

int64_t qkv_allocations(void) { return atomic_load(&seen); }

static header *header_of(void *scratch) { return (header *)((char *)scratch - ALIGNMENT); }

static void *allocate(size_t bytes)
{
    int64_t k = atomic_fetch_add(&seen, 1);
    if (k == atomic_load(&countdown) || bytes > SIZE_MAX - 2 * ALIGNMENT)
        return NULL;
    char *block = hook.allocate(bytes + 2 * ALIGNMENT, hook.arg);
    if (!block)
        return NULL;
    char *scratch = block + 2 * ALIGNMENT - (uintptr_t)block % ALIGNMENT;
    *header_of(scratch) = (header){bytes, block};
    return scratch;
}

static void release(void *scratch)
{
    if (scratch)
        hook.release(header_of(scratch)->block, hook.arg);
}

void *qkv_scratch_take(size_t bytes, int slot)
{
    for (int i = 0; i < SLOTS; i++) {
        _Atomic(void *) *place = &kept[(slot + i) % SLOTS];
        if (!atomic_load_explicit(place, memory_order_relaxed))
            continue;
        void *scratch = atomic_exchange(place, NULL);
        if (!scratch)
            continue;
        if (header_of(scratch)->bytes >= bytes)
            return scratch;
        release(scratch);             /* outgrown: a larger one takes its place when given back */
        break;
    }
    return allocate(bytes);
}

void qkv_scratch_put(void *scratch, int slot)
{
    if (!scratch)
        return;
    for (int i = 0; i < SLOTS && header_of(scratch)->bytes <= KEEP; i++) {
        void *empty = NULL;
        if (atomic_compare_exchange_strong(&kept[(slot + i) % SLOTS], &empty, scratch))
            return;
    }
    release(scratch);
}

void qkv_trim(void)
{
    for (int i = 0; i < SLOTS; i++)
        release(atomic_exchange(&kept[i], NULL));
}
