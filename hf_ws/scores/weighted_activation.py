"""Importance by activations times the weights that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ws.axes import EXPERTS, kind_of
from hf_ws.evidence import by_axis
from hf_ws.scores.known import Known
from hf_ws.scores.magnitude import magnitude
from hf_ws.sizes import sizes_of


def weighted_activation(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """Root mean square of each activation times the root mean square of the weights that read it.

    Of the residual stream, block by block: the stream behind a block with the matrices in it, and then summed. Where no
    activation is seen, or nothing is known to read it, by weight magnitude; of experts, the router's mean weight.

    Source: Wanda (2306.11695), section 3, |W_ij| times the L2 norm of input j, gathered over the rows of each matrix.

    Raises:
        CalibrationError: there is no evidence.
    """
    whole = known.seen("rms", axis, layer)
    if whole is None:
        return magnitude(known, axis, layer)
    if kind_of(axis) == EXPERTS:
        return whole
    readers = _readers(known, axis)
    layers = [one for one in readers if layer in (None, one)]
    total = torch.zeros(sizes_of(known.source.config)[axis], dtype=torch.float64)
    for one in layers:
        found = known.seen("rms", axis, one)
        if found is not None:
            total += found * readers[one]
    return total if total.any() else magnitude(known, axis, layer)


def _readers(known: Known, axis: str) -> dict[int | str, Tensor]:
    """By layer, the root mean square weight that reads each index, summed over matrices: float64 [size]."""
    sizes = sizes_of(known.source.config)
    found: dict[int | str, Tensor] = {}
    for layer, name, at, dim in known.reading(axis):
        weight = known.source.tensor(name).float().square()
        squares = weight.mean([d for d in range(weight.ndim) if d != at]).double().cpu()
        norm = by_axis(squares, dim, axis, sizes).sqrt()
        found[layer] = found.get(layer, torch.zeros_like(norm)) + norm
    return found


weighted_activation.wants = ("rms", "routes")  # type: ignore[attr-defined]
