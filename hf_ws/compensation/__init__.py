"""Compensation: what is done, once the maps are known, against what they lose.

A compensation takes a plan whose maps are settled, the opened source, its certificate and the evidence, and returns
the plan with refits, gains or values. They are done in the order of `COMPENSATIONS`, in whichever they are named: each
looks at what those before it made. One carries `wants`, the statistics that it looks at. One that has to run the start
as it is so far carries `runs = True`, and takes a fifth argument, a `Running`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hf_ws.compensation.least_squares import least_squares
from hf_ws.compensation.least_squares_drifted import least_squares_drifted
from hf_ws.compensation.least_squares_hidden import least_squares_hidden
from hf_ws.compensation.mean_bias import mean_bias
from hf_ws.compensation.output import output
from hf_ws.compensation.rms import rms
from hf_ws.compensation.running import Running
from hf_ws.errors import PlanError, unknown
from hf_ws.plan import Plan

Compensation = Callable[..., Plan]

COMPENSATIONS: dict[str, Compensation] = {
    "least_squares": least_squares,
    "least_squares_hidden": least_squares_hidden,
    "rms": rms,
    "mean_bias": mean_bias,  # what the fits leave
    "least_squares_drifted": least_squares_drifted,  # runs the start, and its matrices are settled then
    "output": output,  # runs it too, to the end
}

__all__ = ["COMPENSATIONS", "Compensation", "Running", "chosen", "wants_of", *COMPENSATIONS]


def wants_of(names: Iterable[str]) -> tuple[str, ...]:
    """The statistics that these compensations look at."""
    return tuple(dict.fromkeys(want for name in names for want in getattr(COMPENSATIONS[name], "wants", ())))


def chosen(asked: Sequence[str] | None, method: Callable[..., Plan]) -> tuple[str, ...]:
    """What is to be done against what the maps lose, in the order it is done in: what is asked, or the method's own.

    Raises:
        PlanError: a name that is not in `COMPENSATIONS`, or that comes twice.
    """
    if asked is None:
        return tuple(getattr(method, "compensation", ()))
    for name in asked:
        if name not in COMPENSATIONS:
            raise unknown("compensation", name, COMPENSATIONS)
    if len({*asked}) < len(asked):
        raise PlanError(f"compensation {list(asked)} names one twice; each is done once")
    return tuple(name for name in COMPENSATIONS if name in asked)
