"""The unit for tiles and the process: what it computes, permission, signal stacks, threads, fork.

What needs the unit itself is skipped elsewhere by name ("no AMX"); all else runs on its emulation too.
"""

import errno

import numpy as np
import pytest
from _util import child_says, same_bits

import qkv_fast
from qkv_fast._runtime import force_isa

PATHS = qkv_fast.available_isas()
TILED = [name for name in PATHS if name.startswith("amx")]
BUILT = qkv_fast.show_config("dicts")["build"]["paths"]
on_hardware = pytest.mark.skipif("amx" not in PATHS, reason="no AMX")

# In a child process: whether a thread may have an alternate signal stack of so many bytes.
SIGNAL_STACK = """
import ctypes, errno
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
libc = ctypes.CDLL(None, use_errno=True)
kept = []
def signal_stack(size):
    memory = ctypes.create_string_buffer(size)
    kept.append(memory)
    stack = Stack(ctypes.addressof(memory), 0, size)
    return 0 if libc.sigaltstack(ctypes.byref(stack), None) == 0 else ctypes.get_errno()
"""
CALL = """
import numpy as np, qkv_fast
from qkv_fast import _runtime
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 150, 40)).astype(np.float32)
def path():
    config = qkv_fast.show_config("dicts")["path"]
    return config["in use"], config["tiles"], qkv_fast.explain(q, k, v).kernel
"""


@pytest.fixture(params=TILED or [pytest.param("amx", marks=pytest.mark.skip(reason="no path here multiplies tiles"))])
def tiled(request):
    return request.param


def product(a, b, path):
    with force_isa(path):
        return qkv_fast.scores(a, b, scale=1, out=np.empty((len(a), len(b)), np.float32))


@pytest.mark.parametrize("terms", [1, 2, 31, 32, 64, 200])
def test_the_sums_of_a_tile(tiled, terms):
    """Per 32 terms two chains of multiply-adds from zero, over the even and the odd ones, whose sum is added to C.
    Numbers have few bits and like sizes, so that float64 holds a multiply-add before it is rounded."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(terms)
    a, b = (
        (rng.integers(-255, 256, (n, terms)) * 2.0 ** rng.integers(-4, 5, (n, terms))).astype(bfloat16)
        for n in (70, 50)
    )
    c = np.zeros((70, 50), np.float32)
    for first in range(0, terms, 32):
        chains = np.zeros((2, 70, 50))
        for t in range(first, min(first + 32, terms)):
            chain = chains[t % 2] + np.outer(a[:, t].astype(float), b[:, t].astype(float))
            chains[t % 2] = chain.astype(np.float32)
        c += chains[0].astype(np.float32) + chains[1].astype(np.float32)
    assert terms < 31 or (c != (a.astype(float) @ b.T.astype(float)).astype(np.float32)).any()
    same_bits(product(a, b, tiled) + np.float32(0), c + np.float32(0))


@on_hardware
@pytest.mark.skipif("amx_emulated" not in PATHS, reason="the emulation was not built")
def test_the_unit_and_its_emulation():
    """Bit for bit, of any bits at all: subnormal, infinite, NaN; that is compared as NaN, not by what it holds."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for seed in range(50):
        rng = np.random.default_rng(seed)
        a, b = (rng.integers(0, 2**16, (n, 32), np.uint16) for n in (320, 160))
        if seed % 5:  # else hardly anything is finite
            a, b = ((x & 0x80FF) | (rng.integers(0x30, 0x4F, x.shape) << 8).astype(np.uint16) for x in (a, b))
        if seed % 5 == 1:  # subnormal numbers, and products and sums that are
            a[:, ::3] &= 0x80FF
            b[:, 1::3] &= 0x81FF
        ours, emulated = (product(a.view(bfloat16), b.view(bfloat16), path) for path in ("amx", "amx_emulated"))
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(emulated))
        same_bits(np.nan_to_num(ours, nan=0), np.nan_to_num(emulated, nan=0))


def test_permission_that_is_refused(tiled):
    """The path behind computes, without a word but that of show_config; with a forced path as well."""
    behind = PATHS[PATHS.index(tiled) + 1]
    code = f"""{CALL}
_runtime.refuse_tiles()
out, s = qkv_fast.attention(q, k, v), qkv_fast.scores(q, k)
used = path()
with _runtime.force_isa({behind!r}):
    same = (qkv_fast.attention(q, k, v) == out).all() and (qkv_fast.scores(q, k) == s).all()
print(*used, same, sep="|")
"""
    name, said, kernel, same = child_says(code, QKV_FAST_ISA=tiled).split("|")
    assert name == tiled and kernel == f"attend_f32_{behind}" and same == "True"
    assert "alternate signal stack" in said and "the path behind" in said


def test_what_is_said_of_permission():
    for path in PATHS:
        code = CALL + "print(path()[1]); qkv_fast.attention(q, k, v); print(path()[1])"
        said = child_says(code, QKV_FAST_ISA=path)
        if path == "amx":
            assert said == "permitted"
        else:  # nobody asked: the emulation needs no permission
            assert ("asked for by the first call" in said) if "amx" in PATHS else said == "None"


@pytest.mark.parametrize("path", [name for name in BUILT if name not in PATHS] or ["no such path"])
def test_a_path_that_this_machine_lacks(path):
    """As where a hypervisor hides the unit: not chosen, named with what is missing, and an error if it is forced."""
    if path in BUILT:
        code = "import qkv_fast; print(qkv_fast.show_config('dicts')['path']['not used'])"
        assert f"'{path}': 'built; needs " in child_says(code, QKV_FAST_ISA=None)
    forced = "try:\n    import qkv_fast\nexcept ImportError as error:\n    print(error)"
    assert path in child_says(forced, QKV_FAST_ISA=path)
    with pytest.raises(ValueError, match=path), force_isa(path):
        pass


@on_hardware
def test_signal_stacks_once_tiles_are_permitted():
    """The system refuses those under 12 KB from then on, in all threads."""
    code = f"""{CALL}{SIGNAL_STACK}
before = signal_stack(8192), signal_stack(1 << 16)
qkv_fast.attention(q, k, v)
print(*before, signal_stack(8192), signal_stack(1 << 16), path()[1])
"""
    assert child_says(code, QKV_FAST_ISA="amx").split() == ["0", "0", str(errno.ENOMEM), "0", "permitted"]


@on_hardware
def test_a_small_signal_stack_beforehand():
    """Then permission is refused, and stays so: bits do not change in a process."""
    code = f"""{CALL}{SIGNAL_STACK}
assert signal_stack(8192) == 0
out = qkv_fast.attention(q, k, v)
assert signal_stack(1 << 16) == 0
assert (qkv_fast.attention(q, k, v) == out).all()
print(*path(), sep="|")
"""
    _, said, kernel = child_says(code, QKV_FAST_ISA="amx").split("|")
    assert "alternate signal stack" in said and kernel.startswith("attend_f32_") and not kernel.endswith("_amx")


def test_threads_of_the_host_and_a_fork(tiled):
    """A thread that was there before permission was given, one that comes later, and a child: the same bits."""
    code = f"""{CALL}
import os, threading
begin, outs = threading.Barrier(3), []
def call():
    begin.wait()
    for _ in range(3):
        outs.append(qkv_fast.attention(q, k, v, num_threads=2))
threads = [threading.Thread(target=call) for _ in range(2)]
for thread in threads: thread.start()
begin.wait()
for _ in range(3):
    outs.append(qkv_fast.attention(q, k, v, num_threads=2))
    child = os.fork()
    if not child:  # while others have tiles at work
        os._exit(not (qkv_fast.attention(q, k, v, num_threads=2) == outs[0]).all())
    assert os.waitpid(child, 0)[1] == 0
for thread in threads: thread.join()
print(len(outs), all((out == outs[0]).all() for out in outs), path()[2])
"""
    assert child_says(code, QKV_FAST_ISA=tiled) == f"9 True attend_f32_{tiled}"


def test_signal_handlers_that_use_tiles(tiled):
    """Python runs them while a call is asked whether to stop: tiles are not live then, and both results are right."""
    code = f"""{CALL}
import signal
more = np.random.default_rng(1).standard_normal((3, 2, 1000, 64)).astype(np.float32)
expected, inner = qkv_fast.attention(*more, num_threads=2), qkv_fast.attention(q, k, v)
seen = []
def handler(*_):
    seen.append((qkv_fast.attention(q, k, v) == inner).all())
    signal.setitimer(signal.ITIMER_REAL, 0.005)
signal.signal(signal.SIGALRM, handler)
handler()
while len(seen) < 5:
    assert (qkv_fast.attention(*more, num_threads=2) == expected).all()
signal.setitimer(signal.ITIMER_REAL, 0)
print(all(seen))
"""
    assert child_says(code, QKV_FAST_ISA=tiled, timeout=120) == "True"
