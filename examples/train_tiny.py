"""Trains a small byte transformer in NumPy on the text of Python's own help.

    python examples/train_tiny.py --curve loss.png

Every gradient is written out below; those of attention come from `attention_grad`. Blocks are x + attention(norm(x))
and x + relu(norm(x) W) W', with RMS norms without weights; ALiBi slopes stand in for embeddings of positions. Arrays of
tokens are (batch * length, width). Weights of float64 train in float64.
"""

import argparse
import sys
import time
from pydoc_data.topics import topics

import numpy as np

from qkv_fast import alibi_slopes, attention, attention_grad, weighted_values

BYTES = 256
RATE, BETAS, TINY = 2e-3, (0.9, 0.99), 1e-8  # of Adam


def new_weights(rng, width=128, layers=3, dtype="float32"):
    """Normal, of deviation 1 / sqrt(what they sum over); the embedding's is 1."""

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(dtype)

    weights = {"embed": rng.standard_normal((BYTES, width)).astype(dtype), "out": matrix(width, BYTES)}
    for i in range(layers):
        weights |= {f"{i}.qkv": matrix(width, 3 * width), f"{i}.mix": matrix(width, width)}
        weights |= {f"{i}.up": matrix(width, 4 * width), f"{i}.down": matrix(4 * width, width)}
    return weights


def norm(x):
    """x over its root mean square, and that number's inverse."""
    inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(1e-5))
    return x * inverse, inverse


def norm_grad(dy, y, inverse):
    return inverse * (dy - y * np.mean(dy * y, axis=-1, keepdims=True))


def product(a, b):
    """a @ b, on the threads that attention has: those of NumPy's BLAS would spin beside them."""
    return weighted_values(a, b)


def product_grad(dy, x, w):
    """Of y = x w, with respect to x and to w."""
    return product(dy, w.T), product(x.T, dy)


class Model:
    def __init__(self, weights, heads=4):
        self.weights, self.heads = weights, heads
        self.layers = sum(name.endswith(".qkv") for name in weights)
        self.options = dict(causal=True, alibi_slopes=alibi_slopes(heads), layout="blhd")

    def forward(self, tokens):
        """Logits of the byte behind each, and what the way back needs."""
        w, kept = self.weights, []
        x = w["embed"][tokens.ravel()]
        for i in range(self.layers):
            a, a_inverse = norm(x)
            qkv = product(a, w[f"{i}.qkv"]).reshape(*tokens.shape, 3, self.heads, -1)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            out, lse = attention(q, k, v, return_lse=True, **self.options)
            mixed = out.reshape(a.shape)
            x = x + product(mixed, w[f"{i}.mix"])
            b, b_inverse = norm(x)
            hidden = np.maximum(product(b, w[f"{i}.up"]), 0)
            x = x + product(hidden, w[f"{i}.down"])
            kept.append((a, a_inverse, (q, k, v, out, lse), mixed, b, b_inverse, hidden))
        last, inverse = norm(x)
        return product(last, w["out"]), (last, inverse, kept)

    def loss_and_gradients(self, tokens, targets):
        """The mean cross-entropy, and its gradient with respect to each weight."""
        w, grads = self.weights, {}
        logits, (last, inverse, kept) = self.forward(tokens)
        logits = logits - logits.max(axis=-1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(axis=-1, keepdims=True)
        target = targets.reshape(-1, 1)
        loss = float(np.mean(np.log(total) - np.take_along_axis(logits, target, axis=-1), dtype="float64"))
        p /= total
        np.put_along_axis(p, target, np.take_along_axis(p, target, axis=-1) - 1, axis=-1)
        dlast, grads["out"] = product_grad(p / p.dtype.type(targets.size), last, w["out"])
        dx = norm_grad(dlast, last, inverse)
        for i in reversed(range(self.layers)):
            a, a_inverse, (q, k, v, out, lse), mixed, b, b_inverse, hidden = kept[i]
            dhidden, grads[f"{i}.down"] = product_grad(dx, hidden, w[f"{i}.down"])
            db, grads[f"{i}.up"] = product_grad(dhidden * (hidden > 0), b, w[f"{i}.up"])
            dx = dx + norm_grad(db, b, b_inverse)
            dout, grads[f"{i}.mix"] = product_grad(dx, mixed, w[f"{i}.mix"])
            dqkv = np.stack(attention_grad(dout.reshape(out.shape), q, k, v, out, lse, **self.options), axis=2)
            da, grads[f"{i}.qkv"] = product_grad(dqkv.reshape(len(a), -1), a, w[f"{i}.qkv"])
            dx = dx + norm_grad(da, a, a_inverse)
        grads["embed"] = np.zeros_like(w["embed"])
        np.add.at(grads["embed"], tokens.ravel(), dx)
        return loss, grads


class Adam:
    """D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1."""

    def __init__(self, weights):
        self.weights, self.steps = weights, 0
        self.moments = {name: (np.zeros_like(x), np.zeros_like(x)) for name, x in weights.items()}

    def step(self, grads):
        self.steps += 1
        rest = [1 - beta**self.steps for beta in BETAS]
        for name, g in grads.items():
            mean, square = self.moments[name]
            mean += (1 - BETAS[0]) * (g - mean)
            square += (1 - BETAS[1]) * (g * g - square)
            self.weights[name] -= RATE / rest[0] * mean / (np.sqrt(square / rest[1]) + TINY)


def batches(data, rng, count, length):
    """Endless pairs of (count, length) bytes: some text, and the text one byte further on."""
    while True:
        at = rng.integers(0, len(data) - length, count)[:, np.newaxis] + np.arange(length)
        yield data[at], data[at + 1]


def train(model, given, steps):
    """Yields the loss before each step."""
    adam = Adam(model.weights)
    for _, (tokens, targets) in zip(range(steps), given):  # noqa: B905
        loss, grads = model.loss_and_gradients(tokens, targets)
        adam.step(grads)
        yield loss


def sample(model, rng, start, count, length):
    """`count` more bytes, drawn from what the model expects behind the last `length`."""
    text = [*start]
    for _ in range(count):
        logits = model.forward(np.array([text[-length:]]))[0][-1].astype("float64")
        p = np.exp((logits - logits.max()) / 0.7)
        text.append(int(rng.choice(BYTES, p=p / p.sum())))
    return bytes(text).decode("ascii", "replace")


def show(step, steps, loss, began):
    done = 30 * step // steps
    left = (time.perf_counter() - began) / step * (steps - step)
    print(f"\r[{'#' * done}{'.' * (30 - done)}] {step}/{steps}  loss {loss:.3f}  {left:.0f} s left ", end="",
          file=sys.stderr, flush=True)  # fmt: skip


def draw(losses, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(losses) + 1), np.array(losses) / np.log(2))
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description="Trains a small byte transformer on the text of Python's help.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="pieces of text in a step")
    parser.add_argument("--length", type=int, default=128, help="bytes of one")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=200, help="bytes that it writes in the end")
    parser.add_argument("--curve", metavar="FILE", help="a picture of the loss (needs matplotlib)")
    options = parser.parse_args()
    if min(options.steps, options.batch, options.length, options.layers, options.width) < 1 or options.width % 4:
        parser.error("steps, batch, length, layers and width must be positive, and width a multiple of 4")

    data = np.frombuffer("\n".join(topics.values()).encode("ascii", "replace"), np.uint8)
    rng = np.random.default_rng(options.seed)
    model = Model(new_weights(rng, options.width, options.layers))
    print(f"{sum(x.size for x in model.weights.values()):,} weights, {len(data):,} bytes of text")
    losses, began = [], time.perf_counter()
    for loss in train(model, batches(data, rng, options.batch, options.length), options.steps):
        losses.append(loss)
        show(len(losses), options.steps, loss, began)
    print(file=sys.stderr)
    took, last = time.perf_counter() - began, np.mean(losses[-20:])
    print(f"{last / np.log(2):.2f} bits per byte after {options.steps} steps of {took / options.steps * 1e3:.0f} ms")
    if options.curve:
        draw(losses, options.curve)
    if options.sample:
        print(sample(model, rng, b"The ", options.sample, options.length))


if __name__ == "__main__":
    main()
