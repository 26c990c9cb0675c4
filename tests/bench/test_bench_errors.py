"""The table of errors: its problems are what their names say, and a result that is off is seen."""

import numpy as np
import pytest

import qkv_fast
from qkv_fast.bench import cli, errors


def test_errors_is_a_suite(capsys):
    assert cli.main(["bench", "--list", "--suite", "errors"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(errors.MEASURES)


@pytest.mark.parametrize("kind", errors.ROWS.values())
def test_scores_are_as_large_as_said(kind):
    q, k, _, scale = errors.problem(10.0, 64, 1024, kind)
    assert np.std(q.astype(float) @ k.T.astype(float) * scale) == pytest.approx(10, rel=0.1)


def test_a_result_that_is_off(monkeypatch):
    within, *_ = errors.errors(3.0, 64, 64)
    attention = qkv_fast.attention
    monkeypatch.setattr(qkv_fast, "attention", lambda *args, **kw: attention(*args, **kw) * np.float32(1 + 1e-4))
    beyond, ours, numpys = errors.errors(3.0, 64, 64)
    assert within <= 1 < beyond and ours > 10 * numpys


def test_rows():
    rows = list(errors.measure("mixed", 1.0, (1,)))
    assert len(rows) == 8 and all(row.verdict == "ok" and "NumPy's" in row.note for row in rows)
    assert rows[0].name == "mixed, scores of 1, D 64, 1024 keys: largest error over the rule's"
