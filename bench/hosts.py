"""Hosts that call ours: models of transformers by our attention and by their own, what an adapter takes beside the
call that it makes, two workers of Dask against one.

Each host runs in a process of its own, which `measure_...` starts; the function of the same name without `measure_`
runs there. A host that is not installed is a row that says so.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import qkv_fast

from . import memory
from .measured import Measured
from .method import FEWEST_ROUNDS, LONG_SECONDS, Local, Refused, Summary, interleave
from .problem import element
from .runner import threads_text
from .surroundings import Samples, apart, ratio_of, rounds
from .tables import seconds_text

THEIRS, OURS = "sdpa", "qkv_fast"
# Of one layer of each model (all are alike, and torch's products of bfloat16 take seconds where the CPU has none), as
# times as fast as by sdpa: the whole of it, where "never slower" has 3 % for noise, and attention alone, where None is
# only shown.
MODELS: dict[str, dict[str, tuple[float, float | None]]] = {
    "BERT-base, 8x512": {"float32": (0.97, 1.3), "bfloat16": (0.97, None)},
    "Llama-like, prefill of 2048": {"float32": (0.97, 1.3), "bfloat16": (0.97, None)},
    "Llama-like, 64 tokens behind 4096": {"float32": (0.97, 1.3), "bfloat16": (0.97, 2.0)},
}
NEAR = {"float32": 1e-3, "bfloat16": 0.1}  # what a model gives by one and by the other, of numbers around 1
LLAMA = dict(
    vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=1, num_attention_heads=16,
    num_key_value_heads=4, max_position_embeddings=8192,
)  # fmt: skip
TOKENS, BEHIND = 64, 4096  # of a decode
BERT: dict[str, int] = {}  # what is not said is BERT-base's
ADAPTER = 15.0  # µs that an adapter may take beside the call that it makes
SHAPE, CHUNKS = (8, 16384, 64), (1, 4096, 64)  # of q, k and v for Dask


def need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f"not installed: {', '.join(missing)}")


class Inside:
    """Registers our attention and theirs with a clock around them, and says what a turn of a model spent in them."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        import qkv_fast.integrations.transformers  # noqa: F401

        self.seconds = 0.0
        for name in (THEIRS, OURS):
            AttentionInterface.register(f"timed_{name}", partial(self.call, AttentionInterface()[name]))
            AttentionMaskInterface.register(f"timed_{name}", AttentionMaskInterface()[name])

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **options)
        self.seconds += time.perf_counter() - start
        return result


def build(name: str) -> tuple[Any, Callable[[], Any]]:
    """A model with random weights, and a call of it that gives its last states."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name.startswith("BERT"):
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, **BERT)).eval()
        tokens = torch.randint(3, 900, (8, 512))
        return model, lambda: model(tokens).last_hidden_state
    config = transformers.LlamaConfig(**LLAMA)
    model = transformers.LlamaModel(config).eval()
    tokens = torch.randint(3, 900, (1, 2048))
    if "prefill" in name:
        return model, lambda: model(tokens, use_cache=False).last_hidden_state
    held = torch.randn(config.num_hidden_layers, 2, 1, config.num_key_value_heads, BEHIND, config.head_dim)

    def decode() -> Any:
        cache = transformers.DynamicCache(config=config)
        for layer, (k, v) in enumerate(held.to(model.dtype)):
            cache.update(k, v, layer)
        return torch.cat([model(tokens[:, i : i + 1], past_key_values=cache).last_hidden_state for i in range(TOKENS)])

    return model, decode


def models(name: str, dtype: str, threads: int, seconds: float) -> Samples:
    """Times of whole calls by each, and of what attention takes of them."""
    import torch

    torch.set_num_threads(threads)
    qkv_fast.set_num_threads(threads)
    inside = Inside()
    model, call = build(name)
    model.to(getattr(torch, dtype))
    found: Samples = {f"{THEIRS} inside": [], f"{OURS} inside": []}
    results = {}

    def turn(whose: str) -> float:
        model.set_attn_implementation(f"timed_{whose}")
        for _ in range(2):  # the first is not counted, as in method.timed
            inside.seconds, start = 0.0, time.perf_counter()
            with torch.no_grad():
                results[whose] = call()
            taken = time.perf_counter() - start
            if taken > LONG_SECONDS:
                break
        found[f"{whose} inside"].append(inside.seconds)
        return taken

    found |= rounds({whose: partial(turn, whose) for whose in (THEIRS, OURS)}, seconds, FEWEST_ROUNDS)
    off = (results[THEIRS].float() - results[OURS].float()).abs().max().item()
    if not off <= NEAR[dtype]:
        raise Refused(f"{name}, {dtype}: ours is off by {off:.1e}")
    return found


def measure_models(name: str, seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """A whole model, and attention in it, by ours against sdpa."""
    need("torch", "transformers")
    for n in threads:
        for dtype, (whole, alone) in MODELS[name].items():
            found = apart(models, name, dtype, n, seconds / (2 * len(threads)), environment={})
            for what, end, bound in (("", "", whole), (", attention alone", " inside", alone)):
                times = ratio_of(found, THEIRS + end, OURS + end)
                note = "; ".join(f"{seconds_text(statistics.median(found[w + end]))} {w}" for w in (OURS, THEIRS))
                title = f"{name}, {dtype}{what}, {threads_text(n)}: speed over sdpa"
                yield Measured(title, times.median, "x", bound, more=True, spread=times.spread, note=note)


def adapters(dtype: str, seconds: float) -> Samples:
    """Calls with so few keys that they are hardly more than their cost, by adapters and by `attention` itself."""
    import torch

    from qkv_fast.integrations.torch import scaled_dot_product_attention
    from qkv_fast.integrations.transformers import attention_forward

    qkv_fast.set_num_threads(1)
    layer = torch.nn.Module()
    layer.is_causal = True
    arrays = np.random.default_rng(0).standard_normal((3, 1, 4, 1, 16)).astype(element(dtype))
    tensors = torch.from_numpy(arrays.astype("float32")).to(getattr(torch, dtype)).unbind()
    calls = {
        "attention": partial(qkv_fast.attention, *arrays),
        "transformers": partial(attention_forward, layer, *tensors, None),
        "torch": partial(scaled_dot_product_attention, *tensors),
    }
    with torch.no_grad():
        return interleave([Local(name, call) for name, call in calls.items()], budget=seconds).seconds


def measure_adapters(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """What the adapters take beside `attention`, of one thread."""
    need("torch", "transformers")
    for dtype in ("float32", "bfloat16"):
        found = apart(adapters, dtype, seconds / 2, environment={})
        for name in ("transformers", "torch"):
            over = Summary.of([1e6 * (a - b) for a, b in zip(found[name], found["attention"], strict=True)])
            title = f"adapter of {name} beyond attention, {dtype}"
            yield Measured(title, over.median, "µs", ADAPTER, spread=over.spread)


def workers(seconds: float) -> Samples:
    """Attention from store to store by clusters of one and of two workers of one thread, and the bytes by which a
    worker grew at most."""
    import dask.array as da
    import zarr
    from distributed import Client, LocalCluster

    from qkv_fast.integrations.dask import attention, explain

    rng, length = np.random.default_rng(0), CHUNKS[1]
    options = dict(threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=":0")
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=1, **options) as one,
        LocalCluster(n_workers=2, **options) as two,
        Client(one, set_as_default=False) as of_one,
        Client(two, set_as_default=False) as of_two,
    ):

        def store(name: str) -> Any:
            return zarr.create_array(
                os.path.join(folder, name), shape=SHAPE, chunks=CHUNKS, dtype="float32", compressors=None
            )

        stored = [store(name) for name in "qkv"]
        for x in stored:
            x[:] = rng.standard_normal(SHAPE, dtype="float32")
        q, k, v = map(da.from_zarr, stored)
        out, target = attention(q, k, v), store("out")
        block_bytes = explain(q, k, v).block_bytes

        def turn(client: Client) -> float:
            start = time.perf_counter()
            client.compute(da.store(out, target, lock=False, compute=False)).result()
            return time.perf_counter() - start

        for client in (of_one, of_two):  # workers import what they need, before their memory is looked at
            for address in client.scheduler_info()["workers"]:
                small = attention(q[:1, :64], k[:1, :length], v[:1, :length])
                client.compute(small, workers=[address]).result()
        idle = of_two.run(memory.forget)
        found = rounds({"1": partial(turn, of_one), "2": partial(turn, of_two)}, seconds, FEWEST_ROUNDS)
        most = of_two.run(memory.highest)
        grown = [most[at] - idle[at] for at in idle if most[at] is not None and idle[at] is not None]
        return found | {"grown": grown, "block": [float(block_bytes)]}


def measure_workers(seconds: float, threads: tuple[int, ...]) -> Iterator[Measured]:
    """Two workers against one, and what a worker grows by beyond what it has idle."""
    need("dask", "distributed", "zarr")
    found = apart(workers, seconds, environment={})
    times = ratio_of(found, "1", "2")
    note = "; ".join(f"{seconds_text(statistics.median(found[n]))} by {n}" for n in "12")
    shape = "x".join(map(str, (SHAPE[0], SHAPE[1], SHAPE[1])))
    title = f"dask {shape}, D {SHAPE[2]}, in chunks of {CHUNKS[1]}"
    yield Measured(
        f"{title}: 2 workers, speed over 1", times.median, "x", 1.7, more=True, spread=times.spread, note=note
    )
    for grown in sorted(found["grown"])[-1:]:
        bound = (3 * found["block"][0] + 64e6) / 2**20
        yield Measured(f"{title}: growth of a worker", grown / 2**20, "MB", bound)
