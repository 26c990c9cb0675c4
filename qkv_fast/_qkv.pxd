# src/qkv.h, line for line.
from libc.stdint cimport int32_t, int64_t, uint32_t


cdef extern from "qkv.h" nogil:
    enum:
        QKV_MAX_AXES
        QKV_MAX_DIM
        QKV_MAX_THREADS
        QKV_OPEN
        QKV_PARTS

    ctypedef enum qkv_type:
        QKV_F32
        QKV_F64
        QKV_F16
        QKV_BF16
        QKV_I8
        QKV_I4

    ctypedef enum qkv_status:
        QKV_OK
        QKV_NO_MEMORY
        QKV_OVERFLOW
        QKV_INTERRUPTED

    ctypedef enum qkv_question:
        QKV_VALUES
        QKV_LARGEST
        QKV_ENTROPY
        QKV_TOP_KEYS
        QKV_NORMALISERS
        QKV_RECEIVED
        QKV_WEIGHTS
        QKV_ROWS
        QKV_MEANS
        QKV_MAXIMA
        QKV_INFLUENCE
        QKV_MOVED
        QKV_GROUPS
        QKV_GRADIENTS

    ctypedef struct qkv_strides:
        int64_t axis[64]
        int64_t head, row, dim, beam

    ctypedef struct qkv_run:
        const char *k
        const char *v
        int64_t first, count

    ctypedef struct qkv_members:
        int64_t group, first, last

    ctypedef struct qkv_counters:
        int64_t tiles_full
        int64_t tiles_partial
        int64_t tiles_skipped
        int64_t tiles_copied
        int64_t panels_careful
        int64_t splits
        int64_t tasks, threads

    ctypedef struct qkv_problem:
        qkv_type type, k_type, v_type
        qkv_type out_type
        int swapped_q, swapped_k, swapped_v, swapped_out
        int n_axes
        int64_t axes[64]
        int64_t heads_q, heads_kv
        int64_t len_q, len_k
        int64_t dim, dim_v
        int64_t beams, beam_step
        int latent
        const char *q
        char *out
        void *lse
        qkv_strides q_at, k_at, v_at, out_at
        const qkv_run *runs
        int64_t n_runs
        const int64_t *run_of
        const int64_t *offset
        const int64_t *positions
        const int64_t *start
        const int64_t *length
        const int64_t *queries
        int64_t left, right
        int64_t kept
        const int64_t *spans
        const int32_t *q_ids
        const int32_t *k_ids
        double scale
        double softcap
        const double *slopes
        const char *bias
        const char *mask
        const int64_t *mask_from
        qkv_type bias_type
        int swapped_bias
        qkv_strides bias_at, mask_at
        const double *sinks
        const int64_t *q_starts
        const int64_t *k_starts
        qkv_question question
        void *answer
        int64_t *answer_keys
        int64_t answer_n
        int64_t answer_rows
        int64_t answer_first
        int answer_quick
        const void *normalisers
        const qkv_members *members
        const int64_t *members_of
        int64_t n_members
        const void *delta
        char *dq
        char *dk
        char *dv
        qkv_type dq_type, dk_type, dv_type
        qkv_strides dq_at, dk_at, dv_at
        char *dq_parts
        int64_t dq_part
        char *dbias
        int64_t dbias_part
        qkv_strides dbias_at
        double *dslopes
        int threads
        int isa
        qkv_counters *counters
        int (*interrupted)(void *) noexcept nogil
        void *interrupted_arg

    qkv_status qkv_forward(const qkv_problem *problem)
    int64_t qkv_gradient_parts(int64_t len_k)

    enum:
        QKV_WIDENED
        QKV_SWAPPED
        QKV_STRIDED
        QKV_UNALIGNED
        QKV_UNPAIRED
        QKV_APART

    ctypedef struct qkv_report:
        qkv_counters counts
        int64_t isa
        int64_t pair
        int64_t parts, products
        int64_t decode
        int64_t panel_rows, vector_rows, kernel_keys
        int64_t rows
        int64_t tile_panels
        int64_t block_keys, pass_keys, chunk_keys, chunks, split
        int64_t obstacles_q, obstacles_k, obstacles_v, obstacles_out
        double scratch_bytes
        double pairs
        double operations
        double bytes

    qkv_status qkv_explain(const qkv_problem *problem, qkv_report *report)

    ctypedef struct qkv_product_problem:
        qkv_type type, b_type
        qkv_type c_type
        int swapped_a, swapped_b, swapped_c
        int transposed
        int n_axes
        int64_t axes[64]
        int64_t heads, heads_b
        int64_t rows, terms, columns
        const char *a
        const char *b
        char *c
        const char *added
        qkv_type added_type
        int swapped_added
        qkv_strides a_at, b_at, c_at, added_at
        const void *packed
        double scale
        int tiles
        int threads, isa
        qkv_counters *counters
        int (*interrupted)(void *) noexcept nogil
        void *interrupted_arg

    qkv_status qkv_product(const qkv_product_problem *problem)
    qkv_status qkv_packed_bytes(const qkv_product_problem *problem, int64_t *bytes)
    qkv_status qkv_pack(const qkv_product_problem *problem, void *packed)

    ctypedef struct qkv_softmax_problem:
        qkv_type type, out_type
        qkv_type p_type
        int swapped_x, swapped_out, swapped_p
        int n_axes
        int64_t axes[64]
        int64_t x_at[64]
        int64_t with_at[64]
        int64_t out_at[64]
        int64_t n, x_step, with_step, out_step
        const char *x
        const char *mask
        const char *p
        char *out
        int threads, isa
        qkv_counters *counters
        int (*interrupted)(void *) noexcept nogil
        void *interrupted_arg

    qkv_status qkv_softmax(const qkv_softmax_problem *problem)

    ctypedef struct qkv_angles_problem:
        qkv_type type
        int64_t rows, pairs
        const int64_t *positions
        const double *frequencies
        double factor
        void *cos
        void *sin
        int threads
        int (*interrupted)(void *) noexcept nogil
        void *interrupted_arg

    qkv_status qkv_angles(const qkv_angles_problem *problem)

    ctypedef struct qkv_rotation_problem:
        qkv_type type, out_type
        int swapped_x, swapped_out
        int neighbours
        int n_axes
        int64_t axes[64]
        int64_t heads, rows, dim, pairs
        const char *x
        char *out
        const char *cos
        const char *sin
        qkv_strides x_at, out_at, table_at
        int threads, isa
        qkv_counters *counters
        int (*interrupted)(void *) noexcept nogil
        void *interrupted_arg

    qkv_status qkv_rotate(const qkv_rotation_problem *problem)

    ctypedef struct qkv_stage_report:
        qkv_counters counts
        int64_t parts, products
        int64_t across
        int64_t tile_rows, tile_columns
        int64_t pass_terms
        int64_t stream
        int64_t obstacles_a, obstacles_b, obstacles_c
        double scratch_bytes
        double operations
        double bytes

    qkv_status qkv_explain_product(const qkv_product_problem *problem, qkv_stage_report *report)
    qkv_status qkv_explain_softmax(const qkv_softmax_problem *problem, qkv_stage_report *report)

    const char *qkv_isa_name(int isa)

    const char *qkv_built_name(int path)
    uint32_t qkv_built_needs(int path)
    const char *qkv_feature_name(int bit)
    uint32_t qkv_features()
    const char *qkv_compiler()
    int qkv_tiles_refusal(int *known)

    void qkv_set_allocator(void *(*allocate)(size_t, void *) noexcept nogil,
                           void (*release)(void *, void *) noexcept nogil, void *arg)
    void qkv_trim()

    int qkv_pool_threads()
    void qkv_pool_stop()

    void qkv_ask_instead(int (*ask)() noexcept nogil)
    void qkv_fail_allocation(int64_t k)
    int64_t qkv_allocations()
    int qkv_exp2(int isa, qkv_type type, const void *x, void *y, int64_t n)
    double qkv_fma_rate(int isa, qkv_type type, int threads, double seconds)
    double qkv_tile_rate(int isa, int threads, double seconds)
    double qkv_pair_rate(int threads, double seconds)
    double qkv_read_rate(const void *data, size_t bytes, int threads, double seconds)
    double qkv_copy_rate(void *to, const void *data, size_t bytes, int threads, double seconds)
    double qkv_fork_join(int threads, int repeats)

    ctypedef struct qkv_choice:
        int64_t sequences, heads, rows, len_k
        float *weights
        const float *reach
        const float *slack
        const float *steps
        int64_t steps_at[2]
        const int64_t *length
        double tolerance
        int64_t *keys
        int64_t *count
        float *left
        int threads
        int (*interrupted)(void *) noexcept nogil
        void *interrupted_arg

    qkv_status qkv_choose(const qkv_choice *choice) nogil

    ctypedef struct qkv_pruning:
        int64_t sequences, heads, rows, len_k, dim
        const float *queries
        const char *keys
        int64_t keys_at[3]
        const float *steps
        int64_t steps_at[2]
        const int64_t *start
        const int64_t *length
        double scale, tolerance
        int64_t *chosen
        int64_t *count
        float *left
        int threads, isa
        int (*interrupted)(void *) noexcept nogil
        void *interrupted_arg

    qkv_status qkv_prune(const qkv_pruning *pruning) nogil

    ctypedef struct qkv_gathering:
        int64_t sequences, heads, most, bytes, keys_row
        const int64_t *keys
        const int64_t *count
        const char *from_ "from"
        int64_t from_at[3]
        char *to
        int threads
        int (*interrupted)(void *) noexcept nogil
        void *interrupted_arg

    qkv_status qkv_gather(const qkv_gathering *gathering) nogil

    ctypedef struct qkv_storage:
        qkv_type type
        qkv_type stored
        int64_t turn
        int swapped
        int isa
        int64_t count[3]
        int64_t dim
        int64_t x_at[3]
        int64_t x_step
        int64_t rows_at[3]

    void qkv_quantise(const qkv_storage *storage, const char *x, char *rows)
    void qkv_turn_rows(const qkv_storage *storage, const char *x, void *rotated, int back)
    void qkv_dequantise(const qkv_storage *storage, const char *rows, float *x)
