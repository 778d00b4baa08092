"""How large the target shall be, where no sizes are given: `params="125M"`, or `ratio=0.4` of the source."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hf_ws.errors import PlanError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Goal:
    """So many parameters, or such a part of the source's; what is tied counts once, embeddings count."""

    params: int | None = None
    ratio: float | None = None

    @classmethod
    def of(cls, params: str | int | None, ratio: float | None) -> Goal | None:
        """The goal that these arguments mean; None if neither is given.

        Raises:
            PlanError: both, or one that is no number above 0; a ratio above 1.
        """
        if params is None and ratio is None:
            return None
        if params is not None and ratio is not None:
            raise PlanError(f"params={params!r} and ratio={ratio!r} both given; give one of the two")
        if params is not None:
            return cls(params=_counted(params))
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or not 0 < float(ratio or 0) <= 1:
            raise PlanError(f"ratio={ratio!r}: wanted is a part of the source's parameters, above 0, up to 1")
        return cls(ratio=float(ratio or 0))

    def wanted(self, source: int) -> int:
        """Parameters of the target, for a source with so many."""
        return self.params if self.params is not None else round(source * (self.ratio or 1.0))

    def __str__(self) -> str:
        return f"params={self.params:,}" if self.params is not None else f"ratio={self.ratio:g}"


def _counted(params: str | int) -> int:
    """`"125M"`, `"1.5B"`, `"350_000"` or a whole number, as a whole number."""
    match = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([KMBGT]?)\s*", str(params).upper())
    count = 0
    if match and not isinstance(params, bool | float):
        count = round(float(match[1].replace("_", "").replace(",", "")) * _UNITS[match[2]])
    if count < 1 or not math.isfinite(count):
        raise PlanError(
            f'params={params!r}: wanted is a number of parameters, such as 125_000_000 or "125M" (K, M, B, T)'
        )
    return count
