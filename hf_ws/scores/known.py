"""What a score may look at."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hf_ws.axes import EXPERTS, Dim, kind_of, parse
from hf_ws.errors import CalibrationError
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate, generic
from hf_ws.store import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """The source and what calibration saw of it."""

    source: Source
    certificate: Certificate
    evidence: Evidence | None = None
    """None without calibration data; else with everything that the score carries in `wants`."""
    seed: int = 0

    def seen(self, statistic: str, axis: str, layer: int | str | None) -> Tensor | None:
        """A statistic of an axis, float64 [size]; of experts, the router's mean weight; None where nothing is seen.

        Raises:
            CalibrationError: there is no evidence, or it lacks the statistic.
        """
        if self.evidence is None:
            raise CalibrationError(f"{statistic} of {axis} needs calibration data; pass calibration=")
        if kind_of(axis) == EXPERTS and layer is not None:
            found = self.evidence.route_weights.get(layer)
        else:
            found = self.evidence.statistic(statistic, axis, layer)
        if found is None:
            level = logging.INFO if layer is not None else logging.WARNING  # of the whole net: the stream
            where = axis if layer is None else f"{axis} of layer {layer}"
            logger.log(level, "%s: no activation to be seen, ranked by weight magnitude", where)
        return found

    def reading(self, axis: str) -> Iterator[tuple[int | str, str, int, Dim]]:
        """The tensors of layers that read an axis: layer, name, which of its dimensions, and what that is made of."""
        for name in self.source.tensors:
            pattern, layer = generic(name, self.certificate.stacks)
            for at, dim in enumerate(parse(self.certificate.layouts.get(pattern, ""))):
                if layer is not None and dim.reads and axis in dim.axes:
                    yield layer, name, at, dim
