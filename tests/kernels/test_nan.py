"""NaN and infinity: those a query may not attend to never matter, those it attends to are never swallowed.

The counters say that a test met what it is about: a tile with per-row limits, or the careful second run of a
panel.
"""

import warnings

import numpy as np
import pytest
from _util import ALL_TYPES, check, normal, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", ALL_TYPES)
rows = pytest.mark.parametrize("lq", [1, 4, 40])
poisons = pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@dtypes
@rows
@poisons
def test_nothing_past_kv_lengths_matters(dtype, lq, poison):
    """A poisoned cache tail: padding, alone or in one tile with keys that count."""
    q, k, v = qkv(1, dtype, batch=(3,), heads=(4, 2), lengths=(lq, 300), dims=(8, 8))
    lengths = [300, 101, 0]
    for options in ({}, dict(causal=True, q_offset=250), dict(window=(60, 20), q_offset=[200, 80, 0])):
        clean = qkv_fast.attention(q, k, v, kv_lengths=lengths, return_lse=True, **options)
        k2, v2 = k.copy(), v.copy()
        for b, n in enumerate(lengths):
            k2[b, :, n:], v2[b, :, n:] = poison, poison
        same_bits(qkv_fast.attention(q, k2, v2, kv_lengths=lengths, return_lse=True, **options), clean)
        check(q, k2, v2, kv_lengths=lengths, **options)


@dtypes
@rows
@poisons
def test_masked_poison_beside_rows_that_attend(dtype, lq, poison):
    """In one tile, a key that some rows attend to and others may not: the others keep their bits."""
    q, k, v = qkv(
        2, dtype, heads=(3, 1), lengths=(lq, 300), dims=(8, 8)
    )  # 3: no vector holds one position alone
    for offset in (300 - lq, 120, 95):
        clean = qkv_fast.attention(q, k, v, causal=True, q_offset=offset, return_lse=True)
        for first in range(offset, min(offset + lq + 1, 300), 5):  # poison from this key on
            k2, v2 = k.copy(), v.copy()
            v2[:, first:] = poison
            with _runtime.counters() as seen:
                got = qkv_fast.attention(q, k, v2, causal=True, q_offset=offset, return_lse=True)
            safe = first - offset  # rows before this one do not see it
            if lq > 1:
                assert seen["tiles_partial"] > 0
            same_bits((got[0][:, :safe], got[1]), (clean[0][:, :safe], clean[1]))
            assert not np.isfinite(got[0][:, safe:]).any()
            if 0 < safe < lq:
                assert seen["panels_careful"] > 0
            k2[:, first:] = np.nan
            got = qkv_fast.attention(q, k2, v, causal=True, q_offset=offset, return_lse=True)
            same_bits((got[0][:, :safe], got[1][:, :safe]), (clean[0][:, :safe], clean[1][:, :safe]))
            assert np.isnan(got[0][:, safe:]).all() and np.isnan(got[1][:, safe:]).all()
            check(q, k2, v2, causal=True, q_offset=offset)


@dtypes
@poisons
def test_masked_on_the_left(dtype, poison):
    """Keys that have left a sliding window."""
    q, k, v = qkv(3, dtype, lengths=(40, 300), dims=(8, 8))
    options = dict(causal=True, window=50, q_offset=200, return_lse=True)
    clean = qkv_fast.attention(q, k, v, **options)
    k2, v2 = k.copy(), v.copy()
    k2[:, :170], v2[:, :170] = np.nan, poison  # visible to the rows up to 19, whose windows begin at 150..169
    with _runtime.counters() as seen:
        got = qkv_fast.attention(q, k2, v2, **options)
    assert seen["tiles_partial"] > 0
    same_bits((got[0][:, 20:], got[1][:, 20:]), (clean[0][:, 20:], clean[1][:, 20:]))
    assert np.isnan(got[0][:, :20]).all() and np.isnan(got[1][:, :20]).all()


@dtypes
@pytest.mark.parametrize("heads", [(2, 2), (8, 1), (6, 2)])
def test_tiles_full_of_nan(dtype, heads):
    """Half of the keys are NaN and out of everybody's sight, in whole tiles and in parts of one."""
    q, k, v = qkv(4, dtype, batch=(2,), heads=heads, lengths=(70, 700), dims=(8, 8))
    options = dict(window=(20, 10), q_offset=300)  # keys 280..379
    clean = check(q, k, v, **options)
    k[..., :280, :], v[..., :280, :] = np.nan, np.nan
    k[..., 380:, :], v[..., 380:, :] = np.nan, np.inf
    same_bits(qkv_fast.attention(q, k, v, return_lse=True, **options), clean)


@dtypes
@rows
def test_attended_nan_in_values_stays_in_its_column(dtype, lq):
    q, k, v = qkv(5, dtype, heads=(4, 2), lengths=(lq, 200), dims=(8, 40))
    clean = qkv_fast.attention(q, k, v, return_lse=True)
    for key in (0, 64, 95, 199):
        for column in (0, 15, 16, 39):
            v2 = v.copy()
            v2[1, key, column] = np.nan  # of key head 1: query heads 2 and 3
            out, lse = qkv_fast.attention(q, k, v2, return_lse=True)
            assert np.isnan(out[2:, :, column]).all()
            same_bits(lse, clean[1])
            same_bits(out[:2], clean[0][:2])
            same_bits(np.delete(out, column, -1), np.delete(clean[0], column, -1))


@dtypes
@rows
def test_attended_nan_in_queries_and_keys_stays_in_its_rows(dtype, lq):
    q, k, v = qkv(6, dtype, batch=(2,), heads=(4, 2), lengths=(lq, 200), dims=(20, 8))
    clean = qkv_fast.attention(q, k, v, return_lse=True)
    for row in range(0, lq, 7):
        q2 = q.copy()
        q2[1, 2, row, 19] = np.nan
        out, lse = qkv_fast.attention(q2, k, v, return_lse=True)
        assert np.isnan(out[1, 2, row]).all() and np.isnan(lse[1, 2, row])
        assert np.isnan(out).sum() == 8 and np.isnan(lse).sum() == 1
        good = ~np.isnan(lse)
        same_bits((out[good], lse[good]), (clean[0][good], clean[1][good]))
    k2 = k.copy()
    k2[0, 1, 77, 3] = np.nan
    out, lse = check(q, k2, v)
    assert np.isnan(out[0, 2:]).all() and np.isnan(lse[0, 2:]).all()
    same_bits(
        (out[1], out[0, :2], lse[1], lse[0, :2]), (clean[0][1], clean[0][0, :2], clean[1][1], clean[1][0, :2])
    )


@dtypes
@rows
@pytest.mark.parametrize("key", [0, 1, 63, 95, 96, 130, 199])
def test_nan_key_at_every_place_of_a_block(dtype, lq, key):
    """A maximum instruction that prefers the number would lose a NaN score, first or last in its block."""
    q, k, v = qkv(7, dtype, lengths=(lq, 200), dims=(8, 8))
    k[:, key] = np.nan
    for options in ({}, dict(causal=True), dict(window=(300, 300))):
        out, lse = check(q, k, v, **options)
        rows = slice(None) if not options.get("causal") else slice(max(0, key - (200 - lq)), None)
        assert np.isnan(out[:, rows]).all() and np.isnan(lse[:, rows]).all()


@dtypes
@rows
def test_infinite_values(dtype, lq):
    """An infinite value is infinite in its column; with its opposite, NaN."""
    q, k, v = qkv(8, dtype, lengths=(lq, 200), dims=(8, 8))
    v[:, 3, 0], v[:, 150, 1] = np.inf, -np.inf
    v[:, 3, 2], v[:, 190, 2] = np.inf, -np.inf
    out, _ = check(q, k, v)
    assert (out[..., 0] == np.inf).all() and (out[..., 1] == -np.inf).all() and np.isnan(out[..., 2]).all()
    assert np.isfinite(out[..., 3:]).all()


@dtypes
@rows
def test_infinite_scores(dtype, lq):
    """+inf is NaN, by inf - inf; -inf is excluded; 0 * inf in a product is NaN."""
    q, k, v = qkv(9, dtype, lengths=(lq, 200), dims=(8, 8))
    q = np.abs(q)
    k2 = k.copy()
    k2[:, 70, 5] = np.inf
    out, lse = qkv_fast.attention(q, k2, v, return_lse=True)
    assert np.isnan(out).all() and not np.isfinite(lse).any()
    check(q, -k2, v)
    q[:, -1, 5] = 0
    out, lse = qkv_fast.attention(q, -k2, v, return_lse=True)
    assert np.isnan(out[:, -1]).all() and np.isnan(lse[:, -1]).all() and np.isfinite(lse[:, :-1]).all()


@dtypes
@rows
@poisons
def test_value_of_a_key_excluded_by_its_score(dtype, lq, poison):
    """A score of -inf excludes a key like a mask: its value is out of the sum whatever it is."""
    q, k, v = qkv(10, dtype, lengths=(lq, 200), dims=(8, 8))
    q = np.abs(q)
    k[:, [5, 100]] = -np.inf
    clean = qkv_fast.attention(q, k, v, return_lse=True)
    assert np.isfinite(clean[0]).all()
    v[:, [5, 100]] = poison
    same_bits(qkv_fast.attention(q, k, v, return_lse=True), clean)


@dtypes
@rows
def test_all_nan(dtype, lq):
    nan = np.full((2, 130, 8), np.nan, dtype)
    q, k, v = qkv(11, dtype, heads=(2, 2), lengths=(lq, 130), dims=(8, 8))
    for args in ((nan[:, :lq], k, v), (q, nan, v), (q, k, nan), (nan[:, :lq], nan, nan)):
        assert np.isnan(qkv_fast.attention(*args)).all()
        assert np.isnan(qkv_fast.attention(*args, causal=True)).all()
    out, lse = qkv_fast.attention(q, nan, nan, kv_lengths=0, return_lse=True)
    assert not out.any() and (lse == -np.inf).all()


@dtypes
def test_nan_of_either_sign_and_payload(dtype):
    """A signalling NaN is a NaN too, and comes out quiet."""
    q, k, v = qkv(12, dtype, lengths=(20, 100), dims=(8, 8))
    word = f"u{v.dtype.itemsize}"
    infinity = np.array(-np.inf, dtype).view(word)
    v.view(word)[:, 50, 3] = infinity + infinity.dtype.type(1)
    out = qkv_fast.attention(q, k, v)
    assert np.isnan(out[..., 3]).all() and np.isnan(out).sum() == 20


@dtypes
@rows
def test_nan_beyond_the_first_chunk(dtype, lq):
    """Chunks of keys are merged: a NaN in one of them arrives, one out of sight does not."""
    rng = np.random.default_rng(13)
    q, k, v = qkv(13, dtype, lengths=(lq, 5000), dims=(8, 300))
    options = dict(causal=True, q_offset=4000, num_threads=4)
    with _runtime.counters() as seen:
        clean = qkv_fast.attention(q, k, v, return_lse=True, **options)
    assert seen["splits"] > 0
    for key in rng.integers(0, 5000, 12):
        k2, v2 = k.copy(), v.copy()
        k2[:, key] = np.nan
        v2[:, key, 3] = np.inf
        out, lse = qkv_fast.attention(q, k2, v, return_lse=True, **options)
        sees = np.arange(lq) + 4000 >= key
        assert np.isnan(out[:, sees]).all() and np.isnan(lse[:, sees]).all()
        same_bits((out[:, ~sees], lse[:, ~sees]), (clean[0][:, ~sees], clean[1][:, ~sees]))
        out = qkv_fast.attention(q, k, v2, **options)
        assert (out[:, sees, 3] == np.inf).all()
        same_bits(out[:, ~sees], clean[0][:, ~sees])


@dtypes
def test_first_chunks_out_of_sight(dtype):
    """Chunks in which a row sees nothing, before and after the one in which it does, are no NaN."""
    q, k, v = qkv(14, dtype, heads=(1, 1), lengths=(3, 5000), dims=(8, 8))
    for offset in (0, 1030, 2500, 4990):
        check(q, k, v, window=5, q_offset=offset)
        check(q, k, normal(np.random.default_rng(15), v.shape, dtype), window=(0, 3000), q_offset=offset)
