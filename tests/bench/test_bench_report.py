"""What the benchmark tells people: goals where they apply, legends, a verdict in words. The samples are made up."""

import json
import subprocess
import sys

import pytest

import qkv_fast
from qkv_fast.bench import (
    cases,
    cli,
    legend,
    machine,
    measured,
    properties,
    report,
    surroundings,
    tables,
    verdict,
    work,
)
from qkv_fast.bench.cases import case
from qkv_fast.bench.measured import Measured, Property
from qkv_fast.bench.method import Rounds
from qkv_fast.bench.runner import Job, Row
from qkv_fast.bench.selfcheck import Check
from qkv_fast.bench.worker import Ready

LARGE = case("1x12x2048", 64, isa=qkv_fast.isa(), goal=cases.Goal("peak", 0.9, 0.95))
SMALL = case("1x8x1", 64)


def row(shape, seconds=1e-3, limit=1e11, **peers):
    """A finished row of two equal rounds; `peers`: their times over ours."""
    times = {"qkv_fast": seconds, **{name: ratio * seconds for name, ratio in peers.items()}}
    found = Row(Job(shape, 2), isa=qkv_fast.isa(), our_error=1e-7)
    found.rounds = Rounds({name: [s, s] for name, s in times.items()}, [(limit, limit)] * 2)
    found.ready = {name: Ready("", "1", 2, 1e-7) for name in peers}
    return found


@pytest.fixture
def cpu(monkeypatch):
    """Says whether this CPU is of the kind that goals were measured on."""

    def be(reference):
        monkeypatch.setattr(machine, "is_reference", lambda: reference)

    return be


# Goals


def test_goals_are_judged_on_the_kind_of_cpu_that_they_are_from(cpu):
    slow = row(LARGE, seconds=work.flops(LARGE) / 5e10)  # half of the limit
    cpu(True)
    assert slow.verdict == "below"
    text = tables.as_text(report.speed_table([slow], [], "title"))
    assert "below" in text and "at least" in text and report.NOT_JUDGED not in text
    cpu(False)
    assert slow.verdict == "" and slow.goal is None
    text = tables.as_text(report.speed_table([slow], [], "title"))
    assert "below" not in text and "at least" not in text and "50.0" in text
    assert machine.REFERENCE in report.NOT_JUDGED and report.NOT_JUDGED in text
    assert report.NOT_JUDGED not in tables.as_text(report.speed_table([row(SMALL)], [], "title"))  # it has no goal


def test_bounds_of_properties_are_judged_there_too_and_some_everywhere(cpu):
    def figures(seconds, threads):
        yield Measured("figure", 3.0, "x", 2.0)
        yield Measured("shown", 3.0, "%")

    here, everywhere = Property("here", (), figures), Property("everywhere", (), figures, everywhere=True)
    cpu(False)
    found = measured.measure(here, 1.0, (1,))
    assert [m.verdict for m in found] == ["", ""]
    assert report.NOT_JUDGED in tables.as_text(report.measured_table(found))
    assert report.NOT_JUDGED not in tables.as_text(report.measured_table(found[1:]))  # it is held to nothing
    assert [m.verdict for m in measured.measure(everywhere, 1.0, (1,))] == ["below", ""]
    cpu(True)
    found = measured.measure(here, 1.0, (1,))
    assert [m.verdict for m in found] == ["below", ""]
    assert report.NOT_JUDGED not in tables.as_text(report.measured_table(found))


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "is_it"),
    [
        ("AuthenticAMD", "25", "fpu avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", "25", "fpu avx2", False),
        ("AuthenticAMD", "26", "fpu avx2 avx512f", False),
        ("GenuineIntel", "25", "fpu avx512f", False),
    ],
    ids=["Zen 4", "Zen 3", "Zen 5", "another's"],
)
def test_the_kind_of_cpu_is_told_by_its_family_and_flags(vendor, family, flags, is_it, monkeypatch):
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n"
    monkeypatch.setattr(machine, "first_cpu", machine.first_cpu.__wrapped__)
    monkeypatch.setattr(machine, "read", lambda path: text)
    assert machine.is_reference() == is_it
    monkeypatch.setattr(machine, "read", lambda path: "")
    assert not machine.is_reference()  # where the system says nothing, nothing is judged


# Legends


def test_the_legend_explains_the_names_and_columns_that_are_there():
    shown = [case("1x12x2048", 64, causal=True), case("1x32x1", 128, label="decode", kv_heads=8, kv_len=4096)]
    text = legend.of_names(shown)
    assert text.startswith("names: 1x12x2048-d64: batch 1, 12 heads, 2048 queries and as many keys, head dimension 64;")
    for part in ("-causal:", "-k4096: 4096 keys", "-kv8: 8 heads", "decode: "):
        assert part in text
    for part in ("-window", "-ragged", "@avx2", "float64"):
        assert part not in text
    assert "1 head, 1 query and" in legend.of_names([case("1x1x1", 8, dtype="float64")])
    assert "-f64: float64" in legend.of_names([case("1x1x1", 8, dtype="float64")])
    table = report.speed_table([row(shown[0])], [], "title")
    assert text.split(";")[0] in "\n".join(table.notes)
    assert "spread: interquartile range" in table.notes[-1] and "at least" not in table.notes[-1]


def test_every_label_of_a_case_has_a_meaning_or_is_a_model():
    labels = {c.name.split(":")[0].split("+")[0] for c in cases.CASES if ":" in c.name}
    assert labels <= {*legend.LABELS, "bert", "gpt2", "llama", "whisper", "vit"}


def test_one_round_has_no_spread():
    once = row(SMALL)
    once.rounds = Rounds({"qkv_fast": [1e-3]}, [(1e11, 1e11)])
    text = tables.as_text(report.speed_table([once], [], "title"))
    assert "1 round" in text and " 0 %" not in text
    assert "1 round" not in tables.as_text(report.speed_table([row(SMALL)], [], "title"))


def test_small_calls_have_a_rate():
    text = tables.as_text(report.speed_table([row(SMALL, seconds=5e-6)], [], "title"))
    assert "200 k calls/s" in text


def test_small_calls_have_their_place_in_the_pictures():
    pytest.importorskip("matplotlib")
    from qkv_fast.bench import plots, record

    rows = [record.row_data(found) for found in (row(LARGE, torch=2.0), row(SMALL, seconds=5e-6, torch=3.0))]
    assert [found["limited_by"] for found in rows] == ["float32", "calls"]
    run = {"machine": machine.identify(), "rows": rows, "limits": {"before": {"2": {"float32": 1e11, "read": 1e10}}}}
    figure = plots.roofline(run, rows, "the machine")
    assert SMALL.name in figure.axes[-1].texts[-1].get_text()
    shares, calls = plots.bars(run, rows, "the machine").axes
    assert "% of the limit" in shares.get_xlabel() and "calls per second" in calls.get_xlabel()
    assert [text.get_text() for text in calls.texts] == [" 200", " 66.7"]


# The verdict


def test_the_verdict_is_computed_from_the_rows():
    rows = [row(LARGE, numpy=6.04, torch=1.9), row(SMALL, numpy=2.1, torch=1.2)]
    assert verdict.sentence(rows) == (
        "On this CPU attention is 2.1 to 6 times as fast as NumPy and 1.2 to 1.9 times as fast as PyTorch;"
        " exact everywhere."
    )
    rows[1].failures["torch"] = "no"
    assert "1.9 times as fast as PyTorch;" in verdict.sentence(rows)
    rows[0].rounds.seconds["numpy"] = [0.0123, 0.0123]
    assert "2.1 to 12 times as fast as NumPy" in verdict.sentence(rows)


def test_the_verdict_says_what_was_wrong_or_left_out():
    fine, broken = row(LARGE, numpy=2.0), Row(Job(SMALL, 2), error="wrong answer", wrong=True)
    assert verdict.sentence([fine, broken]).endswith("NOT exact: 1 wrong answers.")
    failed = Check("avx2", "float32", "name", 2.0, "error 1, allowed 0.5")
    assert verdict.sentence([fine], [failed]).endswith("NOT exact: 1 failed checks.")
    broken.wrong = False
    assert verdict.sentence([fine, broken]).endswith("exact everywhere (1 of 2 workloads could not run).")
    assert verdict.sentence([broken]) == "" == verdict.sentence([])


def test_the_verdict_without_peers_is_about_the_limit():
    found = verdict.sentence([row(LARGE, seconds=work.flops(LARGE) / 6.2e10), row(SMALL)])
    assert found == "On this CPU attention reaches 62 % of what the machine can do; exact everywhere."
    assert "was timed; exact" in verdict.sentence([row(SMALL)])


@pytest.mark.parametrize("suite", ["quick", "small"])
def test_suite_quick_ends_with_a_verdict(suite, capsys):
    arguments = ["--suite", suite, "--case", "1x8x1-d64", "--peers", "none", "--seconds", "0.01"]
    assert cli.main(["bench", *arguments]) == 0
    assert ("On this CPU" in capsys.readouterr().out.splitlines()[-1]) == (suite == "quick")


# Surroundings


def test_surroundings_is_a_suite_of_properties(capsys):
    assert cli.main(["bench", "--list", "--suite", "surroundings"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["after-product", "gaps", "block"]
    assert all(p.everywhere == (p.name != "block") for p in properties.PROPERTIES if "surroundings" in p.suites)


def test_figures_of_surroundings_come_from_processes_of_their_own(monkeypatch):
    asked = []

    def apart(function, *arguments, environment):
        asked.append((function.__name__, arguments, environment))
        names = {
            "after_product": {"product": [3.0, 3.0], "pause": [2.0, 2.0]},
            "gaps": {f"{gap} {n}": [float(n)] * 2 for gap in surroundings.GAPS for n in (1, 2)},
            "block": {"block": [4.0, 4.0], "inside": [1.0, 1.0], "alone": [0.5, 0.5]},
        }
        return names[function.__name__]

    monkeypatch.setattr(surroundings, "apart", apart)
    products = list(surroundings.measure_after_product(1.0, (2,)))
    assert [(m.value, m.floor, m.verdict) for m in products] == [(1.5, 1.55, "ok"), (1.5, 1.1, "below")]
    assert [environment for *_, environment in asked] == [{}, {"OPENBLAS_THREAD_TIMEOUT": "4"}]
    assert [m.value for m in surroundings.measure_gaps(1.0, (1, 2))] == [2.0] * 3
    assert list(surroundings.measure_gaps(1.0, (1,))) == []
    blocks = list(surroundings.measure_block(1.0, (2,)))
    assert len(blocks) == 4 and {(m.value, m.unit, m.verdict) for m in blocks} == {(25.0, "%", "")}
    assert "attention 1 s in it, 500 ms in a loop" in blocks[0].note


def test_what_runs_apart_runs():
    """Each of the three in its own process, as short as it gets: times by name, a list of as many rounds for each."""
    code = """
import json
from qkv_fast.bench import surroundings
surroundings.QUIET, surroundings.CALLS, surroundings.GAP_CALLS, surroundings.LEAST_ROUNDS = 0.0, 1, 1, 2
calls = (surroundings.after_product, (2,)), (surroundings.gaps, (2,)), (surroundings.block, (1, 8, 2, 4, 2))
print(json.dumps([function(*arguments, 0.0) for function, arguments in calls]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    product, gaps, block = json.loads(done.stdout)
    assert set(product) == {"product", "pause"} and set(block) == {"block", "inside", "alone"}
    assert set(gaps) == {f"{gap} {n}" for gap in surroundings.GAPS for n in (1, 2)}
    assert all(len(times) == 2 and min(times) > 0 for found in (product, gaps, block) for times in found.values())
    alone = surroundings.apart(surroundings.gaps, 1, 0.0, environment={"QKV_FAST_ISA": "portable"})
    assert set(alone) == {f"{gap} 1" for gap in surroundings.GAPS}
