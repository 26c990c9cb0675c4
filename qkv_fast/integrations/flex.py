"""torch's `flex_attention` on our attention, for the masks and scores that most models use, with gradients.

FlexAttention takes any Python function of a score or of a pair of positions. What a function computes cannot be known
from outside, so ours takes those that this module makes: they are functions too, which torch's own `flex_attention` and
`create_block_mask` take as they are. Any other is refused by name.

Examples
--------
>>> import torch
>>> from qkv_fast.integrations import flex
>>> q, k, v = torch.randn(3, 1, 12, 100, 64)  # batch, heads, length, dim
>>> mask = flex.causal() & flex.documents(torch.arange(100) // 30)
>>> flex.flex_attention(q, k, v, flex.soft_cap(20.0), mask).shape
torch.Size([1, 12, 100, 64])
"""

import dataclasses
import operator
from typing import Any

import torch

from .. import attention
from ._tensors import TYPES, as_tensor, check_tensor, check_tensors, memory, refuse
from .torch import Recorded

__all__ = ["Mask", "Score", "alibi", "causal", "documents", "flex_attention", "sliding_window", "soft_cap"]

_NAME = "flex_attention"


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A mask_mod that `flex_attention` knows: keys from `left` before a query's position, its index plus `offset`, to
    `right` after it (None: open), and of the same document. ``a & b`` is both masks."""

    left: int | None = None
    right: int | None = None
    offset: int | None = None
    ids: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        """What torch asks of a pair of positions."""
        distance = q_idx + (self.offset or 0) - kv_idx
        seen = distance == distance  # True, for numbers and for tensors
        if self.left is not None:
            seen = seen & (distance <= self.left)
        if self.right is not None:
            seen = seen & (distance >= -self.right)
        if self.ids is not None:
            of_query, of_key = self.ids
            seen = seen & (_at(of_query, b, q_idx) == _at(of_key, b, kv_idx))
        return seen

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        if self.ids is not None and other.ids is not None:
            refuse(_NAME, "one mask of documents at most")
        sides = ([x for x in pair if x is not None] for pair in ((self.left, other.left), (self.right, other.right)))
        left, right = (min(side, default=None) for side in sides)
        ids = self.ids if other.ids is None else other.ids
        return Mask(left, right, _one_offset(self.offset, other.offset), ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """A score_mod that `flex_attention` knows: a soft cap, and then ALiBi. ``soft_cap(c).then(alibi(slopes))``."""

    cap: float | None = None
    slopes: torch.Tensor | None = None
    offset: int | None = None

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        """What torch asks of a score."""
        if self.cap is not None:
            score = self.cap * torch.tanh(score / self.cap)
        if self.slopes is not None:
            score = score - self.slopes[h] * (q_idx + (self.offset or 0) - kv_idx).abs()
        return score

    def then(self, other: "Score") -> "Score":
        """This one and then another, as far as there is a place for it.

        Parameters
        ----------
        other : Score
            What is done to the score after this.

        Returns
        -------
        Score
            Both.

        Raises
        ------
        NotImplementedError
            Anything but ALiBi after a soft cap.

        Examples
        --------
        >>> import torch
        >>> from qkv_fast.integrations import flex
        >>> flex.soft_cap(20.0).then(flex.alibi(torch.tensor([0.5, 0.25]))).cap
        20.0
        """
        if self.slopes is not None or other.cap is not None:
            refuse(_NAME, "no score but ALiBi after a soft cap")
        return Score(self.cap, other.slopes, other.offset)


def causal(offset: int = 0) -> Mask:
    """Query i sees the keys 0 to i + offset.

    Parameters
    ----------
    offset : int, default 0
        Of the positions of queries, such as the number of keys in a cache before them.

    Returns
    -------
    Mask
        For `flex_attention`, or as a mask_mod of torch.

    Raises
    ------
    TypeError
        No integer.

    Examples
    --------
    >>> from qkv_fast.integrations import flex
    >>> flex.causal(2)(0, 0, 1, 3), flex.causal(2)(0, 0, 1, 4)
    (True, False)
    """
    return Mask(right=0, offset=operator.index(offset))


def sliding_window(left: int | None, right: int | None = 0, offset: int = 0) -> Mask:
    """Query i sees the keys from i + offset - left to i + offset + right, itself among them.

    Parameters
    ----------
    left : int or None
        How far back; None is open.
    right : int or None, default 0
        How far ahead.
    offset : int, default 0
        As in `causal`.

    Returns
    -------
    Mask
        For `flex_attention`, or as a mask_mod of torch.

    Raises
    ------
    TypeError
        No integers.
    ValueError
        Negative distances.

    Examples
    --------
    >>> from qkv_fast.integrations import flex
    >>> [flex.sliding_window(2)(0, 0, 5, key) for key in range(7)]
    [False, False, False, True, True, True, False]
    """
    sides = [None if side is None else operator.index(side) for side in (left, right)]
    if any(side is not None and side < 0 for side in sides):
        raise ValueError(f"sliding_window: distances must not be negative, got {left} and {right}")
    return Mask(sides[0], sides[1], operator.index(offset))


def documents(ids: torch.Tensor, kv_ids: torch.Tensor | None = None) -> Mask:
    """A query sees the keys of its own document.

    Parameters
    ----------
    ids : torch.Tensor of integers, shape (L,) or (B, L)
        The document of each query, and of each key where `kv_ids` is not given.
    kv_ids : torch.Tensor of integers, shape (S,) or (B, S), optional
        The document of each key.

    Returns
    -------
    Mask
        For `flex_attention`, or as a mask_mod of torch.

    Raises
    ------
    TypeError
        No tensors of integers.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations import flex
    >>> bool(flex.documents(torch.tensor([0, 0, 1]))(0, 0, 0, 2))
    False
    """
    both = (ids, ids if kv_ids is None else kv_ids)
    for name, x in zip(("ids", "kv_ids"), both, strict=True):
        check_tensor("documents", name, x, (torch.int64, torch.int32))
    return Mask(ids=both)


def soft_cap(cap: float) -> Score:
    """Scores become ``cap * tanh(score / cap)``.

    Parameters
    ----------
    cap : float
        Above 0.

    Returns
    -------
    Score
        For `flex_attention`, or as a score_mod of torch.

    Raises
    ------
    ValueError
        A cap that is not above 0.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations import flex
    >>> round(float(flex.soft_cap(2.0)(torch.tensor(100.0), 0, 0, 0, 0)), 3)
    2.0
    """
    if not cap > 0:
        raise ValueError(f"soft_cap: cap must be above 0, got {cap!r}")
    return Score(cap=float(cap))


def alibi(slopes: torch.Tensor, offset: int = 0) -> Score:
    """Scores lose their head's slope for each step between a query's position and a key.

    Where keys lie ahead too, they lose as much: ``slope * (kv_idx - q_idx)``, as in most examples of FlexAttention,
    differs there.

    Parameters
    ----------
    slopes : torch.Tensor, shape (Hq,)
        Of each head.
    offset : int, default 0
        As in `causal`.

    Returns
    -------
    Score
        For `flex_attention`, or as a score_mod of torch.

    Raises
    ------
    TypeError
        No tensor of a floating type.
    NotImplementedError
        Slopes with `requires_grad`.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations import flex
    >>> float(flex.alibi(torch.tensor([0.5]))(torch.tensor(1.0), 0, 0, torch.tensor(3), torch.tensor(1)))
    0.0
    """
    check_tensor("alibi", "slopes", slopes, TYPES)
    if slopes.requires_grad:
        refuse("alibi", "no gradients of slopes: slopes has requires_grad set; pass slopes.detach()")
    return Score(slopes=slopes, offset=operator.index(offset))


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Score | None = None,
    block_mask: Mask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """What `torch.nn.attention.flex_attention.flex_attention` computes, on CPU tensors, for functions of this module.

    Parameters
    ----------
    query : torch.Tensor, shape (B, Hq, L, E)
        Queries, float32, float64, float16 or bfloat16, on the CPU; read where they lie, as are key and value.
    key : torch.Tensor, shape (B, H, S, E)
        Keys, of query's type; B may be 1.
    value : torch.Tensor, shape (B, H, S, Ev)
        Values, of query's type.
    score_mod : Score, optional
        `soft_cap`, `alibi`, or one and then the other.
    block_mask : Mask, optional
        `causal`, `sliding_window`, `documents`, or several of them with ``&``. The mask itself: no block mask is made.
    scale : float, optional
        Factor of the scores, ``1 / sqrt(E)`` by default.
    enable_gqa : bool, default False
        Whether H may be less than Hq, which it divides then.
    return_lse : bool, default False
        Whether to return the log-sum-exp too.
    kernel_options : None
        For kernels of torch's.
    return_aux : torch.nn.attention.flex_attention.AuxRequest, optional
        Of ``lse``.

    Returns
    -------
    out : torch.Tensor, shape (B, Hq, L, Ev)
        Of query's type. Rows that see nothing are 0.
    lse : torch.Tensor, shape (B, Hq, L)
        With `return_lse`, or in an AuxOutput with `return_aux`: natural logarithms, float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        Types and shapes that do not fit.
    ImportError
        bfloat16 without ml_dtypes.
    NotImplementedError
        A function, or a BlockMask, that this module did not make; kernel_options; the largest scores; what
        `qkv_fast.integrations.torch` refuses.

    Notes
    -----
    The meaning is that of torch 2.13. The function is from J. Dong, B. Feng, D. Guessous, Y. Liang and H. He, "Flex
    Attention: a programming model for generating optimized attention kernels", 2024.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations import flex
    >>> q, k, v = torch.randn(3, 2, 4, 5, 16)
    >>> out = flex.flex_attention(q, k, v, block_mask=flex.causal())
    >>> torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.disable(flex_attention)(
            query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse, kernel_options,
            return_aux=return_aux,
        )  # fmt: skip
    tensors = {"query": query, "key": key, "value": value}
    plain = check_tensors(_NAME, tensors)
    shapes = ", ".join(f"{name}: {tuple(x.shape)}" for name, x in tensors.items())
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"{_NAME}: query, key and value must have 4 axes each ({shapes})")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(f"{_NAME}: for groups of query heads pass enable_gqa=True ({shapes})")
    score = _known("score_mod", score_mod, Score) or Score()
    mask = _known("block_mask", block_mask, Mask) or Mask()
    if kernel_options is not None:
        refuse(_NAME, f"no kernel_options: they are for kernels of torch's, got {kernel_options!r}")
    if return_aux is not None and (return_lse or return_aux.max_scores):
        refuse(_NAME, f"return_aux is for lse alone, without return_lse, got {return_aux!r}")

    options: dict[str, Any] = {"q_offset": _one_offset(score.offset, mask.offset) or 0, "scale": scale}
    options |= {"window": (mask.left, mask.right), "softcap": score.cap}
    if score.slopes is not None:
        options["alibi_slopes"] = memory(_NAME, "slopes", score.slopes, False)
    if mask.ids is not None:
        options["segments"] = tuple(memory(_NAME, "ids", ids, False) for ids in mask.ids)
    given = [memory(_NAME, name, x, plain) for name, x in tensors.items()]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        out, lse = Recorded.apply(_NAME, options, query, key, value)
    else:
        out, lse = map(as_tensor, attention(*given, return_lse=True, **options))
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def _at(ids: torch.Tensor, b: Any, index: Any) -> torch.Tensor:
    return ids[index] if ids.ndim == 1 else ids[b, index]


def _known(name: str, given: Any, kind: type[Any]) -> Any:
    if given is None or isinstance(given, kind):
        return given
    what = getattr(given, "mask_mod", given)
    what = getattr(what, "__qualname__", None) or repr(what)
    refuse(
        _NAME,
        f"{name} must be made by qkv_fast.integrations.flex, got {type(given).__name__} ({what}): what another "
        "function computes is not known. A Mask is passed itself, not a BlockMask of it",
    )


def _one_offset(a: int | None, b: int | None) -> int | None:
    if a is not None and b is not None and a != b:
        raise ValueError(f"{_NAME}: positions have one offset, got {a} and {b}")
    return b if a is None else a
