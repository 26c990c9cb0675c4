/* K and V as rows of int8 and int4 with their scales, in runs that are each a block of exactly their bytes: the results of
 * the same rows dequantised, by plain loops, for few query rows and for many. */
#include "problem.h"

static int64_t row_bytes(qkv_type stored, int64_t dim)
{
    return stored == QKV_I8 ? (dim + 3) / 4 * 4 + 4 : (dim + 31) / 32 * 18;
}

/* A row of random n and scales of many sizes, and what it is: a definition apart from that of the core. */
static void fill_row(qkv_type stored, char *bytes, qkv_type type, void *values, int64_t at, int64_t dim)
{
    float scale;
    int64_t behind = (dim + 3) / 4 * 4, groups = (dim + 31) / 32;
    memset(bytes, 0, (size_t)row_bytes(stored, dim));
    if (stored == QKV_I8) {
        scale = (float)between(1, 1000) / 127000;
        for (int64_t e = 0; e < dim; e++) {
            int n = (int)between(-127, 127);
            bytes[e] = (char)n;
            store(type, values, at + e, (double)scale * n);
        }
        memcpy(bytes + behind, &scale, 4);
        return;
    }
    for (int64_t g = 0; g < groups; g++) {
        uint16_t half = (uint16_t)(between(0, 1) << 15 | between(0x3a00, 0x3dff));          /* 2^-11 to 1/8, of any sign */
        uint32_t bits = (uint32_t)half << 16;
        memcpy(&scale, &bits, 4);
        memcpy(bytes + 16 * groups + 2 * g, &half, 2);
        for (int64_t e = 0; e < 32; e++) {
            int n = 32 * g + e < dim ? (int)between(0, 15) : 8;
            bytes[16 * g + e % 16] = (char)(bytes[16 * g + e % 16] | n << (e < 16 ? 0 : 4));
            if (32 * g + e < dim)
                store(type, values, at + 32 * g + e, (double)scale * (n - 8));
        }
    }
}

/* The rows of all heads of `count` keys of one sequence, (heads, count, bytes). */
static char *fill_run(const problem *x, qkv_type stored, void *values, int64_t b, int64_t first, int64_t count, int64_t dim)
{
    const qkv_problem *p = &x->p;
    int64_t bytes = row_bytes(stored, dim);
    char *rows = block(p->heads_kv * count * bytes);
    for (int64_t h = 0; h < p->heads_kv; h++)
        for (int64_t j = 0; j < count; j++)
            fill_row(stored, rows + (h * count + j) * bytes, p->type, values,
                     ((b * p->heads_kv + h) * p->len_k + first + j) * dim, dim);
    return rows;
}

static void byte_rows(qkv_strides *at, int64_t bytes)
{
    at->dim = 1;
    at->row = bytes;
    at->head = 0;                     /* one head, where runs differ in length */
}

/* Every sequence has its keys in two runs. */
static void check_stored(int isa, qkv_type type, qkv_type stored, qkv_type stored_v, int64_t group, int64_t len_q, int64_t len_k,
                         int64_t dim, int64_t dim_v)
{
    enum { SEQUENCES = 2 };
    problem x = make(type, SEQUENCES, 1, group, len_q, len_k, dim, dim_v);
    qkv_problem *p = &x.p;
    qkv_run runs[2 * SEQUENCES];
    int64_t run_of[SEQUENCES + 1] = {0, 2, 4}, cut = between(1, len_k);
    for (int64_t b = 0; b < SEQUENCES; b++)
        for (int64_t i = 0; i < 2; i++) {
            int64_t first = i ? cut : 0, count = i ? len_k - cut : cut;
            runs[2 * b + i] = (qkv_run){fill_run(&x, stored, x.k, b, first, count, dim),
                                        fill_run(&x, stored_v, x.v, b, first, count, dim_v), first, count};
        }
    p->isa = isa;
    p->right = len_q > 1 ? 0 : QKV_OPEN;
    p->runs = runs;
    p->n_runs = 2 * SEQUENCES;
    p->run_of = run_of;
    byte_rows(&p->k_at, row_bytes(stored, dim));
    byte_rows(&p->v_at, row_bytes(stored_v, dim_v));
    void *out = NULL;
    for (p->threads = 1; p->threads <= 3; p->threads++) {
        p->k_type = stored;
        p->v_type = stored_v;
        CHECK(run(&x) == QKV_OK, "stored rows");
        p->k_type = p->v_type = type; /* of x.k and x.v */
        if (!out) {
            check_result(&x, stored == QKV_I8 ? "int8" : "int4");
            out = block(x.out_bytes);
            memcpy(out, x.out, (size_t)x.out_bytes);
        }
        CHECK(!memcmp(out, x.out, (size_t)x.out_bytes), "%d threads: other bits", p->threads);
    }
    for (int64_t r = 0; r < p->n_runs; r++) {
        free((void *)runs[r].k);
        free((void *)runs[r].v);
    }
    free(out);
    destroy(&x);
}

/* V is the first elements of the rows of K, in two runs again. */
static void check_latent(int isa, qkv_type type, qkv_type stored, int64_t group, int64_t len_q, int64_t len_k, int64_t dim,
                         int64_t dim_v)
{
    problem x = make(type, 1, 1, group, len_q, len_k, dim, dim_v);
    qkv_problem *p = &x.p;
    qkv_run runs[2];
    int64_t run_of[2] = {0, 2}, cut = between(1, len_k), bytes = row_bytes(stored, dim);
    for (int64_t i = 0; i < 2; i++) {
        int64_t first = i ? cut : 0, count = i ? len_k - cut : cut;
        runs[i] = (qkv_run){.k = fill_run(&x, stored, x.k, 0, first, count, dim), .first = first, .count = count};
        runs[i].v = runs[i].k;
    }
    for (int64_t j = 0; j < len_k; j++)
        for (int64_t e = 0; e < dim_v; e++)
            store(type, x.v, j * dim_v + e, load(type, x.k, j * dim + e));
    p->isa = isa;
    p->runs = runs;
    p->n_runs = 2;
    p->run_of = run_of;
    byte_rows(&p->k_at, bytes);
    byte_rows(&p->v_at, bytes);
    p->k_type = p->v_type = stored;
    p->latent = 1;
    CHECK(run(&x) == QKV_OK, "latent rows");
    p->k_type = p->v_type = type;     /* of x.k and x.v */
    check_result(&x, "latent");
    free((void *)runs[0].k);
    free((void *)runs[1].k);
    destroy(&x);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F32; type <= QKV_F64; type++)
            for (qkv_type stored = QKV_I8; stored <= QKV_I4; stored++) {
                qkv_type other = stored == QKV_I8 ? QKV_I4 : QKV_I8;
                for (int64_t dim = 1; dim <= 130; dim++)
                    check_stored(isa, type, stored, dim % 3 ? stored : other, dim % 5 + 1, 1, between(1, 150), dim, 131 - dim);
                for (int i = 0; i < share_of(20); i++)
                    check_stored(isa, type, stored, i % 3 ? stored : other, between(1, 4), between(1, 60), between(1, 300),
                                 between(1, 140), between(1, 140));
                for (int64_t dim = 1; dim <= 130; dim++)
                    check_latent(isa, type, stored, dim % 5 + 1, dim % 7 ? 1 : 30, between(1, 150), dim, between(1, dim));
                check_latent(isa, type, stored, 16, 1, 1500, 576, 512);
                check_stored(isa, type, stored, other, 4, 1, 3000, 64, 96);
                check_stored(isa, type, stored, stored, 3, 2, 2500, 33, 31);
                check_stored(isa, type, stored, stored, 2, 40, 2200, 24, 40);
                printf("test_quantised: %s, float%d, int%d: %ld checks\n", qkv_isa_name(isa), type == QKV_F32 ? 32 : 64,
                       stored == QKV_I8 ? 8 : 4, checks);
            }
    qkv_pool_stop();
    qkv_trim();
    return 0;
}
