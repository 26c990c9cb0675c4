"""Models of transformers give with our attention what they give with the host's own."""

import itertools
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("transformers", reason="the extra [test] leaves it out for its size; [transformers] has it")

import torch
import transformers
from _models import compare, compare_all, kinds
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import qkv_fast
from qkv_fast.integrations.transformers import MODEL_TYPES, attention_forward, attention_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own, about its future

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = {
    "llama": transformers.LlamaConfig(num_key_value_heads=2, **SIZES),
    "mistral, a window": transformers.MistralConfig(num_key_value_heads=2, sliding_window=4, **SIZES),
    "gemma 2, a soft cap": transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=4, **SIZES),
    "gpt_oss, sinks": transformers.GptOssConfig(
        num_key_value_heads=2, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, **SIZES
    ),
}
FEW = "llama bert t5 whisper gpt_oss gemma3_text vit bart clip modernbert deepseek_v3 llama4_text".split()
# Rounding of the sum of a few layers, of numbers around 1; 16 bits: a rounding of every layer's states.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def make(name, implementation="eager", dtype=torch.float32):
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_config(DECODERS[name], attn_implementation="eager").eval().to(dtype)
    model.set_attn_implementation(implementation)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def padded(left, right, length=9):
    torch.manual_seed(1)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    return {"input_ids": torch.randint(3, 99, (2, length)), "attention_mask": mask}


def qkv(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


class Layer(torch.nn.Module):
    num_key_value_groups = 1


@pytest.mark.parametrize("kind", FEW)
def test_few_architectures(kind):
    called, uncalled, error, ours = compare(kind)
    assert error < TOLERANCE[torch.float32] and not uncalled and ours
    assert called <= MODEL_TYPES


@pytest.mark.full
def test_all_architectures():
    """All that can be built here and call ours, what they generate too; MODEL_TYPES is made of them."""
    good, bad, served, others, every = set(), set(), [], [], kinds()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:  # more than a minute
        found = itertools.chain(*pool.map(compare_all, (every[::2], every[1::2])))
    for kind, called, uncalled, error, ours in found:
        right = error < 1e-4  # of sizes up to 60, in many layers; what is wrong is off by 0.05 and more
        good |= called if right else set()
        bad |= uncalled if right else called | uncalled
        served += [kind] * (right and ours)
        others += [kind] * (right and not ours and not uncalled)
    print(len(served), "architectures:", *sorted(served))
    print(len(others), "call no registered function, and are not ours:", *sorted(others))
    assert {"clip_vision_model", "wav2vec2", "t5", "llama"} <= {*served} and "deberta-v2" in others
    assert good - bad == MODEL_TYPES


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding", [(0, 0), (4, 0), (0, 4)])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, padding, dtype):
    given = padded(*padding)
    with torch.no_grad():
        ours, theirs = (make(name, kind, dtype)(**given).logits for kind in ("qkv_fast", "eager"))
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, options, cache):
    """Past the window, so that sliding caches drop tokens."""
    for left in (0, 4):
        tokens = []
        for kind in ("qkv_fast", "eager"):
            model = make(name, kind)
            settings = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, **options}
            if cache == "static":
                settings["cache_implementation"] = "static"
            tokens.append(model.generate(**padded(left, 0), **settings))
        assert torch.equal(*tokens)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_prompt_in_pieces(cache):
    """Six tokens beside a buffer of 64 keys, three more, then one: the logits of each."""
    tokens, results = padded(0, 0, 10)["input_ids"], []
    for kind in ("qkv_fast", "sdpa", "eager"):
        model = make("llama", kind)
        options = {"max_cache_len": 64} if cache is StaticCache else {}
        past = cache(config=model.config, **options)
        with torch.no_grad():
            pieces = [model(piece, past_key_values=past).logits for piece in tokens.split([6, 3, 1], 1)]
        results.append(torch.cat(pieces, 1))
    for theirs in results[1:]:
        torch.testing.assert_close(results[0], theirs, rtol=0, atol=TOLERANCE[torch.float32])


def test_encoder_decoder_generates():
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    tokens = []
    for kind in ("qkv_fast", "eager"):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=kind).eval()
        model.generation_config.decoder_start_token_id = 0
        given = padded(0, 4)
        tokens.append(model.generate(**given, max_new_tokens=8, num_beams=2, do_sample=False))
    assert torch.equal(*tokens)


def test_both_are_registered():
    assert AttentionInterface()["qkv_fast"] is attention_forward
    assert AttentionMaskInterface()["qkv_fast"] is attention_mask


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_models_that_only_make_masks_are_refused(kind):
    sizes = {"vocab_size": 99, "hidden_size": 32, "n_head": 4, "n_layer": 1, "d_model": 32, "n_heads": 4, "n_layers": 1}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="qkv_fast").eval()
    with pytest.raises(NotImplementedError, match=f"no '{kind}' models"):
        model(**padded(0, 0))


def test_weights():
    given = padded(4, 0)
    with torch.no_grad():
        ours, theirs = (make("llama", kind)(**given, output_attentions=True) for kind in ("qkv_fast", "eager"))
    seen = given["attention_mask"].bool()[:, None, :, None]
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(a * seen, b * seen, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_see_nothing(dtype):
    """Also where a mask is made of lowest numbers, of which -inf is none."""
    q, k, v = qkv(1, 2, 4, 8, dtype=dtype)
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    seen[..., 1, :] = False
    lowest = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    out, _ = attention_forward(Layer(), q, k, v, seen)
    assert not out[:, 1].any() and out[:, 2].any()
    for mask in (lowest, lowest + 2, lowest.masked_fill(~seen, -torch.inf)):
        added, _ = attention_forward(Layer(), q, k, v, mask)
        assert not added[:, 1].any()
    torch.testing.assert_close(attention_forward(Layer(), q, k, v, lowest)[0], out, rtol=0, atol=0)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("is_causal", [None, False, True])
def test_no_mask(queries, is_causal):
    _, k, v = qkv(2, 4, 7, 8)
    q = qkv(2, 4, queries, 8)[0]
    for module_says in (None, False, True):
        layer = Layer()
        if module_says is not None:
            layer.is_causal = module_says
        ours, theirs = (
            f(layer, q, k, v, None, is_causal=is_causal, scaling=0.5)[0]
            for f in (attention_forward, sdpa_attention_forward)
        )
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous() and ours.shape == (2, queries, 4, 8)


def test_position_bias_and_mask():
    q, k, v = qkv(2, 4, 7, 8)
    bias, seen = torch.randn(1, 4, 7, 7), torch.ones(2, 1, 7, 7).tril().bool()
    for mask in (None, seen, torch.randn(2, 1, 7, 7)):
        ours, theirs = (
            f(Layer(), q, k, v, mask, position_bias=bias)[0] for f in (attention_forward, sdpa_attention_forward)
        )
        torch.testing.assert_close(ours, theirs)


def test_window_without_a_mask():
    q, k, v = qkv(1, 2, 9, 8)
    ours = attention_forward(Layer(), q, k, v, None, sliding_window=3)[0]
    expected = qkv_fast.attention(q.numpy(), k.numpy(), v.numpy(), causal=True, window=2)
    torch.testing.assert_close(ours.transpose(1, 2), torch.from_numpy(expected))
    last = attention_forward(Layer(), q[:, :, -1:], k, v, None, sliding_window=3)[0]
    torch.testing.assert_close(last[:, 0], ours[:, -1])
    with pytest.raises(NotImplementedError, match=re.escape("no sliding_window (3) over 9 keys")):
        attention_forward(Layer(), q, k, v, None, sliding_window=3, is_causal=False)


@pytest.mark.parametrize("word", ["indices", "block_indices", "sinks", "cu_seq_lens_q", "something"])
def test_unknown_words(word):
    q, k, v = qkv(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match=f"no '{word}': this layer \\(Layer\\)"):
        attention_forward(Layer(), q, k, v, None, **{word: torch.zeros(1)})
    attention_forward(Layer(), q, k, v, None, **{word: None}, position_ids=torch.arange(4))


def test_bad_input():
    q, k, v = qkv(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match=r"dropout must be 0, got 0\.1"):
        attention_forward(Layer(), q, k, v, None, dropout=0.1)
    with pytest.raises(NotImplementedError, match="no gradients: query has requires_grad"):
        attention_forward(Layer(), q.clone().requires_grad_(), k, v, None)
    with pytest.raises(NotImplementedError, match="on the CPU only: key is"):
        attention_forward(Layer(), q, k.to("meta"), v, None)
    with pytest.raises(TypeError, match=r"value must be torch\.float32, got torch\.float64"):
        attention_forward(Layer(), q, k, v.double(), None)
    with pytest.raises(TypeError, match=r"attention_mask must be torch\.bool or"):
        attention_forward(Layer(), q, k, v, torch.ones(1, 1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must have 4 axes each \(query: \(2, 4, 8\)"):
        attention_forward(Layer(), q[0], k[0], v[0], None)
