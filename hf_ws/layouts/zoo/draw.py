"""What rows of `hf_ws.layouts.zoo` are made of: random inputs, the same every time, and values by miniature."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

RESERVED = 24
"""Ids below this are padding, start, end and the like in a miniature: text has none of them."""


class Open(NamedTuple):
    """A field's value where the config itself has none: a published one always does."""

    value: Any


class Each(NamedTuple):
    """A field's value in the first miniature and in the second: a size that must be a multiple of something."""

    first: Any
    second: Any


def floats(*shape: int, seed: int = 1) -> Tensor:
    """Numbers around zero, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(vocab: int, *shape: int, seed: int = 1, low: int = RESERVED) -> Tensor:
    """Token ids [2, 9], or of another shape, none of them reserved."""
    return torch.randint(low, vocab, shape or (2, 9), generator=torch.Generator().manual_seed(seed))
