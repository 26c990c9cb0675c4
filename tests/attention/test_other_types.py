"""Types that are not ours are refused by their names, whichever argument it is: letter and size may be one of ours."""

import re

import ml_dtypes
import numpy as np
import pytest

import qkv_fast

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FOREIGN = [
    np.dtype(found)
    for found in vars(ml_dtypes).values()
    if isinstance(found, type) and issubclass(found, np.generic) and np.dtype(found) != BFLOAT16
]
FOREIGN += [np.dtype(name) for name in ("int8", "uint16", "int32", "longdouble", "complex64", "V2", "V4", "O", "S4")]

X = np.ones((1, 2, 50, 64), np.float32)
P = np.ones((1, 2, 50, 50), np.float32)
LSE = X[..., 0]
HALVES = (X.astype(np.float16), X.astype(BFLOAT16))
PACKED = np.ones((50, 2, 64), np.float32), [0, 50]

CALLS = {
    "q": lambda x: qkv_fast.attention(x(X), X, X),
    "k, v": lambda x: [qkv_fast.attention(q, x(X), x(X)) for q in (X, *HALVES)],
    "q, k, v": lambda x: qkv_fast.attention(x(X), x(X), x(X)),
    "out": lambda x: qkv_fast.attention(X, X, X, out=x(X)),
    "out, float16": lambda x: qkv_fast.attention(*HALVES[:1] * 3, out=x(X)),
    "out, bfloat16": lambda x: qkv_fast.attention(*HALVES[1:] * 3, out=x(X)),
    "bias": lambda x: qkv_fast.attention(X, X, X, bias=x(P)),
    "mask": lambda x: qkv_fast.attention(X, X, X, mask=x(P)),
    "explain": lambda x: qkv_fast.explain(x(X), x(X), x(X)),
    "packed": lambda x: qkv_fast.attention_varlen(*[x(PACKED[0])] * 3, *[PACKED[1]] * 2),
    "packed out": lambda x: qkv_fast.attention_varlen(*PACKED[:1] * 3, *[PACKED[1]] * 2, out=x(PACKED[0])),
    "scores": lambda x: qkv_fast.scores(x(X), x(X)),
    "scores out": lambda x: qkv_fast.scores(X, X, out=x(P)),
    "softmax": lambda x: qkv_fast.softmax(x(X)),
    "softmax out": lambda x: qkv_fast.softmax(X, out=x(X)),
    "softmax mask": lambda x: qkv_fast.softmax(X, mask=x(X)),
    "weighted values": lambda x: qkv_fast.weighted_values(x(P), x(X)),
    "partials": lambda x: qkv_fast.merge_partials([x(X), x(X)], [LSE, LSE]),
    "second partial": lambda x: qkv_fast.merge_partials([HALVES[1], x(X)], [LSE, LSE]),
    "lses": lambda x: qkv_fast.merge_partials([X, X], [x(LSE), x(LSE)]),
    "tokens": lambda x: qkv_fast.KVCache(1, 2, 64, 50).append(x(X), x(X)),
    "query of a cache": lambda x: qkv_fast.KVCache(1, 2, 64, 50).attend(x(X)),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", FOREIGN, ids=str)
def test_refused_by_name(dtype, call):
    with pytest.raises(TypeError, match=re.escape(str(dtype))):
        CALLS[call](lambda x: np.zeros(x.shape, dtype))


def test_scale_and_softcap_take_scalars_of_bfloat16():
    quarter = BFLOAT16.type(0.25)
    found, asked = (qkv_fast.attention(X, X, X, scale=x, softcap=x) for x in (quarter, 0.25))
    np.testing.assert_array_equal(found, asked)
    with pytest.raises(TypeError, match="scale must be a real number, got 3"):
        qkv_fast.attention(X, X, X, scale=ml_dtypes.int4(3))


@pytest.mark.parametrize("call", ["q, k, v", "bias", "partials"])
def test_bits_of_bfloat16_are_hinted_at(call):
    with pytest.raises(TypeError, match=r"pip install ml_dtypes and pass \w+\.view\(ml_dtypes\.bfloat16\)"):
        CALLS[call](lambda x: np.zeros(x.shape, np.uint16))
