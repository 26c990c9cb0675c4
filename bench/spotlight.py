"""What questions of spotlight cost: time over attention's on the same arrays, memory beyond the result.

Their times against the whole matrix in torch are rows of suite `spotlight` (`ASKED` in cases.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

import qkv_fast

from . import work
from .answers import Exact
from .cases import Case, case
from .measured import Measured
from .method import Local, interleave
from .ours import Ours
from .questions import LAST, QUESTIONS
from .runner import threads_text
from .tables import seconds_text
from .worker import first_call_memory

SHAPES = ("1x12x2048", "1x8x8192")
LONG = "1x8x32768"
DIM = 64
# Time over attention's: at most, aim.
OVER_ATTENTION = {
    "received": (1.40, 1.15),
    "received+lse": (0.80, 0.60),
    "pooled": (1.40, 1.15),
    "pooled+lse": (0.80, 0.60),
    "top_keys": (0.95, 0.70),
    "entropy": (0.80, 0.60),
    "largest": (0.80, 0.60),
    "influence+lse+output": (1.30, 1.10),
}
OF_ANY_LENGTH = ("received", "pooled", "top_keys", "entropy", "largest")
MEMORY = 32.0  # MB beyond the result, at most


def right(asked: Case, call: Local) -> Local:
    """The call, whose answer is right: else Refused."""
    Exact.of(asked).error(work.operation(asked).head_first(asked, call.call()))
    return call


def questions(plain: Case, threads: int) -> list[Local]:
    """Attention and the questions about the same arrays."""
    arrays, found = work.inputs(plain), []
    for name in ("attention", *OVER_ATTENTION):
        asked = replace(plain, operation=name)
        call = Local(name, work.operation(asked).call(asked, arrays, threads, False))
        found.append(right(asked, call))
    return found


def measure_over_attention(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Each question's time over attention's, full and causal, in the same rounds."""
    shapes = [case(shape, DIM, causal=causal) for shape in SHAPES for causal in (False, True)]
    for plain in shapes:
        for n in threads:
            rounds = interleave(questions(plain, n), budget=seconds / (len(shapes) * len(threads)))
            for name, (most, aim) in OVER_ATTENTION.items():
                found, took = rounds.ratio(name, "attention"), rounds.time(name)
                title = f"{name} over attention, {plain.name}, {threads_text(n)}"
                yield Measured(title, found.median, "x", most, aim, spread=found.spread, note=seconds_text(took.median))


def attend_and_fill(attend: Callable[[], object], shape: tuple[int, ...]) -> None:
    attend()
    np.empty(shape, np.float32).fill(0)


def measure_rows(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """The weights of the last queries, against attention of these queries and the filling of a result as large."""
    for causal in (False, True):
        asked = case(LONG, DIM, causal=causal, operation="weights")
        q, k, v = arrays = work.inputs(asked)
        last, shape, options = q[:, :, -LAST:], QUESTIONS["weights"].result(asked), asked.arguments()
        for n in threads:
            attend = partial(qkv_fast.attention, last, k, v, num_threads=n, **options)
            call = right(asked, Local("weights", work.operation(asked).call(asked, arrays, n, False)))
            both = Local("both", partial(attend_and_fill, attend, shape))
            rounds = interleave([call, both], budget=seconds / (2 * len(threads)))
            found, took = rounds.ratio("weights", "both"), rounds.time("weights")
            title = f"weights of {LAST} queries over attention and a fill, {asked.name}, {threads_text(n)}"
            yield Measured(title, found.median, "x", 1.0, 0.8, spread=found.spread, note=seconds_text(took.median))


def measure_memory(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Growth of a fresh process in one question about a matrix of 34 GB, beyond the result."""
    n = max(threads)
    for name in OF_ANY_LENGTH:
        asked = case(LONG, DIM, operation=name, isa=qkv_fast.isa())
        added = first_call_memory(Ours, asked, n)
        if added is None:
            return
        beyond = (added - QUESTIONS[name].result_bytes(asked)) / 2**20
        yield Measured(f"{name}: memory beyond the result, {LONG}-d{DIM}, {threads_text(n)}", beyond, "MB", MEMORY)
