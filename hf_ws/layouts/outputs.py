"""What goes into a miniature when its axes are mapped, and how far from the right answer its outputs then are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_ws.axes import (
    HIDDEN,
    VOCAB,
    kind_of,
    parse,
    positions,
)
from hf_ws.layouts.explain import joined
from hf_ws.sizes import sizes_of

Maps = Mapping[str, np.ndarray]
"""The source index of each target index, by axis."""


def renumbered(given: Mapping[str, Tensor], maps: Maps, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The inputs with token ids numbered as their vocabulary now is, the channels of states as they are now."""
    made = dict(given)
    tables = [axis for axis in sizes if kind_of(axis) == VOCAB]
    about = {
        name: name.replace("input_", "").removesuffix("ids").strip("_")
        for name in given
        if name.endswith("_ids")
    }
    for name, tensor in given.items():
        if name.endswith(("embeds", "hidden_states", "latents")):
            made[name] = _states(tensor, maps, sizes)
        elif (axis := _vocabulary(name, about, tables)) in maps and int(tensor.max()) < sizes[axis]:
            made[name] = torch.from_numpy(np.argsort(maps[axis]))[tensor]
    return made


def seen(maps: Maps, config: PreTrainedConfig, target: Mapping[str, int]) -> Maps:
    """The maps as inputs and outputs have them: with those of streams that consist of several mapped axes."""
    found = dict(maps)
    for hidden, text in joined(config).items():
        dim = parse(text)[0]
        if not maps.keys().isdisjoint(dim.axes):
            found[hidden] = positions(dim, sizes_of(config), target, maps)
    return found


def _states(tensor: Tensor, maps: Maps, sizes: Mapping[str, int]) -> Tensor:
    """States with their channels as they now are, last or first in a step, of one layer or several side by side."""
    for at in (-1, 1):
        for axis in (axis for axis in maps if kind_of(axis) == HIDDEN):
            layers, rest = divmod(tensor.shape[at], sizes[axis])
            if not rest and layers:
                index = np.arange(layers)[:, None] * sizes[axis] + maps[axis]
                return tensor.index_select(at, torch.from_numpy(index.ravel()))
    return tensor


def _vocabulary(name: str, about: Mapping[str, str], tables: Sequence[str]) -> str:
    """The vocabulary that these ids are of: the decoder's, the Q-Former's, or that of the rest."""
    if own := next((axis for axis in tables if about.get(name) and about[name] in axis), None):
        return own
    if not name.endswith("input_ids"):
        return ""
    rest = [axis for axis in tables if not any(word and word in axis for word in about.values())]
    before = [axis for axis in rest if "encoder" in axis and "decoder" in about.values() and not about[name]]
    return next(iter(before + rest), "")


def distance(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], maps: Maps) -> float:
    """The largest difference of all outputs, as a share of each one's largest value.

    An output that has a mapped axis itself (logits, hidden states, feature maps) must be mapped along.
    """
    if given.keys() != wanted.keys() or not wanted:
        return float("inf")
    return max(_one_distance(given[name], wanted[name], maps) for name in wanted)


def _one_distance(given: Tensor, wanted: Tensor, maps: Maps) -> float:
    if given.ndim != wanted.ndim:
        return float("inf")
    found = []
    for moved in (wanted, *_along(wanted, given.shape, maps)):
        if moved.shape == given.shape:
            masked = moved.isinf()  # what a class takes out of a comparison must be out of it in both
            if not torch.equal(given[masked], moved[masked]):
                continue
            own, other = given.masked_fill(masked, 0), moved.masked_fill(masked, 0)
            found.append(float((own - other).abs().max() / other.abs().max().clamp(min=1e-30)))
    return min((error for error in found if error == error), default=float("inf"))


def _along(wanted: Tensor, shape: torch.Size, maps: Maps) -> Iterator[Tensor]:
    """What the output may look like if it has a mapped axis, alone or with a number as factor, in one dimension."""
    for axis_map in maps.values():
        before = int(axis_map.max()) + 1
        index = torch.from_numpy(axis_map)
        for at, size in enumerate(wanted.shape):
            number, rest = divmod(size, before)
            if rest or not number or shape[at] != number * len(index):
                continue
            outer = (torch.arange(number)[:, None] * before + index).ravel()
            yield wanted.index_select(at, outer)
            if number > 1:
                yield wanted.index_select(at, (index[:, None] * number + torch.arange(number)).ravel())
