"""explain(): what a call would do. The facts come from the plan that the call would follow.

What it returns, _plans.py, is imported when it is called: 1 ms of every import, which few need.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core, _runtime
from ._attention import attention
from ._checks import Array, _arithmetic, _as_array
from ._core import Problem
from ._foreign import is_foreign, kind_of
from ._problem import Planned
from ._stages import PlannedStage, scores, softmax, softmax_grad, weighted_values
from ._varlen import attention_varlen
from .cache import KVCache, PagedKVCache

if TYPE_CHECKING:
    from ._plans import Plan, StagePlan

_VERBS = {
    attention, attention_varlen, scores, softmax, softmax_grad, weighted_values, KVCache.attend, PagedKVCache.attend,
}  # fmt: skip


def explain(*call: Any, **arguments: Any) -> "Plan | StagePlan":
    """Say what a call would do, without doing it: `attention` of these arguments, or of a function the call of it.

    ``explain(q, k, v, causal=True)`` explains ``attention(q, k, v, causal=True)``. For other functions and methods pass
    them first: ``explain(qkv_fast.attention_varlen, q, k, v, starts, starts)``, ``explain(cache.attend, q)``,
    ``explain(qkv_fast.softmax, x, axis=0)`` and the other stages.

    Parameters
    ----------
    q, k, v, mask, bias, causal, window, q_offset, q_positions, q_lengths, kv_lengths, kv_starts, segments, \
alibi_slopes, sinks, softcap, scale, layout, return_lse, out, num_threads
        What `attention` takes, with the same meaning; or another function first, and then what that takes. Elements
        of arrays are not looked at, and `out` is not written to; those of a mask and of segments decide which tiles
        there are.

    Returns
    -------
    plan : Plan, or StagePlan of a stage
        It prints as a short report: CPU path, kernel, tile sizes, chunks, threads, scratch memory, operations and
        bytes, what masks skip, the time that the roofline predicts, how arrays were read whose axes might have meant
        something else, and a note for whatever makes the call slower than its shape alone would (types that widen,
        copies, few queries). Each of these is an attribute too. A stage has no chunks, and hides no tiles.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        Where the call would.

    Notes
    -----
    The plan is the one that the call would follow; only results that are not finite, and a thread pool that is busy
    with another call, can change what then happens. The first print measures the machine's peaks: about 0.3 s. A
    softmax is bound by memory: its peak is the rate at which the machine copies.

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

    A step of a cache:

    >>> cache = qkv_fast.KVCache(1, 8, 64, capacity=1000)
    >>> cache.append(k[None], v[None])
    >>> qkv_fast.explain(cache.attend, q[None, :, -1:], num_threads=1).kernel.split("_")[0]
    'decode'

    Weights that are asked for along an axis that is not the last, in another byte order:

    >>> plan = qkv_fast.explain(qkv_fast.softmax, np.ones((64, 64), ">f4"), axis=0, num_threads=1)
    >>> plan.kernel.split("_")[:2], plan.tiles_copied
    (['softmax', 'rows'], 64)
    """
    from ._plans import Plan

    if call and isinstance(call[0], (KVCache, PagedKVCache)):
        raise TypeError(f"explain: of a cache pass its method, cache.attend, got {call[0]!r}")
    verb = attention
    if call and callable(call[0]) and not is_foreign(call[0]):
        verb, *call = call  # type: ignore[assignment]
        if getattr(verb, "__func__", verb) not in _VERBS:
            names = ", ".join(sorted(f"{known.__qualname__}" for known in _VERBS))
            raise TypeError(f"explain: a function must be one of {names}, got {verb!r}")
    # Before: their own code may call attention.
    given = dict(zip(verb.__code__.co_varnames[hasattr(verb, "__self__") :], call, strict=False)) | arguments
    made = [_made(x) for x in call]
    arguments = {name: _made(x) for name, x in arguments.items()}
    with _runtime.planning():
        planned = verb(*made, **arguments)
    source = "num_threads=" if arguments.get("num_threads") is not None else _runtime.threads_source()
    if isinstance(planned, PlannedStage):
        return _of_stage(planned, given, source)
    asked, index = planned.problem.threads, planned.problem.isa
    p, report, out = planned.problem, planned.report, planned.out
    used = {"q": p.q, "k": p.k, "v": p.v, "out": out}
    counts = report["counts"]
    for other in planned.also:
        for name in ("operations", "bytes", "pairs"):
            report[name] += other[name]
        for name in ("tasks", "tiles_full", "tiles_partial", "tiles_skipped", "tiles_copied"):
            counts[name] += other["counts"][name]
        counts["threads"] = max(counts["threads"], other["counts"]["threads"])
        report["split"] |= other["split"]
        report["scratch_bytes"] = max(report["scratch_bytes"], other["scratch_bytes"])
    isa, dtype = _runtime.available_isas()[index], "float64" if p.q.dtype.itemsize == 8 else "float32"
    kernel = "decode" if report["decode"] else "attend"
    kind = "f64" if dtype == "float64" else "bf16" if report["pair"] == 2 else "f32"
    if report["parts"]:
        kind = _KINDS[report["parts"] - 1]
    kernel += f"_{kind}_{_runtime.available_isas()[report['isa']]}"
    stored = {} if p.extras is None else {"k": p.extras.k_stored, "v": p.extras.v_stored}
    return Plan(
        isa=isa,
        dtype=dtype,
        kernel=kernel,
        rows=report["rows"],
        panel_rows=report["panel_rows"],
        vector_rows=report["vector_rows"],
        kernel_keys=report["kernel_keys"],
        products=report["products"],
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
        pairs_all=_all_pairs(p, planned.longest),
        shapes={name: x.shape for name, x in used.items()} | planned.shapes,
        dtypes={name: stored.get(name) or x.dtype.name for name, x in used.items()},
        readings=tuple(_readings(p)),
        notes=tuple(_notes(planned, given, used, asked, index)),
    )


explain.__wrapped__ = attention  # type: ignore[attr-defined]  # whose signature it has


def _of_stage(planned: PlannedStage, given: dict[str, Any], source: str) -> "StagePlan":
    from ._plans import StagePlan

    report, arrays = planned.report, planned.arrays
    counts = report["counts"]
    a = next(iter(arrays.values()))
    isa, dtype = _runtime.available_isas()[planned.isa], "float64" if a.dtype.itemsize == 8 else "float32"
    kernel, kind, path = "multiply", "f64" if dtype == "float64" else "f32", _runtime.path_of_stages(isa)
    if parts := report["parts"]:
        kind, path = _KINDS[parts - 1], isa
    if planned.stage.startswith("softmax"):
        kernel = f"{planned.stage}_{'columns' if report['across'] else 'rows'}"
    return StagePlan(
        stage=planned.stage,
        isa=isa,
        dtype=dtype,
        kernel=f"{kernel}_{kind}_{path}",
        products=report["products"],
        tile_rows=report["tile_rows"],
        tile_columns=report["tile_columns"],
        pass_terms=report["pass_terms"],
        streamed=bool(report["stream"]),
        tasks=counts["tasks"],
        threads=counts["threads"],
        threads_asked=planned.threads,
        threads_from=source,
        tiles_copied=counts["tiles_copied"],
        scratch_bytes=report["scratch_bytes"],
        operations=report["operations"],
        bytes=report["bytes"],
        shapes={name: x.shape for name, x in arrays.items()},
        dtypes={name: x.dtype.name for name, x in arrays.items()},
        notes=tuple(_stage_notes(planned, given)),
    )


def _made(x: Any) -> Any:
    """x, or what its own code makes of it; masked arrays and matrices are left to the checks."""
    if isinstance(x, (tuple, list)) and any(map(is_foreign, x)):
        return type(x)(_made(part) for part in x)
    return _as_array("an argument", x, "explain") if is_foreign(x) else x


def _all_pairs(p: Problem, longest: int | None) -> float:
    """Pairs of a query and a key of its sequence; `longest` is that of a cache."""
    extras = p.extras
    if extras is not None and extras.q_starts is not None and extras.k_starts is not None:
        return p.rows[0] * float(np.dot(np.diff(extras.q_starts), np.diff(extras.k_starts).astype(float)))
    keys: int = p.k.shape[-2 if p.heads_first or p.k.ndim == 2 else -3]
    return float(math.prod(p.rows)) * (keys if longest is None else longest)


def _readings(p: Problem) -> list[str]:
    """How axes were read that might have meant something else."""
    from ._plans import _many

    readings, extras = [], p.extras
    ragged = extras is not None and extras.q_starts is not None
    if p.q.ndim == 3 and not ragged:
        heads, length, dim = p.q.shape if p.heads_first else (p.q.shape[1], p.q.shape[0], p.q.shape[2])
        split = "; heads not split? reshape to (B, L, num_heads, D), layout='blhd'" if dim > 256 else ""
        readings.append(f"q: one sequence of {_many(heads, 'head')}, {length} long, of {_many(dim, 'element')}{split}")
    for name in ("mask", "bias"):
        x = None if extras is None else getattr(extras, name)
        if x is None:
            continue
        if x.ndim > 2:
            readings.append(f"{name} {x.shape}: (..., query heads, queries, keys)")
        else:
            axes = ("queries", "keys")[-x.ndim :]
            readings.append(f"{name} {x.shape}: ({', '.join(axes)}{',' * (x.ndim == 1)}), the same for all sequences")
    return readings


_KINDS = ("bf16", "f16", "f32")  # of one to three parts

_COPIED = {
    "q": "copied a row at a time",
    "k": "copied a tile at a time",
    "v": "copied a tile at a time",
    "out": "written through a copy of each row",
}
_COPIED_BY_STAGES = _COPIED | {
    "q": "copied a few rows at a time",
    "p": "copied a few rows at a time",
    "x": "copied a row at a time",
    "dp": "copied a row at a time",
}


def _notes(planned: Planned, given: dict[str, Any], used: dict[str, Array], asked: int, index: int) -> list[str]:
    """Whatever makes the call slower than its shape alone would."""
    from ._plans import _many

    notes, report, extras = [], planned.report, planned.problem.extras
    for name, x in used.items():
        notes += _array_notes(name, x, given, report[f"obstacles_{name}"], _COPIED[name])
    for name in ("mask", "bias"):
        y = None if extras is None else getattr(extras, name)
        if y is None:
            continue
        notes += _made_notes(name, y, given)
        if found := _obstacles(y, used["q"]):
            notes.append(f"{name}: {' and '.join(found)}; copied a tile at a time ({y.dtype}, strides {y.strides})")
    notes += _temporary_notes(planned.given_out, used["out"])
    rows, vector = report["rows"], report["vector_rows"]
    lanes = -(-rows // vector) * vector
    if report["operations"] and not report["decode"] and 0 < lanes < report["panel_rows"]:
        notes.append(
            f"queries: {_many(rows, 'row')} for each key head, of the {report['panel_rows']} that the kernel computes "
            f"side by side; they take {lanes} lanes"
        )
    if given.get("tolerance") is not None:
        notes.append(
            f"tolerance: what {given['tolerance']} leaves out depends on what keys hold, which is not looked at: "
            "the plan is that of reading all of them, as where nothing can be left out"
        )
    return notes + _place_notes(report["counts"], asked, index)


def _stage_notes(planned: PlannedStage, given: dict[str, Any]) -> list[str]:
    """The same of a stage."""
    report, notes = planned.report, []
    *names, out = planned.arrays
    for name, field in (*zip(names, "ab", strict=False), (out, "c")):
        x, found = planned.arrays[name], report[f"obstacles_{field}"]
        notes += _array_notes(name, x, given, found, _COPIED_BY_STAGES[name])
    if planned.rescaled:
        notes.append("scale: beyond what products take in one step, so the result is multiplied again, by NumPy")
    else:
        notes += _temporary_notes(planned.given_out, planned.arrays[out])
    return notes + _place_notes(report["counts"], planned.threads, planned.isa)


def _array_notes(name: str, x: Array, given: dict[str, Any], obstacles: int, copied: str) -> list[str]:
    """Why an array is copied."""
    notes = _made_notes(name, x, given)
    if obstacles:
        why = " and ".join(words for bit, words in _core.OBSTACLES.items() if obstacles & bit)
        notes.append(f"{name}: {why}; {copied} ({x.dtype}, strides {x.strides})")
    return notes


def _made_notes(name: str, x: Array, given: dict[str, Any]) -> list[str]:
    """Whether x was copied from what was given. What is made anew by being asked once more was."""
    made = given.get(name, x)
    if name == "out" or isinstance(made, (np.ndarray, np.generic)) or not x.size:
        return []
    if is_foreign(made) and np.may_share_memory(_as_array(name, made, "explain"), x):
        return []
    return [f"{name}: a {kind_of(made)}, copied to an array in every call"]


def _temporary_notes(given_out: Array | None, target: Array) -> list[str]:
    if given_out is None or not target.size or np.may_share_memory(target, given_out):
        return []
    return ["out: may overlap an input, so the result is computed in a temporary array and copied"]


def _place_notes(counts: dict[str, int], asked: int, index: int) -> list[str]:
    """Threads and the CPU path."""
    notes, threads, tasks = [], counts["threads"], counts["tasks"]
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
