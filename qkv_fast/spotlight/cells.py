"""The whole map of weights in cells."""

from typing import Any, Never

import numpy as np

from .._checks import Array, _index
from .._help import documented
from . import _ask

_QUESTIONS = {"mean": "means", "max": "maxima"}


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
        "spotlight.pooled", q, k, None, None, mask, bias, causal, window, q_offset, kv_lengths, segments,
        alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    cells = _cells(p.where, shape)
    if not isinstance(reduce, str):
        raise TypeError(f"{p.where}: reduce must be 'mean' or 'max', got {reduce!r}")
    if reduce not in _QUESTIONS:
        raise ValueError(f"{p.where}: reduce must be 'mean' or 'max', got {reduce!r}")
    if lse is not None:
        lse = _ask.check_lse(p, lse)
    rows, columns = min(cells[0], p.rows[-1]), min(cells[1], _ask.key_count(p))
    normalisers = _ask.answer(p, "normalisers", (*p.rows, 2)) if lse is None else None
    return _ask.answer(p, _QUESTIONS[reduce], (*p.rows[:-1], rows, columns), lse=lse, normalisers=normalisers)


def _cells(where: str, shape: Any) -> tuple[int, int]:
    wrong = f"{where}: shape must be two integers, of rows and columns, got {shape!r}"
    try:
        sizes = tuple(shape)
    except TypeError:
        raise TypeError(wrong) from None
    if len(sizes) != 2:
        raise ValueError(wrong)
    rows, columns = (_index(n) if not isinstance(n, (bool, np.bool_)) else None for n in sizes)
    if rows is None or columns is None:
        raise TypeError(wrong)
    if rows < 1 or columns < 1:
        raise ValueError(f"{where}: shape must be at least 1 in each axis, got {shape!r}")
    return rows, columns
