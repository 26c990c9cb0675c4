"""merge_partials(): attention over disjoint sets of keys becomes attention over all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core
from ._checks import _FLOAT32, _FLOAT64, _NAMES, _TYPES, Array, _as_array, _check_layout, _hint_of_bits, _is_known
from ._help import documented

_AT_ONCE = 2**15  # elements: what is summed of them in float64 stays in a near cache


@documented
def merge_partials(outs: Sequence[Any], lses: Sequence[Any], *, layout: str = "bhld") -> tuple[Array, Array]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    Parameters
    ----------
    outs : sequence of array_like, shape (..., H, L, Dv)
        Results of `attention`, one per set of keys. (L, Dv) if the call was 2-D.
    lses : sequence of array_like, shape (..., H, L)
        Their log-sum-exps, from ``return_lse=True``. A row with -inf saw no key: its output is not looked at.
    <layout>
        It is that of `outs`; `lses` are head-first in either.

    Returns
    -------
    out : ndarray
        Of the shape and type of one of `outs`.
    lse : ndarray
        Of the shape and type of one of `lses`.

    Raises
    ------
    TypeError
        Other element types than `attention` takes (for `lses`: gives), or not the same in all.
    ValueError
        No partials, or shapes that do not fit.

    Notes
    -----
    Each output is weighted by its share of the softmax denominator, in float64 (T. Dao et al., "FlashAttention", 2022,
    section 3.1).

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 4, 50, 16))
    >>> halves = [qkv_fast.attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(30), slice(30, 50))]
    >>> out, lse = qkv_fast.merge_partials(*zip(*halves))
    >>> np.allclose(out, qkv_fast.attention(q, k, v))
    True
    """
    heads_first = _check_layout(layout, "merge_partials")
    outs, lses = _list_arrays("outs", outs), _list_arrays("lses", lses)
    if not outs or len(outs) != len(lses):
        given = f"{len(outs)} outs and {len(lses)} lses"
        raise ValueError(f"merge_partials: one lse for each out, and at least one, got {given}")
    for name, arrays, names in (("outs", outs, _NAMES), ("lses", lses, "float32 or float64")):
        numbers = {x.dtype.num for x in arrays}
        known = numbers <= {_FLOAT32, _FLOAT64} if name == "lses" else _is_known(arrays[0].dtype)
        if len(numbers) > 1 or not known:
            given = ", ".join(str(x.dtype) for x in arrays) + _hint_of_bits("each", arrays[0])
            raise TypeError(f"merge_partials: {name} must be of one type, {names}, got {given}")
    shape = outs[0].shape
    rows = shape[:-1] if heads_first or len(shape) < 3 else (*shape[:-3], shape[-2], shape[-3])
    if len(shape) < 2 or any(x.shape != shape for x in outs) or any(x.shape != rows for x in lses):
        given = f"outs: {[x.shape for x in outs]}, lses: {[x.shape for x in lses]}"
        raise ValueError(f"merge_partials: shapes do not fit ({given})")

    _core.check_result("merge_partials", outs[0].dtype.num)
    with np.errstate(all="ignore"):  # NaN and infinity are legal, and -inf is a row that saw nothing
        logs = np.array(lses, np.float64)
        top = logs.max(axis=0)
        shift = np.where(np.isneginf(top), 0, top)
        weights = np.exp(logs - shift)
        total = weights.sum(axis=0)
        lse = shift + np.log(total)
        if not heads_first and len(shape) > 2:
            weights, logs, total = (np.swapaxes(x, -1, -2) for x in (weights, logs, total))
        total[total == 0] = 1
        saw_nothing = np.isneginf(logs)
        blind = bool(saw_nothing.any())
        weights, total = weights[..., np.newaxis], total[..., np.newaxis]
        out = np.empty(shape, _TYPES[outs[0].dtype.num])
        axis = len(shape) - (2 if heads_first or len(shape) == 2 else 3)
        step = max(1, _AT_ONCE * shape[axis] // max(out.size, 1))
        room = np.empty((2, *shape[:axis], min(step, shape[axis]), *shape[axis + 1 :]))
        for first in range(0, shape[axis], step):
            rows = (*(slice(None),) * axis, slice(first, first + step))
            merged, part = room[:, *rows[:axis], : shape[axis] - first]
            merged.fill(0)
            for i, x in enumerate(outs):
                np.multiply(x[rows], weights[i][rows], out=part)
                if blind:
                    part[saw_nothing[i][rows]] = 0
                merged += part
            merged /= total[rows]
            out[rows] = merged
        return out, lse.astype(_TYPES[lses[0].dtype.num])


def _list_arrays(name: str, xs: Any) -> list[Array]:
    if not hasattr(xs, "__iter__"):
        raise TypeError(f"merge_partials: {name} must be a sequence of arrays, got {xs!r}")
    return [_as_array(f"{name}[{i}]", x, "merge_partials") for i, x in enumerate(xs)]
