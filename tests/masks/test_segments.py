"""segments=: only equal ids attend, whatever the ids, their order and how they broadcast."""

import numpy as np
import pytest
from _util import TYPES, check, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)

LENGTHS = [(1, 1), (1, 200), (40, 40), (7, 130), (130, 97), (200, 1100)]
ORDERS = {
    "sorted": np.sort,
    "falling": lambda ids: np.sort(ids)[::-1],
    "any order": lambda ids: ids,
    "blocks in any order": lambda ids: (np.sort(ids) * 7 + 3) % 11 - 5,
}


@dtypes
@pytest.mark.parametrize("q_order", ORDERS)
@pytest.mark.parametrize("k_order", ORDERS)
def test_orders(dtype, q_order, k_order):
    """Spans say it all where equal keys follow one another; else ids do. Queries may come in any order."""
    rng = np.random.default_rng(1)
    for n, (lq, lk) in enumerate(LENGTHS):
        q, k, v = qkv(n, dtype, heads=(2, 1), lengths=(lq, lk), dims=(8, 4))
        ids = ORDERS[q_order](rng.integers(0, 4, lq)), ORDERS[k_order](rng.integers(0, 4, lk))
        for options in ({}, dict(causal=True), dict(window=(40, 3)), dict(causal=True, q_offset=lk // 2)):
            check(q, k, v, segments=ids, **options)


@dtypes
def test_one_unequal_key(dtype):
    """A single stranger between equal keys, at every place of a block and beside its edges."""
    q, k, v = qkv(2, dtype, lengths=(3, 300), dims=(8, 4))
    for at in (0, 1, 15, 16, 31, 32, 63, 95, 96, 127, 128, 200, 298, 299):
        ids = np.zeros(300, int)
        ids[at] = 1
        k2, v2 = k.copy(), v.copy()
        k2[:, at], v2[:, at] = np.nan, np.nan
        out, lse = check(q, k2, v2, segments=([0, 0, 0], ids))
        rest = np.delete(np.arange(300), at)
        eps = np.finfo(dtype).eps  # the same terms in another order: twice the constant of the error rule
        expected = qkv_fast.attention(q, k[:, rest], v[:, rest], return_lse=True)
        np.testing.assert_allclose(out, expected[0], rtol=0, atol=8 * eps * np.abs(v).max())
        np.testing.assert_allclose(lse, expected[1], rtol=0, atol=8 * eps * np.abs(lse).max())


@dtypes
@pytest.mark.parametrize("order", ["sorted", "any order"])
def test_ids_that_no_key_has(dtype, order):
    """Such a query sees nothing; keys that no query has are left alone, NaN and all."""
    rng = np.random.default_rng(3)
    q, k, v = qkv(3, dtype, lengths=(50, 260))
    k_ids = ORDERS[order](rng.integers(0, 3, 260))
    q_ids = rng.integers(1, 5, 50)
    k[:, k_ids == 0], v[:, k_ids == 0] = np.nan, np.nan
    out, lse = check(q, k, v, segments=(q_ids, k_ids))
    absent = q_ids > 2
    assert not out[:, absent].any() and (lse[:, absent] == -np.inf).all() and np.isfinite(lse[:, ~absent]).all()
    out, lse = check(q, k, v, segments=(np.full(50, 9), k_ids))
    assert not out.any() and (lse == -np.inf).all()


@dtypes
@pytest.mark.parametrize("order", ["sorted", "any order"])
def test_broadcasting(dtype, order):
    """Ids for all sequences, for one each, for an axis of the batch; for queries one way and for keys another."""
    rng = np.random.default_rng(4)
    q, k, v = qkv(4, dtype, batch=(3, 2), heads=(4, 2), lengths=(20, 130), dims=(8, 4))
    axes = [(), (2,), (3, 1), (1, 2), (3, 2), (1,)]

    def ids(shape):
        return np.apply_along_axis(ORDERS[order], -1, rng.integers(0, 3, shape))

    for q_axes, k_axes in zip(axes, axes[::-1], strict=True):
        check(q, k, v, segments=(ids((*q_axes, 20)), ids((*k_axes, 130))))
    segments = ids((3, 2, 20)), ids((3, 2, 130))
    whole = check(q, k, v, segments=segments, causal=True)
    for b in np.ndindex(3, 2):
        own = qkv_fast.attention(
            q[b], k[b], v[b], segments=tuple(x[b] for x in segments), causal=True, return_lse=True
        )
        same_bits((whole[0][b], whole[1][b]), own)
    blhd = tuple(x.swapaxes(-3, -2) for x in (q, k, v))
    out = qkv_fast.attention(*blhd, segments=segments, causal=True, layout="blhd")
    same_bits(np.ascontiguousarray(out.swapaxes(-3, -2)), whole[0])


@dtypes
def test_kinds_of_ids(dtype):
    """Any integers: lists, small types, negative and far apart, of any strides; read-only; two dimensions."""
    q, k, v = (x[0] for x in qkv(5, dtype, lengths=(6, 9), dims=(8, 4)))
    q_ids, k_ids = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    expected = check(q, k, v, segments=(q_ids, k_ids))
    far = np.array([-(2**63), 7, 2**63 - 1])
    for q_given, k_given in (
        (q_ids.tolist(), tuple(k_ids.tolist())),
        (q_ids.astype("i1"), k_ids.astype("u8")),
        (q_ids.astype(">i4"), k_ids[::-1].copy()[::-1]),
        (far[q_ids], far[k_ids]),
        (q_ids, np.repeat(k_ids, 3).reshape(9, 3)[:, 1]),
    ):
        same_bits(qkv_fast.attention(q, k, v, segments=(q_given, k_given), return_lse=True), expected)
    same_bits(qkv_fast.attention(q, k, v, segments=[q_ids, k_ids], return_lse=True), expected)
    scattered = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0])
    expected = check(q, k, v, segments=(q_ids, scattered))
    for ids in (far, np.array([-(2**31), 0, 2**31]), np.array([2**31, 0, 1]), np.array([5, 6, 7], "i1")):
        got = qkv_fast.attention(q, k, v, segments=(ids[q_ids], ids[scattered]), return_lse=True)
        same_bits(got, expected)


@dtypes
def test_with_lengths(dtype):
    """A padded batch of packed documents: ids of the padding count for nothing."""
    rng = np.random.default_rng(6)
    q, k, v = qkv(6, dtype, batch=(3,), heads=(2, 1), lengths=(150, 150), dims=(8, 4))
    lengths = [150, 97, 30]
    ids = np.sort(rng.integers(0, 4, (3, 150)), axis=-1)
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:], ids[b, n:] = np.nan, np.nan, 0
    check(q, k, v, kv_lengths=lengths, segments=(ids, ids), causal=True, q_offset=0)
    check(q, k, v, kv_lengths=lengths, segments=(ids, ids))


def test_no_elements():
    for lq, lk in ((0, 5), (5, 0), (0, 0)):
        q, k, v = qkv(7, lengths=(lq, lk))
        out, lse = check(q, k, v, segments=([3] * lq, [3] * lk))
        assert out.shape == (1, lq, 16) and (lse == -np.inf).all()
    q, k, v = qkv(7, batch=(0,), lengths=(5, 6))
    assert qkv_fast.attention(q, k, v, segments=(np.zeros((0, 5), int), np.zeros(6, int))).shape == (0, 1, 5, 16)


@dtypes
def test_documents_skip_each_other(dtype):
    """Eight documents in one sequence: an eighth of the tiles, and what straddles an edge."""
    q, k, v = qkv(8, dtype, lengths=(2048, 2048), dims=(8, 4))
    with _runtime.counters() as whole:
        qkv_fast.attention(q, k, v)
    ids = np.repeat(np.arange(8), 256)
    for own in (ids, ids[::-1], np.where(np.arange(2048) % 256 == 7, 99, ids)):  # the last is not said by spans
        with _runtime.counters() as blocks:
            qkv_fast.attention(q, k, v, segments=(own, own))
        assert blocks["tiles_full"] + blocks["tiles_partial"] < 0.25 * whole["tiles_full"]
