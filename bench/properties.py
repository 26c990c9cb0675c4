"""What is asked of the library beside the time of a workload: ratios, memory, import time.

Each function yields `Measured` values with the bounds that they are held to. Ratios come from interleaved
rounds in this process; memory and import time are each taken in a process of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

import qkv_fast

from .. import _runtime
from . import data, errors, hosts, limits, machine, spotlight, surprises, surroundings, work
from .cases import CASES, Case, case
from .measured import Measured, Property, child, ratio
from .method import Local, Summary, interleave, rotate
from .ours import Ours, ours
from .runner import threads_text
from .worker import first_call_memory


def find(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def measure_window(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """A narrow causal window on a long sequence against what its share of the causal pairs predicts."""
    windowed = find("1x8x8192-d64-causal-window255_0")
    causal = replace(windowed, window=None)
    share = windowed.visible_pairs() / causal.visible_pairs()
    for n in threads:
        found = ratio(ours(windowed, n), ours(causal, n), seconds / len(threads))
        note = f"{100 * share:.1f} % of the causal pairs are visible"
        name = f"{windowed.name}, {threads_text(n)}: time over visible share"
        yield Measured(name, found.median / share, "x", 1.25, spread=found.spread, note=note)


def measure_blhd(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """(batch, length, heads, dim) arrays against contiguous heads."""
    for name in ("1x12x2048-d64", "1x8x2048-d128"):
        contiguous = find(name)
        for n in threads:
            views = replace(contiguous, layout="blhd")
            found = ratio(ours(views, n), ours(contiguous, n), seconds / (2 * len(threads)))
            yield Measured(f'layout="blhd" {name}, {threads_text(n)}', found.median, "x", 1.05, spread=found.spread)


def changes(heads: int, length: int) -> dict[str, tuple[dict, float]]:
    """What a call may be given beside q, k and v, and how much longer it may then take."""
    rng, matrix = np.random.default_rng(0), (1, 1, length, length)
    return {
        "bias (1, 1, L, L)": ({"bias": rng.standard_normal(matrix, dtype="float32")}, 1.12),
        "mask (1, 1, L, L), half at random": ({"mask": rng.random(matrix) < 0.5}, 1.12),
        "softcap 50": ({"softcap": 50.0}, 1.25),
        "softcap 1": ({"softcap": 1.0}, 1.25),
        "ALiBi": ({"alibi_slopes": qkv_fast.alibi_slopes(heads)}, 1.06),
        "sinks": ({"sinks": np.zeros(heads)}, 1.01),
    }


def measure_changes(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Calls with a mask, a bias or the like against the call without."""
    plain = case("1x12x1024", 64)
    q, k, v = work.inputs(plain)
    asked, out = changes(plain.heads, plain.q_len), np.empty_like(q)
    for n in threads:
        call = partial(qkv_fast.attention, q, k, v, out=out, num_threads=n)
        calls = [Local("plain", call), *(Local(name, partial(call, **given)) for name, (given, _) in asked.items())]
        rounds = interleave(calls, budget=seconds / len(threads))
        for name, (_, bound) in asked.items():
            found = rounds.ratio(name, "plain")
            yield Measured(f"{name}, {plain.name}, {threads_text(n)}", found.median, "x", bound, spread=found.spread)


def measure_step_changes(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """One query over many keys in memory, with a bias or the like, against the call without."""
    for name in ("decode:1x32x1-d128-k4096", "decode:1x32x1-d128-kv8-k4096"):
        plain = find(name)
        sets, rng, row = list(work.sets(plain)), np.random.default_rng(0), (1, 1, 1, plain.kv_len)
        asked = {
            "bias (1, 1, 1, L)": {"bias": rng.standard_normal(row, dtype="float32")},
            "mask (1, 1, 1, L), half at random": {"mask": rng.random(row) < 0.5},
            "softcap 50": {"softcap": 50.0},
            "softcap 1": {"softcap": 1.0},
            "ALiBi": {"alibi_slopes": qkv_fast.alibi_slopes(plain.heads)},
        }
        for n in threads:
            calls = [
                Local(title, rotate([partial(qkv_fast.attention, *s, num_threads=n, **given) for s in sets]))
                for title, given in {"plain": {}, **asked}.items()
            ]
            rounds = interleave(calls, budget=seconds / (2 * len(threads)))
            for title in asked:
                found = rounds.ratio(title, "plain")
                yield Measured(f"{title}, {name}, {threads_text(n)}", found.median, "x", 1.1, spread=found.spread)


def measure_drafts(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """A few drafted tokens against a single one, both over keys in memory."""
    four, one = find("decode:1x32x4-d128-kv8-k4096"), find("decode:1x32x1-d128-kv8-k4096")
    for n in threads:
        found = ratio(ours(four, n), ours(one, n), seconds / len(threads))
        computing = work.flops(four) / limits.rate("float32", n, 0.1)
        arithmetic = computing * limits.rate("read", n, 0.1) / work.bytes_of(one)
        note = f"{arithmetic:.2f} x if four ran at the FMA peak and one at the read bandwidth"
        name = f"4 queries over 1, {four.name}, {threads_text(n)}"
        yield Measured(name, found.median, "x", 1.6, spread=found.spread, note=note)


def measure_cache_calls(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """What `KVCache` adds to attention over the arrays that it holds, and to a copy of a token's key and value. Of one
    thread, and with so few keys that the call is most of it."""
    token = case("1x8x1", 64, kv_len=256)
    q, *held = work.inputs(token)
    cache = qkv_fast.KVCache(token.batch, token.kv_heads, token.dim, token.kv_len + 1)
    cache.append(*held)
    new, keys, values, room = held[0][:, :, :1].copy(), cache.keys, cache.values, np.empty_like(held[0])

    def copy() -> None:
        room[:, :, 1:2] = new
        room[:, :, 2:3] = new

    def append() -> None:
        cache.append(new, new)
        cache.truncate(token.kv_len)

    calls = {
        "attention": partial(qkv_fast.attention, q, keys, values, num_threads=1),
        "attend": partial(cache.attend, q, num_threads=1),
        "copy": copy,
        "append": append,
        "truncate": partial(cache.truncate, token.kv_len),
    }
    found = interleave([Local(name, call) for name, call in calls.items()], budget=seconds).seconds
    took = {name: np.array(times) * 1e6 for name, times in found.items()}
    over = Summary.of(list(took["attend"] - took["attention"]))
    yield Measured("KVCache.attend beyond attention", over.median, "µs", 3.0, spread=over.spread)
    over = Summary.of(list(took["append"] - took["truncate"] - took["copy"]))
    yield Measured("KVCache.append of a token beyond copies", over.median, "µs", 5.0, spread=over.spread)


def measure_documents(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Documents that attend to themselves alone, against what their share of the pairs predicts."""
    plain, documents = case("1x12x4096", 64), 8
    q, k, v = work.inputs(plain)
    ids, out = np.arange(plain.q_len) // (plain.q_len // documents), np.empty_like(q)
    given = {"segments": (ids, ids), "mask": (ids[:, None] == ids)[None, None]}
    for n in threads:
        call = partial(qkv_fast.attention, q, k, v, out=out, num_threads=n)
        calls = [Local("plain", call), *(Local(name, partial(call, **{name: x})) for name, x in given.items())]
        rounds = interleave(calls, budget=seconds / len(threads))
        for name in given:
            found = rounds.ratio(name, "plain")
            title = f"{documents} documents by {name}, {plain.name}, {threads_text(n)}: time over visible share"
            yield Measured(title, found.median * documents, "x", 1.2, spread=found.spread)


def measure_ragged(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Many short sequences, packed, against one long one: operations per second."""
    long = case("1x12x2048", 64)
    one, one_out = work.inputs(long), np.empty((1, long.heads, long.q_len, long.value_dim), long.dtype)
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(20, 300, 64).astype(int))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    packed = rng.standard_normal((3, starts[-1], long.heads, long.dim), dtype=long.dtype)
    out = np.empty_like(packed[0])
    pairs = float((lengths**2).sum()) / long.q_len**2
    for n in threads:
        calls = [
            Local("one", partial(qkv_fast.attention, *one, out=one_out, num_threads=n)),
            Local("ragged", partial(qkv_fast.attention_varlen, *packed, starts, starts, out=out, num_threads=n)),
        ]
        found = interleave(calls, budget=seconds / len(threads)).ratio("one", "ragged")
        given = f"{lengths.size} sequences of {lengths.min()} to {lengths.max()}, {threads_text(n)}"
        title = f"{given}: speed over one of {long.q_len}"
        yield Measured(title, found.median * pairs, "x", 0.70, 0.85, more=True, spread=found.spread)


def measure_scaling(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """One thread's time over two threads'; the note says what the FMA peak itself gains."""
    if machine.cpu_count() < 2:
        return
    peak = _runtime.peak_flops("float32", 2, 0.1) / _runtime.peak_flops("float32", 1, 0.1)
    names = (
        "1x12x512-d64",
        "1x12x2048-d64",
        "1x12x2048-d64-causal",
        "1x8x1024-d256-causal",
        "sd:1x8x4096-d40",
    )
    for name in names:
        found = ratio(ours(find(name), 1), ours(find(name), 2), seconds / len(names))
        note = f"FMA peak {peak:.2f} x"
        yield Measured(f"2 threads, {name}", found.median, "x", 1.9, more=True, spread=found.spread, note=note)


ACROSS = (((8, 2048, 2048), 1), ((4096, 4096), 0), ((12, 512, 512), 1))  # (shape, axis), as long as the last axis


def measure_softmax_axis(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Softmax down columns against along rows: the same number of equally long sums, other strides."""
    for shape, axis in ACROSS:
        x = np.random.default_rng(0).standard_normal(shape, dtype="float32")
        out = np.zeros_like(x)
        for n in threads:
            last = partial(qkv_fast.softmax, x, out=out, num_threads=n)
            found = ratio(partial(last, axis=axis), last, seconds / (len(ACROSS) * len(threads)))
            name = f"softmax {'x'.join(map(str, shape))}, axis {axis} over last, {threads_text(n)}"
            yield Measured(name, found.median, "x", 1.3, spread=found.spread)


def measure_explain(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """What it takes to plan a call, which is all that `explain` does before it is printed."""
    usual = find("1x12x2048-d64-causal")
    q, k, v = work.inputs(usual)
    call = Local("explain", partial(qkv_fast.explain, q, k, v, **usual.arguments()))
    found = interleave([call], budget=seconds).time(call.name)
    yield Measured(f"explain {usual.name}", found.median * 1e6, "µs", 50.0, spread=found.spread)


def measure_fork_join(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """An empty parallel loop, over and over, on the largest thread count."""
    n = max(threads)
    if n == 1:
        return
    _runtime.fork_join_seconds(n, 1000)
    found = Summary.of([_runtime.fork_join_seconds(n, 5000) for _ in range(9)])
    yield Measured(f"hot fork-join, {threads_text(n)}", found.median * 1e6, "µs", 3.0, spread=found.spread)


def measure_memory(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Growth of a fresh process in one long call, beyond the output, per thread."""
    long = case("1x8x16384", 64)
    output = long.heads * long.q_len * long.value_dim * np.dtype(long.dtype).itemsize
    for n in threads:
        added = first_call_memory(Ours, replace(long, isa=qkv_fast.isa()), n)
        if added is None:
            return
        name = f"memory beyond the output per thread, {long.name}, {threads_text(n)}"
        yield Measured(name, (added - output) / n / 2**20, "MB", 2.0)


def measure_training_memory(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Growth of a fresh process in one long step, per thread, beyond what attention returns, the three gradients and
    four times that of queries."""
    long = case("1x8x16384", 64, causal=True, operation="training", isa=qkv_fast.isa())
    queries = long.heads * long.q_len * long.dim * np.dtype(long.dtype).itemsize
    for n in threads:
        added = first_call_memory(Ours, long, n)
        if added is None:
            return
        name = f"memory of a step beyond 8 results per thread, {long.name}, {threads_text(n)}"
        yield Measured(name, (added - 8 * queries) / n / 2**20, "MB", 4.0)


def measure_linear_halves(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """A linear layer in bfloat16 against float32, times as fast: more where its pairs are multiplied."""
    floor, aim = (1.6, 2.0) if qkv_fast.isa().endswith("bf16") else (0.9, 1.0)
    wide, half = find("linear:1x1x512-d1024"), find("linear:1x1x512-d1024-bf16")
    for n in threads:
        found = ratio(ours(wide, n), ours(half, n), seconds / len(threads))
        name = f"speed over float32, {half.name}, {threads_text(n)}"
        yield Measured(name, found.median, "x", floor, aim, more=True, spread=found.spread)


IMPORT = """
import time
import numpy
start = time.perf_counter()
import qkv_fast
print(time.perf_counter() - start)
"""


def measure_import(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Importing the package where NumPy is already imported, with byte code as an installer leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        child(IMPORT, environment=compiled)  # from now on it is there, and the files are in the page cache
        found = Summary.of([float(child(IMPORT, environment=compiled)) for _ in range(9)])
    yield Measured("import beyond NumPy's", found.median * 1e3, "ms", 10.0, spread=found.spread)


PROPERTIES: tuple[Property, ...] = (
    Property("window", ("foundation", "prefill"), measure_window),
    Property("blhd", ("foundation", "prefill"), measure_blhd),
    Property("scaling", ("foundation", "prefill"), measure_scaling),
    Property("changes", ("masks",), measure_changes),
    Property("step-changes", ("decode",), measure_step_changes),
    Property("drafts", ("decode",), measure_drafts),
    Property("cache-calls", ("decode",), measure_cache_calls),
    Property("documents", ("masks",), measure_documents),
    Property("ragged", ("masks",), measure_ragged),
    Property("softmax-axis", ("stages",), measure_softmax_axis),
    Property("explain", ("stages",), measure_explain),
    Property("fork-join", ("foundation", "small"), measure_fork_join),
    Property("memory", ("foundation", "prefill"), measure_memory, everywhere=True),
    Property("training-memory", ("grad",), measure_training_memory, everywhere=True),
    Property("linear-halves", ("layers",), measure_linear_halves, everywhere=True),
    Property("import", ("foundation", "small"), measure_import),
    Property("after-product", ("surroundings",), surroundings.measure_after_product, everywhere=True),
    Property("gaps", ("surroundings",), surroundings.measure_gaps, everywhere=True),
    Property("block", ("surroundings",), surroundings.measure_block),
    Property("layers-block", ("layers",), surroundings.measure_layers, everywhere=True),
    Property("data", ("data",), data.measure_attention, everywhere=True),
    Property("data-stages", ("data",), data.measure_stages, everywhere=True),
    *(Property(name, ("errors",), function, everywhere=True) for name, function in errors.MEASURES.items()),
    Property("over-attention", ("spotlight",), spotlight.measure_over_attention, everywhere=True),
    Property("last-rows", ("spotlight",), spotlight.measure_rows, everywhere=True),
    *(Property(kind, ("surprises",), partial(surprises.measure, kind), everywhere=True) for kind in surprises.TWINS),
    Property("cache-bandwidth", ("surprises",), surprises.measure_bandwidth, everywhere=True),
    Property("cache-halves", ("surprises",), surprises.measure_halves, everywhere=True),
    *(
        Property(name, ("hosts",), partial(hosts.measure_models, model), everywhere=True)
        for name, model in zip(("bert", "llama-prefill", "llama-decode"), hosts.MODELS, strict=True)
    ),
    Property("adapters", ("hosts",), hosts.measure_adapters, everywhere=True),
    Property("dask-workers", ("hosts",), hosts.measure_workers, everywhere=True),
    Property("beyond-result", ("spotlight",), spotlight.measure_memory, everywhere=True),
)
