"""A question about each key: the weight that it receives."""

from typing import Any, Never

import numpy as np

from .._checks import Array
from .._core import Problem
from .._help import documented
from . import _ask, _select


@documented
def received(
    q: Any,
    k: Any,
    *,
    lse: Any = None,
    queries: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    mask: Any = None,
    bias: Any = None,
    causal: bool | str = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    kv_lengths: Any = None,
    segments: tuple[Any, Any] | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    layout: str = "bhld",
    num_threads: int | None = None,
    **words: Never,
) -> Array:
    """The weight that each key receives, summed over queries.

    Parameters
    ----------
    <q>
    <k>
    <lse>
    queries : slice or array_like of int, optional
        The queries that count, all by default: ``slice(-32, None)`` are the last 32, as the eviction of keys from a
        cache wants. Negative ones count from the last, repeated ones count again. Positions, masks and `lse` stay
        those of all queries. Not for packed sequences.
    <cu_seqlens_q>
        Only of packed sequences; q is then (Tq, Hq, D) and k (Tk, Hkv, D), as in `qkv_fast.attention_varlen`.
    <mask>
    <bias>
    <causal>
    <window>
    <q_offset>
    <kv_lengths>
    <segments>
    <alibi_slopes>
    <sinks>
    <softcap>
    <scale>
    <layout>
        It is that of q and k.
    <num_threads>

    Returns
    -------
    ndarray, shape (..., Hq, Lk)
        float32 (float64 for float64), head-first in every layout; 0 for keys that nobody sees. (Hq, Tk) of packed
        sequences.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`; also for an `lse` of another shape or type, and `queries` that are no integers or
        out of range.

    See Also
    --------
    qkv_fast.attention : What every argument means.
    qkv_fast.reference.spotlight : The definition in plain NumPy.

    Notes
    -----
    The order of the sums is fixed: the same bits for any number of threads. Keys that receive most are those that
    caches keep: Z. Zhang et al., "H2O: Heavy-Hitter Oracle", 2023, section 4; Y. Li et al., "SnapKV", 2024, section 4,
    sums over the last queries.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import spotlight
    >>> q, k = np.zeros((3, 1)), np.ones((3, 1))
    >>> spotlight.received(q, k, causal=True).round(3)
    array([1.833, 0.833, 0.333])
    >>> spotlight.received(q, k, causal=True, queries=[-1]).round(3)
    array([0.333, 0.333, 0.333])
    """
    p = _ask.check(
        "spotlight.received", q, k, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, kv_lengths,
        segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    if queries is not None and p.extras is not None and p.extras.q_starts is not None:
        raise ValueError("spotlight.received: packed sequences take no queries, whose numbers mean one sequence")
    if lse is not None:
        lse = _ask.check_lse(p, lse)
    if queries is None:
        return _sums(p, lse)
    chosen, times = np.unique(_select.indices(p.where, "queries", queries, p.rows[-1]), return_counts=True)
    total = np.zeros((*p.rows[:-1], _ask.key_count(p)), _ask.result_type(p))
    for run in _select.runs(chosen, times):
        first, last = int(chosen[run][0]), int(chosen[run][-1]) + 1
        part = None if lse is None else np.ascontiguousarray(lse[..., first:last])
        total += times[run][0] * _sums(_select.queries(p, first, last), part)
    return total


def _sums(p: Problem, lse: Array | None) -> Array:
    normalisers = _ask.answer(p, "normalisers", (*p.rows, 2)) if lse is None else None
    return _ask.answer(p, "received", (*p.rows[:-1], _ask.key_count(p)), lse=lse, normalisers=normalisers)
