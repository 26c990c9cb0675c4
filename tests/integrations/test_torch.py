"""Our scaled_dot_product_attention for torch gives what torch's gives, on a grid of its arguments."""

import inspect
import itertools
import re
import tracemalloc
import weakref

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [test] leaves it out for its size; [torch] has it")

import torch
from torch import masked
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor
from torch.nn.attention import bias

import qkv_fast
from qkv_fast.integrations import torch as adapter
from qkv_fast.integrations.torch import scaled_dot_product_attention

THEIRS = torch.nn.functional.scaled_dot_product_attention
L, S, E = 5, 7, 8
SHAPES = {  # of query, key, value: what torch takes, by its broadcasting and by enable_gqa
    "2-D": ((L, E), (S, E), (S, 3)),
    "3-D": ((4, L, E), (4, S, E), (4, S, 3)),
    "4-D": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, 3)),
    "5-D": ((3, 2, 4, L, E), (3, 2, 4, S, E), (3, 2, 4, S, 3)),
    "more queries than keys": ((2, 4, 9, E), (2, 4, S, E), (2, 4, S, E)),
    "one key": ((2, 4, L, E), (2, 4, 1, E), (2, 4, 1, E)),
    "no key": ((2, 4, L, E), (2, 4, 0, E), (2, 4, 0, E)),
    "no query": ((2, 4, 0, E), (2, 4, S, E), (2, 4, S, E)),
    "no batch": ((0, 4, L, E), (0, 4, S, E), (0, 4, S, E)),
    "one batch of keys": ((2, 4, L, E), (1, 4, S, E), (1, 4, S, E)),
    "one batch of queries": ((1, 4, L, E), (2, 4, S, E), (2, 4, S, E)),
    "one batch but of values": ((1, 4, L, E), (1, 4, S, E), (2, 4, S, E)),
    "one head of keys": ((2, 4, L, E), (2, 1, S, E), (2, 1, S, E)),
    "one head of queries": ((2, 1, L, E), (2, 4, S, E), (2, 4, S, E)),
    "one head of keys, not of values": ((2, 4, L, E), (2, 1, S, E), (2, 4, S, E)),
    "no axes for keys": ((2, 4, L, E), (S, E), (4, S, E)),
    "no axes for queries": ((L, E), (2, 4, S, E), (2, 4, S, E)),
    "gqa": ((2, 4, L, E), (2, 2, S, E), (2, 2, S, 3)),
    "gqa 3-D": ((4, L, E), (2, S, E), (2, S, E)),
    "gqa 5-D": ((3, 2, 4, L, E), (3, 2, 1, S, E), (3, 2, 1, S, E)),
    "gqa of one batch of keys": ((2, 4, L, E), (1, 2, S, E), (1, 2, S, E)),
    "gqa of two kinds": ((2, 8, L, E), (2, 2, S, E), (2, 4, S, E)),
    "gqa of equal heads": ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E)),
}
TYPES = (torch.float32, torch.float64)
MASKS = {  # made of random numbers of the shape of the scores
    "none": lambda x: None,
    "bool": lambda x: hide_a_row(x > 0.3, False),
    "bool, for all keys": lambda x: x[..., :1] > 0.3,
    "bool, for all heads": lambda x: x.new_ones(x.shape[-2:]).cumsum(-1) % 3 > 1,
    "added": lambda x: hide_a_row(x, -torch.inf),
    "added, float32": lambda x: x.to(torch.float32),
    "added, for all queries": lambda x: x[..., :1, :],
}


def hide_a_row(mask, value):
    mask[..., :1, :] = value
    return mask


def tensors(name, dtype=torch.float32):
    """query, key, value and random numbers of the shape of the scores."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES[name])
    axes = q.shape[:-2] if name.startswith("gqa") else torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    return q, k, v, torch.randn((*axes, q.shape[-2], k.shape[-2]), generator=generator, dtype=dtype)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_gives_what_torch_gives(name, mask):
    """To the tolerance that torch.testing has for the type."""
    for dtype, is_causal, scale in itertools.product(TYPES, (False, True), (None, 0.5, 0, -1.0)):
        q, k, v, numbers = tensors(name, dtype)
        options = {"scale": scale, "enable_gqa": name.startswith("gqa")}
        attn_mask = MASKS[mask](numbers)
        ours = scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, **options)
        if is_causal and (attn_mask is not None or scale in (0, -1)):
            # Torch's general path refuses a mask with is_causal, its fused one makes -inf and then scales it.
            past = torch.ones(numbers.shape[-2:], dtype=torch.bool).tril()
            if attn_mask is None:
                attn_mask = past
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & past
            else:
                attn_mask = attn_mask.expand(numbers.shape).masked_fill(~past, -torch.inf)
            is_causal = False
        theirs = THEIRS(q, k, v, attn_mask, is_causal=is_causal, **options)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_16_bits(name, dtype):
    """What torch gives for the same numbers in float32, rounded: once, or where pairs of bfloat16 are multiplied the
    weights as well."""
    unit = torch.finfo(dtype).eps / 2
    for mask, is_causal in itertools.product(("none", "bool", "added", "added, float32"), (False, True)):
        q, k, v, numbers = (x.to(dtype) for x in tensors(name))
        attn_mask = MASKS[mask](numbers)
        if is_causal and attn_mask is not None:
            continue
        options = {"is_causal": is_causal, "enable_gqa": name.startswith("gqa")}
        ours = scaled_dot_product_attention(q, k, v, attn_mask, **options)
        wide = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
        theirs = THEIRS(q.float(), k.float(), v.float(), attn_mask if wide is None else wide, **options)
        assert ours.dtype == dtype and ours.is_contiguous()
        weights = 2 * unit * v.float().abs().max().item() if v.numel() and dtype == torch.bfloat16 else 0
        torch.testing.assert_close(ours.float(), theirs, rtol=unit, atol=1e-6 + weights)
    strided = [x.to(dtype).transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors("4-D")[:3]]
    torch.testing.assert_close(
        scaled_dot_product_attention(*strided), scaled_dot_product_attention(*(x.contiguous() for x in strided)),
        rtol=0, atol=0,
    )  # fmt: skip


def test_mask_and_causal_are_composed_like_torchs_fused_kernel():
    q, k, v, numbers = tensors("more queries than keys")
    for mask in (numbers > 0, numbers):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            theirs = THEIRS(q, k, v, mask, is_causal=True)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask, is_causal=True), theirs)


def test_signature():
    """That of torch's documentation, and what it says is keyword-only is."""
    documented = re.match(r"\w+(\(.*?\)) -> Tensor", THEIRS.__doc__, re.DOTALL)[1]
    ours = inspect.signature(scaled_dot_product_attention)
    given = [x.replace(annotation=inspect.Parameter.empty) for x in ours.parameters.values()]
    keyword_only = [x.name for x in given if x.kind is inspect.Parameter.KEYWORD_ONLY]
    positional = [x.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in given]
    assert str(inspect.Signature(positional)) == re.sub(r"\s+", " ", documented)
    assert keyword_only == ["scale", "enable_gqa"]
    q, k, v, _ = tensors("4-D")
    for function in (scaled_dot_product_attention, THEIRS):
        with pytest.raises(TypeError, match="positional"):
            function(q, k, v, None, 0.0, False, 0.5)


class Renamed(torch.Tensor):
    """Adds nothing to how torch's functions treat it."""


class Unlike(torch.Tensor):
    """Its numbers may be others than its memory holds: that is for its functions to say, which are not asked."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


STRIDED = {
    "as stored": lambda x: x,
    "heads after lengths": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second element": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "part of a packed one": lambda x: torch.cat((x, x), dim=-1)[..., x.shape[-1] :],
    "negation that torch has put off": lambda x: torch.complex(x, -x).conj().imag,
    "buffer": torch.nn.Buffer,
    "class without a meaning of its own": lambda x: x.as_subclass(Renamed),
}


@pytest.mark.parametrize("view", STRIDED)
def test_strides(view, monkeypatch):
    """Any are taken; the arrays that our attention gets are the tensors' memory, unless torch must compute first."""
    given = []
    monkeypatch.setattr(
        adapter, "attention", lambda *x, **options: given.extend(x) or qkv_fast.attention(*x, **options)
    )
    inputs = [STRIDED[view](x) for x in tensors("4-D")[:3]]
    copies = [x.clone() for x in inputs]
    out = scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(out, THEIRS(*copies))
    for x, copy, array in zip(inputs, copies, given, strict=True):
        assert torch.equal(x, copy)
        assert x.is_neg() or np.shares_memory(array, x.numpy())
        assert x.is_neg() or not np.may_share_memory(out.numpy(), x.numpy())
    assert out.is_contiguous() and not out.requires_grad


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16, torch.bfloat16])
def test_tensors_that_torch_has_not_computed_yet(dtype):
    """Views whose numbers are the opposites of those in memory, and zeros that have no memory, in every place."""
    q, k, v, numbers = (x.to(dtype) for x in tensors("4-D"))
    inputs = {"query": q, "key": k, "value": v, "attn_mask": numbers}
    for lazy in (torch._neg_view, lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype)):
        for name, x in inputs.items():
            given, computed = lazy(x), -x if lazy is torch._neg_view else torch.zeros_like(x)
            assert given.is_neg() or given._is_zerotensor()
            ours = scaled_dot_product_attention(**{**inputs, name: given})
            expected = scaled_dot_product_attention(**{**inputs, name: computed})
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_parameters():
    q, k, v, _ = tensors("4-D")
    with torch.no_grad():
        ours = scaled_dot_product_attention(torch.nn.Parameter(q), k, v)
    assert type(ours) is torch.Tensor
    torch.testing.assert_close(ours, THEIRS(q, k, v))


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16, torch.bfloat16])
def test_memory_goes_both_ways(dtype):
    """No copies; a result outlives what it was made from, and what is dropped is given back."""
    q, k, v = (x.to(dtype) for x in torch.randn(3, 1, 4, 1000, 64))
    with torch.inference_mode():
        inferred = scaled_dot_product_attention(q.clone(), k, v)
    expected = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(inferred, expected, rtol=0, atol=0)
    assert scaled_dot_product_attention(inferred, k, v).shape == q.shape
    assert not scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0]).any()
    gone = weakref.ref(q)
    tracemalloc.start()  # NumPy tells it of the memory of its arrays
    try:
        for _ in range(20):
            found = scaled_dot_product_attention(q, k, v)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.nbytes <= held < 2 * found.nbytes
    del q
    assert gone() is None and torch.equal(found, expected)


LENGTHS = ((5, 5), (3, 6), (6, 3), (1, 4), (4, 1))


@pytest.mark.filterwarnings("ignore:Lower right causal bias")  # where more queries than keys: torch once had NaN
@pytest.mark.parametrize("make", [bias.causal_upper_left, bias.causal_lower_right])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_causal_bias(lengths, make):
    """By what it means: its memory is not initialised, and NaN in it changes nothing."""
    rng = torch.Generator().manual_seed(0)
    for heads, kv_heads, dtype in ((4, 4, torch.float32), (4, 2, torch.float64)):
        q = torch.randn(2, heads, lengths[0], E, generator=rng, dtype=dtype)
        k, v = torch.randn(2, 2, kv_heads, lengths[1], E, generator=rng, dtype=dtype)
        causal = make(*lengths)
        with torch.no_grad():
            torch.Tensor.fill_(causal, torch.nan)
        options = {"scale": 0.3, "enable_gqa": heads != kv_heads}
        ours = scaled_dot_product_attention(q, k, v, causal, **options)
        past = torch.ones(lengths).tril(lengths[1] - lengths[0] if make is bias.causal_lower_right else 0).bool()
        torch.testing.assert_close(ours, THEIRS(q, k, v, causal, **options))
        torch.testing.assert_close(ours, THEIRS(q, k, v, past, **options))


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias_of_other_lengths():
    q, k, v, _ = tensors("4-D")
    for make in (bias.causal_upper_left, bias.causal_lower_right):
        for given in ((3, 6), (L, S + 1), (L - 1, S), (S, L)):
            with pytest.raises(ValueError, match=rf"{given[0]} queries and {given[1]} keys.*4, 5, 8\).*4, 7, 8\)"):
                scaled_dot_product_attention(q, k, v, make(*given))
        with pytest.raises(ValueError, match="CausalBias for 5 queries"):
            scaled_dot_product_attention(q[0, 0, 0], k, v, make(L, S))
        for function in (scaled_dot_product_attention, THEIRS):
            with pytest.raises(ValueError, match="CausalBias"):
                function(q, k, v, make(L, S), is_causal=True)


def test_mask_is_read_where_it_lies(monkeypatch):
    """Expanded from one head and one query, and unchanged."""
    given = {}
    monkeypatch.setattr(
        adapter, "attention", lambda *x, **options: given.update(options) or qkv_fast.attention(*x, **options)
    )
    q, k, v, numbers = tensors("4-D")
    for mask, name in ((numbers, "bias"), (numbers > 0, "mask")):
        one = mask[:, :1, :1].contiguous()
        copy = one.clone()
        scaled_dot_product_attention(q, k, v, one.expand(2, 4, L, S))
        assert np.shares_memory(given[name], one.numpy()) and torch.equal(one, copy)


def test_hidden_nan():
    q, k, v, _ = tensors("4-D")
    k[..., 2:, :], v[..., 2:, :] = torch.nan, torch.nan
    seen = torch.arange(S) < 2
    expected = THEIRS(q, k[..., :2, :], v[..., :2, :])
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, seen[None]), expected)


def gradients_of(function, inputs, dout, **options):
    """Of all inputs that are floating-point numbers."""
    inputs = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items() if x is not None}
    function(**inputs, **options).backward(dout)
    return {name: x.grad for name, x in inputs.items() if x.requires_grad}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients(name, mask):
    for dtype, is_causal in itertools.product(TYPES, (False, True)):
        q, k, v, numbers = tensors(name, dtype)
        inputs = {"query": q, "key": k, "value": v, "attn_mask": MASKS[mask](numbers)}
        if is_causal and inputs["attn_mask"] is not None:
            continue
        options = {"is_causal": is_causal, "scale": 0.7, "enable_gqa": name.startswith("gqa")}
        dout = THEIRS(**inputs, **options).cos()
        ours = gradients_of(scaled_dot_product_attention, inputs, dout, **options)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            theirs = gradients_of(THEIRS, inputs, dout, **options)
        for x, y in theirs.items():
            y = y if y is not None else inputs[x].detach()  # torch has none for a mask of no keys
            assert ours[x].dtype == y.dtype
            torch.testing.assert_close(ours[x], y.nan_to_num())  # torch has NaN where a mask hides all keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bits(dtype):
    """Those in float32 of the same numbers and the same, rounded, result."""
    inputs = dict(zip(("query", "key", "value", "attn_mask"), (x.to(dtype) for x in tensors("gqa")), strict=True))
    dout = inputs["query"][..., :3] * 0.5
    ours = gradients_of(scaled_dot_product_attention, inputs, dout, enable_gqa=True)
    wide = {name: x.float() for name, x in inputs.items()}
    theirs = gradients_of(THEIRS, wide, dout.float(), enable_gqa=True)
    unit = torch.finfo(dtype).eps / 2
    for name, x in theirs.items():
        assert ours[name].dtype == dtype
        # The result enters as the sum of dout * out over a row.
        torch.testing.assert_close(ours[name].float(), x, rtol=unit, atol=8 * unit)


def test_gradients_of_some():
    """Those that are asked for, through views, of parameters, with a gradient of the result that repeats in memory."""
    q, k, v, numbers = tensors("4-D")
    weight = torch.nn.Parameter(numbers[:1, :1])
    packed = torch.cat((q, q), dim=-1).requires_grad_()
    out = scaled_dot_product_attention(packed[..., E:], k, v, weight)
    assert type(out) is torch.Tensor and out.requires_grad
    out.sum().backward()
    assert not packed.grad[..., :E].any() and packed.grad[..., E:].any() and k.grad is None
    q.requires_grad_()
    other = weight.detach().clone().requires_grad_()
    THEIRS(q, k, v, other).sum().backward()
    torch.testing.assert_close((packed.grad[..., E:], weight.grad), (q.grad, other.grad))
    with torch.no_grad():
        assert not scaled_dot_product_attention(packed[..., E:], k, v, weight).requires_grad


def test_gradients_by_differences():
    inputs = [x.requires_grad_() for x in tensors("gqa of one batch of keys", torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: scaled_dot_product_attention(*x, enable_gqa=True), inputs)


def test_second_derivatives():
    """Refused, also where the gradient of the result is a constant; so is what was overwritten before its gradient."""
    q, k, v, _ = tensors("4-D")
    q.requires_grad_()
    for loss in (lambda x: x.sum(), lambda x: x.square().sum()):
        (dq,) = torch.autograd.grad(loss(scaled_dot_product_attention(q, k, v)), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            dq.sum().backward()
    out = scaled_dot_product_attention(q, k, v)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # make_dual() calls it
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_forward_gradients(name):
    """Refused also where reverse ones are off; what carries none is computed at any level."""
    inputs = dict(zip(("query", "key", "value", "attn_mask"), tensors("4-D"), strict=True))
    with forward_ad.dual_level():
        torch.testing.assert_close(scaled_dot_product_attention(**inputs), THEIRS(**inputs))
        inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with torch.no_grad(), pytest.raises(NotImplementedError, match=f"forward gradients: {name} carries a tangent"):
            scaled_dot_product_attention(**inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_a_trace_would_keep_the_result():
    inputs = tensors("4-D")[:3]
    with pytest.raises(NotImplementedError, match=r"jit\.trace"):
        torch.jit.trace(lambda *x: scaled_dot_product_attention(*x), inputs)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_would_keep_the_result(pre_dispatch):
    inputs = tensors("4-D")[:3]
    with pytest.raises(NotImplementedError, match="make_fx"):
        proxy_tensor.make_fx(lambda *x: scaled_dot_product_attention(*x), pre_dispatch=pre_dispatch)(*inputs)


def fake(x):
    return FakeTensorMode().from_tensor(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors", "ignore:.*prototype")
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_classes_with_a_meaning_of_their_own(name):
    """Refused by name, whatever their memory holds."""
    inputs = dict(zip(("query", "key", "value", "attn_mask"), tensors("4-D"), strict=True))
    given = [fake(inputs[name]), inputs[name].as_subclass(Unlike)]
    given.append(masked.masked_tensor(inputs[name], inputs[name] > 0))
    if name != "attn_mask":
        given.append(bias.causal_lower_right(L, S))
    for x in given:
        with pytest.raises(NotImplementedError, match=f"{name} is a {type(x).__name__}; pass a torch.Tensor"):
            scaled_dot_product_attention(**{**inputs, name: x})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_transforms(name, dtype):
    """Refused, in vmap for what it maps only; torch's ends the process where functionalize's tensors reach NumPy."""
    inputs = dict(zip(("query", "key", "value", "attn_mask"), (x.to(dtype) for x in tensors("4-D")), strict=True))
    expected = scaled_dot_product_attention(**inputs)

    def ours(x):
        return scaled_dot_product_attention(**{**inputs, name: x})

    for transform in (torch.vmap, torch.func.functionalize):
        with pytest.raises(NotImplementedError, match=f"transforms of torch.func: {name} is inside"):
            transform(ours)(inputs[name])
    with pytest.raises(NotImplementedError, match=f"transforms of torch.func: {name} is inside"):
        ours(torch._to_functional_tensor(inputs[name]))
    with pytest.raises(NotImplementedError, match="query is inside of one"):
        torch.func.grad(lambda x: ours(x).sum())(inputs[name])
    with pytest.raises(NotImplementedError, match="query is inside of one"):
        torch.func.grad(lambda x: scaled_dot_product_attention(**inputs).sum() * x)(torch.tensor(1.0, dtype=dtype))
    mapped = torch.vmap(lambda x: scaled_dot_product_attention(**inputs) + x)(torch.zeros(3, dtype=dtype))
    torch.testing.assert_close(mapped, expected.expand(3, *expected.shape), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    """The call is made as it stands, between the graphs before and after it; one graph of all is refused."""
    inputs = [x.to(dtype) for x in tensors("4-D")[:3]]

    def function(q, k, v):
        return scaled_dot_product_attention(q * 2, k, v, is_causal=True) + 1

    torch.testing.assert_close(torch.compile(function, backend="eager")(*inputs), function(*inputs), rtol=0, atol=0)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(function, backend="eager", fullgraph=True)(*inputs)


MASKS_BY_AXES = [
    (S,), (1,), (L, S), (1, S), (L, 1), (4, L, S), (1, L, S), (4, 1, 1), (2, 4, L, S), (2, 1, L, S), (1, 4, 1, S),
]  # fmt: skip
UNEQUAL_AXES = [
    ((4, L, E), (4, S, E), (4, S, E)),
    ((2, 4, L, E), (2, 4, S, E), (2, 4, S, E)),
    ((2, 4, L, E), (4, S, E), (4, S, E)),
    ((2, 4, L, E), (4, S, E), (2, 4, S, E)),
    ((2, 4, L, E), (S, E), (S, E)),
    ((4, L, E), (2, 4, S, E), (4, S, E)),
    ((4, L, E), (4, S, E), (2, 4, S, E)),
    ((L, E), (4, S, E), (2, 1, S, E)),
]


@pytest.mark.parametrize("shapes", UNEQUAL_AXES)
@pytest.mark.parametrize("shape", MASKS_BY_AXES)
def test_numbers_of_axes(shape, shapes):
    """All broadcast as in torch, a mask to the axes of all three; torch is asked with them written out."""
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(x, generator=rng) for x in shapes]
    numbers = torch.randn(shape, generator=rng)
    axes = torch.broadcast_shapes(*(x[:-2] for x in shapes))
    whole = [x.expand(*axes, *x.shape[-2:]) for x in inputs]
    for mask in (numbers, numbers > -1):
        if len(shape) > len(axes) + 2:
            with pytest.raises(ValueError, match="must have"):
                scaled_dot_product_attention(*inputs, mask)
        else:
            theirs = THEIRS(*whole, mask.expand(*axes, L, S))
            torch.testing.assert_close(scaled_dot_product_attention(*inputs, mask), theirs)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout):
    inputs = dict(zip(("query", "key", "value"), tensors("4-D")[:3], strict=True))
    for name in inputs:
        nested = torch.nested.nested_tensor([torch.zeros(n, E) for n in (2, 3)], layout=layout)
        with pytest.raises(NotImplementedError, match=f"nested tensors: {name} is one"):
            scaled_dot_product_attention(**{**inputs, name: nested})


def test_autocast_keeps_the_type():
    inputs = tensors("4-D")[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert THEIRS(*inputs).dtype == torch.bfloat16
        assert scaled_dot_product_attention(*inputs).dtype == torch.float32


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"is_causal": 1}, TypeError, "is_causal must be bool, got 1"),
        ({"enable_gqa": None}, TypeError, "enable_gqa must be bool, got None"),
        ({"dropout_p": None}, TypeError, "dropout_p must be a real number, got None"),
        ({"dropout_p": "0"}, TypeError, "dropout_p must be a real number, got '0'"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0, got 0.1"),
        ({"query": torch.zeros(4, L, E, device="meta")}, NotImplementedError, "query is .* on meta"),
        ({"attn_mask": torch.zeros(L, S, device="meta")}, NotImplementedError, "attn_mask is .* on meta"),
        ({"key": torch.zeros(4, S, E).to_sparse()}, NotImplementedError, "key is torch.sparse_coo on cpu"),
        ({"query": torch.zeros(4, L, E, dtype=torch.int8)}, TypeError, "torch.float32 or .*bfloat16, got torch.int8"),
        ({"query": torch.zeros(4, L, E, dtype=torch.int64)}, TypeError, "torch.float32 or .*bfloat16, got torch.int64"),
        ({"value": torch.zeros(4, S, E, dtype=torch.float64)}, TypeError, "value must be torch.float32, .*float64"),
        ({"attn_mask": torch.ones(L, S, dtype=torch.int64)}, TypeError, "attn_mask must be torch.bool.*int64"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.bfloat16)}, TypeError, "attn_mask .* got torch.bfloat16"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.float64)}, TypeError, "bool or torch.float32, got .*float64"),
        ({"key": np.zeros((4, S, E))}, TypeError, "key must be a torch.Tensor, got ndarray"),
        ({"attn_mask": np.zeros((L, S))}, TypeError, "attn_mask must be a torch.Tensor, got ndarray"),
        ({"key": torch.zeros(2, S, E), "value": torch.zeros(2, S, E)}, ValueError, "enable_gqa=True .*2, 7, 8"),
        ({"key": torch.zeros(3, S, E), "enable_gqa": True}, ValueError, "heads"),
        ({"key": torch.zeros(S, E), "enable_gqa": True}, ValueError, "3 or more axes"),
        ({"query": torch.zeros(L, E), "enable_gqa": True}, ValueError, "3 or more axes"),
        ({"value": torch.zeros(S, E), "enable_gqa": True}, ValueError, r"3 or more axes .*value: \(7, 8\)"),
        ({"value": torch.zeros(4, S - 1, E)}, ValueError, "v has length 6, k has 7"),
        ({"key": torch.zeros(4, S, E - 1)}, ValueError, "k has dimension 7, q has 8"),
        ({"attn_mask": torch.ones(2, 4, L, S, dtype=torch.bool)}, ValueError, r"mask .*2, 4, 5, 7"),
        ({"attn_mask": torch.zeros(L, S - 1)}, ValueError, r"bias .*5, 6"),
    ],
)
def test_errors(changes, error, words):
    inputs = dict(zip(("query", "key", "value"), tensors("3-D")[:3], strict=True))
    with pytest.raises(error, match=words) as caught:
        scaled_dot_product_attention(**{**inputs, **changes})
    assert type(caught.value) is error


@pytest.mark.filterwarnings("ignore")  # of what torch's own tests import
def test_the_samples_of_torchs_own_tests():
    """Of its OpInfo, without dropout: results, and gradients but of 16 bits, which are held to what torch gives in
    float32. Elements are up to 9, so scores of some hundreds are rounded, and gradients have that times 9."""
    pytest.importorskip("expecttest", reason="torch's own tests import it")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    count = 0
    for dtype, recorded in itertools.product((*TYPES, torch.float16, torch.bfloat16), (False, True)):
        unit = torch.finfo(dtype).eps / 2
        near = {"rtol": 256 * unit, "atol": 9 * 256 * unit}
        if dtype not in TYPES:  # rounded once
            near = {"rtol": unit, "atol": unit}
        for sample in info.sample_inputs("cpu", dtype, requires_grad=recorded):
            if sample.kwargs.get("dropout_p"):
                continue
            results = []
            for function in (scaled_dot_product_attention, info.op):
                wide = function is info.op and dtype not in TYPES
                kind = torch.float32 if wide else dtype
                given = [x.detach().to(kind).requires_grad_(recorded) for x in (sample.input, *sample.args)]
                options = {
                    name: x.to(kind) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                    for name, x in sample.kwargs.items()
                }
                out = function(*given, **options)
                found = [out, *(torch.autograd.grad(out.sum(), given) if recorded and dtype in TYPES else ())]
                results.append([x.detach().to(dtype if dtype in TYPES else torch.float32) for x in found])
            torch.testing.assert_close(*results, **near)
            count += 1
    assert count >= 100


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer"])
def test_the_samples_of_torchs_own_layers(name, monkeypatch):
    """Of its ModuleInfo, in evaluation: results and gradients with ours in the place of torch's, in float64."""
    pytest.importorskip("expecttest", reason="torch's own tests import it")
    from torch.testing._internal.common_modules import module_db

    calls, count = [], 0

    def ours(*args, **options):
        calls.append(args)
        return scaled_dot_product_attention(*args, **options)

    (info,) = [layer for layer in module_db if layer.module_cls.__name__ == name]
    samples = info.module_inputs_func(info, "cpu", torch.float64, True, False)
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input
        layer, results = info.module_cls(*made.args, **made.kwargs).eval(), []
        layer = layer.double()
        for function in (THEIRS, ours):
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", function)
            out = layer(*given.args, **given.kwargs)
            out = out[0] if isinstance(out, tuple) else out
            results.append([out, *torch.autograd.grad(out.sum(), list(layer.parameters()), allow_unused=True)])
        torch.testing.assert_close(*results)
        count += 1
    assert count and calls
