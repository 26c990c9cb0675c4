"""What a case's operation makes of it: its inputs, how much work it is, and what limits it.

Inputs are drawn from a fixed seed, so every process that works on a case sees the same numbers without sending them
around.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import qkv_fast

from .cases import Case
from .layers import LAYERS
from .operations import Attention, CacheStep, Scores, Softmax, Training, WeightedValues
from .problem import HALVES
from .questions import QUESTIONS

OPERATIONS: dict[str, Any] = {
    "attention": Attention,
    "cache": CacheStep,
    "training": Training,
    "scores": Scores,
    "weighted_values": WeightedValues,
    "softmax": Softmax,
    **LAYERS,
    **QUESTIONS,
}

STREAM_BYTES = 1 << 28  # what the inputs of a streaming case total: several times the largest common L3
TINY_FLOPS = 1e7  # fewer than these take less than 0.1 ms: such a case is about the cost of a call


def operation(case: Case) -> Any:
    """How a case's inputs are drawn, how much work it is, how it is called."""
    return OPERATIONS[case.operation]


def inputs(case: Case) -> tuple[np.ndarray, ...]:
    """The operation's arrays, standard normal, contiguous in the case's layout."""
    return operation(case).inputs(case, np.random.default_rng(zlib.crc32(case.name.encode())))


def flops(case: Case) -> int | None:
    """Useful operations of a call; None where they are not what its time goes to."""
    return operation(case).flops(case)


def bytes_of(case: Case) -> int:
    """Bytes that a call has to read and write at least."""
    return operation(case).bytes(case)


def copies(case: Case) -> int:
    """Sets of inputs that calls take in turn."""
    return math.ceil(STREAM_BYTES / bytes_of(case)) if case.stream else 1


def sets(case: Case) -> Iterator[tuple[np.ndarray, ...]]:
    """The inputs as often as `copies` says: the same numbers, each at a place of their own."""
    first = inputs(case)
    yield first
    for _ in range(copies(case) - 1):
        yield tuple(a.copy() for a in first)


def limited_by(case: Case) -> str:
    """What a call can at best be as fast as: "read" or "copy" (memory), "calls" (Python), or a type's FMA peak:
    for 16 bits that of bfloat16 where its pairs are multiplied, else that of float32."""
    useful = flops(case)
    if useful is None:
        return "copy"
    if case.stream or useful < TINY_FLOPS:
        return "read" if case.stream else "calls"
    pairs = case.dtype == case.kv_type == "bfloat16" and (case.isa or qkv_fast.isa()).endswith("bf16")
    return "float32" if case.dtype in HALVES and not pairs else case.dtype


def amount(case: Case) -> int:
    """Work of a call in the unit of its limit: bytes, calls or operations."""
    limit = limited_by(case)
    if limit == "calls":
        return 1
    if limit in ("read", "copy"):
        return bytes_of(case) // (2 if limit == "copy" else 1)
    return flops(case)
