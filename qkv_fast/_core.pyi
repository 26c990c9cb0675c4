# The types of _core.pyx, for checkers; what the functions mean stands there.
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]

COUNTERS: tuple[str, ...]
MAX_DIM: int
MAX_THREADS: int
OBSTACLES: dict[int, str]
PLAN: object

def isa_names() -> tuple[str, ...]: ...
def build_info() -> dict[str, Any]: ...
def forward(
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    lse: _Array | None,
    heads_first: bool,
    scale: float,
    left: int | None,
    right: int | None,
    offset: _Array | None,
    length: _Array | None,
    threads: int,
    isa: int,
    counters: object,
    extras: object,
) -> Any: ...
def product(
    a: _Array,
    b: _Array,
    c: _Array,
    transposed: bool,
    a_heads_first: bool,
    b_heads_first: bool,
    c_heads_first: bool,
    scale: float,
    threads: int,
    isa: int,
    counters: _Array | None,
) -> None: ...
def softmax(
    x: _Array, mask: _Array | None, out: _Array, axis: int, threads: int, isa: int, counters: _Array | None
) -> None: ...
def pool_threads() -> int: ...
def pool_stop() -> None: ...
def trim() -> None: ...
def fail_allocation(k: int) -> None: ...
def allocations() -> int: ...
def exp2(x: _Array, y: _Array, isa: int) -> None: ...
def fma_rate(wide: bool, threads: int, seconds: float, isa: int) -> float: ...
def pair_rate(threads: int, seconds: float) -> float: ...
def read_rate(data: _Array, threads: int, seconds: float) -> float: ...
def copy_rate(to: _Array, data: _Array, threads: int, seconds: float) -> float: ...
def fork_join(threads: int, repeats: int) -> float: ...
def quantise(x: _Array, rows: _Array, stored: str, isa: int) -> None: ...
def dequantise(rows: _Array, x: _Array, stored: str, isa: int) -> None: ...
