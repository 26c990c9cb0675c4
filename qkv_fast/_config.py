"""show_config(): what was built, what the machine has, and what calls will use. A bug report begins with it."""

import errno
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import _core, _runtime


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print, or return, versions, compiler, CPU features and paths, caches, and threads.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        ``"stdout"`` prints a text for people; ``"dicts"`` returns the same as nested dicts, as NumPy's function does.

    Returns
    -------
    config : dict or None
        With ``mode="dicts"``, the sections:

        - ``versions`` of qkv_fast, Python and NumPy, and the system;
        - ``build``: the compiler, and the CPU paths built with the features that each needs;
        - ``cpu``: its name, which features it has, and its caches;
        - ``path``: the CPU paths that run here, best first, the one in use, what chose it, what the system says to
          tiles (None where no path has to ask), and why each of the others that were built is not used;
        - ``threads``: how many calls use here, where that number comes from, the CPUs that the process may run on, the
          control group's quota (None for none), the live workers of the pool, and variables that say no count;
        - ``environment``: the variables that matter.

    Raises
    ------
    ValueError
        If `mode` is another word.

    Examples
    --------
    >>> import qkv_fast
    >>> config = qkv_fast.show_config(mode="dicts")
    >>> config["path"]["in use"] in config["build"]["paths"]
    True
    >>> config["threads"]["count"] == qkv_fast.get_num_threads()
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"show_config: mode must be 'stdout' or 'dicts', got {mode!r}")
    config = _config()
    if mode == "dicts":
        return config
    print("\n".join(_lines(config)))
    return None


def _config() -> dict[str, Any]:
    from ._version import __version__

    build = _core.build_info()
    threads = {
        "count": _runtime.get_num_threads(),
        "from": _runtime.threads_source(),
        "CPUs allowed": _runtime.allowed_cpus(),
        "control group's quota": _runtime.cpu_quota(),
        "workers alive": _runtime.pool_threads(),
        "ignored": {name: f"{value!r} is no count" for name, value in _runtime.ignored_variables().items()},
    }
    gil = "" if getattr(sys, "_is_gil_enabled", lambda: True)() else ", free-threaded"
    return {
        "versions": {
            "qkv_fast": __version__,
            "python": platform.python_version() + gil,
            "numpy": np.__version__,
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "build": {"compiler": build["compiler"], "cython": build["cython"], "paths": build["paths"]},
        "cpu": {"name": cpu_name(), "features": build["features"], "caches": caches()},
        "path": {
            "available": _runtime.available_isas(),
            "in use": _runtime.isa(),
            "from": _runtime.isa_source(),
            "tiles": _tiles(build["paths"]),
            "not used": _not_used(build["paths"], build["features"]),
        },
        "threads": threads,
        "environment": {
            name: os.environ[name]
            for name in ("QKV_FAST_ISA", "QKV_FAST_NUM_THREADS", "OMP_NUM_THREADS")
            if name in os.environ
        },
    }


def _tiles(paths: dict[str, tuple[str, ...]]) -> str | None:
    """What the system says to tiles, where a path that runs here has to ask for them."""
    refusal, paths_here = _core.tiles_refusal(), _runtime.available_isas()
    if refusal == 0:
        return "permitted"
    if refusal is not None:
        why = os.strerror(refusal) if refusal > 0 else "no reason is known"
        if refusal == errno.ENOSPC:
            why = "a thread has an alternate signal stack under 12 KB"
        return f"refused by the system: {why}; the path behind is used instead"
    asks = any(need.startswith("amx") for path in paths_here for need in paths[path])
    return "permission is asked for by the first call that uses them" if asks else None


def _not_used(paths: dict[str, tuple[str, ...]], features: dict[str, bool]) -> dict[str, str]:
    """Why a path that was built is not the one in use."""
    used, source = _runtime.isa(), _runtime.isa_source()
    chose = f"{used} comes first" if source == "best available" else f"{source} chose {used}"
    reasons = {}
    for path, needs in paths.items():
        if missing := [name for name in needs if not features[name]]:
            # The core asks for both at once: a feature whose registers the system does not save is of no use.
            lacking = f"needs {', '.join(missing)}, which this CPU lacks or the system has not enabled"
            reasons[path] = f"built; {lacking}"
        elif path != used:
            reasons[path] = f"built and runs here; {chose}"
    return reasons


def cpu_name() -> str:
    """The name that the CPU gives itself."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Sizes by level and kind, of the first CPU; empty where the system does not say."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if level and size:
            found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _lines(section: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in section.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    # Variables may hold bytes that are no text.
    return "none" if value is None or value == {} else str(value).encode("utf-8", "backslashreplace").decode()
