"""attention(): the one validator. Names, types, broadcasting and layout; every error a user can make is raised here."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core, _masks, _runtime
from ._checks import (
    _FLOAT32,
    _FLOAT64,
    _NAMES,
    _TYPES,
    Array,
    _arithmetic,
    _as_array,
    _broadcast,
    _check_fit,
    _check_layout,
    _check_lengths,
    _check_offsets,
    _check_out,
    _check_positions,
    _check_scale,
    _check_types,
    _empty,
    _fail_shapes,
    _hint_of_bits,
    _is_known,
    _per_sequence,
)


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
    kv_lengths: Any = None,
    segments: tuple[Any, Any] | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    layout: str = "bhld",
    return_lse: bool = False,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Any:
    r"""Scaled dot-product attention, fused: ``softmax(scale * q @ k.T) @ v``.

    The (Lq, Lk) matrix of scores is never stored, arrays of any strides are read where they lie, and the work is
    shared among threads. The result is the same bits for any number of threads, batch, key heads and strides.

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries, float16, bfloat16 (of ml_dtypes), float32 or float64; D up to 1024. Or (Lq, D), if all three are 2-D.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys, of q's type or a narrower one; float16 and bfloat16 do not mix. ``Hq`` is a multiple of ``Hkv``; query
        head h reads key head ``h // (Hq // Hkv)`` (grouped-query attention).
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values, of k's type. The axes left of the heads broadcast among q, k and v.
    mask : array_like of bool, optional
        True where a query may attend to a key, False where not. Broadcasts from the right against (..., Hq, Lq, Lk), or
        (Lq, Lk) for 2-D arrays, without enlarging it; any strides, never copied whole. Where a tile of keys is hidden
        from all of its queries, keys and values are not even read.
    bias : array_like, optional
        Of any of these types, added to the scaled (and capped) scores; -inf excludes, as False in a mask does.
        Broadcasts as `mask` does; any strides and byte order, never copied whole.
    causal : bool or "top-left", default False
        Exclude the keys after the query's position. ``"top-left"`` also sets `q_offset` to 0.
    window : int or (left, right), optional
        Keep the keys from `left` before to `right` after the query's position, both inclusive; None on a side leaves
        it open. An int w is (w, w), or (w, 0) when causal, so that a causal w sees w + 1 keys: a model whose "sliding
        window" of 4096 counts the query itself is ``window=4095`` here.
    q_offset : int or array_like of int, optional
        Query i sits at position ``i + q_offset``; one offset, or one per sequence. By default query i sits at
        ``i + n - Lq``, where n is the sequence's `kv_lengths` or Lk: the last query sees the last key.
    kv_lengths : int or array_like of int, optional
        Number of keys of each sequence, 0 to Lk; one for all, or one per sequence (it broadcasts to the axes left of
        the heads). Keys and values at or past it are never read. With `causal`, `window` or `alibi_slopes` and fewer
        keys than queries, but some, say with `q_offset` where the queries sit (0 for right-padded ones): that call is
        a ValueError without it.
    segments : (q_ids, k_ids), optional
        Integers of shapes (..., Lq) and (..., Lk), whose leading axes broadcast to those left of the heads. A query
        attends only to keys with its own id: documents packed into one sequence, for example. In any order; whole tiles
        of keys are skipped where equal ids follow one another.
    alibi_slopes : array_like, shape (Hq,), optional
        Per query head: adds ``-slope * abs(position - key)`` to the scaled scores, the position being that of `causal`.
        The function `qkv_fast.alibi_slopes` has the usual slopes.
    sinks : array_like, shape (Hq,), optional
        Per query head: the logit of one more key that has no value, so that the weights of the keys sum to less than
        1. Finite or -inf (none); neither scaled nor capped.
    softcap : float, optional
        Scaled scores s become ``softcap * tanh(s / softcap)``, before anything is added; greater than 0.
    scale : float, optional
        Factor of the scores, any finite number; ``1 / sqrt(D)`` by default (1 for D = 0).
    layout : {"bhld", "blhd"}, default "bhld"
        ``"blhd"`` swaps the head and length axes of q, k, v and the result: (..., L, H, D). The log-sum-exp stays
        (..., Hq, Lq).
    return_lse : bool, default False
        Return the natural log-sum-exp of each row's scores as well.
    out : ndarray, optional
        Where to write the result: its exact shape, q's type (or float32 for 16-bit q), any strides. It may overlap an
        input.
    num_threads : int, optional
        Threads for this call; see `get_num_threads` for the default.

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
        arrays, `np.matrix`.
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
    even. Where the CPU multiplies pairs of bfloat16 (path avx512bf16), weights are rounded to bfloat16 too, and
    subnormal bfloat16 inputs may count as 0. An excluded key has no influence on the result, even if it or its value is
    NaN; NaN and infinity in visible keys do what IEEE arithmetic makes them do. A score of -inf excludes its key.
    The division by the sum of weights comes last, so visible keys times max|v| must fit the type.

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
    if type(q) is not np.ndarray:
        q = _as_array("q", q)
    if type(k) is not np.ndarray:
        k = _as_array("k", k)
    if type(v) is not np.ndarray:
        v = _as_array("v", v)
    number = q.dtype.num
    if not (number == k.dtype.num == v.dtype.num and number in _TYPES):
        _check_types("attention", q, k, v)

    # Shapes: heads and lengths by layout, the axes left of them broadcast.
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    heads_first = layout == "bhld" or _check_layout(layout, "attention")
    if q_shape == k_shape == v_shape and len(q_shape) == 4 and heads_first:  # the rest of this in one comparison
        batch: tuple[int, ...] = q_shape[:1]
        q_heads = k_heads = v_heads = q_shape[1]
        len_q = len_k = len_v = q_shape[2]
        shape = q_shape
    elif len(q_shape) < 3 or len(k_shape) < 3 or len(v_shape) < 3:
        if not len(q_shape) == len(k_shape) == len(v_shape) == 2:
            _fail_shapes("attention", "q, k, v must have 3 or more axes each, or 2 each", q=q, k=k, v=v)
        batch = ()
        q_heads = k_heads = v_heads = 1
        len_q, len_k, len_v = q_shape[0], k_shape[0], v_shape[0]
        shape = (len_q, v_shape[1])
    else:
        batch = q_shape[:-3]
        if not batch == k_shape[:-3] == v_shape[:-3]:
            batch = _broadcast("attention", q=q, k=k, v=v)
        if heads_first:
            q_heads, len_q = q_shape[-3:-1]
            k_heads, len_k = k_shape[-3:-1]
            v_heads, len_v = v_shape[-3:-1]
            shape = (*batch, q_heads, len_q, v_shape[-1])
        else:
            len_q, q_heads = q_shape[-3:-1]
            len_k, k_heads = k_shape[-3:-1]
            len_v, v_heads = v_shape[-3:-1]
            shape = (*batch, len_q, q_heads, v_shape[-1])
    dim = q_shape[-1]
    if (
        k_shape[-1] != dim
        or len_v != len_k
        or k_heads != v_heads
        or (q_heads != k_heads and (k_heads == 0 or q_heads % k_heads))
        or dim > _core.MAX_DIM
        or v_shape[-1] > _core.MAX_DIM
    ):  # then it says which
        _check_fit("attention", q, k, v, (q_heads, k_heads, v_heads), (len_k, len_v))

    if scale is None:
        scale = dim**-0.5 if dim else 1.0
    else:
        scale = _check_scale(scale)

    # Key limits: one interval per query.
    left = right = offsets = lengths = None
    if causal is not False or window is not None:
        left, right, q_offset = _check_positions("attention", causal, window, q_offset)
    if kv_lengths is not None:
        lengths = _per_sequence("attention", "kv_lengths", kv_lengths, batch)
        positions = left is not None or right is not None or alibi_slopes is not None
        _check_lengths("attention", lengths, len_q, len_k, positions and q_offset is None)
    if q_offset is not None:
        offsets = _check_offsets("attention", q_offset, batch)

    extras = None
    if not (mask is bias is segments is alibi_slopes is sinks is softcap is None):
        logits = (*batch, q_heads, len_q, len_k) if len(shape) > 2 else (len_q, len_k)
        extras = _masks.check_extras("attention", logits, q_heads, mask, bias, alibi_slopes, sinks, softcap)
        if segments is not None:
            spans, q_ids, k_ids = _masks.check_segments("attention", segments, batch, len_q, len_k)
            extras = extras._replace(spans=spans, q_ids=q_ids, k_ids=k_ids)

    threads, isa, counters = _runtime.current()
    if num_threads is not None:
        threads = _runtime.check_threads(num_threads, "attention: num_threads")

    if out is None:
        # A plan asks a result for no more than its strides, which are q's: no pages for what will not be written.
        planned = counters is not None and counters is _core.PLAN and shape == q_shape
        result = target = q if planned and q.flags.carray and q.dtype.isnative else _empty(shape, number)
    else:
        result = target = _check_out(out, shape, number)
        if any(np.may_share_memory(out, x) for x in (q, k, v)) or (extras and extras.overlaps(out)):
            target = _empty(shape, out.dtype.num)
    lse = None
    if return_lse:
        lse = _empty((*batch, q_heads, len_q) if len(shape) > 2 else (len_q,), _arithmetic(number))

    plan = _core.forward(
        q, k, v, target, lse, heads_first, scale, left, right, offsets, lengths, threads, isa, counters,
        extras,
    )  # fmt: skip
    if plan is not None:  # inside _runtime.planning(): nothing has been computed
        return plan
    if target is not result:
        result[...] = target
    return (result, lse) if return_lse else result


def merge_partials(outs: Sequence[Any], lses: Sequence[Any], *, layout: str = "bhld") -> tuple[Array, Array]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    Parameters
    ----------
    outs : sequence of array_like, shape (..., H, L, Dv)
        Results of `attention`, one per set of keys. (L, Dv) if the call was 2-D.
    lses : sequence of array_like, shape (..., H, L)
        Their log-sum-exps, from ``return_lse=True``. A row with -inf saw no key: its output is not looked at.
    layout : {"bhld", "blhd"}, default "bhld"
        Of `outs`; `lses` are head-first in either.

    Returns
    -------
    out : ndarray
        Of the shape and type of one of `outs`.
    lse : ndarray
        Of the shape and type of one of `lses`.

    Raises
    ------
    TypeError
        Other element types than `attention` takes (for `lses`: gives), or not the same in all.
    ValueError
        No partials, or shapes that do not fit.

    Notes
    -----
    Each output is weighted by its share of the softmax denominator, in float64 (T. Dao et al., "FlashAttention", 2022,
    section 3.1).

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 4, 50, 16))
    >>> halves = [qkv_fast.attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(30), slice(30, 50))]
    >>> out, lse = qkv_fast.merge_partials(*zip(*halves))
    >>> np.allclose(out, qkv_fast.attention(q, k, v))
    True
    """
    heads_first = _check_layout(layout, "merge_partials")
    outs, lses = _list_arrays("outs", outs), _list_arrays("lses", lses)
    if not outs or len(outs) != len(lses):
        given = f"{len(outs)} outs and {len(lses)} lses"
        raise ValueError(f"merge_partials: one lse for each out, and at least one, got {given}")
    for name, arrays, names in (("outs", outs, _NAMES), ("lses", lses, "float32 or float64")):
        numbers = {x.dtype.num for x in arrays}
        known = numbers <= {_FLOAT32, _FLOAT64} if name == "lses" else _is_known(arrays[0].dtype)
        if len(numbers) > 1 or not known:
            given = ", ".join(str(x.dtype) for x in arrays) + _hint_of_bits("each", arrays[0])
            raise TypeError(f"merge_partials: {name} must be of one type, {names}, got {given}")
    shape = outs[0].shape
    rows = shape[:-1] if heads_first or len(shape) < 3 else (*shape[:-3], shape[-2], shape[-3])
    if len(shape) < 2 or any(x.shape != shape for x in outs) or any(x.shape != rows for x in lses):
        given = f"outs: {[x.shape for x in outs]}, lses: {[x.shape for x in lses]}"
        raise ValueError(f"merge_partials: shapes do not fit ({given})")

    with np.errstate(all="ignore"):  # NaN and infinity are legal, and -inf is a row that saw nothing
        logs = np.stack([x.astype(np.float64) for x in lses])
        top = logs.max(axis=0)
        shift = np.where(np.isneginf(top), 0, top)
        weights = np.exp(logs - shift)
        total = weights.sum(axis=0)
        lse = shift + np.log(total)
        if not heads_first and len(shape) > 2:
            weights, logs, total = (np.swapaxes(x, -1, -2) for x in (weights, logs, total))
        out = np.zeros(shape)
        for x, weight, log in zip(outs, weights, logs, strict=True):
            out += np.where(np.isneginf(log)[..., None], 0, x * weight[..., None])
        out /= np.where(total == 0, 1, total)[..., None]
        return out.astype(_TYPES[outs[0].dtype.num]), lse.astype(_TYPES[lses[0].dtype.num])


def _list_arrays(name: str, xs: Any) -> list[Array]:
    if not hasattr(xs, "__iter__"):
        raise TypeError(f"merge_partials: {name} must be a sequence of arrays, got {xs!r}")
    return [_as_array(f"{name}[{i}]", x, "merge_partials") for i, x in enumerate(xs)]
