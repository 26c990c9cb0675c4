"""Saved runs: read back as they were written, compared with a noise band, drawn. Made-up samples, never real times."""

import json

import numpy as np
import pytest

import qkv_fast
from qkv_fast.bench import cli, compare, machine, record, runner, work
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
    seconds = slow_down * work.amount(shape) / (0.8 * limit) * np.exp(rng.normal(0, noise, rounds))
    peer = 1.5 * seconds * np.exp(rng.normal(0, noise, rounds))
    row = Row(Job(shape, threads), isa=qkv_fast.isa(), our_error=1e-7, memory={"qkv_fast": 1 << 20})
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
        assert row["amount"] == work.flops(shape) and row["limited_by"] == "float32"
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


TIMES = ("rows", 0, "seconds", "qkv_fast")


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("machine",), 5, "machine is 5"),
        (("rows",), 5, "rows is 5"),
        (("rows", 0), None, "rows[0]"),
        (("rows", 1, "case"), {}, "rows[1]: KeyError: 'name'"),
        (("rows", 0, "threads"), [1], "case, threads and isa"),
        (("rows", 0, "seconds"), {}, "KeyError: 'qkv_fast'"),
        (TIMES, [], "0 times and 7 limits"),
        (TIMES, [1e-3], "1 times and 7 limits"),
        ((*TIMES, 0), 0, "time 0 is not"),
        ((*TIMES, 6), -1e-3, "time -0.001 is not"),
        ((*TIMES, 0), "1", "time '1' is not"),
        ((*TIMES, 0), None, "time None is not"),
        ((*TIMES, 0), True, "time True is not"),
        ((*TIMES, 0), float("nan"), "time nan is not"),
        ((*TIMES, 0), float("inf"), "time inf is not"),
        ((*TIMES, 0), 10**400, "time 1000"),
        (("rows", 0, "limits", 3), [1e11], "not enough values"),
        (("rows", 0, "limits", 3, 1), 0, "limit 0 is not"),
        (("rows", 0, "amount"), 0, "amount 0 is not"),
    ],
)
def test_a_damaged_run_is_told_before_anything_is_timed(path, value, complaint, tmp_path, capsys):
    run = made_up_run(0)
    *way, last = path
    place = run
    for step in way:
        place = place[step]
    place[last] = value
    file = tmp_path / "old.json"
    file.write_text(json.dumps(run))  # record.save would not write a NaN
    assert cli.main(["bench", "--compare", str(file)]) == 2
    output = capsys.readouterr()
    assert f"{file}: damaged: " in output.err and complaint in output.err and not output.out


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


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_or_two_change_only_far_outside(count):
    """Noise between runs, here 8 %, does not show in so few; it must not be taken for a change, nor twice the time be
    taken for noise, wherever the rows' own noise lies."""

    def few(seed, slow_down):
        run = made_up_run(seed, slow_down, which=(0,), noise=0.01)
        return run | {"rows": run["rows"][:count]}

    drifted, doubled = [], []
    for seed in range(50):
        old = few(seed, 1.0)
        drifted += compare.changes(old, few(1000 + seed, 1.08))[:1]
        doubled += compare.changes(old, few(1000 + seed, 2.0))[:1]
    assert {change.verdict for change in drifted} == {"too few rows to tell"}
    assert not compare.regressions(drifted, 1)
    assert len(compare.regressions(doubled, 10)) == len(doubled)
    notes = "\n".join(compare.table(old, few(1000, 1.0), drifted[:1], "old.json").notes)
    assert "fewer than 3 rows" in notes and "1 too few rows to tell" in notes


def test_regressions_are_beyond_the_percentage_and_the_noise():
    changes = [
        compare.Change("noise", 1, 1.3, 0.4),
        compare.Change("small", 1, 1.04, 0.01),
        compare.Change("large", 1, 1.2, 0.05),
        compare.Change("faster", 1, 0.5, 0.05),
    ]
    assert [change.verdict for change in changes] == ["same", "slower", "slower", "faster"]
    assert [change.name for change in compare.regressions(changes, 10)] == ["large"]


def test_what_has_no_figure_is_a_regression():
    changes = [compare.Change("ratio", 1, float("nan"), 0.1), compare.Change("band", 1, 1.0, float("nan"))]
    assert [change.verdict for change in changes] == ["unknown", "unknown"]
    assert compare.regressions(changes, 1e6) == changes


def test_rows_are_matched_by_case_threads_and_path():
    old, new = made_up_run(7), made_up_run(8)
    old["rows"][0]["threads"] = 2
    old["rows"][1]["isa"] = "another"
    old["rows"][2]["error"] = "out of memory"
    old["machine"]["cpu"] = "another"
    changes = compare.changes(old, new)
    assert [change.name for change in changes] == [c.name for c in CASES[3:]]
    notes = "\n".join(compare.table(old, new, changes, "old.json").notes)
    here = f"1 thread, {qkv_fast.isa()}"
    old_only = f"{CASES[0].name} (2 threads, {qkv_fast.isa()}), {CASES[1].name} (1 thread, another)"
    assert f"finished in the old run only: {old_only}\n" in notes
    assert f"finished in this run only: {', '.join(f'{c.name} ({here})' for c in CASES[:3])}\n" in notes
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


def test_long_lists_of_rows_are_cut_and_say_so():
    keys = [(f"row{i}", 1, "avx2") for i in range(5)]
    assert compare.names(keys, most=2) == "row0 (1 thread, avx2), row1 (1 thread, avx2), and 3 more"
    assert compare.names([]) == "none"


@pytest.mark.parametrize("options", [[], ["--fail-over", "10"]], ids=["compare", "fail-over"])
@pytest.mark.parametrize("change", ["path", "no rows", "errors"])
def test_nothing_in_common_is_told_before_anything_is_timed(change, options, tmp_path, monkeypatch, capsys):
    old = made_up_run(9)
    for row in old["rows"]:
        row |= {"path": {"isa": "another"}, "errors": {"error": "out of memory"}}.get(change, {})
    if change == "no rows":
        old["rows"] = []
    path = tmp_path / "old.json"
    record.save(str(path), old)
    monkeypatch.setattr(cli, "choose", lambda *_: (CASES, []))
    assert cli.main(["bench", "--threads", "1", "--compare", str(path), *options]) == 2
    output = capsys.readouterr()
    assert f"no row in common with {path}" in output.err and not output.out
    assert f"its rows: {f'{CASES[0].name} (1 thread, another)' if change == 'path' else 'none'}" in output.err
    assert f"rows of this run: {CASES[0].name} (1 thread, {qkv_fast.isa()})" in output.err


@pytest.mark.parametrize(("stops", "status"), [(False, 2), (True, 130)], ids=["errors", "Ctrl-C"])
def test_nothing_in_common_in_the_end_is_told_too(stops, status, tmp_path, monkeypatch, capsys):
    def run_job(job, *_):
        if stops:
            raise KeyboardInterrupt
        return Row(job, isa=qkv_fast.isa(), error="out of memory")

    path = tmp_path / "old.json"
    record.save(str(path), made_up_run(9))
    monkeypatch.setattr(runner, "run_job", run_job)
    monkeypatch.setattr(cli, "choose", lambda *_: (CASES, []))
    assert cli.main(["bench", "--threads", "1", "--compare", str(path), "--fail-over", "10"]) == status
    output = capsys.readouterr()
    assert f"no row in common with {path}" in output.err and "rows of this run: none" in output.err


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
