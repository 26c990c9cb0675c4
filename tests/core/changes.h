/* What may change the scores of a problem, and which rows of it count. One test program includes it. */
#include "problem.h"

static int64_t *numbers(int64_t n, int64_t low, int64_t high)
{
    int64_t *all = block(n * (int64_t)sizeof *all);
    for (int64_t i = 0; i < n; i++)
        all[i] = between(low, high);
    return all;
}

static int32_t *ids(int64_t n)
{
    int32_t *all = block(n * (int64_t)sizeof *all);
    for (int64_t i = 0; i < n; i++)
        all[i] = (int32_t)between(0, 2);
    return all;
}

/* One of five is the least. */
static double *per_head(int64_t heads, double least, double most)
{
    double *all = block(heads * (int64_t)sizeof *all);
    for (int64_t h = 0; h < heads; h++)
        all[h] = draw() % 5 ? most * (double)between(0, 20) / 20 : least;
    return all;
}

/* A mask of which whole stretches of keys are hidden, others seen, and the rest is random. */
static char *random_mask(int64_t rows, int64_t keys)
{
    char *mask = block(rows * keys);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t first = 0, end; first < keys; first = end) {
            int kind = (int)(draw() % 3);
            end = first + between(1, 300);
            end = end < keys ? end : keys;
            for (int64_t j = first; j < end; j++)
                mask[i * keys + j] = (char)(kind < 2 ? kind * 7 : (int)(draw() % 2));
        }
    return mask;
}

static void by_element(qkv_strides *at, const qkv_problem *p, int64_t heads, int64_t size)
{
    contiguous(at, p, heads, p->len_q, p->len_k, size);
    if (heads == 1)
        at->head = 0;
}

/* The same in any memory order: heads, queries and keys, heads last, or keys before queries. */
static void in_some_order(qkv_strides *at, const qkv_problem *p, int64_t heads, int64_t size)
{
    int64_t order = between(0, 2);
    by_element(at, p, heads, size);
    if (order == 1) {
        at->dim = heads * size;
        at->row = p->len_k * at->dim;
        at->head = heads == 1 ? 0 : size;
    } else if (order == 2) {
        at->row = size;
        at->dim = p->len_q * size;
    }
}

/* Rows first .. last of each of the heads of sequence b become NaN: nobody may look at them. */
static void spoil(qkv_type type, void *data, int64_t b, int64_t heads, int64_t rows, int64_t dim, int64_t first, int64_t last)
{
    for (int64_t h = b * heads; h < (b + 1) * heads; h++)
        for (int64_t i = (h * rows + first) * dim; i < (h * rows + last) * dim; i++)
            store(type, data, i, NAN);
}

/* Sequences that have fewer queries and keys than there are rows, and queries that say where they are. */
static void random_padding(problem *x)
{
    qkv_problem *p = &x->p;
    x->length = numbers(x->sequences, 0, p->len_k);
    x->start = numbers(x->sequences, 0, p->len_k);
    x->queries = numbers(x->sequences, 0, p->len_q);
    if (draw() % 2)
        x->positions = numbers(x->sequences * p->len_q, -10, p->len_k + 10);
    for (int64_t b = 0; b < x->sequences; b++) {
        x->start[b] = x->start[b] < x->length[b] ? x->start[b] : x->length[b] / 2;
        spoil(p->type, x->q, b, p->heads_q, p->len_q, p->dim, x->queries[b], p->len_q);
        void *of_keys[] = {x->k, x->v};
        for (int i = 0; i < 2; i++) {
            int64_t dim = i ? p->dim_v : p->dim;
            spoil(p->type, of_keys[i], b, p->heads_kv, p->len_k, dim, 0, x->start[b]);
            spoil(p->type, of_keys[i], b, p->heads_kv, p->len_k, dim, x->length[b], p->len_k);
        }
    }
}

static void random_changes(problem *x)
{
    qkv_problem *p = &x->p;
    int64_t rows = x->sequences * p->len_q;
    if (draw() % 2) {
        x->mask_heads = draw() % 2 ? p->heads_q : 1;
        x->mask = random_mask(rows * x->mask_heads, p->len_k);
        in_some_order(&p->mask_at, p, x->mask_heads, 1);
    }
    if (draw() % 2) {
        x->bias_heads = draw() % 2 ? p->heads_q : 1;
        p->bias_type = (qkv_type)(draw() % 2);
        x->bias = uniform(p->bias_type, rows * x->bias_heads * p->len_k);
        for (int64_t i = 0; i < rows * x->bias_heads * p->len_k; i += between(1, 20))
            store(p->bias_type, x->bias, i, -INFINITY);
        in_some_order(&p->bias_at, p, x->bias_heads, size_of(p->bias_type));
    }
    if (draw() % 3 == 0) {
        x->spans = numbers(2 * rows, 0, p->len_k);
        if (draw() % 2) {
            x->q_ids = ids(rows);
            x->k_ids = ids(x->sequences * p->len_k);
        }
    }
    if (draw() % 3 == 0)
        x->slopes = per_head(p->heads_q, 0, 0.1);          /* exp(-0.1 * distance) is a normal number */
    if (draw() % 3 == 0)
        x->sinks = per_head(p->heads_q, -INFINITY, 2);
    if (draw() % 3 == 0)
        p->softcap = (double)between(1, 30) / 10;
    if (draw() % 2)
        p->right = between(0, 100);
    if (draw() % 3 == 0)
        random_padding(x);
}
