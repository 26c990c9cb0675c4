"""The arrays of torch, JAX, PyArrow, xarray and pandas in place of NumPy's, in every verb: read where they lie, or
refused with the way out."""

import re

import ml_dtypes
import numpy as np
import pytest
from _util import child_says, same_bits
from _verbs import VERBS, WRITERS, K, Q, V

import qkv_fast
from qkv_fast import reference


def host(name):
    return pytest.importorskip(name, reason="the extra [test] leaves it out: its arrays are given to ours")


def to_torch(x):
    torch = host("torch")
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_jax(x):
    jax = host("jax")
    return jax.device_put(x)  # with the strides of a contiguous array


def to_arrow(x):
    return host("pyarrow").Tensor.from_numpy(x)


def to_xarray(x):
    return host("xarray").DataArray(x)


HOSTS = {"torch": to_torch, "jax": to_jax, "pyarrow": to_arrow, "xarray": to_xarray}
TYPES = ("float32", "float64", "float16", "bfloat16")


def test_import_loads_no_host():
    names = "torch transformers jax autograd keras dask distributed zarr onnx ml_dtypes pandas pyarrow xarray"
    code = f"import sys, qkv_fast; print('loaded:', *sorted({{*'{names}'.split()}} & {{*sys.modules}}))"
    assert child_says(code) == "loaded:"


@pytest.mark.parametrize("make", HOSTS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_reads_them(verb, make):
    """The same bits as of NumPy's arrays; PyArrow has no tensors of bool, and JAX no integers of 64 bits."""
    convert = HOSTS[make]
    if make == "pyarrow":
        convert = lambda x: x if x.dtype == bool else to_arrow(x)  # noqa: E731
    found, expected = VERBS[verb](convert), VERBS[verb](lambda x: x)
    for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        assert type(x) is np.ndarray
        same_bits(x, y)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("make", HOSTS)
def test_types_without_a_copy(make, dtype):
    if (make, dtype) in (("pyarrow", "bfloat16"), ("jax", "float64")):
        pytest.skip(f"{make} has no {dtype} (by default)")
    arrays = [x.astype(dtype) for x in (Q, K, V)]
    given = [HOSTS[make](x) for x in arrays]
    same_bits(qkv_fast.attention(*given), qkv_fast.attention(*arrays))
    assert not [note for note in qkv_fast.explain(*given).notes if "copied to an array" in note]


@pytest.mark.parametrize("dtype", TYPES)
def test_views_of_torch(dtype):
    """Any strides; what torch has put off is computed first, never read raw."""
    torch = host("torch")
    q, k, v = (to_torch(x.astype(dtype)) for x in (Q, K, V))
    expected = qkv_fast.attention(q, k, v)
    same_bits(qkv_fast.attention(q.mT.contiguous().mT, k.transpose(1, 2).contiguous().transpose(1, 2), v), expected)
    same_bits(qkv_fast.attention(torch._neg_view(-q), torch._neg_view(-k), v), expected)
    same_bits(qkv_fast.attention(torch._efficientzerotensor(q.shape, dtype=q.dtype), k, v),
              qkv_fast.attention(torch.zeros_like(q), k, v))  # fmt: skip
    if dtype in ("float32", "float64"):
        imaginary = torch.complex(q, -k.repeat_interleave(2, 1)[:, :, :5]).conj().imag
        assert imaginary.is_neg()
        same_bits(qkv_fast.softmax(imaginary), qkv_fast.softmax(imaginary.resolve_neg()))
    with torch.inference_mode():
        same_bits(qkv_fast.attention(q.clone(), k, v), expected)
    same_bits(qkv_fast.attention(torch.nn.Parameter(q, requires_grad=False), k, v), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("verb", WRITERS)
def test_a_tensor_of_torch_to_write_to(verb, dtype):
    """Of any strides; it is what is returned."""
    torch = host("torch")
    shape, call = WRITERS[verb]

    def convert(x):
        return to_torch(x.astype(dtype))

    out = torch.full((*shape[:-1], 2 * shape[-1]), 5.0, dtype=getattr(torch, dtype))[..., ::2]
    assert call(convert, out) is out
    expected = to_torch(call(lambda x: x.astype(dtype), None))
    assert torch.equal(out, expected)
    if dtype in ("float16", "bfloat16"):
        wide = torch.empty(shape)
        assert call(convert, wide) is wide
        torch.testing.assert_close(wide.to(out.dtype), out, rtol=2.0**-7, atol=1e-6)


def test_what_cannot_be_written_to():
    torch = host("torch")
    out = torch.empty(1, 4, 5, 6)
    for wrong, error, words in (
        (out.clone().requires_grad_(), TypeError, "out is a torch.Tensor, whose gradient would be lost"),
        (out.to_sparse(), TypeError, r"attention: out: NumPy cannot write to this torch\.Tensor \(can't"),
        (out.to(torch.float8_e4m3fn), TypeError, r"attention: out: NumPy cannot write to this torch\.Tensor \(Got"),
        (torch._neg_view(out), ValueError, r"out is not writable: torch has put off .* pass out\.clone\(\)"),
        (torch.empty(1, 4, 5, 1).expand(1, 4, 5, 6), ValueError, "out has overlapping elements"),
    ):
        with pytest.raises(error, match=words):
            qkv_fast.attention(Q, K, V, out=wrong)


def test_the_reference_takes_them_too():
    torch = host("torch")
    x = torch.arange(24).reshape(1, 2, 3, 4).to(torch.bfloat16)
    known = x.float().numpy()
    for name in ("softmax", "rope"):
        function = getattr(reference, name)
        np.testing.assert_array_equal(function(x), function(known))
    (w, b), (known_w, known_b) = ((array[0, 0], array[0, 0, :, 0]) for array in (x, known))
    np.testing.assert_array_equal(reference.linear(x, w, b), reference.linear(known, known_w, known_b))
    sinks = x[0, 0, 0, :2]
    out, lse = reference.attention(x, x, x, sinks=sinks, return_lse=True)
    np.testing.assert_array_equal(out, reference.attention(known, known, known, sinks=sinks.float().numpy()))
    for ours, plain in zip(
        reference.attention_grad(x, x, x, x, out, lse), reference.attention_grad(*4 * (known,), out, lse), strict=True
    ):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [(to_jax, ValueError, "out is not writable"), (to_xarray, TypeError, "out must be an array whose memory can be")],
)
def test_what_other_libraries_do_not_lend(make, error, words):
    with pytest.raises(error, match=words):
        qkv_fast.attention(Q, K, V, out=make(np.empty((1, 4, 5, 6), "float32")))


@pytest.mark.parametrize("verb", WRITERS)
def test_torch_knows_that_a_tensor_was_written_to(verb):
    """What is recorded of the numbers before them would give wrong gradients; a plan writes nothing."""
    torch = host("torch")
    shape, call = WRITERS[verb]
    out, factor = torch.zeros(shape), torch.ones(shape, requires_grad=True)
    loss = (factor * out).sum()
    if verb == "attention":
        qkv_fast.explain(Q, K, V, out=out)
    loss.backward(retain_graph=True)
    call(lambda x: x, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def torchs(make):
    torch = host("torch")

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    return make(torch, torch.from_numpy(Q), Own)


REFUSED = {
    "whose gradient would be lost; pass q.detach(), or see": lambda torch, x, _: x.clone().requires_grad_(),
    "q is a torch.Parameter, whose gradient": lambda torch, x, _: torch.nn.Parameter(x),
    "of a class that may give it a meaning of its own; pass a torch.Tensor": lambda torch, x, own: x.as_subclass(own),
    "q is a torch.Tensor, on meta; pass q.cpu()": lambda torch, x, _: x.to("meta"),
    "q: NumPy cannot read this torch.Tensor (can't convert Sparse": lambda torch, x, _: x.to_sparse(),
    "q: NumPy cannot read this torch.Tensor (Got unsupported ScalarType Float8": lambda torch, x, _: x.to(
        torch.float8_e4m3fn
    ),
    "that has conjugate bit set": lambda torch, x, _: torch.complex(x, x).conj(),
    "q: NumPy cannot read this torch.Tensor": lambda torch, x, _: torch.nested.nested_tensor(list(x)),
    "q must be float16, bfloat16, float32 or float64, got int64": lambda torch, x, _: x.long(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("words", REFUSED)
def test_torchs_that_are_refused(words):
    given = torchs(REFUSED[words])
    with pytest.raises(TypeError, match=re.escape(words)):
        qkv_fast.attention(given, K, V)


def test_transforms_of_torch():
    torch = host("torch")
    x = torch.from_numpy(Q)
    for transform in (torch.vmap, torch.func.functionalize, torch.func.grad):
        with pytest.raises(TypeError, match=r"q is a torch\.Tensor|NumPy cannot read this torch\.Tensor"):
            transform(lambda x: torch.as_tensor(qkv_fast.attention(x, K, V)).sum())(x)


def test_inside_of_a_program_of_jax():
    jax = host("jax")
    with pytest.raises(TypeError, match=r"q: NumPy cannot read this jax\.\w+"):
        jax.jit(lambda x: qkv_fast.attention(x, K, V))(Q)


def test_pandas_and_names_are_refused():
    frame = host("pandas").DataFrame(K[0, 0])
    with pytest.raises(TypeError, match=r"k is a pandas\.DataFrame, whose index would be lost; pass k\.to_numpy\(\)"):
        qkv_fast.attention(Q[0, 0], frame, V[0, 0])
    with pytest.raises(TypeError, match=r"kv_lengths is a pandas\.Series, whose index"):
        qkv_fast.attention(Q, K, V, kv_lengths=host("pandas").Series([6]))
    named = host("xarray").DataArray(Q, dims=("batch", "head", "query", "dim"))
    with pytest.raises(TypeError, match=r"axes have names \(batch, head, query, dim\).*pass q\.transpose\("):
        qkv_fast.attention(named, K, V)
    same_bits(qkv_fast.attention(named.to_numpy(), K, V), qkv_fast.attention(Q, K, V))
