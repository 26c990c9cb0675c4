"""What identifies a run: the machine, the versions, the settings."""

from __future__ import annotations

import functools
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import qkv_fast

from .memory import read

REFERENCE = "Zen 4 with AVX-512"  # the kind of CPU that goals were measured on; that machine has 2 cores


@functools.cache
def first_cpu() -> dict[str, str]:
    """What Linux says of it."""
    said: dict[str, str] = {}
    for line in read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        said.setdefault(key.strip(), value.strip())
    return said


def is_intel() -> bool:
    return first_cpu().get("vendor_id") == "GenuineIntel"


def is_reference() -> bool:
    """Whether this CPU is of the kind that goals were measured on. Of AMD's family 25 Zen 4 has AVX-512 and Zen 3 has
    not; Zen 5 is another family."""
    said = first_cpu()
    zen = (said.get("vendor_id"), said.get("cpu family")) == ("AuthenticAMD", "25")
    return zen and "avx512f" in said.get("flags", "").split()


def cpu_model() -> str:
    """The name that the CPU gives itself."""
    said = first_cpu()
    return said.get("model name") or said.get("Model") or platform.processor() or platform.machine()


def cpu_count() -> int:
    """CPUs that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def caches() -> dict[str, str]:
    """Sizes by level and kind, of the first CPU."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (read(str(folder / name)) for name in ("level", "type", "size"))
        if level and size:
            found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def identify() -> dict:
    """Everything about machine and software that a reader of the figures needs."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "qkv_fast": qkv_fast.__version__,
        "isa": qkv_fast.isa(),
        "available_isas": list(qkv_fast.available_isas()),
        "threads": qkv_fast.get_num_threads(),
        "cpu": cpu_model(),
        "cpus": cpu_count(),
        "caches": caches(),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not readable",
        "hugepages": read("/sys/kernel/mm/transparent_hugepage/enabled") or "not readable",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version()
        + ("" if getattr(sys, "_is_gil_enabled", lambda: True)() else " free-threaded"),
        "numpy": np.__version__,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("QKV_FAST_", "OMP_", "OPENBLAS_", "MKL_")) and len(value) < 100
        },
    }
