"""Heat maps: all weights of a head, pooled in cells."""

from collections.abc import Callable
from typing import Any

import numpy as np

import qkv_fast

from . import _given

_NAMED = 60  # tokens of an axis that all have room for their names
_DECADES = 4  # of the colours, below the largest


def heatmap(
    q: Any, k: Any, *, shape: tuple[int, int] = (256, 256), reduce: str = "mean", ax: Any = None, tokens: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    """A heat map of one head: its weights, pooled in cells, over axes in tokens.

    Parameters
    ----------
    q : array_like, shape (Lq, D)
        Queries of one head: of (batch, heads, length, dim), ``q[0, h]``.
    k : array_like, shape (Lk, D)
        Its keys: ``k[0, h // (Hq // Hkv)]``.
    shape : (int, int), default (256, 256)
        Cells, at most, along queries and keys.
    reduce : {"mean", "max"}, default "mean"
        What a cell shows of its weights.
    ax : matplotlib Axes, optional
        Where to draw, a new figure by default.
    tokens : sequence of str, or a pair of them, optional
        What stands at the axes instead of numbers, for both, or (of queries, of keys).
    **options : optional
        `lse` and all that `qkv_fast.attention` takes for a head: `causal`, `window`, `mask`, `scale` and so on.

    Returns
    -------
    matplotlib Axes
        With one image, ``ax.images[0]``, whose norm is logarithmic over 4 decades; what nobody sees stays empty.

    Raises
    ------
    ImportError
        Without matplotlib: ``pip install "qkv-fast[plot]"``.
    TypeError, ValueError, OverflowError, MemoryError
        As in `qkv_fast.spotlight.pooled`; also for q and k of more than one head or without tokens, and tokens that are
        not as many.

    See Also
    --------
    zoom : The map down to single weights.
    qkv_fast.spotlight.pooled : Its numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import plot
    >>> q, k = np.random.default_rng(0).standard_normal((2, 1000, 64), dtype=np.float32)
    >>> ax = plot.heatmap(q, k, causal=True)  # doctest: +SKIP
    >>> ax.figure.savefig("map.png")  # doctest: +SKIP
    """
    where = "plot.heatmap"
    q, k = _given.head(where, q, k)
    shown = _given.axes(where, tokens, len(q), len(k))
    try:
        from matplotlib import colors, pyplot, ticker
    except ImportError as error:
        raise ImportError(f'{where}: {error}; pip install "qkv-fast[plot]"') from error
    cells = qkv_fast.spotlight.pooled(q, k, shape, reduce, **options)
    if not np.isfinite(cells).all():
        raise ValueError(f"{where}: weights are not finite: q, k or bias are not")

    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    largest = float(cells.max()) or 1.0
    image = ax.imshow(
        np.ma.masked_array(cells, ~_given.visible(len(q), len(k), shape, options)),
        norm=colors.LogNorm(largest / 10**_DECADES, largest, clip=True),
        cmap="inferno",
        extent=(-0.5, len(k) - 0.5, len(q) - 0.5, -0.5),  # token i is in the middle of i - 0.5 and i + 0.5
        aspect="equal" if 0.2 < len(q) / len(k) < 5 else "auto",
        interpolation="nearest",
    )
    ax.set_facecolor("0.85")
    ax.set(xlabel="key", ylabel="query")
    label = "weight" if cells.shape == (len(q), len(k)) else f"{reduce} weight of a cell"
    ax.figure.colorbar(image, ax=ax, label=label)
    if shown is not None:
        for axis, words in ((ax.yaxis, shown[0]), (ax.xaxis, shown[1])):
            everyone = ticker.FixedLocator(range(len(words)))
            axis.set_major_locator(everyone if len(words) <= _NAMED else ticker.MaxNLocator("auto", integer=True))
            axis.set_major_formatter(ticker.FuncFormatter(_namer(words)))
        ax.tick_params(axis="x", rotation=90)
    return ax


def _namer(words: list[str]) -> Callable[[float, int | None], str]:
    return lambda x, _: words[round(x)] if 0 <= round(x) < len(words) else ""
