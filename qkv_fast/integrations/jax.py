"""Attention and its gradient inside of JAX programs on CPUs, compiled or not: by our arguments, or by `jax.nn`'s.

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
    out: jax.Array = _run(q, k, v, **options)[0]
    return out


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """What `jax.nn.dot_product_attention` computes, under `jit`, `vmap` and `grad` too.

    Parameters
    ----------
    query : array_like, shape (B, T, N, H) or (T, N, H)
        Queries, float32, float64, float16 or bfloat16.
    key : array_like, shape (B, S, K, H) or (S, K, H)
        Keys. K divides N.
    value : array_like, shape of key
        Values.
    bias : array_like, optional
        Added to the scaled scores; broadcasts to (B, N, T, S), with axes that are missing on the left.
    mask : array_like of bool, optional
        True where a query attends; broadcasts as `bias` does.
    scale : float, optional
        Factor of the scores, ``1 / sqrt(H)`` by default; a constant of a compiled program.
    is_causal : bool, default False
        Query i sees the keys 0 to i, also where T and S differ.
    query_seq_lengths, key_value_seq_lengths : array_like of int32, shape (B,), optional
        How many of the queries and of the keys of each sequence are no padding.
    local_window_size : int or (int, int), optional
        Query i sees the keys i - left to i + right.
    implementation : {None, "xla"}, default None
        As in JAX. It does not matter here.
    return_residual : bool, default False
        Whether to return the log-sum-exp of the scores.

    Returns
    -------
    out : jax.Array, shape (B, T, N, H) or (T, N, H)
        Of query's type. Rows that see nothing are 0, where JAX's are the mean of all values.
    residual : jax.Array, shape (B, T, N) or (T, N)
        With `return_residual`: the natural logarithm, in query's type; -inf for rows that see nothing. As in JAX no
        gradient passes it.

    Raises
    ------
    TypeError, ValueError
        Shapes and types that do not fit, when a program is traced; lengths that do not, when it runs.
    NotImplementedError
        Another implementation.

    Notes
    -----
    The meaning is that of JAX 0.10.2.

    Examples
    --------
    >>> import jax
    >>> from qkv_fast.integrations.jax import dot_product_attention
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 12, 64))  # batch, length, heads, dim
    >>> ours, theirs = (f(q, k, v, is_causal=True) for f in (dot_product_attention, jax.nn.dot_product_attention))
    >>> bool(abs(ours - theirs).max() < 1e-5)
    True
    """
    where = "dot_product_attention"
    if implementation not in (None, "xla"):
        raise NotImplementedError(f"{where}: implementation must be None or 'xla' on a CPU, got {implementation!r}")
    q, k, v = (jax.numpy.asarray(x) for x in (query, key, value))
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.ndim not in (3, 4):
            raise ValueError(f"{where}: {name} must have 3 or 4 axes, (B, T, N, H), got {name}.shape={x.shape}")
    if not q.dtype == k.dtype == v.dtype:
        types = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise ValueError(f"{where}: query, key and value must have one type, got {types}")
    window = tuple(local_window_size) if isinstance(local_window_size, list) else local_window_size
    options = {
        "causal": bool(is_causal), "window": window, "q_lengths": query_seq_lengths,
        "kv_lengths": key_value_seq_lengths, "scale": scale, "layout": "blhd",
    }  # fmt: skip
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            x = jax.numpy.asarray(x)
            options[name] = x.reshape((1,) * (4 - x.ndim) + x.shape)
    arrays = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (q, k, v))
    out, lse = _run(*arrays, q_offset=0, **options)
    out = out.reshape(*q.shape[:-1], v.shape[-1])
    if not return_residual:
        return out
    return out, jax.lax.stop_gradient(lse.swapaxes(1, 2).reshape(q.shape[:-1]).astype(q.dtype))


def _run(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The result and its log-sum-exp, through which no gradient passes."""
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
    """The results, and what the gradient of the first needs."""
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
    return (out, lse), (arrays, out, lse)


def _backward(constants: Any, kept: Any, gradients: Any) -> Any:
    want, others = constants
    dout, _ = gradients
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
