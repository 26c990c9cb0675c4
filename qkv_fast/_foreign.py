"""Arrays of other libraries, read where they lie: what the checks do with objects that are no arrays of NumPy.

An object says what it holds by `__dlpack__`, in memory of the CPU, or by `__array__`. No library is imported here: who
has such an object has imported its library. What would be lost without a word (names of axes, an index, a gradient),
what lies elsewhere, and what is not what its memory says is a TypeError with the way out.
"""

import functools
import sys
import threading
from typing import Any, NoReturn

import numpy as np

from . import _core

Array = np.ndarray[Any, Any]

_ONE = threading.Lock()
_CPU = (1, 3, 11)  # DLPack's numbers of devices: the CPU, and its memory that CUDA or ROCm has pinned
_DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 13: "CUDA-managed", 14: "oneAPI"}
_TO_CPU = {"cupy": "cupy.asnumpy({})", "torch": "{}.cpu()", "jax": "jax.device_get({})", "jaxlib": "jax.device_get({})"}


def is_foreign(x: Any) -> bool:
    return not isinstance(x, (np.ndarray, np.generic)) and (hasattr(x, "__dlpack__") or hasattr(x, "__array__"))


def read(name: str, x: Any, where: str) -> Array:
    """The array that x is: its memory, if NumPy can have it as it is, and else what `__array__` makes of it."""
    if _is_tensor(x):
        return _of_torch(name, x, where)
    libraries = {kind.__module__.partition(".")[0] for kind in type(x).__mro__}
    if "pandas" in libraries:
        _refuse(where, name, x, "whose index would be lost", f"{name}.to_numpy()")
    if "xarray" in libraries and any(not str(axis).startswith("dim_") for axis in getattr(x, "dims", ())):
        axes = ", ".join(map(str, x.dims))
        way_out = f"{name}.transpose(...).to_numpy(), with its axes in the order that {where} has"
        _refuse(where, name, x, f"whose axes have names ({axes}) that would not be asked about", way_out)
    why: Exception | None = None
    if hasattr(x, "__dlpack__") and _is_on_cpu(name, x, where):
        try:
            return _of_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:  # types and layouts that it cannot say
            why = error
    if why is not None and not hasattr(x, "__array__"):
        raise TypeError(f"{where}: {name}: NumPy cannot read this {kind_of(x)} ({why})") from None
    return np.asarray(x)


def _is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, getattr(torch, "Tensor", ()))


def kind_of(x: Any) -> str:
    module = type(x).__module__.partition(".")[0]
    return type(x).__name__ if module == "builtins" else f"{module}.{type(x).__name__}"


def memory_of(tensor: Any) -> Array:
    """The memory of a torch tensor that records nothing and is what its memory says, or a copy where torch is lazy."""
    torch = sys.modules["torch"]
    if tensor._is_zerotensor():  # has no memory, such as a tangent that torch knows to be 0
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
    elif tensor.is_neg():  # the bits are those of its opposite
        tensor = tensor.resolve_neg()
    if tensor.dtype != torch.bfloat16:
        found: Array = tensor.numpy()
        return found
    bits: Array = tensor.view(torch.int16).numpy()
    return bits.view(_bfloat16())


def lent(where: str, capsule: Any) -> Array:
    """The memory in a capsule of torch's, for the time of a call: nothing keeps torch from resizing it later."""
    return _core.memory_of(capsule, _bfloat16, where)


def written(where: str, out: Any) -> Array:
    """The memory of `out`, an array of another library that a result is to be written to."""
    is_tensor = _is_tensor(out)
    if not is_tensor and (not hasattr(out, "__dlpack__") or not _is_on_cpu("out", out, where)):
        raise TypeError(f"{where}: out must be an array whose memory can be written to, got {kind_of(out)}")
    try:
        found = _of_torch("out", out, where) if is_tensor else _of_dlpack(out, in_place=True)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith(f"{where}: "):  # says it all
            raise
        raise TypeError(f"{where}: out: NumPy cannot write to this {kind_of(out)} ({error})") from None
    if is_tensor and (out.is_neg() or out._is_zerotensor()):
        raise ValueError(f"{where}: out is not writable: torch has put off what its numbers are; pass out.clone()")
    return found


def has_changed(out: Any) -> None:
    """Torch is told that its tensor was written to, so that it refuses gradients that need what that held."""
    if _is_tensor(out):
        sys.modules["torch"].autograd.graph.increment_version(out)


def capsule_of(x: Array) -> Any:
    """Floating-point numbers as DLPack has them, bfloat16 too."""
    return _core.capsule_of(x)


def is_plain(kind: type[Any]) -> bool:
    """Whether the memory of torch tensors of this class is what they mean, as far as the class says."""
    torch = sys.modules["torch"]
    function = kind.__torch_function__
    # Of classes that say nothing of their own on what a function does with them; torch.nn.Parameter turns the hook off.
    plain = (torch.Tensor.__torch_function__.__func__, torch.nn.Parameter.__torch_function__)
    dispatch: bool = kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return dispatch and getattr(function, "__func__", function) in plain


def _refuse(where: str, name: str, x: Any, what: str, way_out: str) -> NoReturn:
    raise TypeError(f"{where}: {name} is a {kind_of(x)}, {what}; pass {way_out}")


def _of_torch(name: str, x: Any, where: str) -> Array:
    """Not by DLPack, which has the memory of a tensor that is lazy or of a class of its own, whatever it means."""
    torch = sys.modules["torch"]
    if x.device.type != "cpu":
        _refuse(where, name, x, f"on {x.device}", _TO_CPU["torch"].format(name))
    if not is_plain(type(x)):
        _refuse(where, name, x, "of a class that may give it a meaning of its own", "a torch.Tensor of its numbers")
    if x.requires_grad:
        way_out = f"{name}.detach(), or see qkv_fast.integrations.torch"
        _refuse(where, name, x, "whose gradient would be lost", way_out)
    if torch._is_functional_tensor(x):
        _refuse(where, name, x, "inside of a transform of torch.func", "what it stands for, outside of it")
    return memory_of(x)


def _is_on_cpu(name: str, x: Any, where: str) -> bool:
    """Or it is refused, and where it does not say `__array__` is asked."""
    library = type(x).__module__.partition(".")[0]
    try:
        # JAX has no one device for an array in parts, which `__array__` then puts together.
        if library in ("jax", "jaxlib"):
            device = next((found.platform for found in x.devices() if found.platform != "cpu"), None)
        else:
            number = int(x.__dlpack_device__()[0])
            device = None if number in _CPU else _DEVICES.get(number, f"device {number} of DLPack")
    except Exception:  # whatever a library raises for what has no memory, such as a tracer
        return False
    if device is not None:
        way_out = _TO_CPU.get(library, "a copy of {} in the CPU's memory").format(name)
        _refuse(where, name, x, f"in memory of another device than the CPU ({device})", way_out)
    return True


class _AsBits:
    """What DLPack makes of x, `in_place` no copy, with bfloat16, which NumPy does not know by itself, as 16 bits."""

    def __init__(self, x: Any, in_place: bool) -> None:
        self.x, self.in_place, self.is_bfloat16 = x, in_place, False

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if self.in_place and options:  # else it is asked as before DLPack 1, which knows no such word
            options["copy"] = False
        capsule = self.x.__dlpack__(**options)
        self.is_bfloat16 = _core.bfloat16_as_bits(capsule)
        return capsule


def _of_dlpack(x: Any, in_place: bool = False) -> Array:
    given = _AsBits(x, in_place)
    found: Array = np.from_dlpack(given)
    return found.view(_bfloat16()) if given.is_bfloat16 else found


def _bfloat16() -> Any:
    """The type of ml_dtypes, or, where that is missing, one for inside of a call."""
    found = _of_ml_dtypes()
    if found is None and sys.modules.get("ml_dtypes") is not None:  # installed and imported since
        _of_ml_dtypes.cache_clear()
        found = _of_ml_dtypes()
    return found or _of_ours()


@functools.cache
def _of_ml_dtypes() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


def _of_ours() -> Any:
    with _ONE:  # NumPy would take a second one as another type
        return _registered()


@functools.cache
def _registered() -> Any:
    """Whoever prints an array has NumPy write two bytes behind the header of a scalar: the class has room for them."""
    return _core.bfloat16_of_ours(type("bfloat16", (np.uint16,), {"__slots__": ()}))
