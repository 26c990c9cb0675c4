"""The self-check of `qkv-fast`: every available CPU path against the definition, in a second or two.

The rule is the library's promise: the largest error is at most twice that of plain NumPy in the same type,
plus 4 eps max|v|. Both are measured against the next wider type: the float64 reference for float32, plain
NumPy in long double for float64 (where long double is no wider than float64, rounding bounds the difference
to the reference). In 16 bits it is that of float32, one rounding more, and where pairs of bfloat16 are multiplied
that of the weights. Steps of caches are compared with what they store.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import qkv_fast

from .. import _runtime, reference
from . import work
from .cases import Case, case
from .method import describe
from .peers import softmax_values
from .problem import element

UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
HAS_BFLOAT16 = importlib.util.find_spec("ml_dtypes") is not None
TYPES = ("float32", "float64", "float16", "bfloat16")[: 4 if HAS_BFLOAT16 else 3]

# Odd lengths and dims meet every tail of a kernel; the masks meet skipped, full and partial tiles.
SHAPES: tuple[Case, ...] = (
    case("2x3x67", 64),
    case("1x2x130", 33, kv_len=257, value_dim=70),
    case("1x8x40", 128, kv_heads=2, kv_len=100),
    case("1x2x300", 64, causal=True),
    case("1x4x75", 40, kv_heads=1, kv_len=333, causal=True),
    case("1x2x400", 32, causal=True, window=(63, 0)),
    case("1x2x90", 16, window=(20, 30)),
    case("3x4x50", 64, kv_len=120, kv_lengths=(120, 0, 71)),
    case("2x2x33", 24, kv_len=200, kv_lengths=(200, 64), causal=True),
    case("2x4x96", 64, layout="blhd"),
    case("1x8x1", 64, kv_len=700),
    case("1x1x1", 1),
)
STEPS: tuple[Case, ...] = tuple(
    case(shape, 64, label="cache", kv_heads=2, kv_len=n, value_dim=dim_v, kv_dtype=stored, operation="cache")
    for stored in (*TYPES[:1], *TYPES[2:], "int8", "int4")
    for shape, n, dim_v in (("2x2x1", 300, 64), ("1x8x3", 1100, 40), ("1x8x50", 200, 64))
)


@dataclass(frozen=True)
class Check:
    """One comparison: it passed if `problem` is empty. `share` is the error as a share of what is allowed."""

    isa: str
    dtype: str
    name: str
    share: float
    problem: str = ""


def run(isa: str) -> Iterator[Check]:
    """Every check of one CPU path; an exception is a failed check."""
    for dtype in TYPES:
        for shape, views in [(shape, False) for shape in SHAPES] + [(SHAPES[0], True), (SHAPES[3], True)]:
            name = shape.name + (" strided" if views else "")
            try:
                arrays = inputs(shape, dtype, views)
                exact, allowed = exact_and_allowed(shape, dtype)
                with _runtime.force_isa(isa):
                    answer = qkv_fast.attention(*arrays, layout=shape.layout, **shape.arguments())
                yield compare(isa, dtype, name, answer, exact, allowed)
            except Exception as error:
                yield Check(isa, dtype, name, math.nan, describe(error))
    for step in STEPS:
        try:
            operation, arrays = work.operation(step), work.inputs(step)
            exact, allowed = operation.exact(step, arrays, slice(0, step.q_len)), operation.tolerance(step, arrays)
            with _runtime.force_isa(isa):
                answer = operation.call(step, arrays, qkv_fast.get_num_threads(), False)()
            yield compare(isa, step.dtype, step.name, answer, exact, allowed)
        except Exception as error:
            yield Check(isa, step.dtype, step.name, math.nan, describe(error))


def inputs(shape: Case, dtype: str, views: bool) -> list[np.ndarray]:
    """The case's numbers in a type, contiguous or as views with gaps and a negative stride."""
    arrays = [a.astype(element(dtype)) for a in work.inputs(shape)]
    if not views:
        return arrays
    spread = []
    for a in arrays:
        wide = np.zeros((*a.shape[:-2], 2 * a.shape[-2], 3 * a.shape[-1]), a.dtype)
        view = wide[..., ::-2, ::3]
        view[...] = a
        spread.append(view)
    return spread


@functools.cache  # the same for every path
def exact_and_allowed(shape: Case, dtype: str) -> tuple[np.ndarray, float]:
    """The answer in a wider type, in the case's layout, and the error that the rule allows."""
    q, k, v = inputs(shape, dtype, views=False)
    if dtype in UNITS:
        wide = [x.astype("float32") for x in (q, k, v)]
        exact, allowed = error_of_plain(shape, *wide)
        weights = 2 * float(np.abs(wide[2]).max(initial=0.0)) if dtype == "bfloat16" else 0.0
        return exact, allowed + UNITS[dtype] * (float(np.abs(exact).max(initial=0.0)) + weights)
    return error_of_plain(shape, q, k, v)


def error_of_plain(shape: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, float]:
    exact = reference.attention(q, k, v, layout=shape.layout, **shape.arguments())
    largest = float(np.abs(v).max(initial=0.0))
    eps = float(np.finfo(q.dtype).eps)
    plain = plain_numpy(shape, q, k, v)
    if q.dtype == np.float64:
        if np.finfo(np.longdouble).eps >= eps:
            return exact, 64 * eps * largest
        exact = plain_numpy(shape, *(a.astype(np.longdouble) for a in (q, k, v)))
    error = float(np.abs(plain - exact).max(initial=0.0))
    return exact, 2 * error + 4 * eps * largest


def plain_numpy(shape: Case, q, k, v) -> np.ndarray:
    """Attention as one writes it, in the type of the arrays. A query that sees nothing gives 0."""
    if shape.layout == "blhd":
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    group = shape.heads // shape.kv_heads
    low, high = shape.limits()
    keys = np.arange(shape.kv_len)
    hidden = ((keys < low[..., None]) | (keys >= high[..., None]))[:, None]
    blind = hidden.all(axis=-1, keepdims=True)
    k_t, v = (np.repeat(a, group, axis=1) for a in (k.swapaxes(-1, -2), v))
    scale = q.dtype.type(1) / np.sqrt(q.dtype.type(shape.dim))
    out = np.where(blind, 0, softmax_values(q, k_t, v, scale, hidden & ~blind))
    return out.swapaxes(1, 2) if shape.layout == "blhd" else out


def compare(isa: str, dtype: str, name: str, answer, exact, allowed: float) -> Check:
    if answer.shape != exact.shape or answer.dtype != dtype:
        return Check(isa, dtype, name, math.nan, f"{answer.dtype} {answer.shape}, not {dtype} {exact.shape}")
    error = float(np.abs(answer.astype(np.longdouble) - exact).max(initial=0.0))
    share = error / allowed if allowed else 0.0
    problem = "" if error <= allowed else f"error {error:.2e}, allowed {allowed:.2e}"  # a NaN is a problem too
    return Check(isa, dtype, name, share, problem)
