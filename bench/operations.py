"""What may be timed: one class for each function of the library, by name.

An operation works on a `Problem`, plain data. It draws the inputs, says how much work they are, calls the
library, and knows the exact answer. It has

- `shapes(problem)`: those of the arrays, in the problem's layout; `inputs(problem, rng)`: the arrays;
- `flops(problem)`: useful multiply-adds, counted as two; None where the operation is not made of them;
- `bytes(problem)`: bytes of inputs that are looked at, and of the output, once each. From shapes alone: it is asked
  before there is known to be room for the arrays;
- `call(problem, arrays, threads, reuse_out)`: the call that is timed, as a function without arguments;
- `head_first(problem, answer)`: what that function gives, as (batch, heads, rows, last);
- `rows(problem)`: how many rows that has: as many as there are queries, unless the answer is about something else;
- `exact(problem, arrays, rows)`: the same for a slice of the rows, in float64;
- `tolerance(problem, arrays)`: the largest error that is not a wrong answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

import qkv_fast

from .problem import Problem, element

# Times max|v|: far above rounding, far below a narrower type. In 16 bits weights, their sums and results are rounded.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "float16": 3 * 2**-11, "bfloat16": 3 * 2**-8}


def normal(shapes: tuple[tuple[int, ...], ...], problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The first in the problem's type, the others in that of its keys and values."""
    drawn_in = "float64" if problem.dtype == "float64" else "float32"
    first, *others = (rng.standard_normal(shape, dtype=drawn_in) for shape in shapes)
    kept = element(problem.kv_type)
    return first.astype(element(problem.dtype), copy=False), *(x.astype(kept, copy=False) for x in others)


class Attention:
    """q (batch, heads, q_len, dim), k (batch, kv_heads, kv_len, dim), v (..., kv_len, value_dim)."""

    @staticmethod
    def shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
        given = (
            (problem.heads, problem.q_len, problem.dim),
            (problem.kv_heads, problem.kv_len, problem.dim),
            (problem.kv_heads, problem.kv_len, problem.value_dim),
        )
        blhd = problem.layout == "blhd"
        return tuple((problem.batch, n, h, d) if blhd else (problem.batch, h, n, d) for h, n, d in given)

    @staticmethod
    def inputs(problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return normal(Attention.shapes(problem), problem, rng)

    @staticmethod
    def flops(problem: Problem) -> int:
        """Two per multiply-add of both products, over the visible pairs only."""
        return 2 * problem.heads * problem.visible_pairs() * (problem.dim + problem.value_dim)

    @staticmethod
    def bytes(problem: Problem) -> int:
        low, high = problem.limits()
        keys = int(np.maximum(high.max(axis=1) - low.min(axis=1), 0).sum()) if problem.q_len else 0
        rows = problem.batch * problem.q_len * problem.heads * element(problem.dtype).itemsize
        rows += keys * problem.kv_heads * element(problem.kv_type).itemsize
        return rows * (problem.dim + problem.value_dim)

    @staticmethod
    def rows(problem: Problem) -> int:
        return problem.q_len

    @staticmethod
    def call(
        problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], np.ndarray]:
        q, k, v = arrays
        options = dict(problem.arguments(), num_threads=threads)
        if problem.layout != "bhld":
            options["layout"] = problem.layout
        if problem.kv_lengths:
            options["kv_lengths"] = np.array(problem.kv_lengths)
        if reuse_out:
            options["out"] = np.empty((*q.shape[:-1], problem.value_dim), q.dtype)
        attention = qkv_fast.attention
        return lambda: attention(q, k, v, **options)

    @staticmethod
    def head_first(problem: Problem, answer: np.ndarray) -> np.ndarray:
        return answer.swapaxes(1, 2) if problem.layout == "blhd" else answer

    @staticmethod
    def exact(problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        q, k, v = (Attention.head_first(problem, a) for a in arrays)
        arguments = problem.arguments()
        if problem.causal or problem.window:
            lengths = np.array(problem.kv_lengths or (problem.kv_len,) * problem.batch)
            arguments["q_offset"] = lengths - problem.q_len + rows.start
        return qkv_fast.reference.attention(q[:, :, rows], k, v, **arguments)

    @staticmethod
    def tolerance(problem: Problem, arrays: tuple[np.ndarray, ...]) -> float:
        return TOLERANCE[problem.dtype] * float(np.abs(arrays[2].astype(np.float64)).max(initial=0.0))


class Training(Attention):
    """Forward and backward: the gradients of q, k and v from that of the result, (batch, heads, q_len, value_dim),
    which is given behind them. Queries and keys are as many, and so are their heads; the last head alone is compared,
    since the definition needs all queries."""

    @staticmethod
    def shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
        return (*Attention.shapes(problem), (problem.batch, problem.heads, problem.q_len, problem.value_dim))

    @staticmethod
    def inputs(problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return normal(Training.shapes(problem), problem, rng)

    @staticmethod
    def flops(problem: Problem) -> int:
        """Two products forward, five backward."""
        return 7 * Attention.flops(problem) // 2

    @staticmethod
    def bytes(problem: Problem) -> int:
        return 2 * sum(map(math.prod, Training.shapes(problem))) * element(problem.dtype).itemsize

    @staticmethod
    def call(
        problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], tuple[np.ndarray, ...]]:
        *inputs, dout = arrays
        options = dict(problem.arguments(), num_threads=threads)

        def step() -> tuple[np.ndarray, ...]:
            out, lse = qkv_fast.attention(*inputs, return_lse=True, **options)
            return qkv_fast.attention_grad(dout, *inputs, out, lse, **options)

        return step

    @staticmethod
    def head_first(problem: Problem, answer: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.concatenate([x[:, -1:] for x in answer], axis=-1)

    @staticmethod
    def exact(problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        *inputs, dout = (a[:, -1:] for a in arrays)
        result = qkv_fast.reference.attention(*inputs, return_lse=True, **problem.arguments())
        found = qkv_fast.reference.attention_grad(dout, *inputs, *result, **problem.arguments())
        return Training.head_first(problem, found)[:, :, rows]


class Stage:
    """What scores, weighted values and softmax share: (batch, heads, q_len, ...) in and out. Always into one output
    array: new memory for a matrix would time the system's pages."""

    function: str  # its name in qkv_fast and in qkv_fast.reference

    @classmethod
    def inputs(cls, problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return normal(cls.shapes(problem), problem, rng)

    @classmethod
    def call(
        cls, problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], np.ndarray]:
        function = getattr(qkv_fast, cls.function)
        out = np.zeros(cls.output(problem), problem.dtype)
        return lambda: function(*arrays, out=out, num_threads=threads)

    @staticmethod
    def output(problem: Problem) -> tuple[int, ...]:
        """Shape of the result: here a matrix for each head."""
        return problem.batch, problem.heads, problem.q_len, problem.kv_len

    @classmethod
    def bytes(cls, problem: Problem) -> int:
        elements = sum(math.prod(shape) for shape in (*cls.shapes(problem), cls.output(problem)))
        return elements * np.dtype(problem.dtype).itemsize

    @staticmethod
    def rows(problem: Problem) -> int:
        return problem.q_len

    @staticmethod
    def head_first(problem: Problem, answer: np.ndarray) -> np.ndarray:
        return answer

    @classmethod
    def exact(cls, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        first, *others = arrays
        return getattr(qkv_fast.reference, cls.function)(first[:, :, rows], *others)

    @staticmethod
    def tolerance(problem: Problem, arrays: tuple[np.ndarray, ...]) -> float:
        return TOLERANCE[problem.dtype] * float(np.abs(arrays[-1]).max(initial=1.0))


class Scores(Stage):
    """q (batch, heads, q_len, dim), k (batch, kv_heads, kv_len, dim)."""

    function = "scores"

    @staticmethod
    def shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
        return Attention.shapes(problem)[:2]

    @staticmethod
    def flops(problem: Problem) -> int:
        return 2 * math.prod(Scores.output(problem)) * problem.dim


class WeightedValues(Stage):
    """p (batch, heads, q_len, kv_len), whose rows sum to about 1, and v (batch, kv_heads, kv_len, value_dim)."""

    function = "weighted_values"

    @staticmethod
    def shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
        return Stage.output(problem), Attention.shapes(problem)[2]

    @staticmethod
    def output(problem: Problem) -> tuple[int, ...]:
        return problem.batch, problem.heads, problem.q_len, problem.value_dim

    @staticmethod
    def inputs(problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        weights, values = WeightedValues.shapes(problem)
        p = rng.random(weights, dtype=problem.dtype)
        p *= p.dtype.type(2 / problem.kv_len)
        return p, *normal((values,), problem, rng)

    @staticmethod
    def flops(problem: Problem) -> int:
        return 2 * math.prod(WeightedValues.output(problem)) * problem.kv_len


class Softmax(Stage):
    """x (batch, heads, q_len, kv_len), along the last axis."""

    function = "softmax"

    @staticmethod
    def shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
        return (Softmax.output(problem),)

    @staticmethod
    def flops(problem: Problem) -> None:
        """A copy with exponentials on the way: the memory sets its pace."""
        return None

    @staticmethod
    def tolerance(problem: Problem, arrays: tuple[np.ndarray, ...]) -> float:
        return TOLERANCE[problem.dtype]


class CacheStep(Attention):
    """The newest q_len tokens of a `KVCache` that stores keys and values as `kv_type` says, int8 and int4 among them:
    `attend` alone, what `append` made of the numbers is there already. The exact answer is that of what is stored."""

    @staticmethod
    def inputs(problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        q, *others = (rng.standard_normal(shape, dtype="float32") for shape in Attention.shapes(problem))
        return q.astype(element(problem.dtype), copy=False), *others

    @staticmethod
    def cache(problem: Problem, capacity: int) -> qkv_fast.KVCache:
        return qkv_fast.KVCache(
            problem.batch, problem.kv_heads, problem.dim, capacity, value_dim=problem.value_dim, dtype=problem.kv_type
        )

    @staticmethod
    def filled(problem: Problem, arrays: tuple[np.ndarray, ...]) -> qkv_fast.KVCache:
        cache = CacheStep.cache(problem, problem.kv_len)
        cache.append(*arrays[1:])
        return cache

    @staticmethod
    def bytes(problem: Problem) -> int:
        rows = problem.batch * problem.heads * problem.q_len * element(problem.dtype).itemsize
        return rows * (problem.dim + problem.value_dim) + CacheStep.cache(problem, 1).nbytes * problem.kv_len

    @staticmethod
    def call(
        problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], np.ndarray]:
        q, attend = arrays[0], CacheStep.filled(problem, arrays).attend
        options = {"num_threads": threads}
        if reuse_out:
            options["out"] = np.empty((*q.shape[:-1], problem.value_dim), q.dtype)
        return lambda: attend(q, **options)

    @staticmethod
    def exact(problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        cache = CacheStep.filled(problem, arrays)
        return Attention.exact(replace(problem, causal=True), (arrays[0], cache.keys, cache.values), rows)
