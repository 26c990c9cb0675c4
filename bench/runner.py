"""From cases to rows: prepare ours and the peers, check every answer, time them in interleaved rounds.

Jobs are (case, thread count) pairs, taken by thread count so that each peer's process is started once per
count. A job that cannot be run is a row with a reason, never a gap; what is finished when Ctrl-C comes is
kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import qkv_fast

from .. import _runtime
from . import limits, machine, memory, work
from .answers import Exact
from .cases import Case, Goal
from .method import DISTURBED, MAX_ROUNDS, MIN_ROUNDS, Local, Refused, Rounds, Summary, describe, interleave
from .ours import OURS, Ours, ours
from .peers import PEERS
from .worker import Ready, Worker, first_call_memory

GOAL_ISAS = ("avx512bf16", "avx512")  # the paths that goals without a path of their own are for


@dataclass(frozen=True)
class Job:
    case: Case
    threads: int

    def __str__(self) -> str:
        return f"{self.case.name}, {threads_text(self.threads)}"


def threads_text(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


@dataclass(frozen=True)
class How:
    """How jobs are run: peers by name, seconds of timing for each job, CPU path, and whose memory is measured."""

    peers: tuple[str, ...] = ()
    seconds: float = 0.0
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS)
    isa: str | None = None
    reuse_out: bool = False
    peers_memory: bool = False
    adapters: dict[str, type] = field(default_factory=lambda: PEERS)


@dataclass
class Row:
    """What is known of a job: `error` if it could not run, else `rounds`; by peer `ready` or `failures`."""

    job: Job
    isa: str = ""
    error: str = ""
    wrong: bool = False  # our own answer was not right
    our_error: float = 0.0  # largest difference of our answer to the reference
    rounds: Rounds | None = None
    ready: dict[str, Ready] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # bytes that a first call adds, by contestant

    @property
    def time(self) -> Summary:
        return self.rounds.time(OURS)

    @property
    def amount(self) -> int:
        """Work of a call in the unit of its limit."""
        return work.amount(self.job.case)

    @property
    def share(self) -> Summary:
        """Rate over the case's limit."""
        return self.rounds.share(OURS, self.amount)

    def rate(self, name: str) -> float:
        """Work per second of a contestant."""
        return self.amount / self.rounds.time(name).median

    def speedup(self, peer: str) -> Summary:
        """How many times faster than a peer, both in the same round."""
        return self.rounds.ratio(peer, OURS)

    @property
    def disturbed(self) -> dict[str, float]:
        """Peers after whose turn the machine gave clearly less than after ours, and how many times less."""
        found = {name: self.rounds.disturbance(name, OURS) for name in self.rounds.left if name != OURS}
        return {name: ratio for name, ratio in found.items() if ratio > DISTURBED}

    @property
    def finished(self) -> list[str]:
        """Peers that were timed to the end."""
        return [name for name in self.ready if name not in self.failures]

    @property
    def goal(self) -> Goal | None:
        """What the case must reach, if it is meant for this CPU, thread count and path."""
        case, goal = self.job.case, self.job.case.goal
        if goal is None or goal.everywhere:
            return goal
        fits = machine.is_reference() and (case.threads is None or self.job.threads in case.threads)
        return goal if fits and self.isa in ((case.isa,) if case.isa else GOAL_ISAS) else None

    @property
    def verdict(self) -> str:
        """One of "aim", "floor" and "below"; empty without a goal."""
        goal = self.goal
        if self.error or not goal:
            return ""
        if goal.unit in ("peak", "seconds"):
            return goal.verdict(self.share.median if goal.unit == "peak" else self.time.median)
        return goal.verdict(self.speedup(goal.unit).median) if goal.unit in self.finished else ""


def plan(cases: Iterable[Case], default: Iterable[int], asked: Iterable[int] | None = None) -> list[Job]:
    """Every case at the thread counts asked for, else at those that it is about, else at the default ones."""
    jobs = [Job(c, n) for c in cases for n in asked or c.threads or default]
    return sorted(jobs, key=lambda job: job.threads)


def run(jobs: list[Job], how: How, started: Callable[[Job], None] = lambda job: None) -> Iterator[Row]:
    """Rows in the order of the jobs, each as soon as it is measured."""
    workers: dict[str, Worker] = {}
    threads = None
    try:
        for job in jobs:
            if job.threads != threads:
                close(workers)
                threads = job.threads
            started(job)
            yield run_job(job, how, workers)
    finally:
        close(workers)


def close(workers: dict[str, Worker]) -> None:
    for worker in workers.values():
        worker.close()
    workers.clear()


def run_job(job: Job, how: How, workers: dict[str, Worker]) -> Row:
    case = job.case if how.isa is None else replace(job.case, isa=how.isa)
    row = Row(job, isa=case.isa or qkv_fast.isa())
    if row.isa not in qkv_fast.available_isas():
        row.error = f"path {row.isa} is not available here"
        return row
    try:
        check_memory(case)
        with _runtime.force_isa(case.isa) if case.isa else nullcontext():
            measure(row, case, how, workers)
    except MemoryError as error:
        row.error = f"out of memory: {error}" if str(error) else "out of memory"
    except Refused as refusal:
        row.error = str(refusal)
    except Exception as error:  # one bad case must not take the others' results with it
        row.error = describe(error)
    return row


def check_memory(case: Case) -> None:
    """MemoryError where the system would have to kill someone: it promises more memory than it has."""
    elements = sum(math.prod(shape) for shape in work.operation(case).shapes(case))
    once = work.bytes_of(case)
    needed = once * work.copies(case) + max(4 * once, 16 * elements)  # of the reference, in float64
    there = memory.left()
    if there is not None and needed > there:
        raise MemoryError(f"the case takes about {needed / 2**30:.3g} GB, {there / 2**30:.3g} GB are left")


def measure(row: Row, case: Case, how: How, workers: dict[str, Worker]) -> None:
    """Fill the row: answers, memory, times."""
    threads = row.job.threads
    exact = Exact.of(case)
    call = ours(case, threads, how.reuse_out)
    try:
        row.our_error = exact.error(work.operation(case).head_first(case, call()))
    except Refused:
        row.wrong = True
        raise
    crew = summon(row, case, exact, how, workers)
    measure_memory(row, case, how)
    row.rounds = interleave(
        [Local(OURS, call), *crew],
        limit=limits.of_case(case, threads),
        probe=limits.probe(threads) if crew else None,
        budget=how.seconds,
        rounds=how.rounds,
    )
    row.failures.update(row.rounds.failures)
    dismiss(row.rounds.failures, workers)


def summon(row: Row, case: Case, exact: Exact, how: How, workers: dict[str, Worker]) -> list[Worker]:
    """The peers that can do the case and do it right, ready to be timed; the others' reasons go to `row`."""
    crew, threads = [], row.job.threads
    for name in how.peers:
        try:
            if name not in workers:
                workers[name] = Worker(how.adapters[name], threads)
            row.ready[name] = ready = workers[name].prepare(case, exact)
            if ready.threads != threads:
                raise Refused(f"would use {ready.threads} threads, not {threads}")
            crew.append(workers[name])
        except Refused as refusal:
            row.failures[name] = str(refusal)
            dismiss([name], workers)
    return crew


def dismiss(names: Iterable[str], workers: dict[str, Worker]) -> None:
    """Forget processes that are no more, so that the next case starts new ones."""
    for name in names:
        if name in workers and not workers[name].alive:
            workers.pop(name).close()


def measure_memory(row: Row, case: Case, how: How) -> None:
    """What a first call adds, each in a process of its own."""
    adapters = {OURS: (Ours, "")}
    if how.peers_memory:
        adapters |= {name: (how.adapters[name], row.ready[name].label) for name in row.finished}
    for name, (adapter, label) in adapters.items():
        try:
            added = first_call_memory(adapter, case, row.job.threads, label)
        except Refused:  # it stays unknown; whether the contestant can be timed is another question
            continue
        if added is not None:
            row.memory[name] = added
