"""attention inside of JAX programs: NumPy's results, and the gradients that JAX has by itself. And
dot_product_attention, which gives what JAX's gives on a grid of its arguments."""

import functools
import inspect
import itertools

import numpy as np
import pytest

import qkv_fast

jax = pytest.importorskip("jax", reason="the extra [test] leaves it out for its size; [jax] has it")

from jax import numpy as jnp  # noqa: E402

from qkv_fast.integrations.jax import attention, dot_product_attention  # noqa: E402


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


THEIRS = jax.nn.dot_product_attention
T, S, LENGTHS = 5, 7, jnp.array([3, 5], "int32")
HOSTS_SHAPES = {  # of query; of key and value
    "4-D": ((2, T, 4, 8), (2, S, 4, 8)),
    "groups": ((2, T, 4, 8), (2, S, 2, 8)),
    "one key head": ((2, T, 4, 8), (2, S, 1, 8)),
    "3-D": ((T, 4, 8), (S, 2, 8)),
    "more queries than keys": ((2, 9, 4, 8), (2, S, 4, 8)),
    "one query": ((2, 1, 4, 8), (2, S, 2, 8)),
}
LIMITS = [
    {}, {"is_causal": True}, {"local_window_size": 2}, {"local_window_size": (1, 3)},
    {"is_causal": True, "local_window_size": (2, 1)},
]  # fmt: skip


def inputs(name, dtype="float32"):
    """query, key, value, numbers like scores, and which rows see a key whatever hides others."""
    q, k = HOSTS_SHAPES[name]
    return normal(q, k, k, (2 if len(q) == 4 else 1, 4, q[-3], S), dtype=dtype)


def compare(ours, theirs, rows, **tolerance):
    """In the rows that see something: in others JAX has the mean of all values."""
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        keep = rows.reshape(rows.shape + (1,) * (x.ndim - rows.ndim))
        np.testing.assert_allclose(
            *(np.where(keep, np.asarray(z).astype("float32"), 0) for z in (x, y)), **tolerance
        )


@pytest.mark.parametrize("extra", ["none", "bias", "mask", "both", "for all heads", "of two axes"])
@pytest.mark.parametrize("name", HOSTS_SHAPES)
def test_gives_what_jax_gives(name, extra):
    q, k, v, numbers = inputs(name)
    given = {
        "none": {}, "bias": {"bias": numbers}, "mask": {"mask": numbers > -0.5},
        "both": {"bias": numbers, "mask": numbers > -0.5}, "for all heads": {"mask": numbers[:, :1] > -0.5},
        "of two axes": {"bias": numbers[0, 0], "mask": numbers[0, 0, :1] > -0.5},
    }[extra]  # fmt: skip
    padded = [{}] if q.ndim == 3 else [
        {}, {"key_value_seq_lengths": LENGTHS}, {"query_seq_lengths": jnp.minimum(LENGTHS, q.shape[1])},
        {"query_seq_lengths": jnp.minimum(LENGTHS, q.shape[1]), "key_value_seq_lengths": LENGTHS + 1},
    ]  # fmt: skip
    for i, (limits, lengths) in enumerate(itertools.product(LIMITS, padded)):
        if i % 3 and (name, extra) != ("groups", "none"):  # JAX takes its time
            continue
        options = {**given, **limits, **lengths, "scale": (None, 0.5, -1.0)[i % 5 % 3], "return_residual": True}
        out, lse = dot_product_attention(q, k, v, **options)
        seen = np.isfinite(lse)
        assert not np.any(np.asarray(out)[~seen])
        compare((out, lse), THEIRS(q, k, v, **options), seen, rtol=2e-5, atol=2e-5)
    alone = dot_product_attention(q, k, v, **options | {"return_residual": False})
    np.testing.assert_array_equal(alone, out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype):
    """JAX rounds weights to these types, and ours does not: to its unit of the largest value."""
    q, k, v, numbers = inputs("groups", dtype)
    unit = float(jnp.finfo(dtype).eps)
    for options in ({}, {"bias": numbers, "is_causal": True}):
        found, expected = (f(q, k, v, **options, return_residual=True) for f in (dot_product_attention, THEIRS))
        most = 2 * unit * float(jnp.abs(v).max())
        compare(found, expected, np.ones(q.shape[:3], bool), rtol=unit, atol=most)


def test_in_programs():
    """Compiled, mapped, differentiated: also with respect to a bias that is shared."""
    q, k, v, numbers = inputs("groups")

    def loss(function, q, k, v, bias):
        out, lse = function(q, k, v, bias, is_causal=True, key_value_seq_lengths=LENGTHS, return_residual=True)
        return (jnp.sin(out) * lse[..., None]).sum()

    for bias in (numbers, numbers[:1, :1]):
        found, expected = (
            jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1, 2, 3)))(q, k, v, bias)
            for f in (dot_product_attention, THEIRS)
        )
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
    mapped = [jax.vmap(functools.partial(f, is_causal=True))(q, k, v) for f in (dot_product_attention, THEIRS)]
    np.testing.assert_allclose(*mapped, rtol=2e-5, atol=2e-5)
    of_cotangents = jax.grad(lambda q: dot_product_attention(q, k, v, query_seq_lengths=LENGTHS).sum())(q)
    assert not np.any(of_cotangents[0, 3:]) and np.any(of_cotangents[1, 3:])


def test_its_signature_and_what_it_refuses():
    ours, theirs = (inspect.signature(f) for f in (dot_product_attention, THEIRS))
    assert [(x.name, x.kind, x.default) for x in ours.parameters.values()] == [
        (x.name, x.kind, x.default) for x in theirs.parameters.values()
    ]
    q, k, v, _ = inputs("4-D")
    same = dot_product_attention(q, k, v, implementation="xla")
    np.testing.assert_array_equal(same, dot_product_attention(q, k, v))
    with pytest.raises(NotImplementedError, match="implementation must be None or 'xla' on a CPU, got 'cudnn'"):
        dot_product_attention(q, k, v, implementation="cudnn")
    for function in (dot_product_attention, THEIRS):
        for wrong in ((q, k.astype("float16"), v), (q[0, 0], k, v), (q, k[..., :7], v), (q[:, :, :3], k[:, :, :2], v)):
            with pytest.raises(ValueError):
                function(*wrong)
    with pytest.raises(TypeError, match="mask"):
        dot_product_attention(q, k, v, mask=jnp.ones((T, S)))
