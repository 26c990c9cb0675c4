"""Batches as they come: padded queries, keys that begin late, and queries that say where they sit."""

import numpy as np
import pytest
from _util import TYPES, check, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime, spotlight

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)


@dtypes
@pytest.mark.parametrize(
    "options", [{}, dict(causal=True), dict(window=(40, 9)), dict(causal=True, sinks=[0.5, -np.inf, 3, 1])], ids=str
)
def test_padded_queries_leave_their_sequence_as_it_is(dtype, options):
    """Long ones and few rows in one batch: the bits of each alone, whatever its padding holds."""
    counts, lengths = [150, 1, 0, 60, 3], [150, 150, 20, 7, 2]
    q, k, v = qkv(1, dtype, batch=(5,), heads=(4, 2), lengths=(150, 150), dims=(20, 12))
    for b, n in enumerate(counts):
        q[b, :, n:] = np.nan
    out, lse = qkv_fast.attention(q, k, v, q_lengths=counts, kv_lengths=lengths, return_lse=True, **options)
    nothing = np.full(4, -np.inf) if "sinks" not in options else np.array(options["sinks"])
    for b, (n, m) in enumerate(zip(counts, lengths, strict=True)):
        offset = dict(q_offset=m - n)  # which alone is a question where there are fewer keys than queries
        alone = qkv_fast.attention(q[b, :, :n], k[b, :, :m], v[b, :, :m], return_lse=True, **options, **offset)
        same_bits((out[b, :, :n], lse[b, :, :n]), alone)
        assert not out[b, :, n:].any()
        assert np.array_equal(lse[b, :, n:], np.broadcast_to(nothing[:, None], (4, 150 - n)).astype(lse.dtype))


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_every_way_to_write_padded_results(layout):
    q, k, v = qkv(2, batch=(2, 3), heads=(2, 1), lengths=(30, 40), dims=(8, 5))
    if layout == "blhd":
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    counts = np.array([[30, 0, 7], [29, 1, 30]])
    expected = check(q, k, v, layout=layout, q_lengths=counts)
    wide = np.full((*q.shape[:-1], 10), 9, np.float32)
    out = wide[..., ::-2]
    same_bits(qkv_fast.attention(q, k, v, layout=layout, q_lengths=counts, out=out), expected[0])
    assert (wide[..., ::2] == 9).all()
    flat = [x[0, 0, 0] for x in qkv(3, batch=(1, 1), lengths=(30, 40))]
    check(*flat, q_lengths=11)
    same_bits(qkv_fast.attention(*flat, q_lengths=11)[:11], qkv_fast.attention(flat[0][:11], *flat[1:]))


def test_padded_queries_cost_nothing():
    q, k, v = qkv(3, batch=(4,), heads=(2, 2), lengths=(512, 512), dims=(32, 32))
    counts = [512, 0, 130, 2]
    with _runtime.counters() as padded:
        qkv_fast.attention(q, k, v, q_lengths=counts)
    starts, ends = np.cumsum([0, *counts]), np.arange(5) * 512
    packed = np.concatenate([q[b, :, :n].swapaxes(0, 1) for b, n in enumerate(counts)])
    keys = [x.swapaxes(1, 2).reshape(-1, 2, 32) for x in (k, v)]
    with _runtime.counters() as ragged:
        qkv_fast.attention_varlen(packed, *keys, starts, ends)
    assert {n: x for n, x in padded.items() if "tiles" in n} == {n: x for n, x in ragged.items() if "tiles" in n}


@dtypes
def test_prompts_padded_on_the_left(dtype):
    """Each is worth what it is alone, and NaN in its padding is nothing."""
    lengths = np.array([100, 1, 0, 37])
    q, k, v = qkv(4, dtype, batch=(4,), heads=(4, 2), lengths=(100, 100), dims=(20, 12))
    for b, n in enumerate(lengths):
        for x in (q, k, v):
            x[b, :, : 100 - n] = np.nan
    out, lse = check(q, k, v, causal=True, kv_starts=100 - lengths)
    for b, n in enumerate(lengths):
        assert not out[b, :, : 100 - n].any() and np.isneginf(lse[b, :, : 100 - n]).all()
        alone = qkv_fast.attention(q[b, :, 100 - n :], k[b, :, 100 - n :], v[b, :, 100 - n :], causal=True)
        near = np.finfo(np.float32).eps * 8 if dtype != "float64" else 1e-14
        near = max(near, {"float16": 2.0**-9, "bfloat16": 2.0**-6}.get(dtype, 0))  # of results that round differently
        np.testing.assert_allclose(out[b, :, 100 - n :].astype("f8"), alone.astype("f8"), rtol=near, atol=near)


@dtypes
def test_positions_in_any_order(dtype):
    """A query's result is that of its position, wherever it stands."""
    q, k, v = qkv(5, dtype, batch=(2,), heads=(2, 2), lengths=(90, 300), dims=(16, 8))
    slopes = qkv_fast.alibi_slopes(2)
    for options in (dict(causal=True), dict(window=(30, 11)), dict(window=(None, 3), alibi_slopes=slopes)):
        usual = qkv_fast.attention(q, k, v, q_offset=150, **options)
        same_bits(qkv_fast.attention(q, k, v, q_positions=150 + np.arange(90), **options), usual)
        order = np.stack([np.random.default_rng(b).permutation(90) for b in range(2)])
        mixed = np.take_along_axis(q, order[:, None, :, None], axis=-2)
        got = qkv_fast.attention(mixed, k, v, q_positions=150 + order, **options)
        same_bits(got, np.take_along_axis(usual, order[:, None, :, None], axis=-2))
        # With a gap, and the same position twice.
        some = np.array([3, 3, 80, 0])
        got = qkv_fast.attention(q[:, :, some], k, v, q_positions=150 + some, **options)
        np.testing.assert_allclose(got.astype("f8"), usual[:, :, some].astype("f8"), rtol=0.02, atol=0.02)


def test_positions_of_packed_sequences():
    q, k, v = (x.swapaxes(0, 1) for x in qkv(6, heads=(2, 1), lengths=(50, 70), batch=(), dims=(8, 8)))
    rng = np.random.default_rng(0)
    positions, cu_q, cu_k = rng.integers(-3, 40, 50), [0, 20, 20, 50], [0, 25, 40, 70]
    out = qkv_fast.attention_varlen(q, k, v, cu_q, cu_k, causal=True, q_positions=positions)
    for b in (0, 2):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = qkv_fast.attention(
            q[rows], k[keys], v[keys], layout="blhd", causal=True, q_positions=positions[rows]
        )
        same_bits(out[rows], alone)


def test_questions_of_padded_queries():
    q, k, _ = qkv(7, batch=(2,), heads=(2, 2), lengths=(40, 60), dims=(8, 8))
    q[0, :, 11:] = np.nan
    options = dict(q_lengths=[11, 40], kv_starts=[20, 0], causal=True)
    keys, weights = spotlight.top_keys(q, k, **options)
    assert (keys[0, :, 11:] == -1).all() and not weights[0, :, 11:].any() and (keys[0, :, :11, 0] >= 20).all()
    assert np.isneginf(spotlight.largest(q, k, **options)[0, :, 11:]).all()
    assert not spotlight.entropy(q, k, **options)[0, :, 11:].any()
    rows = spotlight.weights(q, k, **options)
    assert not rows[0, :, 11:].any() and not rows[0, :, :, :20].any()
    some = spotlight.weights(q, k, queries=[30, 3, 12], keys=[0, 59, 40], **options)
    np.testing.assert_allclose(some, rows[:, :, [30, 3, 12]][..., [0, 59, 40]], atol=1e-6)
    np.testing.assert_allclose(spotlight.received(q, k, **options), rows.sum(axis=-2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "error, words, options",
    [
        (ValueError, ("q_lengths must be in 0..5", "q's length", "got 6"), dict(q_lengths=[1, 6])),
        (ValueError, ("q_lengths must be in 0..5", "got -1"), dict(q_lengths=-1)),
        (ValueError, ("q_lengths", "(3,)"), dict(q_lengths=[1, 2, 3])),
        (TypeError, ("q_lengths", "integer"), dict(q_lengths=1.5)),
        (ValueError, ("kv_starts must be in 0..9", "got 10"), dict(kv_starts=[0, 10])),
        (ValueError, ("kv_starts must be in 0..4", "got 5"), dict(kv_starts=5, kv_lengths=[9, 4], q_offset=0)),
        (OverflowError, ("kv_starts", "63 bits"), dict(kv_starts=2**70)),
        (ValueError, ("must be of shape (5,)", "(2, 5)", "(2, 4)"), dict(q_positions=np.zeros((2, 4), "i8"))),
        (ValueError, ("q_positions", "()"), dict(q_positions=3)),
        (TypeError, ("q_positions", "integer"), dict(q_positions=np.zeros(5))),
        (OverflowError, ("q_positions", "2**60"), dict(q_positions=np.full(5, 2**61))),
        (ValueError, ("q_positions", "q_offset"), dict(q_positions=np.zeros(5, int), q_offset=1)),
        (ValueError, ("q_positions", "top-left"), dict(q_positions=np.zeros(5, int), causal="top-left")),
    ],
)
def test_errors(error, words, options):
    q, k, v = qkv(8, batch=(2,), heads=(2, 1), lengths=(5, 9), dims=(4, 4))
    for verb in (qkv_fast.attention, lambda q, k, _, **options: spotlight.entropy(q, k, **options)):
        with pytest.raises(error) as caught:
            verb(q, k, v, **({} if "causal" in options else dict(causal=True)), **options)
        assert all(word in str(caught.value) for word in words), caught.value


def test_packed_sequences_have_neither():
    x = np.zeros((4, 1, 2), np.float32)
    with pytest.raises(TypeError, match="q_lengths'; attention has it"):
        qkv_fast.attention_varlen(x, x, x, [0, 4], [0, 4], q_lengths=3)
    with pytest.raises(ValueError, match="packed sequences take no kv_starts"):
        spotlight.entropy(x, x, cu_seqlens_q=[0, 4], cu_seqlens_k=[0, 4], kv_starts=3)


def test_lengths_of_queries_leave_one_reading():
    """Fewer keys than queries: those before key 0 see nothing, and no one asks."""
    q, k, v = qkv(9, batch=(3,), lengths=(8, 9), heads=(1, 1), dims=(4, 4))
    _, lse = check(q, k, v, causal=True, q_lengths=[8, 5, 0], kv_lengths=[3, 9, 2])
    assert np.isneginf(lse[0, :, :5]).all() and np.isfinite(lse[0, :, 5:]).all()
