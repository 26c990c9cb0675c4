"""attention(): shapes, heads, broadcasting, layout, scale, types and results, on every CPU path."""

import itertools

import numpy as np
import pytest
from _util import TYPES, check, normal, pairs, qkv, same_bits

import qkv_fast

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)


@dtypes
def test_every_length_and_dimension(dtype, request):
    """Each L and each D of 1..130, of queries, keys, q and v: the tails of every register tile."""
    combos = pairs(130, full=request.config.getoption("--exhaustive"))
    for n, (length, dim) in enumerate(combos):
        check(*qkv(n, dtype, lengths=(9, length), dims=(dim, 7)))
        check(*qkv(n, dtype, lengths=(length, 11), dims=(5, dim)), causal=True)


@dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_tile_edges(dtype, causal):
    """Every pair of lengths about a multiple of a vector, a panel, or a block of 64, 96 or 128 keys."""
    edges = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193]
    for n, (lq, lk) in enumerate(itertools.product(edges, edges)):
        check(*qkv(n, dtype, lengths=(lq, lk), dims=(4, 4)), causal=causal)


@dtypes
@pytest.mark.parametrize("edge", [1024, 2048, 3072])
def test_chunk_edges(dtype, edge):
    """Long keys are cut into chunks (of 1024 keys, or a divisor of that): lengths about the cuts."""
    for n, lk in enumerate((edge - 1, edge, edge + 1)):
        for lq in (1, 5, 40):
            check(*qkv(n, dtype, lengths=(lq, lk), dims=(8, 8)))
            check(*qkv(n, dtype, heads=(4, 1), lengths=(lq, lk), dims=(8, 8)), causal=True)


@dtypes
def test_dimensions(dtype):
    """D and Dv apart, from 0 to 1024."""
    dims = [0, 1, 3, 16, 64, 65, 256, 1023, 1024]
    for n, (d, dv) in enumerate(itertools.product(dims, dims)):
        check(*qkv(n, dtype, heads=(2, 1), lengths=(5, 13), dims=(d, dv)))


@dtypes
@pytest.mark.parametrize("d, causal", [(256, True), (1000, False), (40, False)])
def test_wide_heads_with_many_keys(dtype, d, causal):
    check(*qkv(d, dtype, lengths=(70, 300), dims=(d, d)), causal=causal)


@dtypes
@pytest.mark.parametrize(
    "heads", [(1, 1), (2, 1), (8, 2), (6, 3), (12, 12), (40, 8), (64, 1), (7, 7), (5, 1)]
)
def test_grouped_heads(dtype, heads):
    for n, lq in enumerate((1, 2, 3, 7, 16, 33)):
        for causal in (False, True):
            check(*qkv(n, dtype, batch=(2,), heads=heads, lengths=(lq, 50), dims=(16, 8)), causal=causal)


@dtypes
def test_grouped_heads_equal_repeated_heads(dtype):
    """Query head h reads key head h // group, and no other."""
    q, k, v = qkv(5, dtype, batch=(2,), heads=(6, 2), lengths=(5, 9))
    out = qkv_fast.attention(q, k, v)
    for h in range(6):
        one = qkv_fast.attention(q[:, h], k[:, h // 3], v[:, h // 3])
        np.testing.assert_allclose(out[:, h], one, rtol=0, atol=8 * np.finfo(dtype).eps * np.abs(v).max())
        # (the kernel depends on the group size, so not the same bits: twice the rule's constant term)


@dtypes
@pytest.mark.parametrize(
    "batches",
    [
        ((), (), ()),
        ((3,), (), ()),
        ((1,), (3,), (3,)),
        ((1,), (), (3,)),
        ((2, 1), (1, 3), (1, 1)),
        ((2, 3), (2, 1), (1, 3)),
        ((1, 1, 1), (), (1, 4, 1)),
        ((2, 1, 2), (1, 3, 1), (2, 3, 2)),
        ((1,) * 12, (1,) * 11 + (2,), ()),
        ((0,), (), (1,)),
        ((2, 0), (2, 1), ()),
    ],
)
def test_leading_axes_broadcast(dtype, batches):
    rng = np.random.default_rng(7)
    shapes = (4, 6, 8), (2, 10, 8), (2, 10, 5)
    q, k, v = (normal(rng, batch + shape, dtype) for batch, shape in zip(batches, shapes, strict=True))
    out, _ = check(q, k, v, causal=True)
    assert out.shape == (*np.broadcast_shapes(*batches), 4, 6, 5)
    check(*(x.swapaxes(-3, -2) for x in (q, k, v)), layout="blhd", window=(3, 2))


@dtypes
def test_as_many_axes_as_numpy_has(dtype):
    q, k, v = qkv(8, dtype)
    deep = [x.reshape((1,) * 61 + x.shape[-3:]) for x in (q, k, v)]
    out = qkv_fast.attention(*deep)
    assert out.shape == deep[0].shape
    same_bits(out.reshape(q.shape), qkv_fast.attention(q, k, v))


@dtypes
def test_two_dimensional(dtype):
    q, k, v = (x[0] for x in qkv(9, dtype, lengths=(7, 20), dims=(16, 3)))
    out, lse = check(q, k, v, causal=True)
    assert out.shape == (7, 3) and lse.shape == (7,)
    same_bits((out, lse), qkv_fast.attention(q, k, v, causal=True, layout="blhd", return_lse=True))
    heads = qkv_fast.attention(q[None], k[None], v[None], causal=True, return_lse=True)
    same_bits((out, lse), (heads[0][0], heads[1][0]))


@dtypes
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_layout(dtype, heads):
    """ "blhd" is the same calculation on swapped axes; the LSE stays head-first."""
    q, k, v = qkv(10, dtype, batch=(2,), heads=heads, lengths=(19, 30), dims=(8, 12))
    out, lse = check(q, k, v, causal=True)
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    out2, lse2 = check(*swapped, causal=True, layout="blhd")
    assert out2.shape == (2, 19, heads[0], 12) and out2.flags.c_contiguous
    same_bits((out2.swapaxes(1, 2), lse2), (out, lse))
    for x, y in zip(swapped, (q, k, v), strict=True):  # and three axes: (L, H, D)
        assert x[0].shape == (y.shape[2], y.shape[1], y.shape[3])
    same_bits(qkv_fast.attention(*(x[0] for x in swapped), causal=True, layout="blhd"), out2[0])


@dtypes
@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_far_apart(dtype, threads):
    """Rows of K and V that lie far from each other are copied for many queries, and nothing else changes."""
    rng = np.random.default_rng(5)
    q, k, v = (normal(rng, (1, 900, 5, 24), dtype).swapaxes(1, 2) for _ in "qkv")
    plain = [x.copy() for x in (q, k, v)]
    bias = normal(rng, (900, 900), "float32")
    notes = repr(qkv_fast.explain(q, k, v, num_threads=threads).notes)
    # More threads have fewer queries each; tiles are copied in any case.
    tiled = qkv_fast.isa().startswith("amx") and dtype == "float32"
    assert threads > 1 or tiled or "rows that lie far from each other" in notes
    for arguments in ({}, {"causal": True, "kv_starts": [70]}, {"window": (90, 20), "bias": bias}):
        found = qkv_fast.attention(q, k, v, return_lse=True, num_threads=threads, **arguments)
        same_bits(found, qkv_fast.attention(*plain, return_lse=True, **arguments))


@pytest.mark.parametrize("dim", [1, 7, 8, 77, 160])
@pytest.mark.parametrize("dtype", TYPES)
def test_few_rows_over_keys_in_columns(dtype, dim):
    """Keys stored (D, L) give the bits of rows, of up to four query heads to a key head and of more."""
    rng = np.random.default_rng(dim)
    for group, length in itertools.product((1, 2, 3, 4, 5), (1, 9, 600, 1300)):
        q, k = normal(rng, (2, 2 * group, 1, dim), dtype), normal(rng, (2, 2, length, dim), dtype)
        columns = k.swapaxes(2, 3).copy().swapaxes(2, 3)
        given = {"window": (700, 0), "kv_lengths": [length, length - length // 3]}
        same_bits(qkv_fast.attention(q, columns, k, return_lse=True), qkv_fast.attention(q, k, k, return_lse=True))
        same_bits(qkv_fast.attention(q, columns, k, **given), qkv_fast.attention(q, k, k, **given))
        if length > 1:  # a row alone lies side by side in any order
            assert (qkv_fast.explain(q, columns, k, num_threads=1).tiles_copied == 0) is (group <= 4 or dim == 1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_few_rows_of_many_tokens_side_by_side(dtype, threads):
    """Heads whose rows of a key lie side by side go through long caches together, with the bits that each has alone."""
    rng, heads, length, dim = np.random.default_rng(3), 20, 2400, 40  # more than 6 MB, more than 16 heads
    q = normal(rng, (1, 2 * heads, 1, dim), dtype)
    k, v = (normal(rng, (1, length, heads, dim), dtype).swapaxes(1, 2) for _ in "kv")
    mask = rng.random((1, 2 * heads, 1, length)) < 0.5
    mask[:, 5, :, :1100], mask[:, :2, :, 1024:2048] = False, False
    v[:, 7, 1500] = np.nan  # not seen, or seen by one group alone
    plain = k.copy(), v.copy()
    given = [
        {"kv_lengths": [1499]},
        {"kv_lengths": [2111], "kv_starts": [77], "window": (500, 0), "alibi_slopes": rng.random(2 * heads)},
        {"mask": mask, "sinks": rng.standard_normal(2 * heads)},
        {"bias": rng.standard_normal((1, 2 * heads, 1, length)).astype("float32"), "softcap": 3.0},
    ]
    for arguments in given:
        found = qkv_fast.attention(q, k, v, return_lse=True, num_threads=threads, **arguments)
        same_bits(found, qkv_fast.attention(q, *plain, return_lse=True, **arguments))
    assert qkv_fast.explain(q, k, v, num_threads=1).tasks < qkv_fast.explain(q, *plain, num_threads=1).tasks


def test_heads_together_leave_work_for_all():
    """Where one sequence of a batch is long, its heads are tasks for every thread."""
    kv = np.zeros((4, 24576, 8, 64), np.float32).swapaxes(1, 2)
    q = np.zeros((4, 8, 1, 64), np.float32)
    alike, uneven = (
        qkv_fast.explain(q, kv, kv, kv_lengths=lengths, num_threads=2) for lengths in (24576, [24576, 16, 16, 16])
    )
    assert alike.tasks == 4 and uneven.tasks >= 16  # of which the long one has a quarter


@dtypes
@pytest.mark.parametrize(
    "scale", [0, 0.0, -0.0, 1, -1, 0.3, -0.125, 1e-30, -1e3, 1e20, np.float32(0.5), np.int8(2)]
)
def test_scale(dtype, scale):
    q, k, v = qkv(11, dtype, lengths=(20, 40))
    if abs(scale) >= 1e3:  # integers and powers of two: the scores stay exact, so the softmax is well defined
        q, k, scale = np.rint(q), np.rint(k), np.sign(scale) * 2.0 ** np.rint(np.log2(abs(scale)))
    check(q, k, v, scale=scale, causal=True)


@dtypes
@pytest.mark.parametrize("scale", [1e39, -1e39, 1e300, 1e-39, 1e-300])
def test_scale_outside_float32(dtype, scale):
    """Any finite scale: it need not fit q's type as long as the scaled scores do."""
    q, k, v = qkv(11, dtype, lengths=(20, 40))
    check(np.zeros_like(q), k, v, scale=scale)
    if abs(scale) > 1e40:
        return  # no score but 0 keeps below 2**120
    q, k = 1 + np.abs(q), 1 + np.abs(k)  # products are normal numbers
    factor = 2.0 ** -np.clip(np.rint(np.log2(abs(scale))), -120, 120)
    scale = np.sign(scale) * 2.0 ** np.rint(np.log2(abs(scale)))  # a power of two: products stay exact
    check((q * factor).astype(dtype), k, v, scale=scale)


@dtypes
def test_default_scale(dtype):
    q, k, v = qkv(12, dtype, dims=(16, 16))
    same_bits(qkv_fast.attention(q, k, v), qkv_fast.attention(q, k, v, scale=0.25))
    same_bits(qkv_fast.attention(q, k, v), qkv_fast.attention(q, k, v, scale=None))


@dtypes
def test_nothing_to_do(dtype):
    """Each extent 0 in turn gives a correctly shaped result; nothing else does."""
    sizes = dict(b=2, h=2, lq=3, lk=4, d=5, dv=6)
    for empty in ("b", "h", "lq", "lk", "d", "dv"):
        s = dict(sizes, **{empty: 0})
        rng = np.random.default_rng(13)
        q = normal(rng, (s["b"], s["h"], s["lq"], s["d"]), dtype)
        k = normal(rng, (s["b"], s["h"], s["lk"], s["d"]), dtype)
        v = normal(rng, (s["b"], s["h"], s["lk"], s["dv"]), dtype)
        for options in ({}, dict(causal=True), dict(layout="blhd")):
            args = (q, k, v) if not options.get("layout") else [x.swapaxes(1, 2) for x in (q, k, v)]
            out, lse = check(*args, **options)
            if empty == "lk":
                assert not out.any() and (lse == -np.inf).all()
    out, lse = qkv_fast.attention(*(np.zeros((0, 0), dtype),) * 3, return_lse=True)
    assert out.shape == (0, 0) and lse.shape == (0,)


@dtypes
def test_no_dimension_means_the_mean(dtype):
    """D = 0: every score is 0, so the output is the mean of the visible values and the LSE is log n."""
    v = np.arange(12, dtype=dtype).reshape(1, 6, 2)
    out, lse = qkv_fast.attention(
        np.zeros((1, 6, 0), dtype), np.zeros((1, 6, 0), dtype), v, causal=True, return_lse=True
    )
    n = np.arange(1, 7)
    mean = np.cumsum(v[0], axis=0) / n[:, None]
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(out[0], mean, rtol=0, atol=4 * eps * v.max())  # the rule's constant term
    np.testing.assert_allclose(lse[0], np.log(n), rtol=0, atol=4 * eps * np.log(6))


def test_narrower_keys_and_values():
    """k and v have one type, q's or narrower: float64 q with float32 k and v computes in float64."""
    q, k, v = qkv(14, "float64", heads=(4, 2), lengths=(9, 40))
    k, v = k.astype("float32"), v.astype("float32")
    out, _ = check(q, k, v, causal=True)
    assert out.dtype == np.float64
    same_bits(out, qkv_fast.attention(q, k.astype("float64"), v.astype("float64"), causal=True))


@dtypes
def test_array_likes(dtype):
    q, k, v = qkv(15, dtype)

    class Wrapped:
        def __array__(self, dtype=None, copy=None):
            return q

    same_bits(qkv_fast.attention(Wrapped(), k, v), qkv_fast.attention(q, k, v))
    lists = [x.astype("float64").tolist() for x in (q, k, v)]
    expected = qkv_fast.attention(*(x.astype("float64") for x in (q, k, v)))
    same_bits(qkv_fast.attention(*lists), expected)


class Subclass(np.ndarray):
    pass


@dtypes
def test_results_are_plain_new_arrays(dtype):
    q, k, v = qkv(16, dtype)
    swapped = [x.astype(np.dtype(dtype).newbyteorder("S")) for x in (q, k, v)]
    subclass = [x.view(Subclass) for x in (q, k, v)]
    for args in ((q, k, v), swapped, subclass):
        out, lse = qkv_fast.attention(*args, return_lse=True)
        for x in (out, lse):
            assert type(x) is np.ndarray and x.flags.c_contiguous and x.flags.owndata and x.flags.writeable
            assert x.dtype == np.dtype(dtype) and x.dtype.isnative
        assert not any(np.shares_memory(out, x) for x in args)
    assert isinstance(qkv_fast.attention(q, k, v), np.ndarray)


@dtypes
def test_out_is_filled_and_returned(dtype):
    q, k, v = qkv(17, dtype, batch=(2,), heads=(4, 2), dims=(8, 5))
    expected, lse = qkv_fast.attention(q, k, v, return_lse=True)
    out = np.full_like(expected, np.nan)
    assert qkv_fast.attention(q, k, v, out=out) is out
    same_bits(out, expected)
    out[...] = np.nan
    result = qkv_fast.attention(q, k, v, out=out, return_lse=True)
    assert result[0] is out
    same_bits(result, (expected, lse))
    out = np.full((2, *expected.shape[1:3][::-1], 5), np.nan, dtype)
    args = [x.swapaxes(1, 2) for x in (q, k, v)]
    assert qkv_fast.attention(*args, layout="blhd", out=out) is out
    same_bits(out.swapaxes(1, 2), expected)


@dtypes
def test_out_is_filled_where_there_are_no_keys(dtype):
    q, k, v = qkv(18, dtype, lengths=(5, 0))
    out = np.full((1, 5, 16), np.nan, dtype)
    qkv_fast.attention(q, k, v, out=out)
    assert not out.any()


@dtypes
def test_inputs_are_not_changed(dtype):
    q, k, v = qkv(19, dtype, heads=(4, 2), lengths=(40, 200))
    copies = [x.copy() for x in (q, k, v)]
    lengths, offset = np.array(150), np.array(110)
    qkv_fast.attention(q, k, v, causal=True, kv_lengths=lengths, q_offset=offset)
    same_bits((q, k, v), tuple(copies))
    assert lengths == 150 and offset == 110


def test_keyword_only():
    q, k, v = qkv(20)
    with pytest.raises(TypeError):
        qkv_fast.attention(q, k, v, True)
