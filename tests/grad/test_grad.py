"""Gradients against finite differences and the reference, and what must not show in them."""

import sys
import tracemalloc

import numpy as np
import pytest
from _compositions import CASES, FEATURES, Case, poisoned, visible
from _fence import Fence
from _grads import check, given_gradients, wanted
from _patterns import PATTERNS, fits
from _util import ALL_TYPES, arithmetic, normal, qkv, same_bits
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import attention, attention_grad, reference
from qkv_fast._runtime import counters, fail_allocation, trim

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("seed", range(12))
def test_reference_is_the_derivative(seed, isa):
    """Of sum(dout * out) + sum(dlse * lse), by central differences along a random direction of each argument."""
    if isa != qkv_fast.available_isas()[0]:
        pytest.skip("plain NumPy is the same on every path")
    rng = np.random.default_rng(seed)
    case = Case(seed, "float64", (2,), 2, 2, (7, 9), (4, 3), sorted(FEATURES)[:: 1 + seed % 3])
    arrays, options = case.arrays(), case.options()
    if seed % 2:
        options |= dict(softcap=3.0, sinks=rng.standard_normal(4), alibi_slopes=rng.random(4))
        if "q_positions" not in options:
            options.setdefault("q_offset", 2)
        options = {n: x for n, x in options.items() if n != "q_offset" or options.get("causal") != "top-left"}
    out, lse = reference.attention(*arrays, return_lse=True, **options)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    want = wanted(options)
    found = reference.attention_grad(dout, *arrays, out, lse, dlse=dlse, want=want, **options)
    check_by_differences(reference.attention, rng, arrays, options, dout, dlse, dict(zip(want, found, strict=True)))


def check_by_differences(attend, rng, arrays, options, dout, dlse, gradients):
    """Gradients of sum(dout * out) + sum(dlse * lse), all in float64."""
    arguments = dict(zip("qkv", arrays, strict=True)) | options
    _, lse = attend(*arrays, return_lse=True, **options)
    # The loss is rounded like a sum of so much, and what is summed like a mean of values.
    terms = np.abs(dout).sum() * max(1, np.abs(arrays[2]).max(initial=0)) + np.abs(dlse * lse)[lse > -1e30].sum()

    def loss(name, value):
        all_of = arguments | {name: value}
        q, k, v = (all_of.pop(n) for n in "qkv")
        out, lse = attend(q, k, v, return_lse=True, **all_of)
        return np.sum(dout * out) + np.sum(dlse * np.where(lse == -np.inf, 0, lse))

    for name, gradient in gradients.items():
        argument = {"slopes": "alibi_slopes"}.get(name, name)
        value = np.asarray(arguments[argument], "f8")
        farthest = sum(arguments[x].shape[-2] for x in "qk") if name == "slopes" else 1  # which multiplies the step
        small = 1e-5 / farthest
        step = np.where(np.isfinite(value) & (np.abs(value) < 1e30), small * rng.standard_normal(value.shape), 0)
        change = (loss(argument, value + step) - loss(argument, value - step)) / 2
        size = np.abs(gradient * step).sum()
        # The error of central differences is of the order of step^2 relative to the gradient.
        assert abs(change - np.sum(gradient * step)) <= 1e-7 * size + 1e-15 * terms, name


@given(case=CASES)
def test_any_composition_by_differences(case):
    """Of what is computed, without the reference."""
    of = case.heads[0] // case.heads[1], case.heads[1]
    case = Case(case.seed, "float64", case.batch, *of, case.lengths, case.dims, case.features)
    arrays, options = case.arrays(), case.options()
    for name in {"bias", "sinks", "alibi_slopes"} & options.keys():
        options[name] = np.asarray(options[name], "f8")
    if "bias" in options:  # scores vanish beside finfo.min
        options["bias"] = np.where((options["bias"] < -1e30) & np.isfinite(options["bias"]), -9, options["bias"])
    dout, out, lse, dlse = given_gradients(arrays, case.seed, **options)
    want = wanted(options)
    found = attention_grad(dout, *arrays, out, lse, dlse=dlse, want=want, **options)
    check_by_differences(attention, case.rng, arrays, options, dout, dlse, dict(zip(want, found, strict=True)))


@given(case=CASES, threads=st.integers(1, 4))
def test_any_composition(case, threads):
    """By the error rule, the same bits with poison where nobody looks, on any number of threads."""
    arrays, options = case.arrays(), case.options()
    got = check(arrays, num_threads=threads, **options)
    dout, out, lse, dlse = given_gradients(arrays, **options)
    seen = visible(case, options)
    q, k, v = poisoned(case, arrays, seen)
    blind = ~seen.any(axis=-1)
    q[blind], dout[blind] = np.nan, np.inf
    want = wanted(options)
    again = attention_grad(dout, q, k, v, out, lse, dlse=dlse, want=want, num_threads=5 - threads, **options)
    same_bits(again, got)


@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_types_and_long_calls(dtype):
    """Several parts of keys and panels of rows; grouped heads; positions that cut tiles."""
    arrays = qkv(1, dtype, batch=(2,), heads=(6, 2), lengths=(70, 2300), dims=(40, 33))
    for options in ({}, dict(causal=True), dict(window=(700, 90), q_offset=1000), dict(kv_lengths=[2000, 7])):
        check(arrays, **options)
    narrow = "float16" if dtype in ("float32", "float64") else dtype
    q, k, v = arrays
    check((q, k.astype(narrow), v.astype(narrow)), sinks=np.zeros(6), softcap=2.0)


@pytest.mark.parametrize("dims", [(0, 3), (300, 5), (3, 300), (1, 1)])
def test_dimensions(dims):
    check(qkv(2, heads=(2, 1), lengths=(30, 50), dims=dims), causal=True)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-60, -1e-75, 1e-90, 1e-300, 30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scales(scale, dtype):
    """Of next to nothing too: all keys weigh the same then."""
    _, _, dv = check(qkv(13, dtype, heads=(2, 1), lengths=(40, 3000), dims=(8, 8)), scale=scale)
    assert dv.all() or scale == 30  # of which some weights are next to nothing


@pytest.mark.parametrize("pattern", PATTERNS)
def test_strides(pattern):
    """However arrays lie in memory, the same bits."""
    for dtype in ("float32", "bfloat16"):
        if fits(pattern, dtype):
            arrays = qkv(3, dtype, batch=(2,), heads=(4, 2), lengths=(9, 30), dims=(8, 8))
            dout, out, lse, _ = given_gradients(arrays)
            place = PATTERNS[pattern]
            moved = attention_grad(place(dout), *(place(x) for x in arrays), place(out), lse)
            same_bits(moved, attention_grad(dout, *arrays, out, lse))


def test_layouts_and_broadcasting():
    q, k, v = arrays = qkv(4, "float64", batch=(3,), heads=(4, 2), lengths=(50, 60))
    options = dict(causal=True, alibi_slopes=qkv_fast.alibi_slopes(4), sinks=np.arange(4.0))
    dout, out, lse, _ = given_gradients(arrays, **options)
    got = attention_grad(dout, *arrays, out, lse, want=wanted(options), **options)
    dout, out, *others = (x.swapaxes(1, 2) for x in (dout, out, *arrays))
    again = attention_grad(dout, *others, out, lse, want=wanted(options), layout="blhd", **options)
    same_bits(tuple(x.swapaxes(1, 2) if x.ndim > 1 else x for x in again), got)
    for shared in ((q, k[1], v[1]), (q, k[:1], v), (q[:1], k, v)):  # summed over the batch
        check(shared, causal=True)
    flat = tuple(x[0, 0] for x in arrays)
    dout, out, lse, _ = given_gradients(flat)
    one = attention_grad(dout[None], *(x[None] for x in flat), out[None], lse[None])
    same_bits(attention_grad(dout, *flat, out, lse), tuple(x[0] for x in one))


@pytest.mark.parametrize("shape", [(), (60,), (50, 1), (1, 60), (1, 4, 50, 60), (3, 1, 50, 60), (3, 4, 1, 1)], ids=str)
def test_bias_that_broadcasts(shape):
    check(qkv(5, batch=(3,), heads=(4, 2), lengths=(50, 60)), bias=normal(np.random.default_rng(5), shape))


@pytest.mark.parametrize("lengths", [([3, 0, 70, 1], [9, 5, 0, 300]), ([50, 100], [60, 100]), ([], [])], ids=str)
def test_packed_sequences(lengths):
    """Each has the bits that it has alone; what is shared is summed over them."""
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(x)]).astype(int) for x in lengths)
    rng, n = np.random.default_rng(6), len(lengths[0])
    q, k, v = normal(rng, (cu_q[-1], 4, 16)), normal(rng, (cu_k[-1], 2, 16)), normal(rng, (cu_k[-1], 2, 8))
    bias = normal(rng, (n, 4, max(lengths[0], default=0), max(lengths[1], default=0)))
    ids = tuple(np.sort(rng.integers(0, 3, x)) for x in (cu_q[-1], cu_k[-1]))
    dout = normal(rng, (cu_q[-1], 4, 8))
    for options in ({}, dict(causal=True, sinks=np.arange(4.0)), dict(bias=bias), dict(segments=ids, window=(20, 3))):
        want = wanted(options)
        out, lse = qkv_fast.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **options)
        starts = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        got = attention_grad(dout, q, k, v, out, lse, want=want, **starts, **options)
        assert [x.shape for x in got[:3]] == [q.shape, k.shape, v.shape]
        for b in range(n):
            rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
            own = dict(options)
            if "bias" in own:
                own["bias"] = bias[b, :, : lengths[0][b], : lengths[1][b]]
            if "segments" in own:
                own["segments"] = ids[0][rows], ids[1][keys]
            alone = attention_grad(
                dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], want=want, layout="blhd", **own
            )
            same_bits((got[0][rows], got[1][keys], got[2][keys]), alone[:3])
            if "bias" in own:
                same_bits(np.ascontiguousarray(got[3][b, :, : lengths[0][b], : lengths[1][b]]), alone[3])


def test_queries_that_see_nothing():
    """Their gradients are 0, and so is what they give, whatever they hold."""
    arrays = qkv(7, batch=(2,), heads=(4, 2), lengths=(50, 40))
    for options in (dict(kv_lengths=0), dict(mask=False), dict(bias=np.float32(-np.inf), sinks=np.ones(4))):
        dout, out, lse, _ = given_gradients(arrays, **options)
        q = np.full_like(arrays[0], np.nan)
        dout[:] = np.inf
        for x in attention_grad(dout, q, *arrays[1:], out, lse, want=wanted(options), **options):
            assert (x == 0).all()
    # Beside others, whose gradients keep their bits: rows that a mask or a bias blinds, and rows past q_lengths.
    blind = np.zeros((2, 1, 50, 1), bool)
    blind[0, :, 3:40:5] = blind[1, :, 45:] = True
    for options in (
        dict(mask=~blind), dict(bias=np.where(blind, -np.inf, 0).astype("f4"), sinks=np.ones(4)),
        dict(q_lengths=[37, 45]), dict(q_lengths=[37, 0], causal=True),
    ):  # fmt: skip
        dout, out, lse, dlse = given_gradients(arrays, **options)
        want = wanted(options)
        expected = attention_grad(dout, *arrays, out, lse, dlse=dlse, want=want, **options)
        no_key = (lse == -np.inf) | (lse == 1 if "sinks" in options else False)
        assert no_key.any() and not no_key.all()
        for bad in (np.nan, np.inf, -np.inf):
            q = np.where(no_key[..., None], np.float32(bad), arrays[0])
            worse = np.where(no_key[..., None], np.float32(bad), dout)
            same_bits(
                attention_grad(worse, q, *arrays[1:], out, lse, dlse=dlse, want=want, **options), expected
            )
    for cut in ((slice(0), slice(None)), (slice(None), slice(0)), (slice(0), slice(0))):
        q, k, v = arrays[0][:, :, cut[0]], arrays[1][:, :, cut[1]], arrays[2][:, :, cut[1]]
        dout, out, lse, _ = given_gradients((q, k, v))
        for x, y in zip(attention_grad(dout, q, k, v, out, lse), (q, k, v), strict=True):
            assert x.shape == y.shape and (x == 0).all()


def test_nan_of_one_query_and_one_key():
    """NaN reaches the gradients of what sees it; all others keep their bits, though they share its tiles."""
    arrays = qkv(8, heads=(2, 1), lengths=(60, 60))
    mask = np.random.default_rng(8).random((60, 60)) < 0.7
    mask[5, 5] = mask[20, 30] = True
    dout, out, lse, _ = given_gradients(arrays, mask=mask)
    clean = attention_grad(dout, *arrays, out, lse, mask=mask)
    bad = dout.copy()
    bad[:, 5] = np.nan
    dq, dk, dv = attention_grad(bad, *arrays, out, lse, mask=mask)
    touched = np.zeros(60, bool)
    touched[5] = True
    for x, y, hit in ((dq, clean[0], touched), (dk, clean[1], mask[5]), (dv, clean[2], mask[5])):
        assert np.isnan(x[:, hit]).all()
        same_bits(np.ascontiguousarray(x[:, ~hit]), np.ascontiguousarray(y[:, ~hit]))
    k = arrays[1].copy()
    k[:, 30] = np.nan  # with the out and lse of before: its queries alone have NaN
    dq, dk, dv = attention_grad(dout, arrays[0], k, arrays[2], out, lse, mask=mask)
    assert np.isnan(dq[:, mask[:, 30]]).all()
    same_bits(np.ascontiguousarray(dq[:, ~mask[:, 30]]), np.ascontiguousarray(clean[0][:, ~mask[:, 30]]))


def test_what_was_given():
    arrays = qkv(9, heads=(2, 1))
    dout, out, lse, dlse = given_gradients(arrays)

    def fails(error, text, dout=dout, out=out, lse=lse, **options):
        with pytest.raises(error, match=text):
            attention_grad(dout, *arrays, out, lse, **options)

    fails(ValueError, r"attention_grad: dout must have the shape \(2, 8, 16\), got dout.shape=\(8, 16\)", dout=dout[0])
    wide = "attention_grad: dout must be float32, as attention returns it for float32, got float64"
    fails(TypeError, wide, dout=dout.astype("f8"))
    fails(ValueError, r"attention_grad: out must have the shape \(2, 8, 16\)", out=out[:, :3])
    fails(ValueError, r"attention_grad: lse must have the shape \(2, 8\), got lse.shape=\(8,\)", lse=lse[0])
    fails(TypeError, "attention_grad: lse must be float32", lse=lse.astype("f8"))
    fails(ValueError, r"attention_grad: dlse must have the shape \(2, 8\)", dlse=dlse[0])
    fails(TypeError, "attention_grad: want must be a tuple of names", want="q")
    fails(ValueError, "attention_grad: want has the names q, k, v, bias, sinks, slopes, got 'mask'", want=("mask",))
    fails(ValueError, "attention_grad: want has 'bias', but bias is not given", want=("bias",))
    fails(ValueError, "attention_grad: want names each argument once", want=("q", "q"))
    fails(TypeError, "attention_grad: packed sequences need both", cu_seqlens_q=[0, 8])
    assert attention_grad(dout, *arrays, out, lse, want=()) == ()


def test_repeated_on_any_number_of_threads():
    arrays = qkv(10, heads=(3, 1), lengths=(300, 2100), dims=(24, 24))
    options = dict(causal=True, bias=normal(np.random.default_rng(10), (1, 300, 1)), alibi_slopes=np.ones(3))
    dout, out, lse, _ = given_gradients(arrays, **options)
    first = attention_grad(dout, *arrays, out, lse, want=wanted(options), num_threads=1, **options)
    for threads in (2, 3, 7, 2, 3):
        same_bits(attention_grad(dout, *arrays, out, lse, want=wanted(options), num_threads=threads, **options), first)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_in_turn_and_apart(dtype):
    """Four heads go evenly into 1, 2 and 4 threads, each of which then adds up the parts of a head by itself."""
    arrays = qkv(15, dtype, heads=(4, 4), lengths=(50, 1500), dims=(24, 24))
    dout, out, lse, _ = given_gradients(arrays)
    with counters() as seen:
        apart = attention_grad(dout, *arrays, out, lse, num_threads=3)
    assert seen["tasks"] == 12  # three parts of each
    for threads in (1, 2, 4):
        with counters() as seen:
            same_bits(attention_grad(dout, *arrays, out, lse, num_threads=threads), apart)
        assert seen["tasks"] == 4
    lengths = [1500, 20, 20, 20]  # of which one is nearly all of the work
    ragged = [np.broadcast_to(x, (4, *x.shape)) for x in arrays]
    dout, out, lse, _ = given_gradients(ragged, kv_lengths=lengths)
    with counters() as seen:
        attention_grad(dout, *ragged, out, lse, kv_lengths=lengths, num_threads=2)
    assert seen["tasks"] == 48


def test_float32_results_of_16_bits():
    """`out` and `dout` of 16-bit arrays may be float32."""
    arrays = qkv(11, "float16", heads=(2, 2), lengths=(20, 20))
    out = np.empty((2, 20, 16), "f4")
    _, lse = attention(*arrays, out=out, return_lse=True)
    dout = normal(np.random.default_rng(11), out.shape)
    got = attention_grad(dout, *arrays, out, lse)
    exact = reference.attention_grad(dout, *arrays, out, lse)
    for x, y in zip(got, exact, strict=True):
        assert x.dtype == "float16"
        np.testing.assert_allclose(x.astype("f8"), y, rtol=2**-10, atol=2e-6)


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("place", ["at_end", "at_start"])
@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_edges_of_memory(dtype, place):
    """One byte past an array that is given ends the process."""
    fences = [Fence(1 << 18) for _ in range(8)]
    for n, (lq, lk, d, dv) in enumerate([(1, 1, 1, 3), (5, 97, 17, 6), (50, 130, 8, 9), (34, 193, 65, 30)]):
        arrays = qkv(n, dtype, heads=(2, 1), lengths=(lq, lk), dims=(d, dv))
        options = dict(bias=normal(np.random.default_rng(n), (lq, lk)), causal=True)
        dout, out, lse, dlse = given_gradients(arrays, **options)
        want = wanted(options)
        expected = attention_grad(dout, *arrays, out, lse, dlse=dlse, want=want, **options)
        given = (dout, *arrays, out, lse, dlse, options["bias"])
        *views, dlse, bias = (fence.put(x, place) for fence, x in zip(fences, given, strict=True))
        same_bits(attention_grad(*views, dlse=dlse, want=want, bias=bias, causal=True), expected)


@pytest.mark.alone
@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_memory(dtype):
    """Beside the results no more than four times the gradient of q in the type of the arithmetic."""
    arrays = qkv(14, dtype, heads=(4, 4), lengths=(4096, 4096), dims=(64, 64))
    dout, out, lse, _ = given_gradients(arrays, window=20)
    tracemalloc.start()
    found = attention_grad(dout, *arrays, out, lse, window=20)
    most = tracemalloc.get_traced_memory()[1] - sum(x.nbytes for x in found)
    tracemalloc.stop()
    assert most <= 4 * found[0].size * arithmetic(dtype).itemsize + 2 * lse.nbytes + 20_000


@pytest.mark.alone
def test_without_memory():
    """Whichever allocation fails, it says so, and the next call is right."""
    arrays = qkv(12, heads=(2, 1), lengths=(300, 600))
    dout, out, lse, _ = given_gradients(arrays)
    expected = attention_grad(dout, *arrays, out, lse, num_threads=2)
    failed, n = 0, 0
    while failed == n:
        trim()
        with fail_allocation(n):
            try:
                attention_grad(dout, *arrays, out, lse, num_threads=2)
            except MemoryError:
                failed += 1
        n += 1
    assert failed
    same_bits(attention_grad(dout, *arrays, out, lse, num_threads=2), expected)
