/* A stage's problem -> its plan: the blocks of a product, the rows or strips of a softmax, the tokens of a rotation. */
#include "plan_stages.h"

#include "mask.h"
#include "plan_tools.h"
#include "types.h"

enum {
    B_BYTES = 256 << 10,              /* panels of B of a task: they stay in L2 while all rows of A pass */
    COPIED_COLUMNS = 288,             /* of a task that copies A, at least: its copy takes 1 / 8 of a linear layer's time with 48 */
    COPIED_ROWS = 32,                 /* of A at a time then, since B may leave L2 */
    TERMS_PASS = 1024,                /* terms of a pass: where B is longer, C is read again */
    A_BYTES = 32 << 10,               /* rows of A that meet every panel in turn */
    FEW_ROWS = 64,                    /* so many rows meet the columns of B where they lie: 0.7 of the time of panels of B */
    TURNED_BYTES = 2 << 20,           /* of B in a task then */
    TURNED_ROWS = 4,                  /* so many do not pay for that: what counts is how fast B is read */
    BYTE_FLOPS = 5,                   /* operations that take a core as long as a byte of B takes to come */
    PACKED_FLOPS = 2,                 /* the same of panels: 1 MB takes 25 us */
    C_BYTES = 1 << 20,                /* C of a task, where it needs a copy */
    TASKS_EACH = 4,                   /* tasks per thread of a stage: they are equally long */
    STRIP_WIDTH = 256,                /* bytes of a row of a strip: 128 takes 1.1 to 1.3 times as long, 512 up to 2.1 times */
    STRIP_BYTES = 4 << 20,            /* narrower ones where a strip is larger; scratch holds two, each a line wider */
    STRIP_ROWS = 1 << 20,             /* longer columns are copied one by one, several times slower */
    STRIP_TASKS_EACH = 2,             /* tasks per thread: the ends of each are slow */
    ROW_BYTES = 512 << 10,            /* exponentials of a longer row leave L2 anyway */
    SOFTMAX_TASK = 64 << 10,          /* elements of a task: about 20 us */
    STRIPS_TASK = 1 << 24,            /* of a task of strips, the first and last of which have no others beside them: 10 ms */
    STREAM_C_BYTES = 4 << 20,         /* a larger product is written without being read first: 0.72 -> 0.85 of the peak */
    STREAM_BYTES = 32 << 20,          /* a larger result would only push other data out of L3 */
    ANGLES_TASK = 4096,               /* pairs of a task: about 60 us */
    ROTATE_RUN = 32 << 10,            /* elements of a head that a task turns one after the other */
    ROTATE_TASK = 256 << 10,          /* elements of a task: about 50 us */
    ROTATE_COPY = 2 << 10,            /* bytes of rows in scratch: 8 KB take 1.2 times as long */
    ROTATE_AHEAD = 4 << 10            /* bytes of x that are asked for before they are turned: 0.8 of the time from memory */
};

/* Row r of a tile is row r % length of head r / length: with one row per head, heads become the rows. */
static void choose_rows(const qkv_product_problem *p, qkv_product_plan *plan)
{
    plan->group = p->heads_b ? p->heads / p->heads_b : 0;
    plan->length = p->rows;
    plan->a_head = p->a_at.head;
    plan->a_row = p->a_at.row;
    plan->c_head = p->c_at.head;
    plan->c_row = p->c_at.row;
    plan->added_head = p->added_at.head;
    plan->added_row = p->added_at.row;
    if (p->rows == 1) {
        plan->length = plan->group;
        plan->group = 1;
        plan->a_row = plan->a_head;
        plan->c_row = plan->c_head;
        plan->added_row = plan->added_head;
    }
}

/* Whether the rows of a are few, and those of b may take their place. */
static int turns(const qkv_product_problem *p)
{
    return p->transposed && !p->packed && p->scale == 1 && p->n_axes == 0 && p->heads == 1 && p->heads_b == 1
        && p->rows > TURNED_ROWS && p->rows <= FEW_ROWS && qkv_arithmetic(p->type) == qkv_arithmetic(p->b_type);
}

/* C^T = B A^T. */
static void turn(const qkv_product_problem *p, qkv_product_problem *to)
{
    *to = *p;
    to->a = p->b;
    to->b = p->a;
    to->type = p->b_type;
    to->b_type = p->type;
    to->swapped_a = p->swapped_b;
    to->swapped_b = p->swapped_a;
    to->a_at = p->b_at;
    to->b_at = p->a_at;
    to->rows = p->columns;
    to->columns = p->rows;
    to->c_at.row = p->c_at.dim;
    to->c_at.dim = p->c_at.row;
    to->added_at.row = p->added_at.dim;
    to->added_at.dim = p->added_at.row;
    to->tiles = 0;                    /* few rows have none: in a batch they are not turned */
}

static int widened(qkv_type type, qkv_type arithmetic) { return type == arithmetic ? 0 : QKV_WIDENED; }

qkv_status qkv_plan_product(const qkv_product_problem *p, qkv_product_plan *plan)
{
    *plan = (qkv_product_plan){.problem = p, .sequences = 1};
    if (turns(p)) {
        turn(p, &plan->turned);
        plan->problem = p = &plan->turned;
    }
    plan->factor = p->scale;
    plan->b_factor = 1;
    if (p->transposed)
        split_scale(p->scale, p->type == QKV_F64, &plan->b_factor, &plan->factor);
    const qkv_type types[] = {p->type, p->b_type};
    const qkv_kernels *tiled = p->tiles && p->rows > FEW_ROWS ? tiles_of(p->isa, types, 2, plan->b_factor) : NULL;
    const qkv_kernels *kernels = plan->kernels = tiled ? tiled : kernels_of(p->isa, p->type);
    int64_t lanes = kernels->lanes, size = kernels->size, rows, heads, base;
    for (int i = 0; i < p->n_axes; i++)
        if (!multiply(plan->sequences, p->axes[i], &plan->sequences))
            return QKV_OVERFLOW;
    choose_rows(p, plan);
    if (!multiply(plan->sequences, p->heads_b, &heads) || !multiply(plan->length, plan->group, &rows))
        return QKV_OVERFLOW;
    if (heads == 0 || rows == 0 || p->columns == 0)
        return QKV_OK;
    qkv_type arithmetic = qkv_arithmetic(p->type);
    plan->copy_a = (tiled ? QKV_UNTILED : widened(p->type, arithmetic)) | obstacles(p->a, p->n_axes, &p->a_at, p->swapped_a, qkv_size(p->type));
    plan->copy_b = p->packed ? 0 : (tiled ? QKV_UNTILED : widened(p->b_type, arithmetic))
        | obstacles(p->b, p->n_axes, &p->b_at, p->swapped_b, qkv_size(p->b_type));
    plan->copy_c = widened(p->c_type, arithmetic)
        | obstacles(p->c, p->n_axes, &p->c_at, p->swapped_c, qkv_size(p->c_type));

    plan->turned_columns = p->transposed && !p->packed && rows <= TURNED_ROWS && plan->b_factor == 1;
    plan->pass = qkv_max(1, qkv_min(p->terms, TERMS_PASS));
    plan->passes = qkv_max(1, ceil_div(p->terms, plan->pass));
    int64_t vector = kernels->vector * size, at_vectors = p->c_at.head | p->c_at.row;
    for (int i = 0; i < p->n_axes; i++)
        at_vectors |= p->c_at.axis[i];
    double bytes = (double)plan->sequences * (double)p->heads * (double)p->rows * (double)p->columns * (double)size;
    plan->stream = !plan->copy_c && !plan->turned_columns && !p->added && !p->packed
        && at_vectors % vector == 0 && p->terms <= QKV_TERMS && bytes >= STREAM_C_BYTES;
    int64_t panels_of_task = B_BYTES / (qkv_panel_rows(plan, plan->pass) * lanes * size);
    if (plan->copy_a && p->a && !p->packed)             /* panels of packed B are those of any A, of which there is none yet */
        panels_of_task = qkv_max(panels_of_task, COPIED_COLUMNS / lanes);
    if (plan->turned_columns) {       /* long tasks, since what is fetched ahead is the next column's */
        int64_t each = ceil_div(p->columns, ceil_div((int64_t)p->threads * TASKS_EACH, heads));
        int64_t most = TURNED_BYTES / (plan->pass * size);
        panels_of_task = ceil_div(qkv_min(each, most), lanes);
    }
    plan->tile_columns = qkv_max(1, panels_of_task) * lanes;
    plan->tile_columns = qkv_min(plan->tile_columns, ceil_div(p->columns, lanes) * lanes);
    plan->column_tiles = ceil_div(p->columns, plan->tile_columns);
    plan->group_rows = plan->copy_a ? COPIED_ROWS : qkv_max(8, qkv_min(32, A_BYTES / (plan->pass * size) / 8 * 8));

    if (!multiply(heads, plan->column_tiles, &base))
        return QKV_OVERFLOW;
    double row_flops = 2.0 * (double)p->terms * (double)plan->tile_columns;
    int64_t most = qkv_max(1, (int64_t)qkv_min(INT64_MAX / 2, (int64_t)(TASK_FLOPS / (row_flops + 1))));
    if (plan->copy_c && plan->passes > 1)
        most = qkv_min(most, C_BYTES / (plan->tile_columns * size));
    int64_t wanted = ceil_div((int64_t)p->threads * TASKS_EACH, qkv_max(1, base));
    most = qkv_min(most, ceil_div(rows, p->threads > 1 ? wanted : 1));
    plan->tile_rows = qkv_max(plan->group_rows, ceil_div(most, plan->group_rows) * plan->group_rows);
    plan->row_tiles = ceil_div(rows, plan->tile_rows);
    if (!multiply(base, plan->row_tiles, &plan->tasks))
        return QKV_OVERFLOW;
    plan->copy_rows = plan->passes > 1 ? plan->tile_rows : plan->group_rows;
    int64_t byte_flops = plan->turned_columns ? BYTE_FLOPS : p->packed ? PACKED_FLOPS : 0;
    int64_t flops_rows = byte_flops * qkv_size(p->packed ? arithmetic : p->b_type) / 2;
    double flops = row_flops * (double)qkv_max(rows, flops_rows) * (double)base;
    plan->threads = flops < SERIAL_FLOPS ? 1 : (int)qkv_min(p->threads, qkv_max(1, plan->tasks));

    size_t at = 0, panels = (size_t)(plan->tile_columns / lanes), pass = (size_t)qkv_panel_rows(plan, plan->pass);
    plan->copy_row = plan->pass + COPY_PAD;
    int64_t copy_row = qkv_copy_row(plan, plan->pass);
#define TAKE(field, bytes) (plan->field = at, at += align(bytes))
    panels += plan->stream;           /* a narrow one before the first that is aligned */
    TAKE(at_b, p->packed || plan->turned_columns ? 0 : panels * pass * (size_t)(lanes * size));
    TAKE(at_rows, (size_t)lanes * sizeof(void *));
    TAKE(at_columns, p->transposed && plan->copy_b ? (size_t)(lanes * copy_row * size) : 0);
    TAKE(at_a, plan->copy_a ? (size_t)(plan->group_rows * copy_row * size) : 0);
    TAKE(at_c, plan->copy_c ? (size_t)(plan->copy_rows * plan->tile_columns * size) : 0);
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
            plan->with_at[at] = plan->with_at[at - 1];
            plan->out_at[at] = plan->out_at[at - 1];
        }
        plan->axes[at] = p->axes[i];
        plan->x_at[at] = p->x_at[i];
        plan->with_at[at] = p->mask || p->p ? p->with_at[i] : 0;
        plan->out_at[at] = p->out_at[i];
    }
    int last = 0;                     /* merges into it what follows */
    for (int i = 1; i < n; i++) {
        int64_t count = plan->axes[i];
        int one = plan->x_at[last] == plan->x_at[i] * count && plan->with_at[last] == plan->with_at[i] * count
            && plan->out_at[last] == plan->out_at[i] * count;
        if (one)
            count *= plan->axes[last];
        else
            last++;
        plan->axes[last] = count;
        plan->x_at[last] = plan->x_at[i];
        plan->with_at[last] = plan->with_at[i];
        plan->out_at[last] = plan->out_at[i];
    }
    plan->n_axes = n ? last : 0;
    plan->run = n ? plan->axes[last] : 1;
    plan->x_run = n ? plan->x_at[last] : 0;
    plan->with_run = n ? plan->with_at[last] : 0;
    plan->out_run = n ? plan->out_at[last] : 0;
}

/* What keeps elements from being used where they lie, of which those `unit` bytes apart should be next to each other. */
static int obstacles_along(const void *data, int n_axes, const int64_t *at, int64_t unit, int64_t other, int swapped,
                           qkv_type type)
{
    int64_t bits = (int64_t)(uintptr_t)data | other, size = qkv_size(type);
    for (int i = 0; i < n_axes; i++)
        bits |= at[i];
    return widened(type, qkv_arithmetic(type)) | (swapped ? QKV_SWAPPED : 0) | (unit != size ? QKV_STRIDED : 0)
        | (bits % size ? QKV_UNALIGNED : 0);
}

static int weight_obstacles(const qkv_softmax_problem *p, const qkv_softmax_plan *plan, int64_t unit, int64_t other)
{
    return obstacles_along(p->p, plan->n_axes, plan->with_at, unit, other, p->swapped_p, p->p_type)
        | widened(p->p_type, qkv_arithmetic(p->type));
}

/* Of x and out, whose 16 bits are widened and narrowed where they lie if that is all: else they stay obstacles. */
static int take_half(qkv_type type, int *found)
{
    if (*found != QKV_WIDENED)
        return 0;
    *found = 0;
    return (int)type;
}

static void find_obstacles(const qkv_softmax_problem *p, qkv_softmax_plan *plan, int across)
{
    int n = plan->n_axes;
    plan->copy_x = obstacles_along(p->x, n, plan->x_at, across ? plan->x_run : p->x_step, across ? p->x_step : plan->x_run,
                                   p->swapped_x, p->type);
    plan->copy_out = obstacles_along(p->out, n, plan->out_at, across ? plan->out_run : p->out_step,
                                     across ? p->out_step : plan->out_run, p->swapped_out, p->out_type);
    plan->copy_p = !p->p ? 0 : weight_obstacles(p, plan, across ? plan->with_run : p->with_step,
                                                across ? p->with_step : plan->with_run);
    plan->half_x = p->p ? 0 : take_half(p->type, &plan->copy_x);
    plan->half_out = p->p ? 0 : take_half(p->out_type, &plan->copy_out);
}

qkv_status qkv_plan_softmax(const qkv_softmax_problem *p, qkv_softmax_plan *plan)
{
    *plan = (qkv_softmax_plan){.kernels = kernels_of(p->isa, p->type)};
    int64_t size = plan->kernels->size, w = plan->kernels->vector, outer = 1, total;
    for (int i = 0; i < p->n_axes; i++)
        if (!multiply(outer, p->axes[i], &outer))
            return QKV_OVERFLOW;
    if (!multiply(outer, p->n, &total))
        return QKV_OVERFLOW;
    if (total == 0)
        return QKV_OK;
    merge_axes(p, plan);
    outer /= plan->run;
    find_obstacles(p, plan, 1);
    plan->across = p->n <= STRIP_ROWS && plan->run > 1 && !plan->copy_x && !plan->copy_out && !plan->copy_p
        && (p->x_step != qkv_size(p->type) || p->out_step != qkv_size(p->out_type));
    if (!plan->across)
        find_obstacles(p, plan, 0);
    /* Rows of strips, when they are not streamed, wait for their lines: 0.57 instead of 0.35 ns per element at 12x512x512. */
    plan->stream = !p->p && !plan->half_out && !plan->copy_out
        && (double)total * (double)size >= (plan->across ? STREAM_C_BYTES : STREAM_BYTES);
    plan->threads = total < SOFTMAX_TASK ? 1 : p->threads;
    if (plan->across) {
        int64_t wanted = plan->run, line = QKV_LINE / qkv_size(p->out_type);
        int64_t strip = qkv_max(line, qkv_min(STRIP_WIDTH, STRIP_BYTES / p->n) / QKV_LINE * (QKV_LINE / size));
        if (p->threads > 1)
            wanted = ceil_div(plan->run, ceil_div((int64_t)p->threads * STRIP_TASKS_EACH, outer));
        plan->strip = qkv_min(strip + line, ceil_div(plan->run, w) * w);      /* the last takes what is left of a line */
        wanted = qkv_min(wanted, STRIPS_TASK / p->n);
        plan->piece = qkv_max(strip, wanted / strip * strip);
        plan->pieces = ceil_div(plan->run, plan->piece);
        plan->at_state = p->p ? 0 : align((size_t)(2 * p->n * plan->strip * size));
        plan->scratch_bytes = plan->at_state + align((size_t)((3 * w + 3) * plan->strip * size));
    } else {
        plan->in_out = !p->p && !plan->copy_out && !plan->half_out && p->n > ROW_BYTES / size;
        plan->piece = qkv_min(plan->run, ceil_div(SOFTMAX_TASK, p->n));
        plan->pieces = ceil_div(plan->run, plan->piece);
        int direct = plan->in_out || (p->p && !plan->copy_x && !plan->copy_out);
        plan->at_p = direct ? ALIGNMENT : align((size_t)(p->n * size));
        plan->scratch_bytes = plan->at_p + (plan->copy_p ? align((size_t)(p->n * size)) : 0);
    }
    plan->tasks = outer * plan->pieces;
    plan->threads = (int)qkv_min(plan->threads, plan->tasks);
    return QKV_OK;
}

int64_t qkv_angles_rows(const qkv_angles_problem *p) { return qkv_max(1, ANGLES_TASK / qkv_max(1, p->pairs)); }

qkv_status qkv_plan_rotation(const qkv_rotation_problem *p, qkv_rotation_plan *plan)
{
    *plan = (qkv_rotation_plan){.kernels = kernels_of(p->isa, p->type), .sequences = 1};
    int64_t size = plan->kernels->size, rows, total;
    for (int i = 0; i < p->n_axes; i++)
        if (!multiply(plan->sequences, p->axes[i], &plan->sequences))
            return QKV_OVERFLOW;
    if (!multiply(plan->sequences, p->heads, &rows) || !multiply(rows, p->rows, &rows) || !multiply(rows, p->dim, &total)
        || !multiply(total, size, &total) || p->dim > INT32_MAX / 2)
        return QKV_OVERFLOW;
    if (total == 0)
        return QKV_OK;
    plan->copy_x = widened(p->type, qkv_arithmetic(p->type))
        | obstacles(p->x, p->n_axes, &p->x_at, p->swapped_x, qkv_size(p->type));
    plan->copy_out = widened(p->out_type, qkv_arithmetic(p->out_type))
        | obstacles(p->out, p->n_axes, &p->out_at, p->swapped_out, qkv_size(p->out_type));
    plan->by_token = p->rows == 1 || (p->heads > 1 && distance(p->out_at.head) < distance(p->out_at.row));

    plan->block = qkv_max(1, qkv_min(p->rows, ROTATE_RUN / p->dim));
    plan->blocks = ceil_div(p->rows, plan->block);
    plan->heads = qkv_max(1, qkv_min(p->heads, ROTATE_TASK / (plan->block * p->dim)));
    plan->head_blocks = ceil_div(p->heads, plan->heads);
    plan->tasks = plan->sequences * plan->blocks * plan->head_blocks;
    plan->threads = total / size < SOFTMAX_TASK ? 1 : (int)qkv_min(p->threads, plan->tasks);

    /* What is turned in place is in the caches when it is written. */
    plan->stream = p->x != p->out && !plan->copy_x && !plan->copy_out && total >= STREAM_BYTES
        && (plan->by_token ? p->out_at.head : p->out_at.row) == p->dim * size;
    plan->ahead = plan->copy_x ? 0
        : qkv_max(1, ROTATE_AHEAD / (p->dim * size)) * ((plan->by_token ? p->x_at.head : p->x_at.row) / size);
    plan->group_rows = qkv_max(1, ROTATE_COPY / (p->dim * size));
    plan->at_sin = p->neighbours ? align((size_t)(plan->block * 2 * p->pairs * size)) : 0;
    plan->at_rows = 2 * plan->at_sin;
    plan->scratch_bytes = plan->at_rows + align((size_t)(plan->group_rows * p->dim * size)) + QKV_LINE;
    return QKV_OK;
}
