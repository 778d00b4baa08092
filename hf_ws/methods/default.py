"""Which method is taken where none is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def default_method(calibrated: bool) -> tuple[str, Mapping[str, Any]]:
    """The best start measured in BENCHMARKS.md, with calibration data or without: the method and its options.

    `rotation` with data; a tied head stays tied, for sizes say how many parameters there will be. Without data
    `subclone` by weight magnitude: before training `weight_selection` is ahead of it, a hundred steps later far behind.
    """
    return ("rotation", {"untie": False}) if calibrated else ("subclone", {})
