"""The boundary: NumPy arrays in, the C core's structures out. No arithmetic, no checks of meaning.

Shapes, types and values have been checked in _problem.py. Here arrays become pointers and byte strides, the GIL is
released, and raise_status turns the core's status into an exception: the only place that does.
"""
cimport cython
cimport numpy as cnp
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject, PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport ENOSPC
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ._qkv cimport *

cdef extern from "Python.h":
    int Py_IsInitialized() nogil

cnp.import_array()

cdef extern from "Python.h":
    void *PyErr_Occurred()
    int PyErr_CheckSignals() nogil              # declared here without `except`: the error stays set for raise_status
    ctypedef struct PyThreadState
    PyThreadState *PyThreadState_Get()
    void PyEval_RestoreThread(PyThreadState *thread) nogil
    PyThreadState *PyEval_SaveThread() nogil


cdef extern from *:
    """
    /* For Cython: "an exception is set", when one is. */
    static int qkv_fast_propagate(void) { return -1; }
    """
    int propagate "qkv_fast_propagate"() except -1
    int CYTHON_HEX_VERSION


cdef extern from *:
    """
    /* threadpoolctl knows a library by a symbol that it exports. */
    #ifdef _WIN32
    __declspec(dllexport)
    #else
    __attribute__((visibility("default")))
    #endif
    int qkv_fast_threadpool(void) { return qkv_pool_threads(); }
    """


def isa_names():
    """The CPU paths that can be forced, best first."""
    return names_of(qkv_isa_name)


cdef tuple names_of(const char *(*name)(int) noexcept nogil):
    names = []
    while name(<int>len(names)):
        names.append(name(<int>len(names)).decode())
    return tuple(names)


def build_info():
    """What was built and what the CPU has: compiler, features of the CPU, and the features that each path needs."""
    features = names_of(qkv_feature_name)
    built = names_of(qkv_built_name)
    return {
        "compiler": qkv_compiler().decode(),
        "cython": ".".join([str(CYTHON_HEX_VERSION >> shift & 0xff) for shift in (24, 16, 8)]),
        "features": {name: bool(qkv_features() >> i & 1) for i, name in enumerate(features)},
        "paths": {path: tuple([name for i, name in enumerate(features) if qkv_built_needs(<int>n) >> i & 1])
                  for n, path in enumerate(built)},
    }


cdef struct dl_tensor:                           # DLPack's DLTensor, ABI of major version 1
    char *data
    int32_t device_type, device_id, ndim
    uint8_t code, bits                          # of an element; code 1 is an unsigned integer, 4 bfloat16
    uint16_t lanes
    int64_t *shape
    int64_t *strides                            # in elements; NULL: C order
    uint64_t byte_offset


cdef struct dl_managed:                         # DLManagedTensor
    dl_tensor tensor
    void *manager                               # here the array, with a reference
    void (*deleter)(dl_managed *) noexcept


cdef struct dl_versioned:                       # DLManagedTensorVersioned; the older DLManagedTensor begins with dl_tensor
    uint32_t major, minor
    void *manager
    void *deleter
    uint64_t flags
    dl_tensor tensor


cdef extern from "numpy/arrayobject.h":
    PyTypeObject PyArrayDescr_Type

    ctypedef struct PyArray_ArrFuncs:
        object (*getitem)(void *, void *)
        int (*setitem)(object, void *, void *) except -1
        void (*copyswap)(void *, void *, int, void *) noexcept
        void (*copyswapn)(void *, cnp.npy_intp, void *, cnp.npy_intp, cnp.npy_intp, int, void *) noexcept

    ctypedef struct PyArray_DescrProto:
        PyTypeObject *typeobj
        char kind, type, byteorder
        int elsize, alignment
        PyArray_ArrFuncs *f
        Py_hash_t hash

    void PyArray_InitArrFuncs(PyArray_ArrFuncs *functions)
    int PyArray_RegisterDataType(PyArray_DescrProto *prototype) except -1
    int PyArray_RegisterCastFunc(
        cnp.PyArray_Descr *given, int number, void (*cast)(void *, void *, cnp.npy_intp, void *, void *) noexcept
    ) except -1
    int PyArray_RegisterCanCast(cnp.PyArray_Descr *given, int number, int kind) except -1
    cnp.PyArray_Descr *PyArray_DescrFromType(int number) except NULL
    int NPY_NOSCALAR


cdef extern from "Python.h":
    void Py_SET_TYPE(void *x, PyTypeObject *kind)


cdef float of_bits(uint16_t bits) noexcept:
    cdef uint32_t wide = <uint32_t>bits << 16
    cdef float number
    memcpy(&number, &wide, 4)
    return number


cdef uint16_t to_bits(float number) noexcept:
    """Rounded to nearest even; NaN stays one."""
    cdef uint32_t wide
    memcpy(&wide, &number, 4)
    return wide >> 16 | 0x40 if number != number else (wide + 0x7fff + (wide >> 16 & 1)) >> 16


cdef object get_bits(void *x, void *array):
    cdef uint16_t bits
    memcpy(&bits, x, 2)
    return of_bits(bits)


cdef int set_bits(number, void *x, void *array) except -1:
    cdef uint16_t bits = to_bits(number)
    memcpy(x, &bits, 2)
    return 0


cdef void copy_bits(void *to, void *x, int swap, void *array) noexcept:
    cdef uint8_t first
    if x != NULL:
        memcpy(to, x, 2)
    if swap:
        first = (<uint8_t *>to)[0]
        (<uint8_t *>to)[0] = (<uint8_t *>to)[1]
        (<uint8_t *>to)[1] = first


cdef void copy_rows_of_bits(
    void *to, cnp.npy_intp to_step, void *x, cnp.npy_intp x_step, cnp.npy_intp n, int swap, void *array
) noexcept:
    cdef cnp.npy_intp i
    for i in range(n):
        copy_bits(<char *>to + i * to_step, NULL if x == NULL else <char *>x + i * x_step, swap, array)


cdef void widen_bits(void *x, void *to, cnp.npy_intp n, void *x_array, void *to_array) noexcept:
    cdef cnp.npy_intp i
    for i in range(n):
        (<float *>to)[i] = of_bits((<uint16_t *>x)[i])


cdef void round_to_bits(void *x, void *to, cnp.npy_intp n, void *x_array, void *to_array) noexcept:
    cdef cnp.npy_intp i
    for i in range(n):
        (<uint16_t *>to)[i] = to_bits((<float *>x)[i])


cdef void widen_bits_to_double(void *x, void *to, cnp.npy_intp n, void *x_array, void *to_array) noexcept:
    cdef cnp.npy_intp i
    for i in range(n):
        (<double *>to)[i] = of_bits((<uint16_t *>x)[i])


cdef void round_double_to_bits(void *x, void *to, cnp.npy_intp n, void *x_array, void *to_array) noexcept:
    cdef cnp.npy_intp i
    for i in range(n):
        (<uint16_t *>to)[i] = to_bits(<float>(<double *>x)[i])


cdef int nameless = -1                          # dtype.num of bfloat16_of_ours, once it is there
cdef PyArray_ArrFuncs nameless_functions
cdef PyArray_DescrProto nameless_prototype


def bfloat16_of_ours(kind):
    """A type for arrays of bfloat16 where ml_dtypes is missing, for what happens inside of a call; to be asked for once.
    `kind` is the class of its scalars, which NumPy keeps. Its arithmetic is that of what it is cast to."""
    global nameless
    PyArray_InitArrFuncs(&nameless_functions)
    nameless_functions.getitem, nameless_functions.setitem = get_bits, set_bits
    nameless_functions.copyswap, nameless_functions.copyswapn = copy_bits, copy_rows_of_bits
    Py_SET_TYPE(&nameless_prototype, &PyArrayDescr_Type)
    Py_INCREF(kind)
    nameless_prototype.typeobj = <PyTypeObject *>kind
    nameless_prototype.kind, nameless_prototype.type, nameless_prototype.byteorder = b"V", b"E", b"="
    nameless_prototype.elsize = nameless_prototype.alignment = 2
    nameless_prototype.f, nameless_prototype.hash = &nameless_functions, -1
    cdef int number = PyArray_RegisterDataType(&nameless_prototype)
    cdef cnp.PyArray_Descr *found = PyArray_DescrFromType(number)
    PyArray_RegisterCastFunc(found, cnp.NPY_FLOAT32, widen_bits)
    PyArray_RegisterCastFunc(found, cnp.NPY_FLOAT64, widen_bits_to_double)
    PyArray_RegisterCastFunc(PyArray_DescrFromType(cnp.NPY_FLOAT32), number, round_to_bits)
    PyArray_RegisterCastFunc(PyArray_DescrFromType(cnp.NPY_FLOAT64), number, round_double_to_bits)
    PyArray_RegisterCanCast(found, cnp.NPY_FLOAT32, NPY_NOSCALAR)
    PyArray_RegisterCanCast(found, cnp.NPY_FLOAT64, NPY_NOSCALAR)
    nameless = number
    return <object>found


def bfloat16_as_bits(capsule):
    """Of a capsule that `__dlpack__` made, whether it holds bfloat16, which then is called unsigned 16 bits."""
    cdef dl_tensor *tensor
    cdef dl_versioned *versioned
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        versioned = <dl_versioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned")
        if versioned.major != 1:                # laid out in some other way: NumPy will say so
            return False
        tensor = &versioned.tensor
    elif PyCapsule_IsValid(capsule, "dltensor"):
        tensor = <dl_tensor *>PyCapsule_GetPointer(capsule, "dltensor")
    else:
        return False
    if tensor.code != 4 or tensor.bits != 16 or tensor.lanes != 1:
        return False
    tensor.code = 1
    return True


def memory_of(capsule, bfloat16, str where):
    """The memory in a capsule named "dltensor", of real numbers on the CPU, as an array that keeps the capsule and may
    not be written to. `bfloat16` gives that type: NumPy does not know it by itself."""
    cdef dl_tensor *tensor = <dl_tensor *>PyCapsule_GetPointer(capsule, "dltensor")
    cdef cnp.npy_intp dims[64]                  # NumPy's most
    cdef cnp.npy_intp strides[64]
    cdef int i, number = -1, size = tensor.bits // 8
    cdef bint empty = False
    if tensor.code == 2:
        number = cnp.NPY_FLOAT32 if size == 4 else cnp.NPY_FLOAT64 if size == 8 else cnp.NPY_FLOAT16 if size == 2 else -1
    elif tensor.code == 4 and size == 2:
        number = (<cnp.dtype>bfloat16()).num
    elif tensor.code == 6 and size == 1:
        number = cnp.NPY_BOOL
    elif tensor.code == 0:
        number = cnp.NPY_INT64 if size == 8 else cnp.NPY_INT32 if size == 4 else -1
    if number < 0 or tensor.lanes != 1 or tensor.device_type != 1 or tensor.ndim > 64:
        raise BufferError(f"{where}: type {tensor.code} of {tensor.bits} bits on device {tensor.device_type} of DLPack")
    for i in range(tensor.ndim):
        dims[i] = tensor.shape[i]
        strides[i] = tensor.strides[i] * size if tensor.strides else 0
        empty |= dims[i] == 0
    cdef cnp.ndarray found = cnp.PyArray_New(
        cnp.ndarray, tensor.ndim, dims, number, strides if tensor.strides and not empty else NULL,
        NULL if empty else tensor.data + tensor.byte_offset, 0, 0, None
    )
    cnp.set_array_base(found, capsule)
    return found


cdef void release_managed(dl_managed *managed) noexcept with gil:
    Py_DECREF(<object>managed.manager)
    PyMem_Free(managed)


cdef void delete_managed(dl_managed *managed) noexcept nogil:
    if Py_IsInitialized():                      # a tensor may outlive the interpreter, and what it holds with it
        release_managed(managed)


cdef void delete_capsule(capsule) noexcept:
    if PyCapsule_IsValid(capsule, "dltensor"):  # nobody took what is in it
        delete_managed(<dl_managed *>PyCapsule_GetPointer(capsule, "dltensor"))


def capsule_of(cnp.ndarray array):
    """A capsule named "dltensor" with the memory of an array of floating-point numbers, which is kept for as long."""
    cdef int i, n = array.ndim, size = <int>cnp.PyArray_ITEMSIZE(array)
    cdef dl_managed *managed = <dl_managed *>PyMem_Malloc(sizeof(dl_managed) + 2 * n * sizeof(int64_t))
    if managed == NULL:
        raise MemoryError
    cdef dl_tensor *tensor = &managed.tensor
    tensor.data, tensor.byte_offset = <char *>cnp.PyArray_DATA(array), 0
    tensor.device_type, tensor.device_id, tensor.ndim = 1, 0, n
    tensor.code, tensor.bits, tensor.lanes = 2 if cnp.PyArray_ISFLOAT(array) else 4, <uint8_t>(8 * size), 1
    tensor.shape = <int64_t *>(managed + 1)
    tensor.strides = tensor.shape + n
    for i in range(n):
        tensor.shape[i] = array.shape[i]
        tensor.strides[i] = array.strides[i] // size
    Py_INCREF(array)
    managed.manager, managed.deleter = <void *>array, delete_managed
    try:
        return PyCapsule_New(managed, "dltensor", delete_capsule)
    except MemoryError:
        delete_managed(managed)
        raise


COUNTERS = ("tiles_full", "tiles_partial", "tiles_skipped", "tiles_copied", "panels_careful", "splits", "tasks",
            "threads")
MAX_DIM = QKV_MAX_DIM
MAX_THREADS = QKV_MAX_THREADS
PARTS = QKV_PARTS
OBSTACLES = {
    QKV_WIDENED: "a type narrower than that of the arithmetic", QKV_SWAPPED: "swapped bytes",
    QKV_STRIDED: "rows whose elements are not adjacent", QKV_UNALIGNED: "addresses that are not aligned",
    QKV_UNPAIRED: "pairs of bfloat16 that are multiplied, to be put side by side",
    QKV_APART: "rows that lie far from each other, which many queries share",
}
PLAN = object()                                 # as counters: see forward
QUESTIONS = {
    "largest": QKV_LARGEST, "entropy": QKV_ENTROPY, "top_keys": QKV_TOP_KEYS, "normalisers": QKV_NORMALISERS,
    "received": QKV_RECEIVED, "weights": QKV_WEIGHTS, "rows": QKV_ROWS, "means": QKV_MEANS, "maxima": QKV_MAXIMA,
    "influence": QKV_INFLUENCE, "moved": QKV_MOVED, "groups": QKV_GROUPS, "gradients": QKV_GRADIENTS,
}


cdef int raise_status(qkv_status status) except -1:
    if status == QKV_OK:
        return 0
    if status == QKV_NO_MEMORY:
        raise MemoryError("qkv_fast: no memory for scratch space")
    if status == QKV_OVERFLOW:
        raise OverflowError("qkv_fast: the number of rows or tasks does not fit in 63 bits")
    if not PyErr_Occurred():
        raise RuntimeError("qkv_fast: a signal handler has forked during the call, which cannot go on in the child")
    return propagate()                          # the signal handler's exception


cdef int check_signals(void *thread) noexcept nogil:
    # The calling thread's own state, as at the end of `with nogil`: PyGILState_Ensure, which `with gil` means, looks for an
    # interpreter that is gone where a daemon thread is still at work while the process ends.
    cdef int pending
    PyEval_RestoreThread(<PyThreadState *>thread)
    pending = PyErr_CheckSignals()
    PyEval_SaveThread()
    return pending


cdef int64_t stride_of(cnp.ndarray x, int axis) noexcept:
    """Byte stride along an axis counted from the right (1 is the last); 0 where the axis is absent or has one entry,
    whose stride NumPy leaves undefined."""
    cdef int n = cnp.PyArray_NDIM(x)
    if axis > n or cnp.PyArray_DIM(x, n - axis) == 1:
        return 0
    return cnp.PyArray_STRIDE(x, n - axis)


cdef int fill_axes(int64_t *axes, cnp.ndarray out) noexcept:
    """The leading axes of a result that have more than one entry, or none; returns how many there are."""
    cdef int i, n = 0
    for i in range(cnp.PyArray_NDIM(out) - 3):
        if cnp.PyArray_DIM(out, i) != 1:
            axes[n] = cnp.PyArray_DIM(out, i)
            n += 1
    return n


cdef void fill_strides(qkv_strides *at, cnp.ndarray x, bint heads_first, cnp.ndarray out) noexcept:
    cdef int i, n = 0, axes = cnp.PyArray_NDIM(out) - 3
    at.dim = stride_of(x, 1)
    if cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1) == 1:
        at.dim = cnp.PyArray_ITEMSIZE(x)
    at.row = stride_of(x, 2 if heads_first else 3)
    at.head = stride_of(x, 3 if heads_first else 2)
    at.beam = 0
    for i in range(axes):
        if cnp.PyArray_DIM(out, i) != 1:
            at.axis[n] = stride_of(x, axes - i + 3)
            n += 1


cdef qkv_type type_of(cnp.ndarray x) noexcept:
    cdef int number = cnp.PyArray_TYPE(x)
    if number == cnp.NPY_FLOAT32:
        return QKV_F32
    if number == cnp.NPY_FLOAT64:
        return QKV_F64
    return QKV_F16 if number == cnp.NPY_FLOAT16 else QKV_BF16         # which is not NumPy's: its number is not known


cdef qkv_type quantised(str name) noexcept:
    return QKV_I8 if name == "int8" else QKV_I4


cdef const int64_t *integers_of(cnp.ndarray x) noexcept:
    return NULL if x is None else <const int64_t *>cnp.PyArray_DATA(x)


cdef const int32_t *ids_of(cnp.ndarray x) noexcept:
    return NULL if x is None else <const int32_t *>cnp.PyArray_DATA(x)


cdef const double *doubles_of(cnp.ndarray x) noexcept:
    return NULL if x is None else <const double *>cnp.PyArray_DATA(x)


cdef void fill_logits(qkv_strides *at, cnp.ndarray x, cnp.ndarray out, bint ragged) noexcept:
    """Strides of a mask or bias that broadcasts to (axes..., heads, queries, keys)."""
    fill_strides(at, x, True, out)
    at.dim = stride_of(x, 1)                    # 0 where one element is for all keys
    if ragged:
        at.axis[0] = stride_of(x, 4)


cdef bytearray fill_extras(qkv_problem *p, extras, cnp.ndarray out):
    """Pointers into the arrays of `extras`. Returns the runs of packed sequences, which are to be kept as long as p."""
    cdef cnp.ndarray mask = extras.mask, bias = extras.bias, starts = extras.q_starts
    cdef bytearray room = None
    p.positions = integers_of(extras.positions)
    p.start = integers_of(extras.starts)
    p.queries = integers_of(extras.queries)
    p.spans = integers_of(extras.spans)
    p.q_ids = ids_of(extras.q_ids)
    p.k_ids = ids_of(extras.k_ids)
    p.slopes = doubles_of(extras.slopes)
    p.sinks = doubles_of(extras.sinks)
    p.softcap = extras.softcap
    p.kept = extras.kept
    p.latent = extras.latent
    if mask is not None:
        p.mask = <const char *>cnp.PyArray_DATA(mask)
        p.mask_from = integers_of(extras.mask_from)
        fill_logits(&p.mask_at, mask, out, starts is not None)
    if bias is not None:
        p.bias = <const char *>cnp.PyArray_DATA(bias)
        p.bias_type = type_of(bias)
        p.swapped_bias = cnp.PyArray_ISBYTESWAPPED(bias)
        fill_logits(&p.bias_at, bias, out, starts is not None)
    if starts is not None:
        p.q_starts = integers_of(starts)
        p.k_starts = integers_of(extras.k_starts)
        p.n_axes = 1
        p.axes[0] = cnp.PyArray_DIM(starts, 0) - 1
        p.len_q = extras.longest_q
        p.len_k = extras.longest_k
        p.q_at.axis[0] = p.k_at.axis[0] = p.v_at.axis[0] = p.out_at.axis[0] = 0
        room = fill_runs(p, p.axes[0])
    if extras.k_stored is not None:
        p.k_type = quantised(extras.k_stored)
    if extras.v_stored is not None:
        p.v_type = quantised(extras.v_stored)
        p.dim_v = cnp.PyArray_DIM(out, cnp.PyArray_NDIM(out) - 1)
    if extras.runs is not None:
        p.len_k = extras.longest_k
        room = place_runs(p, extras.runs)
        p.run_of = integers_of(extras.run_of)
    return room


cdef bytearray place_runs(qkv_problem *p, cnp.ndarray table):
    """The runs of a cache, from a table of (bytes from k, bytes from v, first key, keys); to be kept as long as p."""
    cdef const int64_t *entry = integers_of(table)
    cdef int64_t i, n = cnp.PyArray_DIM(table, 0)
    cdef bytearray room = bytearray(n * sizeof(qkv_run))
    cdef qkv_run *runs = <qkv_run *><char *>room
    for i in range(n):
        runs[i].k = p.runs[0].k + entry[4 * i]
        runs[i].v = p.runs[0].v + entry[4 * i + 1]
        runs[i].first = entry[4 * i + 2]
        runs[i].count = entry[4 * i + 3]
    p.runs = runs
    p.n_runs = n
    return room


cdef bytearray fill_runs(qkv_problem *p, int64_t n):
    """One run for each packed sequence, and their numbers after them, in memory that is to be kept as long as p."""
    cdef bytearray room = bytearray(n * sizeof(qkv_run) + (n + 1) * sizeof(int64_t))
    cdef qkv_run *runs = <qkv_run *><char *>room
    cdef int64_t *run_of = <int64_t *>(runs + n)
    cdef int64_t b
    for b in range(n):
        runs[b].k = p.runs[0].k + p.k_starts[b] * p.k_at.row
        runs[b].v = p.runs[0].v + p.k_starts[b] * p.v_at.row
        runs[b].first = 0
        runs[b].count = p.k_starts[b + 1] - p.k_starts[b]
        run_of[b] = b
    run_of[n] = n
    p.runs = runs
    p.n_runs = n
    p.run_of = run_of
    return room


@cython.freelist(8)
@cython.final
cdef class Problem:
    """One call of attention, which _problem.py has checked.

    where         the verb, for errors
    q, k, v       (..., heads, rows, dim) with `heads_first`, else (..., rows, heads, dim); 2-D arrays have no heads
    shape, rows   of the result, and of its log-sum-exp (..., heads, rows); `number` is the result's type (dtype.num)
    scale         of the scores
    left, right   distances from a position that keys may have; None is open
    offsets       contiguous int64, one per sequence, or None: see qkv.h
    lengths       the same
    extras        an Extras of _masks.py, or None; with its starts the rows of all arrays are those of packed sequences, and
                  offsets and lengths are given. With its runs k and v (..., heads, rows, dim) are where these point into,
                  and lengths are given. With its `k_stored` or `v_stored` the last axis of k or v is the bytes of a row. If it is
                  `latent`, v are the first elements of the rows of k.
    threads, isa  how many, and which path
    counters      contiguous int64 in the order of COUNTERS, or None; or PLAN: nothing is to be computed
    """
    cdef public str where
    cdef public cnp.ndarray q, k, v
    cdef public bint heads_first
    cdef public tuple shape, rows
    cdef public int number
    cdef public double scale
    cdef public object left, right
    cdef public cnp.ndarray offsets, lengths
    cdef public object extras
    cdef public int threads, isa
    cdef public object counters

    def __init__(self, str where, cnp.ndarray q not None, cnp.ndarray k, cnp.ndarray v, bint heads_first, tuple shape,
                 tuple rows, double scale, left, right, cnp.ndarray offsets, cnp.ndarray lengths, extras, int threads,
                 int isa, counters):
        self.where = where
        self.q, self.k, self.v = q, k, v
        self.heads_first = heads_first
        self.shape, self.rows = shape, rows
        self.number = cnp.PyArray_TYPE(q)
        self.scale = scale
        self.left, self.right = left, right
        self.offsets, self.lengths = offsets, lengths
        self.extras = extras
        self.threads, self.isa, self.counters = threads, isa, counters

    @property
    def is_planned(self):
        return self.counters is PLAN

    def empty(self):
        """An array for the result."""
        return empty(self.where, self.shape, self.number)


cpdef cnp.ndarray empty(str where, tuple shape, int number):
    """An array for a result of this shape and type (dtype.num), in C order; `where` is for the error."""
    check_result(where, number)
    return scratch(where, shape, number)


cpdef int check_result(str where, int number) except -1:
    """That a caller can use an array of this type."""
    if number == nameless and nameless >= 0:
        raise ImportError(f"{where}: a new array of bfloat16 needs ml_dtypes: pip install ml_dtypes, or give an out= where there is one")
    return 0


cpdef cnp.ndarray scratch(str where, tuple shape, int number):
    """The same for what stays inside of a call, in any type."""
    cdef cnp.npy_intp dims[64]                  # NumPy's most
    cdef int i, n = <int>len(shape)
    try:
        for i in range(n):
            dims[i] = shape[i]
        return cnp.PyArray_EMPTY(n, dims, number, 0)
    except (ValueError, OverflowError):
        raise OverflowError(f"{where}: a result of shape {shape} is too large for any array") from None


def gradient_parts(int64_t keys):
    """In how many parts the gradient of queries comes, for the keys of the longest sequence."""
    return qkv_gradient_parts(keys)


cdef void fill_gradients(qkv_problem *p, gradients, bint heads_first, cnp.ndarray out):
    """Pointers into the arrays of a Gradients of _grad.py."""
    cdef cnp.ndarray delta = gradients.delta, dq = gradients.dq, dk = gradients.dk, dv = gradients.dv
    cdef cnp.ndarray bias = gradients.bias, slopes = gradients.slopes, parts = gradients.dq_parts
    p.delta = cnp.PyArray_DATA(delta)
    p.dq = <char *>cnp.PyArray_DATA(dq)
    p.dk = <char *>cnp.PyArray_DATA(dk)
    p.dv = <char *>cnp.PyArray_DATA(dv)
    p.dq_type = type_of(dq)
    p.dk_type = type_of(dk)
    p.dv_type = type_of(dv)
    p.dq_parts = NULL
    p.dq_part = 0
    if parts is not None:
        p.dq_parts = <char *>cnp.PyArray_DATA(parts)
        p.dq_part = cnp.PyArray_NBYTES(parts) // cnp.PyArray_DIM(parts, 0)
    fill_strides(&p.dq_at, dq, heads_first, out)
    fill_strides(&p.dk_at, dk, heads_first, out)
    fill_strides(&p.dv_at, dv, heads_first, out)
    p.dbias = NULL
    p.dbias_part = 0
    if bias is not None:
        p.dbias = <char *>cnp.PyArray_DATA(bias)
        fill_logits(&p.dbias_at, bias, out, p.q_starts != NULL)
        if gradients.bias_by_part:
            p.dbias_part = p.dbias_at.dim
            p.dbias_at.dim = 0
    p.dslopes = NULL if slopes is None else <double *>cnp.PyArray_DATA(slopes)


def forward(Problem call not None, cnp.ndarray out not None, cnp.ndarray lse, int question=QKV_VALUES,
            cnp.ndarray answer=None, cnp.ndarray keys=None, cnp.ndarray normalisers=None, int64_t first_key=0,
            cnp.ndarray members=None, cnp.ndarray members_of=None, gradients=None, bint quick=False):
    """Attention into `out`, and into the contiguous `lse` unless it is None. With PLAN for counters nothing is computed: it
    returns what would be done, as a dict of qkv_report.

    Of another `question`, one of QUESTIONS, the contiguous `answer`, `keys` and `normalisers` are what qkv.h says, and so are
    `lse`, `first_key`, `members` (n, 3), `members_of` and `quick`; `out` has the leading axes of the result, and is read where qkv.h says so. Of
    "gradients" it is dO, and `gradients` are what _grad.py says."""
    cdef cnp.ndarray q = call.q, k = call.k, v = call.v
    cdef bint heads_first = call.heads_first
    if k is None or v is None:
        raise ValueError(f"{call.where}: the problem has no keys or values yet")
    cdef qkv_problem p
    cdef qkv_run run
    cdef qkv_report report
    cdef qkv_status status
    cdef bytearray runs = None                  # of packed sequences
    cdef int axes = cnp.PyArray_NDIM(out) - 3
    cdef int row = 2 if heads_first else 3, head = 5 - row

    p.type = type_of(q)
    p.k_type = type_of(k)
    p.v_type = type_of(v)
    p.out_type = type_of(out)
    p.swapped_q = cnp.PyArray_ISBYTESWAPPED(q)
    p.swapped_k = cnp.PyArray_ISBYTESWAPPED(k)
    p.swapped_v = cnp.PyArray_ISBYTESWAPPED(v)
    p.swapped_out = cnp.PyArray_ISBYTESWAPPED(out)

    p.n_axes = fill_axes(p.axes, out)
    p.beams = p.beam_step = 0
    if axes < 0:                                # 2-D
        heads_first = True
        row = 2
        p.heads_q = p.heads_kv = 1
    else:
        p.heads_q = cnp.PyArray_DIM(q, cnp.PyArray_NDIM(q) - head)
        p.heads_kv = cnp.PyArray_DIM(k, cnp.PyArray_NDIM(k) - head)
    p.len_q = cnp.PyArray_DIM(q, cnp.PyArray_NDIM(q) - row)
    p.len_k = cnp.PyArray_DIM(k, cnp.PyArray_NDIM(k) - row)
    p.dim = cnp.PyArray_DIM(q, cnp.PyArray_NDIM(q) - 1)
    p.dim_v = cnp.PyArray_DIM(v, cnp.PyArray_NDIM(v) - 1)
    p.latent = 0

    p.q = <const char *>cnp.PyArray_DATA(q)
    p.out = <char *>cnp.PyArray_DATA(out)
    p.lse = NULL if lse is None else cnp.PyArray_DATA(lse)
    fill_strides(&p.q_at, q, heads_first, out)
    fill_strides(&p.k_at, k, heads_first, out)
    fill_strides(&p.v_at, v, heads_first, out)
    fill_strides(&p.out_at, out, heads_first, out)

    run.k = <const char *>cnp.PyArray_DATA(k)
    run.v = <const char *>cnp.PyArray_DATA(v)
    run.first = 0
    run.count = p.len_k
    p.runs = &run
    p.n_runs = 1
    p.run_of = NULL

    p.offset = integers_of(call.offsets)
    p.length = integers_of(call.lengths)
    p.left = QKV_OPEN if call.left is None else call.left
    p.right = QKV_OPEN if call.right is None else call.right
    p.kept = 0
    p.scale = call.scale
    p.positions = p.start = p.queries = NULL
    p.spans = p.q_ids = p.k_ids = p.q_starts = p.k_starts = NULL
    p.slopes = p.sinks = NULL
    p.mask = p.bias = NULL
    p.mask_from = NULL
    p.softcap = 0
    if call.extras is not None:
        runs = fill_extras(&p, call.extras, out)
    p.question = <qkv_question>question
    p.answer = NULL if answer is None else cnp.PyArray_DATA(answer)
    p.answer_keys = NULL if keys is None else <int64_t *>cnp.PyArray_DATA(keys)
    p.answer_n = 0 if answer is None else cnp.PyArray_DIM(answer, cnp.PyArray_NDIM(answer) - 1)
    p.answer_rows = 0 if answer is None else length_of(answer, 2)
    p.answer_first = first_key
    p.answer_quick = quick
    p.normalisers = NULL if normalisers is None else cnp.PyArray_DATA(normalisers)
    p.members = <const qkv_members *>integers_of(members)
    p.members_of = integers_of(members_of)
    p.n_members = 0 if members is None else cnp.PyArray_DIM(members, 0)
    if gradients is not None:
        fill_gradients(&p, gradients, heads_first, out)
    p.threads = call.threads
    p.isa = call.isa
    p.counters = NULL
    p.interrupted = check_signals
    p.interrupted_arg = PyThreadState_Get()
    if call.counters is not None:
        if call.counters is PLAN:
            with nogil:
                status = qkv_explain(&p, &report)
            raise_status(status)
            return report
        p.counters = <qkv_counters *>cnp.PyArray_DATA(call.counters)
    with nogil:
        status = qkv_forward(&p)
    raise_status(status)


def product(cnp.ndarray a not None, cnp.ndarray b not None, cnp.ndarray c not None, bint transposed, bint a_heads_first,
            bint b_heads_first, bint c_heads_first, double scale, int threads, int isa, counters, cnp.ndarray added=None,
            cnp.ndarray packed=None, bint tiles=False):
    """c = scale * a @ b, or scale * a @ b.T with `transposed`; each (..., heads, rows, dim) or, without its heads first,
    (..., rows, heads, dim). 2-D arrays have no heads. `added`, of c's last axes, goes to the sums; `packed` is b from `pack`, in whose
    place b can be any array. With `tiles` the path may multiply them.
    With PLAN for counters it returns what would be done, as `forward` does: a dict of qkv_stage_report."""
    cdef qkv_product_problem p
    cdef qkv_stage_report report
    cdef qkv_status status
    p.n_axes = fill_axes(p.axes, c)
    if cnp.PyArray_NDIM(c) < 3:                                # 2-D
        a_heads_first = b_heads_first = c_heads_first = True
        p.heads = p.heads_b = 1
    else:
        p.heads = cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - (3 if a_heads_first else 2))
        p.heads_b = cnp.PyArray_DIM(b, cnp.PyArray_NDIM(b) - (3 if b_heads_first else 2))
    p.type = type_of(a)
    p.b_type = type_of(b)
    p.c_type = type_of(c)
    p.swapped_a = cnp.PyArray_ISBYTESWAPPED(a)
    p.swapped_b = cnp.PyArray_ISBYTESWAPPED(b)
    p.swapped_c = cnp.PyArray_ISBYTESWAPPED(c)
    p.transposed = transposed
    p.rows = cnp.PyArray_DIM(c, cnp.PyArray_NDIM(c) - (2 if c_heads_first else 3))
    p.columns = cnp.PyArray_DIM(c, cnp.PyArray_NDIM(c) - 1)
    p.terms = cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1)
    p.a = <const char *>cnp.PyArray_DATA(a)
    p.b = <const char *>cnp.PyArray_DATA(b)
    p.c = <char *>cnp.PyArray_DATA(c)
    fill_strides(&p.a_at, a, a_heads_first, c)
    fill_strides(&p.b_at, b, b_heads_first, c)
    fill_strides(&p.c_at, c, c_heads_first, c)
    p.added = NULL
    if added is not None:
        p.added = <const char *>cnp.PyArray_DATA(added)
        p.added_type = type_of(added)
        p.swapped_added = cnp.PyArray_ISBYTESWAPPED(added)
        fill_strides(&p.added_at, added, c_heads_first, c)
    p.packed = NULL if packed is None else cnp.PyArray_DATA(packed)
    p.scale = scale
    p.tiles = tiles
    p.threads = threads
    p.isa = isa
    p.counters = NULL
    p.interrupted = check_signals
    p.interrupted_arg = PyThreadState_Get()
    if counters is not None:
        if counters is PLAN:
            raise_status(qkv_explain_product(&p, &report))
            return report
        p.counters = <qkv_counters *>cnp.PyArray_DATA(counters)
    with nogil:
        status = qkv_product(&p)
    raise_status(status)


def pack(cnp.ndarray b not None, int threads, int isa):
    """b, (columns, terms), as `product` takes it for a @ b.T on this path, where b's type has the arithmetic of a's: bytes that
    begin at a cache line."""
    cdef qkv_product_problem p
    cdef int64_t size = 0
    cdef cnp.npy_intp room
    cdef cnp.ndarray packed
    cdef qkv_status status
    cdef char *to
    p.type = p.b_type = p.c_type = type_of(b)
    p.swapped_b = cnp.PyArray_ISBYTESWAPPED(b)
    p.swapped_a = p.swapped_c = 0
    p.transposed = 1
    p.rows = p.heads = p.heads_b = 1
    p.columns = cnp.PyArray_DIM(b, 0)
    p.terms = cnp.PyArray_DIM(b, 1)
    p.n_axes = 0
    p.b = <const char *>cnp.PyArray_DATA(b)
    p.a = p.c = NULL
    p.added = NULL
    p.packed = NULL
    fill_strides(&p.b_at, b, True, b)
    p.a_at = p.c_at = p.added_at = p.b_at
    p.scale = 1
    p.tiles = 0
    p.threads = threads
    p.isa = isa
    p.counters = NULL
    p.interrupted = check_signals
    p.interrupted_arg = PyThreadState_Get()
    raise_status(qkv_packed_bytes(&p, &size))
    room = size + 64
    packed = cnp.PyArray_EMPTY(1, &room, cnp.NPY_UINT8, 0)
    to = <char *>cnp.PyArray_DATA(packed)
    to += 64 - <size_t>to % 64
    with nogil:
        status = qkv_pack(&p, to)
    raise_status(status)
    return packed[to - <char *>cnp.PyArray_DATA(packed):]


def softmax(cnp.ndarray x not None, cnp.ndarray mask, cnp.ndarray out not None, int axis, int threads, int isa, counters,
            cnp.ndarray weights=None):
    """out = softmax of x along `axis` (not negative), where the bool `mask` of the same shape, if any, is True. Or, of `weights`
    that a softmax returned, x being their gradient, that of what it was given. With PLAN for counters: see product."""
    cdef qkv_softmax_problem p
    cdef cnp.ndarray beside = mask if weights is None else weights
    cdef qkv_stage_report report
    cdef qkv_status status
    cdef int i, at, n = cnp.PyArray_NDIM(x)
    p.type = type_of(x)
    p.out_type = type_of(out)
    p.swapped_x = cnp.PyArray_ISBYTESWAPPED(x)
    p.swapped_out = cnp.PyArray_ISBYTESWAPPED(out)
    p.n_axes = n - 1
    for i in range(n - 1):
        at = i if i < axis else i + 1
        p.axes[i] = cnp.PyArray_DIM(x, at)
        p.x_at[i] = cnp.PyArray_STRIDE(x, at)
        p.with_at[i] = 0 if beside is None else cnp.PyArray_STRIDE(beside, at)
        p.out_at[i] = cnp.PyArray_STRIDE(out, at)
    p.n = cnp.PyArray_DIM(x, axis)
    p.x_step = stride_of(x, n - axis) if p.n > 1 else cnp.PyArray_ITEMSIZE(x)
    p.with_step = 0 if beside is None else stride_of(beside, n - axis)
    p.out_step = stride_of(out, n - axis) if p.n > 1 else cnp.PyArray_ITEMSIZE(out)
    p.x = <const char *>cnp.PyArray_DATA(x)
    p.mask = NULL
    if mask is not None:
        p.mask = <const char *>cnp.PyArray_DATA(mask)
    p.p = NULL
    p.p_type = p.type
    p.swapped_p = 0
    if weights is not None:
        p.p = <const char *>cnp.PyArray_DATA(weights)
        p.p_type = type_of(weights)
        p.swapped_p = cnp.PyArray_ISBYTESWAPPED(weights)
        if p.n == 1:
            p.with_step = cnp.PyArray_ITEMSIZE(weights)
    p.out = <char *>cnp.PyArray_DATA(out)
    p.threads = threads
    p.isa = isa
    p.counters = NULL
    p.interrupted = check_signals
    p.interrupted_arg = PyThreadState_Get()
    if counters is not None:
        if counters is PLAN:
            raise_status(qkv_explain_softmax(&p, &report))
            return report
        p.counters = <qkv_counters *>cnp.PyArray_DATA(counters)
    with nogil:
        status = qkv_softmax(&p)
    raise_status(status)


def angles(cnp.ndarray positions not None, cnp.ndarray frequencies not None, double factor, cnp.ndarray cos not None,
           cnp.ndarray sin not None, int threads):
    """cos and sin (rows, pairs) = factor times those of positions (rows), int64, times frequencies (pairs), float64. All are
    contiguous."""
    cdef qkv_angles_problem p
    cdef qkv_status status
    p.type = type_of(cos)
    p.rows = cnp.PyArray_DIM(positions, 0)
    p.pairs = cnp.PyArray_DIM(frequencies, 0)
    p.positions = integers_of(positions)
    p.frequencies = doubles_of(frequencies)
    p.factor = factor
    p.cos = cnp.PyArray_DATA(cos)
    p.sin = cnp.PyArray_DATA(sin)
    p.threads = threads
    p.interrupted = check_signals
    p.interrupted_arg = PyThreadState_Get()
    with nogil:
        status = qkv_angles(&p)
    raise_status(status)


def rotate(cnp.ndarray x not None, cnp.ndarray out not None, cnp.ndarray cos not None, cnp.ndarray sin not None,
           bint neighbours, bint heads_first, int threads, int isa, counters):
    """out = x with pairs of elements turned. x is as in `product`; cos and sin, of the type of the arithmetic, broadcast to the axes
    of a result with its heads first, with an axis of 1 for the heads, and have rows without gaps."""
    cdef qkv_rotation_problem p
    cdef qkv_status status
    p.n_axes = fill_axes(p.axes, out)
    if cnp.PyArray_NDIM(out) < 3:                              # 2-D
        heads_first = True
    p.heads = length_of(x, 3 if heads_first else 2)
    p.rows = length_of(x, 2 if heads_first else 3)
    p.dim = length_of(x, 1)
    p.pairs = length_of(cos, 1)
    p.type = type_of(x)
    p.out_type = type_of(out)
    p.swapped_x = cnp.PyArray_ISBYTESWAPPED(x)
    p.swapped_out = cnp.PyArray_ISBYTESWAPPED(out)
    p.neighbours = neighbours
    p.x = <const char *>cnp.PyArray_DATA(x)
    p.out = <char *>cnp.PyArray_DATA(out)
    p.cos = <const char *>cnp.PyArray_DATA(cos)
    p.sin = <const char *>cnp.PyArray_DATA(sin)
    fill_strides(&p.x_at, x, heads_first, out)
    fill_strides(&p.out_at, out, heads_first, out)
    fill_strides(&p.table_at, cos, True, out)
    p.threads = threads
    p.isa = isa
    p.counters = NULL
    p.interrupted = check_signals
    p.interrupted_arg = PyThreadState_Get()
    if counters is not None:
        p.counters = <qkv_counters *>cnp.PyArray_DATA(counters)
    with nogil:
        status = qkv_rotate(&p)
    raise_status(status)


def pool_threads():
    return qkv_pool_threads()


def pool_stop():
    # With the GIL: who gives it up in an atexit function may not get it back (a subinterpreter's, run while the process
    # ends), and workers never ask for it.
    qkv_pool_stop()


def trim():
    qkv_trim()


def fail_allocation(int64_t k):
    qkv_fail_allocation(k)


def allocations():
    return qkv_allocations()


def exp2(cnp.ndarray x not None, cnp.ndarray y not None, int isa):
    qkv_exp2(isa, type_of(x), cnp.PyArray_DATA(x), cnp.PyArray_DATA(y), cnp.PyArray_SIZE(x))


def fma_rate(bint wide, int threads, double seconds, int isa):
    cdef double rate
    with nogil:
        rate = qkv_fma_rate(isa, QKV_F64 if wide else QKV_F32, threads, seconds)
    return rate


def tiles_refusal():
    """Why the system refuses tiles: an error number, or -1; 0 if it permits them, and None if nobody asked yet."""
    cdef int known, found = qkv_tiles_refusal(&known)
    return found if known else None


cdef int no_room() noexcept nogil:
    return ENOSPC


def refuse_tiles():
    """What a system does one of whose threads has a small alternate signal stack, to all paths with tiles: for tests."""
    qkv_ask_instead(&no_room)


def tile_rate(int threads, double seconds, int isa):
    cdef double rate
    with nogil:
        rate = qkv_tile_rate(isa, threads, seconds)
    return rate


def pair_rate(int threads, double seconds):
    cdef double rate
    with nogil:
        rate = qkv_pair_rate(threads, seconds)
    return rate


def read_rate(cnp.ndarray data not None, int threads, double seconds):
    cdef const void *start = cnp.PyArray_DATA(data)
    cdef size_t nbytes = cnp.PyArray_NBYTES(data)
    cdef double rate
    with nogil:
        rate = qkv_read_rate(start, nbytes, threads, seconds)
    return rate


def copy_rate(cnp.ndarray to not None, cnp.ndarray data not None, int threads, double seconds):
    cdef const void *start = cnp.PyArray_DATA(data)
    cdef void *target = cnp.PyArray_DATA(to)
    cdef size_t nbytes = cnp.PyArray_NBYTES(data)
    cdef double rate
    with nogil:
        rate = qkv_copy_rate(target, start, nbytes, threads, seconds)
    return rate


def fork_join(int threads, int repeats):
    cdef double seconds
    with nogil:
        seconds = qkv_fork_join(threads, repeats)
    return seconds


cdef int64_t length_of(cnp.ndarray x, int axis) noexcept:
    """Entries along an axis counted from the right; 1 where it is absent."""
    cdef int n = cnp.PyArray_NDIM(x)
    return 1 if axis > n else cnp.PyArray_DIM(x, n - axis)


cdef void fill_storage(qkv_storage *s, cnp.ndarray x, cnp.ndarray rows, int64_t turn, int isa) noexcept:
    cdef int i
    s.type = type_of(x)
    s.turn = turn
    s.swapped = cnp.PyArray_ISBYTESWAPPED(x)
    s.isa = isa
    for i in range(3):
        s.count[i] = length_of(x, 4 - i)
        s.x_at[i] = stride_of(x, 4 - i)
        s.rows_at[i] = stride_of(rows, 4 - i)
    s.dim = length_of(x, 1)
    s.x_step = stride_of(x, 1) if s.dim > 1 else cnp.PyArray_ITEMSIZE(x)


def quantise(cnp.ndarray x not None, cnp.ndarray rows not None, str stored, int64_t turn, int isa):
    """The `rows` (..., tokens, bytes), uint8, of a cache from x (..., tokens, dim), with one or two axes in front; `stored`
    is "int8" or "int4", and `turn` what qkv.h says."""
    cdef qkv_storage s
    s.stored = quantised(stored)
    fill_storage(&s, x, rows, turn, isa)
    with nogil:
        qkv_quantise(&s, <const char *>cnp.PyArray_DATA(x), <char *>cnp.PyArray_DATA(rows))


def turn_rows(cnp.ndarray x not None, cnp.ndarray rotated not None, int64_t turn, bint back, int isa):
    """x (batch, heads, tokens, dim) rotated, or back, into the contiguous array of the type of its arithmetic."""
    cdef qkv_storage s
    s.stored = QKV_I8
    fill_storage(&s, x, x, turn, isa)
    with nogil:
        qkv_turn_rows(&s, <const char *>cnp.PyArray_DATA(x), cnp.PyArray_DATA(rotated), back)


def dequantise(cnp.ndarray rows not None, cnp.ndarray x not None, str stored, int64_t turn, int isa):
    """The contiguous float32 x from the rows."""
    cdef qkv_storage s
    s.stored = quantised(stored)
    fill_storage(&s, x, rows, turn, isa)
    with nogil:
        qkv_dequantise(&s, <const char *>cnp.PyArray_DATA(rows), <float *>cnp.PyArray_DATA(x))


def choose(cnp.ndarray weights not None, cnp.ndarray reach not None, cnp.ndarray slack not None, cnp.ndarray steps not None,
           cnp.ndarray lengths not None, double tolerance, cnp.ndarray keys not None, int threads):
    """How many keys have to be read, (sequences, heads), and what share of the weights of each row the others have at most; which
    ones goes to the first of the int64 `keys` (sequences, heads, keys). Other arrays are float32, and all contiguous but for the
    first axes of steps: see qkv_choice."""
    cdef qkv_choice c
    cdef qkv_status status
    cdef tuple shape = (<object>weights).shape
    cdef cnp.ndarray count = empty("attend", shape[:2], cnp.NPY_INT64)
    cdef cnp.ndarray left = empty("attend", shape[:3], cnp.NPY_FLOAT32)
    c.sequences, c.heads, c.rows, c.len_k = shape
    c.weights = <float *>cnp.PyArray_DATA(weights)
    c.reach = <const float *>cnp.PyArray_DATA(reach)
    c.slack = <const float *>cnp.PyArray_DATA(slack)
    c.steps = <const float *>cnp.PyArray_DATA(steps)
    c.steps_at[0], c.steps_at[1] = stride_of(steps, 3), stride_of(steps, 2)
    c.length = integers_of(lengths)
    c.tolerance = tolerance
    c.keys = <int64_t *>cnp.PyArray_DATA(keys)
    c.count = <int64_t *>cnp.PyArray_DATA(count)
    c.left = <float *>cnp.PyArray_DATA(left)
    c.threads = threads
    c.interrupted = check_signals
    c.interrupted_arg = PyThreadState_Get()
    with nogil:
        status = qkv_choose(&c)
    raise_status(status)
    return count, left


def prune(cnp.ndarray queries not None, cnp.ndarray rows not None, cnp.ndarray steps not None, cnp.ndarray starts,
          cnp.ndarray lengths not None, double scale, double tolerance, cnp.ndarray keys not None, int threads, int isa):
    """The same of contiguous float32 queries (sequences, heads, rows, dim) and int8 rows (sequences, heads, keys, bytes), where
    all keys are seen from starts on and nothing becomes of their scores: see qkv_pruning."""
    cdef qkv_pruning c
    cdef qkv_status status
    cdef tuple shape = (<object>queries).shape
    cdef cnp.ndarray count = empty("attend", shape[:2], cnp.NPY_INT64)
    cdef cnp.ndarray left = empty("attend", shape[:3], cnp.NPY_FLOAT32)
    c.sequences, c.heads, c.rows, c.dim = shape
    c.len_k = keys.shape[2]
    c.queries = <const float *>cnp.PyArray_DATA(queries)
    c.keys = <const char *>cnp.PyArray_DATA(rows)
    c.keys_at[0], c.keys_at[1], c.keys_at[2] = stride_of(rows, 4), stride_of(rows, 3), stride_of(rows, 2)
    c.steps = <const float *>cnp.PyArray_DATA(steps)
    c.steps_at[0], c.steps_at[1] = stride_of(steps, 3), stride_of(steps, 2)
    c.start = integers_of(starts)
    c.length = integers_of(lengths)
    c.scale, c.tolerance = scale, tolerance
    c.chosen = <int64_t *>cnp.PyArray_DATA(keys)
    c.count = <int64_t *>cnp.PyArray_DATA(count)
    c.left = <float *>cnp.PyArray_DATA(left)
    c.threads = threads
    c.isa = isa
    c.interrupted = check_signals
    c.interrupted_arg = PyThreadState_Get()
    with nogil:
        status = qkv_prune(&c)
    raise_status(status)
    return count, left


def gather(cnp.ndarray x not None, cnp.ndarray keys not None, cnp.ndarray count not None, cnp.ndarray out not None, int threads):
    """Of rows x (sequences, heads, rows, dim), whose elements are next to each other, those of `keys` into out (sequences,
    heads, most, dim), with zeros behind the last."""
    cdef qkv_gathering g
    cdef qkv_status status
    g.sequences, g.heads, g.most = x.shape[0], x.shape[1], out.shape[2]
    g.bytes = x.shape[3] * cnp.PyArray_ITEMSIZE(x)
    g.keys_row = keys.shape[2]
    g.keys = integers_of(keys)
    g.count = integers_of(count)
    g.from_ = <const char *>cnp.PyArray_DATA(x)
    g.from_at[0], g.from_at[1], g.from_at[2] = stride_of(x, 4), stride_of(x, 3), stride_of(x, 2)
    g.to = <char *>cnp.PyArray_DATA(out)
    g.threads = threads
    g.interrupted = check_signals
    g.interrupted_arg = PyThreadState_Get()
    with nogil:
        status = qkv_gather(&g)
    raise_status(status)
