"""threadpoolctl sees our pool and limits it. In child processes, since what is registered there stays."""

import pytest
from _util import child_says

pytest.importorskip("threadpoolctl", reason="the extra [test] installs it")

PREPARE = """
import asyncio, ctypes, os, shutil, sys, tempfile, threading
import numpy as np
def ours():
    return [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "qkv_fast"]
def used():
    x = np.ones((32, 128, 32), "float32")
    with qkv_fast._runtime.counters() as did:
        qkv_fast.attention(x, x, x)
    return did["threads"]
"""
LOADED = PREPARE + "import threadpoolctl, qkv_fast\nqkv_fast.set_num_threads(3)\n"


def test_import_registers_where_threadpoolctl_is_loaded():
    code = LOADED + "(pool,) = ours(); print(sorted(pool.items()))"
    said = child_says(code)
    for pair in ("('num_threads', 3)", "('internal_api', 'qkv_fast')", "('version', '"):
        assert pair in said
    assert "_core." in said


def test_import_does_not_load_threadpoolctl():
    assert child_says("import sys, qkv_fast; print('threadpoolctl' in sys.modules)") == "False"


def test_registering_later():
    code = (
        PREPARE
        + """
import qkv_fast, threadpoolctl
assert not ours()
import qkv_fast.integrations.threadpoolctl
assert len(ours()) == 1
import importlib
importlib.reload(qkv_fast.integrations.threadpoolctl)
print(len(ours()))
"""
    )
    assert child_says(code) == "1"


def test_a_threadpoolctl_without_registration():
    """Before 3.2 there was none: the package imports, the integration says why it does not."""
    code = """
import sys, types
sys.modules["threadpoolctl"] = types.ModuleType("threadpoolctl")
import qkv_fast
try:
    import qkv_fast.integrations.threadpoolctl
except ImportError as error:
    print(error)
"""
    assert "3.2" in child_says(code)


def test_limits():
    code = (
        LOADED
        + """
from threadpoolctl import threadpool_limits
with threadpool_limits(1):
    assert used() == qkv_fast.get_num_threads() == 1
    with threadpool_limits({"qkv_fast": 2}):
        assert used() == 2 and ours()[0]["num_threads"] == 2
    assert used() == 1
    with qkv_fast.num_threads(4):
        assert used() == 4
    assert used() == 1
assert used() == 3
qkv_fast.set_num_threads(5)                 # the limit has left nothing behind
assert used() == qkv_fast.get_num_threads() == 5
with qkv_fast.num_threads(2):
    with threadpool_limits(1, user_api="qkv_fast"):
        assert used() == 1
    assert used() == 2
assert used() == 5
with threadpool_limits(1, user_api="blas"):
    assert used() == 5
threadpool_limits(2)                        # without a block it stays
print(used())
"""
    )
    assert child_says(code) == "2"


def test_limits_are_the_contexts_own():
    code = (
        LOADED
        + """
from threadpoolctl import threadpool_limits
elsewhere = []
with threadpool_limits(1, user_api="qkv_fast"):
    thread = threading.Thread(target=lambda: elsewhere.append(used()))
    thread.start(); thread.join()
async def task(n, seen):
    with threadpool_limits(n, user_api="qkv_fast"):
        for _ in range(3):
            await asyncio.sleep(0)
            seen.add(used())
async def main():
    seen = set(), set()
    await asyncio.gather(task(1, seen[0]), task(2, seen[1]))
    return seen
inherits = getattr(sys.flags, "thread_inherit_context", 0)
assert elsewhere == [1 if inherits else 3], elsewhere
(scope,) = [p["thread_limit_scope"] for p in threadpoolctl.threadpool_info(debugging_info=True)
            if p["user_api"] == "qkv_fast"] if threadpoolctl.__version__ >= "3.7" else ["current_thread"]
assert inherits or scope == "current_thread", scope
print(asyncio.run(main()), used())
"""
    )
    assert child_says(code) == "({1}, {2}) 3"


def test_a_stranger_of_the_same_file_name():
    """Another library called like ours is not taken for it: it lacks our symbol."""
    code = (
        LOADED
        + """
import numpy.linalg._umath_linalg as other
folder = tempfile.mkdtemp()
path = os.path.join(folder, os.path.basename(qkv_fast._core.__file__))
shutil.copyfile(other.__file__, path)
ctypes.CDLL(path)
(pool,) = ours()
print(os.path.samefile(pool["filepath"], qkv_fast._core.__file__))
"""
    )
    assert child_says(code) == "True"


def test_bad_limits():
    code = LOADED + "threadpoolctl.threadpool_limits({'qkv_fast': 0})"
    with pytest.raises(AssertionError, match="must be at least 1, got 0"):
        child_says(code)
