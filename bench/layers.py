"""Linear layers and rotary positions: what comes before attention and after it, as operations (operations.py).

Of a case of linear layers, `dim` is what a row of the input has and `value_dim` what one of the result has, of q_len
rows in all. A projection makes queries, keys and values of (batch, q_len, heads * dim). Rotary positions turn (batch,
heads, q_len, dim). Each knows what NumPy is timed on: `plain(problem, arrays, out)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

import qkv_fast

from .operations import TOLERANCE, Stage, normal
from .problem import Problem, element

LARGEST = 6  # of results that are N(0, 1), about


class Linear(Stage):
    """x (q_len, dim) and w (value_dim, dim), drawn so that results are N(0, 1)."""

    @staticmethod
    def shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
        return (problem.q_len, problem.dim), (problem.value_dim, problem.dim)

    @staticmethod
    def output(problem: Problem) -> tuple[int, ...]:
        return problem.q_len, problem.value_dim

    @classmethod
    def inputs(cls, problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        x, w = normal(cls.shapes(problem), problem, rng)
        return x, (w * w.dtype.type(w.shape[1] ** -0.5)).astype(w.dtype, copy=False)

    @classmethod
    def flops(cls, problem: Problem) -> int:
        x, w = cls.shapes(problem)
        return 2 * math.prod(x) * w[0]

    @classmethod
    def bytes(cls, problem: Problem) -> int:
        elements = sum(math.prod(shape) for shape in (*cls.shapes(problem), cls.output(problem)))
        return elements * element(problem.dtype).itemsize

    @classmethod
    def call(
        cls, problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], np.ndarray]:
        x, w = arrays
        out = np.zeros(cls.output(problem), x.dtype)
        return lambda: qkv_fast.linear(x, w, out=out, num_threads=threads)

    @staticmethod
    def head_first(problem: Problem, answer: np.ndarray) -> np.ndarray:
        return answer[None, None]

    @classmethod
    def exact(cls, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        x, w = arrays
        return qkv_fast.reference.linear(x[rows], w)[None, None]

    @staticmethod
    def tolerance(problem: Problem, arrays: tuple[np.ndarray, ...]) -> float:
        return TOLERANCE[problem.dtype] * LARGEST

    @staticmethod
    def plain(problem: Problem, arrays: tuple[np.ndarray, ...], out: np.ndarray) -> Callable[[], np.ndarray]:
        x, w = arrays
        return lambda: np.matmul(x, w.T, out=out)


class Packed(Linear):
    """The same with weights that are packed before."""

    @classmethod
    def call(
        cls, problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], np.ndarray]:
        x, w = arrays
        layer, out = qkv_fast.Linear(w, num_threads=threads), np.zeros(cls.output(problem), x.dtype)
        return lambda: layer(x, out=out, num_threads=threads)


class Project(Linear):
    """x (batch, q_len, heads * dim) and w (3 * heads * dim, heads * dim): the answer is q, k and v, side by side."""

    @staticmethod
    def shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
        width = problem.heads * problem.dim
        return (problem.batch, problem.q_len, width), (3 * width, width)

    @staticmethod
    def output(problem: Problem) -> tuple[int, ...]:
        return problem.batch, problem.q_len, 3 * problem.heads * problem.dim

    @classmethod
    def call(
        cls, problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], tuple[np.ndarray, ...]]:
        x, w = arrays
        return lambda: qkv_fast.project_qkv(x, w, None, problem.heads, num_threads=threads)

    @staticmethod
    def head_first(problem: Problem, answer: tuple[np.ndarray, ...] | np.ndarray) -> np.ndarray:
        if isinstance(answer, tuple):
            answer = np.concatenate([part.swapaxes(1, 2).reshape(*part.shape[::2], -1) for part in answer], axis=-1)
        return answer.reshape(problem.batch, problem.q_len, 1, -1).swapaxes(1, 2)

    @classmethod
    def exact(cls, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        x, w = arrays
        return qkv_fast.reference.linear(x[:, rows], w)[:, None]


class Rotate(Stage):
    """x (batch, heads, q_len, dim) at positions 0 to q_len - 1; the answer has its shape."""

    @staticmethod
    def shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
        return (Rotate.output(problem),)

    @staticmethod
    def output(problem: Problem) -> tuple[int, ...]:
        return problem.batch, problem.heads, problem.q_len, problem.dim

    @staticmethod
    def flops(problem: Problem) -> None:
        """A copy with cosines and sines on the way."""
        return None

    @classmethod
    def bytes(cls, problem: Problem) -> int:
        return 2 * math.prod(cls.output(problem)) * element(problem.dtype).itemsize

    @staticmethod
    def tables(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        angles = np.arange(problem.q_len)[:, None] * 10000.0 ** (-np.arange(0, problem.dim, 2) / problem.dim)
        kept = np.float64 if problem.dtype == "float64" else np.float32
        return np.cos(angles).astype(kept), np.sin(angles).astype(kept)

    @classmethod
    def call(
        cls, problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], np.ndarray]:
        (x,) = arrays
        out = np.zeros(x.shape, x.dtype)
        return lambda: qkv_fast.rope(x, out=out, num_threads=threads)

    @classmethod
    def exact(cls, problem: Problem, arrays: tuple[np.ndarray, ...], rows: slice) -> np.ndarray:
        return qkv_fast.reference.rope(arrays[0][:, :, rows], np.arange(rows.start, rows.stop))

    @staticmethod
    def plain(problem: Problem, arrays: tuple[np.ndarray, ...], out: np.ndarray) -> Callable[[], np.ndarray]:
        """As models have it, with tables of whole rows."""
        (x,) = arrays
        cos, sin = (np.concatenate([table, table], axis=-1) for table in Rotate.tables(problem))
        half = problem.dim // 2

        def turned() -> np.ndarray:
            np.multiply(x, cos, out=out)
            out[...] += np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin
            return out

        return turned


class RotateByTables(Rotate):
    """The same with cosines and sines that are given."""

    @classmethod
    def call(
        cls, problem: Problem, arrays: tuple[np.ndarray, ...], threads: int, reuse_out: bool
    ) -> Callable[[], np.ndarray]:
        (x,) = arrays
        out, tables = np.zeros(x.shape, x.dtype), cls.tables(problem)
        return lambda: qkv_fast.rope(x, cos_sin=tables, out=out, num_threads=threads)


LAYERS = {
    "linear": Linear,
    "linear+packed": Packed,
    "project": Project,
    "rope": Rotate,
    "rope+tables": RotateByTables,
}
