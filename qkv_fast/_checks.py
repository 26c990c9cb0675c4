"""Checks of single arguments, for every function that takes arrays: each error restates what was given."""

import math
import operator
from typing import Any, NoReturn

import numpy as np

from . import _core, _foreign
from ._foreign import kind_of

Array = np.ndarray[Any, Any]

_FLOAT32, _FLOAT64 = np.dtype("float32").num, np.dtype("float64").num
# Element types by dtype.num, which no other type has, as it may have their letter; and bfloat16, once it was seen.
_TYPES: dict[int, np.dtype[Any]] = {np.dtype(name).num: np.dtype(name) for name in ("float32", "float64", "float16")}
_NAMES = "float16, bfloat16, float32 or float64"
_FARTHEST_OFFSET = 2**60  # positions and distances below this cannot overflow 63 bits in the core
_OPEN_DISTANCE = 2**61  # beyond every key from every position


def _fail_shapes(where: str, what: str, error: type[Exception] = ValueError, /, **arrays: Array) -> NoReturn:
    shapes = ", ".join(f"{name}.shape={x.shape}" for name, x in arrays.items())
    raise error(f"{where}: {what} ({shapes})")


def _broadcast(where: str, **arrays: Array) -> tuple[int, ...]:
    """The axes left of the heads."""
    try:
        return np.broadcast_shapes(*(x.shape[:-3] for x in arrays.values()))
    except (ValueError, RuntimeError) as error:  # RuntimeError: more axes than NumPy broadcasts
        if "too large" in str(error):
            _fail_shapes(where, "too many sequences", OverflowError, **arrays)
        _fail_shapes(where, "the axes left of the heads do not broadcast", **arrays)


def _as_array(name: str, x: Any, where: str = "attention") -> Array:
    """x as an array; of the subclasses of ndarray only those that mean the same by multiplication and by a value."""
    if isinstance(x, np.ma.MaskedArray):
        fill: Any = False if x.dtype == bool else 0
        if name.startswith("lse"):  # of a row without keys
            fill = "-numpy.inf"
        raise TypeError(f"{where}: {name} is a masked array, whose mask would be lost; pass {name}.filled({fill})")
    if isinstance(x, np.matrix):
        raise TypeError(f"{where}: {name} is a numpy.matrix; pass numpy.asarray({name})")
    try:
        return _foreign.read(name, x, where) if _foreign.is_foreign(x) else np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{where}: {name} is no array: {error}") from None
    except (TypeError, RuntimeError) as error:
        if str(error).startswith(f"{where}: "):  # says it all
            raise
        raise TypeError(f"{where}: {name}: NumPy cannot read this {kind_of(x)} ({error})") from None


def _restated(x: Any) -> str:
    """What was given, in short: of an array its shape."""
    shape = getattr(x, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{kind_of(x)} of shape {tuple(shape)}"
    text = repr(x)
    return text if len(text) <= 80 else f"{text[:60]} …"


def _check_count(where: str, name: str, count: Any) -> int:
    if isinstance(count, (bool, np.bool_)) or not isinstance(count, (int, np.integer)):
        raise TypeError(f"{where}: {name} must be an integer, got {count!r}")
    if count < 1:
        raise ValueError(f"{where}: {name} must be at least 1, got {count}")
    return int(count)


def _check_layout(layout: Any, where: str) -> bool:
    """Whether heads come before lengths."""
    if not isinstance(layout, str) or layout not in ("bhld", "blhd"):
        raise ValueError(f"{where}: layout must be 'bhld' or 'blhd', got {layout!r}")
    return layout == "bhld"


def _is_known(dtype: np.dtype[Any]) -> bool:
    """Whether calls take this type. Who has an array of bfloat16 has imported ml_dtypes, which registers it:
    we never need to."""
    if dtype.num in _TYPES:
        return True
    if dtype.name != "bfloat16":
        return False
    _TYPES[dtype.num] = np.dtype(dtype.type)
    return True


def _arithmetic(number: int) -> int:
    """The type that results of type `number` are computed in, and that of their log-sum-exp."""
    return _FLOAT64 if number == _FLOAT64 else _FLOAT32


def _check_type(where: str, name: str, x: Array) -> None:
    if not _is_known(x.dtype):
        way_out = f"; pass {name}.astype('float32')" if x.dtype.kind in "biuf" or _is_small(x.dtype) else ""
        held = f" holding a {kind_of(x.flat[0])}" if x.dtype == object and x.size else ""
        raise TypeError(f"{where}: {name} must be {_NAMES}, got {x.dtype}{held}{way_out}{_hint_of_bits(name, x)}")


def _is_small(dtype: np.dtype[Any]) -> bool:
    """Numbers of another package than NumPy, such as float8 and int4 of ml_dtypes."""
    return dtype.kind == "V" and dtype.names is None and dtype.type is not np.void and np.can_cast(dtype, np.float64)


def _hint_of_bits(name: str, x: Array) -> str:
    """Where x may be what bfloat16 looks like to a NumPy that does not know it."""
    if x.dtype.kind not in "iuV" or x.dtype.itemsize != 2 or _is_known(x.dtype):
        return ""
    return f"; if these are the bits of bfloat16, pip install ml_dtypes and pass {name}.view(ml_dtypes.bfloat16)"


def _check_narrower(where: str, given: dict[str, Array]) -> None:
    """That the second of two arrays has the type of the first, or a narrower one."""
    (name, a), (other, b) = given.items()
    if a.dtype.itemsize == b.dtype.itemsize == 2 and a.dtype.num != b.dtype.num:
        raise TypeError(f"{where}: float16 and bfloat16 do not mix, got {name} in {a.dtype} and {other} in {b.dtype}")
    if b.dtype.itemsize > a.dtype.itemsize:
        raise TypeError(f"{where}: {other} must have {name}'s type or a narrower one, got {b.dtype} for {a.dtype}")


def _check_types(where: str, q: Array, k: Array, **values: Array) -> None:
    for name, x in {"q": q, "k": k, **values}.items():
        _check_type(where, name, x)
    for v in values.values():
        if k.dtype.num != v.dtype.num:
            raise TypeError(f"{where}: k and v must have one type, got {k.dtype} and {v.dtype}")
    _check_narrower(where, {"q": q, "k and v" if values else "k": k})


def _check_axes(where: str, heads_first: bool, **arrays: Array) -> None:
    """Numbers of axes that go together. They alone decide, so no call depends on sizes that are equal by chance."""
    (first, q), *others = arrays.items()
    if min(x.ndim for x in arrays.values()) < 3:
        _fail_shapes(where, f"{', '.join(arrays)} must have 3 or more axes each, or 2 each", **arrays)
    for name, x in others:
        if x.ndim not in (3, q.ndim):
            ways_out = "".join(f"; {way}" for way in _more_axes(first, q, name, x, heads_first))
            _fail_shapes(where, f"{name} must have as many axes as {first}, or 3{ways_out}", **arrays)


def _more_axes(first: str, q: Array, name: str, x: Array, heads_first: bool) -> list[str]:
    """What x, or q, may have been meant as, as far as the axes left of the heads allow it."""
    missing = q.ndim - x.ndim
    if missing < 0:
        return [f"one {first} for all sequences: pass {first}[{'None, ' * -missing}...]"]

    def fits(batch: tuple[int, ...]) -> bool:
        return all(m == n or 1 in (m, n) for m, n in zip(batch, q.shape[:-3], strict=True))

    ways = []
    if missing == 1 and fits(x.shape[:-2] if heads_first else (*x.shape[:-3], x.shape[-3])):
        ways.append(f"one for each group of {first}'s heads: pass {name}[..., None, :{', :' * heads_first}]")
    if fits((1,) * missing + x.shape[:-3]):
        ways.append(f"the same for all of the first axes: pass {name}[{'None, ' * missing}...]")
    return ways


def _check_fit(
    where: str, arrays: dict[str, Array], heads: tuple[int, ...], lengths: tuple[int, int], *, packed: bool = False
) -> None:
    """Dimensions, the heads of q, k and v, and the lengths of k and v; of q and k alone if no v is given."""
    q_heads, k_heads, v_heads = heads
    len_k, len_v = lengths
    q, k, v = arrays["q"], arrays["k"], arrays.get("v", arrays["k"])
    if k.shape[-1] != q.shape[-1]:
        _fail_shapes(where, f"k has dimension {k.shape[-1]}, q has {q.shape[-1]}", **arrays)
    if len_v != len_k:
        _fail_shapes(where, f"v has length {len_v}, k has {len_k}", **arrays)
    if k_heads != v_heads:
        _fail_shapes(where, f"v has {v_heads} heads, k has {k_heads}", **arrays)
    if q_heads != k_heads and (k_heads == 0 or q_heads % k_heads):
        _fail_shapes(where, f"k has {k_heads} heads, which does not divide q's {q_heads}", **arrays)
    if q.shape[-1] > _core.MAX_DIM or v.shape[-1] > _core.MAX_DIM:
        hint = "; heads not split? reshape to (B, L, num_heads, D), layout='blhd'"
        split = hint if q.ndim == 3 and not packed else ""
        _fail_shapes(where, f"D and Dv are at most {_core.MAX_DIM}{split}", **arrays)


def _scale_of(where: str, scale: Any, dim: int) -> float:
    """Of scores of so many terms, if it is not given."""
    if scale is None:
        return float(dim**-0.5) if dim else 1.0
    return _check_scale(scale, where)


def _check_scale(scale: Any, where: str = "attention", name: str = "scale") -> float:
    if isinstance(scale, np.ndarray) and scale.ndim == 0:
        scale = scale[()]
    number = isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool)
    if not number and not (isinstance(scale, np.generic) and _is_known(scale.dtype)):
        raise TypeError(f"{where}: {name} must be a real number, got {scale!r}")
    try:
        value = float(scale)
    except OverflowError:
        raise OverflowError(f"{where}: {name} does not fit in a float, got {scale!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name} must be finite, got {scale!r}")
    return value


# Words of other libraries: ours for them, and what these are.
_OTHERS = {
    "is_causal": ("causal", "causal=True, or causal='top-left' as torch aligns it"),
    "attn_mask": ("mask bias", "mask= if it is bool, bias= if it is added to the scores"),
    "attention_mask": ("mask", "mask=, bool, True where a query attends"),
    "key_padding_mask": ("mask", "mask=~key_padding_mask[:, None, None, :]: ours is True where a query attends"),
    "dropout_p": ("", "nothing: there is no dropout"),
    "enable_gqa": ("", "nothing: heads of k and v that divide q's are groups"),
    "softmax_scale": ("scale", "scale="),
    "sm_scale": ("scale", "scale="),
    "scaling": ("scale", "scale="),
    "logits_soft_cap": ("softcap", "softcap="),
    "window_size": ("window", "window=, (left, right), with None for an open side"),
    "sliding_window": ("window", "window=, which does not count the query itself: W - 1"),
    "local_window_size": ("window", "window="),
    "key_value_seq_lengths": ("kv_lengths", "kv_lengths="),
    "query_seq_lengths": ("q_lengths", "q_lengths="),
    "cache_leftpad": ("kv_starts", "kv_starts="),
    "position_ids": ("q_positions", "q_positions=, for causal, window and alibi_slopes; rotary positions come before"),
    "cache_seqlens": ("kv_lengths", "kv_lengths=, or a KVCache"),
    "cu_seqlens_q": ("", "an argument of attention_varlen"),
    "cu_seqlens_k": ("", "an argument of attention_varlen"),
    "max_seqlen_q": ("", "nothing: cu_seqlens_q and cu_seqlens_k say it"),
    "max_seqlen_k": ("", "nothing: cu_seqlens_q and cu_seqlens_k say it"),
    "need_weights": ("", "softmax(scores(q, k)) for the matrix of weights"),
    "return_softmax_lse": ("return_lse", "return_lse="),
    "return_residual": ("return_lse", "return_lse="),
    "s_aux": ("sinks", "sinks="),
}
# Words of some questions, for the others.
_OF_QUESTIONS = {
    "cu_seqlens_q": "weights and pooled take no packed sequences: ask for each of them, with layout='blhd'",
    "lse": "received, weights, pooled and influence take it; without it the answer is the same",
    "output": "influence takes it; without it the answer is the same",
    "queries": "received and weights take it; others are asked about q[..., queries, :] with q_positions",
    "keys": "weights takes it",
    "groups": "influence takes it",
    "v": "influence takes it; other questions are about q and k alone",
    "return_lse": "attention has it",
}
_OF_QUESTIONS["cu_seqlens_k"] = _OF_QUESTIONS["cu_seqlens_q"]
_EVERYTHING = (
    "mask bias causal window q_offset q_positions q_lengths kv_lengths kv_starts segments alibi_slopes sinks softcap "
    "scale return_lse"
)


def _fail_words(
    where: str, words: dict[str, Any], has: str = _EVERYTHING, hints: dict[str, str] | None = None
) -> NoReturn:
    """For arguments that a function has no parameter for; `has` are its parameters that others have a word for, and
    `hints` say what is to be said of some words instead."""
    name = next(iter(words))
    ours, text = _OTHERS.get(name, ("", ""))
    if hints and name in hints:
        known = f"; {hints[name]}"
    elif name in _EVERYTHING.split():
        known = "; attention has it"
    elif text:
        known = f"; here it is {text}" if {*ours.split()} <= {*has.split()} else f"; attention has it, as {text}"
    else:
        known = ""
    raise TypeError(f"{where}() got an unexpected keyword argument {name!r}{known}")


def _check_positions(where: str, causal: Any, window: Any) -> tuple[int | None, int | None, bool]:
    """Distances to the left and to the right of a position that keys may have, None being open; whether positions are
    those of "top-left"."""
    causal, top_left = _check_causal(where, causal)
    return *_check_window(where, window, causal), top_left


def _check_causal(where: str, causal: Any) -> tuple[bool, bool]:
    if isinstance(causal, (bool, np.bool_)):
        return bool(causal), False
    if isinstance(causal, str):
        if causal == "top-left":
            return True, True
        raise ValueError(f"{where}: causal must be True, False or 'top-left', got {causal!r}")
    raise TypeError(f"{where}: causal must be True, False or 'top-left', got {causal!r}")


def _check_window(where: str, window: Any, causal: bool) -> tuple[int | None, int | None]:
    """Distances to the left and to the right; None is open."""
    if window is None:
        return None, 0 if causal else None
    sides = window if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"{where}: window must be an integer or (left, right), got {window!r}")
    left, right = (_distance(where, side, window) for side in sides)
    return left, 0 if causal else right


def _distance(where: str, side: Any, window: Any) -> int | None:
    if side is None:
        return None
    distance = None if isinstance(side, (bool, np.bool_)) else _index(side)
    if distance is None:
        raise TypeError(f"{where}: window must be an integer or (left, right) of integers or None, got {window!r}")
    if distance < 0:
        raise ValueError(f"{where}: window distances must not be negative, got {window!r}; None leaves a side open")
    return min(distance, _OPEN_DISTANCE)


def _index(x: Any) -> int | None:
    try:
        return operator.index(x)
    except TypeError:
        return None


def _per_sequence(where: str, name: str, values: Any, batch: tuple[int, ...]) -> Array:
    """int64, contiguous, of the shape of the batch: one integer for all, or an array that broadcasts to it."""
    given = _integers(where, name, values)
    if given.shape == batch and given.flags.c_contiguous:
        return given
    try:
        spread = np.broadcast_to(given, batch)
    except ValueError:
        raise ValueError(
            f"{where}: {name} must be one integer or one per sequence, got shape {given.shape} for the axes {batch}"
        ) from None
    return np.ascontiguousarray(spread)


def _integers(where: str, name: str, values: Any) -> Array:
    given = _as_array(name, values, where)
    if given.dtype.kind not in "iu" and not (given.size == 0 and isinstance(values, (list, tuple))):
        if isinstance(values, int) and not isinstance(values, bool):
            raise OverflowError(f"{where}: {name} does not fit in 63 bits, got {values!r}")
        raise TypeError(f"{where}: {name} must be an integer or an array of integers, got {values!r}")
    if given.dtype.kind == "u" and given.size and int(given.max()) >= 2**63:
        raise OverflowError(f"{where}: {name} does not fit in 63 bits, got {values!r}")
    return given.astype(np.int64)


def _check_offsets(where: str, q_offset: Any, batch: tuple[int, ...]) -> Array:
    if type(q_offset) is int and abs(q_offset) <= _FARTHEST_OFFSET:  # the usual case, in short
        return np.full(batch or 1, q_offset, np.int64)
    offsets = _per_sequence(where, "q_offset", q_offset, batch)
    if offsets.size and max(-int(offsets.min()), int(offsets.max())) > _FARTHEST_OFFSET:
        raise OverflowError(f"{where}: q_offset must be within ±2**60, got {q_offset!r}")
    return offsets


def _check_query_positions(where: str, positions: Any, batch: tuple[int, ...], len_q: Any) -> Array:
    """int64, contiguous: (..., Lq), or one axis of all rows of packed sequences, where `len_q` has one length each."""
    given = _integers(where, "q_positions", positions)
    packed = isinstance(len_q, np.ndarray)
    shape = (int(len_q.sum()),) if packed else (*batch, len_q)
    sizes = list(zip(given.shape[::-1], shape[::-1], strict=False))  # of the last axis as it is: one of each query
    if not 0 < given.ndim <= len(shape) or sizes[0][0] != sizes[0][1] or any(n not in (1, m) for n, m in sizes):
        known = f"({shape[-1]},)" + ("" if packed or not batch else f" or, per sequence, {shape}")
        raise ValueError(f"{where}: q_positions must be of shape {known}, got {given.shape}")
    if given.size and max(-int(given.min()), int(given.max())) > _FARTHEST_OFFSET:
        raise OverflowError(f"{where}: q_positions must be within ±2**60, got {_farthest(given)}")
    return np.ascontiguousarray(np.broadcast_to(given, shape))


def _farthest(x: Array) -> int:
    return int(max(x.min(), x.max(), key=abs))


def _check_range(where: str, name: str, numbers: Array, most: Any, what: str) -> None:
    """Of one sequence each; `most` is one for all, or one per sequence."""
    if np.any(wrong := (numbers < 0) | (numbers > most)):
        least = np.broadcast_to(most, numbers.shape)[wrong].flat[0]
        raise ValueError(f"{where}: {name} must be in 0..{least} ({what}), got {numbers[wrong].flat[0]}")


def _check_lengths(where: str, lengths: Array, len_q: Any, len_k: Any, ambiguous: bool) -> None:
    """Of one sequence each; `len_q` and `len_k` are one for all, or one per sequence."""
    if not lengths.size:
        return
    _check_range(where, "kv_lengths", lengths, len_k, "k's length")
    if ambiguous and np.any(short := (lengths > 0) & (lengths < len_q)):
        many = np.broadcast_to(len_q, lengths.shape)[short].flat[0]
        raise ValueError(
            f"{where}: kv_lengths of {lengths[short].flat[0]} with {many} queries leaves two readings of causal, "
            "window and alibi_slopes: padded queries? pass q_lengths, or q_offset=0. Positions that end at the last "
            "key? pass q_offset=kv_lengths - Lq"
        )


def _check_out(out: Any, shape: tuple[int, ...], number: int, where: str = "attention", like: str = "q") -> Array:
    """Where to write: `out`, or the memory of another library's array."""
    if not isinstance(out, np.ndarray) and _foreign.is_foreign(out):
        out = _foreign.written(where, out)
    if not isinstance(out, np.ndarray) or isinstance(out, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(f"{where}: out must be a plain numpy.ndarray, got {type(out).__name__}")
    if out.dtype.num != number:
        wider = "" if number in (_FLOAT32, _FLOAT64) else ", or float32"
        if not wider or out.dtype.num != _FLOAT32:
            raise TypeError(f"{where}: out must have {like}'s type {_TYPES[number]}{wider}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"{where}: out must have the shape {shape}, got out.shape={out.shape}")
    if not out.flags.writeable:
        raise ValueError(f"{where}: out is not writable")
    if not out.size:
        return out
    reach = out.itemsize  # of the axes with smaller strides
    for step, n in sorted((abs(step), n) for step, n in zip(out.strides, out.shape, strict=True) if n > 1):
        if step < reach:
            given = f"out.strides={out.strides}, out.shape={out.shape}"
            raise ValueError(f"{where}: out has overlapping elements ({given})")
        reach += step * (n - 1)
    return out


def _returned(result: Array, out: Any) -> Array:
    """What a call gives back: a new result, or `out` as it was given, whose memory that is."""
    if out is None:
        return result
    _foreign.has_changed(out)
    given: Array = out
    return given
