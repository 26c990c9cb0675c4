"""The library under test, behind the same adapter as a peer (peers.py has the contract)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import qkv_fast

from . import work
from .cases import Case
from .method import rotate

OURS = "qkv_fast"


class Ours:
    name, title, requires = OURS, OURS, ()
    operations = tuple(work.OPERATIONS)

    def __init__(self, threads: int, reuse_out: bool = False) -> None:
        self.threads, self.reuse_out, self.version = threads, reuse_out, qkv_fast.__version__

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        return {}

    def prepare(self, case: Case) -> list[tuple]:
        operation = work.operation(case)
        calls = [operation.call(case, arrays, self.threads, self.reuse_out) for arrays in work.sets(case)]
        return [("", calls, lambda: operation.head_first(case, calls[0]()))]


def ours(case: Case, threads: int, reuse_out: bool = False) -> Callable[[], np.ndarray]:
    """The call as a user writes it; with `reuse_out` into one output array."""
    ((_, calls, _),) = Ours(threads, reuse_out).prepare(case)
    return rotate(calls)
