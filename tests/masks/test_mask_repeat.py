"""With masks, biases, segments and changed scores too: the same bits for any threads, batch, heads, padding and run."""

import numpy as np
import pytest
from _util import TYPES, compare, normal, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)

BATCH, HEADS, GROUP = 3, 2, 2  # key heads, and query heads for each
SHAPES = {  # (queries, keys), of which the first is decoded
    "few rows": (2, 5000),
    "square": (130, 130),
    "a few rows over many keys": (3, 9000),
    "a panel over many keys": (40, 4100),
}
MAKE = {
    "mask": lambda rng, dtype, lq, lk: dict(mask=rng.random((BATCH, HEADS * GROUP, lq, lk)) < 0.6),
    "documents": lambda rng, dtype, lq, lk: dict(
        mask=(np.arange(lk) // 700 == (np.arange(lq) % 3)[:, None]) & np.ones((BATCH, HEADS * GROUP, 1, 1), bool)
    ),
    "bias": lambda rng, dtype, lq, lk: dict(bias=normal(rng, (BATCH, HEADS * GROUP, lq, lk), dtype)),
    "transposed": lambda rng, dtype, lq, lk: dict(
        mask=(rng.random((lk, lq, HEADS * GROUP, BATCH)) < 0.7).T,
        bias=normal(rng, (lk, lq, HEADS * GROUP, BATCH), dtype).T,
    ),
    "sorted segments": lambda rng, dtype, lq, lk: dict(
        segments=tuple(np.sort(rng.integers(0, 4, (BATCH, n)), axis=-1) for n in (lq, lk))
    ),
    "segments": lambda rng, dtype, lq, lk: dict(segments=tuple(rng.integers(0, 4, (BATCH, n)) for n in (lq, lk))),
    "scores": lambda rng, dtype, lq, lk: dict(
        alibi_slopes=np.geomspace(0.5, 1e-3, HEADS * GROUP), sinks=np.array([4.0, -np.inf, 9.0, 0.0]), softcap=3.0
    ),
}
kinds = pytest.mark.parametrize("kind", MAKE)
shapes = pytest.mark.parametrize("shape", SHAPES)


def problem(kind, shape, dtype):
    lengths = SHAPES[shape]
    arrays = qkv(1, dtype, batch=(BATCH,), heads=(HEADS * GROUP, HEADS), lengths=lengths, dims=(8, 8))
    return arrays, MAKE[kind](np.random.default_rng(2), dtype, *lengths)


def part(arrays, options, sequences, head):
    """The call for these sequences and one key head, given all options in their full shapes."""
    q, k, v = arrays
    rows = slice(head * GROUP, (head + 1) * GROUP)
    own = dict(options)
    for name in ("mask", "bias"):
        if name in own:
            own[name] = own[name][sequences, rows]
    for name in ("alibi_slopes", "sinks"):
        if name in own:
            own[name] = own[name][rows]
    if "segments" in own:
        own["segments"] = tuple(ids[sequences] for ids in own["segments"])
    return (q[sequences, rows], k[sequences, head : head + 1], v[sequences, head : head + 1]), own


@dtypes
@shapes
@kinds
def test_threads(dtype, shape, kind):
    arrays, options = problem(kind, shape, dtype)
    one = qkv_fast.attention(*arrays, return_lse=True, num_threads=1, **options)
    compare(one, arrays, **options)
    for threads in range(1, 9):
        with _runtime.counters() as seen:
            got = qkv_fast.attention(*arrays, return_lse=True, num_threads=threads, **options)
        same_bits(got, one)
        if "few rows" in shape and threads == 8:
            assert seen["splits"] > 0, "the keys were not split: the test is not about what it should be"


@dtypes
@shapes
@kinds
def test_batch_and_heads(dtype, shape, kind):
    """A sequence and a key head are worth the same bits alone and among others."""
    arrays, options = problem(kind, shape, dtype)
    out, lse = qkv_fast.attention(*arrays, return_lse=True, **options)
    for sequences in (slice(0, 1), slice(1, 3)):
        for head in range(HEADS):
            given, own = part(arrays, options, sequences, head)
            rows = slice(head * GROUP, (head + 1) * GROUP)
            got = qkv_fast.attention(*given, return_lse=True, **own)
            same_bits(got, (out[sequences, rows], lse[sequences, rows]))


@dtypes
@kinds
def test_padding(dtype, kind):
    """Keys past kv_lengths, and what masks and biases say of them, make no difference."""
    (q, k, v), options = problem(kind, "square", dtype)
    n = 97
    lengths = dict(kv_lengths=n, q_offset=n - q.shape[2])
    short = dict(options)
    for name in ("mask", "bias"):
        if name in short:
            short[name] = short[name][..., :n]
    if "segments" in short:
        short["segments"] = short["segments"][0], short["segments"][1][:, :n]
    for causal in (False, True):
        expected = qkv_fast.attention(
            q, k[:, :, :n], v[:, :, :n], causal=causal, q_offset=n - q.shape[2], return_lse=True, **short
        )
        same_bits(qkv_fast.attention(q, k, v, causal=causal, return_lse=True, **lengths, **options), expected)


@dtypes
@kinds
def test_runs(dtype, kind):
    arrays, options = problem(kind, "square", dtype)
    first = qkv_fast.attention(*arrays, return_lse=True, **options)
    for _ in range(20):
        same_bits(qkv_fast.attention(*arrays, return_lse=True, **options), first)


@dtypes
@pytest.mark.parametrize("shape", ["few rows", "a panel over many keys"])
@kinds
def test_strides(dtype, shape, kind):
    """Where masks and biases lie changes nothing."""
    arrays, options = problem(kind, shape, dtype)
    expected = qkv_fast.attention(*arrays, return_lse=True, **options)
    moved = {
        name: np.asfortranarray(x) if name in ("mask", "bias") else x for name, x in options.items()
    }
    same_bits(qkv_fast.attention(*arrays, return_lse=True, **moved), expected)


@dtypes
def test_a_mask_and_what_it_is_made_of(dtype):
    """The same keys hidden by positions, by a mask and by ids: the same bits where scores stay as they are."""
    (q, k, v), _ = problem("mask", "a panel over many keys", dtype)
    lq, lk = q.shape[2], k.shape[2]
    causal = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    visible = np.arange(lk) <= np.arange(lq)[:, None] + lk - lq
    same_bits(qkv_fast.attention(q, k, v, mask=visible, return_lse=True), causal)
    ids = np.sort(np.random.default_rng(3).integers(0, 4, lk))
    by_ids = qkv_fast.attention(q, k, v, segments=(ids[:lq], ids), return_lse=True)
    same_bits(qkv_fast.attention(q, k, v, mask=ids[:lq, None] == ids, return_lse=True), by_ids)


@dtypes
@pytest.mark.parametrize("far", ["least", -1e30, -np.inf, 1e30])
def test_the_sink_of_another_head(dtype, far):
    """However far it is. A scale that is no power of two shows in every rounding."""
    far = np.finfo(dtype).min if far == "least" else far
    for lq in (1, 40):
        q, k, v = qkv(5, dtype, heads=(2, 2), lengths=(lq, 200), dims=(48, 8))
        both = qkv_fast.attention(q, k, v, sinks=[0.5, far], return_lse=True)
        alone = qkv_fast.attention(q[:1], k[:1], v[:1], sinks=[0.5], return_lse=True)
        same_bits((both[0][:1], both[1][:1]), alone)


def test_far_positions_beside_others():
    """Where positions are no longer exact in float32, they are rounded in the same way for every neighbour."""
    q, k, v = qkv(6, np.float32, lengths=(40, 300), dims=(8, 8))
    options = dict(alibi_slopes=[1e-3], window=(2**25 - 100, None), return_lse=True)
    for offset in range(2**25, 2**25 + 8):
        out, lse = qkv_fast.attention(q, k, v, q_offset=offset, **options)
        alone = qkv_fast.attention(q[:, :17], k, v, q_offset=offset, **options)
        same_bits((out[:, :17], lse[:, :17]), alone)


@dtypes
def test_lse_of_a_sink_alone(dtype):
    """It is the sink, to the bit, whatever the scale."""
    sinks = np.linspace(-3, 5, 8).astype(dtype)
    for lq in (1, 40):
        q, k, v = qkv(7, dtype, heads=(8, 8), lengths=(lq, 20), dims=(48, 8))
        out, lse = qkv_fast.attention(q, k, v, sinks=sinks, kv_lengths=0, return_lse=True)
        assert not out.any() and (lse == sinks[:, None]).all()
