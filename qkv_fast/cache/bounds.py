"""Attention that leaves out keys, and proves how little they weigh.

A copy of the keys in int8 says what each score is but for half a step for each element of the query, so what each
weight is but for a factor. The core then chooses the keys that have to be read (src/choose.c); attention is over these
alone.
"""

import contextlib
import copy
import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from .. import _core, _problem
from .._checks import Array, _check_out
from .._core import Problem
from .._masks import Extras
from .attend import Held, Keys, Tokens, _newest, ask_newest, attend_newest
from .types import Form, Rows

_LOG2E = 1.0 / math.log(2.0)
_MOST_READ = 0.35  # of the keys: beyond that it takes longer to bring them together than to read all
_SAMPLED = 16  # one key of so many, the newest, says whether it is worth looking at the others
_WORTH_SAMPLING = 8192  # tokens of a sequence
_LARGEST_SCALE = np.float32(2.0**121)  # of int8 rows, beyond which elements are cut off (src/cache.c)
_NORMAL = np.float32(2.0**-126)  # what is less may be taken as 0, steps too
_MOST_ROWS = 32  # of a key head: what is known of the keys of more would take more room than the keys
_UNIT = 2.0**-24  # of float32


class Bounds:
    """The int8 copy of a slab's keys, the steps of its rows, infinite where a token has to be read, and the largest
    magnitude of each head's values."""

    def __init__(self, batch: int, kv_heads: int, capacity: int, dim: int) -> None:
        self.stored = Rows(dim, dim, np.dtype(np.uint8), "int8")
        self.rows = np.empty((batch, kv_heads, capacity, self.stored.width), np.uint8)
        self.steps = np.empty((batch, kv_heads, capacity, 1), np.float32)
        self.largest = np.zeros((batch, kv_heads), np.float64)
        self._rooms: deque[tuple[Array, Array]] = deque(maxlen=1)

    def borrow(self, weights: int, keys: int) -> tuple[Array, Array]:
        """Room for so many weights and keys, which the last call has left: new pages took half of a call's time."""
        with contextlib.suppress(IndexError):
            room = self._rooms.pop()  # at once, whoever else attends
            if room[0].size >= weights and room[1].size >= keys:
                return room
        return np.empty(weights, np.float32), np.empty(keys, np.int64)

    def give_back(self, room: tuple[Array, Array]) -> None:
        self._rooms.append(room)

    @property
    def form(self) -> Form:
        """Of the problem whose weights are those that the copy gives."""
        rows = self.stored
        return Form(self.rows.shape[1], rows.dim, 0, rows, rows._replace(dim=0), (), ("int8", "int8"), False, False)

    def take(self, sequences: slice, tokens: slice, k: Array, v: Array) -> None:
        """What is known of the stored rows k and v of these tokens."""
        with np.errstate(all="ignore"):
            keys = k.astype(np.float32)
            finite: Any = np.isfinite(keys).all(axis=-1) & np.isfinite(v).all(axis=-1)
            keys[~finite] = 0
            rows = self.rows[sequences, :, tokens]
            self.stored.write(rows, keys)
            scales = np.ascontiguousarray(rows[..., -4:]).view(np.float32)
            known = finite[..., np.newaxis] & (scales < _LARGEST_SCALE)
            steps = np.where(scales < _NORMAL, 256 * _NORMAL, scales)  # half of which is more than 127 that read as 0
            self.steps[sequences, :, tokens] = np.where(known, steps, np.inf)
            most = np.abs(v.astype(np.float64)).max((2, 3), initial=0)
            most[np.isnan(most)] = np.inf
        self.largest[sequences] = np.maximum(self.largest[sequences], most)

    def first(self, n: int) -> "Bounds":
        """Those of the first n sequences, in the same memory."""
        some = copy.copy(self)
        some.rows, some.steps, some._rooms = self.rows[:n], self.steps[:n], deque(maxlen=1)
        return some


def check_tolerance(where: str, tolerance: Any) -> float:
    if isinstance(tolerance, (bool, np.bool_)) or not isinstance(tolerance, (int, float, np.integer, np.floating)):
        raise TypeError(f"{where}: tolerance must be a number, got {tolerance!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"{where}: tolerance must be above 0 and below 1, a share of all weights, got {tolerance!r}")
    return float(tolerance)


class _Chosen(NamedTuple):
    keys: Array  # (batch, kv_heads, keys): those to read, rising, as far as the counts go
    counts: Array  # (batch, kv_heads)
    left: Array  # (batch, Hq, L): what share of its weights the others have at most
    weights: Array  # (batch, kv_heads, rows of a head, keys): bounds of all weights, below 0 where the key is read


def attend_within(
    where: str, held: Held, bounds: Bounds, tolerance: Any, q: Any, lengths: Any, mask: Any, bias: Any, causal: Any,
    window: Any, alibi_slopes: Any, sinks: Any, softcap: Any, scale: Any, layout: str, return_lse: bool,
    out: Array | None, num_threads: int | None, words: dict[str, Any],
) -> Any:  # fmt: skip
    """Attention that leaves out at most a share `tolerance` of the weights of each query, as (out, left, read) or
    (out, lse, left, read)."""
    tolerance = check_tolerance(where, tolerance)
    form, tokens, find, _, _ = held
    p, queries = _newest(
        where, form, tokens, None, form.dim_v, q, lengths, mask, bias, causal, window, alibi_slopes, sinks, softcap,
        scale, layout, num_threads, words,
    )  # fmt: skip
    if out is not None:
        _check_out(out, p.shape, p.number, where)
    found = None
    rows = p.rows[1] // form.kv_heads * p.rows[2]
    if tokens.most and math.prod(p.rows) and rows <= _MOST_ROWS and not p.is_planned:
        room = bounds.borrow(math.prod(p.rows) * tokens.most, len(bounds.rows) * form.kv_heads * tokens.most)
        chosen = _choose(p, bounds, tokens, queries, causal, window, tolerance, room)
        if chosen is not None:
            keys = find(where, None, queries, False)
            found = _attend_chosen(p, tokens, queries, chosen, keys, softcap, return_lse, out, num_threads)
        bounds.give_back(room)
    if found is None:
        found = attend_newest(
            where, held, q, lengths, mask, bias, causal, window, alibi_slopes, sinks, softcap, scale, layout,
            return_lse, out, num_threads, words,
        )  # fmt: skip
        if not p.is_planned:
            left = np.zeros(p.rows, np.float32)
            found = (*found, left, 1.0) if return_lse else (found, left, 1.0)
    return found


def _attend_chosen(
    p: Problem, tokens: Tokens, queries: Any, chosen: _Chosen, keys: Keys, softcap: Any, return_lse: bool,
    out: Array | None, num_threads: int | None,
) -> Any:  # fmt: skip
    """Attention over the chosen keys, which are brought together."""
    most = int(chosen.counts.max())
    k, v = (_core.gather(x, chosen.keys, chosen.counts, most, p.threads) for x in (keys.k, keys.v))
    if k.dtype != v.dtype:  # of caches alone; float16 and bfloat16 meet in float32
        wide = max(k.dtype, v.dtype, np.dtype(np.float32), key=lambda dtype: dtype.itemsize)
        k, v = k.astype(wide), v.astype(wide)
    seen, added = _meet(p, tokens, queries, chosen, most)
    extras = p.extras or Extras()
    own = _problem.check(
        p.where, p.q, k, v, seen, added, False, None, None, None, extras.queries, None, None, None, None, extras.sinks,
        softcap, p.scale, "bhld", num_threads, {},
    )  # fmt: skip
    target = out if out is None or p.heads_first else out.swapaxes(1, 2)
    found = _problem.attend(own, target, return_lse)
    result, *lse = found if return_lse else (found,)
    if not p.heads_first:
        result = result.swapaxes(1, 2) if out is None else out
    read = chosen.counts.sum() / (tokens.lengths.sum() * chosen.counts.shape[1])
    return (result, *lse, chosen.left, float(read))


def _choose(
    p: Problem, bounds: Bounds, tokens: Tokens, queries: Any, causal: Any, window: Any, tolerance: float,
    room: tuple[Array, Array],
) -> _Chosen | None:  # fmt: skip
    """The keys to read; None where that is all of them, or so many that all are read sooner."""
    n = tokens.most
    if n >= max(_WORTH_SAMPLING, _SAMPLED * p.rows[2]) and tokens.least == n and tokens.starts is None:
        if _choose_of(p, bounds, tokens, queries, causal, window, tolerance, room, n // _SAMPLED) is None:
            return None
    return _choose_of(p, bounds, tokens, queries, causal, window, tolerance, room, n)


def _choose_of(
    p: Problem, bounds: Bounds, tokens: Tokens, queries: Any, causal: Any, window: Any, tolerance: float,
    room: tuple[Array, Array], n: int,
) -> _Chosen | None:  # fmt: skip
    """The same if the newest n tokens were all; those of the longest sequence are."""
    first = tokens.most - n
    extras, lengths = p.extras or Extras(), tokens.lengths
    mask, bias = (x if x is None or x.shape[-1] == 1 else x[..., first:] for x in (extras.mask, extras.bias))
    if first:
        lengths = np.full_like(lengths, n)
        tokens = Tokens(lengths, n, n, None)

    def find(*_: Any) -> Keys:
        return Keys(rows := bounds.rows[:, :, first : first + n], rows)

    q = p.q.astype(np.float32) if p.q.dtype.itemsize > 4 else p.q
    own = ask_newest(
        p.where, (bounds.form, tokens, find, None, 0), q, extras.queries, None, None, mask, bias, causal, window,
        extras.slopes, extras.sinks, extras.softcap or None, p.scale, "bhld", p.threads, {},
    )  # fmt: skip
    weights = room[0][: math.prod(p.rows) * n].reshape(*p.rows, n)
    if extras.queries is not None:
        weights[...] = 0  # rows past them are left alone
    _core.forward(own, own.empty(), None, _core.QUESTIONS["rows"], weights, quick=True)
    heads = bounds.rows.shape[1]
    by_head = (p.rows[0], heads, p.rows[1] // heads * p.rows[2])
    weights = weights.reshape(*by_head, n)
    steps = bounds.steps[:, :, first : first + n, 0]
    reach, slack = (x.reshape(by_head) for x in _errors(p, bias, n))
    keys = room[1][: len(lengths) * heads * n].reshape(len(lengths), heads, n)
    counts, left = _core.choose(weights, reach, slack, steps, lengths, tolerance, keys, p.threads)
    if (counts < 0).any() or counts.sum() > _MOST_READ * heads * lengths.sum():
        return None
    return _Chosen(keys, counts, left.reshape(p.rows), weights)


def _errors(p: Problem, bias: Array | None, n: int) -> tuple[Array, Array]:
    """By how many powers of two the weight of a key may be off, for each step of its row, and whatever its step:
    (batch, Hq, L) float32 each."""
    extras, dim = p.extras or Extras(), p.q.shape[-1]
    with np.errstate(all="ignore"):
        sizes = np.abs(p.q).sum(-1, dtype=np.float64) * abs(p.scale)  # a score's, for each unit of its key's elements
        # Half a step; and roundings of products and sums, there and here, of at most 127 steps an element; and elements
        # of the query that read as 0.
        reach = sizes * (0.5 + 2 * (dim + 16) * 127 * _UNIT) + 2 * dim * 127 * float(_NORMAL) * abs(p.scale)
        reach = reach * _LOG2E
        added = 0.0
        if bias is not None:
            added = float(np.abs(bias, where=np.isfinite(bias), out=np.zeros(bias.shape)).max(initial=0))
        slopes: Any = 0.0 if extras.slopes is None else np.abs(extras.slopes)[:, np.newaxis] * (n + p.rows[2])
        # Their roundings; and those of differences of scores, of up to 88 where a weight is not 0, and of exp2.
        slack = np.broadcast_to((16 * (added + slopes + extras.softcap) + 512) * _UNIT * _LOG2E, p.rows)
        up = np.float32(np.inf)
        return np.nextafter(reach.astype(np.float32), up), np.nextafter(slack.astype(np.float32), up)


def _meet(
    p: Problem, tokens: Tokens, queries: Any, chosen: _Chosen, most: int
) -> tuple[Array, Array | None]:
    """What the scores of the keys that are read meet: who sees them, and what is added to them."""
    heads = p.rows[1]
    among = np.arange(most) < chosen.counts[..., np.newaxis]
    keys = np.where(among, chosen.keys[..., :most], 0)
    seen = (np.take_along_axis(chosen.weights, keys[:, :, np.newaxis], -1) < 0) & among[:, :, np.newaxis]
    seen = seen.reshape(*p.rows, most)
    extras = p.extras or Extras()
    if extras.bias is None and extras.slopes is None:
        return seen, None
    wide = np.float64 if p.q.dtype.itemsize > 4 else np.float32
    added = np.zeros(seen.shape, wide)
    of_head = np.repeat(keys, heads // keys.shape[1], axis=1)[:, :, np.newaxis]  # (batch, Hq, 1, keys)
    if extras.slopes is not None:
        own = np.arange(p.rows[2]) + (tokens.lengths - queries)[:, np.newaxis]  # positions (batch, L)
        far = np.abs(own[:, np.newaxis, :, np.newaxis] - of_head)
        added -= extras.slopes[:, np.newaxis, np.newaxis] * far
    if extras.bias is not None:
        bias = np.broadcast_to(extras.bias, (*p.rows, extras.bias.shape[-1]))
        at = of_head if bias.shape[-1] > 1 else np.zeros_like(of_head)
        added += np.take_along_axis(bias, np.broadcast_to(at, seen.shape), -1)
    return seen, added
