"""How far outputs move without a key or a group of keys: as with these hidden by a mask, and by the error rule."""

import itertools

import numpy as np
import pytest
from _compositions import CASES, poisoned, visible
from _patterns import PATTERNS, fits
from _questions import check_influence
from _util import ALL_TYPES, qkv, same_bits
from hypothesis import given
from hypothesis import strategies as st

from qkv_fast import attention, reference, spotlight

pytestmark = pytest.mark.usefixtures("isa")


def check(q, k, v, **options):
    got = spotlight.influence(q, k, v, **options)
    options.pop("num_threads", None)
    check_influence(got, q, k, v, **options)
    return got


@given(case=CASES, threads=st.integers(1, 4))
def test_values_of_their_own(case, threads):
    """Values that are not the keys: by the error rule, and the same bits with poison where nobody looks."""
    arrays, options = case.arrays(), case.options()
    got = check(*arrays, num_threads=threads, **options)
    hidden = poisoned(case, arrays, visible(case, options))
    same_bits(spotlight.influence(*hidden, num_threads=5 - threads, **options), got)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("deviation", [1, 5, 20, 300])
def test_hidden_by_a_mask(dtype, deviation):
    """Every key. At 300 the heaviest have all the weight."""
    q, k, v = qkv(1, dtype, heads=(4, 2), lengths=(60, 150), dims=(16, 8))
    q *= q.dtype.type(deviation)
    seen = np.random.default_rng(1).random((60, 150)) < 0.6
    for options in ({}, dict(causal=True, q_offset=0), dict(mask=seen, sinks=np.arange(4.0)), dict(window=(3, 0))):
        # At 300 the rounding of scores in the thousands decides, NumPy's no less: the rule would be a matter of luck.
        got = (check if deviation < 300 else spotlight.influence)(q, k, v, **options).astype("f8")
        whole = reference.attention(q, k, v, **options)
        largest = np.abs(whole).max(initial=1)
        for j in range(0, 150, 7):
            without = options | dict(mask=options.get("mask", True) & (np.arange(150) != j))
            exact = np.sqrt(((whole - reference.attention(q, k, v, **without)) ** 2).sum(axis=(-2, -1)))
            # A score of size s is off by eps s, and its weight by that; 60 queries of 8 elements.
            eps = np.finfo(dtype).eps * 8 * deviation * 8 * largest * np.sqrt(60)
            np.testing.assert_allclose(got[:, j], exact, rtol=0, atol=4 * eps)


def test_nothing_else_to_see():
    """Without its only key an output is 0, so it moves by all of itself; with a sink it moves by less."""
    q, k, v = np.ones((2, 1), "f4"), np.ones((2, 1), "f4"), np.array([[3.0, 4.0], [6.0, 8.0]], "f4")
    own = np.eye(2, dtype=bool)
    assert spotlight.influence(q, k, v, mask=own).tolist() == [5, 10]
    got = spotlight.influence(q[None], k[None], v[None], mask=own, sinks=[1.0])
    np.testing.assert_allclose(got, [[2.5, 5]], rtol=1e-6)
    assert spotlight.influence(q, k, v, mask=False).tolist() == [0, 0]


def test_values_far_from_0():
    """What all values have in common moves nothing: they are compared with outputs from a centre."""
    q, k, v = qkv(2, lengths=(70, 5))
    far = v + np.float32(1000)
    near = spotlight.influence(q, k, far - np.float32(1000))
    # Outputs are given to eps of 1000, 70 queries of 16 elements; squares of values would lose 16 million eps.
    np.testing.assert_allclose(spotlight.influence(q, k, far), near, rtol=0, atol=4 * 2**-23 * 1000 * np.sqrt(70 * 16))


@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_saved_lse_and_output(dtype):
    """They save passes, in any layout, strides and type that attention gives them in."""
    q, k, v = qkv(3, dtype, batch=(2,), heads=(6, 2), lengths=(70, 1300), dims=(24, 40))
    wide = np.float64 if dtype == "float64" else np.float32
    options = dict(causal=True, sinks=np.zeros(6))
    plain = check(q, k, v, **options)
    own, lse = attention(q, k, v, return_lse=True, **options)
    out = attention(q, k, v, out=np.empty(own.shape, wide), **options)
    for saved in (dict(output=out), dict(lse=lse), dict(lse=lse, output=out)):
        np.testing.assert_allclose(spotlight.influence(q, k, v, **saved, **options), plain, rtol=2e-5)
    rounded = spotlight.influence(q, k, v, output=own, lse=lse, **options)
    # Outputs that are rounded by u are off by that each: 70 queries of 40 elements, and outputs of 1 or so.
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, 1e-6)
    np.testing.assert_allclose(rounded, plain, rtol=1e-5, atol=u * np.sqrt(70 * 40))
    swapped = [x.swapaxes(1, 2) for x in (q, k, v, out)]
    got = spotlight.influence(*swapped[:3], lse=lse, output=swapped[3], layout="blhd", **options)
    same_bits(got, spotlight.influence(q, k, v, lse=lse, output=out, **options))
    foreign = out.astype(out.dtype.newbyteorder(">"))[..., ::-1].copy()[..., ::-1]
    same_bits(spotlight.influence(q, k, v, lse=lse, output=foreign, **options), got)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_strides(pattern):
    for dtype in ("float32", "bfloat16"):
        if fits(pattern, dtype):
            q, k, v = qkv(4, dtype, batch=(2,), heads=(4, 2), lengths=(9, 30), dims=(8, 12))
            got = spotlight.influence(*(PATTERNS[pattern](x) for x in (q, k, v)))
            same_bits(got, spotlight.influence(q, k, v))


def test_nan_in_values():
    """It reaches the keys of the queries that see it, and no others."""
    q, k, v = qkv(5, lengths=(90, 90))
    v[0, 40, 3] = np.nan
    got = spotlight.influence(q, k, v, causal=True, window=20)
    assert np.isnan(got[0, 20:61]).all() and np.isfinite(got[0, :20]).all() and np.isfinite(got[0, 61:]).all()
    exact = reference.spotlight.influence(q, k, v, causal=True, window=20)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_a_query_of_one_heavy_key_in_another_range():
    """Ranges of keys are tasks of their own, and so are queries: several chunks, on any number of threads."""
    q, k, v = qkv(6, heads=(2, 1), lengths=(200, 3000))
    k[0, [100, 2900]] *= 8
    got = check(q, k, v, num_threads=1)
    for threads in (2, 3, 7):
        same_bits(spotlight.influence(q, k, v, num_threads=threads), got)
    one = spotlight.influence(q[:1], k, v)
    same_bits(np.ascontiguousarray(got[:1]), one)


def test_other_lse():
    """One that is not theirs: what the formula gives, without a word; here all weights are doubled, to 1 and more."""
    q, k, v = np.zeros((3, 1), "f4"), np.zeros((2, 1), "f4"), np.array([[1.0], [3.0]], "f4")
    lse = np.full(3, -1, "f4")
    got = spotlight.influence(q, k, v, lse=lse, output=np.full((3, 1), 2, "f4"))
    assert got.shape == (2,) and np.isfinite(got).all()


@given(case=CASES, threads=st.integers(1, 4), data=st.data())
def test_groups(case, threads, data):
    """Documents, scattered ones, some empty, keys of none: by the error rule, and the same bits with poison."""
    arrays, options = case.arrays(), case.options()
    groups = case.rng.integers(-1, data.draw(st.sampled_from([0, 1, 2, 5, 40])), case.lengths[1])
    if data.draw(st.booleans()):
        groups = np.sort(groups)
    got = check(*arrays, groups=groups, num_threads=threads, **options)
    assert got.shape[-1] == groups.max() + 1
    hidden = poisoned(case, arrays, visible(case, options))
    same_bits(spotlight.influence(*hidden, groups=groups, num_threads=5 - threads, **options), got)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("deviation", [1, 20, 300])
def test_groups_hidden_by_a_mask(dtype, deviation):
    q, k, v = qkv(7, dtype, heads=(4, 2), lengths=(60, 1300), dims=(16, 8))
    q *= q.dtype.type(deviation)
    groups = np.repeat([2, -1, 0, 1, 2, 4], [300, 50, 7, 800, 100, 43])
    seen = np.random.default_rng(1).random((60, 1300)) < 0.6
    for options in ({}, dict(causal=True, q_offset=0), dict(mask=seen, sinks=np.arange(4.0)), dict(window=(3, 0))):
        got = (check if deviation < 300 else spotlight.influence)(q, k, v, groups=groups, **options).astype("f8")
        whole = reference.attention(q, k, v, **options)
        for g in range(5):
            without = options | dict(mask=options.get("mask", True) & (groups != g))
            exact = np.sqrt(((whole - reference.attention(q, k, v, **without)) ** 2).sum(axis=(-2, -1)))
            # As for keys.
            eps = np.finfo(dtype).eps * 8 * deviation * 8 * np.abs(whole).max(initial=1) * np.sqrt(60)
            np.testing.assert_allclose(got[:, g], exact, rtol=0, atol=4 * eps)


def test_groups_of_one_key_are_keys():
    q, k, v = qkv(8, batch=(2,), heads=(4, 2), lengths=(70, 150))
    for options in ({}, dict(causal=True, alibi_slopes=[0.5, 1, 2, 0])):
        keys = spotlight.influence(q, k, v, **options)
        got = spotlight.influence(q, k, v, groups=np.arange(150)[::-1], **options)
        np.testing.assert_allclose(got[..., ::-1], keys, rtol=2e-5, atol=1e-5)


def test_groups_of_packed_sequences():
    """All sequences together: squares of each alone add up."""
    cu_q, cu_k = [0, 3, 3, 73], [0, 9, 14, 1314]
    q, k, v = (x[0].swapaxes(0, 1) for x in qkv(9, batch=(1,), heads=(4, 2), lengths=(1314, 1314)))
    q, groups = q[:73], np.random.default_rng(9).integers(-1, 3, 1314)
    got = spotlight.influence(q, k, v, groups=groups, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True)
    squares = np.zeros((4, 3))
    for b in range(3):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        own = spotlight.influence(q[rows], k[keys], v[keys], groups=groups[keys], causal=True, layout="blhd")
        squares[:, : own.shape[1]] += own.astype("f8") ** 2
    np.testing.assert_allclose(got, np.sqrt(squares), rtol=1e-6)


def test_groups_of_a_sequence_have_the_bits_that_it_has_alone():
    """Whoever lies beside it: how its queries are shared out to sums is its own matter. In float64, which shows it."""
    lengths = [70, 1, 2900, 333]
    starts = np.cumsum([0, *lengths])
    q, k, v = (x[0].swapaxes(0, 1) for x in qkv(10, "float64", batch=(1,), heads=(2, 1), lengths=(starts[-1],) * 2))
    for b, (first, last) in enumerate(itertools.pairwise(starts)):
        own = np.random.default_rng(b).integers(0, 3, last - first)
        own[: 3 if last - first > 2 else 0] = [0, 1, 2][: last - first]
        groups = np.full(starts[-1], -1)
        groups[first:last] = own
        options = dict(causal=True, num_threads=2)
        got = spotlight.influence(q, k, v, groups=groups, cu_seqlens_q=starts, cu_seqlens_k=starts, **options)
        one = slice(first, last)
        same_bits(got, spotlight.influence(q[one], k[one], v[one], groups=own, layout="blhd", **options))


@pytest.mark.parametrize(
    "error, words, groups",
    [
        (TypeError, "groups must be integers, got float64", np.zeros(9)),
        (TypeError, "groups must be integers, got bool", np.zeros(9, bool)),
        (ValueError, r"groups must have the shape \(9,\), .* got \(2, 9\)", np.zeros((2, 9), int)),
        (ValueError, r"groups must have the shape \(9,\), .* got \(8,\)", np.zeros(8, int)),
        (ValueError, "groups must be -1 .*, got -2", np.full(9, -2)),
        (OverflowError, "groups are too many", np.full(9, 2**63 - 1)),
        (OverflowError, "groups are too many", np.full(9, 2**61)),
    ],
)
def test_groups_that_are_none(error, words, groups):
    q, k, v = qkv(0, batch=(2,), heads=(4, 2), lengths=(5, 9))
    with pytest.raises(error, match=f"^spotlight.influence: {words}"):
        spotlight.influence(q, k, v, groups=groups)
