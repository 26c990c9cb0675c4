"""PagedKVCache: sequences that come and go share one pool of pages; those with a common beginning share its pages.

Page p is the rows p * page_size to (p + 1) * page_size of k (kv_heads, rows, dim) and v. A sequence is a list of pages,
and attention reads pages that follow one another in the pool as one run. Who appends to a page that others have as
well copies it first.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Never, Self

import numpy as np

from .._checks import Array, _index, _is_known
from .._core import Problem
from .._help import documented
from . import types
from .attend import Held, Keys, Tokens, ask_newest, attend_newest, check_chosen, check_index, check_tokens
from .paged_questions import PagedQuestions
from .types import Shown


class New(NamedTuple):
    """Tokens that are about to be appended."""

    chosen: list[int]
    k: Array  # (len(chosen), kv_heads, n, dim)
    v: Array
    n: int
    counts: Array | None  # of each sequence, where not all get n
    many: list[int]  # the same, always
    ends: list[int]  # how many tokens there will be


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
    KVCache : A batch that grows together; rings and files.

    Notes
    -----
    A result has the bits that `attention` has for the same keys in one array; for int8 and int4 that is true to
    rounding. Pages are from W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", 2023, section 4.

    A cache is not to be changed by two threads at once. Pages are in memory alone: there is no file
    of them.

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
    ) -> None:
        where = "PagedKVCache"
        self._form = form = types.check_form(where, kv_heads, head_dim, value_dim, dtype, value_dtype, latent)
        pages, self._size = (
            types.count(where, name, n) for name, n in (("pages", pages), ("page_size", page_size))
        )
        try:
            self._k, self._v = form.empty(form.kv_heads, pages * self._size)
        except ValueError:
            raise OverflowError(f"{where}: no array is as large as {pages} pages of {self._size} tokens") from None
        self._owners = np.zeros(pages, np.int64)  # sequences that have the page
        self._free = list(range(pages - 1, -1, -1))  # the first ones are taken first
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._last: tuple[Any, Keys] | None = None  # the runs of the last call, and what they were made for

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # as of an array: pages and counters are its own

    def __getstate__(self) -> dict[str, Any]:
        used = [x[:, self._used()] for x in self._arrays]
        return self.__dict__ | {"_last": None, "_k": None, "_v": None, "used": used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        used = state.pop("used")
        self.__dict__.update(state)
        self._k, self._v = self._form.empty(self._form.kv_heads, self._owners.size * self._size)
        for to, x in zip(self._arrays, used, strict=True):
            _is_known(x.dtype)  # bfloat16, in a process that has not seen any
            to[:, self._used()] = x

    @property
    def _arrays(self) -> tuple[Array, ...]:
        """What is stored: keys, and values if they are not in them."""
        return self._form.parts(self._k, self._v)

    def _used(self) -> Array:
        """Rows of pages that some sequence has."""
        return (np.flatnonzero(self._owners)[:, None] * self._size + np.arange(self._size)).ravel()

    kv_heads = Shown(
        "Heads of keys and values.", "PagedKVCache(4, 64, 20).kv_heads -> 4", lambda c: int(c._form.kv_heads)
    )
    head_dim = Shown("Elements of a key.", "PagedKVCache(4, 64, 20).head_dim -> 64", lambda c: int(c._form.dim))
    value_dim = Shown("Elements of a value.", "PagedKVCache(4, 64, 20).value_dim -> 64", lambda c: int(c._form.dim_v))
    pages = Shown("Pages in the pool.", "PagedKVCache(4, 64, 20).pages -> 20", lambda c: int(c._owners.size))
    page_size = Shown("Tokens in a page.", "PagedKVCache(4, 64, 20).page_size -> 128", lambda c: int(c._size))
    dtype = Shown(
        "Name of the type that keys are stored in.", "PagedKVCache(4, 64, 20, dtype='int8').dtype -> 'int8'",
        lambda c: str(c._form.k.name),
    )  # fmt: skip
    value_dtype = Shown(
        "Name of the type that values are stored in.", "PagedKVCache(4, 64, 20, dtype='int8').value_dtype -> 'int8'",
        lambda c: str(c._form.v.name),
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
        return len(self._free)

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
        return list(self._pages)

    def __repr__(self) -> str:
        form = self._form
        return (
            f"PagedKVCache(kv_heads={form.kv_heads}, head_dim={form.dim}, pages={self._owners.size}, "
            f"page_size={self._size}{form.dims}, {form.names}, lengths={self._lengths})"
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
        return np.array([self._lengths[s] for s in self._check("PagedKVCache.lengths", sequences)], np.int64)

    def _check(self, where: str, sequences: Any) -> list[int]:
        if not hasattr(sequences, "__iter__"):
            raise TypeError(f"{where}: sequences must be a list of their numbers, got {sequences!r}")
        return [self._known(where, s) for s in sequences]

    def _known(self, where: str, sequence: Any) -> int:
        found = None if isinstance(sequence, (bool, np.bool_)) else _index(sequence)
        if found is None:
            raise TypeError(f"{where}: a sequence's number is an integer, got {sequence!r}")
        if found not in self._pages:
            raise ValueError(f"{where}: there is no sequence {found}; there are {list(self._pages)}")
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
        self._pages[made], self._lengths[made] = [], 0
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
            No sequence here, or more tokens than it has.

        Examples
        --------
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> pool.fork(pool.add())
        1
        """
        where = "PagedKVCache.fork"
        sequence = self._known(where, sequence)
        n = self._check_length(where, sequence, self._lengths[sequence] if n is None else n)
        pages = self._pages[sequence][: -(-n // self._size)]
        made = self.add()
        self._pages[made], self._lengths[made] = pages, n
        self._owners[pages] += 1
        return made

    def _check_length(self, where: str, sequence: int, n: Any) -> int:
        stay = types.count(where, "n", n, 0)
        if stay > self._lengths[sequence]:
            raise ValueError(f"{where}: n must be in 0..{self._lengths[sequence]} for sequence {sequence}, got {stay}")
        return stay

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
            No sequence here, or `n` out of range.

        Examples
        --------
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> pool.truncate(pool.add(), 0)
        """
        where = "PagedKVCache.truncate"
        sequence = self._known(where, sequence)
        n = self._check_length(where, sequence, n)
        pages = self._pages[sequence]
        while len(pages) > -(-n // self._size):
            self._release(pages.pop())
        self._lengths[sequence] = n

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
            that other sequences have as well; the cache is then as it was.

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
        n = self._check_length(where, sequence, n)
        (chosen,) = check_index(where, index, None)
        check_chosen(where, chosen, n, self._lengths[sequence], sequence)
        pages, end = self._pages[sequence], n + len(chosen)
        written = range(n // self._size, -(-end // self._size) if end > n else n // self._size)
        needed = sum(int(self._owners[pages[i]]) > 1 for i in written)
        if needed > len(self._free):
            raise ValueError(f"{where}: {needed} new pages are needed, {len(self._free)} are free")
        own = self._rows(pages, chosen + n)
        moved = [x[:, own] for x in self._arrays]  # copies
        self._lengths[sequence] = n
        try:
            for i in written:
                self._own(pages, i, min(max(n - i * self._size, 0), self._size))
            rows = self._rows(pages, np.arange(n, end))
            for x, those in zip(self._arrays, moved, strict=True):
                x[:, rows] = those
            self._lengths[sequence] = end
        finally:
            self.truncate(sequence, self._lengths[sequence])  # pages beyond go back

    def _rows(self, pages: list[int], tokens: Array) -> Array:
        rows: Array = np.array(pages, np.int64)[tokens // self._size] * self._size + tokens % self._size
        return rows

    def _release(self, page: int) -> None:
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)

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
        self.truncate(sequence, 0)
        del self._pages[sequence], self._lengths[sequence]

    @documented
    def append(
        self, sequences: Sequence[int], k: Any, v: Any = None, *, lengths: Any = None, layout: str = "bhld"
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
        <layout>
            It is that of k and v.

        Raises
        ------
        TypeError
            Other element types.
        ValueError
            Unknown or repeated sequences, shapes that do not fit, lengths out of range, or more new pages than are
            free; the cache is then as it was.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> pool = qkv_fast.PagedKVCache(1, 8, 20)
        >>> token = np.ones((1, 1, 1, 8), "float32")
        >>> pool.append([pool.add()], token, token)
        """
        self._add(self._check_new("PagedKVCache.append", sequences, k, v, lengths, layout))

    def _check_new(self, where: str, sequences: Any, k: Any, v: Any, lengths: Any, layout: str) -> New:
        chosen = self._check(where, sequences)
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"{where}: sequences must be different ones, got {chosen}")
        k, v, n, counts = check_tokens(where, self._form, len(chosen), k, v, lengths, layout)
        many = [n] * len(chosen) if counts is None else counts.tolist()
        needed = self._count_needed(chosen, many)
        if needed > len(self._free):
            given = f"{sum(many)} tokens for {len(chosen)} sequence{'s' * (len(chosen) != 1)}, {self._size} in a page"
            raise ValueError(f"{where}: {needed} new pages are needed, {len(self._free)} are free ({given})")
        return New(chosen, k, v, n, counts, many, [self._lengths[s] + m for s, m in zip(chosen, many, strict=True)])

    def _add(self, new: New) -> None:
        _, k, v, *_ = new
        try:
            for i, (sequence, n) in enumerate(zip(new.chosen, new.many, strict=True)):
                done = 0
                while done < n:
                    end, within = divmod(self._lengths[sequence] + done, self._size)
                    row = self._own(self._pages[sequence], end, within) * self._size + within
                    m = min(n - done, self._size - within)
                    to = self._k[:, row : row + m], self._v[:, row : row + m]
                    self._form.write(*to, k[i, :, done : done + m], v[i, :, done : done + m])
                    done += m
        except BaseException:  # Ctrl-C among them: pages beyond the lengths go back
            for sequence in new.chosen:
                self.truncate(sequence, self._lengths[sequence])
            raise
        self._lengths.update(zip(new.chosen, new.ends, strict=True))

    def _count_needed(self, chosen: list[int], many: list[int]) -> int:
        """Pages that an append takes: new ones at the ends, and copies of last ones that are shared."""
        needed, left = 0, dict[int, int]()
        for sequence, n in zip(chosen, many, strict=True):
            pages, length = self._pages[sequence], self._lengths[sequence]
            needed += -(-(length + n) // self._size) - len(pages)
            if n and length % self._size:
                owners = left.get(pages[-1], int(self._owners[pages[-1]]))
                needed += owners > 1
                left[pages[-1]] = owners - 1
        return needed

    def _own(self, pages: list[int], i: int, used: int) -> int:
        """Page number i of a sequence as its own: taken if it has none, copied if others have it as well."""
        if i < len(pages) and self._owners[pages[i]] == 1:
            return pages[i]
        page = self._free.pop()
        self._owners[page] = 1
        if i == len(pages):
            pages.append(page)
            return page
        old, new = pages[i] * self._size, page * self._size
        for x in self._arrays:
            x[:, new : new + used] = x[:, old : old + used]
        self._release(pages[i])
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
        mask: Any = None,
        bias: Any = None,
        causal: bool = True,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        return_lse: bool = False,
        out: Array | None = None,
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
        <mask>
            Here Lq is L, and Lk the tokens of the longest sequence.
        <bias>
        <causal>
            True by default, and here not "top-left": a query sees no token after its own.
        <window>
        <alibi_slopes>
        <sinks>
        <softcap>
        <scale>
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
            Only with ``return_lse=True``.

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
        held = self._held(where, self._check(where, sequences))
        return attend_newest(
            where, held, q, lengths, mask, bias, causal, window, alibi_slopes, sinks, softcap, scale, layout,
            return_lse, out, num_threads, words, tree,
        )  # fmt: skip

    @documented
    def step(
        self,
        sequences: Sequence[int],
        q: Any,
        k: Any,
        v: Any,
        *,
        lengths: Any = None,
        tree: Any = None,
        mask: Any = None,
        bias: Any = None,
        causal: bool = True,
        window: int | tuple[int | None, int | None] | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        softcap: float | None = None,
        scale: float | None = None,
        layout: str = "bhld",
        return_lse: bool = False,
        out: Array | None = None,
        num_threads: int | None = None,
        **words: Never,
    ) -> Any:
        """Append tokens and attend with their queries, in one call: `append(sequences, k, v)`, then
        `attend(sequences, q)`.

        What is checked is checked before anything is appended, and once; so a step is quicker than the two calls, and
        the cache is as it was where one fails.

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
        <tree>
        <mask>
            Here Lq is L, and Lk the tokens of the longest sequence, the new ones among them.
        <bias>
        <causal>
            True by default, and here not "top-left": a query sees no token after its own.
        <window>
        <alibi_slopes>
        <sinks>
        <softcap>
        <scale>
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
            Only with ``return_lse=True``.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As of `append` and `attend`. What ends a call later (no memory for its work, Ctrl-C) takes the new tokens
            back.

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
        new = self._check_new(where, sequences, k, v, lengths, layout)
        form, tokens, find, limit, keep = self._held(where, new.chosen, new.ends)

        def found(*asked: Any) -> Keys:
            self._add(new)
            return find(*asked)

        before = [self._lengths[s] for s in new.chosen]
        try:
            return attend_newest(
                where, (form, tokens, found, limit, keep), q, new.counts, mask, bias, causal, window, alibi_slopes,
                sinks, softcap, scale, layout, return_lse, out, num_threads, words, tree, new.n,
            )  # fmt: skip
        except BaseException:  # Ctrl-C among them
            for sequence, n in zip(new.chosen, before, strict=True):
                self.truncate(sequence, n)
            raise

    def _ask(self, where: str, sequences: Any, q: Any, *arguments: Any, values: bool = False) -> Problem:
        return ask_newest(where, self._held(where, self._check(where, sequences)), q, *arguments, values=values)

    def _held(self, where: str, chosen: list[int], ends: list[int] | None = None) -> Held:
        """What these have, or will have when they have so many tokens."""
        if not chosen:
            raise ValueError(f"{where}: at least one sequence is needed")
        lengths = [self._lengths[s] for s in chosen] if ends is None else ends
        tables = [self._pages[s] for s in chosen]
        tokens = Tokens(np.array(lengths, np.int64), min(lengths), max(lengths))
        return self._form, tokens, lambda *_: self._find(tables), None, 0

    def _find(self, tables: list[list[int]]) -> Keys:
        last = self._last
        if last is None or last[0] != tables:
            self._last = last = [list(pages) for pages in tables], self._make_runs(tables)
        return last[1]

    def _make_runs(self, tables: list[list[int]]) -> Keys:
        """Pages that follow one another in the pool are one run."""
        size, k_row, v_row = self._size, self._k.strides[1], self._v.strides[1]
        table: list[list[int]] = []
        run_of = [0]
        for pages in tables:
            for i, page in enumerate(pages):
                if i and page == pages[i - 1] + 1:
                    table[-1][3] += size
                else:
                    table.append([page * size * k_row, page * size * v_row, i * size, size])
            run_of.append(len(table))
        return Keys(self._k, self._v, np.array(table, np.int64).reshape(-1, 4), np.array(run_of, np.int64))

    def gather(self, sequence: int) -> tuple[Array, Array]:
        """Copies of the keys and values of one sequence, in order: float32 for int8 and int4.

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
        sequence = self._known("PagedKVCache.gather", sequence)
        at = np.arange(self._lengths[sequence])
        rows = np.array(self._pages[sequence], np.int64)[at // self._size] * self._size + at % self._size
        return self._form.k.read(self._k[:, rows]), self._form.v.read(self._v[:, rows])
