"""Make the target's tensors one by one, as a settled plan says."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_ws.axes import Dim, Layout, parse, split_key
from hf_ws.layouts import Certificate, before, select
from hf_ws.layouts.select import Sides, along
from hf_ws.layouts.turn import turned, unseen
from hf_ws.maps import Blocks, Dense, Gather
from hf_ws.plan import Plan
from hf_ws.store import Source


class Maker:
    """Makes the target's tensors one by one, as the plan says."""

    def __init__(
        self, plan: Plan, source: Source, certificate: Certificate, dtype: torch.dtype | None
    ) -> None:
        self._plan, self._source, self._stacks, self._dtype = plan, source, certificate.stacks, dtype
        self._unseen: dict[tuple[str, int | str | None], Tensor] = {}
        norms = {*plan.folds, *(fold.bias for fold in plan.folds.values())}
        self._norms = {
            (own.pattern, own.layer): own.name
            for own in certificate.spelled(plan.layers, plan.folds)
            if own.pattern in norms
        }

    def made(self, name: str, pattern: str, layer: int | str | None) -> tuple[Tensor, Tensor]:
        """A tensor of the target, and the source's that it is made of, whose memory it may share."""
        plan, layout = self._plan, parse(self._plan.layouts[pattern])
        weight = self._weight(name, layer)
        if name in plan.values:
            return torch.from_numpy(plan.values[name].value), weight
        maps = self._maps(layout, layer, name)
        value, maps = self._folded(weight, pattern, layer, maps)
        if value is None:
            made = self._with_rest(weight, name, pattern, layer)
            refit = plan.refits.get(name)
            if refit is not None:
                (at,) = [at for at, dim in enumerate(layout) if dim.reads]
                made = along(made, at, refit.read)
                layout = tuple(Dim(made.shape[at]) if d == at else dim for d, dim in enumerate(layout))
            made = select(made, layout, plan.source_sizes, plan.target_sizes, maps)
        gain = plan.gains.get(name, plan.gains.get(pattern, 1.0))
        if value is None and gain != 1.0:
            wide = made.to(torch.promote_types(made.dtype, self._dtype or made.dtype))
            own = made.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
            offset = plan.offsets.get(pattern, 0.0)
            made = wide.mul_(gain) if own else wide * gain
            made = made.add_((gain - 1.0) * offset) if offset else made
        return made if value is None else value, weight

    def _weight(self, name: str, layer: int | str | None) -> Tensor:
        """The source's tensor for one of the target's, or the sum of those of several layers."""
        if layer is None:
            return self._source.tensor(name)
        layers = self._plan.layers
        if str(layer) not in self._plan.blends:
            return self._source.tensor(before(name, layer, self._stacks, layers))
        axis, number = split_key(layer)
        total = torch.zeros(())
        for one, share in self._plan.blends[str(layer)].items():
            kept = (*layers[axis][:number], int(one), *layers[axis][number + 1 :])
            tensor = self._source.tensor(before(name, layer, self._stacks, {**layers, axis: kept}))
            total = total + share * tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return total

    def _maps(
        self, layout: Layout, layer: int | str | None, name: str
    ) -> dict[str, np.ndarray | Sides | Blocks]:
        maps: dict[str, np.ndarray | Sides | Blocks] = {}
        for axis in {axis for dim in layout for axis in dim.axes}:
            axis_map = self._plan.axis_map(axis, layer, name)
            if isinstance(axis_map, Gather):
                maps[axis] = axis_map.as_array
            elif isinstance(axis_map, Dense):
                maps[axis] = axis_map.write, axis_map.read
            elif isinstance(axis_map, Blocks):
                maps[axis] = axis_map
            elif axis in self._plan.layers:
                maps[axis] = np.asarray(self._plan.layers[axis])
        return maps

    def _folded(
        self,
        weight: Tensor,
        pattern: str,
        layer: int | str | None,
        maps: dict[str, np.ndarray | Sides | Blocks],
    ) -> tuple[Tensor | None, dict[str, np.ndarray | Sides | Blocks]]:
        """A tensor's value where folding a norm says all about it, and the maps with the norm's gain in them."""
        value = None
        for axis, sides in list(maps.items()):
            if isinstance(sides, tuple):
                own = {norm: fold for norm, fold in self._plan.folds.items() if fold.axis == axis}
                value, maps[axis] = turned(
                    weight,
                    pattern,
                    own,
                    sides,
                    lambda norm: self._of_norm(norm, layer),
                    lambda norm: self._level(norm, layer),
                )
        return value, maps

    def _of_norm(self, pattern: str, layer: int | str | None) -> Tensor | None:
        """The source's gain or bias of a norm that is folded, in this layer; None where it has none."""
        if pattern not in self._plan.layouts:
            return None
        own = layer if "*" in pattern else None
        return self._weight(self._norms[pattern, own], own)

    def _level(self, norm: str, layer: int | str | None) -> float:
        """What a folded norm multiplies every channel by in the target."""
        named = self._norms.get((norm, layer if "*" in norm else None), norm)
        return self._plan.gains.get(named, self._plan.gains.get(norm, 1.0))

    def _with_rest(self, weight: Tensor, name: str, pattern: str, layer: int | str | None) -> Tensor:
        """A bias with what its matrix no longer reads, on average; any other tensor as it is."""
        owner, _, leaf = name.rpartition(".")
        about = f"{pattern.rpartition('.')[0]}.weight"
        layout = parse(self._plan.layouts.get(about, "")) if leaf == "bias" else ()
        reading = [at for at, dim in enumerate(layout) if dim.reads]
        if len(layout) != 2 or len(reading) != 1:
            return weight
        rest = self._rest(f"{owner}.weight", about, layout[reading[0]], layer)
        if rest is None:
            return weight
        wide = self._weight(f"{owner}.weight", layer).double()
        return weight.double() + torch.tensordot(wide, rest.to(wide), dims=(reading, [0]))

    def _rest(self, name: str, pattern: str, reading: Dim, layer: int | str | None) -> Tensor | None:
        """What a matrix of the target never sees of the source's inputs, on average [source inputs]."""
        refit = self._plan.refits.get(name)
        if refit is not None:
            return None if refit.rest is None else torch.from_numpy(refit.rest)
        for norm, fold in self._plan.folds.items():
            bias = self._of_norm(fold.bias, layer) if pattern in fold.readers else None
            sides = self._plan.axis_map(fold.axis, layer, name)
            if bias is None or reading.expression != fold.axis or not isinstance(sides, Dense):
                continue
            key = norm, layer if "*" in norm else None
            if key not in self._unseen:  # once for all that read it
                gain = self._of_norm(norm, layer)
                own = self._level(norm, layer) if gain is None else gain.double() + fold.offset
                self._unseen[key] = unseen(bias, own, (sides.write, sides.read))
            return self._unseen[key]
        return None
