"""show_config(): what it says is so, in child processes with settings, variables, affinity and control groups."""

import ast
import os
import shutil
import sys

import numpy as np
import pytest
from _limits import LIMITS, tree
from _util import child_says

import qkv_fast

ASK = """
import qkv_fast
config = qkv_fast.show_config(mode="dicts")
print({name: config["threads"][name] for name in ("count", "from", "CPUs allowed", "control group's quota", "ignored")})
"""


def threads(code="", *, prefix=(), **environment):
    return ast.literal_eval(child_says(code + ASK, prefix=prefix, **{**LIMITS, **environment}))


def faked(root):
    """Code after which the process sees the control groups under `root`."""
    return f"""
import functools
from qkv_fast import _runtime
_runtime.cpu_quota = functools.partial(_runtime.cpu_quota, {root!r})
_runtime.allowed_cpus = lambda: 8
"""


def test_sections_and_facts():
    config = qkv_fast.show_config(mode="dicts")
    assert list(config) == ["versions", "build", "cpu", "path", "threads", "environment"]
    assert config["versions"]["numpy"] == np.__version__ and config["versions"]["qkv_fast"] == qkv_fast.__version__
    assert config["path"]["available"] == qkv_fast.available_isas() and config["path"]["in use"] == qkv_fast.isa()
    assert config["threads"]["count"] == qkv_fast.get_num_threads()
    assert any(name in config["build"]["compiler"].lower() for name in ("gcc", "clang", "llvm", "msvc"))
    # A path runs here exactly if the CPU has all that it needs.
    features, built = config["cpu"]["features"], config["build"]["paths"]
    runs = tuple(path for path, needs in built.items() if all(features[name] for name in needs))
    assert runs == qkv_fast.available_isas() and built["portable"] == ()


def test_text(capsys):
    assert qkv_fast.show_config() is None
    text = capsys.readouterr().out
    config = qkv_fast.show_config(mode="dicts")
    for word in (*config, qkv_fast.isa(), np.__version__, config["build"]["compiler"], config["threads"]["from"]):
        assert str(word) in text


@pytest.mark.parametrize("mode", ["text", None, "dict"])
def test_bad_mode(mode):
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts'"):
        qkv_fast.show_config(mode=mode)


@pytest.mark.parametrize(
    "code, environment, count, source",
    [
        ("", dict(QKV_FAST_NUM_THREADS=3), 3, "QKV_FAST_NUM_THREADS"),
        ("", dict(OMP_NUM_THREADS="4,2"), 4, "OMP_NUM_THREADS"),
        ("import qkv_fast; qkv_fast.set_num_threads(5)", dict(QKV_FAST_NUM_THREADS=3), 5, "set_num_threads"),
        ("import qkv_fast; inside = qkv_fast.num_threads(6); inside.__enter__()", {}, 6, "num_threads(n)"),
    ],
)
def test_where_the_number_comes_from(code, environment, count, source):
    said = threads(code, **environment)
    assert (said["count"], said["from"], said["ignored"]) == (count, source, {})


def test_a_variable_that_says_no_count_is_named():
    said = threads(QKV_FAST_NUM_THREADS="many", OMP_NUM_THREADS="0")
    assert said["from"] not in LIMITS and set(said["ignored"]) == set(LIMITS)
    assert said["ignored"]["QKV_FAST_NUM_THREADS"] == "'many' is no count"
    assert threads(QKV_FAST_NUM_THREADS="", OMP_NUM_THREADS=" 2 ")["ignored"] == {}


@pytest.mark.skipif(not (sys.platform.startswith("linux") and shutil.which("taskset")), reason="needs taskset")
def test_taskset():
    cpu = str(min(os.sched_getaffinity(0)))
    said = threads(prefix=("taskset", "-c", cpu))
    assert (said["count"], said["CPUs allowed"]) == (1, 1) and "affinity" in said["from"]
    said = threads(prefix=("taskset", "-c", cpu), QKV_FAST_NUM_THREADS=3)
    assert (said["count"], said["CPUs allowed"], said["from"]) == (3, 1, "QKV_FAST_NUM_THREADS")


V1 = {
    "proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n1:name=systemd:/y\n",
    "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "300000\n",
    "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
}
V2 = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "350000 100000\n"}
SMALL = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}
LARGE = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}


@pytest.mark.parametrize(
    "files, quota, count", [(V1, 3.0, 3), (V2, 3.5, 3), (SMALL, 0.2, 1), (LARGE, 64.0, 8), ({}, None, 8)]
)
def test_control_groups(tmp_path, files, quota, count):
    said = threads(faked(tree(tmp_path, files)))
    assert (said["count"], said["control group's quota"], said["CPUs allowed"]) == (count, quota, 8)
    assert ("quota" in said["from"]) == (count < 8)
    assert threads(faked(tree(tmp_path, files)), QKV_FAST_NUM_THREADS=5)["count"] == 5


def test_why_a_path_is_not_used():
    config = qkv_fast.show_config(mode="dicts")
    features, built, path = config["cpu"]["features"], config["build"]["paths"], config["path"]
    assert set(path["not used"]) == set(built) - {path["in use"]}
    for name, reason in path["not used"].items():
        missing = [need for need in built[name] if not features[need]]
        assert ("runs here" in reason) == (name in path["available"]) == (not missing), name
        assert all(need in reason for need in missing), name
    code = "import qkv_fast; print(qkv_fast.show_config(mode='dicts')['path']['not used'])"
    best = qkv_fast.available_isas()[0]
    if best != "portable":
        assert f"{best} comes first" in ast.literal_eval(child_says(code, QKV_FAST_ISA=None))["portable"]
        forced = ast.literal_eval(child_says(code, QKV_FAST_ISA="portable"))
        assert forced[best] == "built and runs here; QKV_FAST_ISA chose portable" and "portable" not in forced


def test_the_path_and_what_chose_it():
    code = "import qkv_fast; print(*[qkv_fast.show_config(mode='dicts')['path'][key] for key in ('in use', 'from')])"
    assert child_says(code, QKV_FAST_ISA="portable") == "portable QKV_FAST_ISA"
    assert child_says(code, QKV_FAST_ISA=None) == f"{qkv_fast.available_isas()[0]} best available"
