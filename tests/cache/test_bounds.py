"""KVCache(bounds=True) and attend(tolerance=): how little the keys weigh that are left out, and what is left out."""

import copy
import pickle

import numpy as np
import pytest
from _quantised import QUANTISED
from _util import ALL_TYPES, normal, same_bits
from hypothesis import given
from hypothesis import strategies as st

from qkv_fast import KVCache, PagedKVCache, explain, num_threads, reference
from qkv_fast.cache import bounds

pytestmark = pytest.mark.usefixtures("isa")
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def filled(rng, dtype="float32", batch=1, heads=1, n=600, dims=(16, 16), lengths=None, **options):
    """A cache of these tokens, and these in float64."""
    k, v = (normal(rng, (batch, heads, n, dim)).astype(dtype) for dim in dims)
    cache = KVCache(batch, heads, dims[0], n + 3, value_dim=dims[1], dtype=dtype, bounds=True, **options)
    cache.append(k, v, lengths=lengths)
    return cache, k.astype("float64"), v.astype("float64")


def hold(cache, q, k, v, tolerance, own=(), seen=None, **options):
    """Assert that what is proven is true, of float64's result over all keys; returns the share of keys read. `own`: the
    sequences of a pool; `seen`: what a ring's queries see."""
    out, lse, left, read = cache.attend(*own, q, tolerance=tolerance, return_lse=True, **options)
    assert out.dtype == q.dtype and left.dtype == np.float32 and left.shape == lse.shape
    assert left.min() >= 0 and left.max() <= tolerance and 0 <= read <= 1
    plain, whole = cache.attend(*own, q, return_lse=True, **options)
    if read == 1:
        same_bits((out, lse), (plain, whole))
        assert not left.any()
    lengths = options.pop("lengths", None)
    ends, starts = (x(*own) if own else x for x in (cache.lengths, cache.starts))
    if seen is not None:
        options["mask"] = seen
    exact, full = reference.attention(
        q.astype("float64"), k, v, q_lengths=lengths, kv_lengths=ends, causal=options.pop("causal", cache.causal),
        kv_starts=starts, return_lse=True, **options,
    )  # fmt: skip
    largest = cache.largest_values(*own) if own else cache.largest_values
    most = np.repeat(largest, q.shape[1] // cache.kv_heads, axis=1)[:, :, None, None]
    # Rounding is no more than several times that of attention over all keys, and units for each of up to 30 keys' sums.
    rounding = 8 * np.abs(plain.astype("float64") - exact).max(initial=0) + 32 * UNIT[q.dtype.name] * most
    assert (np.abs(out.astype("float64") - exact) <= 2 * left[..., None] * most + rounding).all()
    # What was left out is the difference of the two sums of exponentials.
    seen = np.isfinite(full)
    missing = -np.expm1(lse[seen].astype("float64") - full[seen])
    wide = 2.0**-20 if q.dtype != np.float64 else 2.0**-44
    rounding = 8 * np.abs(whole[seen].astype("float64") - full[seen]) + wide * (1 + np.abs(full[seen]))
    assert (missing <= left[seen] + rounding).all()
    return read


@given(st.data())
def test_the_bound_holds(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    batch, heads, group, queries = draw(1, 2), draw(1, 2), draw(1, 3), draw(1, 3)
    n, dims = data.draw(st.integers(queries, 1300)), (draw(1, 16, 33), draw(1, 16))
    lengths = rng.integers(queries, n + 1, batch)
    lengths[rng.integers(batch)] = n
    dtype = draw(*ALL_TYPES)
    cache, k, v = filled(rng, dtype, batch, heads, n, dims, lengths)
    q = (normal(rng, (batch, heads * group, queries, dims[0])) * draw(0.3, 5, 40)).astype(dtype)
    options = {}
    for name, value in (
        ("window", int(rng.integers(0, n))), ("alibi_slopes", rng.random(heads * group) / 8), ("softcap", 20.0),
        ("sinks", normal(rng, heads * group)), ("bias", normal(rng, (queries, n)).astype("float32")),
        ("mask", rng.random((batch, 1, queries, n)) < 0.6), ("causal", False), ("scale", -0.4),
        ("lengths", rng.integers(0, queries + 1, batch)),
    ):  # fmt: skip
        if data.draw(st.integers(0, 3)) == 0:
            options[name] = value
    hold(cache, q, k, v, draw(1e-6, 1e-3, 0.3), **options)


def test_few_keys_are_read_where_few_weigh():
    rng = np.random.default_rng(0)
    cache, k, v = filled(rng, n=4000, heads=2, dims=(64, 64))
    q = normal(rng, (1, 8, 1, 64)).astype("float32")
    assert hold(cache, q * 10, k, v, 1e-3) < 0.05
    assert hold(cache, q, k, v, 1e-3) == 1
    assert hold(cache, q * 10, k, v, 0.3) < 0.01


def test_room_of_the_last_call_changes_nothing():
    """More keys, fewer, and rows of two types."""
    rng = np.random.default_rng(9)
    cache, _, _ = filled(rng, n=3000, heads=2, dims=(33, 16), value_dtype="float16")
    calls = [normal(rng, (1, 8, 1, 33)).astype("float32") * size for size in (40, 8, 60, 8, 20)]
    alone = [copy.deepcopy(cache).attend(q, tolerance=1e-3) for q in calls]
    assert len({read for _, _, read in alone}) > 3 and max(read for _, _, read in alone) < 1
    for q, expected in zip(calls, alone, strict=True):
        found = cache.attend(q, tolerance=1e-3)
        same_bits(found[:2], expected[:2])
        assert found[2] == expected[2]


def test_the_newest_of_many_say_whether_it_is_worth_it(monkeypatch):
    rng = np.random.default_rng(1)
    cache, k, v = filled(rng, n=1000, batch=2)
    q = normal(rng, (2, 1, 1, 16)).astype("float32") * 30
    mask, bias = np.ones((1, 1000), bool), np.zeros((1, 1000), "float32")
    calls = {}, {"mask": mask}, {"bias": bias}, {"mask": mask[:, :1]}
    whole = [cache.attend(q, tolerance=1e-3, **options) for options in calls]
    monkeypatch.setattr(bounds, "_WORTH_SAMPLING", 100)
    for options, at_once in zip(calls, whole, strict=True):
        found = cache.attend(q, tolerance=1e-3, **options)
        np.testing.assert_allclose(found[0], at_once[0], atol=1e-5)
        assert found[2] == at_once[2] < 1
    bias[:, -62:] = 0
    bias[:, :-62] = -100  # all weight among the newest, evenly
    q[:] = 0
    assert cache.attend(q, tolerance=1e-3, bias=bias)[2] == 1
    hold(cache, q, k, v, 1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v", "q"])
def test_what_is_not_finite_is_read(where, bad):
    rng = np.random.default_rng(2)
    k, v = normal(rng, (2, 1, 1, 300, 16)).astype("float32")
    q = normal(rng, (1, 2, 1, 16)).astype("float32") * 20
    {"k": k, "v": v, "q": q}[where][0, 0, -1, 3] = bad
    cache = KVCache(1, 1, 16, 300, bounds=True)
    cache.append(k, v)
    out, left, read = cache.attend(q, tolerance=1e-3)
    same_bits(out, cache.attend(q))
    assert not left.any() and read == 1
    assert cache.largest_values[0, 0] == (np.inf if where == "v" else np.abs(v).max())


@pytest.mark.parametrize("size", [1.4e-36, 1e-37, 1e-40])
def test_keys_whose_steps_are_next_to_nothing(size):
    """Their copy reads as 0."""
    rng = np.random.default_rng(8)
    k = (rng.choice([-1, 1], (1, 1, 500, 4)) * size).astype("float32")
    v, q = normal(rng, (1, 1, 500, 4)).astype("float32"), np.full((1, 1, 1, 4), 1e8, "float32")
    cache = KVCache(1, 1, 4, 500, bounds=True)
    cache.append(k, v)
    bias = np.where(np.arange(500) < 20, 0, -14)[None].astype("float32")
    hold(cache, q, k.astype("float64"), v.astype("float64"), 1e-3, scale=1.43e28, bias=bias)


def test_queries_that_are_next_to_nothing_in_float32():
    rng = np.random.default_rng(9)
    k, v = rng.choice([-1e38, 1e38], (1, 1, 500, 64)), normal(rng, (1, 1, 500, 64))
    cache = KVCache(1, 1, 64, 500, dtype="float64", bounds=True)
    cache.append(k, v)
    bias = np.where(np.arange(500) < 20, 0, -14)[None].astype("float64")
    hold(cache, np.full((1, 1, 1, 64), 1.1e-38), k, v, 1e-3, bias=bias)


@pytest.mark.parametrize("size", [200, 300, 350])
def test_what_reads_as_nothing_may_be_more_than_is_tolerated(size):
    """The widest bounds that are looked at, of padding too."""
    rng = np.random.default_rng(11)
    k, v, q = (normal(rng, (1, 2, n, 128)).astype("float64") for n in (900, 900, 3))
    cache = KVCache(1, 2, 128, 900, dtype="float64", bounds=True)
    cache.append(k, v, starts=[400])
    hold(cache, q * size, k, v, 1e-3)


def test_more_queries_than_are_looked_at(monkeypatch):
    rng = np.random.default_rng(10)
    cache, k, v = filled(rng, n=700)
    monkeypatch.setattr(bounds, "_WORTH_SAMPLING", 100)
    for queries in (43, 44, 60):
        q = np.repeat(normal(rng, (1, 1, 1, 16)).astype("float32") * 20, queries, axis=2)
        monkeypatch.setattr(bounds, "_MOST_ROWS", queries)
        assert hold(cache, q, k, v, 1e-1) < 1
        monkeypatch.setattr(bounds, "_MOST_ROWS", queries - 1)
        assert hold(cache, q, k, v, 1e-1) == 1


def test_tokens_that_move_take_along_what_is_known():
    rng = np.random.default_rng(3)
    cache, k, v = filled(rng, batch=2, n=500)
    q = normal(rng, (2, 2, 1, 16)).astype("float32") * 20
    cache.truncate([490, 300])
    cache.select(280, [3, 1, 7])
    kept = np.r_[:280, 283, 281, 287]
    k, v = k[:, :, kept], v[:, :, kept]
    assert hold(cache, q, k, v, 1e-3) < 0.3
    cache.reorder([1, 1])
    k, v = k[[1, 1]], v[[1, 1]]
    for same in (cache, copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        hold(same, q, k, v, 1e-3)
        same_bits(same.attend(q, tolerance=1e-3)[0], cache.attend(q, tolerance=1e-3)[0])
        same_bits(same.largest_values, cache.largest_values)
    token = normal(rng, (2, 1, 1, 16)).astype("float32")
    cache.append(token, token)
    hold(cache, q, np.concatenate([k, token], 2), np.concatenate([v, token], 2), 1e-3)


@pytest.mark.parametrize("types", [("float32", "float16"), ("float16", "bfloat16"), ("float16", "float32")])
def test_keys_and_values_of_two_types(types):
    rng = np.random.default_rng(7)
    k, v = normal(rng, (2, 1, 1, 300, 16)).astype("float32")
    cache = KVCache(1, 1, 16, 300, dtype=types[0], value_dtype=types[1], bounds=True)
    cache.append(k, v)
    q = normal(rng, (1, 2, 1, 16)).astype("float32") * 20
    k, v = (x.astype(dtype).astype("float64") for x, dtype in zip((k, v), types, strict=True))
    assert hold(cache, q, k, v, 1e-3) < 1


def test_layouts_outputs_threads_and_plans():
    rng = np.random.default_rng(4)
    cache, *_ = filled(rng, heads=2, n=900)
    q = normal(rng, (1, 4, 2, 16)).astype("float32") * 20
    out, left, read = cache.attend(q, tolerance=1e-2)
    assert read < 1
    for threads in (1, 2, 5):
        with num_threads(threads):
            again = cache.attend(q, tolerance=1e-2)
        same_bits(again[:2], (out, left))
    room = np.empty((1, 2, 4, 16), "float32")
    other = cache.attend(q.swapaxes(1, 2), tolerance=1e-2, layout="blhd", out=room)
    assert other[0] is room
    same_bits(np.ascontiguousarray(room.swapaxes(1, 2)), out)
    plan = explain(cache.attend, q, tolerance=1e-2)
    assert plan.pairs == explain(cache.attend, q).pairs
    assert any(note.startswith("tolerance: what 0.01 leaves out") for note in plan.notes)


def test_empty_caches_and_queries_that_see_nothing():
    cache = KVCache(2, 1, 8, 20, bounds=True)
    q = np.ones((2, 2, 1, 8), "float32")
    out, left, read = cache.attend(q, tolerance=0.1)
    assert not out.any() and not left.any() and read == 1
    tokens = np.random.default_rng(5).standard_normal((2, 1, 9, 8), dtype="float32")
    cache.append(tokens, tokens, lengths=[9, 0])
    out, left, read = cache.attend(q * 30, tolerance=0.1, mask=np.zeros((1, 9), bool))
    assert not out.any() and left.max() < 1e-30


@pytest.mark.parametrize("wrong, error, says", [
    ({"tolerance": 0}, ValueError, "above 0 and below 1"), ({"tolerance": 1.0}, ValueError, "got 1.0"),
    ({"tolerance": np.nan}, ValueError, "got nan"), ({"tolerance": "1e-3"}, TypeError, "a number, got '1e-3'"),
    ({"tolerance": True}, TypeError, "got True"),
    ({"tolerance": 0.1, "tree": np.ones((1, 1), bool)}, ValueError, "pass the tree as a mask"),
    ({"tolerance": 0.1, "out": np.empty((1, 1, 1, 4), "float32")}, ValueError, "out"),
])  # fmt: skip
def test_bad_calls(wrong, error, says):
    cache, *_ = filled(np.random.default_rng(6), n=20)
    with pytest.raises(error, match=says):
        cache.attend(np.ones((1, 1, 1, 16), "float32"), **wrong)


def test_caches_that_have_no_bounds():
    with pytest.raises(ValueError, match="made with bounds=True"):
        KVCache(1, 1, 8, 9).attend(np.ones((1, 1, 1, 8), "float32"), tolerance=0.1)
    with pytest.raises(ValueError, match="bounds=True knows"):
        _ = KVCache(1, 1, 8, 9).largest_values


def numbers(dtype, heads, k, v, **rows):
    """Keys and values as a cache gives them back, in float64."""
    cache = KVCache(len(k), heads, k.shape[-1], k.shape[2], value_dim=v.shape[-1], dtype=dtype, **rows)
    cache.append(*((k,) if cache.latent else (k, v)))
    return cache.keys.astype("float64"), cache.values.astype("float64")


def as_one_of(kind, path, heads, k, v, lengths, **rows):
    """A cache of some kind with these tokens; the sequences of a pool; and what the one query of a ring sees."""
    batch, _, n, dim = k.shape
    dims, own, seen = dict(value_dim=v.shape[-1], bounds=True, **rows), (), None
    given = (k,) if rows.get("latent") else (k, v)
    if kind.startswith("pages"):
        window = n // 2 if kind == "pages with a window" else None
        cache = PagedKVCache(heads, dim, 4 + n * batch // 3, page_size=7, window=window, **dims)
        own = ([cache.add() for _ in range(batch)],)
    elif kind.startswith("ring"):
        keep, window = (3 if kind == "ring that keeps" else 0), n // 2
        cache = KVCache(batch, heads, dim, keep + window + 10, window=window, keep=keep, **dims)
    else:
        of = {"encoder": dict(causal=False), "file": dict(path=path)}.get(kind, {})
        cache = KVCache(batch, heads, dim, n + 3, **of, **dims)
    for at in range(0, n, 9):
        step = [x[:, :, at : at + 9] for x in given]
        cache.append(*own, *step, lengths=np.clip(np.subtract(lengths, at), 0, step[0].shape[2]))
    if cache.causal and cache.window is not None:
        j, last = np.arange(n), np.reshape(lengths, (-1, 1, 1, 1)) - 1
        seen = (j >= last - cache.window) & (j <= last) | (j < getattr(cache, "keep", 0))
    return cache, own, seen


KINDS = ["slab", "file", "encoder", "ring", "ring that keeps", "pages", "pages with a window"]


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_every_kind_of_cache(tmp_path_factory, kind, data):
    """All types of rows, latent and rotated ones too: the bound holds, and keys are left out."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    batch, heads, group, n = draw(1, 2), draw(1, 2), draw(1, 3), data.draw(st.integers(1, 500))
    rows = dict(dtype=draw(*ALL_TYPES, *QUANTISED), latent=draw(False, True))
    rows["rotate"] = rows["dtype"] in QUANTISED and draw(False, True)
    dims = (16, 8) if rows["latent"] else (draw(1, 33), draw(1, 16))
    k, v = (normal(rng, (batch, heads, n, dim)).astype("float32") for dim in dims)
    if rows["dtype"] not in QUANTISED:
        k, v = k.astype(rows["dtype"]), v.astype(rows["dtype"])
    lengths = rng.integers(1, n + 1, batch)
    lengths[rng.integers(batch)] = n
    path = tmp_path_factory.mktemp("bounds") / "cache.kv"
    cache, own, seen = as_one_of(kind, path, heads, k, v, lengths, **rows)
    q = (normal(rng, (batch, heads * group, 1, dims[0])) * draw(0.3, 5, 40)).astype(
        "float32" if rows["dtype"] in QUANTISED else rows["dtype"]
    )
    stored = numbers(rows.pop("dtype"), heads, k, v, **rows)
    options = {"sinks": normal(rng, heads * group)} if draw(False, True) else {}
    hold(cache, q, *stored, draw(1e-4, 1e-2, 0.3), own, seen, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_few_keys_of_every_kind_are_read(tmp_path, kind, dtype):
    rng = np.random.default_rng(11)
    k, v = normal(rng, (2, 1, 2, 800, 32)).astype("float32")
    rows = dict(dtype=dtype, rotate=dtype in QUANTISED)
    cache, own, seen = as_one_of(kind, tmp_path / "cache.kv", 2, k, v, [800], **rows)
    q = normal(rng, (1, 4, 1, 32)).astype("float32") * 10
    stored = numbers(dtype, 2, k, v, rotate=rows["rotate"])
    assert hold(cache, q, *stored, 1e-3, own, seen) < 0.1
    if "window" not in kind and not kind.startswith("ring"):
        bias = np.where(np.arange(800) % 3, 0, -1e9).astype("float32")[None]
        assert hold(cache, q, *stored, 1e-3, own, bias=bias) < 0.1
    token = normal(rng, (1, 2, 1, 32)).astype("float32")
    if kind == "file":
        cache.flush()
    other = KVCache.load(tmp_path / "cache.kv") if kind == "file" else copy.copy(cache)
    found = cache.step(*own, q, token, token, tolerance=1e-3)
    other.append(*own, token, token)
    expected = other.attend(*own, q, tolerance=1e-3)
    same_bits(found[:2], expected[:2])
    assert found[2] == expected[2] < 0.1
    assert not cache.step(*own, q * 0, token, token, tolerance=1e-3)[1].any()
    if kind != "file":
        path = tmp_path / "saved.kv"
        cache.save(path)
        for again in (type(cache).open(path), pickle.loads(pickle.dumps(cache))):
            assert again.bounds and "bounds=True" in repr(again)
            same_bits(again.attend(*own, q, tolerance=1e-3)[:2], cache.attend(*own, q, tolerance=1e-3)[:2])


@pytest.mark.parametrize("value", [-1e9, np.finfo("float32").min, -65504.0])
def test_large_biases_that_mean_minus_infinity(value):
    rng = np.random.default_rng(12)
    cache, k, v = filled(rng, n=500, batch=2)
    q = normal(rng, (2, 2, 2, 16)).astype("float32") * 20
    hidden = rng.random((2, 1, 2, 500)) < 0.4
    bias = np.where(hidden, value, normal(rng, (2, 1, 2, 500))).astype("float32")
    assert hold(cache, q, k, v, 1e-3, bias=bias) < 0.3
    hold(cache, q, k, v, 1e-3, bias=np.maximum(bias, -65504).astype("float16"))
    bias[1, :, 1] = value  # of all keys: they share the weight
    assert (hold(cache, q, k, v, 1e-3, bias=bias) == 1) == (value < -1e6)
    bias[1, :, 1, ::2] = value * 0.9
    hold(cache, q, k, v, 1e-3, bias=bias)
    hold(cache, q, k, v, 1e-3, bias=bias, sinks=[-1e6, 0])
    hold(cache, q * 1e6, k, v, 1e-3, bias=bias)


def test_pages_that_are_copied_take_along_what_is_known():
    rng = np.random.default_rng(13)
    pool = PagedKVCache(1, 16, 60, page_size=16, bounds=True)
    k, v = normal(rng, (2, 1, 1, 400, 16)).astype("float32")
    a = pool.add()
    pool.append([a], k, v)
    b = pool.fork(a)
    token = normal(rng, (2, 1, 1, 1, 16)).astype("float32")
    pool.append([b], *token)
    pool.select(b, 300, [5, 1, 7])
    q = normal(rng, (2, 2, 1, 16)).astype("float32") * 20
    kept = np.r_[:300, 305, 301, 307]
    own = [np.zeros((2, 1, 400, 16)) for _ in range(2)]
    for x, y in zip(own, (k, v), strict=True):
        x[0], x[1, :, : len(kept)] = y[0], y[0][:, kept]
    assert hold(pool, q, *own, 1e-3, ([a, b],)) < 0.3
    same_bits(pool.largest_values([b])[0, 0], np.abs(v[0, 0, kept]).max().astype("float64"))
    with pytest.raises(ValueError, match="bounds=True knows"):
        PagedKVCache(1, 8, 4).largest_values([])


def test_what_caches_were_made_with():
    cache = KVCache(1, 1, 8, 9, dtype="int8", rotate=True, latent=True, bounds=True)
    pool = PagedKVCache(1, 8, 9, dtype="int8", rotate=True, latent=True, bounds=True)
    for one in (cache, pool):
        assert (one.latent, one.rotate, one.bounds) == (True, True, True)
    plain = KVCache(1, 1, 8, 9)
    assert (plain.latent, plain.rotate, plain.bounds) == (False, False, False)
    with pytest.raises(AttributeError, match="cannot be set"):
        plain.bounds = True


def test_steps_that_fail_change_nothing():
    cache, *_ = filled(np.random.default_rng(14), n=20)
    pool = PagedKVCache(1, 16, 4, bounds=True)
    own = ([pool.add()],)
    q, k = np.ones((1, 1, 1, 16), "float32"), np.ones((1, 1, 1, 16), "float32")
    for one, sequences in ((cache, ()), (pool, own)):
        before = repr(one)
        wrongs = {"below 1": {}, "as a mask": {"tree": np.eye(1) > 0}, "those of a tree": {"q_positions": [0]}}
        for says, wrong in wrongs.items():
            wrong = {"tolerance": 0.1 if wrong else 2} | wrong
            with pytest.raises(ValueError, match=says):
                one.step(*sequences, q, k, k, **wrong)
        assert repr(one) == before
