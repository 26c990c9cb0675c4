"""Bad masks, biases, segments, slopes, sinks, caps and packed batches: which exception, naming what was given."""

import re

import numpy as np
import pytest
from _util import no_change, normal, qkv

import qkv_fast
from qkv_fast import _runtime

Q, K, V, OUT = (2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6), (2, 4, 5, 6)
OBJECT = pytest.param(object(), id="object")  # whose name would be an address
LOGITS = (2, 4, 5, 9)


def arrays():
    rng = np.random.default_rng(1)
    return [normal(rng, shape) for shape in (Q, K, V)]


def says(error, call, *words):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, f"{type(caught.value)} is a subclass of its own"
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", str(caught.value)), (word, str(caught.value))


def refuses(error, *words, **options):
    """attention, explain and out= alike; nothing is written."""
    given, out = arrays(), np.full(OUT, 7, "float32")
    with no_change(*given, out):
        says(error, lambda: qkv_fast.attention(*given, out=out, **options), "attention", *words)
        says(error, lambda: qkv_fast.explain(*given, **options), *words)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i4", "u1", "i8"])
def test_masks_of_numbers(dtype):
    """Both readings are named: added to scores, or True where not 0."""
    refuses(TypeError, "mask", "bool", np.dtype(dtype), "True", "bias", "astype(bool", mask=np.zeros(LOGITS, dtype))


@pytest.mark.parametrize(
    "bad", [np.zeros(LOGITS, object), np.zeros(LOGITS, "c8"), "text", 3, [[0, 1]], np.zeros(LOGITS, "U1"), [None]]
)
def test_masks_of_other_kinds(bad):
    refuses(TypeError, "mask", "bool", mask=bad)


@pytest.mark.parametrize("dtype", ["i4", "u1", "?", "O", "c8", "g", "U1"])
def test_biases_of_other_kinds(dtype):
    words = ["mask"] if dtype in "i4u1?" else []
    refuses(TypeError, "bias", "float32", "float64", np.dtype(dtype), *words, bias=np.zeros(LOGITS, dtype))


def test_16_bits():
    """A bias of either type is what its numbers are in float32; so are slopes."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        bias = np.random.default_rng(1).standard_normal(LOGITS).astype(dtype)
        got = qkv_fast.attention(*arrays(), bias=bias)
        np.testing.assert_array_equal(got, qkv_fast.attention(*arrays(), bias=bias.astype(np.float32)))
    slopes = np.array([0.5, 0.25, 1, 2], ml_dtypes.bfloat16)
    got = qkv_fast.attention(*arrays(), alibi_slopes=slopes, sinks=slopes)
    np.testing.assert_array_equal(
        got, qkv_fast.attention(*arrays(), alibi_slopes=slopes.tolist(), sinks=slopes.tolist())
    )


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_masked_arrays_and_matrices(name):
    dtype = bool if name == "mask" else "f4"
    refuses(TypeError, name, "masked", **{name: np.ma.masked_array(np.zeros((5, 9), dtype))})
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.asmatrix(np.zeros((5, 9), dtype))
    refuses(TypeError, name, "matrix", **{name: matrix})
    refuses(ValueError, name, **{name: [[True], [True, False]]})


@pytest.mark.parametrize(
    "shape",
    [(5, 8), (4, 9), (9, 5), (3, 5, 9), (4, 1, 9, 5), (3, 1, 5, 9), (1, 2, 4, 5, 9), (2, 2, 4, 5, 9), (0,), (2,)],
)
def test_shapes(shape):
    """They broadcast to the scores and do not enlarge them."""
    refuses(ValueError, "mask", shape, LOGITS, mask=np.zeros(shape, bool))
    refuses(ValueError, "bias", shape, LOGITS, bias=np.zeros(shape, "f4"))


def test_one_per_sequence():
    """(B, Lq, Lk) is read as heads: the message says how to make it one per sequence, and that works."""
    for shape in ((2, 5, 9), (2, 1, 9), (2, 5, 1)):
        mask, bias = np.ones(shape, bool), np.zeros(shape, "f4")
        refuses(ValueError, "mask[:, None", shape, mask=mask)
        refuses(ValueError, "bias[:, None", shape, bias=bias)
        qkv_fast.attention(*arrays(), mask=mask[:, None], bias=bias[:, None])
    q, k, v = (x.reshape(1, 2, *x.shape[1:]) for x in arrays())
    for shape in ((1, 2, 5, 9), (2, 5, 9)):
        mask = np.ones(shape, bool)
        hint = "mask[..., None, :, :" if len(shape) > 3 else "mask[None, ..., None, :, :"
        says(ValueError, lambda mask=mask, hint=hint: qkv_fast.attention(q, k, v, mask=mask), hint)
        qkv_fast.attention(q, k, v, mask=mask.reshape(1, 2, 1, 5, 9))


def test_padding_of_keys():
    """(B, Lk) is read as (Lq, Lk): likewise."""
    mask, bias = np.ones((2, 9), bool), np.zeros((2, 9), "f4")
    refuses(ValueError, "mask[:, None, None", (2, 9), mask=mask)
    refuses(ValueError, "bias[:, None, None", (2, 9), bias=bias)
    qkv_fast.attention(*arrays(), mask=mask[:, None, None], bias=bias[:, None, None])
    q, k, v = (x.reshape(1, 2, *x.shape[1:]) for x in arrays())
    mask = mask[None]
    says(ValueError, lambda: qkv_fast.attention(q, k, v, mask=mask), "mask[..., None, None, :")
    qkv_fast.attention(q, k, v, mask=mask[..., None, None, :])


def test_advice_can_be_typed():
    refuses(TypeError, "mask.filled(False", mask=np.ma.masked_array(np.ones((5, 9), bool)))
    refuses(TypeError, "bias.filled(0", bias=np.ma.masked_array(np.ones((5, 9), "f4")))
    for i, masked in enumerate(((np.ma.zeros(5, int), IDS[1]), (IDS[0], np.ma.zeros(9, int)))):
        refuses(TypeError, f"pass segments[{i}].filled(0", segments=masked)
    q, k, v = (x[0, 0] for x in arrays())
    with pytest.raises(ValueError, match=r"query ids of shape \(5,\), got \(4,\)"):
        qkv_fast.attention(q, k, v, segments=(np.zeros(4, int), IDS[1]))


def test_two_dimensions():
    q, k, v = (x[0] for x in qkv(2, lengths=(5, 9)))
    for shape in ((1, 5, 9), (2, 5, 9), (9, 5), (5, 1, 1)):
        mask = np.ones(shape, bool)
        says(ValueError, lambda mask=mask: qkv_fast.attention(q, k, v, mask=mask), "mask", shape, (5, 9))
    for name in ("alibi_slopes", "sinks"):
        says(ValueError, lambda name=name: qkv_fast.attention(q, k, v, **{name: [1.0, 2.0]}), name, "(1,", "(2,")


IDS = np.zeros(5, int), np.zeros(9, int)


@pytest.mark.parametrize("bad", [np.zeros((2, 5), int), 3, "ab", {0: IDS}, np.zeros(14, int), IDS[0]], ids=repr)
def test_segments_that_are_no_pair(bad):
    refuses(TypeError, "segments", "pair", type(bad).__name__, segments=bad)


@pytest.mark.parametrize("bad", [(), IDS[:1], (*IDS, IDS[0])], ids=len)
def test_segments_of_another_number(bad):
    refuses(ValueError, "segments", "pair", len(bad), segments=bad)


@pytest.mark.parametrize("shape", [(), (4,), (9,), (3, 5), (1, 2, 5), (5, 1), (2, 4, 5)], ids=str)
def test_query_ids_of_wrong_length(shape):
    refuses(ValueError, "segments", "query", shape, "(5,", segments=(np.zeros(shape, int), IDS[1]))


@pytest.mark.parametrize("shape", [(), (5,), (10,), (3, 9), (1, 2, 9)], ids=str)
def test_key_ids_of_wrong_length(shape):
    refuses(ValueError, "segments", "key", shape, "(9,", segments=(IDS[0], np.zeros(shape, int)))


@pytest.mark.parametrize("dtype", ["f4", "?", "O", "U1", "c8"])
def test_kinds_of_ids(dtype):
    refuses(TypeError, "segments", "query", np.dtype(dtype), segments=(np.zeros(5, dtype), IDS[1]))
    refuses(TypeError, "segments", "key", np.dtype(dtype), segments=(IDS[0], np.zeros(9, dtype)))


def test_ids_that_overflow():
    refuses(OverflowError, "segments", 2**63, segments=(np.full(5, 2**63, "u8"), IDS[1]))


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_one_per_head(name):
    for shape in ((), (2,), (5,), (1,), (4, 1), (1, 4), (2, 4), (0,)):
        refuses(ValueError, name, "(4,", shape, **{name: np.zeros(shape)})
    for bad in (np.zeros(4, "c8"), np.zeros(4, object), "text", [None] * 4, np.zeros(4, bool), np.zeros(4, "V4")):
        refuses(TypeError, name, **{name: bad})
    for bad in (np.nan, np.inf):
        refuses(ValueError, name, bad, **{name: [0.0, bad, 1.0, 2.0]})
    if name == "alibi_slopes":
        refuses(ValueError, name, -np.inf, alibi_slopes=[0.0, 1.0, 2.0, -np.inf])


@pytest.mark.parametrize("bad", [0, -1, 0.0, -0.5, np.nan, np.inf, -np.inf, np.float32(0)], ids=repr)
def test_caps_out_of_range(bad):
    refuses(ValueError, "softcap", repr(bad).replace("np.float32(", "").rstrip(")"), softcap=bad)


@pytest.mark.parametrize("bad", ["1", 1j, [1.0], True, np.array([1.0]), (1,), OBJECT], ids=str)
def test_caps_of_other_kinds(bad):
    refuses(TypeError, "softcap", softcap=bad)


def test_two_readings_of_alibi():
    """It needs positions, as causal does."""
    slopes = qkv_fast.alibi_slopes(4)
    refuses(ValueError, "kv_lengths", "alibi_slopes", "q_offset=0", kv_lengths=[9, 3], alibi_slopes=slopes)
    qkv_fast.attention(*arrays(), kv_lengths=[9, 3], alibi_slopes=slopes, q_offset=0)
    qkv_fast.attention(*arrays(), kv_lengths=[9, 0], alibi_slopes=slopes)


@pytest.mark.parametrize("bad", [0, -3, 2.0, "4", True, None, [4]], ids=repr)
def test_numbers_of_heads(bad):
    error = ValueError if isinstance(bad, int) and not isinstance(bad, bool) else TypeError
    says(error, lambda: qkv_fast.alibi_slopes(bad), "alibi_slopes", "num_heads", repr(bad))


def packed(**changes):
    """A packed call of two sequences that would be right but for these changes."""
    rng = np.random.default_rng(3)
    given = dict(q=normal(rng, (5, 4, 8)), k=normal(rng, (9, 2, 8)), v=normal(rng, (9, 2, 6)))
    given |= dict(cu_seqlens_q=[0, 2, 5], cu_seqlens_k=[0, 9, 9], return_lse=True) | changes
    return qkv_fast.attention_varlen(**given)


@pytest.mark.parametrize("name, total", [("cu_seqlens_q", 5), ("cu_seqlens_k", 9)])
def test_starts(name, total):
    packed()
    for bad, words in (
        ([1, 2, total], (1,)),
        ([-1, 2, total], (-1,)),
        ([0, 4, 3, total], (4, 3)),
        ([0, 2, total - 1], (total, total - 1)),
        ([0, 2, total + 1], (total, total + 1)),
        ([0, 2, 2**40], (total, 2**40)),
        ([], ("(0,",)),
        (0, ("(",)),
        ([[0, 2, total]], ("(1, 3",)),
    ):
        kind = np.asarray(bad, int)
        says(ValueError, lambda kind=kind: packed(**{name: kind}), "attention_varlen", name, *words)
    for bad in ([0.0, 2.0, total], "text", [False, True], None, [0, None]):
        says(TypeError, lambda bad=bad: packed(**{name: bad}), "attention_varlen", name)


def test_starts_that_differ():
    says(ValueError, lambda: packed(cu_seqlens_q=[0, 5]), "cu_seqlens_q", "cu_seqlens_k", 2, 3)


def test_packed_shapes():
    rng = np.random.default_rng(4)
    wrong = [("q", (1, 5, 4, 8)), ("k", (9, 8)), ("q", (5, 4, 7)), ("k", (8, 2, 8)), ("v", (9, 1, 6)), ("q", (5, 3, 8))]
    for name, shape in wrong:
        says(ValueError, lambda name=name, shape=shape: packed(**{name: normal(rng, shape)}), "attention_varlen", shape)
    for name in "qkv":
        says(TypeError, lambda name=name: packed(**{name: np.zeros((5, 4, 8), int)}), "attention_varlen", name)
        says(TypeError, lambda name=name: packed(**{name: np.ma.zeros((5, 4, 8))}), "attention_varlen", name)
    says(TypeError, lambda: packed(v=np.zeros((9, 2, 6))), "k", "v", "float64")
    says(ValueError, lambda: packed(out=np.zeros((5, 4, 8), "f4")), "attention_varlen", "out", (5, 4, 6))
    says(TypeError, lambda: packed(out=np.zeros((5, 4, 6))), "attention_varlen", "out", "float64")
    says(TypeError, lambda: packed(layout="bhld"), "layout")


def test_packed_arguments():
    """Errors name the function; shapes are those of the sequences."""
    for options, words in (
        (dict(mask=np.zeros((4, 3, 8), bool)), ("mask", (4, 3, 8), (2, 4, 3, 9))),
        (dict(mask=np.zeros((2, 3, 9), bool)), ("mask[:, None",)),
        (dict(bias=np.zeros((2, 4, 3, 8))), ("bias", (2, 4, 3, 8))),
        (dict(segments=(np.zeros(4, int), IDS[1])), ("segments", "query", "(4,", "(5,")),
        (dict(segments=(IDS[0], np.zeros((2, 9), int))), ("segments", "key", (2, 9))),
        (dict(kv_lengths=[9, 1]), ("kv_lengths", 1)),
        (dict(kv_lengths=[-1, 0]), ("kv_lengths", -1)),
        (dict(kv_lengths=[9, 0, 0]), ("kv_lengths", "(3,")),
        (dict(kv_lengths=[1, 0], causal=True), ("kv_lengths", "q_offset=0")),
        (dict(q_offset=[1, 2, 3]), ("q_offset", "(3,")),
        (dict(causal="bottom"), ("causal", "'bottom'")),
        (dict(causal="top-left", q_offset=1), ("causal", "q_offset")),
        (dict(window=-1), ("window", -1)),
        (dict(scale=np.nan), ("scale", "nan")),
        (dict(softcap=0.0), ("softcap", 0.0)),
        (dict(sinks=[1.0]), ("sinks", "(1,")),
        (dict(alibi_slopes=np.ones(3)), ("alibi_slopes", "(3,")),
        (dict(num_threads=0), ("num_threads", 0)),
    ):
        says(ValueError, lambda options=options: packed(**options), "attention_varlen", *words)
    says(TypeError, lambda: packed(mask=np.zeros((3, 9))), "attention_varlen", "mask", "bias")
    says(TypeError, lambda: packed(bias=np.zeros((3, 9), int)), "attention_varlen", "bias", "mask")
    says(OverflowError, lambda: packed(q_offset=2**61), "attention_varlen", "q_offset")


@pytest.mark.usefixtures("isa")
def test_every_allocation_may_fail():
    """Copies of masks, of biases, of ids, and what packed sequences share: MemoryError, and the next call is right."""
    rng = np.random.default_rng(5)
    q, k, v = qkv(5, heads=(4, 2), lengths=(40, 2500))
    options = dict(
        mask=np.asfortranarray(rng.random((40, 2500)) < 0.5), bias=rng.random((40, 2500)).astype(">f4"),
        segments=(rng.integers(0, 2, 40), rng.integers(0, 2, 2500)), alibi_slopes=[1, 2, 3, 4], sinks=[1, 2, 3, 4],
    )  # fmt: skip

    def masked():
        return qkv_fast.attention(q, k, v, num_threads=2, **options)

    for call in (masked, packed):
        expected, failures = call(), 0
        while True:
            _runtime.trim()
            with _runtime.fail_allocation(failures):
                try:
                    got = call()
                except MemoryError:
                    failures += 1
                    continue
            break
        assert failures
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(call()[0], expected[0])


@pytest.mark.parametrize("slope", [2.0**60 * 1.01, -1e39, 1e300])
def test_slopes_that_are_too_steep(slope):
    q, k, v = qkv(1, heads=(2, 2))
    with pytest.raises(OverflowError, match=r"alibi_slopes must be within ±2\*\*60, got"):
        qkv_fast.attention(q, k, v, alibi_slopes=[1, slope])
