"""explain() of ragged batches and of caches: what it says is what the call then counts, and nothing changes."""

import numpy as np
import pytest
from _explained import agree
from _util import normal, qkv

import qkv_fast
from qkv_fast import KVCache, PagedKVCache

pytestmark = pytest.mark.usefixtures("isa")
KINDS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(50, 0)),
    "scores": dict(alibi_slopes=[0.5, 1.0, 0.25, 2.0], sinks=np.zeros(4), softcap=3.0),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_ragged(dtype, threads, kind):
    rng = np.random.default_rng(0)
    lengths = np.array([[70, 300, 1, 0, 5, 200], [70, 300, 900, 40, 0, 130]])
    starts_q, starts_k = np.cumsum(np.c_[[0, 0], lengths], axis=1)
    q, k, v = (normal(rng, (n, h, 16), dtype) for n, h in ((576, 4), (1440, 2), (1440, 2)))
    plan = agree(qkv_fast.attention_varlen, q, k, v, starts_q, starts_k, **KINDS[kind], num_threads=threads)
    pairs = 4 * (lengths[0] * lengths[1]).sum()
    assert plan.pairs_all == pairs and 0 < plan.pairs <= pairs
    assert (plan.pairs == pairs) == (kind in ("plain", "scores"))
    assert plan.shapes["q"] == q.shape and plan.operations == 2 * plan.pairs * 32


def state(cache):
    """All that a cache holds."""
    return [np.copy(x).tobytes() for x in (cache.keys, cache.values, cache.lengths)] + [repr(cache)]


def filled(dtype="float32", n=700, steps=50, **options):
    cache = KVCache(2, 2, 16, options.pop("capacity", 800), dtype=dtype, **options)
    _, k, v = qkv(4, batch=(2,), heads=(4, 2), lengths=(1, n), dims=(16, 16))
    for t in range(0, n, steps):
        cache.append(k[:, :, t : t + steps], v[:, :, t : t + steps])
    return cache


@kinds
@pytest.mark.parametrize("rows", [1, 3, 60])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_slab(dtype, rows, kind):
    cache = filled(dtype)
    q = qkv(5, batch=(2,), heads=(4, 2), lengths=(rows, 1))[0]
    before = state(cache)
    for options in ({}, dict(lengths=[rows, rows - 1])):
        plan = agree(cache.attend, q, **KINDS[kind], **options, num_threads=2)
        assert plan.pairs_all == 2 * 4 * rows * 700 and plan.shapes["q"] == q.shape
        assert plan.dtypes["k"] == plan.dtypes["v"] == dtype and plan.dtype == "float32"
    assert state(cache) == before
    cache.truncate([700, 9])
    agree(cache.attend, q[:, :, :1], **KINDS[kind], num_threads=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("rows, options", [
    (1, {}),
    (1, dict(alibi_slopes=np.ones(4))),
    (10, {}),
    (10, dict(window=30)),
    (10, dict(lengths=[10, 3])),
    (10, dict(mask=np.arange(700) % 3 > 0, sinks=np.zeros(4))),
])  # fmt: skip
def test_ring(dtype, keep, rows, options):
    """Kept tokens that lie outside of the window make two calls, whose tiles and tasks add up; for one query of which
    nothing counts positions they are moved beside the window, which makes one."""
    cache = filled(dtype, capacity=200, window=100, keep=keep)
    q = qkv(5, "float16" if dtype == "float16" else "float32", batch=(2,), heads=(4, 2), lengths=(rows, 1))[0]
    before, out = state(cache), np.full_like(q, 7)
    plan = agree(cache.attend, q, **options, num_threads=1)
    qkv_fast.explain(cache.attend, q, out=out, **options)
    assert state(cache) == before and (out == 7).all()
    queries, window = options.get("lengths", [rows] * 2), options.get("window", 100)
    at, j = np.arange(700 - rows, 700)[:, None], np.arange(700)
    visible = ((j < keep) | (j >= at - window)) & (j <= at) & options.get("mask", True)
    assert plan.pairs == sum(4 * visible[rows - many :].sum() for many in queries)
    one = qkv_fast.explain(filled(dtype, capacity=200, window=100).attend, q, **options, num_threads=1)
    two_calls = keep and not (rows == 1 and not options)
    assert plan.tasks == (2 if two_calls else 1) * one.tasks


def test_ring_on_threads():
    cache = filled(capacity=200, window=100, keep=4)
    q = qkv(5, batch=(2,), heads=(4, 2), lengths=(40, 1))[0]
    assert agree(cache.attend, q, num_threads=2).tasks > 1


@pytest.mark.parametrize("dtype", ["int4", "float16"])
def test_rows_that_are_widened_as_they_are_loaded(dtype):
    """Of int4 only for up to four rows of a tile; beams are 64, and those that are left."""
    cache = KVCache(1, 2, 64, 700, dtype=dtype, causal=False)
    cache.append(*qkv(8, heads=(1, 2), batch=(1,), lengths=(1, 700), dims=(64, 64))[1:])
    in_registers = qkv_fast.isa() not in ("portable", "amx_emulated")
    for batch, heads in ((1, 2), (1, 8), (1, 10), (5, 2), (66, 2), (69, 2)):
        plan = agree(cache.attend, np.ones((batch, heads, 1, 64), "float32"), num_threads=1)
        copies = dtype == "int4" and batch * heads > 8
        assert (plan.tiles_copied > 0) is (copies or not in_registers)
        assert any("; copied" in note for note in plan.notes) is (copies or not in_registers)


@kinds
@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pages(dtype, rows, kind):
    """Pages in no order, that are no rows of one array: passes that span them are copied."""
    pool = PagedKVCache(2, 16, 100, page_size=24, dtype=dtype)
    ids = [pool.add() for _ in range(3)]
    _, k, v = qkv(6, batch=(3,), heads=(4, 2), lengths=(1, 640))
    for t in range(0, 640, 64):
        pool.append(ids, k[:, :, t : t + 64], v[:, :, t : t + 64], lengths=[64, 40, 7])
    q = qkv(7, batch=(3,), heads=(4, 2), lengths=(rows, 1))[0]
    before = [x.tobytes() for i in ids for x in pool.gather(i)], pool.free_pages
    plan = agree(pool.attend, ids, q, **KINDS[kind], num_threads=2)
    assert ([x.tobytes() for i in ids for x in pool.gather(i)], pool.free_pages) == before
    assert plan.tiles_copied > 0 or kind == "window" or rows == 1
    agree(pool.attend, ids[1:2], q[1:2], lengths=[rows - 1], **KINDS[kind], num_threads=1)


@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("window", [None, 100])
def test_pages_with_a_window_and_padding(window, rows):
    """One sequence is all padding; of the others pages have been given back, where there is a window."""
    pool = PagedKVCache(2, 16, 100, page_size=24, window=window)
    ids = [pool.add() for _ in range(3)]
    _, k, v = qkv(6, batch=(3,), heads=(4, 2), lengths=(1, 640))
    starts = [0, 290, 320]
    pool.append(ids, k[:, :, :320], v[:, :, :320], starts=starts)
    pool.append(ids[:2], k[:2, :, 320:640], v[:2, :, 320:640], lengths=[320, 60])
    pool.append(ids[:2], k[:2, :, :60], v[:2, :, :60])
    q = qkv(7, batch=(3,), heads=(4, 2), lengths=(rows, 1))[0]
    plan = agree(pool.attend, ids, q, num_threads=1)
    pairs = 0
    for n, start in zip((700, 440, 320), starts, strict=True):
        at, j = np.arange(n - rows, n)[:, None], np.arange(n)
        pairs += 4 * ((j >= start) & (j <= at) & (j >= at - (n if window is None else window))).sum()
    assert plan.pairs == pairs


def test_what_is_slow_is_named():
    cache = filled()
    q = qkv(5, batch=(2,), heads=(4, 2), lengths=(60, 1))[0]
    plan = qkv_fast.explain(cache.attend, q[..., ::-1], num_threads=1)
    assert plan.notes[0].startswith("q: rows whose elements are not adjacent; copied")
    assert "temporary" in qkv_fast.explain(cache.attend, q, out=q, num_threads=1).notes[0]
    assert "queries" not in str(qkv_fast.explain(cache.attend, list(q), num_threads=1).notes)
    text = str(qkv_fast.explain(cache.attend, q, num_threads=1))
    assert text.startswith("attention of q (2, 4, 60, 16), k (2, 2, 700, 16)")
