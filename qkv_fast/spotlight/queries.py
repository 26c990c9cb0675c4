"""Questions about each query: its largest score, the entropy of its weights, its heaviest keys."""

from typing import Any, Never

from .._checks import Array
from .._help import documented
from . import _answers, _ask


@documented
def largest(
    q: Any,
    k: Any,
    *,
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
    """The largest score of each query: ``max(scale * q @ k.T)`` over the keys that it sees.

    Parameters
    ----------
    <q>
    <k>
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
    ndarray, shape (..., Hq, Lq)
        float32 (float64 for float64), head-first in every layout; -inf for a query that sees no key, NaN for one that
        sees a NaN. (Hq, Tq) of packed sequences.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`.

    See Also
    --------
    qkv_fast.attention : What every argument means.
    qkv_fast.reference.spotlight : The definition in plain NumPy.

    Notes
    -----
    It is the product before soft cap, ALiBi, bias and sinks: of a bias only -inf counts, as of a mask. Optimisers that
    clip the weights of a head whose scores grow ask for it: Kimi Team, "Kimi K2", 2025, section 2.1 (MuonClip).

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import spotlight
    >>> q, k = np.array([[1.0], [2.0]]), np.array([[3.0], [5.0]])
    >>> spotlight.largest(q, k, causal=True)
    array([ 3., 10.])
    """
    p = _ask.check(
        "spotlight.largest", q, k, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions,
        q_lengths, kv_lengths, kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    return _answers.largest(p)


@documented
def entropy(
    q: Any,
    k: Any,
    *,
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
    """The entropy of each query's weights in nats: how many keys share its attention.

    Parameters
    ----------
    <q>
    <k>
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
    ndarray, shape (..., Hq, Lq)
        ``-sum(p * log(p))`` over visible keys, float32 (float64 for float64), head-first in every layout: 0 where one
        key has all the weight, log n where n keys share it evenly, and 0 for a query that sees none. (Hq, Tq) of packed
        sequences.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`.

    See Also
    --------
    qkv_fast.attention : What every argument means.
    qkv_fast.reference.spotlight : The definition in plain NumPy.

    Notes
    -----
    With sinks the weights p sum to less than 1, and the sink has no part in the sum. It is computed in one pass, from
    running sums of p and of p times the distance from the largest score. Entropy as a measure of what heads do: J. Vig
    and Y. Belinkov, "Analyzing the Structure of Attention in a Transformer Language Model", 2019, section 4.3.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import spotlight
    >>> q, k = np.zeros((2, 1)), np.ones((4, 1))
    >>> np.exp(spotlight.entropy(q, k, causal=True)).round(6)  # keys that share it
    array([3., 4.])
    """
    p = _ask.check(
        "spotlight.entropy", q, k, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions,
        q_lengths, kv_lengths, kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    return _answers.entropy(p)


@documented
def top_keys(
    q: Any,
    k: Any,
    n: int = 5,
    *,
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
) -> tuple[Array, Array]:
    """The n heaviest keys of each query, and their weights.

    Parameters
    ----------
    <q>
    <k>
    n : int, default 5
        How many, at least 1.
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
    keys : ndarray of int64, shape (..., Hq, Lq, n)
        Head-first in every layout. By score, the largest first, ties by the smaller key; -1 where fewer keys are
        visible. (Hq, Tq, n) of packed sequences, where keys count from their sequence's first.
    weights : ndarray, shape (..., Hq, Lq, n)
        Their weights, float32 (float64 for float64); 0 where keys are -1.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`; also a ValueError or TypeError for `n`.

    See Also
    --------
    qkv_fast.attention : What every argument means.
    qkv_fast.reference.spotlight : The definition in plain NumPy.

    Notes
    -----
    Keys are ranked by their final scores, bias included, not by rounded weights: of visible keys whose weights are all
    0, the heaviest still come first. The weights of a query whose log-sum-exp is NaN are NaN, and its keys -1. It takes
    one pass over the keys, and memory for the result alone; n beyond some dozens makes it slower.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import spotlight
    >>> q, k = np.ones((1, 1)), np.log([[1.0], [6.0], [3.0]])
    >>> keys, weights = spotlight.top_keys(q, k, 2)
    >>> keys
    array([[1, 2]])
    >>> weights.round(6)
    array([[0.6, 0.3]])
    """
    p = _ask.check(
        "spotlight.top_keys", q, k, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions,
        q_lengths, kv_lengths, kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    return _answers.top_keys(p, n)
