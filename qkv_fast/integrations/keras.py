"""Keras 3's `keras.ops.dot_product_attention` on our attention, for its NumPy, JAX and torch backends on CPUs.

Examples
--------
>>> import keras
>>> from qkv_fast.integrations.keras import dot_product_attention
>>> q, k, v = (keras.random.normal((2, 100, 12, 64), seed=i) for i in range(3))  # batch, length, heads, dim
>>> tuple(dot_product_attention(q, k, v, is_causal=True).shape)
(2, 100, 12, 64)
"""

from typing import Any

import keras

import qkv_fast

__all__ = ["dot_product_attention"]

_NAME = "dot_product_attention"


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    flash_attention: bool | None = None,
    attn_logits_soft_cap: float | None = None,
) -> Any:
    """What `keras.ops.dot_product_attention` computes, on the backend that Keras runs on.

    It is differentiated by the backend, JAX or torch, and runs inside of JAX programs. Called with symbolic tensors
    it becomes a node of a functional model.

    Parameters
    ----------
    query : tensor, shape (B, T, N, H)
        Queries; query, key and value are computed in the type that Keras promotes theirs to.
    key : tensor, shape (B, S, K, H)
        Keys. K divides N.
    value : tensor, shape (B, S, K, Hv)
        Values.
    bias : tensor, optional
        Added to the scaled scores; broadcasts to (B, N, T, S).
    mask : tensor, optional
        True, or not 0, where a query attends; broadcasts to (B, N, T, S). Composed with `bias` on every backend.
    scale : float, optional
        Factor of the scores, ``1 / sqrt(H)`` by default.
    is_causal : bool, default False
        Query i sees the keys 0 to i.
    flash_attention : bool, optional
        Not asked: it is fused always.
    attn_logits_soft_cap : None
        As in Keras on CPUs.

    Returns
    -------
    tensor, shape (B, T, N, Hv)
        Of the backend. Rows that see nothing are 0, where Keras has the mean of all values.

    Raises
    ------
    TypeError, ValueError
        Types and shapes that do not fit; a soft cap.
    NotImplementedError
        Another backend.

    Notes
    -----
    The meaning is that of Keras 3.15.1.

    Examples
    --------
    >>> import keras
    >>> from qkv_fast.integrations.keras import dot_product_attention
    >>> q = keras.random.normal((1, 5, 4, 8), seed=0)
    >>> ours, theirs = (f(q, q, q, is_causal=True) for f in (dot_product_attention, keras.ops.dot_product_attention))
    >>> bool(keras.ops.max(keras.ops.abs(ours - theirs)) < 1e-5)
    True
    """
    if attn_logits_soft_cap is not None:
        raise ValueError(f"{_NAME}: attn_logits_soft_cap must be None but on TPUs, got {attn_logits_soft_cap!r}")
    if any(isinstance(x, keras.KerasTensor) for x in (query, key, value)):
        return _DotProductAttention(is_causal)(query, key, value, bias=bias, mask=mask, scale=scale)
    return _attend(query, key, value, bias, mask, scale, is_causal)


@keras.saving.register_keras_serializable(package="qkv_fast")
class _DotProductAttention(keras.Operation):
    """A node of a functional model."""

    def __init__(self, is_causal: bool = False, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.is_causal = is_causal

    def call(self, query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, scale: Any = None) -> Any:
        return _attend(query, key, value, bias, mask, scale, self.is_causal)

    def compute_output_spec(
        self, query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, scale: Any = None
    ) -> Any:
        dtype = keras.backend.result_type(query.dtype, key.dtype, value.dtype)
        return keras.KerasTensor((*query.shape[:-1], value.shape[-1]), dtype=dtype)


def _attend(query: Any, key: Any, value: Any, bias: Any, mask: Any, scale: float | None, is_causal: bool) -> Any:
    q, k, v = (keras.ops.convert_to_tensor(x) for x in (query, key, value))
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        shapes = ", ".join(f"{name}.shape={tuple(x.shape)}" for name, x in (("query", q), ("key", k), ("value", v)))
        raise ValueError(f"{_NAME}: query, key and value must have 4 axes each ({shapes})")
    dtype = keras.backend.result_type(q.dtype, k.dtype, v.dtype)
    q, k, v = (keras.ops.cast(x, dtype) for x in (q, k, v))
    mask, bias = _of_four_axes(mask, "bool"), _of_four_axes(bias, dtype)
    options: dict[str, Any] = {"causal": "top-left" if is_causal else False, "layout": "blhd"}
    match keras.backend.backend():
        case "numpy":
            return qkv_fast.attention(q, k, v, mask=mask, bias=bias, scale=scale, **options)
        case "jax":
            from . import jax

            return jax.attention(q, k, v, mask=mask, bias=bias, scale=scale, **options)
        case "torch":
            from .torch import scaled_dot_product_attention

            if mask is not None and bias is not None:
                mask = bias.masked_fill(~mask, -float("inf"))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = scaled_dot_product_attention(
                q, k, v, bias if mask is None else mask, is_causal=bool(is_causal), scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2)
        case other:
            raise NotImplementedError(f"{_NAME}: backends numpy, jax and torch only, Keras runs on {other!r}")


def _of_four_axes(x: Any, dtype: str) -> Any:
    """Broadcast as NumPy does, with axes that are missing on the left; ours does not guess."""
    if x is None:
        return None
    x = keras.ops.cast(keras.ops.convert_to_tensor(x), dtype)
    return keras.ops.reshape(x, (1,) * (4 - len(x.shape)) + tuple(x.shape))
