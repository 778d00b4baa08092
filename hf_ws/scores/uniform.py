"""Evenly spaced indices, said as a score."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ws.scores.known import Known
from hf_ws.sizes import sizes_of


def uniform(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """A score whose highest indices lie evenly, however many are kept: float64 [size].

    Index i scores the higher the smaller the number is that its binary digits give backwards (van der Corput's
    sequence): of half the indices every second is kept, of a quarter every fourth.
    """
    size = sizes_of(known.source.config)[axis]
    digits = max((size - 1).bit_length(), 1)
    backwards = [int(f"{i:0{digits}b}"[::-1], 2) for i in range(size)]
    return -torch.tensor(backwards, dtype=torch.float64)
