"""Calls where programs have them: after a matrix product of NumPy, with other work in between, inside a block.

A benchmark's loop has the machine to itself. In a program NumPy's products come before and after the call, and the
threads of their pool (OpenBLAS's spin for about 0.1 s after a product) sit on the cores that ours need. Which pools
there are and what the environment says to them is part of such a figure, so each is taken in a process of its own:
`measure_...` starts it, and the function of the same name without `measure_` runs there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

import qkv_fast

from . import work
from .cases import case
from .measured import Measured, child
from .method import Summary
from .peers import NumPy
from .runner import threads_text
from .tables import seconds_text

# What OpenBLAS's threads spin: 2**26 clock ticks unless it is told, and 2**4, the least that it takes, if it is.
POOLS: dict[str, dict[str, str]] = {"": {}, "OPENBLAS_THREAD_TIMEOUT=4": {"OPENBLAS_THREAD_TIMEOUT": "4"}}
QUIET = 0.15  # seconds after which no thread spins any more
CALLS = 8  # of a sample, after an untimed one
GAPS = (30, 100, 300)  # microseconds
GAP_CALLS = 100
LEAST_ROUNDS = 5
BLOCKS = {"1x512x768": (1, 512, 12, 64), "vit 8x197x768": (8, 197, 12, 64)}  # batch, length, heads, dim

Samples = dict[str, list[float]]


def apart(function: Callable[..., Samples], *arguments: float | str, environment: dict[str, str]) -> Samples:
    """What a function gives in a process of its own: numbers and words in, lists of seconds out."""
    code = f"""
import json, sys
from {function.__module__} import {function.__name__}
print(json.dumps({function.__name__}(*json.loads(sys.argv[1]))))
"""
    return json.loads(child(code, json.dumps(arguments), environment=environment))


def ratio_of(found: Samples, over: str, under: str) -> Summary:
    return Summary.of([a / b for a, b in zip(found[over], found[under], strict=True)])


def sample(before: Callable[[], object], call: Callable[[], object], count: int) -> float:
    """Median time of a call that something else comes before, which is not timed."""
    times = []
    for _ in range(count + 1):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def rounds(contestants: dict[str, Callable[[], float]], seconds: float, least: int | None = None) -> Samples:
    """Samples of each in turn, for about that long."""
    found: Samples = {name: [] for name in contestants}
    start, done = time.perf_counter(), 0
    while done < (LEAST_ROUNDS if least is None else least) or time.perf_counter() - start < seconds:
        for name, contestant in contestants.items():
            found[name].append(contestant())
        done += 1
    return found


def after_product(threads: int, seconds: float) -> Samples:
    """A call right after a product, and after a sleep as long in which no other thread runs; the product's arrays are
    read after the sleep, so that the caches hold the same."""
    q, k, v = work.inputs(case("1x12x512", 64))
    x, w, y = (np.ones(shape, np.float32) for shape in ((512, 768), (768, 768), (512, 768)))
    call = partial(qkv_fast.attention, q, k, v, num_threads=threads)
    product = partial(np.matmul, x, w, out=y)
    length = sample(lambda: None, product, CALLS)

    def pause() -> None:
        time.sleep(length)
        for array in (x, w, y):
            array.sum()

    def after_pauses() -> float:
        time.sleep(QUIET)
        return sample(pause, call, CALLS)

    return rounds({"product": lambda: sample(product, call, CALLS), "pause": after_pauses}, seconds)


def measure_after_product(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Attention right after a matrix product of NumPy, whose threads may still spin, over the same after a pause."""
    for n in threads:
        for (pool, environment), bound in zip(POOLS.items(), (1.55, 1.10), strict=True):
            found = apart(after_product, n, seconds / (2 * len(threads)), environment=environment)
            over = ratio_of(found, "product", "pause")
            after, cold = (seconds_text(statistics.median(found[name])) for name in ("product", "pause"))
            name = f"1x12x512-d64 right after a product, {threads_text(n)}" + (f", {pool}" if pool else "")
            note = f"{after}; {cold} after a pause"
            yield Measured(name, over.median, "x", bound, spread=over.spread, note=note)


def gaps(threads: int, seconds: float) -> Samples:
    """A small call with other work before each, on one thread and on several."""
    q, k, v = work.inputs(case("3x12x1", 64, kv_len=60))
    small = np.ones(64, np.float32)

    def other_work(length: float) -> None:
        until = time.perf_counter() + length
        while time.perf_counter() < until:
            np.add(small, small, out=small)
            np.multiply(small, 0.5, out=small)

    def contestant(gap: int, n: int) -> Callable[[], float]:
        call = partial(qkv_fast.attention, q, k, v, num_threads=n)
        return lambda: sample(partial(other_work, gap * 1e-6), call, GAP_CALLS)

    return rounds({f"{gap} {n}": contestant(gap, n) for gap in GAPS for n in (1, threads)}, seconds)


def measure_gaps(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Small calls with gaps of other work, during which our threads fall asleep: several threads over one."""
    n = max(threads)
    if n == 1:
        return
    found = apart(gaps, n, seconds, environment={})
    for gap in GAPS:
        over = ratio_of(found, f"{gap} {n}", f"{gap} 1")
        many, one = (seconds_text(statistics.median(found[f"{gap} {count}"])) for count in (n, 1))
        name = f"3x12x1-d64-k60 every {gap} µs, {threads_text(n)} over 1"
        # No slower than one thread, and 5 % for the noise of calls so short.
        yield Measured(name, over.median, "x", 1.05, 1.0, spread=over.spread, note=f"{many}; {one} on 1 thread")


def block(batch: int, length: int, heads: int, dim: int, threads: int, seconds: float) -> Samples:
    """Project, attend, project: all of it, the call inside it, and the call in a loop of its own."""
    width = heads * dim
    rng = np.random.default_rng(0)
    x, w_in, w_out = (
        rng.standard_normal(shape, dtype="float32") / np.float32(width**0.5)
        for shape in ((batch, length, width), (width, 3 * width), (width, width))
    )
    times: dict[str, float] = {}

    def attend(projected: np.ndarray) -> np.ndarray:
        q, k, v = (projected.reshape(batch, length, 3, heads, dim)[:, :, i] for i in range(3))
        return qkv_fast.attention(q, k, v, layout="blhd", num_threads=threads)

    def whole() -> None:
        start = time.perf_counter()
        projected = np.matmul(x, w_in)
        before = time.perf_counter()
        attended = attend(projected)
        after = time.perf_counter()
        np.matmul(attended.reshape(batch, length, width), w_out)
        times["block"], times["inside"] = time.perf_counter() - start, after - before

    projected = np.matmul(x, w_in)
    found: Samples = {"block": [], "inside": [], "alone": []}
    start = time.perf_counter()
    while len(found["block"]) < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        passes = []
        for _ in range(CALLS + 1):
            whole()
            passes.append((times["block"], times["inside"]))
        for name, samples in zip(("block", "inside"), zip(*passes[1:], strict=True), strict=True):
            found[name].append(statistics.median(samples))
        time.sleep(QUIET)
        found["alone"].append(sample(lambda: None, partial(attend, projected), CALLS))
    return found


def measure_block(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Attention's share of a block's time, between the projections of NumPy."""
    for n in threads:
        for shape, sizes in BLOCKS.items():
            for pool, environment in POOLS.items():
                part = seconds / (len(threads) * len(BLOCKS) * len(POOLS))
                found = apart(block, *sizes, n, part, environment=environment)
                share = ratio_of(found, "inside", "block")
                whole, inside, alone = (
                    seconds_text(statistics.median(found[name])) for name in ("block", "inside", "alone")
                )
                name = f"block {shape}: attention's share, {threads_text(n)}" + (f", {pool}" if pool else "")
                note = f"block {whole}, attention {inside} in it, {alone} in a loop"
                yield Measured(name, 100 * share.median, "%", spread=share.spread, note=note)


def layers(batch: int, length: int, heads: int, dim: int, threads: int, seconds: float) -> Samples:
    """A block by our layers, when no other thread spins, and by products of NumPy, whose threads do."""
    width = heads * dim
    rng = np.random.default_rng(0)
    x, w_in, w_out = (
        rng.standard_normal(shape, dtype="float32") / np.float32(width**0.5)
        for shape in ((batch, length, width), (3 * width, width), (width, width))
    )
    attend = partial(qkv_fast.attention, layout="blhd", num_threads=threads)

    packed_in, packed_out = qkv_fast.Linear(w_in), qkv_fast.Linear(w_out)

    def ours() -> np.ndarray:
        q, k, v = qkv_fast.project_qkv(x, w_in, None, heads, layout="blhd", num_threads=threads)
        return qkv_fast.linear(attend(q, k, v).reshape(batch, length, width), w_out, num_threads=threads)

    def packed() -> np.ndarray:
        q, k, v = qkv_fast.project_qkv(x, packed_in, None, heads, layout="blhd", num_threads=threads)
        return packed_out(attend(q, k, v).reshape(batch, length, width), num_threads=threads)

    def with_numpy() -> np.ndarray:
        projected = np.matmul(x, w_in.T).reshape(batch, length, 3, heads, dim)
        q, k, v = (projected[:, :, i] for i in range(3))
        return np.matmul(attend(q, k, v).reshape(batch, length, width), w_out.T)

    def after_pause(call: Callable[[], np.ndarray]) -> float:
        time.sleep(QUIET)
        return sample(lambda: None, call, CALLS)

    contestants = {
        "numpy": lambda: sample(lambda: None, with_numpy, CALLS),
        "ours": lambda: after_pause(ours),
        "packed": lambda: after_pause(packed),
    }
    return rounds(contestants, seconds)


def measure_layers(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """project_qkv, attention, linear against the same attention between products of NumPy, times as fast."""
    for n in threads:
        for shape, sizes in BLOCKS.items():
            found = apart(layers, *sizes, n, seconds / (len(threads) * len(BLOCKS)), environment=NumPy.environment(n))
            for whose, what in {"ours": "our layers", "packed": "our packed layers"}.items():
                times = ratio_of(found, "numpy", whose)
                note = "; ".join(f"{seconds_text(statistics.median(found[name]))} {name}" for name in (whose, "numpy"))
                name = f"block {shape} by {what} over NumPy's products, {threads_text(n)}"
                yield Measured(name, times.median, "x", 1.25, 1.6, more=True, spread=times.spread, note=note)
