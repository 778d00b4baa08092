"""Layer policies: which layers of the source the target keeps.

A policy takes the source's depth and the number to keep, and returns that many source layers in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_ws.depth.first import first
from hf_ws.depth.middle_dropped import middle_dropped
from hf_ws.errors import PlanError, SizeError, unknown

LayerPolicy = Callable[[int, int], tuple[int, ...]]

POLICIES: dict[str, LayerPolicy] = {"first": first, "middle_dropped": middle_dropped}

__all__ = ["POLICIES", "LayerPolicy", "first", "kept_layers", "middle_dropped"]


def kept_layers(policy: Any, depth: int, asked: int | None, grows: bool) -> tuple[int, ...]:
    """The source layer of each target layer.

    Args:
        policy: A name in `POLICIES`, a policy, or the list of layers itself.
        depth: Layers of the source.
        asked: Layers of the target; None for as many.
        grows: Whether the method may repeat layers.

    Raises:
        SizeError: layers that the source does not have, or that this method cannot give.
        PlanError: an unknown policy, or one that does not keep what it was asked to.
    """
    if isinstance(policy, Sequence) and not isinstance(policy, str):
        kept = tuple(policy)
        if asked is not None and asked != len(kept):
            raise SizeError(f"layers={asked}, but layer_policy names {len(kept)}: {list(kept)}")
    else:
        if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
            raise SizeError(f"layers={asked!r}: wanted is a whole number, 1 to {depth}")
        keep = depth if asked is None else asked
        if keep > depth:
            if not grows:
                raise SizeError(
                    f"layers={keep} is more than the source's {depth}, and this method cannot grow"
                )
            return (*range(depth), *[depth - 1] * (keep - depth))
        if not callable(policy) and not (isinstance(policy, str) and policy in POLICIES):
            raise unknown("layer_policy", policy, POLICIES)
        kept = tuple((policy if callable(policy) else POLICIES[policy])(depth, keep))
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
