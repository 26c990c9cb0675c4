"""What adapters for torch share: which tensors are read, and how an array becomes one.

A tensor that is not what its memory says (fake, nested, inside of a transform, of a class of its own) is refused by
name, never read raw.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.dlpack import to_dlpack

from .._foreign import capsule_of, is_plain, lent, memory_of

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What torch's dispatcher looks at, with inference_mode and without. It has one key more for each way in which a tensor
# may not be what its memory says (sparse, nested, negative, fake, inside of a transform ...), and for each mode in
# which somebody wants to see what a thread calls (traces, transforms).
_Key, _Keys = torch._C.DispatchKey, torch._C.DispatchKeySet
_keys_of, _keys_of_thread = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set
_CPU, _THREAD = _Keys(_Key.CPU).add(_Key.AutocastCPU), _Keys(_Key.BackendSelect)
_PLAIN = {_CPU.raw_repr(), _CPU.add(_Key.AutogradCPU).add(_Key.ADInplaceOrView).raw_repr()}
_UNSEEN = {_THREAD.raw_repr(), _THREAD.add(_Key.ADInplaceOrView).raw_repr()}
_KINDS = (torch.Tensor, torch.nn.Parameter)


def refuse(where: str, what: str) -> NoReturn:
    raise NotImplementedError(f"{where}: {what}")


def check_tensor(where: str, name: str, x: Any, types: tuple[torch.dtype, ...]) -> None:
    """That x is a tensor whose memory on the CPU is what it means, of one of these types."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        refuse(where, f"no nested tensors: {name} is one; pass its parts one by one, or padded with an attn_mask")
    if not x.is_cpu or x.layout != torch.strided:
        refuse(where, f"strided tensors on the CPU only: {name} is {x.layout} on {x.device}")
    if type(x) is not torch.Tensor and not is_plain(type(x)):
        refuse(
            where,
            f"no tensors whose class gives them a meaning of its own: {name} is a {type(x).__name__}; "
            "pass a torch.Tensor of the numbers that it stands for",
        )
    if x.dtype not in types:
        allowed = " or ".join(map(str, dict.fromkeys(types)))
        raise TypeError(f"{where}: {name} must be {allowed}, got {x.dtype}")


def check_tensors(
    where: str, tensors: dict[str, torch.Tensor], others: Mapping[str, tuple[torch.dtype, ...]] = MappingProxyType({})
) -> bool:
    """That all are what `check_tensor` asks for, of the first's type but where `others` has types by name, and that
    nobody expects forward gradients of the result, or to record how it was made. Returns whether they are plain, so
    that their memory may be read as it is."""
    plain = forward_ad._current_level < 0 and _keys_of_thread().raw_repr() in _UNSEEN
    types: tuple[torch.dtype, ...] = TYPES
    for name, x in tensors.items():
        allowed = others[name] if name in others else types
        # The dispatcher answers in a third of the time that the questions of `check_tensor` and `detached` take.
        if type(x) not in _KINDS or _keys_of(x).raw_repr() not in _PLAIN or x.dtype not in allowed:
            check_tensor(where, name, x, allowed)
            plain = False
        if types is TYPES:
            types = (x.dtype,)
    if not plain:
        _check_unrecorded(where, tensors)
    return plain


def _check_unrecorded(where: str, tensors: dict[str, torch.Tensor]) -> None:
    if forward_ad._current_level >= 0:  # outside of all levels nothing carries one
        carrying = [name for name, x in tensors.items() if forward_ad.unpack_dual(x).tangent is not None]
        if carrying:
            names = ", ".join(carrying)
            refuse(where, f"no forward gradients: {names} carries a tangent; pass unpack_dual(...).primal")
    if torch.jit.is_tracing() or get_proxy_mode() is not None:
        what = "no torch.jit.trace, no make_fx: the result for these inputs would become a constant of the trace"
        refuse(where, what)


def memory(where: str, name: str, x: torch.Tensor, plain: bool) -> Any:
    """x as an array of NumPy, for the time of a call; `plain` is what `check_tensors` returned."""
    return lent(where, to_dlpack(x)) if plain else memory_of(detached(where, name, x))


def detached(where: str, name: str, x: torch.Tensor) -> torch.Tensor:
    # Inside of a transform detach() wraps too what comes from outside of it, and then it is seen.
    if x.requires_grad or torch._C._functorch.peek_interpreter_stack() is not None:
        x = x.detach()
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x):
        refuse(
            where,
            f"no transforms of torch.func: {name} is inside of one (vmap, grad, vjp, jvp or functionalize); call this "
            "outside of it. In place of vmap: any axes left of the heads are batches",
        )
    return x


def as_tensor(x: Any) -> torch.Tensor:
    """A result of ours as a tensor that has its memory."""
    found: torch.Tensor = torch._C._from_dlpack(capsule_of(x))
    return found
