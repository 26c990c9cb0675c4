"""What questions refuse says what was given; they leave their inputs alone, and stop where memory ends."""

import itertools
import re
import sys

import numpy as np
import pytest
from _questions import ALL, RAGGED, arrays_of, ask
from _util import child_says, no_change, qkv, same_bits

import qkv_fast
from qkv_fast import spotlight
from qkv_fast._runtime import fail_allocation, trim

Q, K, _ = qkv(0, batch=(2,), heads=(4, 2), lengths=(5, 9))
LSE, OUT = np.zeros((2, 4, 5), "f4"), np.zeros((2, 4, 5, 16), "f4")
PACKED = dict(cu_seqlens_q=[0, 5], cu_seqlens_k=[0, 9])


@pytest.mark.parametrize(
    "name, error, words, options",
    [
        ("top_keys", ValueError, "n must be at least 1, got 0", dict(n=0)),
        ("top_keys", ValueError, "n must be at least 1, got -3", dict(n=-3)),
        ("top_keys", TypeError, "n must be an integer, got 2.0", dict(n=2.0)),
        ("top_keys", TypeError, "n must be an integer, got True", dict(n=True)),
        ("top_keys", TypeError, "n must be an integer, got None", dict(n=None)),
        ("received", ValueError, r"lse must have the shape \(2, 4, 5\), got .*\(2, 4, 4\)", dict(lse=LSE[..., 1:])),
        ("received", TypeError, "lse must be float32, .* got float64", dict(lse=LSE.astype("f8"))),
        ("received", ValueError, r"queries must be in -5..4, got 5", dict(queries=[0, 5])),
        ("received", ValueError, r"queries must be in -5..4, got -6", dict(queries=[-6])),
        ("received", ValueError, r"queries must have one axis, got shape \(1, 1\)", dict(queries=[[0]])),
        ("received", TypeError, "queries must be a slice or integers, got float64", dict(queries=[0.0])),
        ("weights", ValueError, r"keys must be in -9..8, got 9", dict(keys=[9])),
        ("weights", TypeError, "keys must be a slice or integers, got bool", dict(keys=[True])),
        ("weights", ValueError, r"lse must have the shape", dict(lse=LSE[0])),
        ("influence", ValueError, r"lse must have the shape \(2, 4, 5\), got .*\(4, 5\)", dict(lse=LSE[0])),
        ("influence", TypeError, "lse must be float32, .* got float64", dict(lse=LSE.astype("f8"))),
        ("influence", ValueError, r"output must have the shape .*, got .*\(4, 5, 16\)", dict(output=OUT[0])),
        ("influence", TypeError, "output must be float32, .* got float64", dict(output=OUT.astype("f8"))),
        ("influence", TypeError, "output must be float32, .* got bool", dict(output=OUT > 0)),
        ("received", TypeError, "queries must be a slice of integers, got slice", dict(queries=slice(0.5))),
        ("pooled", ValueError, r"shape must be at least 1 in each axis, got \(0, 8\)", dict(shape=(0, 8))),
        ("pooled", ValueError, r"shape must be at least 1 in each axis, got \(8, -1\)", dict(shape=(8, -1))),
        ("pooled", ValueError, r"shape must be two integers, .*, got \(1, 2, 3\)", dict(shape=(1, 2, 3))),
        ("pooled", TypeError, "shape must be two integers, .*, got 256", dict(shape=256)),
        ("pooled", TypeError, r"shape must be two integers, .*, got \(2.0, 2\)", dict(shape=(2.0, 2))),
        ("pooled", TypeError, r"shape must be two integers, .*, got \(2, True\)", dict(shape=(2, True))),
        ("pooled", ValueError, "reduce must be 'mean' or 'max', got 'sum'", dict(reduce="sum")),
        ("pooled", TypeError, "reduce must be 'mean' or 'max', got None", dict(reduce=None)),
        ("pooled", ValueError, r"lse must have the shape", dict(lse=LSE[0])),
        ("top_keys", TypeError, r"n must be an integer, got .* of shape \(2, 2, 9, 16\); was it v\? Only", dict(n=K)),
        ("pooled", TypeError, r"shape must be .*, got .* of shape \(2, 2, 9, 16\); was it v\? Only", dict(shape=K)),
        ("top_keys", TypeError, r"n must be an integer, got \[\[\[.{57} …$", dict(n=K.tolist())),
        ("top_keys", OverflowError, r"a result of shape \(2, 4, 5, 9223372036854775808\) is too", dict(n=2**63)),
        ("received", ValueError, r"queries must have one axis, got shape \(\); pass queries=\[3\]", dict(queries=3)),
        ("weights", TypeError, r"keys must be .* got bool; pass numpy.flatnonzero\(keys\)", dict(keys=[True] * 9)),
        ("weights", ValueError, "keys must be a slice whose step is not 0, got", dict(keys=slice(None, None, 0))),
        ("received", TypeError, r"lse is a masked .*; pass lse.filled\(-numpy.inf\)", dict(lse=np.ma.array(LSE))),
    ],
    ids=lambda x: str(x)[:60],
)
def test_arguments_of_their_own(name, error, words, options):
    with pytest.raises(error, match=rf"^spotlight\.{name}: {words}"):
        ask(name, Q, K, **options)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "error, words, options",
    [
        (TypeError, "mask must be bool", dict(mask=np.zeros((5, 9)))),
        (ValueError, "layout must be 'bhld' or 'blhd'", dict(layout="hbld")),
        (ValueError, "'top-left' means q_offset=0", dict(causal="top-left", q_offset=1)),
        (TypeError, "unexpected keyword argument 'is_causal'; here it is causal=", dict(is_causal=True)),
    ],
    ids=str,
)
def test_errors_are_attentions(name, error, words, options):
    with pytest.raises(error, match=rf"^spotlight\.{name}(\(\))?:? .*{words}"):
        ask(name, Q, K, **options)


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize(
    "error, words, options",
    [
        (TypeError, "packed sequences need both", dict(cu_seqlens_q=[0, 5])),
        (ValueError, "take no layout, got 'blhd'", dict(PACKED, layout="blhd")),
        (ValueError, "q, k(, v)? must have 3 axes each", PACKED),
    ],
    ids=str,
)
def test_errors_of_packed_sequences(name, error, words, options):
    with pytest.raises(error, match=rf"^spotlight\.{name}: .*{words}"):
        ask(name, Q, K, **options)


@pytest.mark.parametrize("name", ["weights", "pooled"])
def test_the_matrix_is_not_for_packed_sequences(name):
    message = "unexpected keyword argument 'cu_seqlens_q'; .* ask for each of them, with layout='blhd'$"
    with pytest.raises(TypeError, match=rf"^spotlight\.{name}\(\).* {message}"):
        ask(name, Q, K, **PACKED)


@pytest.mark.parametrize("name", ALL)
def test_arguments_of_other_questions(name):
    """They say whose they are."""
    own = dict(received="lse queries", weights="lse queries keys", pooled="lse", influence="lse output groups v")
    words = dict(lse="received, weights", output="influence", queries="received and", keys="weights", v="influence")
    for word in words.keys() - set(own.get(name, "").split()):
        message = f"got an unexpected keyword argument '{word}'; {words[word]}.* take"
        with pytest.raises(TypeError, match=rf"^spotlight\.{name}\(\) {message}"):
            getattr(spotlight, name)(*arrays_of(name, Q, K), **{word: 1})


@pytest.mark.parametrize("name", sorted({*ALL} - {"influence"}))
def test_no_error_speaks_of_values(name):
    """Which questions about weights do not have."""
    odd = (Q, K[..., 1:]), (Q[:, :3], K), (Q[0, 0], K), (Q[0], K), (Q, K.astype("f8")), (Q, np.repeat(K[:1], 3, axis=0))
    for q, k in odd:
        with pytest.raises((TypeError, ValueError)) as error:
            ask(name, q, k)
        assert not re.search(r"\bv\b", str(error.value)), error.value


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_types(name):
    odd = (Q, K[..., 1:]), (Q[:, :3], K), (Q[0, 0], K), (Q, K.astype("f8")), (Q.astype(int), K), (Q, np.float32(1))
    for q, k in odd:
        with pytest.raises((TypeError, ValueError), match=rf"^spotlight\.{name}: "):
            ask(name, q, k)


def test_packed_sequences_have_no_common_queries():
    with pytest.raises(ValueError, match="packed sequences take no queries"):
        spotlight.received(Q[0].swapaxes(0, 1), K[0].swapaxes(0, 1), queries=[0], **PACKED)


@pytest.mark.parametrize("name", ALL)
def test_explain_has_no_plan_of_a_question(name):
    with pytest.raises(TypeError, match=f"^explain: a function must be one of .*, got <function {name} "):
        qkv_fast.explain(getattr(spotlight, name), Q, K)


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_left_alone(name):
    mask, sinks = np.ones((5, 9), bool), np.zeros(4)
    with no_change(Q, K, mask, sinks):
        ask(name, Q, K, mask=mask, sinks=sinks)


@pytest.mark.alone
@pytest.mark.parametrize("name", ALL)
def test_no_memory(name):
    """Whichever allocation fails, a MemoryError; the next call is right."""
    q, k, _ = qkv(1, batch=(2,), heads=(4, 2), lengths=(300, 900))
    options = dict(mask=np.ones((300, 900), bool), num_threads=2)
    whole = ask(name, q, k, **options)
    for n in itertools.count():
        trim()
        with fail_allocation(n) as allocations:
            try:
                got = ask(name, q, k, **options)
            except MemoryError:
                got = None
            count = allocations.count
        same_bits(ask(name, q, k, **options), whole)
        if got is not None:
            same_bits(got, whole)
            break
    assert count <= n and n >= 3  # two threads, and what they share


@pytest.mark.alone
@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_memory(name):
    """At 8 heads and 32k keys a question takes 32 MB beside its answer, at most."""
    code = f"""
import resource, numpy as np
from qkv_fast import spotlight
q, k = np.random.default_rng(0).standard_normal((2, 8, 32768, 16), dtype=np.float32)
def ask(n):
    options = dict(queries=slice(-32, None)) if "{name}" == "weights" else dict()
    arrays = [q[:, :n], k[:, :n], k[:, :n]][:3 if "{name}" == "influence" else 2]
    answer = spotlight.{name}(*arrays, causal=True, num_threads=2, **options)
    return sum(x.nbytes for x in (answer if type(answer) is tuple else (answer,)))
def size():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ask(1000)
before = size()
print(ask(32768), before, size())
"""
    pytest.importorskip("resource", reason="the process size is read through a POSIX module")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    nbytes, before, after = map(int, child_says(code, timeout=300).split())
    assert (after - before) * unit - nbytes < 32 << 20
