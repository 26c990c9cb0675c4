"""The examples in the docstrings of everything public, and in docs/, run as doctests; docstrings are numpydoc."""

import doctest
import importlib
import inspect
import json
import operator
import re
import runpy
import sys
from pathlib import Path

import pytest
from _examples import need_model

import qkv_fast
import qkv_fast.plot

CHECKOUT = Path(__file__).resolve().parents[1]
FUNCTIONS = {name: getattr(qkv_fast, name) for name in qkv_fast.__all__ if callable(getattr(qkv_fast, name))}
for name in ("KVCache", "PagedKVCache"):
    FUNCTIONS |= {f"{name}.{key}": getattr(FUNCTIONS[name], key) for key in dir(FUNCTIONS[name]) if key[0] != "_"}
FUNCTIONS["plot.LitText.save"] = qkv_fast.plot.LitText.save
for name in ("spotlight", "plot", "reference", "reference.spotlight"):
    public = [(key, thing) for key, thing in vars(operator.attrgetter(name)(qkv_fast)).items() if key[0] != "_"]
    FUNCTIONS |= {f"{name}.{key}": thing for key, thing in public if inspect.isfunction(thing)}


def run(test):
    runner = doctest.DocTestRunner()
    assert test.examples and runner.run(test).failed == 0


def examples(name, thing):
    (test,) = doctest.DocTestFinder(recurse=False, exclude_empty=False).find(thing, name, globs={})
    return test


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples(name):
    run(examples(name, FUNCTIONS[name]))


HOSTS = ("threadpoolctl", "onnx", "torch", "flex", "transformers", "jax", "autograd", "keras", "dask")


@pytest.mark.parametrize("host", HOSTS)
def test_examples_of_integrations(host, monkeypatch):
    if host == "keras":  # by itself it asks for TensorFlow
        monkeypatch.setenv("KERAS_BACKEND", "numpy")
    reason = "the extra [test] installs threadpoolctl and onnx, the others bring their own"
    pytest.importorskip("torch" if host == "flex" else host, reason=reason)
    run(examples(host, importlib.import_module(f"qkv_fast.integrations.{host}")))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sections(name):
    """Every parameter, result and error has its place."""
    text = inspect.getdoc(FUNCTIONS[name])
    signature = inspect.signature(FUNCTIONS[name]) if callable(FUNCTIONS[name]) else inspect.Signature()
    parameters = [parameter for parameter in signature.parameters if parameter != "self"]
    for parameter in parameters:
        name = rf"(\*\*)?{parameter}"
        assert re.search(rf"^({name}|.*, {name}(, .*)?|{name}, .*)( :|$)", text, re.MULTILINE), parameter
    for section in ("Parameters", "Raises"):
        assert not parameters or f"\n{section}\n{'-' * len(section)}\n" in text
    assert re.search(r"\nExamples\n--------\n", text)


GUIDE = CHECKOUT / "docs" / "guide.md"


@pytest.mark.parametrize("name", ["gradients.md", "guide.md", "layers.md", "masks.md", "spotlight.md", "trouble.md"])
def test_pages(name):
    """All blocks in order, as one session. A block ends with an empty line, which ends its last result."""
    for host in ("threadpoolctl", "onnx", "ml_dtypes"):
        pytest.importorskip(host, reason="the extra [test] installs it")
    text = (CHECKOUT / "docs" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 6 and text.count(">>> ") == sum(block.count(">>> ") for block in blocks)
    # Outside the blocks everything becomes blank, so that line numbers in a failure are those of the file.
    kept = re.sub(r"(?s)(```python\n)(.*?)(```\n)|[^\n]", lambda m: f"\n{m[2]}\n" if m[2] else "", text)
    run(doctest.DocTestParser().get_doctest(kept, {}, name, f"docs/{name}", 0))


def test_the_guide_names_everything_public():
    text = GUIDE.read_text(encoding="utf-8")
    assert not [name for name in FUNCTIONS if not re.search(rf"\b{name.split('.')[-1]}\b", text)]


def test_the_picture_is_that_of_its_script(monkeypatch):
    """To two digits: no weight is within 2e-4 of where rounding turns, and another BLAS moves them by 1e-6."""
    need_model()
    monkeypatch.setattr("sys.path", sys.path.copy())
    script = runpy.run_path(str(CHECKOUT / "docs" / "spotlight.py"))
    assert script["picture"]() == (CHECKOUT / "docs" / "spotlight.svg").read_text(encoding="utf-8")


def test_the_page_of_speed_is_that_of_its_runs():
    script = runpy.run_path(str(CHECKOUT / "docs" / "speed.py"))
    runs = json.loads((CHECKOUT / "docs" / "speed.json").read_text(encoding="utf-8"))
    assert script["page"](runs) == (CHECKOUT / "docs" / "speed.md").read_text(encoding="utf-8")
    again = {**runs[0], "rows": {}, "time": "9999-01-01"}
    assert script["add"](runs, again) == [*runs[1:], again]
    other = {**again, "cpu": "another"}
    assert script["add"](runs, other) == [*runs, other]


def test_the_page_of_speed_takes_what_the_benchmark_saves():
    script = runpy.run_path(str(CHECKOUT / "docs" / "speed.py"))
    machine = dict.fromkeys(script["KEPT"], "x")
    row = {"case": {"name": "a"}, "threads": 2, "error": "", "median_seconds": 0.02, "share_of_limit": 0.5}
    rows = [row | {"limited_by": "float32"}, row | {"error": "no memory"}]
    run = script["reduce"]({"interrupted": False, "machine": machine | {"governor": "y"}, "rows": rows})
    assert run == machine | {"rows": {"a, 2 thr": [0.02, 0.5, "float32"]}}
    assert "| a, 2 thr | 20 ms (50%) |" in script["page"]([run])
    with pytest.raises(ValueError, match="interrupted"):
        script["reduce"]({"interrupted": True})


LINKING = ["README.md", "examples/README.md", *sorted(f"docs/{path.name}" for path in GUIDE.parent.glob("*.md"))]


@pytest.mark.parametrize("page", LINKING)
def test_links(page):
    """Files and headings that a page links to exist."""
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    targets = [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in x]
    assert targets or page != "README.md"
    for target in targets:
        name, _, heading = target.partition("#")
        file = (CHECKOUT / page).parent / name if name else CHECKOUT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target


def test_the_first_call_of_the_readme():
    """The first block of code runs by itself, and its comment tells the shape."""
    block = re.search(r"^```python\n(.*?)^```$", (CHECKOUT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    names = {}
    exec(block, names)
    assert block.rstrip().endswith(f"# {names['out'].shape}") and names["out"].shape == names["q"].shape
