"""What is in the archives: the sdist builds, tests and documents the package; the wheel is the package only.

QKV_FAST_DIST names a folder with one of each; without it they are built here: a wheel takes a compiler and a minute.
"""

import email
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from _util import once

import qkv_fast

CHECKOUT = Path(__file__).resolve().parents[1]
ROOT_FILES = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md"}
ROOT_FILES |= {"pyproject.toml", "setup.py"}
FOLDERS = ("src", "qkv_fast", "bench", "tests", "docs", "examples", "scripts")
BUILT = {".so", ".pyd", ".o", ".obj", ".pyc"}
release = SimpleNamespace(**runpy.run_path(str(CHECKOUT / "scripts" / "check_release.py")))
WORKFLOWS = sorted((CHECKOUT / ".github" / "workflows").glob("*.yml"))


def sources(folder):
    """The files of a folder of the checkout, without what builds and runs leave there."""
    files = (path for path in (CHECKOUT / folder).rglob("*") if path.is_file() and path.suffix not in BUILT)
    return {path.relative_to(CHECKOUT).as_posix() for path in files if not path.name.startswith(".")}


def build(archive, source, folder):
    # -P: a folder named build in the current directory is not the module.
    command = [sys.executable, "-P", "-m", "build", f"--{archive}", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    def make(folder):
        copy = tmp_path_factory.mktemp("copy")
        for name in sorted(ROOT_FILES.union(*map(sources, FOLDERS))):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, copy / name)
        build("sdist", copy, folder)

    dist = Path(os.environ.get("QKV_FAST_DIST") or once(tmp_path_factory, "sdist", make))
    (archive,) = dist.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist."""

    def make(folder):
        unpacked = tmp_path_factory.mktemp("unpacked")
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        build("wheel", unpacked / sdist.name.removesuffix(".tar.gz"), folder)

    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cl")[0]
    if "QKV_FAST_DIST" not in os.environ and not shutil.which(compiler):
        pytest.skip(f"building the wheel needs the compiler {compiler}, which is not here")
    dist = Path(os.environ.get("QKV_FAST_DIST") or once(tmp_path_factory, "wheel", make))
    (archive,) = dist.glob("*.whl")
    return archive


def test_sdist_has_every_source(sdist):
    top = f"qkv_fast-{qkv_fast.__version__}"
    assert sdist.name == f"{top}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {entry.name.removeprefix(f"{top}/") for entry in archive if entry.isfile()}
    made = {name for name in names if name.startswith("qkv_fast.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == ROOT_FILES.union(*map(sources, FOLDERS))


@pytest.mark.full
def test_wheel_has_the_package_only(wheel):
    assert wheel.stat().st_size <= release.WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if name.startswith(f"qkv_fast-{qkv_fast.__version__}.dist-info/")}
    binary = {name for name in names if name.startswith("qkv_fast/_core.") and name.endswith((".so", ".pyd"))}
    modules = {name for name in sources("qkv_fast") if name.endswith((".py", ".pyi", ".html", "/py.typed"))}
    modules |= {f"qkv_fast/{name}" for name in sources("bench") if name.endswith(".py")}
    assert len(binary) == 1
    assert names - about == modules | binary
    assert any(name.endswith("/LICENSE") for name in about)


@pytest.mark.full
def test_wheel_has_no_debug_symbols(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (binary,) = (archive.read(name) for name in archive.namelist() if name.endswith((".so", ".pyd")))
    found = [word for word in (b".debug_", b"__debug_info", b".symtab") if word in binary]
    assert not found


@pytest.mark.full
def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(name))
    always = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert always == ["numpy>=2.0"]
    assert about["Requires-Python"] == ">=3.11" and about["License-Expression"] == "BSD-3-Clause"
    assert about["Version"] == metadata.version("qkv-fast") == qkv_fast.__version__


def archives(folder, *wheels):
    """A folder with an sdist and wheels of version 1.2.0: {name: names in it}."""
    (folder / "qkv_fast-1.2.0.tar.gz").touch()
    for name, members in wheels:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member in members:
                archive.writestr(member, b"")
    return sorted(folder.iterdir())


GOOD = ("qkv_fast-1.2.0-cp312-cp312-win_amd64.whl", ["qkv_fast/__init__.py", "qkv_fast/_core.cp312-win_amd64.pyd"])


def test_a_release_is_what_its_archives_say(tmp_path):
    assert release.archive_faults(archives(tmp_path, GOOD), "1.2.0") == []
    found = release.archive_faults(archives(tmp_path, GOOD), "1.3.0")
    assert len(found) == 2 and "sdist of 1.3.0" in found[0] and "not of version 1.3.0" in found[1]


def test_a_release_has_wheels():
    assert release.archive_faults([Path("qkv_fast-1.2.0.tar.gz")], "1.2.0") == ["no wheel"]


def test_a_release_carries_no_library_but_the_extension(tmp_path):
    name, members = GOOD
    for extra in ("qkv_fast.libs/libgomp-1.so.1", "qkv_fast/.dylibs/libomp.dylib", "qkv_fast.libs/msvcp140.dll"):
        (fault,) = release.archive_faults(archives(tmp_path, (name, [*members, extra])), "1.2.0")
        assert extra in fault


def test_a_release_has_small_wheels(tmp_path):
    files = archives(tmp_path, GOOD)
    assert release.archive_faults(files, "1.2.0") == []
    with zipfile.ZipFile(tmp_path / GOOD[0], "a") as archive:  # which does not compress
        archive.writestr("qkv_fast/large.py", bytes(release.WHEEL_BYTES))
    (fault,) = release.archive_faults(files, "1.2.0")
    assert "more than 1500000" in fault


@pytest.mark.parametrize(
    "section, tagged, fault",
    [
        ("1.2.0 (2026-11-29)\n\n- A thing.\n\n## 1.1.0 (2026-01-01)\n", True, ""),
        ("1.2.0 (unreleased)\n\n- A thing.\n", False, ""),
        ("1.2.0 (unreleased)\n\n- A thing.\n", True, "no date"),
        ("1.1.0 (2026-01-01)\n\n- A thing.\n", True, "not 1.2.0's"),
        ("1.2.0 (2026-11-29)\n\n## 1.1.0 (2026-01-01)\n\n- A thing.\n", True, "no entry"),
        ("1.2.0\n\n- A thing.\n", True, "not 1.2.0's"),
    ],
)
def test_a_release_is_in_the_changelog(section, tagged, fault):
    found = release.changelog_faults(f"# Changelog\n\n## {section}", "1.2.0", tagged)
    assert (fault in found[0]) if fault else found == []


def test_the_changelog_has_this_version():
    assert release.version(CHECKOUT) == qkv_fast.__version__
    text = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert release.changelog_faults(text, qkv_fast.__version__, tagged=False) == []


@pytest.mark.skipif(not WORKFLOWS, reason="the sdist has no workflows")
def test_workflows_run_actions_of_a_commit_and_may_do_nothing_unasked():
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        assert "\npermissions: {}\n" in text, path.name
        used = re.findall(r"uses: *(\S+)(.*)", text)
        assert used, path.name
        for action, comment in used:
            if action.startswith("./"):  # of the commit itself
                assert (CHECKOUT / action).is_file(), action
                continue
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action


def test_wheels_are_built_for_every_python_that_is_promised():
    """Those that the classifiers name, and free-threaded ones from the first that NumPy supports as such."""
    with open(CHECKOUT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    classifiers = project["project"]["classifiers"]
    named = re.findall(r"Python :: 3\.(\d+)", "\n".join(classifiers))
    (built,) = re.fullmatch(r"cp3\{(.+)\}-\*", project["tool"]["cibuildwheel"]["build"]).groups()
    assert [n for n in built.split(",") if not n.endswith("t")] == named
    assert {n.rstrip("t") for n in built.split(",") if n.endswith("t")} <= set(named)


def test_source_folder_says_that_it_is_not_the_package(tmp_path):
    """Python puts the current directory first, so in a checkout the folder hides what is installed."""
    for name in sources("qkv_fast"):  # a copy: the checkout may hold the extension of an editable install
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CHECKOUT / name, tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": str(Path(np.__file__).parents[1])}
    environment.pop("PYTHONSAFEPATH", None)
    # -S: no .pth files, so that an editable install does not lend its extension.
    command = [sys.executable, "-S", "-c", "import qkv_fast"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError:") and "source" in last and "pip install" in last, done.stderr
