/* Problem -> plan. Every tuning number of the driver is in this file, those of the stages in plan_stages.c, what both share
 * in plan_tools.h; those inside a kernel (its register tile, P_LIMIT, QKV_TERMS) stand where they are used, in kernels/, and
 * those of the pool in threads.c.
 *
 * Two kinds of choice are kept apart. What changes arithmetic (block, chunk) depends only on types and dimensions, so
 * that results are the same bits for any batch, heads, strides and threads. What changes only who does what when (query
 * tiles, passes, splits, copies, threads) may depend on everything.
 */
#include "plan.h"

#include <string.h>

#include "cpu.h"
#include "mask.h"
#include "plan_tools.h"
#include "types.h"

/* Chosen on a 2-core Zen 4 (32 KB L1d, 1 MB L2). Blocks of 64 to 256 keys, passes of 64 to 512 KB and states of 40 to 400 KB
 * came out within that machine's noise of each other; only copies clearly want large states (1.06 against 1.035 of the
 * time without copies, 8 heads of D 128). */
enum {
    BLOCK = 128,                      /* keys per kernel call: S^T (128, 48) is 24 KB, most of L1, but read in order */
    /* Rows of a key head up to which lanes along the head dimension are faster: one for this many columns of K and V, and not
     * more than fill three quarters of 64 bytes, on every path (at D 128, float32, 12 take 0.9 of the time of lanes of rows, 16
     * take 1.1); if K and V would have to be widened, more: 16 take 0.5 and 32 0.7 in float16. From memory, Zen 5. Where registers
     * hold 8 sums, 20 take 0.93 and 32 take 1.06 (float16, D 128, Zen 3). */
    FEW_COLUMNS = 8,
    FEW_LEAST = 4,
    FEW_BYTES = 48,
    FEW_WIDENED = 32,                 /* not of int8 and int4: 32 take 1.6 times as long as lanes of rows with widened copies (Zen 3) */
    FEW_WIDENED_8 = 20,
    FEW_ONCE = 5,                     /* rows from which on int4 is widened once for all, and not for every four: 12 take 0.7 of the time (Zen 3) */
    FEW_BEAMS = 64,                   /* rows of a tile that several beams share: what is kept of a row is 5 KB */
    TOGETHER_BYTES = 4096,            /* of a key, of some heads together: from memory 0.6 to 0.8 of the time of one after the other (Zen 3) */
    TOGETHER_LEAST = 6 << 20,         /* bytes of K and V from which on that pays: with 4 MB 1.03 to 1.07, with 8 MB 0.92 */
    CHUNK = 1024,                     /* keys per chunk; merging chunks of about 1000 keeps the error of 64k keys small */
    PASS_BYTES = 256 << 10,           /* K and V of a pass: a quarter of L2, half of an older 512 KB one */
    STATE_BYTES = 192 << 10,          /* Q^T, O and totals of the panels that share a pass */
    COPY_PASS_BYTES = 128 << 10,      /* the same two where K or V is copied */
    COPY_STATE_BYTES = 2 << 20,
    APART_ROWS = 4,                   /* K and V whose rows lie that many rows from each other are copied, for tiles of this many panels: */
    APART_PANELS = 16,                /* 0.85 to 0.97 of the time of rows where they lie, with 16 panels or more; 1.03 with 9. Zen 3 */
    TILE_PANELS = 32,                 /* most panels in a query tile */
    TASKS_PER_THREAD = 8,             /* enough for an even finish; fewer, larger tasks share K and V better */
    ENOUGH_ROUNDS = 4,                /* heads for each thread: if they come out even, the panels of a head stay together, */
    SHARING_PANELS = 3,               /* up to this many: they read K and V from memory once (64 rows: 0.88 of the time) */
    PARTIAL_BYTES = 32 << 20,         /* most memory that a split may take */
    SUMMARY_BYTES = 8 << 20,          /* most of a mask's summary: 1 GB of mask */
    HEADS_INNER_BYTES = 16 << 20,     /* a bias that heads share is read tile by tile, by all heads, where L3 would not hold it */
    KEPT_BYTES = 1536 << 10,          /* most that a task keeps of a bias or mask for the heads that it takes together */
    KEPT_PANELS = 2,                  /* fewest of a task where K and V are copied too: 0.95 to 0.99 of the time of one (float16, Zen 3) */
    KEPT_TASKS = 4,                   /* fewest tasks for each thread that this may leave */
    SUMMARY_ROWS = 64,                /* of a task of it: some microseconds for rows of a few thousand keys */
    GRADIENT_PARTS = 4,               /* most partial sums of dQ */
    GRADIENT_KEYS = 512,              /* fewest keys of one */
    GRADIENT_BYTES = 1 << 20,         /* dK and dV of the keys that all queries of a head meet before the next */
    COLUMNS = 256,                    /* most columns of cells in a task: what is kept of a panel is half of L2 at most */
    COLD_BYTES = 1 << 20              /* less than that of K and V is in some cache: asking for it took 3 % at 8x128, Zen 5 */
};
/* Times as much for a thread that sleeps, which comes some 30 us later. With gaps of 30 to 300 us, two threads for 4 Mflop take
 * 0.9 of the time of one, for 6 Mflop 0.8; for 1 MB of K and V read once 1.35. Zen 3. */
static const double WORTH_WAKING = 2;
static const double SERIAL_BYTES = 1 << 20;             /* as SERIAL_FLOPS, where K and V are read once */
static const double ROW_FLOPS = 1e4;                    /* a row takes some 0.1 us beside its products: begin, softmax, end */

_Static_assert((int)QKV_AS_F32 == QKV_F32 && (int)QKV_AS_F64 == QKV_F64 && (int)QKV_AS_F16 == QKV_F16
               && (int)QKV_AS_BF16 == QKV_BF16 && (int)QKV_AS_I8 == QKV_I8 && (int)QKV_AS_I4 == QKV_I4, "kernels number types as problems do");

/* What keeps a row from being used where it lies if pairs of its elements are multiplied. */
static int pair_obstacles(const void *data, int n_axes, const qkv_strides *at, int swapped, int64_t dim)
{
    int odd = dim % 2 || places(data, n_axes, at) % 4;
    return obstacles(data, n_axes, at, swapped, 2) | (odd ? QKV_UNPAIRED : 0);
}

/* -inf as it is stored. */
static void store_minus_infinity(qkv_type type, int swapped, char *to)
{
    const double wide = -INFINITY;
    const float narrow = -INFINITY;
    const uint16_t half = type == QKV_F16 ? 0xfc00 : 0xff80;
    int size = qkv_size(type);
    memcpy(to, size == 8 ? (const void *)&wide : size == 4 ? (const void *)&narrow : &half, (size_t)size);
    for (int i = 0; swapped && i < size / 2; i++) {
        char x = to[i];
        to[i] = to[size - 1 - i];
        to[size - 1 - i] = x;
    }
}

static void choose_copies(const qkv_problem *p, qkv_plan *plan)
{
    qkv_type arithmetic = qkv_arithmetic(p->type);
    int kv_axes = p->run_of ? 0 : p->n_axes;
    int tiles = plan->kernels->parts > 0, pairs = plan->kernels->pair > 1 && !tiles;
    plan->copy_k = tiles ? QKV_UNTILED : !pairs && p->k_type != arithmetic ? QKV_WIDENED : 0;
    plan->copy_v = tiles ? QKV_UNTILED : pairs ? QKV_UNPAIRED : p->v_type != arithmetic ? QKV_WIDENED : 0;
    for (int64_t i = 0; i < p->n_runs; i++) {
        plan->copy_k |= pairs ? pair_obstacles(p->runs[i].k, kv_axes, &p->k_at, p->swapped_k, p->dim)
                              : obstacles(p->runs[i].k, kv_axes, &p->k_at, p->swapped_k, qkv_size(p->k_type));
        plan->copy_v |= obstacles(p->runs[i].v, kv_axes, &p->v_at, p->swapped_v, qkv_size(p->v_type));
    }
    int row_axes = p->q_starts ? 0 : p->n_axes;
    plan->obstacles_q = pairs ? pair_obstacles(p->q, row_axes, &p->q_at, p->swapped_q, p->dim)
        : (tiles ? QKV_UNTILED : p->type != arithmetic ? QKV_WIDENED : 0)
          | obstacles(p->q, row_axes, &p->q_at, p->swapped_q, qkv_size(p->type));
    plan->obstacles_out = (p->out_type != arithmetic ? QKV_WIDENED : 0)
        | obstacles(p->out, row_axes, &p->out_at, p->swapped_out, qkv_size(p->out_type));
    plan->direct_q = !plan->obstacles_q;
    plan->direct_out = !plan->obstacles_out;
    plan->direct_bias = p->bias && p->bias_type == arithmetic
        && !obstacles(p->bias, p->n_axes, &p->bias_at, p->swapped_bias, qkv_size(arithmetic));
    store_minus_infinity(p->bias_type, p->swapped_bias, plan->hidden);
    plan->direct_mask = p->mask && p->mask_at.dim == 1 && !p->q_ids && !p->mask_from;
}

/* A mask whose rows are shared, by heads or sequences, is summed up before the work. */
static void plan_summary(const qkv_problem *p, qkv_plan *plan)
{
    int64_t rows = 1;
    qkv_strides *at = &plan->summary_at;
    int64_t all, most = p->length ? 0 : p->len_k;       /* keys that some sequence has */
    for (int64_t b = 0; p->length && b < plan->sequences; b++)
        most = qkv_max(most, qkv_length(p, b));
    /* Rows that windows or spans cut short are looked at by the tiles that need them. */
    if (plan->decode || !p->mask || p->mask_from || p->q_ids || p->spans || p->left != QKV_OPEN || p->mask_at.dim > 1
        || p->mask_at.dim < 0 || most == 0
        || !multiply(plan->sequences, p->heads_q, &all) || !multiply(all, p->len_q, &all) || !multiply(all, plan->beams, &all))
        return;
    int64_t blocks = p->mask_at.dim ? ceil_div(most, BLOCK) : 1;
    at->dim = p->mask_at.dim ? 1 : 0;
    at->row = p->mask_at.row ? blocks : 0;
    rows = p->mask_at.row ? p->len_q : 1;
    at->head = p->mask_at.head ? rows * blocks : 0;
    int fits = !p->mask_at.head || multiply(rows, p->heads_q, &rows);
    at->beam = p->mask_at.beam ? rows * blocks : 0;
    fits = fits && (!p->mask_at.beam || multiply(rows, plan->beams, &rows));
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

/* Whether heads read the same lines of a bias or mask: they lie side by side or, of one that they share, are more than stays in
 * a cache for the next head. */
static int shares_lines(const qkv_problem *p, const void *data, const qkv_strides *at)
{
    double bytes = (double)llabs(at->row) * (double)p->len_q;
    return data && llabs(at->head) < llabs(at->row) && (at->head || bytes >= HEADS_INNER_BYTES);
}

/* Whether copies of a bias or mask serve several heads: they share what is copied, or its lines. */
static int serves_heads(const void *data, const qkv_strides *at, int direct)
{
    return data && !direct && at->dim && at->row && llabs(at->head) < llabs(at->dim) && llabs(at->head) < llabs(at->row);
}

/* What a panel keeps for one head. */
static qkv_kept copies_of(const qkv_plan *plan, size_t size)
{
    size_t row_bytes = (size_t)plan->block * size;
    return (qkv_kept){1, size, row_bytes, (size_t)plan->kernels->lanes * row_bytes + COPY_PAD * size};
}

/* Heads that a task takes together, since copies of a bias or mask serve them all, and panels of its tile: so many as what is kept of
 * them has room, and threads have tasks. */
static void plan_kept(const qkv_problem *p, qkv_plan *plan, int64_t panels)
{
    int bias = serves_heads(p->bias, &p->bias_at, plan->direct_bias);
    int mask = serves_heads(p->mask, &p->mask_at, plan->direct_mask) && !p->q_ids && !p->mask_from;
    if (plan->decode || p->question || qkv_is_uneven(p) || plan->heads < 2 || panels == 0 || p->len_k == 0 || !(bias || mask))
        return;
    plan->kept_bias = bias ? copies_of(plan, (size_t)plan->kernels->size) : plan->kept_bias;
    plan->kept_mask = mask ? copies_of(plan, 1) : plan->kept_mask;
    plan->places = ceil_div(qkv_min(p->len_k, plan->chunk), plan->block);
    /* Bytes of a panel, of all heads and of each. */
    double common = 0, own = plan->merges ? (double)plan->state_bytes : 0, places = (double)plan->places;
    *(p->bias_at.head ? &own : &common) += places * (double)plan->kept_bias.head_bytes;
    *(p->mask_at.head ? &own : &common) += places * (double)plan->kept_mask.head_bytes;
    int64_t heads = plan->heads, threads = qkv_max(1, p->threads), tile = plan->tile_panels;
    int64_t least = plan->copy_k | plan->copy_v ? qkv_min(tile, KEPT_PANELS) : 1;
    double room = (double)KEPT_BYTES / (double)least;
    if (common + own * (double)heads > room)
        heads = own > 0 && room > common ? (int64_t)((room - common) / own) : 0;
    if (heads > 0)
        tile = qkv_max(least, qkv_min(tile, (int64_t)(KEPT_BYTES / (common + own * (double)heads))));
    int64_t tiles = ceil_div(panels, tile);
    if (threads > 1)
        heads = qkv_min(heads, plan->sequences * tiles * plan->heads / (threads * KEPT_TASKS));
    if (heads < 2) {
        plan->kept_bias.heads = plan->kept_mask.heads = 0;
        return;
    }
    plan->head_tasks = ceil_div(plan->heads, heads);
    plan->task_heads = ceil_div(plan->heads, plan->head_tasks);
    plan->kept_bias.heads *= p->bias_at.head ? plan->task_heads : 1;
    plan->kept_mask.heads *= p->mask_at.head ? plan->task_heads : 1;
    plan->tiles = tiles;
    plan->tile_panels = ceil_div(panels, tiles);
}

static int reads_out(const qkv_problem *p)
{
    return p->question == QKV_INFLUENCE || p->question == QKV_MOVED || p->question == QKV_GROUPS || p->question == QKV_GRADIENTS;
}

static void lay_out_scratch(const qkv_problem *p, qkv_plan *plan)
{
    size_t size = (size_t)plan->kernels->size, lanes = (size_t)plan->kernels->lanes;
    size_t vectors = lanes / (size_t)plan->kernels->vector;
    size_t panels = (size_t)plan->tile_panels, dim_v = (size_t)p->dim_v;
    size_t at = 0;
    int64_t pair = plan->kernels->pair;
#define TAKE(field, bytes) (plan->field = at, at += align(bytes))
    TAKE(at_panels, panels * QKV_PANEL_BYTES);
    TAKE(at_limits, panels * ((vectors + 1) * sizeof(qkv_limits) + lanes * sizeof(qkv_range)));
    TAKE(at_rows, lanes * sizeof(void *));
    TAKE(at_q, panels * (size_t)plan->terms * lanes * size);
    TAKE(at_state, panels * plan->state_bytes);
    TAKE(at_total, plan->merges ? (size_t)plan->task_heads * panels * plan->state_bytes : 0);
    int gradients = p->question == QKV_GRADIENTS;       /* dS and products beside S */
    TAKE(at_s, (size_t)plan->block * lanes * size * (gradients ? 3 : plan->kernels->parts > 1 ? 2 : 1));
    TAKE(at_k, plan->copy_k || p->n_runs > 1 ? (size_t)(plan->pass * plan->copy_row_k) * size : 0);
    int64_t copied_v = (plan->copy_v || p->n_runs > 1) && !plan->one ? plan->pass / pair : 0;
    copied_v = p->question == QKV_INFLUENCE ? plan->range : copied_v;
    TAKE(at_v, (size_t)(copied_v * plan->copy_row_v) * size);
    /* Who reads O has a row more for it. */
    size_t most = (size_t)qkv_max(plan->terms, qkv_max(p->dim, p->dim_v));
    TAKE(at_tile, plan->direct_q && plan->direct_out && !reads_out(p) ? 0 : (lanes + 1) * most * size);
    TAKE(at_peaked, sizeof(int));
    TAKE(at_lanes, plan->adjust ? panels * lanes * QKV_LANE_BYTES : 0);
    TAKE(at_pointers, plan->adjust ? 2 * lanes * sizeof(void *) : 0);
    const qkv_kept *bias = &plan->kept_bias, *mask = &plan->kept_mask;
    size_t kept = panels * (size_t)plan->places;
    TAKE(at_bias, bias->heads ? kept * (size_t)bias->heads * bias->head_bytes
                  : p->bias && !plan->direct_bias ? lanes * (size_t)plan->block * size : 0);
    TAKE(at_mask, mask->heads ? kept * (size_t)mask->heads * mask->head_bytes
                  : plan->masked && !plan->direct_mask ? lanes * (size_t)plan->block : 0);
    size_t ends = bias->heads && !p->bias_at.head ? vectors * QKV_END_BYTES : 0;
    TAKE(at_kept, plan->kept_bytes = bias->heads || mask->heads ? kept * (2 * sizeof(int64_t) + ends) : 0);
    TAKE(at_keys, p->slopes && p->positions && p->mask_from ? (size_t)plan->block * size : 0);
    size_t columns = gradients ? (size_t)(qkv_columns(plan, p->dim) + qkv_columns(plan, p->dim_v)) : 2 * (size_t)plan->kernels->vector;
    TAKE(at_sums, (size_t)plan->range * (qkv_asks_cells(p) ? sizeof(double) : columns * size));
    TAKE(at_finite, gradients ? (size_t)(plan->range / plan->block) * sizeof(int64_t) : 0);
    TAKE(at_bounds, qkv_asks_cells(p) ? (size_t)(plan->range * plan->parts + 1) * sizeof(int64_t) : 0);
    TAKE(at_sizes, p->question == QKV_INFLUENCE ? (size_t)plan->range * size : 0);
    TAKE(at_products, p->question == QKV_INFLUENCE ? (size_t)plan->block * lanes * size : 0);
    TAKE(at_centre, p->question == QKV_INFLUENCE ? dim_v * size : 0);
    TAKE(at_without, p->question == QKV_MOVED ? panels * lanes * sizeof(int64_t) : 0);
    size_t grouped = p->question == QKV_GROUPS ? panels : 0;
    TAKE(at_best, grouped * plan->state_bytes);
    TAKE(at_rest, grouped * plan->state_bytes);
    TAKE(at_outputs, grouped * dim_v * lanes * size);
    TAKE(at_shares, grouped * lanes * QKV_SHARE_BYTES);
#undef TAKE
    plan->scratch_bytes = plan->decode || at < plan->few.scratch_bytes ? plan->few.scratch_bytes : at;
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
        plan->adjust = 1;
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

int qkv_few_obstacles(const qkv_plan *plan, int values, int64_t rows)
{
    const qkv_few_plan *few = &plan->few;
    return (values ? few->copy_v : few->copy_k) | (rows >= (values ? few->once_v : few->once_k) ? QKV_WIDENED : 0);
}

/* Pairs are multiplied where Q, K and V hold them, and what goes into Q is its sign alone. */
static int multiplies_pairs(const qkv_problem *p, const qkv_plan *plan)
{
    int halves = p->type == QKV_BF16 && p->k_type == QKV_BF16 && p->v_type == QKV_BF16;
    return !p->question && !p->answer && qkv_isa_at(p->isa)->pairs && halves && fabs(plan->q_factor) == 1;
}

/* The table of tiles, or NULL. Few rows and questions have no tiles. */
static const qkv_kernels *tiles_for(const qkv_problem *p, const qkv_plan *plan)
{
    const qkv_type types[] = {p->type, p->k_type, p->v_type};
    return p->question || p->answer ? NULL : tiles_of(p->isa, types, 3, plan->q_factor);
}

/* Rows of lanes and of copies, which tiles have otherwise than the table of the arithmetic. */
static void plan_tiles(const qkv_problem *p, qkv_plan *plan)
{
    const qkv_kernels *kernels = plan->kernels;
    size_t state_bytes = (size_t)((p->dim_v + 2) * kernels->lanes * kernels->size);
    plan->state_bytes = (size_t)qkv_max((int64_t)align(state_bytes), (int64_t)plan->few.state_bytes);
    plan->terms = plan->copy_row_k = kernels->parts * ceil_div(p->dim, 32) * 16;
    plan->copy_row_v = kernels->parts * ceil_div(p->dim_v, 16) * 16;
}

/* Whether few rows are asked for their weights, and may have them from the walk of attention. */
static int keeps_rows(const qkv_problem *p)
{
    return p->question == QKV_ROWS && p->answer_quick && !p->kept;
}

/* Whether the rows that heads have of a key lie side by side. */
static int lie_together(const qkv_strides *at) { return at->head && llabs(at->head) < llabs(at->row); }

/* Key heads of few rows that go through a few keys together before the next, as long as that leaves work for all threads: tasks of
 * the longest sequences, for short ones are none. */
static int64_t heads_together(const qkv_problem *p, const qkv_plan *plan)
{
    const qkv_few_plan *few = &plan->few;
    int64_t most = TOGETHER_BYTES / (qkv_row_bytes(p->k_type, p->dim) + 1) + 1, long_ones = 0;
    int64_t heads = qkv_min(plan->heads, qkv_min(most, QKV_HEADS_TOGETHER)), tiles = ceil_div(plan->rows, few->rows);
    int copies = qkv_few_obstacles(plan, 0, few->rows) | qkv_few_obstacles(plan, 1, few->rows);
    int aside = lie_together(&p->k_at) && lie_together(&p->v_at);
    if (!plan->decode || p->question || copies || !aside)
        return 1;
    double keys = 0;
    for (int64_t b = 0; b < plan->sequences; b++) {
        int64_t n = qkv_min(qkv_length(p, b), plan->reach);
        keys += (double)n;
        long_ones += 2 * n > plan->reach;
    }
    if (keys * (double)plan->heads * (double)qkv_token_bytes(p) < TOGETHER_LEAST)
        return 1;
    for (; heads > 1 && p->threads > 1; heads = ceil_div(heads, 2)) {
        int64_t tasks = tiles * ceil_div(plan->heads, heads);
        int splits = plan->sequences * tasks < 2 * p->threads;          /* then chunks are tasks of their own */
        if (long_ones * tasks * (splits ? plan->chunks : 1) >= 2 * p->threads)
            break;
    }
    return heads;
}

/* For tiles of few rows, where there may be some: `rows` at most. */
static void plan_few(const qkv_problem *p, qkv_plan *plan)
{
    qkv_few_plan *few = &plan->few;
    int64_t size = plan->kernels->size, vector = plan->kernels->vector;
    few->heads = 1;
    if (plan->rows == 0 || (p->question && !keeps_rows(p)))
        return;
    qkv_type arithmetic = qkv_arithmetic(p->type);
    int quantised = p->k_type >= QKV_I8 || p->v_type >= QKV_I8, own = p->k_type == arithmetic && p->v_type == arithmetic;
    int64_t widened = plan->kernels->decode_keys == 8 ? FEW_WIDENED_8 : FEW_WIDENED;
    int64_t most = own || quantised ? FEW_BYTES / size : widened;
    few->most = qkv_min(most, qkv_max(FEW_LEAST, (p->dim + p->dim_v) / FEW_COLUMNS));
    plan->decode = p->len_q * plan->group <= few->most;
    if (!plan->decode && !qkv_is_uneven(p))
        return;
    int pairs = multiplies_pairs(p, plan);
    few->kernels = pairs ? qkv_isa_at(p->isa)->pairs : plan->kernels;
    /* Whole vectors are widened as they are loaded; pairs are loaded from anywhere. */
    int anywhere = pairs ? QKV_WIDENED | QKV_UNPAIRED | QKV_UNALIGNED : 0, widens = few->kernels->widens;
    few->copy_k = plan->copy_k & ~(widens && p->dim % vector == 0 ? QKV_WIDENED : anywhere);
    few->copy_v = plan->copy_v & ~(widens && p->dim_v % vector == 0 ? QKV_WIDENED : anywhere);
    few->streams = (qkv_features() & QKV_CPU_STREAMS) != 0;
    few->obstacles_q = plan->obstacles_q & ~anywhere;
    int64_t n = few->rows = qkv_min(plan->beams > 1 ? FEW_BEAMS : few->most, plan->rows);
    few->columns = !pairs && few->copy_k == QKV_STRIDED && p->k_type == arithmetic && p->k_at.row == size && n <= QKV_COLUMN_ROWS;
    few->copy_k = few->columns ? 0 : few->copy_k;
    few->once_k = p->k_type == QKV_I4 ? FEW_ONCE : INT64_MAX;
    few->once_v = p->v_type == QKV_I4 ? FEW_ONCE : INT64_MAX;
    int copies_k = qkv_few_obstacles(plan, 0, n) != 0, copies_v = qkv_few_obstacles(plan, 1, n) != 0;
    size_t at = 0, rows = (size_t)n, lanes = (size_t)(ceil_div(n, vector) * vector);
    size_t dim = (size_t)qkv_max(p->dim, p->dim_v);
    few->pass = qkv_min(CHUNK, qkv_max(16, COPY_PASS_BYTES / ((p->dim + p->dim_v + 1) * size) / 16 * 16));
    few->copy_row_k = plan->copy_row_k;
    few->copy_row_v = plan->copy_row_v;
    int64_t pair = few->kernels->pair;
    few->q_row = ceil_div(p->dim, pair * vector) * vector;
    few->o_row = ceil_div(p->dim_v, pair * vector) * pair * vector;
    few->l_bytes = align((size_t)(n * size));
    few->state_bytes = align((size_t)(n * few->o_row * size)) + 2 * few->l_bytes;
#define TAKE(field, bytes) (few->field = at, at += align(bytes))
    TAKE(at_limits, rows * (sizeof(qkv_range) + 2 * sizeof(int32_t)));
    TAKE(at_rows, rows * sizeof(void *));
    TAKE(at_q, rows * (size_t)(few->q_row * size));
    few->s_row = CHUNK + COPY_PAD;
    TAKE(at_s, rows * (size_t)(few->s_row * size));
    TAKE(at_parts, few->columns ? rows * (size_t)(vector * QKV_COLUMN_KEYS * size) : 0);
    TAKE(at_sums, rows * (size_t)(few->o_row * size));
    TAKE(at_state, few->state_bytes);
    TAKE(at_total, few->state_bytes);
    TAKE(at_k, copies_k ? (size_t)(few->pass * few->copy_row_k * size) : 0);
    TAKE(at_v, copies_v ? (size_t)(few->pass * few->copy_row_v * size) : 0);
    TAKE(at_pair, pairs ? (size_t)(2 * ceil_div(p->dim_v, 2) * size) : 0);
    TAKE(at_copies, !few->obstacles_q && plan->direct_out ? 0 : rows * dim * (size_t)size);
    TAKE(at_lanes, plan->adjust ? lanes * QKV_LANE_BYTES : 0);
    TAKE(at_pointers, plan->adjust ? 2 * rows * sizeof(void *) : 0);
    TAKE(at_bias, p->bias && !plan->direct_bias ? rows * (size_t)(CHUNK * size) : 0);
    TAKE(at_mask, plan->masked && !plan->direct_mask ? rows * CHUNK : 0);
    TAKE(at_keys, p->slopes && p->positions && p->mask_from ? (size_t)(CHUNK * size) : 0);
    TAKE(at_tops, p->question ? (size_t)plan->chunks * few->l_bytes : 0);
#undef TAKE
    few->heads = heads_together(p, plan);
    few->head_bytes = at;
    few->scratch_bytes = (size_t)few->heads * at;
    plan->state_bytes = plan->decode ? few->state_bytes : (size_t)qkv_max((int64_t)plan->state_bytes, (int64_t)few->state_bytes);
}

/* What keeps whole rows from being used where they lie, by tiles of so many panels: far from each other they share few sets of a cache. */
static int apart(const qkv_strides *at, int64_t bytes, int64_t panels)
{
    return panels >= APART_PANELS && llabs(at->row) >= APART_ROWS * bytes ? QKV_APART : 0;
}

static int64_t panels_of(const qkv_problem *p, const qkv_plan *plan, int64_t sequence)
{
    return ceil_div(qkv_queries(p, sequence) * plan->each, plan->kernels->lanes);
}

int64_t qkv_tiles_of(const qkv_problem *p, const qkv_plan *plan, int64_t sequence)
{
    if (qkv_has_few(p, plan, sequence))
        return ceil_div(qkv_queries(p, sequence) * plan->each, qkv_max(1, plan->few.rows));
    return ceil_div(panels_of(p, plan, sequence), plan->tile_panels);
}

/* What of the keys queries can see at all. */
static void find_reach(const qkv_problem *p, qkv_plan *plan)
{
    int64_t alike = !p->length && !p->offset && !p->positions && !p->start && !qkv_is_uneven(p);
    plan->chunks = 1;
    for (int64_t b = 0; b < (alike ? qkv_min(1, plan->sequences) : plan->sequences); b++) {
        qkv_range keys = qkv_reach(p, b, 0, qkv_queries(p, b) - 1);
        if (keys.lo >= keys.hi)
            continue;
        plan->reach = qkv_max(plan->reach, keys.hi - keys.lo);
        plan->chunks = qkv_max(plan->chunks, (keys.hi - 1) / CHUNK - keys.lo / CHUNK + 1);
    }
}

/* Panels of all key heads, rows of all heads, and floating-point operations if every query saw every key within reach (of ragged
 * sequences: all). */
static int count_work(const qkv_problem *p, const qkv_plan *plan, int64_t *panels, double *rows, double *flops)
{
    int64_t heads;
    double queries = (double)plan->sequences * (double)plan->beams * (double)p->len_q, pairs = queries * (double)plan->reach;
    if (!multiply(plan->sequences, plan->heads, &heads)
        || !multiply(heads, ceil_div(plan->rows, plan->kernels->lanes), panels))
        return 0;
    if (qkv_is_uneven(p)) {           /* less than that */
        *panels = 0;
        queries = pairs = 0;
        for (int64_t b = 0; b < plan->sequences; b++) {
            *panels += plan->heads * panels_of(p, plan, b);
            queries += (double)qkv_queries(p, b);
            pairs += (double)qkv_queries(p, b) * (double)qkv_length(p, b);
        }
    }
    *rows = queries * (double)p->heads_q;
    *flops = 2.0 * (double)(p->dim + p->dim_v) * pairs * (double)p->heads_q;
    return 1;
}

/* Bytes of what a question keeps for each row beside m and l. */
static int64_t answer_lane_bytes(const qkv_problem *p, const qkv_plan *plan)
{
    const qkv_kernels *kernels = plan->kernels;
    if (qkv_asks_cells(p))
        return plan->range * plan->parts * kernels->size;
    if (p->question == QKV_ENTROPY)
        return kernels->size;
    if (p->question == QKV_GRADIENTS) /* dQ^T, delta, columns of Q and dO; dO^T where attention has O^T */
        return (p->dim + 1 + qkv_columns(plan, p->dim) + qkv_columns(plan, p->dim_v)) * kernels->size;
    if (p->question == QKV_TOP_KEYS)  /* no more keys than there are */
        return 2 * qkv_max(1, qkv_min(p->answer_n, p->len_k)) * kernels->size;
    if (p->question == QKV_INFLUENCE) /* the square of an output's length, and a key */
        return 2 * kernels->size;
    return 0;
}

/* Tasks that sum over queries have a range of keys each. It is what says who adds up what, not in which order. */
static int plan_ranges(const qkv_problem *p, qkv_plan *plan)
{
    int64_t heads = plan->sequences * plan->heads, blocks = ceil_div(p->len_k, BLOCK);
    int64_t wanted = heads ? ceil_div((int64_t)p->threads * TASKS_PER_THREAD, heads) : 1;
    plan->range = qkv_max(1, qkv_min(CHUNK / BLOCK, blocks / qkv_max(1, wanted))) * BLOCK;
    plan->ranges = ceil_div(p->len_k, plan->range);
    return multiply(heads, plan->ranges, &plan->tasks);
}

/* Keys of a part of the gradient of queries. */
static int64_t gradient_keys(int64_t len_k)
{
    return qkv_max(GRADIENT_KEYS, ceil_div(ceil_div(len_k, GRADIENT_PARTS), BLOCK) * BLOCK);
}

int64_t qkv_gradient_parts(int64_t len_k)
{
    return qkv_max(1, ceil_div(len_k, gradient_keys(len_k)));
}

/* Tasks of gradients have a part of the keys each, of one key head, or of all where these share a bias. */
static int plan_gradients(const qkv_problem *p, qkv_plan *plan, int64_t panels, int64_t panel_bytes)
{
    int64_t heads = plan->sequences * plan->heads, bytes = (p->dim + p->dim_v) * plan->kernels->size;
    plan->share = gradient_keys(p->len_k);
    plan->range = qkv_min(qkv_min(plan->share, CHUNK), qkv_max(1, GRADIENT_BYTES / (bytes + 1) / BLOCK) * BLOCK);
    plan->pass = plan->block;         /* all panels of a tile meet a block of keys before the next */
    /* Nothing but their size says how many: sums over keys and queries come in this order. */
    plan->tile_panels = qkv_max(1, qkv_min(qkv_min(TILE_PANELS, STATE_BYTES / panel_bytes), panels));
    plan->ranges = qkv_gradient_parts(p->len_k);
    plan->together = p->dbias && plan->heads > 1 && !p->dbias_at.head;
    for (int i = 0; i < p->n_axes; i++)
        plan->together |= p->dbias && !p->dbias_at.axis[i];
    int64_t tasks = plan->together ? heads > 0 : heads, threads = qkv_max(1, p->threads);
    /* Parts in turn need no memory and no sum in the end: 1 to 4 % of the time of rows of 64. Where each is one range, which begins
     * from zero, the sums are the same; and no thread may be left without a task, as where sequences differ in length. */
    int alike = threads == 1 || (!qkv_is_uneven(p) && !p->length);
    plan->in_turn = alike && plan->share == plan->range && 50 * (ceil_div(tasks, threads) * threads - tasks) <= tasks;
    return multiply(tasks, plan->in_turn ? 1 : plan->ranges, &plan->tasks);
}

/* A map of cells: columns that a task has, and the parts of one, of up to CHUNK keys. */
static int plan_columns(const qkv_problem *p, qkv_plan *plan)
{
    int64_t columns = qkv_max(1, p->answer_n), unused;
    plan->ranges = ceil_div(columns, COLUMNS);
    plan->range = ceil_div(columns, plan->ranges);
    plan->parts = qkv_max(1, ceil_div(ceil_div(p->len_k, columns), CHUNK));
    return multiply(columns, plan->parts, &columns) && multiply(columns, p->len_k, &unused)
        && multiply(p->answer_rows, p->len_q, &unused);
}

/* And rows of it: as many as fill a tile, or one, which may take several tiles. */
static int plan_cells(const qkv_problem *p, qkv_plan *plan)
{
    int64_t rows = plan->tile_panels * plan->kernels->lanes;
    plan->cell_rows = p->len_q ? qkv_max(1, qkv_min(rows, p->len_q) * p->answer_rows / p->len_q) : 1;
    return multiply(plan->sequences * plan->heads, ceil_div(p->answer_rows, plan->cell_rows), &plan->tasks)
        && multiply(plan->tasks, p->answer_n ? plan->ranges : 0, &plan->tasks);
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
    plan->by_key = p->question == QKV_RECEIVED || p->question == QKV_INFLUENCE;
    plan->values = p->question == QKV_VALUES || p->question == QKV_MOVED || p->question == QKV_GROUPS;
    plan->heads = plan->by_key || p->question == QKV_GROUPS || qkv_asks_cells(p) ? p->heads_q : p->heads_kv;
    plan->group = plan->heads ? p->heads_q / plan->heads : 0;
    plan->sharing = p->heads_kv ? plan->heads / p->heads_kv : 0;
    plan->beams = qkv_max(1, p->beams);
    if (!multiply(plan->beams, plan->group, &plan->each) || !multiply(p->len_q, plan->each, &plan->rows))
        return QKV_OVERFLOW;

    if (qkv_asks_cells(p) && !plan_columns(p, plan))
        return QKV_OVERFLOW;
    int64_t lane_bytes;
    int numbered = p->question == QKV_TOP_KEYS || p->question == QKV_INFLUENCE;
    if (numbered && kernels->size == sizeof(uint32_t) && p->len_k >= UINT32_MAX)
        return QKV_OVERFLOW;          /* keys are numbered in as many bits */
    if (!multiply(answer_lane_bytes(p, plan) + (p->dim_v + 2) * kernels->size, kernels->lanes, &lane_bytes))
        return QKV_OVERFLOW;
    plan->state_bytes = align((size_t)lane_bytes);
    plan->block = BLOCK;
    plan->chunk = CHUNK;
    find_reach(p, plan);
    /* A sink is merged even with a single chunk: how many there are must not show in a sequence that has only one. So is
     * what belongs to a group. */
    plan->merges = plan->values && (p->len_k > CHUNK || p->sinks || p->question == QKV_GROUPS);
    choose_copies(p, plan);
    plan->copy_row_k = p->dim + COPY_PAD;
    plan->copy_row_v = p->dim_v + COPY_PAD;
    plan_few(p, plan);
    plan->task_heads = plan->few.heads;
    plan->head_tasks = ceil_div(plan->heads, plan->task_heads);
    if (!plan->decode && multiplies_pairs(p, plan)) {
        kernels = plan->kernels = qkv_isa_at(p->isa)->pairs;
        choose_copies(p, plan);
    }
    plan->terms = ceil_div(p->dim, kernels->pair);
    if (!plan->decode && tiles_for(p, plan)) {
        kernels = plan->kernels = tiles_for(p, plan);
        choose_copies(p, plan);
        plan_tiles(p, plan);
    }
    plan->one = p->latent && kernels->pair == 1;
    int64_t row_bytes = (p->dim + (plan->one ? 0 : p->dim_v)) * kernels->size / kernels->pair * qkv_max(1, kernels->parts);
    int64_t panels = ceil_div(plan->rows, kernels->lanes), threads = qkv_max(1, p->threads), base;
    double rows, flops;
    if (!count_work(p, plan, &base, &rows, &flops))
        return QKV_OVERFLOW;
    int64_t sharing = threads > 1 ? qkv_min(panels, base / (threads * TASKS_PER_THREAD)) : panels;
    if (!plan->decode && !p->question && kernels->pair == 1) {
        plan->copy_k |= apart(&p->k_at, qkv_row_bytes(p->k_type, p->dim), sharing);
        plan->copy_v |= apart(&p->v_at, qkv_row_bytes(p->v_type, p->dim_v), sharing);
    }
    /* Copies want many panels to share them, and leave them the room by being short. */
    int copies = (plan->copy_k | plan->copy_v) != 0;
    double cold_bytes = (double)plan->sequences * (double)p->heads_kv * (double)plan->reach * (double)qkv_token_bytes(p);
    plan->cold = !((plan->copy_k | plan->copy_v) & ~(p->question ? 0 : QKV_WIDENED)) && cold_bytes > COLD_BYTES;
    int64_t pass = (copies ? COPY_PASS_BYTES : PASS_BYTES) / (row_bytes + kernels->size) / BLOCK * BLOCK;
    plan->pass = qkv_min(CHUNK, qkv_max(BLOCK, pass));

    /* Query tiles: as many panels as stay in cache together, but enough tiles for all threads. */
    int64_t panel_bytes = (plan->terms + 2 * p->dim_v + 4) * kernels->lanes * kernels->size;
    if (!plan->values)
        panel_bytes = plan->terms * kernels->lanes * kernels->size + (int64_t)plan->state_bytes;
    int64_t most = qkv_min(TILE_PANELS, qkv_max(1, (copies ? COPY_STATE_BYTES : STATE_BYTES) / panel_bytes));
    int64_t heads = plan->sequences * plan->heads, rounds = ceil_div(heads, threads);
    int even = rounds >= ENOUGH_ROUNDS && rounds * threads <= heads + heads / 16;
    int64_t least = plan->cold && even ? SHARING_PANELS : 1;
    int64_t wanted = p->threads > 1 ? qkv_max(least, base / (threads * TASKS_PER_THREAD)) : most;
    double panel_flops = 2.0 * (double)(p->dim + p->dim_v) * (double)kernels->lanes * (double)plan->reach;
    most = qkv_min(most, (int64_t)(TASK_FLOPS / (panel_flops + 1)));
    plan->tiles = plan->decode ? ceil_div(plan->rows, plan->few.rows) : ceil_div(panels, qkv_max(1, qkv_min(qkv_min(most, wanted), panels)));
    plan->tile_panels = plan->decode ? 1 : qkv_max(1, ceil_div(panels, qkv_max(1, plan->tiles)));     /* of about one size */
    plan_kept(p, plan, panels);
    plan->tasks = plan->sequences * plan->head_tasks * plan->tiles;
    if (qkv_is_uneven(p)) {
        plan->tasks = 0;
        for (int64_t b = 0; b < plan->sequences; b++)
            plan->tasks += plan->head_tasks * qkv_tiles_of(p, plan, b);
    }
    if (p->question == QKV_GRADIENTS && !plan_gradients(p, plan, panels, panel_bytes))
        return QKV_OVERFLOW;
    if ((plan->by_key && !plan_ranges(p, plan)) || (qkv_asks_cells(p) && !plan_cells(p, plan)))
        return QKV_OVERFLOW;
    if (p->question == QKV_GROUPS) {  /* by what each query head has alone: it is in this order that its queries are summed */
        int64_t fits = qkv_max(1, STATE_BYTES / (3 * panel_bytes));
        plan->tile_panels = qkv_max(1, qkv_min(qkv_min(TILE_PANELS, fits), ceil_div(panels, QKV_PARTS)));
        plan->tasks = plan->sequences * plan->heads * QKV_PARTS;
    }
    double bytes = 0, dims = (double)(p->dim + p->dim_v);               /* of K and V */
    if (plan->decode && dims > 0)
        bytes = flops / (2 * dims * (double)plan->rows)
            * (double)qkv_token_bytes(p);
    double work = flops + ROW_FLOPS * rows;
    plan->threads = work < SERIAL_FLOPS && bytes < SERIAL_BYTES ? 1 : p->threads;
    plan->small = work < WORTH_WAKING * SERIAL_FLOPS && bytes < WORTH_WAKING * SERIAL_BYTES;
    plan->partial_bytes = plan->state_bytes * (size_t)(plan->tasks * plan->few.heads * plan->tile_panels);
    if ((!p->question || plan->decode) && plan->threads > 1 && plan->chunks > 1 && plan->tasks < 2 * plan->threads
        && (double)plan->partial_bytes * (double)plan->chunks <= PARTIAL_BYTES) {
        plan->split = 1;
        plan->partial_bytes *= (size_t)plan->chunks;
        plan->tasks *= plan->chunks;
    }
    plan->threads = (int)qkv_min(plan->threads, qkv_max(1, plan->tasks));
    plan_summary(p, plan);
    plan->heads_inner = shares_lines(p, p->bias, &p->bias_at) || shares_lines(p, p->mask, &p->mask_at);
    plan->bases = plan->split ? plan->tasks / plan->chunks : 0;
    if (p->question == QKV_GRADIENTS)
        plan->bases = plan->tasks / (plan->in_turn ? 1 : plan->ranges);
    size_t numbers = (size_t)plan->bases;
    numbers += qkv_is_uneven(p) ? (size_t)plan->sequences + 1 : 0;
    plan->shared_bytes = (plan->split ? plan->partial_bytes : 0) + numbers * sizeof(int64_t) + plan->summary_bytes;
    lay_out_scratch(p, plan);
    return QKV_OK;
}
