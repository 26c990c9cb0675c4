"""Processes: forks before, during and after parallel calls, and the end of a process. None hangs.

All of it runs in child processes; a hang there is a time-out here. 200 forks in all.
"""

import os
import subprocess
import sys
import time

import pytest
from _util import child, child_says

# The parent computes on 3 threads, forks, and waits; each child computes the same on 3 threads and compares.
FORKS = """
import os, sys, threading, time, warnings
import numpy as np, qkv_fast
warnings.simplefilter("ignore", DeprecationWarning)    # Python warns of forks beside threads: our subject
rng = np.random.default_rng(1)
x = rng.standard_normal((8, 300, 32)).astype("float32")
few = [rng.standard_normal((1, n, 32)).astype("float32") for n in (3, 15_000)]
cache = qkv_fast.KVCache(1, 1, 32, 15_000)
cache.append(few[1][None], few[1][None])
layer = qkv_fast.MultiHeadAttention(*rng.standard_normal((4, 32, 32)).astype("float32"), num_heads=2, rope={})
def compute():
    a = qkv_fast.attention(x, x, x, causal=True, num_threads=3)
    b = qkv_fast.attention(few[0], few[1], few[1], num_threads=3)
    c = qkv_fast.spotlight.received(x, x, causal=True, num_threads=3)
    d = cache.top_keys(few[0][None], num_threads=3)
    e = qkv_fast.attention_grad(x, x, x, x, a, np.full(x.shape[:2], 9, "f4"), causal=True, num_threads=3)
    f = qkv_fast.linear(x, x[0], num_threads=3)
    g = layer(x, causal=True, num_threads=3)        # whose weights are packed before the fork
    h = qkv_fast.rope(x, num_threads=3)
    return b"".join(y.tobytes() for y in (a, b, c, *d, *e, f, g, h))
def fork_and_wait(expected, depth=1):
    pid = os.fork()
    if pid == 0:
        right = False
        try:
            right = compute() == expected
            if right and depth > 1:
                right = fork_and_wait(expected, depth - 1) == 0
        finally:
            os._exit(0 if right else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.0005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"
"""

pytestmark = pytest.mark.alone
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@posix
def test_fork_before_any_call():
    """The pool does not exist yet: child and parent each make their own."""
    code = (
        FORKS
        + """
pid = os.fork()
if pid == 0:
    os._exit(0 if len(compute()) else 1)
expected = compute()
assert os.waitpid(pid, 0)[1] == 0
print(fork_and_wait(expected))
"""
    )
    for _ in range(5):  # 2 forks each
        assert child_says(code) == "0"


@posix
def test_fork_after_calls():
    """The pool's threads are asleep, or spinning still, when their process is copied without them."""
    code = (
        FORKS
        + """
expected = compute()
results = []
for i in range(70):
    if i % 3:
        assert compute() == expected    # the workers are still awake
    if i % 7 == 0:
        time.sleep(0.002)               # and asleep
    results.append(fork_and_wait(expected))
print(sorted(map(str, set(results))))
assert compute() == expected
"""
    )
    assert child_says(code, timeout=120) == "['0']"


@posix
def test_fork_during_calls():
    """Another thread is inside a parallel call: the pool's state is copied in the middle of a job."""
    code = (
        FORKS
        + """
expected = compute()
stop = False
wrong = []
def busy():
    while not stop:
        if compute() != expected:
            wrong.append(1)
thread = threading.Thread(target=busy)
thread.start()
results = [fork_and_wait(expected) for _ in range(80)]
stop = True
thread.join()
print(sorted(map(str, set(results))), len(wrong))
"""
    )
    assert child_says(code, timeout=120) == "['0'] 0"


@posix
def test_fork_of_a_fork():
    code = (
        FORKS
        + """
expected = compute()
print(sorted(map(str, {fork_and_wait(expected, depth=3) for _ in range(10)})))
"""
    )
    assert child_says(code, timeout=120) == "['0']"  # 30 forks


@posix
def test_fork_while_the_caller_is_another_python_thread():
    """The forking thread is not the one that made the pool, and its child has no other."""
    code = (
        FORKS
        + """
expected = []
first = threading.Thread(target=lambda: expected.append(compute()))
first.start()
first.join()
results = []
second = threading.Thread(target=lambda: results.extend(fork_and_wait(expected[0]) for _ in range(6)))
second.start()
second.join()
print(sorted(map(str, set(results))))
"""
    )
    assert child_says(code, timeout=120) == "['0']"


@posix
def test_multiprocessing_by_fork():
    code = (
        FORKS
        + """
import multiprocessing
def work(n):
    return compute()
expected = compute()
with multiprocessing.get_context("fork").Pool(4) as pool:
    print(all(result == expected for result in pool.map(work, range(16))))
assert compute() == expected
"""
    )
    assert child_says(code, timeout=120) == "True"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="on_exit is glibc's")
def test_a_daemon_thread_outlives_the_interpreter():
    """It looks for signals between tasks, also when there is no interpreter left to ask. The process sleeps as many
    seconds as its exit status says between the interpreter's end and its own."""
    code = """
import ctypes, threading, time
import numpy as np, qkv_fast
libc = ctypes.CDLL(None)
libc.on_exit(ctypes.cast(libc.sleep, ctypes.c_void_p), None)
x = np.random.default_rng(1).standard_normal((8, 8000, 64)).astype("float32")
thread = threading.Thread(target=qkv_fast.attention, args=(x, x, x), kwargs={"num_threads": 1}, daemon=True)
thread.start()
time.sleep(0.1)
assert thread.is_alive()
raise SystemExit(1)
"""
    done = child(code, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")


EXITS = {
    "idle": "",
    "daemon threads calling": """
for _ in range(3):
    threading.Thread(target=busy, daemon=True).start()
time.sleep(0.2)
""",
    "a call at exit": "atexit.register(compute, 3)",
    "os._exit": "",
}


@pytest.mark.parametrize("name", EXITS)
def test_exit_within_a_second(name):
    """From the last statement to the end of the process, also with daemon threads inside calls."""
    code = f"""
import atexit, os, sys, threading, time
import numpy as np, qkv_fast
x = np.random.default_rng(1).standard_normal((8, 1000, 64)).astype("float32")
def compute(n):
    qkv_fast.attention(x, x, x, num_threads=n)
def busy():
    while True:
        compute(3)
compute(3)
{EXITS[name]}
print("end", flush=True)
{"os._exit(0)" if name == "os._exit" else "raise SystemExit(0)"}
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout.readline().strip() == b"end", process.stderr.read().decode()
        start = time.monotonic()
        assert process.wait(20) == 0, process.stderr.read().decode()
        assert time.monotonic() - start < 1
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="newer versions end subinterpreters before the process ends")
def test_exit_with_a_subinterpreter():
    """It imported the package and is left to the end of the process, whose other threads would keep it alive."""
    create = "create(isolated=False)" if sys.version_info >= (3, 12) else "create()"
    code = f"""
import threading, time, warnings
import _xxsubinterpreters as interpreters
threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
sub = interpreters.{create}
interpreters.run_string(sub, "import warnings; warnings.simplefilter('ignore'); import qkv_fast")
print("end")
"""
    assert child_says(code, timeout=20, OPENBLAS_NUM_THREADS=None) == "end"


def test_exit_by_a_signal():
    """Ctrl-C ends a program that does nothing but compute; the status is that of KeyboardInterrupt."""
    code = """
import _thread, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they run in the background
import numpy as np, qkv_fast
x = np.random.default_rng(1).standard_normal((4, 6000, 64)).astype("float32")
small = x[:, :100]
expected = qkv_fast.attention(small, small, small)
sent = []
def interrupt():
    time.sleep(0.3)
    sent.append(time.monotonic())
    _thread.interrupt_main()
threading.Thread(target=interrupt).start()
try:
    while True:
        qkv_fast.attention(x, x, x, num_threads=2)
except KeyboardInterrupt:
    waited = time.monotonic() - sent[0]
assert np.array_equal(qkv_fast.attention(small, small, small), expected)
print(waited)
"""
    for isa in ("", "portable"):
        # 50 to 100 ms between two looks, and the tasks that are under way
        assert float(child_says(code, QKV_FAST_ISA=isa or None)) < 0.2


def test_a_child_process_shows_its_errors():
    """The tests above would see a failure."""
    assert child("raise SystemExit(3)").returncode == 3
    with pytest.raises(subprocess.TimeoutExpired):
        child("import time; time.sleep(9)", timeout=1)
