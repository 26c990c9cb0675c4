"""alibi_slopes=, sinks= and softcap=: what becomes of scores, and what that makes of the log-sum-exp."""

import itertools
import math
import warnings

import numpy as np
import pytest
from _util import TYPES, check, qkv, same_bits

import qkv_fast
from qkv_fast import reference

dtypes = pytest.mark.parametrize("dtype", TYPES)
every_path = pytest.mark.usefixtures("isa")

LENGTHS = [(1, 1), (1, 1100), (3, 130), (40, 40), (130, 97), (60, 1100)]


def heads_of(dtype, seed, lq, lk, **more):
    return qkv(seed, dtype, heads=(4, 2), lengths=(lq, lk), **{"dims": (8, 4), **more})


# ALiBi


def test_slopes_of_the_paper():
    """Its example: 8 heads have 1/2, 1/4, ... 1/256. 12 heads: those, and every second of 16."""
    twelve = 2.0 ** -np.array([1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])
    np.testing.assert_array_equal(qkv_fast.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_array_equal(qkv_fast.alibi_slopes(1), [2.0**-8])
    np.testing.assert_allclose(qkv_fast.alibi_slopes(12), twelve, rtol=1e-15)
    for n in range(1, 200):
        slopes = qkv_fast.alibi_slopes(n)
        assert slopes.shape == (n,) and slopes.dtype == np.float64 and len(set(slopes)) == n
        assert slopes.min() >= 2.0**-8 and slopes.max() < 1
    same_bits(qkv_fast.alibi_slopes(np.int8(6)), qkv_fast.alibi_slopes(6))


@every_path
@dtypes
@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=True), dict(causal="top-left"), dict(window=(9, 30)), dict(q_offset=5), dict(q_offset=-300)],
    ids=str,
)
def test_alibi(dtype, options):
    for n, lengths in enumerate(LENGTHS):
        for slopes in (qkv_fast.alibi_slopes(4), [0.0, -0.5, 3.0, 1e-4]):
            check(*heads_of(dtype, n, *lengths), alibi_slopes=slopes, **options)


@every_path
@dtypes
def test_alibi_positions_per_sequence(dtype):
    q, k, v = qkv(3, dtype, batch=(3,), heads=(4, 2), lengths=(20, 130), dims=(8, 4))
    slopes = qkv_fast.alibi_slopes(4)
    check(q, k, v, alibi_slopes=slopes, q_offset=[0, 50, 110])
    check(q, k, v, alibi_slopes=slopes, kv_lengths=[20, 70, 130])
    check(q, k, v, alibi_slopes=slopes, kv_lengths=[0, 7, 130], q_offset=0, causal=True)


@every_path
@dtypes
@pytest.mark.parametrize("offset", [10**5, -(10**5), 2**24 + 1, 2**40 + 3, -(2**59), 2**60])
def test_alibi_far_away(dtype, offset):
    """Far from all keys only the differences of distances are left: as if the query sat beside the keys."""
    q, k, v = qkv(4, dtype, heads=(4, 2), lengths=(5, 300), dims=(8, 4))
    slopes = qkv_fast.alibi_slopes(4)
    far = qkv_fast.attention(q, k, v, alibi_slopes=slopes, q_offset=offset)
    near = reference.attention(q, k, v, alibi_slopes=slopes, q_offset=300 if offset > 0 else -300)
    # A score is offset * slope + something: that something is only as exact as eps of the whole.
    loss = abs(offset) * slopes[:, None, None] * np.finfo(dtype).eps
    error = np.abs(far - near) / np.abs(v).max()
    assert (error <= 16 * np.finfo(dtype).eps + 2 * loss).all()
    assert np.isfinite(far).all()


@every_path
@dtypes
def test_alibi_takes_any_real_numbers(dtype):
    q, k, v = heads_of(dtype, 5, 33, 70)
    slopes = np.array([0.5, 0.25, 1, 2])
    expected = qkv_fast.attention(q, k, v, alibi_slopes=slopes, return_lse=True)
    for given in (slopes.tolist(), slopes.astype("f2"), slopes.astype(">f4"), np.repeat(slopes, 3)[::3]):
        same_bits(qkv_fast.attention(q, k, v, alibi_slopes=given, return_lse=True), expected)
    same_bits(qkv_fast.attention(q, k, v, alibi_slopes=[0, 1, 2, 3]), qkv_fast.attention(
        q, k, v, alibi_slopes=np.arange(4, dtype="u1")))  # fmt: skip


# Sinks

SINKS = {
    "usual": [0.0, 1.5, -2.0, 4.0],
    "none": [-np.inf] * 4,
    "some": [-np.inf, 3.0, -np.inf, 0.5],
    "small": [-1e4] * 4,
    "large": [50.0, 1e3, 1e6, 30.0],
}


@every_path
@dtypes
@pytest.mark.parametrize("name", SINKS)
def test_sinks(dtype, name):
    for n, lengths in enumerate(LENGTHS):
        q, k, v = heads_of(dtype, n, *lengths)
        check(q, k, v, sinks=SINKS[name])
        check(q, k, v, sinks=SINKS[name], causal=True)


@every_path
@dtypes
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sink_counts_once(dtype, threads):
    """Over many chunks, also if threads share them: the weights and the sink's sum to 1."""
    q, k, v = qkv(6, dtype, heads=(4, 2), lengths=(2, 9000))
    sinks = np.array([9.0, 8.0, 9.5, -np.inf])
    out, lse = check(q, k, np.ones_like(v), sinks=sinks, num_threads=threads)
    share = 1 - np.exp(sinks[:, None] - lse.astype("f8"))
    eps = np.finfo(dtype).eps  # of an LSE of about 10
    np.testing.assert_allclose(out[..., 0], share, rtol=0, atol=20 * eps)


@every_path
@dtypes
def test_a_sink_of_minus_infinity_is_none(dtype):
    q, k, v = heads_of(dtype, 7, 60, 1100)
    plain = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    same_bits(qkv_fast.attention(q, k, v, causal=True, return_lse=True, sinks=[-np.inf] * 4), plain)


@every_path
@dtypes
@pytest.mark.parametrize("lq", [1, 3, 60])
def test_only_the_sink_is_visible(dtype, lq):
    """Output 0; the LSE is the sink."""
    q, k, v = heads_of(dtype, 8, lq, 300)
    sinks = np.array([0.25, -3.0, 1e30, -np.inf])
    rounded = np.finfo(dtype).eps  # maxima are kept in units of the scale
    for options in (
        dict(kv_lengths=0),
        dict(mask=np.array(False)),
        dict(bias=np.full((1, 300), -np.inf, dtype)),
        dict(causal=True, q_offset=-lq),
        dict(segments=([1] * lq, [0] * 300)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, lse = qkv_fast.attention(q, k, v, sinks=sinks, return_lse=True, **options)
        assert not out.any() and not np.signbit(out).any()
        np.testing.assert_allclose(lse, np.broadcast_to(sinks[:, None], (4, lq)), rtol=rounded)
    q, k, v = heads_of(dtype, 8, lq, 0)
    lse = qkv_fast.attention(q, k, v, sinks=sinks, return_lse=True)[1]
    np.testing.assert_allclose(lse, np.broadcast_to(sinks[:, None], (4, lq)), rtol=rounded)


@every_path
@dtypes
def test_sinks_are_neither_scaled_nor_capped(dtype):
    q, k, v = heads_of(dtype, 9, 33, 130)
    for options in (dict(scale=3.0), dict(scale=-0.01), dict(softcap=2.0), dict(scale=0.0)):
        check(q, k, v, sinks=[7.0, 20.0, -1.0, 0.0], **options)


@every_path
@dtypes
def test_a_huge_sink_takes_all(dtype):
    q, k, v = heads_of(dtype, 10, 20, 200)
    out, lse = qkv_fast.attention(q, k, v, sinks=[1e30] * 4, return_lse=True)
    assert not out.any()
    np.testing.assert_allclose(lse, 1e30, rtol=np.finfo(dtype).eps)


@every_path
@dtypes
def test_merging_partials_with_one_sink(dtype):
    """A sink goes to exactly one of the parts."""
    q, k, v = heads_of(dtype, 11, 20, 200)
    sinks = [1.0, 3.0, -np.inf, 5.0]
    parts = [
        qkv_fast.attention(q, k[:, keys], v[:, keys], sinks=own, return_lse=True)
        for keys, own in ((slice(70), None), (slice(70, 200), sinks))
    ]
    out, lse = qkv_fast.merge_partials(*zip(*parts, strict=True))
    whole = qkv_fast.attention(q, k, v, sinks=sinks, return_lse=True)
    eps = np.finfo(dtype).eps  # two results of a few roundings each
    np.testing.assert_allclose(out, whole[0], rtol=0, atol=8 * eps * np.abs(v).max())
    np.testing.assert_allclose(lse, whole[1], rtol=4 * eps)


# Soft caps


@every_path
@dtypes
@pytest.mark.parametrize("softcap", [1e-30, 1e-3, 0.3, 1.0, 5.0, 50.0, 1e4, 1e30, np.float32(20), 7])
def test_softcap(dtype, softcap):
    for n, lengths in enumerate(LENGTHS):
        for scale in (None, 3.0):
            check(*heads_of(dtype, n, *lengths), softcap=softcap, scale=scale)


@every_path
@dtypes
def test_tanh(dtype):
    """One key without neighbours makes the LSE the capped score itself: tanh to the last bits, from tiny to huge."""
    x = np.concatenate([[0.0], np.geomspace(1e-20, 100, 3000), np.linspace(0.3, 10, 3000), [1e9, 1e30]])
    x = np.concatenate([x, -x]).astype(dtype)
    k = v = np.ones((1, 1), dtype)
    for cap in (1.0, 30.0, 0.5):
        q = (x * x.dtype.type(cap))[:, None]
        _, lse = qkv_fast.attention(q, k, v, scale=1.0, softcap=cap, return_lse=True)
        exact = cap * np.tanh(q[:, 0].astype(np.longdouble) / np.longdouble(cap))
        error = np.abs(lse - exact)
        # relative to the result: as good as NumPy's own in the type, and a rounding of the quotient and the product
        wrong = error > 6 * np.finfo(dtype).eps * np.abs(exact)
        assert not wrong.any(), (cap, q[wrong, 0][:3], lse[0, wrong][:3])
        assert (np.abs(lse) <= cap * (1 + 2 * np.finfo(dtype).eps)).all()



@every_path
@dtypes
def test_infinite_scores_are_capped(dtype):
    """A score of -inf becomes -softcap, which excludes nothing; NaN stays NaN."""
    q, k, v = heads_of(dtype, 12, 5, 70)
    q = np.abs(q)
    k[0, 3], k[1, 5] = -np.inf, np.inf
    check(q, k, v, softcap=2.0)
    k[0, 3, 0] = np.nan
    out, _ = check(q, k, v, softcap=2.0)
    assert np.isnan(out[:2]).all() and np.isfinite(out[2:]).all()


@every_path
@dtypes
def test_order_of_changes(dtype):
    """The cap holds scores, not what is added to them; nothing that is added is scaled."""
    rng = np.random.default_rng(13)
    q, k, v = heads_of(dtype, 13, 33, 130)
    bias = (10 * rng.standard_normal((33, 130))).astype(dtype)
    changes = dict(bias=bias, alibi_slopes=[0.5, 0.1, 1.0, 2.0], softcap=1.5, scale=2.0, sinks=[1.0, 2.0, 3.0, 4.0])
    for n in range(2, 6):
        for names in itertools.combinations(changes, n):
            check(q, k, v, **{name: changes[name] for name in names})


# The reference itself


def test_the_reference_in_loops():
    """The definition, one number at a time."""
    rng = np.random.default_rng(14)
    q, k, v = rng.standard_normal((3, 2, 4, 3))
    mask, bias = rng.random((2, 4, 4)) < 0.7, rng.standard_normal((4, 4))
    slopes, sinks, cap, scale = [0.5, 0.25], [0.3, -0.7], 1.3, 0.9
    ids = [0, 1, 1, 0], [1, 0, 1, 1]
    out, lse = reference.attention(
        q, k, v, mask=mask, bias=bias, segments=ids, alibi_slopes=slopes, sinks=sinks, softcap=cap, scale=scale,
        causal=True, q_offset=1, return_lse=True,
    )  # fmt: skip
    for h, i in np.ndindex(2, 4):
        weights = {}
        for j in range(4):
            if mask[h, i, j] and j <= i + 1 and ids[0][i] == ids[1][j]:
                score = cap * math.tanh(scale * math.fsum(q[h, i] * k[h, j]) / cap)
                weights[j] = math.exp(score - slopes[h] * abs(i + 1 - j) + bias[i, j])
        total = math.exp(sinks[h]) + math.fsum(weights.values())
        expected = sum((w * v[h, j] for j, w in weights.items()), np.zeros(3)) / total
        np.testing.assert_allclose(out[h, i].astype("f8"), expected, rtol=1e-12, atol=1e-12)  # rounded to double
        np.testing.assert_allclose(float(lse[h, i]), math.log(total), rtol=1e-12)
