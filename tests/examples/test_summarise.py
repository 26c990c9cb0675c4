"""examples/summarise.py: what sentences receive and move is as defined, and as printed."""

import html
import re

import numpy as np
import pytest
import summarise
from _examples import EXAMPLES, run, run_without

import qkv_fast

PROGRAM = "summarise.py"
TEXT = EXAMPLES / "data" / "tide_mills.txt"


@pytest.fixture(scope="module")
def known(model):
    return summarise.split(model, TEXT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(model, known):
    return summarise.measure(model, *known)


# Sentences and windows


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It cost 3.5 crowns, e.g. much. “Really?” he said.", ["It cost 3.5 crowns, e.g. much.", "“Really?” he said."]),
        ("He said “No.” Then\nhe left.", ["He said “No.”", "Then he left."]),
        ("A heading\n \nA line of\ntwo lines.\n", ["A heading", "A line of two lines."]),
        ("So ... it goes on… 7 did.", ["So ... it goes on…", "7 did."]),
        ("Yes.\u200b\n\n\u200b", ["Yes.\u200b"]),
        (" \n\t", []),
        ("", []),
    ],
)
def test_sentences(model, text, sentences):
    found, counts = summarise.split(model, text)
    assert found == sentences and len(counts) == len(found) and (counts > 0).all()


@pytest.mark.parametrize(
    "counts, limit, sizes",
    [([3, 3, 3], 6, [2, 1]), ([3, 3, 3], 9, [3]), ([6, 1, 6, 5, 1], 6, [1, 1, 1, 2]), ([4], 4, [1])],
)
def test_windows(counts, limit, sizes):
    runs = summarise.windows(np.array(counts), limit)
    assert [run.stop - run.start for run in runs] == sizes
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])] and runs[-1].stop == len(counts)


# The figures


def test_figures_are_those_of_the_definition(model, known, measured):
    sentences, counts = known
    received, influence, special = measured
    tokens, q, k, v = model.look(" ".join(sentences))
    assert len(tokens.ids) == counts.sum() + 2
    assert received.sum() + special == pytest.approx(len(tokens.ids), rel=1e-5)
    sentence = np.repeat(np.arange(len(counts)), counts)
    weights = qkv_fast.reference.spotlight.weights(q, k).mean((0, 1))  # (L, L)
    exact = np.bincount(sentence, weights.sum(0)[1:-1])
    np.testing.assert_allclose(received, exact, rtol=1e-4)
    whole = qkv_fast.attention(q[-1], k[-1], v[-1])
    for i in (0, 9, len(counts) - 1):
        seen = np.pad(sentence != i, 1, constant_values=True)
        moved = whole - qkv_fast.attention(q[-1], k[-1], v[-1], mask=seen[None, None])
        assert influence[i] == pytest.approx(np.linalg.norm(moved), rel=1e-4)


def test_windows_are_measured_as_texts_of_their_own(model, known, measured):
    sentences, counts = known
    assert counts.sum() + counts[2] > model.max_tokens - 2  # so that the third sentence begins a window
    twice = summarise.measure(model, [*sentences, *sentences[2:5]], np.concatenate([counts, counts[2:5]]))
    alone = summarise.measure(model, sentences[2:5], counts[2:5])
    for figures, first, second in zip(twice, measured, alone, strict=True):
        expected = first + second if np.ndim(first) == 0 else np.concatenate([first, second])
        np.testing.assert_allclose(figures, expected, rtol=1e-4)


def test_a_text_of_one_sentence(model):
    received, influence, special = summarise.measure(model, ["Rain."], np.array([2]))
    assert received[0] + special == pytest.approx(4, rel=1e-5) and influence[0] > 0


def test_removed_is_the_embedding_without_the_sentence(model):
    sentences = ["Rain fell on the roof.", "The cat slept.", "Interest rates rose by a half."]
    turned = summarise.removed(model, sentences, np.array([6, 4, 7]))
    whole, without = model.embed([" ".join(sentences), " ".join([sentences[0], sentences[2]])])
    assert turned[1] == pytest.approx(1 - whole @ without, abs=1e-5) and turned.shape == (3,)


def test_rank_correlation():
    assert summarise.rank_correlation([1, 2, 30], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert summarise.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert summarise.rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


# The program


def lists(output):
    """{title: the numbers of its sentences, their figures, and the share of the weight in percent}."""
    found = {}
    for part in re.split(r"\n(?=\S.*, in times the average:\n)", output)[1:]:
        rows = re.findall(r"^ {0,3}(\d+) +(\d+\.\d\d)  \S", part, re.MULTILINE)
        share = re.search(r"Kept (\d+) of \d+ sentences, which hold (\d+)% of the weight", part)
        assert int(share[1]) == len(rows)
        found[part.split(",")[0]] = [int(i) for i, _ in rows], [float(x) for _, x in rows], int(share[2])
    return found


def test_program(known, measured, tmp_path):
    done = run(PROGRAM, TEXT, "-n", "3", "--check", "--html", tmp_path / "mills.html")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    received, influence, special = measured
    assert lines[0] == f"{len(known[0])} sentences, {known[1].sum()} tokens, read in 1 window."
    assert f"[CLS] and [SEP] receive {special / (special + received.sum()):.0%} of all attention" in lines[1]
    found = lists(done.stdout)
    figures = {"Received most attention per token": received / known[1], "Most influence on the last layer": influence}
    for title, values in figures.items():
        kept, shown, share = found[title]
        assert kept == sorted(np.argsort(-values)[:3] + 1)  # in the text's order
        np.testing.assert_allclose(shown, values[np.array(kept) - 1] / values.mean(), atol=0.006)
        assert share == pytest.approx(100 * received[np.array(kept) - 1].sum() / received.sum(), abs=0.51)
    assert len(found) == 3 and found["Most influence on the last layer"][0][0] == 1
    assert re.search(r"^   1   2\.\d\d  A tide mill is a water mill that is driven by the sea\.$", done.stdout, re.M)
    readme = " ".join((EXAMPLES / "README.md").read_text(encoding="utf-8").split())
    for name, value in re.findall(r"^  ([a-z ]+?) +(-?\d\.\d\d)$", done.stdout, re.MULTILINE):
        assert f"{value} ({name})" in readme
    page = (tmp_path / "mills.html").read_text(encoding="utf-8")
    assert all(html.escape(sentence) in page for sentence in known[0]) and "http" not in page


def test_program_reads_long_texts_in_windows(model, tmp_path):
    text = TEXT.read_text(encoding="utf-8")
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + f"{text}\n\n{text}".encode())
    done = run(PROGRAM, tmp_path / "long.txt", "-n", "99")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("34 sentences, 478 tokens, read in 2 windows.\n")
    assert [(len(kept), share) for kept, _, share in lists(done.stdout).values()] == [(34, 100), (34, 100)]


def test_program_on_a_terminal_without_unicode(model, tmp_path):
    (tmp_path / "one.txt").write_text("Die Vögel singen.", encoding="utf-8")
    done = run(PROGRAM, tmp_path / "one.txt", "--check", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == ""
    assert "   1   1.00  Die V?gel singen." in done.stdout and "Rank" not in done.stdout


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot read "),
        (b"", "no sentences in "),
        (b"\xef\xbb\xbf \n\n", "no sentences in "),
        (b"Short. " + b"Word " * 255, "sentence 2 has 255 tokens; the model reads 254 at once"),
    ],
)
def test_bad_files(model, tmp_path, content, says):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    done = run(PROGRAM, path)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr and done.stderr.startswith("usage: summarise.py")


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "required: FILE"),
        ([TEXT, "-n", "0"], "-n must be at least 1, got 0"),
        ([TEXT, "-n", "two"], "invalid int value: 'two'"),
        ([EXAMPLES], "cannot read "),
        ([TEXT, "--html", "absent/mills.html"], "cannot write absent/mills.html: "),
    ],
)
def test_bad_usage(model, arguments, says):
    done = run(PROGRAM, *arguments)
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr and "Traceback" not in done.stderr


def test_program_without_the_model():
    done = run_without("tokenizers", PROGRAM, str(TEXT))
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("summarise.py: ")
