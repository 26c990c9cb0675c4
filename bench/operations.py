"""What a case may time: one class for each function of the library, by the name that `Case.operation` gives.

An operation draws a case's inputs, says how much work they are, calls the library, and knows the exact answer. It has

- `shapes(case)`: those of the arrays, in the case's layout; `inputs(case, rng)`: the arrays;
- `flops(case)`: useful multiply-adds, counted as two; None where the operation is not made of them;
- `bytes(case)`: bytes of inputs that are looked at, and of the output, once each. From shapes alone: it is asked before
  there is known to be room for the arrays;
- `call(case, arrays, threads, reuse_out)`: the call that is timed, as a function without arguments;
- `head_first(case, answer)`: what that function gives, as (batch, heads, queries, last);
- `exact(case, arrays, rows)`: the same for a slice of the queries, in float64;
- `tolerance(case, arrays)`: the largest error that is not a wrong answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

import qkv_fast

if TYPE_CHECKING:
    from .cases import Case

HALVES = ("float16", "bfloat16")
# Times max|v|: far above rounding, far below a narrower type. In 16 bits weights, their sums and results are rounded.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "float16": 3 * 2**-11, "bfloat16": 3 * 2**-8}


def normal(shapes: tuple[tuple[int, ...], ...], case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The first in the case's type, the others in that of its keys and values."""
    drawn = (rng.standard_normal(shape, dtype="float64" if case.dtype == "float64" else "float32") for shape in shapes)
    first, *others = drawn
    return first.astype(element(case.dtype), copy=False), *(x.astype(element(case.kv_type), copy=False) for x in others)


def element(name: str) -> np.dtype:
    """A type by its name; that of bfloat16 is in ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class Attention:
    """q (batch, heads, q_len, dim), k (batch, kv_heads, kv_len, dim), v (..., kv_len, value_dim)."""

    @staticmethod
    def shapes(case: Case) -> tuple[tuple[int, ...], ...]:
        given = (
            (case.heads, case.q_len, case.dim),
            (case.kv_heads, case.kv_len, case.dim),
            (case.kv_heads, case.kv_len, case.value_dim),
        )
        blhd = case.layout == "blhd"
        return tuple((case.batch, n, h, d) if blhd else (case.batch, h, n, d) for h, n, d in given)

    @staticmethod
    def inputs(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return normal(Attention.shapes(case), case, rng)

    @staticmethod
    def flops(case: Case) -> int:
        """Two per multiply-add of both products, over the visible pairs only."""
        return 2 * case.heads * case.visible_pairs() * (case.dim + case.value_dim)

    @staticmethod
    def bytes(case: Case) -> int:
        low, high = case.limits()
        keys = int(np.maximum(high.max(axis=1) - low.min(axis=1), 0).sum()) if case.q_len else 0
        rows = case.batch * case.q_len * case.heads * element(case.dtype).itemsize
        rows += keys * case.kv_heads * element(case.kv_type).itemsize
        return rows * (case.dim + case.value_dim)

    @staticmethod
    def call(case: Case, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool) -> Callable[[], np.ndarray]:
        q, k, v = arrays
        options = dict(case.arguments(), num_threads=threads)
        if case.layout != "bhld":
            options["layout"] = case.layout
        if case.kv_lengths:
            options["kv_lengths"] = np.array(case.kv_lengths)
        if reuse_out:
            options["out"] = np.empty((*q.shape[:-1], case.value_dim), q.dtype)
        attention = qkv_fast.attention
        return lambda: attention(q, k, v, **options)

    @staticmethod
    def head_first(case: Case, answer: np.ndarray) -> np.ndarray:
        return answer.swapaxes(1, 2) if case.layout == "blhd" else answer

    @staticmethod
    def exact(case: Case, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        q, k, v = (Attention.head_first(case, a) for a in arrays)
        arguments = case.arguments()
        if case.causal or case.window:
            lengths = np.array(case.kv_lengths or (case.kv_len,) * case.batch)
            arguments["q_offset"] = lengths - case.q_len + rows.start
        return qkv_fast.reference.attention(q[:, :, rows], k, v, **arguments)

    @staticmethod
    def tolerance(case: Case, arrays: tuple[np.ndarray, ...]) -> float:
        return TOLERANCE[case.dtype] * float(np.abs(arrays[2].astype(np.float64)).max(initial=0.0))


class Stage:
    """What scores, weighted values and softmax share: (batch, heads, q_len, ...) in and out. Always into one output
    array: new memory for a matrix would time the system's pages."""

    @classmethod
    def inputs(cls, case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return normal(cls.shapes(case), case, rng)

    @classmethod
    def call(
        cls, case: Case, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], np.ndarray]:
        function = getattr(qkv_fast, case.operation)
        out = np.zeros(cls.output(case), case.dtype)
        return lambda: function(*arrays, out=out, num_threads=threads)

    @staticmethod
    def output(case: Case) -> tuple[int, ...]:
        """Shape of the result: here a matrix for each head."""
        return case.batch, case.heads, case.q_len, case.kv_len

    @classmethod
    def bytes(cls, case: Case) -> int:
        elements = sum(math.prod(shape) for shape in (*cls.shapes(case), cls.output(case)))
        return elements * np.dtype(case.dtype).itemsize

    @staticmethod
    def head_first(case: Case, answer: np.ndarray) -> np.ndarray:
        return answer

    @staticmethod
    def exact(case: Case, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        first, *others = arrays
        return getattr(qkv_fast.reference, case.operation)(first[:, :, rows], *others)

    @staticmethod
    def tolerance(case: Case, arrays: tuple[np.ndarray, ...]) -> float:
        return TOLERANCE[case.dtype] * float(np.abs(arrays[-1]).max(initial=1.0))


class Scores(Stage):
    """q (batch, heads, q_len, dim), k (batch, kv_heads, kv_len, dim)."""

    @staticmethod
    def shapes(case: Case) -> tuple[tuple[int, ...], ...]:
        return Attention.shapes(case)[:2]

    @staticmethod
    def flops(case: Case) -> int:
        return 2 * math.prod(Scores.output(case)) * case.dim


class WeightedValues(Stage):
    """p (batch, heads, q_len, kv_len), whose rows sum to about 1, and v (batch, kv_heads, kv_len, value_dim)."""

    @staticmethod
    def shapes(case: Case) -> tuple[tuple[int, ...], ...]:
        return Stage.output(case), Attention.shapes(case)[2]

    @staticmethod
    def output(case: Case) -> tuple[int, ...]:
        return case.batch, case.heads, case.q_len, case.value_dim

    @staticmethod
    def inputs(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        weights, values = WeightedValues.shapes(case)
        p = rng.random(weights, dtype=case.dtype)
        p *= p.dtype.type(2 / case.kv_len)
        return p, *normal((values,), case, rng)

    @staticmethod
    def flops(case: Case) -> int:
        return 2 * math.prod(WeightedValues.output(case)) * case.kv_len


class Softmax(Stage):
    """x (batch, heads, q_len, kv_len), along the last axis."""

    @staticmethod
    def shapes(case: Case) -> tuple[tuple[int, ...], ...]:
        return (Softmax.output(case),)

    @staticmethod
    def flops(case: Case) -> None:
        """A copy with exponentials on the way: the memory sets its pace."""
        return None

    @staticmethod
    def tolerance(case: Case, arrays: tuple[np.ndarray, ...]) -> float:
        return TOLERANCE[case.dtype]


class CacheStep(Attention):
    """The newest q_len tokens of a `KVCache` that stores keys and values as `kv_type` says, int8 and int4 among them:
    `attend` alone, what `append` made of the numbers is there already. The exact answer is that of what is stored."""

    @staticmethod
    def inputs(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        q, *others = (rng.standard_normal(shape, dtype="float32") for shape in Attention.shapes(case))
        return q.astype(element(case.dtype), copy=False), *others

    @staticmethod
    def cache(case: Case, capacity: int) -> qkv_fast.KVCache:
        return qkv_fast.KVCache(
            case.batch, case.kv_heads, case.dim, capacity, value_dim=case.value_dim, dtype=case.kv_type
        )

    @staticmethod
    def filled(case: Case, arrays: tuple[np.ndarray, ...]) -> qkv_fast.KVCache:
        cache = CacheStep.cache(case, case.kv_len)
        cache.append(*arrays[1:])
        return cache

    @staticmethod
    def bytes(case: Case) -> int:
        rows = case.batch * case.heads * case.q_len * (case.dim + case.value_dim) * element(case.dtype).itemsize
        return rows + CacheStep.cache(case, 1).nbytes * case.kv_len

    @staticmethod
    def call(case: Case, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool) -> Callable[[], np.ndarray]:
        q, attend = arrays[0], CacheStep.filled(case, arrays).attend
        options = {"num_threads": threads}
        if reuse_out:
            options["out"] = np.empty((*q.shape[:-1], case.value_dim), q.dtype)
        return lambda: attend(q, **options)

    @staticmethod
    def exact(case: Case, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        cache = CacheStep.filled(case, arrays)
        return Attention.exact(replace(case, causal=True), (arrays[0], cache.keys, cache.values), rows)


OPERATIONS: dict[str, type] = {
    "attention": Attention,
    "cache": CacheStep,
    "scores": Scores,
    "weighted_values": WeightedValues,
    "softmax": Softmax,
}
