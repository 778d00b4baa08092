"""What a method decided, as pure data: for every axis which of the source's indices the target keeps.

A plan can be printed, argued with, saved, and applied again: the same plan and the same source give the same bytes.
It is checked whole when it is made, so nothing starts that cannot be finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hf_ws.axes import AXES, HEADS, KV_HEADS, LAYERS, kind_of, layer_key, parse, sibling, split_key
from hf_ws.errors import OutputError, PlanError
from hf_ws.layouts.stacks import of_any_kind
from hf_ws.maps import (
    AxisMap,
    Blocks,
    Dense,
    Fold,
    Gather,
    Given,
    Merge,
    Rank,
    Refit,
    Turn,
    from_json,
    to_json,
)
from hf_ws.tables import bytes_each, merged, table

FORMAT = 3
"""Version of the saved form."""

_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a target is made from a source.

    A key of `maps` is an axis (`hidden`), an axis in one target layer (`ffn@3`, or `ffn@decoder.layers.3` where
    there are several stacks), or an axis in one parameter (`hidden@lm_head.weight`, for ablations that break
    consistency); the most particular one holds. A key of `folds` and an entry of `fresh` is a parameter's name with
    the layer's number written `*`; one of `refits` is its name in the target; one of `gains` is either.

    Raises:
        PlanError: on construction, naming everything that is inconsistent.
    """

    source: str
    """Hub id, folder or class that the weights come from."""
    revision: str | None
    """Commit of a Hub source."""
    fingerprint: str | None
    """Hash of the source's headers; None when only its config was read."""
    model_class: str
    method: str
    method_args: Mapping[str, Any]
    seed: int
    version: str
    """Of this library."""
    source_config: Mapping[str, Any]
    target_config: Mapping[str, Any]
    source_sizes: Mapping[str, int]
    target_sizes: Mapping[str, int]
    layouts: Mapping[str, str]
    """The proven layout of every parameter, the layer's number written `*`."""
    parameters: tuple[int, int]
    """How many the source has and the target will have; what is tied counts once."""
    untied: int = 0
    """How many of the target's are there because its head is a tensor of its own, where the source's is tied."""
    layers: Mapping[str, tuple[int, ...]]
    """The source layer of each target layer, by the axis that counts them."""
    maps: Mapping[str, AxisMap]
    gains: Mapping[str, float] = field(default_factory=dict)
    """What a parameter is multiplied by; of a norm that is folded, what it is, for every channel."""
    offsets: Mapping[str, float] = field(default_factory=dict)
    """What the class adds to a norm's gain before it multiplies, where that is not nothing (Gemma), layer numbers
    written `*`: a gain of ours multiplies the sum."""
    fresh: tuple[str, ...] = ()
    """Parameters that the model class initialises; `*` alone means all."""
    folds: Mapping[str, Fold] = field(default_factory=dict)
    """The norms whose gains move into what reads them, by the gain."""
    refits: Mapping[str, Refit] = field(default_factory=dict)
    """The matrices whose reading side is fitted to what the target gives them to read, by target name."""
    values: Mapping[str, Given] = field(default_factory=dict)
    """The parameters that are fitted whole, by target name; what else is said of them does not count."""
    blends: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The source layers, by number, of which a target layer is the weighted sum where it is not one alone."""
    compensation: tuple[str, ...] = ()
    """What is to be done, when the data are read, against what the maps lose: names in `COMPENSATIONS`, in order."""
    compensated: tuple[str, ...] = ()
    """What has been done; `refits`, `gains` and `values` are what came of it."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """How the sizes were found where a goal was given: see `hf_ws.search.table.record`."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise PlanError(
                f"this {self.method} plan for {self.source} is inconsistent: {'; '.join(problems)}"
            )

    def _problems(self) -> Iterator[str]:
        for stack, kept in self.layers.items():
            depth = self.source_sizes.get(stack, 0)
            if len(kept) != self.target_sizes.get(stack):
                yield f"{len(kept)} {stack} are named, the target has {self.target_sizes.get(stack)}"
            if outside := [i for i in kept if not 0 <= i < depth]:
                yield f"{stack} {outside} are outside the source's 0 to {depth - 1}"
        for key, axis_map in self.maps.items():
            yield from self._map_problems(key, axis_map)
        if not self.is_fresh("*"):
            yield from self._unmapped()
            for heads in [axis for axis in self.target_sizes if kind_of(axis) == HEADS]:
                for layer in self._scopes(heads):
                    yield from self._heads_apart(heads, layer)
        for name, gain in self.gains.items():
            if not self._is_parameter(name) or not np.isfinite(gain) or gain <= 0:
                yield f"gain {gain} for {name}"
        for name, refit in self.refits.items():
            if not self._is_parameter(name) or refit.read.ndim != 2 or not np.isfinite(refit.read).all():
                yield f"refit of {name}, with a matrix {refit.read.shape}"
        for name, given in self.values.items():
            if not self._is_parameter(name) or not np.isfinite(given.value).all():
                yield f"a value of {name} {given.value.shape}"
        yield from self._blend_problems()
        if unknown := [name for name in self.fresh if name != "*" and name not in self.layouts]:
            yield f"fresh {', '.join(unknown)}: no such parameter"

    def _map_problems(self, key: str, axis_map: AxisMap) -> Iterator[str]:
        axis, _, scope = key.partition("@")
        if kind_of(axis) not in AXES:
            yield f"{key} names no axis; known are {', '.join(AXES)}"
        elif axis not in self.source_sizes or axis not in self.target_sizes:
            yield f"{key} maps an axis that this model does not have"
        elif isinstance(axis_map, Blocks):
            yield from self._block_problems(key, axis_map)
        elif len(axis_map) != self.target_sizes[axis] or axis_map.size != self.source_sizes[axis]:
            yield (
                f"{key} maps {axis_map.size} to {len(axis_map)}, the configs say "
                f"{self.source_sizes[axis]} to {self.target_sizes[axis]}"
            )
        elif isinstance(axis_map, Gather) and not all(0 <= i < axis_map.size for i in axis_map.index):
            yield f"{key} has an index outside 0 to {axis_map.size - 1}"
        elif scope and self._is_layer(scope):
            stack, number = split_key(scope)
            if number >= len(self.layers[stack]):
                yield f"{key} is for a layer that the target does not have"
        elif scope and not self._is_parameter(scope):
            yield f"{key} is for a parameter that the target does not have"
        elif isinstance(axis_map, Rank | Turn | Merge) and axis_map.keep > axis_map.size:
            yield f"{key} keeps {axis_map.keep} of {axis_map.size}; a ranking only drops"
        elif isinstance(axis_map, Dense) and not (
            axis_map.read.shape == axis_map.write.shape
            and np.isfinite(axis_map.read).all()
            and np.isfinite(axis_map.write).all()
        ):
            yield f"{key} has matrices that do not match, or hold no finite numbers"

    def _block_problems(self, key: str, heads: Blocks) -> Iterator[str]:
        axis, _, name = key.partition("@")
        if not self._is_parameter(name):
            yield f"{key} mixes heads of a parameter that the target does not have"
        elif (
            len(heads) != self.target_sizes[axis]
            or heads.blocks.ndim != 4
            or not np.isfinite(heads.blocks).all()
        ):
            yield f"{key} makes {len(heads)} heads, the config says {self.target_sizes[axis]}, or of no finite numbers"
        elif len(heads.index) != heads.blocks.shape[0] * heads.blocks.shape[1] or not all(
            0 <= i < self.source_sizes[axis] for i in heads.index
        ):
            yield f"{key} has an index outside 0 to {self.source_sizes[axis] - 1}"

    def _blend_problems(self) -> Iterator[str]:
        for key, parts in self.blends.items():
            stack, number = split_key(key)
            depth = self.source_sizes.get(stack, 0)
            if number >= len(self.layers.get(stack, ())) or not all(0 <= int(i) < depth for i in parts):
                yield f"layer {key} is a sum of layers {', '.join(parts)}, which are not all there"

    def _is_parameter(self, name: str) -> bool:
        """Whether this is a parameter, or a norm, by its name as it is or with its layer's number written `*`.

        Which of its numbers that is, a stage's before it or an expert's behind it, the name does not say.
        """
        known = {*map(of_any_kind, (*self.layouts, *self.folds))}
        spelled = (f"{name[: n.start()]}.*.{name[n.end() :]}" for n in _LAYER.finditer(name))
        return not known.isdisjoint({name, *spelled})

    def _is_layer(self, scope: str) -> bool:
        """Whether what stands after the @ is a layer, not a parameter."""
        stack, _, number = scope.rpartition(".")
        return number.isdigit() and (stack or LAYERS) in self.layers

    def source_layer(self, key: int | str) -> int | str:
        """The source layer that a target layer comes from, both as maps call them (`3`, `decoder.layers.3`)."""
        stack, number = split_key(key)
        return layer_key(stack, self.layers[stack][number])

    def _unmapped(self) -> Iterator[str]:
        mapped = {key.partition("@")[0] for key in self.maps} | {*self.layers}
        for axis in sorted(self._axes()):
            if axis not in mapped and self.source_sizes[axis] != self.target_sizes[axis]:
                yield f"{axis} changes from {self.source_sizes[axis]} to {self.target_sizes[axis]}, and no map says how"

    def _scopes(self, heads: str) -> Iterator[int | str]:
        """Where heads or their key/value heads have maps of their own: in layers, and "" for everywhere."""
        keys = [key.partition("@") for key in self.maps]
        scoped = [(axis, scope) for axis, _, scope in keys if axis in (heads, sibling(heads, KV_HEADS))]
        stacks = dict.fromkeys(split_key(scope)[0] for _, scope in scoped if self._is_layer(scope))
        if not stacks or sum(scope == "" for _, scope in scoped) == 2:
            yield ""
        for stack in stacks:
            yield from (layer_key(stack, i) for i in range(len(self.layers[stack])))

    def _heads_apart(self, axis: str, layer: int | str) -> Iterator[str]:
        """Query heads whose key/value head goes elsewhere; what has no map keeps its number."""
        groups = sibling(axis, KV_HEADS)
        if groups not in {key.partition("@")[0] for key in self.maps} | self._axes():
            return
        heads, kv_heads = (
            self.axis_map(axis, layer)
            or Gather(tuple(range(self.target_sizes[axis])), self.source_sizes[axis])
            for axis in (axis, groups)
        )
        if not isinstance(heads, Gather) or not isinstance(kv_heads, Gather):
            return
        where = axis if layer == "" else f"layer {layer}"
        if len(heads) % len(kv_heads) or heads.size % kv_heads.size:
            yield f"{where}: {len(heads)} query heads are no multiple of {len(kv_heads)} kv heads"
            return
        before, after = heads.size // kv_heads.size, len(heads) // len(kv_heads)
        for target, source in enumerate(heads.index):
            if source // before != kv_heads.index[target // after]:
                yield (
                    f"{where}: query head {target} comes from head {source} of kv group {source // before}, "
                    f"but its kv head comes from group {kv_heads.index[target // after]}"
                )
                return

    def _axes(self) -> set[str]:
        """The axes of everything that is taken from the source."""
        taken = [text for name, text in self.layouts.items() if not self.is_fresh(name)]
        return {axis for text in taken for dim in parse(text) for axis in dim.axes}

    def axis_map(self, axis: str, layer: int | str | None = None, parameter: str = "") -> AxisMap | None:
        """The map that holds for an axis in a target layer and parameter; None if its indices stay."""
        for key in (f"{axis}@{parameter}", f"{axis}@{layer}", axis):
            if key in self.maps:
                return self.maps[key]
        return None

    def is_fresh(self, pattern: str) -> bool:
        """Whether the model class initialises this parameter."""
        return pattern in self.fresh or "*" in self.fresh

    @property
    def is_settled(self) -> bool:
        """Whether every index is known; if not, `settle` reads the weights or the data and settles them."""
        closed = all(isinstance(axis_map, Gather | Dense | Blocks) for axis_map in self.maps.values())
        return closed and not self.compensation

    @property
    def wants_data(self) -> bool:
        """Whether something is still open that looks at more than weights."""
        looks = (isinstance(m, Turn) or (isinstance(m, Rank) and m.wants_data) for m in self.maps.values())
        return any(looks) or bool(self.compensation)

    def with_maps(self, maps: Mapping[str, AxisMap], **changes: Any) -> Plan:
        """This plan with other maps."""
        return replace(self, maps=dict(maps), **changes)

    def apply(self, source: Any = None, **options: Any) -> Any:
        """The model that this plan describes.

        Args:
            source: A Hub id, a folder or a live model; the source the plan was made for if None.
            options: `calibration`, `dtype`, `device`, `token`, `cache_dir` and `local_files_only`, as in
                `AutoSubclone.from_pretrained`.

        Raises:
            PlanError: the source is not the one that the plan was made for.
            CheckpointError: the source cannot be read.
        """
        from hf_ws.auto import apply_plan

        return apply_plan(self, source, **options)

    def save(self, path: str | Path) -> None:
        """Write the plan as one JSON file, and its matrices, if there are any, as safetensors beside it.

        Raises:
            OutputError: the files cannot be written.
            PlanError: a callable is still to rank.
        """
        for key, axis_map in self.maps.items():
            if isinstance(axis_map, Rank) and callable(axis_map.score):
                raise PlanError(
                    f"{key} is still to be ranked by {axis_map.by}, a function, which cannot be saved; "
                    "make the plan with calibration=, or save what `from_pretrained` leaves in model.hf_ws_plan"
                )
        path, arrays = Path(path), dict[str, np.ndarray]()
        values = {own.name: getattr(self, own.name) for own in fields(self)} | {"format": FORMAT}
        for name in ("maps", "folds", "refits", "values"):
            values[name] = {key: to_json(f"{name}/{key}", m, arrays) for key, m in values[name].items()}
        try:
            if arrays:
                save_file(arrays, path.with_suffix(".safetensors"))
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"the plan cannot be written to {path}: {reason}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Raises PlanError if the file is missing, of another format or inconsistent."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise PlanError(f"{path} is a plan of another format than {FORMAT}; make it again")
            beside = path.with_suffix(".safetensors")
            arrays = load_file(beside) if beside.is_file() else {}
            for name in ("maps", "folds", "refits", "values"):
                values[name] = {key: from_json(m, arrays) for key, m in values[name].items()}
            return cls(**_tuples(values))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"{path} is not a saved plan: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        commit = f" at {self.revision[:12]}" if self.revision else ""
        args = ", ".join(f"{name}={value!r}" for name, value in self.method_args.items())
        lines = [f"{self.method}({args}): {self.model_class} from {self.source}{commit}", ""]
        lines += table(["", "source", "target", "keeps"], list(self._rows()))
        for key, axis_map in self.maps.items():
            if "@" in key and not self._is_layer(key.partition("@")[2]) and not isinstance(axis_map, Blocks):
                return "\n".join(
                    [*lines, "", f"each parameter has indices of its own, for example {key}: {axis_map}"]
                )
        return "\n".join(lines)

    def _rows(self) -> Iterator[list[str]]:
        shown = {axis for text in self.layouts.values() for dim in parse(text) for axis in dim.axes} | {HEADS}
        for axis in self.source_sizes:
            if axis in shown or axis in self.layers:
                yield [
                    axis,
                    f"{self.source_sizes[axis]:,}",
                    f"{self.target_sizes[axis]:,}",
                    self._keeps(axis),
                ]
        before, after = self.parameters
        yield ["parameters", f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
        if self.untied:
            yield ["of them untied", "0", f"{self.untied:,}", "the head, tied in the source"]
        configs = (self.source_config, self.target_config)
        widths = [bytes_each(config.get("dtype")) for config in configs]
        yield ["bytes", f"{before * widths[0]:,}", f"{after * widths[1]:,}", ""]

    def _keeps(self, axis: str) -> str:
        names = [
            name
            for name, text in self.layouts.items()
            if axis
            in {a for dim in parse(text) for a in dim.axes} | (set(self.layers) if "*" in name else set())
        ]
        if self.is_fresh("*") or (names and all(map(self.is_fresh, names))):
            return "nothing: every weight is new"
        if axis in self.layers:
            kept = str(Gather(self.layers[axis], self.source_sizes[axis]))
            keys = (layer_key(axis, number) for number in range(len(self.layers[axis])))
            return kept + merged([(*self.blends.get(str(key), ()),) for key in keys])
        scoped = [
            m
            for key, m in self.maps.items()
            if key.startswith(f"{axis}@") and self._is_layer(key.partition("@")[2])
        ]
        if scoped:
            same = all(m == scoped[0] for m in scoped)
            return f"{scoped[0]}" if same else f"by layer; in the first, {scoped[0]}"
        return str(self.axis_map(axis) or "all")


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples: the sequence fields become what they were."""
    plain = dict(values)
    for name in plain.keys() & {"fresh", "parameters", "compensation", "compensated"}:
        plain[name] = tuple(plain[name])
    if "layers" in plain:
        plain["layers"] = {stack: tuple(kept) for stack, kept in plain["layers"].items()}
    return plain
