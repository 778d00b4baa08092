"""Importance by the size of the activations."""

from __future__ import annotations

from torch import Tensor

from hf_ws.scores.known import Known
from hf_ws.scores.magnitude import magnitude


def activation(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """Mean absolute activation over the calibration tokens.

    For the residual stream, of every block's output, summed over blocks; for ffn, of what the down projection reads;
    for heads, of what the output projection reads, averaged over the head; for experts, the router's mean weight.
    Of neurons in experts, over the tokens that each was given. Where experts are one tensor and their class lets no
    other function run them (Llama 4, LongCat, DBRX), none is seen: there the weights' magnitude stands in.

    Source: Weight Subcloning (2312.09299), steps 1 to 4. "After the softmax" is read as each head's context.

    Raises:
        CalibrationError: there is no evidence.
    """
    found = known.seen("mean_abs", axis, layer)
    return magnitude(known, axis, layer) if found is None else found


activation.wants = ("mean_abs", "routes")  # type: ignore[attr-defined]
