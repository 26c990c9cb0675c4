"""attention_varlen(): packed sequences are each what attention() gives for it alone, to the bit."""

import itertools

import numpy as np
import pytest
from _util import TYPES, compare, normal, same_bits

import qkv_fast
from qkv_fast import _runtime, reference

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", TYPES)

LENGTHS = {
    "usual": ([5, 40, 1, 130, 17], [5, 40, 1, 130, 17]),
    "cross": ([3, 60, 49], [200, 7, 1100]),
    "empty ones": ([0, 4, 0, 9, 3, 0], [5, 4, 0, 0, 12, 0]),
    "no queries": ([0, 0], [3, 4]),
    "no keys": ([3, 4], [0, 0]),
    "one": ([33], [97]),
    "none": ([], []),
    "decoding": ([1] * 9, [1, 17, 300, 5, 0, 1025, 96, 2000, 64]),
}


def starts(lengths):
    return np.concatenate([[0], np.cumsum(lengths, dtype=int)])


def packed(seed, dtype, q_lengths, k_lengths, heads=(4, 2), dims=(8, 6)):
    rng = np.random.default_rng(seed)
    tq, tk = sum(q_lengths), sum(k_lengths)
    shapes = (tq, heads[0], dims[0]), (tk, heads[1], dims[0]), (tk, heads[1], dims[1])
    return tuple(normal(rng, shape, dtype) for shape in shapes), (starts(q_lengths), starts(k_lengths))


def alone(arrays, cu, b, **options):
    """attention() of sequence b, with its part of the options of each kind. (out, lse) as attention_varlen has them."""
    (q, k, v), (cu_q, cu_k) = arrays, cu
    rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
    lq, lk, n = rows.stop - rows.start, keys.stop - keys.start, len(cu_q) - 1
    for name in ("mask", "bias"):
        if name in options:
            logits = (n, q.shape[1], np.diff(cu_q).max(initial=0), np.diff(cu_k).max(initial=0))
            options[name] = np.broadcast_to(options[name], logits)[b, :, :lq, :lk]
    for name in ("q_offset", "kv_lengths"):
        if name in options:
            options[name] = int(np.broadcast_to(options[name], n)[b])
    if "segments" in options:
        q_ids, k_ids = options["segments"]
        options["segments"] = q_ids[rows], k_ids[keys]
    return qkv_fast.attention(q[rows], k[keys], v[keys], layout="blhd", return_lse=True, **options)


def agree(arrays, cu, **options):
    """Packed and alone, bit by bit. Returns the packed result."""
    out, lse = qkv_fast.attention_varlen(*arrays, *cu, return_lse=True, **options)
    assert out.shape == (*arrays[0].shape[:2], arrays[2].shape[2]) and lse.shape == out.shape[1::-1]
    for b in range(len(cu[0]) - 1):
        rows = slice(*cu[0][b : b + 2])
        same_bits((out[rows], lse[:, rows]), alone(arrays, cu, b, **options))
    return out, lse


OPTIONS = [
    {},
    dict(causal=True),
    dict(causal="top-left", window=(30, None)),
    dict(window=(3, 70), scale=0.2, softcap=2.0),
    dict(causal=True, alibi_slopes=[0.5, 0.25, 1.0, 0.0], sinks=[1.0, -np.inf, 3.0, 0.0]),
    dict(q_offset=7, causal=True),
]


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_each_sequence_alone(dtype, name, options):
    agree(*packed(1, dtype, *LENGTHS[name]), **options)


@dtypes
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 3), (7, 1), (8, 2)])
def test_grouped_heads(dtype, heads):
    for name, dims in itertools.product(("usual", "cross", "decoding"), ((8, 6), (64, 64), (65, 1))):
        agree(*packed(2, dtype, *LENGTHS[name], heads=heads, dims=dims), causal=True)


@dtypes
@pytest.mark.parametrize("name", ["usual", "cross", "empty ones", "decoding"])
def test_arguments_of_each_sequence(dtype, name):
    """Masks and biases by sequence, head, query and key; ids, offsets and lengths of each sequence's own."""
    rng = np.random.default_rng(3)
    arrays, cu = packed(3, dtype, *LENGTHS[name])
    lq, lk = np.diff(cu[0]), np.diff(cu[1])
    n, longest = lq.size, (lq.max(), lk.max())
    mask, bias = rng.random((n, 4, *longest)) < 0.6, normal(rng, (n, 4, *longest), dtype)
    agree(arrays, cu, mask=mask)
    agree(arrays, cu, bias=bias, causal=True)
    for own in (mask[:1], mask[:, :1], mask[0, 0], mask[:, :1, :1], mask[..., :1], mask[:, ::-1, ::-1]):
        agree(arrays, cu, mask=own, bias=np.asfortranarray(bias))
    for ids in (np.sort, rng.permutation):
        segments = tuple(ids(rng.integers(0, 3, x)) for x in (cu[0][-1], cu[1][-1]))
        agree(arrays, cu, segments=segments)
        agree(arrays, cu, segments=segments, mask=mask, window=(9, 4))
    agree(arrays, cu, q_offset=rng.integers(-9, 99, n), causal=True)
    lengths = rng.integers(0, lk + 1)
    agree(arrays, cu, kv_lengths=lengths)
    agree(arrays, cu, kv_lengths=lengths, q_offset=0, causal=True, bias=bias, sinks=[0.0, 1.0, 2.0, 3.0])
    agree(arrays, cu, kv_lengths=np.where((lengths < lq) & (lengths > 0), lk, lengths) if (lk >= lq).all() else lk)


@dtypes
def test_against_the_reference(dtype):
    """By the error rule, sequence by sequence."""
    arrays, cu = packed(4, dtype, *LENGTHS["cross"])
    for options in OPTIONS:
        out, lse = qkv_fast.attention_varlen(*arrays, *cu, return_lse=True, **options)
        exact = reference.attention_varlen(*arrays, *cu, return_lse=True, **options)
        assert exact[0].shape == out.shape and exact[1].shape == lse.shape
        for b in range(3):
            rows, keys = slice(*cu[0][b : b + 2]), slice(*cu[1][b : b + 2])
            own = arrays[0][rows], arrays[1][keys], arrays[2][keys]
            compare((out[rows], lse[:, rows]), own, layout="blhd", **options)
            same_bits(
                (exact[0][rows].astype(dtype), exact[1][:, rows].astype(dtype)),
                tuple(
                    x.astype(dtype) for x in reference.attention(*own, layout="blhd", return_lse=True, **options)
                ),
            )


@dtypes
def test_threads(dtype):
    arrays, cu = packed(5, dtype, *[[300, 1, 40, 700, 5, 33, 64, 90]] * 2, dims=(32, 32))
    expected = qkv_fast.attention_varlen(*arrays, *cu, causal=True, return_lse=True, num_threads=1)
    for threads in range(2, 9):
        for _ in range(3):
            got = qkv_fast.attention_varlen(*arrays, *cu, causal=True, return_lse=True, num_threads=threads)
            same_bits(got, expected)
    arrays, cu = packed(6, dtype, [1, 1, 2], [9000, 50, 3000], heads=(2, 1))  # chunks of keys are shared
    expected = agree(arrays, cu, num_threads=1)
    for threads in range(2, 9):
        same_bits(qkv_fast.attention_varlen(*arrays, *cu, return_lse=True, num_threads=threads), expected)


@dtypes
def test_a_sequence_does_not_depend_on_others(dtype):
    """NaN and infinity in one leave the others as they are; the order of sequences does not matter."""
    (q, k, v), (cu_q, cu_k) = packed(7, dtype, *LENGTHS["usual"])
    clean = qkv_fast.attention_varlen(q, k, v, cu_q, cu_k)
    k2, v2 = k.copy(), v.copy()
    k2[cu_k[1] : cu_k[2]], v2[cu_k[3] : cu_k[4]] = np.nan, np.inf
    out = qkv_fast.attention_varlen(q, k2, v2, cu_q, cu_k)
    for b in (0, 2, 4):
        rows = slice(*cu_q[b : b + 2])
        same_bits(out[rows], clean[rows])
    assert np.isnan(out[cu_q[1] : cu_q[2]]).all() and (out[cu_q[3] : cu_q[4]] == np.inf).all()


@dtypes
def test_any_strides(dtype):
    """Views of one packed QKV array, swapped axes, reversed tokens, byte order, unaligned; and out of any strides."""
    (q, k, v), cu = packed(8, dtype, *LENGTHS["usual"], heads=(3, 3), dims=(8, 8))
    expected = qkv_fast.attention_varlen(q, k, v, *cu, causal=True)
    total, heads, dim = q.shape
    fields = np.zeros(q.shape, [("pad", "u1"), ("x", dtype)])
    together = np.stack([q, k, v], axis=1)
    views = {
        "one array": [together[:, i] for i in range(3)],
        "heads first": [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (q, k, v)],
        "dimension outermost": [np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0) for x in (q, k, v)],
        "reversed": [np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1] for x in (q, k, v)],
        "swapped bytes": [x.astype(x.dtype.newbyteorder("S")) for x in (q, k, v)],
        "lists": [x.tolist() for x in (q, k, v)] if dtype == "float64" else [q, k, v],
    }
    for given in views.values():
        same_bits(qkv_fast.attention_varlen(*given, *cu, causal=True), expected)
    fields["x"] = v
    same_bits(qkv_fast.attention_varlen(q, k, fields["x"], *cu, causal=True), expected)
    for out in (fields["x"], np.zeros((dim, heads, total), dtype).transpose(2, 1, 0), np.zeros_like(q)[::-1]):
        assert qkv_fast.attention_varlen(q, k, v, *cu, causal=True, out=out) is out
        same_bits(out.copy(), expected)
    out = q.copy()
    same_bits(qkv_fast.attention_varlen(out, k, v, *cu, causal=True, out=out), expected)
    shared = np.zeros((total, heads, dim), dtype)
    bias = shared[:130, 0, :1].T
    shared[:130, 0, 0] = normal(np.random.default_rng(8), 130, dtype)
    expected = qkv_fast.attention_varlen(q, k, v, *cu, bias=bias.copy())
    same_bits(qkv_fast.attention_varlen(q, k, v, *cu, bias=bias, out=shared), expected)


@dtypes
def test_narrower_keys(dtype):
    arrays, cu = packed(9, dtype, *LENGTHS["usual"])
    narrow = arrays[0].astype("f8"), *(x.astype("f4") for x in arrays[1:])
    agree(narrow, cu, causal=True)


@dtypes
def test_kinds_of_starts(dtype):
    arrays, (cu_q, cu_k) = packed(10, dtype, *LENGTHS["usual"])
    expected = qkv_fast.attention_varlen(*arrays, cu_q, cu_k)
    for given in (cu_q.tolist(), tuple(cu_q), cu_q.astype("i4"), cu_q.astype(">u2"), np.repeat(cu_q, 2)[::2]):
        same_bits(qkv_fast.attention_varlen(*arrays, given, cu_k), expected)
        same_bits(qkv_fast.attention_varlen(*arrays, cu_q, given), expected)


def test_what_is_hidden_is_not_computed():
    """Sequences do not see each other: work grows with the sum of squares, not with the square of the sum."""
    arrays, cu = packed(11, "float32", [256] * 8, [256] * 8, heads=(1, 1))
    with _runtime.counters() as ragged:
        qkv_fast.attention_varlen(*arrays, *cu)
    with _runtime.counters() as whole:
        qkv_fast.attention(*arrays, layout="blhd")
    done = ragged["tiles_full"] + ragged["tiles_partial"] + ragged["tiles_skipped"]
    assert done < 0.25 * whole["tiles_full"]
