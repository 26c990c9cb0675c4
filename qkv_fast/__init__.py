"""Attention for NumPy arrays on CPUs, at the speed of the hardware."""

import sys as _sys

from ._version import __version__

try:
    import qkv_fast._core  # noqa: F401 (first, for its error)
except ModuleNotFoundError as error:
    if error.name != f"{__name__}._core":
        raise
    raise ImportError(
        f"{__path__[0]} is the source folder of qkv_fast, without its compiled part. Python found it before the "
        "installed package: run from another directory or with `python -P`, or build in place with "
        "`pip install -e .`"
    ) from None

from . import reference, spotlight
from ._attention import attention
from ._config import show_config
from ._explain import explain
from ._grad import attention_grad
from ._layers import Linear, linear, project_qkv
from ._masks import alibi_slopes
from ._merge import merge_partials
from ._multihead import MultiHeadAttention
from ._rope import rope
from ._runtime import available_isas, get_num_threads, isa, num_threads, set_num_threads
from ._stages import scores, softmax, softmax_grad, weighted_values
from ._varlen import attention_varlen
from .cache import KVCache, PagedKVCache

if hasattr(_sys.modules.get("threadpoolctl"), "register"):  # loaded, and new enough (3.2)
    from . import _threadpoolctl  # noqa: F401 (it registers itself)

__all__ = [
    "KVCache",
    "Linear",
    "MultiHeadAttention",
    "PagedKVCache",
    "__version__",
    "alibi_slopes",
    "attention",
    "attention_grad",
    "attention_varlen",
    "available_isas",
    "explain",
    "get_num_threads",
    "isa",
    "linear",
    "merge_partials",
    "num_threads",
    "project_qkv",
    "reference",
    "rope",
    "scores",
    "set_num_threads",
    "show_config",
    "softmax",
    "softmax_grad",
    "spotlight",
    "weighted_values",
]
