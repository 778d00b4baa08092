"""Importance scores: how much each channel, head or neuron of the source matters.

A score takes the opened source, its certificate, the evidence (None without calibration data), an axis and a source
layer (None for an axis of the whole net), and returns one number for each index of the axis, larger for what matters
more.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.scores.activation import activation
from hf_ws.scores.magnitude import magnitude
from hf_ws.store import Source

Score = Callable[[Source, Certificate, Evidence | None, str, int | str | None], Tensor]

SCORES: dict[str, Score] = {"activation": activation, "magnitude": magnitude}

__all__ = ["SCORES", "Score", "activation", "magnitude"]
