"""The gradients of attention as they are defined: from the whole matrix of weights."""

from typing import Any

import numpy as np

from .._checks import _as_array
from .attention import _distances, _limits_of, _scored_by, _weigh


def attention_grad(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *, dlse: Any = None, want: tuple[str, ...] = ("q", "k", "v"),
    **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of attention with respect to its arguments.

    For the weights ``p[i, j] = exp(s[i, j] - lse[i])`` of visible keys, and 0 of others::

        delta[i] = sum_d dout[i, d] * out[i, d] - dlse[i]
        ds[i, j] = p[i, j] * (sum_d dout[i, d] * v[j, d] - delta[i])            dbias
        dslope   = -sum_ij ds[i, j] * |position of i - j|
        dsink    = -sum_i exp(sink - lse[i]) * delta[i]
        dx[i, j] = ds[i, j] * (1 - tanh(x[i, j] / softcap)^2)                   of x = scale * q @ k.T, without cap ds
        dq[i]    = scale * sum_j dx[i, j] * k[j]
        dk[j]    = scale * sum_i dx[i, j] * q[i]
        dv[j]    = sum_i p[i, j] * dout[i]

    Parameters
    ----------
    dout, q, k, v, out, lse, dlse, want
        As in `qkv_fast.attention_grad`.
    **options
        Its other arguments, packed sequences apart.

    Returns
    -------
    tuple of ndarray
        In the order of `want`, each of its argument's shape, and of the type that `reference.attention` returns for q.

    Raises
    ------
    TypeError, ValueError
        As in `reference.attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import reference
    >>> q, k, v = np.zeros((1, 1)), np.array([[1.0], [2.0]]), np.array([[3.0], [5.0]])
    >>> out, lse = reference.attention(q, k, v, return_lse=True)
    >>> dq, dv = reference.attention_grad(np.ones((1, 1)), q, k, v, out, lse, want=("q", "v"))
    >>> float(dq[0, 0]), dv.ravel().astype("float64")
    (0.5, array([0.5, 0.5]))
    """
    where = "reference.attention_grad"
    given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    dout, q, k, v, out, lse = (_as_array(name, x, where) for name, x in given.items())
    _, wide_k, wide_v, products, scores, sinks = _scored_by(where, q, k, v, options)
    wide = scores.dtype
    flat, swapped = q.ndim == 2, options.get("layout") == "blhd"

    def headed(x: Any) -> Any:
        x = np.asarray(x, wide)
        return x[np.newaxis] if flat else x.swapaxes(-3, -2) if swapped else x

    wide_q, dout, out = headed(q), headed(dout), headed(out)
    lse = np.asarray(lse, wide)[..., np.newaxis]
    lse = lse[np.newaxis] if flat else lse
    visible = (scores != -np.inf) & (lse != -np.inf)
    with np.errstate(all="ignore"):
        delta = np.sum(np.where(out == 0, 0, dout * out), axis=-1, keepdims=True)
        if dlse is not None:
            delta = delta - np.asarray(dlse, wide).reshape(delta.shape)
        p = np.where(visible, np.exp(scores - lse), 0)
        ds = np.where(visible, p * (dout @ wide_v.swapaxes(-1, -2) - delta), 0)
        dx = ds
        if options.get("softcap") is not None:
            dx = np.where(visible, ds * (1 - np.tanh(products / wide.type(options["softcap"])) ** 2), 0)
        found = {"bias": ds}
        scale = options.get("scale")
        if scale is None:
            scale = 1 / np.sqrt(wide.type(q.shape[-1])) if q.shape[-1] else 1
        found["q"] = wide.type(scale) * _weigh(dx, wide_k, visible)
        backwards = [x.swapaxes(-1, -2) for x in (dx, p, visible)]
        found["k"] = wide.type(scale) * _weigh(backwards[0], wide_q, backwards[2])
        found["v"] = _weigh(backwards[1], dout, backwards[2])
        if "slopes" in want:
            *batch, _, rows, keys = scores.shape
            distance = np.abs(_distances(tuple(batch), rows, keys, _limits_of(options)))
            found["slopes"] = -np.where(ds == 0, 0, ds * distance).sum(axis=(-2, -1))
        if "sinks" in want:
            weight = np.exp(sinks - lse)
            found["sinks"] = -np.where((weight == 0) | (lse == -np.inf), 0, weight * delta).sum(axis=(-2, -1))
    given = {"q": q, "k": k, "v": v, "bias": options.get("bias")}
    given |= {"sinks": options.get("sinks"), "slopes": options.get("alibi_slopes")}
    for name in ("k", "v"):
        heads = given[name].shape[-2 if swapped else -3] if not flat else 1
        x = found[name]
        group = x.shape[-3] // heads if heads else 1
        found[name] = x.reshape(*x.shape[:-3], heads, group, *x.shape[-2:]).sum(axis=-3)
    for name in ("q", "k", "v"):
        x = found[name]
        found[name] = x[0] if flat else x.swapaxes(-3, -2) if swapped else x
    return tuple(_summed(found[name], np.shape(given[name])) for name in want)


def _summed(x: Any, shape: tuple[int, ...]) -> Any:
    """Over what broadcasts in an array of this shape."""
    whole = (*(1,) * (x.ndim - len(shape)), *shape)
    x = x.sum(axis=tuple(i for i, n in enumerate(whole) if n != x.shape[i]), keepdims=True)
    return x.reshape(shape)
