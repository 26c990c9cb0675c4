"""Time that should not depend on the data: operations on unusual numbers, over the same on numbers from N(0, 1)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

import qkv_fast

from . import work
from .cases import Case, case
from .measured import Measured
from .method import Local, interleave
from .runner import threads_text

Arrays = tuple[np.ndarray, ...]

DEVIATIONS = (3, 10, 20, 30, 60)  # of scores, which have 1
PEAKED, SKEWED, SUBNORMAL, BROKEN = 1.08, 1.10, 1.15, 1.5  # at most
HEAVY = 40.0  # what one key's scores are larger by, in all


def peaked(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Iterator[tuple[str, Arrays, float]]:
    for deviation in DEVIATIONS:
        yield f"scores of deviation {deviation}", (q * q.dtype.type(deviation), k, v), PEAKED


def skewed(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Iterator[tuple[str, Arrays, float]]:
    """All queries have a part in common, along which some keys are long."""
    dim = q.shape[-1]
    q, along = q + q.dtype.type(1), np.full(dim, HEAVY / np.sqrt(dim), k.dtype)
    first, last, growing = k.copy(), k.copy(), k.copy()
    first[..., 0, :] += along
    last[..., -1, :] += along
    growing += np.linspace(0, 1, k.shape[-2], dtype=k.dtype)[:, np.newaxis] * along
    for name, keys in {"a heavy first key": first, "a heavy last key": last, "growing keys": growing}.items():
        yield name, (q, keys, v), SKEWED


def subnormal(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Iterator[tuple[str, Arrays, float]]:
    """Inputs full of subnormal numbers, and weights that decay into them."""
    info = np.finfo(q.dtype)
    tiny, lowest = info.dtype.type(info.tiny * 1e-2), float(np.log(info.tiny))
    steep, decaying = np.zeros_like(q), np.zeros_like(k)
    steep[..., 0] = np.sqrt(q.shape[-1])  # so a score is the key's first element
    decaying[..., 1:, 0] = np.linspace(0.9 * lowest, 1.2 * lowest, k.shape[-2] - 1)
    yield "subnormal weights", (steep, decaying, v), SUBNORMAL
    yield "subnormal values", (q, k, v * tiny), SUBNORMAL
    yield "subnormal queries and keys", (q * tiny, k * tiny, v), SUBNORMAL


def broken(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Iterator[tuple[str, Arrays, float]]:
    k, v = k.copy(), v.copy()
    k[0, 0, 7, 0] = np.nan
    v[0, 0, 7, 0] = np.inf
    yield "NaN in a key of one head", (q, k, v), BROKEN


def cases() -> tuple[Case, ...]:
    return (
        case("1x12x2048", 64),
        case("1x12x2048", 64, causal=True),
        case("1x8x1024", 64, dtype="float64"),
        case("1x8x1", 64, kv_len=8192),
        case("1x8x8", 64, kv_len=8192),
    )


def measure_attention(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    for plain in cases():
        q, k, v = work.inputs(plain)
        kinds = (peaked, skewed, subnormal, broken) if plain.q_len > 8 else (peaked, skewed, subnormal)
        odd = [variant for kind in kinds for variant in kind(q, k, v)]
        for n in threads:
            call = partial(qkv_fast.attention, causal=plain.causal, num_threads=n)
            calls = [Local("N(0, 1)", partial(call, q, k, v)), *(Local(name, partial(call, *a)) for name, a, _ in odd)]
            rounds = interleave(calls, budget=seconds / (len(cases()) * len(threads)))
            for name, _, most in odd:
                found = rounds.ratio(name, "N(0, 1)")
                title = f"{name}, {plain.name}, {threads_text(n)}"
                yield Measured(title, found.median, "x", most, spread=found.spread)


def measure_stages(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Softmax of peaked scores, and values weighted by it."""
    rng = np.random.default_rng(0)
    scores, values = (rng.standard_normal(s, dtype="float32") for s in ((8, 1024, 1024), (8, 1024, 64)))
    inputs = {f"scores of deviation {d}": scores * np.float32(d) for d in (1, *DEVIATIONS)}
    weights = {name: qkv_fast.softmax(x) for name, x in inputs.items()}
    plain, *odd = inputs
    for n in threads:
        for stage, call, given in (
            ("softmax", partial(qkv_fast.softmax, out=np.empty_like(scores), num_threads=n), inputs),
            ("weighted_values", partial(qkv_fast.weighted_values, v=values, num_threads=n), weights),
        ):
            rounds = interleave([Local(name, partial(call, x)) for name, x in given.items()], budget=seconds / 2)
            for name in odd:
                found = rounds.ratio(name, plain)
                yield Measured(
                    f"{stage}, {name}, {threads_text(n)}", found.median, "x", PEAKED, spread=found.spread
                )
