"""Arrays of other libraries: read where they lie by DLPack or `__array__`, or refused with the way out.

These are small classes that speak as the libraries do; tests/integrations/test_arrays.py has the libraries themselves.
"""

import gc
import hashlib
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from _dlpack import Exported, Old, truncated
from _util import child_says, same_bits
from _verbs import VERBS, WRITERS, K, Q, V, W

import qkv_fast


class Copied(Exported):
    """Hands out copies, unless that is refused."""

    def __dlpack__(self, *, copy=None, **options):
        if copy is False:
            raise BufferError("it would be a copy")
        return Exported(self.bits.copy()).__dlpack__(**options)


class Arrays:
    """Says what it is by `__array__`, each time anew."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x.copy()


def tree(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("make", [Exported, Old, Arrays])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_reads_them(verb, make):
    """The same bits as of NumPy's arrays."""
    for x, y in zip(tree(VERBS[verb](make)), tree(VERBS[verb](lambda x: x)), strict=True):
        assert type(x) is np.ndarray
        same_bits(x, y)


@pytest.mark.parametrize("make", [Exported, Old])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_types_and_strides_without_a_copy(dtype, make):
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    same_bits(qkv_fast.attention(make(q), make(k), make(v)), qkv_fast.attention(q, k, v))
    turned = [x.swapaxes(1, 2).copy().swapaxes(1, 2)[..., ::2] for x in (q, k, v)]
    same_bits(qkv_fast.attention(*map(make, turned)), qkv_fast.attention(*turned))
    notes = qkv_fast.explain(make(q), Arrays(k), v.tolist() if dtype == "float64" else v).notes
    made = [note for note in notes if "copied to an array" in note]
    assert re.fullmatch(r"k: a \S*Arrays, copied to an array in every call", made[0])
    assert made[1:] == ["v: a list, copied to an array in every call"] * (dtype == "float64")


def test_a_mask_is_looked_at_too():
    mask = np.ones((5, 7), bool)
    for make, copied in ((Exported, 0), (Arrays, 1)):
        notes = qkv_fast.explain(Q, K, V, mask=make(mask)).notes
        assert sum("mask" in note for note in notes) == copied


def test_memory_is_held_as_long_as_it_is_read():
    """Also where an object is all that holds it, and is gone by then."""
    layer = qkv_fast.Linear(Exported(W.copy()))
    gc.collect()
    same_bits(layer(Q), qkv_fast.linear(Q, W))


def library(name, kind, **attributes):
    """An object of a class of that name in a library that need not be installed."""
    return type(kind, (), {"__module__": name, **attributes})()


def on(device):
    return {"__dlpack_device__": lambda self: device, "__dlpack__": None, "__array__": lambda self: Q}


REFUSED = {
    "q is a cupy.ndarray, in memory of another device than the CPU (CUDA); pass cupy.asnumpy(q)":
        library("cupy", "ndarray", **on((2, 0))),
    "another device than the CPU (Metal); pass a copy of q in the CPU's memory": library("mlx", "array", **on((8, 0))),
    "another device than the CPU (device 99 of DLPack)": library("new", "array", **on((99, 0))),
    "q is a pandas.DataFrame, whose index would be lost; pass q.to_numpy()":
        library("pandas.core.frame", "DataFrame", __array__=lambda self: Q),
    "q is a xarray.DataArray, whose axes have names (batch, head, dim_2)":
        library("xarray.core", "DataArray", dims=("batch", "head", "dim_2"), __array__=lambda self: Q),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_refused_with_the_way_out(words):
    with pytest.raises(TypeError, match=re.escape(words)) as caught:
        qkv_fast.attention(REFUSED[words], K, V)
    assert str(caught.value).startswith("attention: q is a ")


def test_axes_without_names():
    given = library("xarray.core", "DataArray", dims=("dim_0", "dim_1"), __array__=lambda self: Q)
    same_bits(qkv_fast.attention(given, K, V), qkv_fast.attention(Q, K, V))


def test_what_a_library_cannot_say():
    """Its own words are handed on; where `__array__` is there as well, that is asked."""

    def fails(self, *_args, **_options):
        raise BufferError("no such layout")

    both = {"__dlpack__": fails, "__dlpack_device__": lambda self: (1, 0)}
    with pytest.raises(TypeError, match=r"softmax: x: NumPy cannot read this host\.Array \(no such layout\)"):
        qkv_fast.softmax(library("host", "Array", **both))
    array = library("host", "Array", **both, __array__=lambda self: Q)
    same_bits(qkv_fast.softmax(array), qkv_fast.softmax(Q))
    for error in (TypeError, RuntimeError):

        def refuse(self, error=error):
            raise error("as it is in a graph")

        with pytest.raises(TypeError, match=r"attention: k: NumPy cannot read this host\.Lazy \(as it is in a graph"):
            qkv_fast.attention(Q, library("host", "Lazy", __array__=refuse), V)


def test_numpy_is_asked_first():
    """Subclasses, masked arrays and matrices keep their rule, whatever protocols they speak."""

    class Own(np.ndarray):
        def __dlpack__(self, **options):
            raise AssertionError("asked")

    same_bits(qkv_fast.attention(Q.view(Own), K, V), qkv_fast.attention(Q, K, V))
    with pytest.raises(TypeError, match=r"masked array, whose mask would be lost; pass q\.filled\(0\)"):
        qkv_fast.attention(np.ma.masked_array(Q), K, V)


def of_bits(x):
    return truncated(x).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("verb", WRITERS)
def test_an_array_of_a_library_to_write_to(verb):
    """It is what is returned, and holds the bits that a new array has; beside an input that it overlaps, too."""
    shape, call = WRITERS[verb]
    for convert in (lambda x: x, of_bits):
        memory = np.empty(shape, convert(Q).dtype)
        out = Exported(memory)
        assert call(convert, out) is out
        same_bits(memory, call(convert, None))
    q = np.concatenate([Q, Q], -1)
    out = Exported(q[..., 4:12])
    expected = qkv_fast.attention(q[..., :8].copy(), K, K)
    assert qkv_fast.attention(Exported(q[..., :8]), K, K, out=out) is out
    same_bits(q[..., 4:12], expected)


@pytest.mark.parametrize("make, error, words", [
    (lambda: Exported(np.empty((1, 4, 5, 7), "float32")), ValueError, r"out must have the shape \(1, 4, 5, 6\), got"),
    (lambda: Exported(np.empty((1, 4, 5, 6))), TypeError, "out must have q's type float32, got float64"),
    (lambda: Exported(np.empty((1, 4, 5, 6), "complex64")), TypeError, "out must have q's type float32, got complex64"),
    (lambda: Exported(np.broadcast_to(np.float32(0), (1, 4, 5, 6))), ValueError, "out is not writable"),
    (lambda: Old(np.empty((1, 4, 5, 6), "float32")), ValueError, "out is not writable"),  # it does not say that it is
    (lambda: Copied(np.empty((1, 4, 5, 6), "float32")), TypeError, r"cannot write to this \S*Copied \(it would"),
    (lambda: Arrays(np.empty((1, 4, 5, 6), "float32")), TypeError, r"whose memory can be written to, got \S*Arrays"),
    (lambda: library("cupy", "ndarray", **on((2, 0))), TypeError, r"out is a cupy\.ndarray, in memory of another dev"),
    (lambda: library("host", "Array", __dlpack_device__=lambda self: (1, 0), __dlpack__=lambda self, **_: 1),
     TypeError, r"attention: out: NumPy cannot write to this host\.Array"),
])  # fmt: skip
def test_what_cannot_be_written_to(make, error, words):
    with pytest.raises(error, match=words):
        qkv_fast.attention(Q, K, V, out=make())


WITHOUT = """
import sys
sys.modules["ml_dtypes"] = None
import hashlib, json, traceback
import numpy as np
import qkv_fast
from _dlpack import Exported, truncated
from _verbs import DOUT, LSE, OUT, WRITERS, K, Q, V, W

def convert(x):
    return Exported(truncated(x), are_bits=True)

def digests(*arrays):
    return [hashlib.sha1(x).hexdigest() for x in arrays]

def needs_it(call):
    try:
        call()
    except ImportError as error:
        assert ": a new array of bfloat16 needs ml_dtypes: pip install ml_dtypes, or give an out=" in str(error)
    else:
        raise AssertionError(call)

found = {}
for name, (shape, call) in WRITERS.items():
    memory, wide = np.empty(shape, np.uint16), np.empty(shape, "float32")
    out = Exported(memory, are_bits=True)
    assert call(convert, out) is out and call(convert, wide) is wide
    found[name] = digests(memory, wide)
    needs_it(lambda: call(convert, None))
needs_it(lambda: qkv_fast.merge_partials([convert(OUT)] * 2, [LSE] * 2))
needs_it(lambda: qkv_fast.attention_grad(*map(convert, (DOUT, Q, K, V, OUT)), LSE, want=("v",)))
needs_it(lambda: qkv_fast.Linear(convert(W))(convert(Q)))
memory = truncated(Q)
out = Exported(memory, are_bits=True)
assert qkv_fast.attention(out, *map(convert, (K, K)), out=out) is out
numbers, shares = qkv_fast.spotlight.top_keys(convert(Q), convert(K), 2)
influence = qkv_fast.spotlight.influence(*map(convert, (Q, K, V)))
found["others"] = digests(memory, numbers, shares, influence)
cache = qkv_fast.KVCache(1, 2, 8, 700, value_dim=6, bounds=True)
cache.append(*(convert(np.tile(x, (1, 1, 100, 1))) for x in (K, V)))
out = np.empty((1, 4, 1, 6), "float32")
cache.attend(Q[:, :, -1:], bias=convert(np.tile(Q[0, 0, 0, :7], 100)), tolerance=0.1, out=out)
found["a bias looked at by NumPy"] = digests(out)
try:
    qkv_fast.attention(*map(convert, (Q, K, K[:, :, :-1])))
except ValueError as error:  # with the arrays that its frames hold printed, as debuggers do
    shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert shown.count("dtype=bfloat16)") > 2
    frame = error.__traceback__.tb_next
    while not isinstance(inside := frame.tb_frame.f_locals.get("q"), np.ndarray):
        frame = frame.tb_next
    assert inside.byteswap().view("uint16").tolist() == inside.view("uint16").byteswap().tolist()
ring = qkv_fast.KVCache(1, 2, 8, 4, value_dim=6, dtype="int8", window=3, bounds=True)
for at in range(6):
    ring.append(K[:, :, at:at + 1], V[:, :, at:at + 1])
before = ring.attend(Q[:, :, -1:])
needs_it(lambda: ring.step(convert(Q[:, :, -1:]), K[:, :, 6:], V[:, :, 6:], tolerance=0.1))
assert np.array_equal(ring.attend(Q[:, :, -1:]), before)
del sys.modules["ml_dtypes"]  # as if it were installed now
import ml_dtypes
assert qkv_fast.attention(*map(convert, (Q, K, V))).dtype == ml_dtypes.bfloat16
print(json.dumps(found))
"""


def digests(*arrays):
    return [hashlib.sha1(x).hexdigest() for x in arrays]


def test_bfloat16_without_ml_dtypes():
    """What is read has the bits that it has with that package, and `out=` is given them; a new array is an ImportError
    that says so."""
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    found = json.loads(child_says(WITHOUT, PYTHONPATH=paths))
    for name, (shape, call) in WRITERS.items():
        wide = call(of_bits, np.empty(shape, "float32"))
        assert found.pop(name) == digests(call(of_bits, None), wide), name
    q, k, v = map(of_bits, (Q, K, V))
    influence = qkv_fast.spotlight.influence(q, k, v)
    expected = digests(qkv_fast.attention(q, k, k), *qkv_fast.spotlight.top_keys(q, k, 2), influence)
    assert found.pop("others") == expected
    cache = qkv_fast.KVCache(1, 2, 8, 700, value_dim=6, bounds=True)
    cache.append(*(np.tile(x, (1, 1, 100, 1)) for x in (k, v)))
    out, bias = np.empty((1, 4, 1, 6), "float32"), np.tile(q[0, 0, 0, :7], 100)
    cache.attend(Q[:, :, -1:], bias=bias, tolerance=0.1, out=out)
    assert found == {"a bias looked at by NumPy": digests(out)}
