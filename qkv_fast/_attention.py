"""attention(): the one validator. Names, types, broadcasting and layout; every error a user can make is raised here."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from . import _core, _runtime

Array = np.ndarray[Any, Any]

_WIDTHS = {"f": 4, "d": 8}  # element types by dtype.char, and their bytes
_TYPES: dict[str, np.dtype[Any]] = {"f": np.dtype(np.float32), "d": np.dtype(np.float64)}
_FARTHEST_OFFSET = 2**60  # positions and distances below this cannot overflow 63 bits in the core
_OPEN_DISTANCE = 2**61  # beyond every key from every position


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
    out: Array | None = None,
    num_threads: int | None = None,
) -> Any:
    r"""Scaled dot-product attention, fused: ``softmax(scale * q @ k.T) @ v``.

    The (Lq, Lk) matrix of scores is never stored, arrays of any strides are read where they lie, and the work is
    shared among threads. The result is the same bits for any number of threads, batch, heads and strides.

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries, float32 or float64; D up to 1024. Or (Lq, D), if all three are 2-D.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys, of q's type or a narrower one. ``Hq`` is a multiple of ``Hkv``; query head h reads key head
        ``h // (Hq // Hkv)`` (grouped-query attention).
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values, of k's type. The axes left of the heads broadcast among q, k and v.
    causal : bool or "top-left", default False
        Exclude the keys after the query's position. ``"top-left"`` also sets `q_offset` to 0.
    window : int or (left, right), optional
        Keep the keys from `left` before to `right` after the query's position, both inclusive; None on a side leaves
        it open. An int w is (w, w), or (w, 0) when causal, so that a causal w sees w + 1 keys: a model whose "sliding
        window" of 4096 counts the query itself is ``window=4095`` here.
    q_offset : int or array_like of int, optional
        Query i sits at position ``i + q_offset``; one offset, or one per sequence. By default query i sits at
        ``i + n - Lq``, where n is the sequence's `kv_lengths` or Lk: the last query sees the last key.
    kv_lengths : int or array_like of int, optional
        Number of keys of each sequence, 0 to Lk; one for all, or one per sequence (it broadcasts to the axes left of
        the heads). Keys and values at or past it are never read. With `causal` or `window` and fewer keys than queries,
        say with `q_offset` where the queries sit (0 for right-padded ones): that call is a ValueError without it.
    scale : float, optional
        Factor of the scores, any finite number; ``1 / sqrt(D)`` by default (1 for D = 0).
    layout : {"bhld", "blhd"}, default "bhld"
        ``"blhd"`` swaps the head and length axes of q, k, v and the result: (..., L, H, D). The log-sum-exp stays
        (..., Hq, Lq).
    return_lse : bool, default False
        Return the natural log-sum-exp of each row's scores as well.
    out : ndarray, optional
        Where to write the result: its exact shape, q's type, any strides. It may overlap an input.
    num_threads : int, optional
        Threads for this call; see `get_num_threads` for the default.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        In q's type and native byte order; `out` itself where given. A query that sees no key has the result 0.
    lse : ndarray, shape (..., Hq, Lq)
        Only with ``return_lse=True``; float32 (float64 for float64), -inf for a query that sees no key.

    Raises
    ------
    TypeError
        An argument of the wrong kind: element types other than float32 and float64, masked arrays, `np.matrix`.
    ValueError
        Shapes that do not fit, values out of range, an unknown word.
    OverflowError
        An offset beyond ±2**60, or a size too large for 63 bits.
    MemoryError
        No memory for the result or for scratch space.

    See Also
    --------
    merge_partials : Combine results over disjoint sets of keys.
    qkv_fast.reference.attention : The definition in plain NumPy.

    Notes
    -----
    Products are accumulated in q's type. An excluded key has no influence on the result, even if it or its value is
    NaN; NaN and infinity in visible keys do what IEEE arithmetic makes them do. A score of -inf excludes its key.
    The division by the sum of weights comes last, so visible keys times max|v| must fit the type.

    The online softmax is from M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018; the
    tiling and the log-sum-exp follow T. Dao et al., "FlashAttention", 2022, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 100, 64), dtype=np.float32)  # batch, heads, length, dim
    >>> k, v = rng.standard_normal((2, 2, 2, 300, 64), dtype=np.float32)  # 2 key heads for 8 query heads
    >>> qkv_fast.attention(q, k, v, causal=True).shape
    (2, 8, 100, 64)
    """
    if type(q) is not np.ndarray:
        q = _as_array("q", q)
    if type(k) is not np.ndarray:
        k = _as_array("k", k)
    if type(v) is not np.ndarray:
        v = _as_array("v", v)
    char = q.dtype.char
    if not (char == k.dtype.char == v.dtype.char and char in _WIDTHS):
        _check_types(q, k, v)

    # Shapes: heads and lengths by layout, the axes left of them broadcast.
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    heads_first = layout == "bhld" or _check_layout(layout, "attention")
    if q_shape == k_shape == v_shape and len(q_shape) == 4 and heads_first:  # the rest of this in one comparison
        batch: tuple[int, ...] = q_shape[:1]
        q_heads = k_heads = v_heads = q_shape[1]
        len_q = len_k = len_v = q_shape[2]
        shape = q_shape
    elif len(q_shape) < 3 or len(k_shape) < 3 or len(v_shape) < 3:
        if not len(q_shape) == len(k_shape) == len(v_shape) == 2:
            _fail("q, k, v must have 3 or more axes each, or 2 each", q, k, v)
        batch = ()
        q_heads = k_heads = v_heads = 1
        len_q, len_k, len_v = q_shape[0], k_shape[0], v_shape[0]
        shape = (len_q, v_shape[1])
    else:
        batch = q_shape[:-3]
        if not batch == k_shape[:-3] == v_shape[:-3]:
            batch = _broadcast("attention", q=q, k=k, v=v)
        if heads_first:
            q_heads, len_q = q_shape[-3:-1]
            k_heads, len_k = k_shape[-3:-1]
            v_heads, len_v = v_shape[-3:-1]
            shape = (*batch, q_heads, len_q, v_shape[-1])
        else:
            len_q, q_heads = q_shape[-3:-1]
            len_k, k_heads = k_shape[-3:-1]
            len_v, v_heads = v_shape[-3:-1]
            shape = (*batch, len_q, q_heads, v_shape[-1])
    dim = q_shape[-1]
    if k_shape[-1] != dim:
        _fail(f"k has dimension {k_shape[-1]}, q has {dim}", q, k, v)
    if len_v != len_k:
        _fail(f"v has length {len_v}, k has {len_k}", q, k, v)
    if k_heads != v_heads:
        _fail(f"v has {v_heads} heads, k has {k_heads}", q, k, v)
    if q_heads != k_heads and (k_heads == 0 or q_heads % k_heads):
        _fail(f"k has {k_heads} heads, which does not divide q's {q_heads}", q, k, v)
    if dim > _core.MAX_DIM or v_shape[-1] > _core.MAX_DIM:
        _fail(f"D and Dv are at most {_core.MAX_DIM}", q, k, v)

    if scale is None:
        scale = dim**-0.5 if dim else 1.0
    else:
        scale = _check_scale(scale)

    # Key limits: one interval per query.
    left = right = offsets = lengths = None
    if causal is not False or window is not None:
        causal, top_left = _check_causal(causal)
        left, right = _check_window(window, causal)
        if top_left:
            if q_offset is not None:
                raise ValueError("attention: causal='top-left' means q_offset=0; give one of the two")
            q_offset = 0
    if kv_lengths is not None:
        lengths = _per_sequence("kv_lengths", kv_lengths, batch)
        _check_lengths(lengths, len_q, len_k, q_offset is None and (left is not None or right is not None))
    if q_offset is not None:
        offsets = _per_sequence("q_offset", q_offset, batch)
        if offsets.size and max(-int(offsets.min()), int(offsets.max())) > _FARTHEST_OFFSET:
            raise OverflowError(f"attention: q_offset must be within ±2**60, got {q_offset!r}")

    threads, isa, counters = _runtime.current()
    if num_threads is not None:
        threads = _runtime.check_threads(num_threads, "attention: num_threads")

    if out is None:
        result = target = _empty(shape, char)
    else:
        result = target = _check_out(out, shape, char)
        if any(np.may_share_memory(out, x) for x in (q, k, v)):
            target = _empty(shape, char)
    lse = _empty((*batch, q_heads, len_q) if len(shape) > 2 else (len_q,), char) if return_lse else None

    plan = _core.forward(
        q, k, v, target, lse, heads_first, scale, left, right, offsets, lengths, threads, isa, counters
    )  # fmt: skip
    if plan is not None:  # inside _runtime.planning(): nothing has been computed
        return plan
    if target is not result:
        result[...] = target
    return (result, lse) if return_lse else result


def merge_partials(outs: Sequence[Any], lses: Sequence[Any], *, layout: str = "bhld") -> tuple[Array, Array]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    Parameters
    ----------
    outs : sequence of array_like, shape (..., H, L, Dv)
        Results of `attention`, one per set of keys. (L, Dv) if the call was 2-D.
    lses : sequence of array_like, shape (..., H, L)
        Their log-sum-exps, from ``return_lse=True``. A row with -inf saw no key: its output is not looked at.
    layout : {"bhld", "blhd"}, default "bhld"
        Of `outs`; `lses` are head-first in either.

    Returns
    -------
    out : ndarray
        Of the shape and type of one of `outs`.
    lse : ndarray
        Of the shape and type of one of `lses`.

    Raises
    ------
    TypeError
        Element types other than float32 and float64, or not the same in all.
    ValueError
        No partials, or shapes that do not fit.

    Notes
    -----
    Each output is weighted by its share of the softmax denominator, in float64 (T. Dao et al., "FlashAttention", 2022,
    section 3.1).

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 4, 50, 16))
    >>> halves = [qkv_fast.attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(30), slice(30, 50))]
    >>> out, lse = qkv_fast.merge_partials(*zip(*halves))
    >>> np.allclose(out, qkv_fast.attention(q, k, v))
    True
    """
    heads_first = _check_layout(layout, "merge_partials")
    outs, lses = _list_arrays("outs", outs), _list_arrays("lses", lses)
    if not outs or len(outs) != len(lses):
        given = f"{len(outs)} outs and {len(lses)} lses"
        raise ValueError(f"merge_partials: one lse for each out, and at least one, got {given}")
    for name, arrays in (("outs", outs), ("lses", lses)):
        if any(x.dtype.char not in _WIDTHS or x.dtype.char != arrays[0].dtype.char for x in arrays):
            given = ", ".join(str(x.dtype) for x in arrays)
            raise TypeError(f"merge_partials: {name} must all be float32 or all float64, got {given}")
    shape = outs[0].shape
    rows = shape[:-1] if heads_first or len(shape) < 3 else (*shape[:-3], shape[-2], shape[-3])
    if len(shape) < 2 or any(x.shape != shape for x in outs) or any(x.shape != rows for x in lses):
        given = f"outs: {[x.shape for x in outs]}, lses: {[x.shape for x in lses]}"
        raise ValueError(f"merge_partials: shapes do not fit ({given})")

    with np.errstate(all="ignore"):  # NaN and infinity are legal, and -inf is a row that saw nothing
        logs = np.stack([x.astype(np.float64) for x in lses])
        top = logs.max(axis=0)
        shift = np.where(np.isneginf(top), 0, top)
        weights = np.exp(logs - shift)
        total = weights.sum(axis=0)
        lse = shift + np.log(total)
        if not heads_first and len(shape) > 2:
            weights, logs, total = (np.swapaxes(x, -1, -2) for x in (weights, logs, total))
        out = np.zeros(shape)
        for x, weight, log in zip(outs, weights, logs, strict=True):
            out += np.where(np.isneginf(log)[..., None], 0, x * weight[..., None])
        out /= np.where(total == 0, 1, total)[..., None]
        return out.astype(_TYPES[outs[0].dtype.char]), lse.astype(_TYPES[lses[0].dtype.char])


def _list_arrays(name: str, xs: Any) -> list[Array]:
    if not hasattr(xs, "__iter__"):
        raise TypeError(f"merge_partials: {name} must be a sequence of arrays, got {xs!r}")
    return [_as_array(f"{name}[{i}]", x, "merge_partials") for i, x in enumerate(xs)]


def _empty(shape: tuple[int, ...], char: str, where: str = "attention", like: Array | None = None) -> Array:
    """With the axes in memory as those of `like`, if given."""
    try:
        return np.empty(shape, _TYPES[char]) if like is None else np.empty_like(like, _TYPES[char], subok=False)
    except ValueError:
        raise OverflowError(f"{where}: a result of shape {shape} is too large for any array") from None


def _fail(what: str, q: Array, k: Array, v: Array) -> NoReturn:
    _fail_shapes("attention", what, q=q, k=k, v=v)


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
        raise TypeError(f"{where}: {name} is a masked array, whose mask would be lost; pass {name}.filled(0)")
    if isinstance(x, np.matrix):
        raise TypeError(f"{where}: {name} is a numpy.matrix; pass numpy.asarray({name})")
    try:
        return np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{where}: {name} is no array: {error}") from None


def _check_layout(layout: Any, where: str) -> bool:
    """Whether heads come before lengths."""
    if not isinstance(layout, str) or layout not in ("bhld", "blhd"):
        raise ValueError(f"{where}: layout must be 'bhld' or 'blhd', got {layout!r}")
    return layout == "bhld"


def _check_type(where: str, name: str, x: Array) -> None:
    if x.dtype.char not in _WIDTHS:
        way_out = f"; pass {name}.astype('float32')" if x.dtype.kind in "biuf" else ""
        raise TypeError(f"{where}: {name} must be float32 or float64, got {x.dtype}{way_out}")


def _check_types(q: Array, k: Array, v: Array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_type("attention", name, x)
    if k.dtype.char != v.dtype.char:
        raise TypeError(f"attention: k and v must have one type, got {k.dtype} and {v.dtype}")
    if _WIDTHS[k.dtype.char] > _WIDTHS[q.dtype.char]:
        raise TypeError(f"attention: k and v must have q's type or a narrower one, got {k.dtype} for q's {q.dtype}")


def _check_scale(scale: Any, where: str = "attention") -> float:
    if isinstance(scale, (bool, np.bool_)) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise TypeError(f"{where}: scale must be a real number, got {scale!r}")
    try:
        value = float(scale)
    except OverflowError:
        raise OverflowError(f"{where}: scale does not fit in a float, got {scale!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{where}: scale must be finite, got {scale!r}")
    return value


def _check_causal(causal: Any) -> tuple[bool, bool]:
    if isinstance(causal, (bool, np.bool_)):
        return bool(causal), False
    if isinstance(causal, str):
        if causal == "top-left":
            return True, True
        raise ValueError(f"attention: causal must be True, False or 'top-left', got {causal!r}")
    raise TypeError(f"attention: causal must be True, False or 'top-left', got {causal!r}")


def _check_window(window: Any, causal: bool) -> tuple[int | None, int | None]:
    """Distances to the left and to the right; None is open."""
    if window is None:
        return None, 0 if causal else None
    sides = window if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"attention: window must be an integer or (left, right), got {window!r}")
    left, right = (_distance(side, window) for side in sides)
    return left, 0 if causal else right


def _distance(side: Any, window: Any) -> int | None:
    if side is None:
        return None
    distance = None if isinstance(side, (bool, np.bool_)) else _index(side)
    if distance is None:
        raise TypeError(f"attention: window must be an integer or (left, right) of integers or None, got {window!r}")
    if distance < 0:
        raise ValueError(f"attention: window distances must not be negative, got {window!r}")
    return min(distance, _OPEN_DISTANCE)


def _index(x: Any) -> int | None:
    try:
        return operator.index(x)
    except TypeError:
        return None


def _per_sequence(name: str, values: Any, batch: tuple[int, ...]) -> Array:
    """int64, contiguous, of the shape of the batch: one integer for all, or an array that broadcasts to it."""
    given = _as_array(name, values)
    if given.dtype.kind not in "iu" and not (given.size == 0 and isinstance(values, (list, tuple))):
        if isinstance(values, int) and not isinstance(values, bool):
            raise OverflowError(f"attention: {name} does not fit in 63 bits, got {values!r}")
        raise TypeError(f"attention: {name} must be an integer or an array of integers, got {values!r}")
    if given.dtype.kind == "u" and given.size and int(given.max()) >= 2**63:
        raise OverflowError(f"attention: {name} does not fit in 63 bits, got {values!r}")
    try:
        spread = np.broadcast_to(given.astype(np.int64), batch)
    except ValueError:
        raise ValueError(
            f"attention: {name} must be one integer or one per sequence, got shape {given.shape} for the axes {batch}"
        ) from None
    return np.ascontiguousarray(spread)


def _check_lengths(lengths: Array, len_q: int, len_k: int, ambiguous: bool) -> None:
    if not lengths.size:
        return
    if lengths.min() < 0 or lengths.max() > len_k:
        wrong = lengths[(lengths < 0) | (lengths > len_k)].flat[0]
        raise ValueError(f"attention: kv_lengths must be in 0..{len_k} (k's length), got {wrong}")
    if ambiguous and np.any(short := (lengths > 0) & (lengths < len_q)):
        raise ValueError(
            f"attention: kv_lengths of {lengths[short].flat[0]} with {len_q} queries leaves two readings of causal and "
            "window: padded queries? pass q_offset=0. Positions that end at the last key? pass q_offset=kv_lengths - Lq"
        )


def _check_out(out: Any, shape: tuple[int, ...], char: str, where: str = "attention", like: str = "q") -> Array:
    if not isinstance(out, np.ndarray) or isinstance(out, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(f"{where}: out must be a plain numpy.ndarray, got {type(out).__name__}")
    if out.dtype.char != char:
        raise TypeError(f"{where}: out must have {like}'s type {_TYPES[char]}, got {out.dtype}")
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
