"""Bad input to the stages: which exception, that its message restates what was given, and that nothing was done."""

import re

import numpy as np
import pytest
from _util import no_change
from numpy.lib.stride_tricks import as_strided

import qkv_fast

GOOD = {
    "scores": (dict(q=(2, 4, 5, 8), k=(2, 2, 9, 8)), (2, 4, 5, 9)),
    "weighted_values": (dict(p=(2, 4, 5, 9), v=(2, 2, 9, 6)), (2, 4, 5, 6)),
    "softmax": (dict(x=(2, 4, 5, 9)), (2, 4, 5, 9)),
    "softmax_grad": (dict(dp=(2, 4, 5, 9), p=(2, 4, 5, 9)), (2, 4, 5, 9)),
}
functions = pytest.mark.parametrize("name", GOOD)
products = pytest.mark.parametrize("name", ["scores", "weighted_values"])
softmaxes = pytest.mark.parametrize("name", ["softmax", "softmax_grad"])


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def refuses(name, error, *words, **changes):
    shapes, shape = GOOD[name]
    arguments = {key: zeros(*value) for key, value in shapes.items()}
    arguments |= {"out": np.full(shape, 7, "float32")} | changes
    watched = [x for x in arguments.values() if isinstance(x, np.ndarray) and x.dtype != object]
    args = [arguments.pop(key) for key in shapes]
    with no_change(*watched), pytest.raises(error) as caught:
        getattr(qkv_fast, name)(*args, **arguments)
    assert type(caught.value) is error
    for word in (name, *words):
        assert re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", str(caught.value)), (word, str(caught.value))


@pytest.mark.parametrize(
    "name, a, b",
    [
        ("scores", (8,), (9, 8)),
        ("scores", (5, 8), (2, 2, 9, 8)),
        ("scores", (2, 4, 5, 8), (9, 8)),
        ("scores", (2, 4, 5, 8), (2, 2, 9, 7)),
        ("scores", (2, 4, 5, 8), (2, 3, 9, 8)),
        ("scores", (2, 4, 5, 8), (2, 0, 9, 8)),
        ("scores", (2, 1, 5, 8), (2, 2, 9, 8)),
        ("scores", (3, 4, 5, 8), (2, 2, 9, 8)),
        ("scores", (5, 8), (9, 1)),
        ("weighted_values", (9,), (9, 6)),
        ("weighted_values", (5, 9), (2, 9, 6)),
        ("weighted_values", (5, 9), (8, 6)),
        ("weighted_values", (2, 4, 5, 9), (2, 2, 1, 6)),
        ("weighted_values", (2, 4, 5, 9), (2, 3, 9, 6)),
        ("weighted_values", (2, 4, 5, 9), (3, 2, 9, 6)),
    ],
)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_shapes(name, a, b, layout):
    given = {key: zeros(*shape) for key, shape in zip(GOOD[name][0], (a, b), strict=True)}
    if layout == "blhd":  # p stays as it is
        given = {key: x.swapaxes(-3, -2) if x.ndim > 2 and key != "p" else x for key, x in given.items()}
    refuses(name, ValueError, *given, *(x.shape for x in given.values()), layout=layout, **given)


BAD_ARRAYS = [
    np.zeros((2, 4, 5, 8), "int64"),
    np.zeros((2, 4, 5, 8), bool),
    np.zeros((2, 4, 5, 8), "complex64"),
    np.zeros((2, 4, 5, 8), object),
    np.zeros((2, 4, 5, 8), "uint16"),
    np.zeros((2, 4, 5, 8), "longdouble"),
    np.ma.masked_array(np.zeros((2, 4, 5, 8))),
    None,
    "text",
    [[1, 2], [3, 4]],
]


@pytest.mark.parametrize("bad", BAD_ARRAYS, ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', x)}")
@functions
def test_kinds(name, bad):
    for key in GOOD[name][0]:
        refuses(name, TypeError, key, **{key: bad})


@pytest.mark.parametrize("name", [name for name in GOOD if len(GOOD[name][0]) > 1])
def test_wider_second_operand(name):
    first, second = GOOD[name][0]
    shape = GOOD[name][0][second]
    refuses(name, TypeError, first, second, "float32", "float64", **{second: zeros(*shape, dtype="float64")})


@pytest.mark.parametrize("bad", ["lbhd", "", None, 3])
@products
def test_layout(name, bad):
    refuses(name, ValueError, "layout", repr(bad), layout=bad)


@pytest.mark.parametrize(
    "bad, error", [(np.nan, ValueError), (np.inf, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_scale(bad, error):
    refuses("scores", error, "scale", scale=bad)


@pytest.mark.parametrize("bad", [4, -5, 2**40, -(2**70)])
@softmaxes
def test_axis_out_of_range(name, bad):
    """NumPy's own exception, which is a ValueError and an IndexError."""
    refuses(name, np.exceptions.AxisError, bad, (2, 4, 5, 9), axis=bad)


@pytest.mark.parametrize("bad", [1.0, "1", None, (0, 1)])
@softmaxes
def test_axis_kind(name, bad):
    refuses(name, TypeError, "axis", repr(bad), axis=bad)


def test_no_axis():
    refuses("softmax", ValueError, "x", (), x=np.float32(3))
    refuses("softmax_grad", ValueError, "dp", (), dp=np.float32(3))


@pytest.mark.parametrize("shape", [(), (9,), (1, 4, 5, 9), (2, 4, 5, 8), (2, 4, 9, 5)])
def test_weights_of_another_shape(shape):
    refuses("softmax_grad", ValueError, "dp", "p", (2, 4, 5, 9), shape, p=zeros(*shape))


@pytest.mark.parametrize("shape", [(8,), (2, 1, 4, 5, 9), (3, 4, 5, 9), (4, 5, 2)])
def test_mask_shape(shape):
    refuses("softmax", ValueError, "mask", (2, 4, 5, 9), shape, mask=np.ones(shape, bool))


@pytest.mark.parametrize(
    "bad", [np.ones(9, "int8"), np.ones(9, "float32"), 1.0, [0, 1] * 4 + [0], "text", np.ma.ones(9, bool)]
)
def test_mask_kind(bad):
    refuses("softmax", TypeError, "mask", mask=bad)


@functions
def test_out(name):
    shape = GOOD[name][1]
    for wrong in ((), shape[1:], (*shape[:-1], shape[-1] + 1), (1, *shape)):
        refuses(name, ValueError, "out", shape, wrong, out=zeros(*wrong))
    for dtype in ("float64", "int32", "float16", "bfloat16"):
        refuses(name, TypeError, "out", "float32", np.dtype(dtype), out=zeros(*shape, dtype=dtype))
    for kind in ([1.0], 3, np.ma.zeros(shape, "float32")):
        refuses(name, TypeError, "out", out=kind)
    refuses(name, ValueError, "out", out=np.broadcast_to(zeros(shape[-1]), shape))  # read-only
    refuses(name, ValueError, "out", "overlapping", out=as_strided(zeros(shape[-1]), shape, (0, 0, 0, 4)))


@pytest.mark.parametrize("n, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
@functions
def test_thread_counts(name, n, error):
    refuses(name, error, "num_threads", num_threads=n)


def test_sizes():
    """MemoryError for a result that no memory holds, OverflowError for one that 63 bits do not count."""
    x = zeros(8)
    long = as_strided(x, (1, 2**40, 8), (0, 0, 4))
    with pytest.raises(MemoryError):
        qkv_fast.scores(long[:, : 2**23], long[:, : 2**23])
    with pytest.raises(OverflowError, match="scores"):
        qkv_fast.scores(long, long)
    with pytest.raises(OverflowError, match="weighted_values"):
        qkv_fast.weighted_values(as_strided(x, (2**40, 1), (0, 4)), as_strided(x, (1, 2**40), (0, 0)))
    with pytest.raises(MemoryError):
        qkv_fast.softmax(as_strided(x, (2**44, 8), (0, 4)))
    with pytest.raises(OverflowError, match="scores"):
        wide = as_strided(x, (2**31, 1, 1, 1, 8), (0, 0, 0, 0, 4))
        qkv_fast.scores(wide, as_strided(x, (1, 2**33, 1, 1, 8), (0, 0, 0, 0, 4)))
