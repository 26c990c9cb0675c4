"""Where attention falls, as it is defined: from the whole matrix of weights."""

from typing import Any

import numpy as np

from .attention import _scored_by, _softmax, _weigh


def _matrices(where: str, q: Any, k: Any, options: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Scaled products, final scores, weights, each (..., Hq, Lq, Lk), 2-D without heads; and the log-sum-exp."""
    k = np.asarray(k)
    given, *_, products, scores, sinks = _scored_by(f"reference.spotlight.{where}", q, k, k[..., :0], options)
    p, lse = _softmax(scores, sinks)
    found = products, scores, p, lse
    return tuple(x[0] for x in found) if given.ndim == 2 else found


def largest(q: Any, k: Any, **options: Any) -> Any:
    """The largest scaled product of each query with a key that it sees, ``max(scale * q @ k.T)``.

    Parameters
    ----------
    q, k : array_like
        As in `qkv_fast.spotlight.largest`.
    **options
        Its other arguments.

    Returns
    -------
    ndarray, shape (..., Hq, Lq)
        Of the type that `reference.attention` returns for q.

    Raises
    ------
    TypeError, ValueError
        As in `reference.attention`.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.spotlight.largest([[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]], scale=1).astype("float64")
    array([17.])
    """
    options |= {"sinks": None, "softcap": None, "alibi_slopes": None}
    products, scores, _, _ = _matrices("largest", q, k, options)
    seen = np.where(scores == -np.inf, -np.inf, products)
    return np.max(seen, axis=-1, initial=-np.inf)


def entropy(q: Any, k: Any, **options: Any) -> Any:
    """The entropy of each query's weights in nats, ``-sum(p * log(p))`` over visible keys.

    Parameters
    ----------
    q, k : array_like
        As in `qkv_fast.spotlight.entropy`.
    **options
        Its other arguments.

    Returns
    -------
    ndarray, shape (..., Hq, Lq)
        Of the type that `reference.attention` returns for q.

    Raises
    ------
    TypeError, ValueError
        As in `reference.attention`.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.spotlight.entropy([[0.0]], [[1.0], [2.0]]).astype("float64").round(3)
    array([0.693])
    """
    p = _matrices("entropy", q, k, options)[2]
    with np.errstate(all="ignore"):  # not from the log-sum-exp, which has no digits for it where scores are huge
        return 0 - np.sum(np.where(p == 0, 0, p * np.log(p)), axis=-1)


def top_keys(q: Any, k: Any, n: int = 5, **options: Any) -> tuple[Any, Any]:
    """The n heaviest keys of each query, and their weights.

    Parameters
    ----------
    q, k : array_like
        As in `qkv_fast.spotlight.top_keys`.
    n : int, default 5
        How many.
    **options
        Its other arguments.

    Returns
    -------
    keys : ndarray of int64, shape (..., Hq, Lq, n)
        By score, the largest first, ties by the smaller key; -1 where fewer are visible, and where weights are NaN.
    weights : ndarray, shape (..., Hq, Lq, n)
        Of the type that `reference.attention` returns for q.

    Raises
    ------
    TypeError, ValueError
        As in `reference.attention`.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.spotlight.top_keys([[1.0]], [[1.0], [3.0], [2.0]], 2)[0]
    array([[1, 2]])
    """
    _, scores, p, lse = _matrices("top_keys", q, k, options)
    missing = max(0, n - scores.shape[-1])
    around = [(0, 0)] * (scores.ndim - 1) + [(0, missing)]
    scores, p = np.pad(scores, around, constant_values=-np.inf), np.pad(p, around)
    keys = np.argsort(-scores, axis=-1, kind="stable")[..., :n]
    absent = np.take_along_axis(scores, keys, -1) == -np.inf
    weights = np.where(absent, 0, np.take_along_axis(p, keys, -1))
    nan = np.isnan(lse)[..., np.newaxis]
    return np.where(absent | nan, -1, keys), np.where(nan, np.nan, weights)


def weights(q: Any, k: Any, *, queries: Any = None, keys: Any = None, **options: Any) -> Any:
    """The weights of chosen queries and keys, ``softmax(scale * q @ k.T)[queries][:, keys]``.

    Parameters
    ----------
    q, k : array_like
        As in `qkv_fast.spotlight.weights`.
    queries, keys : slice or array_like of int, optional
        Which; all by default.
    **options
        Its other arguments.

    Returns
    -------
    ndarray, shape (..., Hq, queries, keys)
        Of the type that `reference.attention` returns for q.

    Raises
    ------
    TypeError, ValueError
        As in `reference.attention`.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.spotlight.weights([[0.0], [0.0]], [[1.0], [2.0]], causal=True, keys=[0]).astype("float64")
    array([[1. ],
           [0.5]])
    """
    p = _matrices("weights", q, k, options)[2]
    p = p if queries is None else p[..., queries, :]
    return p if keys is None else p[..., keys]


def received(q: Any, k: Any, *, queries: Any = None, **options: Any) -> Any:
    """The weight that each key receives, summed over queries.

    Parameters
    ----------
    q, k : array_like
        As in `qkv_fast.spotlight.received`.
    queries : slice or array_like of int, optional
        The queries that count; all by default.
    **options
        Its other arguments.

    Returns
    -------
    ndarray, shape (..., Hq, Lk)
        Of the type that `reference.attention` returns for q.

    Raises
    ------
    TypeError, ValueError
        As in `reference.attention`.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.spotlight.received([[0.0], [0.0]], [[1.0], [2.0]], causal=True).astype("float64")
    array([1.5, 0.5])
    """
    p = _matrices("received", q, k, options)[2]
    return np.sum(p if queries is None else p[..., queries, :], axis=-2)


def pooled(q: Any, k: Any, shape: Any = (256, 256), reduce: str = "mean", **options: Any) -> Any:
    """The whole map of weights in cells.

    Parameters
    ----------
    q, k : array_like
        As in `qkv_fast.spotlight.pooled`.
    shape : (int, int), default (256, 256)
        Most rows and columns of cells.
    reduce : {"mean", "max"}, default "mean"
        What a cell says of its weights.
    **options
        Its other arguments.

    Returns
    -------
    ndarray, shape (..., Hq, R, C)
        Of the type that `reference.attention` returns for q.

    Raises
    ------
    TypeError, ValueError
        As in `reference.attention`.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.spotlight.pooled([[0.0]], [[1.0], [2.0], [3.0]], (1, 2), "max").astype("float64").round(3)
    array([[0.333, 0.333]])
    """
    return _pool(_matrices("pooled", q, k, options)[2], shape, reduce)


def _pool(p: Any, shape: Any, reduce: str) -> Any:
    of_cell: Any = {"mean": np.mean, "max": np.max}[reduce]
    for axis, most in zip((-2, -1), shape, strict=True):
        n = p.shape[axis]
        count = min(most, n)
        cells = (range(c * n // count, (c + 1) * n // count) for c in range(count))
        p = np.stack([of_cell(np.take(p, cell, axis), axis) for cell in cells], axis) if count else p
    return p


def influence(q: Any, k: Any, v: Any, *, groups: Any = None, **options: Any) -> Any:
    """How far the output of attention would move if a key, or a group of keys, were hidden.

    Parameters
    ----------
    q, k, v : array_like
        As in `qkv_fast.spotlight.influence`.
    groups : array_like of int, shape (Lk,), optional
        The group of each key, from 0 on, or -1 for none; by default each key is one.
    **options
        Its other arguments.

    Returns
    -------
    ndarray, shape (..., Hq, Lk) or (..., Hq, groups)
        Of the type that `reference.attention` returns for q.

    Raises
    ------
    TypeError, ValueError
        As in `reference.attention`.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.spotlight.influence([[0.0]], [[1.0], [1.0]], [[3.0], [4.0]]).astype("float64")
    array([0.5, 0.5])
    """
    given, _, v, _, scores, sinks = _scored_by("reference.spotlight.influence", q, k, v, options)
    seen = reached = scores != -np.inf
    with np.errstate(all="ignore"):
        p = _softmax(scores, sinks)[0]
        out = _weigh(p, v, seen)
        if groups is None:
            groups, shares = np.arange(scores.shape[-1]), p
            apart = np.zeros_like(p)
            for d in range(v.shape[-1]):
                apart += (out[..., d, np.newaxis] - v[..., np.newaxis, :, d]) ** 2
        else:
            groups = np.asarray(groups)
            members = [groups == g for g in range(groups.max(initial=-1) + 1)]
            shares, apart = np.zeros((2, *p.shape[:-1], len(members)), p.dtype)
            reached = np.zeros(shares.shape, bool)
            for g, inside in enumerate(members):
                shares[..., g] = p[..., inside].sum(axis=-1)
                mean = _weigh(p[..., inside], v[..., inside, :], seen[..., inside]) / shares[..., g, np.newaxis]
                apart[..., g] = np.sum((out - np.where(shares[..., g, np.newaxis] == 0, 0, mean)) ** 2, axis=-1)
                reached[..., g] = seen[..., inside].any(axis=-1)
        moved = (shares / (1 - shares)) ** 2 * apart
        if shares.shape[-1]:
            # 1 - p says little where one has nearly all the weight: such queries attend without it.
            most = np.argmax(np.where(np.isnan(shares), 0, shares), axis=-1)[..., np.newaxis]
            others = np.where(groups == most, -np.inf, scores)
            without = np.sum((out - _weigh(_softmax(others, sinks)[0], v, others != -np.inf)) ** 2, axis=-1)
            spread = np.take_along_axis(shares, most, -1) <= 0.5
            kept = np.where(spread, np.take_along_axis(moved, most, -1), without[..., np.newaxis])
            np.put_along_axis(moved, most, kept, -1)
        found = np.sqrt(np.sum(np.where(reached, moved, 0), axis=-2))
    return found[0] if given.ndim == 2 else found
