"""The definition of every verb in plain NumPy and the next wider type: the tests' oracle, and documentation."""

from . import spotlight
from .attention import _distances, _limits_of, _visible, attention, attention_varlen  # noqa: F401 (tests count what is visible)
from .grad import attention_grad
from .stages import linear, rope, scores, softmax, softmax_grad, weighted_values

__all__ = [
    "attention",
    "attention_grad",
    "attention_varlen",
    "linear",
    "rope",
    "scores",
    "softmax",
    "softmax_grad",
    "spotlight",
    "weighted_values",
]
