"""Sequences of one array to the places of others, all at once, and each row copied once.

A place whose rows nobody needs any more takes those that are to go there, which may free another. What is left then are
circles: the rows of one of their places are put aside. All of it piece by piece, so that what goes to several places is
read once.
"""

from collections.abc import Sequence

import numpy as np

from .._checks import Array

# Bytes of one sequence that are moved at a time: those of some beams stay in the last cache. 2^18, which would stay in
# the second, took 1.16 of the time, 2^16 1.6 (Zen 3).
_PIECE = 1 << 20
_ASIDE = -1
Spans = list[slice]  # of rows


class Moves:
    """Place b gets the rows of sequence ``order[b]`` that are in its own `spans`: (batch, heads, rows, width)."""

    def __init__(self, order: Sequence[int], spans: Sequence[Spans]) -> None:
        self._steps = _steps(order, spans)
        ends = [(span.start, span.stop) for *_, own in self._steps for span in own]
        self._low, self._top = min((low for low, _ in ends), default=0), max((top for _, top in ends), default=0)

    def spare(self, x: Array) -> Array:
        """Room for a piece of a sequence of x: heads, rows, width."""
        row = x.shape[3] * x.itemsize
        rows = max(1, min(_PIECE // row, self._top - self._low))
        return np.empty((max(1, min(_PIECE // (row * rows), x.shape[1])), rows, x.shape[3]), x.dtype)

    def apply(self, x: Array, spare: Array) -> None:
        heads, rows, _ = spare.shape
        for h in range(0, x.shape[1], heads):
            own = slice(h, h + heads)
            for row in range(self._low, self._top, rows):
                for to, source, spans in self._steps:
                    for span in spans:
                        low, top = max(span.start, row), min(span.stop, row + rows)
                        if low < top:
                            aside = spare[: x.shape[1] - h, low - row : top - row]
                            taken = aside if source == _ASIDE else x[source, own, low:top]
                            (aside if to == _ASIDE else x[to, own, low:top])[...] = taken


def _steps(order: Sequence[int], spans: Sequence[Spans]) -> list[tuple[int, int, Spans]]:
    """To where, from where, and which rows, in an order in which nothing is overwritten before it is read."""
    steps = []
    left = {b: source for b, source in enumerate(order) if b != source}
    readers = dict.fromkeys(left, 0)
    for source in left.values():
        if source in readers:
            readers[source] += 1
    free = [b for b, n in readers.items() if not n]
    while free:
        b = free.pop()
        source = left.pop(b)
        steps.append((b, source, spans[b]))
        if source in left:
            readers[source] -= 1
            if not readers[source]:
                free.append(source)
    while left:
        first, source = left.popitem()
        b, at = first, len(steps)
        while source != first:
            steps.append((b, source, spans[b]))
            b, source = source, left.pop(source)
        steps.insert(at, (_ASIDE, first, spans[b]))
        steps.append((b, _ASIDE, spans[b]))
    return steps
