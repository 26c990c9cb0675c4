"""Bad input: which exception, that its message names what was given, and that nothing was done."""

import itertools
import re
import sys

import numpy as np
import pytest
from _util import TYPES, child_says, no_change, normal, qkv, same_bits
from numpy.lib.stride_tricks import as_strided

import qkv_fast
from qkv_fast import _runtime

dtypes = pytest.mark.parametrize("dtype", TYPES)

Q, K, V, OUT = (2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6), (2, 4, 5, 6)
OBJECT = pytest.param(object(), id="object")  # whose name would be an address


def arrays():
    rng = np.random.default_rng(1)
    return {name: normal(rng, shape) for name, shape in (("q", Q), ("k", K), ("v", V))}


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def refuses(error, *words, **changes):
    """The call with these changes raises exactly this kind of error, with all these words in its message."""
    arguments = {**arrays(), **changes}
    out = np.full(OUT, 7, "float32")
    if "out" not in changes:
        arguments["out"] = out
    args = [arguments.pop(name) for name in "qkv"]
    watched = [
        x for x in (*args, arguments.get("out"), out) if isinstance(x, np.ndarray) and x.dtype != object
    ]
    for return_lse in (False, True):
        with no_change(*watched), pytest.raises(error) as caught:
            qkv_fast.attention(*args, return_lse=return_lse, **arguments)
        assert type(caught.value) is error, f"{type(caught.value)} is a subclass of its own"
        for word in words:
            assert re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", str(caught.value)), (
                word,
                str(caught.value),
            )


SHAPES = [
    # (q, k, v): wrong in one respect each
    ((8,), K, V),
    ((), (), ()),
    ((5, 8), K, V),
    (Q, (9, 8), (9, 6)),
    (Q, K, (9, 6)),
    (Q, (2, 2, 9, 7), V),  # D
    ((2, 4, 5, 1), K, V),  # D does not broadcast
    ((2, 4, 5, 0), K, V),
    (Q, K, (2, 2, 8, 6)),  # Lk
    (Q, K, (2, 2, 1, 6)),
    (Q, (2, 2, 1, 8), V),
    (Q, K, (2, 4, 9, 6)),  # heads of v
    (Q, K, (2, 1, 9, 6)),
    (Q, (2, 3, 9, 8), (2, 3, 9, 6)),  # 3 does not divide 4
    (Q, (2, 8, 9, 8), (2, 8, 9, 6)),
    (Q, (2, 0, 9, 8), (2, 0, 9, 6)),
    ((2, 1, 5, 8), K, V),
    ((3, 4, 5, 8), K, V),  # batch
    (Q, (3, 2, 9, 8), V),
    (Q, K, (5, 2, 9, 6)),
    ((2, 3, 4, 5, 8), (4, 2, 9, 8), (4, 2, 9, 6)),
    ((0, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6)),
    ((2, 4, 5, 1025), (2, 2, 9, 1025), V),  # the largest D and Dv are 1024
    (Q, K, (2, 2, 9, 1025)),
    ((5, 8), (9, 7), (9, 6)),  # 2-D
    ((5, 8), (9, 8), (8, 6)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_shapes(shapes, layout):
    """ValueError with all three shapes, as given."""
    q, k, v = (zeros(*shape) for shape in shapes)
    if layout == "blhd":
        q, k, v = (x.swapaxes(-3, -2) if x.ndim > 2 else x for x in (q, k, v))
    refuses(ValueError, "q", "k", "v", q.shape, k.shape, v.shape, q=q, k=k, v=v, layout=layout)


BAD_ARRAYS = [
    np.zeros(Q, "int64"),
    np.zeros(Q, "int8"),
    np.zeros(Q, "uint32"),
    np.zeros(Q, bool),
    np.zeros(Q, "complex64"),
    np.zeros(Q, object),
    np.zeros(Q, "U3"),
    np.zeros(Q, "S3"),
    np.zeros(Q, "M8[s]"),
    np.zeros(Q, "m8[s]"),
    np.zeros(Q, [("x", "f4")]),
    np.zeros(Q, "longdouble"),
    np.ma.masked_array(zeros(*Q)),
    np.ma.masked_array(zeros(*Q), mask=True),
    None,
    "text",
    {"a": 1},
    3,
    [[1, 2], [3, 4]],
]


@pytest.mark.parametrize("bad", BAD_ARRAYS, ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', x)}")
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_kinds(name, bad):
    if isinstance(bad, np.ndarray):
        bad = bad[:, : {"q": 4}.get(name, 2)]
    refuses(TypeError, name, **{name: bad})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_matrix(name):
    """np.matrix is refused, though it is an array of floats."""
    two = {"q": zeros(5, 8), "k": zeros(9, 8), "v": zeros(9, 6)}
    with pytest.warns(PendingDeprecationWarning):
        two[name] = np.asmatrix(two[name])
    refuses(TypeError, name, "matrix", **two, out=zeros(5, 6))


def test_the_way_out_works():
    """What the message of a TypeError proposes is accepted."""
    for bad in (np.zeros(Q, "int64"), np.zeros(Q, bool)):
        with pytest.raises(TypeError, match=re.escape("q.astype('float32')")):
            qkv_fast.attention(bad, arrays()["k"], arrays()["v"])
        qkv_fast.attention(bad.astype("float32"), arrays()["k"], arrays()["v"])


def test_ragged_lists():
    refuses(ValueError, "q", q=[[1.0, 2.0], [3.0]])


@pytest.mark.parametrize("q, k, v", [t for t in itertools.product(TYPES, repeat=3) if t[1:] != (t[0],) * 2])
def test_mixed_types(q, k, v):
    """k and v have one type, which is not wider than q's."""
    given = {name: x.astype(t) for (name, x), t in zip(arrays().items(), (q, k, v), strict=True)}
    if k == v == "float32":
        assert qkv_fast.attention(**given).dtype == np.float64
    else:
        refuses(TypeError, "k", "v", "float32", "float64", **given, out=zeros(*OUT, dtype=q))


@pytest.mark.parametrize(
    "word, error",
    [("lbhd", ValueError), ("BHLD", ValueError), ("", ValueError), (None, None), (3, None), (["bhld"], None)],
)
def test_layout(word, error):
    if error:
        refuses(error, "layout", repr(word), layout=word)
    else:
        with pytest.raises((TypeError, ValueError), match="layout"):
            qkv_fast.attention(**arrays(), layout=word)


@pytest.mark.parametrize("word", ["bottom-right", "", "True", "top_left"])
def test_causal_word(word):
    refuses(ValueError, "causal", repr(word), causal=word)


@pytest.mark.parametrize("bad", [0, 1, None, 2.0, [True], np.array([True, False])], ids=repr)
def test_causal_kind(bad):
    refuses(TypeError, "causal", causal=bad)


@pytest.mark.parametrize(
    "bad", [-1, (-1, 0), (0, -1), (None, -5), (), (1,), (1, 2, 3), [1], -(2**70)], ids=repr
)
def test_window_values(bad):
    refuses(ValueError, "window", window=bad)


@pytest.mark.parametrize(
    "bad",
    [1.0, "3", (1.0, 2), (1, "2"), True, (True, 1), np.nan, {1, 2}, (None, [1]), np.array([1.5, 2])],
    ids=repr,
)
def test_window_kinds(bad):
    refuses(TypeError, "window", window=bad)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.float32("nan"), float("-inf")], ids=repr)
def test_scale_values(bad):
    refuses(ValueError, "scale", scale=bad)


@pytest.mark.parametrize("bad", ["1", 1j, [1.0], True, np.array([1.0, 2.0]), OBJECT, (1,)], ids=str)
def test_scale_kinds(bad):
    refuses(TypeError, "scale", scale=bad)


def test_scale_that_fits_no_float():
    refuses(OverflowError, "scale", scale=10**400)


@pytest.mark.parametrize("bad", [-1, 10, [9, 10], [-1, 0], 2**40, np.array([9, 255], "uint8")], ids=repr)
def test_lengths_out_of_range(bad):
    refuses(ValueError, "kv_lengths", 9, kv_lengths=bad)


@pytest.mark.parametrize("name", ["kv_lengths", "q_offset"])
@pytest.mark.parametrize("bad", [[1, 2, 3], [[1, 2]], [[[5]]], [], np.zeros((2, 1), int)], ids=repr)
def test_per_sequence_shapes(name, bad):
    """One for all or one per sequence; an array cannot enlarge the batch."""
    refuses(ValueError, name, np.shape(bad), (2,), **{name: bad})


@pytest.mark.parametrize("name", ["kv_lengths", "q_offset"])
@pytest.mark.parametrize("bad", [1.0, [1.0, 2.0], "3", True, [True, False], 3j, [None, 1], OBJECT], ids=str)
def test_per_sequence_kinds(name, bad):
    refuses(TypeError, name, **{name: bad})


@pytest.mark.parametrize(
    "bad", [2**63, -(2**63) - 1, 10**30, np.uint64(2**63), np.array([2**63, 0], "uint64")], ids=repr
)
def test_offsets_that_overflow(bad):
    refuses(OverflowError, "q_offset", q_offset=bad, causal=True)


@pytest.mark.parametrize(
    "options", [dict(causal=True), dict(window=3), dict(window=(None, 2)), dict(window=(2, None))]
)
def test_two_readings_of_positions(options):
    for lengths in (4, [9, 1], [0, 4]):
        refuses(ValueError, "kv_lengths", "q_offset=0", kv_lengths=lengths, **options)
    for lengths in (5, 0, [9, 0], [5, 9]):
        qkv_fast.attention(**arrays(), kv_lengths=lengths, **options)


def test_top_left_has_an_offset_already():
    for offset in (0, 3, [0, 0]):
        refuses(ValueError, "causal", "q_offset", causal="top-left", q_offset=offset)


@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 8), (2, 4, 5), (4, 5, 6), (1, 2, 4, 5, 6), (2, 5, 4, 6), (2, 4, 1, 6), ()]
)
def test_out_shape(shape):
    refuses(ValueError, "out", OUT, shape, out=zeros(*shape))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "complex64", "V4"])
def test_out_type(dtype):
    refuses(TypeError, "out", "float32", np.dtype(dtype), out=np.zeros(OUT, dtype))


@pytest.mark.parametrize(
    "bad", [[1.0], "text", 3, np.ma.zeros(OUT, "float32"), memoryview(b"1234"), np.float32(1)]
)
def test_out_kind(bad):
    refuses(TypeError, "out", out=bad)


def test_out_not_writable():
    out = zeros(*OUT)
    out.flags.writeable = False
    refuses(ValueError, "out", out=out)
    refuses(ValueError, "out", out=np.broadcast_to(zeros(6), OUT))


def test_out_that_overlaps_itself():
    """Rows that share memory cannot hold different results."""
    refuses(ValueError, "out", out=as_strided(zeros(6), OUT, (0, 0, 0, 4)))
    refuses(ValueError, "out", out=as_strided(zeros(60), OUT, (120, 0, 24, 4)))


@pytest.mark.parametrize(
    "n, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), ("2", TypeError), (True, TypeError)]
)
def test_thread_counts(n, error):
    refuses(error, "num_threads", num_threads=n)


def test_unknown_arguments():
    for name in ("attn_mask", "is_causal", "dropout", "enable_gqa"):
        with pytest.raises(TypeError, match=name):
            qkv_fast.attention(**arrays(), **{name: None})


@dtypes
def test_results_larger_than_memory(dtype):
    """MemoryError: half a petabyte is more than an address space holds."""
    q, k, v = qkv(1, dtype, lengths=(1, 1), dims=(8, 8))
    q = as_strided(q, (1, 2**45, 8), (0, 0, q.itemsize))
    with pytest.raises(MemoryError):
        qkv_fast.attention(q, k, v)
    with pytest.raises(MemoryError):
        qkv_fast.attention(q, k, v[..., :0], return_lse=True)
    assert np.isfinite(qkv_fast.attention(q[:, :3], k, v)).all()


@dtypes
def test_sizes_that_overflow(dtype):
    """OverflowError: more bytes, rows or sequences than 63 bits count."""
    x = np.zeros(1024, dtype)
    size = x.itemsize
    q = as_strided(x, (1, 2**56, 8), (0, 0, size))
    k, v = as_strided(x, (1, 1, 8), (0, 0, size)), as_strided(x, (1, 1, 1024), (0, 0, size))
    with pytest.raises(OverflowError):
        qkv_fast.attention(q, k, v)  # 2**56 * 1024 elements
    wide = as_strided(x, (2**31, 1, 1, 1, 8), (0, 0, 0, 0, size))
    deep = as_strided(x, (1, 2**31, 1, 1, 8), (0, 0, 0, 0, size))
    with pytest.raises(OverflowError):
        qkv_fast.attention(wide, deep, deep)  # 2**62 sequences of 8 elements
    deeper = as_strided(x, (1, 2**33, 1, 1, 8), (0, 0, 0, 0, size))
    with pytest.raises(OverflowError):
        qkv_fast.attention(wide, deeper, deeper)  # 2**64 sequences


def test_more_axes_than_broadcasting_takes():
    """NumPy itself broadcasts up to 32 axes in places: more are right or a ValueError, nothing else."""
    q, k, v = qkv(2)
    q, k = q.reshape((1,) * 40 + q.shape), k.reshape((1,) * 39 + k.shape)
    v = np.broadcast_to(v, (2, *(1,) * 38, *v.shape))
    try:
        out = qkv_fast.attention(q, k, v)
    except ValueError as error:
        assert "q.shape" in str(error)
    else:
        assert out.shape == (1, 2, *(1,) * 38, *q.shape[-3:])


@pytest.mark.usefixtures("isa")
@dtypes
@pytest.mark.parametrize("case", ["plain", "split", "copied", "two threads"])
def test_every_allocation_may_fail(dtype, case):
    """Fail the first, the second, ... allocation of the core: MemoryError, and the next call is right."""
    q, k, v = qkv(3, dtype, heads=(4, 2), lengths=(40, 200), dims=(16, 16))
    options = dict(num_threads=1, return_lse=True)
    if case == "split":
        q, k, v = qkv(4, dtype, heads=(1, 1), lengths=(4, 20_000), dims=(32, 32))
        options["num_threads"] = 3
    elif case == "copied":
        k, v = k.astype(k.dtype.newbyteorder("S")), v[..., ::-1]
    elif case == "two threads":
        q, k, v = qkv(5, dtype, heads=(8, 8), lengths=(200, 200))
        options["num_threads"] = 2
    expected = qkv_fast.attention(q, k, v, **options)
    for n in itertools.count():
        _runtime.trim()
        with _runtime.fail_allocation(n) as allocations:
            try:
                got = qkv_fast.attention(q, k, v, **options)
            except MemoryError:
                got = None
            count = allocations.count
        if got is not None:
            same_bits(got, expected)
            assert count <= n, "an allocation failed and the call went on"
            break
        assert count == n + 1
        same_bits(qkv_fast.attention(q, k, v, **options), expected)
    assert n >= 1 and (n >= 3 or case != "split") and (n >= 2 or case != "two threads")


@pytest.mark.alone
def test_failed_allocations_leak_nothing():
    """The same failures 3000 times leave the process as large as it was."""
    code = """
import resource, numpy as np, qkv_fast
from qkv_fast import _runtime
x = np.ones((8, 300, 64), "float32")
few = np.ones((1, 4, 64), "float32"), np.ones((1, 30_000, 64), "float32")
def fail(times):
    for i in range(times):
        _runtime.trim()
        with _runtime.fail_allocation(i % 3):
            for args in ((x, x, x), (few[0], few[1], few[1])):
                try:
                    qkv_fast.attention(*args, num_threads=2)
                except MemoryError:
                    pass
def size():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fail(300)
before = size()
fail(1500)
print((size() - before) / 1024)
"""
    pytest.importorskip("resource", reason="the process size is read through a POSIX module")
    # A leak of one 100 KB scratch block in each third call would be 50 MB or more.
    unit = 1024 if sys.platform == "darwin" else 1  # ru_maxrss is in bytes there, else in KB
    assert float(child_says(code, timeout=120)) / unit < 8
