"""Which pages of a pool sequences have: shared, to be copied before one of them is written to, and given back.

A sequence has the pages of its tokens in order, but for the first ones that hold nothing but padding, or with a window
what no later token sees.
"""

import numpy as np

from .._checks import Array
from .files import WHOLE


class Stretch:
    """What a sequence has: `length` tokens, the first `start` of them padding, and its pages from number `gone` on."""

    __slots__ = ("gone", "length", "pages", "start")

    def __init__(self, length: int = 0, start: int = 0, gone: int = 0, pages: list[int] | None = None) -> None:
        self.length, self.start, self.gone = length, start, gone
        self.pages: list[int] = pages or []


class Table:
    """Whose pages are whose; `size` tokens are in one."""

    def __init__(self, pages: int, size: int) -> None:
        self.size = size
        self.owners = [0] * pages  # sequences that have the page
        self.free = list(range(pages - 1, -1, -1))  # the first ones are taken first

    def take(self) -> int:
        page = self.free.pop()
        self.owners[page] = 1
        return page

    def release(self, page: int) -> None:
        self.owners[page] -= 1
        if not self.owners[page]:
            self.free.append(page)

    def share(self, s: Stretch) -> Stretch:
        """Another that has the same pages."""
        for page in s.pages:
            self.owners[page] += 1
        return Stretch(s.length, s.start, s.gone, s.pages.copy())

    def cut(self, s: Stretch, n: int) -> None:
        """Down to n tokens; pages beyond go back, also those of tokens that have not become any."""
        s.length, s.start = n, min(s.start, n)
        end = -(-n // self.size) if n > s.start else 0
        while s.pages and s.gone + len(s.pages) > end:
            self.release(s.pages.pop())
        if not s.pages:
            s.gone = n // self.size

    def first(self, s: Stretch) -> int:
        """The first token that is there, or would be."""
        return max(s.start, s.gone * self.size)

    def first_after(self, s: Stretch, start: int, length: int, window: int) -> int:
        """The same once it has that length and start, after an append that gives back what it can."""
        gone = s.gone + (self.unseen(s, window) if length > max(s.length, start) else 0)
        return max(start, gone * self.size if s.pages else 0)

    def lacks(self, s: Stretch, n: int, window: int | None) -> bool:
        """Whether token n, were it the next one, would see some that are not there any more."""
        return window is not None and n > s.start and max(n - window, s.start) < s.gone * self.size

    def unseen(self, s: Stretch, window: int | None) -> int:
        """How many of its first pages no token from now on sees."""
        return 0 if window is None else max((s.length - window) // self.size - s.gone, 0)

    def drop(self, s: Stretch, n: int) -> None:
        """Give the first n pages back."""
        for page in s.pages[:n]:
            self.release(page)
        del s.pages[:n]
        s.gone += n

    def count(self, stretches: list[Stretch], begins: list[int], ends: list[int], window: int | None) -> int:
        """Pages that an append takes beyond those that it gives back: new ones at the ends, and copies of last ones
        that are shared. It writes the tokens from `begins` to `ends` of each."""
        needed = 0
        owners: dict[int, int] = {}
        if window is not None:
            for s, begin, end in zip(stretches, begins, ends, strict=True):
                for page in s.pages[: self.unseen(s, window) if begin < end else 0]:
                    owners[page] = owners.get(page, self.owners[page]) - 1
                    needed -= not owners[page]
        for s, begin, end in zip(stretches, begins, ends, strict=True):
            if begin == end:
                continue
            at, within = divmod(begin, self.size)
            there = s.gone + len(s.pages) if s.pages else at
            needed += -(-end // self.size) - there
            if within and at < there:
                page = s.pages[-1]
                left = owners.get(page, self.owners[page])
                needed += left > 1
                owners[page] = left - 1
        return needed

    def rows(self, s: Stretch, tokens: Array) -> Array:
        """Where in the pool tokens lie."""
        rows: Array = np.array(s.pages, np.int64)[tokens // self.size - s.gone] * self.size + tokens % self.size
        return rows


def read_table(numbers: list[int], rows: int) -> tuple[Table, int, int, dict[int, Stretch]] | None:
    """From the numbers of a file: page size, window (as a Geometry has it), the next sequence's number; then of each
    sequence its number, length, start, gone, how many pages, and these. None where no pool of so many rows has them."""
    if len(numbers) < 3 or numbers[0] < 1 or rows % numbers[0] or numbers[1] < WHOLE:
        return None
    size, window, following = numbers[:3]
    table, found, at = Table(rows // size, size), dict[int, Stretch](), 3
    while at + 5 <= len(numbers):
        number, length, start, gone, count = numbers[at : at + 5]
        pages = numbers[at + 5 : at + 5 + max(count, 0)]
        at += 5 + len(pages)
        first, end = (start // size, -(-length // size)) if start < length else (length // size, length // size)
        known = len(pages) == count and all(0 <= page < len(table.owners) for page in pages)
        right = gone + len(pages) == end and (gone == first or (window >= 0 and first < gone))
        if not (known and right and 0 <= start <= length < 1 << 62 and 0 <= number < following and number not in found):
            return None
        found[number] = table.share(Stretch(length, start, gone, pages))
    if at != len(numbers):
        return None
    table.free = [page for page in reversed(range(len(table.owners))) if not table.owners[page]]
    return table, window, following, found
