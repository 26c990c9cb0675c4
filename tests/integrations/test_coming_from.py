"""Each row of docs/coming-from.md, against the library that it speaks of, where that is installed."""

import re
from pathlib import Path

import numpy as np
import pytest

import qkv_fast
from qkv_fast import attention

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal(shape, dtype="float32") for shape in ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)))
TURNED = [x.swapaxes(1, 2) for x in (Q, K, V)]
NUMBERS = RNG.standard_normal((2, 4, 5, 7), dtype="float32")
MASK = NUMBERS > -0.5
MASK[..., 2] = True
LOWEST = np.finfo("float32").min
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], "float32")
ROWS, KEYS = np.arange(5)[:, None], np.arange(7)
CHECKS = {}


def row(section, there):
    """The check of the row that begins with `there` in the section of that name."""

    def add(function):
        assert CHECKS.setdefault((section, there), function) is function
        return function

    return add


def same(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def differ(a, b):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-2


def plain(q, k, v, mask=True, score=lambda s: s, scale=None, sink=None):
    """The formula, and the log-sum-exp; rows that see nothing are 0 and −inf."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    s = np.where(mask, score(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)), -np.inf)
    most = np.maximum(s.max(-1, keepdims=True), -1e300)
    p = np.exp(s - most)
    sums = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(sums) + most)[..., 0]
    return p / np.where(sums, sums, 1) @ v, np.where(sums[..., 0], lse, -np.inf)


def mean():
    return np.broadcast_to(V.mean(-2, keepdims=True), (2, 4, 5, 8))


# torch ---------------------------------------------------------------------------------------------------------------

SDPA, FLEX = "torch: scaled_dot_product_attention", "torch: flex_attention"


def sdpa(q=Q, k=K, v=V, mask=None, **options):
    torch = pytest.importorskip("torch")
    mask = mask if mask is None else torch.tensor(mask)
    return torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), mask, **options).numpy()


@row(SDPA, "`is_causal=True`")
def _():
    same(attention(Q, K, V, causal="top-left"), sdpa(is_causal=True))
    import torch
    from torch.nn.attention.bias import causal_lower_right

    theirs = torch.nn.functional.scaled_dot_product_attention
    same(attention(Q, K, V, causal=True), theirs(*map(torch.tensor, (Q, K, V)), causal_lower_right(5, 7)))
    same(attention(Q, K[:, :, :5], V[:, :, :5], causal=True), sdpa(k=K[:, :, :5], v=V[:, :, :5], is_causal=True))


@row(SDPA, "a bool `attn_mask`")
def _():
    same(attention(Q, K, V, mask=MASK), sdpa(mask=MASK))


@row(SDPA, "a floating `attn_mask`")
def _():
    same(attention(Q, K, V, bias=NUMBERS), sdpa(mask=NUMBERS))
    with pytest.raises(TypeError, match="bias"):
        attention(Q, K, V, mask=NUMBERS)


@row(SDPA, "`key_padding_mask` of its layers")
def _():
    torch = pytest.importorskip("torch")
    layer = torch.nn.MultiheadAttention(8, 1, batch_first=True, bias=False).eval()
    hidden = np.arange(7) > np.array([[4], [6]])
    ones = torch.eye(8).repeat(3, 1)
    with torch.no_grad():
        layer.in_proj_weight.copy_(ones)
        layer.out_proj.weight.copy_(torch.eye(8))
        theirs, _ = layer(*(torch.tensor(x[:, 0]) for x in (Q, K, V)), key_padding_mask=torch.tensor(hidden))
    same(attention(Q[:, :1], K[:, :1], V[:, :1], mask=~hidden[:, None, None, :])[:, 0], theirs)


@row(SDPA, "rows of a bool mask, or of −inf, that see nothing")
def _():
    for mask, ours in ((np.zeros((5, 7), bool), "mask"), (np.full((5, 7), -np.inf, "float32"), "bias")):
        assert not np.any(sdpa(mask=mask)) and not np.any(attention(Q, K, V, **{ours: mask}))


@row(SDPA, "a row that is the lowest float everywhere")
def _():
    lowest = np.full((5, 7), LOWEST)
    same(sdpa(mask=lowest), mean())
    same(attention(Q, K, V, bias=lowest), mean())


@row(SDPA, "`enable_gqa=True`")
def _():
    same(attention(Q, K[:, :2], V[:, :2]), sdpa(k=K[:, :2], v=V[:, :2], enable_gqa=True))


@row(SDPA, "a mask of three axes beside four")
def _():
    four = Q.repeat(2, 0), K.repeat(2, 0), V.repeat(2, 0)
    mask = MASK[0]
    same(sdpa(*four, mask=mask), attention(*four, mask=mask[None]))
    with pytest.raises(ValueError, match=r"mask\[:, None\]"):
        attention(*four, mask=mask)


@row(SDPA, "`dropout_p`")
def _():
    with pytest.raises(TypeError, match="there is no dropout"):
        attention(Q, K, V, dropout_p=0.1)


def flexed(score_mod=None, mask_mod=None, lse=False):
    torch = pytest.importorskip("torch")
    from torch.nn.attention import flex_attention as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        block = mask_mod and module.create_block_mask(mask_mod, None, None, 5, 7, device="cpu")
        out, aux = module.flex_attention(
            *map(torch.tensor, (Q, K, V)), score_mod, block, return_aux=module.AuxRequest(lse=True)
        )
    return (out, aux.lse) if lse else out


@row(FLEX, "`q_idx >= kv_idx`")
def _():
    same(attention(Q, K, V, causal="top-left"), flexed(mask_mod=lambda b, h, q, kv: q >= kv))
    same(attention(Q, K, V, causal=True, q_offset=1), flexed(mask_mod=lambda b, h, q, kv: q + 1 >= kv))


@row(FLEX, "`q_idx - kv_idx <= w`, and causal")
def _():
    theirs = flexed(mask_mod=lambda b, h, q, kv: (q >= kv) & (q - kv <= 2))
    same(attention(Q, K, V, causal="top-left", window=2), theirs)


@row(FLEX, "`document[q_idx] == document[kv_idx]`")
def _():
    torch = pytest.importorskip("torch")
    ids = np.array([0, 0, 1, 1, 2, 2, 2])
    tensor = torch.tensor(ids)
    same(attention(Q, K, V, segments=(ids[:5], ids)), flexed(mask_mod=lambda b, h, q, kv: tensor[q] == tensor[kv]))


@row(FLEX, "`c * tanh(score / c)`")
def _():
    torch = pytest.importorskip("torch")
    same(attention(Q, K, V, softcap=1.5), flexed(lambda score, *_: 1.5 * torch.tanh(score / 1.5)))


@row(FLEX, "`score + slopes[h] * (kv_idx - q_idx)`, and causal")
def _():
    torch = pytest.importorskip("torch")
    slopes = torch.tensor(SLOPES)
    theirs = flexed(lambda score, b, h, q, kv: score + slopes[h] * (kv - q), lambda b, h, q, kv: q >= kv)
    same(attention(Q, K, V, causal="top-left", alibi_slopes=SLOPES), theirs)


@row(FLEX, "the log-sum-exp")
def _():
    for ours, theirs in zip(attention(Q, K, V, return_lse=True), flexed(lse=True), strict=True):
        same(ours, theirs)


# flash-attn: the formulas of its documentation -----------------------------------------------------------------------

FLASH = "flash-attn"


@row(FLASH, "(batch, length, heads, dim)")
def _():
    out, lse = attention(*TURNED, layout="blhd", return_lse=True)
    expected, numbers = plain(Q, K, V)
    same(out.swapaxes(1, 2), expected)
    same(lse, numbers)


@row(FLASH, "`causal=True`")
def _():
    same(attention(Q, K, V, causal=True), plain(Q, K, V, KEYS <= ROWS + 2)[0])


@row(FLASH, "`window_size=(l, r)`")
def _():
    mask = (KEYS >= ROWS + 2 - 3) & (KEYS <= ROWS + 2 + 1)
    same(attention(Q, K, V, window=(3, 1)), plain(Q, K, V, mask)[0])
    same(attention(Q, K, V, window=(None, 1)), plain(Q, K, V, KEYS <= ROWS + 2 + 1)[0])


@row(FLASH, "`softcap=0.0`")
def _():
    same(attention(Q, K, V, softcap=None), plain(Q, K, V)[0])
    with pytest.raises(ValueError, match="softcap"):
        attention(Q, K, V, softcap=0.0)


@row(FLASH, "`alibi_slopes`")
def _():
    expected, _ = plain(Q, K, V, score=lambda s: s - SLOPES[:, None, None] * np.abs(ROWS + 2 - KEYS))
    same(attention(Q, K, V, alibi_slopes=SLOPES), expected)


@row(FLASH, "`flash_attn_varlen_func(…, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)`")
def _():
    packed = [np.concatenate((*x,)) for x in TURNED]
    out = qkv_fast.attention_varlen(*packed, [0, 5, 10], [0, 7, 14], causal=True)
    same(out.reshape(2, 5, 4, 8).swapaxes(1, 2), plain(Q, K, V, KEYS <= ROWS + 2)[0])
    with pytest.raises(TypeError, match="max_seqlen_q"):
        qkv_fast.attention_varlen(*packed, [0, 5, 10], [0, 7, 14], max_seqlen_q=5)


@row(FLASH, "`flash_attn_with_kvcache(…, cache_seqlens=n)`")
def _():
    cache = qkv_fast.KVCache(2, 4, 8, 20)
    cache.append(K, V)
    expected, _ = plain(Q[:, :, :2], K, V, KEYS <= np.arange(2)[:, None] + 5)
    same(cache.attend(Q[:, :, :2]), expected)
    buffers = [np.concatenate((x, np.full_like(x, np.nan)), axis=2) for x in (K, V)]
    same(attention(Q[:, :, :2], *buffers, kv_lengths=7, causal=True), expected)


@row(FLASH, "`cache_leftpad=n`")
def _():
    starts = np.array([2, 0])
    same(attention(Q, K, V, kv_starts=starts), plain(Q, K, V, starts[:, None, None, None] <= KEYS)[0])


@row(FLASH, "a row that sees nothing")
def _():
    out, lse = attention(Q, K[:, :, :3], V[:, :, :3], causal=True, return_lse=True)
    assert not np.any(out[:, :, :2]) and np.all(lse[:, :, :2] == -np.inf)


# ONNX Runtime --------------------------------------------------------------------------------------------------------

ORT = "ONNX Runtime: GroupQueryAttention"


def grouped(q, k, v, lengths, past=None, **attributes):
    """Its result, heads first, and its keys and values."""
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    batch, heads, length, dim = q.shape
    past = past or (np.zeros((batch, k.shape[1], 0, dim), "float32"),) * 2
    flat = [x.swapaxes(1, 2).reshape(batch, length, -1) for x in (q, k, v)]
    total = np.array([max(lengths)], np.int32)
    feeds = dict(zip(("q", "k", "v", "pk", "pv"), (*flat, *past), strict=True))
    feeds |= {"lengths": np.array(lengths, np.int32) - 1, "total": total}
    attributes = {"num_heads": heads, "kv_num_heads": k.shape[1], **attributes}
    names = ["y", "keys", "values"]
    node = onnx.helper.make_node("GroupQueryAttention", list(feeds), names, domain="com.microsoft", **attributes)
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in feeds.items()
    ]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), quiet, providers=["CPUExecutionProvider"])
    y, keys, values = session.run(None, feeds)
    return y.reshape(batch, length, heads, dim).swapaxes(1, 2), keys, values


def step(**attributes):
    """One query of each sequence behind 5 and 8 keys of a buffer."""
    past = [RNG.standard_normal((2, 2, 12, 8), dtype="float32") for _ in range(2)]
    q, k, v = Q[:, :, :1], K[:, :2, :1], V[:, :2, :1]
    return q, *grouped(q, k, v, [6, 9], past, **attributes)


@row(ORT, "`seqlens_k`")
def _():
    q, y, keys, values = step()
    same(attention(q, keys, values, kv_lengths=[6, 9]), y)


@row(ORT, "positions of a step behind a past")
def _():
    q, y, keys, values = step(local_window_size=4)
    same(attention(q, keys, values, kv_lengths=[6, 9], causal=True, window=3), y)


@row(ORT, "`local_window_size=W`")
def _():
    q, k, v = Q, K[:, :2, :5], V[:, :2, :5]
    y, keys, values = grouped(q, k, v, [5, 5], local_window_size=3)
    same(attention(q, keys, values, causal=True, window=2), y)
    differ(attention(q, keys, values, causal=True, window=3), y)


@row(ORT, "queries that are padding, on the right")
def _():
    lengths = np.array([3, 5])
    y, keys, values = grouped(Q, K[:, :2, :5], V[:, :2, :5], lengths)
    ours = attention(Q, keys, values, causal=True, kv_lengths=lengths, q_lengths=lengths)
    real = np.arange(5)[:, None] < lengths[:, None, None, None]
    same(np.where(real, ours, 0), np.where(real, y, 0))
    assert not np.any(ours[0, :, 3:]) and np.any(y[0, :, 3:])


@row(ORT, "`scale=0`, `softcap=0`")
def _():
    q, k, v = Q, K[:, :2, :5], V[:, :2, :5]
    y, keys, values = grouped(q, k, v, [5, 5], scale=0.0, softcap=0.0)
    same(attention(q, keys, values, causal=True), y)
    y, *_ = grouped(q, k, v, [5, 5], scale=0.5, softcap=2.0)
    same(attention(q, keys, values, causal=True, scale=0.5, softcap=2.0), y)


@row(ORT, "(batch, length, heads × dim)")
def _():
    _, keys, values = grouped(Q, K[:, :2, :5], V[:, :2, :5], [5, 5])
    same(keys, K[:, :2, :5])
    same(values, V[:, :2, :5])


# transformers --------------------------------------------------------------------------------------------------------

HUGGING = "transformers"


def seen(function):
    """A mask function of transformers as an array, of 5 queries behind 2 keys."""
    import torch

    queries, keys = torch.arange(2, 7), torch.arange(7)
    return np.array([[bool(function(0, 0, q, kv)) for kv in keys] for q in queries])


def eager(mask):
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import eager_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups = 1
    out, _ = eager_attention_forward(module, *map(torch.tensor, (Q, K, V)), torch.tensor(mask), scaling=8**-0.5)
    return out.numpy()


@row(HUGGING, "`sliding_window=W`")
def _():
    masking = pytest.importorskip("transformers.masking_utils")
    mask = seen(masking.sliding_window_causal_mask_function(3))
    same(attention(Q, K, V, causal=True, window=2), attention(Q, K, V, mask=mask))


@row(HUGGING, "chunks of C")
def _():
    masking = pytest.importorskip("transformers.masking_utils")
    torch = pytest.importorskip("torch")
    mask = seen(masking.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64)))
    ids = (np.arange(5) + 2) // 3, np.arange(7) // 3
    same(attention(Q, K, V, causal=True, segments=ids), attention(Q, K, V, mask=mask))


@row(HUGGING, "a 2-D `attention_mask` of 0 and 1")
def _():
    given = (np.arange(7) >= np.array([[3], [0]])).astype(np.int64)
    theirs = eager(np.where(given[:, None, None, :], 0, LOWEST).astype("float32")).swapaxes(1, 2)
    same(attention(Q, K, V, mask=given[:, None, None, :] != 0), theirs)
    same(attention(Q, K, V, kv_starts=given.argmax(1)), theirs)


@row(HUGGING, "a 4-D mask of 0 and the lowest float")
def _():
    given = np.where(MASK, 0, LOWEST).astype("float32")
    same(attention(Q, K, V, mask=given == 0), eager(given).swapaxes(1, 2))
    same(attention(Q, K, V, bias=np.full((5, 7), LOWEST)), mean())


@row(HUGGING, "no mask and several queries")
def _():
    torch = pytest.importorskip("torch")
    sdpa_module = pytest.importorskip("transformers.integrations.sdpa_attention")
    module = torch.nn.Module()
    module.is_causal = True
    out, _ = sdpa_module.sdpa_attention_forward(module, *map(torch.tensor, (Q, K, V)), None)
    same(attention(Q, K, V, causal="top-left"), out.swapaxes(1, 2))


@row(HUGGING, "rows that see nothing")
def _():
    same(eager(np.full((2, 1, 5, 7), LOWEST)).swapaxes(1, 2), mean())
    assert not np.any(attention(Q, K, V, mask=np.zeros((5, 7), bool)))


@row(HUGGING, "the result (batch, length, heads, dim)")
def _():
    same(attention(Q, K, V).swapaxes(1, 2), eager(np.zeros((2, 1, 5, 7), "float32")))


@row(HUGGING, "`position_ids`")
def _():
    with pytest.raises(TypeError, match="rotary positions come before"):
        attention(Q, K, V, position_ids=np.arange(5))


# JAX -----------------------------------------------------------------------------------------------------------------

JAX = "JAX: jax.nn.dot_product_attention"


def jaxs(*args, **options):
    return pytest.importorskip("jax").nn.dot_product_attention(*TURNED, *args, **options)


@row(JAX, "(batch, length, heads, dim)")
def _():
    same(attention(*TURNED, bias=NUMBERS, mask=MASK, layout="blhd"), jaxs(NUMBERS, MASK))


@row(JAX, "`is_causal=True`")
def _():
    same(attention(*TURNED, layout="blhd", causal="top-left"), jaxs(is_causal=True))


@row(JAX, "`local_window_size=(l, r)`")
def _():
    same(attention(*TURNED, layout="blhd", window=(2, 1), q_offset=0), jaxs(local_window_size=(2, 1)))


@row(JAX, "`key_value_seq_lengths=n`")
def _():
    lengths = np.array([5, 7], np.int32)
    theirs = jaxs(key_value_seq_lengths=lengths, is_causal=True)
    same(attention(*TURNED, layout="blhd", kv_lengths=lengths, causal="top-left"), theirs)
    differ(attention(*TURNED, layout="blhd", kv_lengths=lengths, causal=True), theirs)


@row(JAX, "`query_seq_lengths=n`")
def _():
    lengths = np.array([3, 5], np.int32)
    theirs = jaxs(query_seq_lengths=lengths, is_causal=True)
    same(attention(*TURNED, layout="blhd", q_lengths=lengths, causal=True, q_offset=0), theirs)


@row(JAX, "rows that see nothing")
def _():
    hidden = np.zeros((1, 1, 5, 7), bool)
    same(jaxs(None, hidden), mean().swapaxes(1, 2))
    assert not np.any(attention(*TURNED, layout="blhd", mask=hidden))


@row(JAX, "`return_residual=True`")
def _():
    _, theirs = jaxs(return_residual=True)
    _, ours = attention(*TURNED, layout="blhd", return_lse=True)
    same(ours.swapaxes(1, 2), theirs)


# Dask ----------------------------------------------------------------------------------------------------------------

DASK = "Dask: einsum"


def dasks():
    """The adapter, and q, k and v in blocks of 2 heads and 3 queries or 4 keys."""
    da = pytest.importorskip("dask.array")
    adapter = pytest.importorskip("qkv_fast.integrations.dask")
    return da, adapter, [da.from_array(x[0], chunks=(2, n, 8)) for x, n in ((Q, 3), (K, 4), (V, 4))]


@row(DASK, "blocks of scores, and all keys for a softmax")
def _():
    da, adapter, (q, k, v) = dasks()
    s = da.einsum("hqd,hkd->hqk", q, k) / np.sqrt(8)
    p = da.exp(s - s.max(axis=-1, keepdims=True))
    theirs = da.einsum("hqk,hkd->hqd", p / p.sum(axis=-1, keepdims=True), v)
    ours = adapter.attention(q, k, v)
    assert s.npartitions == q.npartitions * 2 and ours.chunks == q.chunks
    same(ours.compute(scheduler="sync"), theirs.compute(scheduler="sync"))


@row(DASK, "`da.map_blocks(qkv_fast.attention, q, k, v)`")
def _():
    da, adapter, (q, k, v) = dasks()
    theirs = da.map_blocks(attention, q, k, v, dtype="float32", meta=np.empty((0, 0, 0), "float32"))
    theirs = theirs.compute(scheduler="sync")
    same(theirs[:, :3], attention(Q[0][:, :3], K[0][:, :4], V[0][:, :4]))
    same(theirs[:, 3:], attention(Q[0][:, 3:], K[0][:, 4:], V[0][:, 4:]))
    same(adapter.attention(q, k, v).compute(scheduler="sync"), attention(Q[0], K[0], V[0]))


@row(DASK, "blocks of `da.from_delayed`, made once for all that need them")
def _():
    da, adapter, _ = dasks()
    made = []

    def make():
        made.append(1)
        return K[0]

    q = da.from_array(Q[0], chunks=(4, 3, 8))
    k = da.from_delayed(pytest.importorskip("dask").delayed(make)(), K[0].shape, "float32")
    da.einsum("hqd,hkd->hqk", q, k).compute(scheduler="sync")
    assert len(made) == 1
    assert adapter.explain(q, k, k).made_anew
    adapter.attention(q, k, k).compute(scheduler="sync")
    assert len(made) == 1 + 2 * 2  # as k and as v, for two blocks of queries
    held = k.persist(scheduler="sync")
    assert not adapter.explain(q, held, held).made_anew


@row(DASK, "positions within blocks")
def _():
    _, adapter, (q, k, v) = dasks()
    given = dict(causal=True, mask=MASK[0], kv_lengths=6, q_offset=1)
    same(adapter.attention(q, k, v, **given).compute(scheduler="sync"), attention(Q[0], K[0], V[0], **given))


# NumPy ---------------------------------------------------------------------------------------------------------------

NUMPY = "NumPy: einsum"


def einsum(q=Q, k=K, v=V, mask=True, hidden=-np.inf):
    s = np.einsum("bhqd,bhkd->bhqk", q, k) / q.dtype.type(np.sqrt(8))
    s = np.where(mask, s, s.dtype.type(hidden))
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", p / p.sum(axis=-1, keepdims=True), v)


@row(NUMPY, "`np.tril(np.ones((Lq, Lk), bool))` as mask")
def _():
    same(attention(Q, K, V, causal="top-left"), einsum(mask=np.tril(np.ones((5, 7), bool))))
    same(attention(Q, K, V, causal=True), einsum(mask=np.tri(5, 7, 2) > 0))


@row(NUMPY, "−inf in a whole row")
def _():
    with pytest.warns(RuntimeWarning, match="invalid value"):
        assert np.isnan(einsum(mask=np.zeros((5, 7), bool))).all()
    assert not np.any(attention(Q, K, V, mask=np.zeros((5, 7), bool)))


@row(NUMPY, "−1e9 in place of −inf, in a whole row")
def _():
    same(einsum(mask=np.zeros((5, 7), bool), hidden=-1e9), mean())


@row(NUMPY, "float16")
def _():
    long = [np.tile(x, (1, 1, 300, 1)).astype(np.float16) for x in (K, V)]
    wide = attention(Q.astype(np.float16).astype("float32"), *(x.astype("float32") for x in long))
    ours, theirs = (np.abs(f(Q.astype(np.float16), *long) - wide).max() for f in (attention, einsum))
    assert ours < 2.0**-11 * np.abs(wide).max() * 1.01 < theirs


@row(NUMPY, "NaN in a value that is hidden")
def _():
    v = V.copy()
    v[:, :, -1] = np.nan
    mask = KEYS < 6
    assert np.isnan(einsum(v=v, mask=mask)).all()
    same(attention(Q, K, v, mask=mask), attention(Q, K[:, :, :6], V[:, :, :6]))


@row(NUMPY, "k and v of fewer heads")
def _():
    same(attention(Q, K[:, :2], V[:, :2]), einsum(k=np.repeat(K[:, :2], 2, axis=1), v=np.repeat(V[:, :2], 2, axis=1)))


def rows_of_the_page():
    section = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif (found := re.match(r"\| (.*?) \| .* \|$", line)) and found[1] != "there":
            yield section, found[1]


def test_every_row_has_a_check_and_every_check_its_row():
    assert list(CHECKS) == list(rows_of_the_page())


@pytest.mark.filterwarnings("ignore:.*flex_attention", "ignore:Lower right causal bias")
@pytest.mark.parametrize("name", CHECKS, ids=": ".join)
def test_row(name):
    CHECKS[name]()
