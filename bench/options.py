"""What may be given on the command line, and what is said of what may not."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

import qkv_fast

from . import cases, peers


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


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def bench_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qkv-fast bench",
        description="Time attention against the peers that are installed, in interleaved rounds.",
    )
    add = parser.add_argument
    suites, names = ", ".join(cases.SUITES), ", ".join(peers.PEERS)
    add("--suite", metavar="NAME", help=f"{suites} (default: quick; with --case: all)")
    add("--case", type=words, metavar="PATTERN", help="only cases whose name contains or matches (*) one of these")
    counts = "thread counts (default: what a case is about; 1 and 2 in foundation; powers of 2 in scaling; else all)"
    add("--threads", type=thread_counts, metavar="N[,N]", help=counts)
    add("--peers", type=words, metavar="NAME[,NAME]", help=f"{names}, none (default: all that are installed)")
    add("--isa", metavar="NAME", help="CPU path for every case")
    add("--dtype", type=words, metavar="NAME", help="only cases of these types")
    add("--seconds", type=positive, metavar="S", help="timing for the whole run (default: 4 s per row, 1.5 in quick)")
    add("--out", action="store_true", help="write into one output array instead of a new one per call")
    add("--json", metavar="FILE", help="save everything, with every sample")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--plot", metavar="FOLDER", help="draw roofline, peers and scaling into PNG files there")
    add("--compare", metavar="OLD.json", help="compare with a run that --json saved")
    add("--fail-over", type=positive, metavar="PERCENT", help="with --compare: exit 1 if a row is that much slower")
    add("--list", action="store_true", help="list the cases and stop")
    return parser


def main_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qkv-fast",
        description="Print the configuration, check every CPU path, and time attention against NumPy.",
        epilog="`qkv-fast bench --help`: more workloads, more peers.",
    )
    add = parser.add_argument
    add("--seconds", type=positive, default=16.0, metavar="S", help="time for the timings (default: 16)")
    add("--json", metavar="FILE", help="save everything")
    add("--version", action="version", version=f"qkv-fast {qkv_fast.__version__}")
    return parser


def check_isa(name: str | None) -> None:
    if name is not None and name not in qkv_fast.available_isas():
        known = ", ".join(qkv_fast.available_isas())
        raise ValueError(f"unknown or unavailable path {name!r}; the paths are: {known}")


def check_writable(path: str | None) -> None:
    """A run of minutes must not end in an error about its file."""
    try:
        if path:
            open(path, "a").close()
    except OSError as error:
        raise ValueError(f"--json: {error}") from None


def check_plots(folder: str | None) -> None:
    if folder is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "qkv-fast[bench]"')
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--plot: {error}") from None


def check_comparison(old: str | None, fail_over: float | None) -> None:
    if fail_over is not None and old is None:
        raise ValueError("--fail-over needs --compare OLD.json")
