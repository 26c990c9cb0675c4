"""The stages on NaN, infinity and hidden elements: what takes no part never matters, what does is never swallowed."""

import numpy as np
import pytest
from _stages import check_softmax, stages
from _util import TYPES, normal, same_bits

import qkv_fast
from qkv_fast import reference

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)


@dtypes
@pytest.mark.parametrize("axis", [-1, -2])
def test_masks(dtype, axis):
    """What is hidden never matters; nothing visible, be it hidden or -inf, is 0; every broadcast of a mask."""
    rng = np.random.default_rng(11)
    x = normal(rng, (3, 50, 70), dtype)
    mask = rng.random(x.shape) < 0.6
    mask[0, 4], mask[1, :, 7] = False, False
    x[2, 5], x[2, :, 9] = -np.inf, -np.inf
    clean = check_softmax(x, axis, mask)
    assert not clean[~mask].any() and np.isfinite(clean).all()
    for poison in (np.nan, np.inf, -np.inf, np.finfo(dtype).max):
        same_bits(qkv_fast.softmax(np.where(mask, x, x.dtype.type(poison)), axis, mask=mask), clean)
    for shape in ((1, 50, 70), (3, 1, 70), (3, 50, 1), (70,), (50, 1), (1, 1, 1), ()):
        part = rng.random(shape) < 0.5
        got = check_softmax(x, axis, part)
        same_bits(got, qkv_fast.softmax(x, axis, mask=np.broadcast_to(part, x.shape).copy()))
    assert not qkv_fast.softmax(x, axis, mask=False).any()
    same_bits(qkv_fast.softmax(x, axis, mask=True), qkv_fast.softmax(x, axis))


@dtypes
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_softmax_of_nan_and_inf(dtype, axis, poison):
    """NaN, or +inf by inf - inf, makes all along its axis NaN, wherever it stands, and nothing else."""
    x = normal(np.random.default_rng(12), (70, 70), dtype)
    clean = qkv_fast.softmax(x, axis)
    for at in (0, 3, 15, 16, 63, 64, 69):
        bad = x.copy()
        bad[at, at] = poison
        got = qkv_fast.softmax(bad, axis)
        across = np.moveaxis(got, axis, -1)
        assert np.isnan(across[at]).all() and np.isnan(reference.softmax(bad, axis)).sum() == 70
        same_bits(np.delete(across, at, 0), np.delete(np.moveaxis(clean, axis, -1), at, 0))


@dtypes
def test_products_of_nan_and_inf(dtype):
    """IEEE arithmetic: only the rows, or columns, of what is not finite, and 0 * NaN is NaN."""
    for n, stage in enumerate(s for s in stages(13, dtype, heads=(1, 1)) if not s.name.startswith("softmax")):
        clean = stage()
        a, b = (x.copy() for x in stage.arrays)
        a[0, 0, 3, 5], a[1, 0, 4, 6] = np.nan, np.inf
        got = stage(a, b)
        assert np.isnan(got[0, 0, 3]).all() and not np.isfinite(got[1, 0, 4]).any()
        same_bits(np.delete(got, (3, 4), 2), np.delete(clean, (3, 4), 2))
        a, b = (x.copy() for x in stage.arrays)
        b[0, 0, 7, 2], a[0, 0, :, 7 if n else 2] = np.nan, 0
        got = stage(a, b)
        row_or_column = got[0, 0, :, 2 if n else 7]
        assert np.isnan(row_or_column).all() and np.isnan(got).sum() == row_or_column.size
