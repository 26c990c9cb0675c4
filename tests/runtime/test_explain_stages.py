"""explain() of the stages: what it says is what the call then counts, and what it takes its time for."""

import tracemalloc

import numpy as np
import pytest
from _explained import agree
from _patterns import PATTERNS
from _stages import stages
from _util import ALL_TYPES, normal, qkv

import qkv_fast
from qkv_fast import _runtime

pytestmark = pytest.mark.usefixtures("isa")


SHAPES = [  # heads, lengths, dims
    ((4, 2), (21, 130), (12, 10)),
    ((6, 1), (1, 2000), (40, 8)),
    ((3, 3), (100, 700), (5, 2100)),
    ((8, 2), (70, 33), (1100, 3)),
]


def arguments_of(stage):
    """As the function itself takes them."""
    if stage.name == "softmax" and len(stage.arrays) == 2:
        return stage.arrays[:1], {**stage.options, "mask": stage.arrays[1]}
    return stage.arrays, stage.options


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_counters(dtype, threads):
    """Types that are widened, types that are not, several heads of rows, several passes of terms, columns of tiles."""
    for seed, (heads, lengths, dims) in enumerate(SHAPES):
        for stage in stages(seed, dtype, heads=heads, lengths=lengths, dims=dims):
            arrays, options = arguments_of(stage)
            plan = agree(getattr(qkv_fast, stage.name), *arrays, **options, num_threads=threads)
            assert plan.stage == stage.name and plan.dtype == ("float64" if dtype == "float64" else "float32")
            widened = dtype in ("float16", "bfloat16") and stage.name != "softmax"  # which widens where x lies
            assert (plan.tiles_copied > 0) >= widened


@pytest.mark.parametrize("pattern", PATTERNS)
def test_strides(pattern):
    for stage in stages(1, "float32"):
        arrays, options = arguments_of(stage)
        plan = agree(getattr(qkv_fast, stage.name), *map(PATTERNS[pattern], arrays), **options, num_threads=2)
        assert plan.tiles_copied == 0 or any("; copied" in note for note in plan.notes)


def test_work():
    q, k, v = qkv(1, batch=(2,), heads=(4, 2), lengths=(21, 130), dims=(12, 10))
    plan = qkv_fast.explain(qkv_fast.scores, q, k, num_threads=1)
    p = qkv_fast.scores(q, k)
    assert plan.operations == 2 * p.size * 12 and plan.bytes == q.nbytes + k.nbytes + p.nbytes
    assert plan.shapes == {"q": q.shape, "k": k.shape, "out": p.shape}
    shared = qkv_fast.explain(qkv_fast.scores, q, k[0], num_threads=1)  # by the batch: read once
    assert shared.bytes == q.nbytes + k[0].nbytes + p.nbytes and shared.operations == plan.operations
    plan = qkv_fast.explain(qkv_fast.weighted_values, p, v.astype("float16"), num_threads=1)
    assert plan.operations == 2 * p.size * 10 and plan.bytes == p.nbytes + v.nbytes // 2 + 4 * 2 * 4 * 21 * 10
    for axis in range(4):
        plan = qkv_fast.explain(qkv_fast.softmax, p, axis, num_threads=1)
        assert plan.operations == 0 and plan.bytes == 2 * p.nbytes
        plan = qkv_fast.explain(qkv_fast.softmax_grad, p, p.astype("float16"), axis, num_threads=1)
        assert plan.operations == 0 and plan.bytes == 2.5 * p.nbytes
    masked = qkv_fast.explain(qkv_fast.softmax, p, mask=np.ones((21, 1), bool), num_threads=1)
    assert masked.bytes == 2 * p.nbytes + 21


def test_kernels_and_tiles():
    x = normal(np.random.default_rng(0), (3, 400, 500))
    rows, columns = (qkv_fast.explain(qkv_fast.softmax, x, axis, num_threads=1) for axis in (2, 1))
    kind = "f32_" + _runtime.path_of_stages(_runtime.isa())
    assert (rows.kernel, columns.kernel) == (f"softmax_rows_{kind}", f"softmax_columns_{kind}")
    assert rows.tile_columns == 500 and columns.tile_rows == 400 and rows.pass_terms == 0
    plan = qkv_fast.explain(qkv_fast.scores, x, x, num_threads=1)
    tiled = f"f32_{plan.isa}" if plan.isa.startswith("amx") else kind
    assert plan.kernel == f"multiply_{tiled}" and plan.pass_terms == 500 and not plan.streamed
    assert qkv_fast.explain(qkv_fast.scores, *np.zeros((2, 2, 1024, 64), "float32"), num_threads=1).streamed


NOTES = {
    "q: a type narrower": lambda q, k: (q.astype("float16"), k.astype("float16")),
    "k: a type narrower": lambda q, k: (q, k.astype("float16")),
    "k: swapped bytes": lambda q, k: (q, k.astype(">f4")),
    "q: rows whose elements": lambda q, k: (q[..., ::-1], k),
    "k: rows whose elements": lambda q, k: (q, np.asfortranarray(k)),
    "q: a list": lambda q, k: (list(q), k),
}


@pytest.mark.parametrize("text", NOTES)
def test_what_is_slow_is_named(text):
    q, k, _ = qkv(1, heads=(4, 4), lengths=(300, 300))
    usual = agree(qkv_fast.scores, q, k, num_threads=1)
    assert [note for note in usual.notes if "CPU path" not in note] == []
    plan = agree(qkv_fast.scores, *NOTES[text](q, k), num_threads=1)
    said = not (plan.products and text.endswith("a type narrower"))  # whatever the type, tiles are made of it
    assert any(note.startswith(text) for note in plan.notes) == said, plan.notes
    assert (text in str(plan)) == said


def test_other_notes():
    q, k, v = qkv(1, heads=(4, 4), lengths=(300, 300))

    def first(*call, **options):
        return agree(*call, **options, num_threads=1).notes[0]

    assert "temporary" in first(qkv_fast.weighted_values, qkv_fast.scores(q, k), v, out=v)
    assert first(qkv_fast.scores, q, k, scale=1e90).startswith("scale: ")
    x = normal(np.random.default_rng(0), (64, 64), "float16")
    assert agree(qkv_fast.softmax, x, axis=0, num_threads=1).tiles_copied == 0
    notes = agree(qkv_fast.softmax, x[:, ::-1], axis=0, num_threads=1).notes
    assert notes[0].startswith("x: a type narrower") and "rows whose elements are not adjacent; copied" in notes[0]
    assert notes[1].startswith("out: a type narrower") and "written through a copy of each row" in notes[1]
    assert any(note.startswith("threads: 1 of 4") for note in agree(qkv_fast.softmax, x, num_threads=4).notes)


def test_nothing_is_computed_or_written():
    x = normal(np.random.default_rng(0), (64, 64))
    kept = x.copy()
    qkv_fast.explain(qkv_fast.softmax, x, out=x)
    qkv_fast.explain(qkv_fast.scores, x, x, out=x)
    assert np.array_equal(x, kept)
    huge = np.broadcast_to(np.float32(1), (1, 2**20, 2**10))
    out = np.empty((1, 64, 2**20), "float32")
    tracemalloc.start()
    plan = qkv_fast.explain(qkv_fast.scores, huge[:, :64], huge, out=out)
    assert plan.operations == 2.0 * 64 * 2**30 and tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_nothing_to_do():
    q, k, _ = qkv(1, lengths=(0, 5))
    for call in ((qkv_fast.scores, q, k), (qkv_fast.softmax, q), (qkv_fast.scores, q[0], k[0])):
        plan = agree(*call)
        assert plan.tasks == plan.operations == plan.bytes == 0 and "no elements" in str(plan) and plan.seconds == 0
    none = agree(qkv_fast.scores, k[..., :0], k[..., :0])  # a sum of no terms is 0
    assert none.tasks == 1 and none.operations == 0 and none.seconds > 0 and "at least" in str(none)


def test_it_refuses_what_the_call_refuses():
    q, k, _ = qkv(1)
    for call, error in [
        ((qkv_fast.scores, q, k[..., :3]), ValueError),
        ((qkv_fast.softmax, q, 5), np.exceptions.AxisError),
        ((qkv_fast.weighted_values, q, k.astype(int)), TypeError),
    ]:
        with pytest.raises(error, match=call[0].__name__):
            qkv_fast.explain(*call)
    for other in (qkv_fast.merge_partials, qkv_fast.reference.softmax, np.exp):
        with pytest.raises(TypeError, match="weighted_values"):
            qkv_fast.explain(other, q)


def test_the_text():
    q, k, v = qkv(1, heads=(8, 8), lengths=(500, 300), dims=(64, 64))
    p = qkv_fast.softmax(qkv_fast.scores(q, k))
    softmaxes = (qkv_fast.softmax, p), (qkv_fast.softmax, p, 0)
    softmaxes += ((qkv_fast.softmax_grad, p, p),)
    for function, *arrays in ((qkv_fast.scores, q, k), *softmaxes, (qkv_fast.weighted_values, p, v)):
        plan = qkv_fast.explain(function, *arrays, num_threads=1)
        text = str(plan)
        assert text == repr(plan) and text.startswith(plan.stage) and plan.kernel in text and "1 of 1" in text
        assert max(map(len, text.splitlines()[1:])) <= 120, text
        bound = "memory" if plan.stage.startswith("softmax") else "arithmetic"
        assert f"bound by {bound}" in text and plan.seconds == max(plan.limits) > 0
