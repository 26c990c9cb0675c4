"""attention_grad(): the gradients of fused attention, as fused."""

import math
from typing import Any, NamedTuple, Never

import numpy as np

from . import _core, _problem
from ._checks import Array, _as_array
from ._core import Problem
from ._help import documented

_WANTED = ("q", "k", "v", "bias", "sinks", "slopes")


class Gradients(NamedTuple):
    """For `_core.forward`; what each is stands in qkv.h. All sequences have their own, where q, k and v broadcast."""

    delta: Array  # (..., heads, queries)
    dq: Array
    dk: Array
    dv: Array
    dq_parts: Array | None  # (parts, ...), without the first if that is dq
    bias: Array | None  # as many axes as the scores have
    bias_by_part: bool  # its last axis is the parts of the keys, which are not told apart
    slopes: Array | None  # (parts, sequences, heads)


@documented
def attention_grad(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    want: tuple[str, ...] = ("q", "k", "v"),
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    mask: Any = None,
    bias: Any = None,
    causal: bool | str = False,
    window: int | tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    q_positions: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    kv_starts: Any = None,
    segments: tuple[Any, Any] | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    layout: str = "bhld",
    num_threads: int | None = None,
    **words: Never,
) -> tuple[Array, ...]:
    """The gradients of `attention` with respect to its arguments, fused.

    Neither weights nor their gradients are ever stored. The same bits for any number of threads.

    Parameters
    ----------
    <dout>
    <q>
    <k>
    <v>
    <given_out>
    <given_lse>
    <dlse>
    <want>
    <cu_seqlens_q>
        Only of packed sequences, and then as in `attention_varlen`: q is (Tq, Hq, D), lse (Hq, Tq).
    <mask>
    <bias>
    <causal>
    <window>
    <q_offset>
    <q_positions>
    <q_lengths>
    <kv_lengths>
    <kv_starts>
    <segments>
    <alibi_slopes>
    <sinks>
    <softcap>
    <scale>
    <layout>
        It is that of q, k, v, `out`, their gradients and `dout`; the log-sum-exp stays (..., Hq, Lq).
    <num_threads>

    Returns
    -------
    tuple of ndarray
        In the order of `want`, each of its argument's shape (summed over what broadcasts) and type: sums are in
        float32 (float64 for float64), and rounded once. Those of `alibi_slopes` and `sinks` are in float64 where these
        are no floating-point numbers.

    Raises
    ------
    TypeError, ValueError, OverflowError, MemoryError
        As in `attention`; also for a `dout`, `out`, `lse` or `dlse` of another shape or type than the problem's, and
        for a `want` that is not known, repeats a name, or names an argument that is not given.

    See Also
    --------
    attention : What every argument means.
    qkv_fast.reference.attention_grad : The definition in plain NumPy.

    Notes
    -----
    Gradients of hidden keys are 0, whatever these hold, and so are those of queries that see nothing. Where a score is
    capped, the gradient is that of the cap; -inf in a bias is a constant.

    With ``p = exp(s - lse)`` and ``delta = sum(dout * out) - dlse``, the gradient of a score is ``p * (dp - delta)``:
    T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022, appendix B.
    Keys come in up to four parts, and the gradients that these give to queries are added up in the end: they take up to
    four times the memory of `q` in that type, and in a padded batch the gradient of `q` is that of the sequence alone
    to rounding. Where a wanted `bias` is shared by heads or sequences, a part is the work of one thread.

    A log-sum-exp says less where scores are huge. Where every key of a row has a bias like finfo.min, the row averages
    in `attention`, but its gradients do not see that: hide keys by -inf or by `mask`. Scores beyond 1e5 lose digits.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 4, 256, 64), dtype=np.float32)
    >>> out, lse = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    >>> dq, dk, dv = qkv_fast.attention_grad(2 * out, q, k, v, out, lse, causal=True)  # of the sum of out**2
    >>> dq.shape, dk.dtype
    ((1, 4, 256, 64), dtype('float32'))
    """
    where = "attention_grad"
    p = _problem.check_any(
        where, q, k, v, cu_seqlens_q, cu_seqlens_k, mask, bias, causal, window, q_offset, q_positions, q_lengths,
        kv_lengths, kv_starts, segments, alibi_slopes, sinks, softcap, scale, layout, num_threads, words,
    )  # fmt: skip
    given = {"q": p.q, "k": p.k, "v": p.v, "bias": bias, "sinks": sinks, "slopes": alibi_slopes}
    _check_want(where, want, given)
    dout, out = _problem.check_output(p, dout, "dout"), _problem.check_output(p, out, "out")
    lse = _problem.check_lse(p, lse)
    delta = _delta(p, dout, out, None if dlse is None else _problem.check_lse(p, dlse, "dlse"))
    found: dict[str, Array] = {}
    if "sinks" in want:
        found["sinks"] = _of_sinks(p, lse, delta)
    if set(want) - {"sinks"}:
        found |= _fused(p, dout, lse, delta, want)
    return tuple(_like(found[name], given[name]) for name in want)


def _fused(p: Problem, dout: Array, lse: Array, delta: Array, want: tuple[str, ...]) -> dict[str, Array]:
    """By name, what the core finds."""
    g = _gradients(p, delta, want)
    _core.forward(p, dout, lse, _core.QUESTIONS["gradients"], gradients=g)
    found = {"q": g.dq, "k": g.dk, "v": g.dv}
    if g.bias is not None:
        found["bias"] = g.bias
    if g.slopes is not None:
        found["slopes"] = g.slopes
    return found


def _check_want(where: str, want: Any, given: dict[str, Any]) -> None:
    if not isinstance(want, (tuple, list)):
        raise TypeError(f"{where}: want must be a tuple of names, such as ('q', 'k', 'v'), got {want!r}")
    for name in want:
        if name not in _WANTED:
            raise ValueError(f"{where}: want has the names {', '.join(_WANTED)}, got {name!r}")
        if given[name] is None:
            argument = "alibi_slopes" if name == "slopes" else name
            raise ValueError(f"{where}: want has {name!r}, but {argument} is not given")
        _core.check_result(where, _as_array(name, given[name], where).dtype.num)
    if len(set(want)) < len(want):
        raise ValueError(f"{where}: want names each argument once, got {want!r}")


def _delta(p: Problem, dout: Array, out: Array, dlse: Array | None) -> Array:
    """The sum of dout * out over a row, less dlse, (..., heads, queries). Where a row of `out` is 0, so is its sum."""
    kind = _problem.result_type(p)
    a, b = (np.ascontiguousarray(x, kind) for x in (dout, out))  # the order of sums depends on strides
    with np.errstate(all="ignore"):
        delta = np.einsum("...d,...d->...", a, b)
        if not (finite := np.isfinite(delta)).all():
            delta[~finite] = np.where(b[~finite] == 0, 0, a[~finite] * b[~finite]).sum(axis=-1)
        if delta.ndim > 1 and not p.heads_first:
            delta = delta.swapaxes(-1, -2)
        if dlse is not None:
            delta = delta - dlse
    return np.ascontiguousarray(delta)


def _of_sinks(p: Problem, lse: Array, delta: Array) -> Array:
    """(heads,) float64."""
    sinks = p.extras.sinks if lse.ndim == 1 else p.extras.sinks[:, np.newaxis]
    with np.errstate(all="ignore"):
        weight = np.exp(sinks - lse.astype(np.float64))
        lost: Array = np.where((weight == 0) | (lse == -np.inf) | (sinks == -np.inf), 0, weight * delta)
    heads = lost[np.newaxis] if lost.ndim == 1 else lost
    total: Array = heads.sum(axis=tuple(i for i in range(heads.ndim) if i != heads.ndim - 2))
    return -total


def _gradients(p: Problem, delta: Array, want: tuple[str, ...]) -> Gradients:
    """Zeros for the core to add or write to, in an argument's type where it has that shape and the core rounds."""
    kind = _problem.result_type(p)
    batch, extras = p.rows[:-2], p.extras
    ragged = extras is not None and extras.q_starts is not None
    keys = extras.longest_k if ragged else p.k.shape[-2 if p.k.ndim == 2 or p.heads_first else -3]
    parts = _core.gradient_parts(keys)
    sequences = len(extras.q_starts) - 1 if ragged else math.prod(batch)
    bias, by_part = None, False
    if "bias" in want:
        shape = extras.bias.shape
        by_part = shape[-1] == 1
        axes = 4 if ragged else len(p.rows) + 1
        shape = (*(1,) * (axes - len(shape)), *shape[:-1], parts if by_part else shape[-1])
        bias = np.zeros(shape, kind)
    slopes = np.zeros((parts, sequences, p.rows[-2] if len(p.rows) > 1 else 1)) if "slopes" in want else None

    def zeros(x: Array) -> Array:
        shape = (*batch, *x.shape[-3:])
        return np.zeros(shape, x.dtype.newbyteorder("=") if x.shape == shape and kind.itemsize == 4 else kind)

    dq, dk, dv = zeros(p.q), zeros(p.k), zeros(p.v)
    more = parts - (dq.dtype == kind)
    return Gradients(delta, dq, dk, dv, np.zeros((more, *dq.shape), kind) if more else None, bias, by_part, slopes)


def _like(x: Array, given: Any) -> Array:
    """Summed over what broadcasts in `given`, and of its type in native byte order."""
    given = _as_array("given", given)
    shape = (*(1,) * (x.ndim - given.ndim), *given.shape)
    if axes := tuple(i for i, n in enumerate(shape) if n != x.shape[i]):
        with np.errstate(all="ignore"):
            x = x.sum(axis=axes, keepdims=True)
    kind = given.dtype.newbyteorder("=") if given.dtype.kind in "fV" else np.dtype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.reshape(given.shape).astype(kind, copy=False)
