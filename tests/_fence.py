"""Memory between pages that may not be touched: one byte too far ends the process."""

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
PROT_NONE = 0


class Fence:
    """Bytes between two untouchable pages."""

    def __init__(self, size):
        self.size = -(-max(size, 1) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * PAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for start in (0, PAGE + self.size):
            if libc.mprotect(self.bytes.ctypes.data + start, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.inside = self.bytes[PAGE : PAGE + self.size]

    def put(self, x, place, *, strides=None, gap=0):
        """x, with these byte strides, so that its first or last byte is `gap` from the fence."""
        strides = strides or x.strides
        reach = [(n - 1) * step for n, step in zip(x.shape, strides, strict=True)]
        low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + x.itemsize
        first = gap - low if place == "at_start" else self.size - gap - high
        view = np.ndarray(x.shape, x.dtype, self.inside, first, strides)
        view[...] = x
        return view
