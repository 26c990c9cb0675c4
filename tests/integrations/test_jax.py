"""attention inside of JAX programs: NumPy's results, and the gradients that JAX has by itself."""

import functools

import numpy as np
import pytest

import qkv_fast

jax = pytest.importorskip("jax", reason="the extra [test] leaves it out for its size; [jax] has it")

from jax import numpy as jnp  # noqa: E402

from qkv_fast.integrations.jax import attention  # noqa: E402


def normal(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def plain(q, k, v, bias=0.0, alibi_slopes=None, sinks=None, causal=False):
    """Heads first; what JAX differentiates."""
    k, v = (jnp.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    s = q @ k.mT / np.sqrt(q.shape[-1]) + bias
    behind = jnp.arange(s.shape[-2])[:, None] + s.shape[-1] - s.shape[-2] - jnp.arange(s.shape[-1])
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None] * jnp.abs(behind)
    if causal:
        s = jnp.where(behind < 0, -jnp.inf, s)
    if sinks is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[:, None, None], (*s.shape[:-1], 1))], axis=-1)
    return jax.nn.softmax(s)[..., : k.shape[-2]] @ v


SHAPES = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(causal, compiled):
    q, k, v, bias, slopes, sinks, dout = normal(*SHAPES, (5, 7), (4,), (4,), (2, 4, 5, 3))

    def loss(function):
        def of(q, k, v, bias, slopes, sinks):
            out = function(q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, causal=causal)
            return (out * dout).sum()

        found = jax.value_and_grad(of, argnums=range(6))
        return (jax.jit(found) if compiled else found)(q, k, v, bias, slopes, sinks)

    ours, theirs = loss(attention), loss(plain)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_arguments(dtype):
    """The bits of qkv_fast.attention, in a program and out of it."""
    q, k, v = normal(*SHAPES, dtype=dtype)
    ids = np.arange(5) // 3, np.arange(7) // 3
    arrays = [np.asarray(x) for x in (q, k, v)]
    for options in (
        {}, dict(kv_lengths=np.array([7, 5]), causal=True), dict(segments=ids), dict(mask=np.arange(7) > 2),
        dict(window=(2, 1), q_offset=1, softcap=3.0, scale=0.2), dict(kv_lengths=0, kv_starts=0),
    ):  # fmt: skip
        expected = qkv_fast.attention(*arrays, **options)
        for compiled in (False, True):
            function = functools.partial(attention, **options)
            given = (jax.jit(function) if compiled else function)(q, k, v)
            assert given.dtype == dtype
            np.testing.assert_array_equal(np.asarray(given), expected)
    turned = [x.swapaxes(1, 2) for x in (q, k, v)]
    given = jax.jit(lambda *x: attention(*x, layout="blhd"))(*turned)
    np.testing.assert_array_equal(np.asarray(given.swapaxes(1, 2)), qkv_fast.attention(*arrays))


def test_layout_and_shared_keys():
    """Gradients of what the batch shares are summed, and so are those of two axes alone."""
    q, k, v = normal(SHAPES[0], (1, 2, 7, 8), (1, 2, 7, 3))

    def ours(q, k, v):
        return attention(*(x.swapaxes(1, 2) for x in (q, k, v)), layout="blhd").swapaxes(1, 2)

    for function, theirs, given in ((ours, plain, (q, k, v)), (attention, None, (q[0, 0], k[0, 0], v[0, 0]))):
        theirs = theirs or (lambda *x: plain(*(y[None] for y in x))[0])
        found = jax.grad(lambda *x, f=function: jnp.sin(f(*x)).sum(), (0, 1, 2))(*given)
        expected = jax.grad(lambda *x, f=theirs: jnp.sin(f(*x)).sum(), (0, 1, 2))(*given)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_mapped():
    q, k, v = normal((3, 4, 5, 8), (3, 2, 7, 8), (3, 2, 7, 3))
    mapped = jax.vmap(jax.grad(lambda q, k, v: attention(q, k, v).sum()))(q, k, v)
    whole = jax.grad(lambda q: attention(q, k, v).sum())(q)
    np.testing.assert_array_equal(mapped, whole)


def test_what_was_given():
    q, k, v = normal(*SHAPES)
    with pytest.raises(ValueError, match="k has dimension 7, q has 8"):
        jax.jit(attention)(q, k[..., :7], v)
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_lse'"):
        attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="Pure callbacks do not support JVP"):
        jax.hessian(lambda q: attention(q, k, v).sum())(q)
