"""Drafts in trees: attend(tree=), with and without positions, and questions about it, in slabs, rings and pages."""

import numpy as np
import pytest
from _questions import hold
from _util import arithmetic, compare, qkv, same_bits

import qkv_fast


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("lq", [1, 3, 40])
def test_trees(dtype, lq):
    """The bits of the mask that says the same of all tokens; NaN in rows past the queries of a sequence is nothing."""
    rng = np.random.default_rng(lq)
    for n in (lq, 130, 1023 + lq, 1024 + lq):
        kind = "float32" if dtype == "int8" else dtype
        q, k, v = qkv(n, kind, batch=(2,), heads=(4, 2), lengths=(lq, n), dims=(16, 8))
        lengths, tree = [n, max(lq, n - 37)], np.tril(rng.random((2, lq, lq)) < 0.5)
        cache = qkv_fast.KVCache(2, 2, 16, 2000, value_dim=8, dtype=dtype)
        cache.append(k, v, lengths=lengths)
        for counts in ([lq, lq], [lq, lq - 1]):
            q[1, :, counts[1] :] = np.nan
            mask = np.zeros((2, 1, lq, n), bool)
            for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
                mask[b, :, :, : length - count] = True
                mask[b, 0, :count, length - count : length] = tree[b, :count, :count]
            for options in ({}, dict(alibi_slopes=np.linspace(0.1, 0.4, 4), softcap=3.0), dict(window=(200, None))):
                options |= dict(lengths=counts, return_lse=True)
                expected = cache.attend(q, mask=mask, causal=False, **options)
                same_bits(cache.attend(q, tree=tree, **options), expected)
                assert qkv_fast.explain(cache.attend, q, tree=tree, **options).pairs == (
                    qkv_fast.explain(cache.attend, q, mask=mask, causal=False, **options).pairs
                )


QUESTIONS = {
    "largest": {}, "entropy": {}, "top_keys": dict(n=3), "received": {}, "weights": dict(queries=[4, 1]),
    "pooled": dict(shape=(3, 7)), "influence": {},
}  # fmt: skip


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_with_trees(name):
    """As of the mask that says the same of all tokens: in slabs, pages and rings."""
    rng = np.random.default_rng(0)
    q, k, v = qkv(1, batch=(1,), heads=(4, 2), lengths=(5, 70), dims=(8, 8))
    tree = np.tril(rng.random((5, 5)) < 0.6) | np.eye(5, dtype=bool)
    seen = np.hstack([np.ones((5, 65), bool), tree])
    slab, ring = (qkv_fast.KVCache(1, 2, 8, 70, window=window) for window in (None, 65))
    pool = qkv_fast.PagedKVCache(2, 8, 20, page_size=16)
    s = pool.add()
    for cache, own in ((slab, ()), (ring, ()), (pool, ([s],))):
        cache.append(*own, k, v)
        ask = getattr(cache, name)
        for options in ({}, dict(alibi_slopes=np.full(4, 0.1), window=(30, None))):
            options |= QUESTIONS[name]
            got, expected = ask(*own, q, tree=tree, **options), ask(*own, q, mask=seen, causal=False, **options)
            for x, y in zip(got, expected, strict=True):
                same_bits(x, y)
        with pytest.raises(ValueError, match=f"{name}: tree and mask exclude each other"):
            ask(*own, q, **QUESTIONS[name], tree=tree, mask=seen)


def test_trees_in_rings_and_pages():
    rng = np.random.default_rng(0)
    q, k, v = qkv(1, batch=(1,), heads=(4, 2), lengths=(5, 70), dims=(8, 8))
    tree = np.tril(rng.random((5, 5)) < 0.6) | np.eye(5, dtype=bool)
    ring = qkv_fast.KVCache(1, 2, 8, capacity=40, window=20, keep=3)
    pool = qkv_fast.PagedKVCache(2, 8, 20, page_size=16)
    s = pool.add()
    for t in range(0, 70, 7):
        ring.append(k[:, :, t : t + 7], v[:, :, t : t + 7])
        pool.append([s], k[:, :, t : t + 7], v[:, :, t : t + 7])
    seen = np.hstack([np.ones((5, 65), bool), tree])
    expected = qkv_fast.attention(q, k, v, mask=seen)
    same_bits(pool.attend([s], q, tree=tree), expected)
    at = np.arange(70)
    seen &= (at < 3) | (at >= np.arange(65, 70)[:, None] - 20)
    np.testing.assert_allclose(ring.attend(q, tree=tree), qkv_fast.attention(q, k, v, mask=seen), atol=1e-6)


@pytest.mark.parametrize(
    "error, words, options",
    [
        (ValueError, r"shape \(2, 2\) or \(1, 2, 2\), .* got \(3, 3\)", dict(tree=np.ones((3, 3), bool))),
        (TypeError, "tree must be bool", dict(tree=np.ones((2, 2)))),
        (ValueError, "exclude each other", dict(tree=np.ones((2, 2), bool), mask=np.ones((2, 3), bool))),
    ],
)
def test_what_is_no_tree(error, words, options):
    cache = qkv_fast.KVCache(1, 1, 4, capacity=10)
    cache.append(*np.zeros((2, 1, 1, 3, 4), "float32"))
    with pytest.raises(error, match=words):
        cache.attend(np.zeros((1, 1, 2, 4), "float32"), **options)
    with pytest.raises(ValueError, match=r"append these first \(4 queries, of which sequence 0 has 3"):
        cache.attend(np.zeros((1, 1, 4, 4), "float32"), tree=np.ones((4, 4), bool))


def draft(rng, n):
    """The tokens of a draft that branches: which of them sees which, and their depths."""
    tree, depth = np.eye(n, dtype=bool), np.zeros(n, int)
    for i in range(1, n):
        parent = rng.integers(-1, i)
        if parent >= 0:
            tree[i] |= tree[parent]
            depth[i] = depth[parent] + 1
    return tree, depth


def said_otherwise(length, tree, at, dtype, window=None, alibi_slopes=None, keep=0):
    """The mask and the bias that say the same of one sequence, whose newest tokens sit `at`."""
    older = length - len(at)
    keys = np.concatenate([np.arange(older), at])
    mask = np.hstack([np.ones((len(at), older), bool), tree])
    if window is not None:
        mask &= (at[:, None] - keys <= window) | (np.arange(length) < keep)
    if alibi_slopes is None:
        return dict(mask=mask)
    bias = -np.asarray(alibi_slopes)[:, None, None] * np.abs(at[:, None] - keys)
    return dict(mask=mask, bias=bias.astype(arithmetic(dtype)))


def caches(k, v, dtype, window=60, keep=5):
    """A slab, a ring and pages of these tokens, and what calls of them begin with."""
    heads, n = k.shape[1:3]
    made = [qkv_fast.KVCache(1, heads, 16, n + 9, dtype=dtype)]
    made.append(qkv_fast.PagedKVCache(heads, 16, 40, page_size=48, dtype=dtype))
    made.append(qkv_fast.KVCache(1, heads, 16, n + window + keep, dtype=dtype, window=window, keep=keep))
    made.append(qkv_fast.PagedKVCache(heads, 16, 40, page_size=48, dtype=dtype, window=window))
    for cache in made:
        own = () if isinstance(cache, qkv_fast.KVCache) else ([cache.add()],)
        cache.append(*own, k, v)
        yield cache, own


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("lq", [1, 4, 40])
def test_depths(dtype, lq):
    """Tokens of one depth sit at one position: for ALiBi and windows, of older tokens and among themselves."""
    rng = np.random.default_rng(lq)
    for n in (lq, 130, 1020 + lq, 1030):
        q, k, v = qkv(n, dtype, batch=(1,), heads=(4, 2), lengths=(lq, n), dims=(16, 16))
        tree, depth = draft(rng, lq)
        slopes = np.linspace(0.1, 0.4, 4)
        for at in (n - lq + depth, n - lq + depth * 3 - 2, depth):
            for cache, own in caches(k, v, dtype):
                near = dict(window=(3, None))
                for options in (dict(alibi_slopes=slopes), dict(window=(20, None)), dict(alibi_slopes=slopes, **near)):
                    keep = getattr(cache, "keep", 0)
                    own_window = options.get("window", (cache.window,))[0]
                    same = said_otherwise(n, tree, at, dtype, own_window, options.get("alibi_slopes"), keep)
                    got = cache.attend(*own, q, tree=tree, q_positions=at, return_lse=True, **options)
                    compare([x[0] for x in got], (q[0], k[0], v[0]), **same)


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_with_depths(name):
    rng = np.random.default_rng(1)
    q, k, _ = qkv(1, batch=(1,), heads=(4, 2), lengths=(6, 200), dims=(16, 16))
    tree, depth = draft(rng, 6)
    at, slopes = 194 + depth, np.linspace(0.1, 0.4, 4)
    for cache, own in caches(k, k, "float32", keep=0 if name == "influence" else 5):
        for options in (dict(alibi_slopes=slopes), dict(alibi_slopes=slopes, window=(2, None))):
            window = options.get("window", (cache.window,))[0]
            same = said_otherwise(200, tree, at, "float32", window, slopes, getattr(cache, "keep", 0))
            own_arguments = QUESTIONS[name] if name == "pooled" else {}
            got = getattr(cache, name)(*own, q, tree=tree, q_positions=at, **own_arguments, **options)
            got = tuple(x[0] for x in got) if name == "top_keys" else got[0]
            if name == "influence":
                expected = qkv_fast.spotlight.influence(q[0], k[0], k[0], **same)
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
                continue
            hold(got, name, q[0], k[0], **own_arguments, **same)


@pytest.mark.usefixtures("isa")
def test_depths_of_sequences_of_their_own():
    """One row of positions for each, where one is padded; those past a sequence's queries are nothing."""
    rng = np.random.default_rng(2)
    for lq in (5, 40):
        q, k, v = qkv(1, batch=(2,), heads=(2, 2), lengths=(lq, 90), dims=(16, 16))
        lengths, counts, slopes = [90, 70], [lq, lq - 2], np.array([0.2, 0.5])
        cache = qkv_fast.KVCache(2, 2, 16, 90)
        cache.append(k, v, lengths=lengths, starts=[0, 8])
        drafts = [draft(rng, lq), draft(rng, lq)]
        tree = np.array([x for x, _ in drafts])
        at = np.array([n - m + depth for n, m, (_, depth) in zip(lengths, counts, drafts, strict=True)])
        at[1, lq - 2 :] = -(2**20)
        got = cache.attend(
            q, tree=tree, q_positions=at, lengths=counts, alibi_slopes=slopes, window=(30, None), return_lse=True
        )
        for b, (n, m) in enumerate(zip(lengths, counts, strict=True)):
            same = said_otherwise(n, tree[b, :m, :m], at[b, :m], "float32", 30, slopes)
            compare([x[b, :, :m] for x in got], (q[b, :, :m], k[b, :, :n], v[b, :, :n]), kv_starts=8 * b, **same)
            assert not got[0][b, :, m:].any()


def test_depths_that_are_the_tokens_own_places():
    """The bits of a tree without them; and without a window and ALiBi they mean nothing."""
    q, k, v = qkv(1, batch=(1,), heads=(2, 1), lengths=(4, 300), dims=(16, 16))
    tree = np.tril(np.ones((4, 4), bool))
    for cache, own in caches(k, v, "float32", keep=0):
        for options in ({}, dict(window=(2, None)), dict(alibi_slopes=[0.1, 0.3], window=(2, None))):
            plain = cache.attend(*own, q, tree=tree, **options)
            same_bits(cache.attend(*own, q, tree=tree, q_positions=np.arange(296, 300), **options), plain)
        if cache.window is None:
            same_bits(cache.attend(*own, q, tree=tree, q_positions=[7] * 4), cache.attend(*own, q, tree=tree))
        at = dict(tree=tree, q_positions=[300, 301, 301, 302], alibi_slopes=[0.1, 0.3])
        stepped = cache.step(*own, q, k[:, :, :4], v[:, :, :4], **at)
        same_bits(stepped, cache.attend(*own, q, **at))


def test_positions_further_back_than_the_cache_has():
    q, k, v = qkv(1, batch=(1,), heads=(1, 1), lengths=(2, 200), dims=(16, 16))
    tree = np.eye(2, dtype=bool)
    ring = qkv_fast.KVCache(1, 1, 16, 70, window=60)
    pool = qkv_fast.PagedKVCache(1, 16, 40, page_size=8, window=60)
    own = ([pool.add()],)
    for t in range(0, 200, 4):
        ring.append(k[:, :, t : t + 4], v[:, :, t : t + 4])
        pool.append(*own, k[:, :, t : t + 4], v[:, :, t : t + 4])
    begins = "the first query's window begins at token 120"
    for cache, given, words in ((ring, (), "the ring holds"), (pool, own, begins)):
        with pytest.raises(ValueError, match=words):
            cache.attend(*given, q, tree=tree, q_positions=[180, 199])
        with pytest.raises(ValueError, match=words):
            cache.largest(*given, q, tree=tree, q_positions=[180, 199])
        cache.attend(*given, q, tree=tree, q_positions=[197, 199])


@pytest.mark.parametrize("error, words, options", [
    (ValueError, "q_positions are those of a tree", dict(q_positions=[1, 2])),
    (ValueError, r"q_positions must be of shape \(2,\)", dict(q_positions=[1], tree=np.eye(2, dtype=bool))),
    (TypeError, "q_positions must be an integer or", dict(q_positions=[1.0, 2.0], tree=np.eye(2, dtype=bool))),
    (OverflowError, r"within 2\*\*24", dict(q_positions=[1, 2**24 + 9], tree=np.eye(2, dtype=bool))),
])  # fmt: skip
def test_what_are_no_depths(error, words, options):
    cache = qkv_fast.KVCache(1, 1, 4, capacity=10)
    cache.append(*np.zeros((2, 1, 1, 3, 4), "float32"))
    for call in (cache.attend, cache.largest):
        with pytest.raises(error, match=words):
            call(np.zeros((1, 1, 2, 4), "float32"), **options)
    with pytest.raises(error, match=words):
        cache.step(np.zeros((1, 1, 2, 4), "float32"), *np.zeros((2, 1, 1, 2, 4), "float32"), **options)
    assert cache.lengths[0] == 3
