"""MultiHeadAttention: what its parts make of the same input; weights by the names of five families of models."""

import copy
import functools
import itertools
import pickle
import re

import numpy as np
import pytest
from _fence import Fence
from _patterns import PATTERNS, fits
from _util import normal, same_bits

import qkv_fast
from qkv_fast import MultiHeadAttention, reference
from qkv_fast import _runtime as runtime

pytestmark = pytest.mark.usefixtures("isa")
N, HEADS, DIM = 24, 4, 6


def parts(seed=1, dtype="float64", kv_heads=HEADS, memory=N, biases=True):
    rng = np.random.default_rng(seed)
    shapes = [(HEADS * DIM, N), (kv_heads * DIM, memory), (kv_heads * DIM, memory), (20, HEADS * DIM)]
    return [(normal(rng, s, dtype), normal(rng, s[:1], dtype) if biases else None) for s in shapes]


def inputs(dtype="float64", shape=(2, 7, N)):
    return normal(np.random.default_rng(2), shape, dtype)


def expected(given, x, memory=None, positions=None, kv_heads=HEADS, rope=None, **options):
    """By the definitions, (batch, tokens, elements)."""
    memory = x if memory is None else memory
    q, k, v = (
        np.moveaxis(np.reshape(reference.linear(y, w, b), (*y.shape[:2], heads, DIM)), 2, 1)
        for y, (w, b), heads in zip((x, memory, memory), given[:3], (HEADS, kv_heads, kv_heads), strict=True)
    )
    if rope is not None:
        q, k = (reference.rope(y, positions, **rope) for y in (q, k))
    q, k, v = (y.astype("float64") for y in (q, k, v))
    seen = np.moveaxis(reference.attention(q, k, v, **options), 1, 2)
    return reference.linear(seen.reshape(*x.shape[:2], -1), *given[3]).astype(x.dtype)


def close(got, exact, dtype="float64"):
    assert got.shape == exact.shape and got.dtype == exact.dtype
    # Four products one after another, of sums of 24: relative to the largest, some tens of roundings.
    error = np.abs(got.astype("float64") - exact.astype("float64")).max()
    assert error <= 60 * np.finfo(dtype).eps * np.abs(exact).max()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rope", [None, {}, dict(base=100.0, rotary_dim=4, interleaved=True)])
@pytest.mark.parametrize("biases", [False, True])
def test_self_attention(kv_heads, rope, biases):
    given = parts(kv_heads=kv_heads, biases=biases)
    layer = MultiHeadAttention(*given, num_heads=HEADS, num_kv_heads=kv_heads, rope=rope)
    x = inputs()
    before = x.copy()
    close(layer(x), expected(given, x, kv_heads=kv_heads, rope=rope))
    close(layer(x, causal=True), expected(given, x, kv_heads=kv_heads, rope=rope, causal=True))
    same_bits(x, before)
    at = np.random.default_rng(3).integers(0, 99, (2, 7))
    close(layer(x, positions=at), expected(given, x, positions=at, kv_heads=kv_heads, rope=rope))
    lengths = np.array([3, 7])
    close(layer(x, kv_lengths=lengths), expected(given, x, kv_heads=kv_heads, rope=rope, kv_lengths=lengths))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types(dtype):
    given = parts(dtype=dtype)
    got = MultiHeadAttention(*given, num_heads=HEADS, rope={})(inputs(dtype))
    wide = [(w.astype("float64"), b.astype("float64")) for w, b in given]
    exact = expected(wide, inputs(dtype).astype("float64"), rope={})
    close(got, exact.astype(dtype), dtype)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cross_attention(kv_heads):
    given = parts(kv_heads=kv_heads, memory=10)
    layer = MultiHeadAttention(*given, num_heads=HEADS, num_kv_heads=kv_heads)
    x, memory = inputs(), inputs(shape=(2, 9, 10))
    got = layer(x, memory)
    close(got, expected(given, x, memory, kv_heads=kv_heads))
    same_bits(layer(x, layer.keys_values(memory)), got)
    of_more = [np.repeat(y, 2, axis=-2) for y in layer.keys_values(memory)]
    with pytest.raises(ValueError, match=rf"k and v must be of shape \(\.\.\., Lk, {layer.num_kv_heads}, D\)"):
        layer(x, tuple(of_more))


@pytest.mark.parametrize("rope", [None, {}])
def test_cache(rope):
    """A prompt, then a token at a time, equal all at once."""
    layer = MultiHeadAttention(*parts(kv_heads=2), num_heads=HEADS, num_kv_heads=2, rope=rope)
    x = inputs()
    cache = qkv_fast.KVCache(2, 2, DIM, capacity=7, dtype="float64")
    got = [layer(x[:, i:j], cache=cache) for i, j in ((0, 4), (4, 5), (5, 7))]
    whole = layer(x, causal=True)
    assert (cache.lengths == 7).all()
    close(np.concatenate(got, axis=1), whole)


@pytest.mark.parametrize("rope", [None, {}])
def test_packed_sequences(rope):
    layer = MultiHeadAttention(*parts(), num_heads=HEADS, rope=rope)
    starts = np.array([0, 3, 3, 11])
    x = inputs(shape=(11, N))
    got = layer(x, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    for i, j in itertools.pairwise(starts):
        if i < j:
            close(got[None, i:j], layer(x[None, i:j], causal=True))


FAMILIES = {
    "torch": ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"],
    "kdim": ["q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"],
    "bert": [f"{a}.{b}" for a in ("self.query", "self.key", "self.value", "output.dense") for b in ("weight", "bias")],
    "gpt2": ["c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias"],
    "llama": [f"{a}_proj.weight" for a in "qkvo"],
    "whisper": [f"{a}.{b}" for a in ("q_proj", "k_proj", "v_proj", "out_proj") for b in ("weight", "bias")],
}


def state_of(family, given):
    """The weights of `parts` by the names of a family."""
    (q, b_q), (k, b_k), (v, b_v), (out, b) = given
    w, bias = np.concatenate([q, k, v]), np.concatenate([b_q, b_k, b_v])
    values = {
        "torch": [w, bias, out, b],
        "kdim": [q, k, v, bias, out, b],
        "gpt2": [w.T, bias, out.T, b],
        "llama": [q, k, v, out],
    }.get(family, [q, b_q, k, b_k, v, b_v, out, b])
    return {f"layers.0.attn.{name}": value for name, value in zip(FAMILIES[family], values, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_from_state(family):
    given = parts(biases=True)
    if family == "llama":
        given = [(w, np.zeros_like(b)) for w, b in given]
    state = state_of(family, given)
    x = inputs()
    exact = MultiHeadAttention(*given, num_heads=HEADS)(x)
    for prefix in ("layers.0.attn", "layers.0.attn."):
        close(MultiHeadAttention.from_state(state, prefix, num_heads=HEADS)(x), exact)
    bare = {name.removeprefix("layers.0.attn."): w for name, w in state.items()}
    close(MultiHeadAttention.from_state(bare, num_heads=HEADS)(x), exact)


def test_whispers_keys_have_no_bias():
    given = parts()
    given[1] = (given[1][0], np.zeros_like(given[1][1]))
    state = state_of("whisper", given)
    del state["layers.0.attn.k_proj.bias"]
    close(MultiHeadAttention.from_state(state, "layers.0.attn", num_heads=HEADS)(inputs()), expected(given, inputs()))


def test_grouped_heads_of_a_state():
    given = [(w, np.zeros_like(b)) for w, b in parts(kv_heads=2)]
    layer = MultiHeadAttention.from_state(state_of("llama", given), "layers.0.attn", num_heads=HEADS, rope={})
    assert layer.num_kv_heads == 2
    assert repr(layer) == "MultiHeadAttention(24 -> 20, num_heads=4, num_kv_heads=2, rope)"
    close(layer(inputs()), expected(given, inputs(), kv_heads=2, rope={}))


def test_torchs_own_layer():
    torch = pytest.importorskip("torch", reason="its layer is compared with ours")
    layer = torch.nn.MultiheadAttention(N, HEADS, batch_first=True, dtype=torch.float64)
    state = {name: w.numpy() for name, w in layer.state_dict().items()}
    x = inputs()
    with torch.no_grad():
        exact, _ = layer(*[torch.from_numpy(x)] * 3)
    close(MultiHeadAttention.from_state(state, num_heads=HEADS)(x), exact.numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_weights_are_all_named(family):
    state = state_of(family, parts())
    kept = re.compile(r"\.(q_proj|self\.query|in_proj|c_attn)")
    lost = [name for name in state if name.endswith("weight") and not kept.search(name)]
    for name in lost:
        del state[name]
    with pytest.raises(KeyError) as caught:
        MultiHeadAttention.from_state(state, "layers.0.attn", num_heads=HEADS)
    for name in lost[:-1] if family in ("llama", "whisper") else lost:  # whose outputs alone differ
        assert name in str(caught.value)


def test_errors():
    def refuses(error, words, call):
        with pytest.raises(error) as caught:
            call()
        for word in ("MultiHeadAttention", *words):
            assert str(word) in str(caught.value), (word, str(caught.value))

    given, x = parts(), inputs()
    layer = MultiHeadAttention(*given, num_heads=HEADS)
    words = ["'nowhere.'", "c_attn.weight"]
    refuses(KeyError, words, lambda: MultiHeadAttention.from_state({}, "nowhere", num_heads=1))
    refuses(ValueError, ["q.shape=(24, 24)"], lambda: MultiHeadAttention(*given, num_heads=5))
    refuses(ValueError, ["num_kv_heads", "3"], lambda: MultiHeadAttention(*given, num_heads=4, num_kv_heads=3))
    refuses(TypeError, ["num_heads", "4.0"], lambda: MultiHeadAttention(*given, num_heads=4.0))
    refuses(TypeError, ["rope", "bool"], lambda: MultiHeadAttention(*given, num_heads=4, rope=True))
    fewer = parts(kv_heads=2)[2]
    refuses(ValueError, ["v.shape"], lambda: MultiHeadAttention(*given[:2], fewer, given[3], num_heads=4))
    refuses(ValueError, ["24", "out"], lambda: MultiHeadAttention(*given[:3], np.zeros((5, 5)), num_heads=4))
    refuses(TypeError, ["out"], lambda: layer(x, out=x))
    refuses(ValueError, ["memory", "cache"], lambda: layer(x, x, cache=qkv_fast.KVCache(2, 4, 6, capacity=9)))
    slab, pages = qkv_fast.KVCache(2, 4, 6, capacity=9), qkv_fast.PagedKVCache(4, 6, 9)
    refuses(TypeError, ["cache", "list"], lambda: layer(x, cache=[]))
    refuses(ValueError, ["sequences", "starts", "cache"], lambda: layer(x, starts=[0, 1]))
    refuses(ValueError, ["sequences", "KVCache"], lambda: layer(x, cache=slab, sequences=[0, 1]))
    refuses(ValueError, ["PagedKVCache", "sequences="], lambda: layer(x, cache=pages))
    refuses(ValueError, ["(2, L, n)", "(3, 1, 24)"], lambda: layer(np.zeros((3, 1, 24)), cache=slab))
    refuses(ValueError, ["(2, L, n)", "(7, 24)"], lambda: layer(x[0], cache=slab))
    assert slab.lengths.tolist() == [0, 0]
    refuses(ValueError, ["(24,)"], lambda: layer(x[0, 0]))
    refuses(ValueError, ["(24,)"], lambda: layer(x, x[0, 0]))
    refuses(ValueError, ["memory", "tuple of 3"], lambda: layer(x, (x, x, x)))
    refuses(TypeError, ["list", "str"], lambda: MultiHeadAttention.from_state([], num_heads=1))
    refuses(TypeError, ["prefix", "int"], lambda: MultiHeadAttention.from_state({}, 5, num_heads=1))
    refuses(TypeError, ["names", "7"], lambda: MultiHeadAttention.from_state({7: np.eye(8)}, num_heads=1))
    for family, name in dict(torch="in_proj_weight", kdim="in_proj_bias", gpt2="c_attn.bias").items():
        state = state_of(family, given)
        state[f"layers.0.attn.{name}"] = state[f"layers.0.attn.{name}"][1:]
        make = functools.partial(MultiHeadAttention.from_state, state, "layers.0.attn", num_heads=HEADS)
        refuses(ValueError, [f"layers.0.attn.{name}", "71"], make)


def test_padded_prompts_in_a_cache():
    """Each sequence grows by its own tokens; the others' padding is no text."""
    layer = MultiHeadAttention(*parts(), num_heads=HEADS, rope={})
    x = inputs()
    cache = qkv_fast.KVCache(2, HEADS, DIM, 20, dtype="float64")
    first = layer(x[:, :5], cache=cache, lengths=[5, 3])
    assert cache.lengths.tolist() == [5, 3]
    same_bits(first[1, :3], layer(x[1:, :3], causal=True)[0])
    close(layer(x[:, 5:6], cache=cache)[1], layer(np.concatenate([x[1:, :3], x[1:, 5:6]], axis=1), causal=True)[0, 3:])


def test_errors_leave_the_cache_as_it_was():
    layer = MultiHeadAttention(*parts(), num_heads=HEADS, rope={})
    slab = qkv_fast.KVCache(2, HEADS, DIM, 30, dtype="float64")
    padded = qkv_fast.KVCache(2, HEADS, DIM, 20, dtype="float64")
    pages = qkv_fast.PagedKVCache(HEADS, DIM, 9, page_size=4, dtype="float64")
    numbers = [pages.add(), pages.add()]
    for options, before in (
        (dict(cache=slab), {}),
        (dict(cache=slab), dict(lengths=[3, 7])),
        (dict(cache=padded, starts=[2, 0]), None),
        (dict(cache=pages, sequences=numbers), dict(lengths=[5, 2])),
    ):
        if before is not None:
            layer(inputs(), **options, **before)
        lengths = [slab.lengths.tolist(), padded.lengths.tolist(), pages.lengths(numbers).tolist()]
        with pytest.raises(TypeError, match="window"):
            layer(inputs(), **options, window="x")
        assert [slab.lengths.tolist(), padded.lengths.tolist(), pages.lengths(numbers).tolist()] == lengths
    assert padded.starts.tolist() == [0, 0]


@pytest.mark.parametrize("paged", [False, True])
def test_without_memory_the_cache_is_as_it_was(paged):
    """Whichever allocation fails, those of the output's product among them, which comes when tokens are appended."""
    layer = MultiHeadAttention(*parts(dtype="float32"), num_heads=HEADS)
    if paged:
        pages = qkv_fast.PagedKVCache(HEADS, DIM, 9, page_size=4)
        options = dict(cache=pages, sequences=[pages.add(), pages.add()])
    else:
        options = dict(cache=qkv_fast.KVCache(2, HEADS, DIM, 30))
    x = inputs("float32")
    failed = 0
    while True:
        runtime.trim()
        with runtime.fail_allocation(failed):
            try:
                layer(x[:, :5], lengths=[5, 2], **options)
                break
            except MemoryError:
                failed += 1
        assert held(**options) == [0, 0]
    assert failed > 2 and held(**options) == [5, 2]


def held(cache, sequences=None):
    return (cache.lengths if sequences is None else cache.lengths(sequences)).tolist()


def test_positions_of_a_packed_memory():
    given = parts()
    layer = MultiHeadAttention(*given, num_heads=HEADS, rope={})
    x, memory = inputs(shape=(5, N)), inputs(shape=(7, N))
    got = layer(x, memory, cu_seqlens_q=[0, 2, 5], cu_seqlens_k=[0, 3, 7])
    close(got[2:][None], expected(given, x[None, 2:], memory[None, 3:], rope={}))
    for starts in (np.array([0, 2, 5], "uint64"), [0, 0, 2, 2, 5, 5]):
        ends = [0, 3, 7] if len(starts) == 3 else [0, 0, 3, 3, 7, 7]
        same_bits(layer(x, memory, cu_seqlens_q=starts, cu_seqlens_k=ends), got)


def test_starts_that_are_none():
    layer, x = MultiHeadAttention(*parts(), num_heads=HEADS, rope={}), inputs(shape=(5, N))
    for wrong in ([], [[0, 5]], None, [0.0, 5.0], [0, 4]):
        for name, given in (("cu_seqlens_q", (x,)), ("cu_seqlens_k", (x, x))):
            options = dict(cu_seqlens_q=[0, 5], cu_seqlens_k=[0, 5]) | {name: wrong}
            with pytest.raises((TypeError, ValueError), match=f"{name} must"):
                layer(*given, **options)


@pytest.mark.parametrize("shape", [(1, 0, N), (0, 3, N)])
def test_nothing_in(shape):
    layer = MultiHeadAttention(*parts(), num_heads=HEADS, rope={})
    assert layer(np.zeros(shape)).shape == (*shape[:-1], 20)


@pytest.mark.parametrize(
    "name", ["bias_k", "q_norm.weight", "sinks", "q_proj.weight_scale", "q_proj.lora_A.weight", "rel_pos_linear.weight"]
)
def test_weights_of_more_than_this_layer(name):
    state = {f"a.{part}_proj.weight": np.eye(8) for part in "qkvo"} | {f"a.{name}": np.ones(8)}
    with pytest.raises(ValueError, match=re.escape(name)):
        MultiHeadAttention.from_state(state, "a", num_heads=2)


@pytest.mark.parametrize("odd", ["whisper masked_bias", "llama in_proj_bias", "gpt2 LayerNorm.bias", "llama "])
def test_weights_that_another_family_has_no_use_for(odd):
    family, name = odd.split(" ")
    state = state_of(family, parts()) | {f"layers.0.attn.{name}": np.zeros(3 * HEADS * DIM)}
    with pytest.raises(ValueError, match=rf"layers\.0\.attn\.{name} is more than"):
        MultiHeadAttention.from_state(state, "layers.0.attn", num_heads=HEADS)


@pytest.mark.parametrize("given", ["llama rotary_emb.inv_freq", "bert self.rotary_embeddings.inv_freq"])
def test_frequencies_of_a_state(given):
    """Positions are not left out in silence, and neither are they put in by others."""
    family, name = given.split()
    plain = state_of(family, parts())
    frequencies = (10000.0 ** (-np.arange(0, DIM, 2) / DIM)).astype("float16")
    state = plain | {f"layers.0.attn.{name}": frequencies, "layers.0.attn2": 0}
    make = functools.partial(MultiHeadAttention.from_state, prefix="layers.0.attn", num_heads=HEADS)
    with pytest.raises(ValueError, match=rf"layers\.0\.attn\.{name}.*rope="):
        make(state)
    x = inputs()
    same_bits(make(state, rope={})(x), make(plain, rope={})(x))
    with pytest.raises(TypeError, match=rf"layers\.0\.attn\.{name} must be"):
        make(state | {f"layers.0.attn.{name}": "x"}, rope={})
    for wrong in (dict(base=500.0), dict(rotary_dim=4)):
        with pytest.raises(ValueError, match=rf"other frequencies than layers\.0\.attn\.{name}"):
            make(state, rope=wrong)
    scaled = dict(scaling=dict(rope_type="linear", factor=2.0))
    same_bits(make(state, rope=scaled)(x), make(plain, rope=scaled)(x))


def test_esms_own_layer():
    """BERT's names, with rotary positions, and a norm before."""
    esm = pytest.importorskip("transformers.models.esm.modeling_esm", reason="compared with transformers' layer")
    torch = pytest.importorskip("torch", reason="transformers' layer needs torch")
    config = esm.EsmConfig(
        vocab_size=30, hidden_size=N, num_attention_heads=HEADS, num_hidden_layers=1, intermediate_size=8,
        pad_token_id=1, position_embedding_type="rotary", attn_implementation="eager",
    )  # fmt: skip
    model = esm.EsmModel(config, add_pooling_layer=False).double().eval()
    attention, met = model.encoder.layer[0].attention, {}
    attention.self.register_forward_hook(
        lambda _, args, words, out: met.update(x=args[0] if args else words["hidden_states"], seen=out),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(input_ids=torch.arange(4, 11)[None])
        exact = attention.output.dense(met["seen"][0]).numpy()
    state = {name: w.numpy() for name, w in model.state_dict().items()}
    layer = MultiHeadAttention.from_state(state, "encoder.layer.0.attention", num_heads=HEADS, rope={})
    # torch's cosines and sines are float32: of angles up to 6.
    np.testing.assert_allclose(layer(met["x"].numpy()), exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_what_was_given_may_change():
    """A layer has its own weights, tables and factors."""
    x = inputs()
    tables = tuple(np.random.default_rng(4).standard_normal((2, 9, DIM // 2)))
    factors = np.full(DIM // 2, 2.0)
    longrope = dict(rope_type="longrope", short_factor=factors, long_factor=factors, factor=2.0,
                    original_max_position_embeddings=4)  # fmt: skip
    for rope in (dict(cos_sin=tables), dict(scaling=longrope)):
        given = parts()
        layer = MultiHeadAttention(*given, num_heads=HEADS, rope=rope)
        expect = layer(x)
        for y in (*tables, factors, *itertools.chain(*given)):
            y[...] = 7
        same_bits(layer(x), expect)
        factors[:] = 2


def test_copies_and_pickles():
    """Packed weights begin at a cache line again, whatever memory a copy gets."""
    layer, x = MultiHeadAttention(*parts(dtype="float32"), num_heads=HEADS), inputs("float32")
    expect = layer(x, causal=True)
    for other in (copy.copy(layer), copy.deepcopy(layer), *(pickle.loads(pickle.dumps(layer)) for _ in range(8))):
        same_bits(other(x, causal=True), expect)


def grown(layer, x, threads=None, **options):
    """A prompt of five tokens, then two more."""
    cache = qkv_fast.KVCache(len(x), layer.num_kv_heads, DIM, 20, dtype=x.dtype)
    return np.concatenate([layer(y, cache=cache, num_threads=threads, **options) for y in (x[:, :5], x[:, 5:])], axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_bits_depend_on_the_sequence_alone(dtype):
    """Not on threads, nor on what else is in the batch, nor on padding behind it."""
    layer = MultiHeadAttention(*parts(dtype=dtype, kv_heads=2), num_heads=HEADS, num_kv_heads=2, rope={})
    x = inputs(dtype, (3, 150, N))
    expect = layer(x, causal=True, num_threads=1)
    for threads in (2, 5):
        same_bits(layer(x, causal=True, num_threads=threads), expect)
    for b in range(3):
        same_bits(layer(x[b : b + 1], causal=True)[0], expect[b])
    lengths = np.array([150, 40, 3])
    padded = layer(x, causal=True, q_lengths=lengths, kv_lengths=lengths)
    for b, n in enumerate(lengths):
        same_bits(padded[b, :n], layer(x[b : b + 1, :n], causal=True)[0])
    steps = grown(layer, x[:, :7], 1)
    same_bits(grown(layer, x[:, :7], 3), steps)
    same_bits(grown(layer, x[1:2, :7])[0], steps[1])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_strides(pattern, dtype):
    if not fits(pattern, dtype):
        pytest.skip("a byte order that this type does not have")
    layer = MultiHeadAttention(*parts(dtype=dtype, memory=10), num_heads=HEADS)
    x, memory = inputs(dtype), inputs(dtype, (2, 9, 10))
    lay_out = PATTERNS[pattern]
    same_bits(layer(*(lay_out(y[:, None])[:, 0] for y in (x, memory))), layer(x, memory))


@pytest.mark.parametrize("place", ["at_start", "at_end"])
def test_nothing_beyond_the_arrays(place):
    given = parts(dtype="float32", kv_heads=2)
    x = inputs("float32")
    plain = MultiHeadAttention(*given, num_heads=HEADS, num_kv_heads=2, rope={})
    fenced = [tuple(Fence(y.nbytes).put(y, place) for y in pair) for pair in given]
    layer = MultiHeadAttention(*fenced, num_heads=HEADS, num_kv_heads=2, rope={})
    near = Fence(x.nbytes).put(x, place)
    same_bits(layer(near, causal=True), plain(x, causal=True))
    same_bits(grown(layer, near), grown(plain, x))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_who_sees_it(value):
    """A token's own row and those that attend to it; of what is masked, nothing."""
    layer = MultiHeadAttention(*parts(), num_heads=HEADS, rope={})
    x = inputs()
    expect, whole = layer(x, causal=True), layer(x, kv_lengths=[7, 4])
    bad = x.copy()
    bad[1, 4, 2] = value
    got = layer(bad, causal=True)
    assert np.isnan(got[1, 4:]).all()
    got[1, 4:] = expect[1, 4:]
    same_bits(got, expect)
    got = layer(bad, kv_lengths=[7, 4])  # keys of token 4 are hidden, its query is not
    assert np.isnan(got[1, 4]).all()
    got[1, 4] = whole[1, 4]
    same_bits(got, whole)
    memory = inputs(shape=(2, 9, N))
    dirty = memory.copy()
    dirty[:, 6:] = value
    same_bits(layer(x, dirty, kv_lengths=6), layer(x, memory, kv_lengths=6))
    expect = grown(layer, x)
    got = grown(layer, bad)
    assert np.isnan(got[1, 4:]).all()
    got[1, 4:] = expect[1, 4:]
    same_bits(got, expect)
