"""ONNX's FlexAttention on ours: ONNX's own tests, and which of its score_mods are one fused call."""

import warnings

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the extra [test] installs it")

from onnx import parser
from onnx.backend.test.case import node as onnx_nodes
from onnx.reference import ReferenceEvaluator

from qkv_fast.integrations import onnx as adapter

RNG = np.random.default_rng(0)
FEEDS = {
    name: RNG.standard_normal(shape, dtype="float32")
    for name, shape in (("Q", (2, 4, 5, 8)), ("K", (2, 2, 7, 8)), ("V", (2, 2, 7, 6)))
}


def collect():
    """The cases of this operator, without their twins made of other operators (`_expanded`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import onnx.backend.test.case.node.flexattention  # noqa: F401
    return [case for case in onnx_nodes._NodeTestCases if case.model.graph.node[0].op_type == "FlexAttention"]


CASES = {case.name: case for case in collect()}
FUSED = {name for name in CASES if "prob_mod" not in name}


@pytest.fixture
def calls(monkeypatch):
    """What our attention is called with."""
    made, attention = [], adapter.attention
    monkeypatch.setattr(adapter, "attention", lambda *x, **options: made.append(options) or attention(*x, **options))
    return made


@pytest.mark.parametrize("name", CASES)
def test_onnx_own_tests(name, calls):
    case = CASES[name]
    for inputs, outputs in case.data_sets:
        feeds = dict(zip((x.name for x in case.model.graph.input), inputs, strict=True))
        (found,) = adapter.Evaluator(case.model).run(None, feeds)
        assert found.dtype == outputs[0].dtype
        wide = found.astype("float64"), outputs[0].astype("float64")
        np.testing.assert_allclose(*wide, rtol=max(case.rtol, 1e-3), atol=max(case.atol, 1e-5))
    assert bool(calls) == (name in FUSED)


def of(body, constants=""):
    """A model of one node with this score_mod."""
    text = f"""<ir_version: 11, opset_import: ["": 24, "ai.onnx.preview": 1]>
    one (float[B, H, L, D] Q, float[B, G, S, D] K, float[B, G, S, E] V) => (float[B, H, L, E] Y) {{
        Y = ai.onnx.preview.FlexAttention<score_mod = graph (float[B, H, L, S] s) => (float[B, H, L, S] t)
        {{ {body} }}>(Q, K, V) }}"""
    return parser.parse_model(text)


def number(x):
    return f"Constant<value_float = {x}>()"


BODIES = {
    "same": ("t = Identity(s)", True),
    "a factor": (f"a = {number(0.5)} t = Mul(a, s)", True),
    "a factor and a cap": (
        f"a = {number(0.5)} c = {number(2.0)} x = Mul(s, a) y = Div(x, c) z = Tanh(y) t = Mul(z, c)", True
    ),
    "a negative factor": (f"a = {number(-2.0)} t = Div(s, a)", True),
    "added and hidden": (
        f"""a = {number(0.5)} n = Constant<value_float = -3.0e38>() x = Sub(s, a) h = Shape<start = 3>(s)
        zero = Constant<value_int = 0>() one = Constant<value_int = 1>() two = Constant<value_int = 2>()
        e = Squeeze(h) r = Range(zero, e, one) m = Less(r, two) y = Where(m, n, x) t = Add(y, a)""",
        True,
    ),
    "a factor after what is added": (f"a = {number(0.5)} x = Add(s, a) t = Mul(x, a)", False),
    "scores twice": ("t = Mul(s, s)", False),
    "one over scores": (f"a = {number(0.5)} t = Div(a, s)", False),
    "hidden by a number": (f"a = {number(-9.0)} z = {number(0.0)} m = Less(z, a) t = Where(m, s, a)", False),
    "where scores are large": (f"a = {number(0.1)} m = Less(s, a) t = Where(m, s, a)", False),
    "a negative cap": (f"c = {number(-2.0)} x = Tanh(s) t = Mul(x, c)", False),
    "two caps": ("x = Tanh(s) t = Tanh(x)", False),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_which_are_fused(name, calls):
    """All give what ONNX's own gives; those that our arguments can say are one call of attention."""
    body, is_fused = BODIES[name]
    model = of(body)
    (found,) = adapter.Evaluator(model).run(None, FEEDS)
    (expected,) = ReferenceEvaluator(model).run(None, FEEDS)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    assert bool(calls) == is_fused


def test_what_was_given():
    with pytest.raises(ValueError, match=r"FlexAttention: Q, K and V must have 4 axes each, got Q\.shape=\(4, 5, 8\)"):
        adapter.Evaluator(of("t = Identity(s)")).run(None, {**FEEDS, "Q": FEEDS["Q"][0]})
