"""What the tables say: rows of a run, peers, errors and memory, properties, checks, limits."""

from __future__ import annotations

import math

from . import legend, machine, work
from .measured import Measured
from .method import WIDE_SPREAD
from .ours import OURS
from .peers import PEERS
from .runner import Goal, Row
from .selfcheck import Check
from .tables import Table, bytes_text, percent_text, ratio_text, seconds_text

NOT_JUDGED = f"goals are for a {machine.REFERENCE}; not judged on this CPU"


def is_tiny(row: Row) -> bool:
    """Whether the row is about the cost of a call: its rate is that of calls, and no share of a limit."""
    return work.limited_by(row.job.case) == "calls"


def rate_text(row: Row, name: str) -> str:
    """Work per second of a contestant, in the row's unit."""
    return f"{row.rate(name) / (1e3 if is_tiny(row) else 1e9):.3g}"


def unit(row: Row) -> str:
    limit = work.limited_by(row.job.case)
    return "k calls/s" if limit == "calls" else "GB/s" if limit in ("read", "copy") else "GF/s"


def speed_table(rows: list[Row], peers: list[str], title: str, goals: bool = True) -> Table:
    """The benchmark's table: time, rate, share of the limit, what was asked, and ours against the fastest peer."""
    asked, goals = goals and any(row.job.case.goal for row in rows), goals and any(row.goal for row in rows)
    columns = ["workload", "thr", "time", "spread", "rate", "% limit"]
    columns += ["at least", "aim", "reached"] if goals else []
    columns += [f"vs {peers[0]}" if len(peers) == 1 else "vs fastest"] if peers else []
    table = Table(title, columns)
    for row in rows:
        cells = [row.job.case.name, str(row.job.threads)]
        if row.error:
            table.add(cells + ["-"] * (len(columns) - 2), "error")
            table.notes.append(f"{row.job}: {row.error}")
            continue
        spread = percent_text(row.time.spread, row.time.wide) if row.time.count > 1 else "1 round"
        cells += [seconds_text(row.time.median), spread]
        rate = f"{rate_text(row, OURS)} {unit(row)}"
        cells += [rate, "" if is_tiny(row) else f"{100 * row.share.median:.1f}"]
        if goals:
            cells += [*goal_text(row.goal), row.verdict]
        if peers:
            name = min(row.finished, key=lambda name: row.speedup(name).median, default=None)
            cells.append(ratio_text(row.speedup(name)) + (f" {name}" if len(peers) > 1 else "") if name else "-")
        table.add(cells, row.verdict if goals else "")
    if any(row.rounds and row.time.wide for row in rows):
        table.notes.append("! wide spread: the interquartile range is more than 10 % of the median")
    if any(unit(row) == "GB/s" for row in rows):
        table.notes.append(
            "GB/s: limited by the bandwidth of reads, or for softmax of copies; GF/s: by the peak of multiply-adds"
        )
    if peers:
        table.notes.append(f"vs: a peer's time over {OURS}'s in the same round; above 1 {OURS} is faster")
    if asked and not goals:
        table.notes.append(NOT_JUDGED)
    table.notes += [legend.of_names([row.job.case for row in rows]), legend.of_columns(columns)] if rows else []
    return table


def goal_text(goal: Goal | None) -> list[str]:
    if goal is None:
        return ["", ""]
    if goal.unit == "peak":
        return [f"{100 * goal.floor:.0f}", f"{100 * goal.aim:.0f}"]
    if goal.unit == "seconds":
        return [f"{goal.floor * 1e6:g} µs", f"{goal.aim * 1e6:g} µs"]
    return [f"{goal.floor:g} x {goal.unit}", f"{goal.aim:g} x"]


def peers_table(rows: list[Row], peers: list[str]) -> Table:
    """Ours against each peer, with the peer's rate (its time where a row has hardly any work) in brackets."""
    table = Table("Against each peer", ["workload", "thr", *peers])
    reasons: dict[str, int] = {}
    titles: dict[str, str] = {}
    slower: list[str] = []
    for row in (row for row in rows if not row.error):
        cells = [row.job.case.name, str(row.job.threads)]
        faster = []
        for name in peers:
            if name in row.failures:
                number = reasons.setdefault(f"{name}: {row.failures[name]}", len(reasons) + 1)
                cells.append(f"({number})")
                continue
            speed = seconds_text(row.rounds.time(name).median) if is_tiny(row) else rate_text(row, name)
            operator = f" {row.ready[name].label[:1]}" if name == "ort" else ""
            cells.append(f"{ratio_text(row.speedup(name))} ({speed}{operator})")
            titles[name] = f"{PEERS[name].title if name in PEERS else name} {row.ready[name].version}"
            faster += [name] if row.speedup(name).median < 1 else []
        if faster:
            slower.append(f"{row.job.case.name} ({row.job.threads}): {', '.join(faster)}")
        table.add(cells)
    table.notes = [f"({number}) {reason}" for reason, number in reasons.items()]
    table.notes += disturbance_notes(rows)
    if titles:
        table.notes.append(", ".join(titles.values()) + "; in brackets their GF/s, GB/s or time")
        table.notes.append("every peer on as many threads as ours (thr)")
    if any(row.ready.get("ort") for row in rows):
        table.notes.append("ort: the fastest of (M)ultiHeadAttention, (G)roupQueryAttention, (A)ttention")
    if slower:
        table.notes.append(f"rows where a peer is faster than {OURS}: " + "; ".join(slower))
    return table


def disturbance_notes(rows: list[Row]) -> list[str]:
    """Peers whose threads were not at rest when the next one's turn began."""
    found: dict[str, list[str]] = {}
    for row in (row for row in rows if not row.error):
        for name, ratio in row.disturbed.items():
            found.setdefault(name, []).append(f"{row.job.case.name} ({row.job.threads}): {ratio:.2f} times")
    return [
        f"disturbed: right after {name}'s turn the machine gave less than after {OURS}'s, and what follows it may look"
        f" slower than it is: {'; '.join(cases)}"
        for name, cases in found.items()
    ]


def exactness_table(rows: list[Row], peers: list[str]) -> Table:
    """Error and memory of each contestant."""
    table = Table("Largest error against float64, and memory", ["workload", "thr", OURS, *peers])
    for row in (row for row in rows if not row.error):
        errors = {OURS: row.our_error} | {name: row.ready[name].error for name in row.finished}
        cells = []
        for name in (OURS, *peers):
            text = f"{errors[name]:.0e}" if name in errors else "-"
            cells.append(f"{text}, {bytes_text(row.memory[name])}" if name in row.memory else text)
        table.add([row.job.case.name, str(row.job.threads), *cells])
    if any(row.memory for row in rows):
        table.notes.append("memory: what a first call adds to a fresh process at its peak, the result included")
    return table


def limits_table(before: dict[int, dict[str, float]], after: dict[int, dict[str, float]]) -> Table:
    """What the machine gave before and after the run."""
    names = {"float32": "float32 GF/s", "float64": "float64 GF/s", "bfloat16": "bfloat16 GF/s", "read": "read GB/s"}
    names["copy"] = "copy GB/s"
    table = Table("Limits of the machine, before → after the run", ["threads", *names.values()], keys=1)
    for threads, first in before.items():
        last = after.get(threads, {})
        cells = []
        for name in names:
            ends = [f"{rates[name] / 1e9:.3g}" for rates in (first, last) if rates.get(name)]
            cells.append(" → ".join(ends) or "-")
        table.add([str(threads), *cells])
    return table


def measured_table(measured: list[Measured]) -> Table:
    """Ratios, memory and import time against what is asked of them."""
    unjudged = [m for m in measured if not m.judged and m.floor is not None]
    table = Table("Properties", ["property", "value", "spread", "asked", "aim", "reached", "note"], keys=1)
    for m in measured:
        if math.isnan(m.value):
            table.add([m.name, "-", "", "", "", "not measured", m.note], "error")
            continue
        sign = "≥" if m.more else "≤"
        spread = percent_text(m.spread, m.spread > WIDE_SPREAD) if m.spread else ""
        asked = "" if m.floor is None else f"{sign} {m.floor:g} {m.unit}"
        aim = "" if m.aim is None else f"{sign} {m.aim:g}"
        verdict = "-" if m in unjudged else m.verdict
        table.add([m.name, f"{m.value:.3g} {m.unit}", spread, asked, aim, verdict, m.note], m.verdict)
    if unjudged:
        table.notes.append(NOT_JUDGED)
    return table


def checks_table(checks: list[Check]) -> Table:
    """One row per path and type; failures are spelled out below."""
    table = Table("Self-check against the reference", ["path", "type", "checks", "worst error / allowed", "result"])
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.isa, check.dtype), []).append(check)
    for (isa, dtype), group in groups.items():
        failed = [check for check in group if check.problem]
        worst = max((check.share for check in group if not math.isnan(check.share)), default=math.nan)
        result = f"{len(failed)} FAILED" if failed else "ok"
        table.add([isa, dtype, str(len(group)), f"{worst:.2f}", result], "error" if failed else "ok")
        table.notes += [f"FAILED {isa} {dtype} {check.name}: {check.problem}" for check in failed]
    return table


def machine_text(machine: dict) -> str:
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    return "\n".join(
        [
            f"qkv_fast {machine['qkv_fast']}, Python {machine['python']}, NumPy {machine['numpy']}",
            f"{machine['cpu']}, {machine['cpus']} CPUs ({caches or 'caches unknown'}); {machine['system']}",
            f"CPU path {machine['isa']} (available: {', '.join(machine['available_isas'])}), "
            f"{machine['threads']} threads by default; governor {machine['governor']}",
        ]
    )
