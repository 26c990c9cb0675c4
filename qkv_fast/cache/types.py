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


class Rows(NamedTuple):
    """How keys, or values, are stored: the first `dim` numbers in a row of an array."""

    dim: int
    whole: int  # all numbers of the row: latent values are the beginnings of keys
    dtype: np.dtype[Any]  # of the array
    stored: str | None  # int8 or int4, whose array is of bytes
    turn: int = -1  # -1, or rows are rotated in blocks that begin at 0 and here: qkv_storage in src/qkv.h

    @property
    def name(self) -> str:
        return self.stored or str(self.dtype)

    @property
    def width(self) -> int:
        """The last axis of the array."""
        return _BYTES[self.stored](self.whole) if self.stored else self.dim

    def write(self, to: Array, x: Array) -> None:
        """Numbers x (..., rows, dim) to stored rows."""
        if self.stored:
            step = max(1, _PIECE // (math.prod(x.shape[:-2]) * x.shape[-1] or 1))
            for at in range(0, x.shape[-2], step):
                rows = (..., slice(at, at + step), slice(None))
                _core.quantise(x[rows], to[rows], self.stored, self.turn, _runtime.current()[1])
        elif x.dtype == self.dtype:
            to[...] = x
        else:
            with np.errstate(all="ignore"):  # what a narrower type cannot hold becomes infinite, as in results
                to[...] = x

    def read(self, rows: Array) -> Array:
        """Stored rows as numbers (..., rows, dim): themselves, or a copy in float32."""
        if not self.stored:
            return rows
        x = np.empty((*rows.shape[:-1], self.whole), np.float32)
        _core.dequantise(rows, x, self.stored, self.turn, _runtime.current()[1])
        return x if self.dim == self.whole else x[..., : self.dim]

    def rotated(self, x: Array) -> Array:
        """Queries (batch, heads, tokens, dim) as keys are: if rotated, a copy in the type of their arithmetic."""
        if self.turn < 0:
            return x
        turned = np.empty(x.shape, np.float64 if x.dtype.itemsize == 8 else np.float32)
        _core.turn_rows(x, turned, self.turn, False, _runtime.current()[1])
        return turned

    def rotate_back(self, x: Array) -> None:
        """Results (batch, heads, tokens, dim) of rotated values, contiguous and of that type, in place."""
        if self.turn >= 0:
            _core.turn_rows(x, x, 0, True, _runtime.current()[1])


class Form(NamedTuple):
    """What every token of a cache has: a key (kv_heads, dim) and a value (kv_heads, dim_v)."""

    kv_heads: int
    dim: int
    dim_v: int
    k: Rows
    v: Rows
    dtypes: tuple[np.dtype[Any], ...]  # of the two, as far as they are not bytes; each once
    stored: tuple[str | None, str | None]  # of the two
    latent: bool  # values are the beginnings of keys
    rotate: bool  # keys or values are rotated
    bounds: bool = False  # what `tolerance` needs is kept beside them, in memory: bounds.py

    @property
    def names(self) -> str:
        """Of the types, as arguments."""
        value_dtype = f", value_dtype={self.v.name!r}" if self.v.name != self.k.name else ""
        more = (", rotate=True" if self.rotate else "") + (", bounds=True" if self.bounds else "")
        return f"dtype={self.k.name!r}{value_dtype}{more}"

    @property
    def dims(self) -> str:
        """What else there is to say of values, as arguments."""
        value_dim = f", value_dim={self.dim_v}" if self.dim_v != self.dim else ""
        return value_dim + (", latent=True" if self.latent else "")

    def parts(self, k: _T, v: _T) -> tuple[_T, ...]:
        """Of what belongs to keys and to values, that which is stored."""
        return (k,) if self.latent else (k, v)

    def empty(self, *rows: int) -> tuple[Array, Array]:
        """Arrays for keys and values; ValueError where NumPy has none as large."""
        arrays = [np.empty((*rows, x.width), x.dtype) for x in self.parts(self.k, self.v)]
        return self.views(*arrays)

    def views(self, k: Array, v: Array | None = None) -> tuple[Array, Array]:
        """Keys and values of the arrays that are stored."""
        return k, k[..., : self.v.width] if v is None else v

    def write(self, to_k: Array, to_v: Array, k: Array, v: Array) -> None:
        """Numbers k and v (..., rows, dim) to stored rows."""
        self.k.write(to_k, k)
        if not self.latent:
            self.v.write(to_v, v)


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


def check_form(
    where: str, kv_heads: Any, head_dim: Any, value_dim: Any, dtype: Any, value_dtype: Any, latent: Any, rotate: Any,
    bounds: Any,
) -> Form:  # fmt: skip
    check_switches(where, latent=latent, rotate=rotate, bounds=bounds)
    heads, dim = count(where, "kv_heads", kv_heads), count(where, "head_dim", head_dim)
    dim_v = dim if value_dim is None else count(where, "value_dim", value_dim)
    if max(dim, dim_v) > _core.MAX_DIM:
        raise ValueError(f"{where}: head_dim and value_dim are at most {_core.MAX_DIM}, got {dim} and {dim_v}")
    name = _check_name(where, "dtype", dtype)
    name_v = name if value_dtype is None else _check_name(where, "value_dtype", value_dtype)
    if latent and dim_v > dim:
        known = "latent values are the first elements of keys"
        raise ValueError(f"{where}: {known}, value_dim is at most head_dim, got {dim_v} and {dim}")
    if latent and name != name_v:
        raise ValueError(f"{where}: latent values are of their keys' type, got value_dtype={name_v!r} for {name!r}")
    if rotate and not {name, name_v} & {*_BYTES}:
        raise ValueError(f"{where}: rotate is for rows of {' and '.join(_BYTES)}, got {name} and {name_v}")
    return make_form(where, heads, (dim, dim_v), (name, name_v), bool(latent), bool(rotate), bool(bounds))


def check_switches(where: str, **switches: Any) -> None:
    for name, x in switches.items():
        if not isinstance(x, bool | np.bool_):
            raise TypeError(f"{where}: {name} must be True or False, got {x!r}")


def check_causal(where: str, causal: Any, window: Any) -> bool:
    check_switches(where, causal=causal)
    if window is not None and not causal:
        raise ValueError(f"{where}: an encoder's tokens have no window (causal=False, window={window!r})")
    return bool(causal)


def _check_name(where: str, argument: str, dtype: Any) -> str:
    try:
        name = str(dtype if dtype is None else np.dtype(dtype))  # of None NumPy makes float64
    except TypeError:  # a word that NumPy does not know: int4, and bfloat16 before ml_dtypes is imported
        name = str(dtype)
    if name not in NAMES:
        raise TypeError(f"{where}: {argument} must be one of {', '.join(NAMES)}, got {dtype!r}")
    return name


def make_form(
    where: str, kv_heads: int, dims: tuple[int, int], names: tuple[str, str], latent: bool, rotate: bool,
    bounds: bool,
) -> Form:  # fmt: skip
    """Of keys and values; the names are of NAMES."""
    turns = [(dims[1] if latent else 0) if rotate and name in _BYTES else -1 for name in names]
    k = Rows(dims[0], dims[0], *_find_type(where, names[0]), turns[0])
    v = Rows(dims[1], dims[0] if latent else dims[1], *_find_type(where, names[1]), turns[1])
    dtypes = dict.fromkeys(x.dtype for x in (k, v) if not x.stored)
    return Form(kv_heads, *dims, k, v, tuple(dtypes), (k.stored, v.stored), latent, max(turns) >= 0, bounds)


def _find_type(where: str, name: str) -> tuple[np.dtype[Any], str | None]:
    if name in _BYTES:
        return np.dtype(np.uint8), name
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(f"{where}: a cache of bfloat16 needs ml_dtypes: pip install ml_dtypes") from None
        _is_known(np.dtype(ml_dtypes.bfloat16))
        return np.dtype(ml_dtypes.bfloat16), None
    return np.dtype(name), None
