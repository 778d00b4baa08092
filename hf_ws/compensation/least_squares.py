"""Fit what reads a cut axis to what is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_ws.axes import HIDDEN, kind_of, parse, positions
from hf_ws.evidence import Evidence, Moments
from hf_ws.layouts import Certificate
from hf_ws.maps import Gather, Refit
from hf_ws.plan import Plan
from hf_ws.scores.elimination import RIDGE
from hf_ws.store import Source


def least_squares(plan: Plan, source: Source, certificate: Certificate, evidence: Evidence) -> Plan:
    """Every matrix that reads fewer neurons or heads than the source's is fitted to them.

    Of the source's inputs a [n] the target sees a_K. The best linear guess at a from a_K is E[a a_K^T] E[a_K a_K^T]^-1
    a_K, so that is what the matrix is multiplied by: W' a_K is then nearest to W a over the calibration data, with a
    small penalty on how far W' goes from the columns that are kept. It takes the place of a gain of fan-in.
    """
    refits, gains = dict(plan.refits), dict(plan.gains)
    for name, kept, moments in tqdm(
        list(cut(plan, certificate, evidence)), desc="fitting", unit="matrix", delay=2
    ):
        refits[name] = Refit(fitted(moments.second.double(), kept))
        gains |= without_gain(name, plan, certificate)
    return replace(plan, refits=refits, gains=gains)


least_squares.wants = ("moments",)  # type: ignore[attr-defined]


def cut(
    plan: Plan, certificate: Certificate, evidence: Evidence, stream: bool = False
) -> Iterator[tuple[str, Tensor, Moments]]:
    """Every matrix that reads fewer neurons or heads than the source's, or fewer channels of a `stream`: its name in
    the target, which of the source's inputs it keeps [target inputs], and their moments."""
    tied = certificate.tied if _ties(plan.target_config) else ()
    for name, source, pattern, layer in certificate.spelled(plan.layers):
        reading = [dim for dim in parse(plan.layouts[pattern]) if dim.reads]
        axes = reading[0].axes if len(reading) == 1 else ()
        if source not in evidence.moments or pattern in tied or plan.is_fresh(pattern):
            continue
        if stream is not any(kind_of(axis) == HIDDEN for axis in axes):
            continue
        maps = {axis: plan.axis_map(axis, layer, name) for axis in axes}
        if any(isinstance(m, Gather) and len(m) < m.size for m in maps.values()):
            arrays = {axis: m.as_array for axis, m in maps.items() if isinstance(m, Gather)}
            kept = positions(reading[0], plan.source_sizes, plan.target_sizes, arrays)
            yield name, torch.from_numpy(kept), evidence.moments[source]


def without_gain(name: str, plan: Plan, certificate: Certificate) -> dict[str, float]:
    """What to put among a plan's gains so that a matrix of the target, by name, has none."""
    return {name: 1.0} if certificate.kept(plan.layers).pattern(name) in plan.gains else {}


def _ties(config: Any) -> bool:
    """Whether a config, or one inside it, ties the head to the embedding."""
    if not isinstance(config, Mapping):
        return False
    return bool(config.get("tie_word_embeddings")) or any(map(_ties, config.values()))


def fitted(second: Tensor, kept: Tensor) -> np.ndarray:
    """What the kept inputs say of all, float32 [kept, all]: of themselves all, of the others what goes along with them.

    Args:
        second: Second moments of the inputs [all, all], float64.
        kept: Which are kept.
    """
    read = torch.zeros(len(kept), len(second), dtype=second.dtype)
    read[torch.arange(len(kept)), kept] = 1.0
    gone = torch.ones(len(second), dtype=torch.bool)
    gone[kept] = False
    inner = second[kept][:, kept]
    inner = inner + RIDGE * inner.diagonal().mean().clamp(min=1e-30) * torch.eye(len(kept), dtype=inner.dtype)
    read[:, gone] = torch.linalg.solve(inner, second[kept][:, gone])
    return read.float().numpy()
