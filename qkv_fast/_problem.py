"""The one validator: what a verb is called with becomes a checked `Problem`, or an error that says what was given.

Arrays with a batch, packed sequences and the newest queries of a cache differ in where their sequences lie; what
positions, masks and everything else mean is checked here once for all of them. A verb is what it does with a problem:
allocate a result, and call the core.
"""

from typing import Any

import numpy as np

from . import _core, _masks, _runtime
from ._checks import (
    _TYPES,
    Array,
    _arithmetic,
    _as_array,
    _broadcast,
    _check_axes,
    _check_fit,
    _check_layout,
    _check_lengths,
    _check_narrower,
    _check_offsets,
    _check_out,
    _check_positions,
    _check_query_positions,
    _check_range,
    _check_type,
    _check_types,
    _fail_shapes,
    _fail_words,
    _per_sequence,
    _returned,
    _scale_of,
)
from ._core import Problem
from ._masks import Extras


class Planned:
    """What a verb returns inside `_runtime.planning()`: its problem and the core's report of what it would do."""

    __slots__ = ("also", "given_out", "longest", "out", "problem", "report", "shapes")

    def __init__(self, problem: Problem, report: dict[str, Any], out: Array, given_out: Array | None) -> None:
        self.problem, self.report, self.out, self.given_out = problem, report, out, given_out
        self.also: list[dict[str, Any]] = []  # reports of the core's other calls
        self.longest: int | None = None  # tokens of a cache's longest sequence
        self.shapes: dict[str, tuple[int, ...]] = {}  # of k and v there, which lie otherwise


def attend(p: Problem, out: Array | None, return_lse: bool) -> Any:
    """Attention, into a new array or `out`; where only a plan is asked for, that."""
    if out is None and p.counters is None:
        result = target = p.empty()
    elif out is None:
        result = target = _like_q(p)
    else:
        result = target = _check_out(out, p.shape, p.number, p.where)
        if overlaps(p, result):
            target = _core.scratch(p.where, p.shape, result.dtype.num)
    lse = _core.empty(p.where, p.rows, _arithmetic(p.number)) if return_lse else None
    report = _core.forward(p, target, lse) if p.extras is None else forward(p, target, lse)
    if report is not None:
        return Planned(p, report, target, None if out is None else result)
    if target is not result:
        result[...] = target
    result = _returned(result, out)
    return (result, lse) if return_lse else result


def forward(p: Problem, out: Array, lse: Array | None) -> dict[str, Any] | None:
    """Attention into `out` and `lse`, those rows too that the core leaves alone; or what the core would do."""
    report: dict[str, Any] | None = _core.forward(p, out, lse)
    if report is None and p.extras is not None and p.extras.queries is not None:
        blank(p, out, 0, axis=-2 if p.heads_first or out.ndim == 2 else -3)
        if lse is not None:
            sinks = p.extras.sinks
            blank(p, lse, -np.inf if sinks is None else sinks[:, np.newaxis] if lse.ndim > 1 else sinks)
    return report


def blank(p: Problem, x: Array, value: Any, axis: int = -1) -> None:
    """Give the rows past `q_lengths`, which the core leaves alone, what a query has that sees nothing."""
    if p.extras is None or p.extras.queries is None:
        return
    rest = (slice(None),) * (-1 - axis)
    for at, n in np.ndenumerate(p.extras.queries.reshape(p.rows[:-2])):
        if n < p.rows[-1]:
            with np.errstate(over="ignore"):  # a sink beyond the type is infinite, as elsewhere
                x[(*at, ..., slice(n, None), *rest)] = value


def _like_q(p: Problem) -> Array:
    """A plan asks a result for no more than its strides, which are q's: no pages for what will not be written."""
    if p.is_planned and p.shape == p.q.shape and p.q.flags.carray and p.q.dtype.isnative:
        return p.q
    return _core.scratch(p.where, p.shape, p.number)


def overlaps(p: Problem, out: Array) -> bool:
    """Whether the core would read what it writes."""
    if any(np.may_share_memory(out, x) for x in (p.q, p.k, p.v)):
        return True
    return p.extras is not None and p.extras.overlaps(out)


NO_VALUES = object()  # for v: what is asked about weights alone has none, and no error speaks of them


def check(
    where: str, q: Any, k: Any, v: Any, mask: Any, bias: Any, causal: Any, window: Any, q_offset: Any, q_positions: Any,
    q_lengths: Any, kv_lengths: Any, kv_starts: Any, segments: Any, alibi_slopes: Any, sinks: Any, softcap: Any,
    scale: Any, layout: Any, num_threads: Any, words: dict[str, Any],
) -> Problem:  # fmt: skip
    """The problem of arrays (..., heads, length, dim), in this order of axes or in that of `layout`."""
    if words:
        _fail_words(where, words)
    if type(q) is not np.ndarray:
        q = _as_array("q", q, where)
    if type(k) is not np.ndarray:
        k = _as_array("k", k, where)
    values = v is not NO_VALUES
    if type(v) is not np.ndarray:
        v = _as_array("v", v, where) if values else k[..., :0] if k.ndim else k
    dtype = q.dtype
    if not (dtype is k.dtype and dtype is v.dtype and dtype.num in _TYPES):  # the usual case, in short
        _check_types(where, q, k, **({"v": v} if values else {}))

    # Shapes: heads and lengths by layout, the axes left of them broadcast.
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    heads_first = layout == "bhld" or _check_layout(layout, where)
    batch: tuple[int, ...]
    if q_shape == k_shape == v_shape and len(q_shape) == 4 and heads_first:  # the rest of this in one comparison
        batch = q_shape[:1]
        q_heads = k_heads = v_heads = q_shape[1]
        len_q = len_k = len_v = q_shape[2]
        shape, rows = q_shape, q_shape[:3]
    elif len(q_shape) == len(k_shape) == len(v_shape) == 2:
        batch = ()
        q_heads = k_heads = v_heads = 1
        len_q, len_k, len_v = q_shape[0], k_shape[0], v_shape[0]
        shape, rows = (len_q, v_shape[1]), (len_q,)
    else:
        _check_axes(where, heads_first, **_arrays(q, k, v, values))
        batch = q_shape[:-3]
        if not batch == k_shape[:-3] == v_shape[:-3]:
            batch = _broadcast(where, **_arrays(q, k, v, values))
        if heads_first:
            q_heads, len_q = q_shape[-3:-1]
            k_heads, len_k = k_shape[-3:-1]
            v_heads, len_v = v_shape[-3:-1]
            rows = (*batch, q_heads, len_q)
            shape = (*rows, v_shape[-1])
        else:
            len_q, q_heads = q_shape[-3:-1]
            len_k, k_heads = k_shape[-3:-1]
            len_v, v_heads = v_shape[-3:-1]
            rows = (*batch, q_heads, len_q)
            shape = (*batch, len_q, q_heads, v_shape[-1])
    dim = q_shape[-1]
    if (
        k_shape[-1] != dim
        or len_v != len_k
        or k_heads != v_heads
        or (q_heads != k_heads and (k_heads == 0 or q_heads % k_heads))
        or dim > _core.MAX_DIM
        or v_shape[-1] > _core.MAX_DIM
    ):  # then it says which
        _check_fit(where, _arrays(q, k, v, values), (q_heads, k_heads, v_heads), (len_k, len_v))

    # The usual values first: what they skip is 0.1 us each, of 5 that the smallest call takes.
    scale = (dim**-0.5 if dim else 1.0) if scale is None else _scale_of(where, scale, dim)
    left = right = offsets = lengths = extras = own = None
    usual = window is q_offset is q_positions is q_lengths is kv_lengths is kv_starts is None
    if usual and (causal is False or causal is True):
        right = 0 if causal else None
    else:
        left, right, offsets, lengths, own = _check_limits(
            where, causal, window, q_offset, q_positions, q_lengths, kv_lengths, kv_starts, alibi_slopes is not None,
            batch, len_q, len_k,
        )  # fmt: skip
    if not (mask is bias is segments is alibi_slopes is sinks is softcap is None):
        extras = _masks.check_extras(where, (*rows, len_k), q_heads, mask, bias, alibi_slopes, sinks, softcap)
        if segments is not None:
            extras = extras.with_segments(*_masks.check_segments(where, segments, batch, len_q, len_k))
    if own:
        extras = (extras or Extras())._replace(**own)
    threads, isa, counters = _runtime.current(num_threads, where)
    return Problem(
        where, q, k, v, heads_first, shape, rows, scale, left, right, offsets, lengths, extras, threads, isa, counters
    )


def _arrays(q: Array, k: Array, v: Array, values: bool) -> dict[str, Array]:
    return {"q": q, "k": k, "v": v} if values else {"q": q, "k": k}


def check_ragged(
    where: str, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, mask: Any, bias: Any, causal: Any,
    window: Any, q_offset: Any, q_positions: Any, kv_lengths: Any, segments: Any, alibi_slopes: Any, sinks: Any,
    softcap: Any, scale: Any, num_threads: Any, words: dict[str, Any],
) -> Problem:  # fmt: skip
    """The problem of packed sequences (tokens, heads, dim)."""
    if words:
        _fail_words(where, words)
    values = v is not NO_VALUES
    q, k = _as_array("q", q, where), _as_array("k", k, where)
    v = _as_array("v", v, where) if values else k[..., :0] if k.ndim else k
    _check_types(where, q, k, **({"v": v} if values else {}))
    arrays = _arrays(q, k, v, values)
    if not q.ndim == k.ndim == v.ndim == 3:
        _fail_shapes(where, f"{', '.join(arrays)} must have 3 axes each, (tokens, heads, dim)", **arrays)
    (total_q, heads, dim), total_k = q.shape, k.shape[0]
    _check_fit(where, arrays, (heads, k.shape[1], v.shape[1]), (total_k, v.shape[0]), packed=True)
    q_starts, len_q, longest_q = _masks.check_starts(where, "cu_seqlens_q", cu_seqlens_q, total_q)
    k_starts, len_k, longest_k = _masks.check_starts(where, "cu_seqlens_k", cu_seqlens_k, total_k)
    if q_starts.size != k_starts.size:
        given = f"{q_starts.size} and {k_starts.size} entries"
        raise ValueError(f"{where}: cu_seqlens_q and cu_seqlens_k must be of one length, got {given}")
    batch = (len_q.size,)

    scale = _scale_of(where, scale, dim)
    left, right, offsets, lengths, own = _check_limits(
        where, causal, window, q_offset, q_positions, None, kv_lengths, None, alibi_slopes is not None, batch, len_q,
        len_k,
    )  # fmt: skip
    if lengths is None:
        lengths = len_k
    if offsets is None:
        offsets = lengths - len_q
    logits = (*batch, heads, longest_q, longest_k)
    extras = _masks.check_extras(where, logits, heads, mask, bias, alibi_slopes, sinks, softcap)
    extras = extras._replace(q_starts=q_starts, k_starts=k_starts, longest_q=longest_q, longest_k=longest_k, **own)
    if segments is not None:
        extras = extras.with_segments(*_masks.check_ragged_segments(where, segments, q_starts, k_starts))
    threads, isa, counters = _runtime.current(num_threads, where)
    shape, rows = (total_q, heads, v.shape[2]), (heads, total_q)
    return Problem(
        where, q, k, v, False, shape, rows, scale, left, right, offsets, lengths, extras, threads, isa, counters
    )


def check_any(
    where: str, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, mask: Any, bias: Any, causal: Any,
    window: Any, q_offset: Any, q_positions: Any, q_lengths: Any, kv_lengths: Any, kv_starts: Any, segments: Any,
    alibi_slopes: Any, sinks: Any, softcap: Any, scale: Any, layout: Any, num_threads: Any, words: dict[str, Any],
) -> Problem:  # fmt: skip
    """The problem of arrays, or of packed sequences where the `cu_seqlens` are given."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return check(
            where, q, k, v, mask, bias, causal, window, q_offset, q_positions, q_lengths, kv_lengths, kv_starts,
            segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
        )  # fmt: skip
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise TypeError(f"{where}: packed sequences need both cu_seqlens_q and cu_seqlens_k")
    if q_lengths is not None or kv_starts is not None:
        name = "q_lengths" if q_lengths is not None else "kv_starts"
        raise ValueError(f"{where}: packed sequences take no {name}: cu_seqlens say where they begin and end")
    if layout != "bhld":
        raise ValueError(f"{where}: packed sequences are (tokens, heads, dim) and take no layout, got {layout!r}")
    return check_ragged(
        where, q, k, v, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions, kv_lengths,
        segments, alibi_slopes, sinks, softcap, scale, num_threads, words,
    )  # fmt: skip


def result_type(p: Problem) -> np.dtype[Any]:
    """That of the log-sum-exp, and of all that is computed."""
    return _TYPES[_arithmetic(p.number)]


def check_lse(p: Problem, lse: Any, name: str = "lse") -> Array:
    """A log-sum-exp as attention returns it for this problem, or its gradient; contiguous."""
    given = _as_array(name, lse, p.where)
    expected = result_type(p)
    if given.dtype.num != expected.num:
        known = f"{expected}, as attention returns it for {p.q.dtype}" if name == "lse" else f"{expected}, as lse is"
        raise TypeError(f"{p.where}: {name} must be {known}, got {given.dtype}")
    if given.shape != p.rows:
        raise ValueError(f"{p.where}: {name} must have the shape {p.rows}, got {name}.shape={given.shape}")
    return np.ascontiguousarray(given, expected)


def check_output(p: Problem, output: Any, name: str = "output") -> Array:
    """The output of attention for this problem, or its gradient; any strides."""
    given = _as_array(name, output, p.where)
    own, wide = _TYPES[p.number], result_type(p)
    if given.dtype.num not in (own.num, wide.num):
        known = f"{own}" if own == wide else f"{own} or {wide}"
        known += f", as attention returns it for {p.q.dtype}"
        raise TypeError(f"{p.where}: {name} must be {known}, got {given.dtype}")
    if given.shape != p.shape:
        raise ValueError(f"{p.where}: {name} must have the shape {p.shape}, got {name}.shape={given.shape}")
    return given


OF_CACHES = "mask bias causal window alibi_slopes sinks softcap scale return_lse"  # as _fail_words takes it


def check_newest(
    where: str, q: Any, batch: int, kv_heads: int, dim: int, dim_v: int, dtypes: tuple[np.dtype[Any], ...],
    stored: tuple[str | None, str | None], longest: int, mask: Any, bias: Any, causal: Any, window: Any,
    alibi_slopes: Any, sinks: Any, softcap: Any, scale: Any, layout: Any, num_threads: Any, words: dict[str, Any],
    beams: bool = False,
) -> Problem:  # fmt: skip
    """The problem of queries of the newest tokens of a cache of `kv_heads` heads, for up to `longest` tokens, and, with
    `beams`, of its batch or a multiple of that. `dtypes` are those of its keys and values that are not `stored` as
    bytes. q is heads-first in it, whatever the layout; keys, offsets and lengths are the cache's."""
    if words:
        _fail_words(where, words, OF_CACHES)
    if type(q) is not np.ndarray:
        q = _as_array("q", q, where)
    if dtypes != (q.dtype,):
        _check_type(where, "q", q)
        names = ("the cache",) if len(dtypes) == 1 else ("the cache's keys", "the cache's values")
        for name, dtype in zip(names, dtypes, strict=False):
            _check_narrower(where, {"q": q, name: np.empty(0, dtype)})
    heads_first = layout == "bhld" or _check_layout(layout, where)
    given = q
    if not heads_first and q.ndim == 4:
        q = q.swapaxes(1, 2)
    known = q.ndim == 4 and (q.shape[0] == batch or (beams and q.shape[0] and q.shape[0] % batch == 0))
    if not known or q.shape[1] % kv_heads or q.shape[3] != dim:
        heads, length, many = f"a multiple of {kv_heads}", "queries", f"a multiple of {batch}" if beams else batch
        fits = f"({many}, {heads}, {length}, {dim})" if heads_first else f"({many}, {length}, {heads}, {dim})"
        _fail_shapes(where, f"q must be of shape {fits}", q=given)
    rows = q.shape[:3]
    shape = (*rows, dim_v) if heads_first else (rows[0], rows[2], rows[1], dim_v)
    scale = dim**-0.5 if scale is None else _scale_of(where, scale, dim)  # as in check: dim is at least 1
    left: int | None = None
    right: int | None = 0
    if causal is not True or window is not None:
        if isinstance(causal, str):
            raise ValueError(f"{where}: causal must be True or False, got {causal!r}")
        left, right, _ = _check_positions(where, causal, window)
    k_stored, v_stored = stored
    extras = Extras(k_stored=k_stored, v_stored=v_stored) if k_stored or v_stored else None
    if not (mask is bias is alibi_slopes is sinks is softcap is None):
        extras = _masks.check_extras(where, (*rows, longest), rows[1], mask, bias, alibi_slopes, sinks, softcap)
        extras = extras._replace(k_stored=k_stored, v_stored=v_stored)
    threads, isa, counters = _runtime.current(num_threads, where)
    return Problem(
        where, q, None, None, heads_first, shape, rows, scale, left, right, None, None, extras, threads, isa, counters
    )


def _check_limits(
    where: str, causal: Any, window: Any, q_offset: Any, q_positions: Any, q_lengths: Any, kv_lengths: Any,
    kv_starts: Any, alibi: bool, batch: tuple[int, ...], len_q: Any, len_k: Any,
) -> tuple[int | None, int | None, Array | None, Array | None, dict[str, Any]]:  # fmt: skip
    """How far keys may lie to the left and to the right of a position; offsets; lengths; and what few calls have, for
    Extras. None is open, or the default. `len_q` and `len_k` are one for all sequences, or one each."""
    left = right = offsets = lengths = None
    own: dict[str, Any] = {}
    if causal is not False or window is not None:
        left, right, top_left = _check_positions(where, causal, window)
        if top_left:
            if q_offset is not None or q_positions is not None:
                other = "q_offset" if q_offset is not None else "q_positions"
                raise ValueError(f"{where}: causal='top-left' means q_offset=0; give it or {other}")
            q_offset = 0
    positions = left is not None or right is not None or alibi
    if q_lengths is not None:
        queries = own["queries"] = _per_sequence(where, "q_lengths", q_lengths, batch)
        _check_range(where, "q_lengths", queries, len_q, "q's length")
    if kv_lengths is not None:
        lengths = _per_sequence(where, "kv_lengths", kv_lengths, batch)
        _check_lengths(where, lengths, len_q, len_k, positions and q_offset is q_positions is q_lengths is None)
    if kv_starts is not None:
        own["starts"] = _per_sequence(where, "kv_starts", kv_starts, batch)
        _check_range(where, "kv_starts", own["starts"], len_k if lengths is None else lengths, "the sequence's keys")
    if q_positions is not None:
        if q_offset is not None:
            raise ValueError(f"{where}: q_positions say where queries sit, and so does q_offset; give one of the two")
        given = _check_query_positions(where, q_positions, batch, len_q)
        if positions:
            own["positions"] = given
    if q_offset is not None:
        offsets = _check_offsets(where, q_offset, batch)
    return left, right, offsets, lengths, own
