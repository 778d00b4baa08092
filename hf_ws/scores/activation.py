"""Importance by the size of the activations."""

from __future__ import annotations

import logging

from torch import Tensor

from hf_ws.errors import CalibrationError
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.scores.magnitude import magnitude
from hf_ws.store import Source

logger = logging.getLogger(__name__)


def activation(
    source: Source, certificate: Certificate, evidence: Evidence | None, axis: str, layer: int | str | None
) -> Tensor:
    """Mean absolute activation over the calibration tokens.

    For the residual stream, of every block's output, summed over blocks; for ffn, of what the down projection reads;
    for heads, of what the output projection reads, averaged over the head. Inside fused experts no activation can
    be seen from outside: there the weights' magnitude stands in.

    Source: Weight Subcloning (2312.09299), steps 1 to 4. "After the softmax" is read as each head's context.

    Raises:
        CalibrationError: there is no evidence.
    """
    if evidence is None:
        raise CalibrationError(
            "scores by activation need calibration data; pass calibration=, or score='magnitude'"
        )
    seen = evidence.get((axis, layer))
    if seen is None:
        logger.info("%s of layer %s: no activation to be seen, ranked by weight magnitude", axis, layer)
        return magnitude(source, certificate, evidence, axis, layer)
    return seen
