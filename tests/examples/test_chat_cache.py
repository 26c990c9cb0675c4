"""examples/chat_cache.py: token by token is all at once, to the rounding of what is stored and of products."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qkv_fast
from qkv_fast._runtime import force_isa

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat_cache.py"
ARGUMENTS = (str(EXAMPLE), "--tokens", "20", "--layers", "2")
BYTES = {"float32": 128, "float64": 256, "float16": 64, "bfloat16": 64, "int8": 36, "int4": 18}  # of a row of 32


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("chat_cache", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("isa", qkv_fast.available_isas())
@pytest.mark.parametrize("kind", BYTES)
def test_token_by_token_is_all_at_once(example, kind, isa):
    with force_isa(isa):
        error, _, size = example.compare(kind, tokens=100, layers=3)
    assert error <= example.tolerance(kind, 3)
    assert size == 3 * 2 * example.KV_HEADS * BYTES[kind]


def test_tolerance_is_for_rounding_alone(example, monkeypatch):
    """Caches of the exact types that miss one key of 100 are found out."""
    whole = qkv_fast.KVCache.step
    monkeypatch.setattr(qkv_fast.KVCache, "step", lambda *given, **options: whole(*given, window=98, **options))
    for kind in ("float32", "float64"):
        assert example.compare(kind, tokens=100, layers=3)[0] > example.tolerance(kind, 3)


def run(*program):
    command = [sys.executable, "-P", *program]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


def test_program():
    lines = [re.match(r" *(\w+): +\d+ tokens/s +(\d+) bytes/token", line) for line in run(*ARGUMENTS)]
    assert {line[1]: int(line[2]) for line in lines} == {kind: 2 * 2 * 2 * size for kind, size in BYTES.items()}


def test_program_without_ml_dtypes():
    """A module that is None in sys.modules cannot be imported."""
    code = "import runpy, sys; sys.modules['ml_dtypes'] = None; sys.argv = sys.argv[1:]; "
    lines = run("-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')", *ARGUMENTS)
    assert len(lines) == len(BYTES) and lines[3].endswith("pip install ml_dtypes")


def test_first_line_says_what_it_is():
    assert "random weights" in EXAMPLE.read_text(encoding="utf-8").splitlines()[0]
