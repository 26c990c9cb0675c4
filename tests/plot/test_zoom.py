"""`plot.zoom`: what a browser reads from the page is what `spotlight.weights` gives, wherever one zooms."""

import json
import re

import numpy as np
import pytest

from qkv_fast import plot, spotlight

ERROR = 2e-3  # what the page promises
LQ, LK, DIM = 230, 300, 16
RNG = np.random.default_rng(5)
SEGMENTS = (np.sort(RNG.integers(0, 9, LQ)) - 4, RNG.integers(-4, 6, LK) << 40)
NARROW_MASK, MASK = RNG.random(LK) < 0.7, RNG.random((LQ, LK)) < 0.5
BIAS = np.where(MASK, RNG.normal(0, 2, (LQ, LK)), -np.inf)
MANY = {
    "window": (70, 40), "q_offset": 20, "kv_lengths": 260, "segments": (SEGMENTS[0] % 3, SEGMENTS[1] % 3),
    "alibi_slopes": [0.03], "sinks": [1.5], "softcap": 3.0, "scale": -0.4, "mask": NARROW_MASK, "bias": BIAS[:, :1],
}  # fmt: skip
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": "top-left"},
    "window": {"window": (5, None)},
    "causal-window": {"causal": True, "window": 50, "q_offset": 3},
    "far": {"causal": True, "q_offset": -40},
    "kv_lengths": {"kv_lengths": 111, "window": (None, 90), "q_offset": np.int64(-100)},
    "segments": {"segments": SEGMENTS},
    "alibi": {"alibi_slopes": [0.1], "causal": True},
    "sinks": {"sinks": [2.0]},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.7},
    "mask": {"mask": MASK},
    "mask of keys": {"mask": NARROW_MASK},
    "no keys": {"mask": False},
    "bias": {"bias": BIAS},
    "bias of queries": {"bias": BIAS[:, :1]},
    "bias of finfo.min": {"bias": np.where(MASK, 0, np.finfo(np.float32).min)},
    "all": MANY,
}


def arrays(size=1.0, dtype=np.float32, queries=LQ, keys=LK, dim=DIM, seed=0):
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((keys, dim))
    q = rng.standard_normal((queries, dim)) + k[rng.integers(0, keys, queries)]
    return (size * q).astype(dtype), (size * k).astype(dtype)


def read(browser, pairs):
    """Weights of (n, 2) queries and keys, as the page reads them."""
    return np.array(browser.run(f"{json.dumps(pairs.tolist())}.map(([i, j]) => qkv.read(i, j))"))


def opened(browser, path):
    browser.open(path)
    browser.run("qkv.ready")
    assert browser.troubles() == []


def check(browser, path, q, k, **options):
    """The heaviest weight of each query, and random ones."""
    plot.zoom(q, k, path, **options)
    opened(browser, path)
    weights = spotlight.weights(q, k, **options)
    queries = np.arange(len(q))
    pairs = np.concatenate([
        np.stack([queries, weights.argmax(-1)], -1),
        np.stack([np.repeat(queries, 4), np.random.default_rng(1).integers(0, len(k), 4 * len(q))], -1),
    ])  # fmt: skip
    exact = weights[pairs[:, 0], pairs[:, 1]]
    assert abs(read(browser, pairs) - exact).max() <= ERROR


@pytest.mark.parametrize("name", CASES)
def test_reads_the_weights(browser, tmp_path, name):
    check(browser, tmp_path / "map.html", *arrays(), **CASES[name])


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_types(browser, tmp_path, dtype):
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    check(browser, tmp_path / "map.html", *arrays(dtype=kind), causal=True)


@pytest.mark.parametrize("queries, keys, dim", [(1, 1, 1), (1, 700, 8), (700, 2, 5), (40, 30, 0), (3, 4, 33)])
def test_shapes(browser, tmp_path, queries, keys, dim):
    check(browser, tmp_path / "map.html", *arrays(queries=queries, keys=keys, dim=dim))


@pytest.mark.parametrize("large, small", [(1e30, 1e-30), (1e5, 1e-5), (1e-25, 1e25)])
def test_beyond_float16(browser, tmp_path, large, small):
    """Rows are stored with factors."""
    q, k = arrays()
    check(browser, tmp_path / "map.html", np.float32(large) * q, np.float32(small) * k)
    check(browser, tmp_path / "map.html", 1e150 * q.astype(np.float64), 1e-150 * k.astype(np.float64))


def test_peaked_scores_take_more_digits(browser, tmp_path):
    """Scores of deviation 16 are not right in float16: they are stored in float32."""
    check(browser, tmp_path / "plain.html", *arrays(0.5, dim=64))
    assert browser.run("about.floats") == 2
    check(browser, tmp_path / "peaked.html", *arrays(4.0, dim=64))
    assert browser.run("about.floats") == 4


def test_scores_that_are_too_large_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"plot.zoom: scores are too large for a page: .* more than 2e-3"):
        plot.zoom(*arrays(1000.0), tmp_path / "map.html", bias=1e6 * RNG.standard_normal((LQ, LK)))
    assert not (tmp_path / "map.html").exists()


def test_hidden_keys_are_not_looked_at(browser, tmp_path):
    q, k = arrays()
    k[200:] = np.nan
    check(browser, tmp_path / "map.html", q, k, kv_lengths=200)
    k[200:] = 1e30
    check(browser, tmp_path / "map.html", q, k, kv_lengths=200)
    k[200:], mask = np.inf, np.arange(LK) < 200
    check(browser, tmp_path / "map.html", q, k, mask=mask)
    q[7], k[200:] = np.nan, 0
    check(browser, tmp_path / "map.html", q, k, mask=np.arange(LQ)[:, None] != 7)


def test_one_value_reads_otherwise_without_its_key(browser, tmp_path):
    """A page that took its numbers from elsewhere would be seen: another key is another weight."""
    q, k = arrays()
    plot.zoom(q, k, tmp_path / "map.html")
    opened(browser, tmp_path / "map.html")
    at = int(spotlight.weights(q, k, queries=[0])[0].argmax())
    other = k.copy()
    other[at] = 0
    assert abs(read(browser, np.array([[0, at]])) - spotlight.weights(q, other, queries=[0])[0, at]).max() > 10 * ERROR


def shown(browser, rows, columns):
    """The pixels of the upper left corner of the map: (rows, columns, 3)."""
    code = (
        "(() => { const [y, x] = qkv.view().origin;"
        f"return [...document.getElementById('map').getContext('2d').getImageData(x, y, {columns}, {rows}).data] }})()"
    )
    return np.array(browser.run(code)).reshape(rows, columns, 4)[..., :3]


def check_colours(pixels, weights):
    """The heavier, the brighter; hidden ones are grey, and no others."""
    grey = np.ptp(pixels, axis=-1) < 10
    assert np.array_equal(grey, weights == 0)
    light = (pixels @ [0.3, 0.6, 0.1])[~grey]
    code = np.rint(8 * np.log2(weights[~grey]))
    order = np.argsort(code, kind="stable")
    light, code = light[order], code[order]
    darker = np.maximum.accumulate(light)[np.searchsorted(code, code - 2, "right") - 1]  # the brightest of clearly less
    later = np.searchsorted(code, code - 2, "right") > 0
    assert (light[later] >= darker[later] - 1).all()
    assert np.ptp(light) > 30


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """8192 tokens: the stored cells are of 4 × 4."""
    q, k = arrays(queries=8192, keys=8192, dim=8)
    path = tmp_path_factory.mktemp("large") / "map.html"
    plot.zoom(q, k, path, causal=True, title="[[DATA]] </script>", tokens=[f"<b>{i}" for i in range(8192)])
    return q, k, path


@pytest.mark.parametrize("cell", [4, 2, 1])
def test_every_level_shows_the_largest_weight_of_a_cell(browser, large, cell):
    q, k, path = large
    opened(browser, path)
    browser.run(f"qkv.goto(3000, 2900, {1 / cell})")
    browser.wait("qkv.view().missing === 0")
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    view = browser.run("qkv.view()")
    # to a whole cell, so that a pixel is one
    (i, _), (j, _) = view["queries"], view["keys"]
    middle = [cell * round(x / cell) - x for x in (i, j)]
    browser.run(f"qkv.goto({3000 + middle[0]}, {2900 + middle[1]}, {1 / cell})")
    browser.wait("qkv.view().missing === 0")
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    view = browser.run("qkv.view()")
    (i, _), (j, _) = view["queries"], view["keys"]
    assert i % cell == j % cell == 0
    i, j = int(i), int(j)
    pixels = shown(browser, 300, 400)
    weights = spotlight.weights(q, k, causal=True, queries=slice(i, i + 300 * cell), keys=slice(j, j + 400 * cell))
    check_colours(pixels, weights.reshape(300, cell, 400, cell).max((1, 3)))


def test_wheel_drag_and_keys(browser, large):
    q, k, path = large
    opened(browser, path)
    whole = browser.run("qkv.view()")
    assert whole["queries"] == [0, 8192] and whole["keys"] == [0, 8192]
    box = browser.run("(({ x, y }) => ({ x, y }))(document.getElementById('map').getBoundingClientRect())")
    x, y = box["x"] + whole["origin"][1] + 150, box["y"] + whole["origin"][0] + 200

    def token(view):  # under the pointer: query, key
        (i, _), (j, _), (sy, sx) = view["queries"], view["keys"], view["pixels"]
        return i + (y - box["y"] - view["origin"][0]) / sy, j + (x - box["x"] - view["origin"][1]) / sx

    at = token(whole)
    for _ in range(14):  # from all to single weights
        browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240)
    close = browser.run("qkv.view()")
    assert np.allclose(token(close), at, atol=0.01)
    assert close["pixels"] == [96, 96] or close["pixels"][0] > 20
    browser.wait("qkv.view().missing === 0")

    browser.mouse("mouseMoved", x, y)
    i, j = map(int, at)
    said = browser.run("document.querySelector('output').textContent")
    found = re.fullmatch(rf"query {i} “<b>{i}” → key {j} “<b>{j}”: (\S+)", said)
    assert abs(float(found[1]) - spotlight.weights(q, k, causal=True, queries=[i], keys=[j]).item()) <= ERROR

    browser.mouse("mousePressed", x, y, button="left", clickCount=1)
    browser.mouse("mouseMoved", x + 96, y + 48, button="left", buttons=1)
    browser.mouse("mouseReleased", x + 96, y + 48, button="left", clickCount=1)
    moved, (sy, sx) = browser.run("qkv.view()"), close["pixels"]
    assert np.allclose(moved["keys"][0], close["keys"][0] - 96 / sx, atol=1e-6)
    assert np.allclose(moved["queries"][0], close["queries"][0] - 48 / sy, atol=1e-6)

    browser.run("document.getElementById('map').focus()")
    browser.key("ArrowDown")
    assert browser.run("qkv.view()")["queries"][0] > moved["queries"][0]
    browser.key("-", text="-")
    assert browser.run("qkv.view()")["pixels"][0] < sy
    browser.key("0", text="0")
    assert browser.run("qkv.view()") == whole
    browser.run("document.getElementById('in').click()")
    assert np.allclose(browser.run("qkv.view()")["pixels"], 2 * np.array(whole["pixels"]))
    browser.mouse("mouseMoved", x + 250, y - 150)  # above the diagonal
    assert browser.run("document.querySelector('output').textContent").endswith(": hidden")
    assert browser.troubles() == []


@pytest.mark.parametrize("width", [320, 500, 1000])
def test_the_hint_is_whole(browser, large, width):
    """It takes more lines where there is no room for one."""
    browser("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=False)
    try:
        opened(browser, large[2])
        read = "(({ clientHeight, scrollHeight, textContent }) => [clientHeight, scrollHeight, textContent])"
        room, wanted, said = browser.run(f"{read}(document.querySelector('output'))")
    finally:
        browser("Emulation.clearDeviceMetricsOverride")
    assert said.endswith("the pointer reads") and wanted <= room


def test_touch_pinch(browser, large):
    """Two fingers that part by a factor zoom by it."""
    _, _, path = large
    opened(browser, path)
    before = browser.run("qkv.view().pixels[0]")

    def touch(kind, *points):
        where = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
        browser("Input.dispatchTouchEvent", type=kind, touchPoints=where)

    touch("touchStart", (300, 400), (400, 400))
    touch("touchMove", (250, 400), (450, 400))
    touch("touchEnd")
    assert np.isclose(browser.run("qkv.view().pixels[0]"), 2 * before, rtol=0.01)


def test_the_whole_map_of_32k_tokens_is_small(tmp_path):
    """32768² of D = 64: computed once with random numbers, which do not compress."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 32768, 64), dtype=np.float32)
    plot.zoom(q, k, tmp_path / "map.html", window=(512, 512))  # whose other tiles are skipped
    assert (tmp_path / "map.html").stat().st_size <= 30e6


def test_no_links(large):
    text = large[2].read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)
    assert text.count("</script>") == text.count("<script") and "<h1>[[DATA]] &lt;/script&gt;</h1>" in text


HEAD = arrays(queries=5, keys=6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"q": np.ones((1, 2, 5, 16), np.float32)}, r"one head is shown, .* q\[0, h\] .* got q.shape=\(1, 2, 5, 16\)"),
        ({"q": np.ones((0, 16), np.float32)}, r"a picture of nothing: 0 queries, 6 keys"),
        ({"k": np.ones((0, 16), np.float32)}, r"a picture of nothing: 5 queries, 0 keys"),
        ({"k": np.ones((6, 15), np.float32)}, r"q.shape=\(5, 16\), k.shape=\(6, 15\)"),
        ({"tokens": ["a"] * 5}, r"5 tokens for 5 queries and 6 keys; .* give \(tokens of queries, tokens of keys\)"),
        ({"tokens": (["a"] * 5, ["b"] * 5)}, r"tokens of keys must be 6, got 5"),
        ({"q": np.full((5, 16), np.nan, np.float32)}, r"the weights of query 0 are not finite"),
        ({"mask": np.broadcast_to(True, (4097, 4096))}, r"mask has 16781312 elements, more than 4096²"),
        ({"bias": np.broadcast_to(np.float32(0), (4097, 4096))}, r"bias has 16781312 elements, more than 4096²"),
        ({"q": np.zeros((40000, 300), np.float32), "k": np.zeros((6, 300), np.float32)}, r"more than 30 MB: q.shape="),
        ({"path": "no/such/folder/map.html"}, r"no file can be written at path='no/such/folder/map.html'"),
        ({"path": "."}, r"no file can be written at path='.'"),
        ({"causal": "left"}, "causal must be True, False or 'top-left', got 'left'"),
    ],
)
def test_values(tmp_path, given, message):
    arguments = {"q": HEAD[0], "k": HEAD[1], "path": tmp_path / "map.html", **given}
    with pytest.raises(ValueError, match=message):
        plot.zoom(**arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given, message",
    [
        ({"title": None}, r"plot.zoom: title must be a string, got None"),
        ({"is_causal": True}, r"plot.zoom\(\) got an unexpected keyword argument 'is_causal'; here it is causal=True"),
        ({"path": 3}, r"path must be a path, got 3"),
        ({"tokens": "abcde"}, r"tokens must be a sequence of strings, got 'abcde'"),
        ({"tokens": [1, 2, 3, 4, 5]}, r"tokens must be strings, got 1 at 0"),
        ({"q": np.ones((5, 16), int)}, r"q must be"),
        ({"mask": np.ones((5, 6), np.float32)}, r"mask"),
        ({"q": np.ma.masked_equal(HEAD[0], 0)}, r"q is a masked array"),
    ],
)
def test_kinds(tmp_path, given, message):
    arguments = {"q": HEAD[0], "k": HEAD[1], "path": tmp_path / "map.html", **given}
    with pytest.raises(TypeError, match=message):
        plot.zoom(**arguments)


def test_a_page_that_grows_too_large_is_refused(tmp_path):
    """Peaked scores take float32, and the page of these arrays is then larger than it may be."""
    q, k = (np.tile(x, (520, 1)) for x in arrays(4.0, dim=128, queries=64, keys=64))
    q, k = (x + np.random.default_rng(2).standard_normal(x.shape, np.float32) for x in (q, k))
    with pytest.raises(ValueError, match=r"the page would have \d+.\d MB, more than 30: .* in float32"):
        plot.zoom(q, k, tmp_path / "map.html", window=(40, 40))
