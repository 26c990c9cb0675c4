"""The stages of attention as they are defined, in plain NumPy; public as `qkv_fast.reference.scores` and so on."""

from typing import Any

import numpy as np

from .._checks import _as_array
from .._help import documented


@documented
def scores(q: Any, k: Any, *, scale: float | None = None, layout: str = "bhld") -> Any:
    """Scores of every query with every key, ``scale * q @ k.T``.

    Parameters
    ----------
    <q>
    <k>
    <scale>
    <layout>
        It is that of q and k.

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
    q, k = _widened("reference.scores", q=q, k=k)
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
    (x,) = _widened("reference.softmax", x=x)
    if mask is not None:
        x = np.where(np.broadcast_to(mask, x.shape), x, -np.inf)
    with np.errstate(all="ignore"):
        largest = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
        p = np.exp(x - np.where(largest == -np.inf, 0, largest))
        total = np.sum(p, axis=axis, keepdims=True)
        return p / np.where(total == 0, 1, total)


def softmax_grad(dp: Any, p: Any, axis: int = -1) -> Any:
    """The gradient through a softmax, ``p * (dp - sum(p * dp))``.

    Parameters
    ----------
    dp : array_like
        The gradient of the weights, with at least one axis.
    p : array_like
        The weights, of dp's shape.
    axis : int, default -1
        Along which these sum to 1.

    Returns
    -------
    ndarray
        Of dp's shape and the type that `attention` returns for dp. 0 where the weight is 0, whatever dp is there.

    Raises
    ------
    ValueError
        Shapes that do not broadcast, an axis that they do not have.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.softmax_grad([1.0, 0.0], [0.25, 0.75]).astype("float64")
    array([ 0.1875, -0.1875])
    """
    dp, p = _widened("reference.softmax_grad", dp=dp, p=p)
    with np.errstate(all="ignore"):
        total = np.sum(np.where(p == 0, 0, p * dp), axis=axis, keepdims=True)
        return np.where(p == 0, 0, p * (dp - total))


@documented
def weighted_values(p: Any, v: Any, *, layout: str = "bhld") -> Any:
    """Sums of the values with given weights, ``p @ v``.

    Parameters
    ----------
    p : array_like, shape (..., Hq, Lq, Lk)
        Weights, head-first in either layout; or both arrays are 2-D, without heads.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values. Each head serves ``Hq // Hkv`` heads of p that follow one another.
    <layout>
        It is that of v and of the result.

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
    p, v = _widened("reference.weighted_values", p=p, v=v)
    swapped = layout == "blhd" and p.ndim > 2
    if swapped:
        v = np.swapaxes(v, -3, -2)
    with np.errstate(all="ignore"):
        out = p @ _for_each_head(v, p)
    return np.swapaxes(out, -3, -2) if swapped else out


@documented
def linear(x: Any, w: Any, b: Any = None) -> Any:
    """A linear layer, ``x @ w.T + b``.

    Parameters
    ----------
    <layer_x>
    <layer_w>
    <layer_b>

    Returns
    -------
    ndarray, shape (..., n_out)
        Of the type that `attention` returns for x.

    Raises
    ------
    ValueError
        Shapes that NumPy's product finds not to fit; there is no other check.

    Examples
    --------
    >>> from qkv_fast import reference
    >>> reference.linear([1.0, 2.0], [[3.0, 4.0], [5.0, 6.0]], [0.0, 1.0]).astype("float64")
    array([11., 18.])
    """
    x, w = _widened("reference.linear", x=x, w=w)
    with np.errstate(all="ignore"):
        out = x @ w.T
        return out if b is None else out + _as_array("b", b, "reference.linear").astype(out.dtype)


def rope(
    x: Any, positions: Any = None, *, base: float = 10000.0, rotary_dim: int | None = None, interleaved: bool = False
) -> Any:
    """Queries or keys with rotary positions: pairs as complex numbers, times ``exp(1j * position * frequency)``.

    Parameters
    ----------
    x : array_like, shape (..., H, L, D)
        Queries or keys. Or (L, D).
    positions : array_like of int, shape (L,) or (..., L), optional
        0 to L - 1 by default.
    base : float, default 10000.0
        The base of the frequencies.
    rotary_dim : int, optional
        The first elements of a row that are turned, an even number. All D by default.
    interleaved : bool, default False
        Whether pairs are the elements 2 i and 2 i + 1, rather than i and i + rotary_dim / 2.

    Returns
    -------
    ndarray, of x's shape
        Of the type that `attention` returns for x.

    Raises
    ------
    ValueError
        Shapes that do not broadcast; there is no other check.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import reference
    >>> np.round(reference.rope([[1.0, 0.0], [1.0, 0.0]]).astype("float64"), 3)
    array([[1.   , 0.   ],
           [0.54 , 0.841]])
    """
    (x,) = _widened("reference.rope", x=x)
    turned = x.shape[-1] if rotary_dim is None else rotary_dim
    at = np.asarray(np.arange(x.shape[-2]) if positions is None else positions)
    angles = at[..., None] * np.float64(base) ** (-np.arange(0, turned, 2) / max(turned, 1))
    first: Any
    second: Any
    first, second = np.s_[..., : turned // 2], np.s_[..., turned // 2 : turned]
    if interleaved:
        first, second = np.s_[..., :turned:2], np.s_[..., 1:turned:2]
    if at.ndim > 1:
        angles = angles[..., None, :, :]
    pairs = (x[first] + 1j * x[second]) * np.exp(1j * angles)
    out = x.copy()
    out[first], out[second] = pairs.real, pairs.imag
    return out


def _widened(where: str, **given: Any) -> list[Any]:
    """All in the type that results are computed in, which follows from the first."""
    arrays = [_as_array(name, x, where) for name, x in given.items()]
    wide = np.longdouble if arrays[0].dtype.kind == "f" and arrays[0].dtype.itemsize == 8 else np.float64
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return [x.astype(wide) for x in arrays]


def _for_each_head(x: Any, like: Any) -> Any:
    """Key or value heads repeated for the query heads of their groups; 2-D arrays have none."""
    return x if x.ndim == 2 else np.repeat(x, like.shape[-3] // max(x.shape[-3], 1), axis=-3)
