"""Where in a config a size stands: read it there, and write another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig as Config


@dataclass(frozen=True)
class Place:
    """Where a config keeps a size."""

    path: tuple[str, ...]
    """The sub-configs on the way."""
    field: str
    index: int | None = None
    """In a list with one entry per stage, or per layer."""
    layer: int | None = None
    """In the exceptions that `per_layer_config` makes for one layer."""
    times: int = 1
    """How many times the axis's length stands there."""

    def read(self, config: Config) -> Any:
        """What stands there."""
        node = node_at(config, self.path)
        own = vars(node) if self.layer is None else exceptions_of(node)[self.layer]
        value = own[self.field] if self.field in own else getattr(node, self.field)
        value = value if self.index is None else value[self.index]
        return value if value is None or self.times == 1 else value // self.times

    def write(self, values: dict[str, Any], size: int) -> None:
        """Put a size there, in the dict that `to_dict` gives."""
        values = node_at(values, self.path)
        if self.layer is not None:
            layers = values["per_layer_config"]
            values = layers[next(key for key in layers if int(key) == self.layer)]
        size *= self.times
        if self.index is None:
            values[self.field] = size
        else:
            values[self.field] = [*values[self.field]]
            values[self.field][self.index] = size


def node_at(tree: Any, path: Sequence[str]) -> Any:
    """The config, or its dict, at the end of a way of sub-configs."""
    for name in path:
        tree = tree[name] if isinstance(tree, dict) else getattr(tree, name)
    return tree


def exceptions_of(node: Config) -> dict[int, dict[str, Any]]:
    """What single layers have otherwise than the whole: Gemma 4's full attention has wider heads."""
    return node._heterogeneity_spec.per_layer_overrides if getattr(node, "is_heterogeneous", False) else {}
