"""What hides keys or changes scores beyond positions: masks, biases, segments, ALiBi, sinks, soft caps.

A call has `Extras` only if one of them is given, so calls without pay nothing. Masks and biases stay as they are: what
they broadcast to is in shapes and strides alone. Segments become a span of keys per query, which the core can skip by;
their ids go along only where a span would say too much, because keys of another id lie within.
"""

import math
import operator
from typing import Any, NamedTuple

import numpy as np

from ._checks import _NAMES, Array, _as_array, _check_scale, _fail_shapes, _hint_of_bits, _is_known

_STEEPEST_SLOPE = 2.0**60  # times any distance, up to 2**62, it is within float32


class Extras(NamedTuple):
    """For `_core.forward`; what each is stands in qkv.h. None and 0 are absent."""

    mask: Array | None = None  # broadcasts to (..., heads, queries, keys)
    mask_from: Array | None = None  # (...,) int64: the key of each sequence that the mask begins at; else 0
    bias: Array | None = None  # the same
    spans: Array | None = None  # (..., queries, 2) int64
    q_ids: Array | None = None  # (..., queries) int32
    k_ids: Array | None = None  # (..., keys) int32
    slopes: Array | None = None  # (heads,) float64
    sinks: Array | None = None  # (heads,) float64
    softcap: float = 0.0
    q_starts: Array | None = None  # ragged batches: (sequences + 1,) int64
    k_starts: Array | None = None
    longest_q: int = 0
    longest_k: int = 0  # of runs as well
    runs: Array | None = None  # caches: (runs, 4) int64: bytes from k, bytes from v, first key, number of keys
    run_of: Array | None = None  # (sequences + 1,) int64: the first run of each sequence, and their number
    positions: Array | None = None  # (..., queries) int64
    queries: Array | None = None  # (...,) int64
    starts: Array | None = None  # (...,) int64
    kept: int = 0  # questions: the first keys, that the window's left side hides from none
    k_stored: str | None = None  # "int8" or "int4": rows of k are bytes, as qkv.h has them; None: of their own type
    v_stored: str | None = None
    latent: bool = False  # caches: v is k, or the first elements of its rows

    def with_segments(self, spans: Array, q_ids: Array | None, k_ids: Array | None) -> "Extras":
        return self._replace(spans=spans, q_ids=q_ids, k_ids=k_ids)

    def overlaps(self, out: Array) -> bool:
        """Whether the core would read what it writes. The other arrays are copies."""
        return any(x is not None and np.may_share_memory(out, x) for x in (self.mask, self.bias))


def check_extras(
    where: str, logits: tuple[int, ...], heads: int, mask: Any, bias: Any, slopes: Any, sinks: Any, softcap: Any
) -> Extras:
    """All but the segments. `logits` is the shape of all scores, (..., heads, queries, keys), or without the heads."""
    if mask is not None:
        mask = _check_mask(where, mask)
        _check_broadcast(where, "mask", mask, logits)
    if bias is not None:
        bias = _check_bias(where, bias)
        _check_broadcast(where, "bias", bias, logits)
    if slopes is not None:
        slopes = _per_head(where, "alibi_slopes", slopes, heads)
        if not np.isfinite(slopes).all():
            raise ValueError(f"{where}: alibi_slopes must be finite, got {slopes[~np.isfinite(slopes)][0]}")
        if slopes.size and np.abs(slopes).max() > _STEEPEST_SLOPE:
            raise OverflowError(f"{where}: alibi_slopes must be within ±2**60, got {slopes[np.abs(slopes).argmax()]}")
    if sinks is not None:
        sinks = _per_head(where, "sinks", sinks, heads)
        if (wrong := ~(sinks < np.inf)).any():
            raise ValueError(f"{where}: sinks must be finite or -inf, got {sinks[wrong][0]}")
    cap = 0.0
    if softcap is not None:
        cap = _check_scale(softcap, where, "softcap")
        if cap <= 0:
            raise ValueError(f"{where}: softcap must be greater than 0, got {softcap!r}; None is no cap")
    return Extras(mask, bias=bias, slopes=slopes, sinks=sinks, softcap=cap)


def _check_mask(where: str, mask: Any) -> Array:
    if isinstance(mask, str):
        word = f"; pass causal={mask == 'causal' or mask!r}" if mask in ("causal", "top-left") else ""
        raise TypeError(f"{where}: mask must be bool, True where a query attends to a key, got {mask!r}{word}")
    given = mask if type(mask) is np.ndarray else _as_array("mask", mask, where)
    if given.dtype == bool:
        return given if given.ndim else given[np.newaxis]  # the core looks at the last axis
    ways_out = "; to add it to the scores pass it as bias="
    if given.dtype.kind in "iuf" or _is_known(given.dtype):
        ways_out += "; if it is not 0 where a query attends, pass mask.astype(bool)"
    raise TypeError(f"{where}: mask must be bool, True where a query attends to a key, got {given.dtype}{ways_out}")


def _check_bias(where: str, bias: Any) -> Array:
    given = bias if type(bias) is np.ndarray else _as_array("bias", bias, where)
    if _is_known(given.dtype):
        return given if given.ndim else given[np.newaxis]
    ways_out = "; True where a query attends to a key is mask=" if given.dtype == bool else ""
    if given.dtype.kind in "iuf":
        ways_out = "; pass bias.astype('float32') to add it, or as a bool mask= what is not 0 where a query attends"
    ways_out += _hint_of_bits("bias", given)
    raise TypeError(f"{where}: bias, added to the scores, must be {_NAMES}, got {given.dtype}{ways_out}")


def _check_broadcast(where: str, name: str, x: Array, logits: tuple[int, ...]) -> None:
    """x has up to 2 axes, the last of (queries, keys), or as many as the scores, and does not enlarge them. Numbers of
    axes alone say what an axis is: (sequences, queries, keys) would be (heads, queries, keys) where the sizes agree."""
    whole = len(logits)
    if (x.ndim <= 2 or x.ndim == whole) and _fits(x.shape, logits):
        return
    axes = "(queries, keys)" if whole == 2 else "(..., query heads, queries, keys)"
    lead = "None, " * (whole - x.ndim - 1)
    ways_out = []
    if x.ndim > 2 and x.ndim < whole:
        if _fits((*x.shape[:-2], 1, *x.shape[-2:]), logits):
            at = ":, None" if whole == 4 else f"{lead}..., None, :, :"
            ways_out.append(f"one per sequence: pass {name}[{at}]")
        if _fits(x.shape, logits):
            ways_out.append(f"the same for all sequences: pass {name}[{lead}None, ...]")
    if 1 < x.ndim < whole - 1 and _fits((*x.shape[:-1], 1, 1, x.shape[-1]), logits):  # (sequences, keys)
        at = ":, None, None" if whole == 4 else f"{lead.removesuffix('None, ')}..., None, None, :"
        ways_out.append(f"one row per sequence: pass {name}[{at}]")
    what = f"{name} does not broadcast to {axes} = {logits}"
    if x.ndim > 2 and whole == 2:
        what = f"{name} must have 1 or 2 axes, (queries, keys) = {logits}, as q, k and v have"
    elif x.ndim > 2 and x.ndim != whole:
        what = f"{name} must have 1 or 2 axes, (queries, keys), or all of {axes} = {logits}"
    _fail_shapes(where, "; ".join([what, *ways_out]), **{name: x})


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    for n, m in zip(shape, target[len(target) - len(shape) :], strict=True):  # a generator would take 1 us
        if n != 1 and n != m:
            return False
    return True


def _per_head(where: str, name: str, values: Any, heads: int) -> Array:
    """A float64 copy of one real number per query head."""
    given = _as_array(name, values, where)
    real = given.dtype.kind in "iuf" or (given.dtype.kind == "V" and np.can_cast(given.dtype, np.float64))
    if not real:
        raise TypeError(f"{where}: {name} must be real numbers, one per query head, got {given.dtype}")
    if given.shape != (heads,):
        raise ValueError(f"{where}: {name} must have the shape ({heads},), one per query head, got {given.shape}")
    with np.errstate(over="ignore"):  # a longdouble becomes infinite, and is refused
        return np.array(given, np.float64, order="C")


def check_segments(
    where: str, segments: Any, batch: tuple[int, ...], len_q: int, len_k: int
) -> tuple[Array, Array | None, Array | None]:
    """Spans of shape batch + (len_q, 2), and the ids, batch + (len_q,) and (len_k,), or None twice."""
    q_ids, k_ids = _check_ids(where, segments)
    for name, ids, length in (("query", q_ids, len_q), ("key", k_ids, len_k)):
        if ids.ndim == 0 or ids.shape[-1] != length or not _fits(ids.shape[:-1], batch):
            own_ids = f" or, per sequence, {(*batch, length)}" if batch else ""
            raise ValueError(f"{where}: segments must have {name} ids of shape ({length},){own_ids}, got {ids.shape}")
    own = np.broadcast_shapes(q_ids.shape[:-1], k_ids.shape[:-1])
    each = np.arange(math.prod(own))
    spans, complete = _find_spans(
        np.broadcast_to(q_ids, (*own, len_q)).ravel(), np.broadcast_to(k_ids, (*own, len_k)).ravel(),
        np.repeat(each, len_q), np.repeat(each, len_k), each * len_k,
    )  # fmt: skip
    spans = spans.reshape(*own, len_q, 2)

    def spread(x: Array, *shape: int) -> Array:
        return np.array(np.broadcast_to(x, (*batch, *shape)), order="C")

    if complete:
        return spread(spans, len_q, 2), None, None
    q_ids, k_ids = _numbered(q_ids, k_ids)
    return spread(spans, len_q, 2), spread(q_ids, len_q), spread(k_ids, len_k)


def check_ragged_segments(
    where: str, segments: Any, q_starts: Array, k_starts: Array
) -> tuple[Array, Array | None, Array | None]:
    """The same for packed sequences: ids and spans lie one sequence after another, spans count from its first key."""
    q_ids, k_ids = _check_ids(where, segments)
    for name, ids, total in (("query", q_ids, q_starts[-1]), ("key", k_ids, k_starts[-1])):
        if ids.shape != (total,):
            raise ValueError(f"{where}: segments must have {name} ids of shape ({total},), got {ids.shape}")
    each = np.arange(q_starts.size - 1)
    of_queries, of_keys = np.repeat(each, np.diff(q_starts)), np.repeat(each, np.diff(k_starts))
    spans, complete = _find_spans(q_ids, k_ids, of_queries, of_keys, k_starts)
    if complete:
        return spans, None, None
    q_ids, k_ids = _numbered(q_ids, k_ids)
    return spans, q_ids, k_ids


def _check_ids(where: str, segments: Any) -> list[Array]:
    """Copies as int64, of any shape."""
    if not isinstance(segments, (tuple, list)):
        raise TypeError(f"{where}: segments must be a pair, (query ids, key ids), got {type(segments).__name__}")
    if len(segments) != 2:
        raise ValueError(f"{where}: segments must be a pair, (query ids, key ids), got {len(segments)} items")
    made = []
    for i, (name, ids) in enumerate(zip(("query", "key"), segments, strict=True)):
        given = _as_array(f"segments[{i}]", ids, where)
        if given.dtype.kind not in "iu" and not (given.size == 0 and isinstance(ids, (list, tuple))):
            raise TypeError(f"{where}: segments must have integers as {name} ids, got {given.dtype}")
        if given.dtype.kind == "u" and given.size and int(given.max()) >= 2**63:
            raise OverflowError(f"{where}: segments: {name} id {given.max()} does not fit in 63 bits")
        made.append(given.astype(np.int64, order="C"))
    return made


def _numbered(*ids: Array) -> list[Array]:
    """The same ids as int32 numbers, which the core compares twice as many at a time."""
    low, high = min(int(x.min()) for x in ids), max(int(x.max()) for x in ids)
    if high - low < 2**31:
        return [(x - low).astype(np.int32) for x in ids]
    numbers = np.unique(np.concatenate([x.ravel() for x in ids]), return_inverse=True)[1].astype(np.int32)
    ends = np.cumsum([x.size for x in ids])[:-1]
    return [part.reshape(x.shape) for part, x in zip(np.split(numbers, ends), ids, strict=True)]


def _find_spans(q_ids: Array, k_ids: Array, of_queries: Array, of_keys: Array, starts: Array) -> tuple[Array, bool]:
    """Spans of all queries of all sequences, from the first key with the query's id to after the last; and whether all
    keys between have it. `of_queries` and `of_keys`: the sequence of each; `starts`: where its keys begin."""
    low = min(int(x.min(initial=0)) for x in (q_ids, k_ids))
    high = max(int(x.max(initial=0)) for x in (q_ids, k_ids))
    if (high - low + 1) * max(starts.size, 1) >= 2**63:  # then their ranks
        q_ids, k_ids, high = _ranked(q_ids, k_ids)
        low = 0
    size = high - low + 1
    q_ids, k_ids = q_ids - low + of_queries * size, k_ids - low + of_keys * size  # no two sequences have one in common
    numbers = size * starts.size
    if numbers > 8 * (q_ids.size + k_ids.size):  # more than a table is worth
        q_ids, k_ids, high = _ranked(q_ids, k_ids)
        numbers = high + 1
    keys = np.arange(k_ids.size)
    keys -= starts.take(of_keys)
    spans = np.zeros((numbers, 2), np.int64)
    spans[k_ids[::-1], 0] = keys[::-1]  # of keys with one id the last that is assigned stays
    keys += 1
    spans[k_ids, 1] = keys
    gaps = np.bincount(k_ids, minlength=numbers) != spans[:, 1] - spans[:, 0]
    return spans.take(q_ids, axis=0), not gaps.take(q_ids).any()  # `spans[q_ids]` takes 15 times as long


def _ranked(q_ids: Array, k_ids: Array) -> tuple[Array, Array, int]:
    """Their ranks in order of size, and the largest rank."""
    values, ids = np.unique(np.concatenate([q_ids, k_ids]), return_inverse=True)
    return ids[: q_ids.size], ids[q_ids.size :], values.size - 1


def check_starts(where: str, name: str, starts: Any, total: int) -> tuple[Array, Array, int]:
    """int64, contiguous: where each of the packed sequences begins, and their end; their lengths; the longest."""
    given = _as_array(name, starts, where)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{where}: {name} must be integers, got {given.dtype}")
    if given.ndim != 1 or not given.size:
        raise ValueError(f"{where}: {name} must have one axis and at least one entry, got shape {given.shape}")
    if given[0] != 0:
        raise ValueError(f"{where}: {name} must start at 0, got {given[0]}")
    begins = given.astype(np.int64, order="C")
    lengths = begins[1:] - begins[:-1]
    if lengths.size and lengths.min() < 0:
        at = int(np.argmax(given[1:] < given[:-1]))
        raise ValueError(f"{where}: {name} must not decrease, got {given[at]}, {given[at + 1]} at {at}")
    if given[-1] != total:
        side = name.removeprefix("cu_seqlens_")
        raise ValueError(f"{where}: {name} must end at {total}, the length of {side}, got {given[-1]}")
    return begins, lengths, int(lengths.max()) if lengths.size else 0


def alibi_slopes(num_heads: int) -> Array:
    """The slopes of ALiBi for so many heads.

    Parameters
    ----------
    num_heads : int
        Number of query heads, at least 1.

    Returns
    -------
    ndarray, shape (num_heads,)
        float64: for a power of two n, ``2 ** (-8 * i / n)`` for i = 1 to n. Otherwise those of the power of two below,
        followed by every second one of twice as many.

    Raises
    ------
    TypeError
        A number of heads that is no integer.
    ValueError
        Fewer than one head.

    See Also
    --------
    attention : Takes them as `alibi_slopes`.

    Notes
    -----
    From O. Press, N. Smith and M. Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length
    Extrapolation", 2022, section 3, and its authors' code for other numbers of heads.

    Examples
    --------
    >>> import qkv_fast
    >>> qkv_fast.alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    """
    try:
        n = operator.index(num_heads)
    except TypeError:
        n = None
    if n is None or isinstance(num_heads, (bool, np.bool_)):
        raise TypeError(f"alibi_slopes: num_heads must be an integer, got {num_heads!r}")
    if n < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1, got {n}")
    power = 1 << (n.bit_length() - 1)
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, between[: n - power]])
