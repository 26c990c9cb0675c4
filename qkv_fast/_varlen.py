"""attention_varlen(): sequences of different lengths, packed one after another, without padding."""

from typing import Any, Never

from . import _problem
from ._help import documented


@documented
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool | str = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    q_positions: Any = None,
    kv_lengths: Any = None,
    segments: tuple[Any, Any] | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    num_threads: int | None = None,
    **words: Never,
) -> Any:
    """Attention of sequences of different lengths, packed one after another.

    Each of the N sequences gets what `attention` gives for it alone, to the last bit.

    Parameters
    ----------
    q : array_like, shape (Tq, Hq, D)
        Queries of all sequences, float16, bfloat16 (of ml_dtypes), float32 or float64; D up to 1024.
    k : array_like, shape (Tk, Hkv, D)
        Keys of all sequences, of q's type or a narrower one. ``Hq`` is a multiple of ``Hkv``.
    v : array_like, shape (Tk, Hkv, Dv)
        Values of all sequences, of k's type.
    <cu_seqlens_q>
    <mask>
        Here the scores are (N, Hq, longest queries, longest keys); element [b, h, i, j] is for query i and key j of
        sequence b.
    <bias>
    <causal>
    <window>
    <q_offset>
    <q_positions>
        Here of shape (Tq,).
    <kv_lengths>
        Here Lq and Lk are those of the sequence; its first keys count.
    <segments>
        Here of shapes (Tq,) and (Tk,): within a sequence, only equal ids attend.
    <alibi_slopes>
    <sinks>
    <softcap>
    <scale>
    <return_lse>
    <out>
    <num_threads>

    Returns
    -------
    out : ndarray, shape (Tq, Hq, Dv)
        In q's type and native byte order; `out` itself where given.
    lse : ndarray, shape (Hq, Tq)
        Only with ``return_lse=True``; see `attention`.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `attention`; a ValueError also for `cu_seqlens_q` and `cu_seqlens_k` that do not start at 0, decrease, do
        not end at Tq and Tk, or are not of one length.

    See Also
    --------
    attention : One sequence, or a batch of equal lengths; what every argument means.

    Notes
    -----
    Packing and its name are those of T. Dao's FlashAttention (``flash_attn_varlen_func``).

    Examples
    --------
    Three sequences of 2, 5 and 3 tokens:

    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 10, 8, 64), dtype=np.float32)  # tokens, heads, dim
    >>> starts = [0, 2, 7, 10]
    >>> out = qkv_fast.attention_varlen(q, k, v, starts, starts, causal=True)
    >>> second = qkv_fast.attention(q[2:7], k[2:7], v[2:7], causal=True, layout="blhd")
    >>> np.array_equal(out[2:7], second)
    True
    """
    problem = _problem.check_ragged(
        "attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions,
        kv_lengths, segments, alibi_slopes, sinks, softcap, scale, num_threads, words,
    )  # fmt: skip
    return _problem.attend(problem, out, return_lse)
