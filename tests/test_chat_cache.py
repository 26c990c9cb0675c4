"""examples/chat_cache.py: token by token is all at once, to the rounding of the products around attention."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qkv_fast
from qkv_fast._runtime import force_isa

EXAMPLE = Path(__file__).parents[1] / "examples" / "chat_cache.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("chat_cache", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("isa", qkv_fast.available_isas())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_token_by_token_is_all_at_once(example, dtype, isa):
    # BLAS sums the products of one row in another order than those of many: some eps per layer, of sums over up to 1024
    # terms. A key too many or too few changes the result by a part of a thousand at least.
    with force_isa(isa):
        error, _, size = example.compare(dtype, tokens=100, layers=3)
    assert error <= 100 * np.finfo(dtype).eps
    assert size == 3 * 2 * example.KV_HEADS * example.HEAD_DIM * np.dtype(dtype).itemsize


def test_program():
    command = [sys.executable, "-P", str(EXAMPLE), "--tokens", "20", "--layers", "2"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [re.match(r" *(\w+): +\d+ tokens/s +(\d+) bytes/token", line).groups() for line in lines[1:]] == [
        ("float32", "1024"), ("float64", "2048"),
    ]  # fmt: skip


def test_first_line_says_what_it_is():
    assert "random weights" in EXAMPLE.read_text(encoding="utf-8").splitlines()[0]
