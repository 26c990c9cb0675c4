"""What people see: tables for a terminal (with rich or without), Markdown, and JSON.

A `Table` is text cells with a style per row; the three renderings differ in nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from .method import WIDE_SPREAD, Summary
from .peers import PEERS
from .properties import Measured
from .runner import OURS, Row
from .selfcheck import Check

STYLES = {"aim": "green", "ok": "green", "floor": "yellow", "below": "red", "error": "red"}
TINY_FLOPS = 1e7  # below, a row is about the cost of a call: its rate says nothing


@dataclass
class Table:
    """`columns` are headings, the first one left-aligned; `styles` one of STYLES' keys (or "") per row."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, cells: list[str], style: str = "") -> None:
        self.rows.append(cells)
        self.styles.append(style)


def have_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def show(table: Table, write: Callable[[str], object] = print) -> None:
    """Print a table: by rich where it is installed and the output is a terminal, else as aligned text."""
    if not table.rows:
        return
    if write is print and sys.stdout.isatty() and have_rich():
        _show_rich(table)
    else:
        write(as_text(table))


def print_markdown(table: Table) -> None:
    if table.rows:
        print(as_markdown(table))


def _show_rich(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for index, heading in enumerate(table.columns):
        grid.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for cells, style in zip(table.rows, table.styles, strict=True):
        grid.add_row(*(Text(cell) for cell in cells), style=STYLES.get(style, ""))
    console = Console()
    console.print(grid)
    for note in table.notes:
        console.print(Text(note), style="dim")
    console.print()


def as_text(table: Table) -> str:
    cells = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]

    def line(row: list[str]) -> str:
        first, *others = (
            c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([table.title, rule, line(table.columns), rule, *map(line, table.rows), *table.notes, ""])


def as_markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = "|" + "|".join("---:" if i else "---" for i in range(len(table.columns))) + "|"
    notes = [f"\n{note}" for note in table.notes]
    return "\n".join(
        [f"**{table.title}**", "", line(table.columns), rule, *map(line, table.rows), *notes, ""]
    )


def seconds_text(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def spread_text(summary: Summary) -> str:
    """Interquartile range in percent of the median; "!" flags a wide one."""
    return f"{100 * summary.spread:.0f} %" + (" !" if summary.wide else "")


def speed_table(rows: list[Row], peers: list[str], title: str, goals: bool = True) -> Table:
    """The benchmark's table: time, rate, share of peak, what was asked, and ours against the fastest peer."""
    goals = goals and any(row.goal for row in rows)
    columns = ["workload", "threads", "time", "spread", "GF/s", "% peak"]
    columns += ["at least", "aim", "reached"] if goals else []
    columns += [f"vs {peers[0]}" if len(peers) == 1 else "vs fastest peer"] if peers else []
    table = Table(title, columns)
    for row in rows:
        cells = [row.job.case.name, str(row.job.threads)]
        if row.error:
            table.add((cells + [row.error] + [""] * len(columns))[: len(columns)], "error")
            continue
        cells += [seconds_text(row.time.median), spread_text(row.time)]
        tiny = row.job.case.flops() < TINY_FLOPS
        cells += ["", ""] if tiny else [f"{row.rate / 1e9:.3g}", f"{100 * row.share.median:.1f}"]
        if goals:
            cells += [*goal_text(row), row.verdict]
        if peers:
            finished = {name: row.speedup(name) for name in row.ready if name not in row.failures}
            name = min(finished, key=lambda name: finished[name].median, default=None)
            cells.append(ratio_text(finished[name]) + (f" {name}" if len(peers) > 1 else "") if name else "-")
        table.add(cells, row.verdict if goals else "")
    if any(row.rounds and row.time.wide for row in rows):
        table.notes.append("! wide spread: the interquartile range is more than 10 % of the median")
    if peers:
        table.notes.append(f"vs: a peer's time over {OURS}'s in the same round; above 1 {OURS} is faster")
    return table


def ratio_text(ratio: Summary) -> str:
    return f"{ratio.median:.2f}x" + (" !" if ratio.wide else "")


def goal_text(row: Row) -> list[str]:
    goal = row.goal
    if goal is None:
        return ["", ""]
    if goal.unit == "peak":
        return [f"{100 * goal.floor:.0f}", f"{100 * goal.aim:.0f}"]
    return [f"{goal.floor * 1e6:g} µs", f"{goal.aim * 1e6:g} µs"]


def peers_table(rows: list[Row], peers: list[str]) -> Table:
    """Ours against each peer, with the peer's GF/s (its time where a row has hardly any work) in brackets."""
    table = Table("Against each peer", ["workload", "threads", *peers])
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
            seconds, flops = row.rounds.time(name).median, row.job.case.flops()
            speed = seconds_text(seconds) if flops < TINY_FLOPS else f"{flops / seconds / 1e9:.3g}"
            operator = f" {row.ready[name].label[:1]}" if name == "ort" else ""
            cells.append(f"{ratio_text(row.speedup(name))} ({speed}{operator})")
            titles[name] = f"{PEERS[name].title if name in PEERS else name} {row.ready[name].version}"
            faster += [name] if row.speedup(name).median < 1 else []
        if faster:
            slower.append(f"{row.job.case.name} ({row.job.threads}): {', '.join(faster)}")
        table.add(cells)
    table.notes = [f"({number}) {reason}" for reason, number in reasons.items()]
    table.notes += [", ".join(titles.values()) + "; in brackets their GF/s or time"] if titles else []
    if any(row.ready.get("ort") for row in rows):
        table.notes.append("ort: the fastest of (M)ultiHeadAttention, (G)roupQueryAttention, (A)ttention")
    if slower:
        table.notes.append(f"rows where a peer is faster than {OURS}: " + "; ".join(slower))
    return table


def measured_table(measured: list[Measured]) -> Table:
    """Ratios, memory and import time against what is asked of them."""
    table = Table("Properties", ["property", "value", "spread", "asked", "aim", "reached", "note"])
    for m in measured:
        if math.isnan(m.value):
            table.add([m.name, "-", "", "", "", "not measured", m.note], "error")
            continue
        sign = "≥" if m.more else "≤"
        spread = f"{100 * m.spread:.0f} %" + (" !" if m.spread > WIDE_SPREAD else "") if m.spread else ""
        asked = f"{sign} {m.floor:g} {m.unit}"
        aim = "" if m.aim is None else f"{sign} {m.aim:g}"
        table.add([m.name, f"{m.value:.3g} {m.unit}", spread, asked, aim, m.verdict, m.note], m.verdict)
    return table


def checks_table(checks: list[Check]) -> Table:
    """One row per path and type; failures are spelled out below."""
    table = Table(
        "Self-check against the reference", ["path", "type", "checks", "worst error / allowed", "result"]
    )
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
            f"{machine['threads']} threads by default",
        ]
    )


def row_data(row: Row) -> dict:
    """A row as plain data, with every sample, so that a later run can be compared with it."""
    data = {
        "case": dataclasses.asdict(row.job.case),
        "threads": row.job.threads,
        "isa": row.isa,
        "error": row.error,
        "failures": row.failures,
    }
    if row.rounds:
        data |= {
            "flops": row.job.case.flops(),
            "max_error": row.our_error,
            "seconds": row.rounds.seconds,
            "peaks": row.rounds.peaks,
            "median_seconds": row.time.median,
            "spread": row.time.spread,
            "share_of_peak": row.share.median,
            "verdict": row.verdict,
            "peers": {name: dataclasses.asdict(ready) for name, ready in row.ready.items()},
            "speedup": {n: row.speedup(n).median for n in row.ready if n not in row.failures},
        }
    return data


def save(path: str, data: dict) -> None:
    """Write JSON that any reader accepts: NaN, which JSON lacks, becomes null."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(_plain(data), file, indent=1, allow_nan=False)
        file.write("\n")


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    return value
