"""Whether an answer is right: against the operation's definition in float64, on a sample of its rows.

The exact values are computed once per case and sent to every process that has to check an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import work
from .cases import Case
from .method import Refused

BAND = 32  # rows; the definition stores whole score matrices, so long cases are compared in three bands


@dataclass(frozen=True)
class Exact:
    """The right answer for some rows: (first, one after the last, values (batch, heads, rows, last))."""

    shape: tuple[int, ...]
    dtype: str
    allowed: float
    bands: list[tuple[int, int, np.ndarray]]

    @classmethod
    def of(cls, case: Case) -> Exact:
        arrays, operation = work.inputs(case), work.operation(case)
        length = operation.rows(case)
        starts = [0] if length <= 3 * BAND else [0, length // 2, length - BAND]
        ends = [length] if len(starts) == 1 else [start + BAND for start in starts]
        bands = [(a, b, operation.exact(case, arrays, slice(a, b))) for a, b in zip(starts, ends, strict=True)]
        batch, heads, _, last = bands[0][2].shape
        return cls((batch, heads, length, last), case.dtype, operation.tolerance(case, arrays), bands)

    def error(self, answer: np.ndarray) -> float:
        """Largest error of an answer (batch, heads, rows, last); Refused if it is wrong."""
        if answer.shape != self.shape:
            raise Refused(f"wrong answer: shape {answer.shape}, not {self.shape}")
        if answer.dtype != self.dtype:
            raise Refused(f"wrong answer: type {answer.dtype}, not {self.dtype}")
        worst = 0.0
        for first, end, exact in self.bands:
            difference = np.abs(answer[:, :, first:end].astype(np.float64) - exact)
            worst = max(worst, np.inf if np.isnan(difference).any() else float(difference.max(initial=0.0)))
        if worst > self.allowed:
            raise Refused(f"wrong answer: error {worst:.1e}, allowed {self.allowed:.1e}")
        return worst
