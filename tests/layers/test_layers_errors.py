"""Bad input to the layers: which exception, that its message restates what was given, and that nothing was done."""

import re

import numpy as np
import pytest

import qkv_fast


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def refuses(error, words, function, *args, **options):
    with pytest.raises(error) as caught:
        function(*args, **options)
    assert type(caught.value) is error
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", str(caught.value)), (word, str(caught.value))


@pytest.mark.parametrize(
    "error, words, x, w, b",
    [
        (ValueError, ["x", "5", "4", "(3, 5)", "(6, 4)"], zeros(3, 5), zeros(6, 4), None),
        (ValueError, ["x", "w.T"], zeros(3, 5), zeros(5, 6), None),
        (ValueError, ["w", "(n_out, n_in)", "(4,)"], zeros(3, 4), zeros(4), None),
        (ValueError, ["w", "(2, 6, 4)"], zeros(3, 4), zeros(2, 6, 4), None),
        (ValueError, ["x", "axis"], zeros(), zeros(6, 4), None),
        (ValueError, ["b", "(6,)", "(4,)"], zeros(3, 4), zeros(6, 4), zeros(4)),
        (ValueError, ["b", "(6,)", "(1, 6)"], zeros(3, 4), zeros(6, 4), zeros(1, 6)),
        (TypeError, ["x", "int64"], zeros(3, 4, dtype="int64"), zeros(6, 4), None),
        (TypeError, ["w", "bool"], zeros(3, 4), zeros(6, 4, dtype=bool), None),
        (TypeError, ["w", "float64", "float32"], zeros(3, 4), zeros(6, 4, dtype="float64"), None),
        (TypeError, ["float64", "float32", "w.astype"], zeros(3, 4, dtype="float64"), zeros(6, 4), None),
        (TypeError, ["float16", "float64"], zeros(3, 4, dtype="float16"), zeros(6, 4, dtype="float64"), None),
        (TypeError, ["b", "float64", "float32"], zeros(3, 4), zeros(6, 4), zeros(6, dtype="float64")),
        (TypeError, ["b", "complex64"], zeros(3, 4), zeros(6, 4), zeros(6, dtype="complex64")),
        (TypeError, ["x", "masked"], np.ma.zeros((3, 4)), zeros(6, 4), None),
    ],
)
def test_linear(error, words, x, w, b):
    refuses(error, ["linear", *words], qkv_fast.linear, x, w, b)
    if "x" not in words and x.dtype == w.dtype == "float32":
        refuses(error, ["Linear", *[word for word in words if word != "x"]], qkv_fast.Linear, w, b)


@pytest.mark.parametrize(
    "error, words, options",
    [
        (ValueError, ["out", "(3, 6)", "(6, 3)"], dict(out=zeros(6, 3))),
        (TypeError, ["out", "float32", "float64"], dict(out=zeros(3, 6, dtype="float64"))),
        (TypeError, ["out", "list"], dict(out=[1])),
        (ValueError, ["num_threads", "0"], dict(num_threads=0)),
        (TypeError, ["bias"], dict(bias=None)),
    ],
)
def test_options(error, words, options):
    refuses(error, ["linear", *words], qkv_fast.linear, zeros(3, 4), zeros(6, 4), **options)


def test_layers():
    layer = qkv_fast.Linear(zeros(6, 4))
    refuses(ValueError, ["Linear", "x", "5", "4"], layer, zeros(3, 5))
    refuses(TypeError, ["Linear", "float32", "float64"], layer, zeros(3, 4, dtype="float64"))
    wide = qkv_fast.Linear(zeros(6, 4, dtype="float64"))
    refuses(TypeError, ["Linear", "float64", "float16"], wide, zeros(3, 4, dtype="float16"))
    refuses(ValueError, ["Linear", "out", "(3, 6)"], layer, zeros(3, 4), out=zeros(3, 5))
    assert repr(layer) == "Linear(n_in=4, n_out=6, float32)"


@pytest.mark.parametrize(
    "error, words, args, options",
    [
        (ValueError, ["13", "2"], (zeros(3, 4), zeros(13, 4), None, 2), {}),
        (ValueError, ["num_kv_heads", "3", "4"], (zeros(3, 4), zeros(20, 4), None, 4, 3), {}),
        (ValueError, ["num_heads", "0"], (zeros(3, 4), zeros(12, 4), None, 0), {}),
        (TypeError, ["num_heads", "None"], (zeros(3, 4), zeros(12, 4)), {}),
        (TypeError, ["num_heads", "True"], (zeros(3, 4), zeros(12, 4), None, True), {}),
        (ValueError, ["x", "(..., L, n_in)", "(4,)"], (zeros(4), zeros(12, 4), None, 2), {}),
        (ValueError, ["b"], (zeros(3, 4), qkv_fast.Linear(zeros(12, 4)), zeros(12), 2), {}),
        (ValueError, ["layout"], (zeros(3, 4), zeros(12, 4), None, 2), dict(layout="lbhd")),
    ],
)
def test_project_qkv(error, words, args, options):
    refuses(error, ["project_qkv", *words], qkv_fast.project_qkv, *args, **options)


X = zeros(2, 3, 5, 8)
YARN = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=2.0, low_freq_factor=4.0, high_freq_factor=1.0)


@pytest.mark.parametrize(
    "error, words, x, options",
    [
        (ValueError, ["x", "(8,)"], zeros(8), {}),
        (TypeError, ["x", "int64"], zeros(5, 8, dtype="int64"), {}),
        (TypeError, ["positions", "float64"], X, dict(positions=np.arange(5.0))),
        (ValueError, ["positions", "(5,)", "(2, 5)", "(4,)"], X, dict(positions=np.arange(4))),
        (ValueError, ["positions", "(3, 5)"], X, dict(positions=np.zeros((3, 5), int))),
        (ValueError, ["positions", "()"], X, dict(positions=3)),
        (ValueError, ["positions", str(2**60)], X, dict(positions=np.full(5, 2**60))),
        (ValueError, ["base", "above", "0"], X, dict(base=0)),
        (ValueError, ["base", "nan"], X, dict(base=float("nan"))),
        (TypeError, ["base", "'10000'"], X, dict(base="10000")),
        (ValueError, ["rotary_dim", "7"], X, dict(rotary_dim=7)),
        (ValueError, ["rotary_dim", "10", "8"], X, dict(rotary_dim=10)),
        (ValueError, ["rotary_dim", "7"], zeros(5, 7), {}),
        (TypeError, ["rotary_dim", "4.0"], X, dict(rotary_dim=4.0)),
        (TypeError, ["interleaved", "1"], X, dict(interleaved=1)),
        (ValueError, ["layout", "'bl'"], X, dict(layout="bl")),
        (ValueError, ["out", "(2, 3, 5, 8)", "(5, 8)"], X, dict(out=zeros(5, 8))),
        (TypeError, ["scaling", "dict", "str"], X, dict(scaling="linear")),
        (ValueError, ["rope_type", "ntk", "llama3"], X, dict(scaling=dict(rope_type="ntk"))),
        (ValueError, ["linear", "beta_fast"], X, dict(scaling=dict(rope_type="linear", factor=2.0, beta_fast=1.0))),
        (ValueError, ["yarn", "factor", "original_max_position_embeddings"], X, dict(scaling=dict(rope_type="yarn"))),
        (TypeError, ["factor", "'2'"], X, dict(scaling={**YARN, "factor": "2"})),
        (ValueError, ["factor", "0.5"], X, dict(scaling={**YARN, "factor": 0.5})),
        (ValueError, ["low_freq_factor", "4"], X, dict(scaling={**LLAMA3, "original_max_position_embeddings": 64})),
        (
            ValueError,
            ["short_factor", "4", "(3,)"],
            X,
            dict(scaling={**YARN, "rope_type": "longrope", "short_factor": [1] * 3, "long_factor": [1] * 4}),
        ),
        (TypeError, ["cos_sin", "ndarray"], X, dict(cos_sin=zeros(5, 4))),
        (ValueError, ["cos", "sin", "(5, 4)", "(5, 3)"], X, dict(cos_sin=(zeros(5, 4), zeros(5, 3)))),
        (ValueError, ["cos", "4", "5"], X, dict(cos_sin=(zeros(4, 4), zeros(4, 4)))),
        (ValueError, ["cos", "(3, 5, 4)"], X, dict(cos_sin=(zeros(3, 5, 4), zeros(3, 5, 4)))),
        (ValueError, ["rotary_dim", "10"], X, dict(cos_sin=(zeros(5, 5), zeros(5, 5)))),
        (ValueError, ["rotary_dim", "6", "8"], X, dict(cos_sin=(zeros(5, 4), zeros(5, 4)), rotary_dim=6)),
        (ValueError, ["cos_sin", "scaling"], X, dict(cos_sin=(zeros(5, 4), zeros(5, 4)), scaling=YARN)),
        (ValueError, ["cos_sin", "base=5.0"], X, dict(cos_sin=(zeros(5, 4), zeros(5, 4)), base=5.0)),
        (
            ValueError,
            ["positions", "0", "4", "-1"],
            X,
            dict(cos_sin=(zeros(5, 4), zeros(5, 4)), positions=np.arange(5) - 1),
        ),
        (
            ValueError,
            ["positions", "cos_sin"],
            X,
            dict(cos_sin=(zeros(2, 5, 4), zeros(2, 5, 4)), positions=np.arange(5)),
        ),
    ],
)
def test_rope(error, words, x, options):
    refuses(error, ["rope", *words], qkv_fast.rope, x, **options)


@pytest.mark.parametrize(
    "error, words, rope",
    [
        (TypeError, ["dict", "list"], [1]),
        (ValueError, ["rope", "positions"], dict(positions=[0])),
        (TypeError, ["rope", "theta"], dict(theta=10000.0)),
        (ValueError, ["rope", "base", "-1"], dict(base=-1)),
        (ValueError, ["rope", "rotary_dim", "6", "4"], dict(rotary_dim=6)),
        (ValueError, ["rope", "rope_type", "ntk"], dict(scaling=dict(rope_type="ntk"))),
        (ValueError, ["rope", "yarn", "factor"], dict(scaling=dict(rope_type="yarn"))),
        (ValueError, ["rope", "rotary_dim", "6", "4"], dict(cos_sin=(zeros(9, 3), zeros(9, 3)))),
        (ValueError, ["rope", "cos", "(9, 2)", "(8, 2)"], dict(cos_sin=(zeros(9, 2), zeros(8, 2)))),
        (TypeError, ["rope", "interleaved", "1"], dict(interleaved=1)),
    ],
)
def test_rope_of_a_layer(error, words, rope):
    """Looked at when the layer is made."""
    refuses(error, words, qkv_fast.MultiHeadAttention, *[zeros(8, 8)] * 4, num_heads=2, rope=rope)


def test_what_a_layer_refuses_before_its_cache_changes():
    w = zeros(8, 8)
    refuses(TypeError, ["weights", "one type", "q float32", "out float64"], qkv_fast.MultiHeadAttention, w, w, w,
            w.astype("f8"), num_heads=2)  # fmt: skip
    rope = {"layout": "bhld"}
    refuses(ValueError, ["rope", "layout"], qkv_fast.MultiHeadAttention, w, w, w, w, num_heads=2, rope=rope)
    layer, cache = qkv_fast.MultiHeadAttention(w, w, w, w, num_heads=2), qkv_fast.KVCache(1, 2, 4, 9, bounds=True)
    refuses(TypeError, ["tolerance", "own attend"], layer, zeros(1, 3, 8), cache=cache, tolerance=0.1)
    assert cache.lengths.tolist() == [0]


def test_sizes_of_a_layer_cannot_be_set():
    """Its packed weights are read by them, and rows are turned as long as they were."""
    layer, heads = qkv_fast.Linear(np.ones((2, 3))), qkv_fast.MultiHeadAttention(*[zeros(8, 8)] * 4, num_heads=2)
    for of, name in ((layer, "n_in"), (layer, "n_out"), (heads, "num_heads"), (heads, "num_kv_heads")):
        with pytest.raises(AttributeError):
            setattr(of, name, 10**6)
    assert (layer.n_in, layer.n_out, heads.num_heads, heads.num_kv_heads) == (3, 2, 2, 2)
