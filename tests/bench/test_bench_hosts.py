"""What the benchmark knows of hosts. Nothing here depends on speed; what calls a host runs where it is installed."""

import os
from functools import partial

import pytest

from qkv_fast.bench import cli, hosts, measured, properties

ROWS = ("bert", "llama-prefill", "llama-decode", "adapters", "dask-workers")


def asked(name):
    return next(p for p in properties.PROPERTIES if p.name == name)


def test_hosts_is_a_suite(capsys):
    assert cli.main(["bench", "--list", "--suite", "hosts"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_host_that_is_not_installed(name, monkeypatch):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda host: None)
    (row,) = measured.measure(asked(name), 1.0, (1,))
    missing = "dask, distributed, zarr" if name == "dask-workers" else "torch, transformers"
    assert row.note == f"not installed: {missing}"


def test_rows_and_bounds(monkeypatch):
    samples = {"sdpa": [2.0, 2.2], "qkv_fast": [1.0, 1.1], "sdpa inside": [0.6, 0.6], "qkv_fast inside": [0.5, 0.5]}
    samples |= {"attention": [5e-6], "transformers": [14e-6], "torch": [21e-6]}
    samples |= {"1": [3.0], "2": [2.0], "grown": [1e6, 2**20 * 118.0], "block": [2e7]}
    monkeypatch.setattr(hosts, "need", lambda *modules: None)
    monkeypatch.setattr(hosts, "apart", lambda function, *arguments, environment: samples)
    found = {name: measured.measure(asked(name), 1.0, (2,)) for name in ROWS}
    assert [(x.value, x.floor, x.verdict) for x in found["bert"]] == [
        (2.0, 0.97, "ok"), (pytest.approx(1.2), 1.3, "below"), (2.0, 0.97, "ok"), (pytest.approx(1.2), None, ""),
    ]  # fmt: skip
    assert found["bert"][0].name == "BERT-base, 8x512, float32, 2 threads: speed over sdpa"
    assert found["llama-decode"][3].floor == 2.0
    assert [x.verdict for x in found["adapters"]] == ["ok", "below"] * 2
    assert [(x.verdict, x.unit) for x in found["dask-workers"]] == [("below", "x"), ("ok", "MB")]


@pytest.mark.filterwarnings("ignore")  # the host's own, about its future
@pytest.mark.parametrize("name", hosts.MODELS)
def test_models(name, monkeypatch):
    """Tiny ones, by both: the same results, and attention is part of the whole."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(hosts, "LLAMA", hosts.LLAMA | dict(hidden_size=32, intermediate_size=16))
    monkeypatch.setattr(hosts, "BERT", dict(hidden_size=24, intermediate_size=16))
    monkeypatch.setattr(hosts, "TOKENS", 3)
    for dtype in hosts.NEAR:
        found = hosts.models(name, dtype, 1, 0.0)
        assert {len(times) for times in found.values()} == {3}
        for whose in ("sdpa", "qkv_fast"):
            assert all(0 < a < b for a, b in zip(found[f"{whose} inside"], found[whose], strict=True))
    monkeypatch.setattr(hosts, "NEAR", {"float32": 0.0})
    with pytest.raises(hosts.Refused, match="ours is off by"):
        hosts.models(name, "float32", 1, 0.0)


def test_adapters(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(hosts, "interleave", partial(hosts.interleave, rounds=(1, 1)))
    found = hosts.adapters("bfloat16", 0.0)
    assert list(found) == ["attention", "transformers", "torch"] and all(x > 0 for (x,) in found.values())


def test_apart_from_this_process():
    assert hosts.apart(os.path.basename, "a/b", environment={}) == "b"


def test_workers(monkeypatch):
    for host in ("distributed", "zarr"):
        pytest.importorskip(host)
    monkeypatch.setattr(hosts, "SHAPE", (2, 128, 16))
    monkeypatch.setattr(hosts, "CHUNKS", (1, 64, 16))
    found = hosts.workers(0.0)
    assert len(found["1"]) == len(found["2"]) == 3 and found["block"] == [4 * 64 * 16 * 4 + 64 * 4]
    assert all(grown >= 0 for grown in found["grown"])
