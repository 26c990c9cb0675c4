"""What a cache stores: its types, and numbers to stored rows and back.

A row of floats is stored as it is. A row of int8 or int4 becomes bytes that carry their own scales (src/qkv.h says what
they mean, src/cache.c how they are chosen): an array (..., rows, bytes) of uint8, whose slices, runs, pages and files
need to know nothing of scales.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Never, Self, TypeVar, overload

import numpy as np

from .. import _core, _runtime
from .._checks import Array, _index, _is_known

_T = TypeVar("_T")
_BYTES = {"int8": lambda dim: -(-dim // 4) * 4 + 4, "int4": lambda dim: -(-dim // 32) * 18}  # of a row
_PIECE = 1 << 22  # elements that are quantised at a time: some 10 ms, between which Ctrl-C is seen
NAMES = ("float32", "float64", "float16", "bfloat16", *_BYTES)


class Form(NamedTuple):
    """What every token of a cache has: a key (kv_heads, dim) and a value (kv_heads, dim_v) of one type."""

    kv_heads: int
    dim: int
    dim_v: int
    dtype: np.dtype[Any]  # of the arrays
    stored: str | None  # int8 or int4, whose arrays are of bytes

    @property
    def name(self) -> str:
        return self.stored or str(self.dtype)

    def shapes(self, *rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of the arrays of keys and values."""
        dims = (self.dim, self.dim_v)
        widths = [_BYTES[self.stored](dim) for dim in dims] if self.stored else dims
        return (*rows, widths[0]), (*rows, widths[1])

    def empty(self, *rows: int) -> tuple[Array, Array]:
        """Arrays for keys and values; ValueError where NumPy has none as large."""
        k, v = (np.empty(shape, self.dtype) for shape in self.shapes(*rows))
        return k, v

    def write(self, to: Array, x: Array) -> None:
        """Numbers x (..., rows, dim) to stored rows."""
        if self.stored:
            step = max(1, _PIECE // (math.prod(x.shape[:-2]) * x.shape[-1] or 1))
            for at in range(0, x.shape[-2], step):
                rows = (..., slice(at, at + step), slice(None))
                _core.quantise(x[rows], to[rows], self.stored, _runtime.current()[1])
        elif x.dtype == self.dtype:
            to[...] = x
        else:
            with np.errstate(all="ignore"):  # what a narrower type cannot hold becomes infinite, as in results
                to[...] = x

    def read(self, rows: Array, dim: int) -> Array:
        """Stored rows as numbers (..., rows, dim): themselves, or a copy in float32."""
        if not self.stored:
            return rows
        x = np.empty((*rows.shape[:-1], dim), np.float32)
        _core.dequantise(rows, x, self.stored, _runtime.current()[1])
        return x


class Shown(Generic[_T]):
    """A read-only attribute of a cache: what it was made with. As a property, with its help made of an example."""

    def __init__(self, text: str, example: str, get: Callable[[Any], _T]) -> None:
        self._get = get
        call, value = example.split(" -> ")
        self.__doc__ = f"""{text}

        Examples
        --------
        >>> import qkv_fast
        >>> qkv_fast.{call}
        {value}
        """

    @overload
    def __get__(self, cache: None, owner: Any) -> Self: ...
    @overload
    def __get__(self, cache: object, owner: Any) -> _T: ...
    def __get__(self, cache: object | None, owner: Any) -> Self | _T:
        return self if cache is None else self._get(cache)

    def __set__(self, cache: object, value: Never) -> Never:
        raise AttributeError("what a cache was made with cannot be set")


def count(where: str, name: str, n: Any, least: int = 1) -> int:
    found = None if isinstance(n, (bool, np.bool_)) else _index(n)
    if found is None:
        raise TypeError(f"{where}: {name} must be an integer, got {n!r}")
    if found < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {found}")
    return found


def check_form(where: str, kv_heads: Any, head_dim: Any, value_dim: Any, dtype: Any) -> Form:
    heads, dim = count(where, "kv_heads", kv_heads), count(where, "head_dim", head_dim)
    dim_v = dim if value_dim is None else count(where, "value_dim", value_dim)
    if max(dim, dim_v) > _core.MAX_DIM:
        raise ValueError(f"{where}: head_dim and value_dim are at most {_core.MAX_DIM}, got {dim} and {dim_v}")
    try:
        name = str(dtype if dtype is None else np.dtype(dtype))  # of None NumPy makes float64
    except TypeError:  # a word that NumPy does not know: int4, and bfloat16 before ml_dtypes is imported
        name = str(dtype)
    if name not in NAMES:
        raise TypeError(f"{where}: dtype must be one of {', '.join(NAMES)}, got {dtype!r}")
    return make_form(where, heads, dim, dim_v, name)


def make_form(where: str, kv_heads: int, dim: int, dim_v: int, name: str) -> Form:
    """`name` is one of NAMES."""
    if name in _BYTES:
        return Form(kv_heads, dim, dim_v, np.dtype(np.uint8), name)
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(f"{where}: a cache of bfloat16 needs ml_dtypes: pip install ml_dtypes") from None
        _is_known(np.dtype(ml_dtypes.bfloat16))
        return Form(kv_heads, dim, dim_v, np.dtype(ml_dtypes.bfloat16), None)
    return Form(kv_heads, dim, dim_v, np.dtype(name), None)
