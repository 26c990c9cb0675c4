"""What the benchmark knows of calls and their plain twins. Nothing here depends on speed."""

from functools import partial

import numpy as np
import pytest

from qkv_fast.bench import cases, cli, machine, measured, surprises
from qkv_fast.bench.method import Refused


@pytest.mark.parametrize("kind", surprises.TWINS)
def test_twins_have_one_result(kind):
    """As far as it is one problem; else all the same every call is made."""
    if kind == "softmax-halves":
        pytest.importorskip("ml_dtypes")
    pairs = list(surprises.TWINS[kind](1))
    for twins in pairs:
        twins.check()
        for call in (twins.plain, *(call for call, _ in twins.others.values())) if twins.within is None else ():
            call()
    names = [name for twins in pairs for name in twins.others]
    assert len(set(names)) == len(names) and all(0 < most <= 2 for t in pairs for _, most in t.others.values())


def test_a_wrong_result_is_refused():
    right, wrong = partial(np.zeros, 3), partial(np.full, 3, np.nan)
    surprises.Twins(right, {"it": (right, 1.0)}, 0.0).check()
    surprises.Twins(right, {"it": (wrong, 1.0)}).check()
    with pytest.raises(Refused, match="it: the result is off by nan"):
        surprises.Twins(right, {"it": (wrong, 1.0)}, 1.0).check()


def test_times_are_over_the_twin(monkeypatch):
    waits = surprises.Twins(partial(np.arange, 10), {"long": (partial(np.arange, 10**6), 2.0)})
    monkeypatch.setitem(surprises.TWINS, "waits", lambda threads: iter([waits]))
    found = list(surprises.measure("waits", 1e-3, (1, 2)))
    assert [x.name for x in found] == ["long, 1 thread", "long, 2 threads"]
    assert all(x.value > 2 and x.verdict == "below" and "plain" in x.note for x in found)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_bounds_of_intel_are_judged_there(vendor, monkeypatch):
    monkeypatch.setattr(machine, "first_cpu", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(surprises, "STREAM_BYTES", 1)
    monkeypatch.setattr(surprises, "LONG", 100)
    found = list(surprises.measure_bandwidth(1e-3, (1,)))
    pytest.importorskip("ml_dtypes")
    found += surprises.measure_halves(1e-3, (1,))
    assert [x.more for x in found] == [True, True, False] and all(x.value > 0 for x in found)
    if vendor == "GenuineIntel":
        assert [x.floor for x in found] == [75, 55, 1.02] and not any(x.note for x in found)
    else:
        assert [x.note for x in found] == [f"asked of Intel: {bound}" for bound in ("75 %", "55 %", "1.02 x")]
        assert all(x.floor is None for x in found)


def test_windows_of_a_shifted_grid_have_parts():
    ids = surprises.shifted_windows(2, 3, 4)
    assert ids.shape == (18, 16) and (ids[:9] == ids[9:]).all()
    assert [len(set(window)) for window in ids[:9]] == [1, 1, 2, 1, 1, 2, 2, 2, 4]


def test_surprises_is_a_suite(capsys):
    assert cli.main(["bench", "--list", "--suite", "surprises"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    short = [c.name for c in cases.select("surprises")]
    assert listed == [*short, *surprises.TWINS, "cache-bandwidth", "cache-halves"] and len(short) == 4
    (broken,) = measured.measure(measured.Property("x", (), partial(surprises.measure, "nothing")), 1.0, (1,))
    assert "KeyError" in broken.note
