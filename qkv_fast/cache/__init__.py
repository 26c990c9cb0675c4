"""Caches of keys and values: slabs and rings (slab, ring), pages (paged), files of them, and one attend for all."""

from .paged import PagedKVCache
from .slab import KVCache

__all__ = ["KVCache", "PagedKVCache"]
