"""A problem as data: shapes, types, what hides keys. Cases name problems, operations work on them; neither knows the
other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HALVES = ("float16", "bfloat16")


def element(name: str) -> np.dtype:
    """A type by its name; that of bfloat16 is in ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """q is (batch, heads, q_len, dim), k (batch, kv_heads, kv_len, dim), v (..., value_dim)."""

    batch: int
    heads: int
    q_len: int
    dim: int
    kv_heads: int
    kv_len: int
    value_dim: int
    dtype: str = "float32"
    kv_dtype: str | None = None  # of k and v, if another
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    kv_lengths: tuple[int, ...] | None = None
    layout: str = "bhld"

    @property
    def kv_type(self) -> str:
        return self.kv_dtype or self.dtype

    def arguments(self) -> dict:
        """Keyword arguments of `attention` and of `reference.attention` (except `layout`)."""
        given = {"causal": self.causal, "window": self.window, "kv_lengths": self.kv_lengths}
        return {name: value for name, value in given.items() if value}

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """First visible key and the one after the last, per (sequence, query)."""
        lengths = np.array(self.kv_lengths or (self.kv_len,) * self.batch, np.int64)[:, None]
        position = np.arange(self.q_len, dtype=np.int64)[None, :] + lengths - self.q_len
        low, high = np.zeros_like(position), np.broadcast_to(lengths, position.shape)
        if self.causal:
            high = np.minimum(high, position + 1)
        left, right = self.window or (None, None)
        if left is not None:
            low = np.maximum(low, position - left)
        if right is not None:
            high = np.minimum(high, position + right + 1)
        return low, high

    def visible_pairs(self) -> int:
        """(query, key) pairs of one head that attention looks at, summed over the batch."""
        low, high = self.limits()
        return int(np.maximum(high - low, 0).sum())
