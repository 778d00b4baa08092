"""Let a bias say what is lost on average."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_ws.compensation.least_squares import cut, fitted
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.maps import Refit
from hf_ws.plan import Plan
from hf_ws.store import Source


def mean_bias(plan: Plan, source: Source, certificate: Certificate, evidence: Evidence) -> Plan:
    """Of every matrix that reads fewer neurons or heads, and has a bias, the bias makes up for the mean of the others.

    The source computes W a + b, the target g W' a_K + b', where g is the gain of fan-in if there is one. With
    b' = b + W E[a] - g W' E[a_K] both have the same mean over the calibration data. After "least_squares" the fit is
    made anew with moments about the mean, which is then what is left to fit. Matrices without a bias stay as they are:
    a stock class has no place for another.

    Source: bias compensation of pruned neurons, FLAP (2312.11983).
    """
    refits = dict(plan.refits)
    for name, kept, moments in cut(plan, certificate, evidence):
        bias = f"{name.removesuffix('weight')}bias"
        if certificate.pattern(bias) not in plan.layouts:
            continue
        mean, centred = moments.mean.double(), name in refits
        read = (
            fitted(moments.second.double() - mean.outer(mean), kept) if centred else _plain(kept, len(mean))
        )
        gain = plan.gains.get(name, plan.gains.get(certificate.kept(plan.layers).pattern(name), 1.0))
        rest = mean - gain * torch.from_numpy(read).double().T @ mean[kept]
        refits[name] = Refit(read, rest.numpy())
    return replace(plan, refits=refits)


mean_bias.wants = ("moments",)  # type: ignore[attr-defined]


def _plain(kept: Tensor, size: int) -> np.ndarray:
    """Selection as a matrix [kept, size]."""
    return np.asarray(torch.nn.functional.one_hot(kept, size).float().numpy())
