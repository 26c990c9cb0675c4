"""What the benchmark knows of spotlight's questions. Nothing here depends on speed."""

import math
from dataclasses import replace

import numpy as np
import pytest

import qkv_fast
from qkv_fast.bench import (
    answers,
    cases,
    cli,
    machine,
    measured,
    memory,
    peers,
    report,
    runner,
    spotlight,
    tables,
    work,
)
from qkv_fast.bench.cases import case
from qkv_fast.bench.method import Refused, Rounds
from qkv_fast.bench.questions import QUESTIONS
from qkv_fast.bench.worker import Ready


def asked(name, **options):
    return case("1x2x512", 8, operation=name, **options)


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("options", [{}, {"causal": True, "kv_len": 700}, {"dtype": "float64"}], ids=str)
def test_answers_are_checked_against_the_definition(name, options):
    """Some rows of it, found from parts of the queries; what is wrong in one of them is refused."""
    shape = asked(name, **options)
    operation = work.operation(shape)
    answer = operation.head_first(shape, operation.call(shape, work.inputs(shape), 1, False)())
    exact = answers.Exact.of(shape)
    assert exact.error(answer) <= exact.allowed < 1e-3
    assert exact.bands[-1][1] == operation.rows(shape) == answer.shape[2]
    wrong = answer.copy()
    wrong[0, -1, -1, -1] += 2 * exact.allowed
    with pytest.raises(Refused, match="wrong answer"):
        exact.error(wrong)


@pytest.mark.parametrize("name", QUESTIONS)
def test_bytes_are_those_of_what_is_looked_at_and_of_the_answer(name):
    shape = asked(name)
    operation, arrays = work.operation(shape), work.inputs(shape)
    answer = operation.call(shape, arrays, 1, False)()
    size = sum(x.nbytes for x in (answer if isinstance(answer, tuple) else (answer,)))
    assert operation.result_bytes(shape) == size
    assert work.bytes_of(shape) == size + sum(x.nbytes for x in operation.asked_of(arrays))


@pytest.mark.parametrize("name", cases.ASKED)
def test_torch_answers_them_from_the_whole_matrix(name):
    pytest.importorskip("torch")
    shape = case("1x2x512", 8, operation=name)
    exact = answers.Exact.of(shape)
    for _, calls, fetch in peers.Torch(1).prepare(shape):
        calls[0]()
        assert exact.error(fetch()) <= exact.allowed


def test_goals_against_a_peer_are_judged_on_every_cpu_where_the_peer_is(monkeypatch):
    shape = next(c for c in cases.CASES if c.operation == "entropy")
    row = runner.Row(runner.Job(shape, 2), isa=qkv_fast.isa())
    row.rounds = Rounds({"qkv_fast": [1.0, 1.0], "torch": [5.0, 5.0]}, [(1e9, 1e9)] * 2)
    row.ready = {"torch": Ready("", "1", 2, 1e-7)}
    for reference in (True, False):
        monkeypatch.setattr(machine, "is_reference", lambda reference=reference: reference)
        assert row.verdict == "below"
    text = tables.as_text(report.speed_table([row], ["torch"], "title"))
    assert "6 x torch" in text and "below" in text and report.NOT_JUDGED not in text
    row.rounds.seconds["torch"] = [6.5, 6.5]
    assert row.verdict == "aim"
    row.failures["torch"] = "no"
    assert row.verdict == ""


def test_times_are_over_attention_on_the_same_arrays(monkeypatch):
    monkeypatch.setattr(spotlight, "SHAPES", ("1x2x40",))
    calls = spotlight.questions(case("1x2x40", 64), 1)
    assert [call.name for call in calls] == ["attention", *spotlight.OVER_ATTENTION]
    found = list(spotlight.measure_over_attention(1e-3, (1, 2)))
    assert [m.name for m in found] == [
        f"{name} over attention, 1x2x40-d64{end}, {threads}"
        for end in ("", "-causal")
        for threads in ("1 thread", "2 threads")
        for name in spotlight.OVER_ATTENTION
    ]
    assert all(m.value > 0 and (m.floor, m.aim) == spotlight.OVER_ATTENTION[m.name.split()[0]] for m in found)
    monkeypatch.setattr(spotlight, "LONG", "1x2x100")
    full, causal = spotlight.measure_rows(1e-3, (1,))
    assert full.value > 0 and "causal" in causal.name and (full.floor, full.aim) == (1.0, 0.8)


def test_a_wrong_answer_is_not_measured(monkeypatch):
    monkeypatch.setattr(spotlight, "SHAPES", ("1x2x40",))
    monkeypatch.setattr(qkv_fast.spotlight, "entropy", lambda q, k, **_: np.zeros(q.shape[:3], q.dtype))
    (figure,) = measured.measure(measured.Property("over-attention", (), spotlight.measure_over_attention), 1.0, (1,))
    assert math.isnan(figure.value) and "wrong answer" in figure.note


def test_memory_is_that_beyond_the_result(monkeypatch):
    monkeypatch.setattr(spotlight, "LONG", "1x2x100")
    added = QUESTIONS["top_keys"].result_bytes(case("1x2x100", 64)) + 2**20
    monkeypatch.setattr(spotlight, "first_call_memory", lambda adapter, case, threads: added)
    figures = {m.name.split(":")[0]: m for m in spotlight.measure_memory(1.0, (1, 2))}
    assert list(figures) == list(spotlight.OF_ANY_LENGTH) and figures["top_keys"].value == 1.0
    assert all(m.floor == 32 and "2 threads" in m.name for m in figures.values())
    monkeypatch.setattr(spotlight, "first_call_memory", lambda *_: None)
    assert list(spotlight.measure_memory(1.0, (1,))) == []


@pytest.mark.skipif(memory.growth(int) is None, reason="the system does not tell a process's memory at its peak")
@pytest.mark.parametrize("operation", ["received", "scores"])
def test_memory_of_a_row_is_known_of_every_operation(operation):
    shape = replace(asked(operation), kv_len=5000)
    (row,) = runner.run(runner.plan([shape], [1]), runner.How(rounds=(1, 1)))
    assert row.error == "" and row.memory["qkv_fast"] > 0


def test_spotlight_is_a_suite(capsys):
    assert cli.main(["bench", "--list", "--suite", "spotlight"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*(f"{name}:1x8x2048-d64" for name in cases.ASKED), "over-attention", "last-rows", "beyond-result"]
