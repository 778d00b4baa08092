"""Importance by the size of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ws.axes import parse
from hf_ws.evidence import Evidence, by_axis
from hf_ws.layouts import Certificate, generic
from hf_ws.sizes import sizes_of
from hf_ws.store import Source


def magnitude(
    source: Source, certificate: Certificate, evidence: Evidence | None, axis: str, layer: int | None
) -> Tensor:
    """Mean absolute weight of everything that touches each index, summed over tensors; needs no data.

    Returns:
        Float64 [size of the axis].
    """
    sizes = sizes_of(source.config)
    total = torch.zeros(sizes[axis], dtype=torch.float64)
    for name in source.tensors:
        pattern, number = generic(name, certificate.stacks)
        layout = parse(certificate.layouts.get(pattern, ""))
        if number != layer and layer is not None:
            continue
        for at, dim in enumerate(layout):
            if axis in dim.axes:
                weight = source.tensor(name)
                others = [d for d in range(weight.ndim) if d != at]
                means = weight.abs().mean(others, dtype=torch.float64) if others else weight.abs().double()
                total += by_axis(means, dim, axis, sizes)
    return total
