"""Masks and biases that lie so that one copy serves several heads: they go together, and nothing else shows."""

import numpy as np
import pytest
from _util import TYPES, normal, qkv, same_bits

import qkv_fast

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)

HEADS = 12
SHAPES = {"short": (100, 130), "one chunk": (50, 1000), "chunks": (30, 2500)}
shapes = pytest.mark.parametrize("shape", SHAPES)
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(70, 5)),
    "sinks": dict(sinks=np.linspace(-1, 1, HEADS), softcap=3.0),
}
options_of_all = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def heads_last(x):
    return np.moveaxis(np.moveaxis(x, -3, -1).copy(), -1, -3)


def keys_first(x):
    return x.swapaxes(-2, -1).copy().swapaxes(-2, -1)


def problem(dtype, shape, *, heads=HEADS, bias_heads=HEADS):
    """Arrays, and a mask and a bias that any type holds, of which whole blocks of keys exclude."""
    lengths = SHAPES[shape]
    rng = np.random.default_rng(1)
    arrays = qkv(1, dtype, batch=(2,), heads=(HEADS, heads), lengths=lengths, dims=(16, 8))
    bias = normal(rng, (2, bias_heads, *lengths), "float16")
    mask = rng.random(bias.shape) < 0.8
    late = np.triu(np.ones(lengths, bool), 20)
    bias[:, :, late] = -np.inf
    bias[0, :, :, 5:40] = -np.inf
    mask[1, :, :, :128] = False
    return arrays, mask, bias


def tasks(arrays, **options):
    return qkv_fast.explain(*arrays, num_threads=1, **options).tasks


@dtypes
@shapes
@options_of_all
def test_heads_last(dtype, shape, options):
    arrays, mask, bias = problem(dtype, shape)
    for given in (dict(bias=bias.astype(dtype)), dict(mask=mask), dict(bias=bias.astype(dtype), mask=mask)):
        expected = qkv_fast.attention(*arrays, return_lse=True, **given, **options)
        moved = {name: heads_last(x) for name, x in given.items()}
        assert tasks(arrays, **moved, **options) < tasks(arrays, **given, **options)
        for threads in (1, 2, 3):
            got = qkv_fast.attention(*arrays, return_lse=True, num_threads=threads, **moved, **options)
            same_bits(got, expected)


@dtypes
@shapes
@options_of_all
def test_one_for_all_heads(dtype, shape, options):
    """Copied for another type or order: once."""
    arrays, mask, bias = problem(dtype, shape, bias_heads=1)
    expected = qkv_fast.attention(*arrays, return_lse=True, mask=mask, bias=bias.astype(dtype), **options)
    for moved in (
        bias.astype("float64" if dtype == "float32" else "float32"),
        bias.astype(dtype).byteswap().view(np.dtype(dtype).newbyteorder()),
        keys_first(bias.astype(dtype)),
    ):
        for own in (mask, keys_first(mask)):
            assert tasks(arrays, bias=moved, mask=own, **options) < HEADS * 2
            for threads in (1, 2):
                got = qkv_fast.attention(*arrays, return_lse=True, num_threads=threads, mask=own, bias=moved, **options)
                same_bits(got, expected)


@dtypes
@pytest.mark.parametrize("group", [2, 3])
def test_grouped_heads(dtype, group):
    arrays, mask, bias = problem(dtype, "one chunk", heads=HEADS // group)
    expected = qkv_fast.attention(*arrays, return_lse=True, mask=mask, bias=bias.astype(dtype))
    for move in (heads_last, keys_first):
        for threads in (1, 2):
            got = qkv_fast.attention(
                *arrays, return_lse=True, num_threads=threads, mask=move(mask), bias=move(bias.astype("float64"))
            )
            same_bits(got, expected)


@dtypes
def test_beside_nan_that_is_hidden(dtype):
    """Panels that run again find the copies that they need."""
    (q, k, v), mask, bias = problem(dtype, "chunks")
    mask[:, :, :, 7] = mask[:, :, :, 2000] = False
    v[:, ::5, 7] = v[:, ::5, 2000] = np.nan
    expected = qkv_fast.attention(q, k, v, return_lse=True, mask=mask, bias=bias.astype(dtype))
    assert np.isfinite(expected[0]).all()
    moved = dict(mask=heads_last(mask), bias=heads_last(bias.astype(dtype)))
    same_bits(qkv_fast.attention(q, k, v, return_lse=True, num_threads=1, **moved), expected)


@dtypes
def test_segments_and_lengths_beside(dtype):
    arrays, mask, bias = problem(dtype, "one chunk")
    lq, lk = SHAPES["one chunk"]
    ids = np.random.default_rng(3).integers(0, 3, (2, lk))
    more = dict(segments=(ids[:, :lq], ids), kv_lengths=[lk, 333])
    expected = qkv_fast.attention(*arrays, return_lse=True, mask=mask, bias=bias.astype(dtype), **more)
    for threads in (1, 2):
        got = qkv_fast.attention(
            *arrays,
            return_lse=True,
            num_threads=threads,
            mask=heads_last(mask),
            bias=heads_last(bias.astype(dtype)),
            **more,
        )
        same_bits(got, expected)


@pytest.mark.parametrize("heads", [*range(1, 19), 64])
def test_any_number_of_heads(heads):
    rng = np.random.default_rng(heads)
    q, k, v = qkv(2, heads=(heads, heads), lengths=(33, 41), dims=(8, 8))
    mask, bias = rng.random((heads, 33, 41)) < 0.6, normal(rng, (heads, 33, 41), "float32")
    expected = qkv_fast.attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    for move in (heads_last, keys_first):
        moved = dict(mask=move(mask), bias=move(bias))
        same_bits(qkv_fast.attention(q, k, v, return_lse=True, num_threads=1, **moved), expected)


@pytest.mark.parametrize("lq, lk", [(0, 20), (20, 0), (0, 0)])
def test_no_elements(lq, lk):
    q, k, v = qkv(3, heads=(2, 2), lengths=(lq, lk))
    out, lse = qkv_fast.attention(
        q, k, v, mask=heads_last(np.ones((2, lq, lk), bool)), bias=np.zeros((lq, lk)), return_lse=True
    )
    assert not out.any() and (lse == -np.inf).all()
