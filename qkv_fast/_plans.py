"""What explain() returns: how a call would run. Printed, it is a short report."""

import math
from typing import NamedTuple

from . import _runtime


class Plan(NamedTuple):
    """How a call would run; its text is for people, and fields may change between versions.

    Attributes
    ----------
    isa, dtype, kernel : str
        CPU path, element type of the arithmetic, and the kernel that would do it.
    rows : int
        Query rows of one key head: Lq times the query heads that share it.
    panel_rows, vector_rows, kernel_keys : int
        Query rows computed side by side, and in one SIMD vector (for a decode kernel, which has one for each key head,
        both are `rows`); keys that the kernel holds in registers.
    products : int
        Products of parts of numbers, on a path with tiles, that a score and a value take for each term; else 0.
    block_keys, pass_keys, chunk_keys, chunks : int
        Keys of one kernel call; keys that stay in cache while every panel of a task sees them; keys that are summed
        from zero, and how many times that happens.
    split : bool
        Whether the chunks of one query are shared among threads.
    tile_panels, tasks : int
        Panels in a task; how many tasks there are.
    threads, threads_asked : int
        Threads that would be used, and that might have been. A small call does without those that sleep.
    threads_from : str
        What says `threads_asked`.
    tiles_full, tiles_partial, tiles_skipped : int
        Tiles of one block of keys and one vector of rows, that need no mask, that need one, and that are left out.
    tiles_copied : int
        Passes of K or V that would be copied to scratch first.
    scratch_bytes, operations, bytes, pairs : float
        Scratch memory of all threads; floating-point operations of the visible pairs; bytes of Q, visible K and V and
        results; (query, key) pairs that see each other.
    pairs_all : float
        Pairs if nothing were hidden.
    shapes, dtypes : dict
        Shapes and element types of q, k, v and the result.
    readings : tuple of str
        How arrays were read whose axes might have meant something else.
    notes : tuple of str
        Whatever makes the call slower than its shape alone would, in words.
    """

    isa: str
    dtype: str
    kernel: str
    rows: int
    panel_rows: int
    vector_rows: int
    kernel_keys: int
    products: int
    block_keys: int
    pass_keys: int
    chunk_keys: int
    chunks: int
    split: bool
    tile_panels: int
    tasks: int
    threads: int
    threads_asked: int
    threads_from: str
    tiles_full: int
    tiles_partial: int
    tiles_skipped: int
    tiles_copied: int
    scratch_bytes: float
    operations: float
    bytes: float
    pairs: float
    pairs_all: float
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    readings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def limits(self) -> tuple[float, float]:
        """Seconds that arithmetic and memory traffic take at this machine's peaks on as many threads.

        The peaks are measured when this is first asked, in about 0.3 s and 256 MB, and then kept.
        """
        _, kind, path = self.kernel.split("_", 2)
        index = _runtime.available_isas().index(path)
        flops, bandwidth = _runtime.measured_peaks(index, kind, max(1, self.threads))
        return self.operations * max(1, self.products / 2) / flops, self.bytes / bandwidth

    @property
    def seconds(self) -> float:
        """The time that the roofline predicts, the longer of the two `limits`: less only if the data lie in cache."""
        return max(self.limits)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        lines = _head(self, "attention")
        if not self.operations:
            return [*lines, _row("work", "none: the result is filled without computing anything")]
        lines += [
            _row("kernel", self._kernel()),
            _row("tiles", self._tiles()),
            _row("", f"{self.tiles_full} full, {self.tiles_partial} partial, {self.tiles_skipped} skipped; "
                     f"{self.tiles_copied} copies of keys or values"),
            _row("chunks", self._chunks()),
            *_resources(self),
            _row("work", f"{_unit(self.operations, 'F')} and {_unit(self.bytes, 'B')}; of all pairs "
                         f"{100 * self.pairs / self.pairs_all:.3g}% are visible"),
            _row("roofline", self._roofline()),
        ]  # fmt: skip
        lines += [_row("read as" if i == 0 else "", reading) for i, reading in enumerate(self.readings)]
        return lines + _noted(self)

    def _kernel(self) -> str:
        if self.kernel.startswith("decode"):
            return f"{self.kernel}: {_many(self.rows, 'query row')} for each key head, lanes along the head dimension"
        held = f"tiles, {self.products} products of parts for a score and a value" if self.products else "registers"
        return f"{self.kernel}: {self.panel_rows} query rows x {self.kernel_keys} keys in {held}"

    def _tiles(self) -> str:
        tiles = f"{self.block_keys} keys x {_many(self.vector_rows, 'row')}; "
        if self.kernel.startswith("decode"):
            return tiles + "each key and value is read once for all of them"
        return tiles + f"{self.pass_keys} keys stay in cache for the {_many(self.tile_panels, 'panel')} of a task"

    def _chunks(self) -> str:
        if self.chunks == 1:
            return f"1: up to {self.chunk_keys} keys are summed in one go"
        why = "summed from zero and merged in order, which keeps long sums exact"
        shared = "; shared among the threads, for which there are too few queries" if self.split else ""
        return f"{self.chunks} of {self.chunk_keys} keys, {why}{shared}"

    def _roofline(self) -> str:
        compute, memory = self.limits
        bound = "arithmetic" if compute >= memory else "memory"
        return (
            f"at least {_unit(self.seconds, 's')}, bound by {bound} ({_unit(self.operations / compute, 'F/s')}, "
            f"{_unit(self.bytes / memory, 'B/s')} measured here)"
        )


class StagePlan(NamedTuple):
    """How a call of `scores`, `softmax`, `softmax_grad` or `weighted_values` would run; see `Plan` for what both have.

    Attributes
    ----------
    stage : str
        The function.
    isa, dtype, kernel : str
        CPU path, element type of the arithmetic, and the kernel that would do it.
    products : int
        Products of parts of numbers, on a path with tiles, that a term takes; else 0.
    tile_rows, tile_columns : int
        Rows and columns of the result in a task, at most. The axis of a softmax is the columns, or the rows where
        columns lie side by side.
    pass_terms : int
        Terms of a product for which keys or values are prepared at a time; 0 for a softmax.
    streamed : bool
        Whether results are written past the caches, since they are large.
    tasks, threads, threads_asked : int
        How many tasks there are; threads that would be used, and that might have been.
    threads_from : str
        What says `threads_asked`.
    tiles_copied : int
        Copies to scratch of rows that cannot be used where they lie, each of some rows; for a softmax, of one.
    scratch_bytes, operations, bytes : float
        Scratch memory of all threads; floating-point operations of a product, 0 for a softmax; bytes of what is given
        and of the result.
    shapes, dtypes : dict
        Shapes and element types of the arrays and the result.
    notes : tuple of str
        Whatever makes the call slower than its shape alone would, in words.
    """

    stage: str
    isa: str
    dtype: str
    kernel: str
    products: int
    tile_rows: int
    tile_columns: int
    pass_terms: int
    streamed: bool
    tasks: int
    threads: int
    threads_asked: int
    threads_from: str
    tiles_copied: int
    scratch_bytes: float
    operations: float
    bytes: float
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    notes: tuple[str, ...]

    @property
    def limits(self) -> tuple[float, float]:
        """Seconds that arithmetic and memory traffic take at this machine's peaks on as many threads.

        The peaks are measured when this is first asked, in about 0.3 s and 256 MB, and then kept. Traffic of a product
        is taken at the rate of reading, that of a softmax, which waits for nothing else, at that of copying.
        """
        threads = max(1, self.threads)
        if not self.is_product:
            return 0.0, self.bytes / _runtime.measured_traffic(threads)
        _, kind, path = self.kernel.split("_", 2)
        flops, bandwidth = _runtime.measured_peaks(_runtime.available_isas().index(path), kind, threads)
        return self.operations * max(1, self.products) / flops, self.bytes / bandwidth

    @property
    def seconds(self) -> float:
        """The time that the roofline predicts, the longer of the two `limits`: less only if the data lie in cache."""
        return max(self.limits)

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices."""
        return not self.stage.startswith("softmax")

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        lines = _head(self, self.stage)
        if not self.tasks:
            return [*lines, _row("work", "none: the result has no elements")]
        operations = f"{_unit(self.operations, 'F')} and " * self.is_product
        where = ", written past the caches" * self.streamed
        copies = _many(self.tiles_copied, "copy", "copies")
        return [
            *lines,
            _row("kernel", f"{self.kernel}: {self._kernel()}"),
            _row("tiles", self._tiles()),
            *_resources(self),
            _row("work", f"{operations}{_unit(self.bytes, 'B')}{where}; {copies} of rows"),
            _row("roofline", self._roofline()),
            *_noted(self),
        ]

    def _kernel(self) -> str:
        if self.is_product:
            return "columns of the result in the lanes" + f", {self.products} products of parts" * (self.products > 0)
        return "columns side by side in the lanes" if "columns" in self.kernel else "a row after the other"

    def _tiles(self) -> str:
        tiles = f"up to {_many(self.tile_rows, 'row')} x {_many(self.tile_columns, 'column')} of the result in a task"
        return tiles + f"; {_many(self.pass_terms, 'term')} at a time" * (self.pass_terms > 0)

    def _roofline(self) -> str:
        compute, memory = self.limits
        rate = _unit(self.bytes / memory, "B/s")
        if not self.is_product:
            return f"at least {_unit(memory, 's')}, bound by memory ({rate} of copying measured here)"
        bound = "arithmetic" if compute >= memory else "memory"
        peak = f"{_unit(self.operations / compute, 'F/s')}, " if compute else ""
        return f"at least {_unit(self.seconds, 's')}, bound by {bound} ({peak}{rate} measured here)"


def _head(plan: Plan | StagePlan, what: str) -> list[str]:
    """The arrays, and the CPU path."""
    mixed = set(plan.dtypes.values()) != {plan.dtype}
    arrays = ", ".join(f"{name} {shape}" + f" {plan.dtypes[name]}" * mixed for name, shape in plan.shapes.items())
    others = ", ".join(name for name in _runtime.available_isas() if name != plan.isa)
    return [
        f"{what} of {arrays}, " + "computed in " * mixed + plan.dtype,
        _row("CPU path", plan.isa + (f" (also here: {others})" if others else "")),
    ]


def _resources(plan: Plan | StagePlan) -> list[str]:
    tasks = _many(plan.tasks, "task")
    return [
        _row("threads", f"{plan.threads} of {plan.threads_asked} ({plan.threads_from}) for {tasks}"),
        _row("scratch", _unit(plan.scratch_bytes, "B")),
    ]


def _noted(plan: Plan | StagePlan) -> list[str]:
    return [_row("note" if i == 0 else "", note) for i, note in enumerate(plan.notes)]


def _row(name: str, text: str) -> str:
    return f"  {name:<10}{text}"


def _many(n: int, noun: str, nouns: str = "") -> str:
    return f"{n} {noun if n == 1 else nouns or noun + 's'}"


def _unit(x: float, unit: str) -> str:
    """Three digits and a prefix."""
    if x == 0:
        return f"0 {unit}"
    power = min(5, max(-3, math.floor(math.log10(x) / 3 + 1e-9)))
    return f"{x / 1000.0**power:.3g} {'nµm'[power] if power < 0 else ['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"
