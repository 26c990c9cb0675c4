"""One validator for every verb: a new one needs no checks of its own, and the help of arguments stands in one place."""

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from _util import normal

import qkv_fast
from qkv_fast import _problem
from qkv_fast._help import documented

PACKAGE = Path(__file__).resolve().parents[2] / "qkv_fast"


@documented
def heaviest(q, k, v, *, mask=None, bias=None, causal=False, window=None, q_offset=None, q_positions=None,
             q_lengths=None, kv_lengths=None, kv_starts=None, segments=None,
             alibi_slopes=None, sinks=None, softcap=None, scale=None, layout="bhld", num_threads=None,
             **words):  # fmt: skip
    """The largest log-sum-exp of each head.

    <mask>
        Nothing else.
    """
    p = _problem.check("heaviest", q, k, v, mask, bias, causal, window, q_offset, q_positions, q_lengths,
                       kv_lengths, kv_starts, segments, alibi_slopes,
                       sinks, softcap, scale, layout, num_threads, words)  # fmt: skip
    return _problem.attend(p, None, True)[1].max(-1)


def arrays():
    rng = np.random.default_rng(0)
    return normal(rng, (2, 4, 5, 8)), normal(rng, (2, 2, 9, 8)), normal(rng, (2, 2, 9, 8))


def test_a_new_verb_takes_what_attention_takes():
    options = dict(causal=True, window=(3, 0), kv_lengths=[9, 6], softcap=3.0, sinks=np.zeros(4), scale=0.5)
    _, lse = qkv_fast.attention(*arrays(), **options, return_lse=True)
    assert np.array_equal(heaviest(*arrays(), **options), lse.max(-1))


@pytest.mark.parametrize(
    "error, words, options",
    [
        (TypeError, "mask must be bool", dict(mask=np.zeros((5, 9)))),
        (ValueError, r"mask\[:, None\]", dict(mask=np.ones((2, 5, 9), bool))),
        (ValueError, "kv_lengths must be in 0..9", dict(kv_lengths=10)),
        (ValueError, "'top-left' means q_offset=0", dict(causal="top-left", q_offset=1)),
        (ValueError, "num_threads must be at least 1", dict(num_threads=0)),
        (TypeError, "'attn_mask'; here it is mask=", dict(attn_mask=None)),
    ],
    ids=str,
)
def test_its_errors_are_attentions_with_its_name(error, words, options):
    with pytest.raises(error, match=rf"^heaviest(\(\))?:? .*{words}"):
        heaviest(*arrays(), **options)
    with pytest.raises(error, match=rf"^attention(\(\))?:? .*{words}"):
        qkv_fast.attention(*arrays(), **options)


def test_its_help_is_attentions():
    entry = re.search(r"(mask : .*?)\nbias : ", inspect.getdoc(qkv_fast.attention), re.DOTALL)[1]
    assert inspect.getdoc(heaviest).endswith(entry + "\n    Nothing else.")
    assert "words" not in inspect.signature(heaviest).parameters


def entries(text):
    """Names in a docstring's section of parameters, as they stand in the source."""
    section = re.search(r"^ *Parameters\n *-+\n(.*?)(^ *\w+\n *-+\n|\Z)", text, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ *([\w, ]+) : ", section[1], re.MULTILINE) if section else []
    return [name for line in lines for name in line.split(", ")]


def test_the_help_of_each_argument_is_written_once():
    """But for words that mean something else: the mask of a softmax, the weights of a layer, threads for a copy alone;
    and methods that say whose arguments theirs are."""
    shared = {"mask", "bias", "causal", "window", "q_offset", "kv_lengths", "segments", "alibi_slopes", "sinks",
              "softcap", "scale", "layout", "return_lse", "out", "num_threads", "cu_seqlens_q",
              "cu_seqlens_k"}  # fmt: skip
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if "integrations" in path.parts:  # which have their hosts' words
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                found += [(node.name, name) for name in entries(text) if name in shared]
    other = {("softmax", "mask"), ("KVCache", "window"), ("MultiHeadAttention", "out"), ("Linear", "num_threads")}
    other |= {("PagedKVCache", "window"), ("KVCache", "causal"), ("PagedKVCache", "causal")}
    other |= {(name, "num_threads") for name in ("__call__", "queries", "keys_values")}
    assert set(found) <= other | {("__call__", "out")}
    help_text = (PACKAGE / "_help.py").read_text(encoding="utf-8")
    for name in shared:
        assert len(re.findall(rf"^(\w+, )?{name}(, \w+)? : ", help_text, re.MULTILINE)) == 1
        assert name in entries(inspect.getdoc(qkv_fast.attention_varlen)) + entries(inspect.getdoc(qkv_fast.attention))
