"""What the benchmark knows of scores, softmax and weighted values on their own. Nothing here depends on speed."""

from dataclasses import replace

import numpy as np
import pytest

from qkv_fast.bench import cli, peers, properties, work
from qkv_fast.bench.cases import case

STAGES = [case("2x4x9", 8, kv_heads=2, kv_len=11, operation=name) for name in ("scores", "weighted_values", "softmax")]


@pytest.mark.parametrize("stage", STAGES, ids=lambda c: c.operation)
def test_bytes_of_a_stage_are_its_arrays_and_known_without_them(stage):
    arrays = work.inputs(stage)
    out = work.operation(stage).call(stage, arrays, 1, False)()
    assert work.bytes_of(stage) == sum(a.nbytes for a in arrays) + out.nbytes
    assert work.bytes_of(replace(stage, q_len=10**8, kv_len=10**8)) > 4 * 10**16  # more than can be addressed


def test_a_stage_s_operations_are_its_share_of_attention_s():
    scores, values, softmax = STAGES
    assert work.flops(scores) + work.flops(values) == work.flops(replace(scores, operation="attention"))
    assert work.flops(softmax) is None and work.limited_by(softmax) == "copy"
    assert work.amount(softmax) == 4 * 2 * 4 * 9 * 11


def test_properties_of_the_stages(monkeypatch, capsys):
    assert cli.main(["bench", "--list", "--suite", "stages"]) == 0
    listed = capsys.readouterr().out
    assert "softmax-axis" in listed and "explain" in listed
    monkeypatch.setattr(properties, "ACROSS", (((2, 30, 30), 1), ((40, 40), 0)))
    across = list(properties.measure_softmax_axis(1e-3, (1, 2)))
    (explain,) = properties.measure_explain(1e-3, (1, 2))
    assert [m.name for m in across] == [
        "softmax 2x30x30, axis 1 over last, 1 thread",
        "softmax 2x30x30, axis 1 over last, 2 threads",
        "softmax 40x40, axis 0 over last, 1 thread",
        "softmax 40x40, axis 0 over last, 2 threads",
    ]
    assert all(m.value > 0 for m in (*across, explain)) and explain.unit == "µs"


@pytest.mark.parametrize("name", ["2x4x9", "1x2x5"])
@pytest.mark.parametrize("operation", ["scores", "weighted_values", "softmax"])
def test_numpy_does_the_stages(operation, name):
    """The peer that is always there gives the right answer, into an array of its own."""
    small = case(name, 8, kv_len=11, operation=operation)
    ((_, calls, fetch),) = peers.NumPy(1).prepare(small)
    calls[0]()
    expected = work.operation(small).call(small, work.inputs(small), 1, True)()
    np.testing.assert_allclose(fetch(), expected, rtol=1e-5, atol=1e-6)
