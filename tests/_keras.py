"""What runs in a process with one backend of Keras: a grid of arguments, and then Keras' own tests with our attention
in the place of its own. The arguments are those of pytest."""

import inspect
import itertools
import sys

import keras
import numpy as np
import pytest

from qkv_fast.integrations.keras import dot_product_attention

BACKEND = keras.backend.backend()
THEIRS = keras.ops.dot_product_attention
CALLS = []


def pytest_configure():
    def counted(*args, **options):
        CALLS.append(args)
        return dot_product_attention(*args, **options)

    keras.src.backend.nn.dot_product_attention = counted


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"our attention was called: {bool(CALLS)}")


def grid():
    """How many calls gave what Keras gives."""
    rng = np.random.default_rng(0)
    heads = ((4, 4),) if BACKEND == "numpy" else ((4, 4), (4, 2), (4, 1))  # its NumPy backend has no groups
    count = 0
    cases = [*itertools.product(heads, ((5, 7, "float32"), (9, 7, "float32"), (5, 7, "bfloat16")))]
    if BACKEND == "jax":  # which compiles each call; tests/integrations/test_jax.py has more of what is below it
        cases = cases[::4]
    for (hq, hkv), (t, s, dtype) in cases:
        shapes = ((2, t, hq, 8), (2, s, hkv, 8), (2, s, hkv, 8))
        q, k, v = (keras.ops.convert_to_tensor(rng.standard_normal(x), dtype=dtype) for x in shapes)
        numbers = rng.standard_normal((2, hq, t, s)).astype("float32")
        mask = numbers > -0.5
        mask[..., 0] = True  # what sees nothing is the mean of all values there
        masks = [{}, {"bias": numbers}, {"mask": mask}, {"mask": mask[:1, :1]}, {"bias": numbers[:1, :1]}]
        if BACKEND != "torch":
            masks.append({"bias": numbers, "mask": mask})  # there an error
        for given, is_causal in itertools.product(masks, (False, True)):
            scale = None if count % 2 else 0.5
            if BACKEND == "torch" and is_causal and "bias" in given:
                continue  # torch's own function refuses that
            results = (f(q, k, v, is_causal=is_causal, scale=scale, **given) for f in (dot_product_attention, THEIRS))
            found, expected = (keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")) for x in results)
            assert found.shape == expected.shape
            # bfloat16: weights are rounded there, and so is the bias
            near = {"rtol": 2e-5, "atol": 2e-5} if dtype == "float32" else {"rtol": 2.0**-7, "atol": 2.0**-5}
            np.testing.assert_allclose(found, expected, **near)
            count += 1
    return count


def others():
    """The signature, more than Keras takes, a functional model, and what is refused."""
    ours, theirs = (inspect.signature(f).parameters.values() for f in (dot_product_attention, THEIRS))
    assert [(x.name, x.kind, x.default) for x in ours] == [(x.name, x.kind, x.default) for x in theirs]
    q = keras.random.normal((2, 5, 4, 8), seed=0)
    bias, mask = np.ones((5, 5), "float32"), np.tri(5) > 0
    found = dot_product_attention(q, q, q, bias=bias, mask=mask)
    causal = dot_product_attention(q, q, q, is_causal=True)
    counted = dot_product_attention(q, q, q, mask=3 * mask.astype("int32"))
    np.testing.assert_array_equal(
        *(keras.ops.convert_to_numpy(x) for x in (counted, dot_product_attention(q, q, q, mask=mask)))
    )
    np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (found, causal)), rtol=1e-5, atol=1e-6)
    given = keras.Input((5, 4, 8))
    model = keras.Model(given, dot_product_attention(given, given, given, is_causal=True))
    assert model.output_shape == (None, 5, 4, 8)
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (model(q), causal)))
    copied = keras.Model.from_config(model.get_config())
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (copied(q), causal)))
    hidden = keras.ops.convert_to_numpy(dot_product_attention(q, q, q, mask=np.zeros((5, 5), bool)))
    assert not np.any(hidden)
    for words, wrong in (("soft_cap", {"attn_logits_soft_cap": 5.0}), ("4 axes", {"key": q[0]})):
        try:
            dot_product_attention(**{"query": q, "key": q, "value": q} | wrong)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)


if __name__ == "__main__":
    print("calls that give what Keras gives:", grid())
    others()
    sys.exit(pytest.main(sys.argv[1:], plugins=[sys.modules[__name__]]))
