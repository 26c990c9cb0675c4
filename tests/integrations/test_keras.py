"""Our dot_product_attention for Keras gives what Keras' gives on each backend, and passes Keras' own tests in its
place. A process has one backend, so each has a process of its own: tests/_keras.py."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("keras") is None:  # not imported here: it asks for its backend then
    pytest.skip("the extra [test] leaves it out for its size; [keras] has it", allow_module_level=True)

TESTS = Path(__file__).resolve().parents[1]
BACKENDS = ("numpy", "jax", "torch")


def run(backend, *arguments):
    """What a process prints where Keras runs on `backend`; it must succeed."""
    pytest.importorskip(backend)
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-P", *arguments]  # the installed package, not the folder that this runs in
    made = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    return made.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_gives_what_keras_gives(backend, tmp_path):
    """In a grid of arguments, and in those of Keras' own tests that its wheel carries, of attention layers and of the
    function; on JAX, which compiles each for seconds, in the function's and those of results."""
    root = Path(find_spec("keras").origin).parent / "src"
    files = [*sorted((root / "layers" / "attention").glob("*_test.py")), root / "ops" / "nn_test.py"]
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", tmp_path]
    chosen = "dot_product_attention or Attention and correctness" if backend == "jax" else "attention or Attention"
    options += ["-k", chosen]
    if backend == "numpy":
        options += ["-m", "not requires_trainable_backend"]
    said = run(backend, TESTS / "_keras.py", *options, *files)
    assert int(re.search(r"gives: (\d+)", said)[1]) > 30
    assert "our attention was called: True" in said
    assert int(re.search(r"(\d+) passed", said)[1]) > (20 if backend == "jax" else 100)
