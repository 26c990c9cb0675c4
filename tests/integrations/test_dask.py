"""Dask arrays: attention's results from any chunks, the same bits whoever computes them, in bounded memory."""

import doctest
import functools
import pickle

import numpy as np
import pytest
from _compositions import CASES, poisoned, visible
from _util import ALL_TYPES, qkv, same_bits
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast

dask = pytest.importorskip("dask", reason="the extra [test] leaves it out; [dask] has it")

import dask.array as da  # noqa: E402
import distributed  # noqa: E402
import zarr  # noqa: E402
from dask.core import get_dependencies  # noqa: E402

from qkv_fast.integrations import dask as adapter  # noqa: E402
from qkv_fast.integrations.dask import attention, explain  # noqa: E402

CLOSE = {"float32": 2e-5, "float64": 1e-13, "float16": 2.0**-9, "bfloat16": 2.0**-6}  # roundings near 1


@pytest.fixture(autouse=True)
def _in_this_thread():
    with dask.config.set(scheduler="sync"):
        yield


@pytest.fixture(scope="module")
def client():
    """Two processes of one thread each."""
    options = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0")  # any port
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        client.run(functools.partial(__import__, "zarr"))
        yield client


def pieces(rng, x, last=1):
    """x as a Dask array, cut at random along all but the last axes."""
    ends = [np.unique([*rng.integers(1, n + 1, rng.integers(0, 4)), n]) if n else [0] for n in x.shape[:-last]]
    chunks = [tuple(np.diff([0, *at]).tolist()) for at in ends]
    return da.from_array(x, chunks=(*chunks, *((n,) for n in x.shape[x.ndim - last :])))


def hold(rng, arrays, options, layout="bhld"):
    """Results of chunked arrays, and those of attention."""

    def placed(x):
        return x if layout == "bhld" else x.swapaxes(-2, -3)

    q, k, v = (pieces(rng, placed(x)) for x in arrays)
    if rng.integers(2):
        v = v.rechunk((*k.chunks[:-1], -1))
    out, lse = attention(q, k, v, layout=layout, return_lse=True, **options)
    found = dask.compute(out, lse)
    expected = qkv_fast.attention(*arrays, return_lse=True, **options)
    assert tuple(map(sum, out.chunks)) == out.shape == found[0].shape and lse.shape == found[1].shape
    for lazy, x, y in zip((out, lse), (placed(found[0]), found[1]), expected, strict=True):
        assert lazy.dtype == x.dtype == y.dtype and x.shape == y.shape
        close = CLOSE[y.dtype.name]
        np.testing.assert_allclose(x.astype("f8"), y.astype("f8"), rtol=close, atol=close)
    same_bits(attention(q, k, v, layout=layout, **options).compute(), found[0])
    return found


@given(CASES, st.sampled_from(["bhld", "blhd"]))
def test_any_composition(case, layout):
    """Of any chunks; with NaN wherever nobody looks."""
    options = case.options()
    if "bias" in options:  # the sum of a row of the lowest floats is absorbed by its log-sum-exp
        options["bias"] = np.where(np.isfinite(options["bias"]) & (options["bias"] < -1e30), 0, options["bias"])
    arrays = poisoned(case, case.arrays(), visible(case, options))
    hold(case.rng, arrays, options, layout)


@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_types(dtype):
    """Partial results of 16 bits are float32; k and v of three axes, and narrower ones."""
    q, k, v = qkv(0, dtype, batch=(2,), heads=(4, 2), lengths=(30, 70))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        hold(rng, (q, k, v), dict(causal=True))
        hold(rng, (q, k[0], v[0]), {})
        hold(rng, (q[0, 0], k[0, 0], v[0, 0]), dict(window=9))
    narrow = "float32" if dtype == "float64" else dtype
    hold(rng, (q, k.astype(narrow), v.astype(narrow)), dict(sinks=np.ones(4)))


@pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 4, 0, 8), (2, 0, 3, 8)])
def test_nothing(shape):
    x = np.ones(shape, np.float32)
    for arrays in ((x, x, x), (x, x[:, :, :0], x[:, :, :0])):
        hold(np.random.default_rng(0), arrays, {})


def test_farthest_positions():
    q, k, v = qkv(6, heads=(2, 2), lengths=(20, 40))
    for far in (2**60, -(2**60)):
        for options in (dict(q_offset=far), dict(q_positions=np.full(20, far))):
            hold(np.random.default_rng(6), (q, k, v), dict(causal=True) | options)


def test_heads_within_groups():
    """Chunks of query heads that are no whole groups, and one head of keys for all of them."""
    q, k, v = qkv(1, heads=(12, 3), lengths=(5, 40))
    for chunks in ((6, 6), (1, 10, 1), (5, 7), (4, 8)):
        for k_chunks in ((3,), (1, 2), (2, 1)):
            lazy = da.from_array(q, chunks=(chunks, 5, 16))
            out = attention(lazy, *(da.from_array(x, chunks=(k_chunks, 10, 16)) for x in (k, v)))
            np.testing.assert_allclose(out, qkv_fast.attention(q, k, v), rtol=1e-5, atol=1e-6)
    out = attention(da.from_array(q, chunks=(5, 5, 16)), k[:1], v[:1])
    assert out.chunks[0] == (5, 5, 2)
    np.testing.assert_allclose(out, qkv_fast.attention(q, k[:1], v[:1]), rtol=1e-5, atol=1e-6)


def test_masks_in_chunks():
    q, k, v = qkv(2, batch=(2,), heads=(2, 2), lengths=(40, 60))
    rng = np.random.default_rng(2)
    bias, mask = rng.standard_normal((2, 2, 40, 60), dtype="f4"), rng.random((40, 60)) < 0.5
    lazy = [da.from_array(x, chunks=(1, 2, 20, 16)) for x in (q, k, v)]
    for chunks in ((2, 2, 20, 20), (2, 2, 40, 60), (1, 2, 20, 40)):
        given = dict(bias=da.from_array(bias, chunks=chunks), mask=da.from_array(mask, chunks=(20, 20)))
        out = attention(*lazy, **given)
        np.testing.assert_allclose(out, qkv_fast.attention(q, k, v, bias=bias, mask=mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, made",
    [
        (dict(causal=True), {0: 1, 1: 2, 2: 3, 3: 4}),
        (dict(causal="top-left", window=10), {0: 1, 1: 2, 2: 2, 3: 2}),
        (dict(window=(0, 5)), {0: 2, 1: 2, 2: 2, 3: 1}),
        (dict(kv_lengths=[16, 5], q_lengths=[0, 10]), {0: 1, 1: 1, 2: 1, 3: 1}),
        (dict(kv_lengths=33, kv_starts=20), {0: 2, 1: 2, 2: 2, 3: 2}),
        (dict(q_positions=np.arange(64)[::-1], causal=True), {0: 4, 1: 3, 2: 2, 3: 1}),
        (dict(segments=(np.arange(64) // 16, np.arange(64) // 16)), {0: 1, 1: 1, 2: 1, 3: 1}),
        (dict(causal=True, q_offset=[-100, -200]), {0: 1, 1: 1, 2: 1, 3: 1}),
    ],
)
def test_hidden_blocks_are_not_made(options, made):
    """Of 4 blocks of keys, for each of 4 of queries; where none is seen one is attended, to say so."""
    q, k, v = qkv(3, batch=(2,), heads=(1, 1), lengths=(64, 64))
    count = [0]

    def counted(x):
        count[0] += 1
        return x

    lazy = [da.from_array(x, chunks=(2, 1, 16, 16)) for x in (q, k, v)]
    lazy[1] = lazy[1].map_blocks(counted, meta=np.empty((0,) * 4, np.float32))
    plan = explain(*lazy, **options)
    assert plan.blocks == sum(made.values()) and plan.blocks_hidden == 16 - plan.blocks
    out = attention(*lazy, **options)
    for i, n in made.items():
        count[0] = 0
        found = out.blocks[:, :, i].compute()
        assert count[0] == n
        expected = qkv_fast.attention(q, k, v, **options)[:, :, 16 * i : 16 * i + 16]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_same_bits(client):
    """By one thread, many, or processes; all at once or a block alone; of keys in runs and in a tree."""
    q, k, v = qkv(4, heads=(2, 2), lengths=(32, 480))
    for chunk in (16, 40, 240):
        lazy = [da.from_array(x, chunks=(1, n, 16)) for x, n in ((q, 16), (k, chunk), (v, chunk))]
        out = attention(*lazy, causal=True)
        found = out.compute()
        same_bits(out.blocks[1, 1].compute(), found[1:, 16:])
        for _ in range(3):
            same_bits(out.compute(scheduler="threads", num_workers=8), found)
        same_bits(client.compute(out).result(), found)
        on_workers = client.persist(lazy)  # futures
        same_bits(client.compute(attention(*on_workers, causal=True)).result(), found)
    assert attention(*lazy, causal=True).name == out.name != attention(*lazy).name


def store(path, name, x, chunks):
    z = zarr.create_array(path / name, shape=x.shape, chunks=chunks, dtype=x.dtype, compressors=None)
    z[...] = x
    return da.from_zarr(z)


def on_workers():
    """What says how much memory a worker has, and what forgets the most it had: not by the name of this module, which
    workers can't import."""

    def memory(of):
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(of))

    def forget():
        with open("/proc/self/clear_refs", "w") as file:  # the highest value so far is that of now
            file.write("5")
        return memory("VmRSS")

    return memory, forget


@pytest.mark.alone
@pytest.mark.parametrize("chunks", [32, 64])
def test_memory_and_bytes_between_workers(client, tmp_path, chunks):
    """Keys and values on disk: a worker grows by a few blocks, however many there are; no more moves than was said."""
    x = np.random.default_rng(5).standard_normal((8, 1024, 64), dtype=np.float32)
    keys = np.tile(x, (1, chunks, 1))
    q = store(tmp_path, "q", np.tile(x[:, :256], (1, 4, 1)), (8, 256, 64))
    k, v = (store(tmp_path, name, keys, (8, 1024, 64)) for name in "kv")
    expected = qkv_fast.attention(x[:, :256], x, x)  # of keys that all stand there equally often
    for worker in client.scheduler_info()["workers"]:  # each imports what it needs: 100 MB
        client.compute(attention(q, k[:, :1024], v[:, :1024]), workers=[worker]).result()
    plan, out = explain(q, k, v), attention(q, k, v)
    assert plan.made_anew and plan.blocks == 4 * chunks

    def moved():
        return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())

    memory, forget = on_workers()
    before = client.run(forget)
    moved_before = moved()
    found = client.compute(out).result()
    highest = client.run(memory, "VmHWM")
    np.testing.assert_allclose(found, np.tile(expected, (1, 4, 1)), rtol=1e-5, atol=1e-6)
    assert max(highest[at] - before[at] for at in before) <= 3 * plan.block_bytes + 64e6
    # Objects without elements, such as an open zarr array, come on top: one for each of q, k and v.
    assert moved() - moved_before <= plan.bytes_between_workers + 3 * 10_000


def test_what_explain_counts():
    q, k, v = (da.ones((4, n, 16), chunks=(4, 8, 16), dtype="float32") for n in (16, 64, 64))
    block, partial = 4 * 8 * 16 * 4, 4 * 8 * 17 * 4
    plan = explain(q, k, v)
    # Of each of two results: 8 tasks with the block of queries, 7 merges of two or with what came before.
    assert plan == adapter.Plan(2 * (8 * block + 14 * partial + partial), 16, 0, 3 * block + partial, True)
    assert explain(q, k, v, return_lse=True).bytes_between_workers == plan.bytes_between_workers + 2 * partial
    made = k.persist()  # by tasks of its own: its blocks move
    assert explain(q, made, v)[0] == plan.bytes_between_workers + 16 * block and not explain(q, made, v).made_anew
    cut = explain(q, k, v.rechunk((4, 32, 16)))
    assert cut.bytes_between_workers > plan.bytes_between_workers


def test_blocks_cut_from_memory(client):
    """By tasks of their own: those that attend to a piece don't need all that it is cut from."""
    x = np.ones((2, 256, 16), np.float32)
    q, v = da.from_array(x[:, :128], chunks=(2, 8, 16)), da.from_array(x, chunks=(2, 64, 16))
    whole = da.from_array(x, chunks=x.shape)
    plan = explain(q, whole, v)
    graph = dict(dask.optimize(attention(q, whole, v))[0].__dask_graph__())
    results = dict(zip(graph, dask.get(graph, list(graph)), strict=True))
    needs = [results[at] for key in graph for at in get_dependencies(graph, key)]
    moved = sum(x.nbytes for found in needs for x in (found if isinstance(found, tuple) else (found,)))
    assert moved <= plan.bytes_between_workers
    assert not plan.made_anew and not explain(q, client.persist(whole), v).made_anew


def test_arrays_in_memory_are_not_part_of_every_task(tmp_path):
    """Of k = array * 2 each task would have a piece; small ones, such as a mean, may be."""
    x = np.ones((2, 4096, 16), np.float32)
    q, stored = da.from_array(x[:, :128], chunks=(2, 8, 16)), store(tmp_path, "k", x, (2, 1024, 16))
    k = da.from_array(x, chunks=(2, 1024, 16)) * 2
    assert not explain(q, k, k).made_anew and not explain(q, stored * x, stored).made_anew
    assert explain(q, stored - x.mean((0, 1)), stored).made_anew
    tasks = dict(dask.optimize(attention(q, k, k))[0].__dask_graph__()).values()
    assert sum(len(pickle.dumps(task)) for task in tasks) < 4 * x.nbytes


def lazy(*shape, dtype="float32", chunks="auto"):
    return da.zeros(shape, dtype=dtype, chunks=chunks)


X = lazy(2, 6, 4)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X, lazy(2, 6, 5), X), {}, ValueError, "attention: k has dimension 5, q has 4"),
        ((X, X, X), dict(is_causal=True), TypeError, "unexpected keyword argument 'is_causal'; here it is causal"),
        ((X, X, X), dict(out=np.empty((2, 6, 4))), TypeError, "unexpected keyword argument 'out'"),
        ((X, X, X), dict(mask=lazy(6, 7, dtype=bool)), ValueError, "mask does not broadcast to"),
        ((X, X, X), dict(mask=lazy(6, 6)), TypeError, "mask must be bool"),
        ((lazy(3, 2, 6, 4),) * 3, dict(mask=lazy(3, 6, 6, dtype=bool)), ValueError, r"pass mask\[:, None\]"),
        ((lazy(2, 6, 4, dtype=int), X, X), {}, TypeError, "attention: q must be float16, bfloat16, float32 or float64"),
        ((X, X, X), dict(kv_lengths=7), ValueError, r"kv_lengths must be in 0\.\.6"),
        ((X, X, X), dict(kv_lengths=3, causal=True), ValueError, "leaves two readings"),
        ((X, X, X), dict(kv_lengths=da.ones(2, dtype=int)), TypeError, r"pass kv_lengths\.compute\(\)"),
        ((X, X, X), dict(segments=(da.ones(6), np.ones(6))), TypeError, r"pass segments\.compute\(\)"),
        ((X, X, X), dict(num_threads=0), ValueError, "num_threads"),
        ((lazy(2, 6, 4, chunks=(2, 6, 2)), X, X), {}, ValueError, r"one chunk, got \(2, 2\); pass q\.rechunk\({2"),
        ((X[X[:, 0, 0] == 0], X, X), {}, ValueError, r"chunks of unknown size.*pass q\.compute_chunk_sizes\(\)"),
        ((X, X, X), dict(mask=lazy(6, 6, dtype=bool, chunks=3)), ValueError, r"pass mask\.rechunk\(\(\(6,\), \(6,\)"),
        ((X, {}, X), {}, TypeError, r"k must be a dask or NumPy array, got dict"),
        ((X, np.ma.ones((2, 6, 4)), X), {}, TypeError, "k must be a dask or NumPy array, got numpy.MaskedArray"),
        ((da.ma.masked_equal(X, 1), X, X), {}, TypeError, "blocks that are NumPy arrays, got MaskedArray"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, message):
    """At once, by attention's own rules."""
    for function in (attention, explain):
        with pytest.raises(error, match=message):
            function(*arguments, **options)


def test_shapes_larger_than_memory():
    x = da.zeros((8, 2**34, 64), chunks=(8, 2**28, 64), dtype="float32")
    assert attention(x, x, x, causal=True).shape == x.shape
    assert explain(x, x, x).blocks == 64 * 64


@pytest.mark.parametrize("function", [attention, explain])
def test_examples(function):
    (test,) = doctest.DocTestFinder(recurse=False).find(function, globs={})
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0
