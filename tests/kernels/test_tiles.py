"""Attention by tiles of bfloat16: which kernel takes what, and how much float32 loses by six products of parts."""

import numpy as np
import pytest
from _util import check, normal, plain, qkv

import qkv_fast
from qkv_fast import reference
from qkv_fast._runtime import force_isa

TILED = [name for name in qkv_fast.available_isas() if name.startswith("amx")]


@pytest.fixture(params=TILED or [pytest.param("amx", marks=pytest.mark.skip(reason="no path here multiplies tiles"))])
def tiled(request):
    with force_isa(request.param):
        yield request.param


def test_which_kernel(tiled):
    """Parts are as many as the widest of the three types wants; few rows and float64 have no tiles."""
    for types, kind, products in (
        ("bfloat16 bfloat16 bfloat16", "bf16", 2),
        ("float16 float16 float16", "f16", 9),
        ("float32 float32 float32", "f32", 12),
        ("float32 bfloat16 bfloat16", "f32", 12),
    ):
        q, k, v = (np.zeros((100, 16), np.float32).astype(_type(name)) for name in types.split())
        plan = qkv_fast.explain(q, k, v)
        assert (plan.kernel, plan.products) == (f"attend_{kind}_{tiled}", products), types
        assert not qkv_fast.explain(q[:2], k, v).kernel.endswith(tiled)
    wide = np.zeros((100, 16))
    assert not qkv_fast.explain(wide, wide, wide).kernel.endswith(tiled)
    plan = qkv_fast.explain(q, k, v, num_threads=1)
    assert "32 query rows x 32 keys in tiles" in repr(plan) and len(plan.notes) <= 1  # on a path that is not the best


def _type(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name


@pytest.mark.parametrize("d", [16, 40, 64, 128, 256])
@pytest.mark.parametrize("size", [1, 3, 10, 30])
def test_six_products(tiled, size, d):
    """Errors of float32 are below NumPy's: what six products leave out is below the last bit, and sums are shorter."""
    q, k, v = qkv(d, heads=(1, 1), lengths=(200, 1000), dims=(d, d))
    q *= np.float32(size)
    expected = reference.attention(*(x.astype(np.float64) for x in (q, k, v)))

    def error(out):
        return np.sqrt(np.mean((out - expected) ** 2))

    ours, numpys = error(qkv_fast.attention(q, k, v)), error(plain(q, k, v)[0])
    assert ours <= numpys, f"{ours:.3g} against {numpys:.3g}"


@pytest.mark.parametrize("magnitude", [1e-18, 1e-12, 1, 1e12, 1e18])
def test_parts_of_any_magnitude(tiled, magnitude):
    """A scale takes back what keys were multiplied by, and values are as large as they are: relative errors stay."""
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, (50, 32)) for _ in range(3))
    factor = np.float32(2.0 ** np.round(np.log2(magnitude)))
    got = qkv_fast.attention(q, k * factor, v * factor, scale=1 / (float(factor) * 6))
    expected = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), scale=1 / 6) * float(factor)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * float(factor))


def test_what_is_cut_off(tiled):
    """NaN whose last bits are cut off would be infinity; the infinities of a product are those of first parts."""
    q = np.full((40, 16), 1 + 2**-20, np.float32)  # all three parts count
    k, v = np.zeros((50, 16), np.float32), np.ones((50, 16), np.float32)
    v[3, 2] = np.array(0x7F800001, np.uint32).view(np.float32)
    k[7], v[9, 5] = -np.inf, np.inf
    out = qkv_fast.attention(q, k, v)
    assert np.isnan(out[:, 2]).all() and (out[:, 5] == np.inf).all()
    np.testing.assert_allclose(np.delete(out, [2, 5], axis=1), 1, rtol=1e-6)


def test_stages_have_no_tiles(tiled):
    """Nor their peak: what runs is said, and what it could do."""
    q = np.zeros((512, 64), np.float32)
    plan = qkv_fast.explain(qkv_fast.scores, q, q, num_threads=1)
    name = next(name for name in qkv_fast.available_isas()[::-1] if plan.kernel.endswith(name))
    with force_isa(name):
        assert plan.kernel == qkv_fast.explain(qkv_fast.scores, q, q, num_threads=1).kernel
        assert plan.limits == qkv_fast.explain(qkv_fast.scores, q, q, num_threads=1).limits


def _cancelling(rng):
    """A problem in float16 whose first query has results near 0: one value is all others against the weights."""
    n, size = int(rng.choice([2, 3, 4, 6, 10, 30, 100, 400])), rng.choice([0.1, 1, 3, 10])
    q, k = (normal(rng, (33, 32)) * np.float32(size)).astype(np.float16), normal(rng, (n, 32), np.float16)
    v = (rng.standard_normal((n, 32)) * rng.choice([0.01, 1, 50, 5000])).astype(np.float16)
    weights = reference.softmax(reference.scores(q[:1].astype(float), k.astype(float)))[0]
    top = weights.argmax()
    others = np.delete(weights, top) @ np.delete(v.astype(float), top, axis=0)
    v[top] = np.clip(-others / weights[top], -60000, 60000)
    if rng.random() < 0.5:
        q[:] = q[0]
    return q, k, v


def test_float16_whose_values_cancel(tiled, request):
    """The rule of float32 and one rounding, with nothing for parts: of weights in two parts, a quarter of these failed."""
    for seed in range(2000 if request.config.option.full else 60):
        check(*_cancelling(np.random.default_rng(seed)))
