"""Calls of every verb that takes arrays, for what may stand in an array's place: each is f(make), which hands all of
its arrays to `make` first; and of those that write to `out=`, the shape of that and f(make, out)."""

import numpy as np

import qkv_fast

_RNG = np.random.default_rng(5)
_SHAPES = (1, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6), (1, 4, 5, 6)
Q, K, V, DOUT = (_RNG.standard_normal(shape, dtype="float32") for shape in _SHAPES)
MASK, BIAS = Q @ K.repeat(2, 1).mT > 0, _RNG.standard_normal((5, 7), dtype="float32")
PACKED, STARTS = _RNG.standard_normal((9, 2, 8), dtype="float32"), np.array([0, 4, 9], np.int32)
OUT, LSE = qkv_fast.attention(Q, K, V, return_lse=True)
W, B = _RNG.standard_normal((24, 8), dtype="float32"), _RNG.standard_normal(24, dtype="float32")


def _cached(make):
    cache = qkv_fast.KVCache(1, 2, 8, 10, value_dim=6)
    cache.append(make(K), make(V))
    return cache.attend(make(Q[:, :, -2:]))


def _paged(make):
    pool = qkv_fast.PagedKVCache(2, 8, pages=4, page_size=16, value_dim=6)
    sequences = [pool.add()]
    pool.append(sequences, make(K), make(V))
    return pool.attend(sequences, make(Q[:, :, -2:]))


def _layer(make):
    weights = {
        "q_proj.weight": W[:8], "k_proj.weight": W[8:16], "v_proj.weight": W[16:], "o_proj.weight": W[:8],
    }  # fmt: skip
    layer = qkv_fast.MultiHeadAttention.from_state({name: make(w) for name, w in weights.items()}, "", num_heads=2)
    return layer(make(PACKED[:, 0]))


VERBS = {
    "attention": lambda make: qkv_fast.attention(make(Q), make(K), make(V), causal=True),
    "masks": lambda make: qkv_fast.attention(make(Q), make(K), make(V), mask=make(MASK), bias=make(BIAS)),
    "per head": lambda make: qkv_fast.attention(
        make(Q), make(K), make(V), alibi_slopes=make(B[:4]), sinks=make(B[4:8])
    ),
    "per sequence": lambda make: qkv_fast.attention(
        make(Q), make(K), make(V), causal=True, kv_lengths=make(np.array([6])), q_lengths=make(np.array([4])),
        segments=(make(np.arange(5)), make(np.arange(7))), q_offset=make(np.array(1)),
    ),
    "packed": lambda make: qkv_fast.attention_varlen(*(make(x) for x in (PACKED, PACKED, PACKED, STARTS, STARTS))),
    "gradients": lambda make: qkv_fast.attention_grad(
        *(make(x) for x in (DOUT, Q, K, V, OUT, LSE)), bias=make(BIAS * 0), want=("q", "k", "v", "bias")
    ),
    "partials": lambda make: qkv_fast.merge_partials([make(OUT), make(OUT)], [make(LSE), make(LSE)]),
    "scores": lambda make: qkv_fast.scores(make(Q), make(K)),
    "softmax": lambda make: qkv_fast.softmax(make(BIAS), mask=make(MASK[0, 0])),
    "weighted values": lambda make: qkv_fast.weighted_values(make(MASK.astype("float32")), make(V)),
    "linear": lambda make: qkv_fast.linear(make(Q), make(W), make(B)),
    "Linear": lambda make: qkv_fast.Linear(make(W), make(B))(make(Q)),
    "rope": lambda make: qkv_fast.rope(make(Q), make(np.arange(5))),
    "MultiHeadAttention": _layer,
    "KVCache": _cached,
    "PagedKVCache": _paged,
    "questions": lambda make: qkv_fast.spotlight.top_keys(make(Q), make(K), 2),
    "influence": lambda make: qkv_fast.spotlight.influence(make(Q), make(K), make(V), output=make(OUT), lse=make(LSE)),
}  # fmt: skip


def _newest(make, out):
    cache = qkv_fast.KVCache(1, 2, 8, 10, value_dim=6, dtype="int8")
    cache.append(make(K), make(V))
    return cache.attend(make(Q[:, :, -2:]), out=out)


def _newest_of_pages(make, out):
    pool = qkv_fast.PagedKVCache(2, 8, pages=4, page_size=16, value_dim=6, dtype="int8")
    sequences = [pool.add()]
    return pool.step(sequences, make(Q[:, :, -2:]), make(K[:, :, :2]), make(V[:, :, :2]), layout="bhld", out=out)


WRITERS = {
    "attention": (OUT.shape, lambda make, out: qkv_fast.attention(make(Q), make(K), make(V), causal=True, out=out)),
    "masks": (
        OUT.shape, lambda make, out: qkv_fast.attention(make(Q), make(K), make(V), mask=MASK, bias=make(BIAS), out=out)
    ),
    "packed": (
        PACKED.shape,
        lambda make, out: qkv_fast.attention_varlen(*(make(x) for x in (PACKED,) * 3), STARTS, STARTS, out=out),
    ),
    "scores": ((1, 4, 5, 7), lambda make, out: qkv_fast.scores(make(Q), make(K), out=out)),
    "softmax": (BIAS.shape, lambda make, out: qkv_fast.softmax(make(BIAS), mask=MASK[0, 0], out=out)),
    "softmax_grad": (BIAS.shape, lambda make, out: qkv_fast.softmax_grad(make(BIAS), make(BIAS), out=out)),
    "weighted values": (
        OUT.shape, lambda make, out: qkv_fast.weighted_values(make(MASK.astype("float32")), make(V), out=out)
    ),
    "linear": ((1, 4, 5, 24), lambda make, out: qkv_fast.linear(make(Q), make(W), make(B), out=out)),
    "rope": (Q.shape, lambda make, out: qkv_fast.rope(make(Q), np.arange(5), out=out)),
    "KVCache": ((1, 4, 2, 6), _newest),
    "PagedKVCache": ((1, 4, 2, 6), _newest_of_pages),
}  # fmt: skip
