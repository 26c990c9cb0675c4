"""Hypothesis: every pair of features, around the edges of tiles, with NaN wherever nobody looks, against the reference.

An example takes some features of _compositions.py, and one test takes each pair for sure.
"""

import itertools

import numpy as np
import pytest
from _compositions import CASES, EDGES, FEATURES, Case, poisoned, visible
from _util import compare, same_bits
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import reference

pytestmark = pytest.mark.usefixtures("isa")


def hold(case, threads):
    """By the error rule, the same bits with poison where nobody looks, on any number of threads."""
    arrays, options = case.arrays(), case.options()
    got = qkv_fast.attention(*arrays, return_lse=True, num_threads=threads, **options)
    compare(got, arrays, **options)
    seen = visible(case, options)
    nothing = ~seen.any(axis=-1)
    assert not got[0][nothing].any()
    sinks = np.broadcast_to(np.reshape(options.get("sinks", -np.inf), (-1, 1)), got[1].shape)[nothing]
    eps = np.finfo(case.dtype).eps  # the maximum is kept in units of the scale: one rounding
    np.testing.assert_allclose(got[1][nothing], sinks, rtol=eps)
    dirty = poisoned(case, arrays, seen)
    same_bits(qkv_fast.attention(*dirty, return_lse=True, num_threads=5 - threads, **options), got)


@given(CASES, st.integers(1, 4))
def test_any_composition(case, threads):
    hold(case, threads)


@pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids="+".join)
def test_every_pair(pair):
    for seed, dtype in enumerate(["float32", "float64"] * 2):
        rng = np.random.default_rng(seed)
        lengths = int(rng.choice(EDGES[:12])), int(rng.choice(EDGES))
        hold(Case(seed, dtype, (2,), 2, 2, lengths, (8, 4), pair), 1 + seed)


@given(CASES, st.data())
def test_nan_that_is_seen(case, data):
    """NaN and infinity in keys that some queries see and others do not, and in queries; NaN in values."""
    arrays, options = case.arrays(), case.options()
    for x, poison in zip(arrays, ([np.nan, np.inf], [np.nan, np.inf, -np.inf], [np.nan]), strict=True):
        for _ in range(data.draw(st.integers(0, 2))):
            index = tuple(case.rng.integers(0, n) for n in x.shape[:-1])
            x[index] = data.draw(st.sampled_from(poison))
    got = qkv_fast.attention(*arrays, return_lse=True, **options)
    exact = reference.attention(*arrays, return_lse=True, **options)
    for a, b in zip(got, exact, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b))
