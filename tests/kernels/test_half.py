"""float16 and bfloat16: widened exactly, computed in float32, rounded once; alone, and mixed with wider queries.

Strides, guard pages and NaN of both types are in the files of those names; the error rule is in _util.compare.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest
from _util import HALVES, check, child_says, compare, qkv, same_bits, unit, weights_unit

import qkv_fast
from qkv_fast import _runtime, reference

pytestmark = pytest.mark.usefixtures("isa")
halves = pytest.mark.parametrize("dtype", HALVES)
SHAPES = dict(batch=(2,), heads=(4, 2), lengths=(21, 130), dims=(12, 10))


def every_value(dtype):
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def slack(q, k, v):
    """What rounding the weights costs at most."""
    return 2 * weights_unit(q, k, v) * float(np.abs(v.astype(float)).max())


def assert_equal(a, b):
    """Equal, NaN and the sign of what is not 0 included, whatever the types."""
    np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64))


@halves
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's own casts of NaN
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_every_value_is_widened_exactly(dtype, wide):
    """At any place of a vector and with any stride; subnormals of bfloat16 are 0 or what they are."""
    x = every_value(dtype)
    one = np.ones((1, 1), wide)
    for values in (x, x[::-1], x[::3], x[7:], x[:-5]):
        out = qkv_fast.weighted_values(one, values[None, :])
        assert out.dtype == wide
        tiny = (out[0] == 0) & (dtype == "bfloat16") & (abs(values.astype(np.float64)) < 2.0**-126)
        assert_equal(out[0], np.where(tiny, 0, values.astype(np.float64)))


@halves
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rounding_is_to_nearest_even(dtype):
    """What NumPy's casts give for halfway cases, overflow and subnormal results of float16: every value times others,
    which float32 multiplies exactly but for what it cannot hold. Numbers below 2**-126 may be 0."""
    rng, x = np.random.default_rng(0), every_value(dtype)
    x = x[np.isfinite(x.astype(np.float32))]
    near_one = 1 + np.arange(33) / (256 if dtype == "bfloat16" else 2048) * 2
    others = np.concatenate([near_one, 2.0 ** -np.arange(9), rng.choice(x, 25).astype(float)]).astype(dtype)
    exact = x.astype(np.float32)[:, None] * others.astype(np.float32)
    low_bits = exact.view(np.uint32) & (0xFFFF if dtype == "bfloat16" else 0x1FFF)
    assert np.count_nonzero(low_bits == (0x8000 if dtype == "bfloat16" else 0x1000)) > 10_000  # halfway
    got = qkv_fast.scores(x[:, None], others[:, None], scale=1)
    normal = np.ones_like(exact, bool)
    if dtype == "bfloat16":
        a, b, least = abs(x.astype(float))[:, None], abs(others.astype(float)), 2.0**-126
        normal = (np.minimum(a, b) >= least) & (abs(exact) >= least)
        assert normal.mean() > 0.9
        near = abs(got.astype(float) - exact) <= least * (1 + a + b)
        assert near[~normal & np.isfinite(exact)].all()
    assert_equal(got[normal], exact.astype(dtype)[normal])


@halves
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_results_are_those_of_float32_rounded_once(dtype):
    """The same call with out= in float32 says what was rounded; for odd sizes and every stage."""
    for n, (lq, lk, d, dv) in enumerate([(1, 1, 1, 1), (5, 3, 7, 3), (50, 131, 33, 65), (17, 700, 64, 40)]):
        q, k, v = qkv(n, dtype, batch=(2,), heads=(2, 1), lengths=(lq, lk), dims=(d, dv))
        p = np.abs(qkv(n, dtype, batch=(2,), heads=(2, 1), lengths=(lq, lk), dims=(lk, dv))[0])
        for function, args in (
            (qkv_fast.attention, (q, k, v)),
            (qkv_fast.scores, (q, k)),
            (qkv_fast.weighted_values, (p, v)),
            (qkv_fast.softmax, (p,)),
        ):
            got = function(*args)
            exact = function(*args, out=np.empty(got.shape, np.float32))
            assert got.dtype == dtype and exact.dtype == np.float32
            same_bits(got + np.array(0, dtype), exact.astype(dtype) + np.array(0, dtype))
            wide = [args[0].astype(np.float32), *args[1:]]
            if qkv_fast.explain(function, *wide).kernel == qkv_fast.explain(function, *args).kernel:
                same_bits(function(*wide), exact)  # a mixed call does the same arithmetic


@halves
@pytest.mark.parametrize("lq", [1, 3, 40])
def test_odd_sizes(dtype, lq):
    for n, (lk, d) in enumerate(itertools.product((1, 2, 3, 127, 128, 129, 1025), (1, 2, 31, 33, 64))):
        args = qkv(n, dtype, heads=(2, 1), lengths=(lq, lk), dims=(d, d + n % 2))
        check(*args)
        check(*args, causal=True)
        check(*args, window=(40, 3), q_offset=lk // 2, kv_lengths=lk - lk // 3)


@halves
def test_sizes_of_scores(dtype):
    for size in (0.01, 1, 10, 30):
        q, k, v = qkv(1, dtype, heads=(8, 2), lengths=(40, 777), dims=(64, 64))
        check((q * size).astype(dtype), k, v)
        check(q, k, (v + 100).astype(dtype), scale=-0.3)


@halves
def test_masks_and_biases(dtype):
    rng = np.random.default_rng(2)
    q, k, v = qkv(2, dtype, **SHAPES)
    mask = rng.random((2, 1, 21, 130)) < 0.5
    bias = rng.standard_normal((1, 4, 21, 130)).astype(dtype)
    options = dict(mask=mask, bias=bias, softcap=5.0, sinks=rng.standard_normal(4), alibi_slopes=[0.1, 0.2, 0.3, 0.4])
    out, lse = qkv_fast.attention(q, k, v, return_lse=True, **options)
    exact = reference.attention(q, k, v, return_lse=True, **options)
    assert np.all(np.abs(out.astype(float) - exact[0]) <= unit(dtype) * np.abs(exact[0]) + 1e-5 + slack(q, k, v))
    np.testing.assert_allclose(lse, exact[1], rtol=0, atol=1e-5)
    starts = [0, 10, 10, 42]
    rows = [np.ascontiguousarray(x[0, :2].swapaxes(0, 1)[:42]) for x in qkv(3, dtype, **dict(SHAPES, lengths=(42, 42)))]
    out = qkv_fast.attention_varlen(*rows, starts, starts, causal=True)
    exact = reference.attention_varlen(*rows, starts, starts, causal=True)
    assert out.dtype == dtype
    more = slack(*(x.swapaxes(0, 1) for x in rows))
    assert np.all(np.abs(out.astype(float) - exact) <= unit(dtype) * np.abs(exact) + 1e-5 + more)


@pytest.mark.parametrize("lq", [1, 40])
def test_float16_scores_beyond_its_range(lq):
    """Scaled scores of more than 65504, and of 10 million, whose differences decide."""
    q, k, v = qkv(3, "float16", lengths=(lq, 300), dims=(64, 64))
    for factor in (60, 1000):
        big = (q * factor).astype(np.float16), (k * factor).astype(np.float16), v
        _, lse = check(*big, scale=1)
        assert np.abs(lse).max() > 65504
    top = np.full((1, lq, 64), 65504, np.float16)
    check(top, (k * 1000).astype(np.float16), v, scale=1)


def subnormals(dtype):
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    return (np.random.default_rng(4).integers(-100, 100, (1, 300, 8)) * tiny).astype(dtype)


@halves
def test_subnormals(dtype):
    """Those of float16 count in Q, K and V and are results; those of bfloat16, which float32 cannot multiply without,
    may be 0 in Q, K and V: a score is then off by that."""
    small = subnormals(dtype)
    q, k, v = qkv(4, dtype, lengths=(20, 300), dims=(8, 8))
    large = (k * (2.0**13 if dtype == "float16" else 2.0**124)).astype(dtype)  # against these, subnormals decide
    scale = 2.0**12 if dtype == "float16" else 2.0**8
    out = qkv_fast.attention(q, k, small)
    exact = reference.attention(q.astype(float), k.astype(float), small.astype(float))
    if dtype == "float16":
        check(q, k, small)
        assert (out != 0).any()
    else:
        assert np.abs(out.astype(float) - exact).max() <= 300 * 2.0**-126
    for args in ((small[:, :20], large, v), (large[:, :20], small, v)):
        if dtype == "float16":
            check(*args, scale=scale)
            _, lse = qkv_fast.attention(*args, scale=scale, return_lse=True)
            assert np.abs(lse - np.log(300)).max() > 0.1
        else:
            zeroed = [np.where(abs(x.astype(float)) < 2.0**-126, 0, x).astype(dtype) for x in args]
            found, expected = (qkv_fast.attention(*x, scale=scale, return_lse=True) for x in (args, zeroed))
            same_bits(found[0], expected[0])
            same_bits(found[1], expected[1])


@halves
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_wide_queries_with_narrow_keys(dtype, wide):
    """The result is that of K and V widened by hand, to the bit."""
    q, k, v = qkv(5, dtype, **SHAPES)
    q = q.astype(wide)
    for options in ({}, dict(causal=True, kv_lengths=[130, 77])):
        got = qkv_fast.attention(q, k, v, return_lse=True, **options)
        assert got[0].dtype == wide and got[1].dtype == wide
        same_bits(got, qkv_fast.attention(q, k.astype(wide), v.astype(wide), return_lse=True, **options))
        compare(got, (q, k, v), **options)


@halves
def test_out_in_float32(dtype):
    """Partial results of 16-bit queries, not rounded; also over an input."""
    q, k, v = qkv(6, dtype, lengths=(33, 40), dims=(16, 8))
    exact = reference.attention(q, k, v)
    out = np.full(exact.shape, np.nan, np.float32)
    assert qkv_fast.attention(q, k, v, out=out) is out
    assert np.abs(out - exact).max() < 1e-6 + slack(q, k, v)
    # q's memory, with room for float32 results of half as many columns
    over = q.copy().view(np.float32)
    got = qkv_fast.attention(over.view(dtype), k, v, out=over)
    same_bits(got, out)
    with pytest.raises(TypeError, match=rf"out must have q's type {dtype}, or float32, got float64"):
        qkv_fast.attention(q, k, v, out=np.empty(exact.shape))


@halves
def test_same_bits_for_any_number_of_threads(dtype):
    q, k, v = qkv(7, dtype, batch=(3,), heads=(4, 2), lengths=(200, 2500), dims=(33, 64))
    one = qkv_fast.attention(q, k, v, causal=True, return_lse=True, num_threads=1)
    for threads in (2, 3, 8):
        same_bits(qkv_fast.attention(q, k, v, causal=True, return_lse=True, num_threads=threads), one)
    few = q[:1, :, :3], k[:1], v[:1]  # chunks of keys are shared
    with _runtime.counters() as seen:
        split = qkv_fast.attention(*few, return_lse=True, num_threads=8)
    assert seen["splits"] > 0
    same_bits(split, qkv_fast.attention(*few, return_lse=True, num_threads=1))
    same_bits(qkv_fast.attention(q[1:2, :2], k[1:2, :1], v[1:2, :1], causal=True), one[0][1:2, :2])


@halves
def test_merged_partials(dtype):
    q, k, v = qkv(8, dtype, lengths=(20, 300), dims=(16, 16))
    parts = [qkv_fast.attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(100), slice(100, 300))]
    out, lse = qkv_fast.merge_partials(*zip(*parts, strict=True))
    exact, exact_lse = reference.attention(q, k, v, return_lse=True)
    assert out.dtype == dtype and lse.dtype == np.float32
    # each part was rounded, and the sum is
    assert np.abs(out.astype(float) - exact).max() <= 2 * unit(dtype) * np.abs(exact).max() + 1e-6 + slack(q, k, v)
    assert np.abs(lse - exact_lse).max() < 1e-5
    with pytest.raises(TypeError, match="lses must be of one type, float32 or float64"):
        qkv_fast.merge_partials([out], [lse.astype(dtype)])


@halves
def test_softmax(dtype):
    x = qkv(9, dtype, lengths=(70, 300), dims=(130, 8))[0]
    mask = np.random.default_rng(9).random(x.shape) < 0.7
    for axis, hide in itertools.product((-1, -2, 0), (None, mask)):
        got = qkv_fast.softmax(x, axis, mask=hide)
        exact = reference.softmax(x, axis, mask=hide)
        assert got.dtype == dtype
        rounding = unit(dtype) * exact + float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2
        assert np.all(np.abs(got.astype(float) - exact) <= rounding + 4e-7 * exact)
    x2 = x.copy()
    assert qkv_fast.softmax(x2, out=x2) is x2
    same_bits(x2, qkv_fast.softmax(x))
    same_bits(qkv_fast.softmax(x[..., ::-2]), qkv_fast.softmax(x[..., ::-2].copy()))


def test_byte_swapped_float16():
    p, v = (np.abs(x) for x in qkv(10, "float16", lengths=(9, 9), dims=(9, 33))[1:])
    swapped = [x.astype(">f2") for x in (p, v)]
    same_bits(qkv_fast.weighted_values(*swapped), qkv_fast.weighted_values(p, v))
    same_bits(qkv_fast.scores(swapped[0], swapped[0]), qkv_fast.scores(p, p))
    same_bits(qkv_fast.softmax(swapped[1]), qkv_fast.softmax(v))
    out = np.empty(v.shape, ">f2")
    assert_equal(qkv_fast.attention(p, p, v, out=out), qkv_fast.attention(p, p, v))


@halves
def test_scale_beyond_float32(dtype):
    """A scale that float32 does not hold is still applied before the one rounding."""
    q, k, _ = qkv(11, dtype, dims=(16, 16))
    big, small = np.abs(q).astype(dtype), np.abs(k).astype(dtype)
    with np.errstate(over="ignore"):
        assert np.isinf(qkv_fast.scores(big, small, scale=1e300)).all()
    assert not qkv_fast.scores(big, small, scale=1e-300).any()


@halves
def test_explain(dtype):
    q, k, v = qkv(12, dtype, heads=(2, 2), lengths=(100, 300), dims=(32, 32))
    with _runtime.counters() as seen:
        qkv_fast.attention(q, k, v, num_threads=1)
    plan = qkv_fast.explain(q, k, v, num_threads=1)
    assert plan.tiles_copied == seen["tiles_copied"] > 0
    assert plan.dtypes == dict.fromkeys(["q", "k", "v", "out"], dtype)
    assert plan.bytes == 2 * (2 * q.size + k.size + v.size)
    mixed = qkv_fast.explain(q.astype("float32"), k, v)
    assert mixed.dtypes["q"] == "float32" and mixed.dtypes["k"] == dtype
    assert f"{dtype}, computed in float32" not in repr(mixed) and "computed in float32" in repr(mixed)


def test_the_two_do_not_mix():
    q, k, v = qkv(13, "float16")
    b = k.astype("bfloat16")
    message = "float16 and bfloat16 do not mix, got q in float16 and k and v in bfloat16"
    with pytest.raises(TypeError, match=message):
        qkv_fast.attention(q, b, b)
    with pytest.raises(TypeError, match="k and v must have one type, got float16 and bfloat16"):
        qkv_fast.attention(q, k, b)
    with pytest.raises(TypeError, match="do not mix"):
        qkv_fast.scores(b, k)
    with pytest.raises(TypeError, match="k and v must have q's type or a narrower one"):
        qkv_fast.attention(q, k.astype("float32"), v.astype("float32"))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "V2"])
def test_bits_of_bfloat16(dtype):
    """What files and other libraries hand out where NumPy does not know bfloat16."""
    x = np.ones((4, 4), "bfloat16").view(dtype)
    message = r"pip install ml_dtypes and pass q\.view\(ml_dtypes\.bfloat16\)"
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64, got .*" + message):
        qkv_fast.attention(x, x, x)
    with pytest.raises(TypeError, match=message.replace("q", "x")):
        qkv_fast.softmax(x)


def test_other_small_types_are_refused():
    x = np.ones((4, 4), ml_dtypes.float8_e5m2)
    with pytest.raises(TypeError, match="got float8_e5m2"):
        qkv_fast.attention(x, x, x)


@pytest.mark.parametrize("prepare", ["", "sys.modules['ml_dtypes'] = None; "])
def test_ml_dtypes_is_not_needed(prepare):
    """Import and calls do not import it, and go on without it."""
    code = (
        f"import sys; {prepare}import numpy as np, qkv_fast\n"
        "x = np.ones((4, 4), np.float16)\n"
        "assert (qkv_fast.attention(x, x, x) == 1).all() and repr(qkv_fast.explain(x, x, x))\n"
        "try: qkv_fast.attention(x.view('u2'), x, x)\n"
        "except TypeError as error: assert 'pip install ml_dtypes' in str(error)\n"
        "print(sys.modules.get('ml_dtypes'))"
    )
    assert child_says(code) == "None"
