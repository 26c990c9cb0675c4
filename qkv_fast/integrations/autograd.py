"""Attention and its gradient in NumPy programs that HIPS autograd differentiates.

Examples
--------
>>> from autograd import grad, numpy as np
>>> from qkv_fast.integrations.autograd import attention
>>> q, k, v = np.random.standard_normal((3, 1, 12, 100, 64))  # batch, heads, length, dim
>>> def loss(q, k, v):
...     return np.sum(attention(q, k, v, causal=True) ** 2)
>>> [x.shape for x in grad(loss, argnum=(0, 1, 2))(q, k, v)]
[(1, 12, 100, 64), (1, 12, 100, 64), (1, 12, 100, 64)]
"""

from typing import Any

import numpy as np
from autograd.extend import defvjp_argnums, primitive

import qkv_fast

_WANTED = {"q": "q", "k": "k", "v": "v", "bias": "bias", "alibi_slopes": "slopes", "sinks": "sinks"}


def attention(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
    """What `qkv_fast.attention` computes, as a function that autograd differentiates.

    It can be differentiated once, in reverse, with respect to q, k, v, bias, sinks and ALiBi slopes; a second
    derivative is refused.

    Parameters
    ----------
    q, k, v : array_like
        As in `qkv_fast.attention`.
    return_lse : bool, default False
        Return the log-sum-exp as well, which has a gradient too.
    **options
        The other arguments of `qkv_fast.attention`, but `out`.

    Returns
    -------
    out, or (out, lse)
        As in `qkv_fast.attention`.

    Raises
    ------
    TypeError, ValueError
        As in `qkv_fast.attention`.
    NotImplementedError
        For a second derivative.

    Examples
    --------
    >>> from autograd import grad
    >>> from qkv_fast.integrations.autograd import attention
    >>> grad(lambda q: attention(q, [[1.0], [2.0]], [[3.0], [5.0]])[0, 0])(np.zeros((1, 1)))
    array([[0.5]])
    """
    if "out" in options:
        raise TypeError("attention() got an unexpected keyword argument 'out'")
    given = {"q": q, "k": k, "v": v} | {name: options.pop(name) for name in _WANTED if options.get(name) is not None}
    found = _attend(*given.values(), names=tuple(given), options=options)
    return (found[0], found[1]) if return_lse else found[0]


@primitive  # type: ignore[untyped-decorator]
def _attend(*arrays: Any, names: tuple[str, ...], options: Any) -> Any:
    """(out, lse) of the arrays of these names."""
    return qkv_fast.attention(**dict(zip(names, arrays, strict=True)), **options, return_lse=True)


@primitive  # type: ignore[untyped-decorator]
def _attend_grad(dout: Any, dlse: Any, out: Any, lse: Any, *arrays: Any, want: Any, names: Any, options: Any) -> Any:
    dout, dlse = np.asarray(dout, out.dtype), np.asarray(dlse, lse.dtype)
    arguments = dict(zip(names, arrays, strict=True)) | options
    return qkv_fast.attention_grad(dout, out=out, lse=lse, dlse=dlse, want=want, **arguments)


def _backward(argnums: Any, found: Any, arrays: Any, given: Any) -> Any:
    want = tuple(_WANTED[given["names"][i]] for i in argnums)
    return lambda d: _attend_grad(d[0], d[1], found[0], found[1], *arrays, want=want, **given)


defvjp_argnums(_attend, _backward)
