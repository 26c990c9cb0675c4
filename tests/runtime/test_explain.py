"""explain(): what it says is what then happens, as the counters of the executed call have it."""

import inspect
import itertools
import re
import tracemalloc

import numpy as np
import pytest
from _explained import agree
from _util import child_says, qkv

import qkv_fast
from qkv_fast import _runtime

LENGTHS = [(1, 1), (1, 700), (5, 130), (48, 128), (49, 129), (100, 300), (300, 100), (200, 2300)]
LIMITS = {
    "none": {},
    "causal": dict(causal=True),
    "top-left": dict(causal="top-left"),
    "left": dict(window=(40, None)),
    "right": dict(window=(None, 7)),
    "window": dict(window=(150, 20)),
    "itself": dict(window=0),
    "ahead": dict(window=(3, 3), q_offset=1000),
    "behind": dict(causal=True, q_offset=-60),
    "far": dict(window=(2**60, 2**60), q_offset=2**59),
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_limits_and_lengths(isa, lengths, limits):
    for dtype, heads in (("float32", (2, 2)), ("float64", (6, 2)), ("float32", (7, 1))):
        agree(*qkv(1, dtype, heads=heads, lengths=lengths), **LIMITS[limits], num_threads=1)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_and_splits(isa, threads):
    splits = set()
    for heads, lengths in itertools.product([(1, 1), (8, 2), (16, 16)], [(1, 8000), (130, 3000), (1500, 1500)]):
        q, k, v = qkv(2, heads=heads, lengths=lengths, dims=(32, 24))
        for options in ({}, dict(causal=True), dict(window=(500, 9))):
            splits.add(agree(q, k, v, **options, num_threads=threads).split)
    assert splits == ({False} if threads == 1 else {False, True})


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(isa, seed):
    """Batches with a length and an offset each, groups, windows, layouts, strides, types."""
    rng = np.random.default_rng(seed)
    batch, heads, group = int(rng.integers(1, 6)), int(rng.integers(1, 4)), int(rng.integers(1, 6))
    lq, lk, d, dv = (int(rng.integers(1, n)) for n in (300, 1500, 40, 40))
    dtype = ("float32", "float64")[seed % 2]
    q, k, v = qkv(seed, dtype, batch=(batch,), heads=(heads * group, heads), lengths=(lq, lk), dims=(d, dv))
    options = {"num_threads": int(rng.integers(1, 5)), "return_lse": bool(rng.integers(2))}
    if rng.integers(2):
        options["kv_lengths"] = rng.integers(0, lk + 1, batch)
    if rng.integers(2) or "kv_lengths" in options:
        options["q_offset"] = rng.integers(-lq, lk, batch)
    if rng.integers(3):
        left, right = rng.integers(0, lk, 2).tolist()
        options["window"] = (left if rng.integers(3) else None, right if rng.integers(3) else None)
    options["causal"] = bool(rng.integers(2))
    if seed % 4 == 1:
        options["q_lengths"] = rng.integers(0, lq + 1, batch)
    if seed % 4 == 2:
        options["kv_starts"] = rng.integers(0, options.get("kv_lengths", lk) + 1, batch)
    if seed % 8 == 3:
        options.pop("q_offset", None)
        options["q_positions"] = rng.integers(-lq, lk, (batch, lq))
    if rng.integers(2):
        q, k, v = (np.ascontiguousarray(x.swapaxes(-3, -2)) for x in (q, k, v))
        options["layout"] = "blhd"
    change = int(rng.integers(5))
    if change == 1:
        k, v = (x.astype("float32") for x in (k, v))
    elif change == 2:
        q, k = q[..., ::-1], k.astype(k.dtype.newbyteorder("S"))
    elif change == 3:
        v = np.asfortranarray(v)
    plan = agree(q, k, v, **options)
    _check_work(plan, q, k, v, options)


@pytest.mark.parametrize("lk", [1, 2, 5, 101, 1000, 1001, 1025, 2049])
@pytest.mark.parametrize("masked", [False, True])
def test_few_rows_of_pairs(isa, lk, masked):
    """Values of an odd number of keys, in rows that have to be copied, seen from odd keys on."""
    q, k, v = (x.astype("bfloat16") for x in qkv(lk, heads=(2, 2), lengths=(1, lk), dims=(33, 31)))
    for options in ({}, {"window": (lk // 2, 0)}, {"kv_lengths": lk - 1}):
        if masked:
            options["mask"] = np.arange(lk) % 7 != 3
        plan = agree(q, k, np.asfortranarray(v), **options, num_threads=1)
        assert plan.tile_panels == 1 and plan.kernel.startswith("decode")


@pytest.mark.parametrize("dtype, rows", [("float64", 1), ("float64", 6), ("float32", 12), ("float16", 20)])
def test_few_rows_are_no_panels(isa, dtype, rows):
    q, k, v = qkv(3, dtype, heads=(2, 2), lengths=(rows, 100), dims=(256, 256))
    plan = agree(q, k, v, num_threads=2)
    assert plan.kernel.startswith("decode") and plan.tile_panels == 1


def _check_work(plan, q, k, v, options):
    """Operations and bytes against the reference's own matrix of visible pairs."""
    if options.get("layout") == "blhd":
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    batch, lq, lk = q.shape[:-3], q.shape[-2], k.shape[-2]
    limits = qkv_fast.reference._limits_of(options)
    visible = np.broadcast_to(qkv_fast.reference._visible(batch, lq, lk, limits), (*batch, 1, lq, lk))
    pairs = visible.sum() * q.shape[-3]
    assert plan.pairs == pairs and plan.pairs_all == q[..., 0].size * lk
    assert plan.operations == 2 * pairs * (q.shape[-1] + v.shape[-1])
    some = visible.any(axis=-2)
    keys = np.where(some.any(axis=-1), lk - some[..., ::-1].argmax(axis=-1) - some.argmax(axis=-1), 0)  # with gaps
    seen = keys.sum() * k.shape[-3]
    rows = np.broadcast_to(options.get("q_lengths", lq), batch).sum() * q.shape[-3]
    results = rows * (v.shape[-1] + options["return_lse"]) * q.itemsize
    assert plan.bytes == rows * q.shape[-1] * q.itemsize + results + seen * (k.shape[-1] + v.shape[-1]) * k.itemsize


def test_the_check_would_see_a_difference():
    q, k, v = qkv(3, lengths=(100, 300))
    plan = agree(q, k, v, causal=True)
    with _runtime.counters() as did:
        qkv_fast.attention(q, k, v)
    assert did["tiles_partial"] != plan.tiles_partial


def test_nothing_to_do():
    for lengths, dims in (((0, 5), (4, 4)), ((3, 5), (4, 0))):
        plan = agree(*qkv(1, lengths=lengths, dims=dims))
        assert plan.tasks == plan.operations == plan.bytes == 0
        assert "without computing" in str(plan) and plan.seconds == 0
    for arrays, options in ((qkv(1, lengths=(3, 0)), {}), (qkv(1), dict(q_offset=-99, causal=True))):
        plan = agree(*arrays, **options)
        assert plan.operations == 0 and plan.tasks == 1 and "without computing" in str(plan)
    assert agree(*qkv(1, lengths=(3, 5), dims=(4, 0)), return_lse=True).operations > 0


def test_nothing_is_computed_or_written():
    q, k, v = qkv(1, lengths=(64, 64))
    out = q.copy()
    qkv_fast.explain(out, k, v, out=out)
    assert np.array_equal(out, q)
    huge = np.broadcast_to(np.float32(1), (1, 1, 2**24, 64))  # 2**48 pairs
    out = np.empty((1, 1, 1000, 64), "float32")
    tracemalloc.start()
    plan = qkv_fast.explain(huge[:, :, :1000], huge, huge, out=out)
    assert plan.pairs == 1000 * 2**24 and tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_arrays_that_compute_when_they_are_asked():
    """A lazy array may call attention itself, and gets a result and not a plan."""

    class Lazy:
        def __array__(self, dtype=None, copy=None):
            return qkv_fast.attention(q, k, v)

    q, k, v = qkv(1)
    plan = qkv_fast.explain(Lazy(), k, v)
    assert plan.shapes["q"] == q.shape and "Lazy, copied to an array in every call" in plan.notes[0]


def test_it_takes_what_attention_takes():
    ours, theirs = (inspect.signature(f).parameters for f in (qkv_fast.explain, qkv_fast.attention))
    assert ours == theirs


def test_it_refuses_what_attention_refuses():
    q, k, v = qkv(1)
    for args, options, error in [
        ((q, k[..., :3], v), {}, ValueError),
        ((q, k, v.astype(int)), {}, TypeError),
        ((q, k, v), dict(window=-1), ValueError),
        ((q, k, v), dict(q_offset=2**61), OverflowError),
        ((q, k, v), dict(out=q[0]), ValueError),
        ((q, k, v), dict(num_threads=0), ValueError),
    ]:
        with pytest.raises(error, match="attention"):
            qkv_fast.explain(*args, **options)
    qkv_fast.attention(q, k, v)  # and leaves calls as they were


NOTES = {
    "a type narrower": lambda q, k, v: (q.astype("float64"), k, v),
    "k: swapped bytes": lambda q, k, v: (q, k.astype(">f4"), v),
    "q: rows whose elements": lambda q, k, v: (q[..., ::-1], k, v),
    "v: rows whose elements": lambda q, k, v: (q, k, np.asfortranarray(v)),
    "k: addresses": lambda q, k, v: (q, _unaligned(k), v),
    "q: a list": lambda q, k, v: (list(q), k, v),
    "queries: 5 rows": lambda q, k, v: (q[:, :5, :8], k[..., :8], v[..., :8]),
}


def _unaligned(x):
    room = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    room[...] = x
    return room


@pytest.mark.parametrize("text", NOTES)
def test_what_is_slow_is_named(text):
    """And what is not is not: each change adds its own note to a call that has none."""
    arrays = qkv(1, heads=(4, 4), lengths=(300, 300), dims=(32, 32))
    assert agree(*arrays, num_threads=1).notes == ()
    plan = agree(*NOTES[text](*arrays), num_threads=1)
    assert any(note.startswith(text) or text in note for note in plan.notes), plan.notes
    assert text in str(plan)


def test_other_notes():
    q, k, v = qkv(1, heads=(4, 4), lengths=(300, 300), dims=(32, 32))
    assert "temporary" in qkv_fast.explain(q, k, v, out=q, num_threads=1).notes[0]
    assert qkv_fast.explain(q, k, v, out=np.empty_like(q), num_threads=1).notes == ()
    few = qkv_fast.explain(q[:1, :1], k[:1, :30], v[:1, :30], num_threads=2)
    assert few.threads == 1 and any("not worth" in note or "no more tasks" in note for note in few.notes)
    many = _runtime.allowed_cpus() + 1
    assert any("CPUs" in note for note in agree(*qkv(2, heads=(64, 64), lengths=(300, 300)), num_threads=many).notes)
    if len(qkv_fast.available_isas()) > 1:
        with _runtime.force_isa("portable"):
            assert "CPU path: portable" in qkv_fast.explain(q, k, v, num_threads=1).notes[-1]


def test_where_the_number_of_threads_comes_from():
    arrays = qkv(1)
    assert qkv_fast.explain(*arrays, num_threads=np.int64(3)).threads_asked == 3
    assert qkv_fast.explain(*arrays, num_threads=3).threads_from == "num_threads="
    with qkv_fast.num_threads(2):
        assert qkv_fast.explain(*arrays).threads_from == "num_threads(n)"


@pytest.mark.parametrize("shape", [(64, 12, 64), (256, 4, 32), (512, 1, 64)])
def test_many_short_heads_are_work_for_two_threads(shape):
    """A row takes time whatever its keys: 64 heads of 12 tokens some 120 us, which two threads take half of."""
    array = np.zeros(shape, "float32")
    plan = agree(array, array, array, num_threads=2)
    assert plan.threads == 2
    if shape[1] > 1:  # enough to wake one that sleeps
        with _runtime.counters() as did:
            qkv_fast.attention(array, array, array, num_threads=2)
        assert did["threads"] == 2
    assert agree(array[:8], array[:8], array[:8], num_threads=2).threads == 1


def test_the_text(isa):
    """Every line fits a terminal of 120 columns but those of arrays and notes; the roofline is measured."""
    plan = qkv_fast.explain(*qkv(1, heads=(8, 8), lengths=(500, 3000), dims=(64, 64)), causal=True)
    text = str(plan)
    assert text == repr(plan)
    assert isa in text and plan.kernel in text and f"{plan.threads} of {plan.threads_asked}" in text
    assert max(map(len, text.splitlines()[1:-1])) <= 120, text
    assert re.search(r"at least [\d.]+ [mµ]?s, bound by arithmetic", text), text
    assert plan.seconds == max(plan.limits) > 0


@pytest.mark.alone
def test_the_roofline_is_a_bound_of_the_right_size():
    """Measured on one thread for a call that is bound by arithmetic: not faster than the bound, give or take the clock
    of a shared machine, and not twenty times slower."""
    code = """
import time, numpy as np, qkv_fast
x = np.random.default_rng(0).standard_normal((8, 1024, 64), dtype="float32")
plan = qkv_fast.explain(x, x, x, num_threads=1)
times = []
for _ in range(5):
    start = time.perf_counter()
    qkv_fast.attention(x, x, x, num_threads=1)
    times.append(time.perf_counter() - start)
print(min(times) / plan.seconds)
"""
    assert 0.5 < float(child_says(code)) < 20


def test_units():
    """1 row of 8 floats against 1000 keys: 32 kB of K, as much of V, and 64 bytes more."""
    text = str(qkv_fast.explain(*qkv(1, lengths=(1, 1000), dims=(8, 8)), num_threads=1))
    assert "work      32 kF and 64.1 kB; of all pairs 100% are visible" in text, text
    mask = np.arange(1000) < 5
    assert "0.5% are visible" in str(qkv_fast.explain(*qkv(1, lengths=(1, 1000)), mask=mask, num_threads=1))


def test_identical_sequences():
    x = np.ones((50, 1, 200, 8), "float32")
    one = qkv_fast.explain(x[:1], x[:1], x[:1], kv_lengths=150, causal=True, q_offset=0, num_threads=1)
    for lengths in (150, np.full(50, 150)):
        plan = qkv_fast.explain(x, x, x, kv_lengths=lengths, causal=True, q_offset=0, num_threads=1)
        for name in ("tiles_full", "tiles_partial", "tiles_skipped", "pairs"):
            assert getattr(plan, name) == 50 * getattr(one, name) > 0
