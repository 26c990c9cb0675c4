"""Key limits: causal, window, q_offset, kv_lengths, what they compose to, and what results then mean."""

import itertools
import warnings

import numpy as np
import pytest
from _util import TYPES, check, normal, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)

LENGTHS = [(1, 1), (1, 9), (9, 1), (40, 40), (7, 130), (130, 7), (65, 200), (200, 65)]


@dtypes
@pytest.mark.parametrize("causal", [False, True, "top-left"])
@pytest.mark.parametrize(
    "window", [None, 0, 3, 70, (0, 0), (2, None), (None, 2), (None, None), (5, 0), (0, 5), (50, 20), [4, 4]]
)
def test_causal_and_window(dtype, causal, window):
    for n, lengths in enumerate(LENGTHS):
        check(*qkv(n, dtype, heads=(2, 1), lengths=lengths, dims=(8, 4)), causal=causal, window=window)


@dtypes
def test_the_last_query_sees_the_last_key(dtype):
    q, k, v = qkv(1, dtype, lengths=(3, 5))
    out = qkv_fast.attention(q, k, v, causal=True)
    for i in range(3):  # positions 2, 3, 4
        np.testing.assert_array_equal(out[:, i], qkv_fast.attention(q, k[:, : 3 + i], v[:, : 3 + i])[:, i])
    out = qkv_fast.attention(q, k, v, causal="top-left")
    np.testing.assert_array_equal(out[:, 0], v[:, 0])
    same_bits(out, qkv_fast.attention(q, k, v, causal=True, q_offset=0))


@dtypes
def test_integer_window(dtype):
    """w is (w, w), or (w, 0) when causal: a causal w sees w + 1 keys. When causal, the right side is 0."""
    q, k, v = qkv(2, dtype, lengths=(50, 50))
    same_bits(qkv_fast.attention(q, k, v, window=7), qkv_fast.attention(q, k, v, window=(7, 7)))
    causal = qkv_fast.attention(q, k, v, window=7, causal=True)
    for window in ((7, 0), (7, None), (7, 30), np.int64(7)):
        same_bits(qkv_fast.attention(q, k, v, window=window, causal=True), causal)
    same_bits(qkv_fast.attention(q, k, v, window=(7, 0)), causal)
    only = np.zeros((1, 50, 50), dtype)
    only[0] = np.eye(50)
    weights = qkv_fast.attention(q, k, only, window=7, causal=True)
    assert ((weights[0] > 0).sum(axis=1) == np.minimum(np.arange(50) + 1, 8)).all()


@dtypes
@pytest.mark.parametrize("causal, window", [(True, None), (False, (5, 2)), (True, 20), (False, (None, 3))])
def test_q_offset(dtype, causal, window):
    for n, (lq, lk) in enumerate(LENGTHS):
        q, k, v = qkv(n, dtype, lengths=(lq, lk), dims=(8, 4))
        for offset in (-300, -lq, -1, 0, 1, lk - lq, lk - 1, lk, lk + 300):
            check(q, k, v, causal=causal, window=window, q_offset=offset)


@dtypes
def test_q_offset_per_sequence(dtype):
    q, k, v = qkv(3, dtype, batch=(2, 3), heads=(4, 2), lengths=(5, 70), dims=(8, 4))
    for offset in ([0, 10, 69], [[3], [-4]], np.arange(6, dtype="uint8").reshape(2, 3), np.int32(7), [[65]]):
        out, lse = check(q, k, v, causal=True, window=30, q_offset=offset)
        offset = np.broadcast_to(offset, (2, 3))
        for b in np.ndindex(2, 3):
            options = dict(causal=True, window=30, return_lse=True)
            one = qkv_fast.attention(q[b], k[b], v[b], q_offset=int(offset[b]), **options)
            same_bits((out[b], lse[b]), one)


@dtypes
@pytest.mark.parametrize("offset", [2**31, -(2**31), 2**40, -(2**40), 2**60, -(2**60)])
def test_far_offsets(dtype, offset):
    """A position out of sight of every key is like any other out of sight; nothing wraps around."""
    q, k, v = qkv(4, dtype, lengths=(40, 70))
    whole, none = qkv_fast.attention(q, k, v), np.zeros_like(q)
    for window, left_sees, right_sees in ((None, True, False), (50, False, False), ((None, 50), True, False)):
        out = qkv_fast.attention(q, k, v, causal=True, window=window, q_offset=offset)
        same_bits(out, whole if (left_sees if offset > 0 else right_sees) else none)
    out = qkv_fast.attention(q, k, v, window=(50, None), q_offset=offset)
    same_bits(out, none if offset > 0 else whole)


@pytest.mark.parametrize("offset", [2**60 + 1, -(2**60) - 1, 2**63 - 1, -(2**63)])
def test_offsets_that_are_too_far(offset):
    """Beyond 2**60 a position would not fit in 63 bits with everything that is added to it."""
    q, k, v = qkv(4)
    for given in (offset, np.array([offset])):
        with pytest.raises(OverflowError, match="q_offset"):
            qkv_fast.attention(q[None], k[None], v[None], q_offset=given, causal=True)


@dtypes
@pytest.mark.parametrize("far", [2**31, 2**32 + 1, 2**62, 2**63 - 1, 10**30])
def test_far_windows(dtype, far):
    q, k, v = qkv(5, dtype, lengths=(40, 70))
    same_bits(qkv_fast.attention(q, k, v, window=far), qkv_fast.attention(q, k, v))
    causal = qkv_fast.attention(q, k, v, causal=True)
    same_bits(qkv_fast.attention(q, k, v, window=(far, 0)), causal)
    same_bits(qkv_fast.attention(q, k, v, window=far, causal=True), causal)
    both = qkv_fast.attention(q, k, v, window=(far, 3), q_offset=-5)
    same_bits(both, qkv_fast.attention(q, k, v, window=(None, 3), q_offset=-5))


@dtypes
def test_kv_lengths(dtype):
    q, k, v = qkv(6, dtype, batch=(4,), heads=(4, 2), lengths=(33, 150), dims=(8, 4))
    for lengths in (
        [0, 1, 97, 150],
        [150] * 4,
        np.array([96, 95, 64, 33], dtype="uint16"),
        40,
        np.int8(3),
        [17],
    ):
        out, lse = check(q, k, v, kv_lengths=lengths)
        for b, n in enumerate(np.broadcast_to(lengths, 4)):
            same_bits((out[b], lse[b]), qkv_fast.attention(q[b], k[b, :, :n], v[b, :, :n], return_lse=True))
    same_bits(qkv_fast.attention(q, k, v, kv_lengths=150), qkv_fast.attention(q, k, v))


@dtypes
def test_kv_lengths_with_positions(dtype):
    q, k, v = qkv(7, dtype, batch=(4,), heads=(4, 2), lengths=(5, 150), dims=(8, 4))
    for lengths, window in (([0, 5, 97, 150], None), ([150, 60, 33, 8], 20), (70, (3, 4))):
        out, lse = check(q, k, v, kv_lengths=lengths, causal=True, window=window)
        for b, n in enumerate(np.broadcast_to(lengths, 4)):
            alone = qkv_fast.attention(
                q[b], k[b, :, :n], v[b, :, :n], causal=True, window=window, return_lse=True
            )
            same_bits((out[b], lse[b]), alone)
        check(q, k, v, kv_lengths=lengths, causal=True, window=window, q_offset=0)
        check(q, k, v, kv_lengths=lengths, window=(2, None), q_offset=[3, 50, 90, -2])
    check(q, k, v, kv_lengths=[1, 2, 3, 4], causal=True, q_offset=0)  # padded queries
    check(q, k, v, kv_lengths=[1, 2, 3, 4], causal="top-left")
    check(q, k, v, kv_lengths=[1, 2, 3, 4])  # without positions there is one reading
    check(q, k, v, kv_lengths=[1, 2, 3, 4], window=(None, None))


@dtypes
def test_batch_axes_of_limits(dtype):
    """Limits broadcast to the batch, also where the batch axes come from v alone."""
    rng = np.random.default_rng(8)
    q, k = normal(rng, (1, 1, 2, 5, 8), dtype), normal(rng, (2, 9, 8), dtype)
    v = normal(rng, (3, 2, 2, 9, 4), dtype)
    for lengths in ([9, 6], [[9], [8], [7]], [[9, 5], [6, 9], [7, 8]], 7):
        check(q, k, v, kv_lengths=lengths)
        check(q, k, v, kv_lengths=lengths, q_offset=[[1], [2], [6]], causal=True)


@dtypes
def test_everything_composes(dtype):
    """Pairs and triples of options, for one row, a few, and more than a panel."""
    rng = np.random.default_rng(9)
    for n in range(150):
        lq, lk = int(rng.choice([1, 2, 5, 33, 70])), int(rng.integers(1, 300))
        q, k, v = qkv(n, dtype, batch=(2,), heads=(2, 1), lengths=(lq, lk), dims=(4, 4))
        sides = [None if rng.random() < 0.3 else int(rng.integers(0, 100)) for _ in range(2)]
        options = dict(
            causal=bool(rng.integers(2)),
            window=tuple(sides) if rng.random() < 0.7 else None,
            q_offset=rng.integers(-50, 200, 2) if rng.random() < 0.5 else None,
            kv_lengths=rng.integers(0, lk + 1, 2) if rng.random() < 0.5 else None,
        )
        positions = options["causal"] or options["window"] not in (None, (None, None))
        lengths = options["kv_lengths"]
        if positions and options["q_offset"] is None and lengths is not None:
            options["kv_lengths"] = np.maximum(lengths, min(lq, lk)) if lk >= lq else None
        check(q, k, v, **options)


@dtypes
def test_tiles_are_skipped_and_full_where_they_can_be(dtype):
    q, k, v = qkv(10, dtype, lengths=(2048, 2048), dims=(16, 16))
    with _runtime.counters() as whole:
        qkv_fast.attention(q, k, v)
    assert whole["tiles_full"] > 0 and whole["tiles_partial"] == whole["tiles_skipped"] == 0
    with _runtime.counters() as causal:
        qkv_fast.attention(q, k, v, causal=True)
    assert (
        causal["tiles_full"] < 0.7 * whole["tiles_full"]
        and 0 < causal["tiles_partial"] < causal["tiles_full"]
    )
    with _runtime.counters() as window:
        qkv_fast.attention(q, k, v, causal=True, window=255)
    with _runtime.counters() as half:
        qkv_fast.attention(q[:, :1024], k[:, :1024], v[:, :1024], causal=True, window=255)
    # an eighth of the keys; and work that grows with the rows, not with rows times keys (4.0)
    assert window["tiles_full"] < 0.2 * whole["tiles_full"]
    for name in ("tiles_full", "tiles_partial"):
        assert window[name] < 2.6 * half[name]


@dtypes
def test_skipping_finds_the_visible_keys(dtype):
    """Narrow windows deep in many keys: a tile that is skipped by mistake loses all that a row sees."""
    q, k, v = qkv(11, dtype, lengths=(60, 3000), dims=(4, 4))
    for offset, window in itertools.product((0, 95, 96, 97, 1000, 1151, 1152, 1153, 2900), (0, 1, (0, 200))):
        check(q, k, v, q_offset=offset, window=window)


@dtypes
@pytest.mark.parametrize("lq", [1, 3, 40])
def test_a_query_that_sees_nothing(dtype, lq):
    """Output 0, LSE -inf, no warning; with neighbours that see something in the same tile, and without."""
    q, k, v = qkv(12, dtype, lengths=(lq, 50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (
            dict(q_offset=-lq - 5, causal=True),
            dict(q_offset=60, window=(2, 2)),
            dict(kv_lengths=0),
            dict(kv_lengths=0, causal=True),
        ):
            out, lse = qkv_fast.attention(q, k, v, return_lse=True, **options)
            assert not out.any() and (lse == -np.inf).all()
            assert not np.signbit(out).any()
        out, lse = qkv_fast.attention(q, k, v, causal=True, q_offset=-1, return_lse=True)
    assert not out[:, 0].any() and (lse[:, 0] == -np.inf).all()
    assert (out[:, 1:] != 0).any(axis=(0, 2)).all() and np.isfinite(lse[:, 1:]).all()


@dtypes
@pytest.mark.parametrize("lq", [1, 3, 40])
def test_a_score_of_minus_infinity_is_excluded(dtype, lq):
    """Whatever made it: an infinite key or query. With all scores -inf, the query sees nothing."""
    q, k, v = qkv(13, dtype, lengths=(lq, 200))
    q = np.abs(q)
    k2 = k.copy()
    gone = [0, 7, 64, 100, 199]
    k2[:, gone, 3] = -np.inf
    rest = np.delete(np.arange(200), gone)
    out, lse = check(q, k2, v)
    expected = qkv_fast.attention(q, k[:, rest], v[:, rest], return_lse=True)
    eps = np.finfo(dtype).eps  # another order of the same terms: twice the constant of the error rule
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=8 * eps * np.abs(v).max())
    np.testing.assert_allclose(lse, expected[1], rtol=0, atol=8 * eps * np.abs(lse).max())
    k2[...] = -np.inf
    out, lse = qkv_fast.attention(q, k2, v, return_lse=True)
    assert not out.any() and (lse == -np.inf).all()
    k2[...] = -1
    q2 = q.copy()
    q2[:, -1] = np.inf
    out, lse = qkv_fast.attention(q2, k2, v, return_lse=True)
    assert not out[:, -1].any() and (lse[:, -1] == -np.inf).all()
    assert np.isfinite(lse[:, :-1]).all() and np.isfinite(out).all()
