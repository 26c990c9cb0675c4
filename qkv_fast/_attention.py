"""attention(): fused attention of arrays."""

from typing import Any, Never

from ._help import documented
from ._problem import attend, check


@documented
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
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
    return_lse: bool = False,
    out: Any = None,
    num_threads: int | None = None,
    **words: Never,
) -> Any:
    r"""Scaled dot-product attention, fused: ``softmax(scale * q @ k.T) @ v``.

    The (Lq, Lk) matrix of scores is never stored, arrays of any strides are read where they lie, and the work is
    shared among threads. The result is the same bits for any number of threads, batch, key heads and strides.

    Parameters
    ----------
    <q>
    <k>
    <v>
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
        It is that of q, k, v and the result; the log-sum-exp stays (..., Hq, Lq).
    <return_lse>
    <out>
    <num_threads>

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        In q's type and native byte order; `out` itself where given. A query that sees no key has the result 0.
    lse : ndarray, shape (..., Hq, Lq)
        Only with ``return_lse=True``; float32 (float64 for float64). It includes the sink. For a query that sees no key
        it is -inf, or the sink.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, a mask that is not bool, masked
        arrays, `np.matrix`, arguments of other libraries.
    ValueError
        Shapes that do not fit, values out of range, an unknown word.
    OverflowError
        An offset or a slope beyond ±2**60, or a size too large for 63 bits.
    MemoryError
        No memory for the result or for scratch space.

    See Also
    --------
    attention_varlen : The same for sequences of different lengths, packed one after another.
    alibi_slopes : The usual slopes.
    merge_partials : Combine results over disjoint sets of keys.
    qkv_fast.reference.attention : The definition in plain NumPy.

    Notes
    -----
    All arguments compose: a key counts where each of them allows it. A score passes through scale, softcap, ALiBi and
    bias, exclusion, sink and softmax, in this order.

    Products are accumulated in q's type, those of 16-bit types in float32, and results are rounded once, to nearest
    even. Where the CPU multiplies pairs of bfloat16 (paths avx512bf16, neonbf16 and amx), weights are rounded to
    bfloat16 too. Products may take subnormal numbers as 0 and give 0 for them, but for float16. An excluded key has
    no influence on the result, even if it or its value is NaN; NaN and infinity in visible keys do what IEEE
    arithmetic makes them do. A score of -inf excludes its key. The division by the sum of weights comes last, so
    visible keys times max|v| must fit the type.

    The online softmax is from M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018; the
    tiling and the log-sum-exp follow T. Dao et al., "FlashAttention", 2022, section 3.1. ALiBi is from O. Press et al.,
    "Train Short, Test Long", 2022, section 3. Sinks follow G. Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks", 2023, section 3.3, as one learned logit per head. The soft cap is from the Gemma team, "Gemma 2",
    2024, section 2.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 100, 64), dtype=np.float32)  # batch, heads, length, dim
    >>> k, v = rng.standard_normal((2, 2, 2, 300, 64), dtype=np.float32)  # 2 key heads for 8 query heads
    >>> qkv_fast.attention(q, k, v, causal=True).shape
    (2, 8, 100, 64)

    Two documents in one sequence, each causal, none seeing the other:

    >>> ids = np.repeat([0, 1], 150)
    >>> qkv_fast.attention(q, k, v, causal=True, segments=(ids[-100:], ids)).shape
    (2, 8, 100, 64)
    """
    problem = check(
        "attention", q, k, v, mask, bias, causal, window, q_offset, q_positions, q_lengths, kv_lengths, kv_starts,
        segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    return attend(problem, out, return_lse)
