"""No importance at all: the baseline."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from hf_ws.scores.known import Known
from hf_ws.sizes import sizes_of


def random(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """Numbers drawn from the seed, others for every axis and layer: float64 [size], 0 to 1."""
    digest = sha256(f"{known.seed}|{axis}|{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(sizes_of(known.source.config)[axis], generator=generator, dtype=torch.float64)
