"""A progress bar on standard error: rich's on a terminal, else one plain line per step.

It redraws only between measurements: a thread that redraws by itself would take its share of a core from what
is being timed.
"""

from __future__ import annotations

import sys
import time

from .tables import have_rich, seconds_text


class Progress:
    """`with Progress(steps) as p: p.step("what comes next")` for each step."""

    def __init__(self, steps: int, quiet: bool = False) -> None:
        self.steps, self.done, self.quiet = steps, 0, quiet
        self.start = time.monotonic()
        self.bar = self.task = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty() and have_rich():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            console = Console(stderr=True)
            self.bar = RichProgress(*columns, console=console, auto_refresh=False, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.steps)
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, text: str) -> None:
        """Say what starts now; what was said before is finished."""
        if self.bar:
            self.bar.update(self.task, completed=self.done, description=text, refresh=True)
        elif not self.quiet:
            elapsed = time.monotonic() - self.start
            left = f", about {seconds_text(elapsed / self.done * (self.steps - self.done))} left" if self.done else ""
            print(f"[{self.done + 1}/{self.steps}{left}] {text}", file=sys.stderr, flush=True)
        self.done += 1
