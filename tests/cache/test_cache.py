"""KVCache and PagedKVCache: what single calls give, and what is refused without a change."""

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
from _util import TYPES, compare, normal, qkv, same_bits

import qkv_fast
from qkv_fast import KVCache, PagedKVCache

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)


def filled(k, v, capacity=None, lengths=None, **options):
    batch, heads, n, dim = k.shape
    cache = KVCache(batch, heads, dim, capacity or n + 5, value_dim=v.shape[3], dtype=k.dtype, **options)
    spare = np.full((batch, heads, cache.positions.shape[1] or (capacity or n + 5), dim), np.nan, k.dtype)
    cache.append(spare, np.full((*spare.shape[:3], v.shape[3]), np.nan, k.dtype))  # memory that must never show
    cache.truncate(0)
    cache.append(k, v, lengths=lengths)
    return cache


OPTIONS = [
    {},
    dict(causal=False),
    dict(window=(30, 2), causal=False),
    dict(window=(None, 3), causal=False, scale=0.3),
    dict(softcap=2.0, alibi_slopes=[0.5, 0.25, 1.0, 0.0], sinks=[1.0, -np.inf, 3.0, 0.0]),
]


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_attention_over_what_was_appended(dtype, options):
    q, k, v = qkv(1, dtype, batch=(3,), heads=(4, 2), lengths=(7, 1100), dims=(8, 6))
    expected = qkv_fast.attention(q, k, v, return_lse=True, **{"causal": True, **options})
    same_bits(filled(k, v).attend(q, return_lse=True, **options), expected)


@dtypes
def test_sequences_of_different_lengths_are_each_as_alone(dtype):
    q, k, v = qkv(2, dtype, batch=(4,), heads=(4, 2), lengths=(5, 300), dims=(8, 8))
    lengths, counts = [300, 1, 0, 97], [5, 1, 0, 2]
    cache = filled(k, v, lengths=lengths)
    bias = normal(np.random.default_rng(0), (4, 1, 5, 300), dtype)
    out, lse = cache.attend(q, lengths=counts, bias=bias, return_lse=True)
    for b, (n, m) in enumerate(zip(lengths, counts, strict=True)):
        inputs = q[b, :, :m], k[b, :, :n], v[b, :, :n]
        compare((out[b, :, :m], lse[b, :, :m]), inputs, causal=True, bias=bias[b, :, :m, :n])
        assert not out[b, :, m:].any() and np.all(lse[b, :, m:] == -np.inf)
    last = q[:, :, :1]
    out = cache.attend(last)
    for b, n in enumerate(lengths):
        same_bits(out[b], qkv_fast.attention(last[b], k[b, :, :n], v[b, :, :n], causal=True))


@pytest.mark.parametrize("keep", [0, 3])
def test_ring_with_everything(keep):
    """Masks and biases count tokens from the first, whatever the ring has forgotten."""
    q, k, v = qkv(3, batch=(2,), heads=(4, 2), lengths=(4, 400), dims=(8, 8))
    rng = np.random.default_rng(0)
    mask, bias = rng.random((2, 1, 4, 400)) < 0.8, normal(rng, (1, 4, 4, 400))
    options = dict(mask=mask, bias=bias, alibi_slopes=[0.1, 0.2, 0.3, 0.4], sinks=[0.5, 1, -np.inf, 2], softcap=5.0)
    cache = KVCache(2, 2, 8, 40, window=30, keep=keep)
    for t in range(0, 400, 8):
        cache.append(k[:, :, t : t + 8], v[:, :, t : t + 8])
    got = cache.attend(q, return_lse=True, **options)
    j, at = np.arange(400), np.arange(396, 400)[:, None]
    seen = dict(options, mask=mask & ((j < keep) | (j >= at - 30)), causal=True)
    compare(got, (q, k, v), **seen)
    if not keep:
        same_bits(got, qkv_fast.attention(q, k, v, causal=True, window=30, return_lse=True, **options))


def test_ring_takes_a_prompt_of_any_length():
    q, k, v = qkv(4, batch=(2,), heads=(2, 2), lengths=(1, 1000))
    cache = KVCache(2, 2, 16, 50, window=20, keep=5)
    cache.append(k, v)
    j = np.arange(1000)
    compare(cache.attend(q, return_lse=True), (q, k, v), mask=(j < 5) | (j >= 979))


@pytest.mark.parametrize("ids", [[0, 1], [1, 0, 1]])
def test_pages_are_attention_over_what_was_appended(ids):
    q, k, v = qkv(5, "float64", batch=(2,), heads=(4, 2), lengths=(3, 500), dims=(8, 6))
    pool = PagedKVCache(2, 8, 40, page_size=30, value_dim=6, dtype="float64")
    pool.add(), pool.add()
    for t in range(0, 500, 25):  # so that their pages alternate in the pool
        pool.append([0, 1], k[:, :, t : t + 25], v[:, :, t : t + 25])
    options = dict(softcap=2.0, sinks=[1, 2, 3, 4], return_lse=True)
    same_bits(
        pool.attend(ids, q[ids], window=200, **options),
        qkv_fast.attention(q[ids], k[ids], v[ids], causal=True, window=200, **options),
    )


def test_layout_out_and_types():
    q, k, v = qkv(6, batch=(2,), heads=(4, 2), lengths=(9, 9))
    expected = qkv_fast.attention(q, k, v, causal=True)
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    cache = KVCache(2, 2, 16, 20)
    cache.append(*swapped[1:], layout="blhd")
    same_bits(cache.attend(swapped[0], layout="blhd").swapaxes(1, 2), expected)
    out = q.copy()
    assert cache.attend(out, out=out) is out
    same_bits(out, expected)
    wide = KVCache(2, 2, 16, 20, dtype="float64")
    wide.append(k, v)  # widened as they are stored
    q = q.astype("float64")
    expected = qkv_fast.attention(q, k.astype("float64"), v.astype("float64"), causal=True)
    same_bits(wide.attend(q), expected)
    same_bits(cache.attend(q), qkv_fast.attention(q, k, v, causal=True))


@pytest.mark.parametrize("stay", [0, 3])
def test_ring_begins_again(stay):
    q, k, v = qkv(7, batch=(1,), heads=(2, 2), lengths=(2, 60))
    cache = KVCache(1, 2, 16, 20, window=8, keep=3)
    cache.append(k, v)
    cache.truncate(stay)
    cache.append(k[:, :, stay:10], v[:, :, stay:10])
    assert cache.positions[0, :10].tolist() == list(range(10))
    j, at = np.arange(10), np.arange(8, 10)[:, None]
    seen = dict(mask=(j < 3) | (j >= at - 8), causal=True)
    compare(cache.attend(q, return_lse=True), (q, k[:, :, :10], v[:, :, :10]), **seen)


def test_ring_takes_its_own_rows():
    k = np.arange(14, dtype="float32").reshape(1, 1, 7, 2)
    cache = KVCache(1, 1, 2, 6, window=3)
    cache.append(k, k)
    rows = cache.keys.copy()
    cache.append(cache.keys, cache.values)
    at = cache.positions[0].argsort()
    same_bits(cache.keys[0, 0, at], rows[0, 0])


def test_keys_and_values_are_views():
    k = np.ones((1, 2, 3, 4), "float32")
    cache = filled(k, k, 10)
    assert cache.keys.shape == (1, 2, 3, 4) and not cache.keys.flags.writeable and not cache.keys.flags.owndata
    assert np.shares_memory(cache.keys, cache.keys) and cache.positions.tolist() == [[0, 1, 2]]
    cache.lengths[:] = 7
    assert cache.lengths.tolist() == [3]


def state(cache):
    if isinstance(cache, PagedKVCache):
        return repr(cache), cache.free_pages, [tuple(x.tobytes() for x in cache.gather(s)) for s in cache.sequences]
    return repr(cache), cache.positions.tolist(), cache.keys.tobytes(), cache.values.tobytes()


K = np.ones((2, 2, 3, 4), "float32")
Q = np.ones((2, 4, 1, 4), "float32")
ERRORS = {
    "type of k": (lambda c: c.append(K.astype("float64"), K), TypeError, "k must be float32 .* got float64"),
    "type of v": (lambda c: c.append(K, K.astype(int)), TypeError, "v must be float16, .* got int64"),
    "masked": (lambda c: c.append(np.ma.array(K), K), TypeError, "masked array"),
    "batch": (lambda c: c.append(K[:1], K[:1]), ValueError, r"\(2, 2, tokens, 4\) .*k.shape=\(1, 2, 3, 4\)"),
    "heads": (lambda c: c.append(K[:, :1], K[:, :1]), ValueError, "k.shape"),
    "dim": (lambda c: c.append(K[..., :3], K), ValueError, "k.shape"),
    "tokens": (lambda c: c.append(K, K[:, :, :2]), ValueError, "v.shape"),
    "axes": (lambda c: c.append(K[0], K[0]), ValueError, "k.shape"),
    "layout": (lambda c: c.append(K, K, layout="bdhl"), ValueError, "layout"),
    "lengths": (lambda c: c.append(K, K, lengths=[4, 1]), ValueError, "0..3 .*, got 4"),
    "lengths' type": (lambda c: c.append(K, K, lengths=[1.0, 1.0]), TypeError, "lengths"),
    "capacity": (lambda c: c.append(*[np.ones((2, 2, 6, 4), "float32")] * 2), ValueError, "6 tokens after 5 .* is 10"),
    "capacity of one": (
        lambda c: c.append(*[np.ones((2, 2, 8, 4), "float32")] * 2, lengths=[0, 8]), ValueError, "8 tokens after 3",
    ),
    "truncate": (lambda c: c.truncate([5, 4]), ValueError, "0..3 for sequence 1, got 4"),
    "truncate below": (lambda c: c.truncate(-1), ValueError, "got -1"),
    "truncate's type": (lambda c: c.truncate(1.5), TypeError, "n must be"),
    "truncate's shape": (lambda c: c.truncate([1, 1, 1]), ValueError, "one per sequence"),
    "index": (lambda c: c.reorder([0, 2]), ValueError, "0..1, got 2"),
    "index below": (lambda c: c.reorder([-1, 0]), ValueError, "got -1"),
    "index's shape": (lambda c: c.reorder([[0], [1]]), ValueError, r"shape \(n,\), one per new sequence, got \(2, 1\)"),
    "no index": (lambda c: c.reorder(np.zeros(0, int)), ValueError, r"got \(0,\)"),
    "start": (lambda c: c.reorder([1, 1], start=4), ValueError, r"0\.\.3, of what the new sequence 0 and the old 1"),
    "start below": (lambda c: c.reorder([1, 0, 1], start=[0, 0, -1]), ValueError, "got -1"),
    "start's shape": (lambda c: c.reorder([1, 0], start=[0, 0, 0]), ValueError, "one per sequence"),
    "start's type": (lambda c: c.reorder([1, 0], start=0.5), TypeError, "start"),
    "index's type": (lambda c: c.reorder([True, False]), TypeError, "bool"),
    "q's type": (lambda c: c.attend(Q.astype("float16")), TypeError, "the cache must have q's type"),
    "q's batch": (lambda c: c.attend(Q[:1]), ValueError, r"q.shape=\(1, 4, 1, 4\)"),
    "q's heads": (lambda c: c.attend(Q[:, :3]), ValueError, "multiple of 2"),
    "q's dim": (lambda c: c.attend(Q[..., :2]), ValueError, "q.shape"),
    "more queries than tokens": (
        lambda c: c.attend(np.ones((2, 4, 4, 4), "float32")), ValueError, "4 queries, of which sequence 1 has 3 tokens",
    ),
    "causal": (lambda c: c.attend(Q, causal="top-left"), ValueError, "True or False"),
    "mask": (lambda c: c.attend(Q, mask=np.ones((1, 6), bool)), ValueError, "mask"),
    "out": (lambda c: c.attend(Q, out=Q[:1].copy()), ValueError, "out must have the shape"),
    "path": (lambda c: KVCache(2, 2, 4, 5, window=2, path="no.kv"), ValueError, "without window"),
    "kind": (lambda c: KVCache(2, 2, 4, 5.0), TypeError, "capacity must be an integer, got 5.0"),
    "least": (lambda c: KVCache(0, 2, 4, 5), ValueError, "batch must be at least 1, got 0"),
    "dims": (lambda c: KVCache(1, 2, 1025, 5), ValueError, "1024"),
    "keep": (lambda c: KVCache(1, 2, 4, 5, keep=1), ValueError, "keep=1"),
    "room": (lambda c: KVCache(1, 2, 4, 5, window=4, keep=1), ValueError, "capacity=5, keep=1, window=4"),
    "size": (lambda c: KVCache(2**40, 2**20, 4, 5), OverflowError, "no array"),
    "too much": (lambda c: KVCache(2**20, 2**20, 4, 2**10), MemoryError, "allocate"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_change_nothing(name):
    call, error, message = ERRORS[name]
    cache = KVCache(2, 2, 4, 10)
    cache.append(*[np.arange(80, dtype="float32").reshape(2, 2, 5, 4)] * 2, lengths=[5, 3])
    before = state(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert state(cache) == before


RING_ERRORS = {
    "window": (lambda c: c.attend(Q, window=9), "reaches 9 back, the cache keeps 6"),
    "open window": (lambda c: c.attend(Q, window=(None, 0)), "reaches without end back"),
    "too many queries": (lambda c: c.attend(np.ones((2, 4, 5, 4), "float32")), "the ring holds 10 tokens from 20 on"),
    "truncate": (lambda c: c.truncate(25), "window of token 25 begins at 19"),
}


@pytest.mark.parametrize("name", RING_ERRORS)
def test_errors_of_rings(name):
    call, message = RING_ERRORS[name]
    cache = KVCache(2, 2, 4, 12, window=6, keep=2)
    cache.append(*[np.ones((2, 2, 30, 4), "float32")] * 2)
    before = state(cache)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert state(cache) == before


@pytest.mark.parametrize("make", [
    lambda: KVCache(2, 2, 4, 9, dtype="float16"), lambda: KVCache(2, 2, 4, 5, dtype="float16", window=3), None,
], ids=["slab", "ring", "pages"])  # fmt: skip
def test_numbers_beyond_the_type_of_the_cache(make):
    """They are stored as infinity, as results are, whatever NumPy is to do about that."""
    k = np.ones((2, 2, 6, 4), "float32")
    k[1, 1, 4, 0], k[1, 0, 5, 1], k[0, 0, 3, 2] = 1e9, -1e9, 1e-30
    with np.errstate(all="raise"):
        if make:
            cache = make()
            cache.append(k[:, :, :3], k[:, :, :3])
            cache.append(k[:, :, 3:], k[:, :, 3:])
            at = cache.positions[0].argsort()[-3:]
            got = cache.keys[:, :, at]
        else:
            pool = PagedKVCache(2, 4, 9, page_size=4, dtype="float16")
            pool.append([pool.add(), pool.add()], k, k)
            got = np.stack([pool.gather(s)[0][:, 3:] for s in pool.sequences])
    expected = k[:, :, 3:].copy()
    expected[1, 1, 1, 0], expected[1, 0, 2, 1], expected[0, 0, 0, 2] = np.inf, -np.inf, 0
    assert np.array_equal(got, expected)


def stop_at(monkeypatch, k):
    """The k-th write of rows from now on is interrupted."""
    rows = type(PagedKVCache(1, 1, 1)._form.k)
    left, real = [k], rows.write

    def write(self, to, x):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(self, to, x)

    monkeypatch.setattr(rows, "write", write)


@pytest.mark.parametrize("k", range(1, 7))
def test_an_interrupted_append_of_pages(monkeypatch, k):
    """What it took is free again, also where a shared page had been copied."""
    pool = PagedKVCache(2, 4, 7, page_size=4)
    pool.add(), pool.add()
    pool.append([0, 1], K, K)
    fork = pool.fork(0)
    before = [x.copy() for s in (0, 1, fork) for x in pool.gather(s)]
    stop_at(monkeypatch, k)
    with pytest.raises(KeyboardInterrupt):
        pool.append([0, 1], *[np.ones((2, 2, 6, 4), "float32")] * 2)
    monkeypatch.undo()
    assert pool.lengths([0, 1, fork]).tolist() == [3, 3, 3]
    same_bits(tuple(x for s in (0, 1, fork) for x in pool.gather(s)), tuple(before))
    for s in (0, 1, fork):
        pool.truncate(s, 0)
    assert pool.free_pages == 7


def test_an_interrupted_append_of_a_ring(monkeypatch):
    """The tokens whose rows it overwrote are gone: attention says so."""
    cache = KVCache(1, 1, 4, 10, window=9)
    for _ in range(25):
        cache.append(K[:1, :1, :1], K[:1, :1, :1])
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        cache.append(*[np.full((1, 1, 2, 4), 9, "float32")] * 2)
    monkeypatch.undo()
    assert cache.lengths.tolist() == [25] and cache.positions.tolist() == [[20, 21, 22, 23, 24, -1, -1, 17, 18, 19]]
    with pytest.raises(ValueError, match="the ring holds 10 tokens from 17 on"):
        cache.attend(K[:1, :1, :1])


STEPS = {
    "q of fewer": (dict(q=np.ones((2, 4, 2, 4), "float32")), ValueError, "tokens that k and v are of, 3 each, got 2"),
    "q": (dict(q=np.ones((2, 3, 3, 4), "float32")), ValueError, "q must be of shape"),
    "k": (dict(k=K[:1]), ValueError, r"k.shape=\(1,"),
    "v": (dict(v=K.astype(complex)), TypeError, "complex"),
    "lengths": (dict(lengths=[4, 0]), ValueError, r"0\.\.3 \(the tokens given\), got 4"),
    "lengths that are no integers": (dict(lengths=[3.0, 3.0]), TypeError, "lengths"),
    "lengths that are bools": (dict(lengths=[True, True]), TypeError, "lengths"),
    "mask": (dict(mask=np.ones((3, 9), bool)), ValueError, r"mask does not broadcast .* 3, 6\)"),
    "bias": (dict(bias=np.ones(6, int)), TypeError, "bias"),
    "sinks": (dict(sinks=np.ones(3)), ValueError, "sinks"),
    "tree": (dict(tree=np.ones((2, 2), bool)), ValueError, r"tree must be of shape \(3, 3\)"),
    "out": (dict(out=np.ones((2, 4, 3, 5), "float32")), ValueError, "out"),
    "scale": (dict(scale=np.nan), ValueError, "scale"),
    "window": (dict(window=-1), ValueError, "window"),
    "threads": (dict(num_threads=0), ValueError, "num_threads"),
    "words": (dict(attn_mask=None), TypeError, "mask="),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_refused_appends_nothing(name):
    wrong, error, message = STEPS[name]
    cache, pool = KVCache(2, 2, 4, 10), PagedKVCache(2, 4, 6, page_size=4)
    pool.add(), pool.add()
    cache.append(K, K)
    pool.append([0, 1], K, K)
    before = state(cache), state(pool)
    call = dict(q=np.ones((2, 4, 3, 4), "float32"), k=K, v=K) | wrong
    with pytest.raises(error, match=rf"^KVCache\.step.*{message}"):
        cache.step(**call)
    with pytest.raises(error, match=rf"^PagedKVCache\.step.*{message}"):
        pool.step([0, 1], **call)
    assert (state(cache), state(pool)) == before


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_step_that_is_ended_takes_its_tokens_back(monkeypatch, error):
    def fail(*_):
        raise error

    q, rng = np.ones((2, 4, 3, 4), "float32"), np.random.default_rng(0)
    cache, ring, pool = KVCache(2, 2, 4, 10), KVCache(2, 2, 4, 10, window=4), PagedKVCache(2, 4, 6, page_size=4)
    pool.add(), pool.add()
    held = cache, ring, pool
    for each, sequences in zip(held, ([], [], [[0, 1]]), strict=True):
        for n in (3, 1):
            each.append(*sequences, *normal(rng, (2, 2, 2, n, 4)))
        before = state(each) if each is not ring else each.lengths.tolist()
        with monkeypatch.context() as patch:
            patch.setattr(qkv_fast._problem, "forward", fail)
            with pytest.raises(error):
                each.step(*sequences, q, K, K)
        assert before == (state(each) if each is not ring else each.lengths.tolist())
        other = copy.deepcopy(each)
        other.append(*sequences, K, K)
        same_bits(each.step(*sequences, q, K, K), other.attend(*sequences, q))


def test_steps_of_a_file(tmp_path):
    cache, q = KVCache(2, 2, 4, 10, path=tmp_path / "x.kv"), np.ones((2, 4, 3, 4), "float32")
    cache.step(q, K, K)
    cache.flush()
    with pytest.raises(ValueError, match=r"KVCache\.step: .*opened for reading"):
        KVCache.open(tmp_path / "x.kv").step(q, K, K)
    assert KVCache.open(tmp_path / "x.kv").lengths.tolist() == [3, 3]


REORDER = """
import resource, sys, numpy as np, qkv_fast
cache = qkv_fast.KVCache(2, 1, 1, 100_000, value_dim=64, path=sys.argv[1] if len(sys.argv) > 1 else None)
numbers = np.arange(2, dtype="float32").reshape(2, 1, 1, 1)
cache.append(np.broadcast_to(numbers, (2, 1, 100_000, 1)), np.broadcast_to(numbers, (2, 1, 100_000, 64)))
cache.flush()
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), resource.RLIM_INFINITY))
try:
    cache.reorder([1, 0] if len(sys.argv) > 1 else [1, 0, 0])
except MemoryError:
    print("no memory")
print(cache.keys[:, 0, 0, 0], cache.values[:, 0, 99_999, 63], cache.lengths)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
@pytest.mark.parametrize("file, said", [
    (True, "[1. 0.] [1. 0.] [100000 100000]\n"), (False, "no memory\n[0. 1.] [0. 1.] [100000 100000]\n"),
])  # fmt: skip
def test_reordering_takes_no_memory_but_for_more_sequences(tmp_path, file, said):
    """There is room for less than a sequence's values; where that is too little, nothing changes."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", REORDER, *([str(tmp_path / "x.kv")] if file else [])], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == said


@pytest.mark.parametrize("pieces", [1, 7, 10**6])
@pytest.mark.parametrize("n", range(1, 6))
def test_every_order_of_four(monkeypatch, pieces, n):
    """Circles, chains and trees, to fewer and more, in pieces of a row, of some and of all."""
    monkeypatch.setattr(sys.modules["qkv_fast.cache.moves"], "_PIECE", 8 * pieces)
    rng = np.random.default_rng(0)
    k, lengths = normal(rng, (4, 3, 9, 2)), np.array([9, 5, 0, 7])
    for index in itertools.product(range(4), repeat=n):
        if n == 5 and rng.random() < 0.8:
            continue
        cache = KVCache(4, 3, 2, 9)
        cache.append(k, -k, lengths=lengths)
        cache.reorder(index)
        assert cache.batch == n and cache.lengths.tolist() == lengths[list(index)].tolist()
        for b, i in enumerate(index):
            own = slice(None), slice(lengths[i])
            same_bits((cache.keys[b][own], cache.values[b][own]), (k[i][own], -k[i][own]))


def test_a_file_keeps_its_number_of_sequences(tmp_path):
    cache = KVCache(2, 2, 4, 10, path=tmp_path / "x.kv")
    cache.append(K, K)
    before = state(cache)
    for index in ([0], [0, 1, 1]):
        with pytest.raises(ValueError, match=f"a file is of 2 sequences, index has {len(index)}"):
            cache.reorder(index)
    assert state(cache) == before


def test_an_interrupted_reorder_leaves_what_changes_empty(monkeypatch):
    cache = KVCache(3, 2, 4, 10)
    k = normal(np.random.default_rng(0), (3, 2, 5, 4))
    cache.append(k, k)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["qkv_fast.cache.moves"].Moves, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.reorder([1, 0, 2])
    assert cache.lengths.tolist() == [0, 0, 5]
    same_bits(cache.keys[2], k[2])


PAGE_ERRORS = {
    "pages": (lambda p: p.append([0], *[np.ones((1, 2, 20, 4), "float32")] * 2), ValueError, "5 new .* 4 are free"),
    "unknown": (lambda p: p.append([0, 7], K, K), ValueError, r"no sequence 7; there are \[0, 1\]"),
    "twice": (lambda p: p.append([1, 1], K, K), ValueError, "different"),
    "no list": (lambda p: p.append(1, K, K), TypeError, "list of their numbers, got 1"),
    "no number": (lambda p: p.attend([1.0], Q[:1]), TypeError, "integer, got 1.0"),
    "none": (lambda p: p.attend([], Q[:0]), ValueError, "at least one"),
    "shape": (lambda p: p.append([0], K, K), ValueError, "k.shape"),
    "queries": (lambda p: p.attend([0, 1], Q.repeat(4, 2)), ValueError, "4 queries, of which sequence 0 has 3"),
    "fork": (lambda p: p.fork(1, 4), ValueError, "0..3 for sequence 1, got 4"),
    "truncate": (lambda p: p.truncate(1, -1), ValueError, "at least 0, got -1"),
    "remove": (lambda p: p.remove(2), ValueError, "no sequence 2"),
    "reorder": (lambda p: p.reorder([0, 0], [0, 1]), ValueError, r"different ones, got \[0, 0\]"),
    "no parent": (lambda p: p.reorder([0, 1], [0, 2]), ValueError, "no sequence 2"),
    "parents": (lambda p: p.reorder([0, 1], [0]), ValueError, "one for each of 2 sequences, got 1"),
    "parent": (lambda p: p.reorder([0], 1), TypeError, "parents must be a list of their numbers, got 1"),
    "starts": (lambda p: p.append([0, 1], K, K, starts=[0, 1]), ValueError, "sequence 1 has 3 tokens"),
    "starts beyond": (lambda p: p.append([0], K[:1], K[:1], starts=7), ValueError, r"0\.\.6 .*, got 7"),
    "window": (lambda p: PagedKVCache(1, 2, 3, window=-1), ValueError, "window must be at least 0, got -1"),
    "page size": (lambda p: PagedKVCache(1, 2, 3, page_size=0), ValueError, "page_size must be at least 1"),
}


@pytest.mark.parametrize("name", PAGE_ERRORS)
def test_errors_of_pages(name):
    call, error, message = PAGE_ERRORS[name]
    pool = PagedKVCache(2, 4, 6, page_size=4)
    pool.add(), pool.add()
    pool.append([0, 1], K, K)
    before = state(pool)
    with pytest.raises(error, match=message):
        call(pool)
    assert state(pool) == before


@pytest.mark.parametrize(
    "n, index, lengths, words",
    [
        (4, [0], None, r"n must be in 0\.\.3 for sequence 1, got 4"),
        (2, [0, 1], None, r"index must be in 0\.\.0 for sequence 1, which has 3 tokens \(n=2\), got 1"),
        (1, [0, 0], None, r"must not repeat a token, got \[0, 0\] for sequence 0"),
        (1, [-1], None, "got -1"),
        (1, [[0]], None, r"shape \(m,\) or \(2, m\), got \(1, 1\)"),
        (1, [0, 1], 3, r"lengths must be in 0\.\.2"),
    ],
)
def test_what_cannot_be_selected(n, index, lengths, words):
    cache = qkv_fast.KVCache(2, 2, 4, capacity=10)
    k = np.arange(80, dtype="float32").reshape(2, 2, 5, 4)
    cache.append(k, k, lengths=[5, 3])
    before = cache.keys.copy()
    with pytest.raises(ValueError, match=words):
        cache.select(n, index, lengths)
    with pytest.raises(TypeError, match="integers"):
        cache.select(0, [0.5])
    same_bits(cache.keys, before)
    assert cache.lengths.tolist() == [5, 3]


def test_a_page_of_others_is_copied_before_tokens_move():
    pool = qkv_fast.PagedKVCache(1, 1, 3, page_size=4)
    k = np.arange(7, dtype="float32").reshape(1, 1, 7, 1)
    a = pool.add()
    pool.append([a], k, k)
    b = pool.fork(a)
    pool.select(b, 1, [4, 0])
    assert pool.gather(b)[0].ravel().tolist() == [0, 5, 1]
    assert pool.gather(a)[0].ravel().tolist() == [*range(7)]
    assert pool.free_pages == 0
    c = pool.fork(a)
    with pytest.raises(ValueError, match="1 new pages are needed, 0 are free"):
        pool.select(c, 5, [1])
    assert pool.gather(c)[0].ravel().tolist() == [*range(7)]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_batch_padded_on_the_left_goes_on_without_a_mask(dtype, tmp_path):
    """NaN in the padding is nothing; cuts, orders and files carry where a sequence begins."""
    q, k, v = qkv(9, batch=(3,), heads=(4, 2), lengths=(12, 12), dims=(8, 8))
    starts = np.array([7, 0, 3])
    for b, n in enumerate(starts):
        k[b, :, :n] = v[b, :, :n] = q[b, :, :n] = np.nan
    cache = qkv_fast.KVCache(3, 2, 8, capacity=20, dtype=dtype)
    cache.append(k[:, :, :10], v[:, :, :10], starts=starts)
    out = [cache.attend(q[:, :, :10])]
    cache.save(tmp_path / "prompts.kv")
    cache = qkv_fast.KVCache.open(tmp_path / "prompts.kv", writable=True)
    cache.reorder([2, 1, 0])
    for t in (10, 11):
        cache.append(k[::-1, :, t : t + 1], v[::-1, :, t : t + 1])
        out.append(cache.attend(q[::-1, :, t : t + 1])[::-1])
    assert cache.starts.tolist() == [3, 0, 7] and "starts=[3, 0, 7]" in repr(cache)
    expected = qkv_fast.attention(q, k, v, causal=True, kv_starts=starts)
    np.testing.assert_allclose(np.concatenate(out, axis=2), expected, atol=1e-6 if dtype == "float32" else 0.05)
    cache.truncate([2, 0, 12])
    assert cache.starts.tolist() == [2, 0, 7]
    cache.flush()
    assert qkv_fast.KVCache.load(tmp_path / "prompts.kv").starts.tolist() == [2, 0, 7]


@pytest.mark.parametrize(
    "starts, words",
    [([0, 1], "empty sequences, and sequence 1 has 3"), (3, "0..2 .* sequence 0, got 3"), (-1, "got -1")],
)
def test_where_sequences_cannot_begin(starts, words):
    cache = qkv_fast.KVCache(2, 1, 4, capacity=10)
    k = np.zeros((2, 1, 3, 4), "float32")
    cache.append(k, k, lengths=[0, 3])
    with pytest.raises(ValueError, match=words):
        cache.append(k[:, :, :2], k[:, :, :2], starts=starts)
    assert cache.lengths.tolist() == [0, 3] and cache.starts.tolist() == [0, 0]


def test_a_ring_need_not_have_what_is_padding():
    """Queries that are padding reach back to tokens that the ring no longer has."""
    q, k, v = qkv(9, batch=(1,), heads=(2, 1), lengths=(20, 100), dims=(4, 4))
    for keep in (0, 3):
        cache = qkv_fast.KVCache(1, 1, 4, capacity=20 + keep, window=10, keep=keep)
        cache.append(k, v, starts=[95])
        out = cache.attend(q)
        assert not out[:, :, :15].any()
        expected = qkv_fast.attention(q[:, :, 15:], k[:, :, 95:], v[:, :, 95:], causal=True)
        np.testing.assert_allclose(out[:, :, 15:], expected, atol=1e-6)
