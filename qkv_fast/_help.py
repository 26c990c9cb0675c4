"""The help of arguments, written once: a line `<name>` in a docstring stands for the entry of that name.

What follows such a line, indented as its text, is what only that function says of it. A last parameter `**words`, which
takes what no parameter is called only to say so, is left out of signatures.
"""

from types import FunctionType
from typing import Any, TypeVar

_F = TypeVar("_F")
_TAKES_MORE, _TAKES_WORDS = 0x04, 0x08  # inspect.CO_VARARGS, CO_VARKEYWORDS

_ENTRIES = """
q : array_like, shape (..., Hq, Lq, D)
    Queries, float16, bfloat16 (of ml_dtypes), float32 or float64; D up to 1024. Or (Lq, D), if all arrays are 2-D.
k : array_like, shape (..., Hkv, Lk, D)
    Keys, of q's type or a narrower one; float16 and bfloat16 do not mix. ``Hq`` is a multiple of ``Hkv``; query
    head h reads key head ``h // (Hq // Hkv)`` (grouped-query attention).
v : array_like, shape (..., Hkv, Lk, Dv)
    Values, of k's type. k and v have as many axes as q, or 3 for all sequences; those left of the heads broadcast
    where they are 1. (B, L, E) is B heads of E elements: split heads by ``reshape(B, L, num_heads, -1)`` and pass
    ``layout="blhd"``.
mask : array_like of bool, optional
    True where a query may attend to a key, False where not. Up to 2 axes, (Lq, Lk) or what broadcasts to
    it: the same for all sequences and heads. Or as many axes as the scores have, (..., Hq, Lq, Lk), with 1
    where it broadcasts; a (B, Lk) mask of keys is ``mask[:, None, None]``. Any strides, never copied whole.
    Where a tile of keys is hidden from all of its queries, keys and values are not even read.
bias : array_like, optional
    Of any of these types, added to the scaled (and capped) scores; -inf excludes, as False in a mask does.
    Axes as of `mask`; any strides and byte order, never copied whole.
causal : bool or "top-left"
    Exclude the keys after the query's position. ``"top-left"`` also sets `q_offset` to 0.
window : int or (left, right), optional
    Keep the keys from `left` before to `right` after the query's position, both inclusive; None on a side
    leaves it open. An int w is (w, w), or (w, 0) when causal, so that a causal w sees w + 1 keys: a model
    whose "sliding window" of 4096 counts the query itself is ``window=4095`` here.
q_offset : int or array_like of int, optional
    Query i sits at position ``i + q_offset``; one offset, or one per sequence. By default query i sits at
    ``i + n - Lq``, where n is the sequence's `kv_lengths` or Lk: the last query sees the last key.
q_positions : array_like of int, shape (Lq,) or (..., Lq), optional
    Where each query sits, instead of `q_offset`: a key's index is its own position, and `causal`, `window` and
    `alibi_slopes` go by the two. In any order, with gaps, the same position twice; within ±2**60.
q_lengths : int or array_like of int, optional
    Number of queries of each sequence, 0 to Lq, as of `kv_lengths`. Those at or past it see nothing and cost nothing;
    the others get what the sequence gives alone, to the last bit: query i sits at ``i + n - q_lengths``.
kv_lengths : int or array_like of int, optional
    Number of keys of each sequence, 0 to Lk; one for all, or one per sequence (it broadcasts to the axes
    left of the heads). Keys and values at or past it are never read. With `causal`, `window` or
    `alibi_slopes` and fewer keys than queries, but some, say where the queries sit: with `q_lengths` for padded
    ones, or with `q_offset`; that call is a ValueError without.
kv_starts : int or array_like of int, optional
    The first key of each sequence, 0 to its number of keys, as of `kv_lengths`: those before it (left padding) are
    never read. Positions stay: the last query sees the last key, and padded queries of a causal call see none.
segments : (q_ids, k_ids), optional
    Integers of shapes (..., Lq) and (..., Lk), whose leading axes broadcast to those left of the heads. A
    query attends only to keys with its own id: documents packed into one sequence, for example. In any
    order; whole tiles of keys are skipped where equal ids follow one another.
alibi_slopes : array_like, shape (Hq,), optional
    Per query head: adds ``-slope * abs(position - key)`` to the scaled scores, the position being that of
    `causal`. The function `qkv_fast.alibi_slopes` has the usual slopes.
sinks : array_like, shape (Hq,), optional
    Per query head: the logit of one more key that has no value, so that the weights of the keys sum to less
    than 1. Finite or -inf (none); neither scaled nor capped.
softcap : float, optional
    Scaled scores s become ``softcap * tanh(s / softcap)``, before anything is added; greater than 0.
scale : float, optional
    Factor of the scores, any finite number; ``1 / sqrt(D)`` by default (1 for D = 0).
layout : {"bhld", "blhd"}, default "bhld"
    ``"blhd"`` swaps the head and length axes: (..., L, H, D) instead of (..., H, L, D).
lse : array_like, shape (..., Hq, Lq), optional
    The log-sum-exp that `qkv_fast.attention` returns for the same arguments: it saves a pass. One that does not
    belong to them cannot be seen from its shape: weights are then what ``exp(score - lse)`` is, above 1 too.
return_lse : bool, default False
    Return the natural log-sum-exp of each row's scores as well.
out : ndarray, or an array of another library, optional
    Where to write the result, and what is returned: its exact shape and type (or float32 instead of 16 bits), any
    strides. It may overlap an input.
num_threads : int, optional
    Threads for this call; see `get_num_threads` for the default.
dout : array_like, shape (..., Hq, Lq, Dv)
    The gradient of `attention`'s result, of its shape and type, or float32 instead of 16 bits.
given_out : array_like, shape (..., Hq, Lq, Dv)
    That result, in q's type, or in float32 instead of 16 bits.
given_lse : array_like, shape (..., Hq, Lq)
    The log-sum-exp that `attention` returns beside it. Neither can be seen not to belong to these arguments but by its
    shape and type.
dlse : array_like, shape (..., Hq, Lq), optional
    The gradient of the log-sum-exp, of its type; none by default.
want : tuple of {"q", "k", "v", "bias", "sinks", "slopes"}, default ("q", "k", "v")
    The arguments whose gradients are returned.
layer_x : array_like, shape (..., n_in)
    float16, bfloat16 (of ml_dtypes), float32 or float64.
layer_w : array_like, shape (n_out, n_in)
    Weights: float64 for an x of float64, otherwise of any other type.
layer_b : array_like, shape (n_out,), optional
    What is added, of any type that x may have, but float64 only with that.
cu_seqlens_q, cu_seqlens_k : array_like of int, shape (N + 1,)
    Where the sequences begin: sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``, exclusive, and
    its keys likewise. From 0 to Tq and Tk; a sequence may be empty.
new_k : array_like, shape (batch, kv_heads, L, head_dim)
    Keys of L tokens per sequence, of the cache's type, float32 or narrower (lists become float64); of any
    type that `attention` takes for int8 and int4. What a narrower type cannot hold becomes infinite in it.
new_v : array_like, shape (batch, kv_heads, L, value_dim)
    Their values; left out where these are latent.
new_lengths : int or array_like of int, optional
    How many of the L tokens each sequence gets: its first ones. All by default.
new_starts : int or array_like of int, optional
    How many of the tokens are padding, which no query sees: the first ones of a sequence that is empty (prompts that
    are padded on the left). 0 by default.
newest_q : array_like, shape (batch, Hq, L, head_dim)
    Queries, of the cache's type or a wider one, any for int8 and int4; ``Hq`` is a multiple of the key
    heads. Of an encoder's cache (``causal=False``) r times as many sequences, too: number b r to b r + r - 1 read its
    sequence b, once for all of them in `attend`.
newest_lengths : int or array_like of int, optional
    How many of the L queries each sequence has, where they differ: its first ones, at its last tokens; the bits are
    those of so many queries. The results of the others are 0.
tree : array_like of bool, shape (L, L) or (batch, L, L), optional
    Which of the newest tokens, who are the queries, sees which of them: a draft that branches. All older tokens are
    seen, and `causal` says nothing. Not beside `mask`; where `lengths` differ, its first rows and columns count.
tree_positions : array_like of int, shape (L,) or (batch, L), optional
    With `tree`: where its tokens sit, as queries and as keys, for `window` and `alibi_slopes`: those of one depth at
    one position, the number of older tokens plus their depth. Older tokens sit at their index. By default the tokens of
    a draft sit one after the other.
tolerance : float, optional
    Of a cache with `bounds`: leave out keys that hold at most this share of all weights of each query, above 0 and
    below 1, and say so. Not with `tree`.
newest_asked_lengths : int or array_like of int, optional
    How many of the L queries each sequence has, where they differ: its first ones, at its last tokens. The others
    see nothing.
"""
# Entries that go together.
_ASKED = """
<newest_asked_lengths>
<tree>
<tree_positions>
<mask>
    Here Lq is L, and Lk the tokens of the longest sequence.
<bias>
<causal>
    True by default, and here not "top-left": a query sees no token after its own.
<window>
    For a `KVCache` that is a ring: not further to the left than its own window, which is the default.
<alibi_slopes>
<sinks>
<softcap>
<scale>
<layout>
    It is that of q.
<num_threads>
"""


def _split(text: str) -> dict[str, list[str]]:
    entries: dict[str, list[str]] = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            name, _, kind = line.partition(" : ")
            lines = entries[name.partition(",")[0]] = []
            shown = name.rpartition("_")[2] if name.startswith(("new", "given", "layer_")) else name
            shown = "q_positions" if name == "tree_positions" else shown
            line = f"{shown} : {kind}"
        lines.append(line)
    return entries


_HELP = _split(_ENTRIES)


def _written(text: str) -> list[str]:
    """The lines of a docstring, with the entries that its lines `<name>` stand for."""
    lines = []
    for line in text.splitlines():
        if line.endswith(">") and (name := line.lstrip()).startswith("<"):
            indent = line[: -len(name)]
            lines += [indent + entry for entry in _HELP[name[1:-1]]]
        else:
            lines.append(line)
    return lines


_HELP["asked"] = _written(_ASKED.strip())


def documented(function: _F) -> _F:
    """The function, with entries for `<name>` in its docstring and without `**words` in its signature."""
    f: Any = function
    f.__doc__ = "\n".join(_written(f.__doc__ or "")) or None  # none with python -OO
    code = f.__code__
    last = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & _TAKES_MORE)
    if code.co_flags & _TAKES_WORDS and code.co_varnames[last] == "words":
        # inspect looks at what a function wraps: the same without **words. Signature objects would cost 1 ms of import.
        shown = FunctionType(code.replace(co_flags=code.co_flags & ~_TAKES_WORDS), {})
        for name in ("__kwdefaults__", "__defaults__", "__doc__", "__module__", "__qualname__"):
            setattr(shown, name, getattr(f, name))
        shown.__annotations__ = {name: kind for name, kind in f.__annotations__.items() if name != "words"}
        f.__wrapped__ = shown
    return function
