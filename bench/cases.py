"""Named workloads: one list for the benchmark, for tuning and for tests.

A `Case` is data: shapes, type, masks, and the goal it is held to. What is timed is its operation (operations.py,
questions.py), and work.py brings the two together.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from .problem import HALVES, Problem

SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class Goal:
    """What a case must reach; `unit` is "peak" (share of the limit), "seconds", or a peer's name: times as fast."""

    unit: str
    floor: float
    aim: float
    everywhere: bool = False  # whether it is for every CPU; else for those like the one that it is from

    def verdict(self, value: float) -> str:
        """One of "aim", "floor" and "below"."""
        reached = (lambda bound: value <= bound) if self.unit == "seconds" else (lambda bound: value >= bound)
        return "aim" if reached(self.aim) else "floor" if reached(self.floor) else "below"


@dataclass(frozen=True, kw_only=True)
class Case(Problem):
    """One workload: a problem with a name, what is done with it, how it is run, and the goal it is held to."""

    name: str
    operation: str = "attention"  # a name in work.OPERATIONS
    isa: str | None = None  # CPU path that the case is about; None: the one in use
    threads: tuple[int, ...] | None = None  # thread counts that the case is about; None: any
    stream: bool = False  # limited by memory: inputs come from there and not from a cache; GB/s instead of GF/s
    suites: tuple[str, ...] = ()
    goal: Goal | None = None


def case(
    shape: str,
    dim: int,
    *,
    kv_heads: int | None = None,
    kv_len: int | None = None,
    value_dim: int | None = None,
    label: str = "",
    **options,
) -> Case:
    """A case from "BxHxL" and D; what is not said follows, the name too (`label` goes in front of it)."""
    batch, heads, q_len = (int(part) for part in shape.split("x"))
    name = f"{shape}-d{dim}"
    if kv_heads:
        name += f"-kv{kv_heads}"
    if kv_len:
        name += f"-k{kv_len}"
    if options.get("causal"):
        name += "-causal"
    if options.get("window"):
        name += "-window" + "_".join("inf" if side is None else str(side) for side in options["window"])
    if options.get("kv_lengths"):
        name += "-ragged"
    if options.get("layout", "bhld") != "bhld":
        name += "-" + options["layout"]
    if options.get("dtype", "float32") != "float32":
        name += "-" + SHORT[options["dtype"]]
    if options.get("kv_dtype"):
        name += "-kv_" + SHORT[options["kv_dtype"]]
    if options.get("isa"):
        name += "@" + options["isa"]
    return Case(
        name=f"{label}:{name}" if label else name,
        batch=batch,
        heads=heads,
        q_len=q_len,
        dim=dim,
        kv_heads=kv_heads or heads,
        kv_len=kv_len or q_len,
        value_dim=value_dim or dim,
        **options,
    )


def _peak(floor: int, aim: int) -> Goal:
    return Goal("peak", floor / 100, aim / 100)


def _micros(floor: float, aim: float) -> Goal:
    return Goal("seconds", floor * 1e-6, aim * 1e-6)


def _ask(question: str, times: float) -> Case:
    """A question of spotlight against the whole matrix in torch."""
    goal = Goal("torch", times, times, everywhere=True)
    return case("1x8x2048", 64, label=question, operation=question, suites=("spotlight",), goal=goal)


def _train(shape: str, dim: int, floor: float, aim: float, **options) -> Case:
    """Forward and backward, against torch, which multiplies bfloat16 on tiles where there are any."""
    goal = Goal("torch", floor, aim, everywhere=options["dtype"] == "float32")
    return case(shape, dim, label="train", operation="training", suites=("grad",), goal=goal, **options)


def _linear(rows: int, **options) -> Case:
    """Rows of 1024 elements times weights (4096, 1024)."""
    label = options.setdefault("operation", "linear")
    return case(f"1x1x{rows}", 1024, label=label, value_dim=4096, suites=("layers",), **options)


def _rope(operation: str, floor: float, aim: float) -> Case:
    """A whole prompt's queries, as a share of the rate of copies."""
    goal = Goal("peak", floor, aim, everywhere=True)
    return case("1x32x2048", 128, label=operation, operation=operation, suites=("layers",), goal=goal)


def _ragged_lengths(batch: int, longest: int) -> tuple[int, ...]:
    """Lengths of a padded batch, spread evenly from a quarter of the longest up to it."""
    return tuple(math.ceil(longest * (0.25 + 0.75 * i / (batch - 1))) for i in range(batch))


def _decode(shape: str, kv_heads: int | None, kv_len: int, goal: Goal | None, **options) -> Case:
    """New tokens against long caches that are read from memory."""
    options |= {"kv_heads": kv_heads, "kv_len": kv_len, "goal": goal}
    return case(shape, 128, label="decode", stream=True, suites=("decode",), **options)


# Single tokens: BxHxL, key heads (None: as many as query heads), keys.
STEPS = (("1x32x1", None, 4096), ("1x32x1", 8, 4096), ("1x32x1", 8, 32768), ("8x32x1", 8, 4096))

# Questions of spotlight, and how many times as fast as torch each has to be.
ASKED = {
    "received": 2.5,
    "received+lse": 4.0,
    "pooled": 2.5,
    "pooled+lse": 4.0,
    "top_keys": 4.5,
    "entropy": 6.0,
    "largest": 2.0,
}

# Goals are those of the AVX-512 test machine (2 cores, Zen 4); on another machine they are only a comparison.
CASES: tuple[Case, ...] = (
    case("1x12x2048", 64, suites=("foundation", "prefill", "masks", "main"), goal=_peak(86, 91)),
    case("1x8x2048", 128, suites=("foundation", "prefill"), goal=_peak(89, 93)),
    case("1x12x2048", 64, causal=True, suites=("foundation", "quick", "prefill", "masks", "main"), goal=_peak(82, 87)),
    case("1x8x2048", 128, causal=True, suites=("foundation", "prefill", "main"), goal=_peak(86, 90)),
    case("1x8x1024", 256, causal=True, suites=("foundation", "prefill"), goal=_peak(84, 88)),
    case("1x12x512", 64, suites=("foundation", "quick", "prefill", "main"), goal=_peak(81, 86)),
    case("1x8x4096", 40, label="sd", suites=("foundation", "prefill"), goal=_peak(82, 87)),
    case("32x12x128", 32, suites=("foundation", "quick", "prefill", "main"), goal=_peak(62, 72)),
    case("1x8x128", 64, threads=(1,), suites=("foundation", "small"), goal=_peak(74, 80)),
    case("1x12x2048", 64, isa="avx2", suites=("foundation",), goal=_peak(79, 85)),
    case("1x8x2048", 128, isa="avx2", suites=("foundation",), goal=_peak(84, 89)),
    case("1x12x2048", 64, dtype="float64", suites=("foundation", "prefill", "main"), goal=_peak(76, 83)),
    # 16 bits, whose goals are shares of the peak that the path in use has for them.
    case("1x12x2048", 64, dtype="bfloat16", suites=("half",), goal=_peak(78, 86)),
    case("1x8x2048", 128, dtype="bfloat16", suites=("half",), goal=_peak(83, 89)),
    case("1x12x2048", 64, dtype="bfloat16", causal=True, suites=("half",), goal=_peak(74, 82)),
    case("32x12x128", 32, dtype="bfloat16", suites=("half",), goal=_peak(45, 55)),
    case("1x12x2048", 64, dtype="float16", suites=("half",), goal=_peak(83, 89)),
    case("1x8x2048", 128, dtype="float16", suites=("half",), goal=_peak(83, 89)),
    case("1x8x2048", 128, kv_dtype="bfloat16", suites=("half",), goal=_peak(83, 89)),
    case("1x8x2048", 128, kv_dtype="float16", suites=("half",), goal=_peak(83, 89)),
    case("1x12x2048", 64, dtype="bfloat16", isa="avx2", suites=("half",), goal=_peak(72, 80)),
    # Calls so small that Python and the thread pool decide.
    case("1x8x1", 64, suites=("foundation", "small", "quick", "main"), goal=_micros(5, 4)),
    case("1x1x64", 64, suites=("foundation", "small", "quick"), goal=_micros(18, 15)),
    case("1x1x16", 32, suites=("small",)),
    case("1x12x64", 64, suites=("small",)),
    case("8x12x32", 64, suites=("small",)),
    case("1x8x128", 64, causal=True, suites=("small",)),
    # Shapes of models.
    case("8x12x384", 64, label="bert", suites=("prefill",)),
    case("8x12x384", 64, label="bert", kv_lengths=_ragged_lengths(8, 384), suites=("prefill", "masks")),
    case("1x12x1024", 64, label="gpt2", causal=True, suites=("prefill",)),
    case("1x32x2048", 128, label="llama", kv_heads=8, causal=True, suites=("prefill",)),
    case("1x8x1500", 64, label="whisper", suites=("prefill",)),
    case("8x12x197", 64, label="vit", suites=("prefill",)),
    case("1x16x64", 64, label="cross", kv_len=4096, suites=("prefill",)),
    case("1x12x2048", 64, layout="blhd", suites=("prefill",)),
    # What positions and lengths hide.
    case("1x8x8192", 64, causal=True, window=(255, 0), suites=("prefill", "masks")),
    case("1x12x2048", 64, window=(128, 128), suites=("masks",)),
    case("1x12x512", 64, kv_len=2048, causal=True, suites=("masks",)),
    case("4x8x512", 64, kv_len=2048, causal=True, kv_lengths=_ragged_lengths(4, 2048), suites=("masks",)),
    # One new token per sequence against long caches, read from memory.
    *(_decode(*shape, _peak(*goal)) for shape, goal in zip(STEPS, ((85, 95), *[(75, 90)] * 3), strict=True)),
    *(_decode(*shape, _peak(70, 85), dtype=dtype) for dtype in HALVES for shape in STEPS),
    *(
        _decode(*shape, _peak(*goal), kv_dtype=stored, operation="cache")
        for stored, alone, grouped in (("int8", (75, 88), (55, 75)), ("int4", (40, 60), (25, 40)))
        for shape, goal in zip(STEPS, (alone, *[grouped] * 3), strict=True)
    ),
    # A few drafted tokens (the first row's goal is in properties.py); from 8 on bound by arithmetic.
    _decode("1x32x4", 8, 4096, None),
    case("1x32x8", 128, label="decode", kv_heads=8, kv_len=4096, suites=("decode",), goal=_peak(70, 82)),
    case("1x32x16", 128, label="decode", kv_heads=8, kv_len=4096, suites=("decode",), goal=_peak(70, 82)),
    case("1x12x1", 64, label="decode", kv_len=1024, suites=("decode", "quick", "main")),
    # The same work, batch * heads * length**2, in sequences of 128 to 4096.
    case("128x8x128", 64, label="scaling", suites=("scaling",)),
    case("32x8x256", 64, label="scaling", suites=("scaling",)),
    case("8x8x512", 64, label="scaling", suites=("scaling",)),
    case("2x8x1024", 64, label="scaling", suites=("scaling",)),
    case("1x4x2048", 64, label="scaling", suites=("scaling",)),
    case("1x1x4096", 64, label="scaling", suites=("scaling",)),
    # The stages on their own.
    case("1x12x512", 64, label="scores", operation="scores", suites=("stages",), goal=_peak(80, 90)),
    case("1x8x2048", 64, label="scores", operation="scores", suites=("stages",), goal=_peak(75, 85)),
    case("1x12x512", 64, label="values", operation="weighted_values", suites=("stages",), goal=_peak(80, 90)),
    case("1x8x2048", 64, label="values", operation="weighted_values", suites=("stages",), goal=_peak(75, 85)),
    case("1x8x2048", 64, label="softmax", operation="softmax", suites=("stages",), goal=_peak(80, 95)),
    case("1x1x4096", 64, label="softmax", operation="softmax", suites=("stages",), goal=_peak(80, 95)),
    case(
        "1x12x512", 64, label="softmax", operation="softmax", threads=(2,), suites=("stages",), goal=_micros(944, 750)
    ),
    # Where attention falls, against the whole matrix.
    *(_ask(question, times) for question, times in ASKED.items()),
    # Gradients.
    *(
        _train(shape, dim, *goal, causal=causal, dtype=dtype)
        for dtype, goal in (("float32", (1.25, 1.5)), ("bfloat16", (1.3, 1.8)))
        for shape, dim in (("1x12x2048", 64), ("1x8x2048", 128))
        for causal in (False, True)
    ),
    # Before attention and after it. A single row's weights come from memory.
    _linear(512, goal=Goal("numpy", 0.95, 1.05, everywhere=True)),
    _linear(512, operation="linear+packed"),
    _linear(512, dtype="bfloat16"),
    _linear(1, stream=True),
    _linear(1, operation="linear+packed", stream=True),
    *(case(shape, 64, label="project", operation="project", suites=("layers",)) for shape in ("8x12x197", "1x12x512")),
    _rope("rope+tables", 0.70, 0.90),
    _rope("rope", 0.45, 0.60),
    # Short sentences and sets, whose tokens do not fill vectors.
    *(
        case(shape, 64, label="short", suites=("surprises",), goal=Goal("torch", 1.4, 1.4, everywhere=True))
        for shape in ("1x64x8", "1x64x12", "8x64x8", "8x64x12")
    ),
    # What a call adds to a process, as sequences grow.
    case("1x8x1024", 64, suites=("memory",)),
    case("1x8x4096", 64, suites=("memory",)),
    case("1x8x8192", 64, suites=("memory",)),
    case("1x8x8192", 64, causal=True, suites=("memory",)),
)

SUITES: tuple[str, ...] = (
    *("foundation", "quick", "prefill", "decode", "small", "masks", "stages", "half", "memory", "scaling"),
    *("surroundings", "data", "spotlight", "grad", "layers", "surprises", "hosts", "errors", "all"),
)


def select(suite: str, patterns: list[str] | None = None, dtypes: list[str] | None = None) -> list[Case]:
    """Cases of a suite whose name contains or matches a pattern; ValueError lists what there is."""
    if suite != "main" and suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; the suites are: {', '.join(SUITES)}")
    chosen = [c for c in CASES if suite == "all" or suite in c.suites]
    for pattern in patterns or []:
        if not any(_matches(c.name, pattern) for c in chosen):
            names = "\n  ".join(c.name for c in chosen)
            raise ValueError(f"no case of suite {suite!r} matches {pattern!r}; its cases are:\n  {names}")
    if patterns:
        chosen = [c for c in chosen if any(_matches(c.name, pattern) for pattern in patterns)]
    if dtypes:
        known = sorted({c.dtype for c in CASES})
        for dtype in dtypes:
            if dtype not in known:
                raise ValueError(f"unknown type {dtype!r}; the types are: {', '.join(known)}")
        chosen = [c for c in chosen if c.dtype in dtypes]
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """A pattern with wildcards matches the whole name; a full name just that case; anything else any part."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    if any(pattern == c.name for c in CASES):
        return pattern == name
    return pattern in name
