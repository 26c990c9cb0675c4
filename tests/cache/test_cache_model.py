"""Caches against a plain model: lists of tokens. Random appends, cuts, reorders, wraps and forks, by hypothesis.
Questions are held to their own rule.

The model stores what a cache of the type gives back: numbers rounded to it, dequantised for int8 and int4. The result
is that of `attention` over them for each sequence alone, to the last bit, and that of `reference.attention` by the
error rule. By the rule alone: quantised rows, whose kernels may multiply by a scale after a sum, keys and values of two
types, which `attention` does not take, and rings that have lost sight of kept tokens of some sequence.
Memory starts as NaN, which must never show.
"""

import copy
import os
import re
import tempfile
from typing import NamedTuple

import numpy as np
import pytest
from _quantised import QUANTISED, as_stored
from _questions import OF_CACHES, hold
from _util import ALL_TYPES, compare, normal, same_bits
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import qkv_fast

DIM, DIM_V = 8, 4
TURNS = settings(stateful_step_count=25, max_examples=max(10, settings.default.max_examples // 2))


class Rows(NamedTuple):
    """What a cache makes of keys and values."""

    dtype: str
    value_dtype: str
    latent: bool
    rotate: bool

    @property
    def is_exact(self):
        """Whether attention over the tokens is to have the same bits."""
        return self.dtype == self.value_dtype and self.dtype not in QUANTISED

    def store(self, k, v):
        k = as_stored(k, self.dtype, (DIM_V if self.latent else 0) if self.rotate else None)
        return k, k[..., :DIM_V] if self.latent else as_stored(v, self.value_dtype, 0 if self.rotate else None)

    def given(self, k, v):
        """What append takes."""
        return (k,) if self.latent else (k, v)


class Model:
    """The tokens of one sequence in a cache with such rows: k (kv_heads, n, DIM) and v."""

    def __init__(self, heads, rows):
        self.rows = rows
        self.k, self.v = rows.store(*(np.empty((heads, 0, dim), "float32") for dim in (DIM, DIM_V)))
        self.start = 0

    def __len__(self):
        return self.k.shape[1]

    def cut(self, n):
        cut = Model.__new__(Model)
        cut.rows = self.rows
        cut.k, cut.v = self.k[:, :n], self.v[:, :n]
        cut.start = min(self.start, len(cut))
        return cut

    def take(self, tokens):
        taken = self.cut(None)
        taken.k, taken.v = self.k[:, tokens], self.v[:, tokens]
        taken.start = min(self.start, len(taken))
        return taken

    def grow(self, k, v):
        k, v = self.rows.store(k, v)
        self.k, self.v = np.concatenate([self.k, k], 1), np.concatenate([self.v, v], 1)

    def check(self, got, q, exact=True, kept=0, window=None, **options):
        """(out, lse) of the queries q, which are the newest tokens, in a ring's window and kept tokens if it is one."""
        if q.shape[1] == 0:
            return
        inputs, options = (q, self.k, self.v), self.meant(q.shape[1], kept, window, **options)
        if "mask" not in options and exact and self.rows.is_exact:
            same_bits(got, qkv_fast.attention(*inputs, return_lse=True, **options))
        compare(got, inputs, **options)

    def meant(self, count, kept, window, tree=None, q_positions=None, **options):
        """What so many newest queries see, as arguments of `attention`: with a mask where that has no others."""
        n, options = len(self), dict(options, kv_starts=self.start)
        if tree is None and not (kept and n - 1 > window):
            return dict(options, causal=True, window=window)
        keys, older = np.arange(n), n - count
        at = keys[older:] if q_positions is None else q_positions
        seen = np.hstack([np.ones((count, older), bool), np.tri(count, dtype=bool) if tree is None else tree])
        keys = np.concatenate([keys[:older], at])
        if window is not None:
            seen &= (at[:, None] - keys <= window) | (np.arange(n) < kept)
        if q_positions is not None and "alibi_slopes" in options:
            options["bias"] = -options.pop("alibi_slopes")[:, None, None] * np.abs(at[:, None] - keys)
        return dict(options, mask=seen)

    def check_within(self, got, most, q, kept=0, window=None, **options):
        """(out, left) of an attend with a tolerance, of values of up to `most`."""
        if q.shape[1]:
            out, left = got
            options = self.meant(q.shape[1], kept, window, **options)
            wide = [x.astype("float64") for x in (q, self.k, self.v)]
            exact = qkv_fast.reference.attention(*wide, **options)
            unit = {"float64": 2.0**-40, "bfloat16": 2.0**-6}.get(q.dtype.name, 2.0**-8)  # far from wrong bounds
            slack = unit * max(1, most.max())
            most = np.repeat(most, q.shape[0] // len(most))[:, None, None]
            assert (np.abs(out.astype("float64") - exact) <= 2 * left[..., None] * most + slack).all()

    def check_answer(self, name, got, b, q, kept=0, window=None, **options):
        """The part of an answer that belongs to sequence b and its queries; tokens beyond are worth nothing."""
        n, count = len(self), q.shape[1]
        got = tuple(x[b, :, :count] for x in got) if name == "top_keys" else got[b]
        if name in ("received", "weights"):
            assert not got[..., n:].any()
            got = got[..., :n]
        if name in ("largest", "entropy", "weights"):
            got = got[:, :count]
        if count:
            hold(got, name, q, self.k, **self.meant(count, kept, window, **options))


def draw_rows(data):
    """Rows of a cache, and a type for its queries: of 32 bits or less."""
    types = st.sampled_from([*ALL_TYPES, *QUANTISED])
    dtype, latent = data.draw(types, "dtype"), data.draw(st.integers(0, 2), "latent") == 2
    value_dtype = dtype if latent else data.draw(st.just(dtype) | types, "value_dtype")
    if {dtype, value_dtype} == {"float64", "int8"}:  # what is read back is rounded to float32
        value_dtype = dtype
    both = {dtype, value_dtype}
    rotate = bool(both & {*QUANTISED}) and "float64" not in both and data.draw(st.booleans(), "rotate")
    plain = {dtype, value_dtype} - {*QUANTISED}
    fits = {"float32", "float16", "bfloat16"} if not plain else {*plain, "float32"} if len(plain) == 1 else {"float32"}
    kind = "float64" if "float64" in plain else data.draw(st.sampled_from(sorted(fits)), "queries' type")
    return Rows(dtype, value_dtype, latent, rotate), kind


def draw_tokens(data, heads, rows, batch, most=9):
    n = data.draw(st.integers(0, most), "tokens")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    rng = np.random.default_rng(seed)
    given = [
        "float32" if dtype in QUANTISED else data.draw(st.sampled_from(sorted({dtype, "float32"})), "given")
        for dtype in (rows.dtype, rows.value_dtype)
    ]
    return normal(rng, (batch, heads, n, DIM), given[0]), normal(rng, (batch, heads, n, DIM_V), given[1])


def draw_counts(data, batch, most):
    return data.draw(st.none() | st.lists(st.integers(0, most), min_size=batch, max_size=batch), "lengths")


def draw_queries(data, lengths, heads, dtype):
    """Queries, and how many of them each sequence has."""
    n = data.draw(st.integers(1, 6), "queries")
    most = [min(n, length) for length in lengths]
    counts = [data.draw(st.integers(0, m)) for m in most]
    if all(m == n for m in most) and data.draw(st.booleans()):
        counts = None
    q = normal(np.random.default_rng(n), (len(lengths), heads, n, DIM), dtype)
    return q, counts, [n] * len(lengths) if counts is None else counts


def draw_options(data, heads, lengths, counts, n):
    """For n queries of each sequence, of which `counts` count; sometimes they are a draft in the form of a tree."""
    drawn = {}
    if data.draw(st.integers(0, 3), "tree") == 0:
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "tree's seed"))
        drawn["tree"] = rng.random((len(lengths), n, n)) < 0.6
        if data.draw(st.booleans(), "positions"):
            older = np.subtract(lengths, counts).reshape(-1, 1)
            drawn["q_positions"] = older + rng.integers(-2, n + 3, (len(lengths), n))
    if data.draw(st.booleans()):
        drawn["alibi_slopes"] = np.linspace(0.1, 0.5, heads)
    if data.draw(st.booleans()):
        drawn["sinks"] = np.linspace(-1, 1, heads)
    return drawn


def of_sequence(options, b, n):
    """What of these is about sequence b, which has n queries."""
    own = dict(options)
    if "tree" in own:
        own["tree"] = own["tree"][b, :n, :n]
    if "q_positions" in own:
        own["q_positions"] = own["q_positions"][b, :n]
    return own


def find_firsts(models, counts, options):
    """Where the first queries sit, or their tokens are."""
    own = [of_sequence(options, b, n).get("q_positions", []) for b, n in enumerate(counts)]
    return [min(len(m) - n, *at, len(m)) for m, n, at in zip(models, counts, own, strict=True)]


def hold_step(cache, sequences, q, tokens, lengths, options, **of_append):
    """A step gives what a copy gives that appends and then attends, or its error, and nothing has changed. Returns
    whether it has."""
    other, options = copy.deepcopy(cache), dict(options, return_lse=True)
    try:
        other.append(*sequences, *tokens, lengths=lengths, **of_append)
        expected = other.attend(*sequences, q, lengths=lengths, **options)
    except ValueError as error:
        words = re.escape(str(error).partition(": ")[2])
        with pytest.raises(ValueError, match=rf"\.step: {words}"):
            cache.step(*sequences, q, *tokens, lengths=lengths, **of_append, **options)
        return False
    same_bits(cache.step(*sequences, q, *tokens, lengths=lengths, **of_append, **options), expected)
    return True


@TURNS
class Slab(RuleBasedStateMachine):
    """KVCache, as a slab or a ring."""

    @initialize(data=st.data())
    def make(self, data):
        self.batch, self.heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        self.group = data.draw(st.integers(1, 3))
        self.rows, self.kind = draw_rows(data)
        self.window = data.draw(st.none() | st.integers(1, 12))
        self.keep = 0 if self.window is None else data.draw(st.integers(0, 5))
        least = 1 if self.window is None else self.keep + self.window + 1
        self.capacity = least + data.draw(st.integers(0, 20))
        self.cache = qkv_fast.KVCache(
            self.batch, self.heads, DIM, self.capacity, value_dim=DIM_V, window=self.window, keep=self.keep,
            bounds=data.draw(st.booleans(), "bounds"), **self.rows._asdict(),
        )  # fmt: skip
        poison = np.full((self.batch, self.heads, self.capacity, DIM), np.nan, "float32")
        self.cache.append(*self.rows.given(poison, poison[..., :DIM_V]))
        self.cache.truncate(0)
        self.model = [Model(self.heads, self.rows) for _ in range(self.batch)]

    @rule(data=st.data())
    def append(self, data):
        k, v = draw_tokens(data, self.heads, self.rows, self.batch, most=30 if self.window else 9)
        counts = draw_counts(data, self.batch, k.shape[2])
        added = [k.shape[2]] * self.batch if counts is None else counts
        if self.window is None and any(len(m) + n > self.capacity for m, n in zip(self.model, added, strict=True)):
            with pytest.raises(ValueError, match=f"capacity is {self.capacity}"):
                self.cache.append(*self.rows.given(k, v), lengths=counts)
            return
        starts = None
        if data.draw(st.integers(0, 2)) == 0:
            starts = [0 if len(m) else data.draw(st.integers(0, n)) for m, n in zip(self.model, added, strict=True)]
        self.cache.append(*self.rows.given(k, v), lengths=counts, starts=starts)
        for b, n in enumerate(added):
            self.model[b].start += starts[b] if starts else 0
            self.model[b].grow(k[b, :, :n], v[b, :, :n])

    @rule(data=st.data())
    def truncate(self, data):
        stay = [data.draw(st.integers(0, len(m))) for m in self.model]
        if self.window and any(not self.has(b, n, n) for b, n in enumerate(stay) if n < len(self.model[b])):
            with pytest.raises(ValueError, match="the ring holds"):
                self.cache.truncate(stay)
            return
        self.cache.truncate(stay)
        self.model = [m.cut(n) for m, n in zip(self.model, stay, strict=True)]

    def has(self, b, first, end, start=0):
        """Whether the ring still has what tokens `first` to `end` see of those before `end`, from `start` on."""
        needed = {*range(min(self.keep, end)), *range(max(0, first - self.window), end)} - {*range(start)}
        return needed <= set(self.cache.positions[b].tolist())

    @rule(data=st.data())
    def select(self, data):
        stay = [data.draw(st.integers(0, len(m))) for m in self.model]
        most = min(len(m) - n for m, n in zip(self.model, stay, strict=True))
        index = [data.draw(st.permutations(range(len(m) - n))) for m, n in zip(self.model, stay, strict=True)]
        index = np.array([x[:most] for x in index], int).reshape(self.batch, most)
        counts = draw_counts(data, self.batch, most)
        kept = [row[:n] + s for row, n, s in zip(index, counts or [most] * self.batch, stay, strict=True)]
        if any(own.size and n < m.start for m, own, n in zip(self.model, kept, stay, strict=True)):
            with pytest.raises(ValueError, match="begins at token"):
                self.cache.select(stay, index, counts)
            return
        if self.window and not all(
            set(own.tolist()) <= set(self.cache.positions[b].tolist())
            and (stay[b] == len(self.model[b]) or self.has(b, stay[b], stay[b]))
            for b, own in enumerate(kept)
        ):
            with pytest.raises(ValueError, match="the ring holds"):
                self.cache.select(stay, index, counts)
            return
        self.cache.select(stay, index, counts)
        self.model = [
            m.take([*range(n), *own.tolist()]) for m, n, own in zip(self.model, stay, kept, strict=True)
        ]

    @rule(data=st.data())
    def reorder(self, data):
        """To more or fewer sequences, each of which may have begun as the old one of its number."""
        index = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4))
        start = [0] * len(index)
        if data.draw(st.booleans()):
            common = [self.common(b, i) if b < self.batch else len(self.model[i]) for b, i in enumerate(index)]
            start = [data.draw(st.integers(0, n)) for n in common]
        self.cache.reorder(index, start=start)
        self.model = [self.model[i].cut(None) for i in index]
        self.batch = len(index)

    def common(self, a, b):
        """How many first tokens of two sequences are the same."""
        n = min(len(self.model[a]), len(self.model[b]))
        same = [
            all(np.array_equal(x[:, t], y[:, t], equal_nan=True) for x, y in self.pairs(a, b)) for t in range(n)
        ]
        return n if all(same) else same.index(False)

    def pairs(self, a, b):
        return (self.model[a].k, self.model[b].k), (self.model[a].v, self.model[b].v)

    @rule(data=st.data())
    def attend(self, data):
        heads = self.heads * self.group
        q, lengths, counts = draw_queries(data, [len(m) for m in self.model], heads, self.kind)
        options = draw_options(data, heads, [len(m) for m in self.model], counts, q.shape[2])
        firsts = find_firsts(self.model, counts, options)
        if self.window and not all(self.has(b, firsts[b], len(m), m.start) for b, m in enumerate(self.model) if len(m)):
            with pytest.raises(ValueError, match="the ring holds"):
                self.cache.attend(q, lengths=lengths, **options)
            return
        if self.cache.bounds and "tree" not in options and data.draw(st.booleans(), "tolerance"):
            out, left, _ = self.cache.attend(q * 8, lengths=lengths, tolerance=1e-2, **options)
            assert left.max(initial=0) <= 1e-2
            for b, (m, n) in enumerate(zip(self.model, counts, strict=True)):
                own, most = q[b, :, :n] * 8, np.abs(m.v.astype("float64")).max((1, 2), initial=0)
                m.check_within((out[b, :, :n], left[b, :, :n]), most, own, self.keep, self.window, **options)
            return
        out, lse = self.cache.attend(q, lengths=lengths, return_lse=True, **options)
        exact = not (self.keep and any(len(m) - 1 > self.window for m in self.model))
        for b, (m, n) in enumerate(zip(self.model, counts, strict=True)):
            own = of_sequence(options, b, n)
            m.check((out[b, :, :n], lse[b, :, :n]), q[b, :, :n], exact, self.keep, self.window, **own)
            assert not out[b, :, n:].any()

    @rule(data=st.data())
    def step(self, data):
        k, v = draw_tokens(data, self.heads, self.rows, self.batch)
        n, heads = k.shape[2], self.heads * self.group
        counts = draw_counts(data, self.batch, n)
        added = [n] * self.batch if counts is None else counts
        starts = None
        if data.draw(st.integers(0, 2)) == 0:
            starts = [0 if len(m) else data.draw(st.integers(0, n)) for m, n in zip(self.model, added, strict=True)]
        q = normal(np.random.default_rng(n), (self.batch, heads, n, DIM), self.kind)
        lengths = [len(m) + new for m, new in zip(self.model, added, strict=True)]
        options = draw_options(data, heads, lengths, added, n)
        if hold_step(self.cache, [], q, self.rows.given(k, v), counts, options, starts=starts):
            for b, n in enumerate(added):
                self.model[b].start += starts[b] if starts else 0
                self.model[b].grow(k[b, :, :n], v[b, :, :n])

    @rule(data=st.data(), name=st.sampled_from(OF_CACHES))
    def ask(self, data, name):
        heads = self.heads * self.group
        q, lengths, counts = draw_queries(data, [len(m) for m in self.model], heads, self.kind)
        options = draw_options(data, heads, [len(m) for m in self.model], counts, q.shape[2])
        firsts = find_firsts(self.model, counts, options)
        if self.window and not all(self.has(b, firsts[b], len(m), m.start) for b, m in enumerate(self.model) if len(m)):
            with pytest.raises(ValueError, match=f"^KVCache.{name}: .*the ring holds"):
                getattr(self.cache, name)(q, lengths=lengths, **options)
            return
        got = getattr(self.cache, name)(q, lengths=lengths, **options)
        for b, (m, n) in enumerate(zip(self.model, counts, strict=True)):
            m.check_answer(name, got, b, q[b, :, :n], self.keep, self.window, **of_sequence(options, b, n))

    @invariant()
    def holds_the_tokens(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths.tolist() == [len(m) for m in self.model]
        assert self.cache.starts.tolist() == [m.start for m in self.model]
        for b, at in enumerate(self.cache.positions):
            there = np.flatnonzero(at >= 0)
            same_bits(self.cache.keys[b][:, there], self.model[b].k[:, at[there]])
            same_bits(self.cache.values[b][:, there], self.model[b].v[:, at[there]])
            n = len(self.model[b])
            expected = range(n) if self.window is None else range(min(self.keep, n))
            assert set(expected) <= set(at.tolist())


@TURNS
class Pages(RuleBasedStateMachine):
    """PagedKVCache: a small pool, so that pages run out and are used again. With a window the model knows which tokens
    are gone: those that no token of the last append sees."""

    SIZE, PAGES, HEADS, GROUP = 3, 20, 2, 2

    @initialize(data=st.data())
    def make(self, data):
        self.rows, self.kind = draw_rows(data)
        self.window = data.draw(st.none() | st.integers(0, 12), "window")
        self.pool = qkv_fast.PagedKVCache(
            self.HEADS, DIM, self.PAGES, page_size=self.SIZE, value_dim=DIM_V, window=self.window,
            bounds=data.draw(st.booleans(), "bounds"), **self.rows._asdict(),
        )
        poison = np.full((1, self.HEADS, self.SIZE * self.PAGES, DIM), np.nan, "float32")
        everything = self.pool.add()
        self.pool.append([everything], *self.rows.given(poison, poison[..., :DIM_V]))
        self.pool.remove(everything)
        self.model, self.saved = {}, False

    def any_of(self, data, least=1):
        return data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=least, max_size=3, unique=True))

    def first(self, m):
        """The first token that is there: whole pages go."""
        return max(m.start, m.gone // self.SIZE * self.SIZE)

    def lacks(self, m, n):
        """Whether, cut down to n tokens, it would lack some that the next one sees."""
        return self.window is not None and n > m.start and max(n - self.window, m.start) < self.first(m)

    def grow(self, m, k, v, start=0):
        if k.shape[1] > start and self.window is not None:
            m.gone = max(m.gone, len(m) - self.window)
        m.grow(k, v)
        m.start += start

    def cut(self, m, n):
        made = m.cut(n)
        made.gone = m.gone if len(made) > made.start else 0
        return made

    @rule()
    def add(self):
        s = self.pool.add()
        self.model[s] = Model(self.HEADS, self.rows)
        self.model[s].gone = 0

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data):
        (s,) = self.any_of(data)[:1]
        m = self.model[s]
        n = data.draw(st.none() | st.integers(0, len(m)))
        free = self.pool.free_pages
        if n is not None and self.lacks(m, n):
            with pytest.raises(ValueError, match=f"window of token {n} begins at"):
                self.pool.fork(s, n)
        else:
            self.model[self.pool.fork(s, n)] = self.cut(m, n)
        assert self.pool.free_pages == free

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        (s,) = self.any_of(data)[:1]
        n = data.draw(st.integers(0, len(self.model[s])))
        if self.lacks(self.model[s], n):
            with pytest.raises(ValueError, match=f"window of token {n} begins at"):
                self.pool.truncate(s, n)
            return
        self.pool.truncate(s, n)
        self.model[s] = self.cut(self.model[s], n)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def select(self, data):
        (s,) = self.any_of(data)[:1]
        m = self.model[s]
        n = data.draw(st.integers(0, len(m)))
        rest = data.draw(st.permutations(range(len(m) - n)))
        index = rest[: data.draw(st.integers(0, len(rest)))]
        if self.lacks(m, n) or (index and n < m.start):
            with pytest.raises(ValueError, match=f"window of token {n} begins at|begins at token {m.start}"):
                self.pool.select(s, n, index)
            return
        try:
            self.pool.select(s, n, index)
        except ValueError as error:
            assert "new pages are needed" in str(error)
            return
        taken = m.take([*range(n), *(n + i for i in index)])
        taken.gone = m.gone if len(taken) > taken.start else 0
        self.model[s] = taken

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def reorder(self, data):
        chosen = self.any_of(data)
        parents = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=len(chosen), max_size=len(chosen)))
        self.pool.reorder(chosen, parents)
        self.model |= {s: self.cut(self.model[p], None) for s, p in zip(chosen, parents, strict=True)}

    @precondition(lambda self: self.model and not self.saved)  # once: the disk takes its time
    @rule()
    def save_and_open(self):
        """From now on its pages are in a file, and what is written to them is not."""
        self.saved = True
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "pool.kv")
            self.pool.save(path)
            opened = qkv_fast.PagedKVCache.open(path)
            assert repr(opened) == repr(self.pool) and opened.free_pages == self.pool.free_pages
            self.pool = copy.copy(opened) if os.name == "nt" else opened

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        (s,) = self.any_of(data)[:1]
        self.pool.remove(s)
        del self.model[s]

    def draw_new(self, data):
        """Sequences, their new tokens, and how they are given."""
        chosen = self.any_of(data)
        k, v = draw_tokens(data, self.HEADS, self.rows, len(chosen))
        counts, starts = draw_counts(data, len(chosen), k.shape[2]), None
        added = [k.shape[2]] * len(chosen) if counts is None else counts
        if data.draw(st.integers(0, 2)) == 0:
            empty = [not len(self.model[s]) for s in chosen]
            starts = [data.draw(st.integers(0, n * new)) for n, new in zip(added, empty, strict=True)]
        return chosen, k, v, counts, added, starts

    def take_new(self, chosen, k, v, added, starts):
        for b, s in enumerate(chosen):
            self.grow(self.model[s], k[b, :, : added[b]], v[b, :, : added[b]], starts[b] if starts else 0)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def append(self, data):
        chosen, k, v, counts, added, starts = self.draw_new(data)
        try:
            self.pool.append(chosen, *self.rows.given(k, v), lengths=counts, starts=starts)
        except ValueError as error:
            assert "new pages are needed" in str(error)  # nothing has changed, as the invariant sees
            assert self.pool.free_pages < sum(-(-9 // self.SIZE) + 1 for _ in chosen)
            return
        self.take_new(chosen, k, v, added, starts)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def step(self, data):
        chosen, k, v, counts, added, starts = self.draw_new(data)
        heads = self.HEADS * self.GROUP
        q = normal(np.random.default_rng(len(chosen)), (len(chosen), heads, k.shape[2], DIM), self.kind)
        lengths = [len(self.model[s]) + n for s, n in zip(chosen, added, strict=True)]
        options = draw_options(data, heads, lengths, added, k.shape[2])
        if hold_step(self.pool, [chosen], q, self.rows.given(k, v), counts, options, starts=starts):
            self.take_new(chosen, k, v, added, starts)

    def draw_call(self, data):
        """Sequences, of which one may come twice, with queries; and whether their windows are all there."""
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=4))
        models, heads = [self.model[s] for s in chosen], self.HEADS * self.GROUP
        q, lengths, counts = draw_queries(data, [len(m) for m in models], heads, self.kind)
        options = draw_options(data, heads, [len(m) for m in models], counts, q.shape[2])
        there = self.window is None or not any(
            n and len(m) > (begin := max(first - self.window, m.start)) and begin < self.first(m)
            for m, n, first in zip(models, counts, find_firsts(models, counts, options), strict=True)
        )
        return chosen, models, q, lengths, counts, options, there

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def attend(self, data):
        chosen, models, q, lengths, counts, options, there = self.draw_call(data)
        if not there:
            with pytest.raises(ValueError, match="the first query's window begins at"):
                self.pool.attend(chosen, q, lengths=lengths, **options)
            return
        if self.pool.bounds and "tree" not in options and data.draw(st.booleans(), "tolerance"):
            out, left, _ = self.pool.attend(chosen, q * 8, lengths=lengths, tolerance=1e-2, **options)
            assert left.max(initial=0) <= 1e-2
            for b, (m, n) in enumerate(zip(models, counts, strict=True)):
                most, first = self.pool.largest_values(chosen)[b], min(self.first(m), len(m))
                same_bits(most, np.abs(m.v[:, first:].astype("float64")).max((1, 2), initial=0))
                m.check_within((out[b, :, :n], left[b, :, :n]), most, q[b, :, :n] * 8, window=self.window, **options)
            return
        out, lse = self.pool.attend(chosen, q, lengths=lengths, return_lse=True, **options)
        for b, (m, n) in enumerate(zip(models, counts, strict=True)):
            m.check((out[b, :, :n], lse[b, :, :n]), q[b, :, :n], window=self.window, **of_sequence(options, b, n))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), name=st.sampled_from(OF_CACHES))
    def ask(self, data, name):
        chosen, models, q, lengths, counts, options, there = self.draw_call(data)
        if not there:
            with pytest.raises(ValueError, match=f"^PagedKVCache.{name}: the first query's window begins at"):
                getattr(self.pool, name)(chosen, q, lengths=lengths, **options)
            return
        got = getattr(self.pool, name)(chosen, q, lengths=lengths, **options)
        for b, (m, n) in enumerate(zip(models, counts, strict=True)):
            m.check_answer(name, got, b, q[b, :, :n], window=self.window, **of_sequence(options, b, n))

    @invariant()
    def holds_the_tokens(self):
        if not hasattr(self, "pool"):
            return
        assert self.pool.sequences == sorted(self.model)
        held = 0
        for s, m in self.model.items():
            first = min(self.first(m), len(m))
            same_bits(self.pool.gather(s), (m.k[:, first:], m.v[:, first:]))
            held += -(-len(m) // self.SIZE) - first // self.SIZE if first < len(m) else 0
        assert self.pool.lengths(list(self.model)).tolist() == [len(m) for m in self.model.values()]
        assert self.pool.starts(list(self.model)).tolist() == [m.start for m in self.model.values()]
        assert self.PAGES - held <= self.pool.free_pages <= self.PAGES


TestSlab = Slab.TestCase
TestPages = Pages.TestCase


def test_all_pages_come_back():
    pool = qkv_fast.PagedKVCache(1, 2, 8, page_size=4)
    k = np.ones((1, 1, 10, 2), "float32")
    a = pool.add()
    pool.append([a], k, k)
    forks = [pool.fork(a), pool.fork(a, 7)]
    pool.append(forks, *np.ones((2, 2, 1, 1, 2), "float32"))  # each copies the page that it writes to
    assert pool.free_pages == 8 - 3 - 2
    pool.append([a], k[:, :, :1], k[:, :, :1])  # nobody else has its last page any more
    assert pool.free_pages == 8 - 3 - 2
    for s in (a, *forks):
        pool.remove(s)
    assert pool.free_pages == 8 and pool.sequences == []
