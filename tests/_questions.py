"""What the tests of questions share: plain NumPy, and the error rule for each question.

The rule is attention's (_util.py) with what an answer is measured by in place of max|v|: 1 for weights, so a key's sum
of them has 4 eps for each query; the largest score for scores; 1 + max|s - m| for entropies, which are weights times
that. A cell of a map is held to the rule of a weight, whether it is their mean or their maximum.
"""

import numpy as np
from _util import arithmetic, general_product, plain
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import reference, spotlight

PER_QUERY = ("largest", "entropy", "top_keys")
RAGGED = (*PER_QUERY, "received")
OF_CACHES = (*RAGGED, "weights")  # which caches have as methods
ALL = (*OF_CACHES, "pooled")
_SIZES = st.sampled_from([1, 2, 7, 40, 256, 2000])
_CELLS = st.fixed_dictionaries(dict(shape=st.tuples(_SIZES, _SIZES), reduce=st.sampled_from(["mean", "max"])))


def own_arguments(name):
    """A strategy for what only this question takes."""
    return _CELLS if name == "pooled" else st.just({})


def ask(name, q, k, **options):
    return getattr(spotlight, name)(q, k, **options)


def plain_weights(q, k, **options):
    """Of plain NumPy in q's arithmetic: attention without its second product."""
    products = iter([general_product, lambda p, v: p])
    return plain(q, k, k, product=lambda a, b: next(products)(a, b), **options)[0]


def plain_products(q, k, scale=None):
    q, k = (np.asarray(x, arithmetic(q.dtype)) for x in (q, k))
    k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3) if q.ndim > 2 else k
    if scale is None:
        scale = 1 / np.sqrt(q.shape[-1]) if q.shape[-1] else 1
    return general_product(q, k.swapaxes(-1, -2)) * q.dtype.type(scale)


def bound(usual, exact, size, eps):
    """The largest error that the rule allows."""
    with np.errstate(invalid="ignore"):
        error = np.abs(usual.astype(exact.dtype) - exact).max(initial=0, where=np.isfinite(exact) & np.isfinite(usual))
    return 2 * error + 4 * eps * float(size)


def close(got, exact, most, dtype):
    assert got.shape == exact.shape and got.dtype == dtype, (got.shape, exact.shape, got.dtype)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[~finite].astype(exact.dtype), exact[~finite])
    assert np.isfinite(got[finite]).all()
    error = np.abs(got.astype(exact.dtype) - exact).max(initial=0, where=finite)
    assert error <= most, f"error {error:.3g} exceeds {most:.3g}"


def check(name, q, k, *, threads=None, queries=None, shape=(256, 256), reduce="mean", **options):
    """Ask, and hold the answer to the rule. Returns it."""
    named = {} if queries is None else {"queries": queries}
    if name == "pooled":
        named = {"shape": shape, "reduce": reduce}
    got = ask(name, q, k, num_threads=threads, **named, **options)
    hold(got, name, q, k, queries=queries, shape=shape, reduce=reduce, **options)
    return got


def hold(got, name, q, k, *, queries=None, shape=(256, 256), reduce="mean", **options):
    """Hold an answer to the rule."""
    dtype, eps = arithmetic(q.dtype), np.finfo(arithmetic(q.dtype)).eps
    products, scores, p, lse = reference.spotlight._matrices(name, q, k, options)
    seen = scores != -np.inf
    with np.errstate(all="ignore"):
        usual_p = plain_weights(q, k, **options)
        if name == "largest":
            usual = np.max(np.where(seen, plain_products(q, k, options.get("scale")), -np.inf), -1, initial=-np.inf)
            exact = reference.spotlight.largest(q, k, **options)
            size = np.abs(products).max(initial=0, where=np.isfinite(products))
            close(got, exact, bound(usual, exact, size, eps), dtype)
        elif name == "entropy":
            usual = -np.sum(np.where(usual_p == 0, dtype.type(0), usual_p * np.log(usual_p)), axis=-1)
            exact = reference.spotlight.entropy(q, k, **options)
            distances = scores - scores.max(axis=-1, keepdims=True, initial=-np.inf)
            size = 1 + np.abs(distances).max(initial=0, where=np.isfinite(distances) & (p > 0))
            close(got, exact, bound(usual, exact, size, eps), dtype)
        elif name == "received":
            rows = slice(None) if queries is None else queries
            exact = reference.spotlight.received(q, k, queries=queries, **options)
            count = p[..., rows, :].shape[-2]
            close(got, exact, bound(usual_p[..., rows, :].sum(axis=-2), exact, max(1, count), eps), dtype)
        elif name == "weights":
            close(got, p, bound(usual_p, p, 1, eps), dtype)
        elif name == "pooled":
            exact = reference.spotlight.pooled(q, k, shape, reduce, **options)
            close(got, exact, bound(reference.spotlight._pool(usual_p, shape, reduce), exact, 1, eps), dtype)
        else:
            check_top(got, q, k, options, dtype, eps, scores, p, usual_p, lse)


def check_top(got, q, k, options, dtype, eps, scores, p, usual_p, lse):
    """Keys by their scores where these are nearly equal."""
    keys, weights = got
    n = keys.shape[-1]
    exact_keys, exact = reference.spotlight.top_keys(q, k, n, **options)
    assert keys.shape == exact.shape and keys.dtype == np.int64
    close(weights, exact, bound(usual_p, p, 1, eps), dtype)
    np.testing.assert_array_equal(keys == -1, exact_keys == -1)
    listed, in_order = np.where(keys < 0, np.arange(-n, 0), keys), np.sort(keys, axis=-1)
    assert (np.diff(np.sort(listed, axis=-1), axis=-1) > 0).all(), "a key twice"
    assert in_order.max(initial=-1) < k.shape[-2]
    if not k.shape[-2]:
        return
    there = keys >= 0
    theirs = np.take_along_axis(scores, np.maximum(keys, 0), -1)
    best = np.take_along_axis(scores, np.maximum(exact_keys, 0), -1)
    visible = scores[scores != -np.inf]
    largest = np.abs(visible).max(initial=0, where=np.isfinite(visible))
    # Scores are compared as the sums that they are: of a product, and of what is added to it.
    most = 16 * eps * float(max(largest, np.abs(plain_products(q, k, options.get("scale"))).max(initial=0)))
    finite = there & np.isfinite(best)
    assert (theirs[there] != -np.inf).all(), "a key that is hidden"
    assert np.abs(theirs - best).max(initial=0, where=finite) <= most
    own = np.take_along_axis(p, np.maximum(keys, 0), -1)
    assert np.abs(own - weights).max(initial=0, where=there) <= bound(usual_p, p, 1, eps)


def lse_of(q, k, **options):
    return qkv_fast.attention(q, k, k[..., :1], return_lse=True, **options)[1]
