"""The machine's limits, measured by loops in our own C core: multiply-adds in registers, reading and copying memory.

A case with hardly any work is limited by how fast Python makes a call, which gets a measure too.
They are taken beside every sample of ours (what a row's share of the limit refers to), and before and after the whole
run, so that a reader sees whether the machine was the same throughout. More threads than CPUs add nothing to what a
machine can do, and would upset the loops, each of which expects a CPU of its own: they run on as many as there are.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

import numpy as np

from .. import _runtime
from . import machine
from .cases import Case
from .work import STREAM_BYTES, limited_by

BESIDE_SECONDS = 0.02  # of each of the two measurements around a sample
RUN_SECONDS = 0.05
PROBE_SECONDS = 0.008  # as long as what a neighbour does shows in it, and no longer
RATES = ("float32", "float64", "bfloat16", "read", "copy")  # what a run notes; a case may also be limited by "calls"


@functools.cache
def memory() -> np.ndarray:
    """What is read: too large for any cache."""
    return np.ones(STREAM_BYTES, np.uint8)


@functools.cache
def copied() -> np.ndarray:
    """Where a copy of it goes."""
    return np.zeros_like(memory())


def of_case(case: Case, threads: int) -> Callable[[], float]:
    """What limits a case, measured anew at each call."""
    return lambda: rate(limited_by(case), threads, BESIDE_SECONDS)


def probe(threads: int) -> Callable[[], float]:
    """What the machine gives at the moment, in multiply-adds: less where another's threads are still at it."""
    return lambda: rate("float32", threads, PROBE_SECONDS)


def rate(name: str, threads: int, seconds: float) -> float:
    """Bytes, calls or operations per second; 0 where the CPU or the build lacks the instruction."""
    threads = min(threads, machine.cpu_count())
    if name == "read":
        return _runtime.read_bandwidth(memory(), threads, seconds)
    if name == "copy":
        return _runtime.copy_bandwidth(copied(), memory(), threads, seconds)
    if name == "calls":
        return call_rate(seconds)
    return _runtime.peak_flops(name, threads, seconds)


def call_rate(seconds: float) -> float:
    """Calls per second of a NumPy function on next to nothing: how fast Python is at the moment."""
    x, add = np.zeros(8), np.add
    done, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        for _ in range(100):
            add(x, x, x)
        done += 100
    return done / (now - begin)


def measure(threads: Iterable[int], seconds: float = RUN_SECONDS) -> dict[int, dict[str, float]]:
    """Every rate at every thread count."""
    return {n: {name: rate(name, n, seconds) for name in RATES} for n in sorted(set(threads))}
