"""What every test stands on: the installed package, a choice of CPU path, how much of all cases runs, and who runs it.

How much: of each test that is a product of parametrizations, `pytest` takes a sample in which each value of each of
them occurs, always the same one, and leaves out tests marked `full`. Who names a test, `pytest file::test`, gets all
of it. `pytest --full` takes everything, with more examples of hypothesis, and `pytest --exhaustive` also every size
where those tests walk through a sample.

Who: folders of tests run in one process per CPU, by pytest-xdist; files and single tests, or all without that package,
in one process. Tests marked `alone` (of time, signals, forks, or the threads and memory of a process) run when the
other processes have ended, one after another, in the process that started them.
"""

import itertools
import json
import os
import random
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before numpy is imported: the plain NumPy that results are compared with has no threads that keep our pool's
# cores busy after each product.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Programs of JAX run once, on few numbers: what takes time is to compile them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import qkv_fast
from qkv_fast._runtime import force_isa

CHECKOUT = Path(__file__).resolve().parents[1]
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:  # one process of many: calls that name no number still have two threads
    os.environ.setdefault("QKV_FAST_NUM_THREADS", "2")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all cases where the default is a sample (minutes)")
    parser.addoption("--exhaustive", action="store_true", help="and all sizes where those take a sample (hours)")


def pytest_configure(config):
    option = config.option
    option.full |= option.exhaustive
    # Derandomised: a failure is there again in the next run. An example may take a second on a busy machine.
    # The one function-scoped fixture in use, `isa`, is the same for all examples of a test.
    settings.register_profile(
        "qkv_fast",
        derandomize=True,
        deadline=None,
        max_examples=2000 if option.exhaustive else 200 if option.full else 50,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("qkv_fast")


def is_editable(name):
    """Whether a distribution was installed with `pip install -e` (PEP 610)."""
    try:
        origin = metadata.distribution(name).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return False
    return bool(origin) and json.loads(origin).get("dir_info", {}).get("editable", False)


@pytest.fixture(scope="session", autouse=True)
def installed_package():
    """The tests are about what a user gets, not about the folder that happens to have the package's name."""
    package = Path(qkv_fast.__file__).resolve()
    if package.is_relative_to(CHECKOUT / "qkv_fast") and not is_editable("qkv-fast"):
        pytest.fail(f"the tests import {package.parent}: run `pip install '.[test]'`, then `pytest`")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    if IS_WORKER:  # it would start workers of its own, and those theirs
        return
    option = config.option
    unset = getattr(option, "numprocesses", 0) is None and option.dist == "no"
    if unset and not option.usepdb and all(Path(name).is_dir() for name in config.args):
        option.numprocesses = "auto"


def has_workers(config):
    return config.pluginmanager.has_plugin("dsession")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """After the workers' tests, those that run alone: the workers have ended by then."""
    done = yield
    if has_workers(session.config):
        session.config.pluginmanager.get_plugin("terminalreporter").ensure_newline()
        others = session.testscollected
        items = session.perform_collect()
        session.testscollected += others
        for item, following in itertools.pairwise([*items, None]):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail or session.shouldstop:
                raise session.Interrupted(session.shouldfail or session.shouldstop)
    return done


def pytest_collection_modifyitems(config, items):
    leave_out_types_of_other_paths(config, items)
    if not config.option.full and not any("::" in name for name in config.args):
        take_a_sample(config, items)
    if IS_WORKER or has_workers(config):
        items[:] = [item for item in items if bool(item.get_closest_marker("alone")) == has_workers(config)]


def leave_out_types_of_other_paths(config, items):
    """A path that only multiplies pairs of bfloat16 leaves all else to the next: other types are tested there."""
    given = [(item, getattr(item, "callspec", None)) for item in items]
    others = ("float16", "float32", "float64")
    extra = [
        item
        for item, spec in given
        if spec and spec.params.get("isa", "").endswith("bf16") and spec.params.get("dtype") in others
    ]
    if extra:
        config.hook.pytest_deselected(items=extra)
        items[:] = [item for item in items if item not in set(extra)]


def take_a_sample(config, items):
    """Of each test's cases as few as have each value of each parametrization: first those with most that are new."""
    by_test = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("full"):
            values = enumerate(item.callspec._idlist) if hasattr(item, "callspec") else [item.name]
            by_test[item.nodeid.partition("[")[0]].append((item, set(values)))
    kept = set()
    for test, cases in by_test.items():
        shuffled, seen = random.Random(test).sample(cases, len(cases)), set()
        for new in range(len(shuffled[0][1]), 0, -1):
            for item, values in shuffled:
                if len(values - seen) >= new:
                    kept.add(item)
                    seen |= values
    if left_out := [item for item in items if item not in kept]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item in kept]


@pytest.fixture(params=qkv_fast.available_isas())
def isa(request):
    """Each CPU path of this machine in turn; calls inside the test use it."""
    with force_isa(request.param):
        yield request.param
