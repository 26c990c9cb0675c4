"""The commands: `qkv-fast` (self-check and a short table) and `qkv-fast bench` (suites against peers)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import qkv_fast

from .. import _runtime
from . import cases, machine, peers, properties, report, runner, selfcheck
from .method import MAX_ROUNDS
from .progress import Progress

SECONDS, QUICK_SECONDS = 4.0, 1.5  # of timing for each row
QUICK_ROUNDS = (3, MAX_ROUNDS)  # in a hurry, fewer rounds will do
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def thread_counts(text: str) -> list[int]:
    try:
        counts = [int(word) for word in words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers") from None
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError("thread counts start at 1")
    return list(dict.fromkeys(counts))


def bench_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qkv-fast bench",
        description="Time attention against the peers that are installed, in interleaved rounds.",
    )
    add = parser.add_argument
    add(
        "--suite",
        metavar="NAME",
        help=f"{', '.join(cases.SUITES)} (default: quick; with --case: all)",
    )
    add(
        "--case",
        type=words,
        metavar="PATTERN",
        help="only cases whose name contains or matches (*) one of these",
    )
    add(
        "--threads",
        type=thread_counts,
        metavar="N[,N]",
        help="thread counts (default: what a case is about; 1 and 2 in foundation; else all)",
    )
    add(
        "--peers",
        type=words,
        metavar="NAME[,NAME]",
        help=f"{', '.join(peers.PEERS)}, none (default: all that are installed)",
    )
    add("--isa", metavar="NAME", help="CPU path for every case")
    add("--dtype", type=words, metavar="NAME", help="only cases of these types")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="timing for the whole run (default: 4 s per row, 1.5 in quick)",
    )
    add("--out", action="store_true", help="write into one output array instead of a new one per call")
    add("--json", metavar="FILE", help="save everything, with every sample")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--list", action="store_true", help="list the cases and stop")
    return parser


def bench(argv: list[str]) -> int:
    """`qkv-fast bench`: suites of cases against the peers, and what else the library is held to."""
    args = bench_parser().parse_args(argv)
    args.suite = args.suite or ("all" if args.case else "quick")
    try:
        chosen, asked = choose(args.suite, args.case, args.dtype)
        names = peers.choose(args.peers)
        check_isa(args.isa)
        check_writable(args.json)
    except ValueError as error:
        print(f"qkv-fast bench: {error}", file=sys.stderr)
        return EXIT_USAGE
    if args.list:
        for entry in (*chosen, *asked):
            print(f"{entry.name:40} {', '.join(s for s in entry.suites if s in cases.SUITES)}")
        return 0
    threads = args.threads or default_threads(args.suite)
    jobs = runner.plan(chosen, threads, args.threads)
    steps = len(jobs) + len(asked)
    hurry = args.seconds is not None or args.suite == "quick"
    if args.seconds is not None:
        seconds = args.seconds / max(1, steps)
    else:
        seconds = QUICK_SECONDS if args.suite == "quick" else SECONDS
    result = Result(machine.identify())
    print(report.machine_text(result.machine), end="\n\n", flush=True)
    with Progress(steps) as progress, result.interruptible():
        rows = runner.run(
            jobs,
            names,
            seconds=seconds,
            isa=args.isa,
            reuse_out=args.out,
            rounds=QUICK_ROUNDS if hurry else None,
            started=lambda job: progress.step(str(job)),
        )
        for row in rows:
            result.rows.append(row)
        with _runtime.force_isa(args.isa) if args.isa else nullcontext():
            for entry in asked:
                progress.step(entry.name)
                result.measured += properties.measure(entry, seconds, tuple(threads))
    render = report.print_markdown if args.markdown else report.show
    names = [name for name in names if any(name in row.ready or name in row.failures for row in result.rows)]
    render(report.speed_table(result.rows, names, f"Suite {args.suite}"))
    if names:
        render(report.peers_table(result.rows, names))
    render(report.measured_table(result.measured))
    return result.finish(args.json)


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
    return cases.select(suite, patterns, dtypes), asked


def check_writable(path: str | None) -> None:
    """A run of minutes must not end in an error about its file."""
    try:
        if path:
            open(path, "a").close()
    except OSError as error:
        raise ValueError(f"--json: {error}") from None


def check_isa(name: str | None) -> None:
    if name is not None and name not in qkv_fast.available_isas():
        raise ValueError(
            f"unknown or unavailable path {name!r}; the paths are: {', '.join(qkv_fast.available_isas())}"
        )


def default_threads(suite: str) -> list[int]:
    """The foundation's goals are for 1 and 2 threads; elsewhere the library's own default."""
    if suite == "foundation":
        return [1, 2] if machine.cpu_count() > 1 else [1]
    return [qkv_fast.get_num_threads()]


def main_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qkv-fast",
        description="Print the configuration, check every CPU path, and time attention against NumPy.",
        epilog="`qkv-fast bench --help`: more workloads, more peers.",
    )
    parser.add_argument(
        "--seconds", type=float, default=15.0, metavar="S", help="time for the timings (default: 15)"
    )
    parser.add_argument("--json", metavar="FILE", help="save everything")
    parser.add_argument("--version", action="version", version=f"qkv-fast {qkv_fast.__version__}")
    return parser


def check_and_time(argv: list[str]) -> int:
    """`qkv-fast`: configuration, self-check, and a few workloads against plain NumPy."""
    args = main_parser().parse_args(argv)
    try:
        check_writable(args.json)
    except ValueError as error:
        print(f"qkv-fast: {error}", file=sys.stderr)
        return EXIT_USAGE
    result = Result(machine.identify())
    print(report.machine_text(result.machine), end="\n\n", flush=True)
    # Small workloads first: on a slow machine it is the large ones that are left out when the time is up.
    chosen = sorted(cases.select("main"), key=lambda c: c.flops())
    jobs = runner.plan(chosen, [qkv_fast.get_num_threads()])
    paths = qkv_fast.available_isas()
    with Progress(len(paths) + len(jobs)) as progress, result.interruptible():
        for isa in paths:
            progress.step(f"checking path {isa} against the reference")
            result.checks += selfcheck.run(isa)
        start = time.monotonic()
        for done, job in enumerate(jobs):
            progress.step(f"timing {job}")
            left = args.seconds - (time.monotonic() - start)
            if left <= 0 and done:
                result.left_out.append(str(job))
                continue
            share = max(0.0, left) / (len(jobs) - done)
            result.rows += runner.run([job], ["numpy"], seconds=share, rounds=(3 if share > 0.5 else 1, 15))
    report.show(report.checks_table(result.checks))
    result.rows.sort(key=lambda row: [c.name for c in cases.CASES].index(row.job.case.name))
    table = report.speed_table(result.rows, ["numpy"], "Attention against plain NumPy", goals=False)
    if result.left_out:
        table.notes.append("left out, since the time was used up: " + "; ".join(result.left_out))
    report.show(table)
    return result.finish(args.json)


@dataclass
class Result:
    """What a run has found so far; an interrupted one keeps what is finished."""

    machine: dict
    checks: list[selfcheck.Check] = field(default_factory=list)
    rows: list[runner.Row] = field(default_factory=list)
    measured: list[properties.Measured] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    interrupted: bool = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True

    def data(self) -> dict:
        """Everything, as plain data."""
        return {
            "schema": 1,
            "machine": self.machine,
            "checks": [asdict(check) for check in self.checks],
            "rows": [report.row_data(row) for row in self.rows],
            "properties": [asdict(m) | {"verdict": m.verdict} for m in self.measured],
            "left_out": self.left_out,
            "interrupted": self.interrupted,
        }

    def finish(self, path: str | None) -> int:
        """Save, say what has to be said last, and give the exit status."""
        if path:
            report.save(path, self.data())
        if self.interrupted:
            print("interrupted: what is above is what was finished", file=sys.stderr)
            return EXIT_INTERRUPTED
        failed = any(check.problem for check in self.checks)
        wrong = any(row.wrong for row in self.rows)
        return EXIT_FAILED if failed or wrong else 0


def main(argv: list[str] | None = None) -> int:
    """The console command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no µ or ≤ shows a question mark instead
            stream.reconfigure(errors="replace")
    if argv[:1] == ["bench"]:
        return bench(argv[1:])
    return check_and_time(argv)
