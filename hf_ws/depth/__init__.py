"""Layer policies: which layers of the source the target keeps.

A policy takes the source's depth and the number to keep, and returns that many source layers in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_ws.depth.first import first
from hf_ws.depth.middle_dropped import middle_dropped

LayerPolicy = Callable[[int, int], tuple[int, ...]]

POLICIES: dict[str, LayerPolicy] = {"first": first, "middle_dropped": middle_dropped}

__all__ = ["POLICIES", "LayerPolicy", "first", "middle_dropped"]
