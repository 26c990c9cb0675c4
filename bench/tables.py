"""Tables as people see them: on a terminal, with rich or without, in a pipe, as Markdown.

A `Table` is text cells with a style per row; the renderings differ in nothing else. Where a terminal is too narrow, a
table is printed in parts, each with the columns that say what a row is about.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .method import Summary

STYLES = {"aim": "green", "ok": "green", "floor": "yellow", "below": "red", "error": "red"}
GAP = 2  # blanks between columns


@dataclass
class Table:
    """`columns` are headings, the first one left-aligned; `styles` one of STYLES' keys (or "") per row."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: int = 2  # leading columns that say what a row is about

    def add(self, cells: list[str], style: str = "") -> None:
        self.rows.append(cells)
        self.styles.append(style)

    def widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]


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
    if write is not print or not sys.stdout.isatty():
        write(as_text(table))
        return
    parts = fit(table, shutil.get_terminal_size().columns)
    for part in parts:
        if have_rich():
            _show_rich(part)
        else:
            print(as_text(part))


def fit(table: Table, width: int) -> list[Table]:
    """The table in parts that are no wider than `width`, if one column beside the keys is not; notes come last."""
    widths = [w + GAP for w in table.widths()]
    groups: list[list[int]] = []
    room = 0
    for index in range(table.keys, len(widths)):
        if not groups or widths[index] > room:
            groups.append([])
            room = width - sum(widths[: table.keys])
        groups[-1].append(index)
        room -= widths[index]
    parts = []
    for group in groups:
        chosen = [*range(table.keys), *group]
        rows = [[row[i] for i in chosen] for row in table.rows]
        parts.append(replace(table, columns=[table.columns[i] for i in chosen], rows=rows, notes=[]))
    parts[-1].notes = table.notes
    return parts


def print_markdown(table: Table) -> None:
    if table.rows:
        print(as_markdown(table))


def _show_rich(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, GAP, 0, 0)
    )
    for index, heading in enumerate(table.columns):
        grid.add_column(heading, justify="right" if index else "left", no_wrap=index < table.keys)
    for cells, style in zip(table.rows, table.styles, strict=True):
        grid.add_row(*(Text(cell) for cell in cells), style=STYLES.get(style, ""))
    console = Console()
    console.print(grid)
    for note in table.notes:
        console.print(Text(note), style="dim")
    console.print()


def as_text(table: Table) -> str:
    widths = table.widths()

    def line(row: list[str]) -> str:
        first, *others = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return (" " * GAP).join([first, *others]).rstrip()

    rule = "-" * (sum(widths) + GAP * (len(widths) - 1))
    return "\n".join([table.title, rule, line(table.columns), rule, *map(line, table.rows), *table.notes, ""])


def as_markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = "|" + "|".join("---:" if i else "---" for i in range(len(table.columns))) + "|"
    notes = [f"\n{note}" for note in table.notes]
    return "\n".join([f"**{table.title}**", "", line(table.columns), rule, *map(line, table.rows), *notes, ""])


def seconds_text(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def bytes_text(count: int) -> str:
    for unit, size in (("GB", 2**30), ("MB", 2**20)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1024:.3g} KB"


def percent_text(spread: float, wide: bool) -> str:
    """A spread in percent; "!" flags a wide one."""
    return f"{100 * spread:.0f} %" + (" !" if wide else "")


def ratio_text(ratio: Summary) -> str:
    return f"{ratio.median:.2f}x" + (" !" if ratio.wide else "")
