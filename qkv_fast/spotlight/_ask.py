"""What the questions share: a problem, mostly without values, what attention computes for it, and the core's answer."""

from typing import Any

import numpy as np

from .. import _core, _problem
from .._checks import _EVERYTHING, _OF_QUESTIONS, Array, _fail_words
from .._core import Problem
from .._problem import result_type


def check(
    where: str, q: Any, k: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, mask: Any, bias: Any, causal: Any, window: Any,
    q_offset: Any, q_positions: Any, q_lengths: Any, kv_lengths: Any, kv_starts: Any, segments: Any, alibi_slopes: Any,
    sinks: Any, softcap: Any, scale: Any, layout: Any, num_threads: Any, words: dict[str, Any],
    v: Any = _problem.NO_VALUES,
) -> Problem:  # fmt: skip
    """The problem of arrays, or of packed sequences; unless they are given, its values have no elements."""
    if words:
        _fail_words(where, words, _EVERYTHING, _OF_QUESTIONS)
    return _problem.check_any(
        where, q, k, v, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions, q_lengths,
        kv_lengths, kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip


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
    # All of rows is written, but for those past q_lengths; of weights not those of hidden keys.
    whole = question == "rows" and (p.extras is None or p.extras.queries is None)
    wide = result_type(p)
    result = _core.empty(p.where, shape, wide.num) if whole else zeros(p, shape, wide)
    number = _core.QUESTIONS[question]
    out = _core.scratch(p.where, p.shape, p.number) if out is None else out
    _core.forward(p, out, lse, number, result, keys, normalisers, first_key)
    return result


def zeros(p: Problem, shape: tuple[int, ...], dtype: Any) -> Array:
    """Of pages that are taken when they are written."""
    try:
        return np.zeros(shape, dtype)
    except ValueError:
        raise OverflowError(f"{p.where}: a result of shape {shape} is too large for any array") from None


def empty_keys(p: Problem, shape: tuple[int, ...]) -> Array:
    return _core.empty(p.where, shape, np.dtype(np.int64).num)


def attended(p: Problem) -> tuple[Array, Array]:
    """The output of attention, not rounded to 16 bits, and what makes weights of its scores: in one pass."""
    wide = result_type(p)
    out = _core.empty(p.where, p.shape, wide.num)
    normalisers = _core.empty(p.where, (*p.rows, 2), wide.num)
    _core.forward(p, out, None, 0, normalisers)
    return out, normalisers
