"""Of several policies' choices, the one that costs least."""

from __future__ import annotations

from hf_ws.depth.angular_distance import angular_distance
from hf_ws.depth.block_influence import block_influence
from hf_ws.depth.context import Context
from hf_ws.depth.middle_dropped import middle_dropped


def lowest_loss(depth: int, keep: int, context: Context) -> tuple[int, ...]:
    """What `middle_dropped`, `angular_distance` or `block_influence` keeps: that with the lowest loss on the data.

    No one of them is best for every model, and which one is shows as soon as the source is run without the other
    layers: one pass over the data for each different choice, where `loss_increase` takes some depth^2 / 2. Of equal
    losses, the first is taken.

    Raises:
        CalibrationError: the streams between the layers were not all seen, or the model gives no loss on this data.
    """
    choices = dict.fromkeys(
        (
            middle_dropped(depth, keep),
            angular_distance(depth, keep, context),
            block_influence(depth, keep, context),
        )
    )
    if len(choices) == 1:
        return next(iter(choices))
    return min(choices, key=lambda kept: context.loss({*range(depth)} - {*kept}))


lowest_loss.wants = ("similarity", "angles")  # type: ignore[attr-defined]
