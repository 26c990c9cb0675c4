"""Where attention falls, without the matrix of weights: questions that take attention's arguments."""

from .cells import pooled
from .influence import influence
from .keys import received
from .matrix import weights
from .queries import entropy, largest, top_keys

__all__ = ["entropy", "influence", "largest", "pooled", "received", "top_keys", "weights"]
