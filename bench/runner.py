"""From cases to rows: prepare ours and the peers, check every answer, time them in interleaved rounds.

Jobs are (case, thread count) pairs, taken by thread count so that each peer's process is started once per
count. A job that cannot be run is a row with a reason, never a gap; what is finished when Ctrl-C comes is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np

import qkv_fast

from .. import _runtime
from .cases import Case, Goal
from .method import Local, Refused, Rounds, Summary, describe, interleave
from .peers import PEERS
from .worker import Ready, Worker, check

OURS = "qkv_fast"
GOAL_ISA = "avx512"  # the path that goals without a path of their own are for
PEAK_SECONDS = 0.02  # of each of the two peak measurements in a round


@dataclass(frozen=True)
class Job:
    case: Case
    threads: int

    def __str__(self) -> str:
        return f"{self.case.name}, {threads_text(self.threads)}"


def threads_text(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


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

    @property
    def time(self) -> Summary:
        return self.rounds.time(OURS)

    @property
    def rate(self) -> float:
        """Useful operations per second."""
        return self.job.case.flops() / self.time.median

    @property
    def share(self) -> Summary:
        return self.rounds.share_of_peak(OURS, self.job.case.flops())

    def speedup(self, peer: str) -> Summary:
        """How many times faster than a peer, both in the same round."""
        return self.rounds.ratio(peer, OURS)

    @property
    def goal(self) -> Goal | None:
        """What the case must reach, if it is meant for this thread count and path."""
        case = self.job.case
        fits = case.threads is None or self.job.threads in case.threads
        return case.goal if fits and self.isa == (case.isa or GOAL_ISA) else None

    @property
    def verdict(self) -> str:
        """One of "aim", "floor" and "below"; empty without a goal."""
        goal = self.goal
        if self.error or not goal:
            return ""
        return goal.verdict(self.share.median if goal.unit == "peak" else self.time.median)


def plan(cases: Iterable[Case], default: Iterable[int], asked: Iterable[int] | None = None) -> list[Job]:
    """Every case at the thread counts asked for, else at those that it is about, else at the default ones."""
    jobs = [Job(c, n) for c in cases for n in asked or c.threads or default]
    return sorted(jobs, key=lambda job: job.threads)


def run(
    jobs: list[Job],
    peers: list[str],
    *,
    seconds: float,
    isa: str | None = None,
    reuse_out: bool = False,
    adapters: dict[str, type] = PEERS,
    rounds: tuple[int, int] | None = None,
    started: Callable[[Job], None] = lambda job: None,
) -> Iterator[Row]:
    """Rows in the order of the jobs, each as soon as it is measured; `seconds` of timing for each job."""
    workers: dict[str, Worker] = {}
    threads = None
    try:
        for job in jobs:
            if job.threads != threads:
                close(workers)
                threads = job.threads
            started(job)
            yield run_job(job, peers, workers, adapters, seconds, isa, reuse_out, rounds)
    finally:
        close(workers)


def close(workers: dict[str, Worker]) -> None:
    for worker in workers.values():
        worker.close()
    workers.clear()


def run_job(job, peers, workers, adapters, seconds, isa, reuse_out, rounds) -> Row:
    case = job.case if isa is None else replace(job.case, isa=isa)
    path = case.isa or qkv_fast.isa()
    row = Row(job, isa=path)
    if path not in qkv_fast.available_isas():
        row.error = f"path {path} is not available here"
        return row
    try:
        with _runtime.force_isa(path) if case.isa else nullcontext():
            call = ours(case, job.threads, reuse_out)
            answer = head_first(case, call())
            try:
                row.our_error = check(case, answer)
            except Refused:
                row.wrong = True
                raise
            del answer  # or its memory could not be used again
            contestants = [Local(OURS, call), *summon(case, job.threads, peers, workers, adapters, row)]
            row.rounds = interleave(
                contestants,
                peak=lambda: _runtime.peak_flops(case.dtype, job.threads, PEAK_SECONDS),
                budget=seconds,
                **({"rounds": rounds} if rounds else {}),
            )
        row.failures.update(row.rounds.failures)
        for name in row.rounds.failures:
            if name in workers and not workers[name].process.is_alive():
                workers.pop(name).close()
    except MemoryError:
        row.error = "out of memory"
    except Refused as refusal:
        row.error = str(refusal)
    except Exception as error:  # one bad case must not take the others' results with it
        row.error = describe(error)
    return row


def ours(case: Case, threads: int, reuse_out: bool = False) -> Callable[[], np.ndarray]:
    """The call as a user writes it; with `reuse_out` into one output array."""
    q, k, v = case.inputs()
    options = dict(case.arguments(), num_threads=threads)
    if case.layout != "bhld":
        options["layout"] = case.layout
    if case.kv_lengths:
        options["kv_lengths"] = np.array(case.kv_lengths)
    if reuse_out:
        options["out"] = np.empty((*q.shape[:-1], case.value_dim), q.dtype)
    attention = qkv_fast.attention
    return lambda: attention(q, k, v, **options)


def head_first(case: Case, answer: np.ndarray) -> np.ndarray:
    return answer.swapaxes(1, 2) if case.layout == "blhd" else answer


def summon(case, threads, peers, workers, adapters, row: Row) -> list[Worker]:
    """The peers that can do the case and do it right, ready to be timed; the others' reasons go to `row`."""
    ready = []
    for name in peers:
        try:
            if name not in workers:
                workers[name] = Worker(adapters[name], threads)
            row.ready[name] = workers[name].prepare(case)
            if row.ready[name].threads != threads:
                raise Refused(f"would use {row.ready[name].threads} threads, not {threads}")
            ready.append(workers[name])
        except Refused as refusal:
            row.failures[name] = str(refusal)
            if name in workers and not workers[name].process.is_alive():
                workers.pop(name).close()
    return ready
