"""Layer policies: which layers of the source the target keeps.

A policy takes the source's depth and the number to keep, and returns that many source layers in ascending order:

    def my_policy(depth, keep): ...

One that looks at data carries `wants`, the names of the statistics it needs (`hf_ws.evidence.STATISTICS`; empty if it
only asks for the loss), and takes a third argument, a `Context` with the evidence of its stack:

    def my_policy(depth, keep, context): ...
    my_policy.wants = ("similarity",)

One that merges returns `merged(layers, blends)`, with the sums of source layers that take their place.

Each stack of a model (`encoder.layers`, `decoder.layers`) is asked for by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from hf_ws.depth.angular_distance import angular_distance
from hf_ws.depth.block_influence import block_influence
from hf_ws.depth.context import Context
from hf_ws.depth.evenly_spaced import evenly_spaced
from hf_ws.depth.first import first
from hf_ws.depth.kept import Kept, blends_of, merged
from hf_ws.depth.last import last
from hf_ws.depth.loss_increase import loss_increase
from hf_ws.depth.lowest_loss import lowest_loss
from hf_ws.depth.merge_neighbours import merge_neighbours
from hf_ws.depth.middle_dropped import middle_dropped
from hf_ws.errors import CalibrationError, PlanError, SizeError, unknown

LayerPolicy = Callable[..., tuple[int, ...]]

POLICIES: dict[str, LayerPolicy] = {
    "first": first,
    "last": last,
    "middle_dropped": middle_dropped,
    "evenly_spaced": evenly_spaced,
    "block_influence": block_influence,
    "angular_distance": angular_distance,
    "loss_increase": loss_increase,
    "lowest_loss": lowest_loss,
    "merge_neighbours": merge_neighbours,
}

__all__ = [
    "POLICIES",
    "Context",
    "Kept",
    "LayerPolicy",
    "behind_the_first",
    "blends_of",
    "kept_layers",
    "merged",
    "wants_of",
    *POLICIES,
]


def wants_of(policy: Any) -> tuple[str, ...] | None:
    """The statistics that a policy needs; None if it looks at no data."""
    found = POLICIES.get(policy) if isinstance(policy, str) else policy
    wants = getattr(found, "wants", None)
    return None if wants is None else tuple(wants)


def kept_layers(
    policy: Any, depth: int, asked: int | None, grows: bool, context: Context | None = None
) -> tuple[int, ...]:
    """The source layer of each target layer.

    Args:
        policy: A name in `POLICIES`, a policy, or the list of layers itself.
        depth: Layers of the source.
        asked: Layers of the target; None for as many.
        grows: Whether the method may repeat layers.
        context: What a policy that looks at data is given; None where there is no calibration data.

    Raises:
        CalibrationError: a policy that looks at data, and there is none.
        SizeError: layers that the source does not have, or that this method cannot give.
        PlanError: an unknown policy, or one that does not keep what it was asked to.
    """
    if isinstance(policy, Sequence) and not isinstance(policy, str):
        kept = _layers(policy)
        if asked is not None and asked != len(kept):
            raise SizeError(f"layers={asked}, but layer_policy names {len(kept)}: {list(kept)}")
    else:
        if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
            raise SizeError(f"layers={asked!r}: wanted is a whole number, 1 to {depth}")
        keep = depth if asked is None else asked
        if keep > depth:
            if not grows:
                raise SizeError(
                    f"layers={keep} is more than the source's {depth}, and this method cannot grow; ask for at most "
                    f"{depth}, or for a method that grows, such as random"
                )
            return (*range(depth), *[depth - 1] * (keep - depth))
        kept = _chosen(policy, depth, keep, context)
        if len(kept) != keep:
            raise PlanError(
                f"layer_policy {policy!r} kept {len(kept)} layers, {keep} were asked for: {list(kept)}"
            )
    if not kept or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth for i in kept):
        raise SizeError(f"layers {list(kept)}: allowed are 0 to {depth - 1}, at least one of them")
    if not grows and list(kept) != sorted(set(kept)):
        raise SizeError(
            f"layers {list(kept)} are not in ascending order, or repeat; this method only drops layers"
        )
    return kept


def _chosen(policy: Any, depth: int, keep: int, context: Context | None) -> tuple[int, ...]:
    if not callable(policy) and not (isinstance(policy, str) and policy in POLICIES):
        raise unknown("layer_policy", policy, POLICIES)
    found = policy if callable(policy) else POLICIES[policy]
    if wants_of(found) is None:
        return _layers(found(depth, keep))
    if keep == depth:
        return tuple(range(depth))
    if context is None:
        name = policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__)
        static = ", ".join(name for name in POLICIES if wants_of(name) is None)
        raise CalibrationError(
            f"layer_policy {name} looks at calibration data, and there is none; pass calibration=, or one of {static}"
        )
    return _layers(found(depth, keep, context))


def _layers(found: Sequence[int]) -> tuple[int, ...]:
    """The layers as they are kept in a plan: NumPy's whole numbers become Python's."""
    if isinstance(found, Kept):
        return found
    try:
        return tuple(
            operator.index(one) if hasattr(one, "__index__") and not isinstance(one, bool) else one
            for one in found
        )
    except TypeError:
        raise PlanError(
            f"layer_policy gave {found!r}; wanted are the numbers of the layers to keep"
        ) from None


def behind_the_first(axis: str, kept: Sequence[int], depth: int) -> tuple[int, ...]:
    """The kept layers of a stack whose first layer has other shapes: that one first, then only others."""
    if depth == 1 and len(kept) > 1:
        raise PlanError(
            f"{axis}={len(kept)}: its one layer is unlike any that could follow it; leave it at 1"
        )
    behind = (0, *(max(1, layer) for layer in kept[1:]))
    return merged(behind, kept.blends) if isinstance(kept, Kept) else behind
