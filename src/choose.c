/* Which keys a call may leave out, from what their weights can be at most; and rows of K and V, brought together.
 *
 * A weight w that is known but for a factor of up to 2^e lies in [w / 2^e, w 2^e]. With L the sum of what all are at least, keys
 * whose weights are at most U together hold no more than U / L of all: read or not, all others are at least L - U. So the keys
 * with the smallest bounds are left out, as many as add up to tolerance * L. Bounds are rounded outward: 2^e is taken from above
 * as the line between powers of two, and sums of float32 have a margin.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu.h"
#include "kernels/compiler.h"
#include "kernels/kernels.h"
#include "memory.h"
#include "qkv.h"
#include "threads.h"

enum {
    BLOCK = 512,                      /* keys that are summed in float32 */
    GROUP = 32,                       /* bounds that are looked at together */
    BINS = 1024,                      /* of bounds, eight for each power of two */
    BIN_BITS = 20,
    AHEAD = 4,                        /* rows that are on their way from memory while one is copied */
    SERIAL = 1 << 17                  /* weights, or bytes, that one thread has done before others wake */
};
static const float farthest = 100;    /* powers of two that a weight may be off */
static const double margin = 0x1p-12; /* of sums, of factors and of their halves: a dozen roundings */
static const double smallest = 0x1p-126;                /* what is less may be 0 */

static int32_t bits_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* At least 2^y, 0 <= y <= farthest. */
static inline float raised(float y)
{
    return float_of((127 << 23) + (int32_t)(y * 0x1p23f) + 1);
}

/* At most 2^-y, likewise: the line is up to 1.0615 times as high as the curve. */
static inline float lowered(float y)
{
    return float_of((127 << 23) - (int32_t)(y * 0x1p23f) - 1) * 0.942f;
}

/* The sum of a block, halves added to each other: a loop that compilers vectorise. */
static double sum_block(float *x)
{
    for (int half = BLOCK / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    return x[0];
}

/* The largest of what is not NaN, or 0: lanes of their own, as a comparison takes longer than the next load. */
static float largest_of(const float *x, int64_t n)
{
    float lane[8] = {0}, largest = 0;
    int64_t whole = n - n % 8;
    for (int64_t i = 0; i < whole; i += 8)
        for (int j = 0; j < 8; j++)
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (int j = 0; j < 8; j++)
        largest = lane[j] > largest ? lane[j] : largest;
    for (int64_t i = whole; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* Weights become their bounds. Returns the sum of what they are at least. */
static double bound_row(float *weight, const float *step, int64_t n, float reach, float slack)
{
    double sum = 0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        float least[BLOCK] = {0}, *w = weight + first;
        const float *of = step + first;
        int count = (int)(n - first < BLOCK ? n - first : BLOCK);
        for (int i = 0; i < count; i++)
            least[i] = w[i] * lowered(reach * of[i] + slack);
        for (int i = 0; i < count; i++)
            w[i] *= raised(reach * of[i] + slack);
        sum += sum_block(least);
    }
    return sum * (1 - margin);
}

/* The sum of the bounds from 0 on that are less than `under`. */
static double sum_under(const float *bound, int64_t n, float under)
{
    double sum = 0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        float part[BLOCK] = {0};
        int count = (int)(n - first < BLOCK ? n - first : BLOCK);
        for (int i = 0; i < count; i++) {
            float x = bound[first + i] < under ? bound[first + i] : 0;
            part[i] = x > 0 ? x : 0;
        }
        sum += sum_block(part);
    }
    return sum * (1 + margin);
}

/* Whether some bound is as large: mostly none is. */
static inline int reaches(const float *bound, int n, float least)
{
    int32_t found = 0;
    for (int i = 0; i < n; i++)
        found |= bound[i] >= least;
    return found;
}

/* The bound from which on keys have to be read, for all others to add up to `allowed` at most. */
static float threshold(const float *bound, int64_t n, double allowed)
{
    double sum[BINS] = {0};
    double even = allowed / (2 * (double)n);            /* all may be as large as this */
    float begin = (float)even;
    if (!(even >= smallest))
        return (float)smallest;
    double total = sum_under(bound, n, begin);
    int32_t base = bits_of(begin) >> BIN_BITS;
    for (int64_t first = 0; first < n; first += GROUP) {
        int count = (int)(n - first < GROUP ? n - first : GROUP);
        for (int i = reaches(bound + first, count, begin) ? 0 : count; i < count; i++)
            if (bound[first + i] >= begin) {
                int32_t bin = (bits_of(bound[first + i]) >> BIN_BITS) - base;
                sum[bin < BINS ? bin : BINS - 1] += bound[first + i];
            }
    }
    for (int bin = 0; bin < BINS; bin++) {
        total += sum[bin] * (1 + margin);
        if (total > allowed)
            return bin ? float_of((base + bin) << BIN_BITS) : begin;
    }
    return INFINITY;
}

typedef struct {
    const qkv_choice *choice;
    int32_t *marks;                   /* (workers, len_k): not 0 for keys that some row needs */
} choosing;

/* What those weights of a row may be together that read as 0, because they are less than the smallest number. */
static double vanished(const qkv_choice *c, int64_t row, int64_t n, float largest)
{
    return smallest * (double)n * raised(largest * c->reach[row] + c->slack[row]);
}

static int64_t list_marked(const int32_t *mark, int64_t n, int64_t *key)
{
    int64_t count = 0;
    for (int64_t first = 0; first < n; first += GROUP) {
        int64_t end = first + GROUP < n ? first + GROUP : n;
        int32_t found = 0;
        for (int64_t i = first; i < end; i++)
            found |= mark[i];
        for (int64_t i = found ? first : end; i < end; i++)
            if (mark[i])
                key[count++] = i;
    }
    return count;
}

static void choose_task(void *context, int64_t task, int worker)
{
    const choosing *job = context;
    const qkv_choice *c = job->choice;
    int64_t sequence = task / c->heads, n = c->length[sequence], first = task * c->rows;
    const float *step = (const float *)((const char *)c->steps + sequence * c->steps_at[0] + task % c->heads * c->steps_at[1]);
    int32_t *mark = job->marks + worker * c->len_k;
    int64_t *key = c->keys + task * c->len_k;
    float largest = largest_of(step, n);
    memset(mark, 0, (size_t)n * sizeof *mark);
    c->count[task] = -1;
    for (int64_t r = first; r < first + c->rows; r++) {
        float *weight = c->weights + r * c->len_k;
        if (!(largest * c->reach[r] + c->slack[r] < farthest))
            return;
        double low = bound_row(weight, step, n, c->reach[r], c->slack[r]);
        if (!(low >= 0))              /* NaN */
            return;
        c->left[r] = (float)low;
        if (low == 0)                 /* nothing is seen, or nothing but a sink weighs */
            continue;
        double allowed = c->tolerance * low - (1 + 2 * margin) * vanished(c, r, n, largest);
        if (!(allowed >= 0))          /* what reads as 0, and is not read, may weigh more */
            return;
        float least = threshold(weight, n, allowed);
        for (int64_t i = 0; i < n; i++)
            mark[i] |= weight[i] >= least;
    }
    int64_t count = list_marked(mark, n, key);
    for (int64_t r = first; r < first + c->rows; r++) {
        float *bound = c->weights + r * c->len_k;
        for (int64_t i = 0; i < n; i++)
            bound[i] = mark[i] ? -bound[i] : bound[i];
        double most = sum_under(bound, n, INFINITY) + vanished(c, r, n, largest), low = c->left[r];
        c->left[r] = (float)(low == 0 ? 2 * most : most / low * (1 + margin));
    }
    c->count[task] = count;
}

/* A task for each key head of each sequence. */
static qkv_status run(qkv_task task, void *job, int64_t tasks, int threads, int (*interrupted)(void *), void *arg)
{
    int workers = qkv_pool_acquire((int)(threads < tasks ? threads : tasks), 0);
    qkv_stop stop = qkv_stop_if(interrupted, arg);
    int stopped = qkv_pool_run(workers, tasks, task, job, interrupted ? qkv_ask_to_stop : NULL, &stop);
    qkv_pool_release(workers);
    return stopped ? QKV_INTERRUPTED : QKV_OK;
}

qkv_status qkv_choose(const qkv_choice *c)
{
    int64_t tasks = c->sequences * c->heads, work = tasks * c->rows * c->len_k;
    int threads = work < SERIAL ? 1 : c->threads;
    if (work == 0) {
        memset(c->count, 0, (size_t)tasks * sizeof *c->count);
        return QKV_OK;
    }
    choosing job = {.choice = c, .marks = qkv_scratch_take((size_t)threads * (size_t)c->len_k * sizeof(int32_t), 0)};
    qkv_status status = job.marks ? run(choose_task, &job, tasks, threads, c->interrupted, c->interrupted_arg) : QKV_NO_MEMORY;
    qkv_scratch_put(job.marks, 0);
    return status;
}

/* The same without weights of all keys: where nothing but a product of Q and K makes a score, what bounds its power of two is
 * enough to see of most keys that they do not matter. Queries become int16, so that scores are made in integers.
 *
 * Sizes: a power of two is off by less than `widest`, half a step of each element, so it is at most 254 * widest, of which a
 * rounding is 0.001; what is read as 0 is less. Each bound is 0.01 wider for that.
 */
static const double widest = 40;      /* powers of two that a weight may be off here */
static const double deepest = 100;    /* below the largest, that are looked at */
static const float slack = 0.01f;

typedef struct {
    double reach;                     /* of a key's step: by how much the power of two may be off */
    double top;                       /* the sum of all weights, over 2^low, at least */
    int64_t many;                     /* keys that are near */
} pruned_row;

typedef struct {
    const qkv_pruning *pruning;
    const qkv_kernels *kernels;
    char *scratch;                    /* of each worker */
    size_t bytes;
} pruning;

/* What a worker needs. */
typedef struct {
    int64_t *near;                    /* (rows, len_k): keys that may matter */
    pruned_row *rows;
    float *up, *top;                  /* as of qkv_bytes; what bounds the weights of near keys takes the place of `up` */
    float *factor, *reach, *low;      /* (rows) */
    int32_t *mark;                    /* (len_k) */
    int16_t *queries;
    size_t bytes;
} room;

static int64_t whole_groups(int64_t keys) { return (keys + QKV_BYTES_GROUP - 1) / QKV_BYTES_GROUP * QKV_BYTES_GROUP; }

/* Laid out from an address on, which may be 0: `bytes` is said then. */
static room furnish(const qkv_pruning *c, uintptr_t at)
{
    size_t keys = (size_t)whole_groups(c->len_k), rows = (size_t)c->rows;
    room r;
    uintptr_t near = at, of_rows = near + rows * keys * sizeof *r.near, up = of_rows + rows * sizeof *r.rows;
    uintptr_t top = up + rows * keys * sizeof *r.up, factor = top + rows * keys / QKV_BYTES_GROUP * sizeof *r.top;
    uintptr_t mark = factor + 3 * rows * sizeof *r.factor, queries = mark + keys * sizeof *r.mark;
    r.near = (int64_t *)near;
    r.rows = (pruned_row *)of_rows;
    r.up = (float *)up;
    r.top = (float *)top;
    r.factor = (float *)factor;
    r.reach = (float *)(factor + rows * sizeof *r.factor);
    r.low = (float *)(factor + 2 * rows * sizeof *r.factor);
    r.mark = (int32_t *)mark;
    r.queries = (int16_t *)queries;
    r.bytes = (size_t)(queries - at) + rows * (size_t)c->dim * sizeof *r.queries;
    return r;
}

/* Elements of a query as integers; 0 if it is out of reach. */
static int round_query(const qkv_pruning *c, const float *q, int16_t *to, float *factor, double *reach)
{
    double most = 0, sum = 0, scale = c->scale * 1.4426950408889634, size = fabs(scale);
    double limit = floor(2147483647.0 / (127 * (double)c->dim));
    limit = limit < INT16_MAX ? limit : INT16_MAX;
    for (int64_t d = 0; d < c->dim; d++) {
        double x = fabs((double)q[d]);
        if (!(x < INFINITY))
            return 0;
        most = x > most ? x : most;
        sum += x;
    }
    if (most * size != 0 && !(most * size > 0x1p-60 && most * size < 0x1p60))
        return 0;
    double step = most / limit;
    for (int64_t d = 0; d < c->dim; d++)
        to[d] = (int16_t)(step > 0 ? lrint(q[d] / step) : 0);
    *factor = (float)(scale * step);
    /* Half a step of the keys' elements and of the query's, roundings of up to 127 steps, and elements that read as 0. */
    *reach = size * (1 + margin) * (sum * (0.5 + 127 * 0x1p-19) + 127 * (double)c->dim * (0.501 * step + 2 * smallest));
    return 1;
}

/* At least 2^y, -126 < y <= 2 widest; at most 2^y. */
static inline float power_above(float y) { return float_of((127 << 23) + (int32_t)(y * 0x1p23f) + 1); }
static inline float power_below(float y) { return float_of((127 << 23) + (int32_t)(y * 0x1p23f) - 1) * 0.942f; }

/* Lists the keys of row r, from `first` on, that weigh 2^(low + under) or more at most, and bounds of their weights over 2^low;
 * and adds up what they weigh at least. Groups are passed over or not in no order that a CPU could foresee, nor are keys: what
 * is found is counted, not branched on. */
static void list_near(const room *of, const qkv_bytes *bytes, int64_t r, int64_t first, double under)
{
    pruned_row *row = &of->rows[r];
    int64_t found = 0, groups = bytes->up_row / QKV_BYTES_GROUP, *near = of->near + r * bytes->up_row;
    double sum = 0;
    float reach = (float)(2 * row->reach * (1 + 4 * margin)), low = of->low[r], least = (float)(low + under) - slack;
    float *up = of->up + r * bytes->up_row;
    const float *top = of->top + r * groups;
    for (int64_t group = 0; group < groups; group++) {
        int64_t i = group * QKV_BYTES_GROUP, end = i + QKV_BYTES_GROUP < bytes->n ? i + QKV_BYTES_GROUP : bytes->n;
        for (; top[group] >= least && i < end; i++) {
            float x = up[i];
            near[found] = i;
            up[found] = x;
            found += x >= least;
        }
    }
    for (int64_t i = 0; i < found; i++) {
        float x = up[i], y = x - low - bytes->step[near[i]] * reach - slack;
        sum += y > -(float)deepest ? power_below(y) : 0;
        near[i] += first;
        up[i] = power_above(x - low + slack);
    }
    row->top = sum * (1 - margin);
    row->many = found;
}

static void prune_task(void *context, int64_t task, int worker)
{
    const pruning *job = context;
    const qkv_pruning *c = job->pruning;
    int64_t sequence = task / c->heads, head = task % c->heads, n = c->length[sequence];
    int64_t first = c->start ? c->start[sequence] : 0, up_row = whole_groups(n - first);
    const float *step = (const float *)((const char *)c->steps + sequence * c->steps_at[0] + head * c->steps_at[1]);
    const char *keys = c->keys + sequence * c->keys_at[0] + head * c->keys_at[1];
    room own = furnish(c, (uintptr_t)job->scratch + (size_t)worker * job->bytes);
    float *left = c->left + task * c->rows, largest = largest_of(step + first, n - first);
    c->count[task] = -1;
    for (int64_t r = 0; r < c->rows; r++) {
        double *reach = &own.rows[r].reach;
        if (!round_query(c, c->queries + (task * c->rows + r) * c->dim, own.queries + r * c->dim, &own.factor[r], reach)
            || !(*reach * largest < widest))
            return;
        own.low[r] = -INFINITY;
        own.reach[r] = (float)(*reach * (1 + margin));
    }
    qkv_bytes bytes = {
        .keys = (const int8_t *)keys + first * c->keys_at[2], .key_row = (ptrdiff_t)c->keys_at[2],
        .at_scale = (ptrdiff_t)qkv_i8_bytes(c->dim), .n = (ptrdiff_t)(n - first), .rows = (ptrdiff_t)c->rows,
        .dim = (ptrdiff_t)c->dim, .step = step + first, .queries = own.queries, .factor = own.factor, .reach = own.reach,
        .up_row = (ptrdiff_t)up_row, .up = own.up, .top = own.top, .low = own.low,
    };
    job->kernels->bound_bytes(&bytes);
    memset(own.mark, 0, (size_t)n * sizeof *own.mark);
    double under = first < n ? log2(c->tolerance / (2 * (double)(n - first))) : 0;      /* all below: half the tolerance */
    if (!(under > -deepest + 2))
        return;
    for (int64_t r = 0; r < c->rows && first < n; r++) {
        list_near(&own, &bytes, r, first, under);
        const int64_t *near = own.near + r * bytes.up_row, many = own.rows[r].many;
        const float *bound = own.up + r * bytes.up_row;
        double rest = c->tolerance * (own.rows[r].top * (1 - 4 * margin) - 0.5 * (1 + margin));
        float least = many ? threshold(bound, many, rest) : INFINITY;
        for (int64_t i = 0; i < many; i++)
            own.mark[near[i]] |= bound[i] >= least;
    }
    int64_t count = list_marked(own.mark, n, c->chosen + task * c->len_k);
    for (int64_t r = 0; r < c->rows; r++) {
        left[r] = 0;
        if (count == n - first)
            continue;
        double most = 0.5 * c->tolerance * (1 + margin);
        for (int64_t i = r * bytes.up_row; i < r * bytes.up_row + own.rows[r].many; i++)
            most += own.mark[own.near[i]] ? 0 : own.up[i];
        left[r] = (float)(most / own.rows[r].top * (1 + margin));
    }
    c->count[task] = count;
}

qkv_status qkv_prune(const qkv_pruning *c)
{
    int64_t tasks = c->sequences * c->heads, work = tasks * c->rows * c->len_k;
    if (work == 0) {
        memset(c->count, 0, (size_t)tasks * sizeof *c->count);
        memset(c->left, 0, (size_t)(tasks * c->rows) * sizeof *c->left);
        return QKV_OK;
    }
    int threads = tasks * c->len_k * c->dim < SERIAL ? 1 : c->threads;
    pruning job = {.pruning = c, .kernels = qkv_kernels_at(c->isa, QKV_F32), .bytes = (furnish(c, 0).bytes + 63) / 64 * 64};
    job.scratch = qkv_scratch_take((size_t)(threads < tasks ? threads : tasks) * job.bytes, 0);
    qkv_status status = job.scratch ? run(prune_task, &job, tasks, threads, c->interrupted, c->interrupted_arg) : QKV_NO_MEMORY;
    qkv_scratch_put(job.scratch, 0);
    return status;
}

static void gather_task(void *context, int64_t task, int worker)
{
    const qkv_gathering *g = context;
    const char *from = g->from + task / g->heads * g->from_at[0] + task % g->heads * g->from_at[1];
    const int64_t *key = g->keys + task * g->keys_row;
    char *to = g->to + task * g->most * g->bytes;
    (void)worker;
    for (int64_t i = 0; i < g->count[task]; i++, to += g->bytes) {
        for (int64_t at = 0; i + AHEAD < g->count[task] && at < g->bytes; at += QKV_LINE)
            QKV_PREFETCH(from + key[i + AHEAD] * g->from_at[2] + at);
        memcpy(to, from + key[i] * g->from_at[2], (size_t)g->bytes);
    }
    memset(to, 0, (size_t)((g->most - g->count[task]) * g->bytes));
}

qkv_status qkv_gather(const qkv_gathering *g)
{
    qkv_gathering job = *g;
    int64_t tasks = g->sequences * g->heads, work = tasks * g->most * g->bytes;
    if (work == 0)
        return QKV_OK;
    return run(gather_task, &job, tasks, work < SERIAL ? 1 : g->threads, g->interrupted, g->interrupted_arg);
}
