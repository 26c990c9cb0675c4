"""A question about each key and its value: how far the output would move without them."""

import math
from typing import Any, Never

import numpy as np

from .._checks import Array
from .._core import Problem
from .._help import documented
from . import _ask


@documented
def influence(
    q: Any,
    k: Any,
    v: Any,
    *,
    lse: Any = None,
    output: Any = None,
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
    """How far the output of attention would move if a key were hidden, for every key at once.

    Parameters
    ----------
    <q>
    <k>
    <v>
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
    <kv_lengths>
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
        float64), head-first in every layout; 0 for keys that nobody sees. (Hq, Tk) of packed sequences.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`; also for an `lse` or `output` of another shape or type.

    See Also
    --------
    qkv_fast.attention : What every argument means.
    received : The weight alone, which knows nothing of values.
    qkv_fast.reference.spotlight : The definition in plain NumPy.

    Notes
    -----
    A query with the output o, and the weight p for the key of value v, has without it the output (o - p v) / (1 - p),
    which lies p / (1 - p) |o - v| away; squares of this are summed over queries. Where a key has more than half the
    weight of a query, of which there is one at most, the row is attended to once more without it, so the result is
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
    """
    p = _ask.check(
        "spotlight.influence", q, k, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, kv_lengths,
        segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words, v,
    )  # fmt: skip
    if lse is not None:
        lse = _ask.check_lse(p, lse)
    normalisers = None
    if output is not None:
        output = _ask.check_output(p, output)
        if lse is None:
            normalisers = _ask.answer(p, "normalisers", (*p.rows, 2), out=output)
    else:
        output, normalisers = _ask.attended(p)
    squares, heavy = _squares(p, lse, output, normalisers)
    if (heavy >= 0).any():
        moved = _ask.answer(p, "moved", p.rows, keys=heavy, out=output)
        squares = squares + _by_key(p, heavy, moved, squares.shape)
    with np.errstate(over="ignore"):
        return np.sqrt(squares).astype(_ask.result_type(p), copy=False)


def _squares(p: Problem, lse: Array | None, output: Array, normalisers: Array | None) -> tuple[Array, Array]:
    """Sums over the queries whose weight is spread, and the key of each of the others, or -1."""
    heavy = _ask.empty_keys(p, p.rows)
    heavy.fill(-1)
    shape = (*p.rows[:-1], _ask.key_count(p))
    return _ask.answer(p, "influence", shape, lse=lse, keys=heavy, normalisers=normalisers, out=output), heavy


def _by_key(p: Problem, heavy: Array, moved: Array, shape: tuple[int, ...]) -> Array:
    """float64 sums of what queries say of one key each, in their order."""
    if p.extras is not None and p.extras.q_starts is not None:  # keys count from their sequence's first
        heavy = np.where(heavy < 0, heavy, heavy + np.repeat(p.extras.k_starts[:-1], np.diff(p.extras.q_starts)))
    rows = heavy.reshape(-1, heavy.shape[-1])
    at = np.arange(len(rows))[:, np.newaxis] * shape[-1] + rows
    return np.bincount(at[rows >= 0], moved[heavy >= 0], math.prod(shape)).reshape(shape)
