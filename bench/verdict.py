"""A run in one sentence: how many times as fast as whom, and whether every answer was right."""

from __future__ import annotations

from collections.abc import Iterable

from .peers import PEERS
from .report import is_tiny
from .runner import Row
from .selfcheck import Check


def sentence(rows: Iterable[Row], checks: Iterable[Check] = ()) -> str:
    """What a reader takes home; empty where nothing was finished."""
    rows, checks = list(rows), list(checks)
    finished = [row for row in rows if not row.error]
    if not finished:
        return ""
    speeds: dict[str, list[float]] = {}
    for row in finished:
        for name in row.finished:
            speeds.setdefault(name, []).append(row.speedup(name).median)
    found = [f"{span(values)} times as fast as {title(name)}" for name, values in speeds.items()]
    if found:
        text = f"attention is {listed(found)}"
    elif shares := [100 * row.share.median for row in finished if not is_tiny(row)]:
        text = f"attention reaches {span(shares)} % of what the machine can do"
    else:
        text = "attention was timed"
    return f"On this CPU {text}; {exactness(rows, checks)}."


def exactness(rows: list[Row], checks: list[Check]) -> str:
    wrong = sum(row.wrong for row in rows)
    failed = sum(bool(check.problem) for check in checks)
    if wrong or failed:
        problems = [f"{count} {what}" for count, what in ((wrong, "wrong answers"), (failed, "failed checks")) if count]
        return f"NOT exact: {listed(problems)}"
    left_out = sum(bool(row.error) for row in rows)
    return "exact everywhere" + (f" ({left_out} of {len(rows)} workloads could not run)" if left_out else "")


def title(name: str) -> str:
    return PEERS[name].title if name in PEERS else name


def listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def span(values: list[float]) -> str:
    """The least and the largest, to two digits."""
    low, high = (f"{value:.0f}" if value >= 9.95 else f"{value:.2g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
