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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from transformers import PreTrainedModel

from hf_ws.axes import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    ROPE_DIM,
    VOCAB,
    WAVES,
    kind_of,
    parse,
    sibling,
)
from hf_ws.layouts import ordered
from hf_ws.layouts.bench import TOLERANCE, Bench
from hf_ws.layouts.duplicate import by_duplication
from hf_ws.layouts.explain import streams
from hf_ws.layouts.infer import Inferred
from hf_ws.layouts.miniature import RESERVED
from hf_ws.layouts.outputs import Maps
from hf_ws.layouts.search import alternatives
from hf_ws.sizes import owner


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
    scaled: Mapping[str, str] = field(default_factory=dict)
    """The embeddings that the class multiplies by sqrt(length of the stream), and its axis."""
    head: str | None = None
    """The matrix that gives the logits."""
    head_norm: tuple[str, ...] = ()
    """Gain and bias of the norm that it reads, if its gain is a factor."""


def prove(model_class: type[PreTrainedModel], inferred: Inferred) -> Proof:
    """Prove each axis by permutation, the reading sides by duplication; in `run.plain_arithmetic`."""
    bench = Bench(model_class, inferred)
    layouts, errors = _by_permutation(bench)
    proven = {axis for axis, error in errors.items() if error <= TOLERANCE}
    proven |= {sibling(axis, KV_HEADS) for axis in proven if kind_of(axis) == HEADS}
    proven |= {hidden for hidden, parts in streams(inferred.miniature).items() if proven.issuperset(parts)}
    layerwise = _layerwise(bench, layouts, proven)
    turned = {
        hidden: parts
        for hidden, parts in streams(inferred.miniature).items()
        if any(kind_of(axis) == WAVES for axis in parts)
        and proven.issuperset(axis for axis in parts if kind_of(axis) != WAVES)
    }
    layouts, error = by_duplication(bench, layouts, proven | turned.keys())
    if error <= TOLERANCE:
        proven |= turned.keys()
    else:  # that each channel has the frequency it is said to have, duplication alone shows
        errors |= {axis: error for parts in turned.values() for axis in parts if axis in proven}
        proven -= {axis for parts in turned.values() for axis in parts}
    errors["reads"] = error
    return Proof(
        layouts,
        proven,
        layerwise,
        errors,
        error <= TOLERANCE,
        bench.unread(),
        bench.tables,
        bench.scaled(layouts),
        **bench.head(),
    )


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


def _layerwise(bench: Bench, layouts: Mapping[str, str], proven: set[str]) -> set[str]:
    """The axes that may be in another order in each layer: they live inside the layers alone.

    Heads and their kv groups are permuted together, so one run tells of both.
    """
    found: dict[str, bool] = {}
    for axis in proven:
        heads = sibling(axis, HEADS) if kind_of(axis) == KV_HEADS else axis
        if heads not in found:
            found[heads] = _is_layerwise(bench, layouts, heads)
    return {axis for axis in proven if found[sibling(axis, HEADS) if kind_of(axis) == KV_HEADS else axis]}


def _is_layerwise(bench: Bench, layouts: Mapping[str, str], axis: str) -> bool:
    about = {axis, sibling(axis, KV_HEADS)} if kind_of(axis) == HEADS else {axis}
    inside = [name for name, text in layouts.items() if any(about & set(dim.axes) for dim in parse(text))]
    if not inside or not all("*" in name for name in inside):
        return False
    maps: dict[str, np.ndarray] = {}
    for seed, layer in enumerate(bench.layers):
        own = dict(permutations(bench.sizes, {axis}, seed + 1))[axis]
        maps |= {f"{name}@{layer}": axis_map for name, axis_map in own.items()}
    return bench.permuted(layouts, maps) <= TOLERANCE


def _by_permutation(bench: Bench) -> tuple[dict[str, str], dict[str, float]]:
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
    first, tries = layouts, 0
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
    if layouts is not first:  # what was proven under the first must hold under the last
        errors = {axis: bench.permuted(layouts, maps) for axis, maps in moves.items()}
    for axis in (axis for axis in bench.sizes if axis in possible):
        if kind_of(axis) == POSITIONS:
            errors[axis] = ordered.shortened(bench, layouts, axis)
        elif kind_of(axis) == LAYERS:
            errors[axis] = ordered.moved_before(bench, layouts, axis)
    return layouts, errors


def _failing(
    bench: Bench, layouts: Mapping[str, str], moves: Mapping[str, Maps], failed: set[str]
) -> set[str] | None:
    """Which of the failed axes still fail under other layouts; None unless these are fewer."""
    left = set(failed)
    for at, axis in enumerate(sorted(failed), 1):
        if bench.permuted(layouts, moves[axis]) <= TOLERANCE:
            left.remove(axis)
        if len(left) == len(failed) and at > 2:
            return None
    return left if len(left) < len(failed) else None


TURNED = (HEAD_DIM, ROPE_DIM)


def _ordered(bench: Bench, axis: str) -> bool:
    """Whether the order on an axis may be no symmetry: then that it is none is no reason to doubt the layouts.

    Inside a head positions turn pairs of channels, and experts may be routed by groups.
    """
    groups = getattr(owner(bench.inferred.miniature, axis), "n_group", None) or 1
    return kind_of(axis) in TURNED or (kind_of(axis) == EXPERTS and groups > 1)
