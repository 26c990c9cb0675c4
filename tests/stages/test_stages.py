"""scores, softmax and weighted_values: right on every CPU path, wherever arrays lie, and the same bits each time."""

import itertools
import sys

import numpy as np
import pytest
from _fence import Fence
from _patterns import PATTERNS
from _stages import check_scores, check_softmax, check_softmax_grad, check_values, stages
from _util import ALL_TYPES, HALVES, TYPES, general_product, no_change, normal, pairs, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime, reference

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)
layouts = pytest.mark.parametrize("layout", ["bhld", "blhd"])


@dtypes
def test_every_length_and_dimension(dtype, request):
    for n, (i, j) in enumerate(pairs(130, full=request.config.getoption("--exhaustive"))):
        q, k, v = qkv(n, dtype, heads=(2, 1), lengths=(i, j), dims=(j, i))
        p = check_softmax(check_scores(q, k))
        check_softmax(q, 1)
        check_softmax_grad(p[::-1], p)
        check_softmax_grad(p[::-1], p, 1)
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
    got, exact, eps = check_softmax(x), reference.softmax(x), np.finfo(dtype).eps
    # Most weights are far below the largest: each is held to its own size. What the exponent is off by, the weight is
    # off by in proportion, and the exponent is rounded as x - max, as its multiple by log2(e), and in the reference
    # where no type is wider: half an eps of it each time. 8: the power, the sum of positive terms, the quotient.
    assert (np.abs(got - exact) <= eps * (1.5 * (x.max(-1, keepdims=True) - x) + 8) * exact).all()
    assert np.abs(got.sum(-1, dtype="float64") - 1).max() < 40 * eps
    for view in (x.astype(x.dtype.newbyteorder("S")), np.asfortranarray(x), np.repeat(x, 2, -1)[:, ::2]):
        same_bits(np.ascontiguousarray(qkv_fast.softmax(view)), got)
    same_bits(qkv_fast.softmax(x.T, 0).T.copy(), got)
    same_bits(qkv_fast.softmax(np.ascontiguousarray(x.T), 0).T.copy(), got)
    out = x.copy()
    assert qkv_fast.softmax(out, out=out) is out
    same_bits(out, got)


@dtypes
@pytest.mark.parametrize("below", [0.5, 4, 16, 32, 64])
def test_error_of_a_small_weight(dtype, below):
    """At most (2 + t) eps of its own size, t below the largest: t is rounded, worst just beyond powers of two."""
    rng, eps = np.random.default_rng(0), np.finfo(dtype).eps
    high = rng.uniform(-40, 40, 20_000).astype(dtype)
    low = (high - rng.uniform(below, 1.2 * below, high.shape)).astype(dtype)
    t = high.astype("longdouble") - low
    error = np.abs(qkv_fast.softmax(np.stack([high, low], axis=1))[:, 1] * (1 + np.exp(t)) - 1)
    assert (error <= (2 + t) * eps).all()
    if dtype == "float32":  # where all differences are rounded that much
        assert below < 16 or (error > (2 + t / 4) * eps).any()


@pytest.mark.parametrize("n", [513, 1030, 2048, 8192])
@pytest.mark.parametrize("spread", [1, 3, 4, 5])
def test_softmax_keeps_the_error_rule(spread, n):
    """At most twice NumPy's error, and 4 eps. A few large weights beside very many small ones: their sum is hard."""
    x = normal(np.random.default_rng(n), (500, n)) * np.float32(spread)
    exact = reference.softmax(x)
    plain = np.exp(x - x.max(-1, keepdims=True))
    plain /= plain.sum(-1, keepdims=True)
    allowed = 2 * np.abs(plain - exact).max() + 4 * np.finfo("float32").eps
    assert np.abs(qkv_fast.softmax(x) - exact).max() <= allowed / 2  # half of it: the order of sums is better than that


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
@pytest.mark.parametrize("columns", [1024, 1040, 1023])  # rows a whole number of vectors apart, and not
def test_large_scores_anywhere(dtype, columns):
    """Beyond 4 MB rows are written past the caches, from their first aligned element on: same bits, nothing around."""
    rows = (5 << 20) // (columns * np.dtype(dtype).itemsize)
    q, k, _ = qkv(12, dtype, lengths=(rows, columns), dims=(17, 1))
    pieces = np.array_split(q, rows // 100, axis=1)  # none of so few rows that another kernel takes them
    expected = np.concatenate([qkv_fast.scores(piece, k) for piece in pieces], axis=1)
    around = 16
    memory = np.empty(rows * columns + 2 * around + 16, dtype)
    for start in range(around, around + 16):
        memory.fill(7)
        out = memory[start : start + rows * columns].reshape(1, rows, columns)
        for threads in (1, 2):
            qkv_fast.scores(q, k, out=out, num_threads=threads)
            same_bits(out.copy(), expected)
        assert (memory[:start] == 7).all() and (memory[start + rows * columns :] == 7).all()


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
def test_huge_scales_of_zeros(dtype):
    """A scale beyond the type times a product of 0 is 0, and below it times infinity is infinity."""
    x = np.ones((3, 5), dtype)
    for scale in (1e75, 1e300, -1e300):
        assert (qkv_fast.scores(0 * x, x, scale=scale) == 0).all()
    assert np.isposinf(qkv_fast.scores(x, np.inf * x, scale=1e-300)).all()


@dtypes
@pytest.mark.parametrize("scale", [0, -1, 3, -0.125, 1e-30, 1e30, 1e-300, 1e300])
def test_scales(dtype, scale):
    q, k, _ = qkv(4, dtype, lengths=(5, 50), dims=(20, 1))
    if abs(scale) > 1e9:
        k *= q.dtype.type(1e-30 if dtype == "float32" else 1e-290)  # products are normal numbers
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
        if stage.name.startswith("softmax"):
            same_bits(stage(*(x[:, 1:2] for x in stage.arrays)), one[:, 1:2])
        else:
            a, b = stage.arrays
            same_bits(stage(a[:, 2:], b[:, 1:]), one[:, 2:])
            if not qkv_fast.isa().startswith("amx"):  # few rows have no tiles
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


@pytest.mark.parametrize("dtype", HALVES)
def test_softmax_of_halves_is_that_of_floats_rounded_once(dtype):
    """Along rows and columns, in place, masked, at odd places, and where copies are needed."""
    rng = np.random.default_rng(5)
    for n, m in ((1, 5), (3, 17), (16, 16), (33, 300), (1030, 70), (140_000, 2)):
        room = (normal(rng, (2, m + 1, n + 1)) * rng.choice([1, 20])).astype(dtype)
        room[0, 0], room[:, 1, ::3] = -np.inf, -np.inf
        for given in (None, rng.random((2, m, n)) < 0.5):
            for x in (room[:, 1:, 1:], room[:, :-1, :-1].copy(), room.swapaxes(1, 2).copy().swapaxes(1, 2)[:, 1:, :-1]):
                expected = qkv_fast.softmax(x.astype("f4"), mask=given).astype(dtype)
                same_bits(qkv_fast.softmax(x, mask=given), expected)
                turned, hidden = x.swapaxes(1, 2).copy(), None if given is None else given.swapaxes(1, 2)
                same_bits(qkv_fast.softmax(turned, 1, mask=hidden, out=turned).swapaxes(1, 2), expected)
                swapped = x.copy() if dtype == "bfloat16" else x.astype(">f2")
                same_bits(qkv_fast.softmax(swapped, mask=given).astype(dtype), expected)


@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize("n", [5, 700, 9000, 300_000])
def test_softmax_gradients(dtype, n):
    """Along rows and across them, of one type and of two; the same bits, in place too."""
    rng = np.random.default_rng(n)
    dp = normal(rng, (3, n), dtype)
    p = reference.softmax(normal(rng, (3, n)) * 3).astype(dtype)
    got = check_softmax_grad(dp, p)
    same_bits(qkv_fast.softmax_grad(np.ascontiguousarray(dp.T), np.ascontiguousarray(p.T), 0).T.copy(), got)
    same_bits(np.ascontiguousarray(qkv_fast.softmax_grad(dp.T, p.T, 0).T), got)
    check_softmax_grad(dp.T, p.T, 1)
    for place in range(2):
        given = [dp.copy(), p.copy()]
        assert qkv_fast.softmax_grad(*given, out=given[place]) is given[place]
        same_bits(given[place], got)
    narrow = p.astype("float16" if dtype in TYPES else dtype)
    same_bits(qkv_fast.softmax_grad(dp, narrow), qkv_fast.softmax_grad(dp, narrow.astype(dtype)))
    check_softmax_grad(dp, narrow)


def test_what_a_softmax_hides_has_no_gradient():
    """Where a weight is 0, whatever is there; a NaN that counts is in all along its axis."""
    for n in (7, 3000):
        rng = np.random.default_rng(n)
        x, dp = normal(rng, (2, 5, n))
        mask = rng.random((5, n)) < 0.5
        mask[3] = False
        p = qkv_fast.softmax(x, mask=mask)
        clean = qkv_fast.softmax_grad(np.where(mask, dp, 0), p)
        for axis, turn in ((-1, np.asarray), (0, lambda x: np.ascontiguousarray(x.T))):
            bad = np.where(mask, dp, np.where(rng.random((5, n)) < 0.5, np.nan, np.inf).astype("f4"))
            got = turn(qkv_fast.softmax_grad(turn(bad), turn(p), axis))
            same_bits(got, clean)
            assert not got[3].any()
            seen = np.argmax(mask[1])
            bad[1, seen] = np.nan
            got = turn(qkv_fast.softmax_grad(turn(bad), turn(p), axis))
            assert (np.isnan(got) == mask * (np.arange(5) == 1)[:, None]).all()
            bad[1, seen] = np.inf
            got = turn(qkv_fast.softmax_grad(turn(bad), turn(p), axis))[1]
            assert np.isnan(got[seen]) and (np.delete(got, seen)[np.delete(mask[1], seen)] == -np.inf).all()


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
            assert qkv_fast.softmax(s, axis).shape == qkv_fast.softmax_grad(s, s, axis).shape == s.shape
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
@pytest.mark.parametrize("dtype", ALL_TYPES)
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
