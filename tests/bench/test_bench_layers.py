"""What the benchmark knows of linear layers and rotary positions. Nothing here depends on speed."""

import numpy as np
import pytest

import qkv_fast
from qkv_fast.bench import answers, cases, cli, peers, properties, surroundings, work
from qkv_fast.bench.cases import case
from qkv_fast.bench.layers import LAYERS
from qkv_fast.bench.method import Refused
from qkv_fast.bench.ours import Ours

SHAPES = [
    case("2x3x200" if name.startswith(("rope", "project")) else "1x1x200", 8, value_dim=30, dtype=dtype, operation=name)
    for name in LAYERS
    for dtype in ("float32", "float64", "bfloat16")
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: f"{x.operation}-{x.dtype}")
def test_answers_are_right(shape):
    """Ours, NumPy's and torch's against the definition; a wrong one is refused."""
    exact = answers.Exact.of(shape)
    ((_, _, fetch),) = Ours(2).prepare(shape)
    answer = fetch()
    assert exact.error(answer) <= exact.allowed
    wrong = np.array(answer)
    wrong[0, -1, -1, -1] += 3 * exact.allowed
    with pytest.raises(Refused, match="wrong answer"):
        exact.error(wrong)
    if shape.dtype != "bfloat16":
        ((_, _, fetch),) = peers.NumPy(1).prepare(shape)
        assert exact.error(fetch()) <= exact.allowed
    pytest.importorskip("torch")
    if shape.dtype == "bfloat16" and shape.operation.startswith("rope"):
        return  # it would be in float32, since its tables are
    ((_, _, fetch),) = peers.Torch(1).prepare(shape)
    assert exact.error(fetch()) <= exact.allowed


@pytest.mark.parametrize("shape", SHAPES[::3], ids=lambda x: x.operation)
def test_work(shape):
    arrays = work.inputs(shape)
    answer = work.operation(shape).call(shape, arrays, 1, False)()
    size = sum(part.nbytes for part in (answer if isinstance(answer, tuple) else (answer,)))
    assert work.bytes_of(shape) == size + sum(a.nbytes for a in arrays)
    if shape.operation.startswith("rope"):
        assert work.flops(shape) is None and work.limited_by(shape) == "copy"
    else:
        assert work.flops(shape) == 2 * arrays[0].size * arrays[1].shape[0]


def test_properties(monkeypatch):
    small = {name: case("1x1x5", 16, value_dim=8, dtype=dtype, operation="linear") for name, dtype in (
        ("linear:1x1x512-d1024", "float32"), ("linear:1x1x512-d1024-bf16", "bfloat16"))}  # fmt: skip
    monkeypatch.setattr(properties, "find", small.__getitem__)
    (halves,) = properties.measure_linear_halves(1e-3, (1,))
    assert halves.more and halves.floor == (1.6 if qkv_fast.isa().endswith("bf16") else 0.9)
    monkeypatch.setattr(surroundings, "QUIET", 0.0)
    found = surroundings.layers(1, 9, 2, 4, 1, 0.0)
    assert set(found) == {"numpy", "ours", "packed"}
    assert all(len(times) == surroundings.LEAST_ROUNDS for times in found.values())
    times = {"numpy": [3.0, 3.0], "ours": [2.0, 2.0], "packed": [2.4, 2.4]}
    monkeypatch.setattr(surroundings, "apart", lambda *_, **__: times)
    blocks = list(surroundings.measure_layers(1.0, (1, 2)))
    assert [x.value for x in blocks] == [1.5, 1.25] * 4 and {x.verdict for x in blocks} <= {"ok", ""}


def test_layers_is_a_suite(capsys):
    assert cli.main(["bench", "--list", "--suite", "layers"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*(x.name for x in cases.CASES if x.operation in LAYERS), "linear-halves", "layers-block"]
    assert len(listed) == 11
