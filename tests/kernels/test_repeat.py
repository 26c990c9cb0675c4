"""Same version, same CPU path: the same bits for any thread count, batch, head count, strides or run.

Every choice that changes arithmetic depends on one sequence's own shape. The counters say that long keys were
cut into chunks and merged, where a test is about that.
"""

import itertools
import threading
from contextvars import copy_context

import numpy as np
import pytest
from _util import TYPES, normal, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)

# (batch, heads, lengths, dims, options): panels and tails, grouped heads, few rows over many keys, key
# limits.
CASES = {
    "square": ((2,), (4, 4), (130, 130), (32, 32), {}),
    "causal": ((2,), (4, 2), (200, 200), (24, 17), dict(causal=True)),
    "one row": ((1,), (1, 1), (1, 30_000), (64, 64), {}),
    "few rows, grouped": ((1,), (12, 2), (3, 5100), (16, 40), dict(causal=True)),
    "a panel over many keys": ((1,), (1, 1), (40, 4097), (16, 16), {}),
    "one row of each sequence": ((5,), (2, 2), (1, 3000), (64, 64), {}),
    "window": ((1,), (2, 1), (300, 2500), (8, 8), dict(window=(1500, 3), causal=True)),
    "lengths": ((3,), (2, 2), (20, 3000), (16, 16), dict(kv_lengths=[3000, 0, 1500], causal=True)),
    "no dimension": ((1,), (2, 1), (5, 2000), (0, 8), {}),
}
LONG = ("one row", "few rows, grouped", "a panel over many keys")
cases = pytest.mark.parametrize("name", CASES)


def _problem(name, dtype, seed=1):
    batch, heads, lengths, dims, options = CASES[name]
    return qkv(seed, dtype, batch=batch, heads=heads, lengths=lengths, dims=dims), dict(
        options, return_lse=True
    )


@dtypes
@cases
def test_thread_counts(dtype, name):
    args, options = _problem(name, dtype)
    one = qkv_fast.attention(*args, num_threads=1, **options)
    for n in range(1, 9):
        with _runtime.counters() as seen:
            got = qkv_fast.attention(*args, num_threads=n, **options)
        same_bits(got, one)
        if name in LONG and n >= 4:
            assert seen["splits"] > 0, "the keys were not split: the test is not about what it should be"
        with qkv_fast.num_threads(n):
            same_bits(qkv_fast.attention(*args, **options), one)


@dtypes
def test_long_keys_use_several_threads(dtype):
    """Few rows over many keys are cut for the threads, not only for the arithmetic."""
    args = qkv(2, dtype, heads=(1, 1), lengths=(4, 60_000), dims=(64, 64))
    with _runtime.counters() as seen:
        two = qkv_fast.attention(*args, num_threads=2)
    assert seen["threads"] == 2 and seen["tasks"] > 1 and seen["splits"] > 0
    same_bits(two, qkv_fast.attention(*args, num_threads=1))


@dtypes
@cases
def test_in_and_out_of_a_batch(dtype, name):
    """A sequence is worth the same bits alone, among others, and in another order."""
    (q, k, v), options = _problem(name, dtype)
    rng = np.random.default_rng(3)
    lengths = options.pop("kv_lengths", None)
    q, k, v = (np.concatenate([x, rng.standard_normal((5, *x.shape[1:])).astype(dtype)]) for x in (q, k, v))
    if lengths is not None:
        lengths = np.array([*lengths, 20, 21, 1023, 1024, 1025])
    out, lse = qkv_fast.attention(q, k, v, kv_lengths=lengths, **options)
    for b in range(len(q)):
        n = None if lengths is None else int(lengths[b])
        alone = qkv_fast.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], kv_lengths=n, **options)
        same_bits(alone, (out[b : b + 1], lse[b : b + 1]))
        same_bits(qkv_fast.attention(q[b], k[b], v[b], kv_lengths=n, **options), (out[b], lse[b]))
    backwards = qkv_fast.attention(
        q[::-1], k[::-1], v[::-1], kv_lengths=None if lengths is None else lengths[::-1], **options
    )
    same_bits(tuple(x[::-1] for x in backwards), (out, lse))


@dtypes
@cases
def test_head_counts(dtype, name):
    """Other heads beside a head change nothing in it, as long as its group is the same."""
    (q, k, v), options = _problem(name, dtype)
    whole = qkv_fast.attention(q, k, v, **options)
    group = q.shape[1] // k.shape[1]
    for h in range(k.shape[1]):
        heads = slice(h * group, (h + 1) * group)
        one = qkv_fast.attention(q[:, heads], k[:, h : h + 1], v[:, h : h + 1], **options)
        same_bits(one, (whole[0][:, heads], whole[1][:, heads]))
    tripled = [np.concatenate([x, x, x], axis=1) for x in (q, k, v)]
    got = qkv_fast.attention(*tripled, **options)
    same_bits(got, tuple(np.concatenate([x, x, x], axis=1) for x in whole))


@dtypes
@cases
def test_broadcast_batch(dtype, name):
    """K and V shared by the whole batch are the same as K and V repeated."""
    (q, k, v), options = _problem(name, dtype)
    options["kv_lengths"] = None
    k, v = k[:1], v[:1]
    repeated = [np.repeat(x, len(q), axis=0) for x in (k, v)]
    same_bits(qkv_fast.attention(q, k, v, **options), qkv_fast.attention(q, *repeated, **options))


@dtypes
@cases
def test_strides_and_layout(dtype, name):
    (q, k, v), options = _problem(name, dtype)
    expected = qkv_fast.attention(q, k, v, **options)
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    out, lse = qkv_fast.attention(*swapped, layout="blhd", **options)
    same_bits((out.swapaxes(1, 2), lse), expected)
    views = [np.asfortranarray(x) for x in (q, k, v)]
    same_bits(qkv_fast.attention(*views, **options), expected)
    width = 1024 // q.itemsize  # keys a multiple of 1 KiB apart: copied before use
    wide = [np.zeros((*x.shape[:3], width), dtype)[..., : x.shape[3]] for x in (q, k, v)]
    for x, y in zip(wide, (q, k, v), strict=True):
        x[...] = y
    same_bits(qkv_fast.attention(*wide, **options), expected)


@dtypes
def test_padded_sequence_equals_itself_alone(dtype):
    """kv_lengths in padding of any length, by whatever it is filled, gives what the sequence alone gives."""
    for lq, n in ((1, 1500), (7, 97), (40, 1024), (40, 1025), (200, 2047)):
        q, k, v = qkv(n, dtype, heads=(4, 2), lengths=(lq, n), dims=(16, 16))
        for options in ({}, dict(causal=True), dict(window=(1000, 10))):
            alone = qkv_fast.attention(q, k, v, return_lse=True, **options)
            for padding in (1, 31, 1000, 5000):
                k2, v2 = (
                    np.concatenate([x, np.full((2, padding, 16), np.nan, dtype)], axis=1) for x in (k, v)
                )
                same_bits(qkv_fast.attention(q, k2, v2, kv_lengths=n, return_lse=True, **options), alone)


@dtypes
def test_padded_queries_equal_themselves_alone(dtype):
    """A row depends on its own position, not on how many rows follow (where the split does not change)."""
    q, k, v = qkv(4, dtype, heads=(2, 2), lengths=(128, 128), dims=(16, 16))
    out = qkv_fast.attention(q, k, v, causal=True, kv_lengths=100, q_offset=0)
    changed = q.copy()
    changed[:, 100:] = np.nan
    same_bits(
        qkv_fast.attention(changed, k, v, causal=True, kv_lengths=100, q_offset=0)[:, :100], out[:, :100]
    )


@dtypes
def test_padded_queries_of_a_window_equal_themselves_alone(dtype):
    """A window cuts tiles to what the rows of a vector see, padded ones too: sums do not begin where the tile does.
    Up to 4 rows have another kernel than more, whose bits differ: the padding stays on one side of that."""
    rng = np.random.default_rng(21)
    numbers = (1, 4), (2, 4), (5, 18), (17, 30), (33, 46), (49, 62)
    for (lq, padded), left, offset in itertools.product(numbers, (60, 100, 127, 255), (0, 37, 101, 333)):
        q, k, v = (normal(rng, (1, n, d), dtype) for n, d in ((padded, 8), (500, 8), (500, 16)))
        options = dict(window=(left, 0), q_offset=offset, return_lse=True)
        out, lse = qkv_fast.attention(q, k, v, **options)
        alone, lse_alone = qkv_fast.attention(q[:, :lq], k, v, **options)
        same_bits(out[:, :lq].copy(), alone)
        same_bits(lse[:, :lq].copy(), lse_alone)


@dtypes
@pytest.mark.parametrize("name", ["causal", "few rows, grouped"])
def test_a_hundred_repeats(dtype, name):
    args, options = _problem(name, dtype)
    with _runtime.counters() as seen:
        first = qkv_fast.attention(*args, num_threads=4, **options)
    assert name not in LONG or seen["splits"] > 0
    for _ in range(100):
        same_bits(qkv_fast.attention(*args, num_threads=4, **options), first)


@dtypes
def test_under_load(dtype):
    """Other Python threads that hold the pool change who does the work, and no bit of it."""
    args, options = _problem("few rows, grouped", dtype)
    expected = qkv_fast.attention(*args, **options)
    stop = threading.Event()
    others = qkv(5, dtype, heads=(2, 2), lengths=(100, 300))

    def busy():
        while not stop.is_set():
            qkv_fast.attention(*others)

    workers = [threading.Thread(target=copy_context().run, args=(busy,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(50):
            same_bits(qkv_fast.attention(*args, **options), expected)
    finally:
        stop.set()
        for worker in workers:
            worker.join()


@dtypes
def test_memory_that_was_used_before(dtype):
    """Scratch is reused: what an earlier call left there is no part of a result."""
    args, options = _problem("window", dtype)
    _runtime.trim()
    first = qkv_fast.attention(*args, **options)
    poison = np.full((2, 4, 2000, 128), np.nan, dtype)
    for lq in (1, 60, 500):
        assert np.isnan(qkv_fast.attention(poison[:, :, :lq], poison, poison)).all()
        same_bits(qkv_fast.attention(*args, **options), first)
