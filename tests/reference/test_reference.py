"""The oracle itself, against the sentence that defines it, in Python loops over math.exp."""

import itertools
import math
import warnings

import numpy as np
import pytest
from _util import normal

from qkv_fast import reference, spotlight


def by_hand(q, k, v, *, sees, scale):
    """One head, one query after the other: sees(i, j) says whether query i may attend to key j."""
    out, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    for i, query in enumerate(q):
        weights = {j: math.exp(scale * math.fsum(query * k[j])) for j in range(len(k)) if sees(i, j)}
        if weights:
            total = math.fsum(weights.values())
            out[i] = [math.fsum(w * v[j, d] for j, w in weights.items()) / total for d in range(v.shape[1])]
            lse[i] = math.log(total)
    return out, lse


@pytest.mark.parametrize("causal", [False, True, "top-left"])
@pytest.mark.parametrize("window", [None, 0, 2, (1, None), (None, 1), (2, 1)])
def test_positions_in_loops(causal, window):
    rng = np.random.default_rng(1)
    left, right = window if isinstance(window, tuple) else (window, window)
    right = 0 if causal else right
    lengths = itertools.product(range(1, 6), range(1, 6), (None, 0, -1, 3), (None, 0, 1, 5))
    for lq, lk, offset, valid in lengths:
        if (causal == "top-left" and offset is not None) or (valid is not None and valid > lk):
            continue
        n = lk if valid is None else valid
        start = 0 if causal == "top-left" else n - lq if offset is None else offset

        def sees(i, j, n=n, start=start):
            distance = j - (i + start)
            return j < n and (left is None or distance >= -left) and (right is None or distance <= right)

        q, k, v = (
            normal(rng, (lq, 3), "float64"),
            normal(rng, (lk, 3), "float64"),
            normal(rng, (lk, 2), "float64"),
        )
        options = dict(causal=causal, window=window, q_offset=offset, kv_lengths=valid, return_lse=True)
        two_readings = causal != "top-left" and offset is None
        if two_readings and valid is not None and (causal or window is not None) and 0 < n < lq:
            with pytest.raises(ValueError, match="padded queries"):
                reference.attention(q, k, v, **options)
            continue
        got = reference.attention(q, k, v, **options)
        for a, b in zip(got, by_hand(q, k, v, sees=sees, scale=1 / math.sqrt(3)), strict=True):
            # by_hand rounds to double after every step; 1e-12 is far above that and far below any wrong key's
            # effect
            np.testing.assert_allclose(a.astype("float64"), b, rtol=1e-12, atol=1e-12)


def test_heads_batch_and_layout():
    rng = np.random.default_rng(2)
    q, k, v = normal(rng, (2, 1, 6, 4, 3)), normal(rng, (1, 3, 2, 5, 3)), normal(rng, (2, 3, 2, 5, 7))
    out, lse = reference.attention(q, k, v, return_lse=True, scale=-0.5)
    assert out.shape == (2, 3, 6, 4, 7) and lse.shape == (2, 3, 6, 4) and out.dtype == lse.dtype == np.float64
    for a, b, h in itertools.product(range(2), range(3), range(6)):
        heads = q[a, 0, h], k[0, b, h // 3], v[a, b, h // 3]
        expected = by_hand(*(x.astype("float64") for x in heads), sees=lambda i, j: True, scale=-0.5)
        np.testing.assert_allclose(
            out[a, b, h], expected[0], rtol=1e-12, atol=1e-12
        )  # doubles, a few roundings
        np.testing.assert_allclose(lse[a, b, h], expected[1], rtol=1e-12, atol=1e-12)
    swapped = reference.attention(
        *(x.swapaxes(-3, -2) for x in (q, k, v)), layout="blhd", return_lse=True, scale=-0.5
    )
    assert np.array_equal(swapped[0].swapaxes(-3, -2), out) and np.array_equal(swapped[1], lse)


def test_type_is_the_next_wider():
    q = np.ones((2, 2))
    assert reference.attention(q, q, q).dtype == np.longdouble
    assert reference.attention(q.astype(">f8"), q, q).dtype == np.longdouble
    assert reference.attention(q.astype("float32"), q, q).dtype == np.float64


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_excluded_poison_is_harmless_and_attended_poison_is_not(poison):
    rng = np.random.default_rng(3)
    q, k, v = normal(rng, (6, 4)), normal(rng, (6, 4)), normal(rng, (6, 3))
    clean = reference.attention(q, k, v, causal=True, return_lse=True)
    k2, v2 = k.copy(), v.copy()
    k2[3], v2[4, 1] = np.nan, poison
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse = reference.attention(q, k2, v2, causal=True, return_lse=True)
    assert np.array_equal(out[:3], clean[0][:3]) and np.array_equal(lse[:3], clean[1][:3])
    assert np.isnan(out[3:]).all() and np.isnan(lse[3:]).all()
    out, lse = reference.attention(q, k, v2, causal=True, return_lse=True)
    assert np.array_equal(out[:4], clean[0][:4]) and np.array_equal(lse, clean[1])
    assert np.array_equal(out[4:, [0, 2]], clean[0][4:, [0, 2]])
    np.testing.assert_array_equal(out[4:, 1], poison)


def test_score_of_minus_infinity_excludes():
    q, k = np.ones((1, 1)), np.array([[1.0], [-np.inf], [2.0]])
    v = np.array([[1.0], [np.nan], [3.0]])
    out = reference.attention(q, k, v, scale=1.0)
    assert np.array_equal(out, reference.attention(q, k[[0, 2]], v[[0, 2]], scale=1.0))


def test_empty():
    for lq, lk, d in itertools.product((0, 3), (0, 4), (0, 2)):
        v = np.arange(lk * 5.0).reshape(lk, 5)
        out, lse = reference.attention(np.zeros((lq, d)), np.zeros((lk, d)), v, return_lse=True)
        assert out.shape == (lq, 5) and lse.shape == (lq,)
        if lq and lk:
            np.testing.assert_array_equal(out, np.broadcast_to(v.mean(axis=0), (lq, 5)))
            np.testing.assert_allclose(
                lse.astype("float64"), math.log(lk), rtol=1e-15
            )  # one rounding to double
        elif lq:
            assert not out.any() and (lse == -np.inf).all()


def test_errors():
    q = np.zeros((2, 3, 4, 8))
    for options, text in [
        (dict(causal="bottom"), "causal"),
        (dict(causal="top-left", q_offset=0), "q_offset"),
        (dict(window=-1), "window"),
        (dict(kv_lengths=[3, 5]), "kv_lengths"),
        (dict(kv_lengths=[3, 3], causal=True), "padded queries"),
        (dict(kv_lengths=[1, 2, 3]), "kv_lengths"),
        (dict(layout="lbhd"), "layout"),
    ]:
        with pytest.raises(ValueError, match=text):
            reference.attention(q, q, q, **options)
    with pytest.raises(ValueError, match="heads"):
        reference.attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match="2-D"):
        reference.attention(q, q[0, 0], q)


@pytest.mark.parametrize("bias", [1e30, -1e30, np.finfo("f4").min, 0.0])
def test_entropy_of_a_bias_that_all_keys_have(bias):
    """It is log n, however large the bias."""
    q, k = np.zeros((2, 1), "f4"), np.zeros((5, 1), "f4")
    got = reference.spotlight.entropy(q, k, bias=np.full((2, 5), bias, "f4"))
    np.testing.assert_allclose(got.astype("f8"), np.log(5), rtol=1e-6)
    np.testing.assert_allclose(spotlight.entropy(q, k, bias=np.full((2, 5), bias, "f4")), np.log(5), rtol=1e-6)
    assert not np.signbit(reference.spotlight.entropy(q, k, mask=False)).any()
