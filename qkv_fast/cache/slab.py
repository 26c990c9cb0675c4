"""KVCache: the keys and values of a batch of growing sequences, in memory or in a file, and attention over them.

One slab of (batch, kv_heads, capacity, dim), written once, or a ring of as many rows (ring.py).
"""

import contextlib
import copy
import os
import sys
from typing import Any, Never, Self

import numpy as np

from .._checks import Array, _as_array, _is_known, _per_sequence
from .._core import Problem
from .._help import documented
from . import files, types
from .attend import Held, Keys, Tokens, ask_newest, attend_newest, check_chosen, check_index, check_starts, check_tokens
from .bounds import Bounds, Stored, attend_within, check_bounds
from .files import WHOLE, Geometry, Store
from .moves import Moves
from .questions import Questions
from .ring import Ring
from .types import Shown

# What is about to be appended: k and v (batch, kv_heads, n, dim), n, how many of these each sequence gets (None: all),
# and the tokens that there will be.
New = tuple[Array, Array, int, Array | None, Tokens]


class KVCache(Questions):
    """Keys and values of a batch of growing sequences, and attention of new queries over them.

    Memory for all tokens is taken at once; appending copies the new ones in, and attending reads them where they lie.

    Parameters
    ----------
    batch : int
        Number of sequences.
    kv_heads : int
        Heads of keys and values.
    head_dim : int
        Elements of a key, up to 1024.
    capacity : int
        Tokens that a sequence can have; with `window`, tokens that are kept of each.
    value_dim : int, optional
        Elements of a value; `head_dim` by default.
    dtype : dtype_like, default "float32"
        Of the stored keys and values: float32, float64, float16, bfloat16 (of the package ml_dtypes), int8 (a scale for
        each key and value) or int4 (a scale for each 32 elements of one).
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
        (window, None). The cache is then a ring of ``capacity - keep`` tokens, which must be more than `window`: with n
        more, n + 1 tokens can be appended and attended to at a time.
    keep : int, default 0
        With `window`: the number of first tokens that stay, and that every later query sees as well.
    bounds : bool, default False
        Keep what `attend` and `step` need for their `tolerance`: a copy of the keys in int8 (of rows of int8 and int4
        themselves, a number each), in memory. Files say that it is wanted, and whoever opens one makes it anew.
    path : str or path-like, optional
        The cache is a memory map of this file, which other processes can `open`. It is made if it does not exist; else
        it must be that of a cache with these parameters, and the cache has the tokens of its last `flush`. Not with
        `window`. One process at a time may write.
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
        Numbers out of range, or a file that is of another version or shape, truncated, damaged, or open for writing.
    OSError
        A file that cannot be made, read or written.
    MemoryError
        No memory for that many tokens.

    See Also
    --------
    PagedKVCache : Sequences that come and go, of very different lengths, and that share beginnings.

    Notes
    -----
    A result has the bits that `attention` has for the same keys in one array, of any batch; for a ring with `keep`,
    once the first tokens of a sequence are out of the window, and for int8 and int4 that is true to rounding. Memory
    past the lengths has no influence.

    int8 stores an element x as the integer n nearest to x / s, where s, a float32, is the largest magnitude of its key
    or value over 127. int4 does so for groups of 32 elements, with n in -8..7 and s, a bfloat16 rounded away from zero,
    the element of largest magnitude over -8. Both read as n s. Where an element is NaN or infinite, all that share its
    scale read as NaN. Queries of an int8 cache are multiplied by the n first: below 2^110, so that no sum overflows.

    Rotated rows are multiplied by Hadamard matrices over the square roots of their sizes, after fixed signs for their
    elements: blocks of descending powers of two, 64 and 32 for 96 elements, which begin anew where latent values end.
    The rounding of a row is then spread evenly over its elements. That pays where a few elements are much larger than
    others, and costs where none is. An element that is NaN or infinite makes its block NaN, numbers are to be below
    2^120, and `keys` and `values` are rotated back, to rounding. From S. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit
    Inference in Rotated LLMs", 2024, section 3.

    To keep the first tokens of a sliding window is from G. Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks", 2023, section 3.2; here tokens keep their positions.

    A cache is not to be changed by two threads at once. One in a file is closed when nothing refers to it any more,
    in forked processes too.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 10, 64), dtype=np.float32)  # batch, heads, tokens, dim
    >>> k, v = rng.standard_normal((2, 2, 4, 10, 64), dtype=np.float32)  # 4 key heads for 8 query heads
    >>> cache = qkv_fast.KVCache(batch=2, kv_heads=4, head_dim=64, capacity=100)
    >>> cache.append(k[:, :, :7], v[:, :, :7])  # a prompt
    >>> first = cache.attend(q[:, :, :7])
    >>> steps = [first]
    >>> for t in range(7, 10):
    ...     cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    ...     steps.append(cache.attend(q[:, :, t : t + 1]))
    >>> np.allclose(np.concatenate(steps, axis=2), qkv_fast.attention(q, k, v, causal=True), atol=1e-6)
    True
    >>> cache
    KVCache(batch=2, kv_heads=4, head_dim=64, capacity=100, dtype='float32', lengths=[10, 10])
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        value_dim: int | None = None,
        dtype: Any = "float32",
        value_dtype: Any = None,
        latent: bool = False,
        rotate: bool = False,
        window: int | None = None,
        keep: int = 0,
        bounds: bool = False,
        path: str | os.PathLike[str] | None = None,
        causal: bool = True,
    ) -> None:
        where = "KVCache"
        form = types.check_form(where, kv_heads, head_dim, value_dim, dtype, value_dtype, latent, rotate, bounds)
        batch = types.count(where, "batch", batch)
        capacity = types.count(where, "capacity", capacity)
        keep = types.count(where, "keep", keep, 0)
        if window is None and keep:
            raise ValueError(f"{where}: keep is for a ring, which takes window as well (keep={keep})")
        none = -1 if types.check_causal(where, causal, window) else WHOLE
        reach = none if window is None else types.count(where, "window", window, 0)
        if capacity - keep <= reach:
            given = f"capacity={capacity}, keep={keep}, window={window}"
            raise ValueError(f"{where}: capacity must be more than keep + window: the window and the token ({given})")
        geometry = Geometry(batch, capacity, reach, keep, form)
        if path is None:
            self._take(geometry, None)
            return
        if window is not None:
            raise ValueError(f"{where}: a ring is not written in place: use path without window, or save()")
        if geometry.places()[3] > sys.maxsize:
            raise OverflowError(f"{where}: no file is as large as a cache of {geometry}")
        if not os.path.exists(path):
            with contextlib.suppress(FileExistsError), files.creating(path, geometry, over=False):
                pass
        store = Store(where, path, True)
        if store.geometry != geometry:
            found = store.geometry
            del store  # and its lock, which the exception's frames would keep
            raise ValueError(f"{where}: {os.fspath(path)!r} is a cache of {found}; asked for was {geometry}")
        self._take(geometry, store)

    def _take(self, geometry: Geometry, store: Store | None) -> None:
        self._geometry, self._store = geometry, store
        self._bounds: Bounds | None = None
        # As a slab, whose capacity no token exceeds, a ring that is never turned.
        self._ring = Ring(geometry.keep, geometry.capacity - geometry.keep)
        if store is None:
            try:
                self._allocate()
            except ValueError:
                raise OverflowError(f"KVCache: no array is as large as a cache of {geometry}") from None
            self._lengths, self._reach, self._starts = np.zeros((3, geometry.batch), np.int64)
        else:
            self._k, self._v = store.k, store.v
            self._lengths, self._reach, self._starts = store.lengths.copy(), store.reach.copy(), store.starts.copy()
            self._bound_all()
        self._least, self._most = int(self._lengths.min()), int(self._lengths.max())
        self._padded = bool(self._starts.any())
        self._laps: tuple[Any, Keys] | None = None  # the last runs of a ring, and what they were made for

    def _allocate(self) -> None:
        batch, capacity, _, _, form = self._geometry
        self._k, self._v = form.empty(batch, form.kv_heads, capacity)
        if form.bounds:
            self._bounds = Bounds(form, batch, form.kv_heads, capacity)

    def _set_lengths(self, lengths: Array) -> None:
        self._lengths = lengths
        if self._padded:
            self._starts = np.minimum(self._starts, lengths)
            self._padded = bool(self._starts.any())
        self._reach = np.maximum(self._reach, lengths)  # of a ring: one past the last token that overwrote an older one
        self._least, self._most = int(lengths.min()), int(lengths.max())

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # as of an array: rows and counters are its own

    def __getstate__(self) -> dict[str, Any]:
        if self._store is not None:
            raise TypeError("KVCache: a cache in a file is not copied or pickled: save(path) writes a copy, open(path) "
                            "has the same tokens, load(path) has them in memory")  # fmt: skip
        used = [x[:, :, self._used()] for x in self._arrays]
        largest = None if self._bounds is None else self._bounds.largest
        absent = dict.fromkeys(("_laps", "_k", "_v", "_bounds"))
        return self.__dict__ | absent | {"used": used, "largest": largest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        used, largest = state.pop("used"), state.pop("largest")
        self.__dict__.update(state)
        self._allocate()
        if self._bounds is not None:
            self._bounds.largest = largest
        for to, x in zip(self._arrays, used, strict=True):
            _is_known(x.dtype)  # bfloat16, in a process that has not seen any
            to[:, :, : x.shape[2]] = x

    @property
    def _arrays(self) -> tuple[Array, ...]:
        """What has a row for each token: keys, values if they are not in them, and what is known of keys."""
        return self._stored(self._k, self._v, self._bounds)

    def _stored(self, k: Array, v: Array, known: Bounds | None) -> tuple[Array, ...]:
        return (*self._geometry.form.parts(k, v), *(() if known is None else known.arrays))

    def _used(self) -> slice:
        """Rows that hold tokens."""
        return slice(min(int(self._reach.max() if self._geometry.window >= 0 else self._most), self._geometry.capacity))

    batch = Shown("Number of sequences.", "KVCache(2, 4, 64, 100).batch -> 2", lambda c: int(c._geometry.batch))
    kv_heads = Shown(
        "Heads of keys and values.", "KVCache(2, 4, 64, 100).kv_heads -> 4", lambda c: int(c._geometry.form.kv_heads)
    )
    head_dim = Shown(
        "Elements of a key.", "KVCache(2, 4, 64, 100).head_dim -> 64", lambda c: int(c._geometry.form.dim)
    )
    value_dim = Shown(
        "Elements of a value.", "KVCache(2, 4, 64, 100).value_dim -> 64", lambda c: int(c._geometry.form.dim_v)
    )
    capacity = Shown(
        "Tokens that a sequence can have, or that a ring keeps of each.", "KVCache(2, 4, 64, 100).capacity -> 100",
        lambda c: int(c._geometry.capacity),
    )  # fmt: skip
    dtype = Shown(
        "Name of the type that keys are stored in.", "KVCache(2, 4, 64, 100, dtype='int8').dtype -> 'int8'",
        lambda c: str(c._geometry.form.k.name),
    )  # fmt: skip
    value_dtype = Shown(
        "Name of the type that values are stored in.", "KVCache(2, 4, 64, 100, dtype='int8').value_dtype -> 'int8'",
        lambda c: str(c._geometry.form.v.name),
    )  # fmt: skip
    window = Shown(
        "Of a ring: tokens before its own that a query sees; else None.",
        "KVCache(2, 4, 64, 100, window=50).window -> 50",
        lambda c: int(c._geometry.window) if c._geometry.window >= 0 else None,
    )
    keep = Shown(
        "Of a ring: first tokens that stay.", "KVCache(2, 4, 64, 100, window=50, keep=4).keep -> 4",
        lambda c: int(c._geometry.keep),
    )  # fmt: skip
    latent = Shown(
        "Whether values are the beginnings of keys.", "KVCache(2, 4, 64, 100).latent -> False",
        lambda c: c._geometry.form.latent,
    )  # fmt: skip
    rotate = Shown(
        "Whether rows are rotated before they are quantised.", "KVCache(2, 4, 64, 100, dtype='int8').rotate -> False",
        lambda c: c._geometry.form.rotate,
    )  # fmt: skip
    bounds = Shown(
        "Whether it keeps what `tolerance` needs.", "KVCache(2, 4, 64, 100, bounds=True).bounds -> True",
        lambda c: c._geometry.form.bounds,
    )  # fmt: skip
    causal = Shown(
        "False for the keys of an encoder, which all queries see.", "KVCache(2, 4, 64, 100).causal -> True",
        lambda c: bool(c._geometry.window != WHOLE),
    )  # fmt: skip

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence, (batch,) int64: a copy.

        Examples
        --------
        >>> import qkv_fast
        >>> qkv_fast.KVCache(3, 1, 8, 10).lengths
        array([0, 0, 0])
        """
        return self._lengths.copy()

    @property
    def starts(self) -> Array:
        """Tokens of each sequence that are padding, its first ones, (batch,) int64: a copy.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(2, 1, 8, capacity=10)
        >>> prompts = np.zeros((2, 1, 6, 8), "float32")
        >>> cache.append(prompts, prompts, starts=[0, 4])
        >>> cache.starts
        array([0, 4])
        """
        return self._starts.copy()

    @property
    def keys(self) -> Array:
        """The stored keys, (batch, kv_heads, rows, head_dim): a read-only view, or a float32 copy of int8 and int4.

        Row t holds token t; in a ring `positions` says which. Rows past a sequence's length hold anything.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(1, 2, 8, 10)
        >>> cache.append(np.ones((1, 2, 3, 8), "float32"), np.zeros((1, 2, 3, 8), "float32"))
        >>> cache.keys.shape
        (1, 2, 3, 8)
        """
        return self._numbers(self._k, self._geometry.form.k)

    @property
    def values(self) -> Array:
        """The stored values, (batch, kv_heads, rows, value_dim), as `keys` has the keys.

        Examples
        --------
        >>> import qkv_fast
        >>> qkv_fast.KVCache(1, 2, 8, 10, value_dim=4).values.shape
        (1, 2, 0, 4)
        """
        return self._numbers(self._v, self._geometry.form.v)

    def _numbers(self, x: Array, stored: types.Rows) -> Array:
        rows = x[:, :, : self._most]
        rows.flags.writeable = False
        return stored.read(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that there is room for; latent values take none.

        Examples
        --------
        >>> import qkv_fast
        >>> [qkv_fast.KVCache(1, 2, 128, 100, dtype=d).nbytes // 100 for d in ("float32", "float16", "int8", "int4")]
        [2048, 1024, 528, 288]
        """
        return sum(x.nbytes for x in self._arrays)

    @property
    def largest_values(self) -> Array:
        """With `bounds`: the largest magnitude of the values of each head that have ever been there, (batch, kv_heads)
        float64, inf where one was not finite: a copy.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(1, 1, 8, 10, bounds=True)
        >>> cache.append(np.ones((1, 1, 3, 8), "float32"), np.full((1, 1, 3, 8), -2, "float32"))
        >>> cache.largest_values
        array([[2.]])
        """
        if self._bounds is None:
            raise ValueError("KVCache.largest_values: only a cache that was made with bounds=True knows")
        return self._bounds.largest.copy()

    @property
    def positions(self) -> Array:
        """Which token each row of `keys` and `values` holds, (batch, rows) int64; -1 where it holds none.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(1, 1, 8, capacity=5, window=2, keep=1)
        >>> for _ in range(7):
        ...     cache.append(np.zeros((1, 1, 1, 8), "float32"), np.zeros((1, 1, 1, 8), "float32"))
        >>> cache.positions  # token 0 is kept, the ring holds the last four
        array([[0, 5, 6, 3, 4]])
        """
        rows = min(self._most, self._geometry.capacity)
        reach = self._reach if self._geometry.window >= 0 else self._lengths
        return self._ring.positions(self._lengths, reach, rows)

    def __repr__(self) -> str:
        batch, capacity, window, keep, form = self._geometry
        ring = f", window={window}, keep={keep}" if window >= 0 else ""
        ring += "" if self.causal else ", causal=False"
        starts = f", starts={self._starts.tolist()}" if self._padded else ""
        return (
            f"KVCache(batch={batch}, kv_heads={form.kv_heads}, head_dim={form.dim}, capacity={capacity}{form.dims}, "
            f"{form.names}{ring}, lengths={self._lengths.tolist()}{starts})"
        )

    @documented
    def append(
        self, k: Any, v: Any = None, *, lengths: Any = None, starts: Any = None, layout: str = "bhld"
    ) -> None:
        """Add tokens to the ends of the sequences.

        Parameters
        ----------
        <new_k>
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
            Shapes that do not fit the cache, lengths out of range, or more tokens than the cache has room for; the
            cache is then as it was; starts of a sequence that is not empty. A cache that was opened for reading.

        Notes
        -----
        A ring takes any number of tokens and holds the last ones.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(2, 4, 64, capacity=100)
        >>> prompt = np.zeros((2, 4, 9, 64), "float32")
        >>> cache.append(prompt, prompt, lengths=[9, 5])  # the second prompt is shorter
        >>> cache.lengths
        array([9, 5])
        """
        self._add(self._check_new("KVCache.append", k, v, lengths, starts, layout))

    def _check_new(self, where: str, k: Any, v: Any, lengths: Any, starts: Any, layout: str) -> New:
        geometry = self._geometry
        k, v, n, counts = check_tokens(where, geometry.form, geometry.batch, k, v, lengths, layout)
        ends = self._lengths + (n if counts is None else counts)
        least, most = self._least + n, self._most + n
        if counts is not None:
            least, most = int(ends.min()), int(ends.max())
        begins = self._starts if self._padded else None
        if starts is not None:
            begins = np.maximum(self._starts, check_starts(where, starts, self._lengths, ends))
            begins = begins if begins.any() else None
        if self._store is not None:
            self._store.check_writable(where)
        if geometry.window < 0 and most > geometry.capacity:
            at = int(ends.argmax())
            used, capacity = int(self._lengths[at]), geometry.capacity
            raise ValueError(f"{where}: {most - used} tokens after {used} are {most}, the capacity is {capacity}")
        return k, v, n, counts, Tokens(ends, least, most, begins, self._geometry.window == WHOLE)

    def _add(self, new: New) -> None:
        k, v, n, counts, tokens = new
        if self._geometry.window >= 0:
            if np.may_share_memory(k, self._k) or np.may_share_memory(v, self._v):
                k, v = k.copy(), v.copy()  # rows of the ring itself, which are about to be overwritten
            # first: whatever happens then, nobody reads what is overwritten
            np.maximum(self._reach, tokens.lengths, out=self._reach)
        if counts is None and self._least == self._most:
            self._write(self._k, self._v, k, v, self._most, n)
        else:
            many = [n] * len(self._lengths) if counts is None else counts.tolist()
            for b, (begin, n) in enumerate(zip(self._lengths.tolist(), many, strict=True)):
                self._write(self._k[b : b + 1], self._v[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], begin, n)
        if self._bounds is not None:
            self._bound(self._lengths, tokens.lengths)
        self._lengths, self._least, self._most, starts, _ = tokens
        if starts is not None:
            self._starts, self._padded = starts, True

    def _bound(self, begins: Array, ends: Array) -> None:
        """What is to be known of the tokens from `begins` to `ends`, which are stored."""
        assert self._bounds is not None
        for b, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
            for row, _, many in self._ring.pieces(begin, end - begin):
                at = slice(b, b + 1), slice(None), slice(row, row + many)
                self._bounds.take(at, self._k[at], self._v[at])

    def _bound_all(self) -> None:
        """The same of all rows, which are those of a file."""
        batch, capacity, *_, form = self._geometry
        if form.bounds:
            self._bounds = self._bounds or Bounds(form, batch, form.kv_heads, capacity)
            self._bound(np.zeros(batch, np.int64), np.minimum(self._reach, capacity))

    def _write(self, to_k: Array, to_v: Array, k: Array, v: Array, begin: int, n: int) -> None:
        """n tokens k and v to the rows of the tokens from `begin` on."""
        if self._geometry.window < 0:
            rows = slice(begin, begin + n)
            self._geometry.form.write(to_k[:, :, rows], to_v[:, :, rows], k, v)
            return
        for row, t, many in self._ring.pieces(begin, n):
            new = (k, v) if many == n else (k[:, :, t : t + many], v[:, :, t : t + many])
            self._geometry.form.write(to_k[:, :, row : row + many], to_v[:, :, row : row + many], *new)

    @documented
    def attend(
        self,
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
        """Attention of the newest tokens' queries over all that is stored.

        Append the tokens first: the last query is that of the last token. What is not said here is as in `attention`.

        Parameters
        ----------
        <newest_q>
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
            For a ring: not further to the left than its own window, which is the default. Nor have an encoder's tokens
            one, or ALiBi.
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
        out : ndarray, shape (batch, Hq, L, value_dim)
            In q's type.
        lse : ndarray, shape (batch, Hq, L)
            Only with ``return_lse=True``; with `tolerance` that of the keys that were read.
        left : ndarray, shape (batch, Hq, L)
            Only with `tolerance`: the share of its weights, float32, that a query has left out at most. 0 everywhere
            where all keys were read: the result then has the bits of a call without it.
        read : float
            Only with `tolerance`: the share of all keys that was read.

        Raises
        ------
        TypeError
            Arguments of the wrong kind.
        ValueError
            Shapes that do not fit, more queries than a sequence has tokens where positions matter (without any token
            it gives zeros), or queries whose window reaches back to tokens that a ring no longer has.

        Notes
        -----
        With `tolerance` the scores of all keys are bounded by a copy of them in int8, and keys are left out whose
        weights together are proven to be small; ``|out - exact|`` is at most ``2 * left * largest_values`` beside what
        rounding does (of rows of int8 and int4, of what they hold). A bias, a mask, a window, ALiBi, sinks and a soft
        cap keep the proof; all query heads of a key head read the keys that one of them needs. A bias is read whole.
        Where keys or values are not finite, or a key head has more than 32 queries, all are read; so they are for
        beams, and by a ring that has gone around where there is more than one query, a mask, a bias or ALiBi. It pays
        where there are many keys and few hold the weight: to find out takes a good part of the time of attention, and
        the newest sixteenth of long sequences says whether it is tried at all. Most heads of encoders spread their
        weight too evenly. Memory of such a call stays for the next one: 4 bytes for each key and query row, 8 for each
        key and key head, and up to 16 MiB of rows that were read; `nbytes` does not count it.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(1, 2, 64, capacity=5000, window=4095, keep=4)
        >>> for _ in range(3):
        ...     token = np.ones((1, 2, 1, 64), "float32")
        ...     cache.append(token, token)
        ...     out = cache.attend(np.ones((1, 8, 1, 64), "float32"))
        >>> out.shape
        (1, 8, 1, 64)
        """
        if tolerance is not None:
            bounds = check_bounds("KVCache.attend", self._bounds, tree, q_positions)
            return attend_within(
                "KVCache.attend", self._held(), bounds, self._rows_of, tolerance, q, lengths, mask, bias, causal,
                window, alibi_slopes, sinks, softcap, scale, layout, return_lse, out, num_threads, words,
            )  # fmt: skip
        return attend_newest(
            "KVCache.attend", self._held(), q, lengths, mask, bias, causal, window, alibi_slopes, sinks, softcap, scale,
            layout, return_lse, out, num_threads, words, tree, q_positions,
        )  # fmt: skip

    @documented
    def step(
        self,
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
        """Append tokens and attend with their queries, in one call: `append(k, v)`, then `attend(q)`.

        What is checked is checked before anything is appended, and the cache is as it was where one fails.

        Parameters
        ----------
        <newest_q>
            Here those of the tokens of k and v.
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
            For a ring: not further to the left than its own window, which is the default.
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
        out : ndarray, shape (batch, Hq, L, value_dim)
            In q's type.
        lse : ndarray, shape (batch, Hq, L)
            Only with ``return_lse=True``; with `tolerance` that of the keys that were read.
        left, read
            Only with `tolerance`, as `attend` gives them.

        Raises
        ------
        TypeError, ValueError, OverflowError, MemoryError
            As of `append` and `attend`. What ends a call later (no memory for its work, Ctrl-C) takes the new tokens
            back; a ring has then lost what they overwrote, as after `truncate`.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> rng = np.random.default_rng(0)
        >>> cache = qkv_fast.KVCache(2, 4, 64, capacity=100)
        >>> for _ in range(3):
        ...     q, (k, v) = rng.standard_normal((2, 8, 1, 64)), rng.standard_normal((2, 2, 4, 1, 64), dtype="float32")
        ...     out = cache.step(q.astype("float32"), k, v)
        >>> out.shape, cache.lengths
        ((2, 8, 1, 64), array([3, 3]))
        """
        where = "KVCache.step"
        new = _, _, n, counts, tokens = self._check_new(where, k, v, lengths, starts, layout)
        form, _, find, limit, keep = self._held(tokens)

        def found(*asked: Any) -> Keys:
            keys = find(*asked)  # or an error
            if self._lengths is not tokens.lengths:
                self._add(new)
            return keys

        before = self._before()
        try:
            if tolerance is not None:
                bounds = check_bounds(where, self._bounds, tree, q_positions)
                return attend_within(
                    where, (form, tokens, found, limit, keep), bounds, self._rows_of, tolerance, q, counts, mask, bias,
                    causal, window, alibi_slopes, sinks, softcap, scale, layout, return_lse, out, num_threads, words, n,
                )  # fmt: skip
            return attend_newest(
                where, (form, tokens, found, limit, keep), q, counts, mask, bias, causal, window, alibi_slopes, sinks,
                softcap, scale, layout, return_lse, out, num_threads, words, tree, q_positions, n,
            )  # fmt: skip
        except BaseException:  # Ctrl-C among them
            self._take_back(before)
            raise

    def _before(self) -> tuple[Array, int, int, Array, bool]:
        """For `_take_back`, should what is now to be done fail."""
        return self._lengths, self._least, self._most, self._starts, self._padded

    def _take_back(self, before: tuple[Array, int, int, Array, bool]) -> None:
        """As it was, but for what new tokens have overwritten in a ring."""
        self._lengths, self._least, self._most, self._starts, self._padded = before

    def _ask(self, where: str, q: Any, *arguments: Any, values: bool = False) -> Problem:
        return ask_newest(where, self._held(), q, *arguments, values=values)

    def _held(self, soon: Tokens | None = None) -> Held:
        """What it has, or what it will have with more tokens."""
        _, _, window, keep, form = self._geometry
        tokens = soon
        if tokens is None:
            starts = self._starts if self._padded else None
            tokens = Tokens(self._lengths, self._least, self._most, starts, window == WHOLE)
        if window < 0:
            k, v = self._k[:, :, : tokens.most], self._v[:, :, : tokens.most]
            return form, tokens, lambda *_: Keys(k, v), None, 0
        reach = self._reach if soon is None else np.maximum(self._reach, soon.lengths)
        begins = self._starts if tokens.starts is None else tokens.starts
        return form, tokens, lambda *asked: self._find(tokens.lengths, reach, begins, *asked), window, keep

    def _rows_of(self, p: Problem, tokens: Tokens, queries: Any) -> Stored | None:
        """Where `tolerance` finds what the queries see, in order; None where a ring's does not lie so."""
        assert self._bounds is not None
        known = self._k if self._bounds.rows is None else self._bounds.rows
        stored = Stored(self._k, self._v, known, self._bounds.steps, tokens, p.left, p.right)
        if p.left is None or self._geometry.window < 0 or tokens.most - 1 <= p.left:
            return stored
        own = p.extras
        plain = own is None or own.mask is own.bias is own.slopes is own.starts is own.queries is None
        if p.rows[2] != 1 or not plain or tokens.least < 1:
            return None
        rows, seen = self._ring.seen(tokens.lengths, p.left)
        tokens = Tokens(seen, int(seen.min()), int(seen.max()))
        return stored._replace(row_of=rows, tokens=tokens, left=None, right=None)

    def _find(
        self, lengths: Array, reach: Array, starts: Array, where: str, left: int, queries: Any, join: bool
    ) -> Keys:
        """Of a ring."""
        ring, steps = self._ring, [(x.strides[0], x.strides[2]) for x in (self._k, self._v)]
        many = [queries] * len(lengths) if isinstance(queries, int) else queries.tolist()
        laps = ring.laps(where, lengths, reach, starts, many, left)
        if join:
            return Keys(self._k, self._v, *ring.joined(lengths, left, steps))
        last = self._laps
        if last is None or last[0] != laps:
            self._laps = last = laps, Keys(self._k, self._v, *ring.runs(laps, steps))
        return last[1]

    def truncate(self, n: Any) -> None:
        """Forget the tokens of each sequence from number `n` on.

        Parameters
        ----------
        n : int or array_like of int, shape (batch,)
            Tokens that stay: at most as many as there are.

        Raises
        ------
        TypeError
            Not integers.
        ValueError
            A number out of range; or, of a ring, one whose window has been overwritten. The cache is then as it was.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(2, 1, 8, capacity=10)
        >>> cache.append(np.zeros((2, 1, 6, 8), "float32"), np.zeros((2, 1, 6, 8), "float32"))
        >>> cache.truncate([6, 2])
        >>> cache.lengths
        array([6, 2])
        """
        where = "KVCache.truncate"
        batch, _, window, keep, _ = self._geometry
        stay = _per_sequence(where, "n", n, (batch,)).copy()
        if (wrong := (stay < 0) | (stay > self._lengths)).any():
            at = int(wrong.argmax())
            raise ValueError(f"{where}: n must be in 0..{self._lengths[at]} for sequence {at}, got {stay[at]}")
        if self._store is not None:
            self._store.check_writable(where)
        if window >= 0:
            if (lost := self._ring.lost(stay, self._lengths, self._reach, window)).any():
                at = int(lost.argmax())
                begin = max(int(stay[at]) - window, keep)
                held = f"of sequence {at} the ring holds the tokens from {self._reach[at] - self._ring.size} on"
                raise ValueError(f"{where}: the window of token {stay[at]} begins at {begin}, {held}")
            self._reach = np.where(stay <= keep, stay, self._reach)  # nothing of the ring is left to be overwritten
        if self._store is not None:
            self._store.withdraw(np.minimum(self._store.lengths, stay))
        self._set_lengths(stay)

    def select(self, n: Any, index: Any, lengths: Any = None) -> None:
        """Keep the first `n` tokens of each sequence, and some of those after them, as the draft that is accepted.

        Parameters
        ----------
        n : int or array_like of int, shape (batch,)
            Tokens that stay where they are: at most as many as there are.
        index : array_like of int, shape (m,) or (batch, m)
            The tokens that follow them, counted from `n`: in any order, each once.
        lengths : int or array_like of int, optional
            How many of the m each sequence takes: its first ones. All by default.

        Raises
        ------
        TypeError
            Not integers.
        ValueError
            A number out of range, or twice in a sequence; or, of a ring, tokens that have been overwritten, also
            those of the window of token `n`. The cache is then as it was.

        See Also
        --------
        truncate : Without the others.

        Notes
        -----
        Rows are moved as they are stored: nothing is quantised again. Whoever turns keys by their positions
        (rotary embeddings) must have given those of a draft the positions that they are to have.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(1, 1, 1, capacity=10)
        >>> tokens = np.arange(6, dtype="float32").reshape(1, 1, 6, 1)
        >>> cache.append(tokens, tokens)  # two tokens, and four of a draft
        >>> cache.select(2, [0, 3])
        >>> cache.keys.ravel()
        array([0., 1., 2., 5.], dtype=float32)
        """
        where = "KVCache.select"
        batch, _, window, keep, _ = self._geometry
        stay = _per_sequence(where, "n", n, (batch,))
        if (wrong := (stay < 0) | (stay > self._lengths)).any():
            at = int(wrong.argmax())
            raise ValueError(f"{where}: n must be in 0..{self._lengths[at]} for sequence {at}, got {stay[at]}")
        chosen = check_index(where, index, batch, lengths)
        for b, (own, first, length) in enumerate(zip(chosen, stay.tolist(), self._lengths.tolist(), strict=True)):
            check_chosen(where, own, first, length, b)
            if len(own) and first < self._starts[b]:
                known = f"sequence {b} begins at token {self._starts[b]}"
                raise ValueError(f"{where}: {known}, n must not be less, got {first}")
        if self._store is not None:
            self._store.check_writable(where)
        tokens = [own + first for own, first in zip(chosen, stay, strict=True)]
        if window >= 0:
            lost = self._ring.lost(stay, self._lengths, self._reach, window)
            for b, own in enumerate(tokens):
                if lost[b] or ((own >= keep) & (own < self._reach[b] - self._ring.size)).any():
                    held = f"the ring holds the tokens from {self._reach[b] - self._ring.size} on"
                    raise ValueError(f"{where}: sequence {b} would lack tokens, {held} (n={stay[b]})")
        moved = [[x[b][:, self._ring.rows(own)] for x in self._arrays] for b, own in enumerate(tokens)]
        if self._store is not None:
            self._store.withdraw(np.minimum(self._store.lengths, stay))
        ends = stay + [len(own) for own in tokens]
        for b, new in enumerate(moved):
            rows = self._ring.rows(np.arange(stay[b], ends[b]))
            for x, those in zip(self._arrays, new, strict=True):
                x[b][:, rows] = those
        if window >= 0:
            self._reach = np.where(stay <= keep, stay, self._reach)
        self._starts = np.minimum(self._starts, stay)
        self._set_lengths(ends)

    def reorder(self, index: Any, *, start: Any = 0) -> None:
        """Replace the sequences: the new sequence b is the old ``index[b]``, as beam search wants it.

        Parameters
        ----------
        index : array_like of int, shape (n,)
            Numbers of sequences, in any order, also several times. There are n sequences then: fewer leave the memory
            as it is, more take new memory for all of them.
        start : int or array_like of int, shape (n,)
            Tokens that the old sequences b and ``index[b]`` have in common, as beams have their prompt: they are not
            copied, and not compared.

        Raises
        ------
        TypeError
            Not integers.
        ValueError
            Another shape, numbers outside 0..batch - 1, or a start beyond one of the two sequences; of a cache in a
            file, another number of sequences. The cache is then as it was.
        MemoryError
            No memory for more sequences. The cache is then as it was.

        See Also
        --------
        PagedKVCache.reorder : Without copies.

        Notes
        -----
        Sequences that change are copied, within the cache's own memory. What ends that (Ctrl-C) leaves them empty; in a
        file they are empty until the next `flush`, should the process end.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(1, 1, 1, capacity=10)
        >>> prompt = np.array([1, 2], "float32").reshape(1, 1, 2, 1)
        >>> cache.append(prompt, prompt)
        >>> cache.reorder([0, 0, 0])  # three beams
        >>> cache.append(*np.arange(3, 9, dtype="float32").reshape(2, 3, 1, 1, 1))
        >>> cache.reorder([2, 1, 2], start=2)
        >>> cache.keys.reshape(3, 3)
        array([[1., 2., 5.],
               [1., 2., 4.],
               [1., 2., 5.]], dtype=float32)
        """
        where = "KVCache.reorder"
        batch = self._geometry.batch
        given = _as_array("index", index, where)
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(f"{where}: index must be integers, got {given.dtype}")
        if given.ndim != 1 or not given.size:
            raise ValueError(f"{where}: index must have the shape (n,), one per new sequence, got {given.shape}")
        if (wrong := (given < 0) | (given >= batch)).any():
            raise ValueError(f"{where}: index must be in 0..{batch - 1}, got {given[wrong][0]}")
        order = given.astype(np.int64)
        if self._store is not None:
            self._store.check_writable(where)
            if order.size != batch:
                raise ValueError(f"{where}: a file is of {batch} sequences, index has {order.size}")
        common = _per_sequence(where, "start", start, order.shape)
        least = self._lengths[order]
        least[:batch] = np.minimum(least[:batch], self._lengths[: order.size])
        if (wrong := (common < 0) | (common > least)).any():
            at = int(wrong.argmax())
            both = f"the new sequence {at} and the old {order[at]} have in common"
            raise ValueError(f"{where}: start must be in 0..{least[at]}, of what {both}, got {common[at]}")
        self._move(order, common)

    def _move(self, order: Array, common: Array) -> None:
        batch, n = self._geometry.batch, order.size
        changed = order != np.arange(n)
        ends = (self._reach if self._geometry.window >= 0 else self._lengths)[order]
        more = n > batch
        if more:
            form = self._geometry.form
            k, v = form.empty(n, form.kv_heads, self._geometry.capacity)
            known = None if self._bounds is None else Bounds(form, n, form.kv_heads, self._geometry.capacity)
            rows = self._used()
            for to, x in zip(self._stored(k, v, known), self._arrays, strict=True):
                for b, source in enumerate(order.tolist()):
                    to[b, :, rows] = x[source, :, rows]
        else:
            k, v = self._k[:n], self._v[:n]
            known = None if self._bounds is None else self._bounds.first(n)
            if self._geometry.window >= 0:  # only where rows hold the same tokens are those in common the same rows
                common = np.where(self._reach[:n] == ends, common, 0)
            moves = Moves(order.tolist(), [
                [slice(row, row + many) for row, _, many in self._ring.pieces(begin, end - begin)]
                for begin, end in zip(common.tolist(), ends.tolist(), strict=True)
            ])  # fmt: skip
            spare = [moves.spare(x) for x in self._arrays]  # before: memory that is not there changes nothing
            if self._store is not None:
                self._store.withdraw(np.where(changed, 0, self._store.lengths))
            try:
                for x, room in zip(self._arrays, spare, strict=True):
                    moves.apply(x, room)
            except BaseException:  # Ctrl-C among them
                changed = np.concatenate([changed, np.zeros(batch - n, bool)])
                self._reach = np.where(changed, 0, self._reach)
                self._set_lengths(np.where(changed, 0, self._lengths))
                raise
        if known is not None and self._bounds is not None:
            known.largest = self._bounds.largest[order]
        self._k, self._v, self._bounds = k, v, known
        self._geometry = self._geometry._replace(batch=n)
        self._laps = None
        self._reach, self._starts = self._reach[order], self._starts[order]
        self._padded = bool(self._starts.any())
        self._set_lengths(self._lengths[order])

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False) -> Self:
        """A cache in a file, in place: a memory map with the tokens of the last `flush`.

        Parameters
        ----------
        path : str or path-like
            What `path` or `save` made.
        writable : bool, default False
            Whether to change it. One process at a time may, while others read; a ring cannot be changed in a file.

        Returns
        -------
        KVCache
            If not `writable`, one whose `append`, `truncate`, `reorder` and `flush` are a ValueError.

        Raises
        ------
        OSError
            A file that cannot be opened, for writing if `writable`.
        ValueError
            No file of a cache, one of another version, or one that is truncated or damaged. It is not touched. If
            `writable`, one that is open for writing already (on POSIX systems).

        Notes
        -----
        A reader has the tokens that were there when it opened the file. Should the writer cut some of them off, or
        reorder sequences, and write others in their place, the reader sees these.

        A file that becomes shorter while it is open ends the process: that is what memory maps do.

        Examples
        --------
        >>> import os, tempfile
        >>> import qkv_fast
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "chat.kv")
        ...     cache = qkv_fast.KVCache(1, 2, 64, capacity=10, path=path)
        ...     cache.flush()
        ...     reader = qkv_fast.KVCache.open(path)
        ...     del cache, reader  # systems without POSIX keep open files from being deleted
        """
        store = Store("KVCache.open", path, bool(writable))
        if writable and store.geometry.window >= 0:
            del store  # and its lock
            raise ValueError(f"KVCache.open: a ring is not written in place; load() it ({os.fspath(path)!r})")
        cache = cls.__new__(cls)
        cache._take(store.geometry, store)
        return cache

    def flush(self) -> None:
        """Write what has been appended to the file, and then say in it that it is there.

        Whatever happens to the process afterwards, the file opens with these tokens. A cache in memory has nothing to
        flush.

        Raises
        ------
        ValueError
            A cache that was opened for reading.
        OSError
            The disk does not take it.

        Notes
        -----
        `truncate` and `reorder` withdraw from the file at once what they make invalid: tokens that are cut off, and
        sequences that change.

        Examples
        --------
        >>> import qkv_fast
        >>> qkv_fast.KVCache(1, 2, 64, capacity=10).flush()
        """
        if self._store is not None:
            self._store.check_writable("KVCache.flush")
            self._store.commit(self._lengths, self._lengths, self._starts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a copy of the cache to a file, over what is there.

        Parameters
        ----------
        path : str or path-like
            For `load` and `open`. The cache's own file is flushed instead.

        Raises
        ------
        OSError
            A file that cannot be written. What was there is then as it was.
        ValueError
            The file that the cache was opened from for reading, or one that another cache writes to.

        Examples
        --------
        >>> import os, tempfile
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(1, 2, 64, capacity=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache.save(os.path.join(folder, "chat.kv"))
        ...     again = qkv_fast.KVCache.load(os.path.join(folder, "chat.kv"))
        >>> again
        KVCache(batch=1, kv_heads=2, head_dim=64, capacity=10, dtype='float32', lengths=[0])
        """
        rows = self._used()
        reach = self._reach if self._geometry.window >= 0 else self._lengths
        if self._store is not None and self._store.is_at(path):
            self._store.check_writable("KVCache.save")
            self.flush()
            return
        files.check_free("KVCache.save", path)
        with files.creating(path, self._geometry, over=True) as new:
            store = Store("KVCache.save", new, True)
            for to, x in zip(store.arrays, self._geometry.form.parts(self._k, self._v), strict=True):
                to[:, :, rows] = x[:, :, rows]
            store.commit(self._lengths, reach, self._starts)
            del to, store  # all that maps the file, which is then given its name

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """A cache in memory from a file that `save` or `path` made.

        Parameters
        ----------
        path : str or path-like
            The file.

        Returns
        -------
        KVCache
            As it was saved or last flushed.

        Raises
        ------
        OSError, ValueError
            As `open`.
        MemoryError
            No memory for it.

        Examples
        --------
        See `save`.

        >>> import qkv_fast
        >>> qkv_fast.KVCache.load("absent.kv")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'absent.kv'
        """
        store = Store("KVCache.load", path, False)
        cache = cls.__new__(cls)
        cache._take(store.geometry, None)
        cache._reach = store.reach.copy()
        cache._starts, cache._padded = store.starts.copy(), bool(store.starts.any())
        cache._set_lengths(store.lengths.copy())
        rows = slice(min(int(cache._reach.max()), store.geometry.capacity))
        for to, x in zip(store.geometry.form.parts(cache._k, cache._v), store.arrays, strict=True):
            to[:, :, rows] = x[:, :, rows]
        cache._bound_all()
        return cache
