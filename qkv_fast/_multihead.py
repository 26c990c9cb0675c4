"""Multi-head attention with its projections: an input in, an output of the same width out."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from . import _core
from ._attention import attention
from ._checks import Array, _as_array, _check_count, _fail_shapes, _per_sequence
from ._layers import Linear, _check_added
from ._masks import check_starts
from ._rope import Rotation
from ._varlen import attention_varlen
from .cache import KVCache, PagedKVCache

_WHERE = "MultiHeadAttention"


class _Family(NamedTuple):
    """The names that a family of models gives the weights of a layer. A bias has that of its weight with "bias" for
    "weight"."""

    parts: tuple[str, ...]  # what makes queries, keys and values, in one or three parts
    out: str
    biases: str = ""  # those of all three parts
    turned: bool = False  # weights are (n_in, n_out)
    idle: str = ""  # a pattern of what stands among them and is not used: causal masks, norms before or behind
    frequencies: str = ""  # of rotary positions


_FAMILIES = {
    "torch.nn.MultiheadAttention": _Family(("in_proj_weight",), "out_proj.weight"),
    "torch.nn.MultiheadAttention with kdim": _Family(
        ("q_proj_weight", "k_proj_weight", "v_proj_weight"), "out_proj.weight", biases="in_proj_bias"
    ),
    "BERT and ESM": _Family(
        ("self.query.weight", "self.key.weight", "self.value.weight"), "output.dense.weight",
        idle=r"(output\.)?LayerNorm\..*", frequencies="self.rotary_embeddings.inv_freq",
    ),
    "GPT-2": _Family(("c_attn.weight",), "c_proj.weight", turned=True, idle=r"bias|masked_bias"),
    "Llama": _Family(
        ("q_proj.weight", "k_proj.weight", "v_proj.weight"), "o_proj.weight", frequencies="rotary_emb.inv_freq"
    ),
    "Whisper": _Family(("q_proj.weight", "k_proj.weight", "v_proj.weight"), "out_proj.weight"),
}  # fmt: skip


class MultiHeadAttention:
    """Attention with its projections: queries of an input, keys and values of it or of another, heads, and the output.

    Weights are kept packed, as in `Linear`: on the CPU path of that time, as float32 (float64 for float64).

    Parameters
    ----------
    q, k, v, out : array_like or (array_like, array_like)
        Weights, as of `linear`, or (weights, bias), of one type: (num_heads * D, n), twice (num_kv_heads * D, m) and
        (n_out, num_heads * D). An input has n elements in a row, a memory m.
    num_heads : int
        Query heads.
    num_kv_heads : int, optional
        Key and value heads, which divide `num_heads`: as many by default.
    rope : mapping, optional
        Arguments of `rope`, of which {} is the default, for queries and keys. Without it positions are not put in.

    Attributes
    ----------
    num_heads, num_kv_heads : int
        Query heads; key and value heads.

    Raises
    ------
    TypeError
        An argument of the wrong kind: other element types, numbers of heads that are no integers, words that `rope`
        does not have.
    ValueError
        Shapes that do not fit each other or the heads; what `rope` refuses.

    See Also
    --------
    attention : What is between the projections.
    project_qkv : The first of them alone.

    Notes
    -----
    From A. Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> layer = qkv_fast.MultiHeadAttention(*rng.standard_normal((4, 8, 8)), num_heads=2, rope={})
    >>> x = rng.standard_normal((1, 5, 8))
    >>> seen = layer(x, causal=True)
    >>> cache = qkv_fast.KVCache(1, 2, 4, capacity=5, dtype="float64")
    >>> steps = [layer(x[:, i : i + 1], cache=cache) for i in range(5)]
    >>> np.allclose(np.concatenate(steps, axis=1), seen)
    True
    """

    __slots__ = ("_kv", "_num_heads", "_num_kv_heads", "_out", "_q", "_rope")

    def __init__(
        self, q: Any, k: Any, v: Any, out: Any, *, num_heads: int, num_kv_heads: int | None = None,
        rope: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        where = _WHERE
        self._num_heads = _check_count(where, "num_heads", num_heads)
        self._num_kv_heads = num_heads if num_kv_heads is None else _check_count(where, "num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{where}: num_kv_heads must divide num_heads, got {num_kv_heads} for {num_heads}")
        if rope is not None and not isinstance(rope, Mapping):
            raise TypeError(f"{where}: rope must be a dict of rope's arguments, got {type(rope).__name__}")
        if wrong := sorted(set(rope or ()) & {"x", "positions", "layout", "out", "num_threads"}):
            raise ValueError(f"{where}: rope says how positions are put in; {wrong[0]} is the call's")
        parts = {name: _pair(where, name, given) for name, given in (("q", q), ("k", k), ("v", v), ("out", out))}
        weights = {name: w for name, (w, _) in parts.items()}
        if len({w.dtype for w in weights.values()}) > 1:
            given = ", ".join(f"{name} {w.dtype}" for name, w in weights.items())
            raise TypeError(f"{where}: weights must be of one type, got {given}")
        rows, kv_rows = weights["q"].shape[0], weights["k"].shape[0]
        if rows % self.num_heads or rows // self.num_heads * self.num_kv_heads != kv_rows:
            heads = f"{self.num_heads} query and {self.num_kv_heads} key heads"
            _fail_shapes(where, f"the rows of q and k are not those of {heads} of one size", **weights)
        self._rope = None if rope is None else Rotation(rows // self.num_heads, **rope).kept()
        if weights["v"].shape != weights["k"].shape:
            _fail_shapes(where, "k and v must have one shape", **weights)
        if weights["out"].shape[1] != rows:
            _fail_shapes(where, f"out must take the {rows} elements of all heads", **weights)
        self._q, self._out = Linear(*parts["q"]), Linear(*parts["out"])
        (w_k, b_k), (w_v, b_v) = parts["k"], parts["v"]
        bias = None
        if b_k is not None or b_v is not None:
            none = np.zeros(kv_rows, w_k.dtype)
            bias = np.concatenate([none if b is None else b for b in (b_k, b_v)])
        self._kv = Linear(np.concatenate([w_k, w_v]), bias)

    @property
    def num_heads(self) -> int:
        """Query heads.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> qkv_fast.MultiHeadAttention(*np.ones((4, 8, 8)), num_heads=2).num_heads
        2
        """
        return self._num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> qkv_fast.MultiHeadAttention(*np.ones((4, 8, 8)), num_heads=2).num_kv_heads
        2
        """
        return self._num_kv_heads

    @classmethod
    def from_state(
        cls, weights: Mapping[str, Any], prefix: str = "", *, num_heads: int, num_kv_heads: int | None = None,
        rope: Mapping[str, Any] | None = None,
    ) -> "MultiHeadAttention":  # fmt: skip
        """A layer from a model's weights, by the names of torch, BERT, ESM, GPT-2, Llama or Whisper.

        Parameters
        ----------
        weights : mapping of str to array_like
            A model's weights, as safetensors' `load_file` returns them.
        prefix : str, default ""
            What the names of this layer begin with, such as "model.layers.0.self_attn". A dot behind it is added.
        num_heads : int
            Query heads.
        num_kv_heads : int, optional
            Key and value heads. By default what the rows of the keys' weights say.
        rope : mapping, optional
            As for the class. It must be given where the weights have frequencies of rotary positions, and unless it
            has a scaling or tables, its frequencies must be those.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        KeyError
            Weights that are missing, all of them by name.
        TypeError, ValueError
            As of the class; also weights that this layer has no use for, such as those of a norm of queries.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> state = {f"layers.0.{name}_proj.weight": np.eye(8) for name in "qkvo"}
        >>> qkv_fast.MultiHeadAttention.from_state(state, "layers.0", num_heads=2)(np.ones((1, 3, 8))).shape
        (1, 3, 8)
        """
        where = "MultiHeadAttention.from_state"
        _check_count(where, "num_heads", num_heads)
        if not isinstance(weights, Mapping) or not isinstance(prefix, str):
            kinds = f"{type(weights).__name__} and {type(prefix).__name__}"
            raise TypeError(f"{where}: weights must be a mapping of names to arrays, and prefix a str, got {kinds}")
        if odd := [name for name in weights if not isinstance(name, str)]:
            raise TypeError(f"{where}: names of weights must be str, got {odd[0]!r}")
        prefix = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
        here = {name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
        names = {family: (*of.parts, of.out) for family, of in _FAMILIES.items()}
        family = max(names, key=lambda known: sum(name in here for name in names[known]))
        missing = [prefix + name for name in names[family] if name not in here]
        if len(missing) == len(names[family]):
            known = "; ".join(f"{family}: {', '.join(all_of)}" for family, all_of in names.items())
            raise KeyError(f"{where}: no weights of a known name begin with {prefix!r}; known are {known}")
        if missing:
            raise KeyError(f"{where}: weights of {family} are missing: {', '.join(missing)}")
        of = _FAMILIES[family]
        used = {of.biases, of.frequencies, *names[family], *(_bias_of(name) for name in names[family])} - {""}
        if odd := sorted(prefix + name for name in here - used if not name or not re.fullmatch(of.idle, name)):
            raise ValueError(f"{where}: a layer with {', '.join(odd)} is more than projections and attention")
        if of.frequencies in here and rope is None:
            raise ValueError(f"{where}: {prefix}{of.frequencies} says that positions are rotary: pass rope=")

        def thirds(name: str, x: Array) -> list[Array]:
            if not x.ndim or len(x) % 3:
                _fail_shapes(where, f"{prefix}{name} must have three parts of one size, of q, k and v", **{name: x})
            return np.split(x, 3)

        def get(name: str) -> tuple[Array, Array | None]:
            w = _as_array(name, weights[prefix + name], where)
            bias = prefix + _bias_of(name)
            return w.T if of.turned else w, None if bias not in weights else _as_array(bias, weights[bias], where)

        if len(of.parts) == 1:
            w, b = get(of.parts[0])
            biases = [None] * 3 if b is None else thirds(_bias_of(of.parts[0]), b)
            q, k, v = zip(thirds(of.parts[0], w), biases, strict=True)
        else:
            q, k, v = map(get, of.parts)
            if of.biases in here:
                biases = thirds(of.biases, _as_array(of.biases, weights[prefix + of.biases], where))
                q, k, v = ((w, b) for (w, _), b in zip((q, k, v), biases, strict=True))
        if num_kv_heads is None:
            num_kv_heads = max(1, k[0].shape[0] * num_heads // max(1, q[0].shape[0]))
        layer = cls(q, k, v, get(of.out), num_heads=num_heads, num_kv_heads=num_kv_heads, rope=rope)
        if of.frequencies in here and layer._rope is not None:
            layer._rope.check_frequencies(where, prefix + of.frequencies, weights[prefix + of.frequencies])
        return layer

    def queries(self, x: Any, positions: Any = None, *, num_threads: int | None = None) -> Array:
        """Queries of an input, for questions about where they look.

        Parameters
        ----------
        x : array_like, shape (..., L, n)
            The input.
        positions : array_like of int, optional
            Of its tokens, as for `rope`.
        num_threads : int, optional
            As for `linear`.

        Returns
        -------
        ndarray, shape (..., L, num_heads, D)
            In layout "blhd", with the positions put in, as a call makes them.

        Raises
        ------
        TypeError, ValueError
            As `linear` and `rope`.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> layer = qkv_fast.MultiHeadAttention(*[np.eye(8)] * 4, num_heads=2)
        >>> x = 9 * np.eye(8)[:3]  # three tokens, of which each looks like itself alone
        >>> keys, values = layer.keys_values(x)
        >>> qkv_fast.spotlight.weights(layer.queries(x), keys, layout="blhd").mean(0).round(2)
        """
        return self._turn(self._heads("x", x, self._q, self.num_heads, num_threads), positions, num_threads)

    def keys_values(
        self, memory: Any, positions: Any = None, *, num_threads: int | None = None
    ) -> tuple[Array, Array]:
        """Keys and values of a memory, for many calls.

        Parameters
        ----------
        memory : array_like, shape (..., Lk, m)
            What is attended to.
        positions : array_like of int, optional
            Of its tokens, as for `rope`.
        num_threads : int, optional
            As for `linear`.

        Returns
        -------
        k, v : ndarray, shape (..., Lk, num_kv_heads, D)
            In layout "blhd", with the positions put in: a `memory` for calls.

        Raises
        ------
        TypeError, ValueError
            As `linear` and `rope`.
        """
        y = self._heads("memory", memory, self._kv, 2 * self.num_kv_heads, num_threads)
        k, v = y[..., : self.num_kv_heads, :], y[..., self.num_kv_heads :, :]
        return self._turn(k, positions, num_threads), v

    def __call__(
        self, x: Any, memory: Any = None, *, cache: Any = None, sequences: Any = None, starts: Any = None,
        positions: Any = None, num_threads: int | None = None, **options: Any,
    ) -> Array:  # fmt: skip
        """What the tokens of x make of those of x, of a memory or of a cache.

        Parameters
        ----------
        x : array_like, shape (..., L, n)
            The input; (T, n) of packed sequences, with `cu_seqlens_q` and `cu_seqlens_k` among the options.
        memory : array_like, shape (..., Lk, m), or (k, v), optional
            What is attended to instead of x, or what `keys_values` has made of it.
        cache : KVCache or PagedKVCache, optional
            To which keys and values of x, (batch, L, n), are appended, and to which x attends: causally, unless told
            otherwise. With ``lengths=`` among the options, sequence b has ``lengths[b]`` tokens of the L.
        sequences : sequence of int, optional
            With a PagedKVCache: the numbers of its sequences that x is of.
        starts : int or array_like of int, optional
            With a cache whose sequences are empty: how many of their first tokens are padding, as for its `append`.
        positions : array_like of int, optional
            Of the tokens of x, as for `rope`; for a layer without it they mean nothing. By default they begin at 0, or
            where a sequence of the cache ends, without its padding, or anew in each packed sequence.
        num_threads : int, optional
            As for `attention`.
        **options
            Arguments of `attention`, of `attention_varlen` with `cu_seqlens_q`, or of the cache's `attend`, but
            `layout`, `out` and `return_lse`.

        Returns
        -------
        ndarray, shape (..., L, n_out)
            In x's type.

        Raises
        ------
        TypeError, ValueError
            As `linear`, `rope` and `attention`; a memory beside a cache, or a cache that is none of ours. The cache is
            then as it was, but a ring may lack its oldest tokens.
        """
        where = _WHERE
        if own := [name for name in ("layout", "out", "return_lse") if name in options]:
            raise TypeError(f"{where}: {', '.join(own)} can't be given, since the output is one more product")
        if "tolerance" in options:
            raise TypeError(f"{where}: tolerance is for a cache's own attend, which says what was left out")
        if cache is not None and memory is not None:
            raise ValueError(f"{where}: memory and cache can't be given both; keys_values keeps those of a memory")
        x = _as_array("x", x, where)
        held = None
        if cache is not None:
            held = _held(cache, sequences, x)
        elif sequences is not None or starts is not None:
            raise ValueError(f"{where}: sequences and starts are those of a cache, and none is given")
        if positions is None and self._rope is not None:
            if held is not None:
                positions = _cached_positions(cache, sequences, held, starts, x)
            elif "cu_seqlens_q" in options and x.ndim > 1:
                positions = _packed_positions("cu_seqlens_q", options["cu_seqlens_q"], x)
        options["num_threads"] = num_threads
        if memory is None:
            q, k, v = self._own(x, positions, num_threads)
        else:
            q = self.queries(x, positions, num_threads=num_threads)
            if isinstance(memory, tuple):
                if len(memory) != 2:
                    raise ValueError(f"{where}: memory must be one array or (k, v), got a tuple of {len(memory)}")
                k, v = memory
                if {np.shape(y)[-2:-1] for y in memory} != {(self.num_kv_heads,)}:
                    rule = f"k and v must be of shape (..., Lk, {self.num_kv_heads}, D), as keys_values gives them"
                    raise ValueError(f"{where}: {rule} (k.shape={np.shape(k)}, v.shape={np.shape(v)})")
            else:
                memory, at = _as_array("memory", memory, where), None
                if self._rope is not None and "cu_seqlens_k" in options and memory.ndim > 1:
                    at = _packed_positions("cu_seqlens_k", options["cu_seqlens_k"], memory)
                k, v = self.keys_values(memory, at, num_threads=num_threads)
        if held is not None:
            given = () if sequences is None else (sequences,)
            before = cache._before() if sequences is None else cache._before(cache._check(where, sequences))
            try:
                seen: Array = cache.step(*given, q, k, v, starts=starts, layout="blhd", **options)
                return self._joined(seen, num_threads)
            except BaseException:  # Ctrl-C, or no memory for the output: then its tokens would stay
                cache._take_back(before)
                raise
        if "cu_seqlens_q" in options:
            return self._joined(attention_varlen(q, k, v, **options), num_threads)
        return self._joined(attention(q, k, v, layout="blhd", **options), num_threads)

    def _joined(self, seen: Array, num_threads: int | None) -> Array:
        """The output of what all heads see, (..., L, heads, D)."""
        *axes, heads, dim = seen.shape
        y = self._apply(self._out, seen.reshape(math.prod(axes), heads * dim), num_threads)
        return y.reshape(*axes, self._out.n_out)

    def _own(self, x: Array, positions: Any, num_threads: int | None) -> tuple[Array, Array, Array]:
        """Queries, keys and values of one input, side by side, so that positions are put in all at once."""
        rows, heads, kv_heads = self._input("x", x, self._q, self._kv), self.num_heads, self.num_kv_heads
        width = self._q.n_out
        y = _core.empty(_WHERE, (len(rows), width + self._kv.n_out), x.dtype.num)
        self._q._into(_WHERE, rows, y[:, :width], num_threads)
        self._kv._into(_WHERE, rows, y[:, width:], num_threads)
        y = y.reshape(*x.shape[:-1], heads + 2 * kv_heads, width // heads)
        self._turn(y[..., : heads + kv_heads, :], positions, num_threads)
        return y[..., :heads, :], y[..., heads : heads + kv_heads, :], y[..., heads + kv_heads :, :]

    def _heads(self, name: str, given: Any, layer: Linear, heads: int, num_threads: int | None) -> Array:
        """What a layer makes of (..., L, elements), as (..., L, heads, D)."""
        x = _as_array(name, given, _WHERE)
        y = self._apply(layer, self._input(name, x, layer), num_threads)
        return y.reshape(*x.shape[:-1], heads, layer.n_out // heads)

    @staticmethod
    def _apply(layer: Linear, rows: Array, num_threads: int | None) -> Array:
        """What a layer makes of rows that have been checked."""
        y = _core.empty(_WHERE, (len(rows), layer.n_out), rows.dtype.num)
        layer._into(_WHERE, rows, y, num_threads)
        return y

    def _input(self, name: str, x: Array, *layers: Linear) -> Array:
        """The rows of an input of these layers."""
        if x.ndim < 2:
            _fail_shapes(_WHERE, f"{name} must be of shape (..., length, elements)", **{name: x})
        for layer in layers:
            layer._check(_WHERE, name, x)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def _turn(self, x: Array, positions: Any, num_threads: int | None) -> Array:
        """x (..., L, heads, D) with its positions, where it lies."""
        if self._rope is not None:
            self._rope.turn(x, self._rope.check(x, positions, False), False, x, num_threads)
        return x

    def __repr__(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"MultiHeadAttention({self._q.n_in} -> {self._out.n_out}, {heads}{', rope' * (self._rope is not None)})"


def _packed_positions(name: str, starts: Any, x: Array) -> Array:
    """From 0 on in each of the packed sequences that x (tokens, elements) has."""
    begins, lengths, _ = check_starts(_WHERE, name, starts, x.shape[-2])
    positions: Array = np.arange(x.shape[-2]) - np.repeat(begins[:-1], lengths)
    return positions


def _held(cache: Any, sequences: Any, x: Array) -> Array:
    """The tokens that a cache has of each sequence of x."""
    where = _WHERE
    if not isinstance(cache, (KVCache, PagedKVCache)):
        raise TypeError(f"{where}: cache must be a KVCache or a PagedKVCache, got {type(cache).__name__}")
    if isinstance(cache, PagedKVCache):
        if sequences is None:
            raise ValueError(f"{where}: a PagedKVCache takes sequences=, the numbers of those that x is of")
        lengths: Array = cache.lengths(sequences)
    elif sequences is not None:
        raise ValueError(f"{where}: sequences are those of a PagedKVCache; a KVCache takes all of its own")
    else:
        lengths = cache.lengths
    if x.ndim != 3 or len(x) != len(lengths):
        _fail_shapes(where, f"with a cache of {len(lengths)} sequences x must be of shape ({len(lengths)}, L, n)", x=x)
    return lengths


def _cached_positions(cache: Any, sequences: Any, lengths: Array, starts: Any, x: Array) -> Array:
    """From where the sequences of a cache end, counted from their first token that is no padding, which is at 0."""
    positions: Array = lengths[:, None] + np.arange(x.shape[1])
    padding = cache.starts if sequences is None else cache.starts(sequences)
    if starts is not None:
        padding = np.maximum(padding, _per_sequence(_WHERE, "starts", starts, lengths.shape))
    own: Array = np.maximum(positions - padding[:, None], 0)
    return own


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _pair(where: str, name: str, given: Any) -> tuple[Array, Array | None]:
    """Weights and their bias, if there is one."""
    w, b = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    w = _as_array(name, w, where)
    if w.ndim != 2:
        _fail_shapes(where, f"the weights of {name} must be of shape (n_out, n_in)", **{name: w})
    return w, None if b is None else _check_added(where, b, w, f"the bias of {name}")
