"""How many threads a process uses by itself: environment variables, affinity, control groups."""

import os

import numpy as np
import pytest
from _limits import LIMITS, tree
from _util import child_says

from qkv_fast import _runtime

HOW_MANY = "import qkv_fast; print(qkv_fast.get_num_threads())"


@pytest.mark.parametrize(
    "environment, expected",
    [
        (dict(QKV_FAST_NUM_THREADS=3), 3),
        (dict(OMP_NUM_THREADS=4), 4),
        (dict(QKV_FAST_NUM_THREADS=3, OMP_NUM_THREADS=4), 3),
        (dict(OMP_NUM_THREADS="4,2"), 4),  # OpenMP's own form: one count per nesting level
        (dict(QKV_FAST_NUM_THREADS="many", OMP_NUM_THREADS=3), 3),  # what is no count is no setting
        (dict(QKV_FAST_NUM_THREADS="0", OMP_NUM_THREADS=3), 3),
        (dict(QKV_FAST_NUM_THREADS="-1", OMP_NUM_THREADS=" 3 "), 3),
    ],
)
def test_environment(environment, expected):
    assert child_says(HOW_MANY, **{**LIMITS, **environment}) == str(expected)


def test_setting_beats_environment():
    code = "import qkv_fast; qkv_fast.set_num_threads(2); print(qkv_fast.get_num_threads())"
    assert child_says(code, **{**LIMITS, "QKV_FAST_NUM_THREADS": 3}) == "2"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity masks")
def test_affinity():
    """One CPU allowed, one thread: as under `taskset`."""
    code = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {HOW_MANY}"
    assert child_says(code, **LIMITS) == "1"


def test_default_is_what_the_process_may_use():
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _runtime.cpu_quota()
    n = int(child_says(HOW_MANY, **LIMITS))
    assert 1 <= n <= allowed and (quota is None or n <= max(1, np.ceil(quota)))
    if quota is None:
        assert n == allowed


@pytest.mark.parametrize(
    "files, quota",
    [
        ({}, None),
        # version 2: one hierarchy; the process's group and every one above it counts
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "50000 25000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
            },
            3.0,
        ),
        # a container sees its own group as the root, under a path that it cannot see
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": "0::/docker/1\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        # version 1: the cpu controller, alone or with cpuacct, has its own hierarchy
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/y\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/docker/1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            2.0,
        ),
        # both, as systemd's hybrid mode has it: version 2 without controllers
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n0::/user.slice\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        # a path with a colon; less than one CPU
        ({"proc/self/cgroup": "0::/a:b\n", "sys/fs/cgroup/a:b/cpu.max": "50000 100000\n"}, 0.5),
        # nonsense is no limit
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "\n"}, None),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "many 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "100000 0\n"}, None),
        ({"proc/self/cgroup": "gibberish\n"}, None),
    ],
)
def test_cgroup_quota(tmp_path, files, quota):
    assert _runtime.cpu_quota(tree(tmp_path, files)) == quota
