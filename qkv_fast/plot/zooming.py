"""One HTML page with the map of a head: coarse levels are stored in it, single weights are computed there.

A page holds q (Lq, D) and k (Lk, D), a row at a time divided by a power of two, in float16, the log-sum-exp of each
query, and the whole map in at most 2048² cells of 8 bits. A finer cell is computed when it is looked at, from
exp(scale·q·k − lse) and the positions of the call; zoom.html says how. The largest weight of a cell is its colour, at
every level, so that a single bright key is seen from afar.
"""

import base64
import json
import math
import zlib
from html import escape
from importlib import resources
from typing import Any, NamedTuple, Never

import numpy as np

import qkv_fast

from .._checks import _fail_words
from .._help import documented
from . import _given
from ._given import Array

_LIMIT = 30_000_000  # bytes of a page
_DENSE = 4096**2  # elements of a mask or a bias
_CELLS = 2048  # of the stored level, along each axis
_STEPS = 8  # codes of an octave; 255 stands for the weight 1, 0 for hidden
_ERROR = 1.9e-3  # of a read weight: 2e-3 is promised against what `weights` gives, which is within 4ε of these
_HEAVIEST = 8  # keys of a query whose weights are compared


class _Rows(NamedTuple):
    """Vectors as they are stored: `values * factors`. Vectors that are not finite are 0, with a factor of NaN."""

    values: Array  # (L, D), float16 or float32
    factors: Array  # (L,), powers of two
    lengths: Array  # (L,), of the vectors that were given
    errors: Array  # (L,), of what is stored: |given − stored|

    @property
    def stored(self) -> Array:
        return self.values * self.factors[:, None]


class _Call(NamedTuple):
    """What changes scores: q·k·scale, capped, less slope·|i + offset − j|, plus bias[i, j]."""

    scale: float
    softcap: float | None
    slope: float
    offset: int
    bias: Array | None  # (1 or Lq, 1 or Lk)


@documented
def zoom(
    q: Any,
    k: Any,
    path: Any,
    *,
    tokens: Any = None,
    title: str = "Where attention falls",
    mask: Any = None,
    bias: Any = None,
    causal: bool | str = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    kv_lengths: Any = None,
    segments: tuple[Any, Any] | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    num_threads: int | None = None,
    **words: Never,
) -> None:
    """Write one HTML page in which the map of a head is zoomed, from the whole down to single weights.

    The wheel or two fingers zoom, dragging pans, the pointer reads a weight. The page needs no other file.

    Parameters
    ----------
    q : array_like, shape (Lq, D)
        Queries of one head: of (batch, heads, length, dim), ``q[0, h]``.
    k : array_like, shape (Lk, D)
        Its keys: ``k[0, h // (Hq // Hkv)]``.
    path : path-like
        Where to write; what is there is replaced.
    tokens : sequence of str, or a pair of them, optional
        What stands at the axes, for both, or (of queries, of keys).
    title : str, optional
        Of the page.
    <mask>
        Here of at most 4096² elements.
    <bias>
        Here of at most 4096² elements; numbers that hardly repeat fill a page at 3000².
    <causal>
    <window>
    <q_offset>
    <kv_lengths>
    <segments>
    <alibi_slopes>
    <sinks>
    <softcap>
    <scale>
    <num_threads>

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.attention`; also for q and k of more than one head or without tokens, tokens that are not as
        many, weights that are not finite, a mask or bias that is too large, a page of more than 30 MB, and a path
        where no file can be written.

    See Also
    --------
    heatmap : The whole map, as a figure.
    qkv_fast.spotlight.weights : The same weights in Python.

    Notes
    -----
    A weight that the page reads is within 2e-3 of what `qkv_fast.spotlight.weights` gives. So q and k are stored in
    float16 where that holds, and in float32 where it takes more digits: the heaviest keys of each query are compared,
    and the others cannot be heavier than these. Where even float32 does not do (scores of thousands with close
    rivals), it is a ValueError. 32768 tokens of 64 elements make about 14 MB, or 26 MB.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import plot
    >>> q, k = np.random.default_rng(0).standard_normal((2, 32768, 64), dtype=np.float32)
    >>> plot.zoom(q, k, "map.html", causal=True)  # doctest: +SKIP
    """
    where = "plot.zoom"
    if words:
        _fail_words(where, words)
    if not isinstance(title, str):
        raise TypeError(f"{where}: title must be a string, got {title!r}")
    q, k = _given.head(where, q, k)
    shown = _given.axes(where, tokens, len(q), len(k))
    path = _given.target(where, path)
    mask, bias = (None if x is None else np.atleast_2d(x) for x in (mask, bias))
    for name, x in (("mask", mask), ("bias", bias)):
        if x is not None and x.size > _DENSE:
            raise ValueError(f"{where}: {name} has {x.size} elements, more than 4096² (positions and segments may do)")
    if 8 / 3 * (q.size + k.size) > _LIMIT:
        raise ValueError(f"{where}: q and k alone make more than 30 MB: q.shape={q.shape}, k.shape={k.shape}")

    options = {
        "mask": mask, "bias": bias, "causal": causal, "window": window, "q_offset": q_offset, "kv_lengths": kv_lengths,
        "segments": segments, "alibi_slopes": alibi_slopes, "sinks": sinks, "softcap": softcap, "scale": scale,
        "num_threads": num_threads,
    }  # fmt: skip
    _, lse = qkv_fast.attention(q, k, k[:, :0], return_lse=True, **options)
    if np.any(wrong := np.isnan(lse) | (lse == np.inf)):
        raise ValueError(f"{where}: the weights of query {np.flatnonzero(wrong)[0]} are not finite: q or k are not")

    seen = len(k) if kv_lengths is None else int(np.asarray(kv_lengths).item())
    offset = 0 if causal == "top-left" else seen - len(q) if q_offset is None else int(np.asarray(q_offset).item())
    left, right = window if isinstance(window, (tuple, list)) else (window, window)
    slope = 0.0 if alibi_slopes is None else float(np.asarray(alibi_slopes).item())
    scale = (q.shape[1] ** -0.5 if q.shape[1] else 1.0) if scale is None else float(scale)
    call = _Call(scale, softcap, slope, offset, bias)
    heaviest = qkv_fast.spotlight.top_keys(q, k, _HEAVIEST, **options)
    kind, rows_q, rows_k, stored_bias = _stored(where, q, k, seen, lse, call, heaviest)

    arrays = {
        "q": rows_q.values, "k": rows_k.values, "qFactors": rows_q.factors, "kFactors": rows_k.factors,
        "lse": lse.astype(np.float32), "cells": _codes(q, k, lse, options),
    }  # fmt: skip
    if segments is not None:
        ids = [np.asarray(x).ravel() for x in segments]
        both = np.unique(np.concatenate(ids), return_inverse=True)[1].astype(np.int32)
        arrays["qSegments"], arrays["kSegments"] = both[: len(q)], both[len(q) :]
    if mask is not None:
        arrays["mask"] = np.packbits(mask, bitorder="little")
    if stored_bias is not None:
        arrays["bias"] = stored_bias
    about = {
        "queries": len(q), "keys": len(k), "dim": q.shape[1], "seen": seen, "offset": offset,
        "left": left, "right": 0 if causal else right, "scale": scale, "softcap": softcap, "slope": slope,
        "cells": arrays["cells"].shape, "steps": _STEPS, "floats": np.dtype(kind).itemsize,
        "mask": None if mask is None else mask.shape, "bias": None if bias is None else bias.shape,
        "tokens": shown and {"queries": shown[0], "keys": None if shown[1] is shown[0] else shown[1]},  # None: the same
    }  # fmt: skip
    page = _page(title, about, arrays)
    if len(page) > _LIMIT:
        raise ValueError(
            f"{where}: the page would have {len(page) / 1e6:.1f} MB, more than 30: q.shape={q.shape} and "
            f"k.shape={k.shape} in {np.dtype(kind)}, as 2e-3 takes here" + (", and a bias" if bias is not None else "")
        )
    path.write_bytes(page)


def _stored(
    where: str, q: Array, k: Array, seen: int, lse: Array, call: _Call, heaviest: tuple[Array, Array]
) -> tuple[type, _Rows, _Rows, Array | None]:
    """The narrowest type in which the page's weights are right: it, q, k and the bias."""
    for kind in (np.float16, np.float32):
        rows_q, rows_k = _rows(q, len(q), kind), _rows(k, seen, kind)
        with np.errstate(over="ignore"):  # then it is no bias for this type
            bias = None if call.bias is None else call.bias.astype(kind)
        error = _error(rows_q, rows_k, bias, lse, call, heaviest)
        if error <= _ERROR:
            return kind, rows_q, rows_k, bias
    raise ValueError(
        f"{where}: scores are too large for a page: a weight could be wrong by {error:.2g}, more than 2e-3; the "
        f"largest log-sum-exp is {np.max(lse, where=np.isfinite(lse), initial=-np.inf):.4g}"
    )


def _rows(x: Array, count: int, kind: type) -> _Rows:
    """The first `count` rows; those after them, which nobody sees, are not stored."""
    x = x.astype(np.float64)
    finite = np.isfinite(x).all(-1) & (np.arange(len(x)) < count)
    x[~finite] = 0
    _, exponents = np.frexp(np.abs(x).max(-1, initial=0))
    factors = np.ldexp(1.0, exponents - 1)  # the largest element becomes 1 to 2
    values = (x / factors[:, None]).astype(kind)
    lengths, errors = (np.linalg.norm(rows, axis=-1) for rows in (x, values * factors[:, None] - x))
    return _Rows(values, np.where(finite, factors, np.nan), lengths, errors)


def _error(q: _Rows, k: _Rows, bias: Array | None, lse: Array, call: _Call, heaviest: tuple[Array, Array]) -> float:
    """How far a weight of the page may be from the exact one.

    That of the heaviest keys is computed as the page does it. A score of the others differs by at most `shift`, and
    their weights, p, by p·(exp(shift) − 1); p is at most that of the last of the heaviest.
    """
    keys, weights = heaviest
    lse = np.where(np.isfinite(lse), lse, 0).astype(np.float32).astype(np.float64)
    worst = 0.0
    for rows in np.array_split(np.arange(len(lse)), -(-len(lse) // 1024)):
        at, exact = keys[rows], weights[rows].astype(np.float64)
        s = np.einsum("id,ind->in", q.stored[rows], k.stored[at]) * call.scale
        s = s if call.softcap is None else call.softcap * np.tanh(s / call.softcap)
        s -= call.slope * np.abs(rows[:, None] + call.offset - at)
        if bias is not None:
            i, j = np.minimum(rows[:, None], bias.shape[0] - 1), np.minimum(at, bias.shape[1] - 1)
            s += bias[i, j]
        p = np.exp(np.minimum(s - lse[rows, None], 1))  # NaN of what is not finite, whose weight is 0
        worst = max(worst, np.abs(np.nan_to_num(p) - exact).max(where=at >= 0, initial=0))

    longest, error = k.lengths.max(), k.errors.max()
    shift = abs(call.scale) * (q.errors * (longest + error) + q.lengths * error)
    # The core's own sums are of float32, and so is the log-sum-exp.
    shift += 2.0**-22 * (abs(call.scale) * q.lengths * longest + np.abs(lse))
    if bias is not None and call.bias is not None:
        finite = np.isfinite(call.bias)
        if not np.array_equal(finite, np.isfinite(bias)):
            return math.inf
        shift += np.abs(bias[finite].astype(np.float64) - call.bias[finite]).max(initial=0)
    rest: float = (weights[:, -1] * np.expm1(np.minimum(shift, 50))).max()
    return max(worst, rest)


def _codes(q: Array, k: Array, lse: Array, options: dict[str, Any]) -> Array:
    """The largest weight of each cell, in steps of a logarithm: 1 is 255, 0 is hidden."""
    shape = (_CELLS, _CELLS)
    largest = qkv_fast.spotlight.pooled(q, k, shape, reduce="max", lse=lse, **options)
    with np.errstate(divide="ignore"):
        codes = np.clip(np.rint(255 + _STEPS * np.log2(largest)), 1, 255)
    return np.where(_given.visible(len(q), len(k), shape, options), codes, 0).astype(np.uint8)


def _page(title: str, about: dict[str, Any], arrays: dict[str, Array]) -> bytes:
    """The template with its data: numbers and tokens as JSON, arrays little-endian, deflated, in base64."""
    template = resources.files(__package__).joinpath("zoom.html").read_text(encoding="utf-8")
    head, foot = template.split("[[DATA]]")
    head = head.replace("[[TITLE]]", escape(title))
    about_text = json.dumps(about).replace("<", "\\u003c")  # no </script> in it
    parts = [head, f'<script type="application/json" id="about">{about_text}</script>\n']
    for name, x in arrays.items():
        raw = np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes()
        text = base64.b64encode(zlib.compress(raw, 6)).decode()
        parts.append(f'<script type="text/plain" id="{name}">{text}</script>\n')
    return "".join([*parts, foot]).encode()
