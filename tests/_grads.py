"""What the tests of gradients share: plain NumPy, and the error rule.

The rule (design.md): the largest error is at most twice that of the same formulas in plain NumPy of that type, with the
same out and lse, plus 8 eps times the largest sum of the absolute values of what is added up. 16 bits: what rounding
once costs comes to it.
"""

import ml_dtypes
import numpy as np
from _util import arithmetic, general_product, normal, plain_scores, unit

import qkv_fast
from qkv_fast import reference

_NAMES = {"bias": "bias", "sinks": "sinks", "slopes": "alibi_slopes"}


def wanted(options):
    return ("q", "k", "v", *(name for name, argument in _NAMES.items() if options.get(argument) is not None))


def given_gradients(arrays, seed=0, **options):
    """dout, out, lse and dlse for some arrays."""
    out, lse = qkv_fast.attention(*arrays, return_lse=True, **options)
    rng = np.random.default_rng(seed)
    return normal(rng, out.shape, out.dtype), out, lse, normal(rng, lse.shape, lse.dtype)


def plain_grad(dout, arrays, out, lse, dlse, *, absolute=False, **options):
    """By name, the gradients of heads-first arrays as NumPy code computes them; or sums of absolute terms."""
    q, k, v, s, capped, sink, scale = plain_scores(*arrays, **options)
    kind, group = q.dtype.type, q.shape[-3] // max(arrays[1].shape[-3], 1)
    dout, out = np.asarray(dout, kind), np.asarray(out, kind)
    sign = kind(-1)
    if absolute:
        q, k, v, dout, out, dlse, scale = (np.abs(x) for x in (q, k, v, dout, out, dlse, scale))
        sign = kind(1)
    lse = lse[..., None]
    dead = lse == -np.inf
    shape = np.broadcast_shapes(s.shape, lse.shape)
    p = np.where(dead | (s == -np.inf), kind(0), np.exp(s - np.where(dead, kind(0), lse)))
    delta = np.sum(dout * out, axis=-1, keepdims=True) + sign * dlse[..., None]
    p = np.broadcast_to(p, shape)
    ds = p * (general_product(dout, v.swapaxes(-1, -2)) + sign * delta)
    dx = ds if capped is None else ds * (1 - capped * capped)

    def of_keys(x):
        return x.reshape(*x.shape[:-3], x.shape[-3] // group, group, *x.shape[-2:]).sum(axis=-3)

    found = {"bias": ds, "q": scale * general_product(dx, k)}
    found["k"] = of_keys(scale * general_product(dx.swapaxes(-1, -2), q))
    found["v"] = of_keys(general_product(p.swapaxes(-1, -2), dout))
    if options.get("alibi_slopes") is not None:
        sizes = s.shape[:-3], *s.shape[-2:], reference._limits_of(options)
        found["slopes"] = sign * (ds * np.abs(reference._distances(*sizes)).astype(kind)).sum(axis=(-2, -1))
    weight = np.exp(sink - np.where(dead, kind(np.inf), lse))
    found["sinks"] = sign * (weight * delta).sum(axis=(-2, -1))
    given = {"q": arrays[0], "k": arrays[1], "v": arrays[2]} | {n: options.get(a) for n, a in _NAMES.items()}
    return {name: reference.grad._summed(found[name], np.shape(given[name])) for name in wanted(options)}


def check(arrays, *, seed=0, num_threads=None, **options):
    """Gradients of heads-first arrays, held to the rule. Returns them."""
    dout, out, lse, dlse = given_gradients(arrays, seed, **options)
    want = wanted(options)
    got = qkv_fast.attention_grad(
        dout, *arrays, out, lse, dlse=dlse, want=want, num_threads=num_threads, **options
    )
    exact = reference.attention_grad(dout, *arrays, out, lse, dlse=dlse, want=want, **options)
    with np.errstate(all="ignore"):
        usual = plain_grad(dout, arrays, out, lse, dlse, **options)
        sizes = plain_grad(dout, arrays, out, lse, dlse, absolute=True, **options)
    given = dict(zip("qkv", arrays, strict=True)) | {n: options.get(a) for n, a in _NAMES.items()}
    eps = np.finfo(arithmetic(arrays[0].dtype)).eps
    for name, x, y in zip(want, got, exact, strict=True):
        kind = np.asarray(given[name]).dtype.newbyteorder("=")
        assert x.shape == np.shape(given[name]) and x.dtype == kind, (name, x.shape, x.dtype)
        assert np.isfinite(y).all() and np.isfinite(x.astype("f8")).all(), name
        rounding = 0.0  # to a type that is narrower than the arithmetic's
        if u := unit(kind) or (np.finfo(kind).eps / 2 if kind.itemsize < arithmetic(arrays[0].dtype).itemsize else 0.0):
            rounding = u * np.abs(y) + float(ml_dtypes.finfo(kind).smallest_subnormal) / 2
        error = (np.abs(x.astype(y.dtype) - y) - rounding).max(initial=0)
        numpy_error = np.abs(usual[name].astype(y.dtype) - y).max(initial=0)
        bound = 2 * numpy_error + 8 * eps * float(sizes[name].max(initial=0))
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g} (plain NumPy: {numpy_error:.3g})"
    return got
