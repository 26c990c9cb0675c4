"""rope: right in both conventions, of any type, strides and positions; scalings against transformers; ONNX's cases."""

import itertools
from importlib import import_module

import ml_dtypes  # registers bfloat16  # noqa: F401
import numpy as np
import pytest
from _patterns import PATTERNS, fits
from _util import ALL_TYPES, no_change, normal, same_bits, unit

import qkv_fast
from qkv_fast import _runtime, reference

dtypes = pytest.mark.parametrize("dtype", ALL_TYPES)
conventions = pytest.mark.parametrize("interleaved", [False, True])


def queries(dtype, shape=(2, 3, 11, 8)):
    return normal(np.random.default_rng(1), shape, dtype)


def check(x, positions=None, **options):
    """Two products and a sum, of cosines and sines that are rounded: 3 eps of the pair's terms."""
    with no_change(x):
        got = qkv_fast.rope(x, positions, **options)
    assert got.dtype == x.dtype.newbyteorder("=") and got.shape == x.shape
    exact = reference.rope(x, positions, **options)
    eps = np.finfo("float64" if x.dtype == "float64" else "float32").eps
    error = np.abs(got.astype(exact.dtype) - exact)
    # float64 angles of the reference and of ours are the same numbers.
    size = 2 * np.abs(exact).max(initial=0)
    assert (error <= 3 * eps * size + unit(x.dtype) * 1.01 * np.abs(exact)).all(), error.max()
    return got


@dtypes
@conventions
@pytest.mark.parametrize(
    "shape", [(5, 8), (3, 5, 8), (2, 3, 11, 8), (2, 2, 1, 7, 64), (0, 3, 4, 8), (2, 3, 0, 8), (2, 2, 3, 0)]
)
def test_shapes(dtype, interleaved, shape):
    check(queries(dtype, shape), interleaved=interleaved)


@dtypes
@conventions
@pytest.mark.parametrize("rotary_dim", [0, 2, 6, 10])
def test_a_part_is_turned(dtype, interleaved, rotary_dim):
    x = queries(dtype, (2, 3, 11, 10))
    got = check(x, interleaved=interleaved, rotary_dim=rotary_dim)
    same_bits(got[..., rotary_dim:].copy(), x[..., rotary_dim:].copy())


@dtypes
@conventions
def test_positions(dtype, interleaved):
    x = queries(dtype)
    rng = np.random.default_rng(2)
    expected = check(x, interleaved=interleaved)
    same_bits(qkv_fast.rope(x, np.arange(11, dtype="uint8"), interleaved=interleaved), expected)
    each = rng.integers(-50, 1000, (2, 11))
    got = check(x, each, interleaved=interleaved, base=500.0)
    for b in range(2):
        same_bits(qkv_fast.rope(x[b], each[b], interleaved=interleaved, base=500.0), got[b])
    same_bits(qkv_fast.rope(x, each[:1], interleaved=interleaved), qkv_fast.rope(x, each[0], interleaved=interleaved))


@pytest.mark.parametrize("start", [10**6, 2**31, 2**40])
def test_far_positions_are_exact(start):
    """By the sines of the integers for the pair of frequency 1, and by the difference of two tokens for the others."""
    x = queries("float64", (1, 4, 8))
    got = qkv_fast.rope(x, np.arange(start, start + 4))
    turned = x[0, :, 0] * np.cos(np.arange(start, start + 4.0)) - x[0, :, 4] * np.sin(np.arange(start, start + 4.0))
    np.testing.assert_allclose(got[0, :, 0], turned, rtol=1e-12)
    near = qkv_fast.rope(x)
    scores, far = near @ near.swapaxes(-1, -2), got @ got.swapaxes(-1, -2)
    np.testing.assert_allclose(far, scores, atol=8 * start * 2.0**-52 + 1e-12)  # angles are rounded, all else is exact


def test_million_in_float32():
    x = queries("float32", (1, 4, 64))
    check(x, np.arange(10**6, 10**6 + 4))


@dtypes
@conventions
@pytest.mark.parametrize("pattern", PATTERNS)
def test_strides(dtype, interleaved, pattern):
    if not fits(pattern, dtype):
        pytest.skip("a byte order that this type does not have")
    x = queries(dtype)
    expected = qkv_fast.rope(x, interleaved=interleaved)
    same_bits(qkv_fast.rope(PATTERNS[pattern](x), interleaved=interleaved), expected)
    out = PATTERNS[pattern](x)
    if out.flags.writeable:
        assert qkv_fast.rope(out, interleaved=interleaved, out=out) is out
        same_bits(np.ascontiguousarray(out).astype(expected.dtype), expected)


@conventions
def test_layout_and_out(interleaved):
    x = queries("float32")
    expected = qkv_fast.rope(x, interleaved=interleaved)
    turned = np.ascontiguousarray(x.swapaxes(1, 2))
    got = qkv_fast.rope(turned, interleaved=interleaved, layout="blhd")
    same_bits(np.ascontiguousarray(got.swapaxes(1, 2)), expected)
    room = np.zeros(x.size + 3, "float32")
    room[3:] = x.ravel()
    given, out = room[3:].reshape(x.shape), room[:-3].reshape(x.shape)  # which overlap
    assert qkv_fast.rope(given, interleaved=interleaved, out=out) is out
    same_bits(out.copy(), expected)


def test_long_inputs_are_turned_in_pieces():
    x = queries("float32", (2, 3, 3000, 64))
    got = check(x)
    same_bits(qkv_fast.rope(x[:, :, 2500:], np.arange(2500, 3000)), np.ascontiguousarray(got[:, :, 2500:]))


@conventions
def test_tables(interleaved):
    x = queries("float32")
    angles = np.arange(20)[:, None] * 10000.0 ** (-np.arange(0, 6, 2) / 6)
    tables = np.cos(angles), np.sin(angles)
    expected = qkv_fast.rope(x, rotary_dim=6, interleaved=interleaved)
    same_bits(qkv_fast.rope(x, cos_sin=tables, interleaved=interleaved), expected)
    at = np.random.default_rng(3).integers(0, 20, (2, 11))
    expected = qkv_fast.rope(x, at, rotary_dim=6, interleaved=interleaved)
    same_bits(qkv_fast.rope(x, at, cos_sin=tables, interleaved=interleaved), expected)
    same_bits(qkv_fast.rope(x, cos_sin=[table[at] for table in tables], interleaved=interleaved), expected)


def test_nan_stays_in_its_pair():
    x = queries("float32")
    expected = qkv_fast.rope(x)
    x[1, 2, 3, 1] = np.nan
    got = qkv_fast.rope(x)
    assert np.isnan(got[1, 2, 3, [1, 5]]).all()
    got[1, 2, 3, [1, 5]] = expected[1, 2, 3, [1, 5]]
    same_bits(got, expected)


SCALINGS = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0, original_max_position_embeddings=8),
    "yarn": dict(factor=4.0, original_max_position_embeddings=64),
    "yarn, mscale": dict(
        factor=40.0, original_max_position_embeddings=4096, mscale=0.7, mscale_all_dim=1.0, beta_fast=20.0
    ),
    "yarn, not truncated": dict(
        factor=32.0, original_max_position_embeddings=4096, truncate=False, attention_factor=1.2
    ),
    "longrope": dict(
        short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0], factor=4.0,
        original_max_position_embeddings=8,
    ),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
}


def pairs_turned(scaling, length, dim=8, base=10000.0):
    """Angles of the last token, and the factor, from what rope does to (1, 0)."""
    x = np.zeros((length, dim))
    x[:, : dim // 2] = 1
    got = qkv_fast.rope(x, base=base, scaling=scaling)
    z = got[:, : dim // 2] + 1j * got[:, dim // 2 :]
    return np.angle(z[1] / z[0]), np.abs(z[0, 0])


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [6, 40])
def test_scalings_are_those_of_transformers(name, length):
    pytest.importorskip("transformers", reason="the scalings are compared with transformers'")
    torch = pytest.importorskip("torch", reason="transformers' scalings need torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = dict(SCALINGS[name], rope_type=name.split(",")[0])
    original = scaling.get("original_max_position_embeddings", 64)
    longest = int(original * scaling["factor"]) if "dynamic" not in name else original
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, head_dim=8, max_position_embeddings=longest,
        rope_parameters=dict(scaling, rope_theta=10000.0),
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)
    got, ours = pairs_turned(scaling, length)
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-6)  # which are computed in float32
    assert abs(ours - factor) < 1e-6


def test_scalings_by_hand():
    """One frequency each, worked out from the formulas."""
    plain = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(pairs_turned(dict(SCALINGS["linear"], rope_type="linear"), 4)[0], plain / 4)
    dynamic = dict(SCALINGS["dynamic"], rope_type="dynamic")
    np.testing.assert_allclose(pairs_turned(dynamic, 8)[0], plain)
    base = 10000.0 * (4.0 * 16 / 8 - 3) ** (8 / 6)
    np.testing.assert_allclose(pairs_turned(dynamic, 16)[0], base ** (-np.arange(4) / 4))
    longrope = dict(SCALINGS["longrope"], rope_type="longrope")
    np.testing.assert_allclose(pairs_turned(longrope, 8)[0], plain / [1.0, 1.1, 1.2, 1.3])
    np.testing.assert_allclose(pairs_turned(longrope, 9)[0], plain / [2.0, 3.0, 4.0, 5.0])
    assert abs(pairs_turned(longrope, 9)[1] - np.sqrt(1 + np.log(4) / np.log(8))) < 1e-12
    llama3 = pairs_turned(dict(SCALINGS["llama3"], rope_type="llama3"), 4)[0]
    turns = 64 * plain / (2 * np.pi)  # 10, 1.02, 0.1, 0.01
    kept = (turns[1] - 1) / 3
    np.testing.assert_allclose(llama3, [1, plain[1] * (kept + (1 - kept) / 8), plain[2] / 8, plain[3] / 8])
    yarn, factor = pairs_turned(dict(SCALINGS["yarn"], rope_type="yarn"), 4)
    # Pair 0 turns 10 times within 64 tokens, and the pairs from 2 on less than once: they are stretched, pair 1 half.
    np.testing.assert_allclose(yarn, [1, plain[1] * (1 / 2 + 1 / 8), plain[2] / 4, plain[3] / 4])
    assert abs(factor - (0.1 * np.log(4) + 1)) < 1e-12
    parameters = dict(rope_type="linear", factor=2.0, rope_theta=100.0, partial_rotary_factor=0.5)
    same_bits(
        qkv_fast.rope(np.ones((3, 8)), scaling=parameters),
        qkv_fast.rope(np.ones((3, 8)), base=100.0, rotary_dim=4, scaling=dict(rope_type="linear", factor=2.0)),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # onnx's own casts, as it makes its cases
def test_the_cases_of_onnx():
    onnx = pytest.importorskip("onnx", reason="its cases are the standard's")
    from onnx.backend.test.case import node as nodes

    import_module("onnx.backend.test.case.node.rotaryembedding")  # adds them; collect_testcases takes 7 s
    made = [case for case in nodes._NodeTestCases if case.model.graph.node[0].op_type == "RotaryEmbedding"]
    cases = [case for case in made if "expanded" not in case.name]
    assert len(cases) >= 8
    for case in cases:
        node = case.model.graph.node[0]
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        ((inputs, (expected,)),) = case.data_sets
        x, cos, sin, at = (*inputs, None)[:4]
        flat = x.ndim == 3
        got = qkv_fast.rope(
            x.reshape(*x.shape[:2], options["num_heads"], -1) if flat else x,
            at,
            cos_sin=(cos, sin),
            interleaved=bool(options.get("interleaved", 0)),
            layout="blhd" if flat else "bhld",
        )
        np.testing.assert_allclose(got.reshape(x.shape), expected, rtol=1e-5, atol=1e-6, err_msg=case.name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_allocation_may_fail(dtype):
    """Of scratch, for the tables and for the rows."""
    x = queries(dtype, (2, 3, 3000, 8))
    expected = qkv_fast.rope(x)
    for n in itertools.count():
        _runtime.trim()
        with _runtime.fail_allocation(n) as allocations:
            try:
                got = qkv_fast.rope(x, num_threads=2)
            except MemoryError:
                got = None
            count = allocations.count
        if got is not None:
            break
        assert count == n + 1
    same_bits(got, expected)
    assert n >= 2 and count <= n


@dtypes
@conventions
def test_bits_depend_on_the_token_alone(dtype, interleaved):
    """Not on threads, on other heads and sequences, or on where rows lie: the larger result goes past the caches."""
    x = queries(dtype, (2, 7, 9000, 72))
    at = np.random.default_rng(4).integers(0, 10**6, (2, 9000))
    expected = qkv_fast.rope(x, at, interleaved=interleaved, rotary_dim=70, num_threads=1)
    options = dict(interleaved=interleaved, rotary_dim=70, num_threads=3)
    same_bits(qkv_fast.rope(x, at, **options), expected)
    same_bits(qkv_fast.rope(x[1:, 2:3, 50:99], at[1:, 50:99], **options), expected[1:, 2:3, 50:99].copy())
    out = np.empty(x.size + 5, x.dtype)[5:].reshape(2, 9000, 7, 72).swapaxes(1, 2)  # not at a line's beginning
    assert qkv_fast.rope(x, at, out=out, **options) is out
    same_bits(out.copy(), expected)


def test_tasks_are_short():
    """Ctrl-C is seen between tasks."""
    x = np.zeros((1, 16, 4096, 64), "float32")
    with _runtime.counters() as counts:
        qkv_fast.rope(x, out=x, num_threads=1)
    assert counts["tasks"] >= x.size // 2**18


def test_a_row_too_long():
    x = np.broadcast_to(np.float16(1), (1, 2**30))
    with pytest.raises(OverflowError):
        qkv_fast.rope(x, rotary_dim=2)
