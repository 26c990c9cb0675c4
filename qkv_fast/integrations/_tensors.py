"""What adapters for torch share: which tensors are read, and how an array becomes one.

A tensor that is not what its memory says (fake, nested, inside of a transform, of a class of its own) is refused by
name, never read raw.
"""

from typing import Any, NoReturn

import numpy as np
import torch
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .._foreign import is_plain

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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


def check_unrecorded(where: str, tensors: dict[str, torch.Tensor]) -> None:
    """That nobody expects forward gradients of the result, or to record how it was made."""
    if forward_ad._current_level >= 0:  # outside of all levels nothing carries one, and asking takes time
        carrying = [name for name, x in tensors.items() if forward_ad.unpack_dual(x).tangent is not None]
        if carrying:
            names = ", ".join(carrying)
            refuse(where, f"no forward gradients: {names} carries a tangent; pass unpack_dual(...).primal")
    # Whether there is any mode takes less time to tell than which, and mostly there is none.
    in_mode = torch._C._len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch()
    if torch.jit.is_tracing() or (in_mode and get_proxy_mode() is not None):
        what = "no torch.jit.trace, no make_fx: the result for these inputs would become a constant of the trace"
        refuse(where, what)


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
    """NumPy knows bfloat16 by ml_dtypes, and torch's only as bits."""
    if x.dtype.kind == "V":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
