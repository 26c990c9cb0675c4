"""How things are timed: warm-up, interleaved rounds, medians with their spread.

Machines are shared and their clocks move, so no time means anything alone. In every round each contestant is
timed once (A B C, A B C, ...), the machine's limit (the FMA peak, or the read bandwidth) right before and right after
the first, and what is reported are medians over rounds of quantities formed within one round: a ratio of two times,
or a rate over the mean of its neighbouring limits.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SAMPLE_SECONDS = 0.02  # a sample repeats short calls for about this long
LONG_SECONDS = 1.0  # of a call; what another's turn leaves behind costs it milliseconds
MIN_ROUNDS, MAX_ROUNDS = 5, 25
FEWEST_ROUNDS = 3  # where those that are asked for would take much longer than there is time
PATIENCE = 2.0  # times the budget is "much longer"
DISTURBED = 1.15  # a machine that gives that much less after a contestant's turn than after ours is not all ours
WIDE_SPREAD = 0.10  # an interquartile range beyond this share of the median is flagged


class Refused(Exception):
    """A contestant cannot do what it was asked; the text says why, in one line."""


class Contestant(Protocol):
    """Something that is timed; a peer in its own process looks the same as a call in this one."""

    name: str

    def sample(self, repeats: int) -> float:
        """Seconds per call, mean of `repeats` calls after an untimed one; of 0 repeats the time of that one."""
        ...


@dataclass
class Local:
    """A contestant in this process."""

    name: str
    call: Callable[[], object]

    def sample(self, repeats: int) -> float:
        return timed(self.call, repeats)


def timed(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call. Results are dropped at once, as in a caller's loop.

    An untimed call comes first, before long ones too: after another's turn the caches hold other data and the pool's
    threads sleep, so that the first call takes 1.05 to 1.6 times as long, whoever makes it. Where no other is asked
    for, or it takes LONG_SECONDS, its own time is the answer.
    """
    counter = time.perf_counter
    start = counter()
    call()
    first = counter() - start
    if not repeats or (repeats == 1 and first > LONG_SECONDS):
        return first
    start = counter()
    for _ in range(repeats):
        call()
    return (counter() - start) / repeats


def rotate(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The calls in turn, over and over: each finds its inputs in memory, because the others' have been through."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def calibrate(contestant: Contestant) -> int:
    """Warm a contestant up and choose how many calls make a sample."""
    seconds = contestant.sample(0)
    for _ in range(2):  # twice: the first call of anything is slow
        if seconds < SAMPLE_SECONDS:
            seconds = contestant.sample(max(1, min(1000, int(SAMPLE_SECONDS / 4 / max(seconds, 1e-7)))))
    return max(1, round(SAMPLE_SECONDS / max(seconds, 1e-7)))


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of one quantity over the rounds."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        values = [v for v in values if not math.isnan(v)]
        if not values:
            return cls(math.nan, math.nan, math.nan, 0)
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.high - self.low) / self.median if self.median else math.nan

    @property
    def wide(self) -> bool:
        return self.spread > WIDE_SPREAD


@dataclass
class Rounds:
    """What was measured: per contestant a time per round and what the machine gave right after it, and the pair of
    limits around the first contestant.

    A contestant that failed keeps NaN from then on, so that lists stay aligned round by round.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    limits: list[tuple[float, float]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    left: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str) -> Summary:
        return Summary.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Summary:
        """Times of `name` over times of `to`, round by round."""
        return Summary.of([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])

    def disturbance(self, name: str, ours: str) -> float:
        """What the machine gave right after our turn over what it gave right after another's: above 1 the other's
        threads were not at rest yet. NaN where it was not measured."""
        pairs = zip(self.left.get(ours, ()), self.left.get(name, ()), strict=True)
        return Summary.of([after_ours / after for after_ours, after in pairs]).median

    def share(self, name: str, work: float) -> Summary:
        """Rate of `name`, at `work` per call, over the mean of the limits measured in the same round."""
        means = [(before + after) / 2 for before, after in self.limits]
        return Summary.of([work / s / limit for s, limit in zip(self.seconds[name], means, strict=True)])


def interleave(
    contestants: Sequence[Contestant],
    *,
    limit: Callable[[], float] | None = None,
    probe: Callable[[], float] | None = None,
    budget: float = 5.0,
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS),
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Time the contestants in turn, round after round, for about `budget` seconds; `rounds`: (least, most).

    `limit` is measured around the first contestant, `probe` right after everyone's turn. Where rounds take so long that
    the least of them would be far over the budget, FEWEST_ROUNDS have to do.
    An exception in the first contestant is the caller's; in any other it ends that contestant only.
    """
    result = Rounds({c.name: [] for c in contestants}, left={c.name: [] for c in contestants} if probe else {})
    repeats: dict[str, int] = {}

    def attempt(contestant: Contestant, action: Callable[[], float]) -> float:
        if contestant is contestants[0]:
            return action()
        try:
            return action()
        except Exception as error:  # whatever a peer raises is its column's text
            result.failures[contestant.name] = describe(error)
            return math.nan

    for contestant in contestants:
        value = attempt(contestant, lambda c=contestant: calibrate(c))
        repeats[contestant.name] = 0 if math.isnan(value) else int(value)
    least, most = rounds
    start = clock()
    for done in range(most):
        spent = clock() - start if done else 0.0
        if done >= least and spent * (done + 1) / done > budget:
            break
        if done >= min(least, FEWEST_ROUNDS) and spent > PATIENCE * budget:
            break
        before = limit() if limit else math.nan
        for index, contestant in enumerate(contestants):
            seconds = math.nan
            if contestant.name not in result.failures:
                seconds = attempt(contestant, lambda c=contestant: c.sample(repeats[c.name]))
            result.seconds[contestant.name].append(seconds)
            if index == 0:
                result.limits.append((before, limit() if limit else math.nan))
            if probe:
                failed = contestant.name in result.failures
                result.left[contestant.name].append(math.nan if failed else probe())
    return result


def describe(error: BaseException) -> str:
    """One line about an exception."""
    text = " ".join(str(error).split())
    if isinstance(error, Refused):
        return text[:300]
    kind = type(error).__name__
    return f"{kind}: {text}"[:300] if text else kind
