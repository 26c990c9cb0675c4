/* What a call would do, from its plan: nothing is computed, and of the arrays only masks and biases of attention are looked at.
 *
 * Tiles are counted as the driver will count them, in closed form for each vector of query rows: the keys that the rows
 * of a vector see are an interval that moves to the right with the position, so its first and last row say which
 * blocks it skips, which it sees whole and which in part. Sequences with the same limits are counted once.
 * With masks, biases, segments, ragged batches or several runs of keys that is not so simple: then the driver walks its tiles with
 * kernels that do nothing.
 * The stages' tasks are alike: what one of them copies, all do.
 */
#include <math.h>
#include <string.h>

#include "beams.h"
#include "cpu.h"
#include "elements.h"
#include "forward.h"
#include "mask.h"
#include "plan.h"
#include "plan_stages.h"
#include "types.h"

/* Rows [first, last] of one key head. Rows that see nothing lie before or after all that see something. */
static qkv_limits limits_of(const qkv_problem *p, int64_t group, int64_t sequence, int64_t first, int64_t last)
{
    qkv_limits limits = qkv_no_limits();
    int64_t begin = first, end = last, offset = qkv_offset(p, sequence);
    if (group > 1) {                  /* two slow divisions, where most calls need none */
        begin /= group;
        end /= group;
    }
    int64_t from = p->right == QKV_OPEN ? begin : qkv_max(begin, -offset - p->right);
    int64_t to = p->left == QKV_OPEN ? end : qkv_min(end, qkv_length(p, sequence) - 1 - offset + p->left);
    if (from <= to) {
        qkv_add_row(&limits, qkv_visible(p, sequence, from));
        qkv_add_row(&limits, qkv_visible(p, sequence, to));
    }
    if (from > begin || to < end)
        qkv_add_row(&limits, (qkv_range){0, 0});
    return limits;
}

static int64_t blocks_up_to(int64_t key, int64_t block) { return key / block + (key % block != 0); }

/* Adds the tiles of `vectors` vectors of rows with these limits, among `visited` blocks of their task. */
static void count_vectors(qkv_counters *count, const qkv_limits *limits, int64_t block, int64_t visited, int64_t vectors)
{
    int64_t begin = 0, end = 0, full = 0;
    if (limits->any.lo < limits->any.hi) {
        begin = limits->any.lo / block;
        end = blocks_up_to(limits->any.hi, block);
        int64_t from = limits->all.lo <= limits->any.lo ? begin : blocks_up_to(limits->all.lo, block);
        int64_t to = limits->all.hi >= limits->any.hi ? end : limits->all.hi / block;
        full = qkv_max(0, to - from);
    }
    count->tiles_full += full * vectors;
    count->tiles_partial += (end - begin - full) * vectors;
    count->tiles_skipped += (visited - (end - begin)) * vectors;
}

/* Passes over the keys [first, last): they begin anew at each chunk. */
static int64_t count_passes(const qkv_plan *plan, int64_t pass, int64_t first, int64_t last)
{
    int64_t chunk = first / plan->chunk, final = (last - 1) / plan->chunk;
    if (chunk == final)
        return blocks_up_to(last - first, pass);
    return blocks_up_to((chunk + 1) * plan->chunk - first, pass)
           + (final - chunk - 1) * blocks_up_to(plan->chunk, pass)
           + blocks_up_to(last - final * plan->chunk, pass);
}

/* One key head of one sequence. */
static void count_tiles(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, qkv_counters *count)
{
    int64_t lanes = plan->kernels->lanes, vector = plan->kernels->vector, rows = plan->tile_panels * lanes;
    int copies = (plan->copy_k != 0) + (plan->copy_v != 0 && !plan->one);
    for (int64_t first = 0; plan->decode && first < plan->rows; first += plan->few.rows) {
        int64_t n = qkv_min(plan->few.rows, plan->rows - first);
        qkv_limits limits = limits_of(p, plan->each, sequence, first, first + n - 1);
        if (limits.any.lo >= limits.any.hi)
            continue;
        int64_t visited = blocks_up_to(limits.any.hi, plan->chunk) - limits.any.lo / plan->chunk;
        if (qkv_few_obstacles(plan, 0, n))
            count->tiles_copied += count_passes(plan, plan->few.pass, limits.any.lo, limits.any.hi);
        /* Of pairs of keys, one beside which no row sees another is no pass. */
        int64_t pair = plan->few.kernels->pair, lo = blocks_up_to(limits.any.lo, pair) * pair;
        int64_t hi = limits.any.hi / pair * pair;
        if (qkv_few_obstacles(plan, 1, n) && lo < hi)
            count->tiles_copied += count_passes(plan, plan->few.pass, lo, hi);
        count_vectors(count, &limits, plan->chunk, visited, 1);
    }
    if (plan->decode)
        return;
    int same = qkv_all_alike(p);
    for (int64_t tile = 0; tile < plan->tiles; tile++) {
        int64_t first = tile * rows, end = qkv_min(first + rows, plan->rows);
        qkv_limits limits = limits_of(p, plan->each, sequence, first, end - 1);
        if (limits.any.lo >= limits.any.hi)
            continue;
        int64_t begin = limits.any.lo / plan->block * plan->block;
        int64_t visited = blocks_up_to(limits.any.hi - begin, plan->block);
        count->tiles_copied += copies * count_passes(plan, plan->pass, begin, limits.any.hi);
        if (same) {
            count_vectors(count, &limits, plan->block, visited, blocks_up_to(end - first, vector));
            continue;
        }
        for (int64_t row = first; row < end; row += vector) {
            limits = limits_of(p, plan->each, sequence, row, qkv_min(row + vector, end) - 1);
            count_vectors(count, &limits, plan->block, visited, 1);
        }
    }
}

static double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

/* The sum of i + shift over first <= i < end. */
static double sum(double first, double end, double shift) { return (end - first) * ((first + end - 1) / 2 + shift); }

/* Pairs of one query head of one sequence that see each other, and the keys that some query sees. */
static double count_pairs(const qkv_problem *p, int64_t sequence, double *keys)
{
    qkv_range any = limits_of(p, 1, sequence, 0, p->len_q - 1).any;
    int64_t n = qkv_length(p, sequence), offset = qkv_offset(p, sequence);
    *keys = any.lo < any.hi ? (double)(any.hi - any.lo) : 0;
    if (*keys == 0)
        return 0;
    /* Of the queries [first, end) that see something, those before `turn` end at position + right, the others at n;
     * and those from `turn` on begin at position - left, the others at 0. */
    double first = 0, end = (double)p->len_q, pairs, turn;
    if (p->right != QKV_OPEN)
        first = fmax(first, (double)(-offset - p->right));
    if (p->left != QKV_OPEN)
        end = fmin(end, (double)(n - offset + p->left));
    turn = p->right == QKV_OPEN ? first : clamp((double)(n - offset - p->right - 1), first, end);
    pairs = sum(first, turn, (double)(offset + p->right + 1)) + (end - turn) * (double)n;
    turn = p->left == QKV_OPEN ? end : clamp((double)(p->left - offset), first, end);
    return pairs - sum(turn, end, (double)(offset - p->left));
}

static void no_attend(const qkv_tile *tile) { (void)tile; }
static void no_reset(void *o, void *m, void *l, int nv, int dv) { (void)o, (void)m, (void)l, (void)nv, (void)dv; }

static void no_merge(void *o, void *m, void *l, const void *o2, const void *m2, const void *l2, int nv, int dv, double c)
{
    (void)o, (void)m, (void)l, (void)o2, (void)m2, (void)l2, (void)nv, (void)dv, (void)c;
}

static void no_pack(void *qt, const void *const *rows, int n, int d, double factor)
{
    (void)qt, (void)rows, (void)n, (void)d, (void)factor;
}

static void no_expect(void *const *rows, int n, int dv) { (void)rows, (void)n, (void)dv; }

static void no_finish(void *const *rows, const void *o, const void *l, int n, int dv)
{
    (void)rows, (void)o, (void)l, (void)n, (void)dv;
}

static int all_finite(const void *o, const void *l, int nv, int dv) { return (void)o, (void)l, (void)nv, (void)dv, 1; }

static void no_gather(void *to, ptrdiff_t to_row, const qkv_rows *from, int n, int d)
{
    (void)to, (void)to_row, (void)from, (void)n, (void)d;
}

static void no_values(void *to, ptrdiff_t to_row, const qkv_rows *from, int at, int n, int d)
{
    (void)at;
    no_gather(to, to_row, from, n, d);
}

static void no_scatter(const qkv_rows *to, const void *from, ptrdiff_t from_row, int n, int d)
{
    (void)to, (void)from, (void)from_row, (void)n, (void)d;
}

static void no_stack(void *q, ptrdiff_t q_row, const void *const *rows, int n, int d, double factor)
{
    (void)q, (void)q_row, (void)rows, (void)n, (void)d, (void)factor;
}

static void no_product(const qkv_stack *stack, const void *rows, ptrdiff_t row, int as, int at, int n)
{
    (void)stack, (void)rows, (void)row, (void)as, (void)at, (void)n;
}

static void no_weigh(const qkv_stack *stack) { (void)stack; }
static void no_states(const qkv_stack *stack, const void *o2, const void *m2, const void *l2)
{
    (void)stack, (void)o2, (void)m2, (void)l2;
}

static int finite_rows(void *const *rows, const qkv_stack *stack) { return (void)rows, (void)stack, 1; }

/* Kernels that do nothing. */
static qkv_kernels idle(const qkv_kernels *of)
{
    qkv_kernels kernels = *of;
    kernels.attend = no_attend;
    kernels.reset = no_reset;
    kernels.merge = no_merge;
    kernels.pack = no_pack;
    kernels.expect = no_expect;
    kernels.finish = no_finish;
    kernels.finite = all_finite;
    kernels.gather = kernels.gather_terms = no_gather;
    kernels.gather_values = no_values;
    kernels.begin = kernels.end = NULL;
    kernels.scatter = no_scatter;
    kernels.decode_stack = no_stack;
    kernels.decode_score = kernels.decode_score_columns = kernels.decode_value = no_product;
    kernels.decode_weigh = no_weigh;
    kernels.decode_merge = no_states;
    kernels.decode_finish = finite_rows;
    return kernels;
}

/* Counts what the call would count, by the driver itself. The problem is the caller's own copy: another would be too much for one
 * frame. */
static qkv_status walk(qkv_problem *p, const qkv_plan *plan, qkv_counters *counters)
{
    qkv_kernels kernels = idle(plan->kernels), few = plan->few.kernels ? idle(plan->few.kernels) : kernels;
    qkv_plan dry_plan = *plan;
    dry_plan.kernels = &kernels;
    dry_plan.few.kernels = &few;
    void *lse = p->lse;
    p->lse = NULL;
    p->counters = counters;
    qkv_status status = qkv_run_plan(p, &dry_plan);
    p->lse = lse;
    return status;
}

/* Whether a sequence sees other keys than the one before it. */
static int differs(const qkv_problem *p, int64_t sequence)
{
    int own = p->spans || p->q_ids || p->positions || p->start || qkv_is_uneven(p) || qkv_length(p, sequence) != qkv_length(p, sequence - 1)
        || qkv_offset(p, sequence) != qkv_offset(p, sequence - 1);
    for (int i = 0; i < p->n_axes && p->mask; i++)
        own |= p->mask_at.axis[i] != 0;
    return own;
}

/* Pairs of all query heads of one sequence, and the keys that some query sees as far as positions say; row by row. Less
 * than 0 if the caller asks to stop. */
static double count_seen(const qkv_problem *p, const qkv_plan *plan, int64_t sequence, double *keys)
{
    enum { ASK = 256 };               /* rows between two looks */
    int64_t heads = p->mask && p->mask_at.head ? p->heads_q : 1;       /* that see different keys */
    int64_t beams = p->mask && p->mask_at.beam ? p->beams : 1;
    double pairs = 0;
    qkv_limits limits = qkv_no_limits();
    for (int64_t i = 0; i < qkv_queries(p, sequence); i++) {
        qkv_range row = qkv_visible(p, sequence, i);
        qkv_add_row(&limits, row);
        if (!plan->masked)
            pairs += (double)(row.hi - row.lo);
        for (int64_t j = 0; plan->masked && j < beams * heads; j++)
            pairs += (double)qkv_count_seen(p, sequence, j / heads, j % heads, i, row);
        if (plan->masked && i % ASK == ASK - 1 && p->interrupted && p->interrupted(p->interrupted_arg))
            return -1;
    }
    *keys = limits.any.lo < limits.any.hi ? (double)(limits.any.hi - limits.any.lo) : 0;
    return pairs * (double)(p->heads_q / heads) * (double)(plan->beams / beams);
}

static qkv_status count_by_walking(qkv_problem *p, const qkv_plan *plan, qkv_report *report, double *all_keys)
{
    double pairs = 0, keys = 0;
    for (int64_t b = 0; b < plan->sequences; b++) {
        if (b == 0 || differs(p, b))
            pairs = count_seen(p, plan, b, &keys);
        if (pairs < 0)
            return QKV_INTERRUPTED;
        report->pairs += pairs;
        *all_keys += keys * (double)p->heads_kv;
    }
    qkv_status status = walk(p, plan, &report->counts);
    report->counts.threads = plan->threads;             /* of kernels that do nothing, one thread may have done all tasks */
    return status;
}

static void count_in_closed_form(const qkv_problem *p, const qkv_plan *plan, qkv_report *report, double *all_keys)
{
    double keys = 0, pairs = 0;
    qkv_counters one = {0};
    int64_t alike = p->offset || p->length ? 1 : plan->sequences;
    for (int64_t b = 0; b < plan->sequences; b += alike) {
        int repeated = b > 0 && qkv_length(p, b) == qkv_length(p, b - 1) && qkv_offset(p, b) == qkv_offset(p, b - 1);
        if (!repeated) {
            one = (qkv_counters){0};
            count_tiles(p, plan, b, &one);
            pairs = count_pairs(p, b, &keys);
        }
        report->counts.tiles_full += one.tiles_full * alike * p->heads_kv;
        report->counts.tiles_partial += one.tiles_partial * alike * p->heads_kv;
        report->counts.tiles_skipped += one.tiles_skipped * alike * p->heads_kv;
        report->counts.tiles_copied += one.tiles_copied * alike * p->heads_kv;
        report->pairs += pairs * (double)alike * (double)p->heads_q * (double)plan->beams;
        *all_keys += keys * (double)alike * (double)p->heads_kv;
    }
    report->counts.splits = plan->split ? plan->tasks : 0;
    report->counts.tasks = plan->tasks;
    report->counts.threads = plan->threads;
}

/* Of all threads: each has its counters in front. */
static double all_scratch(int threads, size_t bytes) { return (double)threads * (double)(sizeof(qkv_counters) + bytes); }

qkv_status qkv_explain(const qkv_problem *problem, qkv_report *report)
{
    qkv_plan plan;
    qkv_problem own, *p = &own;
    const qkv_problem *folded = qkv_fold(problem, &own);
    if (folded != p)
        own = *folded;
    qkv_status status = qkv_make_plan(p, &plan);
    memset(report, 0, sizeof *report);
    const qkv_kernels *kernels = plan.decode ? plan.few.kernels : plan.kernels;
    report->isa = qkv_path_with(kernels, p->isa);
    report->parts = kernels->parts;
    report->products = kernels->score_products + kernels->value_products;
    report->pair = plan.decode ? plan.few.kernels->pair : plan.kernels->pair;
    report->decode = plan.decode;
    report->panel_rows = plan.decode ? plan.few.rows : plan.kernels->lanes;
    report->vector_rows = plan.decode ? plan.few.rows : plan.kernels->vector;
    report->kernel_keys = plan.kernels->row_tile;
    if (status != QKV_OK || plan.tasks == 0 || (p->dim_v == 0 && !p->lse))
        return status;

    report->rows = plan.rows;
    report->tile_panels = plan.tile_panels;
    report->block_keys = plan.decode ? plan.chunk : plan.block;
    report->pass_keys = plan.decode ? plan.chunk : plan.pass;
    report->chunk_keys = plan.chunk;
    report->chunks = plan.chunks;
    report->split = plan.split;
    report->obstacles_q = (plan.decode ? plan.few.obstacles_q : plan.obstacles_q) & ~QKV_UNTILED;
    report->obstacles_k = (plan.decode ? qkv_few_obstacles(&plan, 0, plan.few.rows) : plan.copy_k) & ~QKV_UNTILED;
    report->obstacles_v = (plan.decode ? qkv_few_obstacles(&plan, 1, plan.few.rows) : plan.copy_v) & ~QKV_UNTILED;
    report->obstacles_out = plan.obstacles_out;
    report->scratch_bytes = all_scratch(plan.threads, plan.scratch_bytes) + (double)plan.shared_bytes;

    double sizes = (double)(p->dim * qkv_size(p->type) + p->dim_v * qkv_size(p->out_type))
        + (p->lse ? plan.kernels->size : 0);
    double all_keys = 0;
    /* What spans two runs is copied. */
    if (qkv_is_uneven(p) || p->positions || p->start || p->spans || plan.masked || p->bias || p->n_runs > 1) {
        status = count_by_walking(p, &plan, report, &all_keys);
        if (status != QKV_OK)
            return status;
    } else {
        count_in_closed_form(p, &plan, report, &all_keys);
    }
    report->operations = 2 * report->pairs * (double)(p->dim + p->dim_v);
    double rows = 0;
    for (int64_t b = 0; b < plan.sequences; b++)
        rows += (double)p->heads_q * (double)plan.beams * (double)qkv_queries(p, b);
    report->bytes = rows * sizes
                    + all_keys * (double)qkv_token_bytes(p);
    return QKV_OK;
}

/* Elements along the leading axes of an array; a broadcast one is read once. */
static double count_along(int n_axes, const int64_t *axes, const int64_t *at)
{
    double count = 1;
    for (int i = 0; i < n_axes; i++)
        count *= at[i] ? (double)axes[i] : 1;
    return count;
}

/* Copies of rows of A in one column of tiles: a few rows at a time, of one tile and one head. */
static int64_t count_groups(const qkv_product_plan *plan)
{
    int64_t groups = 0, rows = plan->group * plan->length;
    for (int64_t row = 0, n; row < rows; row += n) {
        n = qkv_min(plan->tile_rows - row % plan->tile_rows, plan->length - row % plan->length);
        groups += blocks_up_to(n, plan->group_rows);
    }
    return groups;
}

qkv_status qkv_explain_product(const qkv_product_problem *p, qkv_stage_report *report)
{
    qkv_product_plan plan;
    qkv_status status = qkv_plan_product(p, &plan);
    memset(report, 0, sizeof *report);
    if (status != QKV_OK || plan.tasks == 0)
        return status;
    int turned = plan.problem != p;
    report->parts = plan.kernels->parts;
    report->products = plan.kernels->score_products;
    int64_t passes = qkv_max(1, blocks_up_to(p->terms, plan.pass));
    if (plan.copy_b)
        report->counts.tiles_copied += plan.tasks * passes;
    if (plan.copy_a)
        report->counts.tiles_copied += plan.tasks / plan.row_tiles * passes * count_groups(&plan);
    report->counts.tasks = plan.tasks;
    report->counts.threads = plan.threads;
    report->tile_rows = turned ? plan.tile_columns : plan.tile_rows;
    report->tile_columns = turned ? plan.tile_rows : plan.tile_columns;
    report->pass_terms = plan.pass;
    report->stream = plan.stream;
    report->obstacles_a = (turned ? plan.copy_b : plan.copy_a) & ~QKV_UNTILED;
    report->obstacles_b = (turned ? plan.copy_a : plan.copy_b) & ~QKV_UNTILED;
    report->obstacles_c = plan.copy_c;
    report->scratch_bytes = all_scratch(plan.threads, plan.scratch_bytes);

    double rows = (double)p->heads * (double)p->rows, terms = (double)p->terms, columns = (double)p->columns;
    report->operations = 2 * (double)plan.sequences * rows * terms * columns;
    report->bytes = count_along(p->n_axes, p->axes, p->a_at.axis) * rows * terms * qkv_size(p->type)
        + count_along(p->n_axes, p->axes, p->b_at.axis) * (double)p->heads_b * terms * columns * qkv_size(p->b_type)
        + (double)plan.sequences * rows * columns * qkv_size(p->c_type);
    return QKV_OK;
}

qkv_status qkv_explain_softmax(const qkv_softmax_problem *p, qkv_stage_report *report)
{
    qkv_softmax_plan plan;
    qkv_status status = qkv_plan_softmax(p, &plan);
    memset(report, 0, sizeof *report);
    if (status != QKV_OK || plan.tasks == 0)
        return status;
    int64_t runs = plan.tasks / plan.pieces;
    report->counts.tiles_copied = ((plan.copy_x != 0) + (plan.copy_p != 0)) * runs * plan.run;
    report->counts.tasks = plan.tasks;
    report->counts.threads = plan.threads;
    report->across = plan.across;
    report->tile_rows = plan.across ? p->n : plan.piece;
    report->tile_columns = plan.across ? plan.piece : p->n;
    report->stream = plan.stream;
    report->obstacles_a = plan.copy_x;
    report->obstacles_b = plan.copy_p;
    report->obstacles_c = plan.copy_out;
    report->scratch_bytes = all_scratch(plan.threads, plan.scratch_bytes);

    double n = (double)p->n, with = count_along(p->n_axes, p->axes, p->with_at) * (p->with_step ? n : 1);
    with *= p->p ? qkv_size(p->p_type) : p->mask != NULL;
    report->bytes = count_along(p->n_axes, p->axes, p->x_at) * (p->x_step ? n : 1) * qkv_size(p->type) + with
        + (double)runs * (double)plan.run * n * qkv_size(p->out_type);
    return QKV_OK;
}
