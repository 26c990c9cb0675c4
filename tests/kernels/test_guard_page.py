"""Arrays that end, or begin, at a page that may not be touched: one byte too far ends the process.

Linux and macOS: the page is taken away with mprotect. Every array of a call lies at such an edge, the output
too.
"""

import itertools
import sys

import numpy as np
import pytest
from _fence import PAGE, Fence
from _questions import ALL, arrays_of
from _util import ALL_TYPES, child, pairs, qkv, same_bits

import qkv_fast
from qkv_fast import spotlight

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX"),
]
dtypes = pytest.mark.parametrize("dtype", ALL_TYPES)

@pytest.fixture(scope="module")
def fences():
    return [Fence(1 << 20) for _ in range(4)]


def _fenced(fences, arrays, out, place):
    views = [fence.put(x, place) for fence, x in zip(fences, (*arrays, out), strict=True)]
    return views[:3], views[3]


def test_the_fence_holds():
    """The page is really out of reach: a child that reads it dies of a signal."""
    code = (
        f"import ctypes, mmap\nm = mmap.mmap(-1, {2 * PAGE})\n"
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        f"ctypes.CDLL(None).mprotect(ctypes.c_void_p(a + {PAGE}), ctypes.c_size_t({PAGE}), 0)\n"
        f"print(m[{PAGE - 1}], flush=True)\nm[{PAGE}]\nprint('alive')"
    )
    done = child(code)
    assert done.stdout.split() == ["0"] and done.returncode < 0


@dtypes
@pytest.mark.parametrize("place", ["at_end", "at_start"])
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_every_length_and_dimension(fences, dtype, place, layout, request):
    combos = pairs(130, full=request.config.getoption("--exhaustive"))
    for n, (length, dim) in enumerate(combos):
        for lengths, dims in (((3, length), (dim, 5)), ((length, 7), (4, dim)), ((2, length), (6, dim))):
            arrays = qkv(n, dtype, heads=(2, 1), lengths=lengths, dims=dims)
            expected = qkv_fast.attention(*arrays, causal=True)
            if layout == "blhd":
                arrays = [np.ascontiguousarray(x.swapaxes(-3, -2)) for x in arrays]
                expected = np.ascontiguousarray(expected.swapaxes(-3, -2))
            views, out = _fenced(fences, arrays, np.full_like(expected, np.nan), place)
            qkv_fast.attention(*views, causal=True, layout=layout, out=out)
            same_bits(out.copy(), expected)


# Byte strides of the axes (heads, rows, dimension) of an array of this shape and item size.
STRIDES = {
    "all reversed": lambda h, n, d, size: (-n * d * size, -d * size, -size),
    "rows reversed": lambda h, n, d, size: (n * d * size, -d * size, size),
    "transposed": lambda h, n, d, size: (n * d * size, size, n * size),
    "heads innermost": lambda h, n, d, size: (size, h * d * size, h * size),
    "steps": lambda h, n, d, size: (7 * n * d * size, 3 * d * size, 2 * size),
    "odd steps": lambda h, n, d, size: (n * (d * (size + 1) + 1), d * (size + 1) + 1, size + 1),
    "rows of 2 KiB": lambda h, n, d, size: (n * 2048, 2048, size),
    "one row": lambda h, n, d, size: (d * size, 0, size),
    "one element": lambda h, n, d, size: (0, 0, 0),
}


@dtypes
@pytest.mark.parametrize("place", ["at_end", "at_start"])
@pytest.mark.parametrize("name", STRIDES)
def test_views(fences, dtype, place, name):
    for n, (lq, lk, d, dv) in enumerate(
        [(1, 40, 17, 9), (5, 97, 33, 66), (50, 130, 8, 8), (34, 193, 65, 30)]
    ):
        arrays = qkv(n, dtype, heads=(2, 2), lengths=(lq, lk), dims=(d, dv))
        strides = [STRIDES[name](*x.shape, x.itemsize) for x in arrays]
        views = [f.put(x, place, strides=s) for f, x, s in zip(fences, arrays, strides, strict=False)]
        copies = [x.copy() for x in views]  # equal to the arrays unless elements share memory
        for causal in (False, True):
            expected = qkv_fast.attention(*copies, causal=causal)
            same_bits(qkv_fast.attention(*views, causal=causal), expected)
            if name not in ("one row", "one element"):
                strides = STRIDES[name](*expected.shape, expected.itemsize)
                out = fences[3].put(np.full_like(expected, np.nan), place, strides=strides)
                qkv_fast.attention(*views, causal=causal, out=out)
                same_bits(out.copy(), expected)


@dtypes
def test_unaligned_ends(fences, dtype):
    """A few bytes short of the fence: an aligned vector would cross it."""
    for gap, (lk, d) in itertools.product((1, 2, 3, 4, 7), [(1, 1), (5, 3), (97, 19), (130, 64)]):
        arrays = qkv(gap, dtype, lengths=(3, lk), dims=(d, d))
        for place in ("at_end", "at_start"):
            views = [fence.put(x, place, gap=gap) for fence, x in zip(fences, arrays, strict=False)]
            same_bits(qkv_fast.attention(*views), qkv_fast.attention(*arrays))


def _longer(fence, x, n):
    """An array of n rows that begins as x does and goes on beyond the fence."""
    start = fence.size - x.nbytes  # an array without bytes begins at the fence
    row = np.ndarray((1, 1, x.shape[2]), x.dtype, fence.bytes, PAGE + start)
    return np.lib.stride_tricks.as_strided(row, (1, n, x.shape[2]), (0, x.shape[2] * x.itemsize, x.itemsize))


@dtypes
@pytest.mark.parametrize("lq", [1, 5, 40])
def test_keys_past_kv_lengths_are_not_read(fences, dtype, lq):
    """K and V whose tails are out of reach: only kv_lengths keeps the call from dying."""
    for n in (0, 1, 40, 95, 96, 97, 1000):
        q, k, v = qkv(n, dtype, lengths=(lq, n), dims=(16, 16))
        views = [fence.put(x, "at_end") for fence, x in zip(fences[1:], (k, v), strict=False)]
        past = [_longer(fence, x, n + 500) for fence, x in zip(fences[1:], views, strict=False)]
        for options in ({}, dict(causal=True, q_offset=200), dict(window=(30, 400), q_offset=n - 20)):
            got = qkv_fast.attention(q, *past, kv_lengths=n, return_lse=True, **options)
            same_bits(got, qkv_fast.attention(q, k, v, return_lse=True, **options))


@dtypes
@pytest.mark.parametrize("lq", [1, 5, 70])
def test_keys_before_kv_starts_are_not_read(fences, dtype, lq):
    """K and V whose first rows are in the fence's page: only kv_starts keeps the call from dying."""
    for start, n in ((1, 300), (77, 80), (127, 300), (128, 129), (129, 1500), (200, 2300), (64, 64)):
        q, k, v = qkv(start, dtype, lengths=(lq, n - start), dims=(2, 2))
        views = []
        for fence, x in zip(fences[1:], (k, v), strict=False):
            fence.put(x, "at_start")
            views.append(np.ndarray((1, n, 2), x.dtype, fence.bytes, PAGE - start * x.strides[1]))
        whole = [np.concatenate([np.zeros((1, start, 2), dtype), x], axis=1) for x in (k, v)]
        for options in ({}, dict(causal=True), dict(window=(300, 4)), dict(alibi_slopes=[0.1])):
            got = qkv_fast.attention(q, *views, kv_starts=start, return_lse=True, **options)
            same_bits(got, qkv_fast.attention(q, *whole, kv_starts=start, return_lse=True, **options))


@dtypes
def test_keys_beyond_every_window_are_not_read(fences, dtype):
    """What no query may attend to is not touched either, where it is whole blocks of keys away."""
    q, k, v = qkv(1, dtype, lengths=(8, 256), dims=(16, 16))
    views = [fence.put(x, "at_end") for fence, x in zip(fences[1:], (k, v), strict=False)]
    past = [_longer(fence, x, 5000) for fence, x in zip(fences[1:], views, strict=False)]
    got = qkv_fast.attention(q, *past, causal=True, q_offset=256 - 8)
    same_bits(got, qkv_fast.attention(q, k, v, causal=True))


@dtypes
@pytest.mark.parametrize("name", ALL)
def test_questions(fences, dtype, name):
    """Their arrays and what is given with them, of few rows and of several panels; results are their own."""
    ask = getattr(spotlight, name)
    for n, (lq, lk, d, dv) in enumerate([(1, 1, 1, 3), (5, 97, 17, 6), (50, 130, 8, 9), (34, 193, 65, 30)]):
        arrays = qkv(n, dtype, heads=(2, 1), lengths=(lq, lk), dims=(d, dv))
        lse = qkv_fast.attention(*arrays, causal=True, return_lse=True)[1]
        options = [{}, dict(lse=lse)] if name in ("received", "weights", "pooled", "influence") else [{}]
        asked = arrays_of(name, *arrays)
        for given, place in itertools.product(options, ("at_end", "at_start")):
            views = [fence.put(x, place) for fence, x in zip(fences, asked, strict=False)]
            fenced = {key: fences[3].put(x, place) for key, x in given.items()}
            got, expected = ask(*views, causal=True, **fenced), ask(*asked, causal=True, **given)
            same_bits(got, expected)
