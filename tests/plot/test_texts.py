"""`plot.spotlight` and `plot.strip`: what they write, as text and in a browser."""

import re

import numpy as np
import pytest

from qkv_fast import plot, spotlight

TOKENS = ["The", "cat", "<b>&", "sat", '"', "down"]
RNG = np.random.default_rng(3)
MATRIX = spotlight.weights(*RNG.standard_normal((2, 6, 8)))


def spans(browser):
    return browser.run(
        "[...document.querySelectorAll('.lit-text span')].map((x) => [x.textContent, x.title, "
        "Number(x.style.getPropertyValue('--lit')), x.classList.contains('query')])"
    )


def check_row(browser, row, query):
    found = spans(browser)
    assert [x[0] for x in found] == TOKENS and [x[3] for x in found] == [i == query for i in range(6)]
    assert np.allclose([x[2] for x in found], np.sqrt(row), atol=6e-4)
    for (text, title, *_), p in zip(found, row, strict=True):
        name, said, percent = re.fullmatch(r"“(.*)”: (\S+) \((\S+) %\)", title).groups()
        assert name == text and np.isclose(float(said), p, rtol=1e-3) and np.isclose(float(percent), 100 * p, rtol=0.06)


def test_a_word_of_a_row(browser, tmp_path):
    plot.spotlight(TOKENS, MATRIX[3], query=3).save(tmp_path / "text.html")
    browser.open(tmp_path / "text.html")
    check_row(browser, MATRIX[3], 3)
    assert browser.run("document.title") == "What “sat” looks at"
    heaviest = [TOKENS[i] for i in np.argsort(-MATRIX[3])[:3]]
    says = re.split(r": | \S+ %,? ?", browser.run("document.querySelector('.says').textContent"))
    assert says == ["What “sat” looks at", *heaviest, ""]
    browser.run("document.querySelectorAll('.lit-text span')[1].click()")
    check_row(browser, MATRIX[3], 3)  # the weights of others are not there
    assert browser.troubles() == []


def test_any_word_of_a_matrix_becomes_the_query(browser, tmp_path):
    plot.spotlight(TOKENS, MATRIX, query="cat").save(tmp_path / "text.html")
    browser.open(tmp_path / "text.html")
    check_row(browser, MATRIX[1], 1)
    place = "(({ x, y }) => [x + 5, y + 10])(document.querySelectorAll('.lit-text span')[4].getBoundingClientRect())"
    x, y = browser.run(place)
    browser.mouse("mouseMoved", x, y)
    says = "document.querySelector('.says').textContent"
    assert browser.run(says) == browser.run("document.querySelectorAll('.lit-text span')[4].title")
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y, button="left", clickCount=1)
    check_row(browser, MATRIX[4], 4)
    browser.mouse("mouseMoved", x, 500)  # elsewhere
    assert browser.run(says).startswith(f"What “\"” looks at: {TOKENS[MATRIX[4].argmax()]} ")
    browser.key("ArrowRight")
    assert "down" in browser.run(says)
    browser.key("Home")
    browser.key("Enter", text="\r")
    check_row(browser, MATRIX[0], 0)
    assert browser.troubles() == []


def test_several_in_one_page(browser, tmp_path):
    """As in a notebook: each has its own."""
    parts = [plot.spotlight(TOKENS, MATRIX, query=i)._repr_html_() for i in (1, 2)]
    (tmp_path / "page.html").write_text("<meta charset=utf-8>" + "".join(parts), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    browser.run("document.querySelectorAll('.lit-text span')[11].click()")
    marked = [i for i, x in enumerate(spans(browser)) if x[3]]
    assert marked == [1, 11] and browser.troubles() == []


def test_strip(browser, tmp_path):
    picture = plot.strip(TOKENS, [1, 2, 0, 4, 1, 0])
    picture.save(tmp_path / "strip.html")
    browser.open(tmp_path / "strip.html")
    found = spans(browser)
    assert [x[2] for x in found] == [0.25, 0.5, 0, 1, 0.25, 0] and not any(x[3] for x in found)
    assert found[3][1] == "“sat”: 4 (50 %)"
    assert str(picture).splitlines()[3] == "   50 %  ████████████████████  sat"
    assert str(plot.strip(["a", "b"], [0, 0])).split() == ["0", "%", "a", "0", "%", "b"]
    plot.strip(["a", "b"], [0, 0]).save(tmp_path / "dark.html")


@pytest.mark.parametrize(
    "pieces, text",
    [
        (["un", "##like", "##ly", "##"], "unlikely ##"),
        (["He", "Ġsaid", "Ġun", "like", "ly", "Ċ"], "He said unlikely⏎"),
        (["▁Hello", "▁wor", "ld", "!"], "Hello world!"),
        (["a", " ", "b"], "a ␣ b"),
    ],
)
def test_word_pieces_are_joined(pieces, text):
    (paragraph,) = re.findall("<p>(.*?)</p>", plot.spotlight(pieces, np.zeros(len(pieces)))._repr_html_())
    assert re.sub("<.*?>", "", paragraph) == text


def test_sentences_have_no_marks():
    """A heading of Markdown is one, and joins nothing."""
    pieces = ["## Title", "##", "▁ is a bar.", "Ġ is none."]
    (paragraph,) = re.findall("<p>(.*?)</p>", plot.strip(pieces, np.zeros(4))._repr_html_())
    assert re.sub("<.*?>", "", paragraph) == " ".join(pieces)


def test_no_links_and_escaped(tmp_path):
    plot.spotlight(["</script>", "<i>", "&amp;"], np.eye(3)).save(tmp_path / "text.html")
    text = (tmp_path / "text.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)
    plot.spotlight(["[[SPANS]]", "[[ID]]"], np.eye(2), "[[SPANS]]").save(tmp_path / "text.html")
    assert text.count("</script>") == text.count("<script>") == 1 and "<i>" not in text and "&amp;amp;" in text


def test_plain_text():
    weights = np.array([0.5, 0.3, 1e-5, 0, 0.004, 0.1])
    lines = str(plot.spotlight(TOKENS, weights, query=-1)).splitlines()
    assert lines[0] == "'down' looks at" and lines[1] == "   50 %  ██████████            The"
    assert [line.split()[0] for line in lines[1:]] == ["50", "30", "10", "0.4", "<0.01", "0"]
    assert not str(plot.spotlight(TOKENS, weights)).startswith("'")
    assert "<b>&" in lines[5]


def test_query():
    assert plot.spotlight(TOKENS, MATRIX).query == 5 and plot.spotlight(TOKENS, MATRIX[0]).query is None
    assert plot.spotlight(TOKENS, MATRIX, -2).query == 4 and plot.spotlight(TOKENS, MATRIX, np.int32(2)).query == 2


@pytest.mark.parametrize(
    "tokens, weights, query, message",
    [
        ([], [], None, "a picture of nothing"),
        (TOKENS, MATRIX[0, :5], None, r"weights must be of shape \(6,\) or \(6, 6\), one for each text, got \(5,\)"),
        (TOKENS, MATRIX[:5], None, r"got \(5, 6\)"),
        (TOKENS, [0.1, 0.2, np.nan, 0, 0, 0], None, "weights must be finite and not negative, got nan"),
        (TOKENS, [0.1, -0.2, 0, 0, 0, 0], None, "weights must be finite and not negative, got -0.2"),
        (TOKENS, MATRIX, 6, r"query must be in -6..5, got 6"),
        (TOKENS, MATRIX, "dog", r"query 'dog' is not one of the tokens"),
        (["a", "b", "a"], np.eye(3), "a", r"query 'a' is at \[0, 2\]: give one of these"),
        (["a", "b"], [0.5, 1.5], None, "weights must be at most 1, got 1.5; plot.strip shows other numbers"),
        (["a"] * 2400, np.broadcast_to(0.1, (2400, 2400)), 0, r"weights of \(2400, 2400\) make a page of more"),
    ],
)
def test_values(tokens, weights, query, message):
    with pytest.raises(ValueError, match=f"plot.spotlight: .*{message}"):
        plot.spotlight(tokens, weights, query)


@pytest.mark.parametrize(
    "tokens, weights, query, message",
    [
        ("text", MATRIX[0], None, "tokens must be a sequence of strings, got 'text'"),
        (["a", 1], [0, 1], None, "tokens must be strings, got 1 at 1"),
        (["a", "b"], ["x", "y"], None, "weights must be numbers, got <U1"),
        (["a", "b"], np.ma.array([0.5, 0.5], mask=[0, 1]), None, "weights is a masked array, whose mask would be lost"),
        (["a", "b"], [0, 1], 0.5, "query must be an index or a word, got 0.5"),
        (["a", "b"], [0, 1], True, "query must be an index or a word, got True"),
    ],
)
def test_kinds(tokens, weights, query, message):
    with pytest.raises(TypeError, match=f"plot.spotlight: {message}"):
        plot.spotlight(tokens, weights, query)


def test_errors_of_strips_and_paths(tmp_path):
    with pytest.raises(ValueError, match=r"plot.strip: received must be of shape \(2,\), .* got \(2, 2\)"):
        plot.strip(["a", "b"], np.eye(2))
    with pytest.raises(TypeError, match=r"plot.strip: received is a masked array"):
        plot.strip(["a", "b"], np.ma.array([1, 2], mask=[1, 0]))
    with pytest.raises(ValueError, match=r"plot.LitText.save: no file can be written at path="):
        plot.strip(["a"], [1]).save(tmp_path / "none" / "x.html")
    with pytest.raises(TypeError, match=r"plot.LitText.save: path must be a path, got None"):
        plot.strip(["a"], [1]).save(None)
