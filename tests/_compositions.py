"""Random calls: shapes around the edges of tiles, and some of all arguments; with NaN wherever nobody looks.

`FEATURES` is the list of what composes.
"""

import numpy as np
from _util import qkv
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import reference

EDGES = sorted({n + d for n in (1, 16, 32, 48, 96, 128, 1024) for d in (-1, 0, 1)} - {0})
LENGTHS = st.integers(1, 40) | st.sampled_from(EDGES) | st.integers(1, 300)


class Case:
    """Shapes and features; arrays follow from them and a seed. Shown as the call that it is."""

    def __init__(self, seed, dtype, batch, group, heads, lengths, dims, features):
        self.seed, self.dtype, self.features = seed, dtype, features
        self.batch, self.heads, self.lengths, self.dims = batch, (group * heads, heads), lengths, dims
        if lengths[0] * lengths[1] > 60_000:
            self.lengths = (lengths[0] % 24 + 1, lengths[1])
        self.rng = np.random.default_rng(seed)

    def __repr__(self):
        return (
            f"Case(seed={self.seed}, {self.dtype}, batch {self.batch}, heads {self.heads}, lengths {self.lengths}, "
            f"dims {self.dims}, {'+'.join(self.features)})"
        )

    def arrays(self):
        return qkv(self.seed, self.dtype, batch=self.batch, heads=self.heads, lengths=self.lengths, dims=self.dims)

    def options(self):
        options = {}
        for name in self.features:
            options |= FEATURES[name](self)
        positions = any(name in options for name in ("causal", "window", "alibi_slopes"))
        top_left = options.get("causal") == "top-left"
        if "q_positions" in options:
            options.pop("q_offset", None)
        elif "kv_lengths" in options and "q_lengths" not in options and positions and not top_left:
            options.setdefault("q_offset", 0)
        if "kv_starts" in options:
            options["kv_starts"] = np.minimum(options["kv_starts"], options.get("kv_lengths", self.lengths[1]))
        return options

    def logits(self):
        """A shape that broadcasts to all scores, of all axes or of the last two, some of length 1."""
        shape = (*self.batch, self.heads[0], *self.lengths)
        shape = tuple(n if self.rng.random() < 0.75 else 1 for n in shape)
        return shape[int(self.rng.integers(2)) * (len(self.batch) + 1) :]

    def placed(self, x):
        """x in one of the ways that arrays lie in memory."""
        way = self.rng.integers(4)
        if way == 0:
            return x
        if way == 1:
            return np.asfortranarray(x)
        index = (slice(None, None, -1),) * x.ndim if way == 2 else (..., slice(None, None, 2))
        wide = np.repeat(x, 2, axis=-1) if way == 3 else np.ascontiguousarray(x[index])
        return wide[index]


def mask(case):
    """Random, in blocks of keys, or hiding rows whole."""
    shape, rng = case.logits(), case.rng
    kind = rng.integers(3)
    if kind == 0:
        x = rng.random(shape) < rng.choice([0.05, 0.5, 0.95])
    else:
        x = np.broadcast_to(np.repeat(rng.random(shape[-1] // 40 + 1) < 0.5, 40)[: shape[-1]], shape).copy()
    if kind == 2:
        x &= rng.random((*shape[:-1], 1)) < 0.7
    return dict(mask=case.placed(x))


def bias(case):
    """With -inf here and there, sometimes of another type or byte order, sometimes finfo.min in whole rows."""
    rng, shape = case.rng, case.logits()
    x = rng.standard_normal(shape)
    x[rng.random(shape) < rng.choice([0, 0.1, 0.9])] = -np.inf
    if shape[-1:] == case.lengths[1:] and rng.integers(4) == 0:
        x[rng.random(shape[:-1]) < 0.3] = np.finfo("f4").min
    return dict(bias=case.placed(x.astype(rng.choice([case.dtype, case.dtype, "<f4", ">f4", "<f8", ">f8"]))))


def segments(case):
    rng = case.rng
    axes = case.batch if rng.integers(2) else ()
    q_ids, k_ids = (rng.integers(0, 4, (*axes, n)) for n in case.lengths)
    order = rng.integers(3)
    if order < 2:
        k_ids = np.sort(k_ids)
    if order < 1:
        q_ids = np.sort(q_ids)
    return dict(segments=(q_ids, k_ids))


def window(case):
    sides = [None if case.rng.random() < 0.3 else int(case.rng.integers(0, 150)) for _ in range(2)]
    return dict(window=tuple(sides))


def q_offset(case):
    lq, lk = case.lengths
    shape = case.batch if case.rng.integers(2) else ()
    return dict(q_offset=case.rng.integers(-lq, lk + 1, shape))


def q_positions(case):
    lq, lk = case.lengths
    axes = case.batch if case.rng.integers(2) else ()
    positions = case.rng.integers(-lq, lk + 30, (*axes, lq))
    return dict(q_positions=np.sort(positions) if case.rng.integers(2) else positions)


def numbers(of):
    """Of queries (0) or keys (1), one for all sequences or one each."""

    def draw(case):
        return case.rng.integers(0, case.lengths[of] + 1, case.batch if case.rng.integers(4) else ())

    return draw


FEATURES = {
    "mask": mask,
    "bias": bias,
    "causal": lambda case: dict(causal=True),
    "window": window,
    "q_offset": q_offset,
    "q_positions": q_positions,
    "q_lengths": lambda case: dict(q_lengths=numbers(0)(case)),
    "kv_lengths": lambda case: dict(kv_lengths=numbers(1)(case)),
    "kv_starts": lambda case: dict(kv_starts=numbers(1)(case)),
    "segments": segments,
    "alibi_slopes": lambda case: dict(alibi_slopes=qkv_fast.alibi_slopes(case.heads[0])),
    "sinks": lambda case: dict(
        sinks=np.where(case.rng.random(case.heads[0]) < 0.3, -np.inf, 2 * case.rng.standard_normal(case.heads[0]))
    ),
    "softcap": lambda case: dict(softcap=float(case.rng.choice([0.5, 3.0, 30.0]))),
    "scale": lambda case: dict(scale=float(case.rng.choice([0.0, 0.7, -0.3])) / max(case.dims[0], 1) ** 0.5),
}

CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "float64"]),
    batch=st.sampled_from([(), (1,), (2,), (2, 2), (3,)]),
    group=st.integers(1, 4),
    heads=st.integers(1, 2),
    lengths=st.tuples(LENGTHS, LENGTHS),
    dims=st.tuples(st.integers(0, 20) | st.sampled_from([64, 65]), st.integers(1, 12)),
    features=st.lists(st.sampled_from(sorted(FEATURES)), min_size=2, max_size=len(FEATURES), unique=True),
)


def visible(case, options):
    """Which (query, key) pairs attend: bool, batch + (heads, Lq, Lk)."""
    seen = reference._visible(case.batch, *case.lengths, reference._limits_of(options))
    seen = seen & (np.asarray(options.get("mask", True)) != 0) & (np.asarray(options.get("bias", 0)) != -np.inf)
    return np.broadcast_to(seen, (*case.batch, case.heads[0], *case.lengths))


def poisoned(case, arrays, seen):
    """Copies whose keys and values are NaN or infinite where no query of their key head looks."""
    q, k, v = (x.copy() for x in arrays)
    kv_heads, lk = case.heads[1], case.lengths[1]
    unseen = ~seen.any(axis=-2).reshape(*case.batch, kv_heads, -1, lk).any(axis=-2)
    k[unseen] = case.rng.choice([np.nan, np.inf])
    v[unseen] = case.rng.choice([np.nan, -np.inf])
    return q, k, v
