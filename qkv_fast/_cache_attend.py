"""What caches share: checks of what is appended and asked, and attention over keys that lie as runs.

Slabs, rings and pages differ only in where the keys of a sequence lie, which `Keys` says. The queries of a call are the
newest tokens of their sequences, so positions need no argument.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import _core, _masks, _runtime
from ._attention import merge_partials
from ._cache_types import Form
from ._checks import (
    _FLOAT32,
    _FLOAT64,
    Array,
    _arithmetic,
    _as_array,
    _check_layout,
    _check_narrower,
    _check_out,
    _check_positions,
    _check_scale,
    _check_type,
    _empty,
    _fail_shapes,
    _per_sequence,
)


class Keys(NamedTuple):
    """Where the keys of a batch lie: in the rows of k and v, or in runs of them."""

    k: Array  # (batch, kv_heads, rows, dim), or (kv_heads, rows, dim) with runs; bytes for dim if the form is of bytes
    v: Array  # the same with dim_v
    runs: Array | None = None  # see Extras
    run_of: Array | None = None
    seen: Array | None = None  # (batch,) int64: all that the one query sees, moved together, and nothing else


class Tokens(NamedTuple):
    """How many tokens the sequences have."""

    lengths: Array  # (batch,) int64
    least: int
    most: int


def check_tokens(
    where: str, form: Form, batch: int, k: Any, v: Any, lengths: Any, layout: str
) -> tuple[Array, Array, int, Array | None]:
    """k and v as (batch, heads, tokens, dim), the number of tokens, and those of each sequence if they differ."""
    if type(k) is not np.ndarray:
        k = _as_array("k", k, where)
    if type(v) is not np.ndarray:
        v = _as_array("v", v, where)
    for name, x in (("k", k), ("v", v)):
        if x.dtype.num == _FLOAT32 or (x.dtype.num == form.dtype.num and not form.stored):
            continue
        _check_type(where, name, x)
        if not form.stored and x.dtype.itemsize >= form.dtype.itemsize:
            also = "" if form.dtype.num in (_FLOAT32, _FLOAT64) else ", float32"
            raise TypeError(f"{where}: {name} must be {form.dtype} as the cache{also} or narrower, got {x.dtype}")
    if layout != "bhld" and not _check_layout(layout, where) and k.ndim == v.ndim == 4:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    shape = k.shape
    if len(shape) != 4 or shape[:2] != (batch, form.kv_heads) or shape[3] != form.dim or v.shape != (
        *shape[:3], form.dim_v,
    ):  # fmt: skip
        fits = f"({batch}, {form.kv_heads}, tokens, {form.dim}) and ({batch}, {form.kv_heads}, tokens, {form.dim_v})"
        _fail_shapes(where, f"k and v must be of shapes {fits}, heads first", k=k, v=v)
    return k, v, shape[2], None if lengths is None else check_counts(where, lengths, batch, shape[2], "tokens")


def check_counts(where: str, lengths: Any, batch: int, most: int, of: str) -> Array:
    """One count of 0..most per sequence."""
    counts = _per_sequence(where, "lengths", lengths, (batch,))
    if (wrong := (counts < 0) | (counts > most)).any():
        raise ValueError(f"{where}: lengths must be in 0..{most} (the {of} given), got {counts[wrong][0]}")
    return counts


def attend(
    where: str,
    form: Form,
    tokens: Tokens,
    find: Callable[[int | None, Any, bool], Keys],
    limit: int | None,
    keep: int,
    q: Any,
    *,
    lengths: Any,
    mask: Any,
    bias: Any,
    causal: Any,
    window: Any,
    alibi_slopes: Any,
    sinks: Any,
    softcap: Any,
    scale: Any,
    layout: str,
    return_lse: bool,
    out: Array | None,
    num_threads: int | None,
) -> Any:
    """Attention of q over the cache.

    `find(left, queries, join)` says where the keys from `left` (None: all) before the first query on lie, `queries`
    being their number, one or per sequence. A ring has a `limit` to the left and may `keep` its first keys beyond it;
    with `join` its positions do not matter.
    """
    if type(q) is not np.ndarray:
        q = _as_array("q", q, where)
    if form.stored:
        _check_type(where, "q", q)
    elif q.dtype != form.dtype:
        _check_type(where, "q", q)
        _check_narrower(where, {"q": q, "the cache": np.empty(0, form.dtype)})
    if layout != "bhld" and not _check_layout(layout, where) and q.ndim == 4:
        q = q.swapaxes(1, 2)
    batch = len(tokens.lengths)
    if q.ndim != 4 or q.shape[0] != batch or q.shape[1] % form.kv_heads or q.shape[3] != form.dim:
        fits = f"({batch}, a multiple of {form.kv_heads}, queries, {form.dim})"
        _fail_shapes(where, f"q must be of shape {fits}, heads first", q=q)
    _, heads, len_q, dim = q.shape
    scale = dim**-0.5 if scale is None else _check_scale(scale, where)

    left: int | None = None
    right: int | None = 0
    if causal is not True or window is not None:
        if isinstance(causal, str):
            raise ValueError(f"{where}: causal must be True or False, got {causal!r}")
        left, right, _ = _check_positions(where, causal, window, None)
    if limit is not None:
        if window is not None and (left is None or left > limit):
            raise ValueError(f"{where}: window reaches {left} back, the cache keeps {limit} (window={window!r})")
        left = limit if window is None else left
    counts = offsets = None
    if lengths is not None:
        counts = check_counts(where, lengths, batch, len_q, "queries")
        offsets = tokens.lengths - counts
    queries = len_q if counts is None else counts
    positions = left is not None or right is not None or alibi_slopes is not None
    if tokens.least < len_q and positions and np.any(short := (tokens.lengths > 0) & (tokens.lengths < queries)):
        at = int(np.argmax(short))
        given = f"{np.broadcast_to(queries, batch)[at]} queries, of which sequence {at} has {tokens.lengths[at]} tokens"
        raise ValueError(f"{where}: the queries are the newest tokens: append these first ({given})")

    extras = _masks.Extras(stored=form.stored) if form.stored else None
    if not (mask is bias is alibi_slopes is sinks is softcap is None):
        logits = (batch, heads, len_q, tokens.most)
        extras = _masks.check_extras(where, logits, heads, mask, bias, alibi_slopes, sinks, softcap)
        extras = extras._replace(stored=form.stored)
    threads, isa, counters = _runtime.current()
    if num_threads is not None:
        threads = _runtime.check_threads(num_threads, f"{where}: num_threads")
    number = q.dtype.num
    shape = (batch, heads, len_q, form.dim_v) if layout == "bhld" else (batch, len_q, heads, form.dim_v)
    result = _empty(shape, number, where) if out is None else _check_out(out, shape, number, where)
    view = target = result if layout == "bhld" else result.swapaxes(1, 2)
    wide = _arithmetic(number)  # of the arithmetic

    apart = min(keep, tokens.most) if left is not None and tokens.most - 1 > left else 0  # kept keys beyond the window
    join = apart > 0 and len_q == 1 and (counts is mask is bias is alibi_slopes is None)
    keys = find(left, queries, join)
    if keys.seen is not None:
        tokens = Tokens(keys.seen, 0, int(keys.seen.max()))
        left = right = None
        apart = 0
    if apart and number != wide:
        target = _empty(view.shape, wide, where)  # rounded once, when both parts are there
    elif out is not None and (np.may_share_memory(out, q) or (extras and extras.overlaps(out))):
        target = _empty(view.shape, out.dtype.num, where)
    lse = _empty((batch, heads, len_q), wide, where) if return_lse or apart else None
    if counts is not None or apart:
        spans = np.zeros((batch, len_q, 2), np.int64)  # nothing for a row beyond the sequence's queries
        spans[..., 1] = np.where(np.arange(len_q) < np.reshape(queries, (-1, 1)), tokens.most, 0)
        extras = (extras or _masks.Extras())._replace(spans=spans)
        if apart:
            first = np.empty_like(target), np.empty_like(lse)
            _see_kept(tokens, keys, apart, q, *first, scale, right, queries, extras, threads, isa, counters)
            spans[..., 0] = apart
            extras = extras._replace(sinks=None)  # the first has them
    if keys.runs is not None:
        extras = (extras or _masks.Extras())._replace(runs=keys.runs, run_of=keys.run_of, longest_k=tokens.most)
    held = None if keys.runs is None and tokens.least == tokens.most else tokens.lengths
    _core.forward(
        q, keys.k, keys.v, target, lse, True, scale, left, right, offsets, held, threads, isa, counters, extras
    )  # fmt: skip
    if apart:
        target[...], lse = merge_partials([first[0], target], [first[1], lse])
    if target is not view:
        with np.errstate(all="ignore"):  # rounding is silent, as that of the core
            view[...] = target
    return (result, lse) if return_lse else result


def _see_kept(
    tokens: Tokens, keys: Keys, n: int, q: Array, out: Array, lse: Array, scale: float, right: int | None, queries: Any,
    extras: _masks.Extras, threads: int, isa: int, counters: Any,
) -> None:  # fmt: skip
    """Attention of q over the first n keys alone, whatever the window, into out and lse."""
    cut = {name: x[..., :n] for name in ("mask", "bias") if (x := getattr(extras, name)) is not None}
    _core.forward(
        q, keys.k[:, :, :n], keys.v[:, :, :n], out, lse, True, scale, None, right, tokens.lengths - queries,
        np.minimum(tokens.lengths, n), threads, isa, counters, extras._replace(**cut),
    )  # fmt: skip
