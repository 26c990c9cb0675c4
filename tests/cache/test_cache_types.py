"""What caches of each type store: quantised rows bit for bit, what they read as, what is taken and what is refused."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from _quantised import QUANTISED, as_stored, dequantise, quantise, rotate
from _questions import hold
from _util import ALL_TYPES, child_says, compare, normal, same_bits

from qkv_fast import KVCache, PagedKVCache, attention, explain, isa, num_threads, reference

pytestmark = pytest.mark.usefixtures("isa")
CACHE_TYPES = (*ALL_TYPES, *QUANTISED)
quantised = pytest.mark.parametrize("stored", QUANTISED)


def rows_of(cache):
    """The bytes of all keys and values, (batch, kv_heads, tokens, bytes)."""
    return tuple(x[:, :, : cache.lengths.max()] for x in (cache._k, cache._v))


def appended(x, stored):
    """A cache with these keys, of which a row is poisoned first: every byte has to be written."""
    cache = KVCache(*x.shape[:2], x.shape[3], x.shape[2], dtype=stored)
    cache._k[...] = 0xA5
    cache.append(x, x)
    return cache


def hostile(rng, dim):
    """Rows of (1, 1, n, dim) that are easy to get wrong."""
    steps = rng.integers(-16, 17, dim) / 2  # halves between two steps of int4
    tied = rng.choice([-3.0, 3.0], dim)
    subnormal = rng.integers(-9, 10, dim) * 2.0**-149
    small = normal(rng, dim) * 2.0**-126
    large = np.where(rng.random(dim) < 0.5, 1, -1) * float(np.finfo("f4").max)
    usual = normal(rng, (9, dim))
    broken = normal(rng, (4, dim))
    broken[[0, 1, 2, 3], rng.integers(0, dim, 4)] = [np.nan, np.inf, -np.inf, -np.nan]
    rows = [steps, tied, -np.abs(tied), subnormal, small, large, np.zeros(dim), -np.zeros(dim), *usual, *broken]
    return np.array(rows, "float32")[None, None]


@quantised
def test_rows_are_those_of_the_reference(stored):
    rng = np.random.default_rng(0)
    for dim in [*range(1, 131), 1023, 1024]:
        x = hostile(rng, dim)
        cache = appended(x, stored)
        same_bits(rows_of(cache), (quantise(x, stored),) * 2)
        with np.errstate(invalid="ignore"):  # infinity times zero, which makes the row NaN
            expected = as_stored(x, stored)
        assert np.array_equal(cache.keys, expected, equal_nan=True), dim  # of 0 the sign is free
        assert cache.keys.dtype == np.float32 and cache.keys.flags.owndata
        finite = np.isfinite(x).all(axis=-1)
        assert np.isfinite(cache.keys[finite]).all()


@pytest.mark.parametrize("stored, share", [("int8", 0.5 / 127), ("int4", 1 / 8)])
def test_error_of_a_number(stored, share):
    """Half a step of int8; of int4 a step, for what lies opposite to the largest of its group."""
    x = normal(np.random.default_rng(1), (2, 3, 50, 96))
    groups = (2, 3, 50, 3, 32) if stored == "int4" else x.shape
    most = np.abs(x.reshape(groups)).max(axis=-1, keepdims=True)
    error = np.abs(appended(x, stored).keys - x).reshape(groups)
    assert np.all(error <= share * most * (1 + 2**-7))  # a scale of bfloat16 is at most 2**-7 too large


@quantised
def test_zero_stays_zero_and_nan_stays_in_its_scale(stored):
    x = normal(np.random.default_rng(2), (1, 1, 5, 70))
    x[..., ::3] = 0
    x[0, 0, 2, 40] = np.nan
    keys = appended(x, stored).keys
    lost = np.arange(32, 64) if stored == "int4" else np.arange(70)
    assert np.isnan(keys[0, 0, 2, lost]).all()
    assert np.isnan(keys).sum() == lost.size
    assert np.all((keys == 0) | np.isnan(keys), where=x == 0)


@quantised
@pytest.mark.parametrize("given", [*ALL_TYPES, ">f4", ">f8", ">f2"])
def test_numbers_of_every_type_and_stride(stored, given):
    rng = np.random.default_rng(3)
    big = normal(rng, (2, 9, 2, 80), "float32").astype(given)
    expected = quantise(np.ascontiguousarray(big.astype("float32")[:, ::-1, :, 5:75:2].swapaxes(1, 2)), stored)
    cache = KVCache(2, 2, 35, 9, dtype=stored)
    view = big[:, ::-1, :, 5:75:2]
    cache.append(view, view, layout="blhd")
    same_bits(rows_of(cache), (expected, expected))
    packed = np.frombuffer(b"\0" + big.tobytes(), np.uint8)[1:].view(big.dtype).reshape(big.shape)  # unaligned
    view = packed[:, ::-1, :, 5:75:2]
    pool = PagedKVCache(2, 35, 6, page_size=4, dtype=stored)
    pool.append([pool.add(), pool.add()], view, view, layout="blhd")
    for b in range(2):
        k, v = pool.gather(b)
        same_bits((k, v), (cache.keys[b], cache.values[b]))


def test_finite_stays_finite():
    wide = np.full((1, 1, 1, 8), 1e300)
    for stored in QUANTISED:
        assert np.isfinite(appended(wide, stored).keys).all()


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_queries_of_every_type(dtype):
    """The result is attention over `keys` and `values`, in q's type."""
    rng = np.random.default_rng(4)
    k, v = normal(rng, (2, 2, 600, 40)), normal(rng, (2, 2, 600, 24))
    cache = KVCache(2, 2, 40, 700, value_dim=24, dtype=dtype)
    cache.append(k, v)
    given = {"float64": ["float64"], "float32": ["float32", "float64"], "float16": ["float16", "float32", "float64"]}
    given |= {"bfloat16": ["bfloat16", "float32", "float64"]}
    for kind in given.get(dtype, ALL_TYPES):
        for rows in (1, 20):  # few and many
            q = normal(rng, (2, 4, rows, 40), kind)
            held = cache.keys, cache.values
            if dtype in QUANTISED and kind == "float64":  # which `keys` is rounded from
                held = (dequantise(rows, dim, dtype, kind) for rows, dim in zip(rows_of(cache), (40, 24), strict=True))
            compare(cache.attend(q, return_lse=True), (q, *held), causal=True)
    same_bits(cache.keys, as_stored(k, dtype))
    same_bits(cache.values, as_stored(v, dtype))


MIXED = [
    ("float16", "int8"), ("int8", "int4"), ("float32", "float16"), ("int4", "float32"), ("bfloat16", "float16"),
    ("float64", "int8"), ("float16", "float64"),
]  # fmt: skip


@pytest.mark.parametrize("dtype, value_dtype", MIXED)
@pytest.mark.parametrize("group", [1, 8])
def test_keys_and_values_of_two_types(dtype, value_dtype, group):
    """One to sixty rows of a head: both kinds of kernels."""
    rng = np.random.default_rng(7)
    k, v = normal(rng, (2, 2, 1100, 40)), normal(rng, (2, 2, 1100, 24))
    cache = KVCache(2, 2, 40, 1200, value_dim=24, dtype=dtype, value_dtype=value_dtype)
    pool = PagedKVCache(2, 40, 20, value_dim=24, dtype=dtype, value_dtype=value_dtype)
    cache.append(k, v)
    pool.append([pool.add(), pool.add()], k, v)
    held = as_stored(k, dtype), as_stored(v, value_dtype)
    same_bits((cache.keys, cache.values), held)
    assert cache.nbytes == sum(KVCache(2, 2, n, 1200, dtype=d).nbytes // 2 for n, d in ((40, dtype), (24, value_dtype)))
    kind = "float64" if "float64" in (dtype, value_dtype) else "float32"
    if kind == "float64":  # which what is read back is rounded from
        wide = zip(rows_of(cache), held, (dtype, value_dtype), strict=True)
        held = [dequantise(rows, x.shape[3], d, kind) if d in QUANTISED else x for rows, x, d in wide]
    for rows in (1, 7):
        q = normal(rng, (2, 2 * group, rows, 40), kind)
        got = cache.attend(q, return_lse=True)
        compare(got, (q, *held), causal=True)
        same_bits(pool.attend([0, 1], q, return_lse=True), got)
        plan = explain(cache.attend, q)
        assert (plan.dtypes["k"], plan.dtypes["v"]) == (dtype, value_dtype)
    keys, half = KVCache(2, 2, 40, 1200, value_dim=24, dtype=dtype), normal(rng, (2, 2, 3, 40), kind)
    keys.append(k, v.astype("float32"))
    same_bits(cache.received(half), keys.received(half))  # which values have no part in


@pytest.mark.parametrize("dtype, value_dtype", MIXED)
def test_names_of_two_types(dtype, value_dtype):
    cache = KVCache(1, 1, 8, 5, dtype=dtype, value_dtype=value_dtype)
    assert (cache.dtype, cache.value_dtype) == (dtype, value_dtype)
    assert repr(cache).endswith(f"dtype={dtype!r}, value_dtype={value_dtype!r}, lengths=[0])")
    again = pickle.loads(pickle.dumps(cache))
    assert (again.dtype, again.value_dtype) == (dtype, value_dtype)
    with pytest.raises(TypeError, match=r"value_dtype must be one of .*, bfloat16, int8, int4, got 'int5'"):
        KVCache(1, 1, 8, 5, dtype=dtype, value_dtype="int5")


def test_each_type_is_checked_by_itself():
    cache = KVCache(1, 2, 8, 5, dtype="float16", value_dtype="int8")
    with pytest.raises(TypeError, match="k must be float16 as the cache, float32 or narrower, got float64"):
        cache.append(K.astype("float64"), K.astype("float64"))
    cache.append(K, K.astype("float64"))
    with pytest.raises(TypeError, match="do not mix"):
        cache.attend(K.astype(ml_dtypes.bfloat16))
    mixed = KVCache(1, 2, 8, 5, dtype="float16", value_dtype="bfloat16")
    with pytest.raises(TypeError, match="got q in float16 and the cache's values in bfloat16"):
        mixed.attend(K.astype("float16"))
    wide = KVCache(1, 2, 8, 5, dtype="int8", value_dtype="float64")
    wide.append(K, K)
    with pytest.raises(TypeError, match="q's type or a narrower one, got float64 for float32"):
        wide.attend(K)


@pytest.mark.parametrize("types", [("float16", None), ("int4", None), ("float32", "int4"), ("int8", "float32")])
def test_what_is_asked_for_while_passes_are_copied(types):
    """More keys than caches are expected to hold: lines of the next pass, which may be short or in another page."""
    dim, dim_v, count = 128, 96, 4200
    k, v, q = (normal(np.random.default_rng(9), (1, 2, *size)) for size in ((count, dim), (count, dim_v), (40, dim)))
    cache = KVCache(1, 2, dim, count, value_dim=dim_v, dtype=types[0], value_dtype=types[1])
    pool = PagedKVCache(2, dim, 7, value_dim=dim_v, dtype=types[0], value_dtype=types[1], page_size=700)
    cache.append(k, v)
    pool.append([pool.add()], k, v)
    for window in (None, 333):
        got = cache.attend(q, window=window, return_lse=True)
        compare(got, (q, cache.keys, cache.values), causal=True, window=window)
        same_bits(pool.attend([0], q, window=window, return_lse=True), got)


@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.parametrize("dim, dim_v", [(96, 64), (40, 24), (37, 21), (33, 33)])
def test_latent_values_are_the_first_elements_of_keys(dtype, dim, dim_v):
    """Of whole vectors and others, of few rows and many; with a window the first block is cut."""
    rng = np.random.default_rng(8)
    k = normal(rng, (2, 1, 1100, dim))
    cache = KVCache(2, 1, dim, 1200, value_dim=dim_v, dtype=dtype, latent=True)
    pool = PagedKVCache(1, dim, 20, value_dim=dim_v, dtype=dtype, latent=True)
    cache.append(k)
    pool.append([pool.add(), pool.add()], k.swapaxes(1, 2), layout="blhd")
    held = as_stored(k, dtype)
    same_bits((cache.keys, cache.values), (held, held[..., :dim_v]))
    same_bits(pool.gather(1), (held[1], held[1, ..., :dim_v]))
    assert cache.nbytes == KVCache(2, 1, dim, 1200, dtype=dtype).nbytes // 2
    assert pool.nbytes == PagedKVCache(1, dim, 20, dtype=dtype).nbytes // 2
    kind = "float64" if dtype == "float64" else "float32"
    for heads, rows in ((1, 1), (16, 1), (3, 40)):
        q = normal(rng, (2, heads, rows, dim), kind)
        options = dict(scale=0.07, window=None if rows == 1 else 300)
        got = cache.attend(q, return_lse=True, **options)
        inputs = q, held, held[..., :dim_v]
        compare(got, inputs, causal=True, **options)
        if dtype not in QUANTISED:
            same_bits(got, attention(*inputs, causal=True, return_lse=True, **options))
        same_bits(pool.attend([0, 1], q, return_lse=True, **options), got)
    apart = KVCache(2, 1, dim, 1200, value_dim=dim_v, dtype=dtype)
    apart.append(k, k[..., :dim_v])
    with num_threads(1):
        plan, other = explain(cache.attend, q), explain(apart.attend, q)
    assert plan.bytes == other.bytes - apart._v[:, :, :1100].nbytes  # rows are read once
    tiled = isa().startswith("amx")  # V is turned in tiles, and can't be the beginning of K
    assert dtype in ("float32", "float64") or tiled or plan.tiles_copied <= other.tiles_copied // 2


def test_the_bytes_of_a_latent_token():
    """As in DeepSeek's models."""
    sizes = {
        dtype: KVCache(1, 1, 576, 10, value_dim=512, dtype=dtype, latent=True).nbytes // 10 for dtype in CACHE_TYPES
    }
    assert sizes == {"float32": 2304, "float64": 4608, "float16": 1152, "bfloat16": 1152, "int8": 580, "int4": 324}


@quantised
@pytest.mark.parametrize("dim, dim_v, latent", [(128, 96, False), (37, 7, False), (576, 512, True), (40, 24, True)])
def test_rotated_rows(stored, dim, dim_v, latent):
    """Bit for bit; attention is that over what is read back, to rounding."""
    rng = np.random.default_rng(9)
    k, v = normal(rng, (2, 1, 300, dim)), normal(rng, (2, 1, 300, dim_v))
    form = dict(value_dim=dim_v, dtype=stored, latent=latent, rotate=True)
    cache, pool = KVCache(2, 1, dim, 310, **form), PagedKVCache(1, dim, 20, **form)
    turn = dim_v if latent else 0
    given = (k,) if latent else (k, v)
    cache.append(*given)
    pool.append([pool.add(), pool.add()], *given)
    same_bits(rows_of(cache)[0], quantise(rotate(k, turn), stored))
    held = as_stored(k, stored, turn)
    values = held[..., :dim_v] if latent else as_stored(v, stored, 0)
    same_bits((cache.keys, cache.values), (held, values))
    same_bits(pool.gather(0), (held[0], values[0]))
    for heads, rows, kind in ((1, 1, "float32"), (16, 1, "float16"), (2, 30, "bfloat16"), (2, 30, "float32")):
        q = normal(rng, (2, heads, rows, dim), kind)
        got = cache.attend(q, return_lse=True)
        assert got[0].dtype == q.dtype
        compare(got, (q, held, values), causal=True)
        same_bits(pool.attend([0, 1], q, return_lse=True), got)
        out = np.full((2, rows, heads, dim_v), np.nan, kind)
        cache.attend(q.swapaxes(1, 2), layout="blhd", out=out)
        same_bits(out.swapaxes(1, 2), got[0])
        hold(cache.top_keys(q), "top_keys", q, held, causal=True)
    ring = KVCache(2, 1, dim, 60, window=40, keep=3, **form)
    ring.append(*given)
    j, at = np.arange(300), np.arange(298, 300)[:, None]
    q = normal(rng, (2, 3, 2, dim))
    compare(ring.attend(q, return_lse=True), (q, held, values), causal=True, mask=(j < 3) | (j >= at - 40))


@pytest.mark.parametrize("stored, most", [("int8", 0.3), ("int4", 0.5)])
def test_rotation_helps_where_an_element_is_large(stored, most):
    """One channel of K and of V has 10 deviations."""
    rng = np.random.default_rng(10)
    k, v, q = normal(rng, (1, 2, 500, 128)), normal(rng, (1, 2, 500, 128)), normal(rng, (1, 8, 20, 128))
    k[..., 17] *= 10
    v[..., 5] *= 10
    exact = reference.attention(*(x.astype("float64") for x in (q, k, v)), causal=True)
    errors = []
    for turned in (False, True):
        cache = KVCache(1, 2, 128, 500, dtype=stored, rotate=turned)
        cache.append(k, v)
        errors.append(np.sqrt(((cache.attend(q) - exact) ** 2).mean()))
    assert errors[1] <= most * errors[0]


def test_rotation_is_of_quantised_rows_alone():
    for make, sizes in ((KVCache, (1, 2, 8, 5)), (PagedKVCache, (2, 8, 5))):
        with pytest.raises(ValueError, match="rotate is for rows of int8 and int4, got float32 and float16"):
            make(*sizes, value_dtype="float16", rotate=True)
    rng = np.random.default_rng(11)
    k, q = normal(rng, (1, 2, 50, 40)), normal(rng, (1, 2, 3, 40), "float16")
    for types in (("float16", "int8"), ("int4", "float32")):
        cache = KVCache(1, 2, 40, 50, dtype=types[0], value_dtype=types[1], rotate=True)
        cache.append(k, k)
        same_bits((cache.keys, cache.values), tuple(as_stored(k, dtype, 0) for dtype in types))
        wide = q.astype("float32")
        compare(cache.attend(wide, return_lse=True), (wide, cache.keys, cache.values), causal=True)
    assert repr(cache).endswith("dtype='int4', value_dtype='float32', rotate=True, lengths=[50])")


def test_what_latent_caches_refuse():
    for make, sizes in ((KVCache, (1, 2, 8, 5)), (PagedKVCache, (2, 8, 5))):
        with pytest.raises(ValueError, match="value_dim is at most head_dim, got 9 and 8"):
            make(*sizes, value_dim=9, latent=True)
        with pytest.raises(ValueError, match="of their keys' type, got value_dtype='int8' for 'float32'"):
            make(*sizes, value_dtype="int8", latent=True)
    cache, pool = KVCache(1, 2, 8, 5, value_dim=4, latent=True), PagedKVCache(2, 8, 5, value_dim=4, latent=True)
    plain, s = KVCache(1, 2, 8, 5), pool.add()
    for call in (lambda: cache.append(K, K[..., :4]), lambda: pool.append([s], K, K[..., :4])):
        with pytest.raises(TypeError, match="a latent cache takes keys alone"):
            call()
    with pytest.raises(TypeError, match="v is missing"):
        plain.append(K)
    with pytest.raises(ValueError, match=r"k must be of shape \(1, 2, tokens, 8\) \(k.shape=\(1, 2, 3, 7\)\)"):
        cache.append(K[..., :7])
    assert cache.lengths.tolist() == pool.lengths([s]).tolist() == plain.lengths.tolist() == [0]
    assert repr(cache) == (
        "KVCache(batch=1, kv_heads=2, head_dim=8, capacity=5, value_dim=4, latent=True, dtype='float32', lengths=[0])"
    )


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_a_ring_with_kept_tokens(dtype):
    """The kept tokens are computed apart, from the same rows."""
    rng = np.random.default_rng(5)
    k, v = as_stored(normal(rng, (2, 2, 90, 40)), dtype), as_stored(normal(rng, (2, 2, 90, 8)), dtype)
    cache = KVCache(2, 2, 40, 40, value_dim=8, dtype=dtype, window=30, keep=3)
    cache.append(k, v)
    q = normal(rng, (2, 4, 2, 40), "float64" if dtype == "float64" else "float32")
    j, at = np.arange(90), np.arange(88, 90)[:, None]
    held, values = (np.zeros((2, 2, 90, x.shape[3]), x.dtype) for x in (cache.keys, cache.values))
    there = cache.positions[0]
    held[:, :, there], values[:, :, there] = cache.keys, cache.values
    seen = dict(mask=(j < 3) | (j >= at - 30), causal=True, sinks=[0.5, -1, 0, 1])
    compare(cache.attend(q, sinks=seen["sinks"], return_lse=True), (q, held, values), **seen)


WORDS = {
    "float32": "float32", "f4": "float32", "float64": "float64", "float16": "float16", "bfloat16": "bfloat16",
    "int8": "int8", "int4": "int4", np.float16: "float16", np.int8: "int8", np.dtype("i1"): "int8",
    ml_dtypes.bfloat16: "bfloat16", np.dtype(ml_dtypes.bfloat16): "bfloat16", ml_dtypes.int4: "int4",
}  # fmt: skip


@pytest.mark.parametrize("given", WORDS)
def test_names_of_types(given):
    assert repr(KVCache(1, 1, 33, 5, dtype=given)).endswith(f"dtype='{WORDS[given]}', lengths=[0])")
    assert f"dtype='{WORDS[given]}'" in repr(PagedKVCache(1, 33, 5, dtype=given))


@pytest.mark.parametrize("given", ["int16", "uint8", "int2", ">f4", bool, object, "float8_e4m3fn", 7, None])
def test_types_that_no_cache_has(given):
    for make in (lambda: KVCache(1, 1, 8, 5, dtype=given), lambda: PagedKVCache(1, 8, 5, dtype=given)):
        with pytest.raises(TypeError, match=r"dtype must be one of .*, bfloat16, int8, int4, got"):
            make()


def test_bytes_of_a_row():
    sizes = {dtype: KVCache(1, 1, 128, 10, dtype=dtype)._k.nbytes // 10 for dtype in CACHE_TYPES}
    assert sizes == {"float32": 512, "float64": 1024, "float16": 256, "bfloat16": 256, "int8": 132, "int4": 72}


K = np.ones((1, 2, 3, 8), "float32")
REFUSED = {
    ("float32", "float64"): "k must be float32 as the cache or narrower, got float64",
    ("float16", "float64"): "k must be float16 as the cache, float32 or narrower, got float64",
    ("float16", "bfloat16"): "k must be float16 as the cache, float32 or narrower, got bfloat16",
    ("bfloat16", "float16"): "k must be bfloat16 as the cache, float32 or narrower, got float16",
    ("int8", "int8"): r"k must be float16, .* got int8; pass k.astype\('float32'\)",
    ("int4", "uint8"): "k must be float16, .* got uint8",  # of which its rows are made
    ("int8", "uint8"): "k must be float16, .* got uint8",
    ("int4", "complex64"): "k must be float16, .* got complex64",
    ("int8", "uint16"): "got uint16; .* the bits of bfloat16",
}


@pytest.mark.parametrize("dtype, given", REFUSED)
def test_numbers_that_are_refused(dtype, given):
    cache, pool = KVCache(1, 2, 8, 5, dtype=dtype), PagedKVCache(2, 8, 5, dtype=dtype)
    pool.add()
    for call in (lambda: cache.append(K.astype(given), K), lambda: pool.append([0], K.astype(given), K)):
        with pytest.raises(TypeError, match=REFUSED[dtype, given]):
            call()
    assert cache.lengths.tolist() == [0] and pool.lengths([0]).tolist() == [0]


@pytest.mark.parametrize(
    "dtype, given",
    [
        ("float32", "float16"),
        ("float32", "bfloat16"),
        ("float64", "float32"),
        ("float16", "float32"),
        ("float16", ">f2"),
    ],
)
def test_numbers_of_other_types(dtype, given):
    """Narrower ones, another byte order, and float32, which is rounded."""
    cache = KVCache(1, 2, 8, 5, dtype=dtype)
    x = (np.arange(48).reshape(K.shape) / 7).astype(given)
    cache.append(x, -x)
    np.testing.assert_array_equal(cache.keys, x.astype(dtype))
    np.testing.assert_array_equal(cache.values, -x.astype(dtype))


@pytest.mark.parametrize("dtype, given", [("int8", "int8"), ("int4", "uint8"), ("bfloat16", "float16")])
def test_queries_that_are_refused(dtype, given):
    cache = KVCache(1, 2, 8, 5, dtype=dtype)
    cache.append(K, K)
    with pytest.raises(TypeError, match=rf"(q must be|do not mix).* got .*{given}"):
        cache.attend(K.astype(given))


def test_bfloat16_without_ml_dtypes_says_what_to_install(tmp_path):
    path = tmp_path / "chat.kv"
    KVCache(1, 1, 8, 5, dtype="bfloat16", path=path).flush()
    code = f"""
import sys
sys.modules["ml_dtypes"] = None  # cannot be imported, whether or not it is installed
import qkv_fast
calls = [
    lambda: qkv_fast.KVCache(1, 1, 8, 5, dtype="bfloat16"), lambda: qkv_fast.PagedKVCache(1, 8, 5, dtype="bfloat16"),
    lambda: qkv_fast.KVCache.open({str(path)!r}), lambda: qkv_fast.KVCache.load({str(path)!r}),
]
for call in calls:
    try:
        call()
    except ImportError as error:
        assert str(error).endswith(": a cache of bfloat16 needs ml_dtypes: pip install ml_dtypes"), error
    else:
        raise AssertionError("no error")
print(qkv_fast.KVCache(1, 1, 8, 5, dtype="int4"))
"""
    assert child_says(code) == "KVCache(batch=1, kv_heads=1, head_dim=8, capacity=5, dtype='int4', lengths=[0])"


def test_import_leaves_ml_dtypes_alone():
    code = "import sys, qkv_fast; qkv_fast.KVCache(1, 1, 8, 5, dtype='int4'); print('ml_dtypes' in sys.modules)"
    assert child_says(code) == "False"
