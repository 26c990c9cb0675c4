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


def as_stored(x, dtype):
    """What a cache of this type gives back for x, in the type of its `keys`."""
    if dtype in QUANTISED:
        return dequantise(quantise(np.asarray(x, np.float32), dtype), x.shape[-1], dtype)
    return x.astype(dtype)
