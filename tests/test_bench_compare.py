"""Saved runs: read back as they were written, compared with a noise band, drawn. Made-up samples, never real times."""

import json

import numpy as np
import pytest

from qkv_fast.bench import cli, compare, machine, record, runner
from qkv_fast.bench.cases import case
from qkv_fast.bench.method import Rounds
from qkv_fast.bench.outcome import Outcome
from qkv_fast.bench.runner import Job, Row
from qkv_fast.bench.worker import Ready

CASES = [case(f"1x8x{length}", 64, suites=("scaling",)) for length in (256, 512, 1024, 2048, 4096)]
MACHINE = machine.identify()
COPY = case("1x8x512", 64, label="softmax", operation="softmax", suites=("stages",))
STREAM = case("1x8x1", 64, kv_len=4096, stream=True, suites=("decode",))


def made_up_row(rng, shape, threads=1, slow_down=1.0, noise=0.02, rounds=7, machine=1.0):
    """A row of a machine whose speed changes from round to round, and whose samples are `noise` (lognormal) off."""
    limit = 100e9 * machine * np.exp(rng.normal(0, 0.1, rounds))
    seconds = slow_down * shape.amount / (0.8 * limit) * np.exp(rng.normal(0, noise, rounds))
    peer = 1.5 * seconds * np.exp(rng.normal(0, noise, rounds))
    row = Row(Job(shape, threads), isa="avx512", our_error=1e-7, memory={"qkv_fast": 1 << 20})
    row.rounds = Rounds({"qkv_fast": seconds.tolist(), "torch": peer.tolist()}, [(x, x) for x in limit.tolist()])
    row.ready["torch"] = Ready("SDPA", "2.13", threads, 2e-7)
    return row


def made_up_run(seed, slow_down=1.0, which=(), **how):
    """A run of CASES; those in `which` (default: all) are slower."""
    rng = np.random.default_rng(seed)
    outcome = Outcome(["bench"], dict(MACHINE))
    rates = {"float32": 1e11, "float64": 5e10, "bfloat16": 0.0, "read": 2e10}
    outcome.limits = {"before": {1: rates, 2: rates}, "after": {1: rates, 2: rates}}
    for index, shape in enumerate(CASES):
        slower = not which or index in which
        outcome.rows.append(made_up_row(rng, shape, slow_down=slow_down if slower else 1.0, **how))
    return outcome.data()


def verdicts(old, new):
    return [change.verdict for change in compare.changes(old, new)]


# The record


def test_a_run_is_read_back_as_it_was_saved(tmp_path):
    run = made_up_run(0)
    path = tmp_path / "run.json"
    record.save(str(path), run)
    assert record.load(str(path)) == run
    for row, shape in zip(run["rows"], CASES, strict=True):
        assert row["case"]["name"] == shape.name and row["case"]["suites"] == ["scaling"]
        assert row["amount"] == shape.flops() and row["limited_by"] == "float32"
        assert row["peers"]["torch"] == {"label": "SDPA", "version": "2.13", "threads": 1, "error": 2e-7}
        assert row["memory"] == {"qkv_fast": 1 << 20}
    assert {"cpu", "caches", "governor", "numpy", "threads", "isa", "environment"} <= set(run["machine"])


def test_samples_that_are_missing_are_null(tmp_path):
    row = made_up_row(np.random.default_rng(0), CASES[0])
    row.rounds.seconds["torch"][2:] = [float("nan")] * 5
    row.failures["torch"] = "had enough"
    data = json.loads(json.dumps(record.row_data(row), allow_nan=False))
    assert data["seconds"]["torch"][2:] == [None] * 5 and data["speedup"] == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "not a run"),
        ('{"machine": {}}', "not a run"),
        ('{"machine": {}, "rows": [], "schema": 1}', "saved in format 1"),
    ],
)
def test_a_file_that_is_no_run_is_told_before_anything_is_timed(text, complaint, tmp_path, capsys):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    assert cli.main(["bench", "--compare", str(path)]) == 2
    output = capsys.readouterr()
    assert complaint in output.err and str(path) in output.err and not output.out


# The comparison


def test_a_run_equals_itself():
    run = made_up_run(1)
    assert [change.ratio for change in compare.changes(run, run)] == [1.0] * len(CASES)
    assert verdicts(run, run) == ["same"] * len(CASES)


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.04])
def test_runs_of_one_build_are_equal_within_the_band(noise):
    """Also where the machine was half as fast in one of them. 7 rounds; 2 % of the rows may be off."""
    found = []
    for seed in range(100):
        old, new = made_up_run(seed, noise=noise), made_up_run(1000 + seed, noise=noise, machine=0.5)
        found += verdicts(old, new)
    assert found.count("same") >= 0.98 * len(found)


@pytest.mark.parametrize("which", [(), (2,), (0, 3)], ids=["all rows", "one row", "two rows"])
def test_a_slow_down_of_15_percent_is_flagged(which):
    found, others = [], []
    for seed in range(100):
        changes = compare.changes(made_up_run(seed), made_up_run(1000 + seed, slow_down=1.15, which=which))
        for index, change in enumerate(changes):
            (others if which and index not in which else found).append(change.verdict)
    assert found.count("slower") >= 0.9 * len(found)
    assert others.count("same") >= 0.98 * len(others)


def test_a_speed_up_is_faster_and_no_regression():
    changes = compare.changes(made_up_run(3), made_up_run(4, slow_down=0.7))
    assert {change.verdict for change in changes} == {"faster"}
    assert not compare.regressions(changes, 10)


def test_a_noisy_run_has_a_wide_band():
    calm = compare.changes(made_up_run(5), made_up_run(6))
    noisy = compare.changes(made_up_run(5), made_up_run(6, noise=0.2))
    assert min(change.band for change in noisy) > 2 * max(change.band for change in calm)


def test_the_band_is_wider_where_the_machine_was_another():
    same = compare.changes(made_up_run(5), made_up_run(6))
    other = compare.changes(made_up_run(5), made_up_run(6, machine=0.5))
    for a, b in zip(same, other, strict=True):
        assert b.ratio == pytest.approx(a.ratio) and b.band > a.band + 0.1


def test_scatter_is_two_standard_deviations_and_ignores_a_few_that_changed():
    ratios = np.random.default_rng(0).normal(1, 0.05, 10001)
    assert compare.scatter(ratios.tolist()) == pytest.approx(0.1, rel=0.05)
    assert compare.scatter([1.0, 1.0, 1.0, 1.0, 1.3]) == 0
    assert compare.scatter([1.15]) == 0


def test_regressions_are_beyond_the_percentage_and_the_noise():
    changes = [
        compare.Change("noise", 1, 1.3, 0.4),
        compare.Change("small", 1, 1.04, 0.01),
        compare.Change("large", 1, 1.2, 0.05),
        compare.Change("faster", 1, 0.5, 0.05),
    ]
    assert [change.verdict for change in changes] == ["same", "slower", "slower", "faster"]
    assert [change.name for change in compare.regressions(changes, 10)] == ["large"]


def test_rows_are_matched_by_case_threads_and_path():
    old, new = made_up_run(7), made_up_run(8)
    old["rows"][0]["threads"] = 2
    old["rows"][1]["isa"] = "avx2"
    old["rows"][2]["error"] = "out of memory"
    old["machine"]["cpu"] = "another"
    changes = compare.changes(old, new)
    assert [change.name for change in changes] == [c.name for c in CASES[3:]]
    notes = "\n".join(compare.table(old, new, changes, "old.json").notes)
    assert f"not in the old run: {', '.join(c.name for c in CASES[:3])}" in notes
    assert "another cpu: another then" in notes


@pytest.mark.parametrize(("slow_down", "options", "status"), [
    (1.0, ["--fail-over", "10"], 0),
    (2.0, ["--fail-over", "10"], 1),
    (2.0, ["--fail-over", "300"], 0),
    (2.0, [], 0),
])  # fmt: skip
def test_exit_status_1_only_with_fail_over(slow_down, options, status, tmp_path, monkeypatch, capsys):
    path = tmp_path / "old.json"
    record.save(str(path), made_up_run(9))
    rng = np.random.default_rng(10)
    monkeypatch.setattr(runner, "run_job", lambda job, *_: made_up_row(rng, job.case, slow_down=slow_down))
    monkeypatch.setattr(cli, "choose", lambda *_: (CASES, []))
    assert cli.main(["bench", "--threads", "1", "--compare", str(path), *options]) == status
    printed = capsys.readouterr().out
    _, comparison = printed.split(f"Compared with {path}")
    slower = [line for line in comparison.splitlines() if line.startswith("1x8x") and line.endswith("slower")]
    assert len(slower) == (len(CASES) if slow_down > 1 else 0)


def test_fail_over_needs_something_to_compare_with(capsys):
    assert cli.main(["bench", "--fail-over", "10"]) == 2
    assert "--compare" in capsys.readouterr().err


# Pictures


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from qkv_fast.bench import plots

    run = made_up_run(11)
    rng = np.random.default_rng(12)
    run["rows"] += [record.row_data(made_up_row(rng, shape, threads=2)) for shape in (*CASES, COPY, STREAM)]
    run["rows"].append(record.row_data(Row(Job(STREAM, 1), error="out of memory")))
    drawn = list(plots.draw(run, str(tmp_path)))
    assert [path.name for path in drawn] == ["roofline.png", "peers.png", "scaling.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    figure = plots.roofline(run, [row for row in run["rows"] if not row["error"]], "the machine")
    assert "the machine" in figure.get_suptitle()
    key = figure.axes[-1].texts[-1].get_text()
    assert STREAM.name in key and COPY.name not in key  # it has no operations to be placed by
    for axes in figure.axes:
        assert "flop/B" in axes.get_xlabel() and "GF/s" in axes.get_ylabel()
    (axes,) = plots.bars(run, [row for row in run["rows"] if not row["error"]], "the machine").axes
    assert "copy" in axes.get_xlabel() and f"{COPY.name}, 2 thr" in [tick.get_text() for tick in axes.get_yticklabels()]


def test_a_run_of_copies_has_no_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    from qkv_fast.bench import plots

    run = made_up_run(13)
    run["rows"] = [record.row_data(made_up_row(np.random.default_rng(14), COPY))]
    assert run["rows"][0]["flops"] is None
    assert [path.name for path in plots.draw(run, str(tmp_path))] == ["peers.png"]


def test_a_run_without_rows_has_no_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from qkv_fast.bench import plots

    assert list(plots.draw(Outcome(["bench"]).data(), str(tmp_path))) == []


def test_plots_without_matplotlib_are_refused_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "--peers", "none", "--plot", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert "matplotlib" in output.err and "qkv-fast[bench]" in output.err and not output.out
