"""What pictures are made of, checked: a head, tokens, a path; and which cells of a map anybody sees."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import qkv_fast

from .._checks import _as_array

Array = npt.NDArray[Any]


def head(where: str, q: Any, k: Any) -> tuple[Array, Array]:
    """q (Lq, D) and k (Lk, D) of one head; their elements are checked by who computes with them."""
    q, k = _as_array("q", q, where), _as_array("k", k, where)
    if not q.ndim == k.ndim == 2:
        raise ValueError(
            f"{where}: one head is shown, q (Lq, D) and k (Lk, D), such as q[0, h] and k[0, h // (Hq // Hkv)] of "
            f"(batch, heads, length, dim); got q.shape={q.shape}, k.shape={k.shape}"
        )
    if not len(q) or not len(k):
        raise ValueError(f"{where}: a picture of nothing: {len(q)} queries, {len(k)} keys")
    return q, k


def words(where: str, name: str, given: Any, count: int | None = None) -> list[str]:
    """Strings, as many as `count` says."""
    if isinstance(given, str) or not isinstance(given, (Sequence, np.ndarray)):
        raise TypeError(f"{where}: {name} must be a sequence of strings, got {given!r}")
    for i, word in enumerate(given):
        if not isinstance(word, str):
            raise TypeError(f"{where}: {name} must be strings, got {word!r} at {i}")
    if count is not None and len(given) != count:
        raise ValueError(f"{where}: {name} must be {count}, got {len(given)}")
    return [str(word) for word in given]


def axes(where: str, tokens: Any, len_q: int, len_k: int) -> tuple[list[str], list[str]] | None:
    """The tokens of queries and of keys: a list for both, or a pair of lists."""
    if tokens is None:
        return None
    if isinstance(tokens, (tuple, list)) and len(tokens) == 2 and not isinstance(tokens[0], str):
        return words(where, "tokens of queries", tokens[0], len_q), words(where, "tokens of keys", tokens[1], len_k)
    both = words(where, "tokens", tokens)
    if not len(both) == len_q == len_k:
        raise ValueError(
            f"{where}: {len(both)} tokens for {len_q} queries and {len_k} keys; "
            "where queries and keys are different tokens, give (tokens of queries, tokens of keys)"
        )
    return both, both


def target(where: str, path: Any) -> Path:
    """Where a file can be written."""
    try:
        file = Path(path)
    except TypeError:
        raise TypeError(f"{where}: path must be a path, got {path!r}") from None
    if not file.parent.is_dir() or file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{where}: no file can be written at path={str(path)!r}")
    return file


def visible(len_q: int, len_k: int, shape: tuple[int, int], options: dict[str, Any]) -> Array:
    """Of each cell of `pooled`, whether any of its keys is seen by any of its queries, however small its weight is.

    Without scores, every weight that is not hidden is above 0.
    """
    names = ("mask", "causal", "window", "q_offset", "kv_lengths", "segments", "num_threads")
    limits = {name: options[name] for name in names if name in options}
    bias = options.get("bias")
    if bias is not None:
        seen = np.asarray(bias) > -np.inf
        limits["mask"] = seen if limits.get("mask") is None else np.asarray(limits["mask"]) & seen
    q, k = np.zeros((len_q, 1), np.float32), np.zeros((len_k, 1), np.float32)
    found: Array = qkv_fast.spotlight.pooled(q, k, shape, reduce="max", **limits) > 0
    return found
