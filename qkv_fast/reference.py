"""Attention as it is defined, in plain NumPy: the tests' oracle and the documentation of every argument.

One matrix of scores, one softmax, one product with the values, all of it stored: memory is O(Lq * Lk) per
head. What `qkv_fast.attention` computes in tiles, this computes in the open and in the next wider type, so an
error measured against it is the error of the fast code.
"""

from typing import Any

import numpy as np

__all__ = ["attention", "scores", "softmax", "weighted_values"]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    kv_lengths: Any = None,
    scale: float | None = None,
    layout: str = "bhld",
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention, ``softmax(scale * q @ k.T) @ v`` over the visible keys.

    For query i and its visible keys j (all of them, unless an argument below excludes some)::

        s[i, j] = scale * sum_d q[i, d] * k[j, d]
        p[i, j] = exp(s[i, j]) / sum_j exp(s[i, j])
        out[i]  = sum_j p[i, j] * v[j]
        lse[i]  = log(sum_j exp(s[i, j]))

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries. Arrays of shape (L, D) are one head without a head axis; then all three must be 2-D.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys. ``Hq`` is a multiple of ``Hkv``; query head h reads key head ``h // (Hq // Hkv)`` (grouped
        queries).
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values. The axes left of the heads broadcast among q, k and v; the head axis does not.
    causal : bool or "top-left", default False
        Exclude keys after the query's position. "top-left" also sets ``q_offset`` to 0.
    window : None, int or (left, right), optional
        Keep keys at most `left` before and at most `right` after the query's position, both inclusive; None
        leaves a side open. An int w is (w, w), or (w, 0) when causal: a causal w sees w + 1 keys.
    q_offset : int or array_like of int, optional
        Query i has the position ``i + q_offset``; one offset, or one per sequence (it broadcasts to the batch
        axes). By default query i has the position ``i + n - Lq`` with n = `kv_lengths` or Lk: the last query
        sees the last key.
    kv_lengths : int or array_like of int, optional
        Number of valid keys, one for all or one per sequence; later keys are excluded.
    scale : float, optional
        Factor of the scores; 1 / sqrt(D) by default, and 1 for D = 0.
    layout : "bhld" or "blhd", default "bhld"
        "blhd" swaps the head and length axes of q, k, v and the output; the log-sum-exp stays (..., Hq, Lq).
    return_lse : bool, default False
        Return the log-sum-exp too.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        Computed and returned in float64; where q is float64, in `numpy.longdouble` (which is 80 bits wide
        with most x86-64 compilers, and no wider than float64 on Windows and on Apple silicon).
    lse : ndarray, shape (..., Hq, Lq)
        Natural log-sum-exp of the visible scores, of the same type. Only with ``return_lse=True``.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown `causal` or `layout`, a negative window or a length outside 0..Lk,
        ``causal="top-left"`` with a `q_offset`, and the call with two readings: `kv_lengths` and positions
        without `q_offset`, where a sequence has fewer keys than there are queries.

    Notes
    -----
    A key whose score is -inf is excluded, whatever made it so. Excluded keys and values never influence a
    result, not even by a NaN; an attended NaN or infinity has the effect that IEEE arithmetic gives it, in
    the rows (for v, the columns) that attend to it. A query without visible keys has the output 0 and the
    log-sum-exp -inf. With D = 0 every score is 0, the output the mean of the visible values.

    The source is A. Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1 (its "Mask (opt.)" is
    what `causal`, `window` and `kv_lengths` make); grouped queries are from J. Ainslie et al., "GQA", 2023,
    section 2.2.

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
    q, k, v = np.asarray(q), np.asarray(k), np.asarray(v)
    shapes = f"q.shape={q.shape}, k.shape={k.shape}, v.shape={v.shape}"
    q, k, v = _widened(q, k, v)
    wide = q.dtype.type

    no_heads = q.ndim == k.ndim == v.ndim == 2
    if no_heads:
        q, k, v = q[np.newaxis], k[np.newaxis], v[np.newaxis]
    elif min(q.ndim, k.ndim, v.ndim) < 3:
        raise ValueError(f"q, k, v: expected three 2-D arrays or three of at least 3 dimensions ({shapes})")
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

    visible = _visible(batch, q_count, key_count, causal, window, q_offset, kv_lengths)  # batch + (1, Lq, Lk)
    with np.errstate(all="ignore"):  # NaN and infinity are legal input, and excluded scores may be either
        scores = q @ np.swapaxes(k, -1, -2) * wide(scale)  # (..., Hq, Lq, Lk)
        scores = np.where(visible, scores, -np.inf)
        visible = scores != -np.inf  # a score of -inf excludes its key; NaN does not
        largest = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
        shift = np.where(largest == -np.inf, 0, largest)  # a row that sees nothing: -inf - -inf would be NaN
        p = np.exp(scores - shift)  # exactly 0 where excluded
        total = np.sum(p, axis=-1, keepdims=True)
        lse = np.squeeze(shift + np.log(total), -1)
        out = _weigh(p, v, visible) / np.where(total == 0, 1, total)

    out = np.broadcast_to(out, (*batch, *out.shape[-3:]))  # a batch axis may come from v or kv_lengths alone
    lse = np.broadcast_to(lse, out.shape[:-1])
    if no_heads:
        out, lse = out[0], lse[0]
    elif layout == "blhd":
        out = np.swapaxes(out, -3, -2)
    return (out.copy(), lse.copy()) if return_lse else out.copy()


def scores(q: Any, k: Any, *, scale: float | None = None, layout: str = "bhld") -> Any:
    """Scores of every query with every key, ``scale * q @ k.T``.

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries; or both arrays are 2-D, without heads.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys. Each head serves ``Hq // Hkv`` query heads that follow one another.
    scale : float, optional
        Factor of the products; ``1 / sqrt(D)`` by default, and 1 for D = 0.
    layout : "bhld" or "blhd", default "bhld"
        "blhd" swaps the head and length axes of q and k.

    Returns
    -------
    ndarray, shape (..., Hq, Lq, Lk)
        Head-first in either layout, of the type that `attention` returns for q.

    Raises
    ------
    ValueError
        Lengths, heads or batch axes that NumPy's product finds not to fit; there is no other check.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.scores([[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]], scale=1).astype("float64")
    array([[11., 17.]])
    """
    q, k = _widened(q, k)
    if layout == "blhd" and q.ndim > 2:
        q, k = np.swapaxes(q, -3, -2), np.swapaxes(k, -3, -2)
    if scale is None:
        scale = 1 / np.sqrt(q.dtype.type(q.shape[-1])) if q.shape[-1] else 1
    with np.errstate(all="ignore"):
        return q @ np.swapaxes(_for_each_head(k, q), -1, -2) * q.dtype.type(scale)


def softmax(x: Any, axis: int = -1, *, mask: Any = None) -> Any:
    """Softmax along an axis, ``exp(x) / exp(x).sum(axis)``, of the elements whose mask is True.

    Parameters
    ----------
    x : array_like
        Numbers, with at least one axis.
    axis : int, default -1
        Along which the result sums to 1.
    mask : array_like of bool, optional
        Broadcasts to x. Where it is False an element takes no part, so that its weight is 0, even if it is NaN.

    Returns
    -------
    ndarray
        Of x's shape and the type that `attention` returns for x. 0 where nothing along the axis takes part; NaN where
        an element that does is NaN or +inf.

    Raises
    ------
    ValueError
        A mask that does not broadcast to x, an axis that x does not have.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import reference
    >>> reference.softmax(np.log([1.0, 3.0]), mask=[True, False]).astype("float64")
    array([1., 0.])
    """
    (x,) = _widened(x)
    if mask is not None:
        x = np.where(np.broadcast_to(mask, x.shape), x, -np.inf)
    with np.errstate(all="ignore"):
        largest = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
        p = np.exp(x - np.where(largest == -np.inf, 0, largest))
        total = np.sum(p, axis=axis, keepdims=True)
        return p / np.where(total == 0, 1, total)


def weighted_values(p: Any, v: Any, *, layout: str = "bhld") -> Any:
    """Sums of the values with given weights, ``p @ v``.

    Parameters
    ----------
    p : array_like, shape (..., Hq, Lq, Lk)
        Weights, head-first in either layout; or both arrays are 2-D, without heads.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values. Each head serves ``Hq // Hkv`` heads of p that follow one another.
    layout : "bhld" or "blhd", default "bhld"
        "blhd" swaps the head and length axes of v and of the result.

    Returns
    -------
    ndarray, shape (..., Hq, Lq, Dv)
        Of the type that `attention` returns for p. A weight of 0 times NaN or infinity is NaN.

    Raises
    ------
    ValueError
        Lengths, heads or batch axes that NumPy's product finds not to fit; there is no other check.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.weighted_values([[0.5, 0.5]], [[1.0, 2.0], [3.0, 6.0]]).astype("float64")
    array([[2., 4.]])
    """
    p, v = _widened(p, v)
    swapped = layout == "blhd" and p.ndim > 2
    if swapped:
        v = np.swapaxes(v, -3, -2)
    with np.errstate(all="ignore"):
        out = p @ _for_each_head(v, p)
    return np.swapaxes(out, -3, -2) if swapped else out


def _widened(*given: Any) -> list[Any]:
    """All in the type that results are computed in, which follows from the first."""
    arrays = [np.asarray(x) for x in given]
    wide = np.longdouble if arrays[0].dtype.kind == "f" and arrays[0].dtype.itemsize == 8 else np.float64
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return [x.astype(wide) for x in arrays]


def _for_each_head(x: Any, like: Any) -> Any:
    """Key or value heads repeated for the query heads of their groups; 2-D arrays have none."""
    return x if x.ndim == 2 else np.repeat(x, like.shape[-3] // max(x.shape[-3], 1), axis=-3)


def _weigh(p: Any, v: Any, visible: Any) -> Any:
    """``p @ v``, to which a value adds nothing where its key is excluded, though 0 * NaN is NaN.

    p and visible have the shape (..., H, Lq, Lk), v has (..., H, Lk, Dv).
    """
    finite = np.isfinite(v)
    out = p @ np.where(finite, v, 0)
    batch_and_head = tuple(range(v.ndim - 2))
    for j in np.flatnonzero(
        ~finite.all(axis=(*batch_and_head, -1))
    ):  # the keys with a NaN or infinity somewhere
        value = np.where(finite[..., j, :], 0, v[..., j, :])[..., np.newaxis, :]
        touched = visible[..., j, np.newaxis] & ~finite[..., j, :][..., np.newaxis, :]
        if touched.any():
            out = out + np.where(touched, p[..., j, np.newaxis] * value, 0)
    return out


def _visible(
    batch: tuple[int, ...], q_count: int, key_count: int, causal: Any, window: Any, q_offset: Any, kv_lengths: Any
) -> Any:
    """Which keys each query may attend to: bool, batch + (1, Lq, Lk) or an array that broadcasts to it."""
    if isinstance(causal, str) and causal == "top-left":
        if q_offset is not None:
            raise ValueError('q_offset: causal="top-left" already means q_offset=0; pass one of the two')
        q_offset = 0
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

    keys = np.arange(key_count)
    lengths = key_count if kv_lengths is None else _per_sequence("kv_lengths", kv_lengths, batch)
    if np.any(lengths < 0) or np.any(lengths > key_count):
        raise ValueError(
            f"kv_lengths: expected lengths in 0..{key_count}, the number of keys, got {kv_lengths!r}"
        )
    visible = np.broadcast_to(keys < lengths, (*np.shape(lengths)[:-2], q_count, key_count))
    if left is None and right is None:
        return visible

    if q_offset is not None:
        offset = _per_sequence("q_offset", q_offset, batch)
    elif kv_lengths is not None and np.any((lengths > 0) & (lengths < q_count)):
        raise ValueError(
            f"kv_lengths: a sequence has fewer keys than the {q_count} queries, so their positions have two "
            f"readings; padded queries? pass q_offset=0 (kv_lengths={kv_lengths!r})"
        )
    else:
        offset = lengths - q_count
    offset = np.clip(
        offset, -(2**62), 2**62
    )  # where i + offset cannot wrap around, and is as far from every key
    distance = keys - (np.arange(q_count)[:, np.newaxis] + offset)
    if left is not None:
        visible = visible & (distance >= -int(left))
    if right is not None:
        visible = visible & (distance <= int(right))
    return visible


def _per_sequence(name: str, values: Any, batch: tuple[int, ...]) -> Any:
    """One integer for all, or one per sequence, as an array that broadcasts against (..., H, Lq, Lk)."""
    values = np.asarray(values).astype(np.int64, casting="same_kind")  # a float is a TypeError here
    if values.ndim == 0:
        return values
    try:
        np.broadcast_to(values, batch)
    except ValueError:
        raise ValueError(
            f"{name}: shape {values.shape} does not broadcast to the batch axes {batch}"
        ) from None
    return values[..., np.newaxis, np.newaxis, np.newaxis]
