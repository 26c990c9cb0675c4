"""ONNX's Attention operator on our attention, so that a whole ONNX graph runs in NumPy.

:class:`Evaluator` is `onnx.reference.ReferenceEvaluator` with :class:`Attention` for the nodes of that name, wherever
they are: in the graph, in the bodies of If, Loop and Scan, and in the model's functions. ``ReferenceEvaluator(model,
new_ops=[Attention])`` does not hand it on to the functions: the nodes in them are ONNX's own then, without a word.

Examples
--------
>>> import numpy as np
>>> from onnx import parser
>>> from qkv_fast.integrations.onnx import Evaluator
>>> model = parser.parse_model('''<ir_version: 11, opset_import: ["": 24]>
... decoder (float[1, L, 64] x) => (float[1, L, 64] y) {
...     y = Attention<is_causal=1, q_num_heads=4, kv_num_heads=4>(x, x, x)
... }''')
>>> x = np.random.default_rng(0).standard_normal((1, 10, 64), dtype=np.float32)
>>> (y,) = Evaluator(model).run(None, {"x": x})
>>> y.shape
(1, 10, 64)
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from .. import attention, scores, softmax, weighted_values
from ._score_mods import arguments_of

_Array = np.ndarray[Any, Any]

_PRECISIONS: tuple[int, ...] = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


class Attention(OpRun):
    """The operator of opsets 23, 24 and 25: all inputs, outputs and attributes, with 3-D and 4-D tensors.

    Y always comes from one fused call of :func:`qkv_fast.attention`, which expresses all that the operator can say.
    Only the output qk_matmul_output, which is the matrix itself, is made from the stages, where a node asks for it.

    float16, bfloat16 and inputs of several types, a mask of numbers among them, are widened (to float32, or to float64
    where one of them needs it) and the outputs rounded once. So `softmax_precision` is the least precision: float64 has
    an effect, what is narrower than the type of computation has none.

    A ReferenceEvaluator does not hand this class on to a model's functions, an :class:`Evaluator` does.

    Notes
    -----
    Where ONNX's own evaluator (1.23.2) differs:

    ========================================== ================================== ==================================
    a node with                                here                               there
    ========================================== ================================== ==================================
    a mask of one column, opset 23             it is for all keys                 it is for key 0 only
    a mask of fewer keys, opset 23             ValueError                         excludes the rest, as of opset 24
    is_causal and a mask of one row            it is for all queries              all queries see what the first sees
    is_causal and a mask of one axis           it is for all queries              ValueError
    is_causal and a mask of integers           added                              OverflowError
    a negative scale                           a factor like any other            NaN
    a softcap and qk_matmul_output_mode 0      the product before it, as in the   the product after it
                                               operator's text
    a qk_matmul_output_mode not of 0 to 3      ValueError                         read as 0
    4-D inputs and q_num_heads, opset 25       not read, as before opset 25       ValueError
    ========================================== ================================== ==================================

    From opset 24 on, a mask of fewer keys (one column too) excludes the keys that it lacks, in both.

    Raises
    ------
    ValueError
        A 3-D input without its number of heads, one of past_key and past_value without the other, nonpad_kv_seqlen
        with a past, a qk_matmul_output_mode other than 0 to 3, a softmax_precision that is no floating type of the
        operator, and whatever :func:`qkv_fast.attention` refuses.
    """

    def _run(  # names as in the operator, which the evaluator passes by keyword
        self,
        Q: _Array,
        K: _Array,
        V: _Array,
        attn_mask: _Array | None = None,
        past_key: _Array | None = None,
        past_value: _Array | None = None,
        nonpad_kv_seqlen: _Array | None = None,
        *,
        is_causal: int = 0,
        kv_num_heads: int | None = None,
        left_window_size: int = -1,
        q_num_heads: int | None = None,
        qk_matmul_output_mode: int = 0,
        right_window_size: int = -1,
        scale: float | None = None,
        softcap: float = 0.0,
        softmax_precision: int | None = None,
    ) -> tuple[_Array, ...]:
        q = _heads_first("Q", Q, "q_num_heads", q_num_heads)
        k = _heads_first("K", K, "kv_num_heads", kv_num_heads)
        v = _heads_first("V", V, "kv_num_heads", kv_num_heads)
        # Queries follow the keys that were there before them. Without any, positions begin at 0 (top-left).
        offset: Any = 0
        if past_key is not None and past_value is not None:
            if nonpad_kv_seqlen is not None:
                raise ValueError("Attention: nonpad_kv_seqlen describes K and V without a past, got past_key as well")
            k, v = np.concatenate((past_key, k), axis=2), np.concatenate((past_value, v), axis=2)
            offset = past_key.shape[2]
        elif past_key is not past_value:
            raise ValueError("Attention: past_key and past_value come together, got one of them")
        elif nonpad_kv_seqlen is not None:
            offset = nonpad_kv_seqlen.astype(np.int64, casting="same_kind") - q.shape[2]  # unsigned, it would wrap
        present = k, v

        wide = _widest("Attention", softmax_precision, q, k, v, attn_mask)
        q, k, v = (x.astype(wide, copy=False) for x in (q, k, v))
        mask = bias = None
        if attn_mask is not None:
            if attn_mask.dtype != bool:
                attn_mask = attn_mask.astype(wide, copy=False)
            if attn_mask.ndim == 3:  # (heads, queries, keys)
                attn_mask = attn_mask[np.newaxis]
            if self.run_params["opsets"][""] > 23:  # since then a shorter mask excludes the keys that it lacks
                attn_mask = _padded(attn_mask, k.shape[2])
            mask, bias = (attn_mask, None) if attn_mask.dtype == bool else (None, attn_mask)
        left, right = (None if size == -1 else size for size in (left_window_size, right_window_size))
        cap = softcap if softcap > 0 else None
        y = attention(
            q, k, v, mask=mask, bias=bias, causal=bool(is_causal), window=(left, right), q_offset=offset,
            kv_lengths=nonpad_kv_seqlen, softcap=cap, scale=scale,
        ).astype(Q.dtype, copy=False)  # fmt: skip
        if Q.ndim == 3:
            y = y.swapaxes(1, 2).reshape(*Q.shape[:2], y.shape[1] * y.shape[3])
        if len(self.output) < 4 or not self.output[3]:
            return y, *present
        visible = _visible(q.shape[2], k.shape[2], offset, left, 0 if is_causal else right, nonpad_kv_seqlen)
        if mask is not None:
            visible = visible & mask
        matrix = _matrix(qk_matmul_output_mode, scores(q, k, scale=scale), cap, bias, visible)
        return y, *present, matrix.astype(Q.dtype, copy=False)

    def _check_and_fix_outputs(self, res: tuple[Any, ...]) -> tuple[Any, ...]:
        # The evaluator stores an output that is left out under "", where it looks for inputs that are left out.
        checked = super()._check_and_fix_outputs(res)
        return tuple(x if name else None for name, x in zip(self.output, checked, strict=False))


class FlexAttention(OpRun):
    """The operator of ai.onnx.preview, version 1.

    A score_mod that is a chain of factors, a soft cap, and what is added or hidden (with a number at or below half of
    the type's lowest) after it, such as a causal mask made of the scores' shape, is part of one fused call of
    :func:`qkv_fast.attention`. Any other, and a prob_mod, is evaluated on the matrix, between the stages.

    float16 and bfloat16 are widened (to float32, or as `softmax_precision` says), and the output is rounded once. Rows
    that see nothing are 0, where ONNX's own evaluator has NaN, or the mean of all values.

    Raises
    ------
    ValueError
        A softmax_precision that is no floating type of the operator, and whatever :func:`qkv_fast.attention` refuses.
    """

    op_domain = "ai.onnx.preview"

    def _run(  # names as in the operator, which the evaluator passes by keyword
        self,
        Q: _Array,
        K: _Array,
        V: _Array,
        *,
        prob_mod: Any = None,
        scale: float | None = None,
        score_mod: Any = None,
        softmax_precision: int | None = None,
        attributes: dict[str, Any] | None = None,  # of the function that the node is in, for its graphs
    ) -> tuple[_Array]:
        wide = _widest("FlexAttention", softmax_precision, Q, K, V)
        q, k, v = (x.astype(wide, copy=False) for x in (Q, K, V))
        if q.ndim != 4:
            raise ValueError(f"FlexAttention: Q, K and V must have 4 axes each, got Q.shape={Q.shape}")
        factor = float(q.shape[3]) ** -0.5 if scale is None else scale
        shape = (*q.shape[:3], k.shape[2])
        arguments = {"scale": factor} if score_mod is None else arguments_of(score_mod, shape, factor, wide)
        if arguments is not None and prob_mod is None:
            return (attention(q, k, v, **arguments).astype(V.dtype, copy=False),)
        s = scores(q, k, scale=factor)
        if score_mod is not None:
            s = _modified(score_mod, s, attributes)
        p = softmax(s)
        if prob_mod is not None:
            p = _modified(prob_mod, p, attributes)
        return (weighted_values(p, v).astype(V.dtype, copy=False),)


class Evaluator(ReferenceEvaluator):
    """A ReferenceEvaluator whose nodes Attention are :class:`Attention`, those in the model's functions too, and whose
    nodes FlexAttention are :class:`FlexAttention`.

    It takes what ReferenceEvaluator takes, but for the model by keyword. What `new_ops` has besides is for the graph
    and the bodies of If, Loop and Scan in it, as there; an operator Attention among them goes before ours.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> from onnx import parser
    >>> from qkv_fast.integrations.onnx import Evaluator
    >>> model = parser.parse_model('''<ir_version: 11, opset_import: ["": 24, "layers": 1]>
    ... decoder (float[1, 4, L, 16] x) => (float[1, 4, L, 16] y) { y = layers.attend(x) }
    ... <domain: "layers", opset_import: ["": 24]>
    ... attend (x) => (y) { y = Attention<is_causal=1>(x, x, x) }''')
    >>> x = np.random.default_rng(0).standard_normal((1, 4, 10, 16), dtype=np.float32)
    >>> (y,) = Evaluator(model).run(None, {"x": x})
    >>> bool((y == qkv_fast.attention(x, x, x, causal=True)).all())
    True
    """

    # The evaluators of functions and bodies are of their caller's class, and made by keyword; only those of bodies are
    # given new_ops.
    def __init__(self, proto: Any, *, new_ops: Sequence[type[OpRun]] | None = None, **options: Any) -> None:
        super().__init__(proto, new_ops=[*(new_ops or ()), Attention, FlexAttention], **options)


def _widest(where: str, softmax_precision: int | None, *arrays: _Array | None) -> Any:
    """The type to compute in."""
    if softmax_precision not in (None, *_PRECISIONS):
        allowed = "1 (FLOAT), 10 (FLOAT16), 11 (DOUBLE) or 16 (BFLOAT16)"
        raise ValueError(f"{where}: softmax_precision must be {allowed}, got {softmax_precision}")
    least = np.float32 if softmax_precision is None else tensor_dtype_to_np_dtype(softmax_precision)
    types = (x.dtype for x in arrays if x is not None)
    return functools.reduce(np.promote_types, types, np.promote_types(np.float32, least))


def _modified(graph: Any, x: _Array, attributes: dict[str, Any] | None) -> _Array:
    (found,) = graph.run(None, {graph.input_names[0]: x}, attributes=attributes)
    return np.asarray(found, x.dtype)


def _heads_first(name: str, x: _Array, attribute: str, heads: int | None) -> _Array:
    """A view (batch, heads, length, dim) of that, or of (batch, length, heads * dim)."""
    if x.ndim == 4:
        return x
    if x.ndim != 3 or not heads or x.shape[2] % heads:
        raise ValueError(
            f"Attention: {name} must have 4 axes, or 3 of which {attribute} divides the last, "
            f"got {name}.shape={x.shape}, {attribute}={heads}"
        )
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def _padded(mask: _Array, length: int) -> _Array:
    """The mask (..., keys) for `length` keys, of which it excludes those that it lacks."""
    missing = length - mask.shape[-1]
    if missing <= 0:
        return mask
    ends = [(0, 0)] * (mask.ndim - 1) + [(0, missing)]
    return np.pad(mask, ends, constant_values=False if mask.dtype == bool else -np.inf)


def _visible(len_q: int, len_k: int, offset: Any, left: int | None, right: int | None, lengths: Any) -> _Array:
    """Which keys positions let queries see, bool, ([batch, 1,] Lq, Lk); `offset` and `lengths` one or per sequence."""

    def per_sequence(x: Any) -> Any:
        return np.reshape(x, (-1, 1, 1, 1)) if np.ndim(x) else x

    keys = np.arange(len_k)
    distance = keys - np.arange(len_q)[:, None] - per_sequence(offset)
    visible = keys < per_sequence(len_k if lengths is None else lengths)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    return np.asarray(visible)


def _matrix(mode: int, s: _Array, softcap: float | None, bias: _Array | None, visible: _Array) -> _Array:
    """What qk_matmul_output shows, (batch, heads, Lq, Lk), made from the scaled scores s: how far `mode` says."""
    if mode not in range(4):
        raise ValueError(f"Attention: qk_matmul_output_mode must be 0, 1, 2 or 3, got {mode}")
    if mode >= 1 and softcap is not None:
        s = softcap * np.tanh(s / softcap)
    if mode >= 2 and bias is not None:
        s = s + bias
    if mode == 2:
        s = np.where(visible, s, s.dtype.type(-np.inf))
    if mode == 3:
        s = softmax(s, mask=visible)
    return s
