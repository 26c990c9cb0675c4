"""Rotary positions: pairs of elements of queries and keys, turned by angles in proportion to their position.

Angles are products of integers and frequencies in float64; only their cosines and sines are rounded to the type of the
arithmetic.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Never

import numpy as np

from . import _core, _runtime
from ._checks import (
    _TYPES,
    Array,
    _arithmetic,
    _as_array,
    _check_layout,
    _check_out,
    _check_scale,
    _check_type,
    _fail_shapes,
    _fail_words,
    _returned,
)
from ._help import documented

_FARTHEST = 2**53  # integers up to here are floats


@documented
def rope(
    x: Any,
    positions: Any = None,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    rotary_dim: int | None = None,
    cos_sin: tuple[Any, Any] | None = None,
    interleaved: bool = False,
    layout: str = "bhld",
    out: Any = None,
    num_threads: int | None = None,
    **words: Never,
) -> Array:
    """Queries or keys with rotary positions: pair i is turned by ``position * base ** (-2 * i / rotary_dim)`` radians.

    Parameters
    ----------
    x : array_like, shape (..., H, L, D)
        Queries or keys, float16, bfloat16 (of ml_dtypes), float32 or float64. Or (L, D).
    positions : array_like of int, optional
        The position of each token, (L,), or of each sequence and token, (..., L), whose leading axes broadcast to those
        left of the heads; up to 2**53 in size. By default 0 to L - 1.
    base : float, default 10000.0
        The base of the frequencies, above 0: the "rope_theta" of models.
    scaling : mapping, optional
        How frequencies are changed for long contexts, with the keys of transformers' ``rope_parameters``: "rope_type"
        is "default", "linear", "dynamic", "yarn", "longrope" or "llama3". What transformers takes from a model's config
        has to be in it, "original_max_position_embeddings" above all. "rope_theta" and "partial_rotary_factor" in it
        replace `base` and `rotary_dim`. "dynamic" and "longrope" look at the largest position + 1.
    rotary_dim : int, optional
        The first elements of a row that are turned, an even number; the others stay. All D by default.
    cos_sin : (cos, sin), optional
        Tables in place of `base` and `scaling`, each (positions, rotary_dim / 2), of which a position is a row, or
        (batch, L, rotary_dim / 2), a row for each token, without `positions`. They are converted to the type
        of the arithmetic.
    interleaved : bool, default False
        Whether pairs are the elements 2 i and 2 i + 1 (GPT-J, the original RoFormer), rather than i and
        i + rotary_dim / 2 (Llama, GPT-NeoX).
    <layout>
        It is that of x and of the result.
    <out>
        It may be x itself.
    <num_threads>

    Returns
    -------
    ndarray, of x's shape
        In x's type and native byte order; `out` itself where given.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, positions that are no integers, a scaling that is no dict.
    ValueError
        Shapes that do not fit, positions out of range, a scaling that does not exist, keys that it does not have or
        that it lacks.
    OverflowError
        A size too large for 63 bits, or a row of 2**30 elements or more.
    MemoryError
        No memory for the result, for the cosines and sines of its positions, or for scratch space.

    See Also
    --------
    project_qkv : Makes queries and keys.

    Notes
    -----
    From J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.4.2. Scalings:
    B. Peng et al., "YaRN", 2023, which has linear and dynamic ones too; Y. Ding et al., "LongRoPE", 2024; Llama 3.1.
    Angles are in float64, so positions of a million are as exact as the first.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> x = np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> np.round(qkv_fast.rope(x), 3)  # tokens 0 and 1, by 0 and 1 radians
    array([[1.   , 0.   ],
           [0.54 , 0.841]])
    >>> q = np.ones((2, 4, 3, 8), np.float32)
    >>> qkv_fast.rope(q, [[0, 1, 2], [5, 6, 7]]).shape
    (2, 4, 3, 8)
    """
    where = "rope"
    if words:
        _fail_words(where, words, "scaling")
    x = _as_array("x", x, where)
    _check_type(where, "x", x)
    heads_first = _check_layout(layout, where)
    if x.ndim < 2:
        _fail_shapes(where, "x must have 2 or more axes, (..., heads, length, dim)", x=x)
    rotation = Rotation(
        x.shape[-1], base=base, scaling=scaling, rotary_dim=rotary_dim, cos_sin=cos_sin, interleaved=interleaved
    )
    at = rotation.check(x, positions, heads_first)
    if out is None:
        return rotation.turn(x, at, heads_first, _core.empty(where, x.shape, x.dtype.num), num_threads)
    target = _check_out(out, x.shape, x.dtype.num, where, "x")
    if target is not x and np.may_share_memory(target, x):
        same = x.strides == target.strides and x.ctypes.data == target.ctypes.data and x.dtype == target.dtype
        x = x if same else x.copy()
    rotation.turn(x, at, heads_first, target, num_threads)
    return _returned(target, out)


class Rotation:
    """What rows of `dim` elements are turned by: rope's arguments, checked once for all calls."""

    __slots__ = ("_angles", "_base", "_cos_sin", "_interleaved", "_rotary_dim", "_scaling")

    def __init__(
        self, dim: int, *, base: Any = 10000.0, scaling: Any = None, rotary_dim: Any = None, cos_sin: Any = None,
        interleaved: Any = False, **words: Any,
    ) -> None:  # fmt: skip
        where = "rope"
        if words:
            _fail_words(where, words, "scaling")
        if not isinstance(interleaved, (bool, np.bool_)):
            raise TypeError(f"{where}: interleaved must be True or False, got {interleaved!r}")
        self._interleaved = bool(interleaved)
        self._cos_sin = self._angles = None
        if cos_sin is not None:
            if scaling is not None:
                raise ValueError(f"{where}: cos_sin replaces scaling, so both can't be given")
            if not np.array_equal(base, 10000.0):
                raise ValueError(f"{where}: cos_sin replaces base, so both can't be given (base={base!r})")
            self._cos_sin = _check_tables(where, cos_sin)
            turned = 2 * self._cos_sin[0].shape[-1]
            _check_rotary_dim(where, turned if rotary_dim is None else rotary_dim, dim, turned)
            return
        self._base, self._scaling, self._rotary_dim = _check_scaling(where, base, scaling, rotary_dim, dim)
        if self._scaling["rope_type"] not in _OF_LENGTH:
            self._angles = self._frequencies(0)

    def kept(self) -> "Rotation":
        """For later calls: with tables of its own, which nobody else changes."""
        if self._cos_sin is not None:
            cos, sin = self._cos_sin
            self._cos_sin = cos.copy(), sin.copy()
        return self

    def check_frequencies(self, where: str, name: str, given: Any) -> None:
        """That a model's own frequencies are these, which may be rounded to 16 bits; unless they are scaled, where
        some models keep those before and some those behind, or replaced by tables."""
        if self._cos_sin is not None or self._scaling["rope_type"] != "default":
            return
        x = _as_array(name, given, where)
        _check_type(where, name, x)
        kept, (own, _) = x.astype(np.float64), self._frequencies(0)
        if kept.shape != own.shape or not np.allclose(own, kept, 2**-8, 2**-24):
            least = ", ".join(f"{x[-1]:.3g}" if x.size else "none" for x in (own, kept.reshape(-1)))
            shapes = f"{own.shape} and {kept.shape}"
            raise ValueError(f"{where}: rope has other frequencies than {name}: shapes {shapes}, the last {least}")

    def _frequencies(self, length: int) -> tuple[Array, float]:
        """Radians per position of each pair, and the factor of cosines and sines, for texts of this length."""
        base, dim = self._base, self._rotary_dim
        if not dim:
            return np.empty(0), 1.0
        plain = base ** (-np.arange(0, dim, 2) / dim)
        return _SCALINGS[self._scaling["rope_type"]](plain, base, dim, self._scaling, length)

    def check(self, x: Array, positions: Any, heads_first: bool) -> Array | None:
        """Positions for x, whose type and axes are checked, or an error."""
        batch, length = x.shape[:-3], _length(x, heads_first)
        at = None if positions is None else _check_positions("rope", positions, batch, length, x)
        if self._cos_sin is not None:
            _check_rows(*self._cos_sin, at, batch, length, x)
        return at

    def turn(self, x: Array, at: Array | None, heads_first: bool, out: Array, num_threads: int | None) -> Array:
        """x at checked positions into `out`, which may be x."""
        length = _length(x, heads_first)
        threads, isa, counters = _runtime.current(num_threads, "rope")
        arithmetic = _TYPES[_arithmetic(x.dtype.num)]
        if self._cos_sin is None:
            at = np.arange(length) if at is None else at
            frequencies, factor = self._angles or self._frequencies(int(at.max(initial=0)) + 1)
            cos, sin = np.empty((2, *at.shape, frequencies.size), arithmetic)
            _core.angles(np.ascontiguousarray(at, np.int64).reshape(-1), frequencies, factor, cos, sin, threads)
        else:
            cos, sin = (_rows_of(table, at, length, arithmetic, out) for table in self._cos_sin)
        if x.ndim > 2:  # for all heads of a sequence
            cos, sin = cos[..., None, :, :], sin[..., None, :, :]
        _core.rotate(x, out, cos, sin, self._interleaved, heads_first, threads, isa, counters)
        return out


def _length(x: Array, heads_first: bool) -> int:
    length: int = x.shape[-2 if heads_first or x.ndim == 2 else -3]
    return length


def _rows_of(table: Array, at: Array | None, length: int, kind: np.dtype[Any], out: Array) -> Array:
    """A row for each token, of this type, which stays while `out` is written."""
    rows: Array = table if table.ndim == 3 else table[:length] if at is None else table[at]
    if np.may_share_memory(out, rows):
        rows = rows.copy()
    return np.require(rows, kind, ["C", "A"])


def _check_positions(where: str, positions: Any, batch: tuple[int, ...], length: int, x: Array) -> Array:
    at = _as_array("positions", positions, where)
    if at.dtype.kind not in "iu":
        raise TypeError(f"{where}: positions must be integers, got {at.dtype}")
    try:
        fits = at.ndim > 0 and at.shape[-1] == length
        fits = fits and (at.shape[:-1] in ((), batch) or np.broadcast_shapes(at.shape[:-1], batch) == batch)
    except ValueError:
        fits = False
    if not fits:
        shape = f"({length},) or {(*batch, length)}" if batch else f"({length},)"
        _fail_shapes(where, f"positions must be of shape {shape}", x=x, positions=at)
    if at.size and max(int(at.max()), -int(at.min())) > _FARTHEST:
        raise ValueError(f"{where}: positions must be up to 2**53 in size, got {at.min()} to {at.max()}")
    return at


def _check_rotary_dim(where: str, rotary_dim: Any, dim: int, given: int | None = None) -> int:
    if isinstance(rotary_dim, (bool, np.bool_)) or not isinstance(rotary_dim, (int, np.integer)):
        raise TypeError(f"{where}: rotary_dim must be an integer, got {rotary_dim!r}")
    if given is not None and rotary_dim != given:
        raise ValueError(f"{where}: rotary_dim is {rotary_dim}, but cos_sin has {given // 2} columns, half of {given}")
    if not 0 <= rotary_dim <= dim or rotary_dim % 2:
        raise ValueError(f"{where}: rotary_dim must be even and up to {dim}, the elements of a row, got {rotary_dim}")
    return int(rotary_dim)


def _check_tables(where: str, cos_sin: Any) -> tuple[Array, Array]:
    if not isinstance(cos_sin, (tuple, list)) or len(cos_sin) != 2:
        raise TypeError(f"{where}: cos_sin must be two arrays (cos, sin), got {type(cos_sin).__name__}")
    cos, sin = (_as_array(name, y, where) for name, y in zip(("cos", "sin"), cos_sin, strict=True))
    for name, y in (("cos", cos), ("sin", sin)):
        _check_type(where, name, y)
    if cos.shape != sin.shape or cos.ndim not in (2, 3):
        shape = "(positions, rotary_dim / 2) or (batch, length, rotary_dim / 2)"
        _fail_shapes(where, f"cos and sin must be of one shape, {shape}", cos=cos, sin=sin)
    return cos, sin


def _check_rows(cos: Array, sin: Array, at: Array | None, batch: tuple[int, ...], length: int, x: Array) -> None:
    """That there are rows for each token."""
    where = "rope"
    if cos.ndim == 3:
        if at is not None:
            raise ValueError(f"{where}: a cos_sin of 3 axes has a row for each token, so positions can't be given")
        if len(batch) != 1 or cos.shape[0] not in (1, *batch) or cos.shape[1] != length:
            _fail_shapes(where, f"cos and sin must be of shape {(*batch, length, cos.shape[2])}", x=x, cos=cos)
    elif at is None:
        if cos.shape[0] < length:
            _fail_shapes(where, f"cos and sin have {cos.shape[0]} positions, x has {length}", x=x, cos=cos)
    elif at.size and not (at.min() >= 0 and at.max() < cos.shape[0]):
        least, most, end = at.min(), at.max(), cos.shape[0] - 1
        raise ValueError(f"{where}: positions must be from 0 to {end}, as cos and sin have, got {least} to {most}")


# Of each rope_type, the keys that it needs and those it may have.
_ORIGINAL = "original_max_position_embeddings"
_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", _ORIGINAL), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", _ORIGINAL), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
}
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _check_scaling(
    where: str, base: Any, scaling: Any, rotary_dim: Any, dim: int
) -> tuple[float, dict[str, Any], int]:
    """The base, what else there is, with its rope_type, and the elements that are turned."""
    if scaling is None:
        scaling = {}
    if not isinstance(scaling, Mapping):
        raise TypeError(f"{where}: scaling must be a dict, got {type(scaling).__name__}")
    given = {key: value for key, value in scaling.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"{where}: rope_type must be one of {', '.join(_KEYS)}, got {kind!r}")
    needs, may = _KEYS[kind]
    if unknown := [key for key in given if key not in (*_ALWAYS, *needs, *may)]:
        raise ValueError(f"{where}: a scaling of {kind} has no {', '.join(map(str, unknown))}")
    if missing := [key for key in needs if key not in given]:
        raise ValueError(f"{where}: a scaling of {kind} needs {', '.join(missing)}")
    if "rope_theta" in given:
        base = given["rope_theta"]
    base = _check_scale(base, where, "base")
    if base <= 0:
        raise ValueError(f"{where}: base must be above 0, got {base}")
    if "partial_rotary_factor" in given and rotary_dim is None:
        rotary_dim = int(dim * _check_scale(given["partial_rotary_factor"], where, "partial_rotary_factor"))
    rotary_dim = _check_rotary_dim(where, dim if rotary_dim is None else rotary_dim, dim)
    for key in (*needs, *may):
        if key in given and key not in ("short_factor", "long_factor", "truncate"):
            given[key] = _check_scale(given[key], where, key)
    for key in {"factor", _ORIGINAL} & given.keys():
        if given[key] < 1:
            raise ValueError(f"{where}: {key} must be at least 1, got {given[key]:g}")
    if kind == "llama3" and not 0 < given["low_freq_factor"] < given["high_freq_factor"]:
        got = f"{given['low_freq_factor']:g} and {given['high_freq_factor']:g}"
        raise ValueError(f"{where}: low_freq_factor must be above 0 and below high_freq_factor, got {got}")
    if kind == "longrope":
        if "factor" not in given and "attention_factor" not in given:
            raise ValueError(f"{where}: a scaling of longrope needs factor or attention_factor")
        for key in ("short_factor", "long_factor"):
            given[key] = np.array(given[key], np.float64)
            if given[key].shape != (rotary_dim // 2,):
                raise ValueError(f"{where}: {key} must have {rotary_dim // 2} numbers, got shape {given[key].shape}")
    return base, {**given, "rope_type": kind}, rotary_dim


def _default(plain: Array, base: float, dim: int, scaling: dict[str, Any], length: int) -> tuple[Array, float]:
    return plain, 1.0


def _linear(plain: Array, base: float, dim: int, scaling: dict[str, Any], length: int) -> tuple[Array, float]:
    return plain / scaling["factor"], 1.0


def _dynamic(plain: Array, base: float, dim: int, scaling: dict[str, Any], length: int) -> tuple[Array, float]:
    """Frequencies of a larger base, the longer the text is."""
    if dim == 2:  # whose only frequency is 1 for any base
        return plain, 1.0
    factor, original = scaling["factor"], scaling[_ORIGINAL]
    base *= (factor * max(length, original) / original - (factor - 1)) ** (dim / (dim - 2))
    return base ** (-np.arange(0, dim, 2) / dim), 1.0


def _yarn(plain: Array, base: float, dim: int, scaling: dict[str, Any], length: int) -> tuple[Array, float]:
    """Fast pairs stay, slow ones are stretched, and those between are mixed."""
    factor, original = scaling["factor"], scaling[_ORIGINAL]

    def pair_of(turns: float) -> float:
        """The pair that turns so often within the original length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    low, high = pair_of(scaling.get("beta_fast", 32.0)), pair_of(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        weight, other = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = magnitude(weight) / magnitude(other) if weight and other else magnitude(1.0)
    return plain / factor * stretched + plain * (1 - stretched), attention


def _longrope(plain: Array, base: float, dim: int, scaling: dict[str, Any], length: int) -> tuple[Array, float]:
    """Each pair has a factor of its own, for short and for long texts."""
    original, attention = scaling[_ORIGINAL], scaling.get("attention_factor")
    if attention is None:
        factor = scaling["factor"]
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return plain / scaling["long_factor" if length > original else "short_factor"], attention


def _llama3(plain: Array, base: float, dim: int, scaling: dict[str, Any], length: int) -> tuple[Array, float]:
    """Pairs that turn often within the original length stay, the others are stretched, with a passage between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling[_ORIGINAL] * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * plain / scaling["factor"] + kept * plain, 1.0


_SCALINGS: dict[str, Callable[[Array, float, int, dict[str, Any], int], tuple[Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
_OF_LENGTH = {"dynamic", "longrope"}  # whose frequencies depend on the length of the text
