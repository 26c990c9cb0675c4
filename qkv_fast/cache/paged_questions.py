"""The questions of spotlight as methods of a PagedKVCache, which makes a problem of what they are called with."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Never

from .._checks import Array
from .._core import Problem
from .._help import documented
from ..spotlight import _answers


class PagedQuestions:
    """What is asked of the tokens of some sequences."""

    _ask: Callable[..., Problem]

    @documented
    def largest(
        self,
        sequences: Sequence[int],
        q: Any,
        *,
        lengths: Any = None,
        tree: Any = None,
        q_positions: Any = None,
        mask: Any = None,
        bias: Any = None,
        causal: bool | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        num_threads: int | None = None,
        **words: Never,
    ) -> Array:
        """The largest score of each query: ``max(scale * q @ k.T)`` over the tokens that it sees.

        The queries are those of the newest tokens, as in `attend`; see `qkv_fast.spotlight.largest`.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, at least one.
        <newest_q>
            Here the batch is that of `sequences`.
        <asked>

        Returns
        -------
        ndarray, shape (batch, Hq, L)
            float32 (float64 for float64); -inf for a query that sees no token.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As in `attend`.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, pages=9)
        >>> a, tokens = pool.add(), np.array([1, 2, 3], "float32").reshape(1, 1, 3, 1)
        >>> pool.append([a], tokens, tokens)
        >>> pool.largest([a], np.full((1, 2, 2, 1), 2, "float32"))[0, 0]
        array([4., 6.], dtype=float32)
        """
        p = self._ask(
            "PagedKVCache.largest", sequences, q, lengths, tree, q_positions, mask, bias, causal, window, alibi_slopes,
            sinks, softcap, scale, layout, num_threads, words,
        )  # fmt: skip
        return _answers.largest(p)

    @documented
    def entropy(
        self,
        sequences: Sequence[int],
        q: Any,
        *,
        lengths: Any = None,
        tree: Any = None,
        q_positions: Any = None,
        mask: Any = None,
        bias: Any = None,
        causal: bool | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        num_threads: int | None = None,
        **words: Never,
    ) -> Array:
        """The entropy of each query's weights in nats: how many tokens share its attention.

        The queries are those of the newest tokens, as in `attend`; see `qkv_fast.spotlight.entropy`.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, at least one.
        <newest_q>
            Here the batch is that of `sequences`.
        <asked>

        Returns
        -------
        ndarray, shape (batch, Hq, L)
            float32 (float64 for float64); 0 for a query that sees no token.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As in `attend`.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, pages=9)
        >>> a, tokens = pool.add(), np.array([1, 2, 3], "float32").reshape(1, 1, 3, 1)
        >>> pool.append([a], tokens, tokens)
        >>> np.exp(pool.entropy([a], np.zeros((1, 2, 2, 1), "float32")))[0, 0].round(6)  # tokens that share it
        array([2., 3.], dtype=float32)
        """
        p = self._ask(
            "PagedKVCache.entropy", sequences, q, lengths, tree, q_positions, mask, bias, causal, window, alibi_slopes,
            sinks, softcap, scale, layout, num_threads, words,
        )  # fmt: skip
        return _answers.entropy(p)

    @documented
    def top_keys(
        self,
        sequences: Sequence[int],
        q: Any,
        n: int = 5,
        *,
        lengths: Any = None,
        tree: Any = None,
        q_positions: Any = None,
        mask: Any = None,
        bias: Any = None,
        causal: bool | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        num_threads: int | None = None,
        **words: Never,
    ) -> tuple[Array, Array]:
        """The n heaviest tokens of each query, and their weights.

        The queries are those of the newest tokens, as in `attend`; see `qkv_fast.spotlight.top_keys`.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, at least one.
        <newest_q>
            Here the batch is that of `sequences`.
        n : int, default 5
            How many, at least 1.
        <asked>

        Returns
        -------
        keys : ndarray of int64, shape (batch, Hq, L, n)
            Numbers of tokens. By score, the largest first, ties by the smaller number; -1 where fewer are visible.
        weights : ndarray, shape (batch, Hq, L, n)
            Their weights, float32 (float64 for float64); 0 where keys are -1.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As in `attend`; also a ValueError or TypeError for `n`.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, pages=9)
        >>> a, tokens = pool.add(), np.array([1, 2, 3], "float32").reshape(1, 1, 3, 1)
        >>> pool.append([a], tokens, tokens)
        >>> keys, weights = pool.top_keys([a], np.ones((1, 2, 1, 1), "float32"), 2)
        >>> keys[0, 0], weights[0, 0].round(3)
        (array([[2, 1]]), array([[0.665, 0.245]], dtype=float32))
        """
        p = self._ask(
            "PagedKVCache.top_keys", sequences, q, lengths, tree, q_positions, mask, bias, causal, window, alibi_slopes,
            sinks, softcap, scale, layout, num_threads, words,
        )  # fmt: skip
        return _answers.top_keys(p, n)

    @documented
    def received(
        self,
        sequences: Sequence[int],
        q: Any,
        *,
        lse: Any = None,
        queries: Any = None,
        lengths: Any = None,
        tree: Any = None,
        q_positions: Any = None,
        mask: Any = None,
        bias: Any = None,
        causal: bool | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        num_threads: int | None = None,
        **words: Never,
    ) -> Array:
        """The weight that each token receives, summed over queries.

        The queries are those of the newest tokens, as in `attend`; see `qkv_fast.spotlight.received`.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, at least one.
        <newest_q>
            Here the batch is that of `sequences`.
        <lse>
            Here that of `attend`.
        queries : slice or array_like of int, optional
            The queries that count, all by default; negative ones count from the last, repeated ones count again.
        <asked>

        Returns
        -------
        ndarray, shape (batch, Hq, tokens)
            For as many tokens as the longest sequence has, float32 (float64 for float64); 0 for those that nobody
            sees.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As in `attend`; also for an `lse` of another shape or type, and `queries` that are no integers or out of
            range.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, pages=9)
        >>> a, tokens = pool.add(), np.array([1, 2, 3], "float32").reshape(1, 1, 3, 1)
        >>> pool.append([a], tokens, tokens)
        >>> pool.received([a], np.zeros((1, 2, 2, 1), "float32"))[0, 0].round(3)
        array([0.833, 0.833, 0.333], dtype=float32)
        """
        p = self._ask(
            "PagedKVCache.received", sequences, q, lengths, tree, q_positions, mask, bias, causal, window, alibi_slopes,
            sinks, softcap, scale, layout, num_threads, words,
        )  # fmt: skip
        return _answers.received(p, lse, queries)

    @documented
    def weights(
        self,
        sequences: Sequence[int],
        q: Any,
        *,
        queries: Any = None,
        keys: Any = None,
        lse: Any = None,
        lengths: Any = None,
        tree: Any = None,
        q_positions: Any = None,
        mask: Any = None,
        bias: Any = None,
        causal: bool | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        num_threads: int | None = None,
        **words: Never,
    ) -> Array:
        """The weights of chosen queries and tokens: exact rows and columns of the matrix, without the rest of it.

        The queries are those of the newest tokens, as in `attend`; see `qkv_fast.spotlight.weights`.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, at least one.
        <newest_q>
            Here the batch is that of `sequences`.
        queries, keys : slice or array_like of int, optional
            Which, all by default; negative ones count from the last, in any order, repeated ones are repeated. Keys are
            tokens, up to those of the longest sequence.
        <lse>
            Here that of `attend`.
        <asked>

        Returns
        -------
        ndarray, shape (batch, Hq, queries, keys)
            Their softmax over all visible tokens, float32 (float64 for float64); 0 where a token is hidden.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As in `attend`; also for an `lse` of another shape or type, and `queries` or `keys` that are no integers or
            out of range.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, pages=9)
        >>> a, tokens = pool.add(), np.array([1, 2, 3], "float32").reshape(1, 1, 3, 1)
        >>> pool.append([a], tokens, tokens)
        >>> pool.weights([a], np.zeros((1, 2, 2, 1), "float32"), keys=[0, 2])[0, 0].round(3)
        array([[0.5  , 0.   ],
               [0.333, 0.333]], dtype=float32)
        """
        p = self._ask(
            "PagedKVCache.weights", sequences, q, lengths, tree, q_positions, mask, bias, causal, window, alibi_slopes,
            sinks, softcap, scale, layout, num_threads, words,
        )  # fmt: skip
        return _answers.weights(p, queries, keys, lse)

    @documented
    def pooled(
        self,
        sequences: Sequence[int],
        q: Any,
        shape: tuple[int, int] = (256, 256),
        reduce: str = "mean",
        *,
        lse: Any = None,
        lengths: Any = None,
        tree: Any = None,
        q_positions: Any = None,
        mask: Any = None,
        bias: Any = None,
        causal: bool | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        num_threads: int | None = None,
        **words: Never,
    ) -> Array:
        """The whole map of weights in cells: a picture of it at any length.

        The queries are those of the newest tokens, as in `attend`; see `qkv_fast.spotlight.pooled`.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, at least one.
        <newest_q>
            Here the batch is that of `sequences`.
        shape : (int, int), default (256, 256)
            Rows and columns of cells, at least 1 each; no more of them are used than there are queries, and tokens of
            the longest sequence. Row r of R holds the queries from ``r * L // R`` to before ``(r + 1) * L // R``, and
            so with columns and tokens.
        reduce : {"mean", "max"}, default "mean"
            What a cell says of its weights. Those of hidden tokens are 0.
        <lse>
            Here that of `attend`.
        <asked>

        Returns
        -------
        ndarray, shape (batch, Hq, R, C)
            float32 (float64 for float64); 0 for tokens that nobody sees.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As in `attend`; also for a `shape` that is not two integers of at least 1, another `reduce`, and an `lse` of
            another shape or type.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, pages=9)
        >>> a, tokens = pool.add(), np.zeros((1, 1, 4, 1), "float32")
        >>> pool.append([a], tokens, tokens)
        >>> pool.pooled([a], tokens, (2, 2))[0, 0].round(3)
        array([[0.5  , 0.   ],
               [0.292, 0.208]], dtype=float32)
        """
        p = self._ask(
            "PagedKVCache.pooled", sequences, q, lengths, tree, q_positions, mask, bias, causal, window, alibi_slopes,
            sinks, softcap, scale, layout, num_threads, words,
        )  # fmt: skip
        return _answers.pooled(p, shape, reduce, lse)

    @documented
    def influence(
        self,
        sequences: Sequence[int],
        q: Any,
        *,
        groups: Any = None,
        lengths: Any = None,
        tree: Any = None,
        q_positions: Any = None,
        mask: Any = None,
        bias: Any = None,
        causal: bool | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        num_threads: int | None = None,
        **words: Never,
    ) -> Array:
        """How far the output of `attend` would move if a token, or a group of tokens, were hidden: for all at once.

        The queries are those of the newest tokens, as in `attend`; see `qkv_fast.spotlight.influence`.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, at least one.
        <newest_q>
            Here the batch is that of `sequences`.
        groups : array_like of int, shape (tokens,), optional
            The group of each token, for as many as the longest sequence has, 0 to G - 1, or -1 for none; the same for
            all sequences.
        <asked>

        Returns
        -------
        ndarray, shape (batch, Hq, tokens)
            In units of the values, float32 (float64 for float64); 0 for tokens that nobody sees.
            With `groups` (batch, Hq, G).

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As in `attend`; also for `groups` that are no integers, below -1 or of another shape.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, pages=9)
        >>> a, tokens = pool.add(), np.array([0, 3, 9], "float32").reshape(1, 1, 3, 1)
        >>> pool.append([a], np.zeros_like(tokens), tokens)
        >>> pool.influence([a], np.zeros((1, 1, 1, 1), "float32"))[0, 0].round(3)  # of the mean 4 without one of them
        array([2. , 0.5, 2.5], dtype=float32)
        """
        p = self._ask(
            "PagedKVCache.influence", sequences, q, lengths, tree, q_positions, mask, bias, causal, window,
            alibi_slopes, sinks, softcap, scale, layout, num_threads, words, values=True,
        )  # fmt: skip
        return _answers.influence(p, groups)


# What Python says of their arguments names the class that people know.
for _method in vars(PagedQuestions).values():
    if isinstance(_method, FunctionType):
        _method.__qualname__ = f"PagedKVCache.{_method.__name__}"
