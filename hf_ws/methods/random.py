"""The baseline: a fresh model of the target's size."""

from __future__ import annotations

from hf_ws.methods.request import Request
from hf_ws.plan import Plan


def random(request: Request) -> Plan:
    """Nothing is transferred; the model class initialises every weight from the seed."""
    return request.plan({}, fresh=("*",))


random.grows = True  # type: ignore[attr-defined]
