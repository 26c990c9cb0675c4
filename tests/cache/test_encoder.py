"""Caches of an encoder's keys: queries see all tokens, and beams share a sequence, with the bits of their own keys."""

import numpy as np
import pytest
from _explained import agree
from _util import compare, same_bits
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "int4"]
BATCH, HEADS, DIM = 2, 2, 32


def made(dtype, lengths, *, beams=1, starts=None, seed=0, **options):
    """A cache of BATCH sequences, each of them there `beams` times, and its keys and values."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, BATCH, HEADS, max(lengths), DIM), "f4")
    cache = qkv_fast.KVCache(BATCH * beams, HEADS, DIM, max(lengths) + 3, dtype=dtype, causal=False, **options)
    starts = None if starts is None else np.repeat(starts, beams)
    cache.append(np.repeat(k, beams, 0), np.repeat(v, beams, 0), lengths=np.repeat(lengths, beams), starts=starts)
    return cache


def arguments(rng, beams, rows, longest):
    """Some of all that a query may be given."""
    n = BATCH * beams
    options = {
        "mask": rng.random((int(rng.choice([1, n])), 1, rows, longest)) < 0.7,
        "bias": rng.standard_normal((rows, longest) if rng.integers(2) else (n, 4, 1, longest)),
        "lengths": rng.integers(0, rows + 1, n),
        "sinks": rng.standard_normal(4),
        "softcap": 5.0,
        "scale": 0.1,
    }
    return {name: x for name, x in options.items() if rng.integers(3) == 0}


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(DTYPES), st.integers(1, 6), st.integers(1, 20),
    st.tuples(st.integers(0, 300), st.integers(1, 1100)),
)  # fmt: skip
def test_beams_read_one_sequence(seed, dtype, beams, rows, lengths):
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, np.add(lengths, 1)) if rng.integers(2) else None
    one, many = (made(dtype, lengths, beams=n, starts=starts, seed=seed) for n in (1, beams))
    q = rng.standard_normal((BATCH * beams, 4, rows, DIM)).astype(dtype if dtype[0] != "i" else "f4")
    options = arguments(rng, beams, rows, max(lengths)) | dict(return_lse=True, num_threads=2)
    got = one.attend(q, **options)
    same_bits(got, many.attend(q, **options))
    if dtype[0] == "i":
        return
    options |= {"q_lengths": options.pop("lengths")} if "lengths" in options else {}
    ends = dict(kv_lengths=many.lengths, kv_starts=many.starts)
    same_bits(got, qkv_fast.attention(q, many.keys, many.values, **ends, **options))


def test_layout_and_out():
    cache = made("float32", (70, 30))
    q = np.random.default_rng(1).standard_normal((6, 4, 3, DIM), "f4")
    expected = cache.attend(q)
    assert expected.shape == (6, 4, 3, DIM)
    other = np.empty((6, 3, 4, DIM), "f4")
    assert cache.attend(q.swapaxes(1, 2), layout="blhd", out=other) is other
    same_bits(other.swapaxes(1, 2), expected)
    spread = np.zeros((12, 4, 3, DIM), "f4")[::2]
    cache.attend(q, out=spread)
    same_bits(spread, expected)
    same_bits(cache.attend(q[::3]), expected[::3])  # each sequence once


def test_equals_the_reference():
    """More queries than tokens too: they are not the newest tokens."""
    cache = made("float64", (9, 9))
    q = np.random.default_rng(2).standard_normal((4, 4, 20, DIM))
    k, v = (np.repeat(x, 2, 0) for x in (cache.keys, cache.values))
    compare(cache.attend(q, return_lse=True), (q, k, v))


def test_step_appends_and_attends():
    one, other = made("float32", (40, 25)), made("float32", (40, 25))
    q, k, v = (np.random.default_rng(4).standard_normal((BATCH, n, 2, DIM), "f4") for n in (4, HEADS, HEADS))
    other.append(k, v)
    same_bits(one.step(q, k, v), other.attend(q))
    beams = q.repeat(3, axis=0)
    for cache in (one, other):
        cache.truncate([20, 9])
    other.append(k, v, lengths=[2, 1])
    counts = np.repeat([2, 1], 3)
    same_bits(one.step(beams, k, v, lengths=[2, 1]), other.attend(beams, lengths=counts))


def test_questions_see_all_tokens():
    cache = made("float32", (40, 25))
    q = np.random.default_rng(3).standard_normal((BATCH, 4, 5, DIM), "f4")
    weights = qkv_fast.spotlight.weights(q, cache.keys, kv_lengths=cache.lengths)
    same_bits(cache.weights(q), weights)
    same_bits(cache.received(q), qkv_fast.spotlight.received(q, cache.keys, kv_lengths=cache.lengths))


def test_files_know(tmp_path):
    cache = made("float32", (40, 25))
    q = np.ones((4, 4, 3, DIM), "f4")
    cache.save(tmp_path / "encoder.kv")
    for again in (qkv_fast.KVCache.load(tmp_path / "encoder.kv"), qkv_fast.KVCache.open(tmp_path / "encoder.kv")):
        assert again.causal is False and "causal=False" in repr(again)
        same_bits(again.attend(q), cache.attend(q))
    with pytest.raises(ValueError, match="not causal; asked for was batch 2"):
        qkv_fast.KVCache(BATCH, HEADS, DIM, cache.capacity, path=tmp_path / "encoder.kv")


@pytest.mark.parametrize("beams", [1, 3])
def test_explained(beams):
    cache = made("float32", (2100, 2100))
    q = np.ones((BATCH * beams, 4, 1, DIM), "f4")
    plan = agree(cache.attend, q)
    assert plan.bytes == 4 * (2 * q.size + BATCH * HEADS * 2100 * 2 * DIM)


def paged(cache):
    """Its tokens in pages that lie in disorder, and the numbers of the sequences."""
    pool = qkv_fast.PagedKVCache(HEADS, DIM, 100, page_size=32, dtype=cache.dtype, causal=False)
    numbers = [pool.add() for _ in range(BATCH)]
    for at in range(0, int(cache.lengths.max()), 50):
        k, v = cache.keys[:, :, at : at + 50], cache.values[:, :, at : at + 50]
        pool.append(numbers, k, v, lengths=np.clip(cache.lengths - at, 0, k.shape[2]))
    return pool, numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_pages(dtype, tmp_path):
    """As a slab, and read once by several beams."""
    cache = made(dtype, (300, 170))
    pool, numbers = paged(cache)
    assert pool.causal is False and "causal=False" in repr(pool)
    pool.save(tmp_path / "encoder.kv")
    for beams, rows in ((1, 3), (4, 1), (3, 30), (9, 2)):
        q = np.random.default_rng(rows).standard_normal((BATCH * beams, 4, rows, DIM)).astype(
            "f4" if dtype == "int8" else dtype
        )
        for options in ({}, {"lengths": np.arange(BATCH * beams) % (rows + 1)}, {"sinks": np.arange(4.0)}):
            options |= dict(return_lse=True, num_threads=2)
            expected = cache.attend(q, **options)
            for one in (pool, qkv_fast.PagedKVCache.open(tmp_path / "encoder.kv")):
                got = one.attend(numbers, q, **options)
                if dtype == "int8":  # which is quantised twice
                    np.testing.assert_allclose(got[0], expected[0], atol=0.02)
                else:
                    same_bits(got, expected)
            if len(options) == 2:
                agree(pool.attend, numbers, q)
    if dtype == "float32":
        q = np.ones((6, 4, 1, DIM), "f4")
        plan = qkv_fast.explain(pool.attend, numbers, q)
        assert plan.bytes == 4 * (2 * q.size + HEADS * 470 * 2 * DIM)
        with pytest.raises(ValueError, match=r"q must be of shape \(a multiple of 2,"):
            pool.attend(numbers, q[:3])
        with pytest.raises(ValueError, match="window is about positions"):
            pool.attend(numbers, q, window=3)
        k = np.ones((2, HEADS, 1, DIM), "f4")
        got = pool.step(numbers, q, k, k)
        same_bits(got, pool.attend(numbers, q))


def test_empty_caches_and_beams():
    cache = qkv_fast.KVCache(BATCH, HEADS, DIM, 5, causal=False)
    pool = qkv_fast.PagedKVCache(HEADS, DIM, 5, causal=False)
    q = np.ones((6, 4, 2, DIM), "f4")
    for one, own in ((cache, ()), (pool, ([pool.add(), pool.add()],))):
        assert not one.attend(*own, q).any() and one.weights(*own, q).shape == (6, 4, 2, 0)


ASKED = {
    "largest": {}, "entropy": {}, "top_keys": dict(n=3), "received": {}, "weights": dict(queries=[2, 1]),
    "pooled": dict(shape=(2, 7)), "influence": {},
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_questions_of_beams(name):
    """The bits of questions about keys of their own."""
    cache = made("float32", (90, 61), starts=[5, 0])
    plain = made("float32", (90, 61))
    pool, numbers = paged(plain)
    rng = np.random.default_rng(5)
    q = rng.standard_normal((BATCH * 3, 4, 3, DIM), "f4")
    mask = rng.random((BATCH * 3, 1, 3, 90)) < 0.7
    for one, own in ((cache, ()), (plain, ()), (pool, (numbers,))):
        starts = np.repeat(one.starts(*own) if own else one.starts, 3)
        k, v = np.repeat(plain.keys, 3, 0), np.repeat(plain.values, 3, 0)
        given = (q, k, v) if name == "influence" else (q, k)
        ends = dict(kv_lengths=np.repeat([90, 61], 3), kv_starts=starts)
        for options in (ASKED[name], ASKED[name] | {"mask": mask}):
            expected = getattr(qkv_fast.spotlight, name)(*given, **ends, **options)
            got = getattr(one, name)(*own, q, **options)
            for x, y in zip(got, expected, strict=True):
                same_bits(x, y)


def test_what_does_not_fit():
    cache = made("float32", (40, 25))
    q = np.ones((BATCH, 4, 3, DIM), "f4")
    with pytest.raises(ValueError, match=r"q must be of shape \(a multiple of 2, a multiple of 2, queries, 32\)"):
        cache.attend(np.ones((3, 4, 3, DIM), "f4"))
    with pytest.raises(ValueError, match=r"q must be of shape \(a multiple of 2, "):
        cache.weights(np.ones((3, 4, 3, DIM), "f4"))
    for name, value in (("window", 3), ("alibi_slopes", np.ones(4)), ("causal", True)):
        with pytest.raises(ValueError, match=f"{name} is about positions, and queries have none"):
            cache.attend(q, **{name: value})
    with pytest.raises(ValueError, match="causal is about positions"):
        cache.received(q, causal=True)
    same_bits(cache.attend(q, causal=False), cache.attend(q))
    with pytest.raises(ValueError, match="queries have none among those of an encoder"):
        cache.attend(q, tree=np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="an encoder's tokens have no window"):
        qkv_fast.KVCache(1, 1, 8, 10, window=4, causal=False)
    with pytest.raises(TypeError, match="causal must be True or False, got 'no'"):
        qkv_fast.KVCache(1, 1, 8, 10, causal="no")
    for name in ("latent", "rotate", "bounds"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
            qkv_fast.KVCache(1, 1, 8, 10, **{name: "no"})
    with pytest.raises(ValueError, match="PagedKVCache: an encoder's tokens have no window"):
        qkv_fast.PagedKVCache(1, 8, 10, window=4, causal=False)
    plain = qkv_fast.KVCache(BATCH, HEADS, DIM, 50)
    with pytest.raises(ValueError, match=r"q must be of shape \(2, "):
        plain.attend(np.ones((4, 4, 3, DIM), "f4"))
