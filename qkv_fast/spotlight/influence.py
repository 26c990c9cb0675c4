"""A question about each key, or group of keys, and their values: how far the output would move without them."""

import itertools
import math
from typing import Any, Never

import numpy as np

from .. import _core, _problem
from .._checks import Array, _as_array
from .._core import Problem
from .._help import documented
from . import _ask

_MOST_GROUPS = 2**48  # of a head; their sums would not fit in any memory


@documented
def influence(
    q: Any,
    k: Any,
    v: Any,
    *,
    groups: Any = None,
    lse: Any = None,
    output: Any = None,
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
    """How far the output of attention would move if a key, or a group of keys, were hidden: for every one at once.

    Parameters
    ----------
    <q>
    <k>
    <v>
    groups : array_like of int, shape (Lk,), optional
        The group of each key, 0 to G - 1, say its sentence or document; -1 for none. The same for all sequences, or
        (Tk,) of packed ones. G is the largest group and 1; keys of a group need not lie together, but the fewer runs
        they make the faster.
    <lse>
    output : array_like, shape (..., Hq, Lq, Dv), optional
        The output that `qkv_fast.attention` returns for the same arguments, in the layout of q: with `lse` it saves a
        pass. Of 16 bits, float32 as well (``out=``), which loses less.
    <cu_seqlens_q>
        Only of packed sequences; q is then (Tq, Hq, D), k (Tk, Hkv, D) and v (Tk, Hkv, Dv), as in
        `qkv_fast.attention_varlen`.
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
        It is that of q, k, v and `output`.
    <num_threads>

    Returns
    -------
    ndarray, shape (..., Hq, Lk)
        The Euclidean length of the change in all outputs of a head together, in units of v: float32 (float64 for
        float64), head-first in every layout; 0 for keys that nobody sees. (Hq, Tk) of packed sequences. With `groups`
        (..., Hq, G), and (Hq, G) of packed sequences, all of them together.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`; also for an `lse` or `output` of another shape or type, and `groups` that are no
        integers, below -1 or of another shape.

    See Also
    --------
    qkv_fast.attention : What every argument means.
    received : The weight alone, which knows nothing of values.
    qkv_fast.reference.spotlight : The definition in plain NumPy.

    Notes
    -----
    A query with the output o, and the weight p for the key of value v, has without it the output (o - p v) / (1 - p),
    which lies p / (1 - p) |o - v| away; squares of this are summed over queries. A group has the sum of its weights for
    p, and their mean of its values for v. Where a key has more than half the weight of a query, of which there is one
    at most, the row is attended to once more without it, and of groups, all others are kept apart: so the result is
    right at p = 1 too. An output without any key is 0. Sinks keep their logits. Changes of less than 1e-19 may count as
    0 in float32, whose squares end there, and values above 1e18 are too large for it.

    It takes about the time of attention with `lse` and `output`, twice that without; queries of which one key has more
    than half take that long again. The order of sums is fixed: the same bits for any number of threads. What leaving
    out a source shows: J. Li et al., "Understanding Neural Networks through Representation Erasure", 2016; that weights
    alone do not say it: G. Kobayashi et al., "Attention is Not Only a Weight", 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import spotlight
    >>> q, k, v = np.zeros((1, 1)), np.zeros((3, 1)), np.array([[0.0], [3.0], [9.0]])
    >>> spotlight.influence(q, k, v)  # of the mean 4 without one of them
    array([2. , 0.5, 2.5])
    >>> spotlight.influence(q, k, v, groups=[0, 1, 1])  # without the last two: 0
    array([2., 4.])
    """
    p = _ask.check(
        "spotlight.influence", q, k, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions,
        q_lengths, kv_lengths, kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words, v,
    )  # fmt: skip
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
