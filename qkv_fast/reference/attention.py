"""Attention as it is defined, in plain NumPy: the tests' oracle and the documentation of every argument.

One matrix of scores, one softmax, one product with the values, all of it stored: memory is O(Lq * Lk) per
head. What `qkv_fast.attention` computes in tiles, this computes in the open and in the next wider type, so an
error measured against it is the error of the fast code.
"""

from typing import Any, NamedTuple, Never

import numpy as np

from .._checks import _as_array, _check_type, _fail_words
from .._help import documented
from .stages import _widened


class Limits(NamedTuple):
    """What says by positions and numbers which keys a query may attend to."""

    causal: Any = False
    window: Any = None
    q_offset: Any = None
    q_positions: Any = None
    q_lengths: Any = None
    kv_lengths: Any = None
    kv_starts: Any = None
    segments: Any = None


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
    **words: Never,
) -> Any:
    """Scaled dot-product attention, ``softmax(scale * q @ k.T) @ v`` over the visible keys.

    For query i and its visible keys j (all of them, unless an argument below excludes some)::

        s[i, j] = scale * sum_d q[i, d] * k[j, d]
        s[i, j] = softcap * tanh(s[i, j] / softcap)                             (only with softcap)
        s[i, j] = s[i, j] - alibi_slope * |position of i - j| + bias[i, j]      (where given)
        total   = sum_j exp(s[i, j]) + exp(sink)                                (without sinks: the sum alone)
        out[i]  = sum_j exp(s[i, j]) * v[j] / total
        lse[i]  = log(total)

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
        It is that of q, k, v and the output; the log-sum-exp stays (..., Hq, Lq).
    <return_lse>

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        Computed and returned in float64; where q is float64, in `numpy.longdouble` (which is 80 bits wide
        with most x86-64 compilers, and no wider than float64 on Windows and on Apple silicon).
    lse : ndarray, shape (..., Hq, Lq)
        Natural log-sum-exp of the visible scores and the sink, of the same type. Only with ``return_lse=True``.

    Raises
    ------
    TypeError
        Arrays that `qkv_fast.attention` does not take.
    ValueError
        Shapes that do not fit, an unknown `causal` or `layout`, a negative window or a length outside 0..Lk,
        ``causal="top-left"`` with a `q_offset`, and the call with two readings: `kv_lengths` and positions
        (of `causal`, `window` or `alibi_slopes`) without `q_offset`, where a sequence has fewer keys than there are
        queries.

    Notes
    -----
    A key whose score is -inf is excluded, whatever made it so. Excluded keys and values never influence a
    result, not even by a NaN; an attended NaN or infinity has the effect that IEEE arithmetic gives it, in
    the rows (for v, the columns) that attend to it. A query without visible keys has the output 0 and the
    log-sum-exp -inf, or the sink. With D = 0 every score is 0, the output the mean of the visible values.

    The source is A. Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1 (its "Mask (opt.)" is
    what `mask`, `causal`, `window` and `kv_lengths` make); grouped queries are from J. Ainslie et al., "GQA", 2023,
    section 2.2; `qkv_fast.attention` has the sources of the rest.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import reference
    >>> q = np.array([[0.0], [0.0]])
    >>> k = np.array([[1.0], [2.0]])
    >>> v = np.array([[10.0, 1.0], [20.0, 3.0]])
    >>> reference.attention(q, k, v).astype("float64")
    array([[15.,  2.],
           [15.,  2.]])

    Causal, the first query sees the first key alone:

    >>> reference.attention(q, k, v, causal=True).astype("float64")
    array([[10.,  1.],
           [15.,  2.]])
    """
    where = "reference.attention"
    if words:
        _fail_words(where, words)
    limits = Limits(causal, window, q_offset, q_positions, q_lengths, kv_lengths, kv_starts, segments)
    q, k, v, _, scores, sinks = _scored(where, q, k, v, mask, bias, limits, alibi_slopes, sinks, softcap, scale, layout)
    p, lse = _softmax(scores, sinks)
    with np.errstate(all="ignore"):
        out = _weigh(p, v, scores != -np.inf)
    if q.ndim == 2:
        out, lse = out[0], lse[0]
    elif layout == "blhd":
        out = np.swapaxes(out, -3, -2)
    return (out.copy(), lse.copy()) if return_lse else out.copy()


def _scored(
    where: str, q: Any, k: Any, v: Any, mask: Any, bias: Any, limits: "Limits", alibi_slopes: Any, sinks: Any,
    softcap: Any, scale: Any, layout: str,
) -> tuple[Any, ...]:  # fmt: skip
    """q as it was given; k and v, widened, for each query head; scaled products and final scores, (..., Hq, Lq, Lk),
    these -inf where a key is excluded; and the sinks, or None. 2-D arrays have one head."""
    q, k, v = _as_array("q", q, where), _as_array("k", k, where), _as_array("v", v, where)
    for name, x in (("q", q), ("k", k), ("v", v)):  # of any types beside one another: it is what caches are held to
        _check_type(where, name, x)
    shapes = f"q.shape={q.shape}, k.shape={k.shape}, v.shape={v.shape}"
    given = q
    q, k, v = _widened(where, q=q, k=k, v=v)
    wide = q.dtype.type

    no_heads = q.ndim == k.ndim == v.ndim == 2
    if no_heads:
        q, k, v = q[np.newaxis], k[np.newaxis], v[np.newaxis]
    elif min(q.ndim, k.ndim, v.ndim) < 3:
        raise ValueError(f"q, k, v: expected three 2-D arrays or three of at least 3 dimensions ({shapes})")
    elif not {k.ndim, v.ndim} <= {3, q.ndim}:
        raise ValueError(f"k, v: expected as many dimensions as q has, or 3 ({shapes})")
    elif layout not in ("bhld", "blhd"):
        raise ValueError(f"layout: expected 'bhld' or 'blhd', got {layout!r}")
    elif layout == "blhd":
        q, k, v = np.swapaxes(q, -3, -2), np.swapaxes(k, -3, -2), np.swapaxes(v, -3, -2)

    q_heads, q_count, head_dim = q.shape[-3:]
    kv_heads, key_count = k.shape[-3:-1]
    if k.shape[-1] != head_dim or v.shape[-3:-1] != (kv_heads, key_count):
        raise ValueError(f"k, v: k needs q's D, and v needs k's heads and length ({shapes})")
    if q_heads != kv_heads and (kv_heads == 0 or q_heads % kv_heads):
        raise ValueError(f"q has {q_heads} heads, which is no multiple of k's {kv_heads} ({shapes})")
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    group = q_heads // kv_heads if kv_heads else 1
    k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
    if scale is None:
        scale = 1 / np.sqrt(wide(head_dim)) if head_dim else 1

    visible = _visible(batch, q_count, key_count, limits)  # batch + (1, Lq, Lk)
    logits = (q_count, key_count) if no_heads else (*batch, q_heads, q_count, key_count)
    for name, x in (("mask", mask), ("bias", bias)):
        if x is not None and np.ndim(x) > 2 and np.ndim(x) != len(logits):
            raise ValueError(f"{name}: expected at most 2 dimensions or {len(logits)}, got shape {np.shape(x)}")
    if mask is not None:
        visible = visible & (np.broadcast_to(mask, logits) != 0)
    with np.errstate(all="ignore"):  # NaN and infinity are legal input, and excluded scores may be either
        products = scores = q @ np.swapaxes(k, -1, -2) * wide(scale)  # (..., Hq, Lq, Lk)
        if softcap is not None:
            scores = wide(softcap) * np.tanh(scores / wide(softcap))
        if alibi_slopes is not None:
            distance = np.abs(_distances(batch, q_count, key_count, limits))
            scores = scores - _per_head("alibi_slopes", alibi_slopes, q_heads, wide) * distance
        if bias is not None:
            visible = visible & (np.broadcast_to(bias, logits) != -np.inf)  # also where the score is NaN
            scores = scores + np.broadcast_to(bias, logits).astype(wide)
        scores = np.where(visible, scores, -np.inf)
    if sinks is not None:
        sinks = _per_head("sinks", sinks, q_heads, wide)
    all_scores = (*batch, q_heads, q_count, key_count)  # a batch axis may come from v or kv_lengths alone
    return given, k, v, np.broadcast_to(products, all_scores), np.broadcast_to(scores, all_scores), sinks


def _limits_of(options: dict[str, Any]) -> Limits:
    return Limits(**{name: options[name] for name in Limits._fields if name in options})


def _scored_by(where: str, q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    """The same, of attention's arguments by their names."""
    own = ("mask", "bias", "alibi_slopes", "sinks", "softcap", "scale")
    if unknown := set(options) - {*own, *Limits._fields, "layout"}:
        raise TypeError(f"{where}() got an unexpected keyword argument {min(unknown)!r}")
    mask, bias, slopes, sinks, softcap, scale = (options.get(name) for name in own)
    layout = options.get("layout", "bhld")
    return _scored(where, q, k, v, mask, bias, _limits_of(options), slopes, sinks, softcap, scale, layout)


def _softmax(scores: Any, sinks: Any) -> tuple[Any, Any]:
    """Weights, which sum to less than 1 by the sink's, and the log-sum-exp."""
    with np.errstate(all="ignore"):
        largest = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
        if sinks is not None:
            largest = np.maximum(largest, sinks)
        shift = np.where(largest == -np.inf, 0, largest)  # a row that sees nothing: -inf - -inf would be NaN
        p = np.exp(scores - shift)  # exactly 0 where excluded: a score of -inf excludes its key, NaN does not
        total = np.sum(p, axis=-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks - shift)
        lse = np.squeeze(shift + np.log(total), -1)
        p = np.where(scores == -np.inf, 0, p / np.where(total == 0, 1, total))
    return p, lse


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
    **words: Never,
) -> Any:
    """Attention of sequences of different lengths, packed one after another: `attention` of each alone.

    Parameters
    ----------
    q : array_like, shape (Tq, Hq, D)
        Queries of all sequences.
    k : array_like, shape (Tk, Hkv, D)
        Keys of all sequences.
    v : array_like, shape (Tk, Hkv, Dv)
        Values of all sequences.
    <cu_seqlens_q>
    <mask>
        Here the scores are (N, Hq, longest queries, longest keys).
    <bias>
    <causal>
    <window>
    <q_offset>
    <q_positions>
        Here of shape (Tq,).
    <kv_lengths>
    <segments>
        Here of shapes (Tq,) and (Tk,).
    <alibi_slopes>
    <sinks>
    <softcap>
    <scale>
    <return_lse>

    Returns
    -------
    out : ndarray, shape (Tq, Hq, Dv)
        Of the type that `attention` returns for q.
    lse : ndarray, shape (Hq, Tq)
        Only with ``return_lse=True``.

    Raises
    ------
    ValueError
        As in `attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import reference
    >>> x = np.array([1.0, 3.0, 5.0, 5.0]).reshape(4, 1, 1)
    >>> reference.attention_varlen(x, 0 * x, x, [0, 2, 4], [0, 2, 4]).astype("float64").ravel()
    array([2., 2., 5., 5.])
    """
    where = "reference.attention_varlen"
    if words:
        _fail_words(where, words)
    q, k, v = _as_array("q", q, where), _as_array("k", k, where), _as_array("v", v, where)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_type(where, name, x)
    wide = _widened(where, q=q[:0])[0].dtype
    options: dict[str, Any] = dict(
        mask=mask, bias=bias, causal=causal, window=window, q_offset=q_offset, q_positions=q_positions,
        kv_lengths=kv_lengths, segments=segments, alibi_slopes=alibi_slopes, sinks=sinks, softcap=softcap, scale=scale,
    )  # fmt: skip
    q_starts, k_starts = np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k)
    q_count, key_count = np.diff(q_starts), np.diff(k_starts)
    n = len(q_count)
    logits = n, q.shape[1], q_count.max(initial=0), key_count.max(initial=0)
    out, lse = np.zeros((*q.shape[:2], v.shape[-1]), wide), np.zeros((q.shape[1], q.shape[0]), wide)
    for b in range(n):
        own = dict(options)
        rows, keys = slice(*q_starts[b : b + 2]), slice(*k_starts[b : b + 2])
        for name in ("mask", "bias"):
            if own.get(name) is not None:
                if 2 < np.ndim(own[name]) < 4:
                    raise ValueError(f"{name}: expected at most 2 dimensions or 4, got shape {np.shape(own[name])}")
                own[name] = np.broadcast_to(own[name], logits)[b, :, : q_count[b], : key_count[b]]
        for name in ("q_offset", "kv_lengths"):
            if own.get(name) is not None:
                own[name] = np.broadcast_to(own[name], (n,))[b]
        if q_positions is not None:
            own["q_positions"] = np.asarray(q_positions)[rows]
        if own.get("segments") is not None:
            q_ids, k_ids = own["segments"]
            own["segments"] = np.asarray(q_ids)[rows], np.asarray(k_ids)[keys]
        out[rows], lse[:, rows] = attention(q[rows], k[keys], v[keys], layout="blhd", return_lse=True, **own)
    return (out, lse) if return_lse else out


def _weigh(p: Any, v: Any, visible: Any) -> Any:
    """``p @ v``, to which a value adds nothing where its key is excluded, though 0 * NaN is NaN.

    p and visible have the shape (..., H, Lq, Lk), v has (..., H, Lk, Dv).
    """
    finite = np.isfinite(v)
    out = p @ np.where(finite, v, 0)
    batch_and_head = tuple(range(v.ndim - 2))
    for j in np.flatnonzero(~finite.all(axis=(*batch_and_head, -1))):  # the keys with a NaN or infinity somewhere
        value = np.where(finite[..., j, :], 0, v[..., j, :])[..., np.newaxis, :]
        touched = visible[..., j, np.newaxis] & ~finite[..., j, :][..., np.newaxis, :]
        if touched.any():
            out = out + np.where(touched, p[..., j, np.newaxis] * value, 0)
    return out


def _visible(batch: tuple[int, ...], q_count: int, key_count: int, limits: Limits) -> Any:
    """Which keys each query may attend to: bool, batch + (1, Lq, Lk) or an array that broadcasts to it."""
    causal, window = limits.causal, limits.window
    if isinstance(causal, str) and causal == "top-left":
        if limits.q_offset is not None or limits.q_positions is not None:
            raise ValueError('causal="top-left" already means q_offset=0; pass it, q_offset or q_positions')
    elif not isinstance(causal, bool | np.bool_):
        raise ValueError(f"causal: expected True, False or 'top-left', got {causal!r}")
    if window is None:
        left = right = None
    elif isinstance(window, int | np.integer):
        left = right = window
    else:
        left, right = window
    if any(side is not None and side < 0 for side in (left, right)):
        raise ValueError(f"window: sides are None or at least 0, got {window!r}")
    if causal:
        right = 0

    keys, queries = np.arange(key_count), np.arange(q_count)[:, np.newaxis]
    lengths = _numbers("kv_lengths", limits.kv_lengths, batch, key_count)
    starts = 0 if limits.kv_starts is None else _numbers("kv_starts", limits.kv_starts, batch, lengths)
    visible = (keys < lengths) & (keys >= starts) & (queries < _numbers("q_lengths", limits.q_lengths, batch, q_count))
    if limits.segments is not None:
        q_ids, k_ids = (np.asarray(ids) for ids in limits.segments)
        for ids, count in ((q_ids, q_count), (k_ids, key_count)):
            np.broadcast_to(ids, (*batch, count))  # ValueError if they do not
        same = q_ids[..., :, np.newaxis] == k_ids[..., np.newaxis, :]
        visible = visible & same[..., np.newaxis, :, :]
    if left is None and right is None:
        return visible
    distance = _distances(batch, q_count, key_count, limits)
    if left is not None:
        visible = visible & (distance >= -int(left))
    if right is not None:
        visible = visible & (distance <= int(right))
    return visible


def _distances(batch: tuple[int, ...], q_count: int, key_count: int, limits: Limits) -> Any:
    """Of each key from each query's position: int64, broadcasts to batch + (1, Lq, Lk)."""
    lengths = _numbers("kv_lengths", limits.kv_lengths, batch, key_count)
    counts = _numbers("q_lengths", limits.q_lengths, batch, q_count)
    queries = np.arange(q_count)[:, np.newaxis]
    if limits.q_positions is not None:
        if limits.q_offset is not None:
            raise ValueError("q_offset, q_positions: both say where queries sit; pass one of the two")
        positions = np.asarray(limits.q_positions).astype(np.int64, casting="same_kind")
        np.broadcast_to(positions, (*batch, q_count))  # ValueError if they do not
        return np.arange(key_count) - positions[..., np.newaxis, :, np.newaxis]
    if isinstance(limits.causal, str):
        offset = 0
    elif limits.q_offset is not None:
        offset = _per_sequence("q_offset", limits.q_offset, batch)
    elif limits.kv_lengths is not None and limits.q_lengths is None and np.any((lengths > 0) & (lengths < q_count)):
        raise ValueError(
            f"kv_lengths: a sequence has fewer keys than the {q_count} queries, so their positions have two "
            f"readings; padded queries? pass q_lengths, or q_offset=0 (kv_lengths={limits.kv_lengths!r})"
        )
    else:
        offset = lengths - counts
    # Where i + offset cannot wrap around, and is as far from every key.
    offset = np.clip(offset, -(2**62), 2**62)
    return np.arange(key_count) - (queries + offset)


def _numbers(name: str, given: Any, batch: tuple[int, ...], most: Any) -> Any:
    """Of queries or keys of each sequence, as `_per_sequence` has them; `most` where they are not given."""
    if given is None:
        return most
    numbers = _per_sequence(name, given, batch)
    if np.any(numbers < 0) or np.any(numbers > most):
        raise ValueError(f"{name}: expected numbers in 0..{np.min(most)}, got {given!r}")
    return numbers


def _per_head(name: str, values: Any, heads: int, wide: Any) -> Any:
    """One number per query head, as an array that broadcasts against (..., Hq, Lq, Lk)."""
    values = _as_array(name, values, "reference").astype(wide)
    if values.shape != (heads,):
        raise ValueError(f"{name}: expected one per query head, shape ({heads},), got {values.shape}")
    return values[:, np.newaxis, np.newaxis]


def _per_sequence(name: str, values: Any, batch: tuple[int, ...]) -> Any:
    """One integer for all, or one per sequence, as an array that broadcasts against (..., H, Lq, Lk)."""
    values = np.asarray(values).astype(np.int64, casting="same_kind")  # a float is a TypeError here
    if values.ndim == 0:
        return values
    try:
        np.broadcast_to(values, batch)
    except ValueError:
        raise ValueError(f"{name}: shape {values.shape} does not broadcast to the batch axes {batch}") from None
    return values[..., np.newaxis, np.newaxis, np.newaxis]
