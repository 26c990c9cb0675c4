"""Few query rows with what hides keys or changes scores: the kernel of few rows takes it all.

What each of them means is tested in the files of their names; here are the edges of that kernel: groups, chunks of
keys, rows that see different parts of one, blocks that nobody sees, and sequences packed with longer ones.
"""

import itertools
import sys

import numpy as np
import pytest
from _explained import agree
from _fence import Fence
from _patterns import PATTERNS, fits
from _util import ALL_TYPES, TYPES, check, compare, normal, qkv, same_bits

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", (*TYPES, "bfloat16"))  # whose pairs are multiplied on some paths
wide = pytest.mark.parametrize("dtype", TYPES)
places = pytest.mark.parametrize("place", ["at_end", "at_start"])
fenced = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")

CHUNK = qkv_fast.explain(*qkv(1, lengths=(1, 1))).chunk_keys


def with_inf(rng, shape, dtype):
    """A bias that excludes some keys."""
    bias = normal(rng, shape, dtype)
    bias[..., ::9] = -np.inf
    return bias


def stranger(rng, lq, lk):
    """Ids that are no span: a key of another document within."""
    ids = np.sort(rng.integers(0, 2, lk))
    ids[lk // 2 :: 50] = 2
    return rng.integers(0, 3, lq), ids


# name: options for so many query heads, queries and keys
KINDS = {
    "mask": lambda rng, dtype, h, lq, lk: dict(mask=rng.random((h, lq, lk)) < 0.6),
    "mask of blocks": lambda rng, dtype, h, lq, lk: dict(mask=np.repeat(rng.random(lk // 100 + 1) < 0.5, 100)[:lk]),
    "bias": lambda rng, dtype, h, lq, lk: dict(bias=with_inf(rng, (h, lq, lk), dtype)),
    "a row of bias": lambda rng, dtype, h, lq, lk: dict(bias=normal(rng, (1, 1, lk), dtype)),
    "a wider bias": lambda rng, dtype, h, lq, lk: dict(bias=with_inf(rng, (h, 1, lk), "f8")),
    "alibi": lambda rng, dtype, h, lq, lk: dict(alibi_slopes=np.geomspace(1, 1e-3, h) * (-1) ** np.arange(h)),
    "softcap": lambda rng, dtype, h, lq, lk: dict(softcap=1.5),
    "spans": lambda rng, dtype, h, lq, lk: dict(segments=(rng.integers(0, 3, lq), np.sort(rng.integers(0, 3, lk)))),
    "ids": lambda rng, dtype, h, lq, lk: dict(segments=stranger(rng, lq, lk)),
}
KINDS["all"] = lambda *given: {
    name: x for kind in ("alibi", "softcap", "ids", "bias", "mask") for name, x in KINDS[kind](*given).items()
} | dict(sinks=np.linspace(-1, 3, given[2]))
kinds = pytest.mark.parametrize("kind", KINDS)


def with_axes(options, n):
    """Masks and biases with n more axes in front: as many as the scores of a batch have."""
    return {
        name: x[(None,) * n] if name in ("mask", "bias") and x.ndim == 3 else x for name, x in options.items()
    }


def case(seed, dtype, kind, *, heads, lengths, dims=(24, 40), batch=()):
    """(q, k, v) and options, of which explain says that they are decoded."""
    arrays = qkv(seed, dtype, batch=batch, heads=heads, lengths=lengths, dims=dims)
    options = with_axes(KINDS[kind](np.random.default_rng(seed), dtype, heads[0], *lengths), len(batch))
    plan = qkv_fast.explain(*arrays, **options)
    assert plan.kernel.startswith("decode_"), plan.kernel
    return arrays, options


@pytest.mark.parametrize("dtype", ALL_TYPES)
@kinds
def test_every_group(dtype, kind):
    most = {"float32": 12, "float64": 6}.get(dtype, 16)
    for group in (1, 2, 3, 4, 5, 6, 7, 12, 16):
        if group > most:
            continue
        lq = most // group if group % 2 else 1
        arrays, options = case(group, dtype, kind, heads=(2 * group, 2), lengths=(lq, 157), dims=(120, 72), batch=(2,))
        check(*arrays, **options)
        check(*arrays, causal=True, q_offset=[100, 0], **options)


@dtypes
@kinds
def test_around_the_edges_of_chunks(dtype, kind):
    for n, (chunks, more) in enumerate(itertools.product((1, 2), (-33, -1, 0, 1, 15, 17, 130))):
        arrays, options = case(n, dtype, kind, heads=(2, 1), lengths=(3, chunks * CHUNK + more))
        check(*arrays, **options)
        check(*arrays, causal=True, num_threads=3, **options)
        check(*arrays, window=(40, 3), q_offset=chunks * CHUNK - 2, **options)  # keys on both sides of an edge


@dtypes
@kinds
def test_every_length(dtype, kind, request):
    """Rows that begin and end anywhere in a vector."""
    step = 1 if request.config.getoption("--exhaustive") else 9
    for lk in sorted({*range(1, 140, step), 1, 7, 8, 15, 16, 17, 31, 32, 33}):
        arrays, options = case(lk, dtype, kind, heads=(2, 1), lengths=(2, lk), dims=(16, 16))
        check(*arrays, window=(lk * 2 // 3, 1), **options)


@dtypes
@kinds
def test_threads_batch_and_padding_do_not_change_bits(dtype, kind):
    (q, k, v), options = case(1, dtype, kind, heads=(6, 2), lengths=(2, 3 * CHUNK - 50), batch=(3,))
    whole = qkv_fast.attention(q, k, v, return_lse=True, num_threads=1, **options)
    for b in range(3):
        own = q[b : b + 1], k[b : b + 1], v[b : b + 1]
        expected = whole[0][b : b + 1], whole[1][b : b + 1]
        for threads in (1, 2, 5):
            with _runtime.counters() as seen:
                same_bits(qkv_fast.attention(*own, return_lse=True, num_threads=threads, **options), expected)
        assert seen["splits"] > 0, "the keys were never shared among threads"
    n = 2 * CHUNK + 77
    lengths = dict(kv_lengths=n, q_offset=n - 2, return_lse=True)
    padded = qkv_fast.attention(q, k, v, **lengths, **options)
    cut = {name: x[..., :n] if name in ("mask", "bias") else x for name, x in options.items()}
    if "segments" in cut:
        cut["segments"] = cut["segments"][0], cut["segments"][1][:n]
    same_bits(qkv_fast.attention(q, k[..., :n, :], v[..., :n, :], return_lse=True, **cut), padded)


@dtypes
def test_the_same_keys_by_positions_spans_ids_and_masks(dtype):
    """The same bits where scores stay as they are, and beside a sequence whose segments need ids."""
    q, k, v = qkv(2, dtype, batch=(2,), heads=(4, 2), lengths=(2, 2 * CHUNK + 300), dims=(24, 40))
    lk = k.shape[2]
    position = np.arange(lk)
    visible = position <= np.array([[lk - 2], [lk - 1]])
    causal = qkv_fast.attention(q, k, v, causal=True, return_lse=True)
    same_bits(qkv_fast.attention(q, k, v, mask=visible, return_lse=True), causal)
    ids = position // 700
    own = np.stack([ids, np.where(position % 50 == 7, -1, ids)])  # the second is not said by spans
    by_span = qkv_fast.attention(q[0], k[0], v[0], segments=([1, 2], ids), return_lse=True)
    both = qkv_fast.attention(q, k, v, segments=([1, 2], own), return_lse=True)
    same_bits((both[0][0], both[1][0]), by_span)
    mask = own[:, None, None] == np.array([1, 2])[:, None]
    same_bits(qkv_fast.attention(q, k, v, mask=mask, return_lse=True), both)


@dtypes
@pytest.mark.parametrize("name", PATTERNS)
def test_masks_and_biases_anywhere_in_memory(dtype, name):
    rng = np.random.default_rng(3)
    q, k, v = qkv(3, dtype, batch=(2,), heads=(4, 2), lengths=(2, CHUNK + 70), dims=(24, 40))
    shape = (2, 4, 2, CHUNK + 70)
    mask, change = rng.random(shape) < 0.6, PATTERNS[name]
    for bias_type in ALL_TYPES:
        if "swapped" in name and not fits(name, bias_type):
            continue
        bias = with_inf(rng, shape, bias_type)
        expected = qkv_fast.attention(q, k, v, mask=mask, bias=bias.astype("f8"), causal=True, return_lse=True)
        if name != "padded rows of 1 KiB":  # which are shorter than these
            got = qkv_fast.attention(q, k, v, mask=change(mask), bias=change(bias), causal=True, return_lse=True)
            same_bits(got, expected)
        if bias_type in TYPES:
            for part in (np.s_[:1], np.s_[:, :1], np.s_[:, :, :1], np.s_[..., :1]):
                options = dict(mask=mask[part], bias=bias[part], return_lse=True)
                wide = {name: np.broadcast_to(x, shape).copy() for name, x in options.items() if name != "return_lse"}
                same_bits(qkv_fast.attention(q, k, v, **options), qkv_fast.attention(q, k, v, return_lse=True, **wide))


@fenced
@dtypes
@places
def test_nothing_beside_masks_and_biases_is_read(dtype, place):
    """Nor keys of theirs that no row sees: the rows end with the window."""
    rng = np.random.default_rng(4)
    fences = [Fence(1 << 20) for _ in range(2)]
    for n, (group, lk) in enumerate(itertools.product((1, 3), (1, 15, 17, 33, 531, CHUNK + 9))):
        q, k, v = qkv(n, dtype, heads=(group, 1), lengths=(1, lk), dims=(16, 16))
        given = rng.random((group, 1, lk)) < 0.7, with_inf(rng, (group, 1, lk), dtype)
        for gap, keys in ((0, 1), (1, 1), (0, 3), (0, -1)):
            steps = [(lk * 3 * x.itemsize, lk * x.itemsize, keys * x.itemsize) for x in given]
            views = [f.put(x, place, strides=s, gap=gap) for f, x, s in zip(fences, given, steps, strict=True)]
            for window in (None, (lk // 2, 0)):
                options = dict(window=window, return_lse=True)
                expected = qkv_fast.attention(q, k, v, mask=given[0], bias=given[1], **options)
                same_bits(qkv_fast.attention(q, k, v, mask=views[0], bias=views[1], **options), expected)


@dtypes
@pytest.mark.parametrize("group", [1, 4])
def test_hidden_blocks_are_not_even_looked_at(dtype, group):
    """Nor is their NaN met by the careful run; where a block holds a seen key as well, that takes care of it."""
    q, k, v = qkv(5, dtype, heads=(group, 1), lengths=(1, 4 * CHUNK), dims=(40, 40))
    block = np.arange(4 * CHUNK) // 128
    clean = qkv_fast.attention(q, k, v, mask=block % 3 == 1, return_lse=True)
    k2, v2 = k.copy(), v.copy()
    k2[:, block % 3 != 1], v2[:, block % 3 != 1] = np.nan, np.inf
    for options in (dict(mask=block % 3 == 1), dict(segments=([1], block % 3))):
        with _runtime.counters() as seen:
            same_bits(qkv_fast.attention(q, k2, v2, return_lse=True, **options), clean)
        assert (seen["panels_careful"], seen["tiles_partial"]) == (0, 4)
    mask = block % 3 == 1
    mask[:CHUNK] = False  # a chunk of nothing
    v2[:, mask.nonzero()[0][5]] = np.nan
    mask[mask.nonzero()[0][5]] = False
    with _runtime.counters() as seen:
        got = check(q, k2, v2, mask=mask)
    assert np.isfinite(got[0]).all() and seen["panels_careful"] == 1 and seen["tiles_skipped"] == 2
    agree(q, k, v, mask=mask)


@dtypes
def test_chunks_between_the_spans_of_two_rows_are_not_read(dtype):
    q, k, v = qkv(11, dtype, heads=(2, 1), lengths=(2, 4 * CHUNK), dims=(24, 40))
    segments = [0, 3], np.arange(4 * CHUNK) // CHUNK
    clean = check(q, k, v, segments=segments)
    plan = agree(q, k, v, segments=segments, num_threads=1)
    assert (plan.tiles_full, plan.tiles_partial, plan.tiles_skipped) == (0, 2, 2)
    between = (segments[1] == 1) | (segments[1] == 2)
    k[:, between], v[:, between] = np.nan, np.nan
    with _runtime.counters() as seen:
        same_bits(qkv_fast.attention(q, k, v, segments=segments, return_lse=True), clean)
    assert seen["panels_careful"] == 0


@dtypes
@kinds
def test_nan_of_hidden_keys(dtype, kind):
    """In keys and values that some rows see and others do not, in every chunk."""
    (q, k, v), options = case(6, dtype, kind, heads=(4, 2), lengths=(2, 2 * CHUNK + 40))
    at = [5, 900, CHUNK, 2 * CHUNK - 1, 2 * CHUNK + 38]
    k[:, at[::2]], v[0, at, 3] = np.nan, np.nan
    mask = np.broadcast_to(options.get("mask", np.array(True)), (4, 2, k.shape[1])).copy()
    mask[:, 0, at] = False
    out, _ = check(q, k, v, **options | dict(mask=mask))
    assert np.isfinite(out[:, 0]).all()
    bias = np.broadcast_to(options.get("bias", np.zeros((), dtype)), mask.shape).copy()
    bias[~mask] = -np.inf
    options.pop("mask", None)
    same_bits(qkv_fast.attention(q, k, v, **options | dict(bias=bias)),
              qkv_fast.attention(q, k, v, **options | dict(bias=bias, mask=mask)))  # fmt: skip


@wide
@pytest.mark.parametrize("threads", [1, 4])
def test_the_least_number_everywhere_averages(dtype, threads):
    q, k, v = qkv(7, dtype, heads=(4, 1), lengths=(1, 3 * CHUNK), dims=(16, 16))
    bias = np.full((4, 1, 3 * CHUNK), np.finfo(dtype).min, dtype)
    bias[1, :, ::2] = -np.inf
    bias[2, :, CHUNK:] = -np.inf
    bias[3] = -np.inf
    out, lse = check(q, k, v, bias=bias, num_threads=threads)
    for head, keys in ((0, np.s_[:]), (1, np.s_[1::2]), (2, np.s_[:CHUNK])):
        mean = v[0, keys].mean(axis=0, dtype="f8")
        np.testing.assert_allclose(out[head, 0], mean, rtol=0, atol=8 * np.finfo(dtype).eps)
    assert not out[3].any() and lse[3] == -np.inf
    sinks = [1.0, np.finfo(dtype).min, -np.inf, 2.0]  # the first takes all weight, the second has that of a key
    out, lse = check(q, k, v, bias=bias, sinks=sinks, num_threads=threads)
    assert not out[0].any() and lse[0] == 1 and not out[3].any() and lse[3] == 2


@wide
@pytest.mark.parametrize("offset", [10**5, -(10**5), 2**24 + 1, 2**40 + 3, 2**60])
def test_alibi_far_away(dtype, offset):
    """As with many rows: only the differences of distances are left, as far as the type holds them."""
    q, k, v = qkv(8, dtype, heads=(4, 1), lengths=(1, CHUNK + 300), dims=(16, 16))
    slopes = qkv_fast.alibi_slopes(4)
    far = qkv_fast.attention(q, k, v, alibi_slopes=slopes, q_offset=offset)
    n = k.shape[1]
    near = qkv_fast.reference.attention(q, k, v, alibi_slopes=slopes, q_offset=n if offset > 0 else -n)
    loss = abs(offset) * slopes[:, None, None] * np.finfo(dtype).eps
    error = np.abs(far - near) / np.abs(v).max()
    assert (error <= 16 * np.finfo(dtype).eps + 2 * loss).all() and np.isfinite(far).all()


@dtypes
@kinds
@pytest.mark.parametrize("threads", [1, 4])
def test_packed_with_longer_ones(dtype, kind, threads):
    """Each packed sequence has the kernel, and the bits, that it has alone, whatever the others' segments need."""
    lengths = [(1, 2500), (60, 700), (2, 40), (0, 9), (1, 1), (2, CHUNK)]
    cu_q, cu_k = (np.cumsum([0, *(pair[i] for pair in lengths)]) for i in (0, 1))
    q, k, v = (x.swapaxes(0, 1) for x in qkv(9, dtype, heads=(4, 2), lengths=(cu_q[-1], cu_k[-1]), dims=(24, 40)))
    rng = np.random.default_rng(9)
    options = KINDS[kind](rng, dtype, 4, 60, 2500)
    if "segments" in options:
        options["segments"] = KINDS[kind](rng, dtype, 4, cu_q[-1], cu_k[-1])["segments"]
    packed = with_axes(options, 1)
    out = qkv_fast.attention_varlen(q, k, v, cu_q, cu_k, causal=True, num_threads=threads, **packed)
    for b, (lq, lk) in enumerate(lengths):
        rows, keys, own = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2]), dict(options)
        for name in own.keys() & {"mask", "bias"}:
            own[name] = np.broadcast_to(own[name], (4, 60, 2500))[:, :lq, :lk]
        if "segments" in own:
            own["segments"] = own["segments"][0][rows], own["segments"][1][keys]
        same_bits(out[rows], qkv_fast.attention(q[rows], k[keys], v[keys], causal=True, layout="blhd", **own))


@dtypes
@pytest.mark.parametrize("limits", [{}, dict(causal=True), dict(window=(700, 0))], ids=str)
@kinds
def test_explain_agrees(dtype, kind, limits):
    for n, (lq, lk) in enumerate([(1, 70), (2, CHUNK + 5), (2, 3 * CHUNK)]):
        arrays, options = case(n, dtype, kind, heads=(4, 2), lengths=(lq, lk), batch=(2,))
        agree(*arrays, num_threads=1 + n, **options, **limits)


@dtypes
@pytest.mark.parametrize("kind", ["mask", "bias", "a row of bias", "alibi", "softcap"])
def test_caches(dtype, kind):
    """A step of a cache is the call that it stands for, tiles of few rows and all."""
    (q, k, v), options = case(10, dtype, kind, heads=(4, 2), lengths=(1, CHUNK + 90), batch=(2,))
    with _runtime.counters() as seen:
        expected = qkv_fast.attention(q, k, v, causal=True, return_lse=True, **options)
    assert seen["tiles_full"] + seen["tiles_partial"] + seen["tiles_skipped"] == 2 * 2 * 2
    cache = qkv_fast.KVCache(2, 2, 24, 2000, value_dim=40, dtype=dtype)
    cache.append(k, v)
    pool = qkv_fast.PagedKVCache(2, 24, pages=40, page_size=64, value_dim=40, dtype=dtype)
    ids = [pool.add(), pool.add()]
    pool.append(ids, k, v)
    for attend in (cache.attend, lambda *args, **given: pool.attend(ids, *args, **given)):
        with _runtime.counters() as steps:
            same_bits(attend(q, return_lse=True, **options), expected)
        same = ("tiles_full", "tiles_partial", "tiles_skipped")
        assert [steps[name] for name in same] == [seen[name] for name in same]


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["mask", "mask of blocks", "bias", "alibi", "softcap"])
def test_caches_of_narrow_types(stored, kind):
    """Scores have the scales of their rows before anything becomes of them."""
    (q, k, v), options = case(12, "float32", kind, heads=(4, 2), lengths=(2, CHUNK + 90), batch=(2,))
    cache = qkv_fast.KVCache(2, 2, 24, 2000, value_dim=40, dtype=stored)
    cache.append(k, v)
    keys, values = cache.keys.astype("float32"), cache.values.astype("float32")
    compare(cache.attend(q, return_lse=True, **options), (q, keys, values), causal=True, **options)
