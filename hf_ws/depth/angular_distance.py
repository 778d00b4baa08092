"""Drop the run of layers that turns the residual stream least."""

from __future__ import annotations

from hf_ws.depth.context import Context
from hf_ws.errors import CalibrationError


def angular_distance(depth: int, keep: int, context: Context) -> tuple[int, ...]:
    """All but the run of depth - keep layers with the least angle between what enters and what leaves it.

    Source: The Unreasonable Ineffectiveness of the Deeper Layers (2403.17887), section 3.2. The paper measures at the
    last token of each sequence; here evenly spread tokens are taken, for there are fewer sequences. Of equal runs,
    the first is dropped.

    Raises:
        CalibrationError: a stack whose boundaries were not all seen.
    """
    angles = context.evidence.angles.get(context.axis)
    if angles is None:
        raise CalibrationError(
            f"angular_distance: the streams between {context.axis} have not one shape, or were not all seen; "
            "name another layer_policy"
        )
    run = depth - keep
    start = min(range(keep + 1), key=lambda layer: float(angles[layer, layer + run]))
    return (*range(start), *range(start + run, depth))


angular_distance.wants = ("angles",)  # type: ignore[attr-defined]
