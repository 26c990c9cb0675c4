"""What questions refuse says what was given; they leave their inputs alone, and stop where memory ends."""

import itertools

import numpy as np
import pytest
from _questions import ALL, RAGGED, ask
from _util import no_change, qkv, same_bits

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
    ],
    ids=str,
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
        (ValueError, "q, k, v must have 3 axes each", PACKED),
    ],
    ids=str,
)
def test_errors_of_packed_sequences(name, error, words, options):
    with pytest.raises(error, match=rf"^spotlight\.{name}: .*{words}"):
        ask(name, Q, K, **options)


def test_weights_are_not_for_packed_sequences():
    with pytest.raises(TypeError, match="unexpected keyword argument 'cu_seqlens_q'"):
        ask("weights", Q, K, **PACKED)


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
