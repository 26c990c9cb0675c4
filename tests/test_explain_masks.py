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
    mask = rng.random((heads, lq, lk)) < 0.5
    return {
        "mask": dict(mask=mask),
        "documents": dict(mask=document),
        "nothing": dict(mask=np.zeros((lq, lk), bool)),
        "everything": dict(mask=np.ones((heads, 1, lk), bool)),
        "one row": dict(mask=mask[0, 0]),
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
        positions = limits.get("causal", False), limits.get("window"), None, None
        seen = reference._visible((2,), lq, lk, *positions, options.get("segments"))
        seen = np.broadcast_to(seen & options.get("mask", np.array(True)), (2, heads[0], lq, lk))
        assert plan.pairs == seen.sum() and plan.pairs_all == seen.size
        assert plan.operations == 2 * seen.sum() * (q.shape[-1] + v.shape[-1])


def test_documents_leave_tiles_out():
    q, k, v = qkv(1, lengths=(2048, 2048))
    document = np.repeat(np.arange(8), 256)
    for options in (dict(mask=document[:, None] == document), dict(segments=(document, document))):
        plan = agree(q, k, v, **options)
        assert plan.pairs * 8 == plan.pairs_all
        assert "12%" in str(plan) or "13%" in str(plan)
    with pytest.raises(TypeError, match="mask"):
        qkv_fast.explain(q, k, v, mask=document)
