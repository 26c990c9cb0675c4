"""CPU paths: their names, forcing one by environment or by context."""

import sys
import threading

import numpy as np
import pytest
from _util import TYPES, child, child_says, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

NAMES = qkv_fast.available_isas()
CONFIG = qkv_fast.show_config(mode="dicts")
BUILT = CONFIG["build"]["paths"]  # best first, with the features that each needs


def test_names():
    """Of those that were built, in their order, the ones that the CPU has the features for; portable is the last."""
    has = {name for name, there in CONFIG["cpu"]["features"].items() if there}
    assert isinstance(NAMES, tuple) and NAMES == tuple(name for name, needs in BUILT.items() if has.issuperset(needs))
    assert NAMES[-1] == "portable" and not BUILT["portable"]
    assert qkv_fast.isa() in NAMES


def test_the_fixture_covers_every_path(isa):
    assert qkv_fast.isa() == isa and isa in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_environment_forces(name):
    code = "import qkv_fast; print(qkv_fast.isa(), *qkv_fast.available_isas())"
    assert child_says(code, QKV_FAST_ISA=name) == " ".join((name, *NAMES))
    same = "import qkv_fast; print(qkv_fast.isa())"
    for unset in (None, ""):
        assert child_says(same, QKV_FAST_ISA=unset) == NAMES[0]


@pytest.mark.parametrize("name", NAMES)
def test_environment_and_context_reach_the_same_kernel(name):
    """A process forced by the environment and a call forced by its context give the same bits."""
    code = """
import numpy as np, qkv_fast
x = np.random.default_rng(1).standard_normal((2, 40, 24)).astype("float32")
print(qkv_fast.attention(x, x, x, causal=True).tobytes().hex())
"""
    x = np.random.default_rng(1).standard_normal((2, 40, 24)).astype("float32")
    with _runtime.force_isa(name):
        here = qkv_fast.attention(x, x, x, causal=True)
    assert child_says(code, QKV_FAST_ISA=name) == here.tobytes().hex()


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 ", "avx512,avx2", "0"])
def test_unknown_name_is_an_import_error(name):
    done = child("import qkv_fast", QKV_FAST_ISA=name)
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 1
        and last.startswith("ImportError")
        and "QKV_FAST_ISA" in last
        and repr(name) in last
    )
    for available in NAMES:
        assert available in last


def test_unavailable_name_is_an_import_error():
    """A path of another kind of CPU, or one that was built and that this CPU cannot run."""
    for name in {"avx2", "neon", *BUILT}.difference(NAMES):
        done = child("import qkv_fast", QKV_FAST_ISA=name)
        assert done.returncode == 1 and "ImportError" in done.stderr and "portable" in done.stderr


def test_force_is_nested_and_context_local():
    best = qkv_fast.isa()
    with _runtime.force_isa("portable"):
        assert qkv_fast.isa() == "portable"
        with _runtime.force_isa(NAMES[0]):
            assert qkv_fast.isa() == NAMES[0]
        assert qkv_fast.isa() == "portable"
        seen = []
        inherits = getattr(sys.flags, "thread_inherit_context", 0)
        worker = threading.Thread(target=lambda: seen.append(qkv_fast.isa()))
        worker.start()
        worker.join()
        assert seen == ["portable" if inherits else best]
    assert qkv_fast.isa() == best
    with pytest.raises(ValueError, match="portable"), _runtime.force_isa("sse9"):
        pass


@pytest.mark.parametrize("dtype", TYPES)
def test_paths_agree(dtype):
    """Different instructions, one definition: within the rounding of a few dozen operations."""
    q, k, v = qkv(2, dtype, heads=(4, 2), lengths=(33, 150), dims=(24, 24))
    results = []
    for name in NAMES:
        with _runtime.force_isa(name):
            results.append(qkv_fast.attention(q, k, v, causal=True, return_lse=True))
            same_bits(qkv_fast.attention(q, k, v, causal=True, return_lse=True), results[-1])
    for out, lse in results:
        # twice the constant term of the error rule, and as much again for NumPy's own error there
        assert np.abs(out - results[0][0]).max() <= 16 * np.finfo(dtype).eps * np.abs(v).max()
        assert np.abs(lse - results[0][1]).max() <= 16 * np.finfo(dtype).eps * np.abs(lse).max()
