/* Gradients of random problems with all that changes scores, on every CPU path: five plain loops in double, one thread against
 * three, and failing allocations. Arrays are blocks of exactly their size. */
#include "changes.h"

#include "allocator.h"

/* What is asked of a problem whose log-sum-exp is there, and what comes back. */
typedef struct {
    int64_t parts, q_bytes, k_bytes, v_bytes, bias_bytes;
    void *delta, *dout, *dq, *dq_parts, *dk, *dv, *dbias;
    double *dslopes;
} gradients;

/* A sum and that of its terms' sizes, to which its error is in proportion. */
typedef struct { double exact, size; } sum;

static void add(sum *to, double term, double size)
{
    to->exact += term;
    to->size += fabs(size);
}

static double dot(const problem *x, const void *a, int64_t row_a, const void *b, int64_t row_b, int64_t dim, double *size)
{
    double total = 0;
    *size = 0;
    for (int64_t d = 0; d < dim; d++) {
        double term = load(x->p.type, a, row_a * dim + d) * load(x->p.type, b, row_b * dim + d);
        total += term;
        *size += fabs(term);
    }
    return total;
}

static gradients allocate(problem *x)
{
    qkv_problem *p = &x->p;
    int64_t size = size_of(p->type), rows = x->sequences * p->heads_q * p->len_q, keys = x->sequences * p->heads_kv * p->len_k;
    gradients g = {
        .parts = qkv_gradient_parts(p->len_k), .q_bytes = rows * p->dim * size, .k_bytes = keys * p->dim * size,
        .v_bytes = keys * p->dim_v * size, .bias_bytes = x->sequences * x->bias_heads * p->len_q * p->len_k * size,
        .delta = block(rows * size), .dout = uniform(p->type, rows * p->dim_v),
    };
    g.dq = block(g.q_bytes);
    g.dq_parts = block((g.parts - 1) * g.q_bytes);
    g.dk = block(g.k_bytes);
    g.dv = block(g.v_bytes);
    g.dbias = block(g.bias_bytes);
    g.dslopes = block(g.parts * x->sequences * p->heads_q * (int64_t)sizeof *g.dslopes);
    for (int64_t row = 0; row < rows; row++) {
        double unused, d = dot(x, g.dout, row, x->out, row, p->dim_v, &unused);
        store(p->type, g.delta, row, d - (double)between(-1000, 1000) / 1000);      /* less a gradient of the log-sum-exp */
    }
    for (int64_t b = 0; b < x->sequences; b++)
        spoil(p->type, g.dout, b, p->heads_q, p->len_q, p->dim_v, query_count(x, b), p->len_q);
    return g;
}

static void release(gradients *g)
{
    void *owned[] = {g->delta, g->dout, g->dq, g->dq_parts, g->dk, g->dv, g->dbias, g->dslopes};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

static qkv_status run_gradients(problem *x, gradients *g)
{
    qkv_problem p = x->p;
    int64_t size = size_of(p.type), slopes = g->parts * x->sequences * p.heads_q * (int64_t)sizeof *g->dslopes;
    memset(g->dq, 0, (size_t)g->q_bytes);
    memset(g->dq_parts, 0, (size_t)((g->parts - 1) * g->q_bytes));
    memset(g->dk, 0, (size_t)g->k_bytes);
    memset(g->dv, 0, (size_t)g->v_bytes);
    memset(g->dbias, 0, (size_t)g->bias_bytes);
    memset(g->dslopes, 0, (size_t)slopes);
    p.question = QKV_GRADIENTS;
    p.delta = g->delta;
    p.out = g->dout;
    p.dq = g->dq;
    p.dk = g->dk;
    p.dv = g->dv;
    p.dq_type = p.dk_type = p.dv_type = p.type;
    p.dq_parts = g->dq_parts;
    p.dq_part = g->q_bytes;
    contiguous(&p.dq_at, &p, p.heads_q, p.len_q, p.dim, size);
    contiguous(&p.dk_at, &p, p.heads_kv, p.len_k, p.dim, size);
    contiguous(&p.dv_at, &p, p.heads_kv, p.len_k, p.dim_v, size);
    p.dbias = x->bias ? g->dbias : NULL;
    by_element(&p.dbias_at, &p, x->bias_heads, size);
    p.dslopes = x->slopes ? g->dslopes : NULL;
    return qkv_forward(&p);
}

/* n numbers in parts, against sums. */
static void check_sums(qkv_type type, const char *what, const void *got, int64_t n, int64_t parts, const sum *of, double eps,
                       double least)
{
    for (int64_t i = 0; i < n; i++) {
        double total = 0;
        for (int64_t part = 0; part < parts; part++)
            total += load(type, got, part * n + i);
        CHECK(fabs(total - of[i].exact) <= eps * of[i].size + least, "%s: number %lld of %lld is %.9g, not %.9g", what, (long long)i,
              (long long)n, total, of[i].exact);
    }
}

static void check_gradients(const problem *x, const gradients *g)
{
    const qkv_problem *p = &x->p;
    int64_t size = size_of(p->type), n_q = g->q_bytes / size, n_k = g->k_bytes / size, n_v = g->v_bytes / size;
    int64_t n_bias = g->bias_bytes / size, n_slopes = x->sequences * p->heads_q, group = p->heads_q / p->heads_kv;
    sum *all = block((n_q + n_k + n_v + n_bias + n_slopes) * (int64_t)sizeof *all), *dq = all, *dk = dq + n_q, *dv = dk + n_k;
    sum *dbias = dv + n_v, *dslopes = dbias + n_bias;
    memset(all, 0, (size_t)(n_q + n_k + n_v + n_bias + n_slopes) * sizeof *all);
    double largest = 0;
    for (int64_t row = 0; row < n_slopes * p->len_q; row++) {
        int64_t i = row % p->len_q, head = row / p->len_q % p->heads_q, b = row / p->len_q / p->heads_q;
        int64_t keys = (b * p->heads_kv + head / group) * p->len_k, position = position_of(x, b, i);
        double lse = load(p->type, x->lse, row), delta = load(p->type, g->delta, row), product_size, moved_size;
        for (int64_t j = first_key(x, b); j < last_key(x, b) && i < query_count(x, b); j++) {
            double product = p->scale * dot(x, x->q, row, x->k, keys + j, p->dim, &product_size);
            double score = changed(x, b, head, i, j, position, product);
            if (score == -INFINITY)
                continue;
            double weight = exp(score - lse), moved = dot(x, g->dout, row, x->v, keys + j, p->dim_v, &moved_size);
            double slope = weight * (moved - delta), slope_size = weight * (moved_size + fabs(delta));
            double inner = p->softcap != 0 ? tanh(product / p->softcap) : 0, of_product = p->scale * slope * (1 - inner * inner);
            double sizes[] = {fabs(score), fabs(lse), p->scale * product_size};
            for (int s = 0; s < 3; s++)
                largest = sizes[s] > largest ? sizes[s] : largest;
            for (int64_t d = 0; d < p->dim; d++) {
                double q = load(p->type, x->q, row * p->dim + d), k = load(p->type, x->k, (keys + j) * p->dim + d);
                add(&dq[row * p->dim + d], of_product * k, p->scale * slope_size * k);
                add(&dk[(keys + j) * p->dim + d], of_product * q, p->scale * slope_size * q);
            }
            for (int64_t d = 0; d < p->dim_v; d++) {
                double term = weight * load(p->type, g->dout, row * p->dim_v + d);
                add(&dv[(keys + j) * p->dim_v + d], term, term);
            }
            if (x->bias)
                add(&dbias[((b * x->bias_heads + head % x->bias_heads) * p->len_q + i) * p->len_k + j], slope, slope_size);
            double distance = fabs((double)(position - j));
            add(&dslopes[b * p->heads_q + head], -slope * distance, slope_size * distance);
        }
    }
    /* A score of size s is off by eps * s or so, and its weight by as much; 32 covers sums, as for attention. */
    double eps = 32 * (p->type == QKV_F32 ? 0x1p-23 : 0x1p-52) * (1 + largest);
    double least = p->type == QKV_F32 ? 0x1p-100 : 0x1p-990;    /* weights below the smallest normal number are 0 */
    check_sums(p->type, "dq", g->dq, n_q, 1, dq, eps, least);
    check_sums(p->type, "dk", g->dk, n_k, 1, dk, eps, least);
    check_sums(p->type, "dv", g->dv, n_v, 1, dv, eps, least);
    if (x->bias)
        check_sums(p->type, "dbias", g->dbias, n_bias, 1, dbias, eps, least);
    if (x->slopes)
        check_sums(QKV_F64, "dslopes", g->dslopes, n_slopes, g->parts, dslopes, eps, least);
    free(all);
}

static APART void test_random(int isa, qkv_type type, int64_t len_k)
{
    problem x = make(type, between(1, 3), between(1, 2), between(1, 3), between(0, 70), len_k, between(0, 40), between(0, 40));
    x.p.isa = isa;
    random_changes(&x);
    CHECK(run(&x) == QKV_OK, "attention");
    check_result(&x, "attention");
    gradients one = allocate(&x);
    CHECK(run_gradients(&x, &one) == QKV_OK, "gradients");
    check_gradients(&x, &one);

    gradients three = one;
    three.dq = block(one.q_bytes);
    three.dk = block(one.k_bytes);
    three.dv = block(one.v_bytes);
    x.p.threads = 3;
    CHECK(run_gradients(&x, &three) == QKV_OK, "gradients");
    CHECK(!memcmp(one.dq, three.dq, (size_t)one.q_bytes) && !memcmp(one.dk, three.dk, (size_t)one.k_bytes)
              && !memcmp(one.dv, three.dv, (size_t)one.v_bytes), "three threads: other bits");
    free(three.dq);
    free(three.dk);
    free(three.dv);
    release(&one);
    destroy(&x);
}

/* Whichever allocation fails, the call says so and leaves nothing behind. */
static APART void test_failing_allocations(int isa, qkv_type type)
{
    problem x = make(type, 1, 2, 2, 90, 900, 32, 24);
    x.p.isa = isa;
    x.p.threads = 2;
    CHECK(run(&x) == QKV_OK, "attention");              /* starts the pool, which a call could do without */
    gradients g = allocate(&x);
    qkv_set_allocator(count_allocate, count_release, NULL);
    qkv_status status = QKV_NO_MEMORY;
    for (int64_t k = 0; status != QKV_OK; k++) {
        qkv_trim();
        CHECK(live == 0, "%lld blocks are kept after trim", (long long)live);
        asked = 0;
        failing = k;
        status = run_gradients(&x, &g);
        CHECK(status == (asked > k ? QKV_NO_MEMORY : QKV_OK), "allocation %lld: status %d", (long long)k, (int)status);
        CHECK(status == QKV_NO_MEMORY || k >= 2, "%lld allocations", (long long)k);
    }
    failing = -1;
    qkv_trim();
    qkv_set_allocator(NULL, NULL, NULL);
    CHECK(live == 0, "%lld blocks leaked", (long long)live);
    release(&g);
    destroy(&x);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F32; type <= QKV_F64; type++)
            test_failing_allocations(isa, type);
    qkv_set_allocator(count_allocate, count_release, NULL);     /* whose scratch is NaN at first */
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F32; type <= QKV_F64; type++) {
            for (int i = 0; i < share_of(60); i++)
                test_random(isa, type, i % 10 == 0 ? between(1000, 2500) : between(0, 200));
            printf("test_gradients: %s, %s: %ld checks\n", qkv_isa_name(isa), type == QKV_F32 ? "float32" : "float64", checks);
        }
    qkv_pool_stop();
    qkv_trim();
    printf("test_gradients: %ld checks passed\n", checks);
    return 0;
}
