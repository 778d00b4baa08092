"""Importance of a channel by what it says of all the others."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ws.axes import HIDDEN, kind_of
from hf_ws.errors import CalibrationError
from hf_ws.scores.activation import activation
from hf_ws.scores.known import Known


def explained(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """How much of the residual stream was not yet explained when a channel was chosen, one after the other.

    The next channel is always that which, by least squares and with those before it, leaves least of the stream's
    second moments unexplained. These are summed over the places where the stream is normed, each divided by its trace
    so that all count alike, as for `rotation`. Channels that only repeat others come last, however loud they are. It
    is what a basis of the stream can do that has to be a selection, as under a tied head, and goes with
    `compensation=["least_squares_hidden"]`. Neurons, heads and experts go by activation.

    Source: greedy column subset selection, Farahat et al. (2011), "An efficient greedy method for unsupervised feature
    selection".

    Raises:
        CalibrationError: there is no evidence, or no norm of the stream ran.
    """
    if kind_of(axis) != HIDDEN:
        return activation(known, axis, layer)
    left = _balanced(known, axis)
    chosen = torch.zeros(len(left), dtype=torch.bool)
    scores, tiny = torch.zeros(len(left), dtype=torch.float64), 1e-12 * float(left.diagonal().max())
    for _ in range(len(left)):
        own = left.diagonal()
        gain = (left.square().sum(0) / own.clamp(min=tiny)).masked_fill(chosen, -1.0)
        best = int(gain.argmax())
        chosen[best] = True
        scores[best] = own.sum().clamp(min=0)
        if own[best] > tiny:
            left = left - torch.outer(left[:, best], left[best]) / own[best]
    return scores


explained.wants = ("mean_abs", "moments", "routes")  # type: ignore[attr-defined]


def _balanced(known: Known, axis: str) -> Tensor:
    """Second moments [size, size] of the stream, float64: every place where it is normed counts alike."""
    if known.evidence is None:
        raise CalibrationError(f"explained needs calibration data to rank {axis}; pass calibration=")
    layouts = known.certificate.layouts
    places = {
        id(moments): moments.second.double()
        for name, moments in known.evidence.moments.items()
        if layouts.get(known.certificate.pattern(name)) == axis
    }
    if not places:
        raise CalibrationError(
            f"explained: no norm of {axis} with a gain ran on the calibration data; rank by another score"
        )
    whole = torch.stack([second / second.trace().clamp(min=1e-300) for second in places.values()]).sum(0)
    return (whole + whole.T) / 2
