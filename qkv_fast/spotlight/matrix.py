"""Parts of the matrix of weights."""

from typing import Any, Never

from .._checks import Array
from .._help import documented
from . import _answers, _ask


@documented
def weights(
    q: Any,
    k: Any,
    *,
    queries: Any = None,
    keys: Any = None,
    lse: Any = None,
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
    """The weights of chosen queries and keys: exact rows and columns of the matrix, without the rest of it.

    Parameters
    ----------
    <q>
    <k>
    queries, keys : slice or array_like of int, optional
        Which, all by default; negative ones count from the last, in any order, repeated ones are repeated. They select
        rows and columns of the whole problem: positions, masks and `lse` stay those of all queries and keys.
    <lse>
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
    ndarray, shape (..., Hq, queries, keys)
        Their softmax over all visible keys, float32 (float64 for float64), head-first in every layout; 0 where a key is
        hidden.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`; also for an `lse` of another shape or type, and `queries` or `keys` that are no
        integers or out of range.

    See Also
    --------
    qkv_fast.attention : What every argument means.
    qkv_fast.reference.spotlight : The definition in plain NumPy.

    Notes
    -----
    Queries that follow one another are computed together, so a slice is faster than as many scattered ones.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import spotlight
    >>> q, k = np.zeros((3, 1)), np.ones((3, 1))
    >>> spotlight.weights(q, k, causal=True, queries=[-1, 0], keys=slice(0, 2)).round(3)
    array([[0.333, 0.333],
           [1.   , 0.   ]])
    """
    p = _ask.check(
        "spotlight.weights", q, k, None, None, mask, bias, causal, window, q_offset, q_positions, q_lengths, kv_lengths,
        kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    return _answers.weights(p, queries, keys, lse)
