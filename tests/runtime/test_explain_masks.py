"""explain() of masks, segments, changed scores: tiles and pairs as the executed call counts them."""

import numpy as np
import pytest
from _explained import agree
from _util import normal, qkv

import qkv_fast
from qkv_fast import reference

pytestmark = pytest.mark.usefixtures("isa")
LENGTHS = [(1, 700), (5, 130), (49, 129), (300, 100), (200, 2300)]


def of_each_kind(rng, batch, heads, lq, lk, dtype):
    """One of what explain has to look at, or to leave alone."""
    ids = tuple(rng.integers(0, 4, (batch, n)) for n in (lq, lk))
    document = np.arange(lq)[:, None] * lk // (lq * 70 + 1) == np.arange(lk) // 70
    mask = rng.random((1, heads, lq, lk)) < 0.5
    return {
        "mask": dict(mask=mask),
        "documents": dict(mask=document),
        "nothing": dict(mask=np.zeros((lq, lk), bool)),
        "everything": dict(mask=np.ones((1, heads, 1, lk), bool)),
        "one row": dict(mask=mask[0, 0, 0]),
        "transposed": dict(mask=np.asfortranarray(mask)),
        "segments": dict(segments=ids),
        "sorted segments": dict(segments=tuple(np.sort(x, axis=-1) for x in ids)),
        "both": dict(segments=ids, mask=document),
        "bias": dict(bias=normal(rng, (lq, lk), dtype)),
        "scores": dict(alibi_slopes=np.ones(heads), sinks=np.zeros(heads), softcap=2.0),
    }


KINDS = list(of_each_kind(np.random.default_rng(0), 1, 1, 2, 2, "f4"))


@pytest.mark.parametrize("limits", [{}, dict(causal=True), dict(window=(150, 20))], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles(kind, limits):
    for seed, (lq, lk) in enumerate(LENGTHS):
        dtype, heads = (("float32", (2, 2)), ("float64", (6, 2)), ("float32", (7, 1)))[seed % 3]
        rng = np.random.default_rng(seed)
        q, k, v = qkv(seed, dtype, batch=(2,), heads=heads, lengths=(lq, lk))
        options = of_each_kind(rng, 2, heads[0], lq, lk, dtype)[kind] | limits
        plan = agree(q, k, v, **options, num_threads=1 + seed % 3)
        seen = reference._visible((2,), lq, lk, reference._limits_of(limits | {"segments": options.get("segments")}))
        seen = np.broadcast_to(seen & options.get("mask", np.array(True)), (2, heads[0], lq, lk))
        assert plan.pairs == seen.sum() and plan.pairs_all == seen.size
        assert plan.operations == 2 * seen.sum() * (q.shape[-1] + v.shape[-1])


def test_documents_leave_tiles_out():
    q, k, v = qkv(1, lengths=(2048, 2048))
    document = np.repeat(np.arange(8), 256)
    for options in (dict(mask=document[:, None] == document), dict(segments=(document, document))):
        plan = agree(q, k, v, **options)
        assert plan.pairs * 8 == plan.pairs_all
        assert "12.5%" in str(plan)
    with pytest.raises(TypeError, match="mask"):
        qkv_fast.explain(q, k, v, mask=document)


ELSEWHERE = {  # how a mask or bias, given as (heads, queries, keys), may lie; and what the note says
    "not adjacent": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "rows whose elements": lambda x: np.asfortranarray(x),
    "a type that is not q's": lambda x: x.astype("f8"),
    "swapped bytes": lambda x: x.astype(x.dtype.newbyteorder("S")),
    "not aligned": lambda x: np.frombuffer(b"_" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}


@pytest.mark.parametrize("words", ELSEWHERE)
def test_masks_and_biases_that_are_copied(words):
    """Each has a note with its strides; what is used where it lies, or repeats an element, has none."""
    q, k, v = qkv(1, heads=(4, 4), lengths=(300, 300), dims=(32, 32))
    bias = np.zeros((4, 300, 300), "f4")

    def notes(name, x, plan=qkv_fast.explain):
        found = plan(q, k, v, **{name: x}, num_threads=1).notes
        return [note for note in found if not note.startswith("CPU path")]

    for name, x in (("bias", bias), ("mask", np.ones(bias.shape, bool))):
        for plain in (x, x[:1], x[0, 0], x[..., :1], x[0, 0, 0], np.broadcast_to(x[..., :1], x.shape), x[:, ::-1]):
            assert notes(name, plain) == []
        if name == "mask" and words not in ("not adjacent", "rows whose elements"):
            continue
        lies = ELSEWHERE[words](x)
        (note,) = notes(name, lies, agree)
        assert note.startswith(f"{name}: ") and words in note and f"strides {lies.strides}" in note
    made, note = notes("bias", bias[..., ::-1].tolist())
    assert made == "bias: a list, copied to an array in every call"
    assert note.startswith("bias: a type that is not q's; copied")
