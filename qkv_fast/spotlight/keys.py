"""A question about each key: the weight that it receives."""

from typing import Any, Never

from .._checks import Array
from .._help import documented
from . import _answers, _ask


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
    q_positions: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    kv_starts: Any = None,
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
    <q_positions>
    <q_lengths>
    <kv_lengths>
    <kv_starts>
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
        "spotlight.received", q, k, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions,
        q_lengths, kv_lengths, kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    return _answers.received(p, lse, queries)
