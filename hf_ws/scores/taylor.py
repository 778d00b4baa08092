"""Importance by what the loss would change, to first order."""

from __future__ import annotations

from torch import Tensor

from hf_ws.scores.known import Known
from hf_ws.scores.magnitude import magnitude


def taylor(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """E|sum of a dL/da|: the loss of a token's sequence when an activation is set to zero there, to first order.

    The sum runs over what belongs to an index (of a head, over its channels), the mean over tokens; of the residual
    stream, the values of all blocks are added. Runs the source backwards. Where no activation is seen, by weight
    magnitude.

    Source: Molchanov et al. (1611.06440), section 2.2; of channels in groups, 1906.10771.

    Raises:
        CalibrationError: there is no evidence, or the model gives no loss on it.
    """
    found = known.seen("taylor", axis, layer)
    return magnitude(known, axis, layer) if found is None else found


taylor.wants = ("taylor", "routes")  # type: ignore[attr-defined]
