/* As many independent multiply-adds as the product keeps in registers, and nothing else: the rate that the benchmark
 * calls the peak. x and y are chosen so that the sums stay finite and the compiler cannot know them. */
static double X(fma_rounds)(int64_t rounds, double *flops)
{
    QKV_ALIGN REAL lane[W];
    volatile REAL start = 0;
    VEC c[ROW_TILE][LANE_VECTORS];
    VEC x = X(set1)((REAL)0.5 + start), y = X(set1)((REAL)0.25 + start);
    QKV_UNROLL
    for (int i = 0; i < ROW_TILE; i++) {
        QKV_UNROLL
        for (int j = 0; j < LANE_VECTORS; j++)
            c[i][j] = X(set1)(start + (REAL)(i + j));
    }
    for (int64_t t = 0; t < rounds; t++) {
        QKV_UNROLL
        for (int i = 0; i < ROW_TILE; i++) {
            QKV_UNROLL
            for (int j = 0; j < LANE_VECTORS; j++)
                c[i][j] = X(mad)(x, y, c[i][j]);
        }
    }
    VEC sum = X(set1)(0);
    QKV_UNROLL
    for (int i = 0; i < ROW_TILE; i++) {
        QKV_UNROLL
        for (int j = 0; j < LANE_VECTORS; j++)
            sum = X(add)(sum, c[i][j]);
    }
    X(store)(lane, sum);
    *flops = 2.0 * PAIR * (double)rounds * ROW_TILE * LANE_VECTORS * W;
    return (double)lane[0];
}
