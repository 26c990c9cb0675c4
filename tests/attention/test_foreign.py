"""Arrays of other libraries: read where they lie by DLPack or `__array__`, or refused with the way out.

These are small classes that speak as the libraries do; tests/integrations/test_arrays.py has the libraries themselves.
"""

import ctypes
import gc
import re

import ml_dtypes
import numpy as np
import pytest
from _util import child_says, same_bits
from _verbs import VERBS, K, Q, V, W

import qkv_fast

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class Exported:
    """Memory that speaks DLPack and nothing else: of NumPy's types as NumPy says them, of bfloat16 as torch does."""

    device = 1, 0
    options = ("max_version", "dl_device", "copy")

    def __init__(self, x):
        self.bits = x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x
        self.is_bfloat16 = x.dtype == ml_dtypes.bfloat16

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if set(options) - {*self.options}:
            raise TypeError("unexpected keyword argument")
        versioned = "max_version" in options
        capsule = self.bits.__dlpack__(**({"max_version": (1, 0)} if versioned else {}))
        if self.is_bfloat16:  # where the type's code lies, by dlpack.h
            name = b"dltensor_versioned" if versioned else b"dltensor"
            ctypes.c_uint8.from_address(_pointer(capsule, name) + 20 + 32 * versioned).value = 4
        return capsule


class Old(Exported):
    """Of DLPack before version 1."""

    options = ()


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


def test_bfloat16_without_ml_dtypes():
    """A capsule of bfloat16 is an ImportError that says so."""
    code = """
import sys
sys.modules["ml_dtypes"] = None
import ctypes, numpy as np, qkv_fast
get = ctypes.pythonapi.PyCapsule_GetPointer
get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
class X:
    def __dlpack_device__(self): return 1, 0
    def __dlpack__(self):
        capsule = np.ones((5, 8), np.uint16).__dlpack__()
        ctypes.c_uint8.from_address(get(capsule, b"dltensor") + 20).value = 4
        return capsule
try:
    qkv_fast.attention(X(), X(), X())
except ImportError as error:
    print(error)
"""
    assert child_says(code) == "attention: bfloat16 needs ml_dtypes: pip install ml_dtypes"
