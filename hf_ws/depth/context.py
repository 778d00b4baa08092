"""What a policy that looks at data is given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hf_ws.axes import layer_key
from hf_ws.evidence import Evidence
from hf_ws.evidence.observation import Observation


@dataclass(frozen=True)
class Context:
    """One stack of the source, and the source on the calibration data."""

    axis: str
    """What counts the stack's layers: `layers`, `decoder.layers`."""
    observed: Observation
    wants: tuple[str, ...] = ()
    """What the policy carries in `wants`."""

    @property
    def evidence(self) -> Evidence:
        """With everything that the policy wants."""
        return self.observed.evidence(self.wants)

    def key(self, layer: int) -> int | str:
        """What evidence calls a layer of this stack."""
        return layer_key(self.axis, layer)

    def loss(self, skipped: Collection[int] = ()) -> float:
        """The source's mean loss, in nats, with these layers of the stack passing on what they get."""
        return self.observed.loss({self.key(layer) for layer in skipped})
