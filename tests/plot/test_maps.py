"""`plot.heatmap`: what is drawn where."""

import subprocess
import sys

import numpy as np
import pytest

from qkv_fast import plot, spotlight

Q, K = np.random.default_rng(4).standard_normal((2, 40, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="the extra [plot] installs it")
    matplotlib.use("agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def texts(axis):
    axis.axes.figure.canvas.draw()
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_cells_lie_over_their_tokens(reduce):
    ax = plot.heatmap(Q, K, shape=(10, 20), reduce=reduce, causal=True)
    (image,) = ax.images
    cells = spotlight.pooled(Q, K, (10, 20), reduce, causal=True)
    assert np.array_equal(image.get_array().filled(0), cells)
    assert np.array_equal(image.get_array().mask, cells == 0) and list(image.get_extent()) == [-0.5, 39.5, 39.5, -0.5]
    ticks = [int(text) for text in texts(ax.xaxis) if 0 <= int(text.replace("−", "-")) < 40]
    assert len(ticks) > 3 and ax.get_xlabel() == "key" and ax.get_ylabel() == "query"
    assert f"{reduce} weight" in ax.figure.axes[1].get_ylabel()
    assert image.norm.vmax == cells.max() and image.norm.vmin == pytest.approx(cells.max() / 1e4)


def test_axes_that_are_given_and_tokens():
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2)
    names = [f"w{i}" for i in range(40)]
    assert plot.heatmap(Q, K, ax=right, tokens=names) is right and not left.images
    assert texts(right.xaxis) == texts(right.yaxis) == names
    plot.heatmap(Q[:7], K, ax=left, tokens=(list("abcdefg"), names))
    assert texts(left.yaxis) == list("abcdefg") and texts(left.xaxis) == names


def test_long_texts_name_some_tokens():
    q, k = np.random.default_rng(4).standard_normal((2, 500, 8)).astype(np.float32)
    ax = plot.heatmap(q, k, tokens=[f"w{i}" for i in range(500)])
    ax.figure.canvas.draw()
    named = {round(x): text for x, text in zip(ax.get_xticks(), texts(ax.xaxis), strict=True) if text}
    assert 3 < len(named) < 30 and all(text == f"w{i}" for i, text in named.items())


def test_weights_of_0_are_not_hidden():
    """Peaked scores: most weights are too small for float32."""
    bias = np.where(np.eye(40), np.float32(0), np.float32(-np.inf))
    bias[3, 4:9] = 1
    (image,) = plot.heatmap(100 * Q, 100 * K, causal=True, mask=np.arange(40) > 1, bias=bias).images
    seen = (bias > -np.inf) & np.tri(40, dtype=bool) & (np.arange(40) > 1)
    assert np.array_equal(image.get_array().mask, ~seen)
    (image,) = plot.heatmap(100 * Q, 100 * K, causal=True).images
    assert np.array_equal(image.get_array().mask, ~np.tri(40, dtype=bool))
    assert (image.get_array().data[20:, :20] == 0).any()
    image.figure.canvas.draw()


def test_nothing_is_seen():
    (image,) = plot.heatmap(Q, K, mask=False).images
    assert image.get_array().mask.all()
    image.figure.canvas.draw()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"q": Q[None]}, r"plot.heatmap: one head is shown"),
        ({"q": Q[:0]}, r"plot.heatmap: a picture of nothing: 0 queries, 40 keys"),
        ({"q": Q * np.nan}, r"plot.heatmap: weights are not finite"),
        ({"shape": (0, 4)}, r"shape"),
        ({"tokens": ["a"]}, r"plot.heatmap: 1 tokens for 40 queries and 40 keys"),
    ],
)
def test_values(given, message):
    with pytest.raises(ValueError, match=message):
        plot.heatmap(**{"q": Q, "k": K, **given})


def run(code):
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_are_late():
    """The package imports no pictures, and pictures no matplotlib."""
    assert run("import qkv_fast, sys; print('qkv_fast.plot' in sys.modules)") == "False"
    assert run("import qkv_fast.plot, sys; print('matplotlib' in sys.modules)") == "False"


def test_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None\nimport numpy as np\nfrom qkv_fast import plot\n"
        "try: plot.heatmap(np.ones((2, 2)), np.ones((2, 2)))\nexcept ImportError as error: print(error)"
    )
    assert 'pip install "qkv-fast[plot]"' in run(code)
