"""Keys that sequences share, as beams do: read once for all of them, and the bits of each sequence by itself."""

import numpy as np
import pytest
from _compositions import FEATURES, LENGTHS, Case
from _explained import agree
from _util import ALL_TYPES, same_bits
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast

pytestmark = pytest.mark.usefixtures("isa")

CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(ALL_TYPES),
    batch=st.sampled_from([(2,), (5,), (17,), (2, 3), (3, 2), (2, 5, 2)]),
    group=st.integers(1, 3),
    heads=st.integers(1, 2),
    lengths=st.tuples(st.integers(1, 6) | LENGTHS, LENGTHS),
    dims=st.tuples(st.integers(0, 20) | st.sampled_from([64, 65]), st.integers(1, 12) | st.just(64)),
    features=st.lists(st.sampled_from(sorted(FEATURES)), max_size=5, unique=True),
)


def shared(case, axes):
    """q, and k and v that do not move along some axes of the batch: with stride 0 or length 1, and as copies."""
    q, k, v = case.arrays()
    index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(len(case.batch)))
    short = k[index], v[index]
    long = tuple(np.broadcast_to(x, y.shape) for x, y in zip(short, (k, v), strict=True))
    return q, short if case.rng.integers(2) else long, tuple(x.copy() for x in long)


def options_of(case, axes):
    """The case's options; limits that each sequence has are often those of all beams."""
    options = case.options()
    for name in ("kv_lengths", "kv_starts", "q_offset", "q_positions"):
        x = np.asarray(options.get(name, 0))
        if x.ndim == len(case.batch) + (name == "q_positions") and case.rng.integers(3):
            for axis in axes:
                x = np.repeat(x.take([0], axis), case.batch[axis], axis)
            options[name] = x
    if "kv_starts" in options:
        options["kv_starts"] = np.minimum(options["kv_starts"], options.get("kv_lengths", case.lengths[1]))
    return options


@given(CASES, st.data())
def test_beams_have_the_bits_of_their_own(case, data):
    axes = data.draw(st.sets(st.integers(0, len(case.batch) - 1), min_size=1))
    q, few, copies = shared(case, axes)
    with np.errstate(over="ignore"):  # a bias of float32's minimum in 16 bits
        options = options_of(case, axes) | dict(return_lse=True)
    expected = qkv_fast.attention(q, *copies, num_threads=2, **options)
    for threads in (1, 3):
        same_bits(qkv_fast.attention(q, *few, num_threads=threads, **options), expected)


@pytest.mark.parametrize("beams", [2, 5, 16, 70])
@pytest.mark.parametrize("rows", [1, 4, 20, 60])
@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_sizes(beams, rows, dtype, layout):
    """Several chunks, and more beams than a tile has rows."""
    rng = np.random.default_rng(beams)
    q = rng.standard_normal((beams, 2, rows, 64)).astype(dtype)
    k, v = rng.standard_normal((2, 1, 1, 2100, 64)).astype(dtype)
    if layout == "blhd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    got = qkv_fast.attention(q, k, v, causal=True, layout=layout, return_lse=True, num_threads=2)
    one = beams // 2
    alone = qkv_fast.attention(q[one : one + 1], k, v, causal=True, layout=layout, return_lse=True, num_threads=1)
    same_bits(tuple(x[one : one + 1] for x in got), alone)


def test_nan_of_one_beam_stays_there():
    """A query of NaN, and a value of NaN that one beam's mask hides."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((6, 2, 1, 32), "f4")
    k, v = rng.standard_normal((2, 1, 2, 300, 32), "f4")
    mask = np.ones((6, 1, 1, 300), bool)
    mask[2, ..., 100] = False
    v[0, 1, 100, 3] = np.nan
    q[4, 0] = np.nan
    got = qkv_fast.attention(q, k, v, mask=mask)
    same_bits(got, qkv_fast.attention(q, *(np.repeat(x, 6, 0) for x in (k, v)), mask=mask))
    assert np.isfinite(got[2]).all() and np.isnan(got[4, 0]).all() and np.isnan(got[3, 1, 0, 3])


@pytest.mark.parametrize("options", [{}, dict(causal=True, window=700), dict(mask=True), dict(kv_lengths=1500)])
@pytest.mark.parametrize("shape", [(5, 4, 1, 32), (80, 4, 1, 32), (3, 4, 70, 32), (2, 5, 4, 3, 32)])
@pytest.mark.parametrize("threads", [1, 2])
def test_explain_counts_shared_keys_once(shape, options, threads):
    rng = np.random.default_rng(0)
    q = rng.standard_normal(shape, "f4")
    k, v = rng.standard_normal((2, *shape[:-4], 1, 2, 2000, 32), "f4")
    if "mask" in options:
        options = dict(mask=rng.random((*shape[:-1], 2000)) < 0.5)
    plan = agree(q, k, v, num_threads=threads, **options)
    keys = 1500 if "kv_lengths" in options else 2000
    if "window" not in options:
        sequences = q.size // np.prod(shape[-4:])
        assert plan.bytes == 4 * (2 * q.size + sequences * 2 * keys * 2 * 32)
