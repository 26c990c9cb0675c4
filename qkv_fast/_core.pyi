# The types of _core.pyx, for checkers; what the functions mean stands there.
from typing import Any, final

import numpy as np

_Array = np.ndarray[Any, Any]

COUNTERS: tuple[str, ...]
MAX_DIM: int
MAX_THREADS: int
PARTS: int
OBSTACLES: dict[int, str]
PLAN: object
QUESTIONS: dict[str, int]

def isa_names() -> tuple[str, ...]: ...
def build_info() -> dict[str, Any]: ...
def bfloat16_of_ours(kind: type[np.generic]) -> np.dtype[Any]: ...
def bfloat16_as_bits(capsule: Any) -> bool: ...
def capsule_of(array: _Array) -> Any: ...
def memory_of(capsule: Any, bfloat16: Any, where: str) -> _Array: ...

@final
class Problem:
    where: str
    q: _Array
    k: _Array
    v: _Array
    heads_first: bool
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    number: int
    scale: float
    left: int | None
    right: int | None
    offsets: _Array | None
    lengths: _Array | None
    extras: Any
    threads: int
    isa: int
    counters: Any
    def __init__(
        self,
        where: str,
        q: _Array,
        k: _Array | None,
        v: _Array | None,
        heads_first: bool,
        shape: tuple[int, ...],
        rows: tuple[int, ...],
        scale: float,
        left: int | None,
        right: int | None,
        offsets: _Array | None,
        lengths: _Array | None,
        extras: Any,
        threads: int,
        isa: int,
        counters: Any,
    ) -> None: ...
    @property
    def is_planned(self) -> bool: ...
    def empty(self) -> _Array: ...

def empty(where: str, shape: tuple[int, ...], number: int) -> _Array: ...
def check_result(where: str, number: int) -> int: ...
def scratch(where: str, shape: tuple[int, ...], number: int) -> _Array: ...
def gradient_parts(keys: int) -> int: ...
def forward(
    call: Problem,
    out: _Array,
    lse: _Array | None,
    question: int = 0,
    answer: _Array | None = None,
    keys: _Array | None = None,
    normalisers: _Array | None = None,
    first_key: int = 0,
    members: _Array | None = None,
    members_of: _Array | None = None,
    gradients: Any = None,
    quick: bool = False,
) -> dict[str, Any] | None: ...
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
    counters: Any,
    added: _Array | None = None,
    packed: _Array | None = None,
    tiles: bool = False,
) -> dict[str, Any] | None: ...
def pack(b: _Array, threads: int, isa: int) -> _Array: ...
def softmax(
    x: _Array, mask: _Array | None, out: _Array, axis: int, threads: int, isa: int, counters: Any,
    weights: _Array | None = None,
) -> dict[str, Any] | None: ...
def angles(positions: _Array, frequencies: _Array, factor: float, cos: _Array, sin: _Array, threads: int) -> None: ...
def rotate(
    x: _Array,
    out: _Array,
    cos: _Array,
    sin: _Array,
    neighbours: bool,
    heads_first: bool,
    threads: int,
    isa: int,
    counters: Any,
) -> None: ...
def pool_threads() -> int: ...
def pool_stop() -> None: ...
def trim() -> None: ...
def fail_allocation(k: int) -> None: ...
def allocations() -> int: ...
def exp2(x: _Array, y: _Array, isa: int) -> None: ...
def fma_rate(wide: bool, threads: int, seconds: float, isa: int) -> float: ...
def tiles_refusal() -> int | None: ...
def refuse_tiles() -> None: ...
def tile_rate(threads: int, seconds: float, isa: int) -> float: ...
def pair_rate(threads: int, seconds: float) -> float: ...
def read_rate(data: _Array, threads: int, seconds: float) -> float: ...
def copy_rate(to: _Array, data: _Array, threads: int, seconds: float) -> float: ...
def fork_join(threads: int, repeats: int) -> float: ...
def choose(
    weights: _Array, reach: _Array, slack: _Array, steps: _Array, lengths: _Array, tolerance: float, keys: _Array,
    threads: int,
) -> tuple[_Array, _Array]: ...
def prune(
    queries: _Array, rows: _Array, steps: _Array, starts: _Array | None, lengths: _Array, scale: float,
    tolerance: float, keys: _Array, threads: int, isa: int,
) -> tuple[_Array, _Array]: ...
def gather(x: _Array, keys: _Array, count: _Array, out: _Array, threads: int) -> None: ...
def quantise(x: _Array, rows: _Array, stored: str, turn: int, isa: int) -> None: ...
def turn_rows(x: _Array, rotated: _Array, turn: int, back: bool, isa: int) -> None: ...
def dequantise(rows: _Array, x: _Array, stored: str, turn: int, isa: int) -> None: ...
