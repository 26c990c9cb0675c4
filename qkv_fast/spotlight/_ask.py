"""What the questions share: a problem, mostly without values, what attention computes for it, and the core's answer."""

from typing import Any

import numpy as np

from .. import _core, _problem
from .._checks import _TYPES, Array, _arithmetic, _as_array
from .._core import Problem


def check(
    where: str, q: Any, k: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, mask: Any, bias: Any, causal: Any, window: Any,
    q_offset: Any, kv_lengths: Any, segments: Any, alibi_slopes: Any, sinks: Any, softcap: Any, scale: Any, layout: Any,
    num_threads: Any, words: dict[str, Any], v: Any = None,
) -> Problem:  # fmt: skip
    """The problem of arrays, or of packed sequences; unless they are given, its values have no elements."""
    if v is None:
        k = _as_array("k", k, where)
        v = k[..., :0] if k.ndim else k
    if cu_seqlens_q is None and cu_seqlens_k is None:
        p = _problem.check(
            where, q, k, v, mask, bias, causal, window, q_offset, kv_lengths, segments, alibi_slopes, sinks, softcap,
            scale, layout, num_threads, words,
        )  # fmt: skip
    else:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise TypeError(f"{where}: packed sequences need both cu_seqlens_q and cu_seqlens_k")
        if layout != "bhld":
            raise ValueError(f"{where}: packed sequences are (tokens, heads, dim) and take no layout, got {layout!r}")
        p = _problem.check_ragged(
            where, q, k, v, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, kv_lengths, segments,
            alibi_slopes, sinks, softcap, scale, num_threads, words,
        )  # fmt: skip
    return p


def key_count(p: Problem) -> int:
    """Keys of a sequence, or of all packed ones; of a cache those of its longest sequence."""
    if p.extras is not None and p.extras.runs is not None:
        return int(p.extras.longest_k)
    count: int = p.k.shape[-2 if p.k.ndim == 2 or p.heads_first else -3]
    return count


def answer(
    p: Problem, question: str, shape: tuple[int, ...], *, lse: Array | None = None, keys: Array | None = None,
    normalisers: Array | None = None, first_key: int = 0, out: Array | None = None,
) -> Array:  # fmt: skip
    """What the core says, an array of this shape."""
    # All of rows is written; of weights not those of hidden keys.
    result = (np.empty if question == "rows" else np.zeros)(shape, result_type(p))
    number = _core.QUESTIONS[question]
    _core.forward(p, p.empty() if out is None else out, lse, number, result, keys, normalisers, first_key)
    return result


def result_type(p: Problem) -> np.dtype[Any]:
    return _TYPES[_arithmetic(p.number)]


def empty_keys(p: Problem, shape: tuple[int, ...]) -> Array:
    return _core.empty(p.where, shape, np.dtype(np.int64).num)


def check_lse(p: Problem, lse: Any) -> Array:
    """A log-sum-exp as attention returns it for this problem, contiguous."""
    given = _as_array("lse", lse, p.where)
    expected = result_type(p)
    if given.dtype.num != expected.num:
        known = f"{expected}, as attention returns it for {p.q.dtype}"
        raise TypeError(f"{p.where}: lse must be {known}, got {given.dtype}")
    if given.shape != p.rows:
        raise ValueError(f"{p.where}: lse must have the shape {p.rows}, got lse.shape={given.shape}")
    return np.ascontiguousarray(given, expected)


def check_output(p: Problem, output: Any) -> Array:
    """The output of attention for this problem; any strides."""
    given = _as_array("output", output, p.where)
    own, wide = _TYPES[p.number], result_type(p)
    if given.dtype.num not in (own.num, wide.num):
        known = f"{own}" if own == wide else f"{own} or {wide}"
        known += f", as attention returns it for {p.q.dtype}"
        raise TypeError(f"{p.where}: output must be {known}, got {given.dtype}")
    if given.shape != p.shape:
        raise ValueError(f"{p.where}: output must have the shape {p.shape}, got output.shape={given.shape}")
    return given


def attended(p: Problem) -> tuple[Array, Array]:
    """The output of attention, not rounded to 16 bits, and what makes weights of its scores: in one pass."""
    wide = result_type(p)
    out = _core.empty(p.where, p.shape, wide.num)
    normalisers = _core.empty(p.where, (*p.rows, 2), wide.num)
    _core.forward(p, out, None, 0, normalisers)
    return out, normalisers
