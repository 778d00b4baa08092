"""Importance by the size of the weights."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_ws.axes import parse
from hf_ws.evidence import by_axis
from hf_ws.layouts import generic
from hf_ws.scores.known import Known
from hf_ws.sizes import sizes_of
from hf_ws.store import Source

_MEANS: WeakKeyDictionary[Source, dict[str, list[Tensor]]] = WeakKeyDictionary()
"""Mean absolute weight along each dimension of each tensor: every axis asks, and each weight is read once."""


def magnitude(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """Mean absolute weight of every matrix that touches each index, summed over them; needs no data.

    Gains and biases are left out: a norm's gains lie near one, matrices near 0.02, and they would drown them
    (BENCHMARKS.md, "What a start knows before training").

    Returns:
        Float64 [size of the axis].
    """
    source, certificate = known.source, known.certificate
    sizes = sizes_of(source.config)
    total = torch.zeros(sizes[axis], dtype=torch.float64)
    for name in source.tensors:
        pattern, number = generic(name, certificate.stacks)
        layout = parse(certificate.layouts.get(pattern, ""))
        if len(layout) < 2 or (layer is not None and number != layer):
            continue
        for at, dim in enumerate(layout):
            if axis in dim.axes:
                total += by_axis(_means(source, name)[at], dim, axis, sizes)
    return total


def _means(source: Source, name: str) -> list[Tensor]:
    """For each dimension of a matrix, the mean absolute weight at each position."""
    cache = _MEANS.setdefault(source, {})
    if name not in cache:
        weight = source.tensor(name).abs().float()
        dims = range(weight.ndim)
        cache[name] = [weight.mean([d for d in dims if d != at]).double().cpu() for at in dims]
    return cache[name]
