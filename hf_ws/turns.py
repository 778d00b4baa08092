"""Settle a turned stream: the basis that the evidence gives, and what each norm then multiplies by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hf_ws.errors import CalibrationError
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.layouts.certify import Spelled
from hf_ws.layouts.turn import with_mean, zero_mean_basis
from hf_ws.maps import Dense, Turn
from hf_ws.plan import Plan


def settle_turn(
    plan: Plan, certificate: Certificate, axis: str, turn: Turn, evidence: Evidence
) -> tuple[Dense, dict[str, float]]:
    """The basis of a stream, and the number that each of its norms multiplies every channel by, by target name.

    In D channels a norm gives x / sqrt(|x|^2 / D + eps); of that the kept part is M x over the same root. In d channels
    it gives M x / sqrt(|M x|^2 / d + eps). So it has to multiply by the one root over the other, on average.
    """
    found = {own.name: own for own in _norms(plan, certificate, axis, evidence)}
    seen = {name: _stream(evidence.moments[own.source].second, turn.centred) for name, own in found.items()}
    places = {target: second for target, second in seen.items() if float(second.trace()) > 0}
    if not places:
        raise CalibrationError(
            f"{axis}: no norm of the stream ran on the calibration data, or it is zero there; is it what it takes?"
        )
    whole = torch.stack([second * weight_of(second) for second in places.values()]).sum(0)
    free = turn.keep - turn.centred
    leading = torch.linalg.eigh(whole)[1].flip(1)[:, :free]
    largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
    basis = (
        leading * largest.sign()
    ).numpy()  # a direction has no sign of its own: the largest part is positive
    matrix = with_mean(zero_mean_basis(turn.keep), basis) if turn.centred else basis.T
    kept = torch.from_numpy(basis)
    levels = {
        name: level(
            float((kept.T @ second @ kept).trace()) / turn.keep,
            float(second.trace()) / turn.size,
            plan.folds[found[name].pattern].eps,
        )
        for name, second in places.items()
    }
    matrix = np.ascontiguousarray(matrix)
    return Dense(matrix, matrix, "leading directions of the"), levels


def level(kept: float, whole: float, eps: float) -> float:
    """What a norm has to multiply by, from the mean squares of the channels it sees and of those it saw."""
    return float(((kept + eps) / max(whole + eps, 1e-300)) ** 0.5)


def weight_of(second: Tensor) -> float:
    """How much a place of the stream with these second moments counts: each alike, whatever its size."""
    return 1 / float(second.trace())


def _stream(second: Tensor, centred: bool) -> Tensor:
    """Second moments [size, size] of what a norm looks at, in float64."""
    second = second.double()
    if centred:
        second = second - second.mean(0, keepdim=True)
        second = second - second.mean(1, keepdim=True)
    return second


def _norms(plan: Plan, certificate: Certificate, axis: str, evidence: Evidence) -> Iterator[Spelled]:
    """The gain of every norm of the stream that the target has, and that ran."""
    for own in certificate.spelled(plan.layers, plan.folds):
        fold = plan.folds.get(own.pattern)
        if fold is not None and fold.axis == axis and own.source in evidence.moments:
            yield own
