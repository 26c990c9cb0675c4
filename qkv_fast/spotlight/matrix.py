"""Parts of the matrix of weights."""

from collections.abc import Iterator
from typing import Any, Never

import numpy as np

from .._checks import Array
from .._core import Problem
from .._help import documented
from . import _ask, _select

_NEAR = 128  # keys of a kernel's call


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
        "spotlight.weights", q, k, None, None, mask, bias, causal, window, q_offset, kv_lengths, segments,
        alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    if lse is not None:
        lse = _ask.check_lse(p, lse)
    rows, at_rows = _chosen(p, "queries", queries, p.rows[-1])
    columns, at_columns = _chosen(p, "keys", keys, _ask.key_count(p))
    parts = [(rows[run], list(_spans(columns))) for run in _select.runs(rows)]
    if len(parts) == 1 and len(parts[0][1]) == 1 and columns.size == columns[-1] - columns[0] + 1:
        found = _block(p, rows, [columns], lse)[0]
    else:
        found = np.zeros((*p.rows[:-1], rows.size, columns.size), _ask.result_type(p))
        done = 0
        for own, spans in parts:
            to = 0
            for span, part in zip(spans, _block(p, own, spans, lse), strict=True):
                found[..., done : done + own.size, to : to + span.size] = part[..., span - span[0]]
                to += span.size
            done += own.size
    if at_rows is not None:
        found = np.take(found, at_rows, axis=-2)
    return found if at_columns is None else np.take(found, at_columns, axis=-1)


def _chosen(p: Problem, name: str, given: Any, length: int) -> tuple[Array, Array | None]:
    """Increasing numbers, and where each that was asked for stands among them; None if that is their order."""
    if given is None:
        return np.arange(length), None
    asked = _select.indices(p.where, name, given, length)
    if (np.diff(asked) > 0).all():
        return asked, None
    return np.unique(asked, return_inverse=True)


def _spans(columns: Array) -> Iterator[Array]:
    """Keys that are near each other, as a kernel takes so many at a time."""
    breaks = np.flatnonzero(np.diff(columns) > _NEAR) + 1
    return (span for span in np.split(columns, breaks) if span.size)


def _block(p: Problem, rows: Array, spans: list[Array], lse: Array | None) -> list[Array]:
    """The weights of rows that follow one another, from the first to the last key of each span."""
    if not rows.size:
        return [np.zeros((*p.rows[:-1], 0, span[-1] + 1 - span[0]), _ask.result_type(p)) for span in spans]
    first, last = int(rows[0]), int(rows[-1]) + 1
    own = _select.queries(p, first, last)
    lse = None if lse is None else np.ascontiguousarray(lse[..., first:last])
    normalisers = _ask.answer(own, "normalisers", (*own.rows, 2)) if lse is None else None
    return [
        _ask.answer(own, "weights", (*own.rows, int(span[-1] + 1 - span[0])), lse=lse, normalisers=normalisers,
                    first_key=int(span[0]))
        for span in spans
    ]  # fmt: skip
