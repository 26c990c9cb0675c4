"""Calls that differ in what should hardly matter: each beside its plain twin, in the same rounds.

Memory order, types and byte order, how a causal mask is said, one row more, what a cache stores. `TWINS` has a function
for each kind, which makes `Twins` for a number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

import qkv_fast

from . import limits, machine
from .measured import Measured
from .method import Local, Refused, interleave
from .problem import element
from .runner import threads_text
from .tables import seconds_text
from .work import STREAM_BYTES

Call = Callable[[], object]
LONG = 8192  # tokens of a cache that is read from memory
ROUNDED = 1e-4  # results of one problem in float32, by two ways


@dataclass(frozen=True)
class Twins:
    """A plain call, and others by name with the most of its time that each may take. `within`: how far their results
    may be from the plain one's; None where they are others."""

    plain: Call
    others: dict[str, tuple[Call, float]]
    within: float | None = None

    def check(self) -> None:
        """Raise `Refused` for a result that is another."""
        if self.within is None:
            return
        expected = np.asarray(self.plain(), np.float64)
        for name, (call, _) in self.others.items():
            off = float(np.abs(np.asarray(call(), np.float64) - expected).max())
            if not off <= self.within:
                raise Refused(f"{name}: the result is off by {off:.1e}")


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(math.prod(shape))
    return rng.standard_normal(shape, dtype="float32").astype(element(dtype), copy=False)


def heads_of(shape: tuple[int, ...], number: int) -> tuple[np.ndarray, ...]:
    """q, k and v of one (batch, heads, length, dim)."""
    return tuple(np.moveaxis(normal(*shape, number), -1, 0).copy())


def softmax_halves(threads: int) -> Iterator[Twins]:
    """16 bits are half the bytes, along rows and down columns."""
    x = normal(8, 1024, 1024)
    for dtype in ("float16", "bfloat16"):
        half = x.astype(element(dtype))
        call, out, narrow = partial(qkv_fast.softmax, num_threads=threads), np.zeros_like(x), np.zeros_like(half)
        for axis, most in ((-1, 1.1), (1, 1.3)):
            name = f"softmax {dtype} over float32, 8x1024x1024, axis {axis}"
            yield Twins(partial(call, x, axis, out=out), {name: (partial(call, half, axis, out=narrow), most)}, 1e-2)


def filled(dtype: str, *, batch: int = 1, heads: int = 8, dim: int = 128, length: int = 4096) -> qkv_fast.KVCache:
    """A full cache, whose sequences hold the same tokens."""
    cache = qkv_fast.KVCache(batch, heads, dim, length, dtype=dtype)
    k, v = (np.broadcast_to(x, (batch, heads, length, dim)) for x in normal(2, 1, heads, length, dim))
    cache.append(k, v)
    return cache


def cache_queries(threads: int) -> Iterator[Twins]:
    """Some queries over what is stored in fewer bits."""
    caches = {dtype: filled(dtype) for dtype in ("float32", "float16", "int4")}
    for queries in (12, 32, 64):
        q = normal(1, 8, queries, 128)
        calls = {dtype: partial(cache.attend, q, num_threads=threads) for dtype, cache in caches.items()}
        title = f"queries over float32, 1x8x{queries}-d128-k4096"
        others = {f"float16 cache, {title}": (calls["float16"], 1.05), f"int4 cache, {title}": (calls["int4"], 1.2)}
        yield Twins(calls["float32"], others)


def biases(threads: int) -> Iterator[Twins]:
    """A bias or a mask in another memory order, or in another type."""
    q, k, v = heads_of((1, 12, 1024, 64), 3)
    call = partial(qkv_fast.attention, q, k, v, out=np.empty_like(q), num_threads=threads)
    bias = normal(1, 12, 1024, 1024)
    for name, x in {"bias": bias, "mask": bias < 0.5}.items():
        given = {
            "heads last": (np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1), 1.25),
            "keys first": (x.swapaxes(2, 3).copy().swapaxes(2, 3), 1.25),
        }
        if name == "bias":
            given |= {
                "of float64": (x.astype("float64"), 1.25),
                "byte-swapped": (x.astype(x.dtype.newbyteorder()), 1.25),
            }
        calls = {how: (partial(call, **{name: y}), most) for how, (y, most) in given.items()}
        others = {f"{name} {how}, 1x12x1024-d64": twin for how, twin in calls.items()}
        yield Twins(partial(call, **{name: x}), others, ROUNDED)


def causal_bias(threads: int) -> Iterator[Twins]:
    """Causal order in the words of a bias."""
    q, k, v = heads_of((1, 12, 2048, 64), 3)
    call = partial(qkv_fast.attention, q, k, v, out=np.empty_like(q), num_threads=threads)
    bias = np.triu(np.full((2048, 2048), -np.inf, "float32"), 1)
    types = ("float32", "float64")
    others = {f"causal as a -inf bias, {t}, 1x12x2048-d64": (partial(call, bias=bias.astype(t)), 1.3) for t in types}
    yield Twins(partial(call, causal=True), others, ROUNDED)


def step_strides(threads: int) -> Iterator[Twins]:
    """One query over keys and values in other memory orders."""
    k, v = heads_of((1, 8, 8192, 128), 2)
    columns, rows = k.swapaxes(2, 3).copy().swapaxes(2, 3), [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in (k, v)]
    for heads in (8, 32):
        call = partial(qkv_fast.attention, normal(1, heads, 1, 128), num_threads=threads)
        name = f"1x{heads}x1-d128-kv8-k8192"
        others = {
            f"decode, K stored (D, L), {name}": (partial(call, columns, v), 1.2),
            f"decode, rows (L, H, D), {name}": (partial(call, *rows), 1.2),
        }
        yield Twins(partial(call, k, v), others, ROUNDED)


def shifted_windows(images: int, across: int, size: int) -> np.ndarray:
    """Ids of the tokens of each window, (images * across^2, size^2), as a Swin transformer has them after a shift: a
    window has one part, or at the far edges two or four."""
    side = np.zeros(across * size, np.int64)
    side[-size:], side[-(size // 2) :] = 1, 2
    ids = (3 * side[:, None] + side).reshape(across, size, across, size).swapaxes(1, 2)
    return np.tile(ids.reshape(across**2, size**2), (images, 1))


def windows(threads: int) -> Iterator[Twins]:
    """Parts of short sequences, by segments and by a mask."""
    ids = shifted_windows(16, 8, 7)
    q, k, v = heads_of((len(ids), 3, ids.shape[1], 32), 3)
    call = partial(qkv_fast.attention, q, k, v, out=np.empty_like(q), num_threads=threads)
    mask = (ids[:, :, None] == ids[:, None, :])[:, None]
    name = f"segments over a mask, {len(ids)}x3x{ids.shape[1]}-d32"
    yield Twins(partial(call, mask=mask), {name: (partial(call, segments=(ids, ids)), 1.1)}, ROUNDED)


def short_sequences(threads: int) -> Iterator[Twins]:
    """Short sentences and sets: fewer tokens take less time."""
    for batch in (1, 8):
        calls = {
            n: partial(qkv_fast.attention, *heads_of((batch, 64, n, 64), 3), num_threads=threads) for n in (8, 12, 16)
        }
        others = {f"{n} tokens over 16, {batch}x64x{n}-d64": (calls[n], most) for n, most in ((8, 0.8), (12, 1.0))}
        yield Twins(calls[16], others)


def one_row_more(threads: int) -> Iterator[Twins]:
    """A row beyond what fills vectors."""
    k, v = heads_of((1, 8, 4096, 64), 2)
    for rows in (16, 48):
        plain, more = (
            partial(qkv_fast.attention, normal(1, 8, n, 64), k, v, num_threads=threads) for n in (rows, rows + 1)
        )
        yield Twins(plain, {f"{rows + 1} rows over {rows}, 1x8x{rows + 1}-d64-k4096": (more, 1.2)})


def packed_views(threads: int) -> Iterator[Twins]:
    """Views of one array of queries, keys and values, as a projection leaves it."""
    packed = normal(8, 197, 3, 12, 64)
    views = [packed[:, :, i].swapaxes(1, 2) for i in range(3)]
    call = partial(qkv_fast.attention, num_threads=threads)
    others = {"packed (B, L, 3, H, D) views, 8x12x197-d64": (partial(call, *views), 1.05)}
    yield Twins(partial(call, *(x.copy() for x in views)), others, ROUNDED)


def reorders(threads: int) -> Iterator[Twins]:
    """Beams that go on with the tokens of others, against one step of them all."""
    order, beams, tokens = [0, 0, 1, 2], 4, 2000
    for heads, dim in ((8, 64), (32, 128)):
        q = normal(beams, heads, 1, dim)
        title = f"reorder over attend, {beams} beams x {tokens}, {heads} heads, D {dim}"
        cache = filled("float32", batch=beams, heads=heads, dim=dim, length=tokens)
        yield Twins(
            partial(cache.attend, q, num_threads=threads), {f"KVCache, {title}": (partial(cache.reorder, order), 2.0)}
        )
        pool = qkv_fast.PagedKVCache(heads, dim, pages=16 * beams)
        sequences = [pool.add() for _ in range(beams)]
        pool.append(sequences, cache.keys, cache.values)
        parents = [sequences[i] for i in order]
        yield Twins(
            partial(pool.attend, sequences, q, num_threads=threads),
            {f"PagedKVCache, {title}": (partial(pool.reorder, sequences, parents), 0.1)},
        )


TWINS: dict[str, Callable[[int], Iterator[Twins]]] = {
    "softmax-halves": softmax_halves,
    "cache-queries": cache_queries,
    "biases": biases,
    "causal-bias": causal_bias,
    "step-strides": step_strides,
    "windows": windows,
    "short-sequences": short_sequences,
    "one-row-more": one_row_more,
    "packed-views": packed_views,
    "reorders": reorders,
}


def measure(kind: str, seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """The rows of one kind of surprise: time over the plain twin's."""
    for n in threads:
        pairs = list(TWINS[kind](n))
        for twins in pairs:
            twins.check()
            calls = [Local("plain", twins.plain), *(Local(name, call) for name, (call, _) in twins.others.items())]
            rounds = interleave(calls, budget=seconds / (len(pairs) * len(threads)))
            beside = seconds_text(rounds.time("plain").median)
            for name, (_, most) in twins.others.items():
                found, took = rounds.ratio(name, "plain"), seconds_text(rounds.time(name).median)
                title, note = f"{name}, {threads_text(n)}", f"{took}, plain {beside}"
                yield Measured(title, found.median, "x", most, spread=found.spread, note=note)


def asked_of_intel(bound: float, unit: str) -> tuple[float | None, str]:
    """A bound where it is judged, and a note that says what it is elsewhere."""
    return (bound, "") if machine.is_intel() else (None, f"asked of Intel: {bound:g} {unit}")


def decoding_cache(dtype: str) -> qkv_fast.KVCache:
    """One that no cache of the CPU holds."""
    one = filled(dtype, length=LONG)
    return filled(dtype, length=LONG, batch=math.ceil(STREAM_BYTES / one.nbytes))


def measure_bandwidth(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """What a step reads of a cache in few bits a second, of what memory can give."""
    for dtype, least in (("int8", 75.0), ("int4", 55.0)):
        cache = decoding_cache(dtype)
        q = normal(cache.batch, 32, 1, 128)
        for n in threads:
            call = Local(dtype, partial(cache.attend, q, num_threads=n))
            read = partial(limits.rate, "read", n, limits.BESIDE_SECONDS)
            rounds = interleave([call], limit=read, budget=seconds / (2 * len(threads)))
            found, (bound, note) = rounds.share(dtype, cache.nbytes), asked_of_intel(least, "%")
            name = f"decode of an {dtype} cache, share of reading, 32/8 heads x {LONG}, D 128, {threads_text(n)}"
            yield Measured(name, 100 * found.median, "%", bound, more=True, spread=found.spread, note=note)


def measure_halves(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """A step over bfloat16 against one over float16."""
    caches = {dtype: decoding_cache(dtype) for dtype in ("float16", "bfloat16")}
    for n in threads:
        calls = [
            Local(dtype, partial(cache.attend, normal(cache.batch, 32, 1, 128, dtype=dtype), num_threads=n))
            for dtype, cache in caches.items()
        ]
        found = interleave(calls, budget=seconds / len(threads)).ratio("bfloat16", "float16")
        bound, note = asked_of_intel(1.02, "x")
        name = f"decode of bfloat16 over float16, 32/8 heads x {LONG}, D 128, {threads_text(n)}"
        yield Measured(name, found.median, "x", bound, spread=found.spread, note=note)
