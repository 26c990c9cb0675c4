"""Tiny models with random weights of the architectures of transformers that this can build, and what they give."""

import copy
import inspect
import re

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.auto import configuration_auto, modeling_auto

from qkv_fast.integrations.transformers import attention_forward

torch.set_num_threads(1)  # for models this small more of them only wait for each other

# What a number of a configuration becomes, by the first pattern that its name has.
SIZES = (
    (r"vocab_size$|num_embeddings$", 99),
    (r"(bos|eos|pad|cls|sep|unk|mask|decoder_start|forced_\w+)_token_id$", 2),
    (r"token_(id|index)$", 90),
    (r"key_value_heads|kv_heads", 2),
    (r"head_dim$|d_kv$|kv_channels|attention_head_size|dim_head", 8),
    (r"lora_rank", 16),
    (r"heads?$|num_attention_heads|n_head", 4),
    (r"first_k_dense|num_dense_layers|n_dense", 1),
    (r"hidden_layers$|_layers$|^n_layers?$|depth$|num_layers$|n_layer$", 2),
    (r"num_experts_per_tok|top_?k$|n_group$|topk_group|num_shared|n_shared|moe_k", 1),
    (r"num_experts|routed_experts|num_local_experts|moe_num_experts", 4),
    (r"(intermediate|inner|ffn|mlp|feed_?forward)\w*(size|dim)|d_ff$|n_inner", 32),
    (r"(hidden|embedding|projection)_size$|(hidden|embed|projection|out)_dim$|^dim$|d_model$|d_embed$|n_embd$", 32),
    (r"image_size$|img_size$", 32),
    (r"patch_size$", 8),
    (r"max_\w*position\w*|n_positions$|n_ctx$|max_sequence_length", 64),
    (r"sliding_window$|window_size$|chunk_size$|local_attention$", 4),
    (r"num_conv_pos_embeddings$", 4),
    (r"num_conv_pos_embedding_groups$", 2),
)  # fmt: skip
MOST = 3_000_000  # parameters
CLASSES = (
    ("CausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    ("Seq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
    ("", modeling_auto.MODEL_MAPPING_NAMES, transformers.AutoModel),
)


class NotBuilt(Exception):
    """Why there is no tiny model of an architecture."""


def shrink(config):
    """Arguments that make the same configuration small."""
    small = {}
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name in ("dtype", "transformers_version", "architectures", "id2label", "label2id"):
            continue
        if isinstance(value, transformers.PreTrainedConfig):
            small[name] = {**shrink(value), "model_type": value.model_type}
        elif isinstance(value, bool) or value is None or name == "num_feat_extract_layers":  # of convolutions
            continue
        elif name in ("conv_dim", "image_size") and isinstance(value, (list, tuple)):
            small[name] = [32] * len(value)
        elif isinstance(value, int):
            new = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
            if new is not None and value > 0:
                if new == 2 and re.search(r"(kv|key_value)_heads", name):  # as many as of queries, or fewer
                    new = 4 if value == getattr(config, "num_attention_heads", None) else 2
                small[name] = min(value, new)
        elif isinstance(value, list) and name in ("layer_types", "layers_block_type", "mlp_layer_types"):
            small[name] = sorted(set(value), key=value.index)[:2] * (1 if len(set(value)) > 1 else 2)
    if "vision" in config.model_type and getattr(config, "num_channels", 3) != 3:
        small["num_channels"] = 3
    return small


def kinds():
    """All names of configurations."""
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def build(kind, implementation="eager"):
    """A model of the configuration that transformers calls so, in evaluation mode."""
    try:
        mapping = transformers.CONFIG_MAPPING[kind]
        config = mapping(**shrink(mapping()))
        auto = next((auto for _, names, auto in CLASSES if kind in names), None)
        if auto is None:
            raise NotBuilt("no model of one class")
        with torch.device("meta"):
            count = sum(x.numel() for x in auto.from_config(copy.deepcopy(config)).parameters())
        if count > MOST:
            raise NotBuilt(f"{count} parameters")
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation=implementation).eval()
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {str(error)[:120]}") from error
    # Weights large enough for attention to be uneven.
    generator = torch.Generator().manual_seed(1)
    for x in model.parameters():
        if x.ndim > 1 and x.is_floating_point():
            x.data.normal_(0, 0.3, generator=generator)
    return model


def inputs(model, left=0, right=0):
    """Two sequences; of the first the given numbers of tokens are padding."""
    words = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(2)
    length, given = 10, {}
    if "input_ids" in words:
        given["input_ids"] = torch.randint(3, 80, (2, length), generator=generator)
        if "attention_mask" in words:
            given["attention_mask"] = torch.ones(2, length, dtype=torch.long)
            given["attention_mask"][0, :left] = 0
            given["attention_mask"][0, length - right :] = 0
    if "decoder_input_ids" in words:
        given["decoder_input_ids"] = torch.randint(3, 80, (2, 7), generator=generator)
    alone = "input_ids" not in words or model.main_input_name == "pixel_values"
    if "pixel_values" in words and (alone or re.search("CLIP|Siglip|Owl", type(model).__name__)):
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, (list, tuple)) else (size, size)
        frames = (config.num_frames,) if re.search("Video|Vivit|Timesformer", type(model).__name__) else ()
        given["pixel_values"] = torch.randn(2, *frames, getattr(config, "num_channels", 3), *size, generator=generator)
    if model.main_input_name == "input_values":
        given["input_values"] = torch.randn(2, 2000, generator=generator)
        if "attention_mask" in words and right:  # of samples, from which models make one of frames
            given["attention_mask"] = torch.ones(2, 2000, dtype=torch.long)
            given["attention_mask"][0, -400 * right :] = 0
    if model.main_input_name == "input_features":
        config = model.config
        bins = getattr(config, "num_mel_bins", getattr(config, "input_feat_per_channel", 80))
        bins = getattr(config, "feature_projection_input_dim", bins)
        frames = 2 * getattr(config, "max_source_positions", 32)
        features = torch.randn(2, bins, frames, generator=generator)
        given["input_features"] = features.mT if re.match("Speech2|Wav2Vec2Bert", type(model).__name__) else features
    return given


def first(output):
    """What a model gives: logits, or its last states."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return output[name]
    return next(x for x in output.to_tuple() if isinstance(x, torch.Tensor))


PADDINGS = ((0, 0), (3, 0), (0, 3))  # on the left, on the right


def generated(model):
    """Logits of the tokens that it goes on with behind a prompt that is padded on the left, with its cache; 1 where it
    does not."""
    if not model.can_generate() or model.main_input_name != "input_ids":
        return torch.ones(1)
    given = {name: x for name, x in inputs(model, 3).items() if name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        made = model.generate(**given, **settings, output_logits=True, return_dict_in_generate=True)
    except Exception:  # whatever a host has not thought of in models so small
        return torch.ones(1)
    return torch.stack(made.logits)


def run(model):
    """What it gives without padding, with it on the left and on the right, where 0 is what padding gives; and what
    it generates."""
    results = []
    for padding in PADDINGS:
        given = inputs(model, *padding)
        torch.manual_seed(0)  # some take random numbers, in evaluation too
        with torch.no_grad():
            result = first(model(**given)).float()
        mask = given.get("attention_mask")
        if mask is not None and mask.shape == result.shape[:2]:
            result = result * mask[..., None]
        results.append(result)
    return [*results, generated(model)]


class Counted:
    """Registers our attention function with a mask function that refuses no model, and counts who calls what."""

    name = "qkv_fast_counted"

    def __init__(self):
        self.masks, self.calls = set(), set()

        def forward(module, *args, **kwargs):
            self.calls.add(getattr(getattr(module, "config", None), "model_type", None))
            return attention_forward(module, *args, **kwargs)

        def mask(*, config, **kwargs):
            self.masks.add(config.model_type)
            return sdpa_mask(**kwargs)

        AttentionInterface.register(self.name, forward)
        AttentionMaskInterface.register(self.name, mask)


def compare(kind):
    """Types of configurations that made masks for ours and called it, those that made masks and did not, and how far
    what the model gives is from what it gives with the host's own functions, relative to the largest number: from eager
    or sdpa, which differ where a row sees nothing. And whether it called ours at all: without a mask, too."""
    model = build(kind)
    try:
        eager = run(model)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {str(error)[:120]}") from error
    hosts, counted = [eager], Counted()
    try:
        model.set_attn_implementation("sdpa")
        hosts.append(run(model))
    except (ValueError, NotImplementedError, AttributeError, KeyError):  # it has none
        pass
    try:
        model.set_attn_implementation(counted.name)
        ours = run(model)
        if not counted.calls:  # then what a model gives that is made with it, as users make it
            made = build(kind, counted.name)
            made.load_state_dict(model.state_dict())
            ours = run(made)
    except (NotBuilt, NotImplementedError, AttributeError, KeyError):
        return set(), set(counted.masks), torch.inf, False
    error = min(
        max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, host, strict=True)) for host in hosts
    )
    called = counted.masks & counted.calls
    return called, counted.masks - called, error, bool(counted.calls)


def compare_all(some):
    """`compare` of those among some kinds that can be built: their names and what it returned."""
    found = []
    for kind in some:
        try:
            found.append((kind, *compare(kind)))
        except NotBuilt:
            continue
    return found
