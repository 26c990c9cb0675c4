"""What the test modules share: inputs, plain NumPy, the error rule against the reference, child processes.

The rule (README, "accuracy"): with `exact` the reference in the next wider type, the largest error is at most
twice that of plain NumPy in the same type, plus 4 eps max|v|. The second term is what remains where NumPy is
exact by luck, for one key or for equal values. NumPy's products here are always the general matrix product:
for a few rows or keys BLAS has others, whose sums run in sixteen lanes at once, so that the same scores would
be held to another rule in a thin matrix than in a wide one.

16-bit inputs are widened, exactly, and held to the rule of float32. To that comes what rounding the result once
costs, relative to the exact result, or in the subnormal range half of the smallest number; and where pairs of
bfloat16 are multiplied, that the weights are rounded, relative to the sum of p |v|.
"""

import contextlib
import os
import subprocess
import sys
import time

import ml_dtypes  # registers bfloat16
import numpy as np

import qkv_fast
from qkv_fast import reference

TYPES = ("float32", "float64")
HALVES = ("float16", "bfloat16")
ALL_TYPES = TYPES + HALVES


def unit(dtype):
    """The largest relative error of rounding once to a 16-bit type; the others keep what they are computed in."""
    return {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(np.dtype(dtype).name, 0.0)


def arithmetic(dtype):
    """The type that is computed in."""
    return np.dtype(np.float64 if np.dtype(dtype).itemsize == 8 else np.float32)


def multiplies_pairs(q, k, v):
    """Whether weights are rounded to bfloat16, and multiplied two at a time: in tiles not those of few rows."""
    path, all_pairs = qkv_fast.isa(), q.dtype == k.dtype == v.dtype == "bfloat16"
    return all_pairs and (path.endswith("bf16") or (path.startswith("amx") and not are_few(q, k, v)))


def weights_unit(q, k, v):
    """The largest relative error of rounded weights: they are bfloat16 where pairs are multiplied."""
    return unit("bfloat16") if multiplies_pairs(q, k, v) else 0.0


def are_few(q, k, v):
    """Whether the kernel of few rows takes the rows of a key head: more of them where K and V would be widened."""
    widened = 20 if qkv_fast.isa() in ("avx2", "portable", "amx_emulated") else 32  # as registers hold 8 or 16 sums
    most = 48 // q.itemsize if k.dtype == arithmetic(q.dtype) else widened
    return q.shape[-2] * q.shape[-3] // k.shape[-3] <= min(most, max(4, (q.shape[-1] + v.shape[-1]) // 8))


def normal(rng, shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype)


def qkv(seed, dtype="float32", *, batch=(), heads=(1, 1), lengths=(8, 8), dims=(16, 16)):
    """Random q, k, v of shapes batch + (heads[0], lengths[0], dims[0]) and so on."""
    rng = np.random.default_rng(seed)
    (hq, hkv), (lq, lk), (d, dv) = heads, lengths, dims
    shapes = (*batch, hq, lq, d), (*batch, hkv, lk, d), (*batch, hkv, lk, dv)
    return tuple(normal(rng, shape, dtype) for shape in shapes)


def pairs(n, *, full):
    """Every (i, j) of 1..n x 1..n when full, else each i and each j once, paired by a fixed permutation."""
    if full:
        return [(i, j) for i in range(1, n + 1) for j in range(1, n + 1)]
    order = np.random.default_rng(n).permutation(n) + 1
    return list(zip(range(1, n + 1), order.tolist(), strict=True))


def _padded(x, rows):
    """x with rows of zeros added: enough of them for the general matrix product."""
    missing = max(0, rows - x.shape[-2])
    return np.concatenate([x, np.zeros((*x.shape[:-2], missing, x.shape[-1]), x.dtype)], axis=-2)


def general_product(a, b):
    """a @ b by BLAS's general matrix product, whatever the shapes."""
    wide = _padded(b.swapaxes(-1, -2), 256).swapaxes(-1, -2)
    return (_padded(a, 64) @ wide)[..., : a.shape[-2], : b.shape[-1]]


def plain_scores(
    q, k, v, *, layout="bhld", scale=None, mask=None, bias=None, alibi_slopes=None, sinks=None, softcap=None,
    product=general_product, **limits,
):  # fmt: skip
    """In q's own type: q, k and v with heads first, k and v for each query head; scores, -inf where hidden; the tanh of
    a cap, or None; the sinks, -inf without; and the scale."""
    q, k, v = (np.asarray(x, dtype=arithmetic(q.dtype)) for x in (q, k, v))
    if q.ndim == 2:
        q, k, v = q[None], k[None], v[None]
    elif layout == "blhd":
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    group = q.shape[-3] // max(k.shape[-3], 1)
    k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    kind, shape = q.dtype.type, (q.shape[-2], k.shape[-2])
    limits = reference._limits_of(limits)
    visible = reference._visible(batch, *shape, limits)
    if scale is None:
        scale = 1 / np.sqrt(q.shape[-1]) if q.shape[-1] else 1
    s, capped = product(q, k.swapaxes(-1, -2)) * kind(scale), None
    if softcap is not None:
        capped = np.tanh(s / kind(softcap))
        s = kind(softcap) * capped
    if alibi_slopes is not None:
        distance = np.abs(reference._distances(batch, *shape, limits)).astype(kind)
        s = s - np.asarray(alibi_slopes).astype(kind)[:, None, None] * distance
    if bias is not None:
        visible = visible & (np.asarray(bias) != -np.inf)
        s = s + np.clip(bias, np.finfo(kind).min, None).astype(kind)  # a wider type's least is not -inf
    if mask is not None:
        visible = visible & (np.asarray(mask) != 0)
    sink = kind(-np.inf) if sinks is None else np.asarray(sinks).astype(kind)[:, None, None]
    return q, k, v, np.where(visible, s, kind(-np.inf)), capped, sink, kind(scale)


def plain(q, k, v, *, product=general_product, **options):
    """Attention as NumPy code computes it in q's own type: (out, lse). It knows nothing of NaN."""
    flat, swapped = q.ndim == 2, q.ndim > 2 and options.get("layout") == "blhd"
    q, k, v, s, _, sink, _ = plain_scores(q, k, v, product=product, **options)
    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    m = np.maximum(m, sink)
    m[m == -np.inf] = 0
    p = np.exp(s - m)
    total = p.sum(axis=-1, keepdims=True) + np.exp(sink - m)
    total_or_1 = np.where(total == 0, q.dtype.type(1), total)
    out = product(p / total_or_1, v)
    lse = np.where(total == 0, q.dtype.type(-np.inf), m + np.log(total_or_1))[..., 0]
    if flat:
        return out[0], lse[0]
    return (out.swapaxes(-3, -2) if swapped else out), lse


def check(q, k, v, **options):
    """Call attention and hold its result to the error rule. Returns (out, lse)."""
    out, lse = qkv_fast.attention(q, k, v, return_lse=True, **options)
    options.pop("num_threads", None)
    options.pop("out", None)
    compare((out, lse), (q, k, v), **options)
    return out, lse


def compare(got, inputs, product=general_product, **options):
    """Hold (out, lse) to the error rule: shapes, type, which elements are finite, error."""
    exact = reference.attention(*inputs, return_lse=True, **options)
    with np.errstate(all="ignore"):
        usual = plain(*inputs, product=product, **options)
    q, _, v = inputs
    dtype = np.dtype(q.dtype.type)
    eps = np.finfo(arithmetic(dtype)).eps
    with np.errstate(invalid="ignore"):  # rows that nothing was written to may hold signalling NaN
        v = np.asarray(v, arithmetic(dtype))
    rounding = 0.0
    if u := unit(dtype):
        rounding = u * np.abs(exact[0]) + float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2
    if rounded := weights_unit(*inputs):
        sizes_of_v = np.where(np.isfinite(v), np.abs(v), 0).astype(v.dtype)
        rounding += 2 * rounded * reference.attention(inputs[0], inputs[1], sizes_of_v, **options)
    # An LSE is as large as a score, and a score of size s carries an error of eps * s before any softmax: for
    # it the largest |LSE| (1 where all are small: log is not better than eps there) takes the place of
    # max|v|.
    lse = exact[1][np.isfinite(exact[1])]
    sizes = (np.abs(v).max(initial=0, where=np.isfinite(v)), max(1, np.abs(lse).max(initial=0)))
    types, more = (dtype, arithmetic(dtype)), (rounding, 0.0)
    for name, a, b, c, size, kind, slack in zip(
        ("out", "lse"), got, exact, usual, sizes, types, more, strict=True
    ):
        assert a.shape == b.shape and a.dtype == kind, (name, a.shape, b.shape, a.dtype)
        finite = np.isfinite(b)
        assert np.array_equal(np.isfinite(a), finite), (
            f"{name}: other elements are finite than in the reference"
        )
        np.testing.assert_array_equal(
            a[~finite].astype(b.dtype), b[~finite], err_msg=name
        )  # which of inf, -inf, NaN
        # "where" keeps a NaN of the plain result out of the bound: then the rule leaves no slack but the
        # second term
        with np.errstate(invalid="ignore"):
            error = (np.abs(a.astype(b.dtype) - b) - slack).max(initial=0, where=finite & np.isfinite(slack))
            numpy_error = np.abs(c.astype(b.dtype) - b).max(initial=0, where=finite & np.isfinite(c))
        bound = 2 * numpy_error + 4 * eps * float(size)
        assert error <= bound, (
            f"{name}: error {error:.3g} exceeds {bound:.3g} (plain NumPy: {numpy_error:.3g})"
        )


def same_bits(a, b):
    """Assert equal bits (NaN and the sign of zero included) of two arrays, or of two tuples of arrays."""
    if isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            same_bits(x, y)
        return
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
    word = f"u{a.dtype.itemsize}"
    different = np.argwhere(np.ascontiguousarray(a).view(word) != np.ascontiguousarray(b).view(word))
    assert not len(different), f"{len(different)} of {a.size} elements differ, the first at {different[0]}"


def child(code, *, timeout=60, prefix=(), preexec_fn=None, **environment):
    """Run Python code in a fresh process that imports only what is installed. None removes a variable."""
    env = dict(os.environ)
    for name, value in environment.items():
        env.pop(name, None)
        if value is not None:
            env[name] = str(value)
    command = [*prefix, sys.executable, "-P", "-c", code]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout, check=False, preexec_fn=preexec_fn
    )


def child_says(code, **options):
    """The last line that the code prints; the process must succeed."""
    done = child(code, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def once(factory, name, make):
    """The folder that make(folder) has filled, one for all processes of a run: whoever comes second waits.

    `factory` is pytest's tmp_path_factory; its folder is one level deeper in the processes of pytest-xdist.
    """
    top = factory.getbasetemp()
    folder = (top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / name
    made = folder.with_suffix(".made")
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 600
        while not made.exists():
            assert time.monotonic() < deadline, f"{name}: still being made, or its maker was killed"
            time.sleep(0.1)
        assert made.read_text() == "whole", f"{name}: another process failed to make it"
        return folder
    state = "failed"
    try:
        make(folder)
        state = "whole"
    finally:
        made.with_suffix(".begun").write_text(state)
        made.with_suffix(".begun").rename(made)  # never seen half written
    return folder


@contextlib.contextmanager
def no_change(*arrays):
    """Assert that the block leaves these arrays as they are, bit for bit."""
    before = [x.tobytes() for x in arrays]
    yield
    assert [x.tobytes() for x in arrays] == before
