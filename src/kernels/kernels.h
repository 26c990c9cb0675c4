/* The contract between the driver and a CPU path: what one tile is, and the table of functions that work on it.
 *
 * Legend: Q K V O are queries, keys, values, output; S = Q K^T; P = 2^(c (S - m)) are the softmax numerators, where c is
 * log2(e) * scale; m and l are the running maximum of S and sum of P of a row; d is the head dimension.
 *
 * The layout. A panel is up to `lanes` query rows that share the same keys; one row is one SIMD lane from beginning to
 * end. Everything about a panel is stored with the lane as the fast axis, `lanes` elements to a row:
 *
 *     Q^T (d, lanes)     S^T, P^T (keys, lanes)     O^T (dv, lanes)     m, l (lanes)
 *
 * and keys are broadcast: no horizontal operation anywhere, and what a lane computes depends on nothing but that
 * lane's own data and the bounds of the key tile. That is what makes results equal bit by bit however rows are
 * grouped into panels and panels given to threads.
 */
#ifndef QKV_KERNELS_H
#define QKV_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { QKV_TERMS = 256 };             /* terms of one sum of a product: longer ones are sums of sums, as in a BLAS */
enum { QKV_COLUMN_ROWS = 4, QKV_COLUMN_KEYS = 512 };  /* most rows and keys of decode_score_columns */
enum { QKV_KEYS = 1024 };             /* most keys in one tile: key numbers are exact in any element type */

/* Rows of bytes (qkv_type in qkv.h): where the scales begin in a row of d elements. */
static inline int64_t qkv_i8_bytes(int64_t d) { return (d + 3) / 4 * 4; }
static inline int64_t qkv_i4_bytes(int64_t d) { return (d + 31) / 32 * 16; }

/* What becomes of the scores of some rows before it is said which they see, if `adjust`: they are multiplied by score_factor,
 * become softcap * tanh(x) unless that is 0, and what is not NULL is added. Per row: a slope, a position, and a row of elements
 * for the keys at hand. */
typedef struct {
    int adjust;
    double score_factor, softcap;
    const double *slope;              /* -slope * |position - key| is added */
    const int64_t *position;
    int64_t key;                      /* of the block's first, where positions count from */
    const void *key_position;         /* (keys): where they are, counted likewise; or NULL: one after the other */
    const void *const *bias;          /* -inf excludes */
    int hides;                        /* all that a bias does is to exclude; not for few rows */
    const uint8_t *const *mask;       /* 0 excludes, else nothing is added */
} qkv_changes;

enum { QKV_LINE = 64 };               /* bytes of a cache line */

/* Rows that are needed soon: `bytes` of each, of which `at` have been asked for in the first. */
typedef struct {
    const char *row;
    ptrdiff_t step;                   /* bytes from row to row */
    int64_t rows, bytes, at;
} qkv_span;

/* What a tile asks memory for while it multiplies, span by span. */
typedef struct {
    qkv_span span[4];                 /* the last has no rows */
    int next;                         /* the first that has rows left */
    int rate;                         /* lines for each line of K or V that is read */
} qkv_ahead;

/* One step of online softmax over nk keys for nv vectors of lanes. All pointers are to the table's element type and
 * aligned to it; panel pointers (q s o m l) are aligned to a vector and have rows of `lanes` elements. */
typedef struct {
    const void *q;                    /* (d, lanes), from pack */
    const void *k;                    /* (nk, d), unit stride along d; where pairs are multiplied, d counts them */
    const void *v;                    /* (nk / pair, dv), unit stride along dv */
    ptrdiff_t k_row, v_row;           /* strides in elements */
    void *s;                          /* (nk, lanes), scratch */
    void *o, *m, *l;                  /* (dv, lanes), (lanes), (lanes): the state that is updated */
    const int32_t *lo, *hi;           /* (lanes): lane j sees the keys lo[j] <= i < hi[j] of the tile; NULL: all */
    const int32_t *without;           /* (lanes): a key that lane j does not see, or -1; NULL: there are none */
    double c;                         /* log2(e) * what of the scale is neither in Q^T nor in score_factor; positive */
    int nk, d, dv, nv;                /* nk <= QKV_KEYS */
    int skew;                         /* keys of the block before the first, even with pairs: sums do not depend on where
                                       * a tile is cut */
    qkv_ahead *ahead;                 /* NULL: nothing */
    int careful;                      /* take nothing from V where the lane's key is excluded, even NaN; nv is 1 to attend */
    int *peaked;                      /* becomes 1 where weights had to be taken twice, for want of a maximum: it comes first then */
    qkv_changes changes;              /* per lane, for the nk keys */
} qkv_tile;

/* The heaviest keys of each lane so far, by score in falling order, ties by key; -inf and -1 behind them. */
typedef struct {
    void *score, *key;                /* (n, lanes), aligned to a vector; keys are integers as large as elements, unsigned */
    int64_t first;                    /* the tile's first key */
    int64_t n;                        /* at least 1 */
} qkv_heaviest;

/* Where weights go. */
typedef struct {
    void **row;                       /* (lanes): elements for the tile's keys from `first` on; NULL: of no lane */
    int first;
} qkv_weights;

/* What is kept of the weights of keys that follow one another, part by part. */
typedef struct {
    void *part;                       /* (parts, lanes), aligned to a vector */
    const int64_t *bound;             /* (parts + 1): the first key of each, and that behind the last */
    int64_t first;                    /* the tile's first key */
    int begin, end;                   /* of the tile's keys, those that count; the first of them is in the first part */
} qkv_parts;

/* A little more than half: two such weights of a row are more than rounding explains. */
#define QKV_HEAVY 0.5078125

/* Of values and outputs less a centre of their own: how far they lie apart is then not lost in where they lie. */
typedef struct {
    const void *v;                    /* (nk, dv), unit stride along dv */
    ptrdiff_t v_row;                  /* elements */
    const void *v_size;               /* (nk): squares of their lengths */
    int not_finite;                   /* some of them, also of keys that nobody sees */
    int64_t first;                    /* the tile's first key */
    void *t;                          /* (nk, lanes), scratch */
    void *sums;                       /* (nk, vector) */
} qkv_influence;

/* What gradients of a tile need beside the tile, whose o is dQ^T and whose m and l make P = l 2^(c (S - m)): m is +inf in a lane that
 * sees nothing. Columns are panels of `lanes` of them: (panels, lanes, lanes), a row for each lane. */
typedef struct {
    const void *dout;                 /* (dv, lanes): dO^T */
    const void *delta;                /* (lanes) */
    void *ds;                         /* (nk, lanes), scratch */
    void *products;                   /* the same: K Q^T, where scores are capped; or NULL */
    const void *q_rows, *dout_rows;   /* columns of Q and of dO */
    void *dk, *dv;                    /* (nk, dk_row) and (nk, dv_row): what is added to; rows are multiples of lanes */
    ptrdiff_t dk_row, dv_row;
    int careful;                      /* take nothing from rows of excluded pairs, even NaN */
} qkv_gradients;

/* Few rows that share their keys, against one chunk of them: here a lane is an element of the head dimension. All pointers
 * are to the table's element type and aligned to a vector, and so are rows. A position is that of a key in the chunk. */
typedef struct {
    const void *q;                    /* (rows, q_row), from decode_stack: elements, or pairs of them */
    void *s;                          /* (rows, s_row): scores, then weights, by position, or of pairs of positions; s_row is a
                                       * multiple of 2 vectors */
    void *parts;                      /* (rows, vector, QKV_COLUMN_KEYS): what decode_score_columns sums up in */
    void *sums;                       /* (rows, o_row): what decode_value keeps from one call to the next */
    void *o, *m, *l;                  /* (rows, o_row), (rows), (rows): the state */
    ptrdiff_t q_row, s_row, o_row;    /* elements, or pairs of Q; o_row is a multiple of 2 vectors there */
    const int32_t *lo, *hi;           /* (rows): row r sees the positions lo[r] <= i < hi[r], between first and last */
    double c;                         /* log2(e) * what of the scale is not in q; positive */
    int rows, d, dv;
    ptrdiff_t k_scales, v_scales;     /* of I8 and I4: bytes in front of a row's scales */
    int first, last;                  /* positions that some row sees */
    int careful;                      /* take nothing from V where the row's key is excluded, even NaN */
    int streams;                      /* the CPU has QKV_CPU_STREAMS */
    const qkv_changes *changes;       /* per row, from position `first` on; the chunk is the block; or NULL: none */
} qkv_stack;

/* A block of a matrix product: C <- factor * A B, or C + factor * A B. Pointers are to the table's element type and aligned
 * to it, B to a vector. What an element of C becomes depends on its row of A, its column of B and the bounds of n alone. */
typedef struct {
    const void *a;                    /* (m, n), unit stride along n */
    const void *b;                    /* (n, lanes), from pack or gather: columns up to the next vector are read */
    void *c;                          /* (m, columns), unit stride along columns; columns <= lanes */
    ptrdiff_t a_row, c_row;           /* strides in elements */
    double factor;
    int m, n, columns;
    int add;                          /* to what C holds */
    int stream;                       /* write whole vectors past the caches: they are aligned, `fence` follows, no add */
} qkv_product_tile;

/* Softmax of `count` rows of n elements, or of `count` columns of n elements. x may be e or out, and e may be out for one
 * row. x and out may be of 16 bits where the table has `narrow`; e is not an out of 16 bits. All but `mask` are of the table's
 * element type and aligned to it, e and state to a vector. Of a gradient x is that of the softmax's result p, x and p may be out,
 * and there are no mask, no stream and no e. */
typedef struct {
    const void *x;                    /* rows: (count, n); columns: (n, count); unit stride along the last */
    void *out;                        /* the same */
    const void *p;                    /* the same */
    ptrdiff_t x_row, out_row, p_row;  /* strides in elements */
    const uint8_t *mask;              /* 0: the element takes no part, and has weight 0; NULL: all do */
    ptrdiff_t mask_axis, mask_run;    /* strides in bytes: along n, along count */
    void *e;                          /* scratch, rows: (n); columns: (2, n, strip) */
    void *state;                      /* scratch, columns: (3 * vector + 3, strip) */
    int64_t n, count;
    int64_t strip;                    /* columns that are worked on together, whole vectors: all, or at least two lines, of which
                                       * one is for what is left at the end */
    int stream;                       /* write past the caches; not in 16 bits */
    int half_x, half_out;             /* QKV_AS_F16 or QKV_AS_BF16: x and out are of that; 0: of the table's type */
} qkv_softmax_tile;

/* Rows whose first 2 * pairs elements are turned, pair by pair: element i of a row with element i + pairs or, of neighbours, 2 i
 * with 2 i + 1. The others are copied. x is out or overlaps neither it nor cos and sin. All are of the table's element type. */
typedef struct {
    const void *x;                    /* (n, dim) */
    void *out;
    ptrdiff_t x_row, out_row;         /* strides in elements */
    const void *cos, *sin;            /* (n, pairs); of neighbours (n, 2 pairs): each twice, the first sine with the other sign */
    ptrdiff_t table_row;              /* 0 where all rows are of one token */
    int n, dim, pairs;
    int neighbours;
    ptrdiff_t ahead;                  /* elements between what is read of x and what is fetched */
    void *buffer;                     /* NULL, or: write past the caches, rows without gaps, by way of this; `fence` follows */
    int buffer_rows;                  /* that it holds, and a line */
} qkv_rotation_tile;

/* Types in memory, numbered as qkv_type. */
enum { QKV_AS_F32, QKV_AS_F64, QKV_AS_F16, QKV_AS_BF16, QKV_AS_I8, QKV_AS_I4 };

/* A run of rows anywhere in memory, for copies: element (i, j) lies at data + i * row + j * col bytes; rows of I8 and I4 are
 * bytes that qkv.h describes, the first of their scales at `col`. */
typedef struct {
    char *data;
    ptrdiff_t row, col;
    int type;                         /* how elements are stored: QKV_AS_... */
    int swapped;                      /* byte order differs from the machine's */
} qkv_rows;

/* Keys of signed bytes and queries of int16, whose products' sums do not overflow: x = product * scale * factor is off by at
 * most step * reach. */
enum { QKV_BYTES_GROUP = 32 };        /* keys that are looked at together */
typedef struct {
    const int8_t *keys;               /* (n): rows, `key_row` bytes apart; `at_scale` bytes from where one begins, a float32 scale */
    ptrdiff_t key_row, at_scale, n, rows, dim;
    const float *step;                /* (n) */
    const int16_t *queries;           /* (rows, dim) */
    const float *factor, *reach;      /* (rows) */
    ptrdiff_t up_row;                 /* n, up to whole groups */
    float *up;                        /* out (rows, up_row): x + step * reach, -inf behind the last */
    float *top;                       /* out (rows, up_row / QKV_BYTES_GROUP): the largest of each group */
    float *low;                       /* in/out (rows): the largest x - step * reach */
} qkv_bytes;

/* The functions of one CPU path for one element type. */
typedef struct {
    int size;                         /* bytes per element */
    int pair;                         /* elements that a term of a product has: 2 where pairs are multiplied, else 1 */
    int vector;                       /* elements per vector */
    int lanes;                        /* elements per panel row, a multiple of vector */
    int row_tile;                     /* keys that attend works on at a time: other numbers of keys are slower */
    int decode_keys;                  /* and decode_score */
    int aligned;                      /* its keys begin at multiples of this in a block, which row_tile is one of */
    int parts;                        /* of a number that is multiplied in tiles, or 0: K and V are then what gather_terms and
                                       * gather_values make of them, with rows of `parts` * whole tiles, and nothing below is
                                       * there but what attention and products need. Keys up to a multiple of `aligned` are read */
    int score_products, value_products;                 /* of parts, that one of a score and one of a value take */

    /* Around all calls of attend or multiply that a thread makes one after the other, where there are parts; else NULL. */
    void (*begin)(void);
    void (*end)(void);

    /* O, m, l <- merge(O, m, l, Q K^T, V) for one tile. An excluded score (hidden by lo and hi, or -inf) has weight
     * 0. NaN in q, k or v of a visible pair reaches O of that lane; a lane that has seen nothing keeps m = -inf, l = 0.
     * The state of a new panel is O = 0, m = -inf, l = 0 (see reset). */
    void (*attend)(const qkv_tile *tile);

    /* Questions about the scores of a tile instead of its values: V is not read, and `careful`, for any nv, keeps NaN in
     * hidden keys out of scores.
     *   largest      m <- max(m, S), NaN if one is visible
     *   entropy      m, l as attend has them, and o (1, lanes) <- the sum of P (S - m)
     *   heaviest     m, l, and the list
     *   normalisers  m and l
     *   received     sums (nk, vector) += l P, with the m and l that are given, lane after lane of an element's
     *   weights      rows <- l P, likewise
     *   rows         m and l, and rows <- S, where -inf is what a key is excluded with
     *   sums         parts += P with the m that is given, 0 where a key is excluded; NaN if m is, and a key visible
     *   maxima       parts <- max(parts, P), likewise
     *   influence    sums += (w |o - v|)^2 with w = l P / (1 - l P), likewise, but where l P is above QKV_HEAVY: that key's
     *                number goes where keys do. Where l is 0 a lane counts for nothing. o is (dv + 2, lanes): -2 times the
     *                outputs, the squares of their lengths, and keys as in qkv_heaviest */
    void (*look_largest)(const qkv_tile *tile);
    void (*look_entropy)(const qkv_tile *tile);
    void (*look_heaviest)(const qkv_tile *tile, const qkv_heaviest *list);
    void (*look_normalisers)(const qkv_tile *tile);
    void (*look_received)(const qkv_tile *tile, void *sums, void *lost); /* (nk, vector) each: `lost` is what rounding took from sums */
    void (*look_weights)(const qkv_tile *tile, const qkv_weights *to);
    void (*look_rows)(const qkv_tile *tile, const qkv_weights *to);
    void (*look_sums)(const qkv_tile *tile, const qkv_parts *parts);
    void (*look_maxima)(const qkv_tile *tile, const qkv_parts *parts);

    /* n scores of a row, from `rows` -> l P in place, as `weights` has it. */
    void (*weigh_row)(void *row, int64_t n, double m, double l, double c);

    /* What a cell has of some lanes whose n parts each begin at part i * n, times the factor of each lane: added to cell[i], lane
     * after lane; or the largest of them and cell[i], NaN if one is. */
    void (*pour_sums)(double *cell, int64_t cells, const void *part, int64_t n, const void *factor, int lanes);
    void (*pour_maxima)(double *cell, int64_t cells, const void *part, int64_t n, const void *factor, int lanes);

    void (*look_influence)(const qkv_tile *tile, const qkv_influence *of);

    /* n rows of values less their centre (d), and the squares of their lengths: returns whether all of these are finite. -2 times
     * the outputs of nv vectors of lanes, (d, lanes), the same. */
    int (*centre_values)(void *values, ptrdiff_t row, const void *centre, void *sizes, int n, int d);
    void (*centre_outputs)(void *outputs, const void *centre, void *sizes, int nv, int d);

    /* squares (lanes) <- |a - O / l|^2 (0 for O / l where l = 0); a is (dv, lanes). */
    void (*distance)(void *squares, const void *a, const void *o, const void *l, int nv, int dv);

    void (*reset)(void *o, void *m, void *l, int nv, int dv);

    /* The state of the keys in `o m l`, followed by that of the keys in `o2 m2 l2`. */
    void (*merge)(void *o, void *m, void *l, const void *o2, const void *m2, const void *l2, int nv, int dv,
                  double c);

    /* Q^T <- factor * rows, `n` rows of d elements at unit stride; lanes from n to the next vector repeat row n - 1. */
    void (*pack)(void *qt, const void *const *rows, int n, int d, double factor);

    /* Asks for the memory of n rows of dv elements before `finish` writes them. */
    void (*expect)(void *const *rows, int n, int dv);

    /* rows <- O / l (0 where l = 0), n rows of dv elements at unit stride. */
    void (*finish)(void *const *rows, const void *o, const void *l, int n, int dv);

    /* Whether O and l of the first nv vectors hold no NaN and no infinity. */
    int (*finite)(const void *o, const void *l, int nv, int dv);

    /* (n, d) elements from any strides, alignment, byte order and type to unit stride; of a wider type, what is finite
     * stays so. And back, to the table's type or from float32 to 16 bits, rounded to nearest even. */
    void (*gather)(void *to, ptrdiff_t to_row, const qkv_rows *from, int n, int d);
    void (*scatter)(const qkv_rows *to, const void *from, ptrdiff_t from_row, int n, int d);

    /* K, or Q for pack, as pairs of elements of a row, and V as pairs of two rows; what is missing of the last is 0. Without
     * pairs, gather. Strides of `to` are in the table's elements, which pairs are as large as. V is that of the keys at .. at + n of
     * `to`, whole pairs if there are more. */
    void (*gather_terms)(void *to, ptrdiff_t to_row, const qkv_rows *from, int n, int d);
    void (*gather_values)(void *to, ptrdiff_t to_row, const qkv_rows *from, int at, int n, int d);
    /* The B of a product in tiles, n rows of up to `lanes` columns, where rows are terms: as pack leaves what gather_terms made of B
     * by its columns, (`parts` * whole tiles, lanes). Where there are parts. */
    void (*gather_panel)(void *to, const qkv_rows *from, int n, int columns);

    /* Few rows. In this order: q <- factor * n rows of d elements at unit stride, 0 behind each; positions at .. at + n of
     * S <- Q K^T; S -> P, m and l, where -inf is excluded; positions at .. at + n of P V, added to O, from 0 at the first to
     * the last in order; the state of the keys so far <- that, followed by that of another chunk, and
     * rows <- O / l (0 where l = 0), which returns whether O and l hold no NaN and no infinity. K and V lie in rows of
     * elements side by side, `k_row` and `v_row` bytes apart, in the table's type or, if `widens` and these are
     * whole vectors, in the QKV_AS_... of `as`. Where pairs are multiplied, K and V are bfloat16 at any alignment, and values
     * come two keys at a time: `at` and n are even for decode_value, and a row that no row sees is 0. */
    int widens;
    void (*decode_stack)(void *q, ptrdiff_t q_row, const void *const *rows, int n, int d, double factor);
    void (*decode_score)(const qkv_stack *stack, const void *k, ptrdiff_t k_row, int as, int at, int n);
    /* The same of up to 4 rows and QKV_COLUMN_KEYS keys of the own type that lie side by side, the elements of one k_col bytes apart. */
    void (*decode_score_columns)(const qkv_stack *stack, const void *k, ptrdiff_t k_col, int as, int at, int n);
    void (*decode_weigh)(const qkv_stack *stack);
    void (*decode_value)(const qkv_stack *stack, const void *v, ptrdiff_t v_row, int as, int at, int n);
    void (*decode_merge)(const qkv_stack *stack, const void *o2, const void *m2, const void *l2);
    int (*decode_finish)(void *const *rows, const qkv_stack *stack);

    /* From here up to exp2 NULL where pairs are multiplied. */

    /* Gradients of a tile, in two steps: P, or -1 where a key is excluded if careful, into s, and dS = P (dP - delta), after all
     * that is added to scores, into ds; then dQ^T, dK and dV are added to, where dS is first taken back behind the cap. */
    void (*grad_scores)(const qkv_tile *tile, const qkv_gradients *gradients);
    void (*grad_values)(const qkv_tile *tile, const qkv_gradients *gradients);
    int (*finite_rows)(const void *rows, ptrdiff_t row, int64_t n, int d);      /* whether n rows hold no NaN and no infinity */

    /* multiply_turned reads each column of B where it lies: b is (lanes) pointers to n terms, the last of `columns`
     * repeated. The same bits. Where there are parts, rows of A are from gather_terms, n of it long, and read up to whole tiles; and
     * of all these there are multiply and fence. */
    void (*multiply)(const qkv_product_tile *tile);
    void (*multiply_turned)(const qkv_product_tile *tile);
    void (*fence)(void);              /* other threads see what was streamed */

    /* Of an axis in memory order, and of one across it. The same bits either way; all 0 where nothing takes part, NaN in
     * every element where an element that takes part is NaN or +inf. */
    void (*softmax_rows)(const qkv_softmax_tile *tile);
    void (*softmax_columns)(const qkv_softmax_tile *tile);

    /* The same of its gradient, out <- p (x - sum of p x). Where p is 0, out is, and x counts for nothing. */
    void (*softmax_grad_rows)(const qkv_softmax_tile *tile);
    void (*softmax_grad_columns)(const qkv_softmax_tile *tile);

    void (*rotate)(const qkv_rotation_tile *tile);

    /* The Hadamard transform of n elements, a power of two; and x <- x times factors, n of each. */
    void (*hadamard)(void *x, int64_t n);
    void (*multiply_row)(void *x, const void *factors, int64_t n);

    void (*bound_bytes)(const qkv_bytes *bytes);              /* of the tables of float32 */

    void (*exp2)(const void *x, void *y, int64_t n);          /* elementwise, for tests */
    double (*fma)(int64_t rounds, double *flops);             /* keeps the FMA units busy; for the benchmark */
} qkv_kernels;

/* A CPU path: one const object of this type is all that a file in this folder exports. */
typedef struct {
    const char *name;
    uint32_t needs;                   /* QKV_CPU_... bits that the CPU and its system must have */
    const qkv_kernels *type[2];       /* of the arithmetic, by qkv_type: float32, float64; NULL: the next path's */
    const qkv_kernels *pairs;         /* attention of bfloat16 alone, whose pairs are multiplied; or NULL */
    const qkv_kernels *tiles[3];      /* attention by tiles, of one to three parts; or NULL */
} qkv_isa;

enum { QKV_CPU_AVX2 = 1, QKV_CPU_FMA = 2, QKV_CPU_AVX512 = 4 };      /* AVX512 is F, VL, DQ, BW and CD together */
enum { QKV_CPU_AVX512BF16 = 8, QKV_CPU_F16C = 16, QKV_CPU_FAST_PAIRS = 32, QKV_CPU_STREAMS = 64 };
enum { QKV_CPU_BF16 = 128 };          /* of Arm */
enum { QKV_CPU_AMX = 256 };           /* AMX-TILE and AMX-BF16; a process has to ask for permission as well */

#endif
