"""Importance by how much an activation varies."""

from __future__ import annotations

from torch import Tensor

from hf_ws.scores.known import Known
from hf_ws.scores.magnitude import magnitude


def variance(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """Variance of the activations over the calibration tokens: what a constant, such as a bias, cannot stand in for.

    Of a head, averaged over its channels; of the residual stream, summed over blocks. Where no activation is seen,
    by weight magnitude.

    Source: FLAP (2312.11983), section 3.2, the fluctuation of a channel, without its weights.

    Raises:
        CalibrationError: there is no evidence.
    """
    found = known.seen("variance", axis, layer)
    return magnitude(known, axis, layer) if found is None else found


variance.wants = ("variance", "routes")  # type: ignore[attr-defined]
