"""The commands: `qkv-fast` (checkup.py) and `qkv-fast bench` (suites against peers)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext

import qkv_fast

from .. import _runtime
from . import (
    cases,
    compare,
    limits,
    machine,
    measured,
    options,
    peers,
    plots,
    properties,
    record,
    report,
    runner,
    verdict,
)
from .checkup import check_and_time
from .method import MAX_ROUNDS, MIN_ROUNDS
from .outcome import EXIT_FAILED, EXIT_USAGE, Outcome
from .progress import Progress
from .tables import print_markdown, show

SECONDS, QUICK_SECONDS = 4.0, 1.5  # of timing for each row
QUICK_ROUNDS = 3  # at least; in a hurry that will do


def bench(argv: list[str]) -> int:
    """`qkv-fast bench`: suites of cases against the peers, and what else the library is held to."""
    args = options.bench_parser().parse_args(argv)
    args.suite = args.suite or ("all" if args.case else "quick")
    try:
        chosen, asked = choose(args.suite, args.case, args.dtype)
        names = peers.choose(args.peers)
        options.check_isa(args.isa)
        threads = args.threads or default_threads(args.suite)
        check_threads(threads)
        jobs = runner.plan(chosen, threads, args.threads)
        options.check_comparison(args.compare, args.fail_over)
        old = compare.load(args.compare) if args.compare else None
        if old:
            compare.check_common(old, planned(jobs, args.isa), args.compare)
        options.check_plots(args.plot)
        options.check_writable(args.json)
    except ValueError as error:
        print(f"qkv-fast bench: {error}", file=sys.stderr)
        return EXIT_USAGE
    if args.list:
        for entry in (*chosen, *asked):
            print(f"{entry.name:40} {', '.join(s for s in entry.suites if s in cases.SUITES)}")
        return 0
    outcome = Outcome(["bench", *argv])
    print(report.machine_text(outcome.machine), end="\n\n", flush=True)
    measure(outcome, args, threads, jobs, asked, names)
    present(outcome, args, names)
    data = outcome.data()
    if args.json:
        record.save(args.json, data)
    if args.plot:
        for path in plots.draw(data, args.plot):
            print(f"drawn: {path}")
    status = outcome.status()
    if old:
        try:
            compare.check_common(old, compare.finished(data), args.compare)
        except ValueError as error:  # what was to be compared could not be run
            print(f"qkv-fast bench: {error}", file=sys.stderr)
            return status or EXIT_USAGE
        found = compare.changes(old, data)
        (print_markdown if args.markdown else show)(compare.table(old, data, found, args.compare))
        if args.fail_over is not None and compare.regressions(found, args.fail_over):
            return status or EXIT_FAILED
    return status


def choose(suite: str, patterns: list[str] | None, dtypes: list[str] | None):
    """Cases and properties of a suite; a pattern may name either."""
    asked = [p for p in properties.PROPERTIES if suite == "all" or suite in p.suites]
    if patterns:
        named = {p.name for p in asked} & set(patterns)
        asked = [p for p in asked if p.name in named]
        patterns = [pattern for pattern in patterns if pattern not in named]
        if not patterns:
            return [], asked
    elif dtypes:
        asked = []
    chosen = cases.select(suite, patterns, dtypes)
    if not chosen and (patterns or not asked):
        kind = " or ".join(dtypes or [])
        named = f" that matches {', '.join(map(repr, patterns))}" if patterns else ""
        there = cases.select("all", patterns, dtypes)
        suites = [s for s in cases.SUITES if there and (s == "all" or any(s in c.suites for c in there))]
        having = ", ".join(suites) or "none"
        raise ValueError(f"suite {suite!r} has no {kind} case{named}; suites that have one: {having}")
    return chosen, asked


def check_threads(counts: Iterable[int]) -> None:
    """The library would use fewer than it is asked for, and the rows would say otherwise."""
    if max(counts) > _runtime.MAX_THREADS:
        raise ValueError(f"--threads: {max(counts)} is above the library's maximum, {_runtime.MAX_THREADS}")


def planned(jobs: Iterable[runner.Job], isa: str | None) -> list[compare.Key]:
    """What the rows of jobs will be compared by."""
    return [(job.case.name, job.threads, isa or job.case.isa or qkv_fast.isa()) for job in jobs]


def default_threads(suite: str) -> list[int]:
    """Foundation's goals are for 1 and 2 threads, scaling is about thread counts; elsewhere the library's default."""
    cpus = machine.cpu_count()
    if suite == "foundation":
        return [1, 2][:cpus]
    if suite == "scaling":
        return sorted({2**i for i in range(cpus.bit_length()) if 2**i <= cpus} | {cpus})
    return [qkv_fast.get_num_threads()]


def measure(outcome: Outcome, args, threads: list[int], jobs: list[runner.Job], asked, names: list[str]) -> None:
    """Fill the outcome, as far as Ctrl-C lets it."""
    counts = {*threads, *(job.threads for job in jobs)}
    steps = len(jobs) + len(asked)
    hurry = args.seconds is not None or args.suite == "quick"
    if args.seconds is not None:
        seconds = args.seconds / max(1, steps)
    else:
        seconds = QUICK_SECONDS if args.suite == "quick" else SECONDS
    how = runner.How(
        peers=tuple(names),
        seconds=seconds,
        rounds=(QUICK_ROUNDS if hurry else MIN_ROUNDS, MAX_ROUNDS),
        isa=args.isa,
        reuse_out=args.out,
        peers_memory=args.suite == "memory",
    )
    with (
        Progress(steps) as progress,
        outcome.interruptible(),
        _runtime.force_isa(args.isa) if args.isa else nullcontext(),
    ):
        outcome.limits["before"] = limits.measure(counts)
        for row in runner.run(jobs, how, started=lambda job: progress.step(str(job))):
            outcome.rows.append(row)
        for entry in asked:
            progress.step(entry.name)
            outcome.measured += measured.measure(entry, seconds, tuple(threads))
        outcome.limits["after"] = limits.measure(counts)


def present(outcome: Outcome, args, names: list[str]) -> None:
    """Print the tables."""
    render = print_markdown if args.markdown else show
    rows = outcome.rows
    names = [name for name in names if any(name in row.ready or name in row.failures for row in rows)]
    render(report.speed_table(rows, names, f"Suite {args.suite}"))
    if names:
        render(report.peers_table(rows, names))
    render(report.exactness_table(rows, names))
    render(report.measured_table(outcome.measured))
    render(report.limits_table(outcome.limits.get("before", {}), outcome.limits.get("after", {})))
    if args.suite == "quick":
        print(verdict.sentence(rows))


def main(argv: list[str] | None = None) -> int:
    """The console command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no µ or ≤ shows a question mark instead
            stream.reconfigure(errors="replace")
    if argv[:1] == ["bench"]:
        return bench(argv[1:])
    return check_and_time(argv)
