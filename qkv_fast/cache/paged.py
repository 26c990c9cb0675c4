"""PagedKVCache: sequences that come and go share one pool of pages; those with a common beginning share its pages.

Page p is the rows p * page_size to (p + 1) * page_size of k (kv_heads, rows, dim) and v. pages.py says which ones a
sequence has; attention reads pages that follow one another in the pool as one run. Who appends to a page that others
have as well copies it first.
"""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Never, Self

import numpy as np

from .._checks import Array, _index, _is_known
from .._core import Problem
from .._help import documented
from . import files, types
from .attend import Held, Keys, Tokens, ask_newest, attend_newest, check_chosen, check_index, check_starts, check_tokens
from .bounds import Bounds, Stored, attend_within, check_bounds
from .files import WHOLE, Geometry, Store
from .paged_questions import PagedQuestions
from .pages import Stretch, Table, read_table
from .ring import BLOCK
from .types import Shown

# What is about to be appended: the sequences, k and v (len(sequences), kv_heads, n, dim), n, how many of these each
# gets (None: all), how many of its tokens will be padding, and how many there will be.
New = tuple[list[Stretch], Array, Array, int, Array | None, list[int], list[int]]


class PagedKVCache(PagedQuestions):
    """Keys and values of sequences of very different lengths in one pool of pages.

    Sequences have numbers. `add` begins an empty one, `fork` one that shares the tokens of another, `remove` gives its
    pages back. The tokens of a shared page are stored once; a sequence that grows beyond them copies that one page.

    Parameters
    ----------
    kv_heads : int
        Heads of keys and values.
    head_dim : int
        Elements of a key, up to 1024.
    pages : int
        Pages in the pool; their memory is taken at once.
    page_size : int, default 128
        Tokens in a page.
    value_dim : int, optional
        Elements of a value; `head_dim` by default.
    dtype : dtype_like, default "float32"
        Of the stored keys and values, as for `KVCache`.
    value_dtype : dtype_like, optional
        Of the values, if it is another one; `dtype` by default.
    latent : bool, default False
        Values are the first `value_dim` elements of their keys, and are stored once: multi-head latent attention. Then
        `append` takes keys alone. The scale is the model's own, so pass it to `attend`: 1/sqrt(192) in DeepSeek's
        models, whose queries have 128 + 64 elements before they are absorbed, and not 1/sqrt(576).
    rotate : bool, default False
        Keys and values of int8 and int4 are rotated before they are quantised, queries with them, and results back:
        what few large elements have is then spread over all. For keys or values with such elements.
    window : int, optional
        Sequences grow without end, and a query sees the `window` tokens before it and itself: `attention`'s window of
        (window, None). An `append` first gives back the pages that none of its tokens sees.
    bounds : bool, default False
        Keep what `attend` and `step` need for their `tolerance`, as `KVCache` does.
    causal : bool, default True
        False is for the keys of an encoder: every query sees all tokens of its sequence, and several queries may read
        one sequence (beams). Not with `window`.

    Raises
    ------
    TypeError
        A number that is no integer, or a type that caches do not have.
    ImportError
        bfloat16 without ml_dtypes.
    ValueError
        Numbers out of range.
    MemoryError
        No memory for that many pages.

    See Also
    --------
    KVCache : A batch that grows together; rings, and files that are written in place.

    Notes
    -----
    A result has the bits that `attention` has for the same keys in one array; for int8 and int4 that is true to
    rounding. Pages are from W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", 2023, section 4.

    Padding on the left takes no pages, but for the one that the first token of a sequence is in.

    A cache is not to be changed by two threads at once.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> def tokens(n):
    ...     return np.ones((1, 2, n, 64), "float32")  # sequences, heads, tokens, dim
    >>> pool = qkv_fast.PagedKVCache(kv_heads=2, head_dim=64, pages=10, page_size=16)
    >>> a = pool.add()
    >>> pool.append([a], tokens(40), tokens(40))  # a prompt: 3 pages
    >>> b = pool.fork(a)
    >>> pool.free_pages
    7
    >>> pool.append([b], tokens(1), tokens(1))  # copies the last page, of which 8 rows are in use
    >>> pool.free_pages, pool.lengths([a, b])
    (6, array([40, 41]))
    >>> pool.attend([a, b], np.ones((2, 8, 1, 64), "float32")).shape
    (2, 8, 1, 64)
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        pages: int,
        *,
        page_size: int = 128,
        value_dim: int | None = None,
        dtype: Any = "float32",
        value_dtype: Any = None,
        latent: bool = False,
        rotate: bool = False,
        window: int | None = None,
        bounds: bool = False,
        causal: bool = True,
    ) -> None:
        where = "PagedKVCache"
        self._form = form = types.check_form(
            where, kv_heads, head_dim, value_dim, dtype, value_dtype, latent, rotate, bounds
        )
        pages, size = (types.count(where, name, n) for name, n in (("pages", pages), ("page_size", page_size)))
        self._window = None if window is None else types.count(where, "window", window, 0)
        self._whole = not types.check_causal(where, causal, window)
        try:
            self._k, self._v = form.empty(form.kv_heads, pages * size)
        except ValueError:
            raise OverflowError(f"{where}: no array is as large as {pages} pages of {size} tokens") from None
        self._bounds = Bounds(form, form.kv_heads, pages * size) if form.bounds else None
        self._table = Table(pages, size)
        self._sequences: dict[int, Stretch] = {}
        self._next = 0
        self._last: tuple[Any, Keys] | None = None  # the runs of the last call, and what they were made for

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # as of an array: pages and counters are its own

    def __getstate__(self) -> dict[str, Any]:
        used = [x[:, self._used()] for x in self._arrays]
        return self.__dict__ | {"_last": None, "_k": None, "_v": None, "_bounds": None, "used": used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        used = state.pop("used")
        self.__dict__.update(state)
        lead = self._form.kv_heads, len(self._table.owners) * self._table.size
        self._k, self._v = self._form.empty(*lead)
        self._bounds = Bounds(self._form, *lead) if self._form.bounds else None
        for to, x in zip(self._arrays, used, strict=True):
            _is_known(x.dtype)  # bfloat16, in a process that has not seen any
            to[:, self._used()] = x

    @property
    def _arrays(self) -> tuple[Array, ...]:
        """What has a row for each token: keys, values if they are not in them, and what is known of keys."""
        return (*self._form.parts(self._k, self._v), *(() if self._bounds is None else self._bounds.arrays))

    def _used(self) -> Array:
        """Rows of pages that some sequence has."""
        table = self._table
        return (np.flatnonzero(table.owners)[:, None] * table.size + np.arange(table.size)).ravel()

    kv_heads = Shown(
        "Heads of keys and values.", "PagedKVCache(4, 64, 20).kv_heads -> 4", lambda c: int(c._form.kv_heads)
    )
    head_dim = Shown("Elements of a key.", "PagedKVCache(4, 64, 20).head_dim -> 64", lambda c: int(c._form.dim))
    value_dim = Shown("Elements of a value.", "PagedKVCache(4, 64, 20).value_dim -> 64", lambda c: int(c._form.dim_v))
    pages = Shown("Pages in the pool.", "PagedKVCache(4, 64, 20).pages -> 20", lambda c: len(c._table.owners))
    page_size = Shown("Tokens in a page.", "PagedKVCache(4, 64, 20).page_size -> 128", lambda c: int(c._table.size))
    dtype = Shown(
        "Name of the type that keys are stored in.", "PagedKVCache(4, 64, 20, dtype='int8').dtype -> 'int8'",
        lambda c: str(c._form.k.name),
    )  # fmt: skip
    value_dtype = Shown(
        "Name of the type that values are stored in.", "PagedKVCache(4, 64, 20, dtype='int8').value_dtype -> 'int8'",
        lambda c: str(c._form.v.name),
    )  # fmt: skip
    window = Shown(
        "Tokens before its own that a query sees; None for all.", "PagedKVCache(4, 64, 20, window=9).window -> 9",
        lambda c: None if c._window is None else int(c._window),
    )  # fmt: skip
    latent = Shown(
        "Whether values are the beginnings of keys.", "PagedKVCache(4, 64, 20).latent -> False",
        lambda c: c._form.latent,
    )  # fmt: skip
    rotate = Shown(
        "Whether rows are rotated before they are quantised.", "PagedKVCache(4, 64, 20, dtype='int8').rotate -> False",
        lambda c: c._form.rotate,
    )  # fmt: skip
    bounds = Shown(
        "Whether it keeps what `tolerance` needs.", "PagedKVCache(4, 64, 20, bounds=True).bounds -> True",
        lambda c: c._form.bounds,
    )  # fmt: skip
    causal = Shown(
        "False for the keys of an encoder, which all queries see.", "PagedKVCache(4, 64, 20).causal -> True",
        lambda c: not c._whole,
    )  # fmt: skip

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has.

        Examples
        --------
        >>> import qkv_fast
        >>> qkv_fast.PagedKVCache(1, 8, 20).free_pages
        20
        """
        return len(self._table.free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages.

        Examples
        --------
        >>> import qkv_fast
        >>> qkv_fast.PagedKVCache(1, 8, 20, page_size=10).nbytes
        12800
        """
        return sum(x.nbytes for x in self._arrays)

    @property
    def sequences(self) -> list[int]:
        """The numbers of all sequences, the oldest first.

        Examples
        --------
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> pool.add(), pool.add(), pool.sequences
        (0, 1, [0, 1])
        """
        return list(self._sequences)

    def __repr__(self) -> str:
        form, held = self._form, self._sequences
        window = "" if self._window is None else f", window={self._window}"
        window += ", causal=False" if self._whole else ""
        starts = {s: found.start for s, found in held.items() if found.start}
        shown = f", starts={starts}" if starts else ""
        return (
            f"PagedKVCache(kv_heads={form.kv_heads}, head_dim={form.dim}, pages={self.pages}, "
            f"page_size={self.page_size}{form.dims}, {form.names}{window}, "
            f"lengths={ {s: found.length for s, found in held.items()} }{shown})"
        )

    def lengths(self, sequences: Sequence[int]) -> Array:
        """Tokens of these sequences, int64.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers.

        Raises
        ------
        TypeError, ValueError
            What is no sequence here.

        Examples
        --------
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> pool.lengths([pool.add()])
        array([0])
        """
        return np.array([s.length for s in self._check("PagedKVCache.lengths", sequences)], np.int64)

    def starts(self, sequences: Sequence[int]) -> Array:
        """Tokens of these sequences that are padding, their first ones, int64.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers.

        Raises
        ------
        TypeError, ValueError
            What is no sequence here.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> prompts, both = np.zeros((2, 1, 6, 8), "float32"), [pool.add(), pool.add()]
        >>> pool.append(both, prompts, prompts, starts=[0, 4])
        >>> pool.starts(both)
        array([0, 4])
        """
        return np.array([s.start for s in self._check("PagedKVCache.starts", sequences)], np.int64)

    def _check(self, where: str, sequences: Any) -> list[Stretch]:
        return [self._sequences[s] for s in self._numbers(where, sequences)]

    def _numbers(self, where: str, sequences: Any, name: str = "sequences") -> list[int]:
        if not hasattr(sequences, "__iter__"):
            raise TypeError(f"{where}: {name} must be a list of their numbers, got {sequences!r}")
        return [self._known(where, s) for s in sequences]

    def _distinct(self, where: str, sequences: Any) -> list[int]:
        chosen = self._numbers(where, sequences)
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"{where}: sequences must be different ones, got {chosen}")
        return chosen

    def _known(self, where: str, sequence: Any) -> int:
        found = None if isinstance(sequence, (bool, np.bool_)) else _index(sequence)
        if found is None:
            raise TypeError(f"{where}: a sequence's number is an integer, got {sequence!r}")
        if found not in self._sequences:
            raise ValueError(f"{where}: there is no sequence {found}; there are {list(self._sequences)}")
        return found

    def add(self) -> int:
        """Begin an empty sequence.

        Returns
        -------
        int
            Its number, which no other sequence of this cache has or gets.

        Examples
        --------
        >>> import qkv_fast
        >>> qkv_fast.PagedKVCache(1, 8, 20).add()
        0
        """
        made = self._next
        self._next += 1
        self._sequences[made] = Stretch()
        return made

    def fork(self, sequence: int, n: int | None = None) -> int:
        """Begin a sequence with the first tokens of another, which both then share.

        Parameters
        ----------
        sequence : int
            The other's number.
        n : int, optional
            How many tokens; all by default.

        Returns
        -------
        int
            The number of the new sequence.

        Raises
        ------
        TypeError, ValueError
            No sequence here, more tokens than it has, or ones whose window has been given back.

        Examples
        --------
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> pool.fork(pool.add())
        1
        """
        where = "PagedKVCache.fork"
        sequence = self._known(where, sequence)
        s, stay = self._check_length(where, sequence, n)
        made = self.add()
        self._sequences[made] = self._table.share(s)
        self._table.cut(self._sequences[made], stay)
        return made

    def _check_length(self, where: str, sequence: int, n: Any) -> tuple[Stretch, int]:
        """A sequence, and how many of its tokens stay, all by default; one that goes on there must have its window."""
        s = self._sequences[sequence]
        stay = s.length if n is None else types.count(where, "n", n, 0)
        if stay > s.length:
            raise ValueError(f"{where}: n must be in 0..{s.length} for sequence {sequence}, got {stay}")
        if self._table.lacks(s, stay, self._window):
            assert self._window is not None
            begin = f"the window of token {stay} begins at {max(stay - self._window, s.start)}"
            held = f"of sequence {sequence} the pages from token {self._table.first(s)} on are there"
            raise ValueError(f"{where}: {begin}, {held}")
        return s, stay

    def truncate(self, sequence: int, n: int) -> None:
        """Forget the tokens of a sequence from number `n` on.

        Parameters
        ----------
        sequence : int
            Its number.
        n : int
            Tokens that stay: at most as many as there are.

        Raises
        ------
        TypeError, ValueError
            No sequence here, `n` out of range, or one whose window has been given back: what the last `append` added
            can always be taken away, and so can all tokens.

        Examples
        --------
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> pool.truncate(pool.add(), 0)
        """
        where = "PagedKVCache.truncate"
        sequence = self._known(where, sequence)
        self._table.cut(*self._check_length(where, sequence, types.count(where, "n", n, 0)))

    def select(self, sequence: int, n: int, index: Any) -> None:
        """Keep the first `n` tokens of a sequence, and some of those after them, as the draft that is accepted.

        Parameters
        ----------
        sequence : int
            Its number.
        n : int
            Tokens that stay where they are: at most as many as there are.
        index : array_like of int, shape (m,)
            The tokens that follow them, counted from `n`: in any order, each once.

        Raises
        ------
        TypeError, ValueError
            No sequence here, a number out of range or twice, or more new pages than are free, where tokens go to pages
            that other sequences have as well, or tokens that have been given back; the cache is then as it was.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, 20, page_size=4)
        >>> tokens, s = np.arange(6, dtype="float32").reshape(1, 1, 6, 1), pool.add()
        >>> pool.append([s], tokens, tokens)
        >>> pool.select(s, 2, [0, 3])
        >>> pool.gather(s)[0].ravel()
        array([0., 1., 2., 5.], dtype=float32)
        """
        where = "PagedKVCache.select"
        sequence = self._known(where, sequence)
        s, n = self._check_length(where, sequence, types.count(where, "n", n, 0))
        (chosen,) = check_index(where, index, None)
        check_chosen(where, chosen, n, s.length, sequence)
        if len(chosen) and n < s.start:
            raise ValueError(f"{where}: sequence {sequence} begins at token {s.start}, n must not be less, got {n}")
        table, end = self._table, n + len(chosen)
        written = range(n // table.size, -(-end // table.size) if end > n else n // table.size)
        needed = sum(table.owners[s.pages[i - s.gone]] > 1 for i in written)
        if needed > len(table.free):
            raise ValueError(f"{where}: {needed} new pages are needed, {len(table.free)} are free")
        own = table.rows(s, chosen + n)
        moved = [x[:, own] for x in self._arrays]  # copies
        stay = n
        try:
            for i in written:
                self._own(s, i, min(max(n - i * table.size, 0), table.size))
            rows = table.rows(s, np.arange(n, end))
            for x, those in zip(self._arrays, moved, strict=True):
                x[:, rows] = those
            stay = end
        finally:
            table.cut(s, stay)  # pages beyond go back

    def reorder(self, sequences: Sequence[int], parents: Sequence[int]) -> None:
        """Replace sequences by others, as beam search wants it: each goes on with the tokens of its parent.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, each once.
        parents : sequence of int
            For each of them the number of the one whose tokens, as they are now, it goes on with: any sequences of the
            pool, also several times.

        Raises
        ------
        TypeError, ValueError
            What is no sequence here, one of `sequences` twice, or another number of parents. The cache is then as it
            was.

        See Also
        --------
        fork, remove : More sequences, and fewer.

        Notes
        -----
        No token is copied: pages are shared, and who appends to one that others have copies that one.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 1, 20)
        >>> beams, tokens = [pool.add(), pool.add()], np.array([1, 2], "float32").reshape(2, 1, 1, 1)
        >>> pool.append(beams, tokens, tokens)
        >>> pool.reorder(beams, [beams[1], beams[1]])
        >>> pool.gather(beams[0])[0].ravel(), pool.free_pages
        (array([2.], dtype=float32), 19)
        """
        where = "PagedKVCache.reorder"
        chosen = self._distinct(where, sequences)
        sources = self._numbers(where, parents, "parents")
        if len(sources) != len(chosen):
            raise ValueError(f"{where}: parents must be one for each of {len(chosen)} sequences, got {len(sources)}")
        changed = [pair for pair in zip(chosen, sources, strict=True) if pair[0] != pair[1]]
        made = [(sequence, self._table.share(self._sequences[parent])) for sequence, parent in changed]
        for sequence, new in made:
            self._table.cut(self._sequences[sequence], 0)
            self._sequences[sequence] = new

    def remove(self, sequence: int) -> None:
        """End a sequence; the pages that it shares with none are free.

        Parameters
        ----------
        sequence : int
            Its number.

        Raises
        ------
        TypeError, ValueError
            No sequence here.

        Examples
        --------
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> pool.remove(pool.add())
        >>> pool.sequences
        []
        """
        sequence = self._known("PagedKVCache.remove", sequence)
        self._table.cut(self._sequences.pop(sequence), 0)

    @documented
    def append(
        self,
        sequences: Sequence[int],
        k: Any,
        v: Any = None,
        *,
        lengths: Any = None,
        starts: Any = None,
        layout: str = "bhld",
    ) -> None:
        """Add tokens to the ends of some sequences.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, each once.
        <new_k>
            The batch is that of `sequences`.
        <new_v>
        <new_lengths>
        <new_starts>
        <layout>
            It is that of k and v.

        Raises
        ------
        TypeError
            Other element types.
        ValueError
            Unknown or repeated sequences, shapes that do not fit, lengths out of range, starts of a sequence that is
            not empty, or more new pages than are free and given back; the cache is then as it was.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> token = np.ones((1, 1, 1, 8), "float32")
        >>> pool.append([pool.add()], token, token)
        """
        self._add(self._check_new("PagedKVCache.append", sequences, k, v, lengths, starts, layout))

    def _check_new(
        self, where: str, sequences: Any, k: Any, v: Any, lengths: Any, starts: Any, layout: str
    ) -> New:
        found = [self._sequences[s] for s in self._distinct(where, sequences)]
        k, v, n, counts = check_tokens(where, self._form, len(found), k, v, lengths, layout)
        many = [n] * len(found) if counts is None else counts.tolist()
        ends = [s.length + m for s, m in zip(found, many, strict=True)]
        begins = [s.start for s in found]
        if starts is not None and found:
            given = check_starts(where, starts, np.array([s.length for s in found]), np.array(ends))
            begins = [max(pair) for pair in zip(begins, given.tolist(), strict=True)]
        table = self._table
        firsts = [max(s.length, begin) for s, begin in zip(found, begins, strict=True)]
        needed = table.count(found, firsts, ends, self._window)
        if needed > len(table.free):
            call = f"{sum(many)} tokens for {len(found)} sequence{'s' * (len(found) != 1)}, {table.size} in a page"
            raise ValueError(f"{where}: {needed} new pages are needed, {len(table.free)} are free ({call})")
        return found, k, v, n, counts, begins, ends

    def _add(self, new: New) -> None:
        found, k, v, _, _, begins, ends = new
        table, size = self._table, self._table.size
        try:
            if self._window is not None:
                for s, begin, end in zip(found, begins, ends, strict=True):
                    table.drop(s, table.unseen(s, self._window) if end > max(s.length, begin) else 0)
            for i, (s, begin, end) in enumerate(zip(found, begins, ends, strict=True)):
                done = max(s.length, begin)
                if not s.pages:
                    s.gone = done // size
                while done < end:
                    at, within = divmod(done, size)
                    row = self._own(s, at, within) * size + within
                    m, t = min(end - done, size - within), done - s.length
                    to = self._k[:, row : row + m], self._v[:, row : row + m]
                    self._form.write(*to, k[i, :, t : t + m], v[i, :, t : t + m])
                    if self._bounds is not None:
                        self._bounds.take((slice(None), slice(row, row + m)), *to)
                    done += m
        except BaseException:  # Ctrl-C among them: pages beyond the lengths go back
            for s in found:
                table.cut(s, s.length)
            raise
        for s, begin, end in zip(found, begins, ends, strict=True):
            s.start, s.length = begin, end

    def _own(self, s: Stretch, at: int, used: int) -> int:
        """Page number `at` of a sequence as its own: taken if it has none, copied if others have it as well."""
        pages, i = s.pages, at - s.gone
        if i < len(pages) and self._table.owners[pages[i]] == 1:
            return pages[i]
        page = self._table.take()
        if i == len(pages):
            pages.append(page)
            return page
        old, new = pages[i] * self._table.size, page * self._table.size
        for x in self._arrays:
            x[:, new : new + used] = x[:, old : old + used]
        self._table.release(pages[i])
        pages[i] = page
        return page

    @documented
    def attend(
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
        tolerance: float | None = None,
        layout: str = "bhld",
        return_lse: bool = False,
        out: Any = None,
        num_threads: int | None = None,
        **words: Never,
    ) -> Any:
        """Attention of the newest tokens' queries over all that is stored of some sequences.

        Append the tokens first: the last query is that of the last token. What is not said here is as in `attention`.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, at least one.
        <newest_q>
            Here the batch is that of `sequences`.
        <newest_lengths>
        <tree>
        <tree_positions>
        <mask>
            Here Lq is L, and Lk the tokens of the longest sequence.
        <bias>
        <causal>
            Here not "top-left". By default a query sees no token after its own, and all of an encoder's, which take no
            ``causal=True``.
        <window>
            Not further to the left than the cache's own, which is the default. An encoder's tokens have none, or ALiBi.
        <alibi_slopes>
        <sinks>
        <softcap>
        <scale>
        <tolerance>
        <layout>
            It is that of q and the result.
        <return_lse>
        <out>
        <num_threads>

        Returns
        -------
        out : ndarray, shape (len(sequences), Hq, L, value_dim)
            In q's type.
        lse : ndarray, shape (len(sequences), Hq, L)
            Only with ``return_lse=True``; with `tolerance` that of the keys that were read.
        left, read
            Only with `tolerance`, as `KVCache.attend` gives them.

        Raises
        ------
        TypeError
            Arguments of the wrong kind.
        ValueError
            Unknown sequences, shapes that do not fit, or more queries than a sequence has tokens where positions
            matter (without any token it gives zeros).

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> a, token = pool.add(), np.ones((1, 1, 1, 8), "float32")
        >>> pool.append([a], token, token)
        >>> float(pool.attend([a], token).sum())
        8.0
        """
        where = "PagedKVCache.attend"
        found = self._check(where, sequences)
        held = self._held(where, found)
        if tolerance is not None:
            bounds = check_bounds(where, self._bounds, tree, q_positions)
            return attend_within(
                where, held, bounds, self._rows_of(found), tolerance, q, lengths, mask, bias, causal, window,
                alibi_slopes, sinks, softcap, scale, layout, return_lse, out, num_threads, words,
            )  # fmt: skip
        return attend_newest(
            where, held, q, lengths, mask, bias, causal, window, alibi_slopes, sinks, softcap, scale, layout,
            return_lse, out, num_threads, words, tree, q_positions,
        )  # fmt: skip

    @documented
    def step(
        self,
        sequences: Sequence[int],
        q: Any,
        k: Any,
        v: Any = None,
        *,
        lengths: Any = None,
        starts: Any = None,
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
        tolerance: float | None = None,
        layout: str = "bhld",
        return_lse: bool = False,
        out: Any = None,
        num_threads: int | None = None,
        **words: Never,
    ) -> Any:
        """Append tokens and attend with their queries, in one call: `append(sequences, k, v)`, then
        `attend(sequences, q)`.

        What is checked is checked before anything is appended, and the cache is as it was where one fails.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers, each once, at least one.
        <newest_q>
            The batch is that of `sequences`; here those of the tokens of k and v.
        <new_k>
        <new_v>
        <new_lengths>
            As many of its queries count, and the results of the others are 0.
        <new_starts>
        <tree>
        <tree_positions>
        <mask>
            Here Lq is L, and Lk the tokens of the longest sequence, the new ones among them.
        <bias>
        <causal>
            Here not "top-left". By default a query sees no token after its own, and all of an encoder's, which take no
            ``causal=True``.
        <window>
            Not further to the left than the cache's own, which is the default. An encoder's tokens have none, or ALiBi.
        <alibi_slopes>
        <sinks>
        <softcap>
        <scale>
        <tolerance>
        <layout>
            It is that of q, k, v and the result.
        <return_lse>
        <out>
        <num_threads>

        Returns
        -------
        out : ndarray, shape (len(sequences), Hq, L, value_dim)
            In q's type.
        lse : ndarray, shape (len(sequences), Hq, L)
            Only with ``return_lse=True``; with `tolerance` that of the keys that were read.
        left, read
            Only with `tolerance`, as `KVCache.attend` gives them.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As of `append` and `attend`. What ends a call later (no memory for its work, Ctrl-C) takes the new tokens
            back; with a window, pages that the tokens before do not need either are then gone.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> a, token = pool.add(), np.ones((1, 1, 1, 8), "float32")
        >>> for _ in range(3):
        ...     out = pool.step([a], token, token, token)
        >>> out.shape, pool.lengths([a])
        ((1, 1, 1, 8), array([3]))
        """
        where = "PagedKVCache.step"
        new = self._check_new(where, sequences, k, v, lengths, starts, layout)
        found, _, _, n, counts, begins, ends = new
        added: list[bool] = []

        def append() -> None:
            if not added:
                self._add(new)
                added.append(True)

        held = self._held(where, found, begins, ends, append)
        before = self._before(found)
        try:
            if tolerance is not None:
                bounds = check_bounds(where, self._bounds, tree, q_positions)
                return attend_within(
                    where, held, bounds, self._rows_of(found), tolerance, q, counts, mask, bias, causal, window,
                    alibi_slopes, sinks, softcap, scale, layout, return_lse, out, num_threads, words, n,
                )  # fmt: skip
            return attend_newest(
                where, held, q, counts, mask, bias, causal, window, alibi_slopes, sinks, softcap, scale, layout,
                return_lse, out, num_threads, words, tree, q_positions, n,
            )  # fmt: skip
        except BaseException:  # Ctrl-C among them
            self._take_back(before)
            raise

    def _before(self, found: list[Stretch]) -> list[tuple[Stretch, int, int]]:
        """For `_take_back`, should what is now to be done with these sequences fail."""
        return [(s, s.length, s.start) for s in found]

    def _take_back(self, before: list[tuple[Stretch, int, int]]) -> None:
        """As they were, but for pages that a window has given back."""
        for s, length, start in before:
            s.start = start
            self._table.cut(s, length)

    def _ask(self, where: str, sequences: Any, q: Any, *arguments: Any, values: bool = False) -> Problem:
        return ask_newest(where, self._held(where, self._check(where, sequences)), q, *arguments, values=values)

    def _held(
        self, where: str, found: list[Stretch], begins: list[int] | None = None, ends: list[int] | None = None,
        append: Callable[[], None] | None = None,
    ) -> Held:  # fmt: skip
        """What these have, or will have when they begin and end there, as they do when `append` has been called."""
        if not found:
            raise ValueError(f"{where}: at least one sequence is needed")
        lengths = [s.length for s in found] if ends is None else ends
        starts = [s.start for s in found] if begins is None else begins
        padded = np.array(starts, np.int64) if any(starts) else None
        tokens = Tokens(np.array(lengths, np.int64), min(lengths), max(lengths), padded, self._whole)
        if self._window is None and append is None:
            return self._form, tokens, lambda *_: self._find(found), None, 0
        firsts = []
        if (window := self._window) is not None:
            soon = zip(found, starts, lengths, strict=True)
            firsts = [self._table.first_after(s, start, length, window) for s, start, length in soon]

        def find(*asked: Any) -> Keys:
            if self._window is not None:
                self._check_window(zip(lengths, starts, firsts, strict=True), *asked)
            if append is not None:
                append()
            return self._find(found)

        return self._form, tokens, find, self._window, 0

    def _rows_of(self, found: list[Stretch]) -> Callable[[Problem, Tokens, Any], Stored]:
        """Where `tolerance` finds the tokens of these sequences."""

        def place(p: Problem, tokens: Tokens, _: Any) -> Stored:
            assert self._bounds is not None
            rows = np.zeros((len(found), tokens.most), np.int64)  # those that are not there are hidden: any do
            for b, s in enumerate(found):
                first = self._table.first(s)
                rows[b, first : s.length] = self._table.rows(s, np.arange(first, s.length))
            known = self._k if self._bounds.rows is None else self._bounds.rows
            return Stored(self._k, self._v, known, self._bounds.steps, tokens, p.left, p.right, rows)

        return place

    def _check_window(self, held: Iterable[tuple[int, int, int]], where: str, left: int, queries: Any, _: Any) -> None:
        """`held` are the length of each sequence, its start, and the first token that is there."""
        for i, (length, start, first) in enumerate(held):
            n = queries if isinstance(queries, int) else int(queries[i])
            begin = max(length - n - left, start)
            if n and length > begin < first:
                raise ValueError(
                    f"{where}: the first query's window begins at token {begin}, those from {first} on "
                    f"are there: attend to the tokens of the last append (window={left})"
                )

    def _find(self, found: list[Stretch]) -> Keys:
        last, wanted = self._last, [(s.gone, s.start, s.pages) for s in found]
        if last is None or last[0] != wanted:
            made = self._make_runs(found)
            self._last = last = [(gone, start, pages.copy()) for gone, start, pages in wanted], made
        return last[1]

    def _make_runs(self, found: list[Stretch]) -> Keys:
        """Pages that follow one another in the pool are one run. Any rows stand for those that have been given back,
        which are in blocks of keys that the core fetches, and hidden by the window."""
        size, k_row, v_row = self._table.size, self._k.strides[1], self._v.strides[1]
        table: list[list[int]] = []
        run_of = [0]
        for s in found:
            first = s.gone * size
            if first > s.start:
                for at in range(max(first - BLOCK, 0), first, self._k.shape[1]):
                    table.append([0, 0, at, min(first - at, self._k.shape[1])])
            for i, page in enumerate(s.pages):
                if i and page == s.pages[i - 1] + 1:
                    table[-1][3] += size
                else:
                    table.append([page * size * k_row, page * size * v_row, first + i * size, size])
            run_of.append(len(table))
        return Keys(self._k, self._v, np.array(table, np.int64).reshape(-1, 4), np.array(run_of, np.int64))

    def largest_values(self, sequences: Sequence[int]) -> Array:
        """With `bounds`: the largest magnitude of the values of each head, inf where one is not finite:
        (len(sequences), kv_heads) float64.

        Parameters
        ----------
        sequences : sequence of int
            Their numbers.

        Raises
        ------
        TypeError, ValueError
            What is no sequence here, or a cache without `bounds`.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20, bounds=True)
        >>> s, k = pool.add(), np.ones((1, 1, 3, 8), "float32")
        >>> pool.append([s], k, -2 * k)
        >>> pool.largest_values([s])
        array([[2.]])
        """
        where = "PagedKVCache.largest_values"
        found = self._check(where, sequences)
        if self._bounds is None or self._bounds.tops is None:
            raise ValueError(f"{where}: only a cache that was made with bounds=True knows")
        largest = np.zeros((len(found), self._form.kv_heads))
        for b, s in enumerate(found):
            rows = self._table.rows(s, np.arange(self._table.first(s), s.length))
            largest[b] = self._bounds.tops[:, rows, 0].max(1, initial=0)
        return largest

    def gather(self, sequence: int) -> tuple[Array, Array]:
        """Copies of the keys and values of one sequence, in order: float32 for int8 and int4.

        Padding is left out, and with `window` what has been given back: the tokens are the last ones of the sequence.

        Parameters
        ----------
        sequence : int
            Its number.

        Returns
        -------
        k : ndarray, shape (kv_heads, tokens, head_dim)
        v : ndarray, shape (kv_heads, tokens, value_dim)

        Raises
        ------
        TypeError, ValueError
            No sequence here.

        Examples
        --------
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> k, v = pool.gather(pool.add())
        >>> k.shape
        (1, 0, 8)
        """
        s = self._sequences[self._known("PagedKVCache.gather", sequence)]
        rows = self._table.rows(s, np.arange(self._table.first(s), s.length))
        return self._form.k.read(self._k[:, rows]), self._form.v.read(self._v[:, rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pool to a file, over what is there: all sequences, and each page once, as it is stored.

        Parameters
        ----------
        path : str or path-like
            For `open`. The file is as large as the pool.

        Raises
        ------
        OSError
            A file that cannot be written. What was there is then as it was.
        ValueError
            A file that a `KVCache` writes to.

        Notes
        -----
        Sequences keep their numbers, and share the pages that they share.

        Examples
        --------
        >>> import os, tempfile
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> s, tokens = pool.add(), np.ones((1, 1, 5, 8), "float32")
        >>> pool.append([s], tokens, tokens)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "pool.kv")
        ...     pool.save(path)
        ...     again = qkv_fast.PagedKVCache.open(path)
        ...     print(again.lengths([s]), again.free_pages)
        ...     del again  # systems without POSIX keep open files from being deleted
        [5] 19
        """
        where = "PagedKVCache.save"
        files.check_free(where, path)
        zeros, rows = np.zeros(1, np.int64), self._used()
        geometry = Geometry(1, len(self._table.owners) * self._table.size, -1, 0, self._form)
        none = WHOLE if self._whole else -1
        table = [self._table.size, none if self._window is None else self._window, self._next]
        for number, s in self._sequences.items():
            table += [number, s.length, s.start, s.gone, len(s.pages), *s.pages]
        with files.creating(path, geometry, over=True) as new:
            store = Store(where, new, True)
            for to, x in zip(store.arrays, self._form.parts(self._k, self._v), strict=True):
                to[0][:, rows] = x[:, rows]
            store.commit(zeros, zeros, zeros)
            del to, store  # all that maps the file, which is then given its name
            files.write_table(new, table)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """A pool from a file, whose pages stay in it: a memory map of what `save` wrote.

        Parameters
        ----------
        path : str or path-like
            The file. It is only read: what is appended afterwards, or moved, is in memory alone.

        Returns
        -------
        PagedKVCache
            With the sequences and the free pages that the pool had.

        Raises
        ------
        OSError
            A file that cannot be opened.
        ValueError
            No file of a pool, one of another version, or one that is truncated or damaged.

        Notes
        -----
        A file that becomes shorter while it is open ends the process: that is what memory maps do. `copy.copy` of the
        pool is one without a file.

        Examples
        --------
        See `save`.

        >>> import qkv_fast
        >>> qkv_fast.PagedKVCache.open("absent.kv")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'absent.kv'
        """
        where = "PagedKVCache.open"
        store = Store(where, path, False, paged=True)
        read = read_table(store.table, store.geometry.capacity)
        if read is None:
            raise ValueError(f"{where}: {os.fspath(path)!r} is damaged: there is no such table of pages")
        pool = cls.__new__(cls)
        pool._form, pool._last = store.geometry.form, None
        pool._k, pool._v = pool._form.views(*(x[0] for x in store.arrays))
        pool._table, window, pool._next, pool._sequences = read
        pool._window, pool._whole, pool._bounds = None if window < 0 else window, window == WHOLE, None
        if pool._form.bounds:
            pool._bounds = Bounds(pool._form, *pool._k.shape[:2])
            for page in np.flatnonzero(pool._table.owners).tolist():
                at = slice(None), slice(page * pool._table.size, (page + 1) * pool._table.size)
                pool._bounds.take(at, pool._k[at], pool._v[at])
        return pool
