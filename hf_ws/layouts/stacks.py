"""Which module lists hold a model's layers, and how a layer's tensors are called in layouts.

A layer's number is written `*`: `model.layers.*.mlp.up_proj.weight`. Layers of several kinds (attention with a state
and without, dense and routed) may have a tensor of one name that lies otherwise in each: then `*2` is the tensor in
layers that lie as those of the third kind do, and `*` in all that lie as those of the first. What a shared layer has
for each that shares it is numbered `#`: `model.layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.#`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

from transformers import PreTrainedConfig

from hf_ws.axes import layer_key, split_key
from hf_ws.sizes import layer_axes, layer_kinds

_NUMBER = re.compile(r"\*\d*")
_RECURRENT = re.compile(r"((?:weight|bias)_[ih]h_l)(\d+)")
"""What an LSTM calls the tensors of its layers: `decoder.lstm.weight_ih_l0`."""
_USE = re.compile(r"(?<=_adapter_list\.)\d+(?=\.)")
"""Where a layer that several share has something for each of them (Zamba 2): which of them, in their order."""


class Stacks(dict[str, str]):
    """The layer axis of each module list that holds layers, and of a first layer with layouts of its own.

    Attributes:
        kinds: For each layer axis the kind of each layer, numbered in the order in which they appear.
        apart: For a tensor that lies otherwise in some kinds of layers, the first kind that it lies alike in, by kind.
        behind: For a list of what stands between layers, one less than there are: 1, for its first is the second's.
    """

    def __init__(
        self,
        axes: Mapping[str, str],
        kinds: Mapping[str, Sequence[int]] | None = None,
        apart: Mapping[str, Mapping[int, int]] | None = None,
        behind: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(axes)
        self.kinds = dict(kinds or {})
        self.apart = dict(apart or {})
        self.behind = dict(behind or {})

    def of(self, config: PreTrainedConfig) -> Stacks:
        """The same with the kinds of another config's layers."""
        return Stacks(self, kinds_of(config), self.apart, self.behind)

    def kept(self, layers: Mapping[str, Sequence[int]]) -> Stacks:
        """The same for a model that has these layers of this one."""
        own = {
            axis: [self.kinds[axis][i] for i in kept] for axis, kept in layers.items() if axis in self.kinds
        }
        return Stacks(self, {**self.kinds, **own}, self.apart, self.behind)

    def part(self, pattern: str, lying: Mapping[int, Hashable]) -> bool:
        """Note that a tensor lies so in each layer, by its number; False if that differs within a kind of layers."""
        kinds = self.kinds.get(self[stack_of(pattern)], ())
        by_kind: dict[int, Hashable] = {}
        for number, way in lying.items():
            if number >= len(kinds) or by_kind.setdefault(kinds[number], way) != way:
                return False
        first: dict[Hashable, int] = {}
        self.apart[pattern] = {kind: first.setdefault(way, kind) for kind, way in sorted(by_kind.items())}
        return True


def kinds_of(config: PreTrainedConfig) -> dict[str, list[int]]:
    """The kind of each layer by layer axis, numbered in the order in which they appear: as a miniature has them."""
    found = {}
    for axis in layer_axes(config):
        kinds = layer_kinds(config, axis)
        number = {kind: at for at, kind in enumerate(dict.fromkeys(kinds))}
        found[axis] = [number[kind] for kind in kinds]
    return found


def generic(name: str, stacks: Mapping[str, str]) -> tuple[str, int | str | None]:
    """A tensor's name with its layer's number written `*`, and which layer that is (None outside the layers).

    The layers of the text part go by number, others by their axis as well: `3`, `decoder.layers.3`. A first layer that
    is a stack of its own in `stacks` keeps its number in the name.
    """
    for stack, axis in stacks.items():
        if name.startswith(f"{stack}.") and not (stack.endswith(".0") and stack[:-2] in stacks):
            number, _, rest = _USE.sub("#", name[len(stack) + 1 :]).partition(".")
            if layer := _RECURRENT.fullmatch(number):
                pattern, own = f"{stack}.{layer[1]}*", int(layer[2])
                return f"{pattern}{_mark(pattern, axis, own, stacks)}", layer_key(axis, own)
            if number.isdigit():
                if number == "0" and f"{stack}.0" in stacks:
                    return name, layer_key(axis, 0)
                own = int(number) + (stacks.behind.get(stack, 0) if isinstance(stacks, Stacks) else 0)
                mark = _mark(f"{stack}.*.{rest}", axis, own, stacks)
                return f"{stack}.*{mark}.{rest}", layer_key(axis, own)
    return name, None


def _mark(pattern: str, axis: str, number: int, stacks: Mapping[str, str]) -> str:
    """The kind of layers in which this tensor lies as in this one; nothing for the first kind there is."""
    if not isinstance(stacks, Stacks) or pattern not in stacks.apart:
        return ""
    kinds, kind_in = stacks.kinds.get(axis, ()), stacks.apart[pattern]
    kind = kind_in.get(kinds[number]) if number < len(kinds) else None
    return "" if kind is None or kind == min(kind_in.values()) else str(kind)


def stack_of(pattern: str) -> str:
    """The module that holds the layers, in a name with the layer's number written `*`."""
    return pattern.partition("*")[0].rpartition(".")[0]


def in_layer(pattern: str, layer: int | str) -> str:
    """A tensor's name in one layer, by its number or its key: the reverse of `generic`."""
    return _NUMBER.sub(str(split_key(layer)[1]), pattern, count=1)


def sharing(name: str, stacks: Stacks, layer: int | str) -> int | None:
    """For which layer a shared one has this tensor, where it has one for each layer of its kind; None elsewhere."""
    use, (axis, number) = _USE.search(name), split_key(layer)
    if use is None:
        return None
    kinds = stacks.kinds[axis]
    return [i for i, kind in enumerate(kinds) if kind == kinds[number]][int(use.group())]


def before(name: str, layer: int | str, stacks: Stacks, kept: Mapping[str, Sequence[int]]) -> str:
    """The source's name of a target's tensor in one of its layers, where these of the source's layers are kept.

    Args:
        name: The target's own name of it.
        layer: The key of its layer in the target.
        stacks: The source's.
        kept: The source layer of each target layer, by layer axis.
    """
    axis, number = split_key(layer)
    own = kept.get(axis)
    if own is None:
        return name
    target = stacks.kept(kept)
    pattern = generic(name, target)[0]
    spelled = in_layer(pattern, own[number] - stacks.behind.get(stack_of(pattern), 0))
    if (user := sharing(name, target, layer)) is not None:
        kinds = stacks.kinds[axis]
        uses = [i for i, kind in enumerate(kinds) if kind == kinds[own[number]]]
        spelled = spelled.replace("#", str(uses.index(own[user])))
    return spelled


def of_any_kind(pattern: str) -> str:
    """A tensor's name in layers of whatever kind."""
    return _NUMBER.sub("*", pattern, count=1)


def led(stacks: Mapping[str, str]) -> set[str]:
    """The layer axes of the stacks whose first layer has layouts of its own, and stays the first in any target."""
    return {axis for stack, axis in stacks.items() if stack.endswith(".0") and stack[:-2] in stacks}
