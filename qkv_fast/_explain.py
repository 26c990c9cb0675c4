"""explain(): what a call of attention would do. The facts come from the plan that the call would follow."""

import math
from typing import Any, NamedTuple

import numpy as np

from . import _core, _runtime
from ._attention import attention
from ._checks import Array, _arithmetic, _as_array


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
    notes: tuple[str, ...]

    @property
    def limits(self) -> tuple[float, float]:
        """Seconds that arithmetic and memory traffic take at this machine's peaks on as many threads.

        The peaks are measured when this is first asked, in about 0.3 s and 256 MB, and then kept.
        """
        index = _runtime.available_isas().index(self.isa)
        flops, bandwidth = _runtime.measured_peaks(index, self.kernel.split("_")[1], max(1, self.threads))
        return self.operations / flops, self.bytes / bandwidth

    @property
    def seconds(self) -> float:
        """The time that the roofline predicts, the longer of the two `limits`: less only if the data lie in cache."""
        return max(self.limits)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        mixed = set(self.dtypes.values()) != {self.dtype}
        arrays = ", ".join(
            f"{name} {shape}" + f" {self.dtypes[name]}" * mixed for name, shape in self.shapes.items()
        )
        lines = [f"attention of {arrays}, " + "computed in " * mixed + self.dtype]
        others = ", ".join(name for name in _runtime.available_isas() if name != self.isa)
        lines.append(_row("CPU path", self.isa + (f" (also here: {others})" if others else "")))
        if not self.operations:
            return [*lines, _row("work", "none: the result is filled without computing anything")]
        lines += [
            _row("kernel", self._kernel()),
            _row("tiles", self._tiles()),
            _row("", f"{self.tiles_full} full, {self.tiles_partial} partial, {self.tiles_skipped} skipped; "
                     f"{self.tiles_copied} copies of keys or values"),
            _row("chunks", self._chunks()),
            _row("threads", f"{self.threads} of {self.threads_asked} ({self.threads_from}) "
                            f"for {_many(self.tasks, 'task')}"),
            _row("scratch", _unit(self.scratch_bytes, "B")),
            _row("work", f"{_unit(self.operations, 'F')} and {_unit(self.bytes, 'B')}; of all pairs "
                         f"{100 * self.pairs / self.pairs_all:.3g}% are visible"),
            _row("roofline", self._roofline()),
        ]  # fmt: skip
        return lines + [_row("note" if i == 0 else "", note) for i, note in enumerate(self.notes)]

    def _kernel(self) -> str:
        if self.kernel.startswith("decode"):
            return f"{self.kernel}: {_many(self.rows, 'query row')} for each key head, lanes along the head dimension"
        return f"{self.kernel}: {self.panel_rows} query rows x {self.kernel_keys} keys in registers"

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


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool | str = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    kv_lengths: Any = None,
    segments: tuple[Any, Any] | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    layout: str = "bhld",
    return_lse: bool = False,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Plan:
    """Say what `attention` would do with these arguments, without doing it.

    Parameters
    ----------
    q, k, v, mask, bias, causal, window, q_offset, kv_lengths, segments, alibi_slopes, sinks, softcap, scale, layout, \
return_lse, out, num_threads
        What `attention` takes, with the same meaning. Elements of q, k and v are not looked at, and `out` is not
        written to; those of a mask and of segments decide which tiles there are.

    Returns
    -------
    plan : Plan
        It prints as a short report: CPU path, kernel, tile sizes, chunks, threads, scratch memory, operations and
        bytes, what masks skip, the time that the roofline predicts, and a note for whatever makes the call slower
        than its shape alone would (types that widen, copies, few queries). Each of these is an attribute too.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        Where the call would.

    Notes
    -----
    The plan is the one that the call would follow; only results that are not finite, and a thread pool that is busy
    with another call, can change what then happens. The first print measures the machine's peaks: about 0.3 s.

    The roofline is from S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model
    for multicore architectures", 2009.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> q, k, v = np.ones((3, 8, 1000, 64), dtype=np.float32)
    >>> plan = qkv_fast.explain(q, k, v, causal=True)
    >>> f"{plan.pairs / plan.pairs_all:.0%} of all pairs are visible"
    '50% of all pairs are visible'
    >>> plan.tiles_copied
    0
    >>> qkv_fast.explain(q, k[..., ::-1], v).notes[0]
    'k: rows whose elements are not adjacent; copied a tile at a time (float32, strides (256000, 256, -4))'
    """
    given = {"q": q, "k": k, "v": v}
    # Before: their own code may call attention.
    made = [_as_array(name, x) for name, x in given.items()]
    own = (mask, bias, q_offset, kv_lengths, alibi_slopes, sinks)
    mask, bias, q_offset, kv_lengths, alibi_slopes, sinks = (_made(x) for x in own)
    if isinstance(segments, (tuple, list)):
        segments = tuple(_made(x) for x in segments)
    with _runtime.planning():
        report, *arrays = attention(
            *made, mask=mask, bias=bias, causal=causal, window=window, q_offset=q_offset, kv_lengths=kv_lengths,
            segments=segments, alibi_slopes=alibi_slopes, sinks=sinks, softcap=softcap, scale=scale, layout=layout,
            return_lse=return_lse, out=out, num_threads=num_threads,
        )  # fmt: skip
    used = dict(zip(("q", "k", "v", "out"), arrays, strict=True))
    counts = report["counts"]
    asked, index, _ = _runtime.current()
    source = _runtime.threads_source()
    if num_threads is not None:
        asked, source = _runtime.check_threads(num_threads, "explain: num_threads"), "num_threads="
    isa, dtype = _runtime.available_isas()[index], "float64" if used["q"].dtype.itemsize == 8 else "float32"
    kernel = "decode" if report["decode"] else "attend"
    if report["pair"] == 2:  # which is all that this path has of its own
        kernel += f"_bf16_{isa}"
    else:
        kernel += f"_{'f64' if dtype == 'float64' else 'f32'}_{isa.removesuffix('bf16')}"
    keys = used["k"].shape[-3 if layout == "blhd" and used["k"].ndim > 2 else -2]
    return Plan(
        isa=isa,
        dtype=dtype,
        kernel=kernel,
        rows=report["rows"],
        panel_rows=report["panel_rows"],
        vector_rows=report["vector_rows"],
        kernel_keys=report["kernel_keys"],
        block_keys=report["block_keys"],
        pass_keys=report["pass_keys"],
        chunk_keys=report["chunk_keys"],
        chunks=report["chunks"],
        split=bool(report["split"]),
        tile_panels=report["tile_panels"],
        tasks=counts["tasks"],
        threads=counts["threads"],
        threads_asked=asked,
        threads_from=source,
        tiles_full=counts["tiles_full"],
        tiles_partial=counts["tiles_partial"],
        tiles_skipped=counts["tiles_skipped"],
        tiles_copied=counts["tiles_copied"],
        scratch_bytes=report["scratch_bytes"],
        operations=report["operations"],
        bytes=report["bytes"],
        pairs=report["pairs"],
        pairs_all=float(math.prod(used["out"].shape[:-1])) * keys,
        shapes={name: x.shape for name, x in used.items()},
        dtypes={name: x.dtype.name for name, x in used.items()},
        notes=tuple(_notes(report, given, used, mask, bias, out, asked, index)),
    )


def _made(x: Any) -> Any:
    """x, or what its own code makes of it; masked arrays and matrices are left to the checks."""
    return np.asarray(x) if hasattr(x, "__array__") and not isinstance(x, np.ndarray) else x


_COPIED = {
    "q": "copied a row at a time",
    "k": "copied a tile at a time",
    "v": "copied a tile at a time",
    "out": "written through a copy of each row",
}


def _notes(
    report: dict[str, Any], given: dict[str, Any], used: dict[str, Array], mask: Any, bias: Any, out: Any, asked: int,
    index: int,
) -> list[str]:  # fmt: skip
    """Whatever makes the call slower than its shape alone would."""
    notes = []
    for name, x in used.items():
        if name in given and not isinstance(given[name], np.ndarray):
            notes.append(f"{name}: a {type(given[name]).__name__}, made an array in every call")
        if found := report[f"obstacles_{name}"]:
            why = " and ".join(words for bit, words in _core.OBSTACLES.items() if found & bit)
            notes.append(f"{name}: {why}; {_COPIED[name]} ({x.dtype}, strides {x.strides})")
    for name, x in (("mask", mask), ("bias", bias)):
        if x is not None and (found := _obstacles(x := np.atleast_1d(np.asarray(x)), used["q"])):
            notes.append(f"{name}: {' and '.join(found)}; copied a tile at a time ({x.dtype}, strides {x.strides})")
    if out is not None and used["out"] is not out:
        notes.append("out: may overlap an input, so the result is computed in a temporary array and copied")
    threads, tasks = report["counts"]["threads"], report["counts"]["tasks"]
    rows, vector = report["rows"], report["vector_rows"]
    lanes = -(-rows // vector) * vector
    if report["operations"] and not report["decode"] and 0 < lanes < report["panel_rows"]:
        notes.append(
            f"queries: {_many(rows, 'row')} for each key head, of the {report['panel_rows']} that the kernel computes "
            f"side by side; they take {lanes} lanes"
        )
    if threads and threads < asked:
        why = "there are no more tasks" if tasks <= threads else "the work is not worth waking another"
        notes.append(f"threads: {threads} of {asked}, since {why}")
    if threads > (cpus := _runtime.allowed_cpus()):
        notes.append(f"threads: {threads} on {cpus} CPUs that the process may use")
    if index:
        best, used_isa = _runtime.available_isas()[0], _runtime.available_isas()[index]
        notes.append(f"CPU path: {used_isa}, though {best} is available ({_runtime.isa_source()})")
    return notes


def _obstacles(x: Array, q: Array) -> list[str]:
    """What keeps rows of a mask or bias from being used where they lie, as choose_copies() in plan.c has it."""
    _, swapped, strided, unaligned, *_ = _core.OBSTACLES.values()
    step = x.strides[-1] if x.shape[-1] > 1 else 0  # of a row that is one element, that one is repeated
    found = {
        "a type that is not q's": x.dtype != bool and x.dtype.num != _arithmetic(q.dtype.num),
        swapped: not x.dtype.isnative,
        strided: step not in (0, x.itemsize),
        unaligned: not x.flags.aligned,
    }
    return [words for words, is_so in found.items() if is_so]


def _row(name: str, text: str) -> str:
    return f"  {name:<10}{text}"


def _many(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _unit(x: float, unit: str) -> str:
    """Three digits and a prefix."""
    if x == 0:
        return f"0 {unit}"
    power = min(5, max(-3, math.floor(math.log10(x) / 3 + 1e-9)))
    return f"{x / 1000.0**power:.3g} {'nµm'[power] if power < 0 else ['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"
