"""What the tests of scores, softmax, its gradient and weighted values share: calls to make, and the error rule.

The rule is attention's (_util): with `exact` the reference in the next wider type, at most twice the error of plain
NumPy in the same type, plus 4 eps times the size of the result's terms.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from _util import arithmetic, general_product, normal, qkv, unit

import qkv_fast
from qkv_fast import reference


@dataclass
class Stage:
    """One function with arguments for it."""

    name: str
    arrays: list
    options: dict

    def __call__(self, *arrays, **more):
        given = {**self.options, **more}
        if self.name == "softmax" and len(arrays or self.arrays) == 2:
            x, given["mask"] = arrays or self.arrays
            return qkv_fast.softmax(x, **given)
        return getattr(qkv_fast, self.name)(*(arrays or self.arrays), **given)


def stages(seed, dtype, *, batch=(2,), heads=(4, 2), lengths=(21, 130), dims=(12, 10)):
    """All of them, on random arrays of these shapes; softmax and its gradient along every axis, softmax with a mask."""
    q, k, v = qkv(seed, dtype, batch=batch, heads=heads, lengths=lengths, dims=dims)
    x = normal(np.random.default_rng(seed), (*batch, heads[0], *lengths), dtype) * 3
    mask = np.random.default_rng(seed).random(x.shape) < 0.7
    p = reference.softmax(x).astype(dtype)
    yield Stage("scores", [q, k], {})
    yield Stage("weighted_values", [p, v], {})
    for axis in range(-x.ndim, 0):
        yield Stage("softmax", [x], dict(axis=axis))
        yield Stage("softmax_grad", [x, p], dict(axis=axis))
    yield Stage("softmax", [x, mask], dict(axis=-1))
    yield Stage("softmax", [x, mask], dict(axis=-2))


def plain_softmax(x, axis, mask):
    x = x if mask is None else np.where(mask, x, x.dtype.type(-np.inf))
    top = x.max(axis=axis, keepdims=True, initial=-np.inf)
    p = np.exp(x - np.where(top == -np.inf, x.dtype.type(0), top))
    total = p.sum(axis=axis, keepdims=True)
    return p / np.where(total == 0, x.dtype.type(1), total)


def within(got, exact, usual, size):
    """The error rule."""
    assert got.shape == exact.shape and got.dtype == usual.dtype
    error = np.abs(got - exact).max(initial=0)
    bound = 2 * np.abs(usual - exact).max(initial=0) + 4 * np.finfo(got.dtype).eps * size
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def check_scores(q, k, **options):
    got = qkv_fast.scores(q, k, **options)
    group = q.shape[-3] // k.shape[-3]
    usual = general_product(q, np.repeat(k, group, -3).swapaxes(-1, -2))
    usual = usual * q.dtype.type(options.get("scale", q.shape[-1] ** -0.5 if q.shape[-1] else 1))
    exact = reference.scores(q, k, **options)
    within(got, exact, usual, np.abs(exact).max(initial=0))
    return got


def check_values(p, v):
    got = qkv_fast.weighted_values(p, v)
    usual = general_product(p, np.repeat(v, p.shape[-3] // v.shape[-3], -3))
    within(got, reference.weighted_values(p, v), usual, np.abs(v).max(initial=0))
    return got


def check_softmax(x, axis=-1, mask=None):
    got = qkv_fast.softmax(x, axis, mask=mask)
    within(got, reference.softmax(x, axis, mask=mask), plain_softmax(x, axis, mask), 1)
    return got


def check_softmax_grad(dp, p, axis=-1):
    """The rule of gradients (design.md): 8 eps of the largest sum of absolute terms, and rounding to 16 bits."""
    got, exact = qkv_fast.softmax_grad(dp, p, axis), reference.softmax_grad(dp, p, axis)
    assert got.shape == dp.shape and got.dtype == dp.dtype.newbyteorder("=")
    kind = arithmetic(dp.dtype)
    dp, p = dp.astype(kind), p.astype(kind)
    usual = p * (dp - (p * dp).sum(axis=axis, keepdims=True))
    size = np.abs(p) * (np.abs(dp) + np.abs(p * dp).sum(axis=axis, keepdims=True))
    rounding = 0.0
    if u := unit(got.dtype):
        rounding = u * np.abs(exact) + float(ml_dtypes.finfo(got.dtype).smallest_subnormal) / 2
    error = (np.abs(got.astype(exact.dtype) - exact) - rounding).max(initial=0)
    bound = 2 * np.abs(usual - exact).max(initial=0) + 8 * np.finfo(kind).eps * size.max(initial=0)
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"
    return got
