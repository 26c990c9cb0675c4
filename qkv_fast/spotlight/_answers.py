"""The answers to questions about a problem, whoever has made it: a function of arrays, or a cache."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import _core, _problem
from .._checks import Array, _as_array, _index, _restated
from .._core import Problem
from . import _ask, _select

_NEAR = 128  # keys of a kernel's call
_MOST_GROUPS = 2**48  # of a head; their sums would not fit in any memory
_OF_CELLS = {"mean": "means", "max": "maxima"}


def largest(p: Problem) -> Array:
    if p.extras is not None:
        p.extras = p.extras._replace(slopes=None, sinks=None, softcap=0.0)
    found = _ask.answer(p, "largest", p.rows)
    _problem.blank(p, found, -np.inf)
    return found


def entropy(p: Problem) -> Array:
    return _ask.answer(p, "entropy", p.rows)


def top_keys(p: Problem, n: Any) -> tuple[Array, Array]:
    count = _index(n) if not isinstance(n, (bool, np.bool_)) else None
    if count is None:
        raise TypeError(f"{p.where}: n must be an integer, got {_restated(n)}{_no_values(n)}")
    if count < 1:
        raise ValueError(f"{p.where}: n must be at least 1, got {count}")
    shape = (*p.rows, count)
    keys = _ask.empty_keys(p, shape)
    _problem.blank(p, keys, -1, axis=-2)
    return keys, _ask.answer(p, "top_keys", shape, keys=keys)


def received(p: Problem, lse: Any, queries: Any) -> Array:
    if queries is not None and p.extras is not None and p.extras.q_starts is not None:
        raise ValueError(f"{p.where}: packed sequences take no queries, whose numbers mean one sequence")
    if lse is not None:
        lse = _problem.check_lse(p, lse)
    if queries is None:
        return _sums(p, lse)
    chosen, times = np.unique(_select.indices(p.where, "queries", queries, p.rows[-1]), return_counts=True)
    total = np.zeros((*p.rows[:-1], _ask.key_count(p)), _problem.result_type(p))
    for run in _select.runs(chosen, times):
        first, last = int(chosen[run][0]), int(chosen[run][-1]) + 1
        part = None if lse is None else np.ascontiguousarray(lse[..., first:last])
        total += times[run][0] * _sums(_select.queries(p, first, last), part)
    return total


def _sums(p: Problem, lse: Array | None) -> Array:
    normalisers = _ask.answer(p, "normalisers", (*p.rows, 2)) if lse is None else None
    return _ask.answer(p, "received", (*p.rows[:-1], _ask.key_count(p)), lse=lse, normalisers=normalisers)


def weights(p: Problem, queries: Any, keys: Any, lse: Any) -> Array:
    if lse is not None:
        lse = _problem.check_lse(p, lse)
    rows, at_rows = _chosen(p, "queries", queries, p.rows[-1])
    columns, at_columns = _chosen(p, "keys", keys, _ask.key_count(p))
    parts = [(rows[run], list(_spans(columns))) for run in _select.runs(rows)]
    if len(parts) == 1 and len(parts[0][1]) == 1 and columns.size == columns[-1] - columns[0] + 1:
        found = _block(p, rows, [columns], lse)[0]
    else:
        found = np.zeros((*p.rows[:-1], rows.size, columns.size), _problem.result_type(p))
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
        return [np.zeros((*p.rows[:-1], 0, span[-1] + 1 - span[0]), _problem.result_type(p)) for span in spans]
    first, last = int(rows[0]), int(rows[-1]) + 1
    own = _select.queries(p, first, last)
    if lse is None and [(span[0], span[-1] + 1) for span in spans] == [(0, _ask.key_count(p))]:
        return [_ask.answer(own, "rows", (*own.rows, _ask.key_count(p)))]
    lse = None if lse is None else np.ascontiguousarray(lse[..., first:last])
    normalisers = _ask.answer(own, "normalisers", (*own.rows, 2)) if lse is None else None
    return [
        _ask.answer(own, "weights", (*own.rows, int(span[-1] + 1 - span[0])), lse=lse, normalisers=normalisers,
                    first_key=int(span[0]))
        for span in spans
    ]  # fmt: skip


def pooled(p: Problem, shape: Any, reduce: Any, lse: Any) -> Array:
    cells = _cells(p.where, shape)
    if not isinstance(reduce, str):
        raise TypeError(f"{p.where}: reduce must be 'mean' or 'max', got {reduce!r}")
    if reduce not in _OF_CELLS:
        raise ValueError(f"{p.where}: reduce must be 'mean' or 'max', got {reduce!r}")
    if lse is not None:
        lse = _problem.check_lse(p, lse)
    rows, columns = min(cells[0], p.rows[-1]), min(cells[1], _ask.key_count(p))
    normalisers = _ask.answer(p, "normalisers", (*p.rows, 2)) if lse is None else None
    return _ask.answer(p, _OF_CELLS[reduce], (*p.rows[:-1], rows, columns), lse=lse, normalisers=normalisers)


def _no_values(given: Any) -> str:
    """For a third argument that looks like the third one of attention."""
    several = isinstance(given, np.ndarray) and given.ndim > 1
    return "; was it v? Only influence takes values" if several else ""


def _cells(where: str, shape: Any) -> tuple[int, int]:
    wrong = f"{where}: shape must be two integers, of rows and columns, got {_restated(shape)}{_no_values(shape)}"
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


def influence(p: Problem, groups: Any, lse: Any = None, output: Any = None) -> Array:
    members = None if groups is None else _members(p, groups)
    if lse is not None:
        lse = _problem.check_lse(p, lse)
    normalisers = None
    if output is not None:
        output = _problem.check_output(p, output)
        if lse is None:
            normalisers = _ask.answer(p, "normalisers", (*p.rows, 2), out=output)
    else:
        output, normalisers = _ask.attended(p)
    if members is not None:
        squares = _of_groups(p, lse, output, normalisers, *members)
    else:
        squares, heavy = _squares(p, lse, output, normalisers)
        if (heavy >= 0).any():
            moved = _ask.answer(p, "moved", p.rows, keys=heavy, out=output)
            squares = squares + _by_key(p, heavy, moved, squares.shape)
    with np.errstate(over="ignore"):
        return np.sqrt(squares).astype(_problem.result_type(p), copy=False)


def _members(p: Problem, given: Any) -> tuple[int, Array, Array | None]:
    """How many groups; the runs of keys in each, (group, first, last), groups in order; where those of each packed
    sequence begin."""
    groups = _as_array("groups", given, p.where)
    if groups.dtype.kind not in "iu" and groups.size:
        raise TypeError(f"{p.where}: groups must be integers, got {groups.dtype}")
    count = _ask.key_count(p)
    if groups.shape != (count,):
        raise ValueError(f"{p.where}: groups must have the shape ({count},), one for each key, got {groups.shape}")
    if groups.size and groups.min() < -1:
        raise ValueError(f"{p.where}: groups must be -1 (none) or more, got {groups.min()}")
    if groups.size and groups.max() >= _MOST_GROUPS:
        raise OverflowError(f"{p.where}: groups are too many, got {groups.max()}")
    groups = groups.astype(np.int64)
    total = int(groups.max(initial=-1)) + 1
    if p.extras is None or p.extras.q_starts is None:
        return total, _runs(groups), None
    starts = p.extras.k_starts
    own = [_runs(groups[a:b]) for a, b in itertools.pairwise(starts.tolist())]
    members = np.concatenate([np.empty((0, 3), np.int64), *own])
    return total, members, np.cumsum([0, *map(len, own)], dtype=np.int64)


def _runs(groups: Array) -> Array:
    ends = np.flatnonzero(np.diff(groups, append=-2))
    firsts = np.concatenate([[0], ends[:-1] + 1])[: ends.size]
    runs = np.stack([groups[firsts], firsts, ends + 1], axis=-1).astype(np.int64)
    return np.ascontiguousarray(runs[np.argsort(runs[:, 0], kind="stable")])


def _of_groups(
    p: Problem, lse: Array | None, output: Array, normalisers: Array | None, total: int, members: Array,
    members_of: Array | None,
) -> Array:  # fmt: skip
    """float64 sums over the queries, in their order."""
    parts = (*p.rows[:-1], _core.PARTS, total)
    if members_of is not None:
        parts = (members_of.size - 1, *parts)
    sums = _ask.zeros(p, parts, np.float64)
    if sums.size:
        number = _core.QUESTIONS["groups"]
        _core.forward(p, output, lse, number, sums, None, normalisers, 0, members, members_of)
    total_sums: Array = sums.sum(axis=-2)
    return total_sums if members_of is None else np.asarray(total_sums.sum(axis=0))


def _squares(p: Problem, lse: Array | None, output: Array, normalisers: Array | None) -> tuple[Array, Array]:
    """Sums over the queries whose weight is spread, and the key of each of the others, or -1."""
    heavy = _ask.empty_keys(p, p.rows)
    heavy.fill(-1)
    shape = (*p.rows[:-1], _ask.key_count(p))
    return _ask.answer(p, "influence", shape, lse=lse, keys=heavy, normalisers=normalisers, out=output), heavy


def _by_key(p: Problem, heavy: Array, moved: Array, shape: tuple[int, ...]) -> Array:
    """float64 sums of what queries say of one key each, which are like each other: sums of leading digits are exact."""
    if p.extras is not None and p.extras.q_starts is not None:  # keys count from their sequence's first
        heavy = np.where(heavy < 0, heavy, heavy + np.repeat(p.extras.k_starts[:-1], np.diff(p.extras.q_starts)))
    rows = heavy.reshape(-1, heavy.shape[-1])
    at = np.arange(len(rows))[:, np.newaxis] * shape[-1] + rows
    at, given = at[rows >= 0], np.asarray(moved[heavy >= 0], np.float64)
    leading = np.where(np.isfinite(given), (given.view(np.int64) & -(1 << 29)).view(np.float64), given)
    rest = np.where(np.isfinite(given), given - leading, 0)
    sums = sum(np.bincount(at, x, math.prod(shape)) for x in (leading, rest))
    return np.asarray(sums).reshape(shape)
