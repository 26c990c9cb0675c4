"""Bad input to the layers: which exception, that its message restates what was given, and that nothing was done."""

import re

import ml_dtypes
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
        (TypeError, ["float16", "bfloat16"], zeros(3, 4, dtype="float16"), zeros(6, 4, dtype=ml_dtypes.bfloat16), None),
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
