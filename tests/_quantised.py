"""The rows of quantised caches in plain NumPy: what src/cache.c makes of numbers, bit for bit, and what rows mean.

Everything is float32 arithmetic: a division and a rounding to nearest even per element, one product back.
"""

import numpy as np

QUANTISED = ("int8", "int4")


def quantise(x, stored):
    """x (..., dim) float32 -> rows (..., bytes) uint8."""
    assert x.dtype == np.float32
    with np.errstate(all="ignore"):
        return (_int8 if stored == "int8" else _int4)(x)


def _padded(x, multiple):
    return np.concatenate([x, np.zeros((*x.shape[:-1], -x.shape[-1] % multiple), x.dtype)], axis=-1)


def _steps(x, scale, low, high):
    """x / scale, rounded and limited; 0 where the scale is 0 or NaN."""
    n = np.rint(x / np.where(scale == 0, np.float32(1), scale))
    return np.where(scale == scale, np.clip(n, low, high), 0).astype(np.int8)


def _int8(x):
    most = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.where(np.isfinite(most), most / np.float32(127), np.float32(np.nan))
    scale = np.minimum(scale, np.float32(float.fromhex("0x1.020406p121")))  # the largest that 127 times is finite
    n = _padded(_steps(x, scale, -127, 127), 4)
    return np.concatenate([n.view(np.uint8), scale.view(np.uint8)], axis=-1)


def _int4(x):
    x = _padded(x, 32)
    front, groups = x.shape[:-1], x.shape[-1] // 32
    x = x.reshape(*front, groups, 32)
    most = np.abs(x).max(axis=-1, keepdims=True)
    largest = np.where((x == most).any(axis=-1, keepdims=True), most, -most)  # of two, the positive one
    scale = largest / np.float32(-8)
    away = (scale.view(np.uint32) + np.uint32(0xFFFF)) >> 16  # the bits of bfloat16, rounded away from zero
    away -= (away & 0x7FFF) == 0x7E00  # 8 times that is infinite
    half = np.where(np.isfinite(most), np.where(scale == 0, 0, away), 0x7FC0).astype(np.uint16)
    n = _steps(x, (half.astype(np.uint32) << 16).view(np.float32), -8, 7) + 8
    halves = (n[..., :16] | n[..., 16:] << 4).astype(np.uint8)
    scales = half[..., 0].copy().view(np.uint8)
    return np.concatenate([halves.reshape(*front, groups * 16), scales], axis=-1)


def dequantise(rows, dim, stored, dtype=np.float32):
    """rows (..., bytes) -> (..., dim). Products of int8 are rounded in float32; all others are exact."""
    if stored == "int8":
        scale, n = rows[..., -4:].copy().view(np.float32), rows[..., :dim].view(np.int8)
        return scale.astype(dtype) * n.astype(dtype)
    groups = -(-dim // 32)
    halves, scales = rows[..., : 16 * groups], rows[..., 16 * groups :].copy().view(np.uint16)
    halves = halves.reshape(*rows.shape[:-1], groups, 16)
    n = np.concatenate([halves & 15, halves >> 4], axis=-1).astype(dtype) - 8
    scale = (scales.astype(np.uint32) << 16).view(np.float32).astype(dtype)
    return (n * scale[..., None]).reshape(*rows.shape[:-1], groups * 32)[..., :dim]


def as_stored(x, dtype, turn=None):
    """What a cache of this type gives back for x, in the type of its `keys`; rotated if `turn` is given."""
    if dtype not in QUANTISED:
        return x.astype(dtype)
    x = np.asarray(x, np.float32)
    if turn is None:
        return dequantise(quantise(x, dtype), x.shape[-1], dtype)
    return rotate(dequantise(quantise(rotate(x, turn), dtype), x.shape[-1], dtype), turn, back=True)


def rotate(x, turn, back=False):
    """x (..., dim) rotated as caches do it, bit for bit, in blocks that begin at 0 and at `turn`."""
    x = x.copy()
    for first, last in ((0, turn), (turn, x.shape[-1])):
        while first < last:
            n = 1 << (last - first).bit_length() - 1
            block = x[..., first : first + n]
            factors = (_signs(n) / np.sqrt(n)).astype(x.dtype)
            if not back:
                block *= factors
            for h in (1 << i for i in range(n.bit_length() - 1)):
                pairs = block.reshape(*x.shape[:-1], n // (2 * h), 2, h)
                a, b = pairs[..., 0, :], pairs[..., 1, :]
                block[...] = np.stack([a + b, a - b], -2).reshape(block.shape)
            if back:
                block *= factors
            first += n
    return x


def _signs(n):
    mixed = np.arange(n, dtype=np.uint32) * np.uint32(0x9E3779B1)
    mixed = (mixed ^ mixed >> np.uint32(15)) * np.uint32(0x85EBCA77)
    return np.where(mixed >> np.uint32(31), -1.0, 1.0)
