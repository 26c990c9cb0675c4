/* The stages of attention on their own: products (scores, weighted values), softmax and rotary positions, each a grid of like
 * tasks.
 *
 * A product's task is a tile of rows against a tile of columns. B becomes panels in scratch, a pass of terms at a time; rows
 * of A are used where they lie, or copied a few at a time, and meet every panel while they are in L1.
 * A softmax's task is some rows, or some columns; so is that of its gradient. A rotation's task is some tokens, whose cosines and
 * sines all heads share.
 */
#include <math.h>
#include <string.h>

#include "mask.h"
#include "memory.h"
#include "plan_stages.h"
#include "threads.h"
#include "types.h"

typedef struct {
    const void *problem, *plan;
    void *packed;                     /* where B goes, if that is all */
    char *scratch[QKV_MAX_THREADS];   /* of each worker, behind its counters */
    qkv_stop stop;
} stage;

_Static_assert(sizeof(qkv_counters) % 64 == 0, "counters misalign scratch");

static qkv_counters *counters_of(const stage *job, int worker) { return (qkv_counters *)job->scratch[worker]; }

static int64_t offset_of(int64_t index, int n_axes, const int64_t *axes, const int64_t *at)
{
    int64_t offset = 0;
    for (int i = n_axes; i-- > 0;) {
        offset += index % axes[i] * at[i];
        index /= axes[i];
    }
    return offset;
}

static qkv_status run_stage(stage *job, qkv_task task, int64_t tasks, int threads, size_t scratch_bytes,
                            qkv_counters *counters, int (*interrupted)(void *), void *arg)
{
    int workers = qkv_pool_acquire((int)qkv_min(threads, QKV_MAX_THREADS), 0), taken = 0;
    qkv_status status = QKV_NO_MEMORY;
    for (; taken < workers; taken++) {
        job->scratch[taken] = qkv_scratch_take(sizeof(qkv_counters) + scratch_bytes, taken);
        if (!job->scratch[taken])
            break;
        counters_of(job, taken)->tiles_copied = 0;
    }
    if (taken == workers) {
        job->stop = qkv_stop_if(interrupted, arg);
        int stopped = qkv_pool_run(workers, tasks, task, job, interrupted ? qkv_ask_to_stop : NULL, &job->stop);
        status = stopped || job->stop.stop ? QKV_INTERRUPTED : QKV_OK;
        for (int i = 0; i < workers && counters; i++)
            counters->tiles_copied += counters_of(job, i)->tiles_copied;
        if (counters) {
            counters->tasks += tasks;
            counters->threads = qkv_max(counters->threads, workers);
        }
    }
    while (taken-- > 0)
        qkv_scratch_put(job->scratch[taken], taken);
    qkv_pool_release(workers);
    return status;
}

/* Columns of the panel that begins here. Four vectors are two panels of two: one by itself loads more than it adds. Where C
 * at `to` is streamed, a narrow panel comes before the first that is aligned. */
static int panel_width(const qkv_product_plan *plan, const char *to, int64_t left)
{
    int most = plan->kernels->lanes, w = plan->kernels->vector;
    size_t bytes = (size_t)(w * plan->kernels->size), over = (uintptr_t)to % bytes;
    if (plan->stream && over)
        return (int)qkv_min(left, (int64_t)(bytes - over) / plan->kernels->size);
    if (left > most && left <= most + w)
        most = (most / w + 1) / 2 * w;
    return (int)qkv_min(most, left);
}

static void copy_rows(const qkv_product_plan *plan, char *to, const qkv_rows *from, int rows, int n)
{
    const qkv_kernels *kernels = plan->kernels;
    (kernels->parts ? kernels->gather_terms : kernels->gather)(to, (ptrdiff_t)qkv_copy_row(plan, n), from, rows, n);
}

/* B (n, width) from term `first` and column `column` on, as a panel. */
static void prepare_panel(const qkv_product_problem *p, const qkv_product_plan *plan, const char *b, char *panel,
                          char *scratch, int64_t first, int n, int64_t column, int width)
{
    const qkv_kernels *kernels = plan->kernels;
    int size = kernels->size;
    int64_t copy_row = qkv_copy_row(plan, n);
    int64_t across = p->transposed ? p->b_at.row : p->b_at.dim, along = p->transposed ? p->b_at.dim : p->b_at.row;
    qkv_rows from = {(char *)b + first * along + column * across, (ptrdiff_t)p->b_at.row, (ptrdiff_t)p->b_at.dim,
                     p->b_type, p->swapped_b};
    if (!p->transposed && kernels->parts) {
        kernels->gather_panel(panel, &from, n, width);
        return;
    }
    if (!p->transposed) {
        if (width % kernels->vector)                    /* lanes behind the last column are multiplied, too */
            memset(panel, 0, (size_t)n * (size_t)kernels->lanes * (size_t)size);
        kernels->gather(panel, kernels->lanes, &from, n, width);
        return;
    }
    const void **rows = (const void **)(scratch + plan->at_rows);
    if (plan->copy_b)
        copy_rows(plan, scratch + plan->at_columns, &from, width, n);
    for (int j = 0; j < width; j++)
        rows[j] = plan->copy_b ? scratch + plan->at_columns + j * copy_row * size : from.data + j * p->b_at.row;
    kernels->pack(panel, rows, width, (int)qkv_panel_rows(plan, n), plan->b_factor);
}

/* Pointers to `n` terms of columns of a transposed B, the last of which is repeated. */
static const void *point_at_columns(const qkv_product_problem *p, const qkv_product_plan *plan, const char *b, char *scratch,
                                    int64_t first, int n, int64_t column, int width)
{
    const void **rows = (const void **)(scratch + plan->at_rows);
    qkv_rows from = {(char *)b + first * p->b_at.dim + column * p->b_at.row, (ptrdiff_t)p->b_at.row, (ptrdiff_t)p->b_at.dim,
                     p->b_type, p->swapped_b};
    if (plan->copy_b)
        copy_rows(plan, scratch + plan->at_columns, &from, width, n);
    for (int j = 0; j < plan->kernels->lanes; j++) {
        int64_t at = qkv_min(j, width - 1);
        rows[j] = plan->copy_b ? scratch + plan->at_columns + at * plan->copy_row * plan->kernels->size
            : from.data + at * p->b_at.row;
    }
    return rows;
}

/* Panels of `n` terms from `first` on, for columns from `column` to `last`; `to` is where these columns of C lie. */
static void prepare_panels(const qkv_product_problem *p, const qkv_product_plan *plan, const char *b, const char *to,
                           char *panels, char *scratch, int64_t first, int n, int64_t column, int64_t last)
{
    for (int width; column < last; column += width) {
        width = panel_width(plan, to, last - column);
        prepare_panel(p, plan, b, panels, scratch, first, n, column, width);
        panels += qkv_panel_rows(plan, n) * plan->kernels->lanes * plan->kernels->size;
        to += width * p->c_at.dim;
    }
}

static void product_task(void *context, int64_t task, int worker)
{
    stage *job = context;
    const qkv_product_problem *p = job->problem;
    const qkv_product_plan *plan = job->plan;
    const qkv_kernels *kernels = plan->kernels;
    int64_t size = kernels->size, lanes = kernels->lanes;
    char *scratch = job->scratch[worker] + sizeof(qkv_counters), *panels = scratch + plan->at_b;

    int64_t column = task % plan->column_tiles * plan->tile_columns, rest = task / plan->column_tiles;
    int64_t row = rest % plan->row_tiles * plan->tile_rows, head = rest / plan->row_tiles % p->heads_b;
    int64_t sequence = rest / plan->row_tiles / p->heads_b;
    int64_t last_row = qkv_min(row + plan->tile_rows, plan->group * plan->length);
    int64_t last_column = qkv_min(column + plan->tile_columns, p->columns);
    int64_t per_head = p->heads / p->heads_b;
    const char *a = p->a + offset_of(sequence, p->n_axes, p->axes, p->a_at.axis) + head * per_head * p->a_at.head;
    const char *b = p->b + offset_of(sequence, p->n_axes, p->axes, p->b_at.axis) + head * p->b_at.head;
    char *c = p->c + offset_of(sequence, p->n_axes, p->axes, p->c_at.axis) + head * per_head * p->c_at.head;

    int64_t first = 0;
    do {
        int n = (int)qkv_min(plan->pass, p->terms - first), panel_rows = (int)qkv_panel_rows(plan, n);
        const char *these = panels;
        if (p->packed)
            these = (const char *)p->packed + qkv_packed_at(plan, first, n, column / plan->tile_columns);
        else if (!plan->turned_columns)
            prepare_panels(p, plan, b, c + column * p->c_at.dim, panels, scratch, first, n, column, last_column);
        counters_of(job, worker)->tiles_copied += plan->copy_b != 0;
        for (int64_t r = row, m; r < last_row; r += m) {
            if (qkv_must_stop(&job->stop, worker))
                return;
            int64_t in_head = r % plan->length;
            m = qkv_min(qkv_min(plan->group_rows, last_row - r), plan->length - in_head);
            const char *from = a + r / plan->length * plan->a_head + in_head * plan->a_row + first * p->a_at.dim;
            char *to = c + r / plan->length * plan->c_head + in_head * plan->c_row;
            qkv_product_tile tile = {
                .a = from, .a_row = (ptrdiff_t)(plan->a_row / size), .c_row = (ptrdiff_t)(plan->c_row / size),
                .factor = plan->factor, .m = (int)m, .n = panel_rows, .add = first > 0 || p->added, .stream = plan->stream,
            };
            if (plan->copy_a) {
                qkv_rows rows = {(char *)from, (ptrdiff_t)plan->a_row, (ptrdiff_t)p->a_at.dim, p->type, p->swapped_a};
                copy_rows(plan, scratch + plan->at_a, &rows, (int)m, n);
                tile.a = scratch + plan->at_a;
                tile.a_row = (ptrdiff_t)qkv_copy_row(plan, n);
                counters_of(job, worker)->tiles_copied++;
            }
            char *block = to + column * p->c_at.dim;
            if (plan->copy_c) {
                block = scratch + plan->at_c + (plan->passes > 1 ? r - row : 0) * plan->tile_columns * size;
                tile.c_row = (ptrdiff_t)plan->tile_columns;
            }
            if (p->added && first == 0) {
                qkv_rows rows = {(char *)p->added + offset_of(sequence, p->n_axes, p->axes, p->added_at.axis)
                                     + head * per_head * p->added_at.head + r / plan->length * plan->added_head
                                     + in_head * plan->added_row + column * p->added_at.dim,
                                 (ptrdiff_t)plan->added_row, (ptrdiff_t)p->added_at.dim, p->added_type, p->swapped_added};
                kernels->gather(block, tile.c_row, &rows, (int)m, (int)(last_column - column));
            }
            if (kernels->begin)       /* so often, because Python may run between them */
                kernels->begin();
            for (int64_t j = column, at = 0; j < last_column; j += tile.columns, at++) {
                tile.c = block + (j - column) * size;
                if (plan->turned_columns) {
                    tile.columns = (int)qkv_min(lanes, last_column - j);
                    tile.b = point_at_columns(p, plan, b, scratch, first, n, j, tile.columns);
                    kernels->multiply_turned(&tile);
                    continue;
                }
                tile.columns = panel_width(plan, c + j * p->c_at.dim, last_column - j);
                tile.b = these + at * panel_rows * lanes * size;
                kernels->multiply(&tile);
            }
            if (kernels->end)
                kernels->end();
            if (plan->copy_c && first + n == p->terms) {
                qkv_rows rows = {to + column * p->c_at.dim, (ptrdiff_t)plan->c_row, (ptrdiff_t)p->c_at.dim, p->c_type,
                                 p->swapped_c};
                kernels->scatter(&rows, block, (ptrdiff_t)plan->tile_columns, (int)m, (int)(last_column - column));
            }
        }
        first += n;
    } while (first < p->terms);
    if (plan->stream)
        kernels->fence();
}

qkv_status qkv_product(const qkv_product_problem *p)
{
    qkv_product_plan plan;
    qkv_status status = qkv_plan_product(p, &plan);
    if (status != QKV_OK || plan.tasks == 0)
        return status;
    stage job = {.problem = plan.problem, .plan = &plan};
    return run_stage(&job, product_task, plan.tasks, plan.threads, plan.scratch_bytes, p->counters, p->interrupted,
                     p->interrupted_arg);
}

static void pack_task(void *context, int64_t task, int worker)
{
    stage *job = context;
    const qkv_product_problem *p = job->problem;
    const qkv_product_plan *plan = job->plan;
    int64_t tile = task % plan->column_tiles, first = task / plan->column_tiles * plan->pass;
    int64_t column = tile * plan->tile_columns;
    int n = (int)qkv_min(plan->pass, p->terms - first);
    char *to = (char *)job->packed + qkv_packed_at(plan, first, n, tile);
    prepare_panels(p, plan, p->b, NULL, to, job->scratch[worker] + sizeof(qkv_counters), first, n, column,
                   qkv_min(column + plan->tile_columns, p->columns));
}

enum { MANY_ROWS = 1024 };

static qkv_status plan_packing(stage *job, qkv_product_problem *p, qkv_product_plan *plan)
{
    p->heads = p->heads_b = 1;
    p->rows = MANY_ROWS;              /* as those have it that are not few */
    p->n_axes = 0;
    *job = (stage){.problem = p, .plan = plan};
    qkv_status status = qkv_plan_product(p, plan);
    plan->stream = 0;
    return status;
}

qkv_status qkv_packed_bytes(const qkv_product_problem *problem, int64_t *bytes)
{
    stage job;
    qkv_product_problem p = *problem;
    qkv_product_plan plan;
    qkv_status status = plan_packing(&job, &p, &plan);
    if (status != QKV_OK)
        return status;
    int64_t columns = plan.column_tiles * plan.tile_columns, row = plan.kernels->size * columns;
    if (p.terms && row > INT64_MAX / p.terms)
        return QKV_OVERFLOW;
    *bytes = p.terms * row;
    return QKV_OK;
}

qkv_status qkv_pack(const qkv_product_problem *problem, void *packed)
{
    stage job;
    qkv_product_problem p = *problem;
    qkv_product_plan plan;
    qkv_status status = plan_packing(&job, &p, &plan);
    if (status != QKV_OK || plan.tasks == 0)
        return status;
    job.packed = packed;
    return run_stage(&job, pack_task, plan.column_tiles * plan.passes, p.threads, plan.scratch_bytes, NULL, p.interrupted,
                     p.interrupted_arg);
}

/* Copies take an int of elements at a time. */
enum { COPY_AT_ONCE = 1 << 20 };

static void copy_row(const qkv_kernels *kernels, int into_scratch, qkv_rows row, char *scratch, int64_t n)
{
    for (int64_t i = 0; i < n; i += COPY_AT_ONCE) {
        int count = (int)qkv_min(COPY_AT_ONCE, n - i);
        char *at = scratch + i * kernels->size;
        if (into_scratch)
            kernels->gather(at, 0, &row, 1, count);
        else
            kernels->scatter(&row, at, 0, 1, count);
        row.data += count * row.col;
    }
}

/* One row of which one end or both cannot be used where they lie, or that is too long for a buffer. */
static void softmax_row(const qkv_softmax_problem *p, const qkv_softmax_plan *plan, qkv_softmax_tile tile, char *e)
{
    const qkv_kernels *kernels = plan->kernels;
    char *out = tile.out;
    if (plan->copy_p) {
        qkv_rows from = {(char *)tile.p, 0, (ptrdiff_t)p->with_step, p->p_type, p->swapped_p};
        copy_row(kernels, 1, from, e + plan->at_p, p->n);
        tile.p = e + plan->at_p;
    }
    tile.e = e = plan->in_out ? out : e;
    tile.count = 1;
    if (plan->copy_x) {
        qkv_rows from = {(char *)tile.x, 0, (ptrdiff_t)p->x_step, p->type, p->swapped_x};
        copy_row(kernels, 1, from, e, p->n);
        tile.x = e;
    }
    if (plan->copy_out)
        tile.out = e;
    (p->p ? kernels->softmax_grad_rows : kernels->softmax_rows)(&tile);
    if (plan->copy_out) {
        qkv_rows to = {out, 0, (ptrdiff_t)p->out_step, p->out_type, p->swapped_out};
        copy_row(kernels, 0, to, e, p->n);
    }
}

static void softmax_task(void *context, int64_t task, int worker)
{
    stage *job = context;
    const qkv_softmax_problem *p = job->problem;
    const qkv_softmax_plan *plan = job->plan;
    const qkv_kernels *kernels = plan->kernels;
    char *scratch = job->scratch[worker] + sizeof(qkv_counters);
    int64_t outer = task / plan->pieces, piece = task % plan->pieces;
    char *out = p->out + offset_of(outer, plan->n_axes, plan->axes, plan->out_at);
    /* Strips meet at lines: those that are written in part are several times slower. */
    int64_t head = plan->across ? (int64_t)(-(uintptr_t)out % QKV_LINE) / qkv_size(p->out_type) : 0;
    int64_t first = piece ? qkv_min(plan->run, head + piece * plan->piece) : 0;
    int64_t last = qkv_min(plan->run, head + (piece + 1) * plan->piece);
    int64_t with_at = offset_of(outer, plan->n_axes, plan->axes, plan->with_at) + first * plan->with_run;
    qkv_softmax_tile tile = {
        .x = p->x + offset_of(outer, plan->n_axes, plan->axes, plan->x_at) + first * plan->x_run,
        .out = out + first * plan->out_run,
        .mask = p->mask ? (const uint8_t *)p->mask + with_at : NULL,
        .mask_axis = (ptrdiff_t)p->with_step, .mask_run = (ptrdiff_t)plan->with_run,
        .p = p->p ? p->p + with_at : NULL,
        .e = scratch, .state = scratch + plan->at_state,
        .n = p->n, .count = last - first, .strip = plan->strip, .stream = plan->stream,
        .half_x = plan->half_x, .half_out = plan->half_out,
    };
    if (plan->across) {
        tile.x_row = (ptrdiff_t)(p->x_step / qkv_size(p->type));
        tile.out_row = (ptrdiff_t)(p->out_step / qkv_size(p->out_type));
        tile.p_row = (ptrdiff_t)(p->with_step / kernels->size);
        (p->p ? kernels->softmax_grad_columns : kernels->softmax_columns)(&tile);
        return;
    }
    if (!plan->copy_x && !plan->copy_p && !plan->copy_out && !plan->in_out) {
        tile.x_row = (ptrdiff_t)(plan->x_run / qkv_size(p->type));
        tile.out_row = (ptrdiff_t)(plan->out_run / qkv_size(p->out_type));
        tile.p_row = (ptrdiff_t)(plan->with_run / kernels->size);
        (p->p ? kernels->softmax_grad_rows : kernels->softmax_rows)(&tile);
        return;
    }
    for (int64_t i = first; i < last && !qkv_must_stop(&job->stop, worker); i++) {
        softmax_row(p, plan, tile, scratch);
        tile.x = (const char *)tile.x + plan->x_run;
        tile.out = (char *)tile.out + plan->out_run;
        tile.mask = tile.mask ? tile.mask + plan->with_run : NULL;
        tile.p = tile.p ? (const char *)tile.p + plan->with_run : NULL;
        counters_of(job, worker)->tiles_copied += (plan->copy_x != 0) + (plan->copy_p != 0);
    }
}

qkv_status qkv_softmax(const qkv_softmax_problem *p)
{
    qkv_softmax_plan plan;
    qkv_status status = qkv_plan_softmax(p, &plan);
    if (status != QKV_OK || plan.tasks == 0)
        return status;
    stage job = {.problem = p, .plan = &plan};
    return run_stage(&job, softmax_task, plan.tasks, plan.threads, plan.scratch_bytes, p->counters, p->interrupted,
                     p->interrupted_arg);
}

static void angles_task(void *context, int64_t task, int worker)
{
    const stage *job = context;
    const qkv_angles_problem *p = job->problem;
    int64_t rows = qkv_angles_rows(p), last = qkv_min(p->rows, (task + 1) * rows);
    (void)worker;
    for (int64_t r = task * rows; r < last; r++) {
        double position = (double)p->positions[r];
        for (int64_t i = r * p->pairs, j = 0; j < p->pairs; i++, j++) {
            double angle = position * p->frequencies[j], c = cos(angle) * p->factor, s = sin(angle) * p->factor;
            if (p->type == QKV_F64) {
                ((double *)p->cos)[i] = c;
                ((double *)p->sin)[i] = s;
            } else {
                ((float *)p->cos)[i] = (float)c;
                ((float *)p->sin)[i] = (float)s;
            }
        }
    }
}

qkv_status qkv_angles(const qkv_angles_problem *p)
{
    if (p->rows == 0 || p->pairs == 0)
        return QKV_OK;
    int64_t rows = qkv_angles_rows(p), tasks = (p->rows - 1) / rows + 1;
    stage job = {.problem = p};
    return run_stage(&job, angles_task, tasks, (int)qkv_min(p->threads, tasks), 0, NULL, p->interrupted, p->interrupted_arg);
}

/* Cosines and sines of some tokens as rotate has them for neighbours. */
static void spread_tables(const qkv_rotation_problem *p, const char *cos, const char *sin, int64_t rows, char *to_cos,
                          char *to_sin)
{
    for (int64_t r = 0; r < rows; r++, cos += p->table_at.row, sin += p->table_at.row)
        for (int64_t i = 0; i < p->pairs; i++) {
            int64_t at = 2 * (r * p->pairs + i);
            if (p->type == QKV_F64) {
                double c = ((const double *)cos)[i], s = ((const double *)sin)[i];
                ((double *)to_cos)[at] = ((double *)to_cos)[at + 1] = c;
                ((double *)to_sin)[at] = -s;
                ((double *)to_sin)[at + 1] = s;
            } else {
                float c = ((const float *)cos)[i], s = ((const float *)sin)[i];
                ((float *)to_cos)[at] = ((float *)to_cos)[at + 1] = c;
                ((float *)to_sin)[at] = -s;
                ((float *)to_sin)[at + 1] = s;
            }
        }
}

/* n rows, of the tokens of a head or of the heads of a token; `tile` has their tables. */
static void rotate_run(const qkv_rotation_problem *p, const qkv_rotation_plan *plan, qkv_rotation_tile tile, const char *x,
                       ptrdiff_t x_row, char *out, ptrdiff_t out_row, int64_t n, char *scratch)
{
    const qkv_kernels *kernels = plan->kernels;
    int64_t size = kernels->size, most = plan->copy_x || plan->copy_out ? plan->group_rows : n;
    for (int64_t i = 0; i < n; i += most) {
        qkv_rows from = {(char *)x + i * x_row, x_row, (ptrdiff_t)p->x_at.dim, p->type, p->swapped_x};
        qkv_rows to = {out + i * out_row, out_row, (ptrdiff_t)p->out_at.dim, p->out_type, p->swapped_out};
        tile.n = (int)qkv_min(most, n - i);
        tile.out = plan->copy_out ? scratch : to.data;
        tile.out_row = plan->copy_out ? (ptrdiff_t)p->dim : (ptrdiff_t)(out_row / size);
        tile.x = from.data;
        tile.x_row = (ptrdiff_t)(x_row / size);
        if (plan->copy_x) {
            kernels->gather(tile.out, tile.out_row, &from, tile.n, tile.dim);
            tile.x = tile.out;
            tile.x_row = tile.out_row;
        }
        kernels->rotate(&tile);
        if (plan->copy_out)
            kernels->scatter(&to, scratch, (ptrdiff_t)p->dim, tile.n, tile.dim);
        tile.cos = (const char *)tile.cos + tile.n * tile.table_row * size;
        tile.sin = (const char *)tile.sin + tile.n * tile.table_row * size;
    }
}

static void rotate_task(void *context, int64_t task, int worker)
{
    stage *job = context;
    const qkv_rotation_problem *p = job->problem;
    const qkv_rotation_plan *plan = job->plan;
    char *scratch = job->scratch[worker] + sizeof(qkv_counters), *rows = scratch + plan->at_rows;
    int64_t size = plan->kernels->size, rest = task / plan->head_blocks, sequence = rest / plan->blocks;
    int64_t head = task % plan->head_blocks * plan->heads, heads = qkv_min(plan->heads, p->heads - head);
    int64_t token = rest % plan->blocks * plan->block, tokens = qkv_min(plan->block, p->rows - token);
    const char *x = p->x + offset_of(sequence, p->n_axes, p->axes, p->x_at.axis) + head * p->x_at.head + token * p->x_at.row;
    char *out = p->out + offset_of(sequence, p->n_axes, p->axes, p->out_at.axis) + head * p->out_at.head + token * p->out_at.row;
    int64_t table = offset_of(sequence, p->n_axes, p->axes, p->table_at.axis) + token * p->table_at.row;
    const char *cos = p->cos + table, *sin = p->sin + table;
    int64_t table_row = p->table_at.row / size;
    if (p->neighbours) {
        spread_tables(p, cos, sin, tokens, scratch, scratch + plan->at_sin);
        cos = scratch;
        sin = scratch + plan->at_sin;
        table_row = 2 * p->pairs;
    }
    qkv_rotation_tile tile = {.dim = (int)p->dim, .pairs = (int)p->pairs, .neighbours = p->neighbours,
                              .ahead = (ptrdiff_t)plan->ahead, .buffer = plan->stream ? rows : NULL, .buffer_rows = (int)plan->group_rows};
    int64_t outer = plan->by_token ? tokens : heads;
    for (int64_t i = 0; i < outer && !qkv_must_stop(&job->stop, worker); i++) {
        int64_t at = plan->by_token ? i * table_row * size : 0;
        tile.cos = cos + at;
        tile.sin = sin + at;
        tile.table_row = plan->by_token ? 0 : (ptrdiff_t)table_row;
        if (plan->by_token)
            rotate_run(p, plan, tile, x + i * p->x_at.row, (ptrdiff_t)p->x_at.head, out + i * p->out_at.row,
                       (ptrdiff_t)p->out_at.head, heads, rows);
        else
            rotate_run(p, plan, tile, x + i * p->x_at.head, (ptrdiff_t)p->x_at.row, out + i * p->out_at.head,
                       (ptrdiff_t)p->out_at.row, tokens, rows);
    }
    counters_of(job, worker)->tiles_copied += plan->copy_x != 0;
    if (plan->stream)
        plan->kernels->fence();
}

qkv_status qkv_rotate(const qkv_rotation_problem *p)
{
    qkv_rotation_plan plan;
    qkv_status status = qkv_plan_rotation(p, &plan);
    if (status != QKV_OK || plan.tasks == 0)
        return status;
    stage job = {.problem = p, .plan = &plan};
    return run_stage(&job, rotate_task, plan.tasks, plan.threads, plan.scratch_bytes, p->counters, p->interrupted,
                     p->interrupted_arg);
}
