/* Problem -> plan. Every tuning number of the driver is in this file; those inside a kernel (its register tile, P_LIMIT,
 * QKV_TERMS) stand where they are used, in kernels/, and those of the pool in threads.c.
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
    /* Rows of a key head up to which lanes along the head dimension are faster: one for this many columns of K and V. At D
     * 128 32 rows take 0.8 of the time of lanes of rows from memory, 1 from cache; at D 64 16 take 0.7 and 1.15; D 32, 8. */
    FEW_COLUMNS = 8,
    FEW_LEAST = 4,
    FEW_MOST = 32,
    CHUNK = 1024,                     /* keys per chunk; merging chunks of about 1000 keeps the error of 64k keys small */
    PASS_BYTES = 256 << 10,           /* K and V of a pass: a quarter of L2, half of an older 512 KB one */
    STATE_BYTES = 192 << 10,          /* Q^T, O and totals of the panels that share a pass */
    COPY_PASS_BYTES = 128 << 10,      /* the same two where K or V is copied */
    COPY_STATE_BYTES = 2 << 20,
    TILE_PANELS = 32,                 /* most panels in a query tile */
    TASKS_PER_THREAD = 8,             /* enough for an even finish; fewer, larger tasks share K and V better */
    PARTIAL_BYTES = 32 << 20,         /* most memory that a split may take */
    SUMMARY_BYTES = 8 << 20,          /* most of a mask's summary: 1 GB of mask */
    SUMMARY_ROWS = 64,                /* of a task of it: some microseconds for rows of a few thousand keys */
    FAR_BYTES = 2048,                 /* rows further apart than this, and than they are long, share cache sets and pages */
    COLD_BYTES = 32 << 10,            /* K and V of a block that are worth fetching ahead: larger ones push S out of L1 */
    COPY_PAD = 16,                    /* elements between copied rows, against the same conflict */
    B_BYTES = 256 << 10,              /* panels of B of a task: they stay in L2 while all rows of A pass */
    TERMS_PASS = 1024,                /* terms of a pass: where B is longer, C is read again */
    A_BYTES = 32 << 10,               /* rows of A that meet every panel in turn */
    C_BYTES = 1 << 20,                /* C of a task, where it needs a copy */
    TASKS_EACH = 4,                   /* tasks per thread of a stage: they are equally long */
    STRIP_WIDTH = 256,                /* bytes of a row of a strip: 128 and 512 are slower, and 512 takes more memory */
    STRIP_ROWS = 1 << 20,             /* longer columns are copied one by one, several times slower */
    ROW_BYTES = 512 << 10,            /* exponentials of a longer row leave L2 anyway */
    SOFTMAX_TASK = 64 << 10,          /* elements of a task: about 20 us */
    STRIPS_TASK = 1 << 24,            /* of a task of strips, the first and last of which have no others beside them: 10 ms */
    STREAM_C_BYTES = 4 << 20,         /* a larger product is written without being read first: 0.72 -> 0.85 of the peak */
    STREAM_BYTES = 32 << 20,          /* a larger result would only push other data out of L3 */
    ALIGNMENT = 64
};
static const double SERIAL_FLOPS = 3e6;                 /* about 30 us of one core: not worth waking another */
static const double SERIAL_BYTES = 1 << 20;             /* the same where K and V are read once */
static const double TASK_FLOPS = 2e9;                   /* about 20 ms, so that an interrupt is seen between tasks */

_Static_assert((int)QKV_AS_F32 == QKV_F32 && (int)QKV_AS_F64 == QKV_F64 && (int)QKV_AS_F16 == QKV_F16
               && (int)QKV_AS_BF16 == QKV_BF16 && (int)QKV_AS_I8 == QKV_I8 && (int)QKV_AS_I4 == QKV_I4, "kernels number types as problems do");

static const qkv_kernels *kernels_of(int isa, qkv_type type) { return qkv_kernels_at(isa, (int)qkv_arithmetic(type)); }

static size_t align(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }
static int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

static int multiply(int64_t a, int64_t b, int64_t *product)
{
    if (b != 0 && a > INT64_MAX / b)
        return 0;
    *product = a * b;
    return 1;
}

/* A number that is a multiple of a power of two if all addresses of rows are. */
static int64_t places(const void *data, int n_axes, const qkv_strides *at)
{
    int64_t bits = (int64_t)(uintptr_t)data | at->head | at->row;
    for (int i = 0; i < n_axes; i++)
        bits |= at->axis[i];
    return bits;
}

/* What keeps a row of elements from being used where it lies; 0 if nothing does. */
static int obstacles(const void *data, int n_axes, const qkv_strides *at, int swapped, int size)
{
    int64_t bits = places(data, n_axes, at);
    return (swapped ? QKV_SWAPPED : 0) | (at->dim != size ? QKV_STRIDED : 0) | (bits % size ? QKV_UNALIGNED : 0);
}

/* The same for rows of which pairs are multiplied. */
static int pair_obstacles(const void *data, int n_axes, const qkv_strides *at, int swapped, int64_t dim)
{
    int odd = dim % 2 || places(data, n_axes, at) % 4;
    return obstacles(data, n_axes, at, swapped, 2) | (odd ? QKV_UNPAIRED : 0);
}

/* Rows that lie far apart, as in (length, heads, dim) arrays. */
static int is_scattered(const qkv_strides *at, int64_t dim)
{
    int64_t apart = at->row < 0 ? -at->row : at->row;
    return apart >= FAR_BYTES && apart > dim * at->dim;
}

static void choose_copies(const qkv_problem *p, qkv_plan *plan)
{
    qkv_type arithmetic = qkv_arithmetic(p->type);
    int kv_size = qkv_size(p->kv_type), widened = p->kv_type != arithmetic ? QKV_WIDENED : 0;
    /* A copy of scattered rows pays only if several panels share it. */
    int shared = plan->rows > 2 * plan->kernels->lanes;
    int kv_axes = p->run_of ? 0 : p->n_axes;
    int pairs = plan->kernels->pair > 1;
    plan->copy_k = (pairs ? 0 : widened) | (shared && is_scattered(&p->k_at, p->dim) ? QKV_SCATTERED : 0);
    plan->copy_v = (pairs ? QKV_UNPAIRED : widened) | (shared && is_scattered(&p->v_at, p->dim_v) ? QKV_SCATTERED : 0);
    for (int64_t i = 0; i < p->n_runs; i++) {
        plan->copy_k |= pairs ? pair_obstacles(p->runs[i].k, kv_axes, &p->k_at, p->swapped_k, p->dim)
                              : obstacles(p->runs[i].k, kv_axes, &p->k_at, p->swapped_k, kv_size);
        plan->copy_v |= obstacles(p->runs[i].v, kv_axes, &p->v_at, p->swapped_v, kv_size);
    }
    int row_axes = p->q_starts ? 0 : p->n_axes;
    plan->obstacles_q = pairs ? pair_obstacles(p->q, row_axes, &p->q_at, p->swapped_q, p->dim)
        : (p->type != arithmetic ? QKV_WIDENED : 0)
          | obstacles(p->q, row_axes, &p->q_at, p->swapped_q, qkv_size(p->type));
    plan->obstacles_out = (p->out_type != arithmetic ? QKV_WIDENED : 0)
        | obstacles(p->out, row_axes, &p->out_at, p->swapped_out, qkv_size(p->out_type));
    plan->direct_q = !plan->obstacles_q;
    plan->direct_out = !plan->obstacles_out;
    plan->direct_bias = p->bias && p->bias_type == arithmetic
        && !obstacles(p->bias, p->n_axes, &p->bias_at, p->swapped_bias, qkv_size(arithmetic));
    plan->direct_mask = p->mask && p->mask_at.dim == 1 && !p->q_ids;
}

/* A mask whose rows are shared, by heads or sequences, is summed up before the work. */
static void plan_summary(const qkv_problem *p, qkv_plan *plan)
{
    int64_t rows = 1;
    qkv_strides *at = &plan->summary_at;
    int64_t all, most = p->length ? 0 : p->len_k;       /* keys that some sequence has */
    for (int64_t b = 0; p->length && b < plan->sequences; b++)
        most = qkv_max(most, p->length[b]);
    /* Rows that windows or spans cut short are looked at by the tiles that need them. */
    if (plan->decode || !p->mask || p->q_ids || p->spans || p->left != QKV_OPEN || p->mask_at.dim > 1
        || p->mask_at.dim < 0 || most == 0
        || !multiply(plan->sequences, p->heads_q, &all) || !multiply(all, p->len_q, &all))
        return;
    int64_t blocks = p->mask_at.dim ? ceil_div(most, BLOCK) : 1;
    at->dim = p->mask_at.dim ? 1 : 0;
    at->row = p->mask_at.row ? blocks : 0;
    rows = p->mask_at.row ? p->len_q : 1;
    at->head = p->mask_at.head ? rows * blocks : 0;
    int fits = !p->mask_at.head || multiply(rows, p->heads_q, &rows);
    for (int i = p->n_axes; i-- > 0 && fits;) {
        at->axis[i] = p->mask_at.axis[i] ? rows * blocks : 0;
        fits = !p->mask_at.axis[i] || multiply(rows, p->axes[i], &rows);
        fits = fits && rows <= SUMMARY_BYTES / blocks;
    }
    if (fits && rows <= SUMMARY_BYTES / blocks && rows < all) {
        plan->summary_rows = rows;
        plan->summary_task = SUMMARY_ROWS;
        plan->summary_keys = p->mask_at.dim ? most : 1;
        plan->summary_bytes = (size_t)(rows * blocks);
    }
}

static void lay_out_scratch(const qkv_problem *p, qkv_plan *plan)
{
    size_t size = (size_t)plan->kernels->size, lanes = (size_t)plan->kernels->lanes;
    size_t vectors = lanes / (size_t)plan->kernels->vector;
    size_t panels = (size_t)plan->tile_panels, dim = (size_t)p->dim, dim_v = (size_t)p->dim_v;
    size_t at = 0;
    int64_t pair = plan->kernels->pair;
#define TAKE(field, bytes) (plan->field = at, at += align(bytes))
    TAKE(at_panels, panels * QKV_PANEL_BYTES);
    TAKE(at_limits, panels * ((vectors + 1) * sizeof(qkv_limits) + lanes * sizeof(qkv_range)));
    TAKE(at_rows, lanes * sizeof(void *));
    TAKE(at_q, panels * (size_t)plan->terms * lanes * size);
    TAKE(at_state, panels * plan->state_bytes);
    TAKE(at_total, plan->merges ? panels * plan->state_bytes : 0);
    TAKE(at_s, (size_t)plan->block * lanes * size);
    TAKE(at_k, plan->copy_k || p->n_runs > 1 ? (size_t)(plan->pass * plan->copy_row_k) * size : 0);
    TAKE(at_v, plan->copy_v || p->n_runs > 1 ? (size_t)(plan->pass / pair * plan->copy_row_v) * size : 0);
    TAKE(at_tile, plan->direct_q && plan->direct_out ? 0 : lanes * (dim > dim_v ? dim : dim_v) * size);
    TAKE(at_lanes, plan->adjust ? panels * lanes * QKV_LANE_BYTES : 0);
    TAKE(at_pointers, plan->adjust ? 2 * lanes * sizeof(void *) : 0);
    TAKE(at_bias, p->bias && !plan->direct_bias ? lanes * (size_t)plan->block * size : 0);
    TAKE(at_mask, plan->masked && !plan->direct_mask ? lanes * (size_t)plan->block : 0);
#undef TAKE
    plan->scratch_bytes = plan->decode || at < plan->few.scratch_bytes ? plan->few.scratch_bytes : at;
}

/* The scale as two factors. Q takes the sign (and with it a scale of 0: -inf * 0 would be NaN) and, of a scale near the
 * ends of the type, a power of two, which is exact and keeps c and 1/c within the type. The rest stays out of Q, where
 * rounding it would show in large scores. */
static void split_scale(double scale, int wide, double *factor, double *rest)
{
    int exponent, plain = wide ? 1000 : 120;            /* exponents: the types end at 1023 and 127 */
    frexp(scale, &exponent);
    int shift = abs(exponent) <= plain ? 0
        : exponent > 0 ? (int)qkv_min(exponent - plain, plain) : (int)qkv_max(exponent + plain, -plain);
    *factor = scale == 0 ? 0 : copysign(ldexp(1, shift), scale);
    *rest = scale == 0 ? 1 : ldexp(fabs(scale), -shift);
}

/* Where something is added to scores they have to be in its unit, else softmax takes them as the products are. */
static void choose_scale(const qkv_problem *p, qkv_plan *plan)
{
    int wide = p->type == QKV_F64;
    split_scale(p->scale, wide, &plan->q_factor, &plan->rest);
    plan->score_factor = 1;
    plan->masked = p->mask || p->q_ids;
    plan->adjust = plan->masked;
    /* Scores are below 2^120: a cap beyond 2^132 does nothing that float32 could show. */
    if (p->softcap != 0 && (wide || p->softcap < 0x1p132))
        plan->softcap = fmin(fmax(p->softcap, wide ? 0x1p-1000 : 0x1p-120), wide ? 0x1p1000 : 0x1p126);
    if (p->bias || p->slopes || plan->softcap != 0) {
        plan->adjust = plan->changes = 1;
        plan->score_factor = plan->rest;
        plan->rest = 1;
    }
    if (plan->softcap != 0)
        plan->score_factor = fmin(plan->score_factor / plan->softcap, wide ? 0x1p1000 : 0x1p127);
    plan->c = fmin(fmax(plan->rest * 1.4426950408889634, wide ? 1e-305 : 4e-37), wide ? 1e305 : 3e37);
}

/* The choice of a kernel changes arithmetic, so it knows nothing of other sequences. */
int qkv_has_few(const qkv_problem *p, const qkv_plan *plan, int64_t sequence)
{
    return qkv_queries(p, sequence) * plan->group <= plan->few.most;
}

/* For tiles of few rows, where there may be some: `rows` at most. */
static void plan_few(const qkv_problem *p, qkv_plan *plan)
{
    qkv_few_plan *few = &plan->few;
    int64_t size = plan->kernels->size, vector = plan->kernels->vector;
    /* Segments are spans or ids, as the others of a batch have it. */
    if (plan->rows == 0 || plan->changes || p->spans || p->q_ids)
        return;
    few->most = qkv_min(FEW_MOST, qkv_max(FEW_LEAST, (p->dim + p->dim_v) / FEW_COLUMNS));
    plan->decode = plan->rows <= few->most;
    if (!plan->decode && !p->q_starts)
        return;
    few->kernels = plan->kernels;
    /* Whole vectors are widened as they are loaded. */
    int widens = few->kernels->widens;
    few->copy_k = plan->copy_k & ~(widens && p->dim % vector == 0 ? QKV_WIDENED : 0);
    few->copy_v = plan->copy_v & ~(widens && p->dim_v % vector == 0 ? QKV_WIDENED : 0);
    few->direct_q = plan->direct_q;
    int64_t n = qkv_min(few->most, plan->rows);
    size_t at = 0, rows = (size_t)n, dim = (size_t)qkv_max(p->dim, p->dim_v);
    few->pass = qkv_min(CHUNK, qkv_max(16, COPY_PASS_BYTES / ((p->dim + p->dim_v + 1) * size) / 16 * 16));
    few->q_row = ceil_div(p->dim, vector) * vector;
    few->o_row = ceil_div(p->dim_v, vector) * vector;
    few->l_bytes = align((size_t)(n * size));
    few->state_bytes = align((size_t)(n * few->o_row * size)) + 2 * few->l_bytes;
#define TAKE(field, bytes) (few->field = at, at += align(bytes))
    TAKE(at_limits, rows * (sizeof(qkv_range) + 2 * sizeof(int32_t)));
    TAKE(at_rows, rows * sizeof(void *));
    TAKE(at_q, rows * (size_t)(few->q_row * size));
    TAKE(at_s, rows * (size_t)(CHUNK * size));
    TAKE(at_sums, rows * (size_t)(few->o_row * size));
    TAKE(at_state, few->state_bytes);
    TAKE(at_total, few->state_bytes);
    TAKE(at_k, few->copy_k ? (size_t)(few->pass * plan->copy_row_k * size) : 0);
    TAKE(at_v, few->copy_v ? (size_t)(few->pass * plan->copy_row_v * size) : 0);
    TAKE(at_copies, plan->direct_q && plan->direct_out ? 0 : rows * dim * (size_t)size);
#undef TAKE
    few->scratch_bytes = at;
    plan->state_bytes = plan->decode ? few->state_bytes : (size_t)qkv_max((int64_t)plan->state_bytes, (int64_t)few->state_bytes);
}

static int64_t panels_of(const qkv_problem *p, const qkv_plan *plan, int64_t sequence)
{
    return ceil_div(qkv_queries(p, sequence) * plan->group, plan->kernels->lanes);
}

int64_t qkv_tiles_of(const qkv_problem *p, const qkv_plan *plan, int64_t sequence)
{
    if (qkv_has_few(p, plan, sequence))
        return qkv_queries(p, sequence) > 0;
    return ceil_div(panels_of(p, plan, sequence), plan->tile_panels);
}

/* Panels of all key heads, and floating-point operations if every query saw every key. */
static int count_work(const qkv_problem *p, const qkv_plan *plan, int64_t *panels, double *flops)
{
    int64_t heads;
    double pairs = (double)plan->sequences * (double)p->len_q * (double)p->len_k;
    if (!multiply(plan->sequences, p->heads_kv, &heads)
        || !multiply(heads, ceil_div(plan->rows, plan->kernels->lanes), panels))
        return 0;
    if (p->q_starts) {                /* less than that */
        *panels = 0;
        pairs = 0;
        for (int64_t b = 0; b < plan->sequences; b++) {
            *panels += p->heads_kv * panels_of(p, plan, b);
            pairs += (double)qkv_queries(p, b) * (double)qkv_length(p, b);
        }
    }
    *flops = 2.0 * (double)(p->dim + p->dim_v) * pairs * (double)p->heads_q;
    return 1;
}

/* Pairs are multiplied where Q, K and V hold them: what goes into Q is its sign alone, and keys come in pairs. */
static int multiplies_pairs(const qkv_problem *p, const qkv_plan *plan)
{
    const qkv_kernels *pairs = qkv_isa_at(p->isa)->pairs;
    int fits = pairs && p->type == QKV_BF16 && p->kv_type == QKV_BF16 && fabs(plan->q_factor) == 1;
    for (int64_t i = 0; fits && i < p->n_runs; i++)
        fits = p->runs[i].first % pairs->pair == 0;
    return fits;
}

qkv_status qkv_make_plan(const qkv_problem *p, qkv_plan *plan)
{
    *plan = (qkv_plan){0};
    choose_scale(p, plan);
    const qkv_kernels *kernels = plan->kernels = kernels_of(p->isa, p->type);
    plan->sequences = 1;
    for (int i = 0; i < p->n_axes; i++)
        if (!multiply(plan->sequences, p->axes[i], &plan->sequences))
            return QKV_OVERFLOW;
    plan->group = p->heads_kv ? p->heads_q / p->heads_kv : 0;
    if (!multiply(p->len_q, plan->group, &plan->rows))
        return QKV_OVERFLOW;

    plan->state_bytes = align((size_t)(p->dim_v + 2) * (size_t)kernels->lanes * (size_t)kernels->size);
    plan->block = BLOCK;
    plan->chunk = CHUNK;
    plan->chunks = p->len_k > 0 ? ceil_div(p->len_k, CHUNK) : 1;
    /* A sink is merged even with a single chunk: how many there are must not show in a sequence that has only one. */
    plan->merges = plan->chunks > 1 || p->sinks;
    choose_copies(p, plan);
    plan->copy_row_k = p->dim + COPY_PAD;
    plan->copy_row_v = p->dim_v + COPY_PAD;
    plan_few(p, plan);
    if (!plan->decode && multiplies_pairs(p, plan)) {
        kernels = plan->kernels = qkv_isa_at(p->isa)->pairs;
        choose_copies(p, plan);
    }
    plan->terms = ceil_div(p->dim, kernels->pair);
    int64_t row_bytes = (p->dim + p->dim_v) * kernels->size / kernels->pair;
    plan->cold = BLOCK * row_bytes <= COLD_BYTES;
    /* Copies want many panels to share them, and leave them the room by being short. */
    int copies = (plan->copy_k | plan->copy_v) != 0;
    int64_t pass = (copies ? COPY_PASS_BYTES : PASS_BYTES) / (row_bytes + kernels->size) / BLOCK * BLOCK;
    plan->pass = qkv_min(CHUNK, qkv_max(BLOCK, pass));

    /* Query tiles: as many panels as stay in cache together, but enough tiles for all threads. */
    int64_t panels = ceil_div(plan->rows, kernels->lanes), base;
    double flops;
    int64_t panel_bytes = (plan->terms + 2 * p->dim_v + 4) * kernels->lanes * kernels->size;
    int64_t most = qkv_min(TILE_PANELS, qkv_max(1, (copies ? COPY_STATE_BYTES : STATE_BYTES) / panel_bytes));
    if (!count_work(p, plan, &base, &flops))
        return QKV_OVERFLOW;
    int64_t wanted = p->threads > 1 ? qkv_max(1, base / ((int64_t)p->threads * TASKS_PER_THREAD)) : most;
    double panel_flops = 2.0 * (double)(p->dim + p->dim_v) * (double)kernels->lanes * (double)p->len_k;
    most = qkv_min(most, (int64_t)(TASK_FLOPS / (panel_flops + 1)));
    plan->tile_panels = plan->decode ? 1 : qkv_max(1, qkv_min(qkv_min(most, wanted), panels));
    plan->tiles = plan->decode ? 1 : ceil_div(panels, plan->tile_panels);
    plan->tasks = plan->sequences * p->heads_kv * plan->tiles;
    if (p->q_starts) {
        plan->tasks = 0;
        for (int64_t b = 0; b < plan->sequences; b++)
            plan->tasks += p->heads_kv * qkv_tiles_of(p, plan, b);
    }
    double bytes = 0, dims = (double)(p->dim + p->dim_v);               /* of K and V */
    if (plan->decode && dims > 0)
        bytes = flops / (2 * dims * (double)plan->rows)
            * (double)(qkv_row_bytes(p->kv_type, p->dim) + qkv_row_bytes(p->kv_type, p->dim_v));
    plan->threads = flops < SERIAL_FLOPS && bytes < SERIAL_BYTES ? 1 : p->threads;
    plan->partial_bytes = plan->state_bytes * (size_t)(plan->tasks * plan->tile_panels);
    if (plan->threads > 1 && plan->chunks > 1 && plan->tasks < 2 * plan->threads
        && (double)plan->partial_bytes * (double)plan->chunks <= PARTIAL_BYTES) {
        plan->split = 1;
        plan->partial_bytes *= (size_t)plan->chunks;
        plan->tasks *= plan->chunks;
    }
    plan->threads = (int)qkv_min(plan->threads, qkv_max(1, plan->tasks));
    plan_summary(p, plan);
    size_t numbers = plan->split ? (size_t)(plan->tasks / plan->chunks) : 0;
    numbers += p->q_starts ? (size_t)plan->sequences + 1 : 0;
    plan->shared_bytes = (plan->split ? plan->partial_bytes : 0) + numbers * sizeof(int64_t) + plan->summary_bytes;
    lay_out_scratch(p, plan);
    return QKV_OK;
}

/* Row r of a tile is row r % length of head r / length: with one row per head, heads become the rows. */
static void choose_rows(const qkv_product_problem *p, qkv_product_plan *plan)
{
    plan->group = p->heads_b ? p->heads / p->heads_b : 0;
    plan->length = p->rows;
    plan->a_head = p->a_at.head;
    plan->a_row = p->a_at.row;
    plan->c_head = p->c_at.head;
    plan->c_row = p->c_at.row;
    if (p->rows == 1) {
        plan->length = plan->group;
        plan->group = 1;
        plan->a_row = plan->a_head;
        plan->c_row = plan->c_head;
    }
}

qkv_status qkv_plan_product(const qkv_product_problem *p, qkv_product_plan *plan)
{
    *plan = (qkv_product_plan){.kernels = kernels_of(p->isa, p->type), .sequences = 1};
    const qkv_kernels *kernels = plan->kernels;
    int64_t lanes = kernels->lanes, size = kernels->size, rows, heads, base;
    for (int i = 0; i < p->n_axes; i++)
        if (!multiply(plan->sequences, p->axes[i], &plan->sequences))
            return QKV_OVERFLOW;
    choose_rows(p, plan);
    if (!multiply(plan->sequences, p->heads_b, &heads) || !multiply(plan->length, plan->group, &rows))
        return QKV_OVERFLOW;
    if (heads == 0 || rows == 0 || p->columns == 0)
        return QKV_OK;
    plan->factor = p->scale;
    if (p->transposed)
        split_scale(p->scale, p->type == QKV_F64, &plan->b_factor, &plan->factor);
    qkv_type arithmetic = qkv_arithmetic(p->type);
    plan->direct_a = p->type == arithmetic && !obstacles(p->a, p->n_axes, &p->a_at, p->swapped_a, (int)size);
    plan->direct_b = p->b_type == arithmetic && !obstacles(p->b, p->n_axes, &p->b_at, p->swapped_b, (int)size);
    plan->direct_c = p->c_type == arithmetic && !obstacles(p->c, p->n_axes, &p->c_at, p->swapped_c, (int)size);

    plan->pass = qkv_max(1, qkv_min(p->terms, TERMS_PASS));
    int64_t vector = kernels->vector * size, at_vectors = p->c_at.head | p->c_at.row;
    for (int i = 0; i < p->n_axes; i++)
        at_vectors |= p->c_at.axis[i];
    double bytes = (double)plan->sequences * (double)p->heads * (double)p->rows * (double)p->columns * (double)size;
    plan->stream = plan->direct_c && at_vectors % vector == 0 && p->terms <= QKV_TERMS && bytes >= STREAM_C_BYTES;
    plan->tile_columns = qkv_max(1, B_BYTES / (plan->pass * lanes * size)) * lanes;
    plan->tile_columns = qkv_min(plan->tile_columns, ceil_div(p->columns, lanes) * lanes);
    plan->column_tiles = ceil_div(p->columns, plan->tile_columns);
    plan->group_rows = qkv_max(8, qkv_min(32, A_BYTES / (plan->pass * size) / 8 * 8));

    if (!multiply(heads, plan->column_tiles, &base))
        return QKV_OVERFLOW;
    double row_flops = 2.0 * (double)p->terms * (double)plan->tile_columns;
    int64_t most = qkv_max(1, (int64_t)qkv_min(INT64_MAX / 2, (int64_t)(TASK_FLOPS / (row_flops + 1))));
    if (!plan->direct_c)
        most = qkv_min(most, C_BYTES / (plan->tile_columns * size));
    int64_t wanted = ceil_div((int64_t)p->threads * TASKS_EACH, qkv_max(1, base));
    most = qkv_min(most, ceil_div(rows, p->threads > 1 ? wanted : 1));
    plan->tile_rows = qkv_max(plan->group_rows, ceil_div(most, plan->group_rows) * plan->group_rows);
    plan->row_tiles = ceil_div(rows, plan->tile_rows);
    if (!multiply(base, plan->row_tiles, &plan->tasks))
        return QKV_OVERFLOW;
    double flops = row_flops * (double)rows * (double)base;
    plan->threads = flops < SERIAL_FLOPS ? 1 : (int)qkv_min(p->threads, qkv_max(1, plan->tasks));

    size_t at = 0, panels = (size_t)(plan->tile_columns / lanes), pass = (size_t)plan->pass;
    plan->copy_row_a = plan->copy_row_b = plan->pass + COPY_PAD;
#define TAKE(field, bytes) (plan->field = at, at += align(bytes))
    panels += plan->stream;           /* a narrow one before the first that is aligned */
    TAKE(at_b, panels * pass * (size_t)(lanes * size));
    TAKE(at_rows, (size_t)lanes * sizeof(void *));
    TAKE(at_columns, p->transposed && !plan->direct_b ? (size_t)(lanes * plan->copy_row_b * size) : 0);
    TAKE(at_a, plan->direct_a ? 0 : (size_t)(plan->group_rows * plan->copy_row_a * size));
    TAKE(at_c, plan->direct_c ? 0 : (size_t)(plan->tile_rows * plan->tile_columns * size));
#undef TAKE
    plan->scratch_bytes = at;
    return QKV_OK;
}

static int64_t distance(int64_t stride) { return stride < 0 ? -stride : stride; }

/* The problem's axes without those of one element, the innermost in `out` last, and those merged that are one in memory. */
static void merge_axes(const qkv_softmax_problem *p, qkv_softmax_plan *plan)
{
    int n = 0;
    for (int i = 0; i < p->n_axes; i++) {
        if (p->axes[i] == 1)
            continue;
        int at = n++;
        for (; at > 0 && distance(plan->out_at[at - 1]) < distance(p->out_at[i]); at--) {
            plan->axes[at] = plan->axes[at - 1];
            plan->x_at[at] = plan->x_at[at - 1];
            plan->mask_at[at] = plan->mask_at[at - 1];
            plan->out_at[at] = plan->out_at[at - 1];
        }
        plan->axes[at] = p->axes[i];
        plan->x_at[at] = p->x_at[i];
        plan->mask_at[at] = p->mask ? p->mask_at[i] : 0;
        plan->out_at[at] = p->out_at[i];
    }
    int last = 0;                     /* merges into it what follows */
    for (int i = 1; i < n; i++) {
        int64_t count = plan->axes[i];
        int one = plan->x_at[last] == plan->x_at[i] * count && plan->mask_at[last] == plan->mask_at[i] * count
            && plan->out_at[last] == plan->out_at[i] * count;
        if (one)
            count *= plan->axes[last];
        else
            last++;
        plan->axes[last] = count;
        plan->x_at[last] = plan->x_at[i];
        plan->mask_at[last] = plan->mask_at[i];
        plan->out_at[last] = plan->out_at[i];
    }
    plan->n_axes = n ? last : 0;
    plan->run = n ? plan->axes[last] : 1;
    plan->x_run = n ? plan->x_at[last] : 0;
    plan->mask_run = n ? plan->mask_at[last] : 0;
    plan->out_run = n ? plan->out_at[last] : 0;
}

/* Whether there are no obstacles, with the run or the axis at unit stride. */
static int is_direct_along(const void *data, int n_axes, const int64_t *at, int64_t unit, int64_t other, int swapped, int size)
{
    int64_t bits = (int64_t)(uintptr_t)data | other;
    for (int i = 0; i < n_axes; i++)
        bits |= at[i];
    return !swapped && unit == size && bits % size == 0;
}

qkv_status qkv_plan_softmax(const qkv_softmax_problem *p, qkv_softmax_plan *plan)
{
    *plan = (qkv_softmax_plan){.kernels = kernels_of(p->isa, p->type)};
    int64_t size = plan->kernels->size, w = plan->kernels->vector, outer = 1, total;
    int s = (int)size;
    for (int i = 0; i < p->n_axes; i++)
        if (!multiply(outer, p->axes[i], &outer))
            return QKV_OVERFLOW;
    if (!multiply(outer, p->n, &total))
        return QKV_OVERFLOW;
    if (total == 0)
        return QKV_OK;
    merge_axes(p, plan);
    outer /= plan->run;
    int n_axes = plan->n_axes, fits = p->n <= STRIP_ROWS;
    int plain_x = p->type == qkv_arithmetic(p->type), plain_out = p->out_type == qkv_arithmetic(p->type);
    plan->across = fits && plan->run > 1 && plain_x && plain_out
        && is_direct_along(p->x, n_axes, plan->x_at, plan->x_run, p->x_step, p->swapped_x, s)
        && is_direct_along(p->out, n_axes, plan->out_at, plan->out_run, p->out_step, p->swapped_out, s)
        && (p->x_step != size || p->out_step != size);
    /* Rows of strips, when they are not streamed, wait for their lines: 0.73 instead of 0.34 ns per element at 12x512x512. */
    plan->stream = (double)total * (double)size >= (plan->across ? STREAM_C_BYTES : STREAM_BYTES);
    plan->threads = total < SOFTMAX_TASK ? 1 : p->threads;
    if (plan->across) {
        int64_t wanted = plan->run, strip = STRIP_WIDTH / size;
        if (p->threads > 1)
            wanted = ceil_div(plan->run, ceil_div((int64_t)p->threads * TASKS_EACH, outer));
        plan->strip = qkv_min(strip + w, ceil_div(plan->run, w) * w);         /* the last takes what is left of a vector */
        wanted = qkv_min(wanted, STRIPS_TASK / p->n);
        plan->piece = qkv_max(strip, wanted / strip * strip);
        plan->pieces = ceil_div(plan->run, plan->piece);
        plan->at_state = align((size_t)(p->n * plan->strip * size));
        plan->scratch_bytes = plan->at_state + align((size_t)((3 * w + 4) * plan->strip * size));
        plan->direct_x = plan->direct_out = 1;
    } else {
        plan->direct_x = plain_x && is_direct_along(p->x, n_axes, plan->x_at, p->x_step, plan->x_run, p->swapped_x, s);
        plan->direct_out = plain_out
            && is_direct_along(p->out, n_axes, plan->out_at, p->out_step, plan->out_run, p->swapped_out, s);
        plan->in_out = plan->direct_out && p->n > ROW_BYTES / size;
        plan->piece = qkv_min(plan->run, ceil_div(SOFTMAX_TASK, p->n));
        plan->pieces = ceil_div(plan->run, plan->piece);
        plan->scratch_bytes = plan->in_out ? ALIGNMENT : align((size_t)(p->n * size));
    }
    plan->tasks = outer * plan->pieces;
    plan->threads = (int)qkv_min(plan->threads, plan->tasks);
    return QKV_OK;
}
