"""attention_varlen(): sequences of different lengths, packed one after another, without padding."""

from typing import Any

import numpy as np

from . import _core, _masks, _runtime
from ._checks import (
    Array,
    _arithmetic,
    _as_array,
    _check_fit,
    _check_lengths,
    _check_offsets,
    _check_out,
    _check_positions,
    _check_scale,
    _check_types,
    _empty,
    _fail_shapes,
    _per_sequence,
)


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
    kv_lengths: Any = None,
    segments: tuple[Any, Any] | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    num_threads: int | None = None,
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
    cu_seqlens_q, cu_seqlens_k : array_like of int, shape (N + 1,)
        Where the sequences begin: sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``, exclusive,
        and its keys likewise. From 0 to Tq and Tk; a sequence may be empty.
    mask, bias : array_like, optional
        As in `attention`. They broadcast against (N, Hq, longest queries, longest keys); element [b, h, i, j] is for
        query i and key j of sequence b.
    causal, window, sinks, softcap, scale
        As in `attention`.
    q_offset : int or array_like of int, shape (N,), optional
        As in `attention`. By default the last query of each sequence sees its last key.
    kv_lengths : int or array_like of int, shape (N,), optional
        How many of each sequence's keys count, the first ones; all by default.
    segments : (q_ids, k_ids), optional
        Integers of shapes (Tq,) and (Tk,): within a sequence, only equal ids attend.
    alibi_slopes : array_like, shape (Hq,), optional
        As in `attention`.
    return_lse : bool, default False
        Return the natural log-sum-exp of each row's scores as well.
    out : ndarray, optional
        Where to write the result: its exact shape, q's type (or float32 for 16-bit q), any strides. It may overlap an
        input.
    num_threads : int, optional
        Threads for this call; see `get_num_threads` for the default.

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
    where = "attention_varlen"
    q, k, v = _as_array("q", q, where), _as_array("k", k, where), _as_array("v", v, where)
    _check_types(where, q, k, v)
    if not q.ndim == k.ndim == v.ndim == 3:
        _fail_shapes(where, "q, k, v must have 3 axes each, (tokens, heads, dim)", q=q, k=k, v=v)
    _check_fit(where, q, k, v, (q.shape[1], k.shape[1], v.shape[1]), (k.shape[0], v.shape[0]))
    q_starts = _masks.check_starts(where, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    k_starts = _masks.check_starts(where, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if q_starts.size != k_starts.size:
        given = f"{q_starts.size} and {k_starts.size} entries"
        raise ValueError(f"{where}: cu_seqlens_q and cu_seqlens_k must be of one length, got {given}")
    len_q, len_k = np.diff(q_starts), np.diff(k_starts)
    longest_q, longest_k = int(len_q.max(initial=0)), int(len_k.max(initial=0))
    batch = (len_q.size,)
    if scale is None:
        scale = q.shape[2] ** -0.5 if q.shape[2] else 1.0
    else:
        scale = _check_scale(scale, where)

    left, right, q_offset = _check_positions(where, causal, window, q_offset)
    lengths = len_k
    if kv_lengths is not None:
        lengths = _per_sequence(where, "kv_lengths", kv_lengths, batch)
        positions = left is not None or right is not None or alibi_slopes is not None
        _check_lengths(where, lengths, len_q, len_k, positions and q_offset is None)
    offsets = lengths - len_q if q_offset is None else _check_offsets(where, q_offset, batch)
    logits = (*batch, q.shape[1], longest_q, longest_k)
    extras = _masks.check_extras(where, logits, q.shape[1], mask, bias, alibi_slopes, sinks, softcap)
    extras = extras._replace(q_starts=q_starts, k_starts=k_starts, longest_q=longest_q, longest_k=longest_k)
    if segments is not None:
        spans, q_ids, k_ids = _masks.check_ragged_segments(where, segments, q_starts, k_starts)
        extras = extras._replace(spans=spans, q_ids=q_ids, k_ids=k_ids)

    threads, isa, counters = _runtime.current()
    if num_threads is not None:
        threads = _runtime.check_threads(num_threads, f"{where}: num_threads")
    shape, number = (q.shape[0], q.shape[1], v.shape[2]), q.dtype.num
    if out is None:
        result = target = _empty(shape, number, where)
    else:
        result = target = _check_out(out, shape, number, where)
        if any(np.may_share_memory(out, x) for x in (q, k, v)) or extras.overlaps(out):
            target = _empty(shape, out.dtype.num, where)
    lse = _empty((q.shape[1], q.shape[0]), _arithmetic(number), where) if return_lse else None
    _core.forward(
        q, k, v, target, lse, False, scale, left, right, offsets, lengths, threads, isa, counters, extras
    )  # fmt: skip
    if target is not result:
        result[...] = target
    return (result, lse) if return_lse else result
