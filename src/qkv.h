/* The C core, as its caller sees it.
 *
 * One call computes softmax(scale * Q K^T + exclusions) V for every sequence of a batch and every query head, fused:
 * the (len_q, len_k) matrix is never stored. The caller describes arrays as a pointer and byte strides, so nothing is
 * copied on the way in; it has checked shapes and types, and the core trusts them. The core never prints, aborts,
 * raises or exits: it returns a status.
 *
 * This is the only header that Cython sees (qkv_fast/_qkv.pxd repeats it line for line).
 */
#ifndef QKV_H
#define QKV_H

#include <stddef.h>
#include <stdint.h>

enum { QKV_MAX_AXES = 64 };           /* leading axes of a batch: NumPy's own limit */
enum { QKV_MAX_DIM = 1024 };          /* largest head dimension */
enum { QKV_MAX_THREADS = 1024 };      /* most threads of a call */
enum { QKV_OPEN = -1 };               /* a window side without a limit */
enum { QKV_PARTS = 4 };               /* that the queries of a head are summed in, where tasks need not be many */

/* How elements are stored. What is computed from fewer bits than 32 is computed in float32.
 *
 * I8 and I4 are types of K and V alone. A row carries its own scales, and is bytes of any alignment, in native byte order:
 *   I8   dim signed bytes n, zeros up to a multiple of 4, a float32 scale: an element is scale * n
 *   I4   groups of 32 elements, 16 bytes each, of which byte j holds n of element j in its low half and of element j + 16
 *        in its high one; then a bfloat16 scale per group: an element is scale * (n - 8), 0 <= n < 16
 * What follows the dim elements of a group has n = 8. A row or group with a scale of NaN is NaN, whatever n is. */
typedef enum { QKV_F32, QKV_F64, QKV_F16, QKV_BF16, QKV_I8, QKV_I4 } qkv_type;

typedef enum {
    QKV_OK,
    QKV_NO_MEMORY,                    /* a scratch allocation failed; nothing was computed, nothing leaked */
    QKV_OVERFLOW,                     /* a size does not fit in 63 bits; nothing was computed */
    QKV_INTERRUPTED                   /* the interrupt callback asked to stop; `out` may be partly written */
} qkv_status;

/* What is asked of scores. Answers to all but the first are of the type of the arithmetic, and contiguous:
 *   LARGEST      (axes..., heads_q, len_q): the largest scaled product of Q and K over visible keys, before all else that
 *              becomes of a score; -inf without one. Soft cap, slopes and sinks are absent, and of a bias only -inf counts
 *   ENTROPY      (axes..., heads_q, len_q): of the weights, in nats
 *   TOP_KEYS     (axes..., heads_q, len_q, n): weights of the heaviest keys by score, largest first, ties by key; and the keys,
 *              -1 where there are fewer
 *   NORMALISERS  (axes..., heads_q, len_q, 2): what makes weights of a query's scores, for questions that sum over queries. A
 *                log-sum-exp says less where scores are large
 *   RECEIVED     (axes..., heads_q, len_k): sums of weights over queries, whose log-sum-exp or normalisers are given
 *   WEIGHTS      (axes..., heads_q, len_q, n): weights of the keys from answer_first on, likewise; what is hidden is left alone
 *   ROWS         (axes..., heads_q, len_q, len_k): weights of all keys, for which nothing is given: a walk less. 0 for what is hidden
 *   MEANS        (axes..., heads_q, rows, n): the means of weights in cells, likewise, what is hidden being 0. Row r of them has
 *                the queries r len_q / rows to (r + 1) len_q / rows, and so it is with columns and keys; rows <= len_q and
 *                n <= len_k. Cells that no query sees may be left alone
 *   MAXIMA       the same with the largest weight of each
 *   INFLUENCE    (axes..., heads_q, len_k): sums over queries of (p / (1 - p) |o - v|)^2, likewise; out is read. But where a key has
 *                more than half the weight of a query, which one does at most: that goes to answer_keys (axes..., heads_q, len_q),
 *                which hold -1 before
 *   MOVED        (axes..., heads_q, len_q): the square of how far out lies from what it is without the key in answer_keys. Where
 *                that is -1 it is left alone
 *   GROUPS       double (sequences, heads_q, QKV_PARTS, groups): sums over parts of the queries of the square of how far they move
 *                without a group of keys; 0 before. Given are lse or normalisers, and out
 *   GRADIENTS    none, but dq and what follows it; out is dO, which is read
 * Axes are those of lse in ragged batches as well: (heads_q, all rows), (heads_q, all keys). */
typedef enum {
    QKV_VALUES, QKV_LARGEST, QKV_ENTROPY, QKV_TOP_KEYS, QKV_NORMALISERS, QKV_RECEIVED, QKV_WEIGHTS, QKV_ROWS,
    QKV_MEANS, QKV_MAXIMA, QKV_INFLUENCE, QKV_MOVED, QKV_GROUPS, QKV_GRADIENTS
} qkv_question;

/* Byte strides of a (batch axes..., head, row, dim) view. A broadcast axis has stride 0. `beam` is the core's own, and 0. */
typedef struct {
    int64_t axis[QKV_MAX_AXES];
    int64_t head, row, dim, beam;
} qkv_strides;

/* A run of keys and values that lie at regular strides: key positions [first, first + count). */
typedef struct {
    const char *k, *v;                /* (axes..., heads_kv, count, dim) and (..., dim_v) */
    int64_t first, count;
} qkv_run;

/* Keys [first, last) that belong to a group, or to none: -1. */
typedef struct {
    int64_t group, first, last;
} qkv_members;

/* What a call did; filled (added to) only when the problem carries one. */
typedef struct {
    /* Tiles of one key block and one vector of query rows, among the blocks that some row of the task sees; panels that
     * run again count again. Few rows (decode) are one panel of one vector, and a chunk is their block. */
    int64_t tiles_full;               /* every row sees every key that is left after cutting the tile */
    int64_t tiles_partial;            /* rows differ */
    int64_t tiles_skipped;            /* no row sees any */
    int64_t tiles_copied;             /* K and V passes that were copied to scratch first */
    int64_t panels_careful;           /* panels run again because a result was not finite */
    int64_t splits;                   /* key chunks computed apart and merged */
    int64_t tasks, threads;
} qkv_counters;

typedef struct {
    qkv_type type, k_type, v_type;    /* of q, k and v: those as q's or narrower. Of I8 and I4, strides along dim are 1 */
    qkv_type out_type;                /* of out: q's, or float32 for 16 bits. lse has the type of the arithmetic */
    int swapped_q, swapped_k, swapped_v, swapped_out;     /* byte order differs from the machine's */

    int n_axes;                       /* leading axes; their product is the number of sequences */
    int64_t axes[QKV_MAX_AXES];
    int64_t heads_q, heads_kv;        /* heads_q is a multiple of heads_kv */
    int64_t len_q, len_k;
    int64_t dim, dim_v;
    /* The core's own, and 0: an axis of sequences that share their keys, when it has become one of rows. See beams.h. */
    int64_t beams, beam_step;
    int latent;                       /* V is the first dim_v elements of the rows of K: types, runs and strides are one */

    const char *q;                    /* (axes..., heads_q, len_q, dim) */
    char *out;                        /* (axes..., heads_q, len_q, dim_v); overlaps no input */
    void *lse;                        /* (axes..., heads_q, len_q), contiguous, or NULL; of questions about weights it is read, else written */
    qkv_strides q_at, k_at, v_at, out_at;

    /* Keys of sequence b: runs[run_of[b]] ... runs[run_of[b + 1] - 1] in order of position, without gaps. With
     * run_of NULL all sequences share all runs and differ by the strides of their axes; else those of K and V are not
     * looked at. */
    const qkv_run *runs;
    int64_t n_runs;
    const int64_t *run_of;

    /* Key limits. Query i of sequence b sits at i + offset_b, or where positions say, and sees the keys from position - left to
     * position + right that are start_b or more and below length_b. */
    const int64_t *offset;            /* one per sequence, |offset| <= 2^60; NULL: length_b less its queries */
    const int64_t *positions;         /* (sequences, len_q), each as far as an offset may be; or NULL */
    const int64_t *start;             /* one per sequence, 0..length_b: keys before it are not read; NULL: 0 */
    const int64_t *length;            /* one per sequence, 0..len_k; NULL: len_k */
    const int64_t *queries;           /* one per sequence, 0..len_q: rows of q from it on have no result; NULL: len_q */
    int64_t left, right;              /* distances up to 2^61, or QKV_OPEN */
    /* Of questions about scores; 0 for others. The first keys that `left` hides from none. Runs may leave out keys between these and the
     * 1024 before the first that some window has. */
    int64_t kept;
    /* Segments. spans: (sequences, len_q, 2): of the keys, query i sees only lo <= j < hi; or NULL. With ids as well, only
     * those whose id equals the query's: for ids in an order in which a span does not say it all. */
    const int64_t *spans;
    const int32_t *q_ids, *k_ids;     /* (sequences, len_q), (sequences, len_k), or both NULL */

    /* What becomes of a score: scale, softcap, ALiBi and bias, exclusion. By element are (axes..., heads_q, len_q, len_k), an
     * axis that is broadcast having stride 0; `dim` is the stride along keys. */
    double scale;                     /* any finite number */
    double softcap;                   /* scaled scores s become softcap * tanh(s / softcap); 0: they do not */
    const double *slopes;             /* ALiBi: -slope * |position - key| is added; one per query head, or NULL */
    const char *bias;                 /* is added; -inf excludes; or NULL */
    const char *mask;                 /* bytes; 0 excludes; or NULL */
    /* One per sequence: the key that the mask begins at, and does not hide those before; NULL: 0. `left` hides none from there on, which
     * are the tokens of the queries: where there are positions, these are theirs as well. */
    const int64_t *mask_from;
    qkv_type bias_type;
    int swapped_bias;
    qkv_strides bias_at, mask_at;
    const double *sinks;              /* the logit of one more key, without a value; finite or -inf; one per query head, or NULL */

    /* Ragged batches, or NULL. There is one axis of sequences, whose strides are not looked at. Sequence b has the rows
     * q_starts[b] .. q_starts[b + 1] of q, out, lse (heads_q, all rows), spans, positions and q_ids, len_q being the longest; and of
     * k_ids those from k_starts[b]. Its keys are the length_b of its runs, len_k being the most. */
    const int64_t *q_starts, *k_starts;

    /* Of a question other than VALUES, INFLUENCE, MOVED, GROUPS and GRADIENTS: dim_v is 0, and out and V are not looked at. */
    qkv_question question;
    void *answer;                     /* of VALUES: that of NORMALISERS as well, or NULL; then no pairs are multiplied */
    int64_t *answer_keys;             /* of TOP_KEYS, INFLUENCE and MOVED */
    int64_t answer_n;                 /* of TOP_KEYS, WEIGHTS and GROUPS, at least 1; of ROWS, MEANS and MAXIMA */
    int64_t answer_rows;              /* of MEANS and MAXIMA */
    int64_t answer_first;             /* of WEIGHTS; 0 for ROWS */
    int answer_quick;                 /* of ROWS: few rows may be walked as in attention, which rounds otherwise */
    const void *normalisers;          /* of questions about weights, if lse is NULL: the answer of that name, of the same problem */

    /* Of GROUPS: each key of a sequence once, groups in rising order, -1 first: members[members_of[b]] .. members[members_of[b + 1]]
     * for sequence b, or, with members_of NULL, all n_members for each. */
    const qkv_members *members;
    const int64_t *members_of;
    int64_t n_members;

    /* Of GRADIENTS; all of the type of the arithmetic but dq, dk and dv, which may be 16 bits where that is float32. lse is given, -inf
     * for a query that sees nothing. What is written is added up over the query heads of a key head. Strides are those of
     * sequences: where k has none for an axis, dk has one. */
    const void *delta;                /* (axes..., heads_q, len_q), contiguous: the sum of dO O, less the gradient of lse; finite or
                                       * not, it counts for nothing where lse is -inf */
    char *dq, *dk, *dv;               /* as q, k and v, without gaps; dq is zeros at first */
    qkv_type dq_type, dk_type, dv_type;
    qkv_strides dq_at, dk_at, dv_at;
    char *dq_parts;                   /* zeros at first, as dq, so many bytes each: what qkv_gradient_parts() parts of the keys give to it,
                                       * but for the first if dq has the type of the arithmetic, which is dq itself */
    int64_t dq_part;
    /* NULL, or zeros at first: gradients of what is added to scores, an axis with stride 0 being summed over; those of part n are
     * n * dbias_part bytes further on. */
    char *dbias;
    int64_t dbias_part;
    qkv_strides dbias_at;
    double *dslopes;                  /* NULL, or (parts, sequences, heads_q) */

    int threads;                      /* at most this many */
    int isa;                          /* index into the available CPU paths */

    qkv_counters *counters;           /* or NULL */
    /* Asked by the calling thread every 50 to 100 ms, between tasks, between the chunks of keys of a long one, and while
     * it waits for other threads; nonzero stops. Or NULL. */
    int (*interrupted)(void *);
    void *interrupted_arg;
} qkv_problem;

qkv_status qkv_forward(const qkv_problem *problem);

/* In how many parts, of keys, the gradient of queries comes. */
int64_t qkv_gradient_parts(int64_t len_k);

/* Why rows of an array cannot be used where they lie and go through scratch. */
enum {
    QKV_WIDENED = 1,                  /* the type is narrower than that of the arithmetic */
    QKV_SWAPPED = 2,                  /* byte order differs from the machine's */
    QKV_STRIDED = 4,                  /* elements of a row are not next to each other */
    QKV_UNALIGNED = 8,                /* addresses are no multiples of the element size */
    QKV_UNPAIRED = 16,                /* pairs are multiplied, and are not side by side at multiples of their size: never in V */
    QKV_APART = 32,                   /* rows lie far from each other, and many queries share a copy */
    QKV_UNTILED = 64                  /* tiles are multiplied, and no array holds them: never said */
};

/* What a call would do; all 0 but the kernel's numbers if it has nothing to compute. */
typedef struct {
    qkv_counters counts;              /* as the call will count, if the pool is free and all results are finite */
    int64_t isa;                      /* the path that has the kernel, where that asked for has none of its own */
    int64_t pair;                     /* elements that are multiplied at a time: 2 for pairs of bfloat16 */
    int64_t parts, products;          /* of a number that is multiplied in tiles, and of a score and a value; or 0 */
    int64_t decode;                   /* few rows, lanes along the head dimension: a tile is all of them and one chunk */
    int64_t panel_rows, vector_rows, kernel_keys;       /* query rows in a panel and in a vector, keys in registers */
    int64_t rows;                     /* of one key head: len_q * group */
    int64_t tile_panels;              /* panels in the query tile of a task */
    int64_t block_keys, pass_keys, chunk_keys, chunks, split;
    int64_t obstacles_q, obstacles_k, obstacles_v, obstacles_out;
    double scratch_bytes;             /* of all threads */
    double pairs;                     /* (query, key) that see each other, over all sequences and query heads */
    double operations;                /* floating-point operations in the two products of these pairs */
    double bytes;                     /* Q and the K and V that some query sees, read once; O and the LSE, written once */
} qkv_report;

qkv_status qkv_explain(const qkv_problem *problem, qkv_report *report);

/* The stages on their own: C = scale * A B for every sequence and head, the softmax of an axis, and its gradient. The same trust, memory,
 * threads and interruption as above. */

/* Scores are Q K^T with A = Q, B = K by its columns; weighted values are P V. */
typedef struct {
    qkv_type type, b_type;            /* of a, and of b: the same or narrower */
    qkv_type c_type;                  /* of c: a's, or float32 for 16 bits */
    int swapped_a, swapped_b, swapped_c;
    int transposed;                   /* b is given by its columns: (axes..., heads_b, columns, terms) */

    int n_axes;
    int64_t axes[QKV_MAX_AXES];
    int64_t heads, heads_b;           /* heads is a multiple of heads_b */
    int64_t rows, terms, columns;

    const char *a;                    /* (axes..., heads, rows, terms) */
    const char *b;                    /* (axes..., heads_b, terms, columns), unless transposed */
    char *c;                          /* (axes..., heads, rows, columns); overlaps no input */
    const char *added;                /* what sums are added to, like c; or NULL: 0 */
    qkv_type added_type;              /* no wider than the arithmetic */
    int swapped_added;
    qkv_strides a_at, b_at, c_at, added_at;             /* `dim` is the stride along the last axis */
    const void *packed;               /* b as qkv_pack has left it, which is then not read; or NULL */

    double scale;                     /* within the type; in float32, if transposed, within 2^-240 .. 2^240 */
    int tiles;                        /* where the path has them, products of many rows are of tiles; those of packed b are not, so
                                       * neither are those that have to have the same bits */
    int threads, isa;
    qkv_counters *counters;           /* or NULL: tiles_copied, tasks and threads */
    int (*interrupted)(void *);       /* or NULL */
    void *interrupted_arg;
} qkv_product_problem;

qkv_status qkv_product(const qkv_product_problem *problem);

/* The b of products of one type, number of terms and columns, transposed or not, on one CPU path, without axes and with one head:
 * as it meets rows, for many calls. `packed` is aligned to 64 bytes. Rows and what has to do with them are not looked at. */
qkv_status qkv_packed_bytes(const qkv_product_problem *problem, int64_t *bytes);
qkv_status qkv_pack(const qkv_product_problem *problem, void *packed);

/* out <- softmax of x along one axis, over the elements whose mask is not 0. Or, if there is a p, the gradient through a softmax that
 * was p: out <- p (x - the sum of p x), over the elements whose p is not 0; what takes no part becomes 0. */
typedef struct {
    qkv_type type, out_type;          /* of x, and of out: the same, or float32 for 16 bits */
    qkv_type p_type;                  /* x's or a narrower one */
    int swapped_x, swapped_out, swapped_p;

    int n_axes;                       /* the others; strides are in bytes */
    int64_t axes[QKV_MAX_AXES];
    int64_t x_at[QKV_MAX_AXES], with_at[QKV_MAX_AXES], out_at[QKV_MAX_AXES];
    int64_t n, x_step, with_step, out_step;             /* the axis */

    const char *x;
    const char *mask, *p;             /* bytes, and weights, of strides `with`: one of them is NULL, or both (all take part) */
    char *out;                        /* x or p itself, or overlaps none */

    int threads, isa;
    qkv_counters *counters;           /* or NULL: tiles_copied, tasks and threads */
    int (*interrupted)(void *);       /* or NULL */
    void *interrupted_arg;
} qkv_softmax_problem;

qkv_status qkv_softmax(const qkv_softmax_problem *problem);

/* Cosines and sines of positions times frequencies, in float64: times the factor, and rounded, only then. */
typedef struct {
    qkv_type type;                    /* of the results: QKV_F32 or QKV_F64 */
    int64_t rows, pairs;
    const int64_t *positions;         /* (rows), up to 2^53 in size */
    const double *frequencies;        /* (pairs): radians per position */
    double factor;
    void *cos, *sin;                  /* (rows, pairs), contiguous */
    int threads;
    int (*interrupted)(void *);       /* or NULL */
    void *interrupted_arg;
} qkv_angles_problem;

qkv_status qkv_angles(const qkv_angles_problem *problem);

/* Rotary positions: out <- x with the first 2 * pairs elements of each row turned, a pair (a, b) to (a cos - b sin, b cos + a sin). */
typedef struct {
    qkv_type type, out_type;          /* of x, and of out: the same, or float32 for 16 bits */
    int swapped_x, swapped_out;
    int neighbours;                   /* a pair is two neighbours; else its elements lie `pairs` apart */

    int n_axes;
    int64_t axes[QKV_MAX_AXES];
    int64_t heads, rows, dim, pairs;

    const char *x;                    /* (axes..., heads, rows, dim) */
    char *out;                        /* x itself, or overlaps no input */
    const char *cos, *sin;            /* (axes..., rows, pairs), of the type of the arithmetic, aligned, pairs side by side */
    qkv_strides x_at, out_at, table_at;

    int threads, isa;
    qkv_counters *counters;           /* or NULL: tiles_copied, tasks and threads */
    int (*interrupted)(void *);       /* or NULL */
    void *interrupted_arg;
} qkv_rotation_problem;

qkv_status qkv_rotate(const qkv_rotation_problem *problem);

/* What a stage would do; all 0 if it has nothing to compute. */
typedef struct {
    qkv_counters counts;              /* as the call will count, if the pool is free */
    int64_t parts, products;          /* of a number that is multiplied in tiles, and of a product; or 0 */
    int64_t across;                   /* a softmax of contiguous columns side by side, instead of rows */
    int64_t tile_rows, tile_columns;  /* of the result, in a task; the axis of a softmax is the columns, or, across, the rows */
    int64_t pass_terms;               /* of a product, for which B is prepared at a time */
    int64_t stream;                   /* results are written past the caches */
    int64_t obstacles_a, obstacles_b, obstacles_c;      /* A is the x of a softmax, C its result */
    double scratch_bytes;             /* of all threads */
    double operations;                /* floating-point operations of a product; 0 for a softmax, which waits for memory */
    double bytes;                     /* what is given, read once, and the result, written once */
} qkv_stage_report;

qkv_status qkv_explain_product(const qkv_product_problem *problem, qkv_stage_report *report);
qkv_status qkv_explain_softmax(const qkv_softmax_problem *problem, qkv_stage_report *report);

/* Which keys have to be read, where weights are known but for a factor. */
typedef struct {
    int64_t sequences, heads, rows, len_k;              /* key heads, and rows of each */
    float *weights;                   /* (sequences, heads, rows, len_k), 0 for what is hidden: known ones; what they are at most, less than 0 of keys to read */
    const float *reach, *slack;       /* (sequences, heads, rows), >= 0: that of key j is off by up to 2^(reach * step_j + slack) */
    const float *steps;               /* (sequences, heads, len_k), >= 0, byte strides of the first two axes */
    int64_t steps_at[2];
    const int64_t *length;            /* one per sequence: keys from it on are not looked at */
    double tolerance;                 /* share of all weights that may be left out, above 0 and below 1 */
    int64_t *keys, *count;            /* (sequences, heads, len_k): keys to read, rising; how many, -1: nothing is known */
    float *left;                      /* (sequences, heads, rows): what share of a row's weights the others have at most */
    int threads;
    int (*interrupted)(void *);       /* or NULL */
    void *interrupted_arg;
} qkv_choice;

qkv_status qkv_choose(const qkv_choice *choice);

/* The same of queries and keys: every key from start_b on and below length_b is seen, and a score is scale times a product. */
typedef struct {
    int64_t sequences, heads, rows, len_k, dim;
    const float *queries;             /* (sequences, heads, rows, dim) */
    const char *keys;                 /* (sequences, heads, len_k): rows of I8, byte strides */
    int64_t keys_at[3];
    const float *steps;               /* (sequences, heads, len_k): an element of a key is half as much off; infinite: a key to be read */
    int64_t steps_at[2];
    const int64_t *start, *length;    /* one per sequence; start may be NULL: 0 */
    double scale, tolerance;
    int64_t *chosen, *count;          /* as of qkv_choice, by whose way more may be known where the count is -1 */
    float *left;
    int threads, isa;
    int (*interrupted)(void *);       /* or NULL */
    void *interrupted_arg;
} qkv_pruning;

qkv_status qkv_prune(const qkv_pruning *pruning);

/* Rows of such keys, to (sequences, heads, most, bytes) without gaps, with zeros behind the last. */
typedef struct {
    int64_t sequences, heads, most, bytes, keys_row;    /* keys_row: of keys, from one head to the next */
    const int64_t *keys, *count;
    const char *from;
    int64_t from_at[3];
    char *to;
    int threads;
    int (*interrupted)(void *);       /* or NULL */
    void *interrupted_arg;
} qkv_gathering;

qkv_status qkv_gather(const qkv_gathering *gathering);

/* The CPU paths that this build has and this CPU runs, best first; NULL past the end. */
const char *qkv_isa_name(int isa);

/* All CPU paths of this build, best first, and what CPU features they need: bits numbered as qkv_feature_name has it.
 * Names are NULL past the end. */
const char *qkv_built_name(int path);
uint32_t qkv_built_needs(int path);
const char *qkv_feature_name(int bit);
uint32_t qkv_features(void);          /* those that the CPU has and the system lets us use */
const char *qkv_compiler(void);       /* what this was built with */
int qkv_tiles_refusal(int *known);    /* 0 if the system permits tiles, else its error number, or -1; *known is 0 if nobody asked yet */

/* Memory. Every allocation of the core goes through one hook, which may only be changed while no call runs. */
void qkv_set_allocator(void *(*allocate)(size_t bytes, void *arg), void (*release)(void *block, void *arg), void *arg);
void qkv_trim(void);                  /* free the scratch that is kept between calls */

/* Threads. */
int qkv_pool_threads(void);           /* live workers in this process, the caller not counted */
void qkv_pool_stop(void);             /* join the workers unless the pool is busy; a later call starts new ones */

/* For tests and benchmarks. */
void qkv_ask_instead(int (*ask)(void));               /* of the system, whether tiles are permitted: 0, or why not; while no call runs */
void qkv_fail_allocation(int64_t k);  /* the k-th allocation from now fails (0 is the next one); -1: none does */
int64_t qkv_allocations(void);        /* allocations since qkv_fail_allocation was last called */
int qkv_exp2(int isa, qkv_type type, const void *x, void *y, int64_t n);
/* Rates are those of all threads together, at most 256. */
double qkv_fma_rate(int isa, qkv_type type, int threads, double seconds);     /* floating-point operations per second */
double qkv_tile_rate(int isa, int threads, double seconds);                 /* the same of parts in tiles; 0 without tiles */
double qkv_pair_rate(int threads, double seconds);    /* the same for bfloat16 pairs; 0 where the CPU or the build has none */
double qkv_read_rate(const void *data, size_t bytes, int threads, double seconds);      /* bytes read per second */
double qkv_copy_rate(void *to, const void *data, size_t bytes, int threads, double seconds);    /* bytes copied per second */
double qkv_fork_join(int threads, int repeats);                               /* seconds per empty parallel call */

/* Rows of a cache in I8 or I4, from rows of numbers and back; on the calling thread.
 *
 * Rotated rows are multiplied before they are quantised by an orthogonal matrix of blocks, of descending powers of two, which
 * begin at element 0 and again at `turn`: 576 elements with turn 512 have blocks of 512 and 64, and 96 ones, of 64 and 32. A block
 * is the Hadamard matrix over the square root of its size n, after a sign for each element (cache.c). Files hold such rows, so this
 * does not change. */
typedef struct {
    qkv_type type;                    /* of x: no quantised one */
    qkv_type stored;                  /* not looked at by qkv_turn_rows */
    int64_t turn;                     /* -1: rows are not rotated */
    int swapped;                      /* byte order of x differs from the machine's */
    int isa;                          /* only decides how rows are copied */
    int64_t count[3];                 /* sequences, heads, tokens */
    int64_t dim;                      /* elements of a row */
    int64_t x_at[3], x_step;          /* byte strides of x (sequences, heads, tokens, dim) */
    int64_t rows_at[3];               /* and of its rows */
} qkv_storage;

void qkv_quantise(const qkv_storage *storage, const char *x, char *rows);
/* The rotation alone, or back, from rows of numbers x to contiguous ones of the type of their arithmetic, which may be x. */
void qkv_turn_rows(const qkv_storage *storage, const char *x, void *rotated, int back);

void qkv_dequantise(const qkv_storage *storage, const char *rows, float *x);  /* x is contiguous; its strides are not looked at */

#endif
