"""attention in programs of HIPS autograd: NumPy's results, and the gradients that autograd has by itself."""

import numpy as np
import pytest

import qkv_fast

autograd = pytest.importorskip("autograd", reason="the extra [test] leaves it out; [autograd] has it")

from autograd import numpy as anp  # noqa: E402

from qkv_fast.integrations.autograd import attention  # noqa: E402


def normal(*shapes, dtype="float64"):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def plain(q, k, v, bias=0.0, alibi_slopes=None, sinks=None, causal=False):
    """Heads first; (out, lse), which autograd differentiates."""
    k, v = (anp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))  # autograd has it wrong for -3
    s = q @ anp.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]) + bias
    behind = np.arange(s.shape[-2])[:, None] + s.shape[-1] - s.shape[-2] - np.arange(s.shape[-1])
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None] * np.abs(behind)
    total = 0.0 if sinks is None else anp.exp(sinks)[:, None, None]
    p = anp.where(causal & (behind < 0), 0, anp.exp(s))
    total = total + anp.sum(p, axis=-1, keepdims=True)
    return p / total @ v, anp.log(total)[..., 0]


SHAPES = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal, dtype, tolerance):
    others = (5, 7), (4,), (4,), (2, 4, 5, 3), (2, 4, 5)
    q, k, v, bias, slopes, sinks, dout, dlse = normal(*SHAPES, *others, dtype=dtype)

    def loss(function, **more):
        def of(q, k, v, bias, slopes, sinks):
            out, lse = function(q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, causal=causal, **more)
            return anp.sum(out * dout) + anp.sum(lse * dlse)

        return autograd.value_and_grad(of, tuple(range(6)))(q, k, v, bias, slopes, sinks)

    (value, ours), (expected, theirs) = loss(attention, return_lse=True), loss(plain)
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=10 * tolerance)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape and x.dtype == dtype
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_of_one_argument():
    """The result alone, with what the batch shares; numbers as they are, without a trace."""
    q, k, v = normal(*SHAPES)
    found = autograd.grad(lambda k: anp.sum(anp.sin(attention(q, k, v[:1]))))(k[:1])
    expected = autograd.grad(lambda k: anp.sum(anp.sin(plain(q, k, v[:1])[0])))(k[:1])
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    for options in ({}, dict(kv_lengths=[7, 5], causal=True), dict(mask=np.arange(7) > 2, sinks=np.ones(4))):
        np.testing.assert_array_equal(attention(q, k, v, **options), qkv_fast.attention(q, k, v, **options))


def test_what_was_given():
    q, k, v = normal(*SHAPES)
    with pytest.raises(ValueError, match="k has dimension 7, q has 8"):
        autograd.grad(lambda q: anp.sum(attention(q, k[..., :7], v)))(q)
    with pytest.raises(TypeError, match="unexpected keyword argument 'out'"):
        attention(q, k, v, out=np.empty((2, 4, 5, 3)))
    with pytest.raises(NotImplementedError, match="VJP of _attend_grad wrt argnums"):
        autograd.hessian(lambda q: anp.sum(attention(q, k, v)))(q)
