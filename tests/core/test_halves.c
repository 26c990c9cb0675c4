/* Q, K and V of 16 bits, results in float32, and softmax, on every CPU path: what plain loops say of the same numbers. Where pairs of
 * bfloat16 are multiplied, weights are rounded to bfloat16. */
#include "problem.h"

/* n numbers of 16 bits, and the floats at x become them. Those of float16 are whole 1024ths of up to 1. */
static uint16_t *halves(qkv_type type, float *x, int64_t n)
{
    uint16_t *made = block(n * 2);
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        if (type == QKV_BF16) {
            memcpy(&bits, x + i, 4);
            made[i] = (uint16_t)(bits >> 16);
            bits &= 0xffff0000u;
            memcpy(x + i, &bits, 4);
            continue;
        }
        int count = (int)fabsf(x[i] * 1024), exponent = 0;
        while (count >> (exponent + 1))
            exponent++;
        made[i] = (uint16_t)((x[i] < 0) << 15 | (count ? (exponent + 5) << 10 | (count << (10 - exponent) & 0x3ff) : 0));
        x[i] = copysignf((float)count / 1024, x[i]);
    }
    return made;
}

static void check_halves(int isa, qkv_type type, int64_t heads, int64_t group, int64_t len_q, int64_t len_k, int64_t dim,
                         int64_t dim_v)
{
    problem x = make(QKV_F32, 1, heads, group, len_q, len_k, dim, dim_v);
    qkv_problem *p = &x.p;
    void *q = x.q, *k = x.k, *v = x.v, *out = NULL;
    x.q = halves(type, q, p->heads_q * len_q * dim);
    x.k = halves(type, k, heads * len_k * dim);
    x.v = halves(type, v, heads * len_k * dim_v);
    contiguous(&p->q_at, p, p->heads_q, len_q, dim, 2);
    contiguous(&p->k_at, p, heads, len_k, dim, 2);
    contiguous(&p->v_at, p, heads, len_k, dim_v, 2);
    p->isa = isa;
    p->left = draw() % 2 ? QKV_OPEN : between(0, 150);
    p->right = draw() % 2 ? QKV_OPEN : between(0, 20);
    p->scale = draw() % 2 ? p->scale : -0.125;
    x.eps = type == QKV_BF16 ? 0x1p-12 : 0;             /* times 32: a weight is off by 2^-9, and so may their sum be */
    for (p->threads = 1; p->threads <= 2; p->threads++) {
        p->type = p->k_type = p->v_type = type;
        CHECK(run(&x) == QKV_OK, "16 bits");
        p->type = p->k_type = p->v_type = QKV_F32;
        if (!out) {
            void *halved[] = {x.q, x.k, x.v};
            x.q = q, x.k = k, x.v = v;
            check_result(&x, type == QKV_BF16 ? "bfloat16" : "float16");
            x.q = halved[0], x.k = halved[1], x.v = halved[2];
            out = block(x.out_bytes);
            memcpy(out, x.out, (size_t)x.out_bytes);
        }
        CHECK(!memcmp(out, x.out, (size_t)x.out_bytes), "%d threads: other bits", p->threads);
    }
    free(q);
    free(k);
    free(v);
    free(out);
    destroy(&x);
}

static double half_at(qkv_type type, const uint16_t *x, int64_t i)
{
    int wide = type == QKV_F16 ? 5 : 8, exponent = x[i] >> (15 - wide) & ((1 << wide) - 1), fraction = x[i] & ((1 << (15 - wide)) - 1);
    int least = 1 - ((1 << (wide - 1)) - 1) - (15 - wide);
    return exponent ? ldexp((1 << (15 - wide)) + fraction, exponent - 1 + least) : ldexp(fraction, least);
}

/* The middle axis of (outer, n, inner), as that of the same floats has it but for the rounding. */
static void check_softmax(int isa, qkv_type type, int64_t outer, int64_t n, int64_t inner, int masked)
{
    int64_t total = outer * n * inner;
    float *x = uniform(QKV_F32, total), *exact = block(total * 4);
    uint16_t *half = halves(type, x, total), *out = masked ? block(total * 2) : half;
    char *mask = block(total);
    for (int64_t i = 0; i < total; i++)
        mask[i] = (char)between(0, 1);
    qkv_softmax_problem p = {
        .type = QKV_F32, .out_type = QKV_F32, .n_axes = 2, .axes = {outer, inner}, .x_at = {n * inner * 4, 4}, .with_at = {n * inner, 1},
        .out_at = {n * inner * 4, 4}, .n = n, .x_step = inner * 4, .with_step = inner, .out_step = inner * 4,
        .x = (const char *)x, .mask = masked ? mask : NULL, .out = (char *)exact, .threads = 2, .isa = isa,
    };
    CHECK(qkv_softmax(&p) == QKV_OK, "softmax");
    p.type = p.out_type = type;
    p.x_at[0] = p.out_at[0] = n * inner * 2;
    p.x_at[1] = p.out_at[1] = 2;
    p.x_step = p.out_step = inner * 2;
    p.x = (const char *)half;
    p.out = (char *)out;
    CHECK(qkv_softmax(&p) == QKV_OK, "softmax of 16 bits");
    double u = type == QKV_F16 ? 0x1p-11 : 0x1p-8;
    for (int64_t i = 0; i < total; i++)
        CHECK(fabs(half_at(type, out, i) - (double)exact[i]) <= u * (double)exact[i] + 0x1p-25, "element %lld", (long long)i);
    free(x);
    free(exact);
    free(mask);
    free(half);
    if (masked)
        free(out);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++)
        for (qkv_type type = QKV_F16; type <= QKV_BF16; type++) {
            for (int i = 0; i < share_of(60); i++)
                check_halves(isa, type, between(1, 2), between(1, 3), between(0, 70), between(0, 200), between(0, 70),
                             between(0, 70));
            for (int64_t n = 1; n <= 130; n++)
                check_halves(isa, type, 1, 1, n * 37 % 131, n, n * 37 % 131, n);
            for (int64_t rows = 1; rows <= 12; rows++)
                check_halves(isa, type, 1, rows, 1, between(1, 150), between(1, 100), between(1, 100));
            for (int i = 0; i < share_of(40); i++) {
                check_softmax(isa, type, between(1, 3), between(1, 70), between(1, 110), i % 2);
                check_softmax(isa, type, between(1, 20), between(1, 150), 1, i % 2);
            }
            check_softmax(isa, type, 1, 2100, 20, 0);
            check_halves(isa, type, 1, 4, 1, 2500, 64, 96);
            check_halves(isa, type, 1, 2, 40, 2200, 33, 31);
            printf("test_halves: %s, %s: %ld checks\n", qkv_isa_name(isa), type == QKV_BF16 ? "bfloat16" : "float16", checks);
        }
    qkv_pool_stop();
    qkv_trim();
    return 0;
}
