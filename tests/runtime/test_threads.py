"""Threads: how many a call uses and who says so, calls from many Python threads, the state of a process."""

import asyncio
import os
import sys
import threading
from contextvars import copy_context

import numpy as np
import pytest
from _util import TYPES, child_says, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.alone
dtypes = pytest.mark.parametrize("dtype", TYPES)


@pytest.fixture(autouse=True)
def keep_setting():
    n = qkv_fast.get_num_threads()
    yield
    qkv_fast.set_num_threads(n)


def threads_used(**options):
    """How many threads a call with work for dozens of them uses."""
    q, k, v = qkv(1, heads=(64, 64), lengths=(256, 256), dims=(32, 32))
    with _runtime.counters() as seen:
        qkv_fast.attention(q, k, v, **options)
    return seen["threads"]


def test_set_and_get():
    for n in (1, 3, np.int64(2)):
        qkv_fast.set_num_threads(n)
        assert qkv_fast.get_num_threads() == n and type(qkv_fast.get_num_threads()) is int
        assert threads_used() == n


def test_call_beats_context_beats_setting():
    qkv_fast.set_num_threads(2)
    with qkv_fast.num_threads(3):
        assert qkv_fast.get_num_threads() == 3 and threads_used() == 3
        assert threads_used(num_threads=4) == 4
        with qkv_fast.num_threads(1):
            assert qkv_fast.get_num_threads() == 1 and threads_used() == 1
        qkv_fast.set_num_threads(5)
        assert qkv_fast.get_num_threads() == 3
    assert qkv_fast.get_num_threads() == 5


def test_context_ends_with_an_exception():
    qkv_fast.set_num_threads(2)
    with pytest.raises(KeyError), qkv_fast.num_threads(3):
        raise KeyError
    assert qkv_fast.get_num_threads() == 2


def test_context_is_the_threads_own():
    qkv_fast.set_num_threads(2)
    inside, outside = [], []
    with qkv_fast.num_threads(3):
        worker = threading.Thread(target=lambda: outside.append(qkv_fast.get_num_threads()))
        worker.start()
        worker.join()
        run = copy_context().run
        worker = threading.Thread(target=lambda: inside.append(run(qkv_fast.get_num_threads)))
        worker.start()
        worker.join()
    # a new thread begins with an empty context, before Python 3.14 and without its thread_inherit_context
    inherits = getattr(sys.flags, "thread_inherit_context", 0)
    assert outside == [3 if inherits else 2] and inside == [3]


def test_context_is_the_tasks_own():
    """Two coroutines in one thread, each inside its own with block while the other runs."""
    qkv_fast.set_num_threads(2)

    async def task(n, seen):
        with qkv_fast.num_threads(n):
            for _ in range(5):
                await asyncio.sleep(0)
                seen.add((qkv_fast.get_num_threads(), threads_used()))

    async def main():
        seen = [set(), set()]
        await asyncio.gather(task(3, seen[0]), task(4, seen[1]))
        return seen, qkv_fast.get_num_threads()

    assert asyncio.run(main()) == ([{(3, 3)}, {(4, 4)}], 2)


@pytest.mark.parametrize(
    "bad, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)]
)
def test_bad_counts(bad, error):
    with pytest.raises(error):
        qkv_fast.set_num_threads(bad)
    with pytest.raises(error), qkv_fast.num_threads(bad):
        pass
    with pytest.raises(error, match="num_threads"):
        qkv_fast.attention(*qkv(1), num_threads=bad)


def test_more_threads_than_anyone_has():
    """A count beyond reason is a wish: the call is right whatever part of it comes true."""
    q, k, v = qkv(2, heads=(40, 40), lengths=(64, 64))
    expected = qkv_fast.attention(q, k, v, num_threads=1)
    for n in (64, 10_000, 2**31, 2**62):
        same_bits(qkv_fast.attention(q, k, v, num_threads=n), expected)


@dtypes
def test_eight_python_threads(isa, dtype):
    """Eight at once, with problems of their own and one in common: all right, to the bit."""
    problems = [
        (qkv(n, dtype, heads=(4, 2), lengths=(50 * n + 1, 300), dims=(16, 16)), dict(causal=bool(n % 2)))
        for n in range(8)
    ]
    problems.append((qkv(9, dtype, heads=(2, 2), lengths=(3, 4000)), {}))
    expected = [qkv_fast.attention(*args, **options) for args, options in problems]
    start, wrong = threading.Barrier(8), []

    def work(n):
        start.wait()
        for i in range(30):
            which = n if i % 3 else 8
            args, options = problems[which]
            if not np.array_equal(
                qkv_fast.attention(*args, num_threads=1 + i % 4, **options), expected[which]
            ):
                wrong.append((n, i))

    workers = [threading.Thread(target=copy_context().run, args=(work, n)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert not wrong


@dtypes
def test_small_stack(isa, dtype):
    """A thread with 128 KB of stack, as musl gives: scratch is not on the stack."""
    problems = [
        qkv(1, dtype, lengths=(70, 300), dims=(1024, 1024)),
        qkv(2, dtype, heads=(8, 1), lengths=(3, 5000), dims=(64, 64)),
        [x.reshape((1,) * 20 + x.shape) for x in qkv(3, dtype)],
    ]
    expected = [qkv_fast.attention(*args, causal=True) for args in problems]
    got = []

    def work():
        got.extend(qkv_fast.attention(*args, causal=True) for args in problems)

    before = threading.stack_size(128 * 1024)
    try:
        worker = threading.Thread(target=copy_context().run, args=(work,))
        worker.start()
        worker.join()
    finally:
        threading.stack_size(before)
    same_bits(tuple(got), tuple(expected))


def test_pool_grows_when_needed_and_not_before():
    code = """
import numpy as np, qkv_fast
from qkv_fast import _runtime
x = np.ones((4, 1, 8), "float32")
qkv_fast.attention(x, x, x, num_threads=3)
small = _runtime.pool_threads()
x = np.ones((64, 256, 32), "float32")
qkv_fast.attention(x, x, x, num_threads=1)
one = _runtime.pool_threads()
qkv_fast.attention(x, x, x, num_threads=3)
print(small, one, _runtime.pool_threads())
"""
    assert child_says(code) == "0 0 2"


def test_small_calls_wake_nobody():
    """After a pause a small call stays on its thread; when they follow one another, others come in."""
    code = """
import time
import numpy as np, qkv_fast
from qkv_fast import _runtime
small, large = (np.ones((n, 64, 64), "float32") for n in (3, 64))
qkv_fast.attention(large, large, large, num_threads=2)
time.sleep(0.1)
used = []
for x, calls in (small, 1), (small, 5000), (large, 1):
    with _runtime.counters() as seen:
        for _ in range(calls):
            qkv_fast.attention(x, x, x, num_threads=2)
    used.append(seen["threads"])
    time.sleep(0.1)
print(*used)
"""
    assert child_says(code) == "1 2 2"


def test_other_threads_on_our_cores(isa):
    """More threads at work than there are cores: the same bits, and nothing is written after the return."""
    q, k, v = qkv(6, heads=(8, 8), lengths=(200, 200))
    expected = qkv_fast.attention(q, k, v, num_threads=1)
    out, wrong, done = np.empty_like(expected), [], threading.Event()
    square = np.ones((300, 300), "float32")

    def multiply():
        while not done.is_set():
            square @ square  # without the interpreter's lock

    others = [threading.Thread(target=multiply) for _ in range(3)]
    for other in others:
        other.start()
    try:
        for n in (2, 3, 4) * 20:
            qkv_fast.attention(q, k, v, out=out, num_threads=n)
            wrong.append(not np.array_equal(out, expected))
            out[...] = 7
            square @ square
            wrong.append(not (out == 7).all())
    finally:
        done.set()
        for other in others:
            other.join()
    assert not any(wrong)


def test_import_leaves_the_process_alone():
    """No thread, no environment variable, no signal handler, no affinity, no warning, no file descriptor."""
    code = """
import os, signal, sys, warnings
import numpy as np
def state():
    proc = [f"/proc/self/{name}" for name in ("task", "fd")]
    counts = [len(os.listdir(path)) for path in proc if os.path.isdir(path)]
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else 0
    handlers = [signal.getsignal(s) for s in sorted(signal.valid_signals())]
    modules = {m.partition(".")[0] for m in sys.modules} & {"asyncio", "unittest", "scipy", "torch"}
    return counts, cpus, handlers, dict(os.environ), warnings.filters[:], np.geterr(), modules
before = state()
import qkv_fast
print(before == state())
"""
    assert child_says(code) == "True"


FLOATS = """
import ctypes, ctypes.util, platform, threading
import numpy as np
libm = ctypes.CDLL(ctypes.util.find_library("m"))
def mode():
    tiny = np.array([1e-40, 1e-310])
    single, double = np.float32(tiny[:1]), tiny[1:]
    return [
        libm.fegetround(),
        (single * np.float32(0.5)).tobytes().hex(),          # flushed to zero?
        (double * 0.5).tobytes().hex(),
        (single + np.float32(0)).tobytes().hex(),            # denormals read as zero?
        (np.float32([1]) / np.float32([3])).tobytes().hex(),  # rounded how?
    ]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="reads the mode through libm")
def test_floating_point_mode_is_the_callers():
    """Before and after import and calls, in this thread and others; a mode the caller set stays set."""
    code = (
        FLOATS
        + """
before = mode()
import qkv_fast
assert mode() == before
x = np.random.default_rng(1).standard_normal((16, 300, 64)).astype("float32") * np.float32(10)
for isa in qkv_fast.available_isas():
    with qkv_fast._runtime.force_isa(isa):
        for dtype in ("float32", "float64"):
            qkv_fast.attention(*[x.astype(dtype)] * 3, num_threads=3)
            assert mode() == before
found = []
thread = threading.Thread(target=lambda: (qkv_fast.attention(x, x, x, num_threads=3), found.append(mode())))
thread.start(); thread.join()
assert found == [before], found
upward = 0x800 if platform.machine() == "x86_64" else 0x400000
assert libm.fesetround(upward) == 0
changed = mode()
assert changed != before
qkv_fast.attention(x, x, x, num_threads=3)
assert mode() == changed
print("kept")
"""
    )
    assert child_says(code) == "kept"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_threads_that_cannot_be_had():
    """Where the system has no room for 500 more threads, the call is right on fewer, or a MemoryError."""
    code = """
import resource, numpy as np, qkv_fast
x = np.random.default_rng(1).standard_normal((64, 256, 32)).astype("float32")
expected = qkv_fast.attention(x, x, x, num_threads=1)
size = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")][0] * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
out = np.empty_like(x)
try:
    qkv_fast.attention(x, x, x, num_threads=500, out=out)
except MemoryError:
    out = expected
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert qkv_fast._runtime.pool_threads() < 499 and np.array_equal(out, expected)
for n in (1, 2, 8):
    assert np.array_equal(qkv_fast.attention(x, x, x, num_threads=n), expected)
print("right")
"""
    assert child_says(code, QKV_FAST_NUM_THREADS=None, OPENBLAS_NUM_THREADS=1) == "right"


def test_a_call_inside_a_call_of_the_pool(isa):
    """Two levels of Python threads, all with parallel calls: whoever finds the pool busy works alone."""
    q, k, v = qkv(4, heads=(8, 8), lengths=(200, 200))
    expected = qkv_fast.attention(q, k, v, num_threads=1)
    results = []

    def outer():
        workers = [threading.Thread(target=copy_context().run, args=(inner,)) for _ in range(2)]
        for worker in workers:
            worker.start()
        inner()
        for worker in workers:
            worker.join()

    def inner():
        results.extend(
            np.array_equal(qkv_fast.attention(q, k, v, num_threads=n), expected) for n in (2, 3, 2)
        )

    workers = [threading.Thread(target=copy_context().run, args=(outer,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 27 and all(results)


def test_a_thread_that_ends_and_its_successors():
    """Threads that call once and end leave nothing that makes the next call wrong or slow to end."""
    q, k, v = qkv(5, heads=(8, 8), lengths=(100, 100))
    expected = qkv_fast.attention(q, k, v)
    bad = []

    def check(n):
        if not np.array_equal(qkv_fast.attention(q, k, v, num_threads=n), expected):
            bad.append(n)

    for n in (2, 3) * 100:
        worker = threading.Thread(target=check, args=(n,))
        worker.start()
        worker.join()
    assert not bad


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="two cores and affinity")
def test_whoever_pins_all_threads_finds_them_pinned():
    """A worker is moved while it has a task, and has then what its user has given it, also if that was meanwhile."""
    code = """
import os, time
import numpy as np
import qkv_fast

def pins():
    return {int(t): os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")}

x = np.ones((1, 12, 300, 64), "float32")
cores = sorted(os.sched_getaffinity(0))[:2]
for allowed in ({cores[0]}, {cores[1]}, set(cores), {cores[1]}, {cores[0]}, set(cores)):
    for wait in (0.0, 0.05):
        qkv_fast.attention(x, x, x, num_threads=2)
        time.sleep(wait)
    assert qkv_fast._runtime.pool_threads() == 1
    for thread in pins():
        os.sched_setaffinity(thread, allowed)
    for wait in (0.0, 0.05):
        qkv_fast.attention(x, x, x, num_threads=2)
        time.sleep(0.02 + wait)
        assert set(map(frozenset, pins().values())) == {frozenset(allowed)}, (allowed, pins())
print("right")
"""
    assert child_says(code, OPENBLAS_NUM_THREADS=1) == "right"
