"""Attention of Dask arrays: k and v may be larger than memory, and workers of a cluster share the work.

A block of queries meets one block of keys at a time. The partial results, which have their log-sum-exp beside them, are
merged in runs of neighbouring blocks, and the runs in a tree: in an order that the chunks alone decide, so that the
result has the same bits for the same chunks, whoever computes what and when. Blocks that no query sees, by `causal`,
`window`, lengths and segments, are never made.

Examples
--------
>>> import dask.array as da
>>> from qkv_fast.integrations.dask import attention, explain
>>> rng = da.random.default_rng(0)
>>> q, k, v = (rng.standard_normal((8, 1000, 64), chunks=(4, 250, 64), dtype="float32") for _ in "qkv")
>>> out = attention(q, k, v, causal=True)
>>> out.chunks
((4, 4), (250, 250, 250, 250), (64,))
>>> out.compute().shape
(8, 1000, 64)
>>> explain(q, k, v, causal=True).blocks
20
"""

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
from dask._task_spec import DataNode, Task
from dask.base import tokenize
from dask.core import istask
from dask.highlevelgraph import HighLevelGraph

import qkv_fast

_AT_A_TIME = 32  # tasks, if there are as many blocks: what follows one after another stays on one worker
_MOST_LARGE = 8  # runs whose partials are large beside blocks of k and v: a worker holds one for each level of the tree
_SMALL = 1 / 8  # share of a block that may be moved so that the block is made anew
_FARTHEST = 2**60  # that a position may be from key 0


class Plan(NamedTuple):
    """What `explain` returns.

    Attributes
    ----------
    bytes_between_workers : int
        No more bytes of elements than these move between workers, whatever each of them computes, while none is lost:
        the blocks and partial results that each task needs. What q, k, v, masks and biases take to be made is not
        among them.
    blocks : int
        Pairs of a block of queries and one of keys that are attended, one task each.
    blocks_hidden : int
        Those that no query sees, which are neither made nor attended.
    block_bytes : int
        The largest block each of q, k and v, and one partial result: a thread of a worker needs a small multiple.
    made_anew : bool
        Whether tasks make the blocks of k and v that they need by themselves, such as read them from a store. Other
        blocks are made once, by tasks of their own, and Dask holds them as long as one task is to come that needs them.
    """

    bytes_between_workers: int
    blocks: int
    blocks_hidden: int
    block_bytes: int
    made_anew: bool


def attention(q: Any, k: Any, v: Any, *, return_lse: bool = False, num_threads: int = 1, **options: Any) -> Any:
    """What `qkv_fast.attention` computes, of Dask arrays that have chunks along the batch, heads, queries and keys.

    Nothing is computed before the result is asked for. Blocks are cut where those of the others end, and never put
    together. The chunks of k and v should be alike, and those of the heads whole groups, so that nothing has to be cut.

    Parameters
    ----------
    q, k, v : dask.array.Array, or arrays in memory
        As in `qkv_fast.attention`; the last axis is one chunk.
    return_lse : bool, default False
        Return the log-sum-exp as well.
    num_threads : int, default 1
        Threads of one task: a worker runs as many tasks at a time as it has threads.
    mask, bias : dask.array.Array, or array in memory
        As in `qkv_fast.attention`. Chunks along queries, keys, heads and batch are those of q and k, or larger.
    **options
        The other arguments of `qkv_fast.attention`, in memory, with the same meaning, but `out`. Positions are those of
        the whole arrays.

    Returns
    -------
    out, or (out, lse) : dask.array.Array
        As in `qkv_fast.attention`, with the chunks of q. Partial results are float32 (float64 for float64), and are
        rounded to q's type once.

    Raises
    ------
    TypeError, ValueError, OverflowError
        As in `qkv_fast.attention`, at once. Arrays that are neither Dask's nor NumPy's, or whose blocks are not;
        arguments in Dask arrays that have to be known at once; chunks of unknown size; several chunks along the last
        axis; chunks of masks that do not fit.

    Notes
    -----
    A block of k or v that one task makes from what is stored, as `dask.array.from_zarr` and elementwise operations on
    it do, is made anew for each block of queries, by the task that attends to it: memory stays bounded, and larger
    chunks of q read less. Others are made once, and Dask holds them: `to_zarr` them first where they are larger than
    memory.

    A log-sum-exp near the lowest float absorbs how many keys there are: a row with such a bias at every key is a mean
    over the means of blocks, and not over all values.

    Examples
    --------
    >>> import dask.array as da
    >>> from qkv_fast.integrations.dask import attention
    >>> q, k, v = (da.ones((2, 6, 4), chunks=(1, 3, 4)) for _ in "qkv")
    >>> out, lse = attention(q, k, v, window=1, return_lse=True)
    >>> lse.chunks
    ((1, 1), (3, 3))
    >>> float(out.sum().compute())
    48.0
    """
    problem = _Problem(q, k, v, options, num_threads)
    name, lse_name = f"attention-{problem.token}", f"attention-lse-{problem.token}"
    graph: dict[Any, Any] = {}
    lse_graph: dict[Any, Any] = {}
    for block in problem.blocks():
        for step in problem.steps(block):
            graph[step.key] = step.task
        graph[name, *problem.index("out", block)] = _result, step.key, problem.dtype
        lse_graph[lse_name, *problem.index("lse", block)] = _log_sum_exp, step.key
    whole = HighLevelGraph.from_collections(name, graph, dependencies=problem.collections)
    out = da.Array(whole, name, problem.chunks("out"), problem.dtype)
    if not return_lse:
        return out
    beside = HighLevelGraph.from_collections(lse_name, lse_graph, dependencies=[out])
    return out, da.Array(beside, lse_name, problem.chunks("lse"), problem.wide)


def explain(q: Any, k: Any, v: Any, *, return_lse: bool = False, num_threads: int = 1, **options: Any) -> Plan:
    """Say what computing the result of `attention` with these arguments takes at most, without computing it.

    Parameters
    ----------
    q, k, v, return_lse, num_threads, **options
        As in `attention`.

    Returns
    -------
    Plan
        The bytes between workers, the blocks, and the memory of one of each.

    Raises
    ------
    TypeError, ValueError, OverflowError
        Where `attention` would.

    Examples
    --------
    >>> import dask.array as da
    >>> from qkv_fast.integrations.dask import explain
    >>> q, k, v = (da.ones((1, 8, 4096, 64), chunks=(1, 8, 1024, 64), dtype="float32") for _ in "qkv")
    >>> plan = explain(q, k, v, causal=True)
    >>> plan.blocks, plan.blocks_hidden, plan.made_anew
    (10, 6, True)
    >>> f"{plan.bytes_between_workers / 2**20:.1f} MiB at most"
    '52.5 MiB at most'
    """
    problem = _Problem(q, k, v, options, num_threads)
    moved, attended, blocks = problem.moved_by_cuts, 0, 0
    for block in problem.blocks():
        for step in problem.steps(block):
            moved += step.moved
            attended += step.attends
        moved += (1 + return_lse) * problem.partial_bytes(block)
        blocks += 1
    pairs = blocks * problem.count("k")
    return Plan(moved, attended, pairs - attended, problem.block_bytes(), problem.made_anew)


class _Step(NamedTuple):
    """One task of the graph, which makes a partial result, and the bytes of what it needs."""

    key: Any
    task: tuple[Any, ...]
    moved: int
    attends: bool


class _Operand(NamedTuple):
    """A Dask array, what each of its axes is, and what makes its blocks where that may be a part of another task, with
    the bytes that this task needs then."""

    array: Any
    axes: tuple[Any, ...]
    nodes: dict[Any, tuple[Any, int]]


class _Problem:
    """Arguments that were checked, as blocks.

    An axis is "h" (query heads), "g" (heads of k and v), "q", "k", "d", "e" (of v), or a number: those left of the
    heads. A block is the number of a block along each axis. `bounds` are where blocks begin and end.
    """

    def __init__(self, q: Any, k: Any, v: Any, options: dict[str, Any], num_threads: int) -> None:
        if "out" in options:
            raise TypeError("attention() got an unexpected keyword argument 'out'")
        options = {name: x for name, x in options.items() if x is not None}
        arrays = {"q": q, "k": k, "v": v} | {name: options.pop(name) for name in ("mask", "bias") if name in options}
        arrays = {name: _as_dask(name, x) for name, x in arrays.items()}
        for name, x in options.items():
            if any(map(dask.is_dask_collection, x if isinstance(x, (tuple, list)) else (x,))):
                raise TypeError(
                    f"attention: {name} must be known at once, got a dask collection; pass {name}.compute()"
                )
        self.options = options | {"num_threads": num_threads}
        _check({name: arrays[name] for name in "qkv"}, self.options)
        q, k, v = (arrays[name] for name in "qkv")
        self.dtype = q.dtype
        self.wide = np.dtype("float64" if q.dtype == np.float64 else "float32")
        self.heads_first = self.options.get("layout", "bhld") == "bhld"

        leading = tuple(range(q.ndim - 3))
        self.axes = {name: self._axes_of(name, x.ndim, leading) for name, x in arrays.items()}
        self.axes["out"] = tuple("e" if axis == "d" else axis for axis in self.axes["q"])
        self.axes["lse"] = (*leading, "h", "q")[-max(q.ndim - 1, 1) :] if q.ndim > 2 else ("q",)
        self.sizes: dict[Any, int] = {}
        for name in "qkv":
            for axis, n in zip(self.axes[name], arrays[name].shape, strict=True):
                self.sizes[axis] = n if self.sizes.get(axis, 1) == 1 else self.sizes[axis]
        self.group = max(self.sizes.get("h", 1) // max(self.sizes.get("g", 1), 1), 1)
        self._check_masks(arrays)
        self.bounds = self._find_bounds(arrays)

        self.moved_by_cuts = 0
        self.operands = {name: self._operand(name, x) for name, x in arrays.items()}
        self.num_blocks = math.prod(map(self.count, self.axes["lse"]))
        self.collections = [operand.array for operand in self.operands.values()]
        k, v = self.operands["k"], self.operands["v"]
        self.made_anew = len(k.nodes) == k.array.npartitions and len(v.nodes) == v.array.npartitions
        self.token = tokenize([x.name for x in self.collections], self.options)
        self._find_positions(leading)

    def _axes_of(self, name: str, ndim: int, leading: tuple[int, ...]) -> tuple[Any, ...]:
        if name in ("mask", "bias"):
            return (*leading, "h", "q", "k")[-ndim:] if ndim > 2 else ("q", "k")[2 - ndim :]
        heads, length, dim = {"q": ("h", "q", "d"), "k": ("g", "k", "d"), "v": ("g", "k", "e")}[name]
        if ndim == 2:
            return length, dim
        before = leading if ndim > 3 else ()
        return (*before, heads, length, dim) if self.heads_first else (*before, length, heads, dim)

    def _check_masks(self, arrays: dict[str, Any]) -> None:
        """What fits is shown with one element: more of them would be looked at, and here they may be many."""
        shown = {name: arrays[name] for name in "qkv"}
        for name in ("mask", "bias"):
            if name in arrays:
                x = arrays[name]
                known = len(self.axes[name]) == x.ndim
                if known and all(n in (1, self.sizes[axis]) for n, axis in zip(x.shape, self.axes[name], strict=True)):
                    x = np.zeros((1,) * x.ndim, x.dtype)
                shown[name] = x
        if len(shown) > 3:
            _check(shown, self.options)

    def _find_bounds(self, arrays: dict[str, Any]) -> dict[Any, list[int]]:
        """Every array's blocks along q, k and what is left of the heads; heads so that each block of query heads reads
        one block of heads of k and v: whole groups, or part of one."""
        found: dict[Any, set[int]] = {axis: {0, n} for axis, n in self.sizes.items()}
        for name in "qkv":
            for axis, n, chunks in zip(self.axes[name], arrays[name].shape, arrays[name].chunks, strict=True):
                if axis in ("d", "e") and len(chunks) > 1:
                    way_out = f"{name}.rechunk({{{arrays[name].ndim - 1}: -1}})"
                    raise ValueError(
                        f"attention: the last axis of {name} must be one chunk, got {chunks}; pass {way_out}"
                    )
                if n == self.sizes[axis]:
                    found[axis].update(itertools.accumulate(chunks))
        if "h" in found:
            group = self.group
            heads = found["h"] | {group * at for at in found["g"]}
            heads |= {at // group * group for at in heads} | {-(-at // group) * group for at in heads}
            found["h"], found["g"] = heads, {at // group for at in heads if at % group == 0}
        return {axis: sorted(bounds) if len(bounds) > 1 else [0, 0] for axis, bounds in found.items()}

    def _operand(self, name: str, x: Any) -> _Operand:
        axes = self.axes[name]
        fitting = tuple(
            self._sizes(axis) if n == self.sizes[axis] else (n,) for axis, n in zip(axes, x.shape, strict=True)
        )
        if name in ("mask", "bias"):
            for axis, n, chunks in zip(axes, x.shape, x.chunks, strict=True):
                if n == self.sizes[axis] and not {*itertools.accumulate(chunks)} <= {*self.bounds[axis]}:
                    raise ValueError(
                        f"attention: the chunks of {name} must end where blocks of q, k and v do, "
                        f"got {x.chunks}; pass {name}.rechunk({fitting})"
                    )
        if x.chunks != fitting:
            pieces = 1  # a piece needs the block that it is cut from
            for axis, chunks in zip(axes, x.chunks, strict=True):
                ends = [0, *itertools.accumulate(chunks)]
                bounds = self.bounds[axis] if ends[-1] == self.sizes[axis] else ends
                pieces *= sum((b - a) * sum(a < at <= b for at in bounds) for a, b in itertools.pairwise(ends))
            self.moved_by_cuts += (pieces + x.size) * x.dtype.itemsize
            x = x.rechunk(fitting)
        return _Operand(x, axes, _made_at_once(x) if name in "kv" else {})

    def _find_positions(self, leading: tuple[int, ...]) -> None:
        """What each sequence has, and how far keys may lie from a position."""
        batch = tuple(self.sizes[axis] for axis in leading)

        def own(name: str, usual: Any) -> Any:
            return np.broadcast_to(np.asarray(self.options.get(name, usual), np.int64), batch)

        self.num_queries, self.num_keys = own("q_lengths", self.sizes["q"]), own("kv_lengths", self.sizes["k"])
        self.starts = own("kv_starts", 0)
        causal, window = self.options.get("causal", False), self.options.get("window")
        ends = 0 if isinstance(causal, str) else self.num_keys - self.num_queries
        self.offsets = own("q_offset", ends)
        self.positions = None
        if "q_positions" in self.options:
            given = np.asarray(self.options["q_positions"], np.int64)
            self.positions = np.broadcast_to(given, (*batch, self.sizes["q"]))
        left, right = window if isinstance(window, (tuple, list)) else (window, window)
        self.left, self.right = left, 0 if causal else right
        ids = self.options.get("segments")
        self.ids = ids and tuple(
            np.broadcast_to(np.asarray(x, np.int64), (*batch, self.sizes[axis]))
            for x, axis in zip(ids, "qk", strict=True)
        )

    # Where blocks lie.

    def count(self, axis: Any) -> int:
        return len(self.bounds[axis]) - 1

    def _sizes(self, axis: Any) -> tuple[int, ...]:
        return tuple(b - a for a, b in itertools.pairwise(self.bounds[axis]))

    def chunks(self, name: str) -> tuple[tuple[int, ...], ...]:
        return tuple(map(self._sizes, self.axes[name]))

    def blocks(self) -> Iterator[dict[Any, int]]:
        """Those of the result."""
        axes = self.axes["lse"]
        for numbers in itertools.product(*(range(self.count(axis)) for axis in axes)):
            yield dict(zip(axes, numbers, strict=True))

    def index(self, name: str, block: dict[Any, int]) -> tuple[int, ...]:
        """Of the block of an array that `block` reads or writes."""
        if "h" in block:
            head = self.bounds["h"][block["h"]] // self.group
            block = block | {"g": bisect_right(self.bounds["g"], head, hi=self.count("g")) - 1}
        operand = self.operands.get(name)
        counts = operand.array.numblocks if operand else (2,) * len(self.axes[name])
        return tuple(0 if n == 1 else block.get(axis, 0) for axis, n in zip(self.axes[name], counts, strict=True))

    def _span(self, axis: Any, block: dict[Any, int]) -> tuple[int, int]:
        return self.bounds[axis][block[axis]], self.bounds[axis][block[axis] + 1]

    def _sequences(self, block: dict[Any, int]) -> tuple[slice, ...]:
        return tuple(slice(*self._span(axis, block)) for axis in self.axes["lse"] if isinstance(axis, int))

    def _bytes(self, name: str, block: dict[Any, int]) -> int:
        x = self.operands[name].array
        sizes = (chunks[i] for chunks, i in zip(x.chunks, self.index(name, block), strict=True))
        return int(math.prod(sizes) * x.dtype.itemsize)

    def partial_bytes(self, block: dict[Any, int]) -> int:
        rows = math.prod(b - a for a, b in (self._span(axis, block) for axis in self.axes["lse"]))
        return rows * (self.sizes["e"] + 1) * self.wide.itemsize

    def block_bytes(self) -> int:
        largest = sum(
            math.prod(map(max, x.array.chunks)) * x.array.dtype.itemsize for x in list(self.operands.values())[:3]
        )
        rows = math.prod(max(self._sizes(axis)) for axis in self.axes["lse"])
        return int(largest + rows * (self.sizes["e"] + 1) * self.wide.itemsize)

    # What is done with them.

    def steps(self, block: dict[Any, int]) -> Iterator[_Step]:
        """The tasks for one block of the result, the last of which makes its partial over all keys."""
        seen = self._visible(block)
        place = tuple(block.values())
        size = self.partial_bytes(block)
        beside = sum(self._bytes(name, block | {"k": seen[0]}) for name in "kv")
        most = max(_MOST_LARGE, 2 ** min(beside // max(size, 1), 30))
        runs = min(len(seen), most, -(-_AT_A_TIME // self.num_blocks))
        made: list[Any] = []
        for run in range(runs):
            before: list[Any] = []
            for at in seen[run * len(seen) // runs : (run + 1) * len(seen) // runs]:
                options = self._options(block | {"k": at}, at == seen[0])
                names = list(self.operands)
                needs = [self._need(name, block | {"k": at}) for name in names]
                attend = functools.partial(_attend, names[3:], options)
                key = (f"attention-partial-{self.token}", *place, at)
                moved = sum(n for _, n in needs) + size * len(before)
                yield _Step(key, (attend, *(need for need, _ in needs), *before), moved, True)
                before = [key]
            made += before
        for level in itertools.count():
            if len(made) == 1:
                return
            for i in range(0, len(made) - 1, 2):
                key = (f"attention-merged-{self.token}", *place, level, i)
                yield _Step(key, (_merge, made[i], made[i + 1], self.options.get("layout", "bhld")), 2 * size, False)
                made[i] = key
            made = made[::2]

    def _need(self, name: str, block: dict[Any, int]) -> tuple[Any, int]:
        """What stands for a block in a task, and the bytes that come from another one."""
        operand = self.operands[name]
        key = (operand.array.name, *self.index(name, block))
        return operand.nodes[key] if key in operand.nodes else (key, self._bytes(name, block))

    def _visible(self, block: dict[Any, int]) -> list[int]:
        """Numbers of the blocks of keys that a query may see, or of one, whose partial says that none is seen."""
        a, b = self._span("q", block)
        at = self._sequences(block)
        first, last = self.starts[at], self.num_keys[at]
        num_rows = np.minimum(self.num_queries[at], b) - a
        if self.positions is None:
            low, high = a + self.offsets[at], a + self.offsets[at] + num_rows - 1
        else:
            rows = self.positions[(*at, slice(a, b))]
            low, high = rows.min(axis=-1, initial=_FARTHEST), rows.max(axis=-1, initial=-_FARTHEST)
        if self.left is not None:
            first = np.maximum(first, low - min(self.left, 2 * _FARTHEST))
        if self.right is not None:
            last = np.minimum(last, high + min(self.right, 2 * _FARTHEST) + 1)
        begins, ends = np.array(self.bounds["k"][:-1]), np.array(self.bounds["k"][1:])
        first, last = (np.where((num_rows > 0) & (first < last), x, -1).reshape(-1, 1) for x in (first, last))
        seen: Any = ((first < ends) & (last > begins)).any(axis=0)
        if self.ids is not None and b > a:
            ids = self.ids[0][(*at, slice(a, b))]
            for i in np.flatnonzero(seen):
                others = self.ids[1][(*at, slice(begins[i], ends[i]))]
                seen[i] = others.size and ids.size and others.min() <= ids.max() and ids.min() <= others.max()
        return np.flatnonzero(seen).tolist() or [0]

    def _options(self, block: dict[Any, int], first: bool) -> dict[str, Any]:
        """Arguments for one block of queries and one of keys, whose positions count from its own first key."""
        (a, b), (c, d), at = self._span("q", block), self._span("k", block), self._sequences(block)
        found = dict(self.options)
        if self.left is not None or self.right is not None or "alibi_slopes" in found:
            if self.positions is None:
                found["q_offset"] = np.clip(self.offsets[at] + a - c, -_FARTHEST, _FARTHEST)
            else:
                found["q_positions"] = np.maximum(self.positions[(*at, slice(a, b))] - c, -_FARTHEST)
        else:
            found.pop("q_offset", None)
            found.pop("q_positions", None)
        if isinstance(found.get("causal"), str):
            found["causal"] = True
        if "q_lengths" in found:
            found["q_lengths"] = np.clip(self.num_queries[at] - a, 0, b - a)
        if "kv_lengths" in found:
            found["kv_lengths"] = np.clip(self.num_keys[at] - c, 0, d - c)
        if "kv_starts" in found:
            found["kv_starts"] = np.clip(self.starts[at] - c, 0, np.clip(self.num_keys[at] - c, 0, d - c))
        if self.ids is not None:
            found["segments"] = tuple(
                x[(*at, slice(*span))] for x, span in zip(self.ids, ((a, b), (c, d)), strict=True)
            )
        heads = slice(*self._span("h", block)) if "h" in block else slice(None)
        for name in ("alibi_slopes", "sinks"):
            if name in found:
                found[name] = np.asarray(found[name])[heads]
        if not first:  # a sink counts once
            found.pop("sinks", None)
        return found


def _as_dask(name: str, x: Any) -> Any:
    if not isinstance(x, da.Array):
        if isinstance(x, (list, tuple, int, float, bool)):
            x = np.asarray(x)
        if type(x) is not np.ndarray:
            kind = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}".removeprefix("builtins.")
            raise TypeError(
                f"attention: {name} must be a dask or NumPy array, got {kind}; pass dask.array.from_array({name})"
            )
        return da.from_array(x, chunks=x.shape)
    if any(map(math.isnan, x.shape)):
        raise ValueError(
            f"attention: {name} has chunks of unknown size, got {name}.shape={x.shape}; "
            f"pass {name}.compute_chunk_sizes()"
        )
    if type(x._meta) is not np.ndarray:
        raise TypeError(f"attention: {name} must have blocks that are NumPy arrays, got {type(x._meta).__name__}")
    return x


def _check(arrays: dict[str, Any], options: dict[str, Any]) -> None:
    """By attention's own rules, on arrays of these shapes that take no memory."""
    stand_ins = {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in arrays.items()}
    try:
        qkv_fast.explain(**stand_ins, **options)
    except MemoryError:  # for a result that is larger than memory, as it may be here
        qkv_fast.explain(**stand_ins | {"v": stand_ins["v"][..., :0]}, **options)


def _made_at_once(x: Any) -> dict[Any, tuple[Any, int]]:
    """Of the blocks that one task makes from what is stored: those tasks, and the bytes of arrays in memory that each
    needs. They go wherever a block is made, so they have to be small beside it."""
    (optimized,) = dask.optimize(x)
    graph = dict(optimized.__dask_graph__())
    found = {}
    for key in graph:
        if key[0] != x.name:
            continue
        node: Any = graph.get(getattr(graph[key], "target", None), graph[key])  # of a task that others are a part of
        if istask(node) and all(at in graph and not istask(graph[at]) for at in node.dependencies):  # no futures
            held: int = _bytes_held(node) + sum(_bytes_held(graph[at]) for at in node.dependencies)
            size = x.dtype.itemsize * math.prod(chunks[i] for chunks, i in zip(x.chunks, key[1:], strict=True))
            if held <= size * _SMALL:
                found[key] = node, held
    return found


def _bytes_held(part: Any) -> int:
    """Of the arrays in memory within a part of a task."""
    if type(part) is np.ndarray:
        return int(part.nbytes)
    if isinstance(part, DataNode):
        part = [part.value]
    elif isinstance(part, Task):
        part = [*part.args, *part.kwargs.values()]
    elif isinstance(part, dict):
        part = part.values()
    elif not isinstance(part, (tuple, list)):
        return 0
    return sum(map(_bytes_held, part))


def _attend(names: list[str], options: dict[str, Any], q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
    """The partial result over a block of keys, and over those before it in the run, if their partial is given."""
    out = None
    if q.dtype.itemsize == 2:
        batch = np.broadcast_shapes(q.shape[:-3], *(x.shape[:-3] for x in (k, v)))
        out = np.empty((*batch, *q.shape[-3:-1], v.shape[-1]), np.float32)
    masks, before = dict(zip(names, rest, strict=False)), rest[len(names) :]
    found = qkv_fast.attention(q, k, v, **options, **masks, out=out, return_lse=True)
    return _merge(before[0], found, options.get("layout", "bhld")) if before else found


def _merge(a: Any, b: Any, layout: str) -> tuple[Any, Any]:
    return qkv_fast.merge_partials(*zip(a, b, strict=True), layout=layout)


def _result(partial: Any, dtype: Any) -> Any:
    with np.errstate(all="ignore"):  # beyond float16 a number is infinite, as in attention
        return partial[0].astype(dtype, copy=False)


def _log_sum_exp(partial: Any) -> Any:
    return partial[1]
