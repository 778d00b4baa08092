"""Proof of which side of each tensor reads: copy every channel, neuron and head once, and share what reads them.

The output must not move. On the reading sides gains and growth depend (Net2Net, 1511.05641, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice, product

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_ws.axes import (
    EMBEDDING,
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MOE_FFN,
    SHARED_FFN,
    UNIT,
    WAVES,
    Dim,
    coordinates,
    kind_of,
    parse,
    sibling,
    spell,
)
from hf_ws.fields import FIELDS
from hf_ws.layouts import run
from hf_ws.layouts.bench import TOLERANCE, Bench
from hf_ws.layouts.outputs import distance, renumbered, seen
from hf_ws.layouts.stacks import generic
from hf_ws.sizes import nodes, resize, sizes_of


def by_duplication(bench: Bench, layouts: dict[str, str], proven: set[str]) -> tuple[dict[str, str], float]:
    """The layouts with the reading sides that pass, and what duplicating every axis moved the output by."""
    try:
        double = Double(bench, layouts, proven)
        error = double.moved_by(layouts)
        if error > TOLERANCE:  # the width may be in a scale that is computed in each run
            held = Double(bench, layouts, proven, hold_widths=True)
            if (other := held.moved_by(layouts)) < error:
                double, error = held, other
    except Exception:  # a class may refuse such sizes; then no growth is proven
        return layouts, float("inf")
    if error <= TOLERANCE:
        return layouts, error
    doubtful: dict[str, list[str]] = {}
    for name, choice in bench.inferred.choices.items():
        if len(choice.reads) > 1 and name in layouts:
            doubtful.setdefault(f"{name.split('.')[-1]} {choice.reads}", []).append(name)
    ranges = [range(len(bench.inferred.choices[names[0]].reads)) for names in doubtful.values()]
    ordered = sorted(islice(product(*ranges), 20_000), key=lambda picks: (sum(map(bool, picks)), sum(picks)))
    for picks in ordered[1 : max(4, bench.tries // 4)]:
        tried = dict(layouts)
        for names, pick in zip(doubtful.values(), picks, strict=True):
            for name in names:
                tried[name] = _read_at(layouts[name], bench.inferred.choices[name].reads[pick])
        if (found := double.moved_by(tried)) <= TOLERANCE:
            return tried, found
    return layouts, error


def _read_at(text: str, at: int | None) -> str:
    """A layout with another dimension, or none, that reads."""
    return spell(tuple(replace(dim, reads=d == at) for d, dim in enumerate(parse(text))))


DUPLICATED = (HIDDEN, UNIT, GROUPS, FFN, MOE_FFN, SHARED_FFN, EMBEDDING, HEADS, KV_HEADS)


_WIDTHS = {"model_dim", *FIELDS[HIDDEN]}
"""What modules and configs call the width that a class may compute a scale from."""


class Double:
    """The miniature with every channel, neuron and head there twice, its reading shared one to two.

    Uneven shares tell the sides apart: weighting the copies on the side that writes would change each of them.
    """

    def __init__(
        self, bench: Bench, layouts: Mapping[str, str], proven: set[str], *, hold_widths: bool = False
    ) -> None:
        config, sizes = bench.inferred.miniature, bench.sizes
        seen = {axis for text in layouts.values() for dim in parse(text) for axis in dim.axes}
        repeated = {
            axis
            for axis in sizes
            if kind_of(axis) == EMBEDDING and sizes[axis] == sizes.get(sibling(axis, HIDDEN))
        }
        twice = [axis for axis in sizes if kind_of(axis) in DUPLICATED and axis in proven | (repeated - seen)]
        target = resize(config, {axis: 2 * sizes[axis] for axis in twice})
        self._bench, self._sizes = bench, sizes_of(target)
        self._maps = {
            axis: np.arange(self._sizes[axis]) % sizes[axis]
            for axis in twice
            if self._sizes[axis] == 2 * sizes[axis]
        }
        for axis in seen & proven - self._maps.keys():  # what a class computes of these, and has any order
            if kind_of(axis) != HEAD_DIM and self._sizes[axis] == 2 * sizes[axis]:
                self._maps[axis] = np.arange(self._sizes[axis]) % sizes[axis]
        for axis in (
            axis for axis in seen if kind_of(axis) == WAVES and self._sizes[axis] == 2 * sizes[axis]
        ):
            self._maps[axis] = (
                np.arange(self._sizes[axis]) // 2
            )  # every second has the frequency of one of these
        self._model = run.frame(bench.model_class, target)
        _same_constants(bench.model, self._model)
        if hold_widths:
            _same_widths(bench.model, self._model)
        bench.silence(self._model, self._sizes)

    def moved_by(self, layouts: Mapping[str, str]) -> float:
        """How far its output is from the miniature's; infinity where it cannot even be run."""
        bench, maps = self._bench, self._maps
        try:
            doubled = bench.transferred(layouts, self._sizes, maps)
            for name, tensor in doubled.items():
                for at, dim in enumerate(parse(layouts[generic(name, bench.inferred.stacks)[0]])):
                    waves = [axis for axis in dim.axes if kind_of(axis) == WAVES and axis in maps]
                    alone = waves == [*dim.axes]  # what multiplies them lies as they do
                    if (dim.reads or alone) and not maps.keys().isdisjoint(dim.axes):
                        share = self._shares(dim)
                        tensor = tensor * share.view([-1 if d == at else 1 for d in range(tensor.ndim)])
                doubled[name] = tensor
            run.load(self._model, doubled)
            along = seen(maps, bench.inferred.miniature, self._sizes)
            given = renumbered(bench.inputs, along, bench.sizes)
            return distance(run.run(self._model, given), bench.output, along)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return float("inf")

    def _shares(self, dim: Dim) -> Tensor:
        """What `select` made of each position is multiplied by: it halved both copies."""
        where = coordinates(dim, self._sizes)
        share = np.ones(len(where[""]))
        for axis in (
            axis for axis in reversed(dim.axes) if axis in self._maps
        ):  # of a product, the first counts
            second = where[axis] >= self._bench.sizes[axis]
            own = np.where(second, 4 / 3, 2 / 3)
            if kind_of(axis) == WAVES:  # those between have a frequency that the source does not
                own = np.where(where[axis] % 2 == 1, 0.0, 2.0 if dim.reads else 1.0)
            share = np.where(where[axis] < 0, share, own)
        return torch.from_numpy(share)


def _same_constants(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Some numbers are computed from the width (an embedding's scale); widening must not change them here."""
    modules = dict(target.named_modules())
    for name, module in source.named_modules():
        if name in modules:
            for key, value in vars(module).items():
                if isinstance(value, float) and isinstance(vars(modules[name]).get(key), float):
                    setattr(modules[name], key, value)
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.ndim == 0 and buffer.is_floating_point():
                    setattr(modules[name], key, buffer)


def _same_widths(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Some are computed in each run, from a stream's width as a module or its config has it: then from the narrow one.

    A class that shapes its tensors by that width breaks, and proves nothing.
    """
    narrow = dict(source.named_modules())
    for name, module in target.named_modules():
        own = vars(narrow[name]) if name in narrow else {}
        vars(module).update({key: own[key] for key in _WIDTHS & vars(module).keys() & own.keys()})
        before, after = own.get("config"), vars(module).get("config")
        if isinstance(before, PreTrainedConfig) and isinstance(after, PreTrainedConfig):
            for (_, there), (_, here) in zip(nodes(before), nodes(after), strict=True):
                for key in _WIDTHS & vars(here).keys() & vars(there).keys():
                    vars(here)[key] = vars(there)[key]
