"""Attention that leaves out keys, and proves how little they weigh.

A copy of the keys in int8, or their own rows where these are of int8 or int4, says what each score is but for half a
step for each element of the query, so what each weight is but for a factor. The core then chooses the keys that have to
be read (src/choose.c); attention is over these alone.
"""

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import _core, _problem
from .._checks import Array, _check_out, _returned
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
_MOST_KEPT = 16 << 20  # bytes of rows that are brought together: room for the next call
_MOST_ROWS = 32  # of a key head: what is known of the keys of more would take more room than the keys
_UNIT = 2.0**-24  # of float32
_FAR = 1e6  # what a bias less than this, with a minus sign, is added to weighs nothing


class Bounds:
    """What is known of stored rows: an int8 copy of the keys, unless they are of int8 or int4 themselves, the steps of
    its rows, infinite where a token has to be read, and the largest magnitude of values, of each head of a sequence or,
    in a pool, of each row."""

    def __init__(self, form: Form, *rows: int) -> None:
        self._form = form
        copied = Rows(form.dim, form.dim, np.dtype(np.uint8), "int8")
        self.keys = form.k._replace(turn=-1) if form.k.stored else copied
        self.rows = None if form.k.stored else np.empty((*rows, copied.width), np.uint8)
        self.steps = np.empty((*rows, 1), np.float32)
        self.largest = np.zeros(rows[:2], np.float64)
        self.tops = np.empty((*rows, 1), np.float64) if len(rows) == 2 else None
        self._forget()

    def _forget(self) -> None:
        self._rooms: deque[tuple[Array, Array]] = deque(maxlen=1)
        self._row_rooms: deque[Array] = deque(maxlen=1)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What has a row for each of the cache's."""
        return tuple(x for x in (self.rows, self.steps, self.tops) if x is not None)

    def borrow(self, weights: int, keys: int) -> tuple[Array, Array]:
        """Room for so many weights and keys, which the last call has left: new pages took half of a call's time."""
        with contextlib.suppress(IndexError):
            room = self._rooms.pop()  # at once, whoever else attends
            if room[0].size >= weights and room[1].size >= keys:
                return room
        return np.empty(weights, np.float32), np.empty(keys, np.int64)

    def give_back(self, room: tuple[Array, Array]) -> None:
        self._rooms.append(room)

    def borrow_rows(self, size: int) -> Array:
        """The same for rows that are brought together, in bytes."""
        with contextlib.suppress(IndexError):
            room = self._row_rooms.pop()
            if room.size >= size:
                return room
        return np.empty(size, np.uint8)

    def give_rows_back(self, room: Array) -> None:
        if room.size <= _MOST_KEPT:
            self._row_rooms.append(room)

    @property
    def form(self) -> Form:
        """Of the problem whose weights are those that the rows give."""
        kind = self.keys.stored
        heads, dim, values = self._form.kv_heads, self._form.dim, self.keys._replace(dim=0)
        return Form(heads, dim, 0, self.keys, values, (), (kind, kind), latent=False, rotate=False)

    def take(self, at: tuple[slice, ...], k: Array, v: Array) -> None:
        """What is known of the stored rows k and v, which are these of the cache's."""
        with np.errstate(all="ignore"):
            keys = self._form.k._replace(turn=-1).read(k).astype(np.float32)
            values = np.abs(self._form.v.read(v).astype(np.float64)).max(-1, initial=0)
            values[np.isnan(values)] = np.inf
            finite: Any = np.isfinite(keys).all(axis=-1) & np.isfinite(values)
            keys[~finite] = 0
            if self.rows is None:
                scales = np.nextafter(np.abs(keys).max(-1, keepdims=True) / np.float32(127), np.float32(np.inf))
            else:
                self.keys.write(self.rows[at], keys)
                scales = np.ascontiguousarray(self.rows[at][..., -4:]).view(np.float32)
            known = finite[..., np.newaxis] & (scales < _LARGEST_SCALE)
            self.steps[at] = np.where(known, np.maximum(scales, self._least), np.inf)
            if self.tops is not None:
                self.tops[at] = values[..., np.newaxis]
            else:
                self.largest[at[0]] = np.maximum(self.largest[at[0]], values.max(-1, initial=0))

    @property
    def _least(self) -> np.float32:
        """Of steps: what they are counted as is then more than elements that read as 0 because they are less than the
        smallest number: of up to 127 such, half a step; of rows of their own, the roundings of a product."""
        return (4096 if self.rows is None else 256) * _NORMAL

    def first(self, n: int) -> "Bounds":
        """Those of the first n sequences, in the same memory."""
        some = copy.copy(self)
        some.rows, some.steps = None if self.rows is None else self.rows[:n], self.steps[:n]
        some._forget()
        return some


def _whole_lines(size: int) -> int:
    """Bytes to the end of a cache line."""
    return -(-size // 64) * 64


class Stored(NamedTuple):
    """Where a call finds its keys: k, v, what is known of them and its steps are (batch, kv_heads, rows, width), or
    without the batch."""

    k: Array
    v: Array
    known: Array
    steps: Array
    tokens: Tokens  # that queries may see
    left: int | None
    right: int | None
    row_of: Array | None = None  # (batch, tokens): the row of each; None: its number

    def pick(self, first: int, n: int) -> tuple[Keys, Array]:
        """The known rows of tokens first .. first + n as keys, and their steps, (batch, heads, n)."""
        if self.row_of is None:
            rows = self.known[:, :, first : first + n]
            return Keys(rows, rows), self.steps[:, :, first : first + n, 0]
        own, table, run_of = self.row_of[:, first : first + n], [], [0]
        step, row = (self.known.strides[0] if self.known.ndim == 4 else 0), self.known.strides[-2]
        for b, places in enumerate(own):
            breaks = np.flatnonzero(np.diff(places) != 1) + 1
            begins = np.concatenate([[0], breaks]) if len(places) else breaks
            bytes_to = b * step + places[begins] * row
            table.append(np.stack([bytes_to, bytes_to, begins, np.diff(begins, append=len(places))], 1))
            run_of.append(run_of[-1] + len(begins))
        if self.steps.ndim == 4:
            steps = np.take_along_axis(self.steps[..., 0], own[:, np.newaxis], 2)
        else:
            steps = np.ascontiguousarray(self.steps[:, own, 0].swapaxes(0, 1))
        return Keys(self.known, self.known, np.concatenate(table), np.array(run_of, np.int64)), steps

    def room_for(self, chosen: "_Chosen") -> int:
        """Bytes of what `bring` makes."""
        return sum(_whole_lines(chosen.rows * x.shape[-1] * x.itemsize) for x in (self.k, self.v))

    def bring(self, form: Form, chosen: "_Chosen", threads: int, room: Array) -> list[Array]:
        """Keys and values that are read, as numbers (batch, heads, keys, dim); keys as rotated queries meet them. Those
        that are stored as numbers lie in `room`."""
        most, rows = int(chosen.counts.max()), chosen.keys
        if self.row_of is not None:
            among = np.arange(most) < chosen.counts[..., np.newaxis]
            rows = np.take_along_axis(self.row_of[:, np.newaxis], np.where(among, rows[..., :most], 0), 2)
        made = []
        for x, of in ((self.k, form.k._replace(turn=-1)), (self.v, form.v)):
            x = x if x.ndim == 4 else np.broadcast_to(x, (len(rows), *x.shape))
            size = chosen.rows * x.shape[-1] * x.itemsize
            stored = room[:size].view(x.dtype).reshape(*chosen.counts.shape, most, x.shape[-1])
            room = room[_whole_lines(size) :]
            _core.gather(x, rows, chosen.counts, stored, threads)
            made.append(of.read(stored))
        return made


# Of a problem, its tokens and its queries, one number or one each: where they are found, or None: nowhere in order.
Place = Callable[[Problem, Tokens, Any], Stored | None]


def check_bounds(where: str, bounds: Bounds | None, tree: Any, positions: Any) -> Bounds:
    if bounds is None:
        raise ValueError(f"{where}: tolerance is for a cache that was made with bounds=True")
    if tree is not None:
        raise ValueError(f"{where}: tree and tolerance exclude each other: pass the tree as a mask")
    if positions is not None:
        raise ValueError(f"{where}: q_positions are those of a tree, which tolerance excludes")
    return bounds


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
    # (batch, kv_heads, rows of a head, keys): bounds of all weights, below 0 where the key is read; None: all see all
    weights: Array | None

    @property
    def rows(self) -> int:
        """Rows of keys where every head has as many as the one that reads most."""
        return self.counts.size * int(self.counts.max())


def attend_within(
    where: str, held: Held, bounds: Bounds, place: Place, tolerance: Any, q: Any, lengths: Any, mask: Any, bias: Any,
    causal: Any, window: Any, alibi_slopes: Any, sinks: Any, softcap: Any, scale: Any, layout: str, return_lse: bool,
    out: Array | None, num_threads: int | None, words: dict[str, Any], new: int | None = None,
) -> Any:  # fmt: skip
    """Attention that leaves out at most a share `tolerance` of the weights of each query, as (out, left, read) or
    (out, lse, left, read)."""
    tolerance = check_tolerance(where, tolerance)
    form, tokens, find, limit, _ = held
    p, queries = _newest(
        where, form, tokens, limit, form.dim_v, q, lengths, mask, bias, causal, window, alibi_slopes, sinks, softcap,
        scale, layout, num_threads, words, new=new, beams=True,
    )  # fmt: skip
    memory = None if out is None else _check_out(out, p.shape, p.number, where)
    if out is None:
        _core.check_result(where, p.number)
    found = None
    few = p.rows[1] // form.kv_heads * p.rows[2] <= _MOST_ROWS and p.rows[0] == len(tokens.lengths)  # and no beams
    if few and tokens.most and math.prod(p.rows) and not p.is_planned:
        find(where, p.left, queries, False)  # a step appends
        stored = place(p, tokens, queries)
        if stored is not None:
            most = stored.tokens.most
            room = bounds.borrow(math.prod(p.rows) * most, p.rows[0] * form.kv_heads * most)
            chosen = _choose(p, bounds, stored, queries, tolerance, room)
            if chosen is not None:
                rows = bounds.borrow_rows(stored.room_for(chosen))
                found = _attend_chosen(
                    p, form, stored, queries, chosen, rows, softcap, return_lse, memory, num_threads,
                )  # fmt: skip
                bounds.give_rows_back(rows)
                found = (_returned(found[0], out), *found[1:])
            bounds.give_back(room)
    if found is None:
        found = attend_newest(
            where, held, q, lengths, mask, bias, causal, window, alibi_slopes, sinks, softcap, scale, layout,
            return_lse, out, num_threads, words, None, None, new,
        )  # fmt: skip
        if not p.is_planned:
            left = np.zeros(p.rows, np.float32)
            found = (*found, left, 1.0) if return_lse else (found, left, 1.0)
    return found


def _attend_chosen(
    p: Problem, form: Form, stored: Stored, queries: Any, chosen: _Chosen, room: Array, softcap: Any, return_lse: bool,
    out: Array | None, num_threads: int | None,
) -> Any:  # fmt: skip
    """Attention over the chosen keys, which are brought together."""
    most, tokens, q = int(chosen.counts.max()), stored.tokens, p.q
    k, v = stored.bring(form, chosen, p.threads, room)
    if k.dtype != v.dtype:  # of caches alone; float16 and bfloat16 meet in float32
        wide = max(k.dtype, v.dtype, np.dtype(np.float32), key=lambda dtype: dtype.itemsize)
        k, v = k.astype(wide), v.astype(wide)
    if q.dtype.itemsize < k.dtype.itemsize:  # of rows that have become float32
        q = q.astype(k.dtype)
    seen, added = _meet(p, tokens, queries, chosen, most)
    extras = p.extras or Extras()
    own = _problem.check(
        p.where, q, k, v, seen, added, False, None, None, None, extras.queries, None, None, None, None, extras.sinks,
        softcap, p.scale, "bhld", num_threads, {},
    )  # fmt: skip
    alike = own.number == p.number
    target = out if out is None or p.heads_first else out.swapaxes(1, 2)
    found = _problem.attend(own, target if alike else None, return_lse)
    result, *lse = found if return_lse else (found,)
    if not alike:
        target = _core.empty(p.where, p.rows + result.shape[3:], p.number) if target is None else target
        with np.errstate(all="ignore"):  # rounding is silent, as that of the core
            target[...] = result
        result = target
    if not p.heads_first:
        result = result.swapaxes(1, 2) if out is None else out
    read = chosen.counts.sum() / (tokens.lengths.sum() * chosen.counts.shape[1])
    return (result, *lse, chosen.left, float(read))


def _choose(
    p: Problem, bounds: Bounds, stored: Stored, queries: Any, tolerance: float, room: tuple[Array, Array]
) -> _Chosen | None:
    """The keys to read; None where that is all of them, or so many that all are read sooner."""
    tokens = stored.tokens
    n = tokens.most
    if n >= max(_WORTH_SAMPLING, _SAMPLED * p.rows[2]) and tokens.least == n and tokens.starts is None:
        if _choose_of(p, bounds, stored, queries, tolerance, room, n // _SAMPLED) is None:
            return None
    return _choose_of(p, bounds, stored, queries, tolerance, room, n)


def _choose_of(
    p: Problem, bounds: Bounds, stored: Stored, queries: Any, tolerance: float, room: tuple[Array, Array], n: int
) -> _Chosen | None:
    """The same if the newest n tokens were all; those of the longest sequence are."""
    tokens = stored.tokens
    first = tokens.most - n
    extras, lengths = p.extras or Extras(), tokens.lengths
    mask, bias = (x if x is None or x.shape[-1] == 1 else x[..., first:] for x in (extras.mask, extras.bias))
    if first:
        lengths = np.full_like(lengths, n)
        tokens = Tokens(lengths, n, n, None, tokens.whole)
    if (pruned := _prune(p, bounds, stored, tokens, tolerance, room[1], first, n)) is not None:
        keys_read, counts, left = pruned
        if counts.sum() > _MOST_READ * keys_read.shape[1] * lengths.sum():
            return None
        return _Chosen(keys_read, counts, left.reshape(p.rows), None)
    keys, steps = stored.pick(first, n)
    bias, is_far = _without_far(p, bias, steps, n)
    window = None if stored.left is stored.right is None else (stored.left, stored.right)
    q = p.q.astype(np.float32) if p.q.dtype.itemsize > 4 else p.q
    own = ask_newest(
        p.where, (bounds.form, tokens, lambda *_: keys, None, 0), q, extras.queries, None, None, mask, bias, False,
        window, extras.slopes, extras.sinks, extras.softcap or None, p.scale, "bhld", p.threads, {},
    )  # fmt: skip
    weights = room[0][: math.prod(p.rows) * n].reshape(*p.rows, n)
    if extras.queries is not None:
        weights[...] = 0  # rows past them are left alone
    nothing = _core.scratch(own.where, own.shape, own.number)
    _core.forward(own, nothing, None, _core.QUESTIONS["rows"], weights, quick=True)
    if is_far and not weights.any(-1).all():
        return None
    heads = steps.shape[1]
    by_head = (p.rows[0], heads, p.rows[1] // heads * p.rows[2])
    weights = weights.reshape(*by_head, n)
    reach, slack = (x.reshape(by_head) for x in _errors(p, bounds, bias, n))
    room_of_keys = room[1][: len(lengths) * heads * n].reshape(len(lengths), heads, n)
    counts, left = _core.choose(weights, reach, slack, steps, lengths, tolerance, room_of_keys, p.threads)
    if (counts < 0).any() or counts.sum() > _MOST_READ * heads * lengths.sum():
        return None
    return _Chosen(room_of_keys, counts, left.reshape(p.rows), weights)


def _prune(
    p: Problem, bounds: Bounds, stored: Stored, tokens: Tokens, tolerance: float, room: Array, first: int, n: int
) -> tuple[Array, Array, Array] | None:
    """Keys to read, how many, and what share of its weights each row leaves, where scores are nothing but products of
    rows that lie side by side, and all are seen; else None. In integers, which is done sooner."""
    extras = p.extras or Extras()
    plain = extras.mask is extras.bias is extras.slopes is extras.queries is None and not extras.softcap
    seen = stored.left is None and (stored.right is None or p.rows[2] == 1)  # a query of the last token
    if not plain or not seen or bounds.rows is None or stored.row_of is not None:
        return None
    batch, heads = p.rows[0], stored.known.shape[1]
    with np.errstate(all="ignore"):  # what float32 cannot hold is infinite, and nothing is known then
        q = np.ascontiguousarray(p.q, np.float32).reshape(batch, heads, -1, p.q.shape[-1])
    rows, steps = stored.known[:, :, first : first + n], stored.steps[:, :, first : first + n, 0]
    keys = room[: batch * heads * n].reshape(batch, heads, n)
    counts, left = _core.prune(
        q, rows, steps, tokens.starts, tokens.lengths, p.scale, tolerance, keys, p.threads, p.isa
    )
    return None if (counts < 0).any() else (keys, counts, left)


def _without_far(p: Problem, bias: Array | None, steps: Array, n: int) -> tuple[Array | None, bool]:
    """A bias with -inf where a large finite number means it, and whether there is such a one: keys that weigh nothing
    beside any other key. What the others of a row, if it has any, then weigh is as if those were hidden; but a row
    that has no others shares its weight among them."""
    if bias is None:
        return None, False
    far = (bias < np.float32(-_FAR)) & (bias > -np.inf)
    if not far.any():
        return bias, False
    extras = p.extras or Extras()
    sizes = np.abs(p.q).sum(-1, dtype=np.float64).max(initial=0) * abs(p.scale)
    widest = 128 * float(np.where(np.isfinite(steps), steps, 0).max(initial=0)) * sizes  # that a score can be
    steepest = 0.0 if extras.slopes is None else float(np.abs(extras.slopes).max()) * (n + p.rows[2])
    near = float(np.abs(bias, where=np.isfinite(bias) & ~far, out=np.zeros(bias.shape)).max(initial=0))
    sink = 0.0 if extras.sinks is None else float(np.abs(extras.sinks).max(initial=0, where=np.isfinite(extras.sinks)))
    if not 2 * widest + 2 * steepest + near + sink < _FAR / 2 or not np.isfinite(steps).all():
        return bias, False
    return np.where(far, -np.inf, bias).astype(bias.dtype), True


def _errors(p: Problem, bounds: Bounds, bias: Array | None, n: int) -> tuple[Array, Array]:
    """By how many powers of two the weight of a key may be off, for each step of its row, and whatever its step:
    (batch, Hq, L) float32 each."""
    extras, dim = p.extras or Extras(), p.q.shape[-1]
    with np.errstate(all="ignore"):
        sizes = np.abs(p.q).sum(-1, dtype=np.float64) * abs(p.scale)  # a score's, for each unit of its key's elements
        half = 0.5 if bounds.rows is not None else 0.0
        # Half a step of a copy; roundings of products and sums, there and here, of at most 127 steps an element; and
        # elements of the query that read as 0.
        reach = sizes * (half + 2 * (dim + 16) * 127 * _UNIT) + 2 * dim * 127 * float(_NORMAL) * abs(p.scale)
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
    seen = among[:, :, np.newaxis]
    if chosen.weights is None:
        return np.repeat(seen, heads // keys.shape[1] * p.rows[2], 2).reshape(*p.rows, most), None
    seen = seen & (np.take_along_axis(chosen.weights, keys[:, :, np.newaxis], -1) < 0)
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
