"""A ring of rows: which row holds which token, and where attention finds the tokens that it may see.

Token t of a sequence lies in row t while t < keep, else in row keep + (t - keep) % size. Positions stay what they are:
every lap around the ring is a run of keys over the same rows. `reach` is one past the last token that overwrote an
older one: `truncate` brings none back.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .._checks import Array

BLOCK = 1024  # keys, at most, that the core fetches together: those of a block before the window need a place too

Laps = list[tuple[int, int]]  # for each sequence the first and the last lap that a call needs
Steps = Sequence[tuple[int, int]]  # bytes between sequences and between rows, of k and of v


class Ring(NamedTuple):
    keep: int
    size: int

    def pieces(self, begin: int, n: int) -> Iterator[tuple[int, int, int]]:
        """Where tokens begin .. begin + n go, as (row, number of the first, how many), without those overwritten."""
        keep, size = self
        t = 0
        while t < n:
            if begin + t < keep:
                row, end = begin + t, keep
            else:
                t = max(t, n - size)
                row, end = keep + (begin + t - keep) % size, keep + size
            many = min(end - row, n - t)
            yield row, t, many
            t += many

    def rows(self, tokens: Array) -> Array:
        """Where tokens are."""
        return np.where(tokens < self.keep, tokens, self.keep + (tokens - self.keep) % self.size)

    def seen(self, lengths: Array, left: int) -> tuple[Array, Array]:
        """Where all that the last token of each sequence sees lies, in order, (batch, most), and how many these are."""
        gaps = np.maximum(lengths - 1 - left - self.keep, 0)
        t = np.arange(int((lengths - gaps).max()))
        return self.rows(np.where(t < self.keep, t, t + gaps[:, np.newaxis])), lengths - gaps

    def positions(self, lengths: Array, reach: Array, rows: int) -> Array:
        """The token in each of the first rows, (batch, rows); -1 where there is none."""
        keep, size = self
        row = np.arange(rows)
        # the last token before `reach` in this row, which is the last one written there
        at = np.where(row < keep, row, row + (reach[:, None] - 1 - row) // size * size)
        return np.where((row <= at) & (at < lengths[:, None]), at, -1)

    def lost(self, stay: Array, lengths: Array, reach: Array, window: int) -> Array:
        """Whether sequences cut down to `stay` tokens would lack some of their last one's window, (batch,) bool."""
        oldest = reach - self.size
        lacking: Array = (stay < lengths) & (stay > self.keep) & (np.maximum(stay - window, self.keep) < oldest)
        return lacking

    def laps(self, where: str, lengths: Array, reach: Array, starts: Array, queries: list[int], left: int) -> Laps:
        """Laps for the newest queries, whose windows reach `left` back, but not beyond where a sequence starts."""
        keep, size = self
        found = []
        for n, end, start, new in zip(lengths.tolist(), reach.tolist(), starts.tolist(), queries, strict=True):
            first = max(n - new - left, keep, start)
            if n > first < end - size:
                raise ValueError(
                    f"{where}: the first query's window begins at token {first}, the ring holds {size} tokens "
                    f"from {end - size} on: append and attend to fewer tokens at a time, or make it with "
                    f"capacity={keep + left + new}, keep + window + queries (window={left})"
                )
            found.append((max((first - BLOCK - keep) // size, 0), max((n - 1 - keep) // size, 0)))
        return found

    def runs(self, laps: Laps, steps: Steps) -> tuple[Array, Array]:
        """The runs of keys of each sequence, and where each one's begin: of the kept ones, then of laps, of which older
        ones stand for what the window hides."""
        keep, size = self
        table, run_of = [], [0]
        for b, (first, last) in enumerate(laps):
            kept = [b * sequence for sequence, _ in steps]
            ring = [b * sequence + keep * row for sequence, row in steps]
            if keep:
                table.append((*kept, 0, keep))
            table += [(*ring, keep + lap * size, size) for lap in range(first, last + 1)]
            run_of.append(len(table))
        return np.array(table, np.int64), np.array(run_of, np.int64)

    def joined(self, lengths: Array, left: int, steps: Steps) -> tuple[Array, Array, Array]:
        """Runs as if the kept tokens and the window of the last one followed one another, and how many keys that is."""
        keep, size = self
        gaps = np.maximum(lengths - 1 - left - keep, 0)
        table = []
        (k_sequence, k_row), (v_sequence, v_row) = steps
        for b, gap in enumerate((gaps % size).tolist()):
            for row, first, n in ((0, 0, keep), (keep + gap, keep, size - gap), (keep, keep + size - gap, gap)):
                table.append((b * k_sequence + row * k_row, b * v_sequence + row * v_row, first, n))
        return np.array(table, np.int64), np.arange(0, len(table) + 1, 3), lengths - gaps
