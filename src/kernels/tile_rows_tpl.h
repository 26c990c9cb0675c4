/* Rows of K, V and Q, and the matrices of stages, as tiles_tpl.h wants them: gathered from any strides and types, and split into parts. */

/* The same rows from element e on, a multiple of 32. */
static QKV_INLINE qkv_rows X(rows_from)(const qkv_rows *from, int e)
{
    qkv_rows rest = *from;
    if (from->type == QKV_AS_I8) {
        rest.data += e;
        rest.col -= e;
    } else if (from->type == QKV_AS_I4) {
        rest.data += e / 32 * 16;
        rest.col += e / 32 * 2 - e / 32 * 16;
    } else
        rest.data += e * from->col;
    return rest;
}

/* (n, d) numbers, both up to 32, of bfloat16 where there is one part, else float32; 0 behind them. */
#if TILE_PARTS == 1
typedef struct { QKV_ALIGN uint16_t at[STRIP][STRIP]; } X(square);
#else
typedef struct { QKV_ALIGN REAL at[STRIP][STRIP]; } X(square);
#endif

static QKV_INLINE void X(gather_square_of)(X(square) *to, const qkv_rows *from, int e, int n, int d)
{
    qkv_rows some = X(rows_from)(from, e);
    if (d < STRIP)
        memset(to->at, 0, sizeof to->at);
    else if (n < STRIP)
        memset(to->at[n], 0, (size_t)(STRIP - n) * sizeof to->at[n]);
#if TILE_PARTS == 1
    for (int i = 0; i < n; i++)
        X(collect)(to->at[i], some.data + i * some.row, &some, d);
#else
    X(gather)(to->at[0], STRIP, &some, n, d);
#endif
}

/* K, or Q for pack. */
static void X(gather_terms)(void *to, ptrdiff_t to_row, const qkv_rows *from, int n, int d)
{
    X(square) some;
    const ptrdiff_t terms = to_row / TILE_PARTS;             /* of a part */
    for (int e = 0; e < d; e += STRIP)
        for (int i = 0, rows; i < n; i += rows) {
            rows = n - i < STRIP ? n - i : STRIP;
            qkv_rows rest = *from;
            rest.data += i * from->row;
            X(gather_square_of)(&some, &rest, e, rows, d - e < STRIP ? d - e : STRIP);
            for (int r = 0; r < rows; r++) {
                REAL *row = (REAL *)to + (i + r) * to_row + e / 2;
                VEC pair[TILE_PARTS];
#if TILE_PARTS == 1
                memcpy(pair, some.at[r], sizeof pair);
#else
                X(split)(TILE_PARTS, 0, X(load)(some.at[r]), X(load)(some.at[r] + W), pair);
#endif
                QKV_UNROLL
                for (int p = 0; p < TILE_PARTS; p++)
                    X(store)(row + p * terms, pair[p]);
            }
        }
}

/* V of keys at .. at + n. Of a strip that they begin or go on with, what is behind them becomes 0. */
static void X(gather_values)(void *to, ptrdiff_t to_row, const qkv_rows *from, int at, int n, int d)
{
    X(square) some;
    const ptrdiff_t columns = to_row / TILE_PARTS;
    for (int i = 0, rows; i < n; i += rows) {
        const int begin = (at + i) % STRIP;
        REAL *strip = (REAL *)to + (at + i) / STRIP * 16 * to_row;
        qkv_rows rest = *from;
        rest.data += i * from->row;
        rows = n - i < STRIP - begin ? n - i : STRIP - begin;
        for (int e = 0; e < columns; e += W) {
            if (e % STRIP == 0)
                X(gather_square_of)(&some, &rest, e, rows, d - e < STRIP ? d - e : STRIP);
            VEC pair[TILE_PARTS], x[TILE_PARTS][X(tile)];
            for (int r = 0; r < X(tile); r++)
                for (int p = 0; p < TILE_PARTS; p++)
                    x[p][r] = X(set1)(0);
            for (int r = 0; 2 * r < rows; r++) {
#if TILE_PARTS == 1
                pair[0] = X(interleave)(some.at[2 * r] + e % STRIP, some.at[2 * r + 1] + e % STRIP);
#else
                X(split)(TILE_PARTS, 0, X(load)(some.at[2 * r] + e % STRIP), X(load)(some.at[2 * r + 1] + e % STRIP), pair);
#endif
                for (int p = 0; p < TILE_PARTS; p++)
                    x[p][begin / 2 + r] = pair[p];
            }
            for (int p = 0; p < TILE_PARTS; p++) {
                REAL *tile = strip + (p * columns + e) * 16;
                X(transpose)(x[p]);
                for (int c = 0; c < X(tile); c++) {
                    REAL column[X(tile)];
                    if (begin == 0) {
                        X(store)(tile + c * 16, x[p][c]);
                        continue;
                    }
                    X(storeu)(column, x[p][c]);
                    memcpy(tile + c * 16 + begin / 2, column + begin / 2, (size_t)(16 - begin / 2) * sizeof(REAL));
                }
            }
        }
    }
}

/* V for `multiply`, in whose terms it lies across: pairs as gather_terms has them, of columns, rows of which are lanes. */
static void X(gather_panel)(void *to, const qkv_rows *from, int n, int columns)
{
    X(square) some;
    const ptrdiff_t terms = (n + STRIP - 1) / STRIP * 16;
    for (int e = 0; e < n; e += STRIP) {
        qkv_rows rest = *from;
        rest.data += e * from->row;
        X(gather_square_of)(&some, &rest, 0, n - e < STRIP ? n - e : STRIP, columns);
        for (int r = 0; r < X(tile); r++)
            for (int j = 0; j < LANES; j += W) {
                VEC pair[TILE_PARTS];
#if TILE_PARTS == 1
                pair[0] = X(interleave)(some.at[2 * r] + j, some.at[2 * r + 1] + j);
#else
                X(split)(TILE_PARTS, 0, X(load)(some.at[r] + j), X(load)(some.at[r + X(tile)] + j), pair);
#endif
                for (int p = 0; p < TILE_PARTS; p++)
                    X(store)((REAL *)to + (p * terms + e / 2 + r) * LANES + j, pair[p]);
            }
    }
}
