"""Hypothesis: any shapes, strides and options, against the reference and against the contiguous copy.

The examples are drawn the same way in each run (conftest.py).
"""

import numpy as np
import pytest
from _util import compare, no_change, same_bits
from hypothesis import assume, given
from hypothesis import strategies as st

import qkv_fast

pytestmark = pytest.mark.usefixtures("isa")

LENGTHS = st.integers(0, 20) | st.integers(0, 150) | st.sampled_from([95, 96, 97, 128, 192, 1152, 1153, 2400])
DIMS = st.integers(0, 20) | st.sampled_from([32, 63, 64, 65, 128, 130])


class Problem(tuple):
    """(q, k, v, options), which a failing example shows by shapes and strides."""

    def __repr__(self):
        arrays = [
            f"{name} {x.dtype.str} {x.shape} strides {x.strides}"
            for name, x in zip("qkv", self, strict=False)
        ]
        return "; ".join([*arrays, repr(self[3])])


@st.composite
def problems(draw):
    """Everything that attention accepts and that fits a quick test.

    Scores stay of usual size: in a peaked softmax of a few rows chance decides whether our error or NumPy's
    is twice the other's (test_accuracy.py has those, with rows enough).
    """
    dtype = draw(st.sampled_from(["float32", "float64"]))
    lq, lk, d, dv = draw(LENGTHS), draw(LENGTHS), draw(DIMS), draw(DIMS)
    if lq * lk > 60_000:
        lq = lq % 20
    group, heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    batch = draw(st.sampled_from([(), (1,), (2,), (3,), (2, 2), (1, 3), (0,)]))
    layout = draw(st.sampled_from(["bhld", "blhd"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def array(heads, length, dim, shared=True):
        own = tuple(1 if draw(st.booleans()) and n != 0 else n for n in batch)  # broadcasts to the batch
        own = () if shared and all(n == 1 for n in own) and draw(st.booleans()) else own
        shape = (*own, heads, length, dim) if layout == "bhld" else (*own, length, heads, dim)
        return own, arranged(draw, rng.standard_normal(shape).astype(dtype))

    q_own, q = array(group * heads, lq, d, shared=False)
    k_own, k = array(heads, lk, d)
    v_own, v = array(heads, lk, dv)
    batch = np.broadcast_shapes(q_own, k_own, v_own)

    def per_sequence(low, high):
        shape = draw(st.sampled_from([(), batch, batch[1:]] + [(1, *batch[1:])] * bool(batch)))
        numbers = rng.integers(low, high + 1, shape, dtype=draw(st.sampled_from(["int64", "int32"])))
        return int(numbers) if shape == () and draw(st.booleans()) else numbers

    options = dict(layout=layout, causal=draw(st.sampled_from([False, True, "top-left"])))
    side = st.none() | st.integers(0, 5) | st.integers(0, 2000)
    options["window"] = draw(st.none() | st.integers(0, 200) | st.tuples(side, side))
    if draw(st.booleans()):
        options["kv_lengths"] = per_sequence(0, lk)
    if options["causal"] != "top-left" and draw(st.booleans()):
        options["q_offset"] = per_sequence(-50, lk + 50)
    if draw(st.booleans()):
        options["scale"] = (
            draw(st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-3]) | st.floats(-1, 1)) / max(d, 1) ** 0.5
        )
    lengths = np.asarray(options.get("kv_lengths", lk))
    positions = options["causal"] is True or options["window"] not in (None, (None, None))
    if positions and options["causal"] != "top-left" and "q_offset" not in options:
        assume("kv_lengths" not in options or not np.any((lengths > 0) & (lengths < lq)))
    return Problem((q, k, v, options))


def arranged(draw, x):
    """x, or an equal array that lies otherwise in memory."""
    way = draw(
        st.sampled_from(["plain", "permuted", "reversed", "steps", "swapped", "unaligned", "read-only"])
    )
    if way == "permuted":
        order = draw(st.permutations(range(x.ndim)))
        return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    if way == "reversed":
        index = tuple(slice(None, None, -1) if draw(st.booleans()) else slice(None) for _ in x.shape)
        return np.ascontiguousarray(x[index])[index]
    if way == "steps":
        steps = [draw(st.integers(1, 3)) for _ in x.shape]
        view = np.full([n * s for n, s in zip(x.shape, steps, strict=True)], np.nan, x.dtype)
        view = view[tuple(slice(None, None, s) for s in steps)]
        view[...] = x
        return view
    if way == "swapped":
        return x.astype(x.dtype.newbyteorder("S"))
    if way == "unaligned":
        view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        view[...] = x
        return view
    if way == "read-only":
        x.flags.writeable = False
    return x


def contiguous(x):
    return np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))


@given(problems(), st.integers(1, 4))
def test_reference_and_contiguous_copy(problem, threads):
    """Right by the error rule, and the same bits as from contiguous copies on another number of threads."""
    q, k, v, options = problem
    with no_change(q, k, v):
        got = qkv_fast.attention(q, k, v, return_lse=True, num_threads=threads, **options)
    compare(got, (q, k, v), **options)
    copies = [contiguous(x) for x in (q, k, v)]
    same_bits(got, qkv_fast.attention(*copies, return_lse=True, num_threads=5 - threads, **options))


@given(problems(), st.data())
def test_hidden_keys_have_no_influence(problem, data):
    """Keys that no query may attend to hold NaN: the same bits."""
    q, k, v, options = problem
    expected = qkv_fast.attention(q, k, v, return_lse=True, **options)
    axis = -2 if options["layout"] == "bhld" else -3
    more = data.draw(st.integers(1, 40))
    padding = [list(x.shape) for x in (k, v)]
    for shape in padding:
        shape[axis] = more
    lk, lq = k.shape[axis], q.shape[axis]
    longer = [
        np.concatenate([x, np.full(s, np.nan, x.dtype)], axis) for x, s in zip((k, v), padding, strict=True)
    ]
    options = dict(options)
    options.setdefault("kv_lengths", lk)
    positions = options["causal"] is True or options["window"] not in (None, (None, None))
    if positions and options["causal"] != "top-left" and "q_offset" not in options and 0 < lk < lq:
        options["q_offset"] = lk - lq
    same_bits(qkv_fast.attention(q, *longer, return_lse=True, **options), expected)


@given(st.data())
def test_overlapping_out(data):
    """out= anywhere in the memory of the inputs: what a call with copies and a new out gives."""
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    memory = np.random.default_rng(data.draw(st.integers(0, 999))).standard_normal(6000).astype(dtype)
    lq, lk, d = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))

    def view(length):
        x = memory[data.draw(st.integers(0, 3000)) :][: 2 * length * d].reshape(2, length, d)
        return x[tuple(slice(None, None, -1) if data.draw(st.booleans()) else slice(None) for _ in range(3))]

    q, k, v, out = view(lq), view(lk), view(lk), view(lq)
    options = dict(causal=data.draw(st.booleans()), return_lse=True)
    expected = qkv_fast.attention(q.copy(), k.copy(), v.copy(), **options)
    before, inside = memory.copy(), np.zeros(memory.shape, bool)
    start = (out.__array_interface__["data"][0] - memory.__array_interface__["data"][0]) // memory.itemsize
    offsets = sum(
        np.arange(n).reshape([-1 if i == axis else 1 for i in range(3)]) * (step // memory.itemsize)
        for axis, (n, step) in enumerate(zip(out.shape, out.strides, strict=True))
    )
    inside[(start + offsets).ravel()] = True
    got = qkv_fast.attention(q, k, v, out=out, **options)
    assert got[0] is out
    same_bits((got[0].copy(), got[1]), expected)
    np.testing.assert_array_equal(memory[~inside], before[~inside])


@given(problems(), st.lists(st.integers(0, 150), max_size=5))
def test_merging_parts_gives_the_whole(problem, cuts):
    """Keys cut anywhere: partial results merge to the whole, by the error rule of the whole."""
    q, k, v, options = problem
    layout = options["layout"]
    axis = -2 if layout == "bhld" else -3
    cuts = sorted(min(cut, k.shape[axis]) for cut in cuts)
    scale = options.get("scale")
    parts = [
        qkv_fast.attention(q, *part, layout=layout, scale=scale, return_lse=True)
        for part in zip(np.split(k, cuts, axis), np.split(v, cuts, axis), strict=True)
    ]
    got = qkv_fast.merge_partials(*zip(*parts, strict=True), layout=layout)
    compare(got, (q, k, v), layout=layout, scale=scale)
