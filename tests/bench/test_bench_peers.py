"""The benchmark's peers: answers are checked, refusals have reasons, a crash is a note under the table."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from _util import child_says

import qkv_fast
from qkv_fast import reference
from qkv_fast.bench import memory, operations, peers, report, runner, tables, work, worker
from qkv_fast.bench.answers import Exact
from qkv_fast.bench.cases import case
from qkv_fast.bench.method import Refused

SMALL = case("2x4x9", 8, causal=True)
ONCE = runner.How(rounds=(1, 1))


def test_answers_are_checked_against_the_reference():
    for shape in (SMALL, case("1x2x150", 8, kv_len=200, causal=True), case("2x4x9", 8, layout="blhd")):
        exact = Exact.of(shape)
        right = reference.attention(*work.inputs(shape), layout=shape.layout, **shape.arguments()).astype("float32")
        answer = work.operation(shape).head_first(shape, right)
        assert exact.error(answer) < 1e-6
        wrong = answer.copy()
        wrong[0, 0, -1, 0] += 1e-3
        with pytest.raises(Refused, match="wrong answer: error"):
            exact.error(wrong)
        wrong[0, 0, -1, 0] = np.nan
        with pytest.raises(Refused, match="wrong answer"):
            exact.error(wrong)
    with pytest.raises(Refused, match="shape"):
        Exact.of(SMALL).error(np.zeros((1, 2, 3, 4), "float32"))
    with pytest.raises(Refused, match="type"):
        Exact.of(SMALL).error(np.zeros((2, 4, 9, 8), "float64"))


@pytest.mark.parametrize("adapter", [peers.NumPy, peers.ChunkedNumPy], ids=lambda peer: peer.name)
@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        case("1x4x300", 8, kv_heads=2, kv_len=310, causal=True, window=(70, 0)),
        case("2x2x40", 8, kv_len=50, kv_lengths=(50, 41), dtype="float64"),
        case("1x2x130", 8, layout="blhd"),
    ],
    ids=lambda c: c.name,
)
def test_plain_numpy_is_right(adapter, shape):
    ((_, _, fetch),) = adapter(1).prepare(shape)
    Exact.of(shape).error(fetch())


PEERS_MODULE = """
import os
import numpy as np


class Wrong:
    name, title, requires = "wrong", "Wrong", ()
    environment = staticmethod(lambda threads: {"WRONG_PEER_THREADS": str(threads)})
    shift = 0.01

    def __init__(self, threads):
        self.threads, self.version = int(os.environ["WRONG_PEER_THREADS"]), "1"

    def prepare(self, case):
        from qkv_fast import reference
        from qkv_fast.bench import work

        answer = reference.attention(*work.inputs(case), **case.arguments()).astype(case.dtype) + self.shift
        answer = answer.astype(case.dtype)
        return [("way", [lambda: answer] * work.copies(case), lambda: answer)]


class Right(Wrong):
    name = "right"
    shift = 0


class Crashing(Right):
    name = "crashing"

    def prepare(self, case):
        os._exit(7)


class Missing(Right):
    name = "missing"

    def __init__(self, threads):
        import a_module_that_nobody_has


class Stubborn(Right):
    name = "stubborn"

    def __init__(self, threads):
        self.threads, self.version = 17, "1"
"""


@pytest.fixture
def strange_peers(tmp_path, monkeypatch):
    """Adapters of all kinds, in a module that the peers' processes can import."""
    (tmp_path / "strange_peers.py").write_text(PEERS_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import strange_peers

    found = (strange_peers.Right, strange_peers.Wrong, strange_peers.Crashing, strange_peers.Missing)
    yield {peer.name: peer for peer in (*found, strange_peers.Stubborn)}
    del sys.modules["strange_peers"]


def test_peers_are_refused_with_the_reason_and_the_run_goes_on(strange_peers):
    jobs = runner.plan([SMALL, case("1x1x4", 4)], [1])
    rows = list(runner.run(jobs, runner.How(tuple(strange_peers), rounds=(1, 1), adapters=strange_peers)))
    assert [row.error for row in rows] == ["", ""]
    for row in rows:
        assert set(row.failures) == {"wrong", "crashing", "missing", "stubborn"}
        assert "wrong answer: error 1" in row.failures["wrong"]
        assert row.failures["crashing"] == "crashed (exit code 7)"
        assert "a_module_that_nobody_has" in row.failures["missing"]
        assert row.failures["stubborn"] == "would use 17 threads, not 1"
        assert row.speedup("right").count == 1
        assert row.ready["right"].threads == 1
    text = tables.as_text(report.peers_table(rows, list(strange_peers)))
    assert "crashed (exit code 7)" in text and "a_module_that_nobody_has" in text


def test_a_peer_that_hangs_is_given_up(strange_peers):
    hung = worker.Worker(strange_peers["right"], 1, patience=0.0)
    try:
        with pytest.raises(Refused, match="no answer in 0 s"):
            hung.prepare(SMALL, Exact.of(SMALL))
    finally:
        hung.close()
    assert not hung.process.is_alive()


def test_an_answer_of_ours_that_is_wrong_is_an_error_and_not_a_time(monkeypatch):
    monkeypatch.setattr(qkv_fast, "attention", lambda q, k, v, **_: np.zeros_like(q))
    (row,) = runner.run(runner.plan([SMALL], [1]), ONCE)
    assert row.wrong and "wrong answer" in row.error and row.rounds is None


def test_no_memory_and_no_path_are_rows_too(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    (row,) = runner.run(runner.plan([case("1x1x4", 4, isa="no-such-path")], [1]), ONCE)
    assert row.error == "path no-such-path is not available here"
    monkeypatch.setattr(qkv_fast, "attention", fail)
    (row,) = runner.run(runner.plan([SMALL], [1]), ONCE)
    assert row.error == "out of memory"


def test_a_case_too_large_for_the_memory_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(memory, "left", lambda: 1000)
    (row,) = runner.run(runner.plan([SMALL], [1]), ONCE)
    assert row.error.startswith("out of memory: the case takes about") and row.rounds is None
    text = tables.as_text(report.speed_table([row], [], "title"))
    assert SMALL.name in text and row.error in text


@pytest.mark.skipif(memory.growth(int) is None, reason="the system does not tell a process's memory at its peak")
def test_memory_is_what_a_first_call_adds_to_a_process_of_its_own(strange_peers):
    size = 1 << 26
    # Freed before the call ends, but it was there. In a process of its own: this one keeps memory that others freed.
    grown = child_says(f"""
import numpy as np
from qkv_fast.bench import memory
print(memory.growth(lambda: len(np.ones({size}, np.uint8))))
""")
    assert abs(int(grown) - size) < 2**20  # the system adds its CPUs' counts of pages up late
    how = runner.How(("right", "wrong"), rounds=(1, 1), adapters=strange_peers, peers_memory=True)
    (row,) = runner.run(runner.plan([SMALL], [1]), how)
    assert set(row.memory) == {"qkv_fast", "right"}  # who gives wrong answers is asked for nothing else


def test_memory_left_is_none_or_positive():
    assert memory.left() is None or memory.left() > 0


def test_a_case_may_be_about_another_operation(strange_peers, monkeypatch):
    """An operation is one class: rows, checks and refusals follow from it."""

    class Doubling(operations.Attention):
        @staticmethod
        def call(case, arrays, threads, reuse_out):
            return lambda: arrays[0] * 2

        @staticmethod
        def exact(case, arrays, rows):
            return arrays[0][:, :, rows].astype("float64") * 2

    monkeypatch.setitem(work.OPERATIONS, "doubling", Doubling)
    how = runner.How(("right",), rounds=(1, 1), adapters=strange_peers)
    (row,) = runner.run(runner.plan([case("1x1x4", 4, operation="doubling")], [1]), how)
    assert not row.error and row.our_error == 0
    assert row.failures == {"right": "no doubling"}


def test_streaming_cases_rotate_among_copies(monkeypatch):
    """Ours and the peers' calls take all sets of inputs in turn: seen by what they were called on."""
    seen = []

    class Watching(operations.Attention):
        @staticmethod
        def call(case, arrays, threads, reuse_out):
            return lambda: seen.append(id(arrays[1])) or arrays[0]

    shape = case("1x64x1", 128, kv_len=2048, stream=True)  # 128 MB: 2 or 3 copies
    assert work.copies(shape) > 1
    _, calls, _ = worker.ways(peers.ChunkedNumPy(1), shape)[0]
    assert len(calls) == work.copies(shape)
    monkeypatch.setitem(work.OPERATIONS, "watching", Watching)
    call = runner.ours(replace(shape, operation="watching"), 1)
    for _ in range(2 * work.copies(shape)):
        call()
    assert len(set(seen)) == work.copies(shape) and seen[: work.copies(shape)] == seen[work.copies(shape) :]
