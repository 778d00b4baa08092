"""Compensation: what is done, once the maps are known, against what they lose.

A compensation takes a plan whose maps are settled, the opened source, its certificate and the evidence, and returns
the plan with refits or gains. They are done in the order in which they are named.
"""

from __future__ import annotations

from collections.abc import Callable

from hf_ws.compensation.least_squares import least_squares
from hf_ws.compensation.least_squares_hidden import least_squares_hidden
from hf_ws.compensation.mean_bias import mean_bias
from hf_ws.compensation.rms import rms
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.plan import Plan
from hf_ws.store import Source

Compensation = Callable[[Plan, Source, Certificate, Evidence], Plan]

COMPENSATIONS: dict[str, Compensation] = {
    "least_squares": least_squares,
    "least_squares_hidden": least_squares_hidden,
    "mean_bias": mean_bias,
    "rms": rms,
}

__all__ = ["COMPENSATIONS", "Compensation", *COMPENSATIONS]
