"""A figure with the bounds that it is held to, and what properties are measured with: ratios, fresh processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import qkv_fast

from . import machine
from .method import Local, Summary, describe, interleave


@dataclass(frozen=True)
class Measured:
    """One figure; `more` says whether more is better, `floor` what it must reach (None: it is only shown), `aim` what
    it should."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    aim: float | None = None
    more: bool = False
    spread: float = 0.0
    note: str = ""
    judged: bool = True  # whether the bounds are meant for this CPU

    @property
    def verdict(self) -> str:
        def reached(bound: float) -> bool:
            return self.value >= bound if self.more else self.value <= bound

        if self.floor is None or not self.judged:
            return ""
        if self.aim is not None and reached(self.aim):
            return "aim"
        return "ok" if reached(self.floor) else "below"


@dataclass(frozen=True)
class Property:
    name: str
    suites: tuple[str, ...]
    measure: Callable[[float, tuple[int, ...]], Iterator[Measured]]  # (seconds to spend, thread counts)
    everywhere: bool = False  # whether its bounds hold on every CPU; else on those like the one that they are from


def measure(asked: Property, seconds: float, threads: tuple[int, ...]) -> list[Measured]:
    """The figures of a property; a failure is a figure too, with its reason as the note."""
    found: list[Measured] = []
    try:
        judged = asked.everywhere or machine.is_reference()
        found.extend(replace(figure, judged=judged) for figure in asked.measure(seconds, threads))
    except Exception as error:  # one that cannot be measured must not take the rest with it
        found.append(Measured(asked.name, math.nan, "", note=describe(error)))
    return found


def ratio(slow: Callable, fast: Callable, seconds: float) -> Summary:
    """Time of one call over that of another, in interleaved rounds."""
    rounds = interleave([Local("fast", fast), Local("slow", slow)], budget=seconds)
    return rounds.ratio("slow", "fast")


def child(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Output of a fresh interpreter on the current CPU path; -P keeps the current folder off its path."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=os.environ | {"QKV_FAST_ISA": qkv_fast.isa()} | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else f"exit {done.returncode}")
    return done.stdout
