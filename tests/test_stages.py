"""scores, softmax and weighted_values: right on every CPU path, wherever arrays lie, and the same bits each time.

The error rule is attention's (_util): with `exact` the reference in the next wider type, at most twice the error of
plain NumPy in the same type, plus 4 eps times the size of the result's terms.
"""

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from _fence import Fence
from _patterns import PATTERNS
from _util import TYPES, general_product, no_change, normal, pairs, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime, reference

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)
layouts = pytest.mark.parametrize("layout", ["bhld", "blhd"])


@dataclass
class Stage:
    """One function with arguments for it."""

    name: str
    arrays: list
    options: dict

    def __call__(self, *arrays, **more):
        given = {**self.options, **more}
        if self.name == "softmax" and len(arrays or self.arrays) == 2:
            x, given["mask"] = arrays or self.arrays
            return qkv_fast.softmax(x, **given)
        return getattr(qkv_fast, self.name)(*(arrays or self.arrays), **given)


def stages(seed, dtype, *, batch=(2,), heads=(4, 2), lengths=(21, 130), dims=(12, 10)):
    """The three of them, on random arrays of these shapes; softmax along every axis, and with a mask."""
    q, k, v = qkv(seed, dtype, batch=batch, heads=heads, lengths=lengths, dims=dims)
    x = normal(np.random.default_rng(seed), (*batch, heads[0], *lengths), dtype) * 3
    mask = np.random.default_rng(seed).random(x.shape) < 0.7
    p = reference.softmax(x).astype(dtype)
    yield Stage("scores", [q, k], {})
    yield Stage("weighted_values", [p, v], {})
    for axis in range(-x.ndim, 0):
        yield Stage("softmax", [x], dict(axis=axis))
    yield Stage("softmax", [x, mask], dict(axis=-1))
    yield Stage("softmax", [x, mask], dict(axis=-2))


def plain_softmax(x, axis, mask):
    x = x if mask is None else np.where(mask, x, x.dtype.type(-np.inf))
    top = x.max(axis=axis, keepdims=True, initial=-np.inf)
    p = np.exp(x - np.where(top == -np.inf, x.dtype.type(0), top))
    total = p.sum(axis=axis, keepdims=True)
    return p / np.where(total == 0, x.dtype.type(1), total)


def within(got, exact, usual, size):
    """The error rule."""
    assert got.shape == exact.shape and got.dtype == usual.dtype
    error = np.abs(got - exact).max(initial=0)
    bound = 2 * np.abs(usual - exact).max(initial=0) + 4 * np.finfo(got.dtype).eps * size
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def check_scores(q, k, **options):
    got = qkv_fast.scores(q, k, **options)
    group = q.shape[-3] // k.shape[-3]
    usual = general_product(q, np.repeat(k, group, -3).swapaxes(-1, -2))
    usual = usual * q.dtype.type(options.get("scale", q.shape[-1] ** -0.5 if q.shape[-1] else 1))
    exact = reference.scores(q, k, **options)
    within(got, exact, usual, np.abs(exact).max(initial=0))
    return got


def check_values(p, v):
    got = qkv_fast.weighted_values(p, v)
    usual = general_product(p, np.repeat(v, p.shape[-3] // v.shape[-3], -3))
    within(got, reference.weighted_values(p, v), usual, np.abs(v).max(initial=0))
    return got


def check_softmax(x, axis=-1, mask=None):
    got = qkv_fast.softmax(x, axis, mask=mask)
    within(got, reference.softmax(x, axis, mask=mask), plain_softmax(x, axis, mask), 1)
    return got


@dtypes
def test_every_length_and_dimension(dtype, request):
    for n, (i, j) in enumerate(pairs(130, full=request.config.getoption("--full"))):
        q, k, v = qkv(n, dtype, heads=(2, 1), lengths=(i, j), dims=(j, i))
        p = check_softmax(check_scores(q, k))
        check_softmax(q, 1)
        check_values(p, v)
        check_scores(q[:, :3], k[:, : 130 - j])
        check_values(p[:, :3, :7], v[:, :7])


@dtypes
@pytest.mark.parametrize("lengths, dims", [((70, 3000), (300, 40)), ((3, 9), (1025, 1200)), ((1, 5000), (64, 64))])
def test_long(dtype, lengths, dims):
    """Several passes of keys and terms, several column tiles, dimensions beyond those of attention."""
    q, k, v = qkv(1, dtype, batch=(2,), heads=(4, 2), lengths=lengths, dims=dims)
    check_values(check_softmax(check_scores(q, k)), v)


@dtypes
@pytest.mark.parametrize("n", [1023, 1024, 1025, 5000, 140_001, 1_100_000])
def test_long_rows(dtype, n):
    """Rows that are summed in blocks, that fit no cache, and that are copied in pieces; a column of each."""
    x = normal(np.random.default_rng(n), (3, n), dtype) * 5
    got = check_softmax(x)
    assert np.abs(got.sum(-1, dtype="float64") - 1).max() < 40 * np.finfo(dtype).eps
    for view in (x.astype(x.dtype.newbyteorder("S")), np.asfortranarray(x), np.repeat(x, 2, -1)[:, ::2]):
        same_bits(np.ascontiguousarray(qkv_fast.softmax(view)), got)
    same_bits(qkv_fast.softmax(x.T, 0).T.copy(), got)
    same_bits(qkv_fast.softmax(np.ascontiguousarray(x.T), 0).T.copy(), got)
    out = x.copy()
    assert qkv_fast.softmax(out, out=out) is out
    same_bits(out, got)


@dtypes
def test_results_larger_than_the_caches(dtype):
    """Those are written past them, from and to any alignment, the same bits as piece by piece."""
    n = 3000 if dtype == "float32" else 2100
    x = normal(np.random.default_rng(2), (n, n), dtype)
    assert x.nbytes > 32 << 20
    mask = np.random.default_rng(2).random((n, n)) < 0.5
    room = np.empty(x.size + 100, dtype)
    for axis, given, shift in itertools.product((0, 1), (None, mask), (0, 3)):
        start = -room.ctypes.data % 64 // x.itemsize + shift
        out = room[start : start + x.size].reshape(x.shape)
        got = qkv_fast.softmax(x, axis, mask=given, out=out)
        for first in (0, 1000, n - 50):
            rows = (slice(first, first + 50), slice(None))[:: 1 if axis else -1]
            same_bits(
                got[rows].copy(), qkv_fast.softmax(x[rows], axis, mask=None if given is None else mask[rows]).copy()
            )


@dtypes
@layouts
def test_stages_make_attention(dtype, layout):
    for heads, lengths, dims in (
        ((6, 2), (40, 200), (64, 64)),
        ((1, 1), (1, 3000), (24, 80)),
        ((8, 8), (100, 7), (5, 3)),
    ):
        q, k, v = qkv(3, dtype, batch=(2,), heads=heads, lengths=lengths, dims=dims)
        if layout == "blhd":
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        p = qkv_fast.softmax(qkv_fast.scores(q, k, layout=layout))
        got = qkv_fast.weighted_values(p, v, layout=layout)
        expected = qkv_fast.attention(q, k, v, layout=layout)
        # Each is within attention's rule of the exact result, where max|v| and the scores are below 6.
        assert got.shape == expected.shape and np.abs(got - expected).max() < 60 * np.finfo(dtype).eps


@dtypes
@pytest.mark.parametrize("scale", [0, -1, 3, -0.125, 1e-30, 1e30, 1e-300, 1e300])
def test_scales(dtype, scale):
    q, k, _ = qkv(4, dtype, lengths=(5, 50), dims=(20, 1))
    if abs(scale) > 1e9:
        k *= q.dtype.type(1e-36 if dtype == "float32" else 1e-290)
    with np.errstate(over="ignore", under="ignore"):
        exact = reference.scores(q, k, scale=scale)
        limit = np.finfo(dtype)
        usual = (
            general_product(q.astype("f8"), k.swapaxes(-1, -2).astype("f8")) * scale
        )  # the factor fits float64 alone
        got = qkv_fast.scores(q, k, scale=scale)
        expected = usual.astype(dtype)
    finite = np.isfinite(expected)
    assert np.array_equal(np.isfinite(got), finite) and np.array_equal(got[~finite], expected[~finite])
    tolerance = 40 * limit.eps * np.abs(exact).max(initial=0, where=finite) + 40 * float(limit.smallest_normal)
    assert np.abs(got - exact).max(initial=0, where=finite) <= tolerance


@dtypes
@pytest.mark.parametrize("name", PATTERNS)
def test_input_patterns(dtype, name):
    for n, lq in enumerate((1, 21)):
        for stage in stages(n, dtype, lengths=(lq, 130)):
            expected = stage()
            views = [PATTERNS[name](x) if x.dtype != bool or "swapped" not in name else x for x in stage.arrays]
            for which in {(0,), (len(views) - 1,), tuple(range(len(views)))}:
                args = [views[i] if i in which else x for i, x in enumerate(stage.arrays)]
                with no_change(*args):
                    same_bits(np.ascontiguousarray(stage(*args)), expected)


@dtypes
@layouts
def test_layouts(dtype, layout):
    """Heads and lengths swapped, in memory or by a view."""
    q, k, v = qkv(5, dtype, batch=(2,), heads=(4, 2), lengths=(21, 130), dims=(12, 10))
    swap = (lambda x: np.ascontiguousarray(x.swapaxes(1, 2))) if layout == "blhd" else (lambda x: x)
    s = qkv_fast.scores(swap(q), swap(k), layout=layout)
    same_bits(s, qkv_fast.scores(q, k))
    expected = swap(qkv_fast.weighted_values(s, v))
    out = np.empty_like(expected)
    same_bits(qkv_fast.weighted_values(s, swap(v), layout=layout), expected)
    assert qkv_fast.weighted_values(s, swap(v), layout=layout, out=out) is out
    same_bits(out, expected)


@dtypes
def test_zero_strides(dtype):
    for stage in stages(6, dtype):
        for axes in ((0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)):
            first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))
            views = [np.broadcast_to(x[first], x.shape) for x in stage.arrays]
            same_bits(np.ascontiguousarray(stage(*views)), np.ascontiguousarray(stage(*(x.copy() for x in views))))


@dtypes
@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "read-only"])
def test_out_patterns(dtype, name):
    """out= is filled, and nothing beside its elements is written."""
    for stage in stages(7, dtype):
        expected = stage()
        out = PATTERNS[name](np.full_like(expected, 7))
        base = out
        while isinstance(base.base, np.ndarray):
            base = base.base
        before = base.tobytes("A")
        assert stage(out=out) is out
        np.testing.assert_array_equal(out, expected)
        out[...] = 7
        assert base.tobytes("A") == before


@dtypes
def test_out_overlaps_an_input(dtype):
    n = 40
    for stage in stages(8, dtype, heads=(2, 2), lengths=(n, n), dims=(n, n)):
        expected = stage()
        for which, view in itertools.product(
            range(len(stage.arrays)), (np.s_[:, :, 1:], np.s_[:, :, :-1], np.s_[:, :, :0:-1])
        ):
            if stage.arrays[which].dtype == bool:
                continue
            big = np.zeros((2, 2, n + 1, n), dtype)
            big[:, :, 1:] = stage.arrays[which]
            args = list(stage.arrays)
            args[which] = big[:, :, 1:]
            assert stage(*args, out=big[view]).base is big
            same_bits(big[view].copy(), expected)


def test_out_overlaps_the_mask():
    x = normal(np.random.default_rng(9), (4, 64))
    out = np.zeros((4, 64), "float32")
    mask = out.view(bool)[:, :64]
    mask[:, ::3] = True
    same_bits(qkv_fast.softmax(x, mask=mask, out=out), qkv_fast.softmax(x, mask=np.arange(64) % 3 == 0))


@dtypes
def test_bits(dtype):
    """The same for any number of threads and run, alone and in a batch, and for a head among others."""
    for stage in stages(10, dtype, lengths=(200, 700), dims=(40, 72)):
        one = stage(num_threads=1)
        for n in (2, 3, 8):
            with _runtime.counters() as seen:
                same_bits(stage(num_threads=n), one)
            assert seen["threads"] == n and seen["tasks"] >= n
        if stage.options.get("axis", -1) < -2:  # heads and batch are what it sums over
            continue
        for b in range(2):
            same_bits(stage(*(x[b] for x in stage.arrays)), one[b])
        if stage.name == "softmax":
            same_bits(stage(*(x[:, 1:2] for x in stage.arrays)), one[:, 1:2])
        else:
            a, b = stage.arrays
            same_bits(stage(a[:, 2:], b[:, 1:]), one[:, 2:])
            same_bits(stage(a[:, :, 5:6], b), one[:, :, 5:6])


@dtypes
def test_softmax_bits_along_any_axis(dtype):
    """An axis in memory order and one across it; lengths about a vector, a block, a strip."""
    for n, m in ((1, 5), (3, 17), (16, 16), (33, 300), (1030, 40), (2100, 3)):
        x = normal(np.random.default_rng(n), (2, m, n), dtype) * 4
        mask = np.random.default_rng(n).random(x.shape) < 0.5
        for given in (None, mask):
            expected = qkv_fast.softmax(x, mask=given)
            for order in itertools.permutations(range(3)):
                turned = np.ascontiguousarray(x.transpose(order))
                hidden = None if given is None else mask.transpose(order)
                got = qkv_fast.softmax(turned, order.index(2), mask=hidden)
                assert got.flags.c_contiguous
                same_bits(np.ascontiguousarray(got.transpose(np.argsort(order))), expected)


@dtypes
@pytest.mark.parametrize("axis", [-1, -2])
def test_masks(dtype, axis):
    """What is hidden never matters; nothing visible, be it hidden or -inf, is 0; every broadcast of a mask."""
    rng = np.random.default_rng(11)
    x = normal(rng, (3, 50, 70), dtype)
    mask = rng.random(x.shape) < 0.6
    mask[0, 4], mask[1, :, 7] = False, False
    x[2, 5], x[2, :, 9] = -np.inf, -np.inf
    clean = check_softmax(x, axis, mask)
    assert not clean[~mask].any() and np.isfinite(clean).all()
    for poison in (np.nan, np.inf, -np.inf, np.finfo(dtype).max):
        same_bits(qkv_fast.softmax(np.where(mask, x, x.dtype.type(poison)), axis, mask=mask), clean)
    for shape in ((1, 50, 70), (3, 1, 70), (3, 50, 1), (70,), (50, 1), (1, 1, 1), ()):
        part = rng.random(shape) < 0.5
        got = check_softmax(x, axis, part)
        same_bits(got, qkv_fast.softmax(x, axis, mask=np.broadcast_to(part, x.shape).copy()))
    assert not qkv_fast.softmax(x, axis, mask=False).any()
    same_bits(qkv_fast.softmax(x, axis, mask=True), qkv_fast.softmax(x, axis))


@dtypes
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_softmax_of_nan_and_inf(dtype, axis, poison):
    """NaN, or +inf by inf - inf, makes all along its axis NaN, wherever it stands, and nothing else."""
    x = normal(np.random.default_rng(12), (70, 70), dtype)
    clean = qkv_fast.softmax(x, axis)
    for at in (0, 3, 15, 16, 63, 64, 69):
        bad = x.copy()
        bad[at, at] = poison
        got = qkv_fast.softmax(bad, axis)
        across = np.moveaxis(got, axis, -1)
        assert np.isnan(across[at]).all() and np.isnan(reference.softmax(bad, axis)).sum() == 70
        same_bits(np.delete(across, at, 0), np.delete(np.moveaxis(clean, axis, -1), at, 0))


@dtypes
def test_products_of_nan_and_inf(dtype):
    """IEEE arithmetic: only the rows, or columns, of what is not finite, and 0 * NaN is NaN."""
    for n, stage in enumerate(s for s in stages(13, dtype, heads=(1, 1)) if s.name != "softmax"):
        clean = stage()
        a, b = (x.copy() for x in stage.arrays)
        a[0, 0, 3, 5], a[1, 0, 4, 6] = np.nan, np.inf
        got = stage(a, b)
        assert np.isnan(got[0, 0, 3]).all() and not np.isfinite(got[1, 0, 4]).any()
        same_bits(np.delete(got, (3, 4), 2), np.delete(clean, (3, 4), 2))
        a, b = (x.copy() for x in stage.arrays)
        b[0, 0, 7, 2], a[0, 0, :, 7 if n else 2] = np.nan, 0
        got = stage(a, b)
        row_or_column = got[0, 0, :, 2 if n else 7]
        assert np.isnan(row_or_column).all() and np.isnan(got).sum() == row_or_column.size


@dtypes
def test_empty(dtype):
    for q, k, v in (
        ((2, 0, 4), (1, 5, 4), (1, 5, 3)),
        ((2, 3, 4), (2, 0, 4), (2, 0, 3)),
        ((2, 3, 0), (1, 5, 0), (1, 5, 0)),
    ):
        q, k, v = (np.ones(shape, dtype) for shape in (q, k, v))
        s = qkv_fast.scores(q, k)
        assert s.shape == (2, q.shape[1], k.shape[1]) and not s[..., : 0 if q.shape[2] else None].any()
        for axis in range(3):
            assert qkv_fast.softmax(s, axis).shape == s.shape
        out = qkv_fast.weighted_values(s, v, out=np.full((2, q.shape[1], v.shape[2]), 7, dtype))
        assert not out.any()


@dtypes
def test_narrower_second_operand(dtype):
    """float32 keys and values with float64 queries and weights."""
    q, k, v = qkv(14, "float32", lengths=(20, 30))
    wide = q.astype(dtype)
    same_bits(qkv_fast.scores(wide, k), qkv_fast.scores(wide, k.astype(dtype)))
    p = qkv_fast.softmax(qkv_fast.scores(wide, k))
    same_bits(qkv_fast.weighted_values(p, v), qkv_fast.weighted_values(p, v.astype(dtype)))


def test_order_of_a_new_result():
    """As x lies in memory, in native byte order."""
    x = np.zeros((4, 5, 6), ">f4").transpose(2, 0, 1)
    got = qkv_fast.softmax(x)
    assert got.strides == x.strides and got.dtype == np.float32 and got.dtype.isnative


@dtypes
def test_copies_are_counted(dtype):
    """What lies well is used where it lies; of the rest the counters tell."""
    for stage in stages(15, dtype):
        for name, copied in (("read-only", False), ("byte-swapped", True), ("every second element", True)):
            with _runtime.counters() as seen:
                stage(PATTERNS[name](stage.arrays[0]), *stage.arrays[1:])
            assert (seen["tiles_copied"] > 0) == copied, (stage.name, name)


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@dtypes
@pytest.mark.parametrize("place", ["at_end", "at_start"])
def test_guard_pages(dtype, place, fences):
    for n, (i, j) in enumerate([*pairs(130, full=False)[::2], (1, 2000), (2000, 1), (64, 64)]):
        for stage in stages(n, dtype, batch=(), heads=(2, 1), lengths=(i, j), dims=(j % 70 + 1, i % 70 + 1)):
            expected = stage()
            args = [fence.put(x, place) for fence, x in zip(fences, stage.arrays, strict=False)]
            out = fences[2].put(np.full_like(expected, np.nan), place)
            stage(*args, out=out)
            same_bits(out.copy(), expected)


@pytest.fixture(scope="module")
def fences():
    return [Fence(1 << 21) for _ in range(3)]


@dtypes
@pytest.mark.parametrize("form", ["plain", "copied"])
def test_every_allocation_may_fail(dtype, form):
    for stage in stages(16, dtype, lengths=(100, 400), dims=(64, 64)):
        expected = stage()
        if form == "copied":
            stage.arrays[0] = stage.arrays[0].astype(stage.arrays[0].dtype.newbyteorder("S"))
        for n in itertools.count():
            _runtime.trim()
            with _runtime.fail_allocation(n) as allocations:
                try:
                    got = stage(num_threads=2)
                except MemoryError:
                    got = None
                count = allocations.count
            if got is not None:
                break
            assert count == n + 1
        same_bits(got, expected)
        assert n >= 2 and count <= n
