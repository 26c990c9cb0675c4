"""Memory: what a call adds to a fresh process, what the system has left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def kilobytes(path: str, key: str) -> int | None:
    """A line `key:  N kB` of a file in /proc, in bytes."""
    for line in read(path).splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def forget() -> int | None:
    """Let the high-water mark of this process start again from what it has now: that many bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return kilobytes("/proc/self/status", "VmRSS")


def highest() -> int | None:
    """Bytes that this process had at most since `forget`."""
    return kilobytes("/proc/self/status", "VmHWM")


def growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grew at most during a call, its result included; None if the system can't say."""
    before = forget()
    result = call()
    most = highest()
    del result
    return None if before is None or most is None else max(0, most - before)


def left() -> int | None:
    """Bytes that the system, and the control group if it limits, can still give; None if they can't be read."""
    found = [kilobytes("/proc/meminfo", "MemAvailable")]
    limit, used = read("/sys/fs/cgroup/memory.max"), read("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and used.isdecimal():
        found.append(max(0, int(limit) - int(used)))
    return min((bytes_ for bytes_ in found if bytes_ is not None), default=None)


def be_first_to_go() -> None:
    """Where the system kills a process because memory ran out, it takes this one before its parent."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass  # the system has no such thing
