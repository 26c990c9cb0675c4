"""Few query rows: the decode kernel against the reference, and its bits against themselves.

The kernel takes a key head's rows (Lq times the group) where there are at most 4 to 32 of them, by D and types.
`plan_of` says that a test met it.
"""

import itertools
import sys

import numpy as np
import pytest
from _fence import Fence
from _patterns import PATTERNS
from _util import TYPES, are_few, check, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", (*TYPES, "bfloat16"))  # whose pairs are multiplied on some paths
wide = pytest.mark.parametrize("dtype", TYPES)


def plan_of(*args, **options):
    plan = qkv_fast.explain(*args, **options)
    assert plan.kernel.startswith("decode_"), plan.kernel
    return plan


CHUNK = qkv_fast.explain(*qkv(1, lengths=(1, 1))).chunk_keys


def test_few_rows_are_decoded_and_many_are_not():
    """By the rows of a key head, and types, alone."""
    for dtype, heads, lq, d, decodes in [
        ("float32", (1, 1), 1, 4, True), ("float32", (8, 2), 1, 4, True), ("float32", (5, 1), 1, 4, False),
        ("float32", (4, 1), 3, 64, True), ("float32", (12, 1), 1, 64, True), ("float32", (13, 1), 1, 64, False),
        ("float32", (33, 33), 1, 128, True), ("float32", (13, 1), 1, 1024, False),
        ("float64", (6, 1), 1, 128, True), ("float64", (7, 1), 1, 128, False),
        ("float16", (4, 1), 5, 128, True), ("float16", (33, 1), 1, 1024, False), ("float16", (8, 1), 2, 64, True),
    ]:  # fmt: skip
        for lk, batch in ((1, ()), (3000, ()), (40, (7,))):
            arrays = qkv(1, dtype, batch=batch, heads=heads, lengths=(lq, lk), dims=(d, d))
            plan = qkv_fast.explain(*arrays)
            assert plan.kernel.startswith("decode_") is decodes is are_few(*arrays), (dtype, heads, lq, d, lk)


@dtypes
def test_every_length(dtype, request):
    """1..600 keys in a batch of sequences that each have their own number, from grouped and from single heads."""
    step = 1 if request.config.getoption("--exhaustive") else 7
    for first in range(1, 601, 60 * step):
        lengths = np.arange(first, min(601, first + 60 * step), step)
        q, k, v = qkv(first, dtype, batch=(len(lengths),), heads=(4, 2), lengths=(1, 600), dims=(20, 12))
        check(q, k, v, kv_lengths=lengths)
    for n in (*range(1, 70), 255, 256, 257, 600):
        check(*qkv(n, dtype, heads=(3, 1), lengths=(1, n), dims=(16, 16)))


@dtypes
@pytest.mark.parametrize("lq", [1, 3])
def test_around_the_edges_of_chunks(dtype, lq):
    for chunks, more in itertools.product((1, 2, 5), (-33, -1, 0, 1, 2, 31, 32, 33)):
        q, k, v = qkv(chunks, dtype, heads=(2, 1), lengths=(lq, chunks * CHUNK + more), dims=(24, 40))
        plan_of(q, k, v)
        check(q, k, v, causal=True)
        check(q, k, v, window=(40, 3), q_offset=chunks * CHUNK - 2)  # keys on both sides of an edge


@dtypes
@pytest.mark.parametrize("group", range(1, 17))
def test_every_group(dtype, group):
    for lq in {1, max(1, 16 // group), max(1, 7 // group)}:
        q, k, v = qkv(group, dtype, batch=(2,), heads=(2 * group, 2), lengths=(lq, 157), dims=(120, 72))
        assert qkv_fast.explain(q, k, v).kernel.startswith("decode_") is are_few(q, k, v)
        check(q, k, v)
        check(q, k, v, causal=True, q_offset=[100, 0])


@dtypes
def test_every_dimension(dtype, request):
    full = request.config.getoption("--exhaustive")
    most = 5 if dtype == "float64" else 7
    few = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 127, 128, 129, 130}
    for d in range(1, 131) if full else sorted(few):
        for group, dims in ((1, (d, 131 - d)), (most, (d, 131 - d)), (3, (d, d)), (4, (d, d))):
            q, k, v = qkv(d, dtype, heads=(group, 1), lengths=(1, 70), dims=dims)
            plan_of(q, k, v)
            check(q, k, v)
    for d, dv in ((256, 256), (1024, 1024), (1024, 5), (3, 1000), (0, 8)):
        for group in (1, 4):
            check(*qkv(d, dtype, heads=(group, 1), lengths=(1, 100), dims=(d, dv)))


@dtypes
@pytest.mark.parametrize("name", PATTERNS)
def test_strides_do_not_change_bits(dtype, name):
    q, k, v = qkv(1, dtype, batch=(2,), heads=(6, 2), lengths=(2, CHUNK + 40), dims=(24, 40))
    expected = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    change = PATTERNS[name]
    for args in ((change(q), k, v), (q, change(k), v), (q, k, change(v)), tuple(map(change, (q, k, v)))):
        plan_of(*args, causal=True)
        same_bits(qkv_fast.attention(*args, causal=True, return_lse=True), expected)
    out = change(np.zeros(expected[0].shape, dtype))
    if out.flags.writeable and out.dtype.isnative:
        qkv_fast.attention(q, k, v, causal=True, out=out)
        same_bits(np.ascontiguousarray(out), expected[0])


@pytest.mark.parametrize("name", ["as it is", "reversed dimension"])
def test_narrower_keys_are_those_widened(name):
    q, k, v = qkv(1, "float64", heads=(4, 2), lengths=(2, 700), dims=(24, 40))
    k, v = k.astype("float32"), v.astype("float32")
    expected = qkv_fast.attention(q, k.astype("float64"), v.astype("float64"))
    if name != "as it is":
        k, v = PATTERNS[name](k[None])[0], PATTERNS[name](v[None])[0]
    same_bits(qkv_fast.attention(q, k, v), expected)


# (heads, lengths, dims, options)
CASES = {
    "one row": ((1, 1), (1, 5000), (64, 64), {}),
    "grouped": ((8, 2), (1, 3000), (40, 24), {}),
    "some positions": ((6, 2), (2, 2100), (56, 65), dict(causal=True)),
    "window": ((2, 1), (3, 9000), (64, 48), dict(window=(6500, 100), q_offset=8000)),
    "short": ((4, 2), (2, 90), (16, 16), dict(causal=True)),
}
cases = pytest.mark.parametrize("name", CASES)


def _case(name, dtype, batch=()):
    heads, lengths, dims, options = CASES[name]
    args = qkv(3, dtype, batch=batch, heads=heads, lengths=lengths, dims=dims)
    plan_of(*args, **options)
    return args, dict(options, return_lse=True)


@dtypes
@cases
def test_threads_do_not_change_bits(dtype, name):
    args, options = _case(name, dtype)
    one = qkv_fast.attention(*args, num_threads=1, **options)
    split = set()
    for n in range(2, 9):
        with _runtime.counters() as seen:
            same_bits(qkv_fast.attention(*args, num_threads=n, **options), one)
        split.add(seen["splits"] > 0)
    assert name == "short" or True in split, "the keys were never shared among threads"


@wide
@pytest.mark.parametrize("lq", [1, 40])
def test_a_window_costs_the_chunks_that_it_reaches(dtype, lq):
    """However many keys lie before and behind: the others are neither tasks nor partial results. Sequences whose
    windows begin anywhere, also in the last chunk of another's, also with no key at all; few rows and many."""
    n, lengths = 30 * CHUNK, np.array([30 * CHUNK, 5, 0, 20 * CHUNK + 1, 20 * CHUNK + lq, 29 * CHUNK - 1])
    q, k, v = qkv(40 + lq, dtype, heads=(2, 2), lengths=(lq, n), dims=(64, 64))
    q, lengths = np.stack([q] * len(lengths)), np.maximum(lengths, lq * (lengths > 0))
    splits = 0
    for window in ((2 * CHUNK, 0), (3, 3), (0, None)):
        options = dict(window=window, kv_lengths=lengths, return_lse=True)
        one = qkv_fast.attention(q, k, v, num_threads=1, **options)
        chunks = 2 + (window[0] + lq + 3) // CHUNK
        assert qkv_fast.explain(q, k, v, window=window, kv_lengths=lengths).chunks <= chunks
        for b in range(len(lengths)):  # alone the chunks of one head are shared among threads
            alone = dict(options, kv_lengths=lengths[b])
            for threads in (2, 8):
                with _runtime.counters() as seen:
                    got = qkv_fast.attention(q[b, :1], k[:1], v[:1], num_threads=threads, **alone)
                same_bits(got, tuple(x[b, :1] for x in one))
                assert seen["splits"] <= chunks * lq
                splits += seen["splits"]
        with _runtime.counters() as seen:
            same_bits(qkv_fast.attention(q, k, v, num_threads=3, **options), one)
        assert lq > 1 or seen["tiles_full"] + seen["tiles_partial"] <= 2 * len(lengths) * chunks
    assert splits, "the chunks were never shared among threads"
    check(q[0], k, v, window=(2 * CHUNK, 0))


@dtypes
@cases
def test_batch_and_heads_do_not_change_bits(dtype, name):
    (q, k, v), options = _case(name, dtype, batch=(5,))
    out, lse = qkv_fast.attention(q, k, v, **options)
    group = q.shape[1] // k.shape[1]
    for b, h in itertools.product(range(5), range(k.shape[1])):
        heads = slice(h * group, (h + 1) * group)
        alone = qkv_fast.attention(q[b, heads], k[b, h : h + 1], v[b, h : h + 1], **options)
        same_bits(alone, (out[b, heads], lse[b, heads]))


@dtypes
@cases
def test_a_padded_sequence_equals_itself_alone(dtype, name):
    (q, k, v), options = _case(name, dtype, batch=(2,))
    n = k.shape[-2] - 37
    options.setdefault("q_offset", n - q.shape[-2])
    padded = qkv_fast.attention(q, k, v, kv_lengths=[n, n], **options)
    same_bits(padded, qkv_fast.attention(q, k[..., :n, :], v[..., :n, :], **options))


@dtypes
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_behind_the_lengths(dtype, poison):
    q, k, v = qkv(5, dtype, batch=(4,), heads=(4, 2), lengths=(3, 1400), dims=(24, 40))
    lengths = np.array([1400, 1023, 17, 0])
    options = dict(kv_lengths=lengths, q_offset=[1000, 900, 10, 0], causal=True, return_lse=True)
    clean = qkv_fast.attention(q, k, v, **options)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = poison, poison
    with _runtime.counters() as seen:
        same_bits(qkv_fast.attention(q, k, v, **options), clean)
    assert seen["panels_careful"] == 0  # what no row sees is not even looked at


@dtypes
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("column", [0, 39])
def test_poison_that_some_rows_see(dtype, group, column):
    """A key that the last position sees and the first does not: the first keeps its bits, the last has the NaN."""
    q, k, v = qkv(6, dtype, heads=(group, 1), lengths=(3, 1200), dims=(40, 40))
    plan_of(q, k, v)
    clean = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    v[0, 1199, column] = np.nan
    with _runtime.counters() as seen:
        out, lse = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    assert seen["panels_careful"] == 1 and seen["tiles_partial"] > 0
    same_bits((out[:, :2], lse), (clean[0][:, :2], clean[1]))
    assert np.isnan(out[:, 2, column]).all()
    same_bits(np.delete(out, column, -1), np.delete(clean[0], column, -1))


@dtypes
def test_a_score_of_minus_infinity_excludes_its_value(dtype):
    q, k, v = qkv(7, dtype, heads=(4, 1), lengths=(1, 800), dims=(8, 8))
    q = np.abs(q)
    k[:, [3, 700]] = -np.inf
    clean = check(q, k, v)
    v[:, [3, 700]] = np.nan
    same_bits(qkv_fast.attention(q, k, v, return_lse=True), clean)
    k[...] = -np.inf
    out, lse = qkv_fast.attention(q, k, v, return_lse=True)
    assert not out.any() and (lse == -np.inf).all()


@wide
@pytest.mark.parametrize("threads", [1, 4])
def test_sinks(dtype, threads):
    q, k, v = qkv(9, dtype, heads=(4, 2), lengths=(2, 3000), dims=(24, 40))
    sinks = [1.5, -np.inf, 300.0, -300.0]
    plan_of(q, k, v, sinks=sinks)
    out, lse = qkv_fast.attention(q, k, v, sinks=sinks, causal=True, return_lse=True, num_threads=threads)
    exact = qkv_fast.reference.attention(q, k, v, sinks=sinks, causal=True, return_lse=True)
    plain = qkv_fast.attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, exact[0], rtol=0, atol=64 * np.finfo(dtype).eps * np.abs(v).max())
    np.testing.assert_allclose(lse, exact[1], rtol=8 * np.finfo(dtype).eps)
    same_bits(out[1], plain[1])
    assert not out[2].any() or np.abs(out[2]).max() < 1e-30  # all weight is the sink's
    _, lse = qkv_fast.attention(q, k, v, sinks=sinks, kv_lengths=0, q_offset=0, return_lse=True)
    assert (lse[:, 0] == np.array(sinks, dtype)).all()


@dtypes
@pytest.mark.parametrize("threads", [1, 4])
def test_packed_with_longer_ones(dtype, threads):
    """Each packed sequence has the kernel that it has alone."""
    lengths = [(1, 2500), (60, 700), (2, 40), (0, 9), (1, 1)]
    cu_q, cu_k = (np.cumsum([0, *(pair[i] for pair in lengths)]) for i in (0, 1))
    q, k, v = (x.swapaxes(0, 1) for x in qkv(10, dtype, heads=(4, 2), lengths=(64, 3250), dims=(24, 40)))
    out = qkv_fast.attention_varlen(q, k, v, cu_q, cu_k, causal=True, num_threads=threads)
    for b in range(len(lengths)):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        alone = qkv_fast.attention(q[rows], k[keys], v[keys], causal=True, layout="blhd")
        same_bits(out[rows], alone)


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@dtypes
@pytest.mark.parametrize("place", ["at_end", "at_start"])
def test_nothing_beside_the_arrays_is_read_or_written(dtype, place):
    fences = [Fence(1 << 20) for _ in range(4)]
    for n, (group, lk, d, dv) in enumerate(itertools.product((1, 2, 5), (1, 15, 33, 531), (1, 17, 64), (3, 16))):
        arrays = qkv(n, dtype, heads=(group, 1), lengths=(1, lk), dims=(d, dv))
        expected = qkv_fast.attention(*arrays)
        views = [f.put(x, place) for f, x in zip(fences, (*arrays, np.zeros_like(expected)), strict=True)]
        qkv_fast.attention(*views[:3], out=views[3])
        same_bits(views[3].copy(), expected)


@wide
def test_long_sums_stay_exact(dtype):
    """64k keys: values that do not cancel, and equal ones, in one chunk after the other."""
    q, k, v = qkv(8, dtype, heads=(2, 1), lengths=(1, 65536), dims=(16, 16))
    check(q, k, np.abs(v))
    v[...] = 1
    assert np.abs(qkv_fast.attention(q, k, v) - 1).max() <= 4 * np.finfo(dtype).eps
    q[...] = 0
    check(q, k, v + v.dtype.type(0.1))
