"""Where calls run: the number of threads and the CPU path, and what tests and benchmarks need to see of the core."""

import atexit
import contextlib
import contextvars
import functools
import operator
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import _core


class Settings(NamedTuple):
    """What a context asks of the calls inside it; None leaves the choice to the process."""

    threads: int | None = None
    isa: int | None = None
    counters: Any = None  # an int64 array in the order of _core.COUNTERS, or _core.PLAN


_settings: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("qkv_fast", default=None)
_process_threads: int | None = None  # set_num_threads
_default_threads: int | None = None  # once it has been needed
_default_source = ""  # where that came from
MAX_THREADS = _core.MAX_THREADS
_VARIABLES = ("QKV_FAST_NUM_THREADS", "OMP_NUM_THREADS")


@contextlib.contextmanager
def _setting(**changes: Any) -> Iterator[None]:
    token = _settings.set((_settings.get() or Settings())._replace(**changes))
    try:
        yield
    finally:
        _settings.reset(token)


# CPU paths


def available_isas() -> tuple[str, ...]:
    """Names of the CPU paths that this build has and this CPU runs, best first.

    Examples
    --------
    >>> import qkv_fast
    >>> "portable" in qkv_fast.available_isas()
    True
    """
    return _NAMES


def isa() -> str:
    """Name of the CPU path that calls use: the best available one, or what ``QKV_FAST_ISA`` named at import.

    Examples
    --------
    >>> import qkv_fast
    >>> qkv_fast.isa() in qkv_fast.available_isas()
    True
    """
    return _NAMES[current()[1]]


def isa_source() -> str:
    """What chose the CPU path of isa(), in words."""
    settings = _settings.get()
    if settings is not None and settings.isa is not None:
        return "force_isa"
    return "QKV_FAST_ISA" if _forced else "best available"


def _isa_index(name: str) -> int:
    if name not in _NAMES:
        raise ValueError(f"no CPU path {name!r} here; available: {', '.join(_NAMES)}")
    return _NAMES.index(name)


def force_isa(name: str) -> contextlib.AbstractContextManager[None]:
    """Calls inside the context use this CPU path."""
    return _setting(isa=_isa_index(name))


_NAMES: tuple[str, ...] = _core.isa_names()
_DEFAULT_ISA = 0
if _forced := os.environ.get("QKV_FAST_ISA"):
    try:
        _DEFAULT_ISA = _isa_index(_forced)
    except ValueError as error:
        raise ImportError(f"QKV_FAST_ISA: {error}") from None


# Threads


def check_threads(n: object, name: str) -> int:
    """`n` as a thread count, or an error that names the argument."""
    if isinstance(n, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer of at least 1, got {n!r}")
    try:
        count = operator.index(n)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least 1, got {n!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return min(count, MAX_THREADS)


def get_num_threads() -> int:
    """Number of threads that a call uses at most, unless ``num_threads=`` says otherwise.

    The first of these that is set: :func:`num_threads` around the call, :func:`set_num_threads`, the environment
    variables ``QKV_FAST_NUM_THREADS`` and ``OMP_NUM_THREADS`` as they were at first use, and otherwise the number of
    CPUs that the process may use (its affinity and its control group's quota, whichever is less). A variable whose
    value is no positive integer is passed over, since no result depends on it; :func:`show_config` names it.

    Examples
    --------
    >>> import qkv_fast
    >>> qkv_fast.get_num_threads() >= 1
    True
    """
    return current()[0]


def threads_source() -> str:
    """Where the answer of get_num_threads() comes from, in words."""
    current()
    settings = _settings.get()
    if settings is not None and settings.threads:
        return "num_threads(n)"
    return "set_num_threads" if _process_threads else _default_source


def set_num_threads(n: int) -> None:
    """Set the number of threads for the process, outside any :func:`num_threads` context.

    Parameters
    ----------
    n : int
        At least 1. More than the machine has cores is allowed.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer, or is below 1.

    Examples
    --------
    >>> import qkv_fast
    >>> before = qkv_fast.get_num_threads()
    >>> qkv_fast.set_num_threads(2)
    >>> qkv_fast.get_num_threads()
    2
    >>> qkv_fast.set_num_threads(before)
    """
    global _process_threads
    _process_threads = check_threads(n, "set_num_threads: n")


def num_threads(n: int) -> contextlib.AbstractContextManager[None]:
    """Context in which calls use at most `n` threads.

    It holds for the current thread or asyncio task only, as :mod:`contextvars` define it.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer, or is below 1.

    Examples
    --------
    >>> import qkv_fast
    >>> with qkv_fast.num_threads(1):
    ...     qkv_fast.get_num_threads()
    1
    """
    return _setting(threads=check_threads(n, "num_threads: n"))


def limit_context(n: int) -> None:
    """Set the number of threads of the current context until it is set again.

    So does threadpoolctl: it limits, and later gives back the number that it found. Where that is the process's own,
    the context is left without a setting.
    """
    settings = (_settings.get() or Settings())._replace(threads=None)
    _settings.set(settings)
    if n != current()[0]:
        _settings.set(settings._replace(threads=check_threads(n, "threadpoolctl: num_threads")))


def current(num_threads: Any = None, where: str = "") -> tuple[int, int, Any]:
    """Threads, CPU path and counters for a call made here; `num_threads` is what the call itself says."""
    settings = _settings.get()
    threads = _process_threads or _default_threads or _first_default()
    if settings is num_threads is None:
        return threads, _DEFAULT_ISA, None
    isa, counters = _DEFAULT_ISA, None
    if settings is not None:
        threads = settings.threads or threads
        isa = _DEFAULT_ISA if settings.isa is None else settings.isa
        counters = settings.counters
    if num_threads is not None:
        threads = check_threads(num_threads, f"{where}: num_threads")
    return threads, isa, counters


def _first_default() -> int:
    global _default_threads, _default_source
    _default_threads, _default_source = default_num_threads()
    return _default_threads


def default_num_threads() -> tuple[int, str]:
    """What get_num_threads says before anything is set, and why; looks at the environment and the system each time."""
    for name in _VARIABLES:
        if count := _count(os.environ.get(name, "")):
            return min(count, MAX_THREADS), name
    cpus, quota = allowed_cpus(), cpu_quota()
    if quota is not None and int(quota) < cpus:
        return max(1, int(quota)), "control group's quota"
    return cpus, "CPUs allowed (affinity)"


def ignored_variables() -> dict[str, str]:
    """The environment variables that should say how many threads, and do not."""
    given = {name: os.environ.get(name, "") for name in _VARIABLES}
    return {name: value for name, value in given.items() if value.strip() and not _count(value)}


def _count(text: str) -> int:
    """The positive integer that a variable says, or 0."""
    first = text.split(",")[0].strip()  # OpenMP allows a list, one entry per level
    if not (first.isascii() and first.isdecimal()):
        return 0
    return MAX_THREADS if len(first.lstrip("0")) > 9 else int(first)


def allowed_cpus() -> int:
    """CPUs that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu_quota(root: str | os.PathLike[str] = "/") -> float | None:
    """CPUs' worth of time that the control groups of this process allow (v1 or v2), or None without a limit.

    A process is bound by its own group and by every one above it, so the least of them counts.
    """
    root = os.fspath(root)
    quotas = []
    for line in _lines(root, "proc/self/cgroup"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            mounts, read = [""], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [controllers, "cpu"], _quota_v1
        else:
            continue
        parts = group.strip("/").split("/")
        for mount in mounts:
            folder = os.path.join(root, "sys/fs/cgroup", mount)
            quotas += [read(os.path.join(folder, *parts[:depth])) for depth in range(len(parts) + 1)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(group: str) -> float | None:
    fields = " ".join(_lines(group, "cpu.max")).split()
    return _ratio(*fields) if len(fields) == 2 else None


def _quota_v1(group: str) -> float | None:
    quota, period = _lines(group, "cpu.cfs_quota_us"), _lines(group, "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _ratio(quota: str, period: str) -> float | None:
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None


def _lines(*path: str) -> list[str]:
    try:
        with open(os.path.join(*path), encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


atexit.register(_core.pool_stop)


def planning() -> contextlib.AbstractContextManager[None]:
    """Inside, attention() returns what it would do, as `_core.forward` has it, and computes nothing."""
    return _setting(counters=_core.PLAN)


@functools.lru_cache
def measured_peaks(isa: int, kind: str, threads: int) -> tuple[float, float]:
    """Floating-point operations (in tiles, of parts) and bytes per second that this machine reaches; measured once, in
    about 0.3 s."""
    flops = 0 if kind == "f64" else _core.tile_rate(threads, 0.03, isa)  # a kernel of a path with tiles is one
    if not flops:
        flops = _core.pair_rate(threads, 0.03) if kind == "bf16" else _core.fma_rate(kind == "f64", threads, 0.03, isa)
    return flops, _core.read_rate(np.ones(1 << 25), threads, 0.1)


@functools.lru_cache
def measured_traffic(threads: int) -> float:
    """Bytes per second, read and written ones together, at which this machine copies; measured once, in about 0.2 s."""
    half = np.ones(1 << 25).reshape(2, -1)
    return 2 * _core.copy_rate(half[1], half[0], threads, 0.1)


def path_of_stages(isa: str) -> str:
    """The path whose kernels products and softmax have: some have none but attention's."""
    paths = available_isas()
    return next(name for name in paths[paths.index(isa) :] if not name.startswith("amx") and not name.endswith("bf16"))


# For tests and benchmarks


@contextlib.contextmanager
def counters() -> Iterator[dict[str, int]]:
    """A dict that, when the context ends, says what the calls inside it did."""
    counts = np.zeros(len(_core.COUNTERS), np.int64)
    result: dict[str, int] = {}
    with _setting(counters=counts):
        yield result
    result.update(zip(_core.COUNTERS, counts.tolist(), strict=True))


def refuse_tiles() -> None:
    """From now on, paths with tiles are refused them, as by a system with a thread whose signal stack is small."""
    _core.refuse_tiles()


def peak_flops(dtype: Any = "float32", threads: int = 1, seconds: float = 0.1) -> float:
    """Floating-point operations per second of multiply-adds that stay in registers, on the current CPU path.

    "bfloat16" is the instruction that multiplies pairs, on any path: 0 where the CPU or the build lacks it.
    """
    if dtype == "bfloat16":
        return _core.pair_rate(threads, seconds)
    return _core.fma_rate(np.dtype(dtype) == np.float64, threads, seconds, current()[1])


def read_bandwidth(data: np.ndarray[Any, Any], threads: int = 1, seconds: float = 0.1) -> float:
    """Bytes per second at which threads read a contiguous array, each a part of its own, again and again."""
    return _core.read_rate(data, threads, seconds)


def copy_bandwidth(
    to: np.ndarray[Any, Any], data: np.ndarray[Any, Any], threads: int = 1, seconds: float = 0.1
) -> float:
    """Bytes per second, read once and written once, at which threads copy a contiguous array to another of its size."""
    return _core.copy_rate(to, data, threads, seconds)


def fork_join_seconds(threads: int, repeats: int = 10000) -> float:
    """Time of an empty parallel call while the workers are awake."""
    return _core.fork_join(threads, repeats)


def exp2(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """2**x by the current CPU path; x is contiguous float32 or float64."""
    y = np.empty_like(x)
    _core.exp2(x, y, current()[1])
    return y


def pool_threads() -> int:
    """Live workers of the pool, the caller not counted."""
    return _core.pool_threads()


def trim() -> None:
    """Free the scratch memory that is kept between calls."""
    _core.trim()


class _Allocations:
    @property
    def count(self) -> int:
        return _core.allocations()


@contextlib.contextmanager
def fail_allocation(k: int) -> Iterator[_Allocations]:
    """Inside, the core's k-th allocation fails (from 0; -1 for none)."""
    _core.fail_allocation(k)
    try:
        yield _Allocations()
    finally:
        _core.fail_allocation(-1)
