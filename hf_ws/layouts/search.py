"""Which explanations of a miniature's tensors are tried next, where the likeliest are not proven."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import combinations, product

from hf_ws.axes import HEADS, KV_HEADS, kind_of, parse, sibling
from hf_ws.layouts.infer import Choice


def alternatives(
    choices: Mapping[str, Choice], picks: Mapping[str, tuple[int, ...]], failed: set[str], proven: set[str]
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Other picks of explanations for what may contain a failed axis: first one changed, then two, then three.

    Tensors of one name and one set of explanations, in whatever layer, are explained alike. What is explained by a
    proven axis alone stays: the proof would fail if that axis were not there.
    """
    groups: dict[Group, list[tuple[str, int]]] = {}
    for name, choice in choices.items():
        for at, (dim, pick) in enumerate(zip(choice.dims, picks[name], strict=True)):
            now = set(parse(dim[pick])[0].axes)
            about = {axis for text in dim for axis in parse(text)[0].axes}
            about |= {sibling(axis, HEADS) for axis in about if kind_of(axis) == KV_HEADS}
            now |= {sibling(axis, HEADS) for axis in now if kind_of(axis) == KV_HEADS}
            if len(dim) > 1 and about & failed and (now & failed or not now & proven):
                leaf = ".".join(part for part in name.split(".")[-3:-1] if part.strip("*0123456789"))
                groups.setdefault((leaf, at == choice.reads[0], dim, pick), []).append((name, at))

    def change(key: Group) -> list[int]:
        return sorted((i for i in range(len(key[2])) if i != key[3]), key=lambda i: not _reordered(key, i))

    # Most likely the factors are right and their order is not.
    ordered = sorted(groups, key=lambda key: not _reordered(key, change(key)[0]))
    for count in (1, 2, 3):
        for keys in combinations(ordered, count):
            for chosen in product(*map(change, keys)):
                other = {name: list(own) for name, own in picks.items()}
                for key, pick in zip(keys, chosen, strict=True):
                    for name, at in groups[key]:
                        other[name][at] = pick
                yield {name: tuple(own) for name, own in other.items()}


Group = tuple[str, bool, tuple[str, ...], int]
"""Dimensions explained alike: where, whether they read, their explanations, and which of these counts now."""


def _reordered(group: Group, pick: int) -> bool:
    """Whether another explanation has a number and the same axes."""
    own, other = (parse(group[2][at])[0] for at in (group[3], pick))
    return bool(re.search(r"\b\d+\b", group[2][pick])) and set(own.axes) == set(other.axes)
