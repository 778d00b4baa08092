"""Where a model is watched: found by the layouts of its parameters, not by the names of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_ws.axes import (
    EXPERTS,
    FFN,
    HEADS,
    HIDDEN,
    MOE_FFN,
    Dim,
    Layout,
    coordinates,
    kind_of,
    layer_key,
    parse,
)
from hf_ws.evidence.fused import can_be_watched
from hf_ws.layouts import Certificate, generic
from hf_ws.sizes import sizes_of


@dataclass(frozen=True)
class Site:
    """One place where an axis is seen: what a matrix reads, or what a block puts out."""

    key: str
    """The module's name and the axis; no two sites share it."""
    axis: str
    layer: int | str
    dim: Dim
    """The dimension of what is seen."""


def readers(model: PreTrainedModel, certificate: Certificate) -> dict[str, tuple[Site, ...]]:
    """The linear maps in layers that read neurons or heads, by module name."""
    found = {}
    for name, module in model.named_modules():
        _, layer = generic(f"{name}.weight", certificate.stacks)
        if isinstance(module, nn.Linear | Conv1D) and layer is not None:
            dims = _layout(f"{name}.weight", certificate)
            pairs = [(axis, dim) for dim in dims if dim.reads for axis in dim.axes]
            sites = [
                Site(f"{name}:{axis}", axis, layer, dim)
                for axis, dim in pairs
                if kind_of(axis) in (FFN, MOE_FFN, HEADS)
            ]
            if sites:
                found[name] = tuple(sites)
    return found


def fused(model: PreTrainedModel, certificate: Certificate) -> dict[str, Site]:
    """The modules that hold a layer's fused experts and can show their neurons, by name."""
    found = {}
    for name, module in model.named_modules():
        _, layer = generic(f"{name}.weight", certificate.stacks)
        dims = _layout(f"{name}.down_proj", certificate)
        if layer is None or len(dims) != 3 or not can_be_watched(module):
            continue
        for dim in dims[1:]:
            axis = dim.expression
            if dim.reads and isinstance(axis, str) and kind_of(axis) in (FFN, MOE_FFN):
                found[name] = Site(f"{name}:{axis}", axis, layer, dim)
    return found


def every(model: PreTrainedModel, certificate: Certificate) -> list[Site]:
    """Every site of `readers`, `fused` and `blocks`."""
    return [
        *(site for own in readers(model, certificate).values() for site in own),
        *fused(model, certificate).values(),
        *(site for site, _ in blocks(model, certificate).values()),
    ]


def blocks(model: PreTrainedModel, certificate: Certificate) -> dict[str, tuple[Site, str]]:
    """The layers of every stack, by module name, with the axis that counts them."""
    found = {}
    streams = {stack: _stream(stack, certificate) for stack in certificate.stacks}
    for name, _ in model.named_modules():
        stack, _, number = name.rpartition(".")
        if (stream := streams.get(stack)) and number.isdigit():
            counts = certificate.stacks[stack]
            site = Site(f"{name}:{stream}", stream, layer_key(counts, int(number)), Dim(stream))
            found[name] = (site, counts)
    return found


def inputs(model: PreTrainedModel, certificate: Certificate) -> dict[str, str]:
    """The modules whose input has moments, by name, each with the parameter that these are called by.

    Linear maps with a side that reads, and norms whose gain lies along the residual stream and nothing else.
    """
    found = {}
    streams = {(size,) for axis, size in sizes_of(model.config).items() if kind_of(axis) == HIDDEN}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            if any(dim.reads and dim.axes for dim in _layout(f"{name}.weight", certificate)):
                found[name] = f"{name}.weight"
        elif "norm" in type(module).__name__.lower():
            if getattr(module, "normalized_shape", None) in streams and not [*module.parameters()]:
                found[name] = f"{name}.weight"  # what its gain would be called, if it had one (OLMo)
            for own, _ in module.named_parameters(recurse=False):
                layout = _layout(f"{name}.{own}", certificate)
                if own != "bias" and len(layout) == 1 and _is_stream(layout[0]):
                    found[name] = f"{name}.{own}"
    return found


def experts(model: PreTrainedModel, certificate: Certificate) -> dict[str, tuple[str, int | str]]:
    """The modules that hold a layer's fused experts, by name: the axis that counts these, and the layer.

    They have a parameter with an expert in each place of its first dimension, or are told which experts to take and
    have one beneath them whose first dimension goes through all experts (DBRX).
    """
    found = {}
    for name, module in model.named_modules():
        _, layer = generic(f"{name}.weight", certificate.stacks)
        told = "top_k_index" in signature(module.forward).parameters
        for own, _ in module.named_parameters(recurse=told):
            layout = _layout(f"{name}.{own}", certificate)
            counts = layout[0].axes[0] if layout and layout[0].axes else ""
            whole = len(layout) == 3 and layout[0].expression == counts
            if layer is not None and kind_of(counts) == EXPERTS and (whole or told):
                found[name] = (counts, layer)
    return found


def routers(model: PreTrainedModel, certificate: Certificate) -> dict[str, tuple[str, int | str]]:
    """The modules that score a layer's experts and choose among them too, by name: the axis, and the layer."""
    found = {}
    for name, module in model.named_modules():
        _, layer = generic(f"{name}.weight", certificate.stacks)
        layout = _layout(f"{name}.weight", certificate)
        counts = layout[0].expression if len(layout) == 2 and _is_stream(layout[1]) else None
        chooses = type(module) is not nn.Linear
        if layer is not None and isinstance(counts, str) and kind_of(counts) == EXPERTS and chooses:
            found[name] = (counts, layer)
    return found


def place(dim: Dim, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """The index on `axis` of each position along `dim`, -1 where it has none: integers [length of `dim`]."""
    return torch.from_numpy(coordinates(dim, sizes)[axis])


def by_axis(values: Tensor, dim: Dim, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """`values` [length of `dim`], averaged over everything in the dimension but one axis: float64 [size]."""
    if dim.expression == axis:
        return values
    where = place(dim, axis, sizes)
    present = where >= 0
    total = torch.zeros(sizes[axis], dtype=torch.float64).index_add_(
        0, where[present], values[present].double()
    )
    counts = torch.zeros(sizes[axis], dtype=torch.float64).index_add_(
        0, where[present], torch.ones(int(present.sum()), dtype=torch.float64)
    )
    return total / counts.clamp(min=1)


def _layout(name: str, certificate: Certificate) -> Layout:
    return parse(certificate.layouts.get(generic(name, certificate.stacks)[0], ""))


def _is_stream(dim: Dim) -> bool:
    return isinstance(dim.expression, str) and kind_of(dim.expression) == HIDDEN


def _stream(stack: str, certificate: Certificate) -> str | None:
    """The axis of the residual stream of a stack's layers."""
    for name, text in certificate.layouts.items():
        for dim in parse(text) if name.startswith(f"{stack}.*") else ():
            if isinstance(dim.expression, str) and kind_of(dim.expression) == HIDDEN:
                return dim.expression
    return None
