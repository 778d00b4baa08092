"""Importance by the root mean square of the activations."""

from __future__ import annotations

from torch import Tensor

from hf_ws.scores.known import Known
from hf_ws.scores.magnitude import magnitude


def l2_activation(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """L2 norm of the activations over the calibration tokens, divided by the root of their number.

    Of the residual stream, summed over blocks. Where no activation is seen, by weight magnitude.

    Source: Minitron (2407.14679), section 2.2, with L2 over the batch. The paper takes the mean inside a sequence
    first, and of the stream what the norms put out; here all tokens count alike, and the stream itself.

    Raises:
        CalibrationError: there is no evidence.
    """
    found = known.seen("rms", axis, layer)
    return magnitude(known, axis, layer) if found is None else found


l2_activation.wants = ("rms", "routes")  # type: ignore[attr-defined]
