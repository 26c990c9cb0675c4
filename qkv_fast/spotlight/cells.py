"""The whole map of weights in cells."""

from typing import Any, Never

from .._checks import Array
from .._help import documented
from . import _answers, _ask


@documented
def pooled(
    q: Any,
    k: Any,
    shape: tuple[int, int] = (256, 256),
    reduce: str = "mean",
    *,
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
    """The whole map of weights in cells: a picture of it at any length.

    Parameters
    ----------
    <q>
    <k>
    shape : (int, int), default (256, 256)
        Rows and columns of cells, at least 1 each; no more of them are used than there are queries and keys. Row r of R
        holds the queries from ``r * Lq // R`` to before ``(r + 1) * Lq // R``, and so with columns and keys.
    reduce : {"mean", "max"}, default "mean"
        What a cell says of its weights. Those of hidden keys are 0.
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
    ndarray, shape (..., Hq, R, C)
        R is ``min(shape[0], Lq)``, C ``min(shape[1], Lk)``; float32 (float64 for float64), head-first in every layout.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`; also for a `shape` that is not two integers of at least 1, another `reduce`, and an
        `lse` of another shape or type.

    See Also
    --------
    qkv_fast.attention : What every argument means.
    qkv_fast.reference.spotlight : The definition in plain NumPy.

    Notes
    -----
    The order of the sums is fixed: the same bits for any number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import spotlight
    >>> q, k = np.zeros((4, 1)), np.ones((4, 1))
    >>> spotlight.pooled(q, k, (2, 2), causal=True)
    array([[0.5       , 0.        ],
           [0.29166667, 0.20833333]])
    >>> spotlight.pooled(q, k, (2, 2), "max", causal=True).round(3)
    array([[1.   , 0.   ],
           [0.333, 0.333]])
    """
    p = _ask.check(
        "spotlight.pooled", q, k, None, None, mask, bias, causal, window, q_offset, q_positions, q_lengths, kv_lengths,
        kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    return _answers.pooled(p, shape, reduce, lse)
