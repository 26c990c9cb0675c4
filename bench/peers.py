"""Peers: one small adapter each, found at run time and never required.

An adapter is a class with `name`, `title`, `requires` (the modules that it imports), an `__init__(threads)` that
imports the library and sets its thread count, `version`, and `prepare(case)`, which returns a list of (label, calls,
fetch): `calls` are what is timed, in turn, one for each of `sets(case)`: inputs already in the layout that the library
likes best, output buffers reused where it can. `fetch()` makes the first call and gives its answer as (batch, heads,
length, dim). Several entries are several ways of the same library: the fastest that gives the right answer is used.
`operations` names what a case may ask for, only "attention" if it is not there; what else an adapter cannot do it
refuses: `raise Refused(reason)`. It lives in a process of its own (worker.py), so it may set whatever it likes there;
`environment(threads)` is set before that process starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import numpy as np

from . import work
from .cases import ASKED, Case
from .layers import LAYERS
from .method import Refused
from .problem import HALVES, element

Way = tuple[str, list[Callable[[], object]], Callable[[], np.ndarray]]


def sets(case: Case) -> list[tuple[np.ndarray, ...]]:
    """Contiguous (batch, heads, length, dim) inputs, whatever the case's layout, as often as the case wants them."""
    found = list(work.sets(case))
    if case.layout == "blhd":
        return [tuple(np.ascontiguousarray(a.swapaxes(1, 2)) for a in arrays) for arrays in found]
    return found


def refuse(
    case: Case,
    *,
    float64: bool = False,
    halves: tuple[str, ...] = (),
    groups: bool = False,
    top_left: bool = False,
) -> None:
    """Refuse what frameworks in general lack; the keywords say what this one has."""
    if case.window is not None:
        raise Refused("no sliding window")
    if case.kv_lengths is not None:
        raise Refused("no lengths per sequence")
    if case.dtype == "float64" and not float64:
        raise Refused("no float64")
    if case.dtype in HALVES and case.dtype not in halves:
        raise Refused(f"no {case.dtype}")
    if case.kv_type != case.dtype:
        raise Refused("no keys of another type")
    if case.kv_heads != case.heads and not groups:
        raise Refused("no grouped heads")
    if case.causal and case.q_len != case.kv_len and top_left:
        raise Refused("causal only from the top left")


class NumPy:
    """Attention as one writes it: the whole score matrix, softmax in place."""

    name, title = "numpy", "NumPy"
    requires = ("numpy",)
    settle = 0.12  # OpenBLAS threads spin for 2^26 clock ticks after a product: up to 0.1 s
    operations = ("attention", "scores", "weighted_values", "softmax", *LAYERS)

    def __init__(self, threads: int) -> None:
        self.version = np.__version__
        try:
            import threadpoolctl
        except ImportError:  # what the environment asked of the BLAS
            self.threads = threads
        else:
            self.threads = max((pool["num_threads"] for pool in threadpoolctl.threadpool_info()), default=threads)

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
        return dict.fromkeys(names, str(threads))

    def prepare(self, case: Case) -> list[Way]:
        if case.operation != "attention":
            return self.prepare_stage(case)
        if {case.dtype, case.kv_type} & {*HALVES}:
            raise Refused("no products of 16-bit types")
        group = case.heads // case.kv_heads
        grouped = (case.batch, case.kv_heads, group, case.q_len, case.dim)
        shape = (case.batch, case.heads, case.q_len, case.value_dim)

        def on(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Callable[[], np.ndarray]:
            q, k_t, v = q.reshape(grouped), k.swapaxes(-1, -2)[:, :, None], v[:, :, None]
            return lambda: self.attend(case, q, k_t, v).reshape(shape)

        calls = [on(*arrays) for arrays in sets(case)]
        return [("", calls, calls[0])]

    def prepare_stage(self, case: Case) -> list[Way]:
        refuse(case, float64=True)
        out, scale = np.zeros(work.operation(case).output(case), case.dtype), np.dtype(case.dtype).type(case.dim**-0.5)

        def on(a: np.ndarray, b: np.ndarray | None = None) -> Callable[[], np.ndarray]:
            if case.operation in LAYERS:
                return LAYERS[case.operation].plain(case, (a,) if b is None else (a, b), out)
            if case.operation == "scores":
                scaled, b = a * scale, b.swapaxes(-1, -2)  # not timed: what is compared is the product
                return lambda: np.matmul(scaled, b, out=out)
            if case.operation == "weighted_values":
                return lambda: np.matmul(a, b, out=out)
            return lambda: softmax_into(out, a)

        calls = [on(*arrays) for arrays in sets(case)]
        return [("", calls, lambda: work.operation(case).head_first(case, calls[0]()))]

    def attend(self, case: Case, q: np.ndarray, k_t: np.ndarray, v: np.ndarray) -> np.ndarray:
        hidden = None
        if case.causal or case.window or case.kv_lengths:
            low, high = case.limits()
            keys = np.arange(case.kv_len)
            hidden = (keys < low[..., None]) | (keys >= high[..., None])
        return softmax_values(q, k_t, v, case.dim**-0.5, None if hidden is None else hidden[:, None, None])


class ChunkedNumPy(NumPy):
    """The same, 128 queries at a time and only over the keys that they see: as a careful user writes it."""

    name, title = "numpy-chunked", "NumPy in chunks"
    operations = ("attention",)

    def attend(self, case: Case, q: np.ndarray, k_t: np.ndarray, v: np.ndarray) -> np.ndarray:
        out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        low, high = case.limits()
        for start in range(0, case.q_len, 128):
            rows = slice(start, start + 128)
            first, last = int(low[:, rows].min()), int(high[:, rows].max())
            keys = np.arange(first, last)
            hidden = (keys < low[:, rows, None]) | (keys >= high[:, rows, None])
            hidden = hidden[:, None, None] if hidden.any() else None
            chunk = q[..., rows, :], k_t[..., first:last], v[..., first:last, :]
            out[..., rows, :] = softmax_values(*chunk, case.dim**-0.5, hidden)
        return out


def softmax_values(
    q: np.ndarray, k_t: np.ndarray, v: np.ndarray, scale: float, hidden: np.ndarray | None
) -> np.ndarray:
    """softmax(scale * q k_t) v; `hidden` is True where a key is not attended to."""
    s = np.matmul(q, k_t)
    s *= s.dtype.type(scale)
    if hidden is not None:
        np.copyto(s, -np.inf, where=hidden)
    return np.matmul(softmax_into(s, s), v)


def softmax_into(out: np.ndarray, s: np.ndarray) -> np.ndarray:
    np.subtract(s, s.max(axis=-1, keepdims=True), out=out)
    np.exp(out, out=out)
    out /= out.sum(axis=-1, keepdims=True)
    return out


class Torch:
    name, title = "torch", "PyTorch"
    requires = ("torch",)
    operations = ("attention", "softmax", "training", *LAYERS, *ASKED)

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.threads, self.version = torch, torch.get_num_threads(), torch.__version__

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}

    def prepare(self, case: Case) -> list[Way]:
        refuse(case, float64=True, halves=HALVES, groups=True, top_left=True)
        if case.operation == "softmax":
            (x,) = map(self.torch.from_numpy, work.inputs(case))
            out = self.torch.zeros_like(x)
            calls = [lambda: self.torch.softmax(x, -1, out=out)]
            return [("softmax", calls, lambda: calls[0]().numpy())]
        if case.operation in ASKED:
            return self.prepare_question(case)
        attend = self.torch.nn.functional.scaled_dot_product_attention
        options = {"is_causal": case.causal, "enable_gqa": case.heads != case.kv_heads}

        def on(q, k, v):
            return lambda: attend(q, k, v, **options)

        def training(*inputs):
            *inputs, dout = inputs
            inputs = [x.requires_grad_() for x in inputs]

            def step():
                with self.torch.enable_grad():
                    return self.torch.autograd.grad(attend(*inputs, **options), inputs, dout)

            return step

        def tensor(x):
            if case.dtype == "bfloat16":  # which torch takes from NumPy as bits alone
                return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
            return self.torch.from_numpy(x)

        def array(x):
            if case.dtype == "bfloat16":
                return x.view(self.torch.int16).numpy().view(element("bfloat16"))
            return x.numpy()

        def linear(x, w):
            return lambda: self.torch.nn.functional.linear(x, w)

        def rotating(x):
            tables = map(self.torch.from_numpy, LAYERS[case.operation].tables(case))
            cos, sin = (self.torch.cat([table, table], -1) for table in tables)
            half = case.dim // 2
            return lambda: x * cos + self.torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        def fetch():
            answer = calls[0]()
            found = tuple(map(array, answer)) if case.operation == "training" else array(answer)
            return found if case.operation == "attention" else work.operation(case).head_first(case, found)

        begin, title = on, "SDPA"
        if case.operation == "training":
            begin = training
        elif case.operation in LAYERS:
            begin, title = (rotating, "rope") if case.operation.startswith("rope") else (linear, "linear")
        calls = [begin(*map(tensor, arrays)) for arrays in sets(case)]
        return [(title, calls, fetch)]

    def prepare_question(self, case: Case) -> list[Way]:
        """As people ask today: the whole matrix, then what they want of it. What is saved of attention is no help."""
        torch, operation, scale = self.torch, work.operation(case), case.dim**-0.5
        q, k, _ = map(torch.from_numpy, work.inputs(case))

        def scores():
            return torch.matmul(q, k.mT).mul_(scale)

        def weights():
            return torch.softmax(scores(), -1)

        def entropy():
            p = weights()
            return -(p * p.log()).sum(-1)

        def blocks():
            p, (down, across) = weights(), operation.result(case)[2:]
            return p.unflatten(-1, (across, -1)).unflatten(-3, (down, -1)).mean((-1, -3))

        def pool():
            return torch.nn.functional.adaptive_avg_pool2d(weights(), operation.result(case)[2:])

        ways = {
            "received": {"sum": lambda: weights().sum(-2)},
            "pooled": {"mean of blocks": blocks, "adaptive_avg_pool2d": pool},
            "top_keys": {"topk": lambda: weights().topk(operation.result(case)[-1])[::-1]},
            "entropy": {"entr": lambda: torch.special.entr(weights()).sum(-1), "p log p": entropy},
            "largest": {"amax": lambda: scores().amax(-1)},
        }[operation.function]

        def fetch(call):
            answer = call()
            arrays = tuple(map(np.asarray, answer)) if isinstance(answer, tuple) else answer.numpy()
            return operation.head_first(case, arrays)

        return [(label, [call], partial(fetch, call)) for label, call in ways.items()]


class OnnxRuntime:
    """The operators that ONNX Runtime has for attention, each with inputs and outputs bound beforehand."""

    name, title = "ort", "ONNX Runtime"
    requires = ("onnxruntime", "onnx")
    settle = 0.06  # its threads spin for 40 ms after a call

    def __init__(self, threads: int) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.ort = onnx, onnxruntime
        self.threads, self.version = threads, onnxruntime.__version__

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        return {}

    def prepare(self, case: Case) -> list[Way]:
        refuse(case, groups=True)
        if case.causal and case.q_len != case.kv_len:
            raise Refused("causal only for as many queries as keys")
        found = sets(case)
        ways = []
        if case.kv_heads == case.heads:
            attributes = {"num_heads": case.heads, "unidirectional": int(case.causal)}
            inputs = [self.flat(case, arrays) for arrays in found]
            ways.append(self.way(case, "MultiHeadAttention", "com.microsoft", inputs, attributes))
        decode = case.q_len == 1 < case.kv_len
        if (case.causal or decode) and case.dim == case.value_dim:
            attributes = {"num_heads": case.heads, "kv_num_heads": case.kv_heads}
            inputs = [self.cached(case, arrays, decode) for arrays in found]
            ways.append(self.way(case, "GroupQueryAttention", "com.microsoft", inputs, attributes))
        attributes = {"is_causal": int(case.causal)}
        inputs = [dict(zip("QKV", arrays, strict=True)) for arrays in found]
        ways.append(self.way(case, "Attention", "", inputs, attributes))
        return ways

    @staticmethod
    def flat(case: Case, arrays: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Inputs as (batch, length, heads * dim)."""
        rows = [np.ascontiguousarray(a.swapaxes(1, 2)).reshape(case.batch, a.shape[2], -1) for a in arrays]
        return dict(zip(("query", "key", "value"), rows, strict=True))

    @classmethod
    def cached(cls, case: Case, arrays: tuple[np.ndarray, ...], decode: bool) -> dict[str, np.ndarray | None]:
        """Inputs of GroupQueryAttention; a decode call puts the last key into the cache and attends to all."""
        q, k, v = arrays
        new = (q, k[:, :, -1:], v[:, :, -1:]) if decode else arrays
        return cls.flat(case, new) | {
            "past_key": k if decode else None,
            "past_value": v if decode else None,
            "seqlens_k": np.full(case.batch, case.kv_len - 1, np.int32),
            "total_sequence_length": np.array(case.kv_len, np.int32),
        }

    def way(self, case: Case, op: str, domain: str, inputs: list[dict], attributes: dict) -> Way:
        """An operator as a model of one node; its inputs, and the outputs, bound once per set."""
        outputs = {"out": (case.batch, case.q_len, case.heads * case.value_dim)}
        if op == "Attention":
            outputs = {"out": (case.batch, case.heads, case.q_len, case.value_dim)}
        if op == "GroupQueryAttention":  # the cache that it returns has to be named
            for name, dim in (("present_key", case.dim), ("present_value", case.value_dim)):
                outputs[name] = (case.batch, case.kv_heads, case.kv_len, dim)
        model = self.model(op, domain, inputs[0], outputs, attributes)
        session, bindings = None, []

        def bind(given: dict):
            values = {n: self.ort.OrtValue.ortvalue_from_numpy(a) for n, a in given.items() if a is not None}
            bound = session.io_binding()
            for name, value in values.items():
                bound.bind_ortvalue_input(name, value)
            for name, shape in outputs.items():
                value = values.get(name.replace("present", "past"))  # a cache is extended where it lies
                if value is None:
                    value = self.ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
                bound.bind_ortvalue_output(name, value)
            return bound

        # Building is delayed: an operator that this version lacks must not take the others with it.
        def start() -> None:
            nonlocal session
            options = self.ort.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
            options.log_severity_level = 3
            session = self.ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            bindings.extend(map(bind, inputs))

        def on(index: int) -> Callable[[], None]:
            def call() -> None:
                if session is None:
                    start()
                session.run_with_iobinding(bindings[index])

            return call

        calls = [on(index) for index in range(len(inputs))]

        def fetch() -> np.ndarray:
            calls[0]()
            result = bindings[0].get_outputs()[0].numpy()
            if op == "Attention":
                return result
            return result.reshape(case.batch, case.q_len, case.heads, case.value_dim).swapaxes(1, 2)

        return op, calls, fetch

    def model(self, op: str, domain: str, inputs: dict, outputs: dict, attributes: dict) -> bytes:
        onnx, helper = self.onnx, self.onnx.helper
        elements = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int32): onnx.TensorProto.INT32}
        names = [name if a is not None else "" for name, a in inputs.items()]
        given = {name: a for name, a in inputs.items() if a is not None}
        graph = helper.make_graph(
            [helper.make_node(op, names, list(outputs), domain=domain, **attributes)],
            "attention",
            [helper.make_tensor_value_info(n, elements[a.dtype], a.shape) for n, a in given.items()],
            [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in outputs.items()],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


class OpenVINO:
    name, title = "openvino", "OpenVINO"
    requires = ("openvino",)

    def __init__(self, threads: int) -> None:
        import openvino

        self.openvino, self.threads, self.version = openvino, threads, openvino.__version__.split("-")[0]
        self.core = openvino.Core()

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        return {"OPENVINO_TELEMETRY": "0"}

    def prepare(self, case: Case) -> list[Way]:
        from openvino import opset13

        refuse(case, halves=("bfloat16",), top_left=True)
        # It computes in bfloat16 what it is given in float32: that is how its users ask for it.
        found = [tuple(a.astype(np.float32, copy=False) for a in arrays) for arrays in sets(case)]
        q, k, v = (opset13.parameter(a.shape, np.float32) for a in found[0])
        node = opset13.scaled_dot_product_attention(q, k, v, causal=case.causal)
        model = self.openvino.Model([node], [q, k, v])
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if case.dtype == "bfloat16" else "f32",
        }
        compiled = self.core.compile_model(model, "CPU", settings)
        self.threads = compiled.get_property("INFERENCE_NUM_THREADS")
        requests = [compiled.create_infer_request() for _ in found]
        for request, arrays in zip(requests, found, strict=True):
            for index, array in enumerate(arrays):
                request.set_input_tensor(index, self.openvino.Tensor(array, shared_memory=True))

        def on(request, arrays):
            def call():
                request.infer(share_outputs=True)
                return arrays  # which the request reads in place, so they have to live as long as this function

            return call

        calls = [on(*pair) for pair in zip(requests, found, strict=True)]

        def fetch() -> np.ndarray:
            calls[0]()
            return np.array(requests[0].get_output_tensor(0).data).astype(element(case.dtype), copy=False)

        return [("SDPA", calls, fetch)]


class Jax:
    name, title = "jax", "JAX"
    requires = ("jax",)

    def __init__(self, threads: int) -> None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        self.jax, self.threads, self.version = jax, threads, jax.__version__

    @staticmethod
    def environment(threads: int) -> dict[str, str]:
        # The size of its pool follows NPROC, read once when the CPU client starts.
        return {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}

    def prepare(self, case: Case) -> list[Way]:
        refuse(case, float64=True, groups=True, top_left=True)
        found = [[self.jax.device_put(a.swapaxes(1, 2)) for a in arrays] for arrays in sets(case)]
        attend = self.jax.jit(lambda q, k, v: self.jax.nn.dot_product_attention(q, k, v, is_causal=case.causal))
        # Compiled here and not in the first call, whose memory may be what is measured.
        attend = attend.lower(*found[0]).compile()

        def on(arrays):
            return lambda: attend(*arrays).block_until_ready()

        calls = [on(arrays) for arrays in found]
        return [("dot_product_attention", calls, lambda: np.asarray(calls[0]()).swapaxes(1, 2))]


PEERS: dict[str, type] = {p.name: p for p in (Torch, OnnxRuntime, OpenVINO, Jax, NumPy, ChunkedNumPy)}


def choose(names: list[str] | None) -> list[str]:
    """Names of peers in the order of `PEERS`; "none" is none; ValueError lists what there is.

    By default those that are installed; one that is asked for by name and is not gets a column that says so.
    """
    if names is None:
        return [name for name, peer in PEERS.items() if all(map(importlib.util.find_spec, peer.requires))]
    for name in names:
        if name not in PEERS and name != "none":
            raise ValueError(f"unknown peer {name!r}; the peers are: {', '.join(PEERS)}, none")
    return [name for name in PEERS if name in names]
