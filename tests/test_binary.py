"""The objects of the C core, compiled as setup.py compiles them: what runs everywhere is for every CPU.

A binary that is right on the machine that built it can still die of an illegal instruction on an older one:
if several files compile a function of a header, the linker may keep the AVX-512 copy for all. So each file
built for every CPU is scanned for wide registers, and one built for one CPU exports nothing but its table.
"""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _util import once

pytestmark = pytest.mark.full  # compiles the core once more
CHECKOUT = Path(__file__).resolve().parents[1]
WIDE = re.compile(r"%?\b[yz]mm\d+\b")
# Nothing in the core prints, aborts or exits.
FORBIDDEN = {"printf", "fprintf", "puts", "fputs", "putchar", "fwrite", "perror", "abort", "exit", "_exit"}
FORBIDDEN |= {"__assert_fail", "__printf_chk", "__fprintf_chk"}


def tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def setup():
    """The tables of setup.py."""
    return runpy.run_path(str(CHECKOUT / "setup.py"), run_name="tables")


@pytest.fixture(scope="module")
def objects(setup, tmp_path_factory):
    """{source file: object} of the core, with the flags of a wheel."""
    if sys.platform == "win32":
        pytest.skip("the scan reads what objdump and nm print of ELF and Mach-O objects")
    from setuptools._distutils.ccompiler import new_compiler
    from setuptools._distutils.sysconfig import customize_compiler

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(CHECKOUT)
        patch.delenv("CFLAGS", raising=False)  # who sets -march=native there wants wide registers
        compiler = new_compiler()
        customize_compiler(compiler)
        for needed in (compiler.compiler_so[0], "objdump", "nm"):
            if not shutil.which(needed):
                pytest.skip(f"the scan needs {needed}, which is not here")

        def build(folder):
            return setup["Core"](compiler, str(folder), debug_info=False).build()

        return build(once(tmp_path_factory, "objects", build))  # the second time, nothing is out of date


def wide_registers(path):
    """The instructions that name a ymm or zmm register."""
    lines = tool("objdump", "-d", "--no-show-raw-insn", path).splitlines()
    return [line.strip() for line in lines if WIDE.search(line)]


def test_only_cpu_paths_use_wide_registers(setup, objects):
    found = {source for source, o in objects.items() if wide_registers(o)}
    wide = {path.source for path in setup["PATHS"] if path.target == "x86_64"}
    assert found == wide & objects.keys()


def symbols(path, *options):
    """Names that nm lists; Mach-O puts an underscore in front of C's."""
    names = {line.split()[-1] for line in tool("nm", *options, path).splitlines() if line.strip()}
    return {name.removeprefix("_") for name in names} if sys.platform == "darwin" else names


def test_a_cpu_path_exports_its_table_only(objects):
    kernels = [source for source in objects if source.startswith("src/kernels/")]
    exported = {source: symbols(objects[source], "-g", "--defined-only") for source in kernels}
    assert exported == {source: {f"qkv_{Path(source).stem}"} for source in kernels}


def test_every_exported_name_has_the_prefix(objects):
    names = set().union(*(symbols(o, "-g", "--defined-only") for o in objects.values()))
    assert not {name for name in names if not name.startswith("qkv_")}


def test_the_core_never_prints_aborts_or_exits(objects):
    assert not {source: bad for source, o in objects.items() if (bad := symbols(o, "-u") & FORBIDDEN)}


def test_nothing_runs_when_the_library_is_loaded(objects):
    constructors = re.compile(r"init_array|\.ctors|mod_init_func")
    assert not [source for source, o in objects.items() if constructors.search(tool("objdump", "-h", o))]
