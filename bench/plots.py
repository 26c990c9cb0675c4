"""Pictures of a run, from its plain data: roofline, bars against the peers, scaling. matplotlib is imported late."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from .method import Rounds
from .ours import OURS

COLOURS = {OURS: "#c8102e"}  # ours is red in every picture; the peers take the following in turn
OTHERS = ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c8c8c", "#bcbd22", "#17becf", "#e377c2")


def draw(run: dict, folder: str) -> Iterator[Path]:
    """Write the pictures that the run has data for; yields their files."""
    rows = [row for row in run["rows"] if not row["error"]]
    machine = run["machine"]
    about = f"{machine['cpu']}, CPUs: {machine['cpus']}, path {machine['isa']}; qkv_fast {machine['qkv_fast']}"
    pictures: dict[str, Callable] = {"roofline": roofline, "peers": bars, "scaling": scaling}
    for name, picture in pictures.items():
        figure = picture(run, rows, about)
        if figure is not None:
            path = Path(folder, f"{name}.png")
            figure.savefig(path, dpi=120)
            yield path


def figure_of(width: float, height: float, panels: int = 1):
    """A figure without pyplot: no window system, no state of the process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def rounds(row: dict) -> Rounds:
    """The samples; null stands for a round that a contestant had left."""
    seconds = {n: [math.nan if s is None else s for s in values] for n, values in row["seconds"].items()}
    return Rounds(seconds, [tuple(pair) for pair in row["limits"]])


def contestants(rows: list[dict]) -> dict[str, str]:
    """Everyone who was timed, with a colour."""
    names = dict.fromkeys(name for row in rows for name in (OURS, *row["speedup"]))
    others = iter(OTHERS * len(names))
    return {name: COLOURS.get(name) or next(others) for name in names}


def label(row: dict, with_threads: bool) -> str:
    return row["case"]["name"] + (f", {row['threads']} thr" if with_threads else "")


def roofline(run: dict, rows: list[dict], about: str):
    """Useful operations per second over operations per byte, below what the machine allows; copies have none."""
    rows = [row for row in rows if row["limited_by"] != "copy"]
    counts = [n for n in sorted({row["threads"] for row in rows}) if str(n) in run["limits"].get("before", {})]
    if not counts:
        return None
    counts = counts if len(counts) <= 2 else [counts[0], counts[-1]]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(row["case"]["name"] for row in rows), 1)}
    figure, axes = figure_of(3.5 + 6.5 * len(counts), max(5.5, 1.5 + 0.145 * len(numbers)), len(counts))
    for ax, n in zip(axes, counts, strict=True):
        under_roof(ax, run, [row for row in rows if row["threads"] == n], numbers)
        ax.set_title(f"{n} thread{'s' * (n > 1)}", fontsize=10, loc="left")
    key = "\n".join(f"{number:2}  {name}" for name, number in numbers.items())
    axes[-1].annotate(key, (1.03, 1), xycoords="axes fraction", va="top", fontsize=7, family="monospace")
    figure.suptitle(f"Roofline\n{about}", fontsize=10)
    return figure


def under_roof(ax, run: dict, rows: list[dict], numbers: dict[str, int]) -> None:
    """The limits at one thread count, and the rows below them."""
    ends = [run["limits"][end][str(rows[0]["threads"])] for end in ("before", "after") if end in run["limits"]]
    limits = {name: max(rates[name] for rates in ends) / 1e9 for name in ends[0]}
    reach = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(0.3, *reach) / 2, max(100.0, *reach) * 2
    bandwidth = limits["read"]
    for dtype, style in (("float32", "-"), ("float64", "--")):
        if dtype == "float32" or dtype in {row["case"]["dtype"] for row in rows}:
            peak = limits[dtype]
            ax.plot(
                [left, peak / bandwidth, right], [left * bandwidth, peak, peak], style, color="black", linewidth=1.4
            )
            ax.text(right, peak * 1.03, f"{dtype} FMA peak {peak:.0f} GF/s", ha="right", va="bottom", fontsize=8)
    ax.text(1, bandwidth, f"read {bandwidth:.0f} GB/s  ", fontsize=8, ha="right", va="bottom")
    for row in rows:
        x, y = row["flops"] / row["bytes"], row["flops"] / row["median_seconds"] / 1e9
        ax.plot(x, y, "o", color=COLOURS[OURS], markersize=4)
        ax.annotate(str(numbers[row["case"]["name"]]), (x, y), xytext=(3, -8), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", yscale="log", xlim=(left, right))
    ax.set_xlabel("operations per byte of inputs and output (flop/B)")
    ax.set_ylabel("useful operations (GF/s)")


def bars(run: dict, rows: list[dict], about: str):
    """Everyone's share of the limit, row by row; calls per second where a call is so small that it has none."""
    names = contestants(rows)
    if len(names) < 2:
        return None
    several = len({row["threads"] for row in rows}) > 1
    groups = [[row for row in rows if (row["limited_by"] == "calls") == small] for small in (False, True)]
    groups = [group for group in groups if group]
    most = max(sum(1 + len(row["speedup"]) + 0.8 for row in group) for group in groups)
    figure, axes = figure_of(9 * len(groups), 1.6 + 0.15 * most, len(groups))
    for ax, group in zip(axes, groups, strict=True):
        bars_of(ax, group, names, several)
    ax = axes[0]
    machine = {name: ready for row in rows for name, ready in row["peers"].items()}
    for name, colour in names.items():
        version = run["machine"]["qkv_fast"] if name == OURS else machine[name]["version"]
        ax.barh([0], [0], color=colour, label=f"{name} {version}")
    ax.legend(fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    figure.suptitle(f"Against the peers, equal thread counts\n{about}", fontsize=10)
    return figure


def bars_of(ax, rows: list[dict], names: dict[str, str], several: bool) -> None:
    """One panel: rows that are all measured by a share, or all by calls per second."""
    small = rows[0]["limited_by"] == "calls"
    at, ticks = 0.0, []
    for row in rows:
        found = rounds(row)
        begin = at
        for name in (name for name in names if name == OURS or name in row["speedup"]):
            value = 1e-3 / found.time(name).median if small else 100 * found.share(name, row["amount"]).median
            ax.barh(at, value, 0.9, color=names[name])
            ax.text(value, at, f" {value:.3g}" if small else f" {value:.0f}", va="center", fontsize=6)
            at += 1
        ticks.append((begin + at - 1) / 2)
        at += 0.8
    ax.set_yticks(ticks, [label(row, several) for row in rows], fontsize=8)
    ax.set_ylim(at, -1)
    limits = "FMA peak of the type (rows that stream from memory: read bandwidth; softmax: copy bandwidth)"
    shares = f"% of the limit, more is better\n{limits}"
    ax.set_xlabel("thousand calls per second, more is better" if small else shares)


def scaling(run: dict, rows: list[dict], about: str):
    """Speed over threads; share of the limit over length, at fixed work."""
    rows = [row for row in rows if row["limited_by"] != "calls"]
    counts = sorted({row["threads"] for row in rows})
    fixed = [row for row in rows if "scaling" in row["case"]["suites"] and row["threads"] == counts[-1]]
    by_case: dict[str, dict[int, float]] = {}
    for row in [row for row in rows if "scaling" in row["case"]["suites"]] or rows:
        by_case.setdefault(label(row, False), {})[row["threads"]] = row["median_seconds"]
    by_case = {name: times for name, times in by_case.items() if len(times) > 1 and counts[0] in times}
    panels = bool(by_case) + (len(fixed) > 1)
    if not panels:
        return None
    figure, axes = figure_of(1 + 7 * panels, max(5.5, 1 + 0.16 * len(by_case)), panels)
    remaining = list(axes)
    if by_case:
        over_threads(remaining.pop(0), by_case, run)
    if len(fixed) > 1:
        over_length(remaining.pop(0), fixed)
    figure.suptitle(f"Scaling\n{about}", fontsize=10)
    return figure


def over_threads(ax, by_case: dict[str, dict[int, float]], run: dict) -> None:
    for name, times in by_case.items():
        first = min(times)
        ax.plot(list(times), [first * times[first] / t for t in times.values()], "o-", markersize=4, label=name)
    peaks = {int(n): rates["float32"] for n, rates in run["limits"].get("before", {}).items()}
    if len(peaks) > 1:
        first = min(peaks)
        gain = [first * peak / peaks[first] for peak in peaks.values()]
        ax.plot(list(peaks), gain, "k--", label="FMA peak, float32")
    ax.set_xticks(sorted({n for times in by_case.values() for n in times}))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("threads")
    ax.set_ylabel("speed, × one thread")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def over_length(ax, fixed: list[dict]) -> None:
    fixed = sorted(fixed, key=lambda row: row["case"]["kv_len"])
    for name, colour in contestants(fixed).items():
        shares = [
            (row["case"]["kv_len"], rounds(row).share(name, row["amount"]).median)
            for row in fixed
            if name in row["seconds"]
        ]
        ax.plot([n for n, _ in shares], [100 * s for _, s in shares], "o-", color=colour, markersize=4, label=name)
    ax.set_xscale("log", base=2)
    lengths = [row["case"]["kv_len"] for row in fixed]
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("sequence length (queries = keys), batch × heads × length² fixed")
    threads = fixed[0]["threads"]
    ax.set_ylabel(f"% of the FMA peak, {threads} thread{'s' * (threads > 1)}")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
