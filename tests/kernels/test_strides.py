"""Every way an array can lie in memory, as input and as out=: the bits are those of the contiguous array."""

import itertools
import mmap
import sys

import numpy as np
import pytest
from _patterns import PATTERNS, fits, readonly
from _util import ALL_TYPES, TYPES, check, no_change, normal, qkv, same_bits
from numpy.lib.stride_tricks import as_strided

import qkv_fast

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)
all_dtypes = pytest.mark.parametrize("dtype", ALL_TYPES)


SHAPES = dict(batch=(2,), heads=(4, 2), lengths=(21, 130), dims=(12, 10))


@pytest.mark.parametrize("dtype, name", [(t, n) for t in ALL_TYPES for n in PATTERNS if fits(n, t)])
def test_input_pattern(dtype, name):
    """Each of q, k and v in turn, then all three, with and without key limits, for many rows and for one."""
    pattern = PATTERNS[name]
    for n, lq in enumerate((1, 3, 21)):
        q, k, v = qkv(n, dtype, **dict(SHAPES, lengths=(lq, 130)))
        views = [pattern(x) for x in (q, k, v)]
        for x, view in zip((q, k, v), views, strict=True):
            np.testing.assert_array_equal(x, view)
        for options in ({}, dict(causal=True, kv_lengths=[130, 99])):
            expected = check(q, k, v, **options)
            for which in ((0,), (1,), (2,), (0, 1, 2)):
                args = [views[i] if i in which else x for i, x in enumerate((q, k, v))]
                with no_change(*args):
                    same_bits(qkv_fast.attention(*args, return_lse=True, **options), expected)


@dtypes
def test_input_patterns_pairwise(dtype, request):
    """Pairs of patterns for k and v, and another for q; all pairs under --exhaustive."""
    q, k, v = qkv(1, dtype, **SHAPES)
    expected = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    names = list(PATTERNS)
    every = request.config.getoption("--exhaustive")
    for i, j in itertools.product(range(len(names)), repeat=2):
        if every or (i + 3 * j) % 7 == 0:
            args = PATTERNS[names[(i + j) % len(names)]](q), PATTERNS[names[i]](k), PATTERNS[names[j]](v)
            same_bits(qkv_fast.attention(*args, causal=True, return_lse=True), expected)


@all_dtypes
@pytest.mark.parametrize("lq", [1, 21])
def test_zero_strides(dtype, lq):
    """Broadcast rows, heads, dimensions and single elements stand for their copies."""
    q, k, v = qkv(2, dtype, **dict(SHAPES, lengths=(lq, 130)))
    for axes in ((0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)):
        first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))
        views = [np.broadcast_to(x[first], x.shape) for x in (q, k, v)]
        assert all(not view.strides[axis] for view in views for axis in axes)
        copies = [view.copy() for view in views]
        for which in ((0,), (1,), (2,), (0, 1, 2)):
            args = [views[i] if i in which else x for i, x in enumerate(copies)]
            same_bits(qkv_fast.attention(*args, causal=True), qkv_fast.attention(*copies, causal=True))


@all_dtypes
def test_sliding_rows(dtype):
    """Rows that overlap one another, as sliding_window_view makes them."""
    rng = np.random.default_rng(3)
    line = normal(rng, 200, dtype)
    k = np.lib.stride_tricks.sliding_window_view(line, 16)  # (185, 16), both strides one element
    q, v = k[:20], k[::-1, :5]
    same_bits(qkv_fast.attention(q, k, v), qkv_fast.attention(q.copy(), k.copy(), v.copy()))


@all_dtypes
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_packed_qkv(dtype, layout):
    """The views of a packed projection: (B, L, 3, H, D), (B, L, H, 3, D), and (B, L, Hq + 2 Hkv, D)."""
    rng = np.random.default_rng(4)
    wide = normal(rng, (2, 65, 3, 4, 8), dtype)
    inner = normal(rng, (2, 65, 4, 3, 8), dtype)
    grouped = normal(rng, (2, 65, 8, 8), dtype)
    for views in (
        [wide[:, :, i] for i in range(3)],
        [inner[:, :, :, i] for i in range(3)],
        [grouped[:, :, :4], grouped[:, :, 4:6], grouped[:, :, 6:]],
    ):
        if layout == "bhld":
            views = [x.swapaxes(1, 2) for x in views]
        expected = check(*(np.ascontiguousarray(x) for x in views), layout=layout, causal=True)
        same_bits(qkv_fast.attention(*views, layout=layout, causal=True, return_lse=True), expected)


@all_dtypes
def test_rows_that_share_cache_sets(dtype):
    """Keys a multiple of 1 KiB apart may be copied to scratch first: the same bits."""
    q, k, v = qkv(5, dtype, lengths=(70, 300), dims=(64, 64))
    expected = check(q, k, v)
    for stride in (1024, 4096):
        wide = [np.full((1, 300, stride // x.itemsize), np.nan, dtype) for x in (k, v)]
        for x, y in zip(wide, (k, v), strict=True):
            x[..., :64] = y
        same_bits(qkv_fast.attention(q, wide[0][..., :64], wide[1][..., :64], return_lse=True), expected)


@all_dtypes
def test_memory_map(dtype, tmp_path):
    q, k, v = qkv(6, dtype, **SHAPES)
    expected = qkv_fast.attention(q, k, v)
    maps = []
    for name, x in zip("qkv", (q, k, v), strict=True):
        (tmp_path / name).write_bytes(b"\1\2\3" + x.tobytes())
        maps.append(np.memmap(tmp_path / name, dtype, "r", offset=3, shape=x.shape))
    got = qkv_fast.attention(*maps)
    assert type(got) is np.ndarray
    same_bits(got, expected)
    out = np.memmap(tmp_path / "out", dtype, "w+", shape=expected.shape)
    assert qkv_fast.attention(*maps, out=out) is out
    same_bits(np.asarray(out), expected)


@pytest.mark.parametrize(
    "dtype, name", [(t, n) for t in ALL_TYPES for n in PATTERNS if fits(n, t) and n != "read-only"]
)
def test_out_pattern(dtype, name):
    """out= in every pattern is filled, and nothing beside its elements is written."""
    for lq in (1, 3, 70):
        q, k, v = qkv(7, dtype, **dict(SHAPES, lengths=(lq, 130)))
        expected = qkv_fast.attention(q, k, v, causal=True)
        out = PATTERNS[name](np.full_like(expected, 7))
        base = out
        while isinstance(base.base, np.ndarray):
            base = base.base
        before = np.frombuffer(base.tobytes("A"), np.uint8).copy()
        assert qkv_fast.attention(q, k, v, causal=True, out=out) is out
        np.testing.assert_array_equal(out, expected)
        out[...] = 7  # puts back all that was allowed to change
        np.testing.assert_array_equal(np.frombuffer(base.tobytes("A"), np.uint8), before)


@all_dtypes
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_out_overlaps_an_input(dtype, layout):
    """q, k or v itself, reversed, shifted by a row, or another view of its memory."""
    for lq, lk in ((40, 40), (1, 1), (2, 2)):
        shape = dict(batch=(2,), heads=(2, 2), lengths=(lq, lk), dims=(8, 8))
        for which in range(3):
            for view in (
                np.s_[:, :, 1:],
                np.s_[:, :, :-1],
                np.s_[:, :, :0:-1],
                np.s_[:, ::-1, 1:],
                np.s_[::-1, :, 1:, ::-1],
            ):
                rng = np.random.default_rng(which)
                big = normal(rng, (2, 2, lq + 1, 8), dtype)
                args = list(qkv(8, dtype, **shape))
                args[which] = big[:, :, 1:]
                out = big[view]
                if layout == "blhd":
                    args, out = [x.swapaxes(1, 2) for x in args], out.swapaxes(1, 2)
                options = dict(layout=layout, causal=True, return_lse=True)
                expected = qkv_fast.attention(*(x.copy() for x in args), **options)
                got = qkv_fast.attention(*args, out=out, **options)
                assert got[0] is out
                same_bits(got, expected)


@all_dtypes
def test_out_overlaps_all_inputs(dtype):
    rng = np.random.default_rng(9)
    x = normal(rng, (2, 33, 8), dtype)
    expected = qkv_fast.attention(x.copy(), x.copy(), x.copy(), causal=True)
    got = qkv_fast.attention(x, x, x, causal=True, out=x)
    assert got is x
    same_bits(x, expected)


@dtypes
def test_out_between_the_elements_of_an_input(dtype):
    """Interleaved memory that does not overlap: written without harm to the neighbours."""
    q, k, v = qkv(10, dtype, dims=(8, 8))
    both = np.zeros((*q.shape, 2), dtype)
    both[..., 0] = q
    qkv_fast.attention(both[..., 0], k, v, out=both[..., 1])
    same_bits(both[..., 0].copy(), q)
    same_bits(both[..., 1].copy(), qkv_fast.attention(q, k, v))


@dtypes
def test_more_than_2_32_elements(dtype):
    """Stride 0 stands for 2**40 keys; kv_lengths or a window near either end leave few to see, at once."""
    q, k, v = qkv(11, dtype, lengths=(5, 1), dims=(8, 4))
    lk = 2**40
    k, v = as_strided(k, (1, lk, 8), (0, 0, k.itemsize)), as_strided(v, (1, lk, 4), (0, 0, v.itemsize))
    expected = qkv_fast.attention(q, k[:, :100], v[:, :100], return_lse=True)
    same_bits(qkv_fast.attention(q, k, v, kv_lengths=100, return_lse=True), expected)
    for offset in (0, 2**31 - 50, 2**32 - 50, 2**32 + 1, lk - 5):
        for lq in (1, 5):
            options = dict(causal=True, q_offset=offset, return_lse=True)
            out, lse = qkv_fast.attention(q[:, :lq], k, v, window=20, **options)
            n = np.minimum(np.arange(offset, offset + lq) + 1, 21)
            np.testing.assert_array_equal(np.round(np.exp(lse - _score(q[:, :lq], k))), n[np.newaxis])
            # every value is the same, so their mean is that value, to the rounding of the sum
            np.testing.assert_allclose(
                out, np.broadcast_to(v[:, :1], out.shape), rtol=30 * np.finfo(dtype).eps
            )
    far = qkv_fast.attention(q, k, v, causal=True, window=3, kv_lengths=lk - 7, return_lse=True)
    near = qkv_fast.attention(q, k, v, causal=True, window=3, kv_lengths=2**20, return_lse=True)
    np.testing.assert_allclose(far[1], near[1], rtol=8 * np.finfo(dtype).eps)  # the keys cut at other places
    # more than 2**32 sequences, without a query
    none = as_strided(np.zeros(1, dtype), (2**33, 2, 0, 8), (0, 0, 0, 0))
    assert qkv_fast.attention(none, none, none).shape == (2**33, 2, 0, 8)


def _score(q, k):
    return (q.astype("float64") @ k[:, :1].astype("float64").swapaxes(1, 2))[..., 0] / np.sqrt(q.shape[-1])


@pytest.mark.skipif(sys.platform == "win32", reason="files are not sparse there")
@dtypes
def test_element_beyond_2_32(dtype, tmp_path):
    """A sparse file with more than 2**32 elements of k, of which the last few matter."""
    dim, lk = 64, 2**26 + 1000
    q = normal(np.random.default_rng(12), (3, dim), dtype)
    path = tmp_path / "sparse"
    size = lk * dim * np.dtype(dtype).itemsize
    assert size // np.dtype(dtype).itemsize > 2**32
    with open(path, "wb") as file:
        file.truncate(size)
    k = np.memmap(path, dtype, "r+", shape=(lk, dim))
    k[-50:] = normal(np.random.default_rng(13), (50, dim), dtype)
    tail = np.array(k[-50:])
    expected = qkv_fast.attention(q, tail, tail[:, ::-1], causal=True, window=20)
    options = dict(causal=True, window=20)
    eps = np.finfo(dtype).eps  # other block bounds sum in another order: twice the rule's constant
    tolerance = dict(rtol=0, atol=8 * eps * np.abs(tail).max())
    np.testing.assert_allclose(qkv_fast.attention(q, k, k[:, ::-1], **options), expected, **tolerance)
    back = k[::-1]  # and with rows that run backwards from the far end
    expected = qkv_fast.attention(q, tail[::-1], tail[::-1], q_offset=10, **options)
    np.testing.assert_allclose(
        qkv_fast.attention(q, back, back, q_offset=10, **options), expected, **tolerance
    )
    del k, back
    path.unlink()


@all_dtypes
def test_read_only_everything(dtype):
    arrays = [readonly(x) for x in qkv(14, dtype, **SHAPES)]
    lengths, offset = readonly(np.array([100, 130])), readonly(np.array([3, 109]))
    out = qkv_fast.attention(*arrays, kv_lengths=lengths, q_offset=offset, causal=True)
    same_bits(
        out,
        qkv_fast.attention(
            *(x.copy() for x in arrays), kv_lengths=[100, 130], q_offset=[3, 109], causal=True
        ),
    )


@dtypes
def test_read_only_pages(dtype, tmp_path):
    """Memory that the system itself keeps from being written."""
    arrays = qkv(15, dtype)
    views = []
    for name, x in zip("qkv", arrays, strict=True):
        path = tmp_path / name
        path.write_bytes(x.tobytes())
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        views.append(np.frombuffer(mapped, dtype).reshape(x.shape))
    same_bits(qkv_fast.attention(*views), qkv_fast.attention(*arrays))
