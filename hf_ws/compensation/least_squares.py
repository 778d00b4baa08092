"""Fit what reads a cut axis to what is left of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_ws.axes import HIDDEN, kind_of, parse, positions
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.maps import Gather, Refit
from hf_ws.plan import Plan
from hf_ws.store import Source

RIDGE = 1e-3
"""Added to the kept inputs' second moments, as a share of their mean: keeps what hardly moves from being blown up."""


def least_squares(plan: Plan, source: Source, certificate: Certificate, evidence: Evidence) -> Plan:
    """Every matrix that reads fewer neurons or heads than the source's is fitted to them.

    Of the source's inputs a [n] the target sees a_K. The best linear guess at a from a_K is E[a a_K^T] E[a_K a_K^T]^-1
    a_K, so that is what the matrix is multiplied by: W' a_K is then nearest to W a over the calibration data. With
    "mean_bias" asked for too, moments are taken about the mean, and W times what is missing of it goes into the bias.
    """
    refits = dict(plan.refits)
    for name, own, pattern, layer in tqdm(
        list(certificate.spelled(plan.layers)), desc="fitting", unit="matrix", delay=2
    ):
        layout = parse(plan.layouts[pattern])
        reading = [dim for dim in layout if dim.reads]
        if (
            len(reading) != 1
            or not reading[0].axes
            or any(kind_of(axis) == HIDDEN for axis in reading[0].axes)
        ):
            continue
        maps = {axis: plan.axis_map(axis, layer, name) for axis in reading[0].axes}
        if own not in evidence.moments or not any(_cuts(axis_map) for axis_map in maps.values()):
            continue
        arrays = {axis: m.as_array for axis, m in maps.items() if isinstance(m, Gather)}
        kept = positions(reading[0], plan.source_sizes, plan.target_sizes, arrays)
        refits[name] = Refit(fitted(evidence.moments[own].second.double(), torch.from_numpy(kept)))
    return replace(plan, refits=refits)


def _cuts(axis_map: object) -> bool:
    return isinstance(axis_map, Gather) and len(axis_map) < axis_map.size


def fitted(second: Tensor, kept: Tensor) -> np.ndarray:
    """What the kept inputs say of all: [kept, all], float32.

    Args:
        second: Second moments of the inputs [all, all], float64.
        kept: Which are kept.
    """
    inner = second[kept][:, kept]
    inner = inner + RIDGE * inner.diagonal().mean().clamp(min=1e-30) * torch.eye(len(kept), dtype=inner.dtype)
    return torch.linalg.solve(inner, second[kept]).float().numpy()
