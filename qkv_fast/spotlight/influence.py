"""A question about each key, or group of keys, and their values: how far the output would move without them."""

from typing import Any, Never

from .._checks import Array
from .._help import documented
from . import _answers, _ask


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

    Where a query sees an infinity in `v`, its part is NaN (the reference says infinity where the rest is finite). With
    a bias like finfo.min for all keys of a query, a given `lse` says too little of its weights: leave `lse` out.

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
    return _answers.influence(p, groups, lse, output)
