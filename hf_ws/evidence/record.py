"""What calibration found out, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from hf_ws.errors import CalibrationError
from hf_ws.evidence.files import read, write

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
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    """What it was collected from: `model`, `weights`, `data`, `code`, and `wants`."""

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

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header. Raises OutputError if that fails."""
        tensors: dict[str, Tensor] = {}
        for name, found in self.statistics.items():
            tensors |= {f"{name}|{axis}|{layer}": values for (axis, layer), values in found.items()}
        for word in ("angles", "routes", "route_weights"):
            tensors |= {f"{word}|{key}": values for key, values in getattr(self, word).items()}
        owners: dict[int, str] = {}  # what several matrices read is written once
        readers = {name: owners.setdefault(id(moments), name) for name, moments in self.moments.items()}
        for name in owners.values():
            moments = self.moments[name]
            tensors |= {f"first|{name}": moments.mean, f"second|{name}": moments.second}
        header = {
            "wants": self.wants,
            "fingerprint": dict(self.fingerprint),
            "read": readers,
            "counts": {name: self.moments[name].count for name in owners.values()},
            "similarity": {str(layer): value for layer, value in self.similarity.items()},
        }
        write(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Read what `save` wrote. Raises CalibrationError if the file is missing or something else."""
        tensors, header = read(Path(path))
        if not header.keys() >= {"wants", "counts", "read", "similarity", "fingerprint"}:
            raise CalibrationError(
                f"{path} is no saved evidence; a cache is passed to calibrate(..., cache=)"
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for key, values in tensors.items():
            word, _, rest = key.partition("|")
            parts.setdefault(word, {})[rest] = values
        first, second = parts.get("first", {}), parts.get("second", {})
        moments = {
            name: Moments(count, first[name], second[name]) for name, count in header["counts"].items()
        }
        return cls(
            wants=tuple(header["wants"]),
            statistics={name: _keyed(parts.get(name, {})) for name in PER_AXIS if name in header["wants"]},
            moments={name: moments[owner] for name, owner in header["read"].items()},
            similarity={layer_of(key): value for key, value in header["similarity"].items()},
            angles=parts.get("angles", {}),
            routes={layer_of(key): value for key, value in parts.get("routes", {}).items()},
            route_weights={layer_of(key): value for key, value in parts.get("route_weights", {}).items()},
            fingerprint=header["fingerprint"],
        )

    def __getitem__(self, key: Key) -> Tensor:
        return self.statistics["mean_abs"][key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.statistics["mean_abs"])

    def __len__(self) -> int:
        return len(self.statistics["mean_abs"])


def layer_of(key: str) -> int | str:
    """What `layer_key` gave, from its text."""
    return int(key) if key.isdigit() else key


def _keyed(values: Mapping[str, Tensor]) -> dict[Key, Tensor]:
    found: dict[Key, Tensor] = {}
    for key, tensor in values.items():
        axis, _, layer = key.partition("|")
        found[axis, None if layer == "None" else layer_of(layer)] = tensor
    return found
