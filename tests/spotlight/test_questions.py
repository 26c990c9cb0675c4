"""Every question against the reference: random compositions of all arguments, types, layouts, packed sequences."""

import numpy as np
import pytest
from _compositions import CASES, poisoned, visible
from _patterns import PATTERNS, fits
from _questions import ALL, PER_KEY, PER_QUERY, RAGGED, ask, check, exactly, lse_of, own_arguments
from _util import ALL_TYPES, normal, qkv, same_bits
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import reference, spotlight

pytestmark = pytest.mark.usefixtures("isa")
questions = pytest.mark.parametrize("name", ALL)


@questions
@given(case=CASES, threads=st.integers(1, 4), data=st.data())
def test_any_composition(name, case, threads, data):
    """By the error rule, the same bits with poison where nobody looks, on any number of threads."""
    (q, k, _), options, own = case.arrays(), case.options(), data.draw(own_arguments(name))
    got = check(name, q, k, threads=threads, **own, **options)
    q, k, _ = poisoned(case, case.arrays(), visible(case, options))
    same_bits(ask(name, q, k, num_threads=5 - threads, **own, **options), got)


@questions
@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_types_and_long_calls(name, dtype):
    """Several chunks of keys and panels of rows; grouped heads; positions that cut tiles."""
    q, k, _ = qkv(1, dtype, batch=(2,), heads=(6, 2), lengths=(70, 2300), dims=(40, 1))
    for options in ({}, dict(causal=True), dict(window=(700, 90), q_offset=1000), dict(kv_lengths=[2000, 7])):
        check(name, q, k, **options)
    mixed = k.astype("float16") if dtype in ("float32", "float64") else k
    check(name, q, mixed, sinks=np.zeros(6), softcap=2.0)


@questions
def test_64k_keys(name):
    q, k, _ = qkv(2, "float32", lengths=(3, 65536), dims=(8, 1))
    if name == "influence":
        np.testing.assert_allclose(ask(name, q, k), exactly(name, q, k), rtol=1e-4, atol=1e-9)
    else:
        check(name, q, k)


@questions
@pytest.mark.parametrize("pattern", PATTERNS)
def test_strides(name, pattern):
    """However arrays lie in memory, the same bits."""
    for dtype in ("float32", "bfloat16"):
        if fits(pattern, dtype):
            q, k, _ = qkv(3, dtype, batch=(2,), heads=(4, 2), lengths=(9, 30), dims=(8, 1))
            same_bits(ask(name, PATTERNS[pattern](q), PATTERNS[pattern](k)), ask(name, q, k))


@questions
def test_a_bias_that_hides_whole_tiles(name):
    q, k, _ = qkv(7, heads=(2, 1), lengths=(40, 700), dims=(16, 1))
    at = np.arange(700)
    for seen in (at < 100, at >= 650, (at < 40) | (at >= 600)):
        check(name, q, k, bias=np.where(seen, 0, -np.inf).astype("f4"))


@questions
def test_layouts_batches_and_dimensions(name):
    q, k, _ = qkv(4, batch=(3,), heads=(4, 2), lengths=(50, 60))
    options = dict(causal=True, alibi_slopes=qkv_fast.alibi_slopes(4), sinks=np.arange(4.0))
    got = ask(name, q, k, **options)
    same_bits(ask(name, q.swapaxes(1, 2), k.swapaxes(1, 2), layout="blhd", **options), got)
    shared = ask(name, q, k[1], **options)  # keys of three axes are shared by the batch
    for b in range(3):
        one = ask(name, q[b], k[b], **options)
        same_bits(one, tuple(x[b] for x in got) if name == "top_keys" else got[b])
        of_shared = tuple(x[b] for x in shared) if name == "top_keys" else shared[b]
        same_bits(ask(name, q[b], k[1], **options), of_shared)
    flat = ask(name, q[0, 0], k[0, 0], causal=True)
    first = ask(name, q[:1, :1], k[:1, :1], causal=True)
    same_bits(flat, tuple(x[0, 0] for x in first) if name == "top_keys" else first[0, 0])


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("lengths", [([3, 0, 70, 1], [9, 5, 0, 1300]), ([50, 100], [60, 100]), ([], [])], ids=str)
def test_packed_sequences(name, lengths):
    """Each is worth the same bits as alone; keys count from its first."""
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(x)]).astype(int) for x in lengths)
    rng, n = np.random.default_rng(5), len(lengths[0])
    q, k = normal(rng, (cu_q[-1], 4, 16)), normal(rng, (cu_k[-1], 2, 16))
    mask = rng.random((n, 4, max(lengths[0], default=0), max(lengths[1], default=0))) < 0.7
    ids = tuple(np.sort(rng.integers(0, 3, x)) for x in (cu_q[-1], cu_k[-1]))
    for options in ({}, dict(causal=True, sinks=np.arange(4.0)), dict(mask=mask), dict(segments=ids, window=(20, 3))):
        got = ask(name, q, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
        parts = got if name == "top_keys" else (got,)
        assert all(x.shape[:2] == (4, (cu_k if name in PER_KEY else cu_q)[-1]) for x in parts)
        for b in range(n):
            rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
            own = dict(options)
            if "mask" in own:
                own["mask"] = mask[b, :, : lengths[0][b], : lengths[1][b]]
            if "segments" in own:
                own["segments"] = ids[0][rows], ids[1][keys]
            alone = ask(name, q[rows], k[keys], layout="blhd", **own)
            at = keys if name in PER_KEY else rows
            for x, y in zip(parts, alone if name == "top_keys" else (alone,), strict=True):
                same_bits(np.ascontiguousarray(x[:, at]), y)


@questions
@given(case=CASES, data=st.data())
def test_nan_that_is_seen(name, case, data):
    """NaN in a query, or in keys that some queries see and others do not: where it is seen, and only there."""
    (q, k, _), options = case.arrays(), case.options() | data.draw(own_arguments(name))
    for x in (q, k):
        for _ in range(data.draw(st.integers(0, 2))):
            x[tuple(case.rng.integers(0, n) for n in x.shape[:-1])] = np.nan
    got, exact = ask(name, q, k, **options), exactly(name, q, k, **options)
    if name == "top_keys":
        np.testing.assert_array_equal(got[0] == -1, exact[0] == -1)
        got, exact = got[1], exact[1]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))


@questions
def test_infinite_keys(name):
    """An infinite score is the largest, and makes the weights of its query NaN; one of -inf excludes its key."""
    q, k = np.ones((1, 3, 1), "f4"), np.ones((1, 40, 1), "f4")
    for value in (np.inf, -np.inf):
        k[0, 7] = value
        got = ask(name, q, k, causal=True, q_offset=6)  # the first query does not see it
        exact = exactly(name, q, k, causal=True, q_offset=6)
        for a, b in zip(got, exact, strict=True) if name == "top_keys" else [(got, exact)]:
            np.testing.assert_allclose(a, b, rtol=1e-6)


@questions
def test_nothing_to_see(name):
    q, k, _ = qkv(6, batch=(2,), heads=(4, 2), lengths=(50, 40))
    empty = {"largest": -np.inf, "entropy": 0, "top_keys": 0}.get(name, 0)
    hidden = dict(mask=False)
    for options in (dict(kv_lengths=0), hidden, dict(bias=np.float32(-np.inf)), dict(sinks=np.ones(4), **hidden)):
        got = ask(name, q, k, **options)
        if name == "top_keys":
            assert (got[0] == -1).all()
            got = got[1]
        assert (got == empty).all()
    for cut in ((slice(0), slice(None)), (slice(None), slice(0)), (slice(0), slice(0))):
        got = ask(name, q[:, :, cut[0]], k[:, :, cut[1]])
        got = got[1] if name == "top_keys" else got
        assert got.shape[2] == (k if name in PER_KEY else q)[:, :, cut[name in PER_KEY]].shape[2]
        assert (got == empty).all()
    got = ask(name, q[:0], k[:0])
    assert len(got[0] if name == "top_keys" else got) == 0


def test_no_dimension():
    """With D = 0 all scores are equal, and the first keys the heaviest."""
    q, k = np.zeros((3, 0)), np.zeros((8, 0))
    np.testing.assert_allclose(spotlight.entropy(q, k), np.log(8), rtol=1e-15)
    keys, weights = spotlight.top_keys(q, k, 3)
    assert (keys == [0, 1, 2]).all() and (weights == 0.125).all()
    assert (spotlight.largest(q, k) == 0).all() and (spotlight.received(q, k) == 0.375).all()
    assert (spotlight.pooled(q, k, (2, 3)) == 0.125).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("n", [1, 2, 5, 64, 3000])
def test_order_of_keys(dtype, n):
    """Scores that are exact, most of them shared by many keys: the smaller key first, and the same as sorting all."""
    rng = np.random.default_rng(n)
    q, k = rng.integers(-3, 4, (2, 60, 4)).astype(dtype), rng.integers(-2, 3, (2, 2500, 4)).astype(dtype)
    for options in (dict(scale=1), dict(scale=-1, causal=True), dict(scale=1, mask=rng.random((60, 2500)) < 0.01)):
        keys, weights = spotlight.top_keys(q, k, n, **options)
        exact, p = reference.spotlight.top_keys(q, k, n, **options)
        np.testing.assert_array_equal(keys, exact)
        np.testing.assert_allclose(weights, p, rtol=1e-5, atol=1e-30)


def test_keys_whose_weights_underflow_are_ranked():
    q, k = np.ones((1, 1), "f4"), -np.arange(0, 5000, 500, dtype="f4")[::-1, None]
    keys, weights = spotlight.top_keys(q, k, 12, scale=1)
    assert keys.tolist() == [[*range(9, -1, -1), -1, -1]] and weights.tolist() == [[1.0] + 11 * [0.0]]
    keys, _ = spotlight.top_keys(q, k, 3, scale=1, bias=np.where(np.arange(10) == 4, 9e3, 0).astype("f4"))
    assert keys.tolist() == [[4, 9, 8]]  # by the final score


def test_extremes_of_entropy():
    """One key has it all; all share it; scores far apart, and scores that only a bias of finfo.min leaves."""
    k = np.zeros((1, 1000, 1), "f4")
    assert abs(spotlight.entropy(np.ones((1, 50, 1), "f4"), k) - np.log(1000)).max() < 1e-5
    k[0, 5] = 1
    assert (spotlight.entropy(np.full((1, 50, 1), 2000, "f4"), k) == 0).all()
    lowest = np.full(1000, np.finfo("f4").min, "f4")
    assert abs(spotlight.entropy(np.zeros((1, 50, 1), "f4"), k, bias=lowest) - np.log(1000)).max() < 1e-5
    assert (spotlight.entropy(np.zeros((1, 50, 1), "f4"), k, sinks=[2000.0]) == 0).all()


def test_largest_knows_scores_alone():
    """What comes after the product does not count, but for what hides a key."""
    q, k, _ = qkv(7, heads=(2, 2), lengths=(20, 50))
    bias = np.random.default_rng(7).standard_normal((20, 50)).astype("f4")
    bias[bias > 1] = -np.inf
    got = spotlight.largest(q, k, bias=bias, softcap=0.1, alibi_slopes=[1.0, 2.0], sinks=[99.0, 0.0])
    same_bits(got, spotlight.largest(q, k, mask=bias != -np.inf))
    bias[3, 4] = np.nan
    same_bits(got, spotlight.largest(q, k, bias=bias))


@given(case=CASES, data=st.data())
def test_chosen_queries(case, data):
    """Some rows of the whole problem, whatever hides keys; repeated ones count again."""
    (q, k, _), options = case.arrays(), case.options()
    n = q.shape[-2]
    if data.draw(st.booleans()):
        ends = [data.draw(st.none() | st.integers(-n, n)) for _ in range(2)]
        queries = slice(*ends, data.draw(st.sampled_from([None, 2, -1])))
    else:
        queries = np.array(data.draw(st.lists(st.integers(-n, n - 1), max_size=8)), int)
    got = check("received", q, k, queries=queries, threads=1, **options)
    same_bits(ask("received", q, k, queries=queries, num_threads=3, **options), got)


@given(case=CASES, data=st.data())
def test_chosen_weights(case, data):
    """Some rows and columns of the whole problem, in any order, repeated: the same bits as in all of it."""
    (q, k, _), options = case.arrays(), case.options()
    whole, chosen = ask("weights", q, k, **options), {}
    for name, n in (("queries", q.shape[-2]), ("keys", k.shape[-2])):
        kind = data.draw(st.integers(0, 2))
        if kind == 1:
            ends = [data.draw(st.none() | st.integers(-n, n)) for _ in range(2)]
            chosen[name] = slice(*ends, data.draw(st.sampled_from([None, 2, -1])))
        elif kind == 2:
            chosen[name] = np.array(data.draw(st.lists(st.integers(-n, n - 1), max_size=8)), int)
    got = ask("weights", q, k, num_threads=data.draw(st.integers(1, 4)), **chosen, **options)
    of_rows = whole[..., chosen.get("queries", slice(None)), :]
    same_bits(got, np.ascontiguousarray(of_rows[..., chosen.get("keys", slice(None))]))
    exact = reference.spotlight.weights(q, k, **chosen, **options)
    assert got.shape == exact.shape


def test_weights_by_a_log_sum_exp_that_is_given():
    q, k, _ = qkv(11, heads=(4, 2), lengths=(130, 1500))
    lse = lse_of(q, k, causal=True)
    for chosen in ({}, dict(queries=[5, 129], keys=[0, 1400, 3]), dict(queries=slice(-32, None))):
        got = spotlight.weights(q, k, causal=True, lse=lse, **chosen)
        np.testing.assert_allclose(got, spotlight.weights(q, k, causal=True, **chosen), rtol=1e-5, atol=1e-9)


def test_all_queries_by_name():
    q, k, _ = qkv(8, batch=(2,), heads=(4, 2), lengths=(60, 90))
    all_of_them = spotlight.received(q, k, causal=True)
    same_bits(spotlight.received(q, k, causal=True, queries=slice(None)), all_of_them)
    same_bits(spotlight.received(q, k, causal=True, queries=np.arange(60)[::-1]), all_of_them)
    ones = [spotlight.received(q, k, causal=True, queries=[i]) for i in range(60)]
    np.testing.assert_allclose(sum(ones), all_of_them, rtol=2e-6, atol=1e-7)  # 60 sums in another order


def test_weights_add_up():
    """What all keys receive is the number of queries; a log-sum-exp that is not theirs gives what the formula gives."""
    q, k, _ = qkv(9, heads=(4, 2), lengths=(130, 1500))
    lse = lse_of(q, k, causal=True)
    got = spotlight.received(q, k, causal=True, lse=lse)
    np.testing.assert_allclose(got, spotlight.received(q, k, causal=True), rtol=1e-5, atol=1e-6)
    part = spotlight.received(q, k, causal=True, lse=lse, queries=[7, -1, 7])
    np.testing.assert_allclose(part, spotlight.received(q, k, causal=True, queries=[7, -1, 7]), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.sum(axis=-1), 130, rtol=1e-5)
    less = lse - np.float32(np.log(4))
    np.testing.assert_allclose(spotlight.received(q, k, causal=True, lse=less), 4 * got, rtol=1e-5)
    foreign = lse.astype(">f4")[..., ::-1].copy()[..., ::-1]  # any strides and byte order
    same_bits(spotlight.received(q, k, causal=True, lse=foreign), got)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_long_cells(dtype):
    """Of many equal weights, whose sums would all be rounded the same way: a mean keeps its digits."""
    eps = np.finfo(dtype).eps
    q, k = np.zeros((5000, 1), dtype), np.zeros((7, 1), dtype)
    np.testing.assert_allclose(spotlight.pooled(q, k, (1, 1)), 1 / 7, rtol=4 * eps)
    q, k = np.zeros((3, 1), dtype), np.zeros((65536, 1), dtype)
    np.testing.assert_allclose(spotlight.pooled(q, k, (1, 1), kv_lengths=65521), 1 / 65536, rtol=4 * eps)
    np.testing.assert_allclose(spotlight.pooled(q, k, (1, 9), "max", kv_lengths=65521), 1 / 65521, rtol=4 * eps)


def test_cells():
    """More of them than there are weights, or one, or others; hidden weights are 0 in a cell."""
    q, k, _ = qkv(12, heads=(4, 2), lengths=(130, 1500))
    lse = lse_of(q, k, causal=True)
    p = spotlight.weights(q, k, causal=True)
    same_bits(spotlight.pooled(q, k, (5000, 2**62), "max", causal=True), p)
    for shape in ((1, 1), (130, 1499), (7, 256), (np.int64(129), 600)):
        for reduce, most in (("mean", 1e-6), ("max", 1e-5)):
            exact = reference.spotlight._pool(p.astype("f8"), shape, reduce)
            for got in (
                spotlight.pooled(q, k, shape, reduce, causal=True),
                spotlight.pooled(q, k, list(shape), reduce=reduce, causal=True, lse=lse),
            ):
                np.testing.assert_allclose(got, exact, rtol=1e-5, atol=most)
    less = lse - np.float32(np.log(4))
    for reduce in ("mean", "max"):
        four = spotlight.pooled(q, k, (7, 9), reduce, causal=True, lse=less)
        np.testing.assert_allclose(four, 4 * spotlight.pooled(q, k, (7, 9), reduce, causal=True), rtol=1e-5)


@pytest.mark.parametrize("first", [230, 246, 254])
def test_cells_of_few_keys_where_limits_meet_a_task(first):
    """Causal limits in the block of keys that a task of 250 columns begins in: a cell is the largest of one weight."""
    for length in (9, 16, 48):
        q, k, _ = qkv(13, heads=(2, 2), lengths=(length, 1500), dims=(16, 16))
        options = dict(causal=True, q_offset=first)
        got = spotlight.pooled(q, k, (length, 1500), "max", **options)
        same_bits(got, spotlight.weights(q, k, **options))


@pytest.mark.parametrize("name", [*PER_QUERY, "weights"])
def test_rows_are_worth_the_same_bits_anywhere(name):
    """Among others or alone, in whatever panel."""
    q, k, _ = qkv(10, heads=(1, 1), lengths=(130, 1100))
    got = ask(name, q, k)
    for first, last in ((0, 1), (5, 60), (100, 130)):
        part = ask(name, q[:, first:last], k)
        whole = got if name == "top_keys" else (got,)
        same_bits(part if name == "top_keys" else (part,), tuple(np.ascontiguousarray(x[:, first:last]) for x in whole))


def test_answers_know_nothing_of_calls_before():
    """Where a tile of queries sees little of a task's keys, or none of its first, after calls that left NaN behind."""
    rng = np.random.default_rng(5)
    broken = np.full((2, 4, 700, 64), np.nan, np.float32)
    q, k, v = (rng.standard_normal((n, 8)).astype(np.float32) for n in (500, 500, 500))
    for options in ({"causal": True}, {"window": (9, 4)}, {"window": (130, 0), "q_offset": 70}):
        weights = spotlight.weights(q, k, **options)
        for reduce in ("mean", "max"):
            qkv_fast.attention(broken, broken, broken)
            cells = spotlight.pooled(q, k, (500, 500), reduce, **options)  # each is one weight
            np.testing.assert_allclose(cells, weights, rtol=1e-5, atol=1e-7)
        qkv_fast.attention(broken, broken, broken)
        assert np.isfinite(spotlight.influence(q[:67], k, v, **options)).all()
