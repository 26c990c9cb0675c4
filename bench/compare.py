"""Two runs, row by row: what changed, and what is only noise.

The measure of a row is its cost: time per call × the machine's limit in the same round (the FMA peak, the read
bandwidth, or calls that Python makes), so that a machine that was slower as a whole, in one run or in a part of it,
cancels. A change is the new median cost over the old one.

The noise band comes from the runs themselves, from two places that are added in quadrature:

- within a run, the interquartile ranges of the row in both runs. Quartiles of few rounds scatter, so they count only
  where they are wider than the median over all rows, which is every row's least.
- between the runs, two standard deviations of the rows' changes about their median change (as estimated from the median
  deviation, so that a few rows that did change don't widen it): noise that stays the same over a run does not show
  within it, like a busy neighbour, or where arrays happen to lie in memory.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from .method import Summary
from .ours import OURS
from .tables import Table

IDENTITY = ("cpu", "cpus", "numpy", "python", "system")  # of the machine; a comparison across them says so


@dataclass(frozen=True)
class Change:
    """A row in both runs: new cost over old, and the band around 1 that is noise."""

    name: str
    threads: int
    ratio: float
    band: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.ratio) or math.isnan(self.band):
            return "unknown"
        if abs(self.ratio - 1) <= self.band:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def key(row: dict) -> tuple:
    return row["case"]["name"], row["threads"], row["isa"]


def cost(row: dict) -> Summary:
    """Time per call in units of what the machine could have done meanwhile, over the rounds."""
    pairs = zip(row["seconds"][OURS], row["limits"], strict=True)
    return Summary.of([s * (before + after) / 2 / row["amount"] for s, (before, after) in pairs])


def changes(old: dict, new: dict) -> list[Change]:
    """Rows that both runs have finished, in the new one's order."""
    before = {key(row): cost(row) for row in old["rows"] if not row["error"]}
    found = []
    for row in new["rows"]:
        if not row["error"] and key(row) in before:
            found.append((row, before[key(row)], cost(row)))
    within = [math.hypot(a.spread, b.spread) for _, a, b in found]
    least = statistics.median(within) if within else math.nan
    ratios = [b.median / a.median for _, a, b in found]
    between = scatter(ratios)
    return [
        Change(row["case"]["name"], row["threads"], ratio, math.hypot(max(own, least), between))
        for (row, _, _), ratio, own in zip(found, ratios, within, strict=True)
    ]


def scatter(ratios: list[float]) -> float:
    """Two standard deviations of ratios about their median; 0 for one ratio, which says nothing about the others."""
    if not ratios:
        return math.nan
    middle = statistics.median(ratios)
    return 2 * 1.4826 * statistics.median(abs(ratio / middle - 1) for ratio in ratios)  # 1.4826: of a normal law


def regressions(found: list[Change], percent: float) -> list[Change]:
    """Rows that are slower by more than `percent`, and by more than noise."""
    return [c for c in found if c.verdict == "slower" and c.ratio > 1 + percent / 100]


def table(old: dict, new: dict, found: list[Change], path: str) -> Table:
    """The comparison as people see it; above 1 the new run is slower."""
    result = Table(f"Compared with {path}", ["workload", "thr", "new / old", "noise", "verdict"])
    for c in found:
        style = {"slower": "below", "faster": "ok"}.get(c.verdict, "")
        result.add([c.name, str(c.threads), f"{c.ratio:.3f}x", f"± {100 * c.band:.1f} %", c.verdict], style)
    result.notes.append(
        "new / old: cost of a call, in time × what the machine's limit was meanwhile; above 1 is slower"
    )
    if found:
        mean = math.exp(statistics.fmean(math.log(c.ratio) for c in found))
        counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in ("same", "slower", "faster")}
        result.notes.append(f"{', '.join(f'{n} {v}' for v, n in counts.items())}; geometric mean {mean:.3f}x")
    keys = {key(row) for row in old["rows"] if not row["error"]}
    if missing := [row["case"]["name"] for row in new["rows"] if not row["error"] and key(row) not in keys]:
        result.notes.append(f"not in the old run: {', '.join(missing)}")
    for name in IDENTITY:
        if old["machine"].get(name) != new["machine"].get(name):
            result.notes.append(f"another {name}: {old['machine'].get(name)} then, {new['machine'].get(name)} now")
    return result
