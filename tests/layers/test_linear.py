"""linear, Linear, project_qkv: right on every CPU path, wherever arrays lie, and the same bits each time."""

import itertools

import ml_dtypes  # registers bfloat16  # noqa: F401
import numpy as np
import pytest
from _fence import Fence
from _patterns import PATTERNS, fits
from _util import ALL_TYPES, HALVES, general_product, no_change, normal, same_bits, unit

import qkv_fast
from qkv_fast import reference

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", ALL_TYPES)


def layer(seed, dtype, rows, n_in, n_out):
    rng = np.random.default_rng(seed)
    shape = rows if isinstance(rows, tuple) else (rows,)
    return normal(rng, (*shape, n_in), dtype), normal(rng, (n_out, n_in), dtype), normal(rng, (n_out,), dtype)


def check(x, w, b=None):
    """The function, and the layer's same bits: at most twice NumPy's error and 4 eps of the sum of absolute terms, and
    half a unit where 16 bits are rounded."""
    with no_change(*(y for y in (x, w, b) if y is not None)):
        got = qkv_fast.linear(x, w, b)
        same_bits(qkv_fast.Linear(w, b)(x), got)
    assert got.dtype == x.dtype.newbyteorder("=") and got.shape == (*x.shape[:-1], w.shape[0])
    exact = reference.linear(x, w, b)
    wide = np.float64 if x.dtype == "float64" else np.float32
    a, c = x.astype(wide).reshape(x.size // max(x.shape[-1], 1) if x.size else 0, x.shape[-1]), w.astype(wide)
    usual = general_product(a, c.T) if a.size else np.zeros((*x.shape[:-1], w.shape[0]), wide)
    usual = usual.reshape(exact.shape) + (0 if b is None else b.astype(wide))
    size = reference.linear(np.abs(x), np.abs(w), None if b is None else np.abs(b))
    error = np.abs(got.astype(exact.dtype) - exact)
    allowed = 2 * np.abs(usual - exact).max(initial=0) + 4 * np.finfo(wide).eps * size.max(initial=0)
    assert (error <= allowed + unit(x.dtype) * np.abs(exact) * 1.01).all(), error.max()
    return got


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 64, 65, 200, (3, 5), (2, 0, 4), ()])
@pytest.mark.parametrize("n_in, n_out", [(0, 3), (1, 1), (5, 28), (33, 0), (70, 25), (2100, 130)])
def test_shapes(dtype, rows, n_in, n_out):
    x, w, b = layer(1, dtype, rows, n_in, n_out)
    check(x, w)
    check(x, w, b)


@pytest.mark.parametrize("mix", list(itertools.product(("float32", "float16", "bfloat16"), repeat=3)), ids="-".join)
@pytest.mark.parametrize("rows", [3, 90])
def test_mixed_types(mix, rows):
    """x, weights and what is added, of any types that are summed in float32."""
    x, w, b = (y.astype(dtype) for y, dtype in zip(layer(2, "float32", rows, 50, 40), mix, strict=True))
    check(x, w, b)


@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_float64_takes_what_is_added_in_any_type(dtype):
    x, w, b = layer(2, "float64", 5, 50, 40)
    check(x, w, b.astype(dtype))


@pytest.mark.parametrize("x, w", list(itertools.product(ALL_TYPES, repeat=2)))
def test_function_and_layer_take_the_same_types(x, w):
    def taken(call):
        try:
            return call(np.ones((2, 3), x), np.ones((4, 3), w)).dtype == x
        except TypeError as error:
            assert all(word in str(error) for word in ("float64", x, w))
            return False

    assert taken(qkv_fast.linear) == taken(lambda x, w: qkv_fast.Linear(w)(x)) == ((x == "float64") == (w == "float64"))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [3, 90])
def test_sums_of_16_bits_are_rounded_once(dtype, rows):
    x, w, b = layer(3, dtype, rows, 3000, 40)
    b32 = b.astype("float32") * np.float32(1.001)
    wide = qkv_fast.linear(x.astype("float32"), w.astype("float32"), b32)
    same_bits(qkv_fast.linear(x, w, b32), wide.astype(dtype))
    out = np.empty(wide.shape, "float32")
    assert qkv_fast.linear(x, w, b32, out=out) is out
    same_bits(out, wide)


@dtypes
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rows", [(3, 4), (5, 40)])
def test_strides(dtype, pattern, rows):
    """Of all arrays; also rows that are no array of rows, in the input and in the result."""
    x, w, b = layer(4, dtype, rows, 30, 50)
    expected = check(x, w, b)
    if not fits(pattern, dtype):
        pytest.skip("a byte order that this type does not have")
    lay_out = PATTERNS[pattern]

    def arrange(a):
        return lay_out(a[(None,) * (4 - a.ndim)])[(0,) * (4 - a.ndim)]

    same_bits(np.ascontiguousarray(qkv_fast.linear(arrange(x), arrange(w), np.repeat(b, 2)[::2])), expected)
    same_bits(np.ascontiguousarray(qkv_fast.Linear(arrange(w), b)(arrange(x))), expected)
    out = arrange(np.zeros_like(expected))
    if out.flags.writeable and out.dtype.isnative:
        assert qkv_fast.linear(x, w, b, out=out) is out
        same_bits(np.ascontiguousarray(out), expected)
    turned = np.asfortranarray(np.swapaxes(x, 0, 1))  # rows of one axis, no rows of both
    same_bits(np.ascontiguousarray(np.swapaxes(qkv_fast.linear(turned, w, b), 0, 1)), expected)


def test_out_may_be_an_input():
    x, w, b = layer(5, "float32", 40, 40, 40)
    expected = qkv_fast.linear(x, w, b)
    for i in range(2):
        given = [x.copy(), w.copy()]
        assert qkv_fast.linear(*given, b, out=given[i]) is given[i]
        same_bits(given[i], expected)


@dtypes
def test_bits_depend_on_rows_alone(dtype):
    """Not on how many there are, threads, or whether weights are packed."""
    x, w, b = layer(6, dtype, 300, 1500, 130)
    expected = qkv_fast.linear(x, w, b, num_threads=1)
    packed = qkv_fast.Linear(w, b)
    for threads in (2, 3):
        same_bits(qkv_fast.linear(x, w, b, num_threads=threads), expected)
        same_bits(packed(x, num_threads=threads), expected)
    for rows in (slice(0, 1), slice(1, 3), slice(4, 8), slice(8, 13), slice(3, 67), slice(200, 300)):
        same_bits(qkv_fast.linear(x[rows], w, b), expected[rows])
        same_bits(packed(x[rows]), expected[rows])
    same_bits(qkv_fast.linear(x, w[:29], b[:29]), np.ascontiguousarray(expected[:, :29]))


@dtypes
@pytest.mark.parametrize("rows", [4, 100])
def test_nan_and_infinity(dtype, rows):
    """What is not finite reaches its own row, or its own column, and no other."""
    x, w, b = layer(7, dtype, rows, 60, 50)
    expected = qkv_fast.linear(x, w, b)
    for value in (np.nan, np.inf):
        for i in range(3):
            given = [x.copy(), w.copy(), b.copy()]
            given[i][(2,) * given[i].ndim] = value
            got = qkv_fast.linear(*given)
            same_bits(qkv_fast.Linear(*given[1:])(given[0]), got)
            hit = (2,) if i == 0 else (slice(None), 2)
            assert not np.isfinite(got[hit].astype("float64")).any()
            got[hit] = expected[hit]
            same_bits(got, expected)


@dtypes
@pytest.mark.parametrize("place", ["at_start", "at_end"])
@pytest.mark.parametrize("rows", [5, 70])
def test_nothing_beyond_the_arrays(dtype, place, rows):
    for n_in, n_out in ((1, 3), (17, 29), (1030, 50)):
        arrays = layer(8, dtype, rows, n_in, n_out)
        expected = qkv_fast.linear(*arrays)
        fenced = [Fence(a.nbytes).put(a, place) for a in arrays]
        out = Fence(expected.nbytes).put(np.zeros_like(expected), place)
        same_bits(qkv_fast.linear(*fenced, out=out).copy(), expected)
        same_bits(qkv_fast.Linear(*fenced[1:])(fenced[0], out=out).copy(), expected)


@dtypes
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("heads, kv_heads", [(4, None), (6, 2), (1, 1)])
def test_project_qkv(dtype, layout, heads, kv_heads):
    few = kv_heads or heads
    x, w, b = layer(9, dtype, (2, 11), 24, (heads + 2 * few) * 8)
    y = qkv_fast.linear(x, w, b).reshape(2, 11, -1, 8)
    parts = np.split(y, [heads, heads + few], axis=2)
    for got in (
        qkv_fast.project_qkv(x, w, b, heads, kv_heads, layout=layout),
        qkv_fast.project_qkv(x, qkv_fast.Linear(w, b), None, heads, kv_heads, layout=layout),
    ):
        assert got[0].base is got[2].base is not None
        for part, expected in zip(got, parts, strict=True):
            expected = expected if layout == "blhd" else expected.swapaxes(1, 2)
            same_bits(np.ascontiguousarray(part), np.ascontiguousarray(expected))


@dtypes
@pytest.mark.parametrize("place", ["at_start", "at_end"])
def test_project_qkv_of_fenced_strided_and_poisoned_arrays(dtype, place):
    x, w, b = layer(11, dtype, (2, 11), 24, 32)
    expected = qkv_fast.project_qkv(x, w, b, 2, 1, num_threads=1)
    arrays = [Fence(a.nbytes).put(a, place) for a in (x, w, b)]
    for given in (arrays, (np.asfortranarray(x), w[::-1].copy()[::-1], b)):
        for threads in (1, 2, 5):
            for part, want in zip(qkv_fast.project_qkv(*given, 2, 1, num_threads=threads), expected, strict=True):
                same_bits(part.copy(), want.copy())
    for alone, want in zip(qkv_fast.project_qkv(x[1:], w, b, 2, 1), expected, strict=True):
        same_bits(alone.copy(), want[1:].copy())
    bad, dirty = x.copy(), w.copy()
    bad[1, 3, 5], dirty[20, 0] = np.nan, np.nan  # of token 3; and of row 16 + 4, of keys
    for part, want in zip(qkv_fast.project_qkv(bad, w, b, 2, 1), expected, strict=True):
        assert np.isnan(part[1, :, 3].astype("float64")).all()
        part[1, :, 3] = want[1, :, 3]
        same_bits(part.copy(), want.copy())
    q, k, v = qkv_fast.project_qkv(x, dirty, b, 2, 1)
    assert np.isnan(k[..., 4].astype("float64")).all()
    k[..., 4] = expected[1][..., 4]
    for part, want in zip((q, k, v), expected, strict=True):
        same_bits(part.copy(), want.copy())


def test_project_qkv_of_one_sequence():
    x, w, _ = layer(10, "float32", 5, 8, 24)
    q, k, v = qkv_fast.project_qkv(x, w, None, 2)
    assert q.shape == k.shape == v.shape == (2, 5, 4)
