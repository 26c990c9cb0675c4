"""PyTorch's `scaled_dot_product_attention` on our attention, for CPU tensors, with gradients.

Examples
--------
>>> import torch
>>> from qkv_fast.integrations.torch import scaled_dot_product_attention
>>> q, k, v = torch.randn(3, 1, 12, 100, 64)  # batch, heads, length, dim
>>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
torch.Size([1, 12, 100, 64])

As the attention of a model that trains, in place of `torch.nn.functional.scaled_dot_product_attention`:

>>> q.requires_grad_()  # doctest: +ELLIPSIS
tensor(...)
>>> scaled_dot_product_attention(q, k, v, is_causal=True).square().sum().backward()
>>> q.grad.shape
torch.Size([1, 12, 100, 64])
"""

import numbers
import sys
from typing import Any, NoReturn

import torch

from .. import attention, attention_grad
from ._tensors import as_tensor, check_tensors, detached, memory, refuse

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, on CPU tensors.

    Inputs are read where they lie, whatever their strides; the result has memory of its own. It can be differentiated
    once, with respect to every floating-point input; a second derivative is refused.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Hq, L, E)
        Queries, float32, float64, float16 or bfloat16. Or (L, E).
    key : torch.Tensor, shape (..., H, S, E)
        Keys, of query's type.
    value : torch.Tensor, shape (..., H, S, Ev)
        Values, of query's type. All axes left of the last two broadcast among the three.
    attn_mask : torch.Tensor, optional
        Broadcasts to (..., Hq, L, S). bool: True where a query may attend; float32 or query's type: added to the
        scaled scores. Or a `torch.nn.attention.bias.CausalBias` for L queries and S keys: ``causal_upper_left(L, S)``
        is `is_causal`, ``causal_lower_right(L, S)`` lets the last query see all keys.
    dropout_p : float, default 0.0
        Must be 0.
    is_causal : bool, default False
        Query i sees the keys 0 to i (top-left, also where L and S differ), of those that `attn_mask` allows: torch's
        fused kernel for CPUs composes the two like this, while torch's documentation calls them an error.
    scale : float, optional
        Factor of the scores, ``1 / sqrt(E)`` by default.
    enable_gqa : bool, default False
        Hq may be a multiple of the heads of key and of value; each of these serves queries that follow one another.
        All three have a head axis then.

    Returns
    -------
    torch.Tensor, shape (..., Hq, L, Ev)
        A plain tensor of query's type, under autocast too, and contiguous. Rows that may attend to nothing are 0.

    Raises
    ------
    TypeError
        Not tensors, or of types other than the supported; a switch that is no bool, a dropout_p that is no real number.
    ValueError
        Shapes that do not fit, the lengths of a CausalBias among them; a CausalBias with `is_causal`.
    ImportError
        bfloat16 without ml_dtypes.
    NotImplementedError
        What torch does and this does not: a second derivative; an input carries a forward-mode gradient, is nested, not
        on the CPU or not strided, or of a class whose ``__torch_function__`` or ``__torch_dispatch__`` gives it a
        meaning of its own (fake and masked tensors, DTensor); dropout; a transform of `torch.func` (vmap, grad, jvp,
        functionalize); `torch.jit.trace` and `make_fx`, which would keep the result as a constant.

    Notes
    -----
    The meaning is that of torch 2.13, see its documentation. A visible NaN or infinity does what IEEE arithmetic
    does; a hidden one has no influence. Inside `torch.compile` the call stays outside the graph, which
    ``fullgraph=True`` therefore refuses.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(3, 2, 5, 16)
    >>> ours = scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 5).tril().bool())
    >>> torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    """
    if torch.compiler.is_dynamo_compiling():  # it would trace NumPy's functions, some of which it does not know
        return torch.compiler.disable(scaled_dot_product_attention)(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    tensors = {"query": query, "key": key, "value": value}
    causal: Any = "top-left" if is_causal else False
    types = {}
    of_lengths = attn_mask is not None and _is_causal_bias(attn_mask)  # and no numbers
    if attn_mask is not None and not of_lengths:
        tensors["attn_mask"] = attn_mask
        types["attn_mask"] = (torch.bool, torch.float32, getattr(query, "dtype", torch.float32))
    plain = check_tensors(_NAME, tensors, types)
    if of_lengths:
        causal = _causal(attn_mask, query, key, is_causal)
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):
        name, switch = ("enable_gqa", enable_gqa) if isinstance(is_causal, bool) else ("is_causal", is_causal)
        raise TypeError(f"scaled_dot_product_attention: {name} must be bool, got {switch!r}")
    if type(dropout_p) is not float and not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"scaled_dot_product_attention: dropout_p must be a real number, got {dropout_p!r}")
    if dropout_p != 0:
        refuse(_NAME, f"no dropout: dropout_p must be 0, got {dropout_p!r}")

    if enable_gqa and min(query.ndim, key.ndim, value.ndim) < 3:
        raise ValueError(
            "scaled_dot_product_attention: with enable_gqa query, key and value must have 3 or more axes "
            f"(query: {tuple(query.shape)}, key: {tuple(key.shape)}, value: {tuple(value.shape)})"
        )

    recorded = torch.is_grad_enabled() and any([x.requires_grad for x in tensors.values()])
    if not plain:
        detached_ones = {name: detached(_NAME, name, x) for name, x in tensors.items()}  # it refuses some
        tensors = tensors if recorded else detached_ones
    q, k, v = tensors["query"], tensors["key"], tensors["value"]
    masks = [tensors["attn_mask"]] if "attn_mask" in tensors else []
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == (masks[0].ndim if masks else len(q_shape)):
        q, k, v, *masks = _with_equal_axes(q, k, v, *masks)
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) > 2 and not q_shape[-3] == k_shape[-3] == v_shape[-3]:
        q, k, v = _share_heads(q, k, v, enable_gqa)
    if recorded:
        result: torch.Tensor = Recorded.apply(_NAME, {"causal": causal, "scale": scale}, q, k, v, *masks)[0]
        return result
    added = _added([memory(_NAME, "attn_mask", x, plain) for x in masks]) if masks else {}
    q, k, v = memory(_NAME, "query", q, plain), memory(_NAME, "key", k, plain), memory(_NAME, "value", v, plain)
    return as_tensor(attention(q, k, v, causal=causal, scale=scale, **added))


class Recorded(torch.autograd.Function):
    """Attention with `options` and its log-sum-exp, for inputs that broadcast as ours do: what torch did before, it
    differentiates itself."""

    @staticmethod
    def forward(ctx: Any, where: str, options: dict[str, Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *masks = (memory(where, "an input", x, False) for x in tensors)
        results = tuple(map(as_tensor, attention(q, k, v, return_lse=True, **options, **_added(masks))))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*results, *tensors)
        ctx.others = where, options
        return results

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            dout = torch.zeros_like(ctx.saved_tensors[0])
        return None, None, *_Gradients.apply(ctx.others, ctx.needs_input_grad[2:], dlse, dout, *ctx.saved_tensors)


class _Gradients(torch.autograd.Function):
    """A function of its own, so that whoever differentiates gradients is told, also where `dout` needs none."""

    @staticmethod
    def forward(
        ctx: Any, others: Any, needed: tuple[bool, ...], dlse: torch.Tensor | None, *tensors: torch.Tensor
    ) -> tuple[Any, ...]:
        ctx.where, options = others
        dout, out, lse, q, k, v, *masks = (memory(ctx.where, "an input", x, False) for x in tensors)
        names = ("q", "k", "v", "bias")[: len(needed)]
        want = tuple(name for name, is_needed in zip(names, needed, strict=True) if is_needed)
        added = _added(masks) if dlse is None else {"dlse": memory(ctx.where, "dlse", dlse, False), **_added(masks)}
        gradients = attention_grad(dout, q, k, v, out, lse, want=want, **options, **added)
        found = dict(zip(want, map(as_tensor, gradients), strict=True))
        return tuple(found.get(name) for name in names)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        refuse(ctx.where, "no second derivatives: its gradients cannot be differentiated again")


def _added(masks: list[Any]) -> dict[str, Any]:
    return {("mask" if mask.dtype == bool else "bias"): mask for mask in masks}


def _is_causal_bias(x: Any) -> bool:
    """Without an import of its module, which imports torch's compiler: who has such a bias has it imported."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and type(x) is module.CausalBias


def _causal(bias: Any, query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> Any:
    """What attention's `causal` is for a CausalBias, a tensor whose memory means nothing."""
    if is_causal:
        raise ValueError("scaled_dot_product_attention: is_causal must be False with a CausalBias, got True")
    if (bias.seq_len_q, bias.seq_len_kv) != (*query.shape[-2:-1], *key.shape[-2:-1]):
        raise ValueError(
            f"scaled_dot_product_attention: attn_mask is a CausalBias for {bias.seq_len_q} queries and "
            f"{bias.seq_len_kv} keys, got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    return "top-left" if bias.variant.name == "UPPER_LEFT" else True


def _with_equal_axes(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """torch broadcasts as NumPy does, with axes that are missing on the left; ours does not guess."""
    axes = max(tensors[0].ndim, tensors[1].ndim, tensors[2].ndim)
    if axes < 3:
        return list(tensors)
    return [x if x.ndim == axes else x.reshape((1,) * (axes - x.ndim) + x.shape) for x in tensors]


def _share_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grouped: bool) -> tuple[torch.Tensor, ...]:
    """Brings torch's rules for heads to ours, which ask for as many in k as in v, and for them to divide q's."""
    if grouped:
        if k.size(-3) != v.size(-3):  # each serves q's heads by itself
            k, v = (x.repeat_interleave(q.shape[-3] // max(x.shape[-3], 1), dim=-3) for x in (k, v))
        return q, k, v
    heads = {x.size(-3) for x in (q, k, v)} - {1} or {1}
    if len(heads) > 1:
        shapes = ", ".join(f"{name}: {tuple(x.shape)}" for name, x in (("query", q), ("key", k), ("value", v)))
        raise ValueError(
            "scaled_dot_product_attention: query, key and value must have equal numbers of heads, or 1; for groups of "
            f"query heads pass enable_gqa=True ({shapes})"
        )
    return tuple(x.expand(*x.shape[:-3], *heads, *x.shape[-2:]) for x in (q, k, v))
