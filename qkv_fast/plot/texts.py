"""A text, lit by weights: what one word looks at, or what each sentence received."""

import base64
import json
import operator
import re
import secrets
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from .._checks import _as_array
from . import _given
from ._given import Array

_LIMIT = 30_000_000  # bytes of a page
_COLUMNS = 20  # of the longest bar of plain text
_WHOLE = 1.001  # a weight of 1, rounded
_SHOWN, _NAMED = 8, 3  # the heaviest words of a spotlight: as plain text, and beside the text
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>[[TITLE]]</title>
<style>
:root { color-scheme: light dark }
body { margin: 2em auto; max-width: 48em; padding: 0 1em }
</style>
"""


class LitText:
    """A text whose parts are lit by weights: HTML in Jupyter, bars in a terminal; made by `spotlight` and `strip`.

    Attributes
    ----------
    pieces : list of str
        Words or sentences.
    weights : ndarray, shape (L,) or (L, L)
        The weight of each, or of each for every query.
    query : int or None
        Whose spotlight it is.

    Examples
    --------
    >>> from qkv_fast import plot
    >>> picture = plot.spotlight(["the", "cat", "sat"], [0.2, 0.7, 0.1], query="sat")
    >>> picture.save("cat.html")  # doctest: +SKIP
    """

    def __init__(self, pieces: list[str], weights: Array, query: int | None, sentences: bool) -> None:
        self.pieces, self.weights, self.query, self._sentences = pieces, weights, query, sentences

    def __str__(self) -> str:
        row = self._row()
        shares = row / self._whole()
        if self._sentences:
            order, longest = np.arange(row.size), shares.max(initial=0)
        else:
            order, longest = np.argsort(-row, kind="stable")[:_SHOWN], 1.0
        lines = [] if self.query is None else [f"{self.pieces[self.query]!r} looks at"]
        for i in order:
            bar = "█" * round(_COLUMNS * min(shares[i] / longest, 1.0)) if longest else ""
            text = " ".join(self.pieces[i].split()) or repr(self.pieces[i])
            text = text if len(text) <= 76 else text[:75] + "…"
            lines.append(f"{_percent(shares[i]):>7}  {bar:<{_COLUMNS}}  {text}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What Jupyter shows: elements with a name of their own, since a notebook may have several."""
        row, whole, joints = self._row(), self._whole(), _joints(self.pieces, not self._sentences)
        lit = row / row.max() if self._sentences and row.any() else np.sqrt(np.minimum(row, 1))
        spans = []
        for i, (text, joined) in enumerate(joints):
            # What each span says is also what a reader without scripts gets from it.
            says = f"“{text}”: {row[i]:.4g} ({_percent(row[i] / whole)})"
            kind = " ".join(["bright"] * bool(lit[i] > 0.6) + ["query"] * (i == self.query))
            spans.append(
                f'{"" if joined or not i else " "}<span class="{kind}" style="--lit:{lit[i]:.3f}" '
                f'tabindex="{0 if i == (self.query or 0) else -1}" title="{escape(says)}">{escape(text)}</span>'
            )
        says = self._title()
        if not self._sentences:
            heaviest = np.argsort(-row, kind="stable")[:_NAMED]
            says += ": " + ", ".join(f"{joints[i][0]} {_percent(row[i])}" for i in heaviest)
        weights = base64.b64encode(self.weights.astype("<f4").tobytes()).decode() if self.weights.ndim == 2 else None
        parts = {
            "ID": f"lit-{secrets.token_hex(6)}", "SAYS": escape(says), "SPANS": "".join(spans),
            "WEIGHTS": json.dumps(weights), "NAMED": str(_NAMED),
        }  # fmt: skip
        template = resources.files(__package__).joinpath("text.html").read_text(encoding="utf-8")
        return re.sub(r"\[\[(\w+)\]\]", lambda found: parts[found[1]], template)

    def save(self, path: Any) -> None:
        """Write one HTML file that needs no other.

        Parameters
        ----------
        path : path-like
            Where; what is there is replaced.

        Raises
        ------
        TypeError, ValueError
            What is no path, or where no file can be written.

        Examples
        --------
        >>> from qkv_fast import plot
        >>> plot.strip(["One.", "Two."], [3.0, 1.0]).save("strip.html")  # doctest: +SKIP
        """
        path = _given.target("plot.LitText.save", path)
        head = _HEAD.replace("[[TITLE]]", escape(self._title()))
        path.write_text(head + self._repr_html_(), encoding="utf-8", newline="\n")

    def _row(self) -> Array:
        row: Array = self.weights if self.weights.ndim == 1 else self.weights[self.query]
        return row

    def _whole(self) -> float:
        """What weights are shares of: what all sentences received, or 1."""
        return float(self._row().sum()) or 1.0 if self._sentences else 1.0

    def _title(self) -> str:
        if self._sentences:
            return "What each sentence received"
        return "Where attention falls" if self.query is None else f"What “{self.pieces[self.query]}” looks at"


def spotlight(tokens: Any, weights: Any, query: Any = None) -> LitText:
    """The spotlight of one word: the words of a text, as bright as their weights for it.

    Parameters
    ----------
    tokens : sequence of str, length L
        The words. Marks of word pieces ("##ing", "Ġthe", "▁the") become spaces, or none.
    weights : array_like, shape (L,) or (L, L)
        What one query takes from each word, or every query, as `qkv_fast.spotlight.weights` says: then a click, or
        Enter, on a word makes it the query.
    query : int or str, optional
        Which word's spotlight it is (at first): its index, negative ones count from the last, or a word that occurs
        once. By default the last of a matrix; none is marked of (L,).

    Returns
    -------
    LitText
        Shows itself in Jupyter; ``save(path)`` writes one HTML file that needs no other; ``print`` lists the heaviest.

    Raises
    ------
    TypeError, ValueError
        No tokens or not strings; weights of another shape, masked, negative, above 1 or not finite; a query that is not
        there or occurs more than once; a matrix too large for a page of 30 MB.

    See Also
    --------
    qkv_fast.spotlight.weights : The weights.
    zoom : For texts of thousands of words.

    Notes
    -----
    A weight p has the opacity sqrt(p), the same for every query, so a word that looks everywhere lights little.

    Examples
    --------
    >>> from qkv_fast import plot
    >>> print(plot.spotlight(["the", "cat", "sat"], [0.2, 0.7, 0.1], query="sat"))
    'sat' looks at
       70 %  ██████████████        cat
       20 %  ████                  the
       10 %  ██                    sat
    """
    where = "plot.spotlight"
    pieces = _given.words(where, "tokens", tokens)
    weights = _checked(where, "weights", weights, pieces, (1, 2))
    if weights.max() > _WHOLE:
        raise ValueError(f"{where}: weights must be at most 1, got {weights.max()}; plot.strip shows other numbers")
    if weights.size * 16 / 3 > _LIMIT:
        raise ValueError(f"{where}: weights of {weights.shape} make a page of more than 30 MB; plot.zoom shows so many")
    if query is None:
        return LitText(pieces, weights, len(pieces) - 1 if weights.ndim == 2 else None, False)
    if isinstance(query, str):
        places = [i for i, piece in enumerate(pieces) if piece == query]
        if len(places) != 1:
            found = f"is at {places}: give one of these" if places else "is not one of the tokens"
            raise ValueError(f"{where}: query {query!r} {found}")
        return LitText(pieces, weights, places[0], False)
    try:
        at = operator.index(query)
    except TypeError:
        at = None
    if at is None or isinstance(query, (bool, np.bool_)):
        raise TypeError(f"{where}: query must be an index or a word, got {query!r}")
    if not -len(pieces) <= at < len(pieces):
        raise ValueError(f"{where}: query must be in {-len(pieces)}..{len(pieces) - 1}, got {at}")
    return LitText(pieces, weights, at % len(pieces), False)


def strip(sentences: Any, received: Any) -> LitText:
    """What each sentence of a text received: the sentences one after another, the brightest received most.

    Parameters
    ----------
    sentences : sequence of str, length n
        The text in parts.
    received : array_like, shape (n,)
        What each received, such as sums of `qkv_fast.spotlight.received` over its words.

    Returns
    -------
    LitText
        Shows itself in Jupyter; ``save(path)`` writes one HTML file that needs no other; ``print`` shows bars.

    Raises
    ------
    TypeError, ValueError
        No sentences or not strings; numbers of another shape, negative or not finite.

    See Also
    --------
    qkv_fast.spotlight.received : What each key receives.
    qkv_fast.spotlight.influence : How far the result would move without each sentence.

    Notes
    -----
    Opacity is proportional to what was received, the largest being opaque.

    Examples
    --------
    >>> from qkv_fast import plot
    >>> print(plot.strip(["It rained.", "We stayed in.", "Cats slept."], [1.0, 2.0, 1.0]))
       25 %  ██████████            It rained.
       50 %  ████████████████████  We stayed in.
       25 %  ██████████            Cats slept.
    """
    pieces = _given.words("plot.strip", "sentences", sentences)
    return LitText(pieces, _checked("plot.strip", "received", received, pieces, (1,)), None, True)


def _checked(where: str, name: str, given: Any, pieces: list[str], axes: tuple[int, ...]) -> Array:
    if not pieces:
        raise ValueError(f"{where}: a picture of nothing: no tokens and no sentences were given")
    array = _as_array(name, given, where)
    if array.dtype.kind not in "fiu" and not _is_bfloat16(array):
        raise TypeError(f"{where}: {name} must be numbers, got {array.dtype}")
    array = array.astype(np.float64)
    if array.ndim not in axes or any(size != len(pieces) for size in array.shape):
        shapes = " or ".join(str((len(pieces),) * n) for n in axes)
        raise ValueError(f"{where}: {name} must be of shape {shapes}, one for each text, got {array.shape}")
    if np.any(wrong := ~(np.isfinite(array) & (array >= 0))):
        raise ValueError(f"{where}: {name} must be finite and not negative, got {array[wrong][0]}")
    return array


def _is_bfloat16(array: Array) -> bool:
    return array.dtype.name == "bfloat16"


def _joints(pieces: list[str], words: bool) -> list[tuple[str, bool]]:
    """The texts of word pieces, and whether each is joined to the one before; sentences, not `words`, have no marks."""
    # Then a piece without this mark is joined.
    spaced = words and any(piece.startswith(("Ġ", "▁")) for piece in pieces)
    shown = []
    for piece in pieces:
        joined = words and piece.startswith("##") and len(piece) > 2
        text = piece[2:] if joined else piece
        if spaced:
            joined = not piece.startswith(("Ġ", "▁"))
            text = piece.lstrip("Ġ▁")
        text = text.replace("\n", "⏎").replace("Ċ", "⏎")
        shown.append((text if text.strip() else "␣", joined))
    return shown


def _percent(share: float) -> str:
    """Two digits."""
    return f"{float(f'{100 * share:.2g}'):g} %" if share >= 5e-5 or share == 0 else "<0.01 %"
