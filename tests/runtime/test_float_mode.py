"""Tasks have a floating-point mode of their own: bits do not depend on what the caller makes of subnormal numbers."""

import ctypes
import ctypes.util
import platform
import signal
import sys

import numpy as np
import pytest

import qkv_fast

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64") or not sys.platform.startswith("linux"),
    reason="writes the mode through glibc's fenv_t",
)

# Where fenv_t has the word that says how subnormal numbers are treated, and the bits for it.
WORD, FLUSH = (7, 0x8040) if platform.machine() == "x86_64" else (0, 1 << 24)


@pytest.fixture
def libm():
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    before = (ctypes.c_uint32 * 8)()
    library.fegetenv(before)
    yield library
    library.fesetenv(before)


def flush(libm):
    mode = (ctypes.c_uint32 * 8)()
    libm.fegetenv(mode)
    mode[WORD] |= FLUSH
    libm.fesetenv(mode)


def flushes():
    return (np.float32([1e-40]) * np.float32(0.5))[0] == 0


def calls(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 4, 100, 32)).astype(dtype) for _ in range(3))
    tiny = dtype(np.finfo(dtype).tiny)
    yield q, k, v * (tiny * dtype(1e-3))
    yield q * dtype(30), k, v
    yield q[:, :, :1] * tiny, k, v * tiny


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_do_not_depend_on_the_callers_mode(libm, isa, dtype):
    given = list(calls(dtype))  # made before the mode changes

    def results():
        attended = [qkv_fast.attention(*c, num_threads=n) for c in given for n in (1, 3)]
        return [x.tobytes() for x in (*attended, *(qkv_fast.scores(*c[:2]) for c in given))]

    usual = results()
    flush(libm)
    assert flushes()
    assert results() == usual
    assert flushes()  # still the caller's


@pytest.mark.alone
def test_signal_handlers_run_in_the_callers_mode(libm):
    """They run while a long call is asked whether to stop."""
    x = np.zeros((4, 4096, 64), np.float32)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(flushes()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        while len(seen) < 3:
            qkv_fast.attention(x, x, x, num_threads=1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert not any(seen)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
