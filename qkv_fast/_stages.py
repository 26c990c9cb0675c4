"""The stages of attention on their own, for those who want the matrix: scores, softmax, weighted values."""

import math
import operator
from typing import Any, NamedTuple, Never

import numpy as np

from . import _core, _runtime
from ._checks import (
    _FLOAT32,
    _TYPES,
    Array,
    _as_array,
    _broadcast,
    _check_axes,
    _check_layout,
    _check_narrower,
    _check_out,
    _check_type,
    _fail_shapes,
    _fail_words,
    _returned,
    _scale_of,
)
from ._help import documented


class PlannedStage(NamedTuple):
    """What a stage returns inside `_runtime.planning()`: its arrays, and the core's report of what it would do."""

    stage: str
    threads: int
    isa: int
    report: dict[str, Any]
    arrays: dict[str, Array]  # the result is "out"
    given_out: Array | None
    rescaled: bool = False  # whether the result is multiplied again


@documented
def scores(
    q: Any,
    k: Any,
    *,
    scale: float | None = None,
    layout: str = "bhld",
    out: Any = None,
    num_threads: int | None = None,
    **words: Never,
) -> Array:
    """Scores of every query with every key, ``scale * q @ k.T``.

    Parameters
    ----------
    <q>
    <k>
        It has as many axes as q, or 3; those left of the heads broadcast.
    <scale>
    <layout>
        It is that of q and k. The scores are head-first in either.
    <out>
    <num_threads>

    Returns
    -------
    ndarray, shape (..., Hq, Lq, Lk)
        In q's type and native byte order; `out` itself where given.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, masked arrays, `np.matrix`.
    ValueError
        Shapes that do not fit, a scale that is not finite, an unknown layout.
    OverflowError
        A size too large for 63 bits.
    MemoryError
        No memory for the result or for scratch space.

    See Also
    --------
    softmax, weighted_values : The other stages.
    attention : All three at once, without storing the matrix.

    Notes
    -----
    This is the matrix in the definition of attention by A. Vaswani et al., "Attention Is All You Need", 2017, section
    3.2.1. The bits of a score depend on its query, its key and the CPU path alone; on a path with tiles (amx) also on
    whether there are more than 64 queries, whose products are made of tiles.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> q = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> k = np.array([[1.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    >>> qkv_fast.scores(q, k, scale=1)
    array([[ 1.,  3.,  0.],
           [ 2.,  0., 10.]])
    """
    where = "scores"
    if words:
        _fail_words(where, words, "scale")
    heads_first = _check_layout(layout, where)
    q, k = _matrices(where, heads_first, q=q, k=k)
    if q.shape[-1] != k.shape[-1]:
        _fail_shapes(where, f"k has dimension {k.shape[-1]}, q has {q.shape[-1]}", q=q, k=k)
    scale = _scale_of(where, scale, q.shape[-1])
    if q.ndim == 2:
        shape: tuple[int, ...] = (q.shape[0], k.shape[0])
    else:
        heads, length = (-3, -2) if heads_first else (-2, -3)
        _check_heads(where, q.shape[heads], k.shape[heads], q=q, k=k)
        shape = (*_broadcast(where, q=q, k=k), q.shape[heads], q.shape[length], k.shape[length])
    return _product(where, "qk", q, k, shape, (heads_first, heads_first, True), scale, out, num_threads)


@documented
def weighted_values(
    p: Any,
    v: Any,
    *,
    layout: str = "bhld",
    out: Any = None,
    num_threads: int | None = None,
    **words: Never,
) -> Array:
    """Sums of the values with given weights, ``p @ v``.

    Parameters
    ----------
    p : array_like, shape (..., Hq, Lq, Lk)
        Weights, as from `softmax`; float16, bfloat16 (of ml_dtypes), float32 or float64. Or (Lq, Lk), if v is 2-D as
        well.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values, of p's type or a narrower one; float16 and bfloat16 do not mix. ``Hq`` is a multiple of ``Hkv``; weight
        head h reads value head ``h // (Hq // Hkv)``. v has as many axes as p, or 3; those left of the heads broadcast.
    <layout>
        It is that of v and of the result. The weights are head-first in either.
    <out>
    <num_threads>

    Returns
    -------
    ndarray, shape (..., Hq, Lq, Dv)
        In p's type and native byte order; `out` itself where given.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, masked arrays, `np.matrix`.
    ValueError
        Shapes that do not fit, an unknown layout.
    OverflowError
        A size too large for 63 bits.
    MemoryError
        No memory for the result or for scratch space.

    See Also
    --------
    scores, softmax : The other stages.
    attention : All three at once, without storing the matrix.

    Notes
    -----
    A plain product (A. Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1): unlike in `attention`, a
    weight of 0 does not hide a NaN in its value, since 0 * NaN is NaN. Sums run over blocks of keys, each from zero.
    On a path with tiles (amx) those of more than 64 queries are made of tiles, as in `scores`.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 4, 50, 16))
    >>> weights = qkv_fast.softmax(qkv_fast.scores(q, k))
    >>> np.allclose(qkv_fast.weighted_values(weights, v), qkv_fast.attention(q, k, v))
    True
    """
    where = "weighted_values"
    if words:
        _fail_words(where, words, "")
    heads_first = _check_layout(layout, where)
    p, v = _matrices(where, heads_first, p=p, v=v)
    two = p.ndim == 2
    heads, length = (-3, -2) if heads_first or two else (-2, -3)
    if v.shape[length] != p.shape[-1]:
        _fail_shapes(where, f"v has length {v.shape[length]}, p weighs {p.shape[-1]} keys", p=p, v=v)
    if two:
        shape: tuple[int, ...] = (p.shape[0], v.shape[1])
    else:
        _check_heads(where, p.shape[-3], v.shape[heads], p=p, v=v)
        rows = p.shape[-3:-1] if heads_first else p.shape[-2:-4:-1]
        shape = (*_broadcast(where, p=p, v=v), *rows, v.shape[-1])
    return _product(where, "pv", p, v, shape, (True, heads_first, heads_first), 1.0, out, num_threads)


@documented
def softmax(
    x: Any,
    axis: int = -1,
    *,
    mask: Any = None,
    out: Any = None,
    num_threads: int | None = None,
    **words: Never,
) -> Array:
    """Softmax along one axis, ``exp(x) / exp(x).sum(axis)``, of what the mask lets take part.

    Parameters
    ----------
    x : array_like
        float16, bfloat16 (of ml_dtypes), float32 or float64, of any shape with at least one axis.
    axis : int, default -1
        The axis whose elements sum to 1.
    mask : array_like of bool, optional
        Broadcasts to x's shape. True: the element takes part; False: its weight is 0, whatever it is.
    <out>
        It may be x itself.
    <num_threads>

    Returns
    -------
    ndarray
        Of x's shape and type, in native byte order and x's order of axes in memory; `out` itself where given. All 0
        along the axis where nothing takes part, be it hidden or -inf.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, a mask that is not bool.
    ValueError
        No axis, a mask that does not broadcast to x, an `out` that does not fit.
    numpy.exceptions.AxisError
        An axis that x does not have.
    OverflowError
        A size too large for 63 bits.
    MemoryError
        No memory for the result or for scratch space.

    See Also
    --------
    scores, weighted_values : The other stages.
    attention : All three at once, without storing the matrix.

    Notes
    -----
    The maximum is subtracted first, as in M. Milakov and N. Gimelshein, "Online normalizer calculation for
    softmax", 2018, section 2 ("safe softmax"). NaN or +inf in an element that takes part makes all along its axis
    NaN. An exponential below half the smallest normal number is 0; between, it is at most that number. The weight of
    an element that lies t below the maximum has a relative error of at most about ``(2 + t) * eps``, since t is rounded
    too. The bits are the same for any axis, strides and number of threads. 16 bits are computed in float32 and rounded
    once. An axis other than the last is as fast only in native byte order; else elements are copied one by one.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> x = np.log([[1.0, 3.0], [4.0, 4.0]])
    >>> np.round(qkv_fast.softmax(x), 3)
    array([[0.25, 0.75],
           [0.5 , 0.5 ]])
    >>> qkv_fast.softmax(x, mask=[[True, False], [False, False]])
    array([[1., 0.],
           [0., 0.]])
    """
    where = "softmax"
    if words:
        _fail_words(where, words, "")
    x = _as_array("x", x, where)
    _check_type(where, "x", x)
    axis = _check_axis(where, axis, x=x)
    if mask is not None:
        given = _as_array("mask", mask, where)
        if given.dtype != bool:
            raise TypeError(f"softmax: mask must be bool, True where an element takes part, got {given.dtype}")
        try:
            mask = np.broadcast_to(given, x.shape)
        except ValueError:
            _fail_shapes(where, "mask does not broadcast to x", x=x, mask=given)
    return _along(where, {"x": x}, mask, axis, out, num_threads)


@documented
def softmax_grad(
    dp: Any,
    p: Any,
    axis: int = -1,
    *,
    out: Any = None,
    num_threads: int | None = None,
    **words: Never,
) -> Array:
    """The gradient through `softmax`: of what it was given, from that of its result, ``p * (dp - sum(p * dp))``.

    Parameters
    ----------
    dp : array_like
        The gradient of the weights, float16, bfloat16 (of ml_dtypes), float32 or float64, of any shape with at least
        one axis.
    p : array_like
        The weights that `softmax` returned, of dp's shape and of its type or a narrower one; float16 and bfloat16 do
        not mix.
    axis : int, default -1
        The axis whose weights sum to 1.
    <out>
        It may be dp or p itself.
    <num_threads>

    Returns
    -------
    ndarray
        Of dp's shape and type, in native byte order and dp's order of axes in memory; `out` itself where given. 0 where
        the weight is 0, whatever dp is there: so what a mask hides takes no part.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, masked arrays, `np.matrix`.
    ValueError
        No axis, shapes that differ, an `out` that does not fit.
    numpy.exceptions.AxisError
        An axis that dp does not have.
    OverflowError
        A size too large for 63 bits.
    MemoryError
        No memory for the result or for scratch space.

    See Also
    --------
    softmax : The stage that this goes back through.
    attention_grad : The gradients of all stages at once, without storing a matrix.

    Notes
    -----
    NaN in a weight, or in dp where the weight is not 0, makes all along the axis NaN but what has weight 0. The bits
    are the same for any axis, strides and number of threads. The formula is in T. Dao et al., "FlashAttention: Fast and
    Memory-Efficient Exact Attention with IO-Awareness", 2022, appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> p = qkv_fast.softmax(np.log([1.0, 3.0]))
    >>> np.round(qkv_fast.softmax_grad(np.array([1.0, 0.0]), p), 4)
    array([ 0.1875, -0.1875])
    """
    where = "softmax_grad"
    if words:
        _fail_words(where, words, "")
    dp, p = _as_array("dp", dp, where), _as_array("p", p, where)
    _check_type(where, "dp", dp)
    _check_type(where, "p", p)
    _check_narrower(where, {"dp": dp, "p": p})
    axis = _check_axis(where, axis, dp=dp)
    if p.shape != dp.shape:
        _fail_shapes(where, "dp and p differ", dp=dp, p=p)
    return _along(where, {"dp": dp, "p": p}, None, axis, out, num_threads)


def _check_axis(where: str, axis: int, **given: Array) -> int:
    ((name, x),) = given.items()
    if x.ndim == 0:
        _fail_shapes(where, f"{name} needs an axis", **given)
    try:
        axis = operator.index(None if isinstance(axis, (bool, np.bool_)) else axis)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{where}: axis must be an integer, got {axis!r}") from None
    if not -x.ndim <= axis < x.ndim:
        raise np.exceptions.AxisError(axis, x.ndim, f"{where}: {name}.shape={x.shape}")
    return axis


def _along(
    where: str, arrays: dict[str, Array], mask: Array | None, axis: int, out: Array | None, num_threads: int | None
) -> Array:
    """The softmax of one array, or its gradient of two, into a new array or `out`; or a plan, if that is asked for."""
    threads, isa, counters = _runtime.current(num_threads, where)
    (name, x), *others = arrays.items()
    if out is None:
        _core.check_result(where, x.dtype.num)
        try:  # axes in memory as x has them
            result = target = np.empty_like(x, _TYPES[x.dtype.num], subok=False)
        except ValueError:
            raise OverflowError(f"{where}: a result of shape {x.shape} is too large for any array") from None
    else:
        result = target = _check_out(out, x.shape, x.dtype.num, where, name)
        given = [*arrays.values()] if mask is None else [x, mask]
        if any(np.may_share_memory(result, y) and not _same_memory(result, y) for y in given):
            target = _core.scratch(where, x.shape, result.dtype.num)
    weights = others[0][1] if others else None
    report = _core.softmax(x, mask, target, axis % x.ndim, threads, isa, counters, weights)
    if report is not None:
        return PlannedStage(where, threads, isa, report, {**arrays, "out": target}, None if out is None else result)  # type: ignore[return-value]
    if target is not result:
        result[...] = target
    return _returned(result, out)


def _matrices(where: str, heads_first: bool, **given: Any) -> tuple[Array, Array]:
    """Both as arrays of types and numbers of axes that go together."""
    (name, a), (other, b) = ((name, _as_array(name, x, where)) for name, x in given.items())
    _check_type(where, name, a)
    _check_type(where, other, b)
    _check_narrower(where, {name: a, other: b})
    if not a.ndim == b.ndim == 2:
        _check_axes(where, heads_first, **{name: a, other: b})
    return a, b


def _check_heads(where: str, many: int, few: int, **arrays: Array) -> None:
    if many != few and (few == 0 or many % few):
        name, other = arrays
        _fail_shapes(where, f"{other} has {few} heads, which does not divide {name}'s {many}", **arrays)


def _product(
    where: str,
    names: str,
    a: Array,
    b: Array,
    shape: tuple[int, ...],
    heads_first: tuple[bool, bool, bool],
    scale: float,
    out: Array | None,
    num_threads: int | None,
) -> Array:
    """scale * a @ b, of b's transpose for scores, into a new array or `out`; where only a plan is asked for, that."""
    threads, isa, counters = _runtime.current(num_threads, where)
    if out is None:
        result = target = _core.empty(where, shape, a.dtype.num)
    else:
        result = target = _check_out(out, shape, a.dtype.num, where, names[0])
        if np.may_share_memory(result, a) or np.may_share_memory(result, b):
            target = _core.scratch(where, shape, result.dtype.num)
    rest = 1.0
    if a.dtype.itemsize < 8 and scale and not 2.0**-200 < abs(scale) < 2.0**200:
        scale, rest = math.copysign(2.0 ** (200 if abs(scale) > 1 else -200), scale), abs(scale)
        rest /= abs(scale)
        if target.itemsize == 2:  # which are rounded once
            target = _core.empty(where, shape, _FLOAT32)
    report = _core.product(a, b, target, where == "scores", *heads_first, scale, threads, isa, counters, tiles=True)
    if report is not None:
        arrays = {names[0]: a, names[1]: b, "out": target}
        return PlannedStage(where, threads, isa, report, arrays, None if out is None else result, rest != 1)  # type: ignore[return-value]
    with np.errstate(all="ignore"):
        while rest != 1:  # in steps within the type: 0 times infinity would be NaN
            step = min(max(rest, 2.0**-100), 2.0**100)
            np.multiply(target, target.dtype.type(step), out=target)
            rest /= step
        if target is not result:
            result[...] = target
    return _returned(result, out)


def _same_memory(a: Array, b: Array) -> bool:
    """Whether each element of one is that of the other."""
    return a.strides == b.strides and a.ctypes.data == b.ctypes.data and a.dtype == b.dtype
