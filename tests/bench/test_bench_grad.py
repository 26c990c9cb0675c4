"""What the benchmark knows of training. Nothing here depends on speed."""

import numpy as np
import pytest

import qkv_fast
from qkv_fast.bench import answers, cases, cli, peers, properties, work
from qkv_fast.bench.cases import case
from qkv_fast.bench.method import Refused
from qkv_fast.bench.ours import Ours

SMALL = [
    case("2x3x200", 8, causal=causal, dtype=dtype, operation="training")
    for causal in (False, True)
    for dtype in ("float32", "float64", "bfloat16")
]


@pytest.mark.parametrize("shape", SMALL, ids=lambda x: x.name)
def test_steps_are_right(shape, monkeypatch):
    """Ours and torch's against the definition; a wrong gradient of values is seen."""
    exact = answers.Exact.of(shape)
    ((_, _, fetch),) = Ours(2).prepare(shape)
    assert exact.error(fetch()) <= exact.allowed
    right = qkv_fast.attention_grad

    def wrong(*arrays, **options):
        dq, dk, dv = right(*arrays, **options)
        return dq, dk, dv * np.asarray(1.5, dv.dtype)

    monkeypatch.setattr(qkv_fast, "attention_grad", wrong)
    with pytest.raises(Refused, match="wrong answer"):
        exact.error(fetch())
    pytest.importorskip("torch")
    ((_, _, fetch),) = peers.Torch(1).prepare(shape)
    assert exact.error(fetch()) <= exact.allowed


def test_work():
    """3.5 times that of attention; four arrays in and three out, of one size here."""
    shape = SMALL[0]
    assert work.flops(shape) == 3.5 * 4 * 2 * 3 * 200 * 200 * 8
    assert work.bytes_of(shape) == 8 * 2 * 3 * 200 * 8 * 4


def test_memory_is_that_beyond_eight_arrays(monkeypatch):
    monkeypatch.setattr(properties, "first_call_memory", lambda *_: 8 * 8 * 16384 * 64 * 4 + 6 * 2**20)
    one, two = properties.measure_training_memory(1.0, (1, 2))
    assert (one.value, two.value) == (6.0, 3.0) and one.verdict == "below" and two.verdict == "ok"
    monkeypatch.setattr(properties, "first_call_memory", lambda *_: None)
    assert list(properties.measure_training_memory(1.0, (1,))) == []


def test_grad_is_a_suite(capsys):
    assert cli.main(["bench", "--list", "--suite", "grad"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*(x.name for x in cases.CASES if x.operation == "training"), "training-memory"]
    assert len(listed) == 9
