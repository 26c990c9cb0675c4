/* Problems for the core's own tests: random arrays, and three plain loops that say what is right. One test program includes
 * it. */
#include "check.h"

/* A problem with contiguous arrays (sequences, heads, rows, dim), and what it owns. */
typedef struct {
    qkv_problem p;
    qkv_run run;
    qkv_counters counters;
    void *q, *k, *v, *out, *lse;
    int64_t sequences, out_bytes, lse_bytes;
    int64_t *offset, *length, *start, *queries, *positions;
    int shared;                       /* all sequences have the keys of the first */

    /* What changes scores, or NULL: mask and bias (sequences, heads or 1, len_q, len_k) in any order, spans, ids, and one per head. */
    char *mask;
    void *bias;
    int64_t bias_heads, mask_heads;
    int64_t *spans;
    int32_t *q_ids, *k_ids;
    double *slopes, *sinks;

    double eps;                       /* of what is computed in; 0: that of the type */
} problem;

static void contiguous(qkv_strides *at, const qkv_problem *p, int64_t heads, int64_t rows, int64_t dim, int64_t size)
{
    at->dim = size;
    at->row = dim * size;
    at->head = rows * at->row;
    int64_t step = heads * at->head;
    for (int i = p->n_axes; i-- > 0; step *= p->axes[i])
        at->axis[i] = step;
}

static problem make(qkv_type type, int64_t sequences, int64_t heads, int64_t group, int64_t len_q, int64_t len_k,
                    int64_t dim, int64_t dim_v)
{
    problem x = {.sequences = sequences};
    qkv_problem *p = &x.p;
    int64_t size = size_of(type);
    p->type = p->k_type = p->v_type = p->out_type = type;
    if (sequences > 1) {
        p->n_axes = 1;
        p->axes[0] = sequences;
    }
    p->heads_kv = heads;
    p->heads_q = heads * group;
    p->len_q = len_q;
    p->len_k = len_k;
    p->dim = dim;
    p->dim_v = dim_v;
    p->left = p->right = QKV_OPEN;
    p->scale = dim ? 1 / sqrt((double)dim) : 1;
    p->threads = 1;
    x.q = uniform(type, sequences * p->heads_q * len_q * dim);
    x.k = uniform(type, sequences * heads * len_k * dim);
    x.v = uniform(type, sequences * heads * len_k * dim_v);
    x.out_bytes = sequences * p->heads_q * len_q * dim_v * size;
    x.lse_bytes = sequences * p->heads_q * len_q * size;
    x.out = block(x.out_bytes);
    x.lse = block(x.lse_bytes);
    contiguous(&p->q_at, p, p->heads_q, len_q, dim, size);
    contiguous(&p->k_at, p, heads, len_k, dim, size);
    contiguous(&p->v_at, p, heads, len_k, dim_v, size);
    contiguous(&p->out_at, p, p->heads_q, len_q, dim_v, size);
    return x;
}

/* The pointers into x itself: set last, since make returns it by value. */
static qkv_status run(problem *x)
{
    qkv_problem *p = &x->p;
    p->q = x->q;
    p->out = x->out;
    p->lse = x->lse;
    p->counters = &x->counters;
    p->offset = x->offset;
    p->length = x->length;
    p->start = x->start;
    p->queries = x->queries;
    p->positions = x->positions;
    p->mask = x->mask;
    p->bias = x->bias;
    p->spans = x->spans;
    p->q_ids = x->q_ids;
    p->k_ids = x->k_ids;
    p->slopes = x->slopes;
    p->sinks = x->sinks;
    if (!p->runs) {
        x->run = (qkv_run){x->k, x->v, 0, p->len_k};
        p->runs = &x->run;
        p->n_runs = 1;
    }
    memset(x->out, 0x7e, (size_t)x->out_bytes);
    memset(x->lse, 0x7e, (size_t)x->lse_bytes);
    x->counters = (qkv_counters){0};
    return qkv_forward(p);
}

static void destroy(problem *x)
{
    void *owned[] = {x->q, x->k, x->v, x->out, x->lse, x->offset, x->length, x->mask, x->bias, x->spans, x->q_ids, x->k_ids,
                     x->slopes, x->sinks, x->start, x->queries, x->positions};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

/* The keys that sequence b has are first_key .. last_key, its queries the first query_count. */
static int64_t first_key(const problem *x, int64_t b) { return x->start ? x->start[b] : 0; }
static int64_t last_key(const problem *x, int64_t b) { return x->length ? x->length[b] : x->p.len_k; }
static int64_t query_count(const problem *x, int64_t b) { return x->queries ? x->queries[b] : x->p.len_q; }

static int64_t position_of(const problem *x, int64_t b, int64_t i)
{
    if (x->positions)
        return x->positions[b * x->p.len_q + i];
    return i + (x->offset ? x->offset[b] : last_key(x, b) - query_count(x, b));
}

/* Where an element lies of what there is one for each query and key. */
static int64_t place(const qkv_strides *at, int64_t b, int64_t head, int64_t i, int64_t j)
{
    return b * at->axis[0] + head * at->head + i * at->row + j * at->dim;
}

/* The scaled score of query i and key j after all that changes it; -inf where it is excluded. */
static double changed(const problem *x, int64_t b, int64_t head, int64_t i, int64_t j, int64_t position, double score)
{
    const qkv_problem *p = &x->p;
    int64_t query = b * p->len_q + i;
    if (p->softcap != 0)
        score = p->softcap * tanh(score / p->softcap);
    if (x->slopes)
        score -= x->slopes[head] * fabs((double)(position - j));
    if (x->bias)
        score += load(p->bias_type, x->bias, place(&p->bias_at, b, head, i, j) / size_of(p->bias_type));
    int seen = (p->left == QKV_OPEN || j >= position - p->left || j < p->kept) && (p->right == QKV_OPEN || j <= position + p->right);
    if (x->mask)
        seen &= x->mask[place(&p->mask_at, b, head, i, j)] != 0;
    if (x->spans)
        seen &= x->spans[2 * query] <= j && j < x->spans[2 * query + 1];
    if (x->q_ids)
        seen &= x->q_ids[query] == x->k_ids[b * p->len_k + j];
    return seen ? score : -INFINITY;
}

/* Every row by three loops in double. */
static void check_result(const problem *x, const char *what)
{
    const qkv_problem *p = &x->p;
    double eps = x->eps != 0 ? x->eps : p->type == QKV_F32 ? 0x1p-23 : 0x1p-52;
    double *weights = block(p->len_k * (int64_t)sizeof *weights);
    int64_t group = p->heads_q / p->heads_kv;
    for (int64_t row = 0; row < x->sequences * p->heads_q * p->len_q; row++) {
        int64_t i = row % p->len_q, head = row / p->len_q % p->heads_q, b = row / p->len_q / p->heads_q;
        int64_t keys = ((x->shared ? 0 : b) * p->heads_kv + head / group) * p->len_k;
        int64_t first = first_key(x, b), n = last_key(x, b), position = position_of(x, b, i);
        double sum = x->sinks ? exp(x->sinks[head]) : 0, largest = 0;
        if (i >= query_count(x, b))
            continue;
        for (int64_t j = first; j < n; j++) {
            double score = 0;
            for (int64_t d = 0; d < p->dim; d++)
                score += load(p->type, x->q, row * p->dim + d) * load(p->k_type, x->k, (keys + j) * p->dim + d);
            score = changed(x, b, head, i, j, position, score * p->scale);
            weights[j] = exp(score);
            largest = isfinite(score) && fabs(score) > largest ? fabs(score) : largest;
            sum += weights[j];
        }
        /* A score of size s is off by eps * s or so, and its weight by as much; values are below 1. 32 covers sums. */
        double bound = 32 * eps * (1 + largest);
        double lse = load(p->type, x->lse, row);
        CHECK(sum == 0 ? lse == -INFINITY : fabs(lse - log(sum)) <= bound * (1 + fabs(log(sum))),
              "%s: lse of row %lld is %.9g, not %.9g", what, (long long)row, lse, log(sum));
        for (int64_t d = 0; d < p->dim_v; d++) {
            double exact = 0, got = load(p->type, x->out, row * p->dim_v + d);
            for (int64_t j = first; j < n; j++)
                exact += weights[j] * load(p->v_type, x->v, (keys + j) * p->dim_v + d);
            exact = sum == 0 ? 0 : exact / sum;
            CHECK(fabs(got - exact) <= bound, "%s: column %lld of row %lld is %.9g, not %.9g (%lld keys)", what,
                  (long long)d, (long long)row, got, exact, (long long)n);
        }
    }
    free(weights);
}

/* Whether a call did what its plan says. A small one does without threads that sleep. */
static inline int counts_agree(const qkv_counters *planned, const qkv_counters *counted)
{
    qkv_counters same = *counted;
    same.threads = counted->threads < planned->threads ? planned->threads : counted->threads;
    return !memcmp(planned, &same, sizeof same);
}
