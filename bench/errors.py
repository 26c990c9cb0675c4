"""How far results are from float64 arithmetic, beside NumPy's in the same type and the error rule.

The rule: at most twice the largest error of plain NumPy, plus 4 eps max|v|. Rows are scores of several sizes, head
dimensions and numbers of keys, and numbers that are huge, tiny or both.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

import qkv_fast

from .measured import Measured

QUERIES = 48
SIZES = (1.0, 3.0, 10.0, 30.0)  # deviation of scores
SHAPES = ((16, 1024), (40, 1024), (64, 64), (64, 1024), (64, 65536), (128, 1024), (256, 1024))  # D, keys
MAGNITUDES = {"huge": (2.0**40, 2.0**40), "tiny": (2.0**-40, 2.0**-40), "mixed": (1.0, 2.0**24)}  # of terms, by turns


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """In the type of its arguments."""
    scores = (q @ k.T) * q.dtype.type(scale)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights @ v / weights.sum(axis=1, keepdims=True)


def problem(size: float, d: int, keys: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """q, k and v in float32, and a scale that makes scores of deviation `size` of them."""
    rng = np.random.default_rng(d + keys)
    q, k, v = (rng.standard_normal((n, d), dtype=np.float32) for n in (QUERIES, keys, keys))
    factors = np.resize(np.float32(MAGNITUDES[kind]), d) if kind else np.ones(d, np.float32)
    k *= factors
    v *= factors
    return q, k, v, size / float(np.sqrt(np.sum(np.square(factors, dtype=np.float64))))


def errors(size: float, d: int, keys: int, kind: str = "") -> tuple[float, float, float]:
    """Our largest error over the rule's; ours and NumPy's relative ones, roots of mean squares. Columns of huge and
    tiny values count alike."""
    q, k, v, scale = problem(size, d, keys, kind)
    exact = plain(*(x.astype(np.float64) for x in (q, k, v)), scale)
    largest = np.abs(v).max(axis=0).astype(np.float64)
    ours, numpys, exact, v = (
        x / largest for x in (qkv_fast.attention(q, k, v, scale=scale) - exact, plain(q, k, v, scale) - exact, exact, v)
    )
    rule = 2 * np.abs(numpys).max() + 4 * np.finfo(np.float32).eps * np.abs(v).max()
    means = (float(np.sqrt(np.mean(x**2) / np.mean(exact**2))) for x in (ours, numpys))
    return float(np.abs(ours).max() / rule), *means


def measure(kind: str, seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """One row for each problem: the share of what the rule allows, and relative errors as a note."""
    shapes = SHAPES if not kind else ((64, 1024), (128, 1024))
    for size in SIZES:
        for d, keys in shapes:
            largest, ours, numpys = errors(size, d, keys, kind)
            name = f"{kind + ', ' if kind else ''}scores of {size:g}, D {d}, {keys} keys: largest error over the rule's"
            yield Measured(name, largest, "x", 1.0, note=f"relative error {ours:.1e}, NumPy's {numpys:.1e}")


ROWS = {"errors": "", **{f"errors-{kind}": kind for kind in MAGNITUDES}}
MEASURES = {name: partial(measure, kind) for name, kind in ROWS.items()}
