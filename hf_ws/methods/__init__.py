"""Methods: each returns a plan.

    def my_method(request: Request, *, option=1) -> Plan: ...

    AutoSubclone.from_pretrained("gpt2", hidden=384, method=my_method, method_args={"option": 2})

A method may carry `layer_policy` (a name in `hf_ws.depth.POLICIES`, used when the user names none; or several, each for
where those before it look at data that is not there), `compensation` (names in `hf_ws.compensation.COMPENSATIONS`,
likewise), `grows` (True if it can make an axis longer than the source's) and `wants` (what its plans will ask of
calibration data, so that one pass collects it together with what the layer policy asks; see
`hf_ws.evidence.STATISTICS`).
"""

from __future__ import annotations

from collections.abc import Callable

from hf_ws.methods.default import default_method
from hf_ws.methods.random import random
from hf_ws.methods.request import Request
from hf_ws.methods.rotation import rotation
from hf_ws.methods.subclone import subclone
from hf_ws.methods.weight_selection import weight_selection
from hf_ws.plan import Plan

Method = Callable[..., Plan]

METHODS: dict[str, Method] = {
    "random": random,
    "rotation": rotation,
    "subclone": subclone,
    "weight_selection": weight_selection,
}

__all__ = [
    "METHODS",
    "Method",
    "Request",
    "default_method",
    "random",
    "rotation",
    "subclone",
    "weight_selection",
]
