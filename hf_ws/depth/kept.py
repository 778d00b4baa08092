"""Layers of which some are sums of several of the source's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hf_ws.axes import layer_key
from hf_ws.errors import PlanError
from hf_ws.layouts.census import Shapes
from hf_ws.layouts.stacks import Stacks, generic


class Kept(tuple[int, ...]):
    """The source layer of each target layer, and the sums that take its place: what a policy that merges returns.

    Importance, and what is fitted, go by the one source layer in the tuple.
    """

    blends: Mapping[int, Mapping[int, float]] = MappingProxyType({})
    """By target layer, the weight of each source layer in the sum."""


def merged(layers: Sequence[int], blends: Mapping[int, Mapping[int, float]]) -> Kept:
    """These layers, with these sums."""
    kept = Kept(layers)
    kept.blends = blends
    return kept


def blends_of(
    kept: Mapping[str, tuple[int, ...]], stacks: Stacks, shapes: Shapes
) -> dict[str, dict[str, float]]:
    """The sums of all stacks as a plan has them: by the key of the target layer, by the number of the source's.

    Args:
        kept: What the policies gave, by the axis that counts layers.
        stacks: Of the source.
        shapes: Of the source's tensors, by name.

    Raises:
        PlanError: a sum of layers that have not the same tensors.
    """
    found = {}
    for axis, layers in kept.items():
        for target, parts in layers.blends.items() if isinstance(layers, Kept) else ():
            tensors = [_tensors(layer_key(axis, layer), stacks, shapes) for layer in parts]
            if any(own != tensors[0] for own in tensors):
                raise PlanError(
                    f"layers {', '.join(map(str, parts))} of {axis} have not the same tensors and cannot be merged; "
                    "name a layer_policy that drops layers"
                )
            found[str(layer_key(axis, target))] = {str(layer): float(share) for layer, share in parts.items()}
    return found


def _tensors(layer: int | str, stacks: Stacks, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer's tensors, by name without its number."""
    named = {generic(name, stacks): tuple(shape) for name, shape in shapes.items()}
    return {pattern: shape for (pattern, own), shape in named.items() if own == layer}
