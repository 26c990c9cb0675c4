"""Chat through a KV cache: a small decoder with deterministic random weights, not a trained model.

Token by token, each seeing those before it through a `KVCache` per layer, against all tokens at once with causal
attention: the same result to the rounding of what is stored. With the speed and the size of each type of cache.

    python examples/chat_cache.py [--tokens 256] [--layers 4]
"""

import argparse
import sys
import time

import numpy as np

import qkv_fast

DIM, HEADS, KV_HEADS, HEAD_DIM = 256, 8, 2, 32  # four query heads share each key head
# By how much a stored number is rounded at most, as a share of the largest that it has its scale with: itself, its key
# or value, or 32 elements of one.
CACHE_TYPES = {"float32": 0, "float64": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 254, "int4": 1 / 8}


class Decoder:
    """Layers of attention and a two-layer network, each with a norm before and a residual connection around it."""

    def __init__(self, layers, dtype="float32"):
        rng = np.random.default_rng(0)

        def weights(n_in, n_out):
            return (rng.standard_normal((n_in, n_out)) / np.sqrt(n_in)).astype(dtype).T

        def layer():
            q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
            parts = np.split(weights(DIM, q + 2 * kv), [q, q + kv])
            heads = dict(num_heads=HEADS, num_kv_heads=KV_HEADS)
            attention = qkv_fast.MultiHeadAttention(*parts, weights(q, DIM), **heads)
            return attention, qkv_fast.Linear(weights(DIM, 4 * DIM)), qkv_fast.Linear(weights(4 * DIM, DIM))

        self.layers = [layer() for _ in range(layers)]

    def caches(self, batch, capacity, cache_type):
        return [qkv_fast.KVCache(batch, KV_HEADS, HEAD_DIM, capacity, dtype=cache_type) for _ in self.layers]

    def __call__(self, x, caches=None):
        """x (batch, tokens, DIM) to the same: of the next tokens, if the caches have those before, else of all."""
        for i, (attention, up, down) in enumerate(self.layers):
            known = dict(causal=True) if caches is None else dict(cache=caches[i])
            x = x + attention(norm(x), **known)
            x = x + down(np.maximum(up(norm(x)), 0))
        return x


def norm(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def compare(cache_type, tokens, layers):
    """The largest difference between the two ways, in units of the result; seconds; bytes per token."""
    dtype = "float64" if cache_type == "float64" else "float32"
    decoder = Decoder(layers, dtype)
    x = np.random.default_rng(1).standard_normal((1, tokens, DIM)).astype(dtype)
    caches = decoder.caches(1, tokens, cache_type)
    start = time.perf_counter()
    steps = [decoder(x[:, t : t + 1], caches) for t in range(tokens)]
    seconds = time.perf_counter() - start
    at_once = decoder(x)
    error = np.abs(np.concatenate(steps, axis=1) - at_once).max() / np.abs(at_once).max()
    return error, seconds, sum(cache.nbytes for cache in caches) / tokens


def tolerance(cache_type, layers):
    """Attention sums over the keys of one query in another order than over those of many: some eps. To that each layer
    adds the rounding of its keys and values, independently, so that the squares add up."""
    eps = np.finfo("float64" if cache_type == "float64" else "float32").eps
    return 100 * eps + layers**0.5 * CACHE_TYPES[cache_type]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    if min(options.tokens, options.layers) < 1:
        parser.error("--tokens and --layers must be at least 1")
    heads = f"{HEADS} query heads on {KV_HEADS} key heads of {HEAD_DIM}"
    print(f"{options.tokens} tokens, {options.layers} layers, {heads}")
    failed = False
    for cache_type in CACHE_TYPES:
        try:
            error, seconds, size = compare(cache_type, options.tokens, options.layers)
        except ImportError as missing:
            print(f"{cache_type:>8}: {missing}")
            continue
        most = tolerance(cache_type, options.layers)
        failed |= not error <= most
        speed = f"{options.tokens / seconds:7.0f} tokens/s {size:7.0f} bytes/token"
        print(f"{cache_type:>8}: {speed}   largest difference from one call: {error:.1e} (at most {most:.1e})")
    if failed:
        sys.exit("a difference is larger than rounding explains")


if __name__ == "__main__":
    main()
