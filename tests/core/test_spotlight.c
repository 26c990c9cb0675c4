/* Questions about where attention falls, on every CPU path: weights against plain loops, and all other answers against these
 * weights. Answers are blocks of exactly their size. */
#include "problem.h"

#include "allocator.h"

static void random_limits(problem *x)
{
    qkv_problem *p = &x->p;
    if (draw() % 2) {
        x->length = block(x->sequences * (int64_t)sizeof(int64_t));
        for (int64_t b = 0; b < x->sequences; b++)
            x->length[b] = between(0, p->len_k);
    }
    p->left = draw() % 2 ? QKV_OPEN : between(0, 150);
    p->right = draw() % 2 ? QKV_OPEN : between(0, 150);
    if (draw() % 2) {
        int64_t n = x->sequences * p->len_q * p->len_k;
        x->mask = block(n);
        x->mask_heads = 1;
        contiguous(&p->mask_at, p, 1, p->len_q, p->len_k, 1);
        p->mask_at.head = 0;
        for (int64_t i = 0; i < n; i++)
            x->mask[i] = draw() % 3 != 0;
    }
}

static void *ask(problem *x, qkv_question question, int64_t elements)
{
    void *answer = block(elements * size_of(x->p.type));
    /* Rows leave nothing as it was. */
    memset(answer, question == QKV_ROWS ? 0xff : 0, (size_t)(elements * size_of(x->p.type)));
    x->p.question = question;
    x->p.answer = answer;
    CHECK(qkv_forward(&x->p) == QKV_OK, "question %d", (int)question);
    return answer;
}

/* The scaled score of a row and a key, -inf where it is hidden. */
static double score_of(const problem *x, int64_t row, int64_t j)
{
    const qkv_problem *p = &x->p;
    int64_t i = row % p->len_q, head = row / p->len_q % p->heads_q, b = row / p->len_q / p->heads_q;
    int64_t key = (b * p->heads_kv + head / (p->heads_q / p->heads_kv)) * p->len_k + j, n = x->length ? x->length[b] : p->len_k;
    double score = 0;
    for (int64_t d = 0; d < p->dim; d++)
        score += load(p->type, x->q, row * p->dim + d) * load(p->type, x->k, key * p->dim + d);
    return j < n ? changed(x, b, head, i, j, i + n - p->len_q, score * p->scale) : -INFINITY;
}

/* The first thing behind cell i, of `cells` that n things are in; and the cell of a thing, found by going through them. */
static int64_t cell_end(int64_t i, int64_t n, int64_t cells) { return (i + 1) * n / cells; }

static int64_t cell_of(int64_t thing, int64_t n, int64_t cells)
{
    int64_t i = 0;
    while (cell_end(i, n, cells) <= thing)
        i++;
    return i;
}

static APART void check_answers(problem *x)
{
    qkv_problem *p = &x->p;
    int64_t rows = x->sequences * p->heads_q * p->len_q, n = between(1, 9), all = p->len_k;
    int64_t from = all ? between(0, all - 1) : 0, some = all ? between(1, all - from) : 0;
    double eps = p->type == QKV_F32 ? 0x1p-23 : 0x1p-52;
    CHECK(run(x) == QKV_OK, "attention");               /* which sets pointers */
    check_result(x, "without values");
    p->lse = NULL;
    p->kept = draw() % 2 ? 0 : between(0, 200);         /* which a window does not hide */
    void *largest = ask(x, QKV_LARGEST, rows), *entropy = ask(x, QKV_ENTROPY, rows), *normalisers = ask(x, QKV_NORMALISERS, 2 * rows);
    p->normalisers = normalisers;
    void *received = ask(x, QKV_RECEIVED, x->sequences * p->heads_q * all);
    p->answer_n = all;
    void *whole = all ? ask(x, QKV_ROWS, rows * all) : block(0);
    p->answer_quick = 1;
    void *quick = all ? ask(x, QKV_ROWS, rows * all) : block(0);
    p->answer_quick = 0;
    p->answer_n = some;
    p->answer_first = from;
    void *part = some ? ask(x, QKV_WEIGHTS, rows * some) : block(0);
    int64_t cells_q = p->len_q ? between(1, p->len_q) : 0, cells_k = all ? between(1, all) : 0;
    p->answer_rows = cells_q;
    p->answer_n = cells_k;
    int64_t cells = x->sequences * p->heads_q * cells_q * cells_k;
    void *means = ask(x, QKV_MEANS, cells), *maxima = ask(x, QKV_MAXIMA, cells);
    double *mean = block(cells * (int64_t)sizeof *mean), *maximum = block(cells * (int64_t)sizeof *maximum);
    for (int64_t i = 0; i < cells; i++)
        mean[i] = maximum[i] = 0;
    p->answer_n = n;
    int64_t *keys = p->answer_keys = block(rows * n * (int64_t)sizeof(int64_t));
    void *top = ask(x, QKV_TOP_KEYS, rows * n);
    double *sums = block(x->sequences * p->heads_q * all * (int64_t)sizeof *sums), *weight = block(all * (int64_t)sizeof *weight);
    for (int64_t i = 0; i < x->sequences * p->heads_q * all; i++)
        sums[i] = 0;
    for (int64_t row = 0; row < rows; row++) {
        double sum = 0, most = -INFINITY, h = 0, bound = 64 * eps * (1 + (double)p->dim);
        for (int64_t j = 0; j < all; j++) {
            double score = score_of(x, row, j);
            most = score > most ? score : most;
            sum += weight[j] = exp(score);
        }
        for (int64_t j = 0; j < all; j++) {
            weight[j] = sum == 0 ? 0 : weight[j] / sum;
            h -= weight[j] == 0 ? 0 : weight[j] * log(weight[j]);
            sums[row / p->len_q * all + j] += weight[j];
            int64_t r = cell_of(row % p->len_q, p->len_q, cells_q), c = cell_of(j, all, cells_k);
            int64_t cell = (row / p->len_q * cells_q + r) * cells_k + c;
            mean[cell] += weight[j] / (double)((cell_end(r, p->len_q, cells_q) - cell_end(r - 1, p->len_q, cells_q))
                                               * (cell_end(c, all, cells_k) - cell_end(c - 1, all, cells_k)));
            maximum[cell] = weight[j] > maximum[cell] ? weight[j] : maximum[cell];
            CHECK(fabs(load(p->type, whole, row * all + j) - weight[j]) <= bound, "weights of row %lld", (long long)row);
            CHECK(fabs(load(p->type, quick, row * all + j) - weight[j]) <= bound, "quick weights of row %lld", (long long)row);
            if (from <= j && j < from + some)
                CHECK(fabs(load(p->type, part, row * some + j - from) - weight[j]) <= bound, "weight of row %lld", (long long)row);
        }
        CHECK(most == -INFINITY ? load(p->type, largest, row) == most : fabs(load(p->type, largest, row) - most) <= bound,
              "largest of row %lld", (long long)row);
        CHECK(fabs(load(p->type, entropy, row) - h) <= bound * (1 + log((double)all + 1)), "entropy of row %lld", (long long)row);
        for (int64_t i = row * n; i < row * n + n; i++) {
            CHECK(-1 <= keys[i] && keys[i] < all, "key %lld", (long long)keys[i]);
            CHECK(fabs(load(p->type, top, i) - (keys[i] < 0 ? 0 : weight[keys[i]])) <= bound, "top of row %lld", (long long)row);
        }
    }
    for (int64_t i = 0; i < x->sequences * p->heads_q * all; i++)
        CHECK(fabs(load(p->type, received, i) - sums[i]) <= 64 * eps * (1 + (double)p->dim) * (double)(1 + p->len_q), "received %lld",
              (long long)i);
    for (int64_t i = 0; i < cells; i++) {
        double bound = 64 * eps * (1 + (double)p->dim);
        CHECK(fabs(load(p->type, means, i) - mean[i]) <= bound, "mean %lld", (long long)i);
        CHECK(fabs(load(p->type, maxima, i) - maximum[i]) <= bound, "maximum %lld", (long long)i);
    }
    void *owned[] = {largest, entropy, normalisers, received, whole, quick, part, keys, top, sums, weight, means, maxima, mean, maximum};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

/* A row's output without the keys of a group, from exp(score) of each key; returns the sum of these. */
static double output_without(const problem *x, int64_t row, const int64_t *group, int64_t hidden, const double *weight, double *out)
{
    const qkv_problem *p = &x->p;
    int64_t head = row / p->len_q % p->heads_q, b = row / p->len_q / p->heads_q;
    int64_t first = (b * p->heads_kv + head / (p->heads_q / p->heads_kv)) * p->len_k;
    double sum = 0;
    for (int64_t d = 0; d < p->dim_v; d++)
        out[d] = 0;
    for (int64_t j = 0; j < p->len_k; j++) {
        double w = group[j] == hidden ? 0 : weight[j];
        sum += w;
        for (int64_t d = 0; d < p->dim_v; d++)
            out[d] += w * load(p->type, x->v, (first + j) * p->dim_v + d);
    }
    for (int64_t d = 0; d < p->dim_v && sum > 0; d++)
        out[d] /= sum;
    return sum;
}

/* How far outputs move without each group of keys, by leaving it out: squares, (rows' heads, groups), and a bound of what
 * rounding makes of them: eps of all that their differences are made of. */
static void move_outputs(const problem *x, const int64_t *group, int64_t groups, double *squares, double *bounds)
{
    const qkv_problem *p = &x->p;
    int64_t rows = x->sequences * p->heads_q * p->len_q;
    double eps = p->type == QKV_F32 ? 0x1p-23 : 0x1p-52, *weight = block(p->len_k * (int64_t)sizeof *weight);
    double whole[64], without[64];
    for (int64_t i = 0; i < x->sequences * p->heads_q * groups; i++)
        squares[i] = bounds[i] = 0;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t j = 0; j < p->len_k; j++)
            weight[j] = exp(score_of(x, row, j));
        double all = output_without(x, row, group, -2, weight, whole);
        for (int64_t g = 0; g < groups; g++) {
            int64_t at = row / p->len_q * groups + g;
            double share = 0;
            for (int64_t j = 0; j < p->len_k; j++)
                share += group[j] == g && all > 0 ? weight[j] / all : 0;
            output_without(x, row, group, g, weight, without);
            for (int64_t d = 0; d < p->dim_v && share > 0; d++) {
                double moved = whole[d] - without[d];
                squares[at] += moved * moved;
                /* Values are below 1. A score of size s is off by eps s; so is a share, and what 1 - share is divided by. */
                bounds[at] += 64 * eps * (1 + (double)p->dim) * (share < 0.5 ? 4 * share * share + share * eps : 4);
            }
        }
    }
    free(weight);
}

static APART void check_moves(problem *x)
{
    qkv_problem *p = &x->p;
    int64_t rows = x->sequences * p->heads_q * p->len_q, heads = x->sequences * p->heads_q, all = p->len_k;
    CHECK(run(x) == QKV_OK, "attention");               /* which sets pointers, and is the output that moves */
    p->lse = NULL;
    void *normalisers = ask(x, QKV_NORMALISERS, 2 * rows);
    p->normalisers = normalisers;
    p->answer_keys = block(rows * (int64_t)sizeof(int64_t));
    memset(p->answer_keys, 0xff, (size_t)(rows * (int64_t)sizeof(int64_t)));
    p->answer_n = all;
    void *spread = ask(x, QKV_INFLUENCE, heads * all), *moved = ask(x, QKV_MOVED, rows);
    int64_t *own = block(all * (int64_t)sizeof *own), groups = between(1, 5);
    double *squares = block(heads * (all + groups) * (int64_t)sizeof *squares);
    double *bounds = block(heads * (all + groups) * (int64_t)sizeof *bounds);
    for (int64_t j = 0; j < all; j++)
        own[j] = j;
    move_outputs(x, own, all, squares, bounds);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t j = 0; j < all; j++) {
            double got = load(p->type, spread, h * all + j);
            for (int64_t row = h * p->len_q; row < (h + 1) * p->len_q; row++)
                got += p->answer_keys[row] == j ? load(p->type, moved, row) : 0;
            CHECK(fabs(got - squares[h * all + j]) <= bounds[h * all + j], "key %lld of head %lld moves %.9g, not %.9g", (long long)j,
                  (long long)h, got, squares[h * all + j]);
        }
    for (int64_t j = 0; j < all; j++)
        own[j] = between(-1, groups - 1);
    qkv_members *members = block(all * (int64_t)sizeof *members);
    p->n_members = 0;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t j = 0; j < all; j++)
            if (own[j] == g)
                members[p->n_members++] = (qkv_members){g, j, j + 1};
    for (int64_t j = 0; j < all; j++)                   /* those of no group are what is left without others */
        if (own[j] < 0)
            members[p->n_members++] = (qkv_members){-1, j, j + 1};
    qkv_members *sorted = block(all * (int64_t)sizeof *sorted);
    int64_t n = 0;
    for (int64_t g = -1; g < groups; g++)
        for (int64_t i = 0; i < p->n_members; i++)
            if (members[i].group == g)
                sorted[n++] = members[i];
    p->members = sorted;
    p->answer_n = groups;
    double *sums = block(heads * QKV_PARTS * groups * (int64_t)sizeof *sums);
    memset(sums, 0, (size_t)(heads * QKV_PARTS * groups) * sizeof *sums);
    p->question = QKV_GROUPS;
    p->answer = sums;
    CHECK(qkv_forward(p) == QKV_OK, "groups");
    move_outputs(x, own, groups, squares, bounds);
    for (int64_t i = 0; i < heads * groups; i++) {
        double got = 0;
        for (int64_t part = 0; part < QKV_PARTS; part++)
            got += sums[(i / groups * QKV_PARTS + part) * groups + i % groups];
        CHECK(fabs(got - squares[i]) <= bounds[i], "group %lld moves %.9g, not %.9g", (long long)i, got, squares[i]);
    }
    void *owned[] = {normalisers, p->answer_keys, spread, moved, own, squares, bounds, members, sorted, sums};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

/* Whichever allocation fails of what is asked about values. */
static APART void test_failing_moves(int isa, qkv_type type)
{
    problem x = make(type, 2, 2, 2, 90, 900, 32, 24);
    int64_t rows = x.sequences * x.p.heads_q * x.p.len_q, heads = x.sequences * x.p.heads_q;
    qkv_members members[] = {{-1, 0, 10}, {0, 10, 500}, {1, 500, 900}};
    x.p.isa = isa;
    x.p.threads = 2;
    CHECK(run(&x) == QKV_OK, "attention");
    x.p.lse = NULL;
    void *normalisers = ask(&x, QKV_NORMALISERS, 2 * rows), *answer = block(heads * 900 * (int64_t)sizeof(double));
    x.p.normalisers = normalisers;
    x.p.answer = answer;
    x.p.answer_keys = block(rows * (int64_t)sizeof(int64_t));
    x.p.members = members;
    x.p.n_members = 3;
    qkv_set_allocator(count_allocate, count_release, NULL);
    const qkv_question asked_of[] = {QKV_INFLUENCE, QKV_MOVED, QKV_GROUPS};
    for (int i = 0; i < 3; i++) {
        qkv_status status = QKV_NO_MEMORY;
        x.p.question = asked_of[i];
        x.p.answer_n = x.p.question == QKV_GROUPS ? 2 : 900;
        memset(answer, 0, (size_t)(heads * 900) * sizeof(double));
        for (int64_t row = 0; row < rows; row++)
            x.p.answer_keys[row] = x.p.question == QKV_MOVED ? row % 900 : -1;
        int64_t k = 0;
        for (; status != QKV_OK; k++) {
            qkv_trim();
            CHECK(live == 0, "question %d: %lld blocks are kept after trim", i, (long long)live);
            asked = 0;
            failing = k;
            status = qkv_forward(&x.p);
            CHECK(status == (asked > k ? QKV_NO_MEMORY : QKV_OK), "question %d, allocation %lld: status %d", i, (long long)k, status);
        }
        CHECK(k >= 3, "question %d: %lld allocations", i, (long long)k - 1);
    }
    failing = -1;
    qkv_trim();
    qkv_set_allocator(NULL, NULL, NULL);
    CHECK(live == 0, "%lld blocks leaked", (long long)live);
    free(normalisers);
    free(answer);
    free(x.p.answer_keys);
    destroy(&x);
}

/* Whichever allocation of a question fails, it says so and leaves nothing behind. */
static APART void test_failing_allocations(int isa, qkv_type type)
{
    problem x = make(type, 2, 2, 2, 90, 900, 32, 0);
    int64_t rows = x.sequences * x.p.heads_q * x.p.len_q, all = x.p.len_k;
    x.p.isa = isa;
    x.p.threads = 2;
    CHECK(run(&x) == QKV_OK, "attention");              /* which sets pointers */
    x.p.lse = NULL;
    void *normalisers = ask(&x, QKV_NORMALISERS, 2 * rows), *answer = block(rows * all * size_of(type));
    x.mask = block(x.p.len_q * all);                    /* shared by all: there is a summary of it */
    memset(x.mask, 1, (size_t)(x.p.len_q * all));
    x.p.mask = x.mask;
    x.p.mask_at = (qkv_strides){.row = all, .dim = 1};
    x.p.normalisers = normalisers;
    x.p.answer = answer;
    x.p.answer_n = 5;
    x.p.answer_keys = block(rows * x.p.answer_n * (int64_t)sizeof(int64_t));
    x.p.kept = 40;
    x.p.left = 300;
    qkv_set_allocator(count_allocate, count_release, NULL);
    for (int question = QKV_LARGEST; question <= QKV_ROWS; question++) {
        qkv_status status = QKV_NO_MEMORY;
        x.p.answer_n = question == QKV_ROWS ? all : 5;
        x.p.question = (qkv_question)question;
        int64_t k = 0;
        for (; status != QKV_OK; k++) {
            qkv_trim();
            CHECK(live == 0, "question %d: %lld blocks are kept after trim", question, (long long)live);
            asked = 0;
            failing = k;
            status = qkv_forward(&x.p);
            CHECK(status == (asked > k ? QKV_NO_MEMORY : QKV_OK), "question %d, allocation %lld: status %d", question, (long long)k, status);
        }
        CHECK(k >= 3, "question %d: %lld allocations", question, (long long)k - 1);
    }
    failing = -1;
    qkv_set_allocator(NULL, NULL, NULL);
    CHECK(live == 0, "%lld blocks leaked", (long long)live);
    free(normalisers);
    free(answer);
    free(x.p.answer_keys);
    destroy(&x);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (int type = QKV_F32; type <= QKV_F64; type++) {
            test_failing_allocations(isa, (qkv_type)type);
            test_failing_moves(isa, (qkv_type)type);
        }
    qkv_trim();
    failing = -1;
    qkv_set_allocator(count_allocate, count_release, NULL);     /* whose scratch is NaN at first */
    for (int isa = 0; tested_path(isa); isa++)
        for (int type = QKV_F32; type <= QKV_F64; type++)
            for (int i = 0; i < share_of(60); i++) {
                int64_t len_k = i % 10 == 0 ? between(1000, 2500) : between(0, 200);
                problem x = make((qkv_type)type, between(1, 3), between(1, 2), between(1, 3), between(0, 70), len_k, between(0, 40), 0);
                x.p.isa = isa;
                x.p.threads = (int)between(1, 3);
                if (i % 4)
                    random_limits(&x);
                check_answers(&x);
                destroy(&x);
            }
    for (int isa = 0; tested_path(isa); isa++)
        for (int type = QKV_F32; type <= QKV_F64; type++)
            for (int i = 0; i < 20; i++) {
                int64_t len_k = i == 0 ? between(1000, 1100) : between(0, 60);
                problem x = make((qkv_type)type, between(1, 2), between(1, 2), between(1, 2), between(0, i ? 40 : 2), len_k,
                                 between(0, 20), between(1, 8));
                x.p.isa = isa;
                x.p.threads = (int)between(1, 3);
                if (i % 4)
                    random_limits(&x);
                qkv_trim();
                check_moves(&x);
                destroy(&x);
            }
    qkv_pool_stop();
    qkv_trim();
    printf("test_spotlight: %ld checks passed\n", checks);
    return 0;
}
