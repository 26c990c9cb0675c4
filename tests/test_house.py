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
    "kernels/portable_halves.h": "",
    "kernels/portable_tpl.h": "kernels/portable_halves.h",
    "kernels/*_tpl.h": "kernels/kernels.h kernels/compiler.h kernels/*_tpl.h kernels/*_poly.h",
    "cpu.[ch]": "qkv.h kernels/kernels.h",
    "memory.[ch]": "qkv.h",
    "mask.h": "qkv.h",
    "threads.[ch]": "qkv.h memory.h affinity.h system.h float_mode.h",
    "system.h": "",
    "float_mode.h": "",
    "affinity.[ch]": "",
    "types.h": "qkv.h kernels/kernels.h",
    "rows.h": "qkv.h",
    "beams.[ch]": "qkv.h mask.h",
    "plan_tools.h": "cpu.h mask.h types.h",
    "plan.[ch]": "qkv.h kernels/kernels.h cpu.h mask.h types.h plan_tools.h",
    "plan_stages.[ch]": "qkv.h kernels/kernels.h mask.h types.h plan_tools.h",
    "elements.[ch]": "plan.h mask.h rows.h types.h",
    "tile.[ch]": "plan.h mask.h rows.h elements.h",
    "spotlight.[ch]": "plan.h mask.h rows.h elements.h tile.h",
    "backward.[ch]": "plan.h mask.h rows.h elements.h tile.h types.h",
    "call.h": "plan.h threads.h",
    "decode.[ch]": "call.h tile.h elements.h mask.h rows.h types.h",
    "forward.[ch]": "plan.h backward.h beams.h call.h decode.h spotlight.h tile.h elements.h mask.h types.h memory.h",
    "explain.c": "beams.h cpu.h plan.h plan_stages.h forward.h elements.h mask.h types.h",
    "cache.c": "qkv.h kernels/kernels.h cpu.h",
    "choose.c": "qkv.h kernels/kernels.h cpu.h threads.h memory.h",
    "stages.c": "plan_stages.h mask.h threads.h memory.h types.h",
    "hooks.c": "*",
}

# file: the system's headers that it may include
CONTRACT = "stddef.h stdint.h"
C11 = f"{CONTRACT} fenv.h float.h limits.h math.h stdalign.h stdatomic.h stdbool.h stdlib.h string.h time.h"
SYSTEM = {
    "qkv.h": CONTRACT,
    "kernels/kernels.h": CONTRACT,
    "kernels/*.c": f"{C11} immintrin.h arm_neon.h",
    "cpu.c": f"{C11} cpuid.h intrin.h sys/auxv.h sys/syscall.h sys/sysctl.h unistd.h windows.h",
    "system.h": f"{C11} pthread.h sched.h signal.h unistd.h process.h windows.h",
    "affinity.[ch]": f"{C11} pthread.h sched.h",
    "float_mode.h": f"{C11} xmmintrin.h",
    "*": C11,
}

# file: what it may import of qkv_fast; PUBLIC is whatever has no leading underscore
PUBLIC = "public"
IMPORTS = {
    "tests/attention/test_problem.py": f"{PUBLIC} _runtime _problem _help",  # it adds a verb
    "tests/*.py": f"{PUBLIC} _runtime",
    "bench/*.py": f"{PUBLIC} _runtime",
    "examples/*.py": PUBLIC,
    "docs/*.py": PUBLIC,
    "scripts/*.py": PUBLIC,
    "qkv_fast/integrations/threadpoolctl.py": f"{PUBLIC} _threadpoolctl",
    "qkv_fast/integrations/_tensors.py": f"{PUBLIC} _foreign",  # the only one that reads the memory of hosts
    "qkv_fast/integrations/*.py": PUBLIC,
    "qkv_fast/plot/*.py": f"{PUBLIC} _checks _help",
    "qkv_fast/_help.py": "",
    "qkv_fast/__init__.py": "*",
    "qkv_fast/__main__.py": PUBLIC,
    "qkv_fast/_version.py": "",
    "qkv_fast/_runtime.py": "_core",
    "qkv_fast/_config.py": "_core _runtime _version",
    "qkv_fast/_threadpoolctl.py": "_core _runtime _version",
    "qkv_fast/_foreign.py": "_core",
    "qkv_fast/_checks.py": "_core _foreign",
    "qkv_fast/_masks.py": "_checks",
    "qkv_fast/_problem.py": "_core _runtime _checks _masks",
    "qkv_fast/_attention.py": "_problem _checks _help",
    "qkv_fast/_varlen.py": "_problem _checks _help",
    "qkv_fast/_grad.py": "_core _problem _checks _help",
    "qkv_fast/_stages.py": "_core _runtime _checks _help",
    "qkv_fast/_layers.py": "_core _runtime _checks _help",
    "qkv_fast/_multihead.py": "_core _checks _masks _attention _varlen _layers _rope cache",  # what it is made of
    "qkv_fast/_rope.py": "_core _runtime _checks _help",
    "qkv_fast/_merge.py": "_core _checks _help",
    "qkv_fast/_plans.py": "_runtime",
    "qkv_fast/_explain.py": f"{PUBLIC} _core _runtime _problem _checks _foreign _attention _varlen _stages _plans",
    "qkv_fast/cache/*.py": f"{PUBLIC} _core _runtime _problem _checks _masks _merge _help _answers",  # questions
    "qkv_fast/spotlight/*.py": f"{PUBLIC} _core _problem _checks _help",
    "qkv_fast/reference/*.py": f"{PUBLIC} _checks _help",  # what positions, masks and shapes mean is its own code
}
BOUNDARY = "_qkv numpy cpython libc cython"  # what qkv_fast/_core.pyx may cimport or import


def row(table, name):
    """The first row whose pattern matches: exact names stand above patterns."""
    return next((table[pattern].split() for pattern in table if fnmatchcase(name, pattern)), None)


def included(name):
    """What a file of src/ includes, as it stands there, with brackets or quotes."""
    text = (CHECKOUT / "src" / name).read_text(encoding="utf-8")
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]*[>"])', text, re.MULTILINE)


def ours(name, header):
    """The file of src/ that "header" means in the file `name`, or None."""
    base = (CHECKOUT / "src" / name).parent
    found = [folder / header.strip('"') for folder in (base, CHECKOUT / "src")]
    path = next((path.resolve() for path in found if path.is_file()), None)
    if path is None or not path.is_relative_to(CHECKOUT / "src"):
        return None
    return path.relative_to(CHECKOUT / "src").as_posix()


def may_include(name, header):
    if header.startswith("<"):
        return header.strip("<>") in row(SYSTEM, name)
    target = ours(name, header)
    if target is None:
        return False
    own = Path(name).with_suffix(".h").as_posix()
    return target == own or any(fnmatchcase(target, pattern) for pattern in row(HEADERS, name))


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Rooms that use each other, of a graph {room: rooms that it uses}: each circle once, its rooms by name."""

    def reach(start):
        seen, ahead = set(), list(graph.get(start, ()))
        while ahead:
            room = ahead.pop()
            if room not in seen:
                seen.add(room)
                ahead.extend(graph.get(room, ()))
        return seen

    reached = {room: reach(room) for room in graph}
    circles = {tuple(sorted(b for b in graph if b in reached[a] and a in reached[b])) for a in graph}
    return sorted(list(circle) for circle in circles if len(circle) > 1)


def functions(text):
    """Of each function at the top level of a C file: its name, whether it is static, whether its body is here."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    text = re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*", "", text, flags=re.MULTILINE)
    text = re.sub(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'', "0", text)
    n = 1
    while n:  # innermost blocks first
        text, n = re.subn(r"\{[^{}]*\}", "\0", text)
    for part in re.findall(r"[^;\0]*[;\0]", text):
        head = part[:-1].split("=")[0]
        if match := re.match(r"\s*((?:\w+[\s*]+)+)(\w+)\s*\(", head):
            if not {"typedef", "struct", "enum", "union"} & set(match[1].split()[:1]):
                yield match[2], "static" in match[1].split(), part.endswith("\0")


def may_import(name, module):
    """`module` is the full name of what an import statement binds: package.module.attribute."""
    parts = module.split(".")
    if parts[0] != "qkv_fast":
        return True
    allowed = row(IMPORTS, name)
    own = ".".join(Path(name).parent.parts)  # a folder's files may use what is private in one another
    if own.count(".") and module.startswith(f"{own}."):
        return True
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
    for folder in ("qkv_fast", "tests", "bench", "examples", "docs", "scripts")
    for path in files(folder, ".py")
]


@pytest.mark.parametrize("name", C_FILES)
def test_includes(name):
    assert row(HEADERS, name) is not None, "no row: which layer is this file in?"
    assert not [header for header in included(name) if not may_include(name, header)]


def test_no_module_of_c_uses_one_that_uses_it():
    """A .c and its .h are one module; that no header stands for another .c is the next test's business."""
    graph = {}
    for name in C_FILES:
        used = {ours(name, header) for header in included(name) if header.startswith('"')}
        room = name.rpartition(".")[0]
        graph.setdefault(room, set()).update({header.rpartition(".")[0] for header in used} - {room})
    assert {"call", "tile"} <= graph["decode"] and "kernels/kernel_tpl" in graph["kernels/avx2"]
    assert find_circles(graph) == []


@pytest.mark.parametrize("name", [name for name in C_FILES if not name.startswith("kernels/") and name != "qkv.h"])
def test_functions_are_declared_where_they_are_defined(name):
    """But for the core's contract, qkv.h, which many modules fulfil."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in files("src", ".c", ".h")}
    stem = name.rpartition(".")[0]
    public = {function for function, *_ in functions(texts["qkv.h"])}
    own = {function for function, static, body in functions(texts.get(f"{stem}.h", "")) if not static and not body}
    defined = {function for function, static, body in functions(texts.get(f"{stem}.c", "")) if not static and body}
    if name.endswith(".h"):
        assert own <= defined
    else:
        assert defined and defined <= own | public
        assert not [function for function, static, body in functions(texts[name]) if not static and not body]


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_imports(name):
    assert row(IMPORTS, name) is not None, "no row: which layer is this file in?"
    assert not [module for module in imports(CHECKOUT / name) if not may_import(name, module)]


def test_the_reference_checks_positions_masks_and_shapes_by_itself():
    """Or it and the product would have the same faults: what it shares is how arrays are read and words refused."""
    found = {module for path in files("qkv_fast/reference", ".py") for module in imports(path) if "_checks" in module}
    assert found <= {f"qkv_fast._checks.{name}" for name in ("_as_array", "_check_type", "_fail_words")}


def module_of(name):
    """The module that a Python file is."""
    parts = Path("qkv_fast", name) if name.startswith("bench/") else Path(name)
    return ".".join(parts.with_suffix("").parts).removesuffix(".__init__")


def test_no_python_module_uses_one_that_uses_it():
    outside = ("tests/", "examples/", "docs/", "scripts/")
    modules = {module_of(name): name for name in PYTHON_FILES if not name.startswith(outside)}

    def target(module):  # of package.module.attribute
        while module and module not in (*modules, "qkv_fast._core"):
            module = module.rpartition(".")[0]
        return module

    graph = {
        module: {target(found) for found in imports(CHECKOUT / name)} - {"", module} for module, name in modules.items()
    }
    assert "qkv_fast._problem" in graph["qkv_fast._attention"] and "qkv_fast.bench.cases" in graph
    assert find_circles(graph) == []


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
    headers = set(headers_of("_core.pyx")), set(headers_of("_qkv.pxd"))
    assert headers[0] <= {"Python.h", "numpy/arrayobject.h"} and headers[1] == {"qkv.h"}


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


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "elsewhere"}, "c": {"a"}, "d": {"a", "e"}, "e": {"d"}, "f": {"f", "a"}}
    assert find_circles(graph) == [["a", "b", "c"], ["d", "e"]]
    assert find_circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_functions_are_found():
    text = """
    #define TWICE(x) \\
        f(x); f(x)
    typedef int (*task)(void *); /* int commented(void); */
    struct pair { int (*of)(int); };
    static inline struct pair one(int a) { if (a) { b(); } return (struct pair){0}; }
    int const *declared(int (*ask)(void *), struct pair x);
    void defined(void) { call("{;"); }
    _Static_assert(sizeof(int) == 4, "a rule");
    static const int numbers[] = {1, 2};
    """
    assert list(functions(text)) == [("one", True, True), ("declared", False, False), ("defined", False, True)]
