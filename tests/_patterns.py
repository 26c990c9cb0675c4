"""Every way an array can lie in memory: PATTERNS[name](x) equals x."""

import numpy as np


def _room(x, factor):
    """An array that is `factor` times as long on each axis, filled with NaN: what a view must step over."""
    return np.full([n * factor for n in x.shape], np.nan, x.dtype)


def _placed(x, index, factor=1):
    view = _room(x, factor)[index]
    view[...] = x
    return view


def _permuted(x, order):
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def _unaligned(x, by):
    view = np.zeros(x.nbytes + 16, np.uint8)[by : by + x.nbytes].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert by % x.itemsize == 0 or not view.flags.aligned
    return view


def _odd_steps(x):
    """A byte between any two elements, so that strides are no multiple of the item size."""
    fields = np.zeros(x.shape, dtype=[("pad", "u1"), ("x", x.dtype)])
    fields["x"] = x
    return fields["x"]


def fits(name, dtype):
    """Whether an array of this type can lie so: ml_dtypes' bfloat16 has no other byte order."""
    return "swapped" not in name or dtype != "bfloat16"


def readonly(x):
    x = x.copy()
    x.flags.writeable = False
    return x


# Shapes are (B, H, L, D). Each entry makes an array equal to x that lies in memory in its own way.
PATTERNS = {
    "reversed rows": lambda x: _placed(x, np.s_[:, :, ::-1]),
    "reversed dimension": lambda x: _placed(x, np.s_[..., ::-1]),
    "reversed heads": lambda x: _placed(x, np.s_[:, ::-1]),
    "reversed batch": lambda x: _placed(x, np.s_[::-1]),
    "all reversed": lambda x: _placed(x, np.s_[::-1, ::-1, ::-1, ::-1]),
    "every second row": lambda x: _placed(x, np.s_[: x.shape[0], : x.shape[1], ::2, : x.shape[3]], 2),
    "every second element": lambda x: _placed(x, np.s_[: x.shape[0], : x.shape[1], : x.shape[2], ::2], 2),
    "every third, backwards": lambda x: _placed(x, np.s_[::-3, ::3, ::-3, ::-3], 3),
    "rows and dimension exchanged": lambda x: _permuted(x, (0, 1, 3, 2)),
    "heads and rows exchanged": lambda x: _permuted(x, (0, 2, 1, 3)),
    "Fortran order": lambda x: np.asfortranarray(x),
    "batch innermost": lambda x: _permuted(x, (1, 2, 3, 0)),
    "unaligned by 1": lambda x: _unaligned(x, 1),
    "unaligned by 4": lambda x: _unaligned(x, 4),
    "unaligned by 2": lambda x: _unaligned(x, 2),
    "odd steps": _odd_steps,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder("S")),
    "byte-swapped, unaligned, reversed": lambda x: _unaligned(x[..., ::-1, :].astype(x.dtype.newbyteorder("S")), 3)[
        ..., ::-1, :
    ],
    "read-only": readonly,
    "padded rows of 1 KiB": lambda x: _placed(np.pad(x, [(0, 0)] * 3 + [(0, 256 - x.shape[3])]), np.s_[...])[
        ..., : x.shape[3]
    ],
}
