/* What the CPU lists and the operating system has enabled, and the best-first list of paths.
 *
 * To add a path: its file in kernels/, a line in setup.py's table, a feature bit if it needs a new one, and a line in
 * `built` below.
 */
#define _GNU_SOURCE                   /* syscall */
#include "cpu.h"

#include <limits.h>
#include <stdatomic.h>

#include "qkv.h"

extern const qkv_isa qkv_amx, qkv_amx_emulated, qkv_avx512bf16, qkv_avx512, qkv_avx2, qkv_neonbf16, qkv_neon, qkv_portable;

static const qkv_isa *const built[] = {                /* best first */
#ifdef QKV_HAVE_AMX
    &qkv_amx,
#endif
#ifdef QKV_HAVE_AVX512BF16
    &qkv_avx512bf16,
#endif
#ifdef QKV_HAVE_AVX512
    &qkv_avx512,
#endif
#ifdef QKV_HAVE_AVX2
    &qkv_avx2,
#endif
#ifdef QKV_HAVE_NEONBF16
    &qkv_neonbf16,
#endif
#ifdef QKV_HAVE_NEON
    &qkv_neon,
#endif
#ifdef QKV_HAVE_AMX_EMULATED
    &qkv_amx_emulated,                                 /* behind every path that is fast */
#endif
    &qkv_portable,
};
enum { BUILT = sizeof built / sizeof built[0] };

#if defined(__x86_64__) || defined(_M_X64)

#ifdef _MSC_VER
#include <intrin.h>
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) { __cpuidex((int *)r, (int)leaf, (int)subleaf); }
static uint64_t enabled_states(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t r[4])
{
    r[0] = r[1] = r[2] = r[3] = 0;
    __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]);
}
static uint64_t enabled_states(void)
{
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}
#endif

static uint32_t detect(void)
{
    enum { EAX = 0, EBX = 1, ECX = 2, EDX = 3 };
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29 };         /* leaf 1, ecx */
    enum { AVX2 = 1 << 5, F = 1 << 16, DQ = 1 << 17, CD = 1 << 28, BW = 1 << 30 };    /* leaf 7, ebx */
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };                                  /* leaf 7, edx */
    enum { BF16 = 1 << 5 };                                                           /* leaf 7.1, eax */
    const uint32_t VL = 1u << 31;
    const uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;            /* register states that the system saves */
    uint32_t zero[4], one[4], seven[4], more[4], have = 0;

    cpuid(0, 0, zero);
    cpuid(1, 0, one);
    if (!(one[ECX] & OSXSAVE) || !(one[ECX] & AVX))
        return 0;
    uint64_t states = enabled_states();
    cpuid(7, 0, seven);
    cpuid(7, seven[EAX] >= 1, more);                   /* seven's eax is the last of its subleaves */
    if ((states & YMM) == YMM) {
        have |= one[ECX] & FMA ? QKV_CPU_FMA : 0;
        have |= one[ECX] & F16C ? QKV_CPU_F16C : 0;
        have |= seven[EBX] & AVX2 ? QKV_CPU_AVX2 : 0;
    }
    const uint32_t all = F | DQ | CD | BW | VL;
    if ((states & ZMM) == ZMM && (seven[EBX] & all) == all)
        have |= QKV_CPU_AVX512 | (seven[EAX] >= 1 && more[EAX] & BF16 ? QKV_CPU_AVX512BF16 : 0);
    if ((states & TILES) == TILES && seven[EDX] & AMX_TILE && seven[EDX] & AMX_BF16)
        have |= QKV_CPU_AMX;
    /* Twice the rate of multiply-adds on Zen 4 and later; on Sapphire Rapids less than theirs. */
    const int amd = zero[ECX] == 0x444d4163;           /* AuthentiCAMD */
    if (have & QKV_CPU_AVX512BF16 && amd)
        have |= QKV_CPU_FAST_PAIRS;
    /* Zen 4 reads a stream fastest if nothing is fetched but the next row: 26 instead of 20 GB/s; Zen 5 17 instead of 33. No
     * other was measured: Zen 3 is taken for Zen 4, and all others for Zen 5. */
    if (amd && (one[EAX] >> 20 & 0xff) == 0xa)         /* family 0x19 */
        have |= QKV_CPU_STREAMS;
    return have;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

#if defined(_WIN32)
#include <windows.h>
static int has_bf16(void) { return IsProcessorFeaturePresent(68); }      /* PF_ARM_V86_BF16_INSTRUCTIONS_AVAILABLE */
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static int has_bf16(void)
{
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, NULL, 0) == 0 && has;
}
#elif defined(__linux__)
#include <sys/auxv.h>
static int has_bf16(void) { return (getauxval(AT_HWCAP2) >> 14 & 1) != 0; }         /* HWCAP2_BF16 */
#else
static int has_bf16(void) { return 0; }
#endif

/* The rest is every such CPU's. */
static uint32_t detect(void) { return has_bf16() ? QKV_CPU_BF16 : 0; }

#else
static uint32_t detect(void) { return 0; }
#endif

uint32_t qkv_features(void)
{
    /* Every thread would find the same, so a race here is harmless. The instruction is slow in virtual machines. */
    static _Atomic uint32_t found;
    const uint32_t known = 1u << 31;
    uint32_t have = atomic_load_explicit(&found, memory_order_relaxed);
    if (!have) {
        have = detect() | known;
        atomic_store_explicit(&found, have, memory_order_relaxed);
    }
    return have & ~known;
}

#if defined(__linux__) && defined(__x86_64__)
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
/* For all threads, those that exist too. It is refused while one of them has an alternate signal stack that tiles do not fit. */
static int ask_system(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 0 : errno;
}
#else
static int ask_system(void) { return -1; }             /* no system that says why */
#endif

enum { UNASKED = INT_MIN };
static _Atomic int refusal = UNASKED;                  /* asked once: bits must not change in a process */
static int (*ask_instead)(void);

void qkv_ask_instead(int (*ask)(void))
{
    ask_instead = ask;
    atomic_store(&refusal, UNASKED);
}

int qkv_tiles_refusal(int *known)
{
    int found = atomic_load(&refusal);
    *known = found != UNASKED;
    return *known ? found : 0;
}

int qkv_may_use_tiles(const qkv_isa *isa)
{
    if (!isa->tiles[0] || !(ask_instead || isa->needs & QKV_CPU_AMX))
        return isa->tiles[0] != NULL;
    int known = atomic_load(&refusal);
    if (known == UNASKED) {
        int found = ask_instead ? ask_instead() : ask_system();
        /* Threads that ask at the same time have the answer of one of them. */
        known = atomic_compare_exchange_strong(&refusal, &known, found) ? found : known;
    }
    return known == 0;
}

const qkv_isa *qkv_isa_at(int index)
{
    uint32_t have = qkv_features();
    for (int i = 0; i < BUILT; i++)
        if ((have & built[i]->needs) == built[i]->needs && index-- == 0)
            return built[i];
    return NULL;
}

const char *qkv_built_name(int path) { return path >= 0 && path < BUILT ? built[path]->name : NULL; }
uint32_t qkv_built_needs(int path) { return path >= 0 && path < BUILT ? built[path]->needs : 0; }

const char *qkv_feature_name(int bit)
{
    static const char *const names[] = {"avx2", "fma", "avx512 (f, vl, dq, bw, cd)", "avx512bf16", "f16c",
                                        "fast avx512bf16 (amd)", "streams (zen 3, zen 4)", "bf16 (arm)", "amx (tile, bf16)"};   /* as QKV_CPU_... */
    return bit >= 0 && (size_t)bit < sizeof names / sizeof names[0] ? names[bit] : NULL;
}

const char *qkv_compiler(void)
{
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#if defined(__clang__)
    return __VERSION__;               /* says its name itself */
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "MSVC " TEXT(_MSC_FULL_VER);
#else
    return "unknown";
#endif
}

int qkv_path_with(const qkv_kernels *kernels, int isa)
{
    for (const qkv_isa *path; (path = qkv_isa_at(isa)) != NULL; isa++) {
        const qkv_kernels *tables[] = {path->type[0], path->type[1], path->pairs, path->tiles[0], path->tiles[1], path->tiles[2]};
        for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++)
            if (tables[i] == kernels)
                return isa;
    }
    return -1;
}

const qkv_kernels *qkv_kernels_at(int index, int type)
{
    while (!qkv_isa_at(index)->type[type])
        index++;
    return qkv_isa_at(index)->type[type];
}

const char *qkv_isa_name(int index)
{
    const qkv_isa *isa = index < 0 ? NULL : qkv_isa_at(index);
    return isa ? isa->name : NULL;
}
