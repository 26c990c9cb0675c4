"""Chosen rows of a problem. Queries that follow one another are a problem of their own, in which every query keeps its
position, and its rows of masks and of all else; others are several such problems."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from .._checks import Array, _as_array
from .._core import Problem


def indices(where: str, name: str, given: Any, length: int) -> Array:
    """The int64 indices that a slice or integers mean, not negative, in their order."""
    if isinstance(given, slice):
        try:
            return np.arange(length)[given]
        except TypeError:
            raise TypeError(f"{where}: {name} must be a slice of integers, got {given!r}") from None
        except ValueError:
            raise ValueError(f"{where}: {name} must be a slice whose step is not 0, got {given!r}") from None
    array = _as_array(name, given, where)
    if array.dtype.kind not in "iu" and not (array.size == 0 and isinstance(given, (list, tuple))):
        way_out = f"; pass numpy.flatnonzero({name})" if array.dtype == bool and array.ndim == 1 else ""
        raise TypeError(f"{where}: {name} must be a slice or integers, got {array.dtype}{way_out}")
    if array.ndim != 1:
        way_out = "" if array.ndim else f"; pass {name}=[{array}] for this one, or a slice"
        raise ValueError(f"{where}: {name} must have one axis, got shape {array.shape}{way_out}")
    if np.any(wrong := (array < -length) | (array >= length)):
        raise ValueError(f"{where}: {name} must be in {-length}..{length - 1}, got {array[wrong][0]}")
    array = array.astype(np.int64)
    return np.where(array < 0, array + length, array)


def runs(numbers: Array, *alike: Array) -> Iterator[slice]:
    """Slices of increasing numbers that follow one another without gaps, and along which `alike` do not change."""
    breaks = np.diff(numbers) != 1
    for x in alike:
        breaks |= np.diff(x) != 0
    ends = [0, *(np.flatnonzero(breaks) + 1).tolist(), numbers.size]
    return (slice(a, b) for a, b in itertools.pairwise(ends) if a < b)


def queries(p: Problem, first: int, last: int) -> Problem:
    """The problem of the queries first .. last of every sequence alone; not of packed sequences."""
    len_q, batch, n = p.rows[-1], p.rows[:-2], last - first
    heads_first = p.heads_first or p.q.ndim == 2
    len_k = p.k.shape[-2 if heads_first else -3]
    q = p.q[..., first:last, :] if heads_first else p.q[..., first:last, :, :]
    rows = (*p.rows[:-1], n)
    shape = (*rows, p.shape[-1]) if heads_first else (*batch, n, p.rows[-2], p.shape[-1])
    offsets = p.offsets
    if offsets is None:
        count = len_q if p.extras is None or p.extras.queries is None else p.extras.queries
        offsets = (np.full(batch, len_k) if p.lengths is None else p.lengths) - count
    extras = p.extras
    if extras is not None:
        own = {name: _rows(getattr(extras, name), len_q, first, last) for name in ("mask", "bias")}
        if extras.spans is not None:
            own["spans"] = np.ascontiguousarray(extras.spans[..., first:last, :])
        if extras.positions is not None:
            own["positions"] = np.ascontiguousarray(extras.positions[..., first:last])
        if extras.queries is not None:
            own["queries"] = np.asarray(np.clip(extras.queries - first, 0, n))  # of one sequence, too
        if extras.q_ids is not None:
            own["q_ids"] = np.ascontiguousarray(extras.q_ids[..., first:last])
        extras = extras._replace(**own)
    return Problem(
        p.where, q, p.k, p.v, p.heads_first, shape, rows, p.scale, p.left, p.right,
        np.ascontiguousarray(offsets + first, np.int64), p.lengths, extras, p.threads, p.isa, p.counters,
    )  # fmt: skip


def _rows(x: Array | None, len_q: int, first: int, last: int) -> Array | None:
    """Of a mask or a bias, unless one row is for all queries."""
    return x if x is None or x.ndim < 2 or x.shape[-2] != len_q else x[..., first:last, :]
