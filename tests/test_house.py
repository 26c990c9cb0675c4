"""Who may include or import whom: the table of src/README.md, held by reading the #include and import lines.

Each file of src/ and each Python file has its row. A row says all that its files may include of ours, so a
new dependency is a decision that shows here.
"""

import ast
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

# file: the headers of src/ that it may include (its own always)
HEADERS = {
    "qkv.h": "",
    "kernels/kernels.h": "",
    "kernels/*.c": "kernels/kernels.h kernels/compiler.h kernels/*_tpl.h kernels/*_poly.h",
    "kernels/compiler.h": "",
    "kernels/*_poly.h": "",
    "kernels/*_tpl.h": "kernels/kernels.h kernels/compiler.h kernels/*_tpl.h kernels/*_poly.h",
    "cpu.[ch]": "qkv.h kernels/kernels.h",
    "memory.[ch]": "qkv.h",
    "mask.h": "qkv.h",
    "threads.[ch]": "qkv.h memory.h affinity.h",
    "affinity.[ch]": "",
    "plan.[ch]": "plan_tools.h qkv.h kernels/kernels.h cpu.h mask.h",
    "plan_stages.c": "plan_tools.h",
    "plan_tools.h": "plan.h cpu.h mask.h",
    "tile.[ch]": "plan.h mask.h",
    "call.h": "plan.h threads.h",
    "forward.c": "call.h tile.h plan.h mask.h threads.h memory.h",
    "decode.c": "call.h tile.h plan.h mask.h threads.h",
    "elements.c": "tile.h plan.h mask.h",
    "explain.c": "plan.h mask.h tile.h",
    "cache.c": "qkv.h kernels/kernels.h cpu.h",
    "stages.c": "plan.h mask.h threads.h memory.h",
    "hooks.c": "*",
}

# file: the system's headers that it may include
CONTRACT = "stddef.h stdint.h"
C11 = f"{CONTRACT} fenv.h float.h limits.h math.h stdalign.h stdatomic.h stdbool.h stdlib.h string.h time.h"
SYSTEM = {
    "qkv.h": CONTRACT,
    "kernels/kernels.h": CONTRACT,
    "kernels/*.c": f"{C11} immintrin.h arm_neon.h",
    "cpu.c": f"{C11} cpuid.h intrin.h",
    "threads.c": f"{C11} errno.h pthread.h sched.h signal.h unistd.h process.h windows.h",
    "affinity.[ch]": f"{C11} pthread.h sched.h",
    "*": C11,
}

# file: what it may import of qkv_fast; PUBLIC is whatever has no leading underscore
PUBLIC = "public"
IMPORTS = {
    "tests/*.py": f"{PUBLIC} _runtime",
    "bench/*.py": f"{PUBLIC} _runtime",
    "examples/*.py": PUBLIC,
    "qkv_fast/integrations/threadpoolctl.py": f"{PUBLIC} _threadpoolctl",
    "qkv_fast/integrations/*.py": PUBLIC,
    "qkv_fast/plot.py": PUBLIC,
    "qkv_fast/*.py": "*",
}
BOUNDARY = "_qkv numpy cpython libc cython"  # what qkv_fast/_core.pyx may cimport or import


def row(table, name):
    """The first row whose pattern matches: exact names stand above patterns."""
    return next((table[pattern].split() for pattern in table if fnmatchcase(name, pattern)), None)


def may_include(name, header):
    """`header` as it stands in the file, with its brackets or quotes."""
    if header.startswith("<"):
        return header.strip("<>") in row(SYSTEM, name)
    base = (CHECKOUT / "src" / name).parent
    found = [folder / header.strip('"') for folder in (base, CHECKOUT / "src")]
    path = next((path.resolve() for path in found if path.is_file()), None)
    if path is None or not path.is_relative_to(CHECKOUT / "src"):
        return False
    target = path.relative_to(CHECKOUT / "src").as_posix()
    own = Path(name).with_suffix(".h").as_posix()
    return target == own or any(fnmatchcase(target, pattern) for pattern in row(HEADERS, name))


def may_import(name, module):
    """`module` is the full name of what an import statement binds: package.module.attribute."""
    parts = module.split(".")
    if parts[0] != "qkv_fast":
        return True
    allowed = row(IMPORTS, name)
    private = [part for part in parts if part.startswith("_") and not part.endswith("__")]
    return allowed == ["*"] or not private or private[0] in allowed


def imports(path):
    """The full names that a Python file imports, at its top or later."""
    package = list(path.relative_to(CHECKOUT).parent.parts)
    if package[0] == "bench":
        package.insert(0, "qkv_fast")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def files(folder, *suffixes):
    return sorted(path for path in (CHECKOUT / folder).rglob("*") if path.suffix in suffixes)


C_FILES = [path.relative_to(CHECKOUT / "src").as_posix() for path in files("src", ".c", ".h")]
PYTHON_FILES = [
    path.relative_to(CHECKOUT).as_posix()
    for folder in ("qkv_fast", "tests", "bench", "examples")
    for path in files(folder, ".py")
]


@pytest.mark.parametrize("name", C_FILES)
def test_includes(name):
    assert row(HEADERS, name) is not None, "no row: which layer is this file in?"
    text = (CHECKOUT / "src" / name).read_text(encoding="utf-8")
    included = re.findall(r'^\s*#\s*include\s*([<"][^>"]*[>"])', text, re.MULTILINE)
    assert not [header for header in included if not may_include(name, header)]


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_imports(name):
    assert row(IMPORTS, name) is not None, "no row: which layer is this file in?"
    assert not [module for module in imports(CHECKOUT / name) if not may_import(name, module)]


def test_package_imports_no_integration():
    """The integrations import the package and a host framework; never the other way round."""
    package = [name for name in PYTHON_FILES if name.startswith("qkv_fast/") and "/integrations/" not in name]
    found = {module for name in package for module in imports(CHECKOUT / name)}
    assert not [module for module in found if "integrations" in module.split(".")]


def headers_of(name):
    text = (CHECKOUT / "qkv_fast" / name).read_text(encoding="utf-8")
    return re.findall(r'(?:cdef extern from|#\s*include)\s*["<]([^">]+)', text)


def test_boundary():
    text = (CHECKOUT / "qkv_fast" / "_core.pyx").read_text(encoding="utf-8")
    modules = {f"{a}.{b}" for a, b in re.findall(r"^\s*from\s+(\S+)\s+c?import\s+(\S+)", text, re.MULTILINE)}
    modules |= set(re.findall(r"^\s*c?import\s+(\S+)", text, re.MULTILINE))
    roots = {module.lstrip(".").removeprefix("qkv_fast.").split(".")[0] for module in modules}
    assert "_qkv" in roots and roots <= set(BOUNDARY.split())
    # The core is declared in the .pxd alone; what the .pyx takes from C directly is Python's.
    assert set(headers_of("_core.pyx")) <= {"Python.h"} and set(headers_of("_qkv.pxd")) == {"qkv.h"}


@pytest.mark.parametrize(
    "name, header",
    [
        ("forward.c", '"cpu.h"'),
        ("forward.c", "<immintrin.h>"),
        ("plan.c", '"threads.h"'),
        ("kernels/avx2.c", '"qkv.h"'),
        ("kernels/avx2.c", '"plan.h"'),
        ("kernels/kernels.h", '"qkv.h"'),
        ("qkv.h", "<Python.h>"),
        ("hooks.c", "<Python.h>"),
    ],
)
def test_the_rule_refuses(name, header):
    assert not may_include(name, header)


def test_the_rule_refuses_imports():
    assert not may_import("tests/test_x.py", "qkv_fast._core")
    assert not may_import("bench/runner.py", "qkv_fast._attention.attention")
    assert not may_import("examples/x.py", "qkv_fast._runtime.force_isa")
    assert may_import("tests/test_x.py", "qkv_fast._runtime.force_isa")
