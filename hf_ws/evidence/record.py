"""What calibration found out, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from hf_ws.errors import CalibrationError

PER_AXIS = ("mean_abs", "rms", "mean", "variance", "taylor")
"""The statistics that give one number for each index of an axis."""

STATISTICS = (*PER_AXIS, "moments", "similarity", "angles", "routes")
"""Everything that `calibrate` can collect."""

Key: TypeAlias = tuple[str, int | str | None]
"""An axis and a source layer, as `layer_key` calls it; None for the whole net."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of what a matrix reads, or of what enters a norm, over the calibration tokens."""

    count: float
    """Tokens."""
    mean: Tensor
    """Float64 [n]: E[a]."""
    second: Tensor
    """Float32 [n, n]: E[a a^T], not centred."""


@dataclass(frozen=True, eq=False)
class Evidence(Mapping[Key, Tensor]):
    """What a model's channels, heads, neurons, blocks and experts did on the calibration data.

    As a mapping it gives the mean absolute activation: `evidence["ffn", 3]` is float64 [neurons of layer 3]. Of the
    residual stream, the key with layer None holds the sum over its blocks.
    """

    wants: tuple[str, ...]
    """Which of `STATISTICS` were collected; `mean_abs` always is."""
    statistics: Mapping[str, Mapping[Key, Tensor]]
    """By the name of the statistic, the same keys in each: see `statistic`."""
    moments: Mapping[str, Moments] = field(default_factory=dict)
    """By the source's full name of a parameter: of a linear map's weight, of the input that it reads; of the gain of
    a norm of the residual stream, of the norm's input. Matrices that read the same tensor share one object."""
    similarity: Mapping[int | str, float] = field(default_factory=dict)
    """By layer, the mean cosine between a block's input and output."""
    angles: Mapping[str, Tensor] = field(default_factory=dict)
    """By the axis that counts layers, float64 [layers + 1, layers + 1]: the mean angle between the streams before
    block i and before block j, as a share of pi. The last boundary is behind the last block."""
    routes: Mapping[int | str, Tensor] = field(default_factory=dict)
    """By layer, float64 [experts]: the share of the tokens that each expert was given."""
    route_weights: Mapping[int | str, Tensor] = field(default_factory=dict)
    """By layer, float64 [experts]: the router's weight of each expert, averaged over all tokens."""

    def statistic(self, name: str, axis: str, layer: int | str | None) -> Tensor | None:
        """One number for each index of an axis: float64 [size], or None where no activation can be seen.

        Of heads, over all tokens and channels of the head. `mean_abs` is E|a|, `rms` sqrt(E[a^2]), `mean` E[a],
        `variance` E[(a - E[a])^2] (of a head, averaged over its channels), `taylor` E|sum of a dL/da| over what
        belongs to the index. Of the residual stream with layer None, the sum over blocks.

        Raises:
            CalibrationError: it was not collected.
        """
        if name not in self.statistics:
            self.require((name,))
        return self.statistics[name].get((axis, layer))

    def require(self, wants: tuple[str, ...]) -> None:
        """Raise CalibrationError if any of these was not collected."""
        if missing := [name for name in wants if name not in self.wants]:
            raise CalibrationError(
                f"this evidence holds {', '.join(self.wants)}, not {', '.join(missing)}; collect it with "
                f"calibrate(..., wants={(*self.wants, *missing)})"
            )

    def __getitem__(self, key: Key) -> Tensor:
        return self.statistics["mean_abs"][key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.statistics["mean_abs"])

    def __len__(self) -> int:
        return len(self.statistics["mean_abs"])
