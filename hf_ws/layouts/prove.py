"""Proof of a layout: permute an axis wherever the layout says it occurs, and the function must not change.

Two symmetries settle it, on the miniature, with every parameter perturbed, in float64 and eager attention:

*Permutation.* Reorder one axis (hidden; ffn; experts; whole kv groups and the query heads inside each) in every
tensor. The output must not move, or move along where it has that axis itself. A factor in the wrong order, a tensor
left out, a q taken for a k, each breaks this. Where the explanation that looked most likely fails, the others that
fit the lengths are tried: the proof decides, not the likelihood. An axis none of them proves stays fixed.

*Duplication.* Copy every channel, neuron and head once, and share what reads them. The output must not move. This
proves which side of each tensor reads, on which gains and growth depend.

The order inside a head is not claimed where rotary pairs make it no symmetry, nor is that of positions: of these a
target keeps the first, and the proof is that it then gives the same on inputs that are short enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, product

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.axes import (
    EMBEDDING,
    EXPERTS,
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MOE_FFN,
    POSITIONS,
    ROPE_DIM,
    SHARED_FFN,
    UNIT,
    VOCAB,
    WAVES,
    Dim,
    coordinates,
    kind_of,
    parse,
    sibling,
    spell,
)
from hf_ws.layouts import ordered, run
from hf_ws.layouts.explain import streams
from hf_ws.layouts.infer import Inferred, tensors_of
from hf_ws.layouts.miniature import RESERVED, inputs
from hf_ws.layouts.outputs import Maps, distance, renumbered, seen
from hf_ws.layouts.search import alternatives
from hf_ws.layouts.select import select
from hf_ws.layouts.stacks import generic
from hf_ws.sizes import owner, resize, sizes_of

TOLERANCE = 2e-5
"""Of the largest output. Norms compute in float32 whatever the model's dtype; float64 elsewhere is far below this."""

TRIES, WORK = 150, 100_000_000
"""How many combinations of explanations are tried before an axis is given up, and how many parameters that may run."""


@dataclass(frozen=True)
class Proof:
    """What was proven of inferred layouts."""

    layouts: dict[str, str]
    proven: set[str]
    layerwise: set[str]
    """Of these, the axes whose order may be another in each layer."""
    errors: dict[str, float]
    reads: bool
    unread: tuple[str, ...]
    tables: tuple[str, ...] = ()
    """Computed position tables that were set to zero for the proof."""


def prove(model_class: type[PreTrainedModel], inferred: Inferred) -> Proof:
    """Prove each axis by permutation, the reading sides by duplication; in `run.plain_arithmetic`."""
    bench = _Bench(model_class, inferred)
    layouts, errors = _by_permutation(bench)
    proven = {axis for axis, error in errors.items() if error <= TOLERANCE}
    proven |= {sibling(axis, KV_HEADS) for axis in proven if kind_of(axis) == HEADS}
    proven |= {hidden for hidden, parts in streams(inferred.miniature).items() if proven.issuperset(parts)}
    layerwise = {axis for axis in proven if _layerwise(bench, layouts, axis)}
    layouts, error = _by_duplication(bench, layouts, proven)
    errors["reads"] = error
    return Proof(layouts, proven, layerwise, errors, error <= TOLERANCE, bench.unread(), bench.tables)


class _Bench:
    """A miniature with its weights, its inputs and what it gives for them."""

    def __init__(self, model_class: type[PreTrainedModel], inferred: Inferred) -> None:
        self.model_class, self.inferred = model_class, inferred
        self.sizes = sizes_of(inferred.miniature)
        self.model = run.perturbed(run.build(model_class, inferred.miniature))
        self.tables = self.silence(self.model, self.sizes)
        self.state = {name: tensor.detach().clone() for name, tensor in tensors_of(self.model).items()}
        self.inputs = inputs(self.model)
        self.output = run.run(self.model, self.inputs)

    @staticmethod
    def silence(model: PreTrainedModel, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Take computed position tables out of a model of these sizes."""
        return run.without_tables(model, {size for axis, size in sizes.items() if kind_of(axis) == HIDDEN})

    @property
    def tries(self) -> int:
        """How many explanations a model of this size is tried with."""
        return min(TRIES, max(8, WORK // sum(tensor.numel() for tensor in self.state.values())))

    def transferred(
        self, layouts: Mapping[str, str], target: Mapping[str, int], maps: Maps
    ) -> dict[str, Tensor]:
        """The state with these maps applied."""
        made = {}
        for name, tensor in self.state.items():
            pattern, layer = generic(name, self.inferred.stacks)
            own = {
                axis.partition("@")[0]: m
                for axis, m in maps.items()
                if axis.partition("@")[2] in ("", str(layer))
            }
            made[name] = select(tensor, parse(layouts[pattern]), self.sizes, target, own)
        return made

    def permuted(self, layouts: Mapping[str, str], maps: Maps) -> float:
        """How far the output moves when these axes are permuted; infinity where the shapes do not even fit."""
        try:
            run.load(self.model, self.transferred(layouts, self.sizes, maps))
            along = seen(maps, self.inferred.miniature, self.sizes)
            given = renumbered(self.inputs, along, self.sizes)
            return distance(run.run(self.model, given), self.output, along)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return float("inf")

    def unread(self) -> tuple[str, ...]:
        """Tensors that have no influence on the output: no gradient, and none when they change either.

        A class may take gradients of a part of itself for not wanted (LayoutLMv3), or in training alone (Reformer).
        """
        run.load(self.model, self.state)
        with torch.enable_grad():
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)
            torch.manual_seed(1)
            given = run.run(self.model, self.inputs)
            total = sum(
                (value * torch.randn_like(value)).sum() for value in given.values() if value.requires_grad
            )
            with contextlib.suppress(AssertionError):
                if isinstance(total, Tensor):
                    total.backward()
        dead = [
            n for n, p in self.model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)
        ]
        movers = set(self._movers(dead))
        return tuple(
            dict.fromkeys(generic(name, self.inferred.stacks)[0] for name in dead if name not in movers)
        )

    def _movers(self, names: list[str]) -> list[str]:
        """Those of these tensors that move the output when they change, by halves: mostly there is none."""
        run.load(self.model, self.state | {name: self.state[name] * 1.5 for name in names})
        if not names or not distance(run.run(self.model, self.inputs), self.output, {}) > 0:
            return []
        middle = len(names) // 2
        return names if not middle else self._movers(names[:middle]) + self._movers(names[middle:])


def permutations(
    sizes: Mapping[str, int], axes: set[str], seed: int = 0
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """For each axis, a permutation of it: kv groups move whole, with their query heads reordered inside."""
    rng = np.random.default_rng(seed)
    for axis in (axis for axis in sizes if axis in axes):
        kind, size = kind_of(axis), sizes[axis]
        if kind == HEADS:
            groups = _order(rng, sizes.get(sibling(axis, KV_HEADS), size))
            inside = np.stack([_order(rng, size // len(groups)) for _ in groups])
            order = (groups[:, None] * inside.shape[1] + inside).ravel()
            yield axis, {sibling(axis, KV_HEADS): groups, axis: order}
        elif kind == KV_HEADS and sibling(axis, HEADS) in sizes:
            continue
        elif kind not in (POSITIONS, WAVES, LAYERS):
            fixed = (
                RESERVED if kind == VOCAB else 0
            )  # RoBERTa counts positions by where the padding id stands
            yield axis, {axis: np.r_[:fixed, fixed + _order(rng, size - fixed)]}


def _order(rng: np.random.Generator, size: int) -> np.ndarray:
    """Another order than it is: one that leaves all in place proves nothing."""
    order = rng.permutation(size)
    return np.roll(order, 1) if (order == np.arange(size)).all() else order


def _layerwise(bench: _Bench, layouts: Mapping[str, str], axis: str) -> bool:
    """Whether the axis may be in another order in each layer: it lives inside the layers alone."""
    heads = sibling(axis, HEADS) if kind_of(axis) == KV_HEADS else axis
    about = {heads, sibling(heads, KV_HEADS)} if kind_of(heads) == HEADS else {heads}
    inside = [name for name, text in layouts.items() if any(about & set(dim.axes) for dim in parse(text))]
    if not inside or not all("*" in name for name in inside):
        return False
    layers = {
        layer
        for name in bench.state
        for layer in [generic(name, bench.inferred.stacks)[1]]
        if layer is not None
    }
    maps: dict[str, np.ndarray] = {}
    for seed, layer in enumerate(layers):
        own = dict(permutations(bench.sizes, {heads}, seed + 1))[heads]
        maps |= {f"{name}@{layer}": axis_map for name, axis_map in own.items()}
    return bench.permuted(layouts, maps) <= TOLERANCE


def _by_permutation(bench: _Bench) -> tuple[dict[str, str], dict[str, float]]:
    """The layouts under which most axes are proven, and what permuting each axis moved the output by."""
    choices = bench.inferred.choices
    layouts = dict(bench.inferred.layouts)
    possible = {
        axis
        for choice in choices.values()
        for dim in choice.dims
        for text in dim
        for axis in parse(text)[0].axes
    }
    possible |= {axis for text in layouts.values() for dim in parse(text) for axis in dim.axes}
    possible |= {sibling(axis, HEADS) for axis in possible if kind_of(axis) == KV_HEADS}
    moves = dict(permutations(bench.sizes, possible))
    errors = {axis: bench.permuted(layouts, maps) for axis, maps in moves.items()}
    doubted = {axis for axis, error in errors.items() if not error <= TOLERANCE}
    failed = {axis for axis in doubted if not _ordered(bench, axis)}
    picks = {name: (0,) * len(choice.dims) for name, choice in choices.items()}
    tries = 0
    limit = bench.tries
    while failed and tries < limit:
        for other in islice(alternatives(choices, picks, failed, set(errors) - failed), limit - tries):
            tries += 1
            tried = {**layouts, **{name: choices[name].text(own) for name, own in other.items()}}
            better = _failing(bench, tried, moves, failed)
            if better is not None and all(
                bench.permuted(tried, moves[axis]) <= TOLERANCE for axis in set(errors) - doubted
            ):  # go on from here with what is left
                picks, layouts, failed = other, tried, better
                break
        else:
            break
    # What was proven under the first layouts must hold under the last.
    errors = {axis: bench.permuted(layouts, maps) for axis, maps in moves.items()}
    for axis in (axis for axis in bench.sizes if axis in possible):
        if kind_of(axis) == POSITIONS:
            errors[axis] = ordered.shortened(bench, layouts, axis)
        elif kind_of(axis) == LAYERS:
            errors[axis] = ordered.moved_before(bench, layouts, axis)
    return layouts, errors


def _failing(
    bench: _Bench, layouts: Mapping[str, str], moves: Mapping[str, Maps], failed: set[str]
) -> set[str] | None:
    """Which of the failed axes still fail under other layouts; None unless these are fewer."""
    left = set(failed)
    for at, axis in enumerate(sorted(failed), 1):
        if bench.permuted(layouts, moves[axis]) <= TOLERANCE:
            left.remove(axis)
        if len(left) == len(failed) and at > 2:
            return None
    return left if len(left) < len(failed) else None


def _by_duplication(bench: _Bench, layouts: dict[str, str], proven: set[str]) -> tuple[dict[str, str], float]:
    """The layouts with the reading sides that pass, and what duplicating every axis moved the output by."""
    try:
        double = _Double(bench, layouts, proven)
    except Exception:  # a class may refuse such sizes; then no growth is proven
        return layouts, float("inf")
    error = double.moved_by(layouts)
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


TURNED = (HEAD_DIM, ROPE_DIM)


def _ordered(bench: _Bench, axis: str) -> bool:
    """Whether the order on an axis may be no symmetry: then that it is none is no reason to doubt the layouts.

    Inside a head positions turn pairs of channels, and experts may be routed by groups.
    """
    groups = getattr(owner(bench.inferred.miniature, axis), "n_group", None) or 1
    return kind_of(axis) in TURNED or (kind_of(axis) == EXPERTS and groups > 1)


DUPLICATED = (HIDDEN, UNIT, GROUPS, FFN, MOE_FFN, SHARED_FFN, EMBEDDING, HEADS, KV_HEADS)


class _Double:
    """The miniature with every channel, neuron and head there twice, its reading shared one to two.

    Uneven shares tell the sides apart: weighting the copies on the side that writes would change each of them.
    """

    def __init__(self, bench: _Bench, layouts: Mapping[str, str], proven: set[str]) -> None:
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
        for axis in (
            axis for axis in seen if kind_of(axis) == WAVES and self._sizes[axis] == 2 * sizes[axis]
        ):
            self._maps[axis] = (
                np.arange(self._sizes[axis]) // 2
            )  # every second has the frequency of one of these
        self._model = run.build(bench.model_class, target)
        _same_constants(bench.model, self._model)
        bench.silence(self._model, self._sizes)

    def moved_by(self, layouts: Mapping[str, str]) -> float:
        """How far its output is from the miniature's; infinity where it cannot even be run."""
        bench, maps = self._bench, self._maps
        try:
            doubled = bench.transferred(layouts, self._sizes, maps)
            for name, tensor in doubled.items():
                for at, dim in enumerate(parse(layouts[generic(name, bench.inferred.stacks)[0]])):
                    if axis := next(
                        (axis for axis in dim.axes if kind_of(axis) == WAVES and axis in maps), None
                    ):
                        between = torch.from_numpy(coordinates(dim, self._sizes)[axis]) % 2 == 1
                        share = torch.where(between, 0.0, 2.0 if dim.reads else 1.0)
                        tensor = tensor * share.view([-1 if d == at else 1 for d in range(tensor.ndim)])
                    elif dim.reads and not maps.keys().isdisjoint(dim.axes):
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
            share = np.where(where[axis] < 0, share, np.where(second, 4 / 3, 2 / 3))
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
