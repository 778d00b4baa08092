"""The legal shapes near a number of parameters, from a config alone.

Which sizes are legal, and what follows from them, `hf_ws.derive` says; how many parameters a shape has follows from the
proven layouts, without building it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig as Config

from hf_ws.axes import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, length, parse, split_key
from hf_ws.derive import attempt
from hf_ws.errors import PlanError, SizeError
from hf_ws.layouts import Certificate
from hf_ws.layouts.census import Shapes
from hf_ws.layouts.stacks import generic
from hf_ws.search.goal import Goal
from hf_ws.sizes import PARTS, field_of, sizes_of

REACH = math.log(1.1)
"""How far from the goal a shape may be: a tenth."""

CLOSE = math.log(1.05)
"""A shape as near as this goes before any other: what is larger has the better score."""

NARROWER, WIDER = (0.5, 0.75), (1.25, 1.5)
"""Feed-forward blocks tried besides the one that follows `hidden`, as multiples of it."""

PARAMETERS_COUNT = 10.0
"""One per cent of parameters off the goal weighs as ten per cent of the proportions."""


@dataclass(frozen=True)
class Shape:
    """Sizes that a target may have: those to ask for, and all that follow."""

    asked: Mapping[str, int]
    sizes: Mapping[str, int]
    parameters: int
    distance: float
    """See `distance`."""


@dataclass(frozen=True)
class Space:
    """What may be searched: a source, and what is asked of every target.

    `asked` are sizes by axis and `fields` other config fields, as `hf_ws.derive.read_request` sorts them; `source`
    are the shapes of the source's tensors.
    """

    config: Config
    certificate: Certificate
    source: Shapes
    asked: Mapping[str, int]
    fields: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Of the source."""
        return sum(map(math.prod, self.source.values()))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The layer axes of the text part, the leading one first."""
        return own_axes(sizes_of(self.config), LAYERS)

    def near(self, goal: Goal) -> list[Shape]:
        """The shapes within a tenth of the goal, nearest first.

        Raises:
            SizeError: there is none; with the nearest that there are.
            PlanError: a model in which neither hidden, layers nor ffn is free.
        """
        wanted = goal.wanted(self.parameters)
        found = sorted(self._all(wanted), key=lambda shape: (shape.distance, *shape.asked.values()))
        near = [shape for shape in found if abs(math.log(shape.parameters / wanted)) <= REACH]
        if not near:
            raise SizeError(_too_far(goal, wanted, found, self.certificate.model_class))
        return near

    def _all(self, wanted: int) -> Iterator[Shape]:
        before, depths = sizes_of(self.config), list(self._depths())
        widths = list(self._widths())
        if len(widths) * len(depths) == 1 and not widths[0][0].keys() - self.asked.keys():
            free = ", ".join(self.certificate.axes) or "none"
            raise PlanError(
                f"{self.certificate.model_class}: a goal searches hidden, ffn and layers of the text part, and here "
                f"none of them is open (it may change {free}); give the sizes themselves"
            )
        for asked, sizes in widths:
            own = self._by_layer(sizes)
            for depth in depths:
                count = own[None] + sum(sum(own.get((s, i), 0) for i in range(n)) for s, n in depth.items())
                count += sum(n for key, n in own.items() if key is not None and key[0] not in depth)
                after = {**sizes, **depth}
                yield Shape({**asked, **depth}, after, count, distance(before, after, count, wanted))

    def _depths(self) -> Iterator[dict[str, int]]:
        """Numbers of layers: every one of the first free stack, the others in proportion."""
        before = sizes_of(self.config)
        free = [axis for axis in self.stacks if axis in self.certificate.axes and axis not in self.asked]
        fixed = {axis: self.asked.get(axis, before[axis]) for axis in self.stacks if axis not in free}
        if not free:
            yield fixed
            return
        whole = before[free[0]]
        for keep in range(1, whole + 1):
            own = {axis: max(1, math.floor(before[axis] * keep / whole + 0.5)) for axis in free}
            yield {axis: (own | fixed)[axis] for axis in self.stacks}

    def _widths(self) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        """What is asked for besides layers, and all sizes with the source's layers."""
        before, problems = sizes_of(self.config), [""]
        free = HIDDEN in before and HIDDEN in self.certificate.axes and HIDDEN not in self.asked
        tried: set[tuple[tuple[str, int], ...]] = set()
        for hidden in self._hidden(before) if free else [None]:
            own = dict(self.asked) if hidden is None else {**self.asked, HIDDEN: hidden}
            for heads in [{}, *self._heads(before, own)]:
                problems, derived = attempt(self.config, {**own, **heads}, {}, self.fields)
                sizes = {} if derived is None else sizes_of(derived)
                if (key := tuple(sizes.items())) in tried or not self._fits(before, sizes):
                    continue
                tried.add(key)
                for ffn in self._ffn(before, sizes):
                    yield {**own, **heads, **ffn}, {**sizes, **ffn}
        if not tried:
            why = f": {'; '.join(problems)}" if problems else ""
            raise SizeError(f"no width below the source's goes with what is asked{why}")

    def _fits(self, before: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
        """Whether nothing grew that was not asked to, and heads are as wide as they were."""
        free = [axis for axis in before if axis not in self.asked]
        widths = [axis for axis in free if axis in own_axes(before, HEAD_DIM)]
        same = all(sizes.get(axis) == before[axis] for axis in widths)
        return bool(sizes) and same and all(sizes.get(axis, 0) <= before[axis] for axis in free)

    def _heads(self, before: Mapping[str, int], asked: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Numbers of heads beside the one that follows `hidden`: the whole key/value groups just below and above."""
        heads, groups = own_axes(before, HEADS), own_axes(before, KV_HEADS)
        if HIDDEN not in asked or any(axis in asked for axis in (*heads, *groups)):
            return
        for more in (0, 1):
            own = {}
            for axis, group in zip(heads, groups, strict=True):
                count = before[group] * asked[HIDDEN] // before[HIDDEN] + more
                own[axis] = before[axis] // before[group] * max(1, count)
            yield own

    def _hidden(self, before: Mapping[str, int]) -> list[int]:
        """Widths worth trying; which are legal `derive` says."""
        steps = {math.gcd(64, before[HIDDEN])}
        steps |= {size for kind in (HEAD_DIM, HEADS) for size in self._of_heads(before, kind)}
        return sorted({n for step in steps for n in range(step, before[HIDDEN] + 1, step)})

    def _of_heads(self, before: Mapping[str, int], kind: str) -> list[int]:
        """The size of heads, and their number where it is asked for: hidden may have to be a multiple of these."""
        own = own_axes(before, kind)
        return [self.asked.get(axis, before[axis]) for axis in own if kind == HEAD_DIM or axis in self.asked]

    def _ffn(self, before: Mapping[str, int], sizes: Mapping[str, int]) -> list[dict[str, int]]:
        """Sizes of the feed-forward blocks: as they follow, and multiples of that, none above the source's."""
        axes = [axis for axis in own_axes(before, FFN) if axis in self.certificate.axes]
        found: list[dict[str, int]] = [{}]
        if not axes or any(axis in self.asked or field_of(self.config, axis) is None for axis in axes):
            return found
        for factor in (*NARROWER, *WIDER):
            own = {}
            for axis in axes:
                unit = math.gcd(64, before[axis])
                own[axis] = max(unit, unit * math.floor(sizes[axis] * factor / unit + 0.5))
            if all(own[axis] <= before[axis] and own[axis] != sizes[axis] for axis in axes):
                found.append(own)
        return found

    def _by_layer(self, sizes: Mapping[str, int]) -> dict[Any, int]:
        """Parameters with these widths: of each layer of the source by stack and number, and of the rest (None)."""
        lengths: dict[str, int] = {}
        found: dict[Any, int] = {None: 0}
        for name, shape in self.source.items():
            pattern, layer = generic(name, self.certificate.stacks)
            text = self.certificate.layouts.get(pattern)
            if text is None:
                count = math.prod(shape)
            elif text not in lengths:
                count = lengths[text] = math.prod(length(dim, sizes) for dim in parse(text))
            else:
                count = lengths[text]
            key = None if layer is None else split_key(layer)
            found[key] = found.get(key, 0) + count
        return found


def distance(before: Mapping[str, int], after: Mapping[str, int], parameters: int, wanted: int) -> float:
    """How far a shape is from the goal and from the source's proportions, in natural logarithms.

    10 |ln(parameters / wanted)| + |ln of the change of hidden : layers| + |ln of the change of ffn : hidden|
    """

    def change(kind: str) -> float:
        own = [axis for axis in own_axes(before, kind) if axis in after]
        return math.log(after[own[0]] / before[own[0]]) if own else 0.0

    proportions = abs(change(HIDDEN) - change(LAYERS)) + abs(change(FFN) - change(HIDDEN))
    return PARAMETERS_COUNT * abs(math.log(parameters / wanted)) + proportions


def own_axes(sizes: Mapping[str, int], kind: str) -> tuple[str, ...]:
    """The axes of a kind in the text part: the plain one, or those of its encoder and decoder."""
    if kind in sizes:
        return (kind,)
    return tuple(f"{part}.{kind}" for part in PARTS[:2] if f"{part}.{kind}" in sizes)


def _too_far(goal: Goal, wanted: int, found: Sequence[Shape], model_class: str) -> str:
    below = max((s for s in found if s.parameters <= wanted), key=lambda s: s.parameters, default=None)
    above = min((s for s in found if s.parameters >= wanted), key=lambda s: s.parameters, default=None)
    nearest = " or ".join(
        f"{shape.parameters:,} ({', '.join(f'{axis}={size}' for axis, size in shape.asked.items())})"
        for shape in (below, above)
        if shape is not None
    )
    return (
        f"{goal}: no shape of {model_class} has within a tenth of {wanted:,} parameters, with what else is asked; "
        f"nearest reachable: {nearest}"
    )
