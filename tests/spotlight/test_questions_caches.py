"""Questions to caches: every kind of them and every type, against the reference on the numbers that they give back."""


import itertools

import numpy as np
import pytest
from _quantised import QUANTISED, as_stored
from _questions import OF_CACHES, ask, check_influence, hold
from _util import ALL_TYPES, no_change, normal, same_bits

from qkv_fast import KVCache, PagedKVCache, reference
from qkv_fast._runtime import fail_allocation, trim

pytestmark = pytest.mark.usefixtures("isa")
questions = pytest.mark.parametrize("name", OF_CACHES)
TYPES = (*ALL_TYPES, *QUANTISED)
KINDS = ("slab", "file", "ring", "kept", "pages")
WINDOW, KEEP, TURN = 90, 5, 40  # of rings, and tokens that are appended at a time


def parts(answer):
    return answer if isinstance(answer, tuple) else (answer,)


def filled(kind, k, lengths, dtype, folder):
    """A cache whose sequences have the first tokens of k (batch, heads, n, dim), and what asks it: f(name, q, ...)."""
    batch, heads, n, dim = k.shape
    turns = [(t, np.clip(np.array(lengths) - t, 0, TURN)) for t in range(0, n, TURN)]
    if kind == "pages":
        pool = PagedKVCache(heads, dim, pages=-(-n // 7) * batch, page_size=7, dtype=dtype)
        everything, poison = pool.add(), np.full((1, heads, -(-n // 7) * batch * 7, dim), np.nan, "f4")
        pool.append([everything], poison, poison)
        pool.remove(everything)
        ids = [pool.add() for _ in range(batch)]
        for t, counts in turns:  # so that their pages alternate in the pool
            pool.append(ids, k[:, :, t : t + TURN], k[:, :, t : t + TURN], lengths=np.minimum(counts, n - t))
        return pool, lambda name, q, *args, **options: getattr(pool, name)(ids, q, *args, **options)
    ring = dict(window=WINDOW, keep=KEEP if kind == "kept" else 0) if kind in ("ring", "kept") else {}
    path = folder / f"{dtype}.kv" if kind == "file" else None
    capacity = ring["keep"] + WINDOW + TURN if ring else n + 9
    cache = KVCache(batch, heads, dim, capacity, dtype=dtype, path=path, **ring)
    poison = np.full((batch, heads, capacity, dim), np.nan, "f4")
    cache.append(poison, poison)
    cache.truncate(0)
    for t, counts in turns:
        cache.append(k[:, :, t : t + TURN], k[:, :, t : t + TURN], lengths=np.minimum(counts, n - t))
    if kind == "file":
        cache.flush()
        cache = KVCache.open(path)
    return cache, lambda name, q, *args, **options: getattr(cache, name)(q, *args, **options)


def limits(kind, n, count, *, mask=None, window=None, causal=True):
    """What queries see that are the newest `count` of n tokens in a cache of this kind, as attention says it."""
    left, right = window if isinstance(window, tuple) else (window, None)
    if kind in ("ring", "kept") and left is None:
        left = WINDOW
    if kind == "kept":
        j, at = np.arange(n), np.arange(n - count, n)[:, None]
        seen = (j < KEEP) | (j >= at - left)
        mask, left = seen if mask is None else mask & seen, None
    return dict(causal=causal, window=(left, right), mask=mask)


@questions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_kind_and_type(kind, dtype, name, tmp_path):
    """Sequences of any length with any number of queries, each held to the rule alone."""
    lengths, counts, n = [300, 97, 1, 0, 212], [6, 3, 1, 0, 0], 300
    rng = np.random.default_rng(1)
    k, q = normal(rng, (5, 2, n, 24)), normal(rng, (5, 4, 6, 24), "float32" if dtype in QUANTISED else dtype)
    mask, bias = rng.random((5, 1, 6, n)) < 0.8, normal(rng, (1, 4, 6, n))
    heads = dict(alibi_slopes=[0.1, 0.0, 0.3, 0.4], sinks=[0.5, 1, -np.inf, 2], softcap=5.0)
    _, asked = filled(kind, k, lengths, dtype, tmp_path)
    for masks in ({}, dict(mask=mask, bias=bias)):
        got = asked(name, q, lengths=counts, num_threads=1, **masks, **heads)
        same_bits(asked(name, q, lengths=counts, num_threads=4, **masks, **heads), got)
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            own = {key: x[min(b, len(x) - 1), :, :count, :length] for key, x in masks.items()}
            used, beyond = alone(name, got, b, length, count)
            assert all((x == nothing).all() for x, nothing in beyond)
            if count:
                stored = as_stored(k[b, :, :length], dtype)
                own |= limits(kind, length, count, mask=own.get("mask"))
                hold(used, name, q[b, :, :count], stored, **own, **heads)


def alone(name, answer, b, length, count):
    """Of an answer what belongs to the queries and tokens of one sequence, and what is not theirs beside what it is."""
    if name == "top_keys":
        keys, weights = (x[b] for x in answer)
        return (keys[:, :count], weights[:, :count]), [(keys[:, count:], -1), (weights[:, count:], 0)]
    x = answer[b]
    if name == "received":
        return x[:, :length], [(x[:, length:], 0)]
    if name == "weights":
        return x[:, :count, :length], [(x[:, count:], 0), (x[:, :, length:], 0)]
    return x[:, :count], [(x[:, count:], -np.inf if name == "largest" else 0)]


@questions
@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences(kind, name, tmp_path, monkeypatch):
    """Several chunks of keys and panels of rows; kept tokens that are more than a block; windows of any kind."""
    for constant, n in dict(WINDOW=1500, KEEP=200, TURN=400).items():
        monkeypatch.setitem(globals(), constant, n)
    k, q = normal(np.random.default_rng(2), (2, 2, 4000, 16)), normal(np.random.default_rng(3), (2, 6, 70, 16))
    _, asked = filled(kind, k, [4000, 4000], "float32", tmp_path)
    for options in ({}, dict(window=900), dict(causal=False, window=(700, 20)), dict(scale=-0.3)):
        got = asked(name, q, num_threads=1, **options)
        same_bits(asked(name, q, num_threads=3, **options), got)
        scale = options.pop("scale", None)
        seen = limits(kind, 4000, 70, **options)
        for b in range(2):
            hold(tuple(x[b] for x in got) if name == "top_keys" else got[b], name, q[b], k[b], scale=scale, **seen)


@questions
@pytest.mark.parametrize("kind", ["slab", "file", "ring", "pages"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_bits_are_those_of_the_function(kind, dtype, name, tmp_path):
    """Of the same keys in one array, where nothing is left out between them."""
    k, q = normal(np.random.default_rng(4), (2, 2, 1300, 16)), normal(np.random.default_rng(5), (2, 4, 9, 16))
    _, asked = filled(kind, k, [1300, 1300], dtype, tmp_path)
    options = dict(window=WINDOW if kind == "ring" else 1000, causal=True, sinks=[0, 1, 2, 3])
    got = asked(name, q, **options)
    same_bits(got, ask(name, q, as_stored(k, dtype), **options))
    swapped = asked(name, q.swapaxes(1, 2), layout="blhd", **options)
    same_bits(swapped, got)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_their_own(kind, tmp_path):
    """Chosen queries and tokens are parts of the whole; a log-sum-exp is what attend returns; any number of keys."""
    k, q = normal(np.random.default_rng(6), (2, 2, 300, 16)), normal(np.random.default_rng(7), (2, 4, 20, 16))
    _, asked = filled(kind, k, [300, 211], "float32", tmp_path)
    whole = asked("weights", q)
    assert whole.shape == (2, 4, 20, 300)
    queries, keys = [3, -1, 3], [0, 299, 4, -40, 150]
    same_bits(asked("weights", q, queries=queries, keys=keys), whole[:, :, queries][..., keys])
    same_bits(asked("weights", q, queries=slice(-5, None)), np.ascontiguousarray(whole[:, :, -5:]))
    some = asked("received", q, queries=queries)
    np.testing.assert_allclose(some, whole[:, :, queries].sum(axis=2), rtol=1e-5, atol=1e-7)
    lse = asked("attend", q, return_lse=True)[1]
    np.testing.assert_allclose(asked("weights", q, lse=lse), whole, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(asked("received", q, lse=lse), asked("received", q), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(asked("received", q, lse=lse, queries=queries), some, rtol=1e-5, atol=1e-7)
    many = asked("top_keys", q, 400)
    for x, first in zip(many, asked("top_keys", q, n=3), strict=True):
        assert x.shape == (2, 4, 20, 400)
        same_bits(np.ascontiguousarray(x[..., :3]), first)
    np.testing.assert_array_equal((many[0] >= 0).sum(axis=-1), (whole > 0).sum(axis=-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_cells_are_those_of_the_weights(kind, dtype, tmp_path, monkeypatch):
    """Of all queries and tokens of the call, also of sequences that have fewer; tokens that a ring keeps count too."""
    for constant, n in dict(WINDOW=300, KEEP=140, TURN=200).items():
        monkeypatch.setitem(globals(), constant, n)
    rng = np.random.default_rng(14)
    k, q = normal(rng, (3, 2, 1500, 16)), normal(rng, (3, 4, 40, 16), "float32" if dtype in QUANTISED else dtype)
    _, asked = filled(kind, k, [1500, 700, 0], dtype, tmp_path)
    bias, lse = normal(rng, (40, 1500)), asked("attend", q, lengths=[40, 9, 0], return_lse=True)[1]
    for options in (dict(lengths=[40, 9, 0]), dict(window=100, sinks=[0, 1, 2, 3]), dict(bias=bias)):
        p = asked("weights", q, **options).astype("f8")
        for shape in ((256, 256), (7, 13), (1, 1500)):
            for reduce in ("mean", "max"):
                got = asked("pooled", q, shape, reduce, num_threads=1, **options)
                same_bits(asked("pooled", q, shape, reduce=reduce, num_threads=3, **options), got)
                np.testing.assert_allclose(got, reference.spotlight._pool(p, shape, reduce), rtol=1e-5, atol=1e-6)
    got = asked("pooled", q, lse=lse, lengths=[40, 9, 0])
    np.testing.assert_allclose(got, asked("pooled", q, lengths=[40, 9, 0]), rtol=1e-4, atol=1e-7)


@questions
def test_pages_with_a_common_beginning(name):
    """They are asked where they lie, also twice in one call; what follows is each sequence's own."""
    k = normal(np.random.default_rng(8), (3, 2, 60, 16))
    k[1:, :, :33] = k[0, :, :33]
    pool = PagedKVCache(2, 16, pages=20, page_size=8)
    a = pool.add()
    pool.append([a], k[:1, :, :33], k[:1, :, :33])
    ids = [a, pool.fork(a), pool.fork(a)]
    pool.append(ids, k[:, :, 33:50], k[:, :, 33:50], lengths=[17, 9, 0])
    order = [ids[2], ids[0], ids[1], ids[0]]
    q = normal(np.random.default_rng(9), (4, 4, 3, 16))
    got = getattr(pool, name)(order, q)
    for b, sequence in enumerate(order):
        n = int(pool.lengths([sequence])[0])
        used, beyond = alone(name, got, b, n, 3)
        assert all((x == nothing).all() for x, nothing in beyond)
        expected = ask(name, q[b], k[ids.index(sequence), :, :n], causal=True)
        same_bits(tuple(np.ascontiguousarray(x) for x in parts(used)), parts(expected))


def test_forgotten_tokens_are_worth_nothing():
    """A ring numbers tokens as its masks do: those that it keeps, and those of the windows."""
    cache = KVCache(1, 1, 1, capacity=12, window=6, keep=2)
    tokens = np.zeros((1, 1, 1000, 1), "f4")
    cache.append(tokens, tokens)
    q = np.zeros((1, 1, 2, 1), "f4")
    seen = [0, 1, *range(992, 1000)]
    got = cache.received(q)[0, 0]
    assert got.shape == (1000,) and np.flatnonzero(got).tolist() == seen
    np.testing.assert_allclose(got[[0, 992, 999]], [2 / 9, 1 / 9, 1 / 9], rtol=1e-6)
    p = cache.weights(q)[0, 0]
    assert [np.flatnonzero(row).tolist() for row in p] == [seen[:-1], seen[:2] + seen[3:]] and p.shape == (2, 1000)
    assert cache.weights(q, keys=slice(500, 600)).max() == 0
    assert cache.top_keys(q, 11)[0][0, 0].tolist() == [[*seen[:-1], -1, -1], [0, 1, *range(993, 1000), -1, -1]]
    np.testing.assert_allclose(np.exp(cache.entropy(q)), 9, rtol=1e-6)


@questions
def test_nothing_to_see(name):
    """Caches without a token, and sequences without one beside others."""

    def blank(answer):
        worth = dict(largest=[-np.inf], top_keys=[-1, 0]).get(name, [0])
        return [bool((x == nothing).all()) for x, nothing in zip(parts(answer), worth, strict=True)]

    q = np.ones((2, 4, 3, 8), "f4")
    pool = PagedKVCache(2, 8, 9, page_size=4)
    ids = [pool.add(), pool.add()]
    shape = {"top_keys": (2, 4, 3, 5), "received": (2, 4, 0), "weights": (2, 4, 3, 0)}.get(name, (2, 4, 3))
    slabs = KVCache(2, 2, 8, 9), KVCache(2, 2, 8, 9, dtype="int8"), KVCache(2, 2, 8, 9, window=4, keep=2)
    for got in (getattr(pool, name)(ids, q), *(getattr(cache, name)(q) for cache in slabs)):
        assert all(x.shape == shape for x in parts(got)) and all(blank(got))
    pool.append(ids[1:], q[:1, :2], q[:1, :2])
    got = parts(getattr(pool, name)(ids, q))
    assert all(blank(tuple(x[0] for x in got))) and not any(blank(tuple(x[1, :, -1:] for x in got)))


Q = np.ones((2, 4, 1, 4), "f4")
ERRORS = {
    "q's batch": (dict(q=Q[:1]), ValueError, r"q must be of shape .*q.shape=\(1, 4, 1, 4\)"),
    "q's type": (dict(q=Q.astype("f2")), TypeError, "the cache must have q's type"),
    "more queries than tokens": (dict(q=np.ones((2, 4, 4, 4), "f4")), ValueError, "sequence 1 has 3 tokens"),
    "causal": (dict(causal="top-left"), ValueError, "True or False"),
    "mask": (dict(mask=np.ones((1, 6), bool)), ValueError, "mask"),
    "lengths": (dict(lengths=[2, 0]), ValueError, r"lengths must be in 0..1 \(the queries given\), got 2"),
    "word": (dict(is_causal=True), TypeError, "unexpected keyword argument 'is_causal'; here it is causal="),
    "word that has no sense": (dict(q_offset=1), TypeError, "unexpected keyword argument 'q_offset'; attention has it"),
}  # fmt: skip
OF_ONE = [
    ("influence", dict(groups=[0, 1]), ValueError, r"groups must have the shape \(5,\), one for each key, got \(2,\)"),
    ("top_keys", dict(n=0), ValueError, "n must be at least 1, got 0"),
    ("received", dict(lse=np.zeros((2, 4, 2), "f4")), ValueError, r"lse must have the shape \(2, 4, 1\)"),
    ("received", dict(queries=[1]), ValueError, "queries must be in -1..0, got 1"),
    ("pooled", dict(shape=(0, 1)), ValueError, r"shape must be at least 1 in each axis, got \(0, 1\)"),
    ("pooled", dict(lse=np.zeros((2, 4, 2), "f4")), ValueError, r"lse must have the shape \(2, 4, 1\)"),
    ("weights", dict(keys=[5]), ValueError, "keys must be in -5..4, got 5"),
    ("weights", dict(keys=[0.5]), TypeError, "keys must be a slice or integers"),
]


def both():
    cache, pool = KVCache(2, 2, 4, 10), PagedKVCache(2, 4, 9, page_size=4)
    ids = [pool.add(), pool.add()]
    k = np.ones((2, 2, 5, 4), "f4")
    cache.append(k, k, lengths=[5, 3])
    pool.append(ids, k, k, lengths=[5, 3])
    return ("KVCache", cache, ()), ("PagedKVCache", pool, (ids,))


@questions
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_attend(name, case):
    options, error, message = ERRORS[case]
    for kind, cache, first in both():
        with pytest.raises(error, match=rf"^{kind}\.{name}(\(\))?:? .*{message}"):
            getattr(cache, name)(*first, **dict(q=Q) | options)


@pytest.mark.parametrize("name, options, error, message", OF_ONE, ids=str)
def test_errors_of_a_question(name, options, error, message):
    for kind, cache, first in both():
        with pytest.raises(error, match=rf"^{kind}\.{name}: {message}"):
            getattr(cache, name)(*first, Q, **options)


@questions
def test_errors_of_rings_and_pages(name):
    cache = KVCache(2, 2, 4, 12, window=6, keep=2)
    cache.append(*[np.ones((2, 2, 30, 4), "f4")] * 2)
    too_far = dict(window=9), "reaches 9 back, the cache keeps 6"
    too_many = dict(q=np.ones((2, 4, 5, 4), "f4")), "the ring holds 10 tokens from 20 on"
    for options, message in (too_far, too_many):
        with pytest.raises(ValueError, match=rf"^KVCache\.{name}: .*{message}"):
            getattr(cache, name)(**dict(q=Q) | options)
    pool = both()[1][1]
    wrong = ([], ValueError, "at least one"), ([0, 9], ValueError, "no sequence 9"), (0, TypeError, "must be a list")
    for sequences, error, message in wrong:
        with pytest.raises(error, match=rf"^PagedKVCache\.{name}: .*{message}"):
            getattr(pool, name)(sequences, Q)


def test_python_names_the_class():
    for kind, cache, first in both():
        with pytest.raises(TypeError, match=rf"^{kind}\.received\(\) missing 1 required positional argument: 'q'"):
            cache.received(*first)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kept"])
@pytest.mark.parametrize("dtype", TYPES)
def test_influence(kind, dtype, tmp_path):
    """Of tokens and of groups, sequences of any length with any number of queries: as of their arrays alone."""
    lengths, counts, n = [300, 97, 1, 0, 212], [6, 3, 1, 0, 0], 300
    rng = np.random.default_rng(1)
    k, q = normal(rng, (5, 2, n, 24)), normal(rng, (5, 4, 6, 24), "float32" if dtype in QUANTISED else dtype)
    q[0, 1] *= q.dtype.type(20)  # some keys have more than half the weight
    mask, sinks = rng.random((5, 1, 6, n)) < 0.8, [0.5, 1, -np.inf, 2]
    _, asked = filled(kind, k, lengths, dtype, tmp_path)
    for groups in (None, rng.integers(-1, 4, n)):
        got = asked("influence", q, groups=groups, lengths=counts, mask=mask, sinks=sinks, num_threads=1)
        again = asked("influence", q, groups=groups, lengths=counts, mask=mask, sinks=sinks, num_threads=3)
        same_bits(again, got)
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            if not count:
                assert (got[b] == 0).all()
                continue
            stored = as_stored(k[b, :, :length], dtype)
            own = limits(kind, length, count, mask=mask[b, 0, :count, :length])
            members = None if groups is None else groups[:length]
            n_own = length if groups is None else members.max() + 1
            assert (got[b, :, n_own:] == 0).all()
            check_influence(got[b, :, :n_own], q[b, :, :count], stored, stored, groups=members, sinks=sinks, **own)


def test_influence_of_kept_tokens_is_refused():
    cache = KVCache(2, 2, 4, 12, window=6, keep=2)
    cache.append(*[np.ones((2, 2, 5, 4), "f4")] * 2)
    assert cache.influence(Q).shape == (2, 4, 5)  # nothing lies between them and the window
    cache.append(*[np.ones((2, 2, 30, 4), "f4")] * 2)
    with pytest.raises(ValueError, match=r"^KVCache\.influence: a ring that keeps its first 2 tokens beyond"):
        cache.influence(Q)


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_changes_nothing(kind, tmp_path):
    """Neither the cache nor what attend says afterwards."""
    k, q = normal(np.random.default_rng(10), (2, 2, 200, 16)), normal(np.random.default_rng(11), (2, 4, 5, 16))
    cache, asked = filled(kind, k, [200, 120], "int8", tmp_path)
    before = asked("attend", q)
    with no_change(cache._k, cache._v, q):
        for name in OF_CACHES:
            asked(name, q)
    same_bits(asked("attend", q), before)


@pytest.mark.alone
@questions
@pytest.mark.parametrize("kind", ["kept", "pages"])
def test_no_memory(kind, name, tmp_path):
    """Whichever allocation fails, a MemoryError; the next call is right."""
    k, q = normal(np.random.default_rng(12), (2, 2, 1500, 64)), normal(np.random.default_rng(13), (2, 8, 40, 64))
    _, asked = filled(kind, k, [1500, 1300], "int4", tmp_path)
    whole = asked(name, q, num_threads=2)
    for n in itertools.count():
        trim()
        with fail_allocation(n) as allocations:
            try:
                got = asked(name, q, num_threads=2)
            except MemoryError:
                got = None
            count = allocations.count
        same_bits(asked(name, q, num_threads=2), whole)
        if got is not None:
            same_bits(got, whole)
            break
    assert count <= n and n >= 1
