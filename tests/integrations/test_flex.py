"""Our flex_attention for torch gives what torch's gives for the same functions, which both take."""

import inspect
import re

import pytest

pytest.importorskip("torch", reason="the extra [test] leaves it out for its size; [torch] has it")

import torch
from torch.nn.attention import flex_attention as theirs

from qkv_fast.integrations import flex

L, S = 6, 9
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
IDS, KV_IDS = torch.tensor([0, 0, 1, 1, 2, 7]), torch.tensor([0, 1, 1, 0, 2, 2, 2, 0, 1])
MASKS = {
    "none": None,
    "causal": flex.causal(),
    "causal behind a cache": flex.causal(S - L),
    "window": flex.sliding_window(2),
    "window of both sides": flex.sliding_window(1, 3),
    "open window": flex.sliding_window(None, 1, offset=2),
    "documents": flex.documents(IDS, KV_IDS),
    "documents of each": flex.documents(torch.stack((IDS, IDS.flip(0))), torch.stack((KV_IDS, KV_IDS)).int()),
    "causal documents": flex.causal() & flex.documents(IDS, KV_IDS),
    "causal window": flex.causal(3) & flex.sliding_window(2, 5, offset=3),
}
SCORES = {
    "none": None,
    "soft cap": flex.soft_cap(1.5),
    "ALiBi": flex.alibi(SLOPES),
    "both": flex.soft_cap(1.5).then(flex.alibi(SLOPES)),
}


@pytest.fixture(autouse=True)
def eagerly(monkeypatch):
    """Not compiled, which takes a minute."""
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def tensors(dtype=torch.float32, heads=2, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, L, 8), (batch, heads, S, 8), (batch, heads, S, 8)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def both(q, k, v, score, mask, **options):
    options = {"return_aux": theirs.AuxRequest(lse=True), "enable_gqa": True, **options}
    block = None if mask is None else theirs.create_block_mask(mask, 2, None, L, S, device="cpu", BLOCK_SIZE=4)
    found = flex.flex_attention(q, k, v, score, mask, **options)
    expected = theirs.flex_attention(q, k, v, score, block, **options)
    return (found[0], found[1].lse), (expected[0], expected[1].lse)


@pytest.mark.filterwarnings("ignore")  # of torch, that its own is slow when it is not compiled
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", MASKS)
def test_gives_what_torch_gives(mask, score):
    if score in ("ALiBi", "both") and MASKS[mask] is not None and MASKS[mask].offset:
        given = MASKS[mask].offset
        chosen = flex.alibi(SLOPES, given) if score == "ALiBi" else flex.soft_cap(1.5).then(flex.alibi(SLOPES, given))
    else:
        chosen = SCORES[score]
    for heads, dtype, scale in ((2, torch.float32, None), (4, torch.float64, 0.3), (1, torch.float32, -1.0)):
        found, expected = both(*tensors(dtype, heads), chosen, MASKS[mask], scale=scale)
        torch.testing.assert_close(found, expected)
    if mask != "none":  # one batch of keys for all: torch wants a block mask for that
        found, expected = both(*tensors(batch=1), chosen, MASKS[mask])
        torch.testing.assert_close(found, expected)


def plain(q, k, v, score, mask):
    """What torch differentiates: its own flex_attention has no gradients on CPUs."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    places = torch.meshgrid(*map(torch.arange, (2, 4, L, S)), indexing="ij")
    numbers = score(q @ k.mT / 8**0.5, *places).masked_fill(~mask(*places), -torch.inf)
    lse = numbers.logsumexp(-1)
    return (numbers - lse.clamp(min=-1e9)[..., None]).exp() @ v, lse


@pytest.mark.parametrize("mask", ["causal", "window", "documents of each"])
def test_gradients(mask):
    """Of the result and of its log-sum-exp; and of one of the two alone."""
    results = []
    for function in (plain, flex.flex_attention):
        given = [x.requires_grad_() for x in tensors()]
        options = {} if function is plain else {"enable_gqa": True, "return_lse": True}
        out, lse = function(*given, SCORES["both"], MASKS[mask], **options)
        kept = torch.isfinite(lse)
        (out[kept].sin().sum() + lse[kept].cos().sum()).backward()
        results.append([x.grad for x in given])
    torch.testing.assert_close(*results)
    given = [x.requires_grad_() for x in tensors()]
    found = flex.flex_attention(*given, block_mask=MASKS[mask], enable_gqa=True, return_lse=True)
    alone = torch.autograd.grad(found[1].exp().sum(), given[:2], retain_graph=True)
    assert all(torch.isfinite(x).all() for x in alone) and alone[0].any()
    with pytest.raises(NotImplementedError, match="flex_attention: no second derivatives"):
        torch.autograd.grad(torch.autograd.grad(found[0].sum(), given[0], create_graph=True)[0].sum(), given[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    given = [x.to(dtype) for x in tensors()]
    out, lse = flex.flex_attention(*given, SCORES["both"], MASKS["causal"], enable_gqa=True, return_lse=True)
    wide = flex.flex_attention(*(x.float() for x in given), SCORES["both"], MASKS["causal"], enable_gqa=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), wide, rtol=torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_its_signature():
    assert [(x.name, x.kind, x.default) for x in inspect.signature(flex.flex_attention).parameters.values()] == [
        (x.name, x.kind, x.default) for x in inspect.signature(theirs.flex_attention).parameters.values()
    ]


REFUSED = {
    "block_mask must be made by qkv_fast.integrations.flex, got function (own)": dict(block_mask=lambda own: 0),
    "score_mod must be made by qkv_fast.integrations.flex, got Mask": dict(score_mod=flex.causal()),
    "no kernel_options": dict(kernel_options={"BLOCK_M": 64}),
    "return_aux is for lse alone": dict(return_aux=theirs.AuxRequest(max_scores=True)),
}
REFUSED[next(iter(REFUSED))]["block_mask"].__qualname__ = "own"


@pytest.mark.parametrize("words", REFUSED)
def test_refused_by_name(words):
    with pytest.raises(NotImplementedError, match=re.escape(words)):
        flex.flex_attention(*tensors(), enable_gqa=True, **REFUSED[words])


def test_block_masks_are_refused():
    def own(b, h, q, kv):
        return q >= kv

    block = theirs.create_block_mask(own, None, None, L, S, device="cpu")
    with pytest.raises(NotImplementedError, match=r"got BlockMask \(.*own\).*A Mask is passed itself"):
        flex.flex_attention(*tensors(), block_mask=block, enable_gqa=True)


def test_bad_input():
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"pass enable_gqa=True \(query: \(2, 4, 6, 8\)"):
        flex.flex_attention(q, k, v)
    with pytest.raises(ValueError, match="positions have one offset, got 1 and 2"):
        flex.flex_attention(q, k, v, flex.alibi(SLOPES, 1), flex.causal(2), enable_gqa=True)
    with pytest.raises(ValueError, match="distances must not be negative"):
        flex.sliding_window(-1)
    with pytest.raises(ValueError, match="cap must be above 0, got 0"):
        flex.soft_cap(0)
    with pytest.raises(NotImplementedError, match="one mask of documents"):
        flex.documents(IDS) & flex.documents(IDS)
    with pytest.raises(NotImplementedError, match="no score but ALiBi after a soft cap"):
        flex.alibi(SLOPES).then(flex.soft_cap(2.0))
    with pytest.raises(NotImplementedError, match="no gradients of slopes"):
        flex.alibi(SLOPES.clone().requires_grad_())
    with pytest.raises(TypeError, match="unsupported operand"):
        flex.causal() & True
    with pytest.raises(TypeError, match=r"ids must be torch\.int64 or torch\.int32, got torch\.float32"):
        flex.documents(SLOPES)
    with pytest.raises(ValueError, match="segments"):
        flex.flex_attention(q, k, v, block_mask=flex.documents(IDS), enable_gqa=True)
