"""Our attention as one of those that models of Hugging Face's transformers choose from, for inference on CPUs.

Importing this module registers the name ``"qkv_fast"`` twice: the function that layers call, and the one that makes
their masks, without which padding would be lost without a word. A model is then told so by
``attn_implementation="qkv_fast"``, or later by ``model.set_attn_implementation("qkv_fast")``.

Examples
--------
>>> import torch
>>> import qkv_fast.integrations.transformers
>>> from transformers import LlamaConfig, LlamaModel
>>> sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
>>> model = LlamaModel._from_config(LlamaConfig(**sizes), attn_implementation="qkv_fast").eval()
>>> with torch.no_grad():
...     model(torch.arange(6)[None]).last_hidden_state.shape
torch.Size([1, 6, 16])
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .. import attention, spotlight
from ._model_types import MODEL_TYPES
from ._tensors import TYPES, as_tensor, check_tensors, memory, refuse

__all__ = ["MODEL_TYPES", "attention_forward", "attention_mask"]

_NAME = "qkv_fast"
# Words that models hand down through their layers, of which no attention function makes any use.
_NOT_OURS = frozenset(
    "position_ids cache_position use_cache output_hidden_states output_router_logits return_dict deterministic "
    "num_items_in_batch logits_to_keep position_embeddings layer_idx".split()
)

_ADDED = {"attention_mask": (torch.bool, *TYPES), "position_bias": TYPES, "s_aux": TYPES}


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a layer calls: attention of its queries, keys and values.

    Parameters
    ----------
    module : torch.nn.Module
        The layer. Its `is_causal` counts where the argument is not given; without either it is causal.
    query : torch.Tensor, shape (B, Hq, L, D)
        Queries, float32, float64, float16 or bfloat16, on the CPU; read where they lie, as are key and value.
    key : torch.Tensor, shape (B, H, S, D)
        Keys, of query's type. H divides Hq.
    value : torch.Tensor, shape (B, H, S, Dv)
        Values, of query's type.
    attention_mask : torch.Tensor or None, broadcasts to (B, Hq, L, S)
        bool: True where a query attends; floating: added to the scores, and what is at or below half of the lowest
        number of its type hides. None: one query sees all keys, as do all where it is not causal; else query i sees
        the keys 0 to i, also of a longer buffer.
    dropout : float, default 0.0
        Must be 0.
    scaling : float, optional
        Factor of the scores, ``1 / sqrt(D)`` by default.
    is_causal : bool, optional
        Counts only without a mask.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)`` before mask and bias.
    s_aux : torch.Tensor, shape (Hq,), optional
        Attention sinks, one logit of each head.
    position_bias : torch.Tensor, broadcasts to (B, Hq, L, S), optional
        Added to the scores.
    sliding_window : int, optional
        As many keys as a query sees, itself among them. Masks have it already: it counts only without one.
    output_attentions : bool, default False
        Whether to return weights.
    **others
        What layers hand down that changes no attention, such as `position_ids`, and whatever is None.

    Returns
    -------
    out : torch.Tensor, shape (B, L, Hq, Dv)
        Contiguous, of query's type. Queries that see nothing have 0.
    weights : torch.Tensor, shape (B, Hq, L, S), or None
        With `output_attentions`, in query's type.

    Raises
    ------
    TypeError
        Tensors of other types.
    ValueError
        Shapes that do not fit.
    ImportError
        bfloat16 without ml_dtypes.
    NotImplementedError
        Dropout, gradients, tensors that are not on the CPU, and any word of `others` that may change the result.

    Notes
    -----
    The meaning is that of transformers 5.24; see `qkv_fast.attention` for what is computed, and how exactly.
    """
    if torch.compiler.is_dynamo_compiling():  # it would trace NumPy's functions, some of which it does not know
        outside: tuple[torch.Tensor, torch.Tensor | None] = torch.compiler.disable(attention_forward)(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap, s_aux, position_bias,
            sliding_window, output_attentions, **others,
        )  # fmt: skip
        return outside
    tensors = {"query": query, "key": key, "value": value}
    if attention_mask is not None:
        tensors["attention_mask"] = attention_mask
    if position_bias is not None:
        tensors["position_bias"] = position_bias
    if s_aux is not None:
        tensors["s_aux"] = s_aux
    plain = check_tensors(_NAME, tensors, _ADDED)
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        shapes = ", ".join(f"{name}: {tuple(tensors[name].shape)}" for name in ("query", "key", "value"))
        raise ValueError(f"{_NAME}: query, key and value must have 4 axes each ({shapes})")
    if torch.is_grad_enabled() and (needing := [name for name, x in tensors.items() if x.requires_grad]):
        refuse(_NAME, f"no gradients: {', '.join(needing)} has requires_grad set; use torch.no_grad()")
    if dropout:
        refuse(_NAME, f"no dropout: dropout must be 0, got {dropout!r}; call model.eval()")
    for name, x in others.items():
        if x is not None and name not in _NOT_OURS:
            refuse(_NAME, f"no {name!r}: this layer ({type(module).__name__}) passes an argument that we do not know")

    arguments: dict[str, Any] = {"scale": scaling, "softcap": softcap}
    queries = query.shape[2]
    if attention_mask is None:
        if queries > 1 or sliding_window is not None:  # one query sees all keys
            if is_causal is None:
                is_causal = getattr(module, "is_causal", True)
            arguments |= _positions(queries, key.shape[2], is_causal, sliding_window)
    else:
        if attention_mask.dtype != torch.bool:
            attention_mask, bias = _split(attention_mask)
            if bias is not None:
                position_bias = bias if position_bias is None else position_bias + bias
        arguments["mask"] = memory(_NAME, "attention_mask", attention_mask, plain)
    if position_bias is not None:
        arguments["bias"] = memory(_NAME, "position_bias", position_bias, plain)
    if s_aux is not None:
        arguments["sinks"] = memory(_NAME, "s_aux", s_aux, plain)

    q = memory(_NAME, "query", query, plain)
    k = memory(_NAME, "key", key, plain)
    v = memory(_NAME, "value", value, plain)
    weights = spotlight.weights(q, k, **arguments) if output_attentions else None
    # Layers take lengths before heads, and so it is computed; of one query memory is the same in both orders.
    if queries == 1:
        out = attention(q, k, v, **arguments)
        out = out.reshape(out.shape[0], 1, out.shape[1], out.shape[3])
    else:
        out = attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), layout="blhd", **arguments)
    result = as_tensor(out)
    return result, None if weights is None else torch.from_numpy(weights).to(query.dtype)


def attention_mask(*, config: Any, **arguments: Any) -> torch.Tensor | None:
    """What makes a model's masks: bool, True where a query attends, or None where `attention_forward` knows as much.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model. Its `model_type` must be in `MODEL_TYPES`, those whose layers call `attention_forward`: others
        would add the mask to their scores, and be wrong without an error.
    **arguments
        Those of transformers' own ``sdpa_mask``, which makes the mask.

    Returns
    -------
    torch.Tensor, shape (B, 1, L, S), or None
        The mask.

    Raises
    ------
    NotImplementedError
        Another model.
    """
    if config.model_type not in MODEL_TYPES:
        refuse(
            _NAME,
            f"no {config.model_type!r} models: as far as we know not all of their layers call a registered attention "
            "function. Use attn_implementation='sdpa', or 'eager'",
        )
    return sdpa_mask(**arguments)


def _positions(queries: int, keys: int, is_causal: bool, sliding_window: int | None) -> dict[str, Any]:
    """What no mask means."""
    causal: Any = "top-left" if is_causal and queries > 1 else False
    if sliding_window is None or keys < sliding_window:
        return {"causal": causal}
    if not is_causal:
        refuse(_NAME, f"no sliding_window ({sliding_window}) over {keys} keys without a mask where not causal")
    return {"causal": causal or True, "window": sliding_window - 1}  # theirs counts the query itself


def _split(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A floating mask as what it lets be seen and what it adds. Models write the lowest number of a type for "hidden",
    add to it, and round: nothing below half of it is meant as a number."""
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    added = mask.masked_fill(hidden, 0)
    return ~hidden, added if added.any() else None


AttentionInterface.register(_NAME, attention_forward)
AttentionMaskInterface.register(_NAME, attention_mask)
