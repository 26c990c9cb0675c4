"""Pictures of where attention falls: a text lit by weights, heat maps, and maps to zoom into.

HTML files need nothing beside them; only `heatmap` needs matplotlib (`pip install "qkv-fast[plot]"`).
"""

from .maps import heatmap
from .texts import LitText, spotlight, strip
from .zooming import zoom

__all__ = ["LitText", "heatmap", "spotlight", "strip", "zoom"]
