"""Write docs/speed.md, the speed of each version, from docs/speed.json, which holds what matters of each run.

    qkv-fast bench --suite quick --peers numpy --json record.json     # the release job does this
    python docs/speed.py record.json                                  # adds that run; one of its version and CPU goes
    python docs/speed.py                                              # writes the page again
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = HERE / "speed.json"
KEPT = ("qkv_fast", "cpu", "cpus", "isa", "numpy", "python", "time")  # of what a record says of its machine
HEAD = """# Speed over versions

Suite `quick` of `qkv-fast bench`, as measured for each release; [bench/README.md](../bench/README.md) says what the
names mean and how a row is timed. A cell is the median time of a call and, in brackets, its share of what the machine
could do in the same round. That share is what to compare, since machines are shared and their clocks change; calls
with hardly any work have none. Columns of one table are comparable, tables (one for each CPU) are not.
`scripts/compare_speed` compares two commits more sharply, in turns on one machine.
"""


def reduce(record):
    """Of a record that `--json` saved: what machine and versions, and of each row seconds and share of the limit."""
    if record["interrupted"]:
        raise ValueError("the run was interrupted: measure again")
    run = {name: record["machine"][name] for name in KEPT}
    rows = [row for row in record["rows"] if not row["error"]]
    figures = ("median_seconds", "share_of_limit", "limited_by")
    run["rows"] = {f"{row['case']['name']}, {row['threads']} thr": [row[name] for name in figures] for row in rows}
    return run


def add(runs, new):
    """The runs with a new one, which replaces that of its version on its CPU; by time."""
    kept = [run for run in runs if (run["qkv_fast"], run["cpu"]) != (new["qkv_fast"], new["cpu"])]
    return sorted([*kept, new], key=lambda run: run["time"])


def cell(seconds, share, limited_by):
    unit, scale = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    text = f"{seconds * scale:.3g} {unit}"
    return text if limited_by == "calls" else f"{text} ({share:.0%})"


def page(runs):
    """The Markdown of all runs: a table per CPU, newest version first."""
    parts = [HEAD]
    for cpu in dict.fromkeys(run["cpu"] for run in reversed(runs)):
        mine = [run for run in reversed(runs) if run["cpu"] == cpu]
        names = dict.fromkeys(name for run in mine for name in run["rows"])
        lines = [f"## {cpu}", "", "| workload | " + " | ".join(run["qkv_fast"] for run in mine) + " |"]
        lines.append("|---|" + "---:|" * len(mine))
        for name in names:
            cells = [cell(*run["rows"][name]) if name in run["rows"] else "" for run in mine]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
        for run in mine:
            about = f"{run['cpus']} CPUs, path {run['isa']}, NumPy {run['numpy']}, Python {run['python']}"
            lines.append(f"- {run['qkv_fast']}: {run['time'][:10]}, {about}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main(records):
    runs = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else []
    for record in records:
        runs = add(runs, reduce(json.loads(Path(record).read_text(encoding="utf-8"))))
    RUNS.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (HERE / "speed.md").write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
