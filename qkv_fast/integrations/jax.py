"""Attention and its gradient inside of JAX programs on CPUs, compiled or not.

Examples
--------
>>> import jax
>>> from qkv_fast.integrations.jax import attention
>>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 12, 100, 64))  # batch, heads, length, dim
>>> @jax.jit
... def loss(q, k, v):
...     return (attention(q, k, v, causal=True) ** 2).sum()
>>> [x.shape for x in jax.grad(loss, argnums=(0, 1, 2))(q, k, v)]
[(1, 12, 100, 64), (1, 12, 100, 64), (1, 12, 100, 64)]
"""

import functools
from typing import Any

import jax
import numpy as np

import qkv_fast

_ARRAYS = (
    "mask", "bias", "q_offset", "q_positions", "q_lengths", "kv_lengths", "kv_starts", "segments", "alibi_slopes",
    "sinks",
)  # fmt: skip
_OTHERS = ("causal", "window", "softcap", "scale", "layout", "num_threads")
_WANTED = {"q": "q", "k": "k", "v": "v", "bias": "bias", "alibi_slopes": "slopes", "sinks": "sinks"}


def attention(q: Any, k: Any, v: Any, **options: Any) -> jax.Array:
    """What `qkv_fast.attention` computes, as a function of JAX.

    Compiled programs call back into Python for it; arrays are read where JAX has them. It can be differentiated once,
    in reverse, with respect to q, k, v, bias, sinks and ALiBi slopes; `jax.vmap` makes one call after the other.

    Parameters
    ----------
    q, k, v : array_like
        As in `qkv_fast.attention`.
    **options
        The other arguments of `qkv_fast.attention`, but `out` and `return_lse`. Arrays may be those of JAX; causal,
        window, softcap, scale, layout and num_threads are constants of a compiled program.

    Returns
    -------
    jax.Array
        As in `qkv_fast.attention`.

    Raises
    ------
    TypeError, ValueError
        As in `qkv_fast.attention`. What is wrong with shapes and types is said when a program is traced, with values
        when it runs.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from qkv_fast.integrations.jax import attention
    >>> attention(jnp.zeros((3, 1)), jnp.zeros((3, 1)), jnp.arange(3.0)[:, None], causal=True).ravel().tolist()
    [0.0, 0.5, 1.0]
    """
    if unknown := set(options) - {*_ARRAYS, *_OTHERS}:
        raise TypeError(f"attention() got an unexpected keyword argument {min(unknown)!r}")
    given = {"q": q, "k": k, "v": v} | {name: options[name] for name in _ARRAYS if options.get(name) is not None}
    arrays = jax.tree.map(jax.numpy.asarray, given)
    others = {name: options[name] for name in _OTHERS if name in options}
    # Shapes and types: as much as can be said before there are numbers.
    qkv_fast.explain(**jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), arrays), **others)
    want = tuple(name for name in _WANTED if isinstance(given.get(name), jax.core.Tracer))
    return _attend((want, tuple(others.items())), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(constants: Any, arrays: dict[str, Any]) -> Any:
    return _forward(constants, arrays)[0]


def _forward(constants: Any, arrays: dict[str, Any]) -> Any:
    """The result, and what its gradient needs."""
    _, others = constants
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    rows = (*batch, *q.shape[-3:-1])
    turned = dict(others).get("layout") == "blhd"
    shapes = (
        jax.ShapeDtypeStruct((*rows, v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct((*batch, *rows[:-3:-1]) if turned else rows, np.promote_types(q.dtype, np.float32)),
    )
    out, lse = jax.pure_callback(functools.partial(_call, others), shapes, arrays, vmap_method="sequential")
    return out, (arrays, out, lse)


def _backward(constants: Any, kept: Any, dout: Any) -> Any:
    want, others = constants
    arrays, out, lse = kept
    shapes = tuple(jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in want)
    call = functools.partial(_call_grad, want, others)
    found = jax.pure_callback(call, shapes, dout, arrays, out, lse, vmap_method="sequential")
    return (dict.fromkeys(arrays) | dict(zip(want, found, strict=True)),)


_attend.defvjp(_forward, _backward)


def _call(others: Any, arrays: Any) -> Any:
    return qkv_fast.attention(**jax.tree.map(np.asarray, arrays), **dict(others), return_lse=True)


def _call_grad(want: tuple[str, ...], others: Any, *given: Any) -> Any:
    dout, arrays, out, lse = jax.tree.map(np.asarray, given)
    names = tuple(_WANTED[name] for name in want)
    return qkv_fast.attention_grad(dout, out=out, lse=lse, want=names, **arrays, **dict(others))
