"""Masks and biases at the edges of memory, over out, and larger than memory: by strides of 0 or untouched pages."""

import mmap
import sys

import numpy as np
import pytest
from _fence import Fence
from _util import TYPES, no_change, normal, pairs, qkv, same_bits
from numpy.lib.stride_tricks import as_strided

import qkv_fast
from qkv_fast import reference

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)
fenced = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")


@pytest.fixture(scope="module")
def fences():
    return [Fence(1 << 20) for _ in range(2)]


@fenced
@dtypes
@pytest.mark.parametrize("place", ["at_end", "at_start"])
def test_every_length(fences, dtype, place, request):
    """One byte past a mask or a bias ends the process."""
    rng = np.random.default_rng(1)
    for n, (lq, lk) in enumerate(pairs(130, full=request.config.getoption("--exhaustive"))):
        q, k, v = qkv(n, dtype, heads=(2, 1), lengths=(lq, lk), dims=(4, 3))
        mask, bias = rng.random((lq, lk)) < 0.7, normal(rng, (lq, lk), dtype)
        at_edge = [fence.put(x, place) for fence, x in zip(fences, (mask, bias), strict=True)]
        for chosen in ((0,), (1,), (0, 1)):
            options = {("mask", "bias")[i]: (mask, bias)[i] for i in chosen}
            views = {("mask", "bias")[i]: at_edge[i] for i in chosen}
            same_bits(qkv_fast.attention(q, k, v, **views), qkv_fast.attention(q, k, v, **options))


@fenced
@dtypes
@pytest.mark.parametrize("place", ["at_end", "at_start"])
def test_strides_at_the_edge(fences, dtype, place):
    """Columns, steps, one row for all queries, one column for all keys, and bytes that are not aligned."""
    rng = np.random.default_rng(2)
    for lq, lk in ((1, 40), (5, 97), (34, 193), (130, 130)):
        q, k, v = qkv(lq, dtype, lengths=(lq, lk), dims=(4, 3))
        mask, bias = rng.random((lq, lk)) < 0.7, normal(rng, (lq, lk), dtype)
        for rows, keys in ((lk, 1), (1, lq), (-lk, -1), (3 * lk, 2), (0, 1), (1, 0), (0, 0)):
            views = []
            for fence, x in zip(fences, (mask, bias), strict=True):
                views.append(fence.put(x, place, strides=(rows * x.itemsize, keys * x.itemsize)))
            options = dict(mask=views[0].copy(), bias=views[1].copy())
            expected = qkv_fast.attention(q, k, v, **options)
            same_bits(qkv_fast.attention(q, k, v, mask=views[0], bias=views[1]), expected)
        for gap in (1, 3):
            views = [fence.put(x, place, gap=gap) for fence, x in zip(fences, (mask, bias), strict=True)]
            expected = qkv_fast.attention(q, k, v, mask=mask, bias=bias)
            same_bits(qkv_fast.attention(q, k, v, mask=views[0], bias=views[1]), expected)


@fenced
@dtypes
def test_keys_past_kv_lengths(fences, dtype):
    """Of a mask and a bias too they are out of reach."""
    rng = np.random.default_rng(3)
    for n in (1, 15, 96, 97):
        q, k, v = qkv(n, dtype, lengths=(5, 200), dims=(4, 3))
        mask, bias = rng.random((1, n)) < 0.7, normal(rng, (1, n), dtype)
        views = []
        for fence, x in zip(fences, (mask, bias), strict=True):
            start = fence.put(x, "at_end")
            views.append(as_strided(start, (5, 200), (0, x.itemsize)))
        got = qkv_fast.attention(q, k, v, mask=views[0], bias=views[1], kv_lengths=n, return_lse=True)
        expected = qkv_fast.attention(q, k[:, :n], v[:, :n], mask=mask, bias=bias, return_lse=True)
        same_bits(got, expected)


@dtypes
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_out_over_the_input(dtype, name):
    """out= in the memory of a mask or bias: what a call with a new out gives."""
    rng = np.random.default_rng(4)
    for lq, lk in ((1, 9), (60, 130), (200, 200)):
        q, k, v = qkv(5, dtype, lengths=(lq, lk), dims=(8, lk))
        memory = normal(rng, (2 * lq + 1, lk), dtype)
        x = memory[:lq]
        if name == "mask":
            x = (rng.random((2 * lq + 1, lk * memory.itemsize)) < 0.6)[:lq, :lk]
            memory = x.base.view(dtype)
        expected = qkv_fast.attention(q, k, v, **{name: x.copy()})
        for out in (memory[:lq], memory[lq::-1][:lq], memory[lq // 2 :][:lq]):
            saved = memory.copy()
            got = qkv_fast.attention(q, k, v, out=out[None], **{name: x})
            same_bits(got.copy(), expected)
            memory[...] = saved


@dtypes
def test_inputs_stay_as_they_are(dtype):
    rng = np.random.default_rng(5)
    q, k, v = qkv(6, dtype, heads=(2, 1), lengths=(70, 130))
    mask, bias = rng.random((70, 130)) < 0.5, normal(rng, (70, 130), dtype)
    ids, slopes, sinks = rng.integers(0, 3, 130), rng.random(2), rng.random(2)
    given = (q, k, v, mask, bias, ids, slopes, sinks)
    for x in given:
        x.flags.writeable = False
    with no_change(*given):
        qkv_fast.attention(
            q, k, v, mask=mask, bias=bias, segments=(ids[:70], ids), alibi_slopes=slopes, sinks=sinks, softcap=3.0
        )


@dtypes
def test_strides_of_0(dtype):
    """2**34 logical elements, of which a window leaves few: one row for all queries, one column, one element."""
    n = 2**17
    rng = np.random.default_rng(6)
    q, k, v = (normal(rng, (1, n, 2), dtype) for _ in range(3))
    row, step = normal(rng, (1, n), dtype), np.dtype(dtype).itemsize
    last = slice(n - 50, n)
    for bias, tail in (
        (as_strided(row, (n, n), (0, step)), row[:, last]),
        (as_strided(row, (n, n), (step, 0)), row[0, last, None]),
        (as_strided(row, (n, n), (0, 0)), row[:, :1]),
    ):
        mask = as_strided(row.view(bool), (n, n), bias.strides)  # the lowest bytes of the same numbers
        out = qkv_fast.attention(q, k, v, bias=bias, mask=mask, causal=True, window=3)[:, last]
        expected = reference.attention(
            q[:, last], k[:, last], v[:, last], bias=tail, mask=mask[last, last], causal=True, window=3
        )
        # the first rows of the tail have lost keys; float32 sums of up to 4 weighted values
        np.testing.assert_allclose(out[:, 3:], expected[:, 3:].astype(dtype), atol=20 * np.finfo(dtype).eps, rtol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="memory of which only what is touched exists")
def test_offsets_beyond_32_bits():
    """A bias of more than 4 GiB, empty but for a few elements near its end."""
    n = 33_000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    bias = np.frombuffer(mmap.mmap(-1, n * n * 4, flags=flags), np.float32).reshape(n, n)
    assert bias.nbytes > 2**32
    bias[-20:, -1] = -np.inf
    q, k, v = (normal(np.random.default_rng(7), (1, n, 2)) for _ in range(3))
    got = qkv_fast.attention(q, k, v, bias=bias, window=5)
    expected = qkv_fast.attention(q[:, -40:], k[:, -40:], v[:, -40:], bias=bias[-40:, -40:], window=5)
    np.testing.assert_allclose(got[:, -30:], expected[:, -30:], atol=20 * np.finfo("f4").eps, rtol=0)
    assert not np.allclose(got[:, -3:], qkv_fast.attention(q[:, -40:], k[:, -40:], v[:, -40:], window=5)[:, -3:])
