"""Memory that speaks DLPack, also of bfloat16, which needs no ml_dtypes here."""

import ctypes

import numpy as np

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class Exported:
    """Memory that speaks DLPack and nothing else: of NumPy's types as NumPy says them, of bfloat16 or its bits as torch
    does."""

    device = 1, 0
    options = ("max_version", "dl_device", "copy")

    def __init__(self, x, are_bits=False):
        self.is_bfloat16 = are_bits or x.dtype.name == "bfloat16"
        self.bits = x.view(np.uint16) if self.is_bfloat16 else x

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


def truncated(x):
    """The bits of float32 as bfloat16."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)
