"""mask= and bias=: every shape, place in memory and type, and what they hide. Edges of arrays: test_mask_memory.py."""

import itertools
import warnings

import numpy as np
import pytest
from _patterns import PATTERNS
from _util import TYPES, check, normal, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)

LENGTHS = [(1, 9), (5, 70), (50, 130)]


def options_of(rng, what, shape, dtype):
    """A mask, a bias, or both, of this shape."""
    both = dict(mask=rng.random(shape) < 0.6, bias=normal(rng, shape, dtype))
    return {name: x for name, x in both.items() if what in (name, "both")}


SHAPES = [  # of (B, H, Lq, Lk): 1 where an axis is broadcast, from the right
    tuple(n if keep else 1 for n, keep in zip("BHQK", kept, strict=True))
    for kept in itertools.product([True, False], repeat=4)
] + [("Q", "K"), (1, "K"), ("Q", 1), ("K",), (1,), ()]


@dtypes
@pytest.mark.parametrize("what", ["mask", "bias", "both"])
@pytest.mark.parametrize("axes", SHAPES, ids=lambda axes: "x".join(map(str, axes)))
def test_every_shape(dtype, what, axes):
    rng = np.random.default_rng(1)
    for n, (lq, lk) in enumerate(LENGTHS):
        q, k, v = qkv(n, dtype, batch=(2,), heads=(4, 2), lengths=(lq, lk), dims=(8, 4))
        sizes = dict(B=2, H=4, Q=lq, K=lk)
        shape = tuple(sizes.get(axis, 1) for axis in axes)
        check(q, k, v, **options_of(rng, what, shape, dtype))


@dtypes
def test_more_axes_and_none(dtype):
    """Several batch axes, one of which comes from v alone; arrays without heads; the other layout."""
    rng = np.random.default_rng(2)
    q, k = normal(rng, (1, 1, 2, 5, 8), dtype), normal(rng, (2, 9, 8), dtype)
    v = normal(rng, (3, 2, 2, 9, 4), dtype)
    for shape in ((3, 2, 2, 5, 9), (3, 1, 1, 5, 9), (1, 2, 1, 5, 1), (1, 1, 1, 1, 9)):
        check(q, k, v, **options_of(rng, "both", shape, dtype))
    q, k, v = normal(rng, (5, 8), dtype), normal(rng, (9, 8), dtype), normal(rng, (9, 4), dtype)
    for shape in ((5, 9), (1, 9), (5, 1), (9,)):
        check(q, k, v, **options_of(rng, "both", shape, dtype))
    q, k, v = (x.swapaxes(1, 2) for x in qkv(2, dtype, batch=(2,), heads=(4, 2), lengths=(33, 70), dims=(8, 4)))
    check(q, k, v, layout="blhd", **options_of(rng, "both", (2, 4, 33, 70), dtype))


def test_no_elements():
    for lq, lk in ((0, 5), (5, 0), (0, 0)):
        q, k, v = qkv(1, lengths=(lq, lk))
        out, lse = check(q, k, v, mask=np.ones((lq, lk), bool), bias=np.zeros((lq, lk)))
        assert out.shape == (1, lq, 16) and (lse == -np.inf).all()
    q, k, v = qkv(1, dims=(0, 4))
    check(q, k, v, bias=np.random.default_rng(1).standard_normal((8, 8)))


@pytest.mark.parametrize("lq, lk", [(0, 5), (5, 0), (0, 0)])
def test_slices_without_elements(lq, lk):
    """Their strides are those of the array that they are cut from."""
    q, k, v = qkv(1, lengths=(lq, lk))
    whole = np.ones((7, 9), bool)
    for mask in (whole[:lq, :lk], whole[:1, :lk], whole[0, :lk], whole.T[:lq, :lk]):
        out, lse = qkv_fast.attention(q, k, v, mask=mask, return_lse=True)
        assert out.shape == (1, lq, 16) and not out.any() and (lse == -np.inf).all()
        qkv_fast.explain(q, k, v, mask=mask)


@dtypes
@pytest.mark.parametrize("name", PATTERNS)
def test_every_place_in_memory(dtype, name):
    """The same bits from any strides, byte order and alignment."""
    rng = np.random.default_rng(3)
    for n, (lq, lk) in enumerate([(3, 40), (40, 130), (64, 200)]):
        q, k, v = qkv(n, dtype, batch=(2,), heads=(2, 1), lengths=(lq, lk), dims=(8, 4))
        options = options_of(rng, "both", (2, 2, lq, lk), dtype)
        expected = qkv_fast.attention(q, k, v, return_lse=True, **options)
        for names in (("mask",), ("bias",), ("mask", "bias")):
            moved = {key: PATTERNS[name](x) if key in names else x for key, x in options.items()}
            same_bits(qkv_fast.attention(q, k, v, return_lse=True, **moved), expected)


@dtypes
@pytest.mark.parametrize("bias_type", [">f4", "<f4", ">f8", "<f8"])
def test_a_bias_of_any_type(dtype, bias_type):
    rng = np.random.default_rng(4)
    for n, (lq, lk) in enumerate(LENGTHS):
        q, k, v = qkv(n, dtype, heads=(2, 1), lengths=(lq, lk))
        bias = rng.standard_normal((2, lq, lk)).astype(bias_type)
        out, lse = check(q, k, v, bias=bias)
        for name in ("unaligned by 1", "odd steps", "reversed dimension"):
            same_bits(qkv_fast.attention(q, k, v, bias=PATTERNS[name](bias[None])[0], return_lse=True), (out, lse))


@dtypes
def test_array_likes(dtype):
    q, k, v = qkv(5, dtype, lengths=(2, 3))
    mask, bias = [[True, False, True], [False, True, True]], [0.5, -1.0, -np.inf]
    got = qkv_fast.attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    same_bits(got, qkv_fast.attention(q, k, v, mask=np.array(mask), bias=np.array(bias), return_lse=True))


@dtypes
@pytest.mark.parametrize("lq", [1, 3, 40])
def test_minus_infinity_is_false(dtype, lq):
    """-inf in a bias excludes exactly like False in a mask, even where the score is NaN or +inf."""
    rng = np.random.default_rng(6)
    q, k, v = qkv(6, dtype, heads=(2, 1), lengths=(lq, 200))
    mask, bias = rng.random((2, lq, 200)) < 0.5, normal(rng, (2, lq, 200), dtype)
    mask[:, :, [3, 70, 199]] = False
    mask[0, 0] = False  # sees nothing
    k[:, 3], k[:, 70], v[:, 199] = np.nan, np.inf, np.nan
    both = check(q, k, v, mask=mask, bias=bias)
    same_bits(qkv_fast.attention(q, k, v, bias=np.where(mask, bias, -np.inf).astype(dtype), return_lse=True), both)
    same_bits(check(q, k, v, mask=mask, bias=np.where(mask, bias, np.nan).astype(dtype)), both)
    assert not both[0][0, 0].any() and both[1][0, 0] == -np.inf


@dtypes
@pytest.mark.parametrize("bias_type", TYPES)
def test_the_least_number_is_not_minus_infinity(dtype, bias_type):
    """finfo.min everywhere in a row averages; beside other numbers it leaves them alone."""
    least = np.finfo(min(dtype, bias_type)).min  # "float32" < "float64"
    for lq, lk in ((1, 30), (3, 130), (40, 1100)):
        q, k, v = qkv(7, dtype, lengths=(lq, lk))
        bias = np.full((lq, lk), least, bias_type)
        out, _ = check(q, k, v, bias=bias)
        eps = np.finfo(dtype).eps  # lk equal weights: a sum and a division
        np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=1, dtype="f8"), out.shape), rtol=0, atol=8 * eps)
        bias[:, ::3] = 0
        bias[0] = least
        out, _ = check(q, k, v, bias=bias)
        mask = bias == 0
        mask[0] = True
        np.testing.assert_array_equal(out[0, 1:], qkv_fast.attention(q, k, v, mask=mask, bias=bias)[0, 1:])


def test_the_least_number_of_a_wider_type():
    """It fits no float32, which must not make it -inf."""
    q, k, v = qkv(8, lengths=(20, 300))
    bias = np.full((20, 300), np.finfo("float64").min)
    bias[1:, 5] = 1.0
    out = qkv_fast.attention(q, k, v, bias=bias)
    np.testing.assert_allclose(out[0, 0], v[0].mean(axis=0, dtype="f8"), rtol=0, atol=8 * np.finfo("f4").eps)
    np.testing.assert_array_equal(out[0, 1:], np.broadcast_to(v[0, 5], out[0, 1:].shape))


@dtypes
def test_bytes_of_a_mask(dtype):
    """A bool array may hold any byte; all but 0 are True."""
    rng = np.random.default_rng(9)
    for lq, lk in LENGTHS:
        q, k, v = qkv(9, dtype, lengths=(lq, lk))
        octets = rng.choice(np.array([0, 0, 0, 1, 2, 128, 254, 255], "u1"), (lq, lk))
        got = qkv_fast.attention(q, k, v, mask=octets.view(bool), return_lse=True)
        same_bits(got, qkv_fast.attention(q, k, v, mask=octets != 0, return_lse=True))


EDGES = [n + d for n in (16, 48, 128, 1024) for d in (-1, 0, 1)]


@dtypes
@pytest.mark.parametrize("lk", EDGES)
def test_around_the_edges_of_tiles(dtype, lk):
    rng = np.random.default_rng(lk)
    for lq in (1, 15, 17, int(rng.choice(EDGES)) % 200 + 1):
        for d in (4, 65):
            q, k, v = qkv(lk, dtype, heads=(2, 1), lengths=(lq, lk), dims=(d, 3))
            check(q, k, v, **options_of(rng, "both", (2, lq, lk), dtype))
            check(q, k, v, **options_of(rng, "mask", (lq, lk), dtype), causal=True)


@dtypes
def test_hidden_tiles_of_nan(dtype):
    """Documents of their own: what lies in the other documents' keys and values makes no difference, not a bit."""
    rng = np.random.default_rng(10)
    q, k, v = qkv(10, dtype, heads=(2, 2), lengths=(600, 600), dims=(8, 4))
    document = np.repeat(np.arange(4), 150)
    mask = document[:, None] == document
    bias = np.where(mask, normal(rng, (600, 600), dtype), -np.inf).astype(dtype)
    for options in (dict(mask=mask), dict(bias=bias), dict(mask=mask, causal=True), dict(mask=mask, bias=bias)):
        whole = check(q, k, v, **options)
        for poison in (np.nan, np.inf):
            k2, v2 = k.copy(), v.copy()
            k2[:, 150:450], v2[:, 150:450] = poison, poison
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                out, lse = check(q, k2, v2, **options)
            for rows in (slice(150), slice(450, 600)):
                same_bits((out[:, rows], lse[:, rows]), (whole[0][:, rows], whole[1][:, rows]))
            assert not np.isnan(poison) or np.isnan(out[:, 150:450]).all()


@dtypes
@pytest.mark.parametrize("lq", [1, 3, 40, 130])
def test_scattered_nan(dtype, lq):
    """NaN in keys and values that some rows of a tile see, and others do not: there and nowhere else."""
    rng = np.random.default_rng(11)
    q, k, v = qkv(11, dtype, heads=(2, 1), lengths=(lq, 300), dims=(8, 4))
    mask = rng.random((2, lq, 300)) < 0.9
    k[:, 17], v[:, 40, 1], v[:, 250, 2], v[:, 251, 3] = np.nan, np.nan, np.inf, -np.inf
    mask[:, lq // 2 :, [17, 40, 250]] = False
    mask[1, 0, :] = False
    bias = normal(rng, (lq, 300), dtype)
    bias[:, ::7] = -np.inf
    for options in (dict(mask=mask), dict(mask=mask, bias=bias), dict(mask=mask, bias=bias, causal=True)):
        check(q, k, v, **options)
    bias[0, 100], bias[-1, 200] = np.nan, np.inf  # an attended NaN, and +inf as scores: NaN in these rows
    out, lse = check(q, k, v, mask=np.ones((lq, 300), bool) & ~np.isin(np.arange(300), [17, 40, 250, 251]), bias=bias)
    assert np.isnan(out[:, [0, -1]]).all() and np.isnan(lse[:, [0, -1]]).all()
    assert np.isfinite(out[:, 1:-1]).all()


@dtypes
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_visible(dtype, threads):
    """All False and all -inf: 0 and -inf, no warning. A mask without False changes nothing."""
    for lq, lk in ((1, 5000), (200, 300)):
        q, k, v = qkv(12, dtype, lengths=(lq, lk))
        nothing = [dict(mask=np.array(False)), dict(bias=np.full((lq, 1), -np.inf)), dict(mask=np.zeros(lk, bool))]
        for options in nothing:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                out, lse = qkv_fast.attention(q, k, v, return_lse=True, num_threads=threads, **options)
            assert not out.any() and not np.signbit(out).any() and (lse == -np.inf).all()
        plain = qkv_fast.attention(q, k, v, return_lse=True)
        for mask in (np.array(True), np.ones((lq, lk), bool)):
            same_bits(qkv_fast.attention(q, k, v, mask=mask, return_lse=True, num_threads=threads), plain)


@dtypes
@pytest.mark.parametrize("lq", [13, 40, 300])
def test_last_keys_that_a_bias_hides_are_left_out(dtype, lq):
    """Wherever a row's keys end: the same bits as where another row of the call sees all of them."""
    rng = np.random.default_rng(14)
    q, k, v = qkv(14, dtype, heads=(2, 1), lengths=(lq, 300))
    bias = normal(rng, (2, lq, 300), dtype)
    ends = rng.integers(0, 301, (2, lq, 1))
    bias = np.where(np.arange(300) < ends, bias, np.dtype(dtype).type(-np.inf))
    out, lse = check(q, k, v, bias=bias)
    k[:, ends.max() :], v[:, ends.max() :] = np.nan, np.inf
    for step in (1, 3):
        rows = np.s_[:, ::step]
        got = qkv_fast.attention(q[rows], k, v, bias=bias[rows], return_lse=True)
        if step == 1 or len(range(0, lq, step)) > 12:
            same_bits(got, (out[rows], lse[rows]))


@dtypes
def test_tiles_are_skipped_and_full_where_they_can_be(dtype):
    q, k, v = qkv(13, dtype, lengths=(2048, 2048))
    document = np.repeat(np.arange(8), 256)
    with _runtime.counters() as whole:
        qkv_fast.attention(q, k, v)
    with _runtime.counters() as blocks:
        qkv_fast.attention(q, k, v, mask=document[:, None] == document)
    tiles = whole["tiles_full"]
    assert blocks["tiles_full"] + blocks["tiles_partial"] < 0.25 * tiles  # an eighth, and what straddles an edge
    bias = np.where(document[:, None] == document, 0, -np.inf)
    for given in (bias.astype(dtype), bias, bias.T, bias.astype(">f4"), np.repeat(bias.astype(dtype), 2, -1)[:, ::2]):
        with _runtime.counters() as hidden:
            qkv_fast.attention(q, k, v, bias=given)
        assert hidden["tiles_skipped"] == blocks["tiles_skipped"]
    with _runtime.counters() as full:
        qkv_fast.attention(q, k, v, mask=np.ones((2048, 2048), bool))
    assert (full["tiles_full"], full["tiles_partial"]) == (tiles, 0)
