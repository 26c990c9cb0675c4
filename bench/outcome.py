"""What a command has found so far, and how it ends: the record, the exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from . import machine, record
from .measured import Measured
from .runner import Row
from .selfcheck import Check

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


@dataclass
class Outcome:
    """An interrupted run keeps what is finished."""

    command: list[str]
    machine: dict = field(default_factory=machine.identify)
    limits: dict[str, dict] = field(default_factory=dict)  # "before" and "after": rates by thread count
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    interrupted: bool = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True

    def data(self) -> dict:
        """Everything, as plain data."""
        return record.plain(
            {
                "schema": record.SCHEMA,
                "command": self.command,
                "machine": self.machine,
                "limits": self.limits,
                "checks": [asdict(check) for check in self.checks],
                "rows": [record.row_data(row) for row in self.rows],
                "properties": [asdict(m) | {"verdict": m.verdict} for m in self.measured],
                "interrupted": self.interrupted,
            }
        )

    def status(self) -> int:
        """Say what has to be said last, and give the exit status."""
        if self.interrupted:
            print("interrupted: what is above is what was finished", file=sys.stderr)
            return EXIT_INTERRUPTED
        failed = any(check.problem for check in self.checks)
        wrong = any(row.wrong for row in self.rows)
        return EXIT_FAILED if failed or wrong else 0
