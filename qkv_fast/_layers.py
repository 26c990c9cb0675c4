"""Linear layers, which make queries, keys and values of an input and an output of what attention sees."""

import math
from typing import Any, Never

import numpy as np

from . import _core, _runtime
from ._checks import (
    Array,
    _arithmetic,
    _as_array,
    _check_count,
    _check_layout,
    _check_out,
    _check_type,
    _fail_shapes,
    _fail_words,
    _returned,
)
from ._help import documented

_LINE = 64  # bytes of a cache line


@documented
def linear(
    x: Any, w: Any, b: Any = None, *, out: Any = None, num_threads: int | None = None, **words: Never
) -> Array:
    """A linear layer, ``x @ w.T + b``.

    Parameters
    ----------
    <layer_x>
    <layer_w>
    <layer_b>
    <out>
    <num_threads>

    Returns
    -------
    ndarray, shape (..., n_out)
        In x's type and native byte order; `out` itself where given.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, masked arrays, `np.matrix`.
    ValueError
        Shapes that do not fit.
    OverflowError
        A size too large for 63 bits.
    MemoryError
        No memory for the result or for scratch space.

    See Also
    --------
    Linear : The same with weights that are used again and again.
    project_qkv : Queries, keys and values from one product.

    Notes
    -----
    The projections of A. Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2, with weights as torch keeps
    them. 16-bit numbers are multiplied and summed in float32, and rounded once. The bits of an element depend on its
    row of x, its row of w, its b and the CPU path alone.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> qkv_fast.linear(np.array([1.0, 2.0]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([0.0, 0.0, 5.0]))
    array([1., 2., 8.])
    """
    where = "linear"
    if words:
        _fail_words(where, words, "")
    x, w, b = _check_layer(where, x, w, b)
    return _apply(where, x, w, b, w.shape[0], None, out, num_threads, None)


class Linear:
    """A linear layer whose weights are used again and again: ``Linear(w, b)(x)`` is ``linear(x, w, b)``, bits too.

    The weights are copied, in the order in which the CPU multiplies them, as float32 (float64 for float64). That order
    is of the CPU path in use at that time, on which all calls of the layer run.

    Parameters
    ----------
    w : array_like, shape (n_out, n_in)
        Weights, float16, bfloat16 (of ml_dtypes), float32 or float64.
    b : array_like, shape (n_out,), optional
        What is added, of any of these types, but float64 only beside weights of float64.
    num_threads : int, optional
        Threads for the copy, not for calls; see `get_num_threads` for the default.

    Attributes
    ----------
    n_in, n_out : int
        Elements of a row of x and of the result.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, masked arrays, `np.matrix`.
    ValueError
        Shapes that do not fit.
    OverflowError
        A size too large for 63 bits.
    MemoryError
        No memory for the copy.

    See Also
    --------
    linear : The function.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> double = qkv_fast.Linear(np.diag([2.0, 2.0]))
    >>> double(np.array([[1.0, 2.0], [3.0, 4.0]]))
    array([[2., 4.],
           [6., 8.]])
    """

    __slots__ = ("_b", "_isa", "_kind", "_packed", "_shape")

    def __init__(self, w: Any, b: Any = None, *, num_threads: int | None = None) -> None:
        where = "Linear"
        w = _check_weights(where, w)
        self._shape: tuple[int, int] = w.shape
        self._kind = w.dtype
        self._b = None if b is None else _check_added(where, b, w).copy()
        threads, self._isa, _ = _runtime.current(num_threads, where)
        self._packed = _core.pack(w, threads, self._isa)

    @property
    def n_in(self) -> int:
        """Elements of a row of x.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> qkv_fast.Linear(np.ones((2, 3))).n_in
        3
        """
        return self._shape[1]

    @property
    def n_out(self) -> int:
        """Elements of a row of the result.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> qkv_fast.Linear(np.ones((2, 3))).n_out
        2
        """
        return self._shape[0]

    def __call__(self, x: Any, *, out: Any = None, num_threads: int | None = None) -> Array:
        """The layer's result for x.

        Parameters
        ----------
        x : array_like, shape (..., n_in)
            float64 if the weights are, and otherwise of any other type that `linear` takes.
        out : ndarray, optional
            As for `linear`.
        num_threads : int, optional
            As for `linear`.

        Returns
        -------
        ndarray, shape (..., n_out)
            In x's type and native byte order; `out` itself where given.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As `linear`.
        """
        where = "Linear"
        x = self._check(where, "x", x)
        return _apply(where, x, None, self._b, self.n_out, self._packed, out, num_threads, self._isa)

    def _check(self, where: str, name: str, given: Any) -> Array:
        """An input of this layer as an array, or an error."""
        x = _check_input(where, name, given, self.n_in)
        _check_mix(where, x.dtype, self._kind)
        return x

    def _into(self, where: str, x: Array, out: Array, num_threads: int | None) -> None:
        """The result for rows of a checked x into rows of a new array."""
        threads, _, counters = _runtime.current(num_threads, where)
        _core.product(x, x, out, True, True, True, True, 1.0, threads, self._isa, counters, self._b, self._packed)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"_isa": _runtime.available_isas()[self._isa]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        paths, path, packed = _runtime.available_isas(), state["_isa"], state["_packed"]
        if path not in paths:
            raise ValueError(f"Linear: the weights are packed for the CPU path {path!r}; there are {', '.join(paths)}")
        room = np.empty(packed.size + _LINE, packed.dtype)
        begin = -room.ctypes.data % _LINE  # the core reads whole vectors from there on
        room[begin : begin + packed.size] = packed
        for name, value in (state | {"_isa": paths.index(path), "_packed": room[begin : begin + packed.size]}).items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"Linear(n_in={self.n_in}, n_out={self.n_out}{', b' * (self._b is not None)}, {self._kind})"


@documented
def project_qkv(
    x: Any,
    w: Any,
    b: Any = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    *,
    layout: str = "bhld",
    num_threads: int | None = None,
    **words: Never,
) -> tuple[Array, Array, Array]:
    """Queries, keys and values of an input, from one product with stacked weights.

    Parameters
    ----------
    x : array_like, shape (..., L, n_in)
        The input, of a type that `linear` takes.
    w : array_like, shape ((num_heads + 2 * num_kv_heads) * D, n_in), or Linear
        Weights of all query heads, then of all key heads, then of all value heads. Or a layer of such weights.
    b : array_like, shape ((num_heads + 2 * num_kv_heads) * D,), optional
        What is added, unless w is a layer, which has its own.
    num_heads : int
        Query heads.
    num_kv_heads : int, optional
        Key and value heads, which divide `num_heads`: as many by default.
    <layout>
        It is that of the results.
    <num_threads>

    Returns
    -------
    q : ndarray, shape (..., num_heads, L, D)
    k, v : ndarray, shape (..., num_kv_heads, L, D)
        In x's type. All three are views of one array, which `attention` takes as they are.

    Raises
    ------
    TypeError
        An argument of the wrong kind, as for `linear`; numbers of heads that are no integers.
    ValueError
        Shapes that do not fit, heads that do not divide the rows of w, an unknown layout.
    OverflowError
        A size too large for 63 bits.
    MemoryError
        No memory for the result or for scratch space.

    See Also
    --------
    linear : One product.
    attention : Takes the results.

    Notes
    -----
    The projections of A. Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2, side by side.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.standard_normal((2, 10, 8)), rng.standard_normal((3 * 8, 8))
    >>> q, k, v = qkv_fast.project_qkv(x, w, None, num_heads=4)
    >>> q.shape
    (2, 4, 10, 2)
    >>> qkv_fast.attention(q, k, v).shape
    (2, 4, 10, 2)
    """
    where = "project_qkv"
    if words:
        _fail_words(where, words, "")
    heads_first = _check_layout(layout, where)
    heads = _check_count(where, "num_heads", num_heads)
    kv_heads = heads if num_kv_heads is None else _check_count(where, "num_kv_heads", num_kv_heads)
    if heads % kv_heads:
        raise ValueError(f"{where}: num_kv_heads must divide num_heads, got {num_kv_heads} for {num_heads}")
    if isinstance(w, Linear):
        if b is not None:
            raise ValueError(f"{where}: b belongs to the layer that is w, so it can't be given")
        rows = w.n_out
    else:
        x, w, b = _check_layer(where, x, w, b)
        rows = w.shape[0]
    x = _as_array("x", x, where)
    if x.ndim < 2:
        _fail_shapes(where, "x must be of shape (..., L, n_in)", x=x)
    if rows % (heads + 2 * kv_heads):
        raise ValueError(
            f"{where}: w has {rows} rows, no multiple of {heads} + 2 * {kv_heads} heads of queries, keys and values"
        )
    dim = rows // (heads + 2 * kv_heads)
    y = w(x, num_threads=num_threads) if isinstance(w, Linear) else linear(x, w, b, num_threads=num_threads)
    y = y.reshape(*y.shape[:-1], heads + 2 * kv_heads, dim)
    if heads_first:
        y = y.swapaxes(-2, -3)
        return y[..., :heads, :, :], y[..., heads : heads + kv_heads, :, :], y[..., heads + kv_heads :, :, :]
    return y[..., :heads, :], y[..., heads : heads + kv_heads, :], y[..., heads + kv_heads :, :]


def _check_input(where: str, name: str, given: Any, n_in: int) -> Array:
    x = _as_array(name, given, where)
    _check_type(where, name, x)
    if x.ndim == 0:
        _fail_shapes(where, f"{name} needs an axis, of {n_in} elements", **{name: x})
    if x.shape[-1] != n_in:
        _fail_shapes(where, f"{name} has {x.shape[-1]} elements in a row, the weights {n_in}", **{name: x})
    return x


def _check_weights(where: str, given: Any) -> Array:
    w = _as_array("w", given, where)
    _check_type(where, "w", w)
    if w.ndim != 2:
        _fail_shapes(where, "w must be of shape (n_out, n_in)", w=w)
    return w


def _check_added(where: str, given: Any, w: Array, name: str = "b") -> Array:
    b = _as_array(name, given, where)
    _check_type(where, name, b)
    if b.dtype.itemsize > 4 and _arithmetic(w.dtype.num) != _arithmetic(b.dtype.num):
        raise TypeError(f"{where}: {name} must be float32 or narrower beside weights of {w.dtype}, got {b.dtype}")
    if b.shape != w.shape[:1]:
        _fail_shapes(where, f"{name} must be of shape ({w.shape[0]},)", **{name: b})
    return b


def _check_mix(where: str, x: np.dtype[Any], w: np.dtype[Any]) -> None:
    """That x and w have one type of sums, so that a layer may pack weights once for all x."""
    if _arithmetic(x.num) != _arithmetic(w.num):
        ways_out = "pass w.astype('float64') or x.astype('float32')" if x.itemsize > 4 else "pass x.astype('float64')"
        raise TypeError(f"{where}: x and w must both be float64 or neither, got {x} and {w}; {ways_out}")


def _check_layer(where: str, x: Any, w: Any, b: Any) -> tuple[Array, Array, Array | None]:
    w = _check_weights(where, w)
    x = _as_array("x", x, where)
    if x.ndim and x.shape[-1] != w.shape[1]:
        hint = "; w is (n_out, n_in), as torch keeps it: pass w.T?" if x.shape[-1] == w.shape[0] else ""
        _fail_shapes(where, f"x has {x.shape[-1]} elements in a row, w {w.shape[1]}{hint}", x=x, w=w)
    x = _check_input(where, "x", x, w.shape[1])
    _check_mix(where, x.dtype, w.dtype)
    return x, w, None if b is None else _check_added(where, b, w)


def _step_of_rows(x: Array) -> int | None:
    """The stride of rows, if all axes but the last are one in memory."""
    step = end = None
    for n, stride in zip(x.shape[-2::-1], x.strides[-2::-1], strict=True):
        if n != 1:
            if end is not None and stride != end:
                return None
            step = stride if step is None else step
            end = stride * n
    return step or 0


def _as_rows(x: Array, y: Array) -> tuple[Array, Array]:
    """Both with all axes but the last in one; or (..., 1, rows, elements) where that is no view of each."""
    if x.ndim == 2:
        return x, y
    merged, count = [], math.prod(x.shape[:-1])
    for a in (x, y):
        if a.flags.c_contiguous:
            merged.append(a.reshape(count, a.shape[-1]))
        elif (step := _step_of_rows(a)) is not None:
            merged.append(np.lib.stride_tricks.as_strided(a, (count, a.shape[-1]), (step, a.strides[-1])))
        else:
            return x[..., None, :, :], y[..., None, :, :]
    return merged[0], merged[1]


def _apply(
    where: str,
    x: Array,
    w: Array | None,
    b: Array | None,
    n_out: int,
    packed: Array | None,
    out: Array | None,
    num_threads: int | None,
    path: int | None,
) -> Array:
    """x @ w.T + b into a new array or `out`. w is None if it is packed, for one path."""
    shape = (*x.shape[:-1], n_out)
    threads, isa, counters = _runtime.current(num_threads, where)
    if path is not None:
        isa = path
    if out is None:
        result = target = _core.empty(where, shape, x.dtype.num)
    else:
        result = target = _check_out(out, shape, x.dtype.num, where, "x")
        if any(np.may_share_memory(result, y) for y in (x, w, b) if y is not None):
            target = _core.scratch(where, shape, result.dtype.num)
    rows, sums = _as_rows(x, target)
    if w is None:
        weights = rows  # of which nothing is looked at, since they are packed
    else:
        weights = w[None] if rows.ndim > 2 else w
    _core.product(rows, weights, sums, True, True, True, True, 1.0, threads, isa, counters, b, packed)
    if target is not result:
        result[...] = target
    return _returned(result, out)
