"""Few query rows against keys and values of narrower types, which are read where they lie if they fill whole vectors.

float16, bfloat16 and quantised rows against the reference on the numbers that they mean, and their bits against
themselves. test_decode.py has float32 and float64; what rows mean is in _quantised.py.
"""

import itertools
import sys

import numpy as np
import pytest
from _fence import Fence
from _patterns import PATTERNS, fits
from _quantised import QUANTISED
from _util import HALVES, compare, normal, qkv, same_bits

import qkv_fast
from qkv_fast import KVCache, PagedKVCache, _runtime

pytestmark = pytest.mark.usefixtures("isa")
NARROW = (*HALVES, *QUANTISED)
narrow = pytest.mark.parametrize("stored", NARROW)
halves = pytest.mark.parametrize("dtype", HALVES)
CHUNK = qkv_fast.explain(*qkv(1, lengths=(1, 1))).chunk_keys


def cached(seed, stored, *, batch=1, heads=(1, 1), lengths=(1, 8), dims=(64, 64), counts=None):
    """float32 queries, and a cache of random keys and values, `counts` in each sequence."""
    q, k, v = qkv(seed, batch=(batch,), heads=heads, lengths=lengths, dims=dims)
    cache = KVCache(batch, heads[1], dims[0], lengths[1], value_dim=dims[1], dtype=stored)
    cache.append(k, v, lengths=counts)
    return q, cache


def check(q, cache, **options):
    options.setdefault("causal", True)
    with _runtime.counters() as seen:
        out, lse = cache.attend(q, return_lse=True, **options)
    # The kernel of few rows took it, if there are more keys than a block has or more rows than a vector.
    # Of int8 and int4 as many rows are few as of the queries' own type.
    rows = q.shape[1] // cache.keys.shape[1] * q.shape[2]
    if cache.keys.dtype in HALVES or rows <= 48 // q.itemsize:
        assert seen["tiles_full"] + seen["tiles_partial"] <= seen["tasks"] * -(-cache.lengths.max() // CHUNK)
    if cache.lengths.min() < cache.lengths.max():
        options.update(kv_lengths=cache.lengths, q_offset=cache.lengths - q.shape[2])
    compare((out, lse), (q, cache.keys, cache.values), **options)
    return out, lse


@narrow
@pytest.mark.parametrize("dims", [(64, 32), (21, 13)])
def test_rows_are_read_where_they_lie(stored, dims):
    q, cache = cached(1, stored, heads=(4, 1), lengths=(1, 600), dims=dims)
    for kind in ("float32", "float64"):
        if kind == "float64" and stored in HALVES:
            continue
        with _runtime.counters() as seen:
            cache.attend(q.astype(kind))
        whole = dims == (64, 32) and kind == "float32" and qkv_fast.isa() not in ("portable", "amx_emulated")
        assert (seen["tiles_copied"] == 0) is whole


@narrow
def test_every_length(stored, request):
    """1..600 keys in a batch of sequences that each have their own number, from grouped and from single heads."""
    step = 1 if request.config.getoption("--exhaustive") else 7
    for first, group in itertools.product(range(1, 601, 60 * step), (1, 4)):
        counts = np.arange(first, min(601, first + 60 * step), step)
        shape = {"batch": len(counts), "heads": (group, 1), "lengths": (1, 600), "dims": (32, 64)}
        check(*cached(first, stored, **shape, counts=counts))
    for n in (*range(1, 70), 255, 256, 257, 600):
        check(*cached(n, stored, heads=(5, 1), lengths=(1, n), dims=(48, 16)))


@narrow
@pytest.mark.parametrize("lq", [1, 3])
def test_around_the_edges_of_chunks(stored, lq):
    for chunks, more in itertools.product((1, 2), (-33, -1, 0, 1, 2, 31, 32, 33)):
        check(*cached(chunks, stored, heads=(2, 1), lengths=(lq, chunks * CHUNK + more), dims=(32, 48)))


@narrow
@pytest.mark.parametrize("group", range(1, 17))
def test_every_group(stored, group):
    for lq in {1, max(1, 16 // group)}:
        q, cache = cached(group, stored, batch=2, heads=(2 * group, 2), lengths=(lq, 157), dims=(128, 64))
        check(q, cache)
        check(q, cache, causal=False)


@narrow
def test_every_dimension(stored):
    """Whole vectors, whole groups of int4, neither."""
    for d in (1, 4, 7, 8, 15, 16, 24, 31, 32, 33, 40, 48, 56, 64, 72, 80, 96, 100, 112, 128, 144, 160, 256):
        for group in (1, 4):
            check(*cached(d, stored, heads=(group, 1), lengths=(1, 170), dims=(d, 16)))
            check(*cached(d, stored, heads=(group, 1), lengths=(1, 170), dims=(16, d)))
    check(*cached(1, stored, heads=(4, 1), lengths=(1, 100), dims=(1024, 1024)))


@pytest.mark.parametrize("dims", [(64, 32), (72, 40), (37, 61)])
def test_rows_for_which_int4_is_widened_once(dims):
    """From five on they share a copy, where fewer widen as they load: each has the bits that it has alone."""
    q, cache = cached(5, "int4", heads=(12, 1), lengths=(1, CHUNK + 157), dims=dims)
    expected = check(q, cache)
    for group in (1, 4, 5, 9):
        for first in range(0, 12, group):
            heads = slice(first, min(12, first + group))
            with _runtime.counters() as seen:
                got = cache.attend(q[:, heads], return_lse=True)
            same_bits(got, [x[:, heads] for x in expected])
            in_registers = dims != (37, 61) and qkv_fast.isa() not in ("portable", "amx_emulated")
            assert (seen["tiles_copied"] == 0) is (in_registers and heads.stop - first < 5)


@narrow
@pytest.mark.parametrize("heads, lq", [((1, 1), 1), ((8, 2), 1), ((6, 2), 4)])
def test_threads_do_not_change_bits(stored, heads, lq):
    q, cache = cached(3, stored, heads=heads, lengths=(lq, 7000), dims=(128, 112))
    one = cache.attend(q, return_lse=True, num_threads=1)
    split = set()
    for n in range(2, 9):
        with _runtime.counters() as seen:
            same_bits(cache.attend(q, return_lse=True, num_threads=n), one)
        split.add(seen["splits"] > 0)
    assert True in split, "the keys were never shared among threads"


@narrow
@pytest.mark.parametrize("dims", [(64, 32), (20, 12), (33, 71)])
@pytest.mark.parametrize("wide", [True, False])
def test_pages_and_rings_do_not_change_bits(stored, dims, wide):
    """Runs that end anywhere in what is scored, summed or copied at once; queries of the stored type too, if it is one
    of theirs, and windows that begin and end between the keys of a pair."""
    if not wide and stored not in HALVES:
        pytest.skip("queries are wider")
    q, k, v = qkv(4, batch=(1,), heads=(4, 2), lengths=(2, 1500), dims=dims)
    q = q if wide else q.astype(stored)
    cache = KVCache(1, 2, dims[0], 1500, value_dim=dims[1], dtype=stored)
    cache.append(k, v)
    windows = {"window": (349, 0)}, {"window": (350, 0)}, {"window": (1, 0)}
    expected = [cache.attend(q, return_lse=True, **options) for options in ({}, *windows)]
    for size in (1, 5, 16, 37):
        pool = PagedKVCache(2, dims[0], 1600 // size + 2, value_dim=dims[1], page_size=size, dtype=stored)
        chosen = [pool.add(), pool.add()]
        for at in range(0, 1500, 100):  # pages of both sequences in turn
            pool.append(chosen[:1], k[:, :, at : at + 100], v[:, :, at : at + 100])
            if at == 500:
                pool.append(chosen[1:], k[:, :, :1], v[:, :, :1])
        for options, same in zip(({}, *windows), expected, strict=True):
            same_bits(pool.attend(chosen[:1], q, return_lse=True, **options), same)
    ring = KVCache(1, 2, dims[0], 401, value_dim=dims[1], dtype=stored, window=350)
    for at in range(0, 1500, 50):
        ring.append(k[:, :, at : at + 50], v[:, :, at : at + 50])
    same_bits(ring.attend(q, return_lse=True), expected[2])


@narrow
def test_many_queries_over_odd_runs(stored):
    """Prompts through pages of an odd number of keys, in and out of order in the pool, alone and in a batch, and around
    a ring of an odd number of rows: where pairs of keys are multiplied, many of them lie in two runs."""
    kind = stored if stored in HALVES else "float32"
    q, k, v = qkv(12, batch=(1,), heads=(4, 2), lengths=(90, 700), dims=(64, 33))
    q = q.astype(kind)
    slab = KVCache(1, 2, 64, 700, value_dim=33, dtype=stored)
    slab.append(k, v)
    expected = slab.attend(q, return_lse=True)
    for size in (1, 3, 15):
        pool = PagedKVCache(2, 64, 2 * (700 // size + 1) + 1, value_dim=33, page_size=size, dtype=stored)
        tidy, mixed = pool.add(), pool.add()
        pool.append([tidy], k, v)
        other = pool.add()
        for at in range(0, 700, 2 * size):
            pool.append([mixed], k[:, :, at : at + 2 * size], v[:, :, at : at + 2 * size])
            if at == 10 * size:
                pool.append([other], k[:, :, :1], v[:, :, :1])
        for chosen in ([tidy], [mixed], [tidy, mixed]):
            got = pool.attend(chosen, q.repeat(len(chosen), axis=0), return_lse=True)
            for i in range(len(chosen)):
                same_bits(tuple(x[i] for x in got), tuple(x[0] for x in expected))
    ring = KVCache(1, 2, 64, 401, value_dim=33, dtype=stored, window=300)
    for at in range(0, 700, 70):
        ring.append(k[:, :, at : at + 70], v[:, :, at : at + 70])
    same_bits(ring.attend(q, return_lse=True), slab.attend(q, window=(300, 0), return_lse=True))


@narrow
def test_poison_behind_the_lengths(stored):
    q, cache = cached(5, stored, batch=4, heads=(4, 2), lengths=(1, 1400), dims=(32, 48))
    lengths = np.array([1400, 1023, 17, 0])
    k, v = cache.keys.copy(), cache.values.copy()
    clean, poisoned = (KVCache(4, 2, 32, 1400, value_dim=48, dtype=stored) for _ in range(2))
    clean._k[...] = clean._v[...] = 0
    clean.append(k, v, lengths=lengths)
    poisoned.append(k * np.nan, v * np.nan)
    poisoned.truncate(0)
    poisoned.append(k, v, lengths=lengths)
    with _runtime.counters() as seen:
        same_bits(poisoned.attend(q, return_lse=True), clean.attend(q, return_lse=True))
    assert seen["panels_careful"] == 0  # what no row sees is not even looked at


@narrow
@pytest.mark.parametrize("group", [1, 3])
def test_nan_that_some_rows_see(stored, group):
    """A value that the last position sees and the first ones do not: these keep their bits, the last has the NaN, in
    all that shares its scale."""
    q, k, v = qkv(6, batch=(1,), heads=(group, 1), lengths=(3, 1200), dims=(64, 48))
    caches = KVCache(1, 1, 64, 1200, value_dim=48, dtype=stored), KVCache(1, 1, 64, 1200, value_dim=48, dtype=stored)
    caches[0].append(k, v)
    v[0, 0, 1199, 40] = np.nan
    caches[1].append(k, v)
    clean = caches[0].attend(q, return_lse=True)
    with _runtime.counters() as seen:
        out, lse = caches[1].attend(q, return_lse=True)
    assert seen["panels_careful"] == 1 and seen["tiles_partial"] > 0
    same_bits((out[:, :, :2], lse), (clean[0][:, :, :2], clean[1]))
    lost = {"int8": np.arange(48), "int4": np.arange(32, 48)}.get(stored, np.array([40]))
    assert np.isnan(out[:, :, 2, lost]).all()
    same_bits(np.delete(out, lost, -1), np.delete(clean[0], lost, -1))
    k[0, 0, 1199, 3] = np.nan  # and a key, whose score is NaN
    caches[1].truncate(0)
    caches[1].append(k, v)
    out, lse = caches[1].attend(q, return_lse=True)
    same_bits((out[:, :, :2], lse[:, :, :2]), (clean[0][:, :, :2], clean[1][:, :, :2]))
    assert np.isnan(out[:, :, 2]).all() and np.isnan(lse[:, :, 2]).all()


@halves
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("wide", [False, True])
def test_strides_do_not_change_bits(dtype, name, wide):
    """In place or by copies."""
    if not fits(name, dtype):
        pytest.skip("there is no such array")
    q, k, v = qkv(1, dtype, batch=(2,), heads=(6, 2), lengths=(2, CHUNK + 40), dims=(32, 48))
    q = q.astype("float32") if wide else q
    change = PATTERNS[name]
    expected = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    compare(expected, (q, k, v), causal=True)
    for args in ((q, change(k), v), (q, k, change(v)), (q, change(k), change(v))):
        same_bits(qkv_fast.attention(*args, causal=True, return_lse=True), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@narrow
@pytest.mark.parametrize("place", ["at_end", "at_start"])
def test_nothing_beside_the_rows_is_read(stored, place):
    fences = [Fence(1 << 18) for _ in range(2)]
    for n, (group, lk, d, dv) in enumerate(itertools.product((1, 4), (1, 15, 33, 300), (16, 33, 64), (8, 48))):
        q, cache = cached(n, stored, heads=(group, 1), lengths=(1, lk), dims=(d, dv))
        expected = cache.attend(q)
        cache._k, cache._v = (f.put(x, place) for f, x in zip(fences, (cache._k, cache._v), strict=True))
        same_bits(cache.attend(q), expected)


@narrow
def test_long_sums_stay_exact(stored):
    """16k keys: values that do not cancel, and equal ones."""
    rng = np.random.default_rng(8)
    q, k, v = normal(rng, (1, 2, 1, 32)), normal(rng, (1, 1, 16384, 32)), normal(rng, (1, 1, 16384, 32))
    cache = KVCache(1, 1, 32, 16384, dtype=stored)
    cache.append(k, np.abs(v))
    check(q, cache)
    cache.truncate(0)
    cache.append(k, v * 0 + 1)
    assert np.abs(cache.attend(q) - 1).max() <= 4 * np.finfo("float32").eps
