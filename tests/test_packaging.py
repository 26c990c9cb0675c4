"""What is in the archives: the sdist builds, tests and documents the package; the wheel is the package only.

QKV_FAST_DIST names a folder with one of each; without it they are built here: a wheel takes a compiler and a minute.
"""

import email
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from _util import once

import qkv_fast

CHECKOUT = Path(__file__).resolve().parents[1]
ROOT_FILES = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
FOLDERS = ("src", "qkv_fast", "bench", "tests", "docs", "examples")
BUILT = {".so", ".pyd", ".o", ".obj", ".pyc"}
WHEEL_BYTES = 1_500_000


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
    assert wheel.stat().st_size <= WHEEL_BYTES
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
