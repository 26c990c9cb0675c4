"""What a score_mod of ONNX's FlexAttention means in our arguments, where it is a chain of steps that they have.

A score_mod is a graph from scores to scores. Its nodes that do not depend on the values of the scores (masks made of
their shape, constants) are evaluated; those that do must be one chain: factors, a soft cap, and then whatever is added
or hidden.
"""

from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]


def arguments_of(graph: Any, shape: tuple[int, ...], scale: float, dtype: Any) -> dict[str, Any] | None:
    """scale, softcap, bias and mask of :func:`qkv_fast.attention` for scores (batch, heads, Lq, Lk) of `dtype`, or None
    where the graph, an evaluator, is no such chain."""
    (head,) = graph.input_names
    links = {head}  # of the chain: all of one shape
    known: dict[str, Any] = {"": None, **graph.rt_inits_}
    chain = _Chain(scale)
    for node in graph.rt_nodes_:
        names = list(node.onnx_node.input)
        if node.op_type == "Shape" and names[0] in links:
            known[node.output[0]] = np.array(shape, np.int64)[node.start : node.end]
        elif all(name in known for name in names):
            if node.has_linked_attribute or any(found.type == found.GRAPH for found in node.onnx_node.attribute):
                return None
            known.update(zip(node.output, node.run(*(known[name] for name in names)), strict=True))
        elif names.count(head) == 1 and all(name in known for name in names if name != head):
            at = names.index(head)
            if not chain.take(node, at, [known[name] for name in names if name != head], dtype):
                return None
            head = node.output[0]
            links.add(head)
        else:
            return None
    if list(graph.output_names) != [head]:
        return None
    options = {"scale": chain.scale, "softcap": chain.cap, "bias": chain.bias, "mask": chain.mask}
    arrays = [x for x in (chain.bias, chain.mask) if x is not None]
    if any(len(x.shape) > 4 or np.broadcast_shapes(x.shape, shape) != shape for x in arrays):
        return None
    four = {name: x.reshape((1,) * (4 - x.ndim) + x.shape) for name, x in options.items() if isinstance(x, np.ndarray)}
    return options | four


class _Chain:
    """The steps so far: cap * tanh(scale * score / cap) + bias where mask."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.cap: float | None = None
        self.bias: _Array | None = None
        self.mask: _Array | None = None

    def take(self, node: Any, at: int, others: list[_Array], dtype: Any) -> bool:
        """One more step, whose input number `at` is the scores; whether it is one of ours."""
        scaled = self.bias is None and self.mask is None
        match node.op_type:
            case "Identity":
                return True
            case "Cast":
                return bool(np.dtype(dtype) == _type_of(node))
            case "Mul" | "Div" if scaled and others[0].size == 1 and (node.op_type == "Mul" or at == 0):
                return self._multiply(float(others[0].item()), node.op_type == "Div")
            case "Tanh" if scaled and self.cap is None:
                self.cap = 1.0
                return True
            case "Add" | "Sub" if node.op_type == "Add" or at == 0:
                added = others[0] if node.op_type == "Add" else -others[0]
                self.bias = added if self.bias is None else self.bias + added
                return True
            case "Where" if at > 0:
                condition, value = others
                if not np.all(value <= np.finfo(dtype).min / 2):
                    return False
                seen = condition if at == 1 else ~condition
                self.mask = seen if self.mask is None else self.mask & seen
                return True
        return False

    def _multiply(self, factor: float, divides: bool) -> bool:
        if not np.isfinite(factor) or (divides and factor == 0):
            return False
        factor = 1 / factor if divides else factor
        if self.cap is None:
            self.scale *= factor
        elif factor > 0:  # the scores in it stay what they were
            self.cap *= factor
            self.scale *= factor
        return self.cap is None or factor > 0


def _type_of(cast: Any) -> Any:
    from onnx.helper import tensor_dtype_to_np_dtype

    return tensor_dtype_to_np_dtype(cast.to)
