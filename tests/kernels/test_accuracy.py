"""The error rule: at most twice plain NumPy's error in the same type, plus 4 eps max|v| (_util.compare)."""

import numpy as np
import pytest
from _util import TYPES, check, compare, normal, qkv

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)
rows = pytest.mark.parametrize("lq", [1, 5, 40])  # few rows, a few, and more than a panel of them


@dtypes
@rows
@pytest.mark.parametrize("size", [0.01, 1, 10, 30])
def test_random(dtype, lq, size):
    """Flat, usual and peaked softmaxes.

    In a peaked one a few rows with two nearly equal scores make the whole error, ours and NumPy's, by chance;
    so there are dozens of rows of each kind.
    """
    for n, (lk, d) in enumerate([(1, 64), (2, 64), (100, 64), (777, 64), (300, 128), (300, 8), (1500, 32)]):
        q, k, v = qkv(
            n, dtype, batch=({1: 16, 5: 8, 40: 1}[lq],), heads=(2, 1), lengths=(lq, lk), dims=(d, d)
        )
        q *= q.dtype.type(size)
        check(q, k, v)
        check(q, k, v + v.dtype.type(100), causal=True)  # values far from 0: an error of the weights shows


@dtypes
@rows
@pytest.mark.parametrize("size", [0.01, 1])
def test_random_by_thin_products(dtype, lq, size):
    """Scores of usual size are within the rule also where BLAS sums products of thin matrices more finely."""
    for n, (lk, d) in enumerate([(2, 64), (13, 64), (100, 64), (777, 64), (300, 128), (300, 8)]):
        args = qkv(n, dtype, batch=(40 // lq,), heads=(2, 1), lengths=(lq, lk), dims=(d, d))
        args[0][...] *= args[0].dtype.type(size)
        compare(qkv_fast.attention(*args, return_lse=True), args, product=np.matmul)


@dtypes
@pytest.mark.parametrize("d", [256, 512, 1024])
@pytest.mark.parametrize("lk", [13, 200])
def test_long_scalar_products(dtype, d, lk):
    """Large head dimensions: NumPy's BLAS does not sum a thousand products one after the other either."""
    for size in (0.1, 1, 10, 100):
        q, k, v = qkv(d, dtype, batch=(4,), heads=(2, 1), lengths=(20, lk), dims=(d, 32))
        q *= q.dtype.type(size)
        check(q, k, v)


@dtypes
@rows
def test_values_of_many_sizes(dtype, lq):
    rng = np.random.default_rng(1)
    q, k, v = qkv(1, dtype, lengths=(lq, 500), dims=(32, 32))
    check(q, k, v * 10 ** rng.uniform(-6, 6, v.shape).astype(dtype))
    check(q, k, np.abs(v))
    check(q, k, v * v.dtype.type(2.0**100))
    check(q, k, v * v.dtype.type(2.0**-100))


@dtypes
@rows
@pytest.mark.parametrize("log2", [10, 60, 100, 119])
def test_huge_scores(dtype, lq, log2):
    """|scaled score| up to 2**120. The scores are exact, powers of two: no chance in the comparison."""
    rng = np.random.default_rng(log2)
    sign = rng.choice([-1.0, 1.0], (1, 300, 1))
    power = rng.integers(0, 3, (1, 300, 1))
    k = np.zeros((1, 300, 4), dtype)
    k[..., :1] = sign * 2.0**power * 2.0 ** (log2 // 2 - 2)
    q = np.zeros((1, lq, 4), dtype)
    q[..., 0] = rng.choice([-1.0, 0.0, 1.0], (1, lq)) * 2.0 ** (log2 - log2 // 2)
    v = normal(rng, (1, 300, 8), dtype)
    check(q, k, v, scale=1)
    check(q, k, v, scale=-1, causal=True)
    check(q * q.dtype.type(2.0**-30), k, v, scale=2.0**30, window=(100, 20))
    check(q[..., :1], k[..., :1], v)  # and by the default scale, 1


@dtypes
@rows
def test_every_score_the_same_and_huge(dtype, lq):
    """As a bias of finfo.min everywhere would: the mean of the values."""
    v = normal(np.random.default_rng(2), (1, 300, 8), dtype)
    for score in (2.0**119, -(2.0**119), 2.0**100, -1e30, -745.0, 710.0, 88.8, -104.0):
        q, k = np.full((1, lq, 1), 1, dtype), np.full((1, 300, 1), score, dtype)
        out, lse = check(q, k, v)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(
            lse, np.full_like(lse, score + np.log(300)), rtol=4 * eps
        )  # the rule's constant
        # the exact mean, by the rule with a NumPy error of a few eps of the largest value
        np.testing.assert_allclose(
            out[0], np.broadcast_to(v[0].mean(axis=0), (lq, 8)), rtol=0, atol=8 * eps * 5
        )


@dtypes
@rows
@pytest.mark.parametrize("step", [1.0, 6.0, 9.0, 100.0, -1.0, -9.0])
def test_growing_scores(dtype, lq, step):
    """The running maximum changes with every key, by less and by more than what makes a kernel rescale."""
    keys = 500
    q, k, v = qkv(3, dtype, lengths=(lq, keys), dims=(4, 16))
    q[...], k[...] = 0, 0  # exact scores: no chance in the comparison
    k[..., 0] = np.arange(keys) * step
    q[..., 0] = 1
    check(q, k, v, scale=1)
    check(q, k, v, scale=np.log(2))  # steps of whole powers of two in base 2
    q[..., 0] = np.arange(lq) % 3 - 1  # neighbouring rows grow, stay or fall
    check(q, k, v, scale=1)


@dtypes
@rows
def test_one_key_outweighs_all(dtype, lq):
    """The largest score at each place in a block, and the rest at, above and below the underflow of exp."""
    for gap in (5.0, 80.0, 87.3, 88.0, 103.0, 104.0, 700.0, 708.0, 745.0, 1000.0):
        q, k, v = qkv(4, dtype, lengths=(lq, 200), dims=(2, 64))
        q[..., 0], k[..., 0] = 1, 0
        q[..., 1], k[..., 1] = 0, 0
        for key in (0, 63, 64, 95, 96, 199):
            k2 = k.copy()
            k2[:, key, 0] = gap
            check(q, k2, v, scale=1)
            check(q, -k2, v, scale=1)


@dtypes
@rows
def test_rows_of_one_value(dtype, lq):
    """Constant keys, constant queries, zeros: every weight is 1/n."""
    q, k, v = qkv(5, dtype, lengths=(lq, 333), dims=(16, 16))
    check(q, np.broadcast_to(k[:, :1], k.shape), v)
    check(np.zeros_like(q), k, v)
    check(q, k, np.broadcast_to(v[:, :1], v.shape))
    check(np.full_like(q, 3), np.full_like(k, -2), np.full_like(v, 0.1))


@dtypes
@rows
def test_cancelling_products(dtype, lq):
    """Scores that are small differences of large products."""
    q, k, v = qkv(6, dtype, lengths=(lq, 300), dims=(64, 16))
    q[..., 32:] = q[..., :32]
    k[..., 32:] = -k[..., :32]
    k[..., 0] += 1
    q *= 100
    check(q, k, v)


@dtypes
@rows
def test_subnormals(dtype, lq):
    """Products may take subnormal queries, keys and values as 0 and give 0 for them; no more than that is lost."""
    tiny, least = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).tiny
    rng = np.random.default_rng(7)
    small = (rng.integers(-1000, 1000, (1, 300, 8)) * tiny).astype(dtype)
    q, k, v = qkv(7, dtype, lengths=(lq, 300), dims=(8, 8))
    out = qkv_fast.attention(q, k, small)
    exact = qkv_fast.reference.attention(q, k, small)
    assert np.abs(out - exact).max() <= 300 * least
    check(q, small, v)  # scores move by 2 * least at most, which is nothing
    check(small[:, :lq], k, v)
    mixed = np.concatenate([small[:, :150], v[:, 150:]], axis=1)
    check(q, k, mixed)


@dtypes
def test_unit_weights_return_the_values(dtype):
    """One visible key returns its value, exactly."""
    q, k, v = qkv(8, dtype, lengths=(50, 50), dims=(16, 16))
    np.testing.assert_array_equal(qkv_fast.attention(q, k, v, window=0), v)
    np.testing.assert_array_equal(qkv_fast.attention(q[:, :1], k[:, :1], v[:, :1]), v[:, :1])


@pytest.mark.parametrize("lq", [2, 40])
def test_64k_keys_float32(lq):
    q, k, v = qkv(9, "float32", lengths=(lq, 65536), dims=(64, 64))
    with _runtime.counters() as seen:
        out, lse = qkv_fast.attention(q, k, v, return_lse=True, num_threads=4)
    assert seen["splits"] > 0
    compare((out, lse), (q, k, v))
    v = np.abs(v)  # no cancellation among the values: the error of one long accumulation would show
    compare(qkv_fast.attention(q, k, v, return_lse=True, causal=True), (q, k, v), causal=True)
    v[...] = 1
    out = qkv_fast.attention(q, k, v)
    assert np.abs(out - 1).max() <= 4 * np.finfo("float32").eps  # NumPy is exact by luck: the constant term


@pytest.mark.parametrize("lq", [1, 20])
def test_64k_keys_float64(lq):
    q, k, v = qkv(10, "float64", lengths=(lq, 65536), dims=(8, 8))
    check(q, k, np.abs(v))


@dtypes
def test_exp2(dtype):
    """Within the error of its polynomial, exactly 0 an octave below the normal range, 1 at 0, NaN at NaN."""
    lowest = -126 if dtype == "float32" else -1022
    rng = np.random.default_rng(11)
    parts = [
        np.linspace(lowest, 9, 200_001),
        -(2.0 ** rng.uniform(-60, 6, 10_000)),
        np.arange(lowest, 9, 0.5),
        np.nextafter(np.arange(lowest + 1, 9, 0.5, dtype), np.array(-np.inf, dtype)),
        np.array([0.0, -0.0, -np.finfo(dtype).tiny, -np.finfo(dtype).smallest_subnormal]),
    ]
    x = np.ascontiguousarray(np.concatenate(parts).astype(dtype))
    wide = np.float64 if dtype == "float32" else np.longdouble
    exact = np.exp2(x.astype(wide))
    y = _runtime.exp2(x)
    assert y.dtype == np.dtype(dtype)
    error = np.abs(y / exact - 1).max()
    # The last step rounds, the table's power is rounded, the rest is below (exp2_poly.h): 0.95 eps in float32, 0.9 in
    # float64. A degree less would be at 1.3 eps and more.
    assert error <= np.finfo(dtype).eps
    assert (_runtime.exp2(np.zeros(40, dtype)) == 1).all()
    whole = np.arange(lowest, 9).astype(dtype)
    np.testing.assert_array_equal(_runtime.exp2(whole), np.exp2(whole))  # powers of two are exact
    below = np.array(
        [lowest - 1, lowest - 3, -150, -1075, -2000, -1e30, -np.finfo(dtype).max, -np.inf], dtype
    )
    assert not _runtime.exp2(below[below < lowest]).any()
    # In the octave between, whose results would be subnormal: no more than the smallest normal number.
    near = np.linspace(lowest - 1, lowest, 1001).astype(dtype)
    assert ((0 <= _runtime.exp2(near)) & (_runtime.exp2(near) <= np.finfo(dtype).tiny)).all()
    assert np.isnan(_runtime.exp2(np.full(40, np.nan, dtype))).all()


@dtypes
def test_exp2_does_not_depend_on_the_place(dtype):
    """An element has the same bits in a whole vector and in a tail."""
    x = np.random.default_rng(12).uniform(-30, 3, 67).astype(dtype)
    y = _runtime.exp2(x)
    for n in range(1, 67):
        np.testing.assert_array_equal(_runtime.exp2(x[:n].copy()), y[:n])
        np.testing.assert_array_equal(_runtime.exp2(x[n:].copy()), y[n:])
