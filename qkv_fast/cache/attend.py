"""What caches share: checks of what is appended and asked, and attention over keys that lie as runs.

Slabs, rings and pages differ only in where the keys of a sequence lie, which `Keys` says. The queries of a call are the
newest tokens of their sequences, so positions need no argument. Attention and questions take the same arguments.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import _core, _problem
from .._checks import (
    _FLOAT32,
    _FLOAT64,
    _OF_QUESTIONS,
    Array,
    _arithmetic,
    _as_array,
    _check_layout,
    _check_out,
    _check_query_positions,
    _check_type,
    _fail_shapes,
    _fail_words,
    _per_sequence,
    _returned,
)
from .._core import Problem
from .._masks import Extras
from .._merge import merge_partials
from .types import Form


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
    starts: Array | None = None  # (batch,) int64: those before are padding
    whole: bool = False  # an encoder's, which all queries see


# What of a cache a call is about: its form, its tokens, how their keys are found, how many tokens before its own a
# query of a ring sees at most, and how many first ones beyond them. find(where, left, queries, join) gives the keys
# from `left` (None: all) before the first query on, `queries` being how many there are, one number or one per sequence;
# with `join` their positions do not matter.
Find = Callable[[str, int | None, Any, bool], Keys]
Held = tuple[Form, Tokens, Find, int | None, int]
_FARTHEST = 1 << 24  # from the older tokens' number that a draft's positions may be: float32 has all distances


def check_tokens(
    where: str, form: Form, batch: int, k: Any, v: Any, lengths: Any, layout: str
) -> tuple[Array, Array, int, Array | None]:
    """k and v as (batch, heads, tokens, dim), the number of tokens, and those of each sequence if they differ."""
    if type(k) is not np.ndarray:
        k = _as_array("k", k, where)
    if form.latent:
        if v is not None:
            raise TypeError(f"{where}: a latent cache takes keys alone: values are their first elements; pass no v")
        v = k[..., : form.dim_v] if k.ndim == 4 else k
    elif v is None:
        raise TypeError(f"{where}: v is missing; only a cache with latent=True takes keys alone")
    if type(v) is not np.ndarray:
        v = _as_array("v", v, where)
    for name, x, rows in (("k", k, form.k), ("v", v, form.v)):
        if x.dtype.num == _FLOAT32 or (x.dtype.num == rows.dtype.num and not rows.stored):
            continue
        _check_type(where, name, x)
        if not rows.stored and x.dtype.itemsize >= rows.dtype.itemsize:
            also = "" if rows.dtype.num in (_FLOAT32, _FLOAT64) else ", float32"
            raise TypeError(f"{where}: {name} must be {rows.dtype} as the cache{also} or narrower, got {x.dtype}")
    given = k, v
    heads_first = layout == "bhld" or _check_layout(layout, where)
    if not heads_first and k.ndim == v.ndim == 4:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    shape = k.shape
    if len(shape) != 4 or shape[:2] != (batch, form.kv_heads) or shape[3] != form.dim or v.shape != (
        *shape[:3], form.dim_v,
    ):  # fmt: skip
        axes = f"{form.kv_heads}, tokens" if heads_first else f"tokens, {form.kv_heads}"
        fits = f"({batch}, {axes}, {form.dim}) and ({batch}, {axes}, {form.dim_v})"
        if form.latent:
            _fail_shapes(where, f"k must be of shape ({batch}, {axes}, {form.dim})", k=given[0])
        _fail_shapes(where, f"k and v must be of shapes {fits}", k=given[0], v=given[1])
    return k, v, shape[2], _own_counts(where, lengths, batch, shape[2], "tokens")


def check_starts(where: str, starts: Any, lengths: Array, ends: Array) -> Array:
    """How many of the tokens that empty sequences get are padding; of others none can become it."""
    begins = _per_sequence(where, "starts", starts, lengths.shape)
    if (wrong := (begins < 0) | (begins > ends)).any():
        at = int(wrong.argmax())
        most = f"0..{ends[at]} (the tokens given) for sequence {at}"
        raise ValueError(f"{where}: starts must be in {most}, got {begins[at]}")
    if (late := (begins > 0) & (lengths > 0)).any():
        at = int(late.argmax())
        raise ValueError(f"{where}: starts are of empty sequences, and sequence {at} has {lengths[at]} tokens")
    return begins


def check_counts(where: str, lengths: Any, batch: int, most: int, of: str) -> Array:
    """One count of 0..most per sequence."""
    counts = _per_sequence(where, "lengths", lengths, (batch,))
    for n in counts.tolist():
        if not 0 <= n <= most:
            raise ValueError(f"{where}: lengths must be in 0..{most} (the {of} given), got {n}")
    return counts


def _own_counts(where: str, lengths: Any, batch: int, most: int, of: str) -> Array | None:
    """None where all have the most, which a step says in every call: it costs less."""
    if lengths is None:
        return None
    plain = lengths.tolist() if type(lengths) is np.ndarray and lengths.dtype.kind in "iu" else lengths
    if type(plain) is list and plain == [most] * batch and {*map(type, plain)} == {int}:
        return None
    counts = check_counts(where, lengths, batch, most, of)
    return None if counts.tolist().count(most) == batch else counts


def check_index(where: str, index: Any, batch: int | None, lengths: Any = None) -> list[Array]:
    """Of each sequence the numbers of the tokens that it keeps; of one alone, where there is no batch."""
    given = _as_array("index", index, where)
    if given.dtype.kind not in "iu" and given.size:
        raise TypeError(f"{where}: index must be integers, got {given.dtype}")
    if given.ndim != 1 and (given.ndim != 2 or given.shape[0] != batch):
        one = "" if batch is None else f" or ({batch}, m)"
        raise ValueError(f"{where}: index must be of shape (m,){one}, got {given.shape}")
    m = given.shape[-1]
    rows = np.broadcast_to(given.astype(np.int64), (batch or 1, m))
    counts = np.full(len(rows), m) if lengths is None else check_counts(where, lengths, len(rows), m, "indices")
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


def check_chosen(where: str, chosen: Array, n: int, length: int, sequence: int) -> None:
    """Numbers, counted from n, of tokens that a sequence has, each once."""
    if (wrong := (chosen < 0) | (chosen >= length - n)).any():
        known = f"0..{length - n - 1} for sequence {sequence}, which has {length} tokens (n={n})"
        raise ValueError(f"{where}: index must be in {known}, got {chosen[wrong][0]}")
    if len(set(chosen.tolist())) < len(chosen):
        raise ValueError(f"{where}: index must not repeat a token, got {chosen.tolist()} for sequence {sequence}")


def _newest(
    where: str, form: Form, tokens: Tokens, limit: int | None, dim_v: int, q: Any, lengths: Any, mask: Any, bias: Any,
    causal: Any, window: Any, alibi_slopes: Any, sinks: Any, softcap: Any, scale: Any, layout: str,
    num_threads: int | None, words: dict[str, Any], *, new: int | None = None, beams: bool = False,
) -> tuple[Problem, Any]:  # fmt: skip
    """The problem of the queries of the newest tokens, but for where keys lie; and how many queries each sequence has,
    one number or one each. `new`: how many there must be. With `beams` several sequences of q may read one
    of a whole cache."""
    stored = form.stored if dim_v else form.stored[:1] * 2  # without values those are none of the keys' elements
    p = _problem.check_newest(
        where, q, len(tokens.lengths), form.kv_heads, form.dim, dim_v, form.dtypes, stored, tokens.most, mask, bias,
        True if causal is None else causal, window, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
        beams and tokens.whole,
    )  # fmt: skip
    len_q = p.rows[2]
    if new is not None and len_q != new:
        raise ValueError(f"{where}: q must be of the tokens that k and v are of, {new} each, got {len_q}")
    if tokens.whole:
        if window is not None or alibi_slopes is not None or causal:
            name = "window" if window is not None else "alibi_slopes" if alibi_slopes is not None else "causal"
            what = "is about positions, and queries have none among the tokens of an encoder"
            raise ValueError(f"{where}: {name} {what}")
        p.right = None
    if form.rotate:
        p.q = form.k.rotated(p.q)
    if limit is not None:
        if window is not None and (p.left is None or p.left > limit):
            reach = "without end" if p.left is None else p.left
            raise ValueError(f"{where}: window reaches {reach} back, the cache keeps {limit} (window={window!r})")
        p.left = limit if window is None else p.left
    if form.latent and dim_v:
        p.extras = (p.extras or Extras())._replace(latent=True)
    if tokens.starts is not None:
        p.extras = (p.extras or Extras())._replace(starts=tokens.starts)
    queries: Any = len_q
    if new is not None and lengths is not None and p.rows[0] != len(lengths):
        lengths = np.repeat(lengths, p.rows[0] // len(lengths))  # those of the tokens, which beams share
    if (counts := _own_counts(where, lengths, p.rows[0], len_q, "queries")) is not None:
        queries = counts
        p.extras = (p.extras or Extras())._replace(queries=queries)
    if tokens.least < len_q and (p.left is not None or p.right is not None or alibi_slopes is not None):
        if np.any(short := (tokens.lengths > 0) & (tokens.lengths < queries)):
            at = int(np.argmax(short))
            many = np.broadcast_to(queries, len(tokens.lengths))[at]
            given = f"{many} queries, of which sequence {at} has {tokens.lengths[at]} tokens"
            raise ValueError(f"{where}: the queries are the newest tokens: append these first ({given})")
    return p, queries


def _take_tree(p: Problem, tokens: Tokens, queries: Any, tree: Any, positions: Any, mask: Any, keep: int) -> Any:
    """A mask of the newest tokens, who are the queries, among themselves; all older ones are seen, as far as the window
    reaches from where the queries sit. Returns how many tokens before the end the first of these positions is."""
    if tree is None:
        if positions is not None:
            raise ValueError(f"{p.where}: q_positions are those of a tree: without one a query sits at its own token")
        return queries
    if tokens.whole:
        raise ValueError(f"{p.where}: a tree is of the newest tokens, and queries have none among those of an encoder")
    if mask is not None:
        raise ValueError(f"{p.where}: tree and mask exclude each other: give one of the two")
    given = _as_array("tree", tree, p.where)
    batch, n = len(tokens.lengths), p.rows[2]
    if given.dtype != bool:
        raise TypeError(f"{p.where}: tree must be bool, True where a token sees another, got {given.dtype}")
    if given.shape not in ((n, n), (batch, n, n)):
        shapes = f"({n}, {n}) or ({batch}, {n}, {n}), the queries' number"
        raise ValueError(f"{p.where}: tree must be of shape {shapes}, got {given.shape}")
    if (short := tokens.lengths < queries).any():
        at = int(short.argmax())
        many = np.broadcast_to(queries, (batch,))[at]
        held = f"{many} queries, of which sequence {at} has {tokens.lengths[at]} tokens"
        raise ValueError(f"{p.where}: a tree is of the newest tokens: append these first ({held})")
    p.right = None
    begins, back = tokens.lengths - queries, queries
    places: Array = np.arange(n)[np.newaxis]
    if positions is not None:
        places = _check_query_positions(p.where, positions, (batch,), n)
        away = places - begins[:, np.newaxis]
        if away.size and np.abs(away).max() > _FARTHEST:
            far = int(places.ravel()[np.abs(away).argmax()])
            raise OverflowError(f"{p.where}: q_positions must be within 2**24 of the older tokens' number, got {far}")
        p.extras = (p.extras or Extras())._replace(positions=places)
        own = np.broadcast_to(queries, (batch,))
        farthest = np.where(np.arange(n) < own[:, np.newaxis], away, 0).min(1, initial=0)
        back = np.where(own > 0, own - farthest, 0)
    seen = given if given.ndim == 3 else given[np.newaxis]
    if p.left is not None and (positions is not None or p.left < n - 1):
        near = places[:, :, np.newaxis] - places[:, np.newaxis] <= p.left  # of the query's position, the key's
        if keep:
            near = near | (begins[:, np.newaxis] + np.arange(n) < keep)[:, np.newaxis]
        seen = seen & near
    p.extras = (p.extras or Extras())._replace(mask=seen[:, np.newaxis], mask_from=begins)
    return back


def _beyond(p: Problem, tokens: Tokens, keep: int) -> int:
    """First tokens that every query sees and that may lie before its window."""
    if not keep or p.left is None:
        return 0
    own = None if p.extras is None else p.extras.positions
    last = tokens.most - 1 if own is None else int(own.max(initial=0))
    return min(keep, tokens.most) if last > p.left else 0


def _place(p: Problem, keys: Keys, tokens: Tokens) -> None:
    if keys.runs is not None:
        p.extras = (p.extras or Extras())._replace(runs=keys.runs, run_of=keys.run_of, longest_k=tokens.most)
    if keys.runs is not None or tokens.least != tokens.most:
        p.lengths = tokens.lengths


def ask_newest(
    where: str, held: Held, q: Any, lengths: Any, tree: Any, q_positions: Any, mask: Any, *arguments: Any,
    values: bool = False,
) -> Problem:  # fmt: skip
    """The problem of a question, with or without values; `arguments` are the others of _newest."""
    form, tokens, find, limit, keep = held
    if words := arguments[-1]:
        _fail_words(where, words, _problem.OF_CACHES, _OF_QUESTIONS)
    dim_v = form.dim_v if values else 0
    p, queries = _newest(where, form, tokens, limit, dim_v, q, lengths, mask, *arguments, beams=True)
    back = _take_tree(p, tokens, queries, tree, q_positions, mask, keep)
    p.heads_first, p.shape = True, (*p.rows, dim_v)
    p.number = p.q.dtype.num  # of rotated queries, that of the arithmetic
    if values and _beyond(p, tokens, keep):
        raise ValueError(
            f"{where}: a ring that keeps its first {keep} tokens beyond its window has no values at hand in one order; "
            "received says what weight its tokens have, and a ring without keep=, a slab and pages have influence"
        )
    keys = find(where, p.left, back, False)
    if p.rows[0] != len(tokens.lengths):
        keys, tokens = _each_beam(p, keys, tokens)
    p.k, p.v = keys.k, keys.v if values else keys.k[..., :0]
    if kept := _beyond(p, tokens, keep):
        p.extras = (p.extras or Extras())._replace(kept=kept)
    _place(p, keys, tokens)
    return p


def attend_newest(
    where: str,
    held: Held,
    q: Any,
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
    words: dict[str, Any],
    tree: Any = None,
    q_positions: Any = None,
    new: int | None = None,
) -> Any:
    """Attention of the queries of the newest tokens over the cache. What is checked is checked before keys are found:
    a step appends its `new` tokens there."""
    form, tokens, find, limit, keep = held
    batch, longest = len(tokens.lengths), tokens.most
    p, queries = _newest(
        where, form, tokens, limit, form.dim_v, q, lengths, mask, bias, causal, window, alibi_slopes, sinks, softcap,
        scale, layout, num_threads, words, new=new, beams=True,
    )  # fmt: skip
    len_q, back = p.rows[2], queries
    if tree is not None or q_positions is not None:
        back = _take_tree(p, tokens, queries, tree, q_positions, mask, keep)
    if out is not None:
        result = _check_out(out, p.shape, p.number, where)
    else:  # a plan may be of a type that results cannot have
        result = _core.scratch(where, p.shape, p.number) if p.is_planned else p.empty()
    view = target = result if p.heads_first else result.swapaxes(1, 2)
    p.heads_first = True
    wide = _arithmetic(p.number)
    apart = _beyond(p, tokens, keep) if keep else 0
    join = apart > 0 and len_q == 1 and isinstance(queries, int)
    join = join and (tokens.starts is tree is mask is bias is alibi_slopes is None)
    keys = find(where, p.left, back, join)
    beams = p.rows[0] // batch if p.rows[0] != batch else 1
    if beams > 1 and keys.runs is not None:
        keys, tokens = _each_beam(p, keys, tokens)
    p.k, p.v = keys.k, keys.v
    if keys.seen is not None:
        tokens = Tokens(keys.seen, 0, int(keys.seen.max()))
        p.left = p.right = None
        apart = 0
    rotated = form.rotate and not (view.dtype.num == wide and view.flags.carray)
    if rotated or (apart and p.number != wide):  # rounded once, when all is there
        target = _core.empty(where, p.rows + view.shape[3:], wide)
    elif out is not None and _problem.overlaps(p, view):
        target = _core.scratch(where, view.shape, view.dtype.num)
    lse = _core.empty(where, p.rows, wide) if return_lse or apart else None
    plans = []
    if apart:
        p.extras = p.extras or Extras()
        first = np.empty_like(target), np.empty_like(lse)
        plans.append(_see_kept(p, tokens.lengths, queries, apart, *first))
        spans = np.full((batch, len_q, 2), (apart, tokens.most), np.int64)
        p.extras = p.extras._replace(spans=spans, sinks=None)  # the first has these
    _place(p, keys, tokens)
    report = _problem.forward(p, target, lse) if beams == 1 else _forward_beams(p, beams, target, lse)
    if report is not None:
        planned = _problem.Planned(p, report, view if apart or form.rotate else target, None if out is None else result)
        planned.also += plans
        planned.longest = longest
        stored = batch, form.kv_heads, longest
        planned.shapes = {"k": (*stored, form.dim), "v": (*stored, form.dim_v)}
        return planned
    if apart:
        target[...], lse = merge_partials([first[0], target], [first[1], lse])
    if form.rotate:
        form.v.rotate_back(target)
    if target is not view:
        with np.errstate(all="ignore"):  # rounding is silent, as that of the core
            view[...] = target
    result = _returned(result, out)
    return (result, lse) if return_lse else result


def _each_beam(p: Problem, keys: Keys, tokens: Tokens) -> tuple[Keys, Tokens]:
    """Keys as runs, and tokens, of every sequence of q, several of which may be beams of one of the cache."""
    beams = p.rows[0] // len(tokens.lengths)
    starts = None if tokens.starts is None else np.repeat(tokens.starts, beams)
    if starts is not None and p.extras is not None:
        p.extras = p.extras._replace(starts=starts)
    if keys.runs is None or keys.run_of is None:
        rows = [[b * keys.k.strides[0], b * keys.v.strides[0], 0, tokens.most] for b in range(len(tokens.lengths))]
        table, run_of = np.array(rows, np.int64), np.arange(len(rows) + 1)
    else:
        table, run_of = keys.runs, keys.run_of
    of_each = [np.arange(first, end) for first, end in itertools.pairwise(run_of) for _ in range(beams)]
    ends = np.cumsum([0, *map(len, of_each)], dtype=np.int64)
    tokens = tokens._replace(lengths=np.repeat(tokens.lengths, beams), starts=starts)
    return keys._replace(runs=table[np.concatenate(of_each)], run_of=ends), tokens


def _forward_beams(p: Problem, beams: int, out: Array, lse: Array | None) -> Any:
    """Attention of sequences b r ... b r + r - 1 of q over sequence b of the cache, into out and lse."""
    split = p.rows[0] // beams, beams

    def apart(x: Array | None) -> Any:
        return x if x is None or x.ndim < 4 or len(x) == 1 else x.reshape(split + x.shape[1:])

    def each(x: Array | None) -> Any:
        return x if x is None or len(x) != split[0] else np.repeat(x, beams)

    if p.extras is not None:
        p.extras = p.extras._replace(
            mask=apart(p.extras.mask), bias=apart(p.extras.bias), starts=each(p.extras.starts)
        )
    if p.k.ndim == 4:  # else runs, which are there for each
        p.k, p.v = p.k[:, np.newaxis], p.v[:, np.newaxis]
    p.q, p.rows, p.shape = p.q.reshape(split + p.q.shape[1:]), split + p.rows[1:], split + p.shape[1:]
    p.lengths = each(p.lengths)
    return _problem.forward(p, out.reshape(split + out.shape[1:]), None if lse is None else lse.reshape(p.rows))


def _see_kept(p: Problem, lengths: Array, queries: Any, n: int, out: Array, lse: Array | None) -> Any:
    """Attention over the first n keys alone, whatever the window, into out and lse."""
    by_key = ("bias",) if p.extras.mask_from is not None else ("mask", "bias")
    cut = {name: x[..., :n] for name in by_key if (x := getattr(p.extras, name)) is not None}
    if p.extras.starts is not None:
        cut["starts"] = np.minimum(p.extras.starts, n)
    kept = Problem(
        p.where, p.q, p.k[:, :, :n], p.v[:, :, :n], True, p.shape, p.rows, p.scale, None, p.right, lengths - queries,
        np.minimum(lengths, n), p.extras._replace(**cut), p.threads, p.isa, p.counters,
    )  # fmt: skip
    return _problem.forward(kept, out, lse)
