"""Spotlight's questions as operations (operations.py has the contract): what is asked of q, k and v.

The inputs are attention's. `head_first` gives an answer a last axis where it has none. Where the definition of a number
needs all queries, or many of them, that of the last head alone is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import qkv_fast

from .operations import TOLERANCE, Attention
from .problem import Problem, element

CELLS = 256  # of a picture, on either axis, unless another shape is asked for
HEAVIEST = 5  # keys, unless another number is asked for
LAST = 32  # queries whose weights are asked for
BAND = 512  # queries; the definition stores a whole score matrix


@dataclass(frozen=True)
class Question:
    """A number about each query. `saved`: what of an earlier call of attention it is given; `largest`: what the numbers
    of its answers may amount to."""

    function: str  # its name in qkv_fast.spotlight and in qkv_fast.reference.spotlight
    saved: tuple[str, ...] = ()
    largest: float = 1.0

    shapes = staticmethod(Attention.shapes)
    inputs = staticmethod(Attention.inputs)

    def result(self, problem: Problem) -> tuple[int, ...]:
        """Shape of the answer."""
        return problem.batch, problem.heads, problem.q_len

    def result_bytes(self, problem: Problem) -> int:
        return math.prod(self.result(problem)) * element(problem.dtype).itemsize

    def rows(self, problem: Problem) -> int:
        return self.result(problem)[2]

    def flops(self, problem: Problem) -> int:
        """The scores once, however often they are computed."""
        return 2 * problem.heads * problem.visible_pairs() * problem.dim

    def bytes(self, problem: Problem) -> int:
        looked_at = self.asked_of(self.shapes(problem))
        return sum(map(math.prod, looked_at)) * element(problem.dtype).itemsize + self.result_bytes(problem)

    def options(self) -> dict[str, Any]:
        """What it is called with beside the problem's own arguments."""
        return {}

    def call(
        self, problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], Any]:
        options = problem.arguments() | {"num_threads": threads}
        if self.saved:
            output, lse = qkv_fast.attention(*arrays, return_lse=True, **options)
            options |= {name: {"output": output, "lse": lse}[name] for name in self.saved}
        function, options = getattr(qkv_fast.spotlight, self.function), options | self.options()
        asked_of = self.asked_of(arrays)
        return lambda: function(*asked_of, **options)

    def asked_of(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """What of q, k and v it is given."""
        return arrays[:2]

    def head_first(self, problem: Problem, answer: Any) -> np.ndarray:
        return answer[..., np.newaxis]

    def defined(self, problem: Problem, arrays: tuple[np.ndarray, ...], first: int, last: int, **options: Any) -> Any:
        """What the definition says of these queries."""
        q, *others = self.asked_of(arrays)
        options |= problem.arguments()
        if problem.causal:
            options["q_offset"] = problem.kv_len - problem.q_len + first
        return getattr(qkv_fast.reference.spotlight, self.function)(q[:, :, first:last], *others, **options)

    def exact(self, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        return self.head_first(problem, self.defined(problem, arrays, rows.start, rows.stop))

    def tolerance(self, problem: Problem, arrays: tuple[np.ndarray, ...]) -> float:
        return TOLERANCE[problem.dtype] * self.largest


class TopKeys(Question):
    """The heaviest keys of each query, compared by their weights."""

    def result(self, problem: Problem) -> tuple[int, ...]:
        return problem.batch, problem.heads, problem.q_len, HEAVIEST

    def result_bytes(self, problem: Problem) -> int:
        return math.prod(self.result(problem)) * (element(problem.dtype).itemsize + np.dtype(np.int64).itemsize)

    def head_first(self, problem: Problem, answer: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return answer[1]


class Weights(Question):
    """The weights of the last queries."""

    def result(self, problem: Problem) -> tuple[int, ...]:
        return problem.batch, problem.heads, LAST, problem.kv_len

    def options(self) -> dict[str, Any]:
        return {"queries": slice(-LAST, None)}

    def head_first(self, problem: Problem, answer: np.ndarray) -> np.ndarray:
        return answer

    def exact(self, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        first = problem.q_len - LAST
        return self.defined(problem, arrays, first + rows.start, first + rows.stop)


class Pooled(Question):
    """The map in cells: its rows are rows of cells, each of as many queries."""

    def result(self, problem: Problem) -> tuple[int, ...]:
        return problem.batch, problem.heads, min(CELLS, problem.q_len), min(CELLS, problem.kv_len)

    def head_first(self, problem: Problem, answer: np.ndarray) -> np.ndarray:
        return answer[:, -1:]

    def exact(self, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        *_, down, across = self.result(problem)
        first, last = (row * problem.q_len // down for row in (rows.start, rows.stop))
        one = tuple(a[:, -1:] for a in arrays)
        return self.defined(problem, one, first, last, shape=(rows.stop - rows.start, across))


class OfKeys(Question):
    """A number about each key: the sum over queries of what each contributes."""

    def result(self, problem: Problem) -> tuple[int, ...]:
        return problem.batch, problem.heads, problem.kv_len

    def head_first(self, problem: Problem, answer: np.ndarray) -> np.ndarray:
        return answer[:, -1:, :, np.newaxis]

    def exact(self, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        one = tuple(a[:, -1:] for a in arrays)
        starts = range(0, problem.q_len, BAND)
        parts = (self.defined(problem, one, first, min(first + BAND, problem.q_len)) for first in starts)
        return sum(part.astype(np.float64) for part in parts)[:, :, rows, np.newaxis]


class Influence(OfKeys):
    """The one question about values, whose work is attention's. Its formula, for some keys: the definition takes every
    element of every value from the output of every query."""

    flops = staticmethod(Attention.flops)

    def asked_of(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        return arrays

    def exact(self, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        one, total = tuple(a[:, -1:] for a in arrays), 0
        value = one[2][:, :, np.newaxis, rows]
        for first in range(0, problem.q_len, BAND):
            last = min(first + BAND, problem.q_len)
            p = Question("weights").defined(problem, one, first, last, keys=rows)
            output = Attention.exact(problem, one, slice(first, last))[:, :, :, np.newaxis]
            with np.errstate(all="ignore"):
                moved = p / (1 - p) * np.linalg.norm(output - value, axis=-1)
            moved = np.where(p == 1, np.linalg.norm(output, axis=-1), moved)  # the only key that the query sees
            total = total + (moved.astype(np.float64) ** 2).sum(axis=-2)
        return np.sqrt(total)[..., np.newaxis]


# Scores of standard normal inputs stay below 8 and entropies below 10; the weights of many keys are small.
# Influence of a key that few others share a query with goes up to some dozens.
QUESTIONS: dict[str, Question] = {
    "received": OfKeys("received"),
    "received+lse": OfKeys("received", saved=("lse",)),
    "pooled": Pooled("pooled", largest=1 / 16),
    "pooled+lse": Pooled("pooled", saved=("lse",), largest=1 / 16),
    "top_keys": TopKeys("top_keys"),
    "entropy": Question("entropy", largest=10.0),
    "largest": Question("largest", largest=8.0),
    "influence+lse+output": Influence("influence", saved=("lse", "output"), largest=10.0),
    "weights": Weights("weights", largest=1 / 16),
}
