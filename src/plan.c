/* Problem -> plan. Every tuning number of the driver is in this file; those inside a kernel (its register tile, P_LIMIT,
 * DEPTH) stand where they are used, in kernels/, and those of the pool in threads.c.
 *
 * Two kinds of choice are kept apart. What changes arithmetic (block, chunk) depends only on types and dimensions, so
 * that results are the same bits for any batch, heads, strides and threads. What changes only who does what when (query
 * tiles, passes, splits, copies, threads) may depend on everything.
 */
#include "plan.h"

#include <math.h>
#include <stdlib.h>

#include "cpu.h"
#include "mask.h"

/* Chosen on a 2-core Zen 4 (32 KB L1d, 1 MB L2). Blocks of 64 to 256 keys, passes of 64 to 512 KB and states of 40 to 400 KB
 * came out within that machine's noise of each other; only copies clearly want large states (1.06 against 1.035 of the
 * time without copies, 8 heads of D 128). */
enum {
    BLOCK = 128,                      /* keys per kernel call: S^T (128, 48) is 24 KB, most of L1, but read in order */
    CHUNK = 1024,                     /* keys per chunk; merging chunks of about 1000 keeps the error of 64k keys small */
    PASS_BYTES = 256 << 10,           /* K and V of a pass: a quarter of L2, half of an older 512 KB one */
    STATE_BYTES = 192 << 10,          /* Q^T, O and totals of the panels that share a pass */
    COPY_PASS_BYTES = 128 << 10,      /* the same two where K or V is copied */
    COPY_STATE_BYTES = 2 << 20,
    TILE_PANELS = 32,                 /* most panels in a query tile */
    TASKS_PER_THREAD = 8,             /* enough for an even finish; fewer, larger tasks share K and V better */
    PARTIAL_BYTES = 32 << 20,         /* most memory that a split may take */
    FAR_BYTES = 2048,                 /* rows further apart than this, and than they are long, share cache sets and pages */
    COLD_BYTES = 32 << 10,            /* K and V of a block that are worth fetching ahead: larger ones push S out of L1 */
    COPY_PAD = 16,                    /* elements between copied rows, against the same conflict */
    ALIGNMENT = 64
};
static const double SERIAL_FLOPS = 3e6;                 /* about 30 us of one core: not worth waking another */
static const double TASK_FLOPS = 2e9;                   /* about 20 ms, so that an interrupt is seen between tasks */

static size_t align(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }
static int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

static int multiply(int64_t a, int64_t b, int64_t *product)
{
    if (b != 0 && a > INT64_MAX / b)
        return 0;
    *product = a * b;
    return 1;
}

/* What keeps a row of elements from being used where it lies; 0 if nothing does. */
static int obstacles(const void *data, const qkv_problem *p, const qkv_strides *at, int swapped, int size)
{
    int64_t bits = (int64_t)(uintptr_t)data | at->head | at->row;
    for (int i = 0; i < p->n_axes; i++)
        bits |= at->axis[i];
    return (swapped ? QKV_SWAPPED : 0) | (at->dim != size ? QKV_STRIDED : 0) | (bits % size ? QKV_UNALIGNED : 0);
}

/* Rows that lie far apart, as in (length, heads, dim) arrays. */
static int is_scattered(const qkv_strides *at, int64_t dim)
{
    int64_t apart = at->row < 0 ? -at->row : at->row;
    return apart >= FAR_BYTES && apart > dim * at->dim;
}

static void choose_copies(const qkv_problem *p, qkv_plan *plan)
{
    int size = plan->kernels->size, kv_size = p->kv_type == QKV_F32 ? 4 : 8;
    int widened = p->kv_type != p->type ? QKV_WIDENED : 0;
    /* A copy of scattered rows pays only if several panels share it. */
    int shared = plan->rows > 2 * plan->kernels->lanes;
    plan->copy_k = widened | (shared && is_scattered(&p->k_at, p->dim) ? QKV_SCATTERED : 0);
    plan->copy_v = widened | (shared && is_scattered(&p->v_at, p->dim_v) ? QKV_SCATTERED : 0);
    for (int64_t i = 0; i < p->n_runs; i++) {
        plan->copy_k |= obstacles(p->runs[i].k, p, &p->k_at, p->swapped_k, kv_size);
        plan->copy_v |= obstacles(p->runs[i].v, p, &p->v_at, p->swapped_v, kv_size);
    }
    plan->obstacles_q = obstacles(p->q, p, &p->q_at, p->swapped_q, size);
    plan->obstacles_out = obstacles(p->out, p, &p->out_at, p->swapped_out, size);
    plan->direct_q = !plan->obstacles_q;
    plan->direct_out = !plan->obstacles_out;
}

static void lay_out_scratch(const qkv_problem *p, qkv_plan *plan)
{
    size_t size = (size_t)plan->kernels->size, lanes = (size_t)plan->kernels->lanes;
    size_t vectors = lanes / (size_t)plan->kernels->vector;
    size_t panels = (size_t)plan->tile_panels, dim = (size_t)p->dim, dim_v = (size_t)p->dim_v;
    size_t at = 0;
    plan->copy_row_k = p->dim + COPY_PAD;
    plan->copy_row_v = p->dim_v + COPY_PAD;
#define TAKE(field, bytes) (plan->field = at, at += align(bytes))
    TAKE(at_panels, panels * QKV_PANEL_BYTES);
    TAKE(at_limits, panels * ((vectors + 1) * sizeof(qkv_limits) + lanes * sizeof(qkv_range)));
    TAKE(at_rows, lanes * sizeof(void *));
    TAKE(at_q, panels * dim * lanes * size);
    TAKE(at_state, panels * plan->state_bytes);
    TAKE(at_total, plan->chunks > 1 ? panels * plan->state_bytes : 0);
    TAKE(at_s, (size_t)plan->block * lanes * size);
    TAKE(at_k, plan->copy_k || p->n_runs > 1 ? (size_t)(plan->pass * plan->copy_row_k) * size : 0);
    TAKE(at_v, plan->copy_v || p->n_runs > 1 ? (size_t)(plan->pass * plan->copy_row_v) * size : 0);
    TAKE(at_tile, plan->direct_q && plan->direct_out ? 0 : lanes * (dim > dim_v ? dim : dim_v) * size);
#undef TAKE
    plan->scratch_bytes = at;
}

/* The scale as two factors. Q takes the sign (and with it a scale of 0: -inf * 0 would be NaN) and, of a scale near the
 * ends of the type, a power of two, which is exact and keeps c and 1/c within the type. The rest stays out of Q, where
 * rounding it would show in large scores. */
static void choose_scale(const qkv_problem *p, qkv_plan *plan)
{
    int exponent, wide = p->type == QKV_F64;
    int plain = wide ? 1000 : 120;                      /* exponents: the types end at 1023 and 127 */
    frexp(p->scale, &exponent);
    int shift = abs(exponent) <= plain ? 0
        : exponent > 0 ? (int)qkv_min(exponent - plain, plain) : (int)qkv_max(exponent + plain, -plain);
    plan->q_factor = p->scale == 0 ? 0 : copysign(ldexp(1, shift), p->scale);
    plan->rest = p->scale == 0 ? 1 : ldexp(fabs(p->scale), -shift);
    plan->c = fmin(fmax(plan->rest * 1.4426950408889634, wide ? 1e-305 : 4e-37), wide ? 1e305 : 3e37);
}

qkv_status qkv_make_plan(const qkv_problem *p, qkv_plan *plan)
{
    *plan = (qkv_plan){.kernels = qkv_isa_at(p->isa)->type[p->type]};
    const qkv_kernels *kernels = plan->kernels;

    choose_scale(p, plan);
    plan->sequences = 1;
    for (int i = 0; i < p->n_axes; i++)
        if (!multiply(plan->sequences, p->axes[i], &plan->sequences))
            return QKV_OVERFLOW;
    plan->group = p->heads_kv ? p->heads_q / p->heads_kv : 0;
    if (!multiply(p->len_q, plan->group, &plan->rows))
        return QKV_OVERFLOW;

    plan->state_bytes = align((size_t)(p->dim_v + 2) * (size_t)kernels->lanes * (size_t)kernels->size);
    plan->block = BLOCK;
    plan->cold = BLOCK * (p->dim + p->dim_v) * kernels->size <= COLD_BYTES;
    plan->chunk = CHUNK;
    plan->chunks = p->len_k > 0 ? ceil_div(p->len_k, CHUNK) : 1;
    choose_copies(p, plan);
    /* Copies want many panels to share them, and leave them the room by being short. */
    int copies = (plan->copy_k | plan->copy_v) != 0;
    int64_t pass = (copies ? COPY_PASS_BYTES : PASS_BYTES) / ((p->dim + p->dim_v + 1) * kernels->size) / BLOCK * BLOCK;
    plan->pass = qkv_min(CHUNK, qkv_max(BLOCK, pass));

    /* Query tiles: as many panels as stay in cache together, but enough tiles for all threads. */
    int64_t panels = ceil_div(plan->rows, kernels->lanes), heads, base;
    int64_t panel_bytes = (p->dim + 2 * p->dim_v + 4) * kernels->lanes * kernels->size;
    int64_t most = qkv_min(TILE_PANELS, qkv_max(1, (copies ? COPY_STATE_BYTES : STATE_BYTES) / panel_bytes));
    if (!multiply(plan->sequences, p->heads_kv, &heads) || !multiply(heads, panels, &base))
        return QKV_OVERFLOW;
    int64_t wanted = p->threads > 1 ? qkv_max(1, base / ((int64_t)p->threads * TASKS_PER_THREAD)) : most;
    double panel_flops = 2.0 * (double)(p->dim + p->dim_v) * (double)kernels->lanes * (double)p->len_k;
    most = qkv_min(most, (int64_t)(TASK_FLOPS / (panel_flops + 1)));
    plan->tile_panels = qkv_max(1, qkv_min(qkv_min(most, wanted), panels));
    plan->tiles = ceil_div(panels, plan->tile_panels);
    plan->tasks = heads * plan->tiles;

    double flops = 2.0 * (double)(p->dim + p->dim_v) * (double)plan->rows * (double)p->len_k * (double)heads;
    plan->threads = flops < SERIAL_FLOPS ? 1 : p->threads;
    plan->partial_bytes = plan->state_bytes * (size_t)(plan->tasks * plan->tile_panels);
    if (plan->threads > 1 && plan->chunks > 1 && plan->tasks < 2 * plan->threads
        && (double)plan->partial_bytes * (double)plan->chunks <= PARTIAL_BYTES) {
        plan->split = 1;
        plan->partial_bytes *= (size_t)plan->chunks;
        plan->tasks *= plan->chunks;
    }
    plan->threads = (int)qkv_min(plan->threads, qkv_max(1, plan->tasks));
    lay_out_scratch(p, plan);
    return QKV_OK;
}
