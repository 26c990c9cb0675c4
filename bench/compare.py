"""Two runs, row by row: what changed, and what is only noise.

The measure of a row is its cost: time per call × the machine's limit in the same round (the FMA peak, the read
bandwidth, or calls that Python makes), so that a machine that was slower as a whole, in one run or in a part of it,
cancels. A change is the new median cost over the old one.

The noise band comes from the runs themselves, from three places that are added in quadrature:

- within a run, the interquartile ranges of the row in both runs. Quartiles of few rounds scatter, so they count only
  where they are wider than the median over all rows, which is every row's least.
- between the runs, two standard deviations of the rows' changes about their median change (as estimated from the median
  deviation, so that a few rows that did change don't widen it): noise that stays the same over a run does not show
  within it, like where arrays happen to lie in memory.
- the machine: where the row's limit was another one in the other run, the cost does not cancel all of it (UNMATCHED).

Fewer than LEAST_ROWS rows cannot show the second: a change that one row has is noise or not, and nothing tells. There
a wider band is added that is as wide as it gets with busy neighbours (UNSEEN). What lies between the two is neither
"same" nor a change but "too few rows to tell"; only what lies outside both is slower or faster.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

from . import record
from .method import Summary
from .ours import OURS
from .runner import threads_text
from .tables import Table

# Of the change of a limit, in logarithms. With a busy neighbour on a Zen 4 core the FMA peak and Python's calls halved
# (0.69), and costs of one build shifted by up to 0.25: kernels share caches with the neighbour, short calls do not.
UNMATCHED = 0.35
LEAST_ROWS = 3  # of two, both deviate from their median alike, whichever of them changed
UNSEEN = 0.20  # the band that runs of many rows show where neighbours take half of the cores
PLAUSIBLE = 1e-30, 1e30  # times, limits and amounts of work lie between; products of such numbers do not overflow
MOST_NAMES = 12  # of rows in a line
IDENTITY = ("cpu", "cpus", "numpy", "python", "system")  # of the machine; a comparison across them says so


Key = tuple[str, int, str]  # case, threads, CPU path: rows are the same if all of it is


@dataclass(frozen=True)
class Change:
    """A row in both runs: new cost over old, and the band around 1 that is noise; `doubt`: what might be, or 0."""

    name: str
    threads: int
    ratio: float
    band: float
    doubt: float = 0.0

    @property
    def verdict(self) -> str:
        if math.isnan(self.ratio) or math.isnan(self.band):
            return "unknown"
        if abs(self.ratio - 1) <= self.band:
            return "same"
        if abs(self.ratio - 1) <= self.doubt:
            return "too few rows to tell"
        return "slower" if self.ratio > 1 else "faster"


def load(path: str) -> dict:
    """A saved run whose rows can be compared; ValueError says what is wrong with it, before anything is timed."""
    run = record.load(path)
    if not isinstance(run["machine"], dict):
        raise ValueError(f"{path}: damaged: machine is {run['machine']!r:.40}, not an object")
    if not isinstance(run["rows"], list):
        raise ValueError(f"{path}: damaged: rows is {run['rows']!r:.40}, not a list")
    for index, row in enumerate(run["rows"]):
        if problem := damage(row):
            raise ValueError(f"{path}: damaged: rows[{index}]: {problem}")
    return run


def damage(row: object) -> str:
    """What keeps a row from being compared, or nothing."""
    try:
        name, threads, isa = key(row)
        if not (isinstance(name, str) and isinstance(threads, int) and isinstance(isa, str)):
            return f"case, threads and isa are {name!r:.40}, {threads!r:.40} and {isa!r:.40}"
        if row["error"]:
            return ""
        seconds, limits, amount = row["seconds"][OURS], row["limits"], row["amount"]
        pairs = [(before, after) for before, after in limits]
        rounds = len(seconds)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    if not rounds or rounds != len(pairs):
        return f"{rounds} times and {len(pairs)} limits"
    least, most = PLAUSIBLE
    for what, values in (("time", seconds), ("limit", [x for pair in pairs for x in pair]), ("amount", [amount])):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, Real) or not least < value < most:
                return f"{what} {value!r:.40} is not a number above 0"
    return ""


def key(row: dict) -> Key:
    return row["case"]["name"], row["threads"], row["isa"]


def finished(run: dict) -> list[Key]:
    return [key(row) for row in run["rows"] if not row["error"]]


def names(keys: Iterable[Key], most: int = MOST_NAMES) -> str:
    """Rows as people know them."""
    texts = [f"{name} ({threads_text(threads)}, {isa})" for name, threads, isa in keys]
    more = f", and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more if texts else "none"


def check_common(old: dict, new: Iterable[Key], path: str) -> None:
    """ValueError where a comparison would compare nothing."""
    new = list(new)
    if set(new).isdisjoint(finished(old)):
        raise ValueError(
            f"no row in common with {path}\n  its rows: {names(finished(old))}\n  rows of this run: {names(new)}"
        )


def cost(row: dict) -> Summary:
    """Time per call in units of what the machine could have done meanwhile, over the rounds."""
    pairs = zip(row["seconds"][OURS], row["limits"], strict=True)
    return Summary.of([s * (before + after) / 2 / row["amount"] for s, (before, after) in pairs])


def limit(row: dict) -> float:
    """What the machine could do meanwhile, the median over the rounds."""
    return statistics.median((before + after) / 2 for before, after in row["limits"])


def changes(old: dict, new: dict) -> list[Change]:
    """Rows that both runs have finished, in the new one's order."""
    before = {key(row): row for row in old["rows"] if not row["error"]}
    pairs = [(before[key(row)], row) for row in new["rows"] if not row["error"] and key(row) in before]
    costs = [(cost(a), cost(b)) for a, b in pairs]
    within = [math.hypot(a.spread, b.spread) for a, b in costs]
    ratios = [b.median / a.median for a, b in costs]
    enough = len(pairs) >= LEAST_ROWS
    between = scatter(ratios) if enough else 0.0
    found = []
    for (a, b), ratio, own in zip(pairs, ratios, within, strict=True):
        machine = UNMATCHED * abs(math.log(limit(b) / limit(a)))
        band = math.hypot(max(own, statistics.median(within)), between, machine)
        doubt = 0.0 if enough else math.hypot(band, UNSEEN)
        found.append(Change(b["case"]["name"], b["threads"], ratio, band, doubt))
    return found


def scatter(ratios: list[float]) -> float:
    """Two standard deviations of ratios about their median."""
    middle = statistics.median(ratios)
    return 2 * 1.4826 * statistics.median(abs(ratio / middle - 1) for ratio in ratios)  # 1.4826: of a normal law


def regressions(found: list[Change], percent: float) -> list[Change]:
    """Rows that are slower by more than `percent`, and by more than noise; one without a figure never passes."""
    slower = [c for c in found if c.verdict == "slower" and c.ratio > 1 + percent / 100]
    return slower + [c for c in found if c.verdict == "unknown"]


def table(old: dict, new: dict, found: list[Change], path: str) -> Table:
    """The comparison as people see it; above 1 the new run is slower."""
    result = Table(f"Compared with {path}", ["workload", "thr", "new / old", "noise", "verdict"])
    for c in found:
        style = {"slower": "below", "unknown": "below", "faster": "ok"}.get(c.verdict, "")
        noise = f"± {100 * c.band:.1f}" + (f" to {100 * c.doubt:.1f}" if c.doubt else "")
        result.add([c.name, str(c.threads), f"{c.ratio:.3f}x", f"{noise} %", c.verdict], style)
    result.notes.append(
        "new / old: cost of a call, in time × what the machine's limit was meanwhile; above 1 is slower"
    )
    if len(found) < LEAST_ROWS:
        result.notes.append(
            f"fewer than {LEAST_ROWS} rows do not show how much runs differ by chance, which may be ±"
            f" {100 * UNSEEN:.0f} %: compare more rows"
        )
    mean = math.exp(statistics.fmean(math.log(c.ratio) for c in found))
    counts = Counter({"same": 0, "slower": 0, "faster": 0})
    counts.update(c.verdict for c in found)
    result.notes.append(f"{', '.join(f'{n} {v}' for v, n in counts.items())}; geometric mean {mean:.3f}x")
    before, after = finished(old), finished(new)
    if missing := [k for k in before if k not in after]:
        result.notes.append(f"finished in the old run only: {names(missing)}")
    if missing := [k for k in after if k not in before]:
        result.notes.append(f"finished in this run only: {names(missing)}")
    for name in IDENTITY:
        if old["machine"].get(name) != new["machine"].get(name):
            result.notes.append(f"another {name}: {old['machine'].get(name)} then, {new['machine'].get(name)} now")
    return result
