"""The benchmark's cases, method and commands. Nothing here depends on how fast anything is."""

import json
import math
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

import qkv_fast
from qkv_fast import _runtime, reference
from qkv_fast.bench import (
    cases,
    cli,
    limits,
    machine,
    method,
    properties,
    record,
    report,
    runner,
    selfcheck,
    tables,
    work,
)
from qkv_fast.bench.cases import case
from qkv_fast.bench.method import Refused, Rounds, Summary

SMALL = case("2x4x9", 8, causal=True)


# Cases


def test_names_are_unique_and_fit_a_terminal():
    names = [c.name for c in cases.CASES]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 40


def test_every_case_has_a_suite_and_every_suite_a_case_or_a_property():
    known = {*cases.SUITES, "main"}
    for c in cases.CASES:
        assert c.suites and set(c.suites) <= known, c.name
    for suite in cases.SUITES:
        assert cases.select(suite) or any(suite in p.suites for p in properties.PROPERTIES), suite


def test_goals_are_ordered():
    for c in cases.CASES:
        if c.goal:
            assert c.goal.verdict(c.goal.aim) == "aim"
            assert c.goal.verdict(c.goal.floor) == ("aim" if c.goal.aim == c.goal.floor else "floor")
            lower, upper = sorted((c.goal.floor, c.goal.aim))
            assert (c.goal.verdict(upper), c.goal.verdict(lower / 2)) == (
                ("floor", "aim") if c.goal.unit == "seconds" else ("aim", "below")
            ), c.name


@pytest.mark.parametrize(
    "shape",
    [
        case("2x3x7", 5),
        case("1x2x7", 5, kv_len=12, causal=True),
        case("1x2x9", 5, causal=True, window=(2, 0)),
        case("1x2x9", 5, kv_len=20, window=(None, 1)),
        case("3x2x4", 5, kv_len=11, kv_lengths=(11, 4, 0)),
    ],
    ids=lambda c: c.name,
)
def test_operations_are_those_of_the_visible_pairs(shape):
    _, k, _ = work.inputs(shape)
    q = np.zeros((shape.batch, shape.heads, shape.q_len, shape.dim))
    values = np.broadcast_to(np.eye(shape.kv_len), (*k.shape[:3], shape.kv_len))
    weights = reference.attention(q, np.zeros(k.shape), values, **shape.arguments())  # 1 / visible, or 0
    assert shape.visible_pairs() == np.count_nonzero(weights[:, 0])
    assert work.flops(shape) == 4 * shape.heads * shape.visible_pairs() * shape.dim


def test_inputs_are_the_same_every_time_and_in_the_case_s_layout_and_type():
    for c in (SMALL, case("2x4x9", 8, kv_heads=2, layout="blhd", dtype="float64")):
        first, second = work.inputs(c), work.inputs(c)
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert {a.dtype.name for a in first} == {c.dtype}
        assert first[0].shape == ((2, 9, 4, 8) if c.layout == "blhd" else (2, 4, 9, 8))


def test_limits_are_of_the_visible_keys():
    low, high = case("2x1x3", 4, kv_len=8, causal=True, window=(2, 0), kv_lengths=(8, 4)).limits()
    assert low.tolist() == [[3, 4, 5], [0, 0, 1]] and high.tolist() == [[6, 7, 8], [2, 3, 4]]


def test_bytes_are_what_has_to_be_read_and_written():
    q, k, v = work.inputs(SMALL)
    assert work.bytes_of(SMALL) == q.nbytes + k.nbytes + v.nbytes + q.nbytes
    assert work.bytes_of(case("1x2x1", 4, kv_len=10, kv_lengths=(3,))) == 4 * (2 * 4 * 2 + 2 * 2 * 3 * 4)


def test_streaming_cases_have_more_inputs_than_a_cache_holds():
    streams = [c for c in cases.CASES if c.stream]
    assert set(streams) < {*cases.select("decode"), *cases.select("layers")} and all(c.q_len < 8 for c in streams)
    for c in streams:
        size = work.bytes_of(c)
        assert work.copies(c) * size >= 256 * 2**20 and work.limited_by(c) == "read" and work.amount(c) == size
    few = replace(SMALL, stream=True)
    first, second, *_ = work.sets(few)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b) and not np.shares_memory(a, b)
    assert len(list(work.sets(SMALL))) == 1


def test_what_limits_a_case_goes_by_its_work():
    assert (work.limited_by(SMALL), work.amount(SMALL)) == ("calls", 1)
    large = case("1x12x2048", 64, dtype="float64")
    assert (work.limited_by(large), work.amount(large)) == ("float64", work.flops(large))


def test_every_operation_of_a_case_is_known():
    assert {c.operation for c in cases.CASES} <= set(work.OPERATIONS)


def test_fixed_work_over_length():
    assert len({work.flops(c) for c in cases.select("scaling")}) == 1


def test_select_by_name_part_and_pattern():
    assert [c.name for c in cases.select("foundation", ["1x12x2048-d64"])] == ["1x12x2048-d64"]
    assert len(cases.select("foundation", ["1x12x2048"])) > 1
    assert {c.isa for c in cases.select("foundation", ["*@avx2"])} == {"avx2"}
    assert {c.dtype for c in cases.select("all", None, ["float64"])} == {"float64"}


# Method


def test_summary_is_median_and_quartiles():
    summary = Summary.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.low, summary.median, summary.high, summary.count) == (2.0, 3.0, 4.0, 5)
    assert summary.spread == pytest.approx(2 / 3)
    assert summary.wide
    assert not Summary.of([1.0, 1.01, 0.99, 1.0]).wide
    assert Summary.of([7.0]).median == 7.0
    assert Summary.of([1.0, math.nan, 3.0]).count == 2
    assert math.isnan(Summary.of([math.nan]).median)


class Fake:
    """A contestant that writes down when it was sampled and says what it is told to."""

    def __init__(self, name, seconds, log, fails_at=None):
        self.name, self.seconds, self.log, self.fails_at = name, seconds, log, fails_at

    def sample(self, repeats):
        self.log.append(self.name)
        if self.fails_at is not None and self.log.count(self.name) > self.fails_at:
            raise Refused("had enough")
        return self.seconds


def test_rounds_are_interleaved_with_the_limit_around_the_first():
    log = []
    contestants = [Fake(name, 0.1, log) for name in "ABC"]
    rounds = method.interleave(contestants, limit=lambda: log.append("limit") or 100.0, budget=0, rounds=(3, 9))
    warm_up, timed = log[:3], log[3:]
    assert warm_up == ["A", "B", "C"]
    assert timed == ["limit", "A", "limit", "B", "C"] * 3
    assert len(rounds.limits) == 3


def test_rounds_fill_the_budget_between_the_least_and_the_most():
    def count(budget):
        now = iter(range(1000))
        rounds = method.interleave(
            [Fake("A", 0.1, [])], budget=budget, rounds=(2, 6), clock=lambda: float(next(now))
        )
        return len(rounds.seconds["A"])

    assert (count(0.0), count(1e9)) == (2, 6)
    assert 2 < count(4.5) < 6


def test_long_rounds_are_three_and_not_many_times_the_budget():
    def count(budget):
        now = iter(range(1000))
        contestants = [Fake("A", 0.1, [])]
        rounds = method.interleave(contestants, budget=budget, rounds=(5, 9), clock=lambda: float(next(now)))
        return len(rounds.seconds["A"])

    assert (count(1.0), count(2.5), count(1e9)) == (3, 5, 9)


def test_a_pool_that_is_not_at_rest_is_seen_by_what_the_machine_gives_after_its_turn():
    gives = {"ours": 100.0, "calm": 90.0, "spinning": 50.0}
    log = []
    contestants = [Fake(name, 0.1, log) for name in gives]
    rounds = method.interleave(contestants, probe=lambda: gives[log[-1]], budget=0, rounds=(3, 3))
    assert rounds.left == {name: [rate] * 3 for name, rate in gives.items()}
    row = runner.Row(runner.Job(SMALL, 2), rounds=replace(rounds, seconds={"qkv_fast": [0.1], **rounds.seconds}))
    row.rounds.left["qkv_fast"] = row.rounds.left.pop("ours")
    assert row.disturbed == {"spinning": 2.0}
    (note,) = report.disturbance_notes([row])
    assert "after spinning's turn" in note and "2x4x9-d8-causal (2): 2.00 times" in note
    assert runner.Row(runner.Job(SMALL, 2), rounds=Rounds()).disturbed == {}


def test_ratios_and_shares_are_formed_within_a_round():
    rounds = Rounds(
        {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 4.0, 8.0]},  # a machine that gets slower and slower
        [(8.0, 12.0), (5.0, 5.0), (2.5, 2.5)],
    )
    assert rounds.ratio("peer", "ours") == Summary(2.0, 2.0, 2.0, 3)
    assert rounds.share("ours", 5.0) == Summary(0.5, 0.5, 0.5, 3)


def test_a_contestant_that_fails_keeps_its_place_and_the_others_go_on():
    log = []
    contestants = [Fake("A", 0.1, log), Fake("B", 0.1, log, fails_at=2), Fake("C", 0.1, log)]
    rounds = method.interleave(contestants, budget=60, rounds=(4, 4))
    assert rounds.failures == {"B": "had enough"}
    assert [math.isnan(s) for s in rounds.seconds["B"]] == [False, True, True, True]
    assert rounds.time("C").count == 4
    assert log.count("B") == 3


def test_short_calls_are_repeated_and_long_ones_are_not(monkeypatch):
    assert method.calibrate(Fake("long", 0.5, [])) == 1
    assert method.calibrate(Fake("short", 0.001, [])) == 20
    calls = []
    method.timed(lambda: calls.append(0), 3)
    assert len(calls) == 4  # one of them to warm the caches
    calls.clear()
    method.timed(lambda: calls.append(0), 1)
    assert len(calls) == 2  # a long call has its untimed one too
    calls.clear()
    assert method.timed(lambda: calls.append(0), 0) > 0 and len(calls) == 1
    monkeypatch.setattr(method, "LONG_SECONDS", 0.0)
    calls.clear()
    assert method.timed(lambda: calls.append(0), 1) > 0 and len(calls) == 1  # one so long that the first is the sample


def test_copies_of_inputs_are_taken_in_turn():
    seen = []
    call = method.rotate([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    only = seen.clear
    assert method.rotate([only]) == only  # nothing between the clock and the call


def test_limits_of_the_machine_are_rates():
    for name in limits.RATES:
        assert limits.rate(name, 1, 1e-3) > 0 or name == "bfloat16"
    flags = machine.read("/proc/cpuinfo")
    if flags and "avx512_bf16" not in flags:
        assert limits.rate("bfloat16", 1, 1e-3) == 0
    assert limits.call_rate(1e-3) > 0
    assert limits.memory().nbytes >= 256 * 2**20


def test_limits_are_of_the_cpus_that_there_are(monkeypatch):
    """More threads than CPUs share them, and each measures as if its CPU were its own."""
    asked = []
    monkeypatch.setattr(machine, "cpu_count", lambda: 2)
    for name in ("peak_flops", "read_bandwidth", "copy_bandwidth"):
        monkeypatch.setattr(_runtime, name, lambda *args: asked.append(args[-2]) or 1.0)
    found = limits.measure([1, 2, 5])
    assert list(found) == [1, 2, 5] and asked == [n for n in (1, 2, 2) for _ in limits.RATES]
    limits.of_case(case("1x12x2048", 64), 3)()
    assert asked[-1] == 2


# Commands


def test_thread_counts_of_jobs():
    single = case("1x1x4", 4, threads=(1,))
    assert [(j.case, j.threads) for j in runner.plan([SMALL, single], [1, 2])] == [
        (SMALL, 1),
        (single, 1),
        (SMALL, 2),
    ]
    assert [j.threads for j in runner.plan([single], [1, 2], [3])] == [3]


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["--suite", "nonsense"], "foundation, quick"),
        (["--suite", "small", "--case", "nonsense"], "1x8x1-d64"),
        (["--peers", "nonsense"], "torch, ort"),
        (["--isa", "nonsense"], "portable"),
        (["--dtype", "nonsense"], "float32"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_unknown_names_list_the_valid_ones(arguments, listed, capsys):
    assert cli.main(["bench", *arguments]) == 2
    message = capsys.readouterr().err
    assert "nonsense" in message and listed in message


@pytest.mark.parametrize("threads", ["0", "x", ""])
def test_bad_thread_counts_are_usage_errors(threads, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--threads", threads])
    assert stop.value.code == 2
    assert "--threads" in capsys.readouterr().err


def test_more_threads_than_the_library_has_are_refused(capsys):
    most = _runtime.MAX_THREADS
    assert cli.main(["bench", "--threads", f"1,{most + 1}"]) == 2
    output = capsys.readouterr()
    assert f"--threads: {most + 1} is above the library's maximum, {most}" in output.err and not output.out
    assert cli.main(["bench", "--threads", str(most), "--list"]) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dtype", "float64"], "'quick' has no float64 case; suites that have one: foundation, prefill, all"),
        (["--case", "sd:", "--dtype", "float64"], "no float64 case that matches 'sd:'; suites that have one: none"),
        (
            ["--suite", "quick", "--case", "2048", "--dtype", "float64"],
            "'quick' has no float64 case that matches '2048'; suites that have one: foundation, prefill, all",
        ),
        (["--case", "fork-join,sd:", "--dtype", "float64"], "'all' has no float64 case that matches 'sd:'"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_a_selection_without_a_case_says_where_there_is_one(arguments, complaint, capsys):
    assert cli.main(["bench", *arguments]) == 2
    output = capsys.readouterr()
    assert complaint in output.err and not output.out


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x", ""])
@pytest.mark.parametrize("command", [[], ["bench"]], ids=["main", "bench"])
def test_no_time_is_a_usage_error(command, seconds, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--seconds", seconds])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--seconds" in message and repr(seconds) in message


def test_list_names_cases_and_properties(capsys):
    assert cli.main(["bench", "--list", "--suite", "foundation"]) == 0
    listed = capsys.readouterr().out
    assert "1x12x2048-d64-causal" in listed and "fork-join" in listed


def test_bench_prints_a_table_and_its_json_says_the_same(tmp_path, capsys):
    path = tmp_path / "run.json"
    arguments = ["--case", "1x8x1-d64,1x1x64-d64", "--peers", "numpy", "--threads", "1", "--seconds", "0.01"]
    assert cli.main(["bench", *arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    run = json.loads(path.read_text(encoding="utf-8"))
    assert run["machine"]["isa"] == qkv_fast.isa()
    assert [row["case"]["name"] for row in run["rows"]] == ["1x8x1-d64", "1x1x64-d64"]
    for row in run["rows"]:
        assert row["case"]["name"] in printed
        rounds = Rounds(row["seconds"], [tuple(pair) for pair in row["limits"]])
        assert rounds.time("qkv_fast").median == row["median_seconds"]
        assert rounds.share("qkv_fast", row["amount"]).median == row["share_of_limit"]
        assert rounds.ratio("numpy", "qkv_fast").median == row["speedup"]["numpy"]
        assert row["peers"]["numpy"]["version"] == np.__version__


def test_a_table_too_wide_for_the_terminal_is_printed_in_parts():
    table = tables.Table("t", ["workload", "thr", "aaaa", "bbbb", "cccc"], notes=["note"])
    table.add(["w", "1", "a", "b", "c"])
    parts = tables.fit(table, width=28)
    assert [part.columns for part in parts] == [["workload", "thr", "aaaa", "bbbb"], ["workload", "thr", "cccc"]]
    assert [part.rows for part in parts] == [[["w", "1", "a", "b"]], [["w", "1", "c"]]]
    assert [part.notes for part in parts] == [[], ["note"]]
    assert all(len(line) <= 28 for part in parts for line in tables.as_text(part).splitlines())
    assert len(tables.fit(table, width=200)) == 1
    assert len(tables.fit(table, width=1)) == 3  # a column at least


def test_markdown_is_a_table(capsys):
    arguments = ["--case", "1x8x1-d64", "--peers", "none", "--seconds", "0.01", "--markdown"]
    assert cli.main(["bench", *arguments]) == 0
    printed = [block.splitlines() for block in capsys.readouterr().out.split("\n\n") if block.startswith("|")]
    assert [len(lines) for lines in printed] == [3, 3, 3]  # speed, errors and memory, limits: heading, rule, row
    for lines in printed:
        assert len({line.count("|") for line in lines}) == 1


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "x.json"
    record.save(str(path), {"a": [math.nan, 1.5, np.float32(2), np.int64(3)], "b": (math.inf, None, "µ")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [None, 1.5, 2.0, 3], "b": [None, None, "µ"]}


@pytest.mark.parametrize("command", [[], ["bench"]], ids=["main", "bench"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_timed(command, tmp_path, capsys):
    path = tmp_path / "no-such-folder" / "run.json"
    assert cli.main([*command, "--json", str(path)]) == 2
    output = capsys.readouterr()
    assert str(path) in output.err and not output.out


def test_ctrl_c_prints_what_is_finished(monkeypatch, capsys):
    real, calls = runner.run_job, []

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(runner, "run_job", interrupted)
    assert cli.main(["bench", "--case", "1x8x1-d64,1x1x64-d64", "--peers", "none", "--seconds", "0.01"]) == 130
    output = capsys.readouterr()
    assert "1x8x1-d64" in output.out and "1x1x64-d64" not in output.out
    assert "interrupted" in output.err


@pytest.mark.full
def test_the_command_exits_0_and_saves_what_it_found(tmp_path):
    path = tmp_path / "run.json"
    command = [sys.executable, "-P", "-m", "qkv_fast", "--seconds", "0.01", "--json", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(path.read_text(encoding="utf-8"))
    assert {check["isa"] for check in run["checks"]} == set(qkv_fast.available_isas())
    assert not any(check["problem"] for check in run["checks"])
    assert {row["case"]["name"] for row in run["rows"]} == {c.name for c in cases.select("main")}  # none left out
    for isa in qkv_fast.available_isas():
        assert isa in done.stdout
    assert qkv_fast.__version__ in done.stdout and machine.cpu_model() in done.stdout


@pytest.mark.full
def test_the_command_exits_1_when_a_check_fails(monkeypatch, capsys):
    real = qkv_fast.attention
    monkeypatch.setattr(qkv_fast, "attention", lambda *a, **k: real(*a, **k) * np.float32(1.0001))
    assert cli.main(["--seconds", "0.01"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_an_exception_in_a_check_is_a_failed_check(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(qkv_fast, "attention", broken)
    monkeypatch.setattr(qkv_fast, "KVCache", broken)
    checks = list(selfcheck.run(qkv_fast.isa()))
    assert checks and all(check.problem == "RuntimeError: broken" for check in checks)


def test_the_self_check_knows_every_type(monkeypatch):
    checks = list(selfcheck.run(qkv_fast.isa()))
    assert {check.dtype for check in checks} == {"float32", "float64", "float16", "bfloat16"}
    assert {name for name in ("f16", "bf16", "int8", "int4") if any(f"-kv_{name}" in c.name for c in checks)} == {
        "f16", "bf16", "int8", "int4",
    }  # fmt: skip
    assert not any(check.problem for check in checks)
    real = qkv_fast.KVCache.attend
    monkeypatch.setattr(qkv_fast.KVCache, "attend", lambda *a, **k: real(*a, **k) * np.float32(1.001))
    failed = {check.name for check in selfcheck.run(qkv_fast.isa()) if check.problem}
    assert failed == {step.name for step in selfcheck.STEPS}


def test_importing_the_package_does_not_import_the_benchmark():
    code = textwrap.dedent("""
        import sys
        import qkv_fast
        unwanted = ("qkv_fast.bench", "multiprocessing", "rich", "matplotlib")
        print([name for name in sys.modules if name.startswith(unwanted)])
    """)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
