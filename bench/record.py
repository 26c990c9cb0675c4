"""A run as plain data: what `--json` saves, and what comparisons and plots read.

`schema` grows when a field changes its meaning; a file of another schema is refused, not misread.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from . import work
from .runner import Row

SCHEMA = 2


def row_data(row: Row) -> dict:
    """A row with every sample."""
    case = row.job.case
    data = {
        "case": dataclasses.asdict(case),
        "threads": row.job.threads,
        "isa": row.isa,
        "error": row.error,
        "failures": row.failures,
        "memory": row.memory,
    }
    if row.rounds:
        data |= {
            "limited_by": work.limited_by(case),
            "amount": work.amount(case),
            "flops": work.flops(case),
            "bytes": work.bytes_of(case),
            "max_error": row.our_error,
            "seconds": row.rounds.seconds,
            "limits": row.rounds.limits,
            "left": row.rounds.left,
            "disturbed": row.disturbed,
            "median_seconds": row.time.median,
            "spread": row.time.spread,
            "wide": row.time.wide,
            "share_of_limit": row.share.median,
            "verdict": row.verdict,
            "peers": {name: dataclasses.asdict(ready) for name, ready in row.ready.items()},
            "speedup": {name: row.speedup(name).median for name in row.finished},
        }
    return plain(data)


def plain(value):
    """Plain data that any reader accepts: NaN, which JSON lacks, becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):
        return plain(value.item())
    return value


def save(path: str, run: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(plain(run), file, indent=1, allow_nan=False)
        file.write("\n")


def load(path: str) -> dict:
    """A saved run; ValueError says what is wrong with a file that is none."""
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(run, dict) or "rows" not in run or "machine" not in run:
        raise ValueError(f"{path}: not a run saved by --json")
    if run.get("schema") != SCHEMA:
        raise ValueError(f"{path}: saved in format {run.get('schema')}, this version reads {SCHEMA}: run it again")
    return run
