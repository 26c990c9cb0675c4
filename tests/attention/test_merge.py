"""merge_partials: results over disjoint sets of keys combine to the result over all of them."""

import numpy as np
import pytest
from _util import TYPES, compare, qkv, same_bits

import qkv_fast

dtypes = pytest.mark.parametrize("dtype", TYPES)


def partials(q, k, v, cuts, layout="bhld", **options):
    """Attention over k[0:cuts[0]], k[cuts[0]:cuts[1]], ... apart."""
    axis = -2 if layout == "bhld" or q.ndim == 2 else -3
    parts = zip(np.split(k, cuts, axis), np.split(v, cuts, axis), strict=True)
    results = [qkv_fast.attention(q, *kv, layout=layout, return_lse=True, **options) for kv in parts]
    return [out for out, _ in results], [lse for _, lse in results]


@dtypes
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("cuts", [[], [50], [1, 2, 99], [0, 0, 40, 100], list(range(0, 100, 3))])
def test_equals_the_whole(isa, dtype, layout, cuts):
    """By the same error rule as the whole: each partial has its error, and their weights sum to 1."""
    q, k, v = qkv(1, dtype, batch=(2,), heads=(4, 2), lengths=(7, 100), dims=(16, 8))
    if layout == "blhd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    out, lse = qkv_fast.merge_partials(*partials(q, k, v, cuts, layout), layout=layout)
    assert out.flags.c_contiguous and lse.flags.c_contiguous
    compare((out, lse), (q, k, v), layout=layout)


@dtypes
def test_two_dimensions(dtype):
    q, k, v = (x[0] for x in qkv(2, dtype, lengths=(5, 40)))
    for layout in ("bhld", "blhd"):
        compare(qkv_fast.merge_partials(*partials(q, k, v, [13], layout), layout=layout), (q, k, v))


@dtypes
def test_scores_of_other_sizes(dtype):
    """Partials whose scores are worlds apart: the small ones vanish, nothing overflows."""
    q, k, v = qkv(3, dtype, lengths=(6, 90), dims=(4, 8))
    q, k = np.rint(q), np.rint(k)
    for factor in (30.0, 2.0**10, 2.0**100):
        k2 = k.copy()
        k2[:, 30:60] *= k.dtype.type(factor)
        compare(qkv_fast.merge_partials(*partials(q, k2, v, [30, 60])), (q, k2, v))


@dtypes
def test_one_partial_is_itself(dtype):
    q, k, v = qkv(4, dtype, lengths=(6, 30))
    out, lse = qkv_fast.attention(q, k, v, causal=True, q_offset=-2, return_lse=True)
    same_bits(qkv_fast.merge_partials([out], [lse]), (out, lse))


@dtypes
def test_empty_partials_have_no_part(dtype):
    """An LSE of -inf says that nothing was seen: whatever the output holds, NaN too, stays out of the sum."""
    q, k, v = qkv(5, dtype, batch=(2,), heads=(2, 2), lengths=(6, 30))
    out, lse = qkv_fast.attention(q, k, v, return_lse=True)
    none = np.full_like(lse, -np.inf)
    for garbage in (np.nan, np.inf, 1e30, 0):
        bad = np.full_like(out, garbage)
        for order in ([0, 1], [1, 0], [1, 0, 1, 1]):
            got = qkv_fast.merge_partials([(out, bad)[i] for i in order], [(lse, none)[i] for i in order])
            same_bits(got, (out, lse))
        got = qkv_fast.merge_partials([bad, bad], [none, none])
        assert not got[0].any() and (got[1] == -np.inf).all()
    # row by row: each row is empty in one of the two
    half = np.arange(6) % 2 == 0
    a, b = np.where(half, lse, -np.inf).astype(dtype), np.where(half, -np.inf, lse).astype(dtype)
    outs = [
        np.where(half[:, None], out, np.nan).astype(dtype),
        np.where(half[:, None], np.nan, out).astype(dtype),
    ]
    same_bits(qkv_fast.merge_partials(outs, [a, b]), (out, lse))


@dtypes
def test_nan_is_not_swallowed(dtype):
    q, k, v = qkv(6, dtype, lengths=(6, 30), dims=(8, 8))
    k[:, 20] = np.nan
    out, lse = qkv_fast.merge_partials(*partials(q, k, v, [10]))
    assert np.isnan(out).all() and np.isnan(lse).all()
    q, k, v = qkv(6, dtype, lengths=(6, 30), dims=(8, 8))
    v[:, 20, 3] = np.nan
    out, lse = qkv_fast.merge_partials(*partials(q, k, v, [10]))
    assert np.isnan(out[..., 3]).all() and np.isnan(out).sum() == 6 and np.isfinite(lse).all()


@dtypes
def test_many_partials_of_few_keys(dtype):
    """1000 partials of one key each: the order and number of merges cost no accuracy."""
    q, k, v = qkv(7, dtype, lengths=(3, 1000), dims=(8, 8))
    compare(qkv_fast.merge_partials(*partials(q, k, v, range(1, 1000))), (q, k, v))


@dtypes
def test_lists_arrays_and_strides(dtype):
    q, k, v = qkv(8, dtype, batch=(2,), heads=(2, 2), lengths=(6, 30))
    outs, lses = partials(q, k, v, [10])
    expected = qkv_fast.merge_partials(outs, lses)
    same_bits(qkv_fast.merge_partials(np.stack(outs), np.stack(lses)), expected)
    same_bits(qkv_fast.merge_partials(iter(outs), iter(lses)), expected)
    same_bits(
        qkv_fast.merge_partials(
            [np.asfortranarray(x) for x in outs], [x[..., ::-1][..., ::-1] for x in lses]
        ),
        expected,
    )
    swapped = (
        [x.astype(x.dtype.newbyteorder("S")) for x in outs],
        [x.astype(x.dtype.newbyteorder("S")) for x in lses],
    )
    same_bits(qkv_fast.merge_partials(*swapped), expected)
    for x in (*outs, *lses):
        x.flags.writeable = False
    same_bits(qkv_fast.merge_partials(outs, lses), expected)


@dtypes
def test_no_rows(dtype):
    out, lse = qkv_fast.merge_partials([np.zeros((2, 0, 4), dtype)] * 2, [np.zeros((2, 0), dtype)] * 2)
    assert out.shape == (2, 0, 4) and lse.shape == (2, 0)
    out, lse = qkv_fast.merge_partials([np.zeros((2, 3, 0), dtype)] * 2, [np.zeros((2, 3), dtype)] * 2)
    assert out.shape == (2, 3, 0) and np.allclose(lse, np.log(2))


def test_bad_input():
    out, lse = np.zeros((2, 4, 5), "float32"), np.zeros((2, 4), "float32")
    merge = qkv_fast.merge_partials
    for outs, lses, words in [
        ([], [], ["outs"]),
        ([out], [lse, lse], ["outs", "lse"]),
        ([out, out], [lse], ["outs", "lse"]),
        ([out, out[:1]], [lse, lse], ["(1, 4, 5)", "(2, 4, 5)"]),
        ([out, out], [lse, lse[:1]], ["(1, 4)", "(2, 4)", "lses"]),
        ([out], [lse[..., None]], ["(2, 4, 1)", "lses"]),
        ([lse[0]], [lse[0, 0]], ["outs", "(4,)"]),
        ([out.swapaxes(0, 1)], [lse], ["(4, 2, 5)", "(2, 4)"]),
    ]:
        with pytest.raises(ValueError) as caught:
            merge(outs, lses)
        for word in words:
            assert word in str(caught.value)
    for outs, lses, word in [
        ([out.astype("int32")], [lse], "outs"),
        ([out, out.astype("float64")], [lse, lse], "outs"),
        ([out], [lse.astype(bool)], "lses"),
        ([out, out], [lse, lse.astype("float64")], "lses"),
        ([np.ma.masked_array(out)], [lse], "outs"),
        ([None], [lse], "outs"),
        (None, [lse], "outs"),
        ([out], 3, "lses"),
    ]:
        with pytest.raises(TypeError, match=word):
            merge(outs, lses)
    for bad in ("hbld", "", None, 3):
        with pytest.raises((TypeError, ValueError), match="layout"):
            merge([out], [lse], layout=bad)
