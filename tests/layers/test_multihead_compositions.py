"""MultiHeadAttention of random compositions: heads, rotary positions, batches, memories, packed sequences, caches.

The model has no batches: it knows the tokens of one sequence, and computes all of them at once in float64 or wider.
"""

import numpy as np
import pytest
from _util import normal
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import MultiHeadAttention, reference

pytestmark = pytest.mark.usefixtures("isa")
N, M, N_OUT = 10, 7, 9  # elements of a token of an input, of a memory and of an output
FAR = 200  # positions that tables have
ROPES = ("none", "halves", "interleaved", "stretched", "tables")
# What goes with every way to call a layer, and what only with tokens that all have the same keys.
CHANGES = ("window", "alibi_slopes", "sinks", "softcap", "scale")
HIDES = ("causal", "mask", "bias", "kv_lengths")


def rope_of(kind, half):
    """A layer's argument, the reference's for the same, and what positions are divided by."""
    some = dict(base=100.0, rotary_dim=2 * max(1, half // 2))
    if kind == "interleaved":
        return ({**some, "interleaved": True},) * 2 + (1,)
    if kind == "tables":
        angles = np.arange(FAR)[:, None] * 100.0 ** (-np.arange(0, some["rotary_dim"], 2) / some["rotary_dim"])
        return dict(cos_sin=(np.cos(angles), np.sin(angles))), some, 1
    if kind == "stretched":
        return dict(scaling=dict(rope_type="linear", factor=4.0)), {}, 4
    return (None if kind == "none" else {},) * 2 + (1,)


class Case:
    """A layer and the model's own copy of it. Shown as what it is."""

    def __init__(self, seed, dtype, group, kv_heads, half, rope, features, memory=False):
        self.told = (f"seed={seed}, {dtype}, {group} x {kv_heads} heads of {2 * half}, rope {rope}, "
                     f"{'+'.join(features)}{', a memory' * memory}")  # fmt: skip
        self.rng, self.dtype, self.kv_heads, self.dim = np.random.default_rng(seed), dtype, kv_heads, 2 * half
        self.heads, self.features, self.m = group * kv_heads, features, M if memory else N
        rows = (self.heads * self.dim, kv_heads * self.dim, kv_heads * self.dim, N_OUT)
        columns = (N, self.m, self.m, self.heads * self.dim)
        self.weights = [
            (self.tokens(r, c) / np.sqrt(c).astype(dtype), None if self.rng.random() < 0.3 else self.tokens(r))
            for r, c in zip(rows, columns, strict=True)
        ]
        rope, self.rope, self.stretch = rope_of(rope, half)
        self.layer = MultiHeadAttention(*self.weights, num_heads=self.heads, num_kv_heads=kv_heads, rope=rope)

    def __repr__(self):
        return f"Case({self.told})"

    def tokens(self, *shape):
        return normal(self.rng, shape, self.dtype)

    def changes(self):
        """Arguments that mean the same for a sequence alone."""
        all_of = dict(
            window=(int(self.rng.integers(0, 9)), None),
            alibi_slopes=qkv_fast.alibi_slopes(self.heads),
            sinks=self.rng.standard_normal(self.heads),
            softcap=3.0,
            scale=0.3,
        )
        return {name: all_of[name] for name in CHANGES if name in self.features}

    def alone(self, x, memory=None, q_at=None, k_at=None, **options):
        """What the layer makes of one sequence x (L, N)."""
        memory = x if memory is None else memory
        q_at = np.arange(len(x)) if q_at is None else q_at
        k_at = np.arange(len(memory)) if k_at is None else k_at
        x, memory = (y.astype("float64") for y in (x, memory))
        weights = [(w.astype("float64"), None if b is None else b.astype("float64")) for w, b in self.weights]
        q, k, v = (
            reference.linear(y, *weights[i]).reshape(len(y), heads, self.dim).swapaxes(0, 1).astype("float64")
            for i, (y, heads) in enumerate(((x, self.heads), (memory, self.kv_heads), (memory, self.kv_heads)))
        )
        if self.rope is not None:
            q, k = (
                reference.rope(y, at / self.stretch, **self.rope).astype("float64") for y, at in ((q, q_at), (k, k_at))
            )
        seen = reference.attention(q, k, v, **options).swapaxes(0, 1).reshape(len(x), self.heads * self.dim)
        return reference.linear(seen.astype("float64"), *weights[3])

    def close(self, got, exact):
        """Elements are about 1, their errors those of four sums of some tens of terms, and of exp of a score."""
        assert got.dtype == self.dtype and got.shape == exact.shape
        error = np.abs(got - exact).max(initial=0)
        assert error <= 60 * np.finfo(self.dtype).eps * max(1, np.abs(exact).max(initial=0)), (self, error)


NO_MEMORY = st.just(False)


def cases(memory=NO_MEMORY):
    return st.builds(
        Case,
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(["float32", "float64"]),
        group=st.integers(1, 3),
        kv_heads=st.integers(1, 2),
        half=st.integers(1, 4),
        rope=st.sampled_from(ROPES),
        features=st.lists(st.sampled_from(CHANGES + HIDES), unique=True),
        memory=memory,
    )


@given(case=cases(memory=st.booleans()))
def test_batches(case):
    rng = case.rng
    batch, lq, lk = int(rng.integers(1, 4)), int(rng.integers(1, 20)), int(rng.integers(1, 30))
    x, memory = case.tokens(batch, lq, N), case.tokens(batch, lk, M) if case.m == M else None
    lk = lq if memory is None else lk
    options, own = case.changes(), [{} for _ in range(batch)]
    if "causal" in case.features:
        options["causal"] = True
    if "kv_lengths" in case.features:
        options["kv_lengths"] = lengths = rng.integers(0, lk + 1, batch)
        if options.keys() & {"causal", "window", "alibi_slopes"}:
            options["q_offset"] = 0
        own = [dict(kv_lengths=n) for n in lengths]
    for name in ("mask", "bias"):
        if name in case.features:
            heads = case.heads if rng.integers(2) else 1
            shape = (batch, heads, lq, lk)
            options[name] = rng.random(shape) < 0.7 if name == "mask" else rng.standard_normal(shape)
            own = [{**mine, name: array} for mine, array in zip(own, options[name], strict=True)]
    at = None
    if memory is None and rng.integers(2):
        at = rng.integers(0, FAR, (batch, lq))
    elif rng.integers(2):
        at = np.sort(rng.integers(0, FAR, lq))
        at = at if memory is not None else None
    given = memory if memory is None or rng.integers(2) else case.layer.keys_values(memory)
    got = case.layer(x, given, positions=at, **options)
    for b in range(batch):
        mine = None if at is None else at[b] if at.ndim == 2 else at
        k_at = mine if memory is None else None
        one = None if memory is None else memory[b]
        case.close(got[b], case.alone(x[b], one, mine, k_at, **{**options, **own[b]}))


@given(case=cases(memory=st.booleans()))
def test_packed_sequences(case):
    rng = case.rng
    lengths = rng.integers(0, 12, int(rng.integers(1, 5)))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    x, options = case.tokens(int(ends[-1]), N), case.changes()
    if "causal" in case.features:
        options["causal"] = True
    memory, key_ends = None, ends
    if case.m == M:
        key_ends = np.concatenate([[0], np.cumsum(rng.integers(0, 15, len(lengths)))])
        memory = case.tokens(int(key_ends[-1]), M)
    got = case.layer(x, memory, cu_seqlens_q=ends, cu_seqlens_k=key_ends, **options)
    for b in range(len(lengths)):
        q, k = slice(*ends[b : b + 2]), slice(*key_ends[b : b + 2])
        case.close(got[q], case.alone(x[q], None if memory is None else memory[k], **options))


def chunks(case, batch):
    """How many tokens each sequence gets at a time: a prompt, then a few."""
    first = case.rng.integers(1, 12, batch)
    return [first, *(case.rng.integers(1, 4, batch) if case.rng.integers(2) else np.ones(batch, int) for _ in range(3))]


@given(case=cases(), kind=st.sampled_from(["slab", "ring", "pages"]))
def test_caches(case, kind):
    """Sequences of their own lengths grow a few tokens at a time; of the others the rows are padding."""
    rng, options = case.rng, case.changes()
    batch = int(rng.integers(1, 4))
    steps = chunks(case, batch)
    texts = [case.tokens(int(n), N) for n in np.sum(steps, axis=0)]
    seen, more = dict(causal=True, **options), {}
    if kind == "pages":
        cache = qkv_fast.PagedKVCache(case.kv_heads, case.dim, 40, page_size=3, dtype=case.dtype)
        numbers = [cache.add() for _ in range(batch + 1)]
        more["sequences"] = rng.permutation(numbers)[:batch].tolist()
    elif kind == "ring":
        reach = int(rng.integers(3, 9))
        cache = qkv_fast.KVCache(batch, case.kv_heads, case.dim, 12 + reach, window=reach, dtype=case.dtype)
        seen["window"] = (min(reach, options.get("window", (reach, None))[0]), None)
        if "window" in options:
            options["window"] = seen["window"]
    else:
        cache = qkv_fast.KVCache(batch, case.kv_heads, case.dim, 40, dtype=case.dtype)
    got = [[] for _ in range(batch)]
    for begin, counts in zip(np.cumsum([np.zeros(batch, int), *steps[:-1]], axis=0), steps, strict=True):
        x = case.tokens(batch, int(counts.max()), N)
        for b, (text, i, n) in enumerate(zip(texts, begin, counts, strict=True)):
            x[b, :n] = text[i : i + n]
        ragged = {} if (counts == counts.max()).all() else dict(lengths=counts)
        y = case.layer(x, cache=cache, **more, **ragged, **options)
        for rows, mine, n in zip(got, y, counts, strict=True):
            rows.append(mine[:n])
    for rows, text in zip(got, texts, strict=True):
        case.close(np.concatenate(rows), case.alone(text, **seen))


@given(case=cases(), paged=st.booleans())
def test_prompts_padded_on_the_left(case, paged):
    """Padding is NaN, and positions begin where a text does."""
    rng, options = case.rng, case.changes()
    batch, length, more = int(rng.integers(1, 4)), int(rng.integers(1, 12)), int(rng.integers(1, 5))
    starts = rng.integers(0, length, batch)
    x = case.tokens(batch, length + more, N)
    x[np.arange(length + more) < starts[:, None]] = np.nan
    where = dict(cache=qkv_fast.KVCache(batch, case.kv_heads, case.dim, 40, dtype=case.dtype))
    if paged:
        pages = qkv_fast.PagedKVCache(case.kv_heads, case.dim, 40, page_size=3, dtype=case.dtype)
        where = dict(cache=pages, sequences=[pages.add() for _ in range(batch)])
    got = [case.layer(x[:, :length], starts=starts, **where, **options)]
    got += [case.layer(x[:, i : i + 1], **where, **options) for i in range(length, length + more)]
    got = np.concatenate(got, axis=1)
    for b, start in enumerate(starts):
        case.close(got[b, start:], case.alone(x[b, start:], causal=True, **options))
