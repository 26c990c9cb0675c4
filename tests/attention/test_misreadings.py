"""Calls that could mean something else than their user thinks are errors, whatever the sizes, or say how they are read.
Each error names the way out."""

import copy
import fractions
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from _util import child_says, normal, same_bits

import qkv_fast

RNG = np.random.default_rng(0)


def fails(error, words, call, *args, **options):
    with pytest.raises(error, match=re.escape(words)):
        call(*args, **options)


# Numbers of axes


@pytest.mark.parametrize("sizes", [(2, 4, 5, 9), (4, 4, 5, 9), (5, 5, 5, 5), (2, 2, 2, 2), (1, 4, 5, 9)], ids=str)
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_three_axes_beside_four(sizes, name):
    """(B, Lq, Lk) and (H, Lq, Lk) are refused for every size, also where B is H; with all axes both mean one thing."""
    b, h, lq, lk = sizes
    q, k, v = normal(RNG, (b, h, lq, 8)), normal(RNG, (b, h, lk, 8)), normal(RNG, (b, h, lk, 8))
    for first in {b, h}:
        x = RNG.random((first, lq, lk)) < 0.5 if name == "mask" else normal(RNG, (first, lq, lk))
        fails(ValueError, f"{name} must have 1 or 2 axes, (queries, keys), or all of", qkv_fast.attention, q, k, v,
              **{name: x})  # fmt: skip
        if first == b:
            fails(ValueError, f"one per sequence: pass {name}[:, None]", qkv_fast.attention, q, k, v, **{name: x})
            qkv_fast.attention(q, k, v, **{name: x[:, None]})
        if first == h:
            fails(ValueError, f"the same for all sequences: pass {name}[None, ...]", qkv_fast.attention, q, k, v,
                  **{name: x})  # fmt: skip
            qkv_fast.attention(q, k, v, **{name: x[None]})


@pytest.mark.parametrize("hk", [2, 3, 1])
def test_grouped_queries_with_an_axis_of_their_own(hk):
    """(B, Hk, G, L, D) beside (B, Hk, L, D): an error where B is Hk, too, and the way out is right."""
    for b in (2, 3):
        q, k, v = normal(RNG, (b, hk, 4, 5, 8)), normal(RNG, (b, hk, 9, 8)), normal(RNG, (b, hk, 9, 8))
        fails(ValueError, "as many axes as q, or 3; one for each group of q's heads: pass k[..., None, :, :]",
              qkv_fast.attention, q, k, v)  # fmt: skip
        fails(ValueError, "pass k[..., None, :, :]", qkv_fast.scores, q, k)
        fails(ValueError, "pass v[..., None, :, :]", qkv_fast.weighted_values, normal(RNG, (b, hk, 4, 5, 9)), v)
        wide = qkv_fast.attention(q, k[..., None, :, :], v[..., None, :, :])
        same_bits(wide.reshape(b, hk * 4, 5, 8), qkv_fast.attention(q.reshape(b, hk * 4, 5, 8), k, v))


def test_ways_out_work():
    """Each that an error names, in either layout, and none that would not."""
    for layout, at in (("bhld", "..., None, :, :"), ("blhd", "..., None, :")):
        q, k = normal(RNG, (2, 3, 4, 4, 8)), normal(RNG, (2, 3, 4, 8))
        if layout == "blhd":  # (B, G, L, H, D) beside (B, G, L, D)
            q, k = normal(RNG, (2, 3, 5, 4, 8)), normal(RNG, (2, 3, 5, 8))
        fails(ValueError, f"one for each group of q's heads: pass k[{at}]", qkv_fast.attention, q, k, k, layout=layout)
        wide = eval(f"k[{at}]")
        assert qkv_fast.attention(q, wide, wide, layout=layout).shape == q.shape
    q, k = normal(RNG, (2, 3, 4, 5, 8)), normal(RNG, (3, 4, 7, 8))
    fails(ValueError, "or 3; the same for all of the first axes: pass k[None, ...] (", qkv_fast.attention, q, k, k)
    assert qkv_fast.attention(q, k[None], k[None]).shape == q.shape
    fails(ValueError, "as many axes as q, or 3 (", qkv_fast.attention, normal(RNG, (2, 2, 2, 4, 5, 8)), k, k)


def test_keys_of_three_axes_serve_all_sequences():
    q, k, v = normal(RNG, (3, 4, 5, 8)), normal(RNG, (2, 9, 8)), normal(RNG, (2, 9, 8))
    same_bits(qkv_fast.attention(q, k, v)[2], qkv_fast.attention(q[2], k, v))
    fails(ValueError, "one q for all sequences: pass q[None, ...]", qkv_fast.attention, q[0], k[None], v[None])


@pytest.mark.parametrize("call", ["ragged", "cache", "pages"])
def test_masks_of_three_axes_elsewhere(call):
    x = np.ones((2, 3, 8), np.float32)
    mask = np.ones((2, 1, 3), bool)
    if call == "ragged":
        packed = np.ones((4, 2, 8), np.float32)
        fails(ValueError, "mask must have 1 or 2 axes", qkv_fast.attention_varlen, packed, packed, packed, [0, 2, 4],
              [0, 2, 4], mask=np.ones((2, 2, 2), bool))  # fmt: skip
        return
    if call == "cache":
        cache = qkv_fast.KVCache(2, 2, 8, 10)
        cache.append(np.stack([x, x]), np.stack([x, x]))
        attend = cache.attend
    else:
        pool = qkv_fast.PagedKVCache(2, 8, 10)
        ids = [pool.add(), pool.add()]
        pool.append(ids, np.stack([x, x]), np.stack([x, x]))
        attend = lambda q, **options: pool.attend(ids, q, **options)  # noqa: E731
    fails(ValueError, "mask must have 1 or 2 axes", attend, np.ones((2, 2, 1, 8), np.float32), mask=mask)


def test_a_mask_of_two_axes_is_queries_and_keys():
    """Where there are as many sequences as queries nobody can tell: help and explain say it."""
    q, k, v = normal(RNG, (5, 2, 5, 8)), normal(RNG, (5, 2, 9, 8)), normal(RNG, (5, 2, 9, 8))
    mask = RNG.random((5, 9)) < 0.7
    same_bits(qkv_fast.attention(q, k, v, mask=mask), qkv_fast.attention(q, k, v, mask=mask[None, None]))
    (reading,) = qkv_fast.explain(q, k, v, mask=mask).readings
    assert reading == "mask (5, 9): (queries, keys), the same for all sequences"
    assert qkv_fast.explain(q, k, v, mask=mask[:, None, None]).readings == (
        "mask (5, 1, 1, 9): (..., query heads, queries, keys)",
    )
    assert "``mask[:, None, None]``" in qkv_fast.attention.__doc__
    assert "read as" in str(qkv_fast.explain(q, k, v, mask=mask))


def test_heads_that_are_not_split():
    x = np.ones((2, 7, 384), np.float32)
    (reading,) = qkv_fast.explain(x, x, x).readings
    assert reading == (
        "q: one sequence of 2 heads, 7 long, of 384 elements; "
        "heads not split? reshape to (B, L, num_heads, D), layout='blhd'"
    )
    (reading,) = qkv_fast.explain(x[..., :64], x[..., :64], x).readings
    assert reading == "q: one sequence of 2 heads, 7 long, of 64 elements"
    wide = np.ones((2, 7, 1536), np.float32)
    fails(ValueError, "D and Dv are at most 1024; heads not split? reshape to (B, L, num_heads, D), layout='blhd'",
          qkv_fast.attention, wide, wide, wide)  # fmt: skip
    with pytest.raises(ValueError, match="at most 1024 \\("):
        qkv_fast.attention(*[wide[None]] * 3)


# Copies of caches


def filled(cache):
    x = normal(RNG, (2, 2, 6, 8))
    cache.append(x, x)
    return cache


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("options", [{}, dict(dtype="int8"), dict(window=3, keep=1)], ids=str)
def test_copies_of_caches_are_their_own(make, options):
    cache = filled(qkv_fast.KVCache(2, 2, 8, 8, **options))
    q = normal(RNG, (2, 4, 1, 8))
    before = cache.attend(q)
    other = make(cache)
    assert repr(other) == repr(cache)
    same_bits(other.attend(q), before)
    other.truncate(5)
    other.append(*[np.full((2, 2, 1, 8), 9, np.float32)] * 2)
    assert not np.array_equal(other.attend(q), before)
    same_bits(cache.attend(q), before)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_pages_are_their_own(make):
    pool = qkv_fast.PagedKVCache(2, 8, pages=8, page_size=4)
    ids = [pool.add(), pool.add()]
    x = normal(RNG, (2, 2, 6, 8))
    pool.append(ids, x, x)
    q = normal(RNG, (2, 4, 1, 8))
    before = pool.attend(ids, q)
    other = make(pool)
    same_bits(other.attend(ids, q), before)
    other.append(ids, *[np.full((2, 2, 1, 8), 9, np.float32)] * 2)
    other.remove(ids[0])
    assert pool.sequences == ids and pool.free_pages == 4
    same_bits(pool.attend(ids, q), before)


def test_a_copy_takes_what_is_used():
    for cache in (qkv_fast.KVCache(1, 2, 8, 10_000), qkv_fast.KVCache(1, 2, 8, 10_000, window=5_000)):
        cache.append(*normal(RNG, (2, 1, 2, 3, 8)))
        assert len(pickle.dumps(cache)) < 5_000 and copy.copy(cache).nbytes == cache.nbytes
    pool = qkv_fast.PagedKVCache(2, 8, pages=1_000)
    pool.append([pool.add()], *normal(RNG, (2, 1, 2, 3, 8)))
    assert len(pickle.dumps(pool)) < 50_000 and copy.copy(pool).nbytes == pool.nbytes


def test_bfloat16_in_a_process_that_has_not_seen_any():
    cache = qkv_fast.KVCache(1, 1, 8, 4, dtype="bfloat16")
    code = f"""
import pickle, numpy as np
cache = pickle.loads({pickle.dumps(cache)!r})
q = cache.keys.astype(cache.keys.dtype)[:, :, :0]
try:
    cache.attend(np.zeros((1, 1, 1, 8), cache.keys.dtype), out=np.zeros((1, 1, 1, 8)))
except TypeError as error:
    print(error)
"""
    assert "out must have q's type bfloat16, or float32, got float64" in child_says(code)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_in_a_file_is_not_copied(tmp_path, make):
    cache = qkv_fast.KVCache(1, 2, 8, 10, path=tmp_path / "cache")
    fails(TypeError, "save(path) writes a copy, open(path) has the same tokens", make, cache)


def test_a_ring_too_small_for_a_prompt_names_the_capacity():
    x = normal(RNG, (1, 1, 6, 8))
    ring = qkv_fast.KVCache(1, 1, 8, capacity=6, window=3, keep=1)
    ring.append(x, x)
    ring.append(x, x)
    fails(ValueError, "capacity=10, keep + window + queries", ring.attend, x)
    ring = qkv_fast.KVCache(1, 1, 8, capacity=10, window=3, keep=1)
    for _ in range(3):
        ring.append(x, x)
        ring.attend(x)


def test_caches_show_what_they_were_made_with():
    cache = qkv_fast.KVCache(3, 2, 8, 10, value_dim=4, dtype="float16", window=4, keep=2)
    names = ("batch", "kv_heads", "head_dim", "capacity", "value_dim", "dtype", "window", "keep")
    shown = ", ".join(f"{name}={getattr(cache, name)!r}" for name in names)
    assert repr(cache) == f"KVCache({shown}, lengths=[0, 0, 0])"
    assert qkv_fast.KVCache(3, 2, 8, 10).window is None
    pool = qkv_fast.PagedKVCache(2, 8, 10, page_size=16, value_dim=4, dtype="int8")
    names = ("kv_heads", "head_dim", "pages", "page_size", "value_dim", "dtype")
    shown = ", ".join(f"{name}={getattr(pool, name)!r}" for name in names)
    assert repr(pool) == f"PagedKVCache({shown}, lengths={{}})"
    for held, name in ((cache, "capacity"), (pool, "pages")):
        with pytest.raises(AttributeError):
            setattr(held, name, 1)


# Words of others

X = np.ones((1, 2, 5, 8), np.float32)
WORDS = {
    "is_causal": "causal=True",
    "attn_mask": "mask= if it is bool, bias= if it is added",
    "dropout_p": "nothing: there is no dropout",
    "enable_gqa": "nothing: heads of k and v that divide q's are groups",
    "key_padding_mask": "mask=~key_padding_mask[:, None, None, :]",
    "softmax_scale": "scale=",
    "window_size": "window=",
}


@pytest.mark.parametrize("word", WORDS)
def test_words_of_others_are_answered_with_ours(word):
    cache = qkv_fast.KVCache(1, 2, 8, 10)
    pool = qkv_fast.PagedKVCache(2, 8, 10)
    packed = X[0].swapaxes(0, 1)
    calls = {
        "attention": lambda **o: qkv_fast.attention(X, X, X, **o),
        "attention_varlen": lambda **o: qkv_fast.attention_varlen(packed, packed, packed, [0, 5], [0, 5], **o),
        "KVCache.attend": lambda **o: cache.attend(X, **o),
        "PagedKVCache.attend": lambda **o: pool.attend([pool.add()], X, **o),
        "scores": lambda **o: qkv_fast.scores(X, X, **o),
        "weighted_values": lambda **o: qkv_fast.weighted_values(X[..., :5], X, **o),
        "softmax": lambda **o: qkv_fast.softmax(X, **o),
        "softmax_grad": lambda **o: qkv_fast.softmax_grad(X, X, **o),
        "reference.attention": lambda **o: qkv_fast.reference.attention(X, X, X, **o),
    }
    own = {"scores": {"softmax_scale"}, "softmax": set(), "softmax_grad": set(), "weighted_values": set()}
    for name, call in calls.items():
        with pytest.raises(TypeError) as caught:
            call(**{word: None})
        has = word in own.get(name, WORDS) or WORDS[word].startswith("nothing")
        known = "here it is" if has else "attention has it, as"
        assert str(caught.value).startswith(f"{name}() got an unexpected keyword argument {word!r}; {known} ")
        assert WORDS[word] in str(caught.value)
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'nonsense'$"):
            call(nonsense=1)


def test_values_of_others_are_answered_with_ours():
    fails(ValueError, "softcap must be greater than 0, got 0; None is no cap", qkv_fast.attention, X, X, X, softcap=0)
    fails(ValueError, "got (-1, -1); None leaves a side open", qkv_fast.attention, X, X, X, window=(-1, -1))
    fails(TypeError, "got 'causal'; pass causal=True", qkv_fast.attention, X, X, X, mask="causal")
    fails(TypeError, "got 'top-left'; pass causal='top-left'", qkv_fast.attention, X, X, X, mask="top-left")
    same_bits(qkv_fast.attention(X, X, X, scale=np.array(0.5)), qkv_fast.attention(X, X, X, scale=0.5))
    fails(TypeError, "axis must be an integer, got True", qkv_fast.softmax, X, axis=True)
    cache = qkv_fast.KVCache(1, 2, 8, 10)
    fails(TypeError, "unexpected keyword argument 'kv_lengths'; attention has it", cache.attend, X, kv_lengths=5)
    fails(TypeError, "of a cache pass its method, cache.attend", qkv_fast.explain, cache, X)
    fails(ValueError, "(1, tokens, 2, 8) (k.shape=(1, 2, 5, 8)", cache.append, X, X, layout="blhd")
    fails(TypeError, "not int", qkv_fast.KVCache.load, 10**6)
    fails(TypeError, "scale must be a real number", qkv_fast.attention, X, X, X, scale=np.array([0.5]))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int4"])
def test_small_types_of_ml_dtypes(name):
    x = X.astype(getattr(ml_dtypes, name))
    fails(TypeError, f"q must be float16, bfloat16, float32 or float64, got {name}; pass q.astype('float32')",
          qkv_fast.attention, x, x, x)  # fmt: skip


def test_objects_say_what_they_hold():
    x = np.full((1, 2, 5, 8), fractions.Fraction(1, 2))
    fails(TypeError, "got object holding a fractions.Fraction", qkv_fast.attention, x, x, x)
    fails(TypeError, "got object holding a list", qkv_fast.attention, np.array([[[1], [2, 3]]] * 3, object), X, X)
