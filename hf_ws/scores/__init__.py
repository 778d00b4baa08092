"""Importance scores: how much each channel, head, neuron or expert of the source matters.

A score takes what is `Known` (the opened source, its certificate, the evidence, the seed), an axis and a source layer
(None for an axis of the whole net), and returns one number for each index of the axis, larger for what matters more:

    def my_score(known, axis, layer): ...
    my_score.wants = ("variance",)        # the statistics it needs; a score without `wants` needs no data

    AutoSubclone.from_pretrained("gpt2", hidden=384, method_args={"score": my_score}, calibration=text)

Of heads it is asked by query heads; a key/value head has the mean of those that share it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_ws.errors import unknown
from hf_ws.scores.activation import activation
from hf_ws.scores.explained import explained
from hf_ws.scores.known import Known
from hf_ws.scores.l2_activation import l2_activation
from hf_ws.scores.magnitude import magnitude
from hf_ws.scores.random import random
from hf_ws.scores.taylor import taylor
from hf_ws.scores.uniform import uniform
from hf_ws.scores.variance import variance
from hf_ws.scores.weighted_activation import weighted_activation

Score = Callable[[Known, str, int | str | None], Tensor]

SCORES: dict[str, Score] = {
    "activation": activation,
    "l2_activation": l2_activation,
    "variance": variance,
    "explained": explained,
    "taylor": taylor,
    "weighted_activation": weighted_activation,
    "magnitude": magnitude,
    "random": random,
    "uniform": uniform,
}

__all__ = ["SCORES", "Known", "Score", "score_of", "wants_of", *SCORES]


def score_of(score: str | Score) -> Score:
    """The score of this name, or the callable itself. Raises PlanError for a name that is in no table."""
    if callable(score):
        return score
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    return SCORES[score]


def wants_of(score: str | Score) -> tuple[str, ...]:
    """The statistics that a score needs; none if it looks at no data."""
    return tuple(getattr(score_of(score), "wants", ()))
