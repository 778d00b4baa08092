"""The certificate of a model class: the proven layouts of its tensors, and which of its axes may change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.axes import HEAD_DIM, HEADS, KV_HEADS, LAYERS, Product, Sum, kind_of, length, parse, sibling, spell
from hf_ws.errors import SizeError, UnsupportedArchitectureError
from hf_ws.layouts import irregular, prove, run
from hf_ws.layouts.bench import TOLERANCE
from hf_ws.layouts.explain import streams
from hf_ws.layouts.infer import Inferred, infer, tensors_of
from hf_ws.layouts.miniature import build_on_meta
from hf_ws.layouts.stacks import Stacks, before, generic, in_layer, stack_of
from hf_ws.sizes import near, owner, resize, sizes_of


class Spelled(NamedTuple):
    """What a tensor of a target is called."""

    name: str
    source: str
    """In the source."""
    pattern: str
    """With the layer's number written `*`."""
    layer: int | str | None
    """The key of its layer in the target; None outside the layers."""


@dataclass(frozen=True)
class Certificate:
    """The proven layouts of a model class, for one kind of config."""

    model_class: str
    layouts: Mapping[str, str]
    """Layout by tensor name, the layer's number written `*`."""
    stacks: Stacks
    """The layer axis of each module list that holds layers, and of which kind each layer is."""
    axes: tuple[str, ...]
    """The axes that may change: those proven, and those that count layers."""
    errors: Mapping[str, float]
    """What each proof moved the output by, as a share of its largest value."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """The axes that occur and may not change, with the reason."""
    layerwise: tuple[str, ...] = ()
    """The axes of which every layer may keep indices of its own."""
    reads: bool = True
    """Whether it is proven which side of each tensor reads, as gains and growth want to know."""
    unread: tuple[str, ...] = ()
    """Tensors that had no influence on the miniature's output: their layouts rest on their shapes."""
    tables: tuple[str, ...] = ()
    """Position tables that the class computes; hidden is proven with these at zero, for a target computes its own."""
    tied: tuple[str, ...] = ()
    """Parameters that are another name of one earlier in `layouts` where the config ties embeddings."""
    scaled: Mapping[str, str] = field(default_factory=dict)
    """The embeddings that the class multiplies by sqrt(length of the stream), by name, and the axis of the stream."""
    head: str | None = None
    """The matrix that gives the logits."""
    head_norm: tuple[str, ...] = ()
    """Gain and bias of the norm whose output the head reads; empty if there is none, or its gain is not a factor."""

    def pattern(self, name: str) -> str:
        """A tensor's name as `layouts` spells it."""
        return generic(name, self.stacks)[0]

    def spelled(self, layers: Mapping[str, Sequence[int]], more: Iterable[str] = ()) -> Iterator[Spelled]:
        """Every tensor of a model with these layers of this one, less what a shared layer has for each of its users.

        Args:
            layers: The layer of this model that each of the other's is, by layer axis.
            more: Patterns that are spelled out too.
        """
        stacks = self.stacks.kept(layers)
        for pattern in dict.fromkeys([*self.layouts, *more]):
            stack = stack_of(pattern) if "*" in pattern else ""
            if stack not in self.stacks:
                yield Spelled(pattern, pattern, pattern, generic(pattern, stacks)[1])
                continue
            for number in range(len(layers[self.stacks[stack]]) - self.stacks.behind.get(stack, 0)):
                name = in_layer(pattern, number)
                own, layer = generic(name, stacks)
                if own == pattern and layer is not None:  # not all layers have it
                    yield Spelled(name, before(name, layer, self.stacks, layers), pattern, layer)

    def kept(self, layers: Mapping[str, Sequence[int]]) -> Certificate:
        """The certificate of a model that has these layers of this one, by layer axis."""
        return replace(self, stacks=self.stacks.kept(layers))

    @property
    def occurring(self) -> tuple[str, ...]:
        """Every axis in the layouts, whether it may change or not."""
        return tuple(
            dict.fromkeys(axis for text in self.layouts.values() for dim in parse(text) for axis in dim.axes)
        )


_CERTIFICATES: dict[tuple[type[PreTrainedModel], str], Certificate] = {}


def certify(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Certificate:
    """Infer the layouts of `model_class(config)` and prove them; seconds at most, and remembered.

    Raises:
        UnsupportedArchitectureError: a dimension without an explanation, or no axis that could be proven.
    """
    if model_class.forward is torch.nn.Module.forward:
        raise UnsupportedArchitectureError(
            f"{model_class.__name__} has no forward of its own, only those of its parts, so nothing is proven "
            "as a whole; transfer the parts"
        )
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _CERTIFICATES:
        try:
            certificate = certificate_of(model_class, infer(model_class, config))
            _CERTIFICATES[key] = anchored(certificate, model_class, config)
        except UnsupportedArchitectureError:
            raise
        except (
            Exception
        ) as error:  # a miniature may break a class in any way; whatever it is, there is no proof
            raise UnsupportedArchitectureError(
                f"{model_class.__name__}: no miniature of it can be built and run, so its layouts are not proven: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    return _CERTIFICATES[key]


def certificate_of(model_class: type[PreTrainedModel], inferred: Inferred) -> Certificate:
    """Prove inferred layouts. Raises UnsupportedArchitectureError if no axis at all can be proven."""
    with run.plain_arithmetic(inferred.miniature):
        proof = prove.prove(model_class, inferred)
    layouts = proof.layouts
    occurring = {axis for text in layouts.values() for dim in parse(text) for axis in dim.axes}
    if not proof.proven & occurring:
        failed = ", ".join(
            f"{axis} (moved the output by {error:.1e})" for axis, error in proof.errors.items()
        )
        raise UnsupportedArchitectureError(
            f"{model_class.__name__}: its layouts were inferred but not proven: {failed}. Nothing is transferred on a "
            "guess; a fused or interleaved tensor needs a row in hf_ws/layouts/irregular.py"
        )
    order = list(sizes_of(inferred.miniature))
    heads = {
        sibling(axis, kind)
        for axis in occurring
        for kind in (HEADS, KV_HEADS)
        if kind_of(axis) in (HEADS, KV_HEADS)
    }
    shown = occurring | heads | streams(inferred.miniature).keys()
    proven = [
        axis
        for axis in order
        if axis in proof.proven & shown and axis not in inferred.fixed and kind_of(axis) != LAYERS
    ]
    fixed = dict(inferred.fixed)
    for axis, error in proof.errors.items():
        if axis in occurring and axis not in proven and not (kind_of(axis) == LAYERS and error <= TOLERANCE):
            theirs = {
                a
                for a in order
                if kind_of(a) == HEADS and near(a, HEAD_DIM, sizes_of(inferred.miniature)) == axis
            }
            if kind_of(axis) == HEAD_DIM and theirs <= {*proven} and _turns_whole(inferred.miniature, axis):
                proven.append(
                    axis
                )  # no symmetry, but which pairs a smaller head keeps is known by their frequency
                continue
            known = irregular.MIXED.get((inferred.miniature.model_type, axis))
            fixed.setdefault(
                axis, f"{known + ', so ' if known else ''}permuting it moved the output by {error:.1e}"
            )
    return Certificate(
        model_class=model_class.__name__,
        layouts=layouts,
        stacks=inferred.stacks,
        axes=tuple(
            dict.fromkeys([*proven, *(axis for axis in inferred.stacks.values() if axis not in fixed)])
        ),
        errors=proof.errors,
        fixed=fixed,
        layerwise=tuple(axis for axis in order if axis in proof.layerwise),
        reads=proof.reads,
        unread=proof.unread,
        tables=proof.tables,
        tied=_tied(model_class, inferred.miniature),
        scaled=proof.scaled,
        head=proof.head,
        head_norm=proof.head_norm,
    )


def _turns_whole(config: PreTrainedConfig, axis: str) -> bool:
    """Whether rotary positions turn all of each head, in pairs that can be told."""
    size = sizes_of(config)[axis]
    try:
        return len(irregular.rotary_index(owner(config, axis), size, size - 2)) == size - 2
    except SizeError:
        return False


def anchored(
    certificate: Certificate, model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> Certificate:
    """The certificate with the numbers in its layouts as they are in the full model: patches, kernels, classes."""
    sizes = sizes_of(config)
    certificate = replace(certificate, stacks=certificate.stacks.of(config))
    layouts = dict(certificate.layouts)
    seen: set[str] = set()
    for name, tensor in tensors_of(build_on_meta(model_class, config)).items():
        pattern = certificate.pattern(name)
        if pattern in seen or pattern not in layouts:
            continue
        seen.add(pattern)
        layouts[pattern] = _numbered(layouts[pattern], tensor, sizes)
    return replace(certificate, layouts=layouts)


def _numbered(text: str, tensor: Tensor, sizes: Mapping[str, int]) -> str:
    layout = list(parse(text))
    for at, (dim, size) in enumerate(zip(layout, tensor.shape, strict=False)):
        if not dim.axes:
            layout[at] = type(dim)(int(size), dim.reads)
        elif isinstance(dim.expression, Product):
            numbers = [f for f in dim.expression.factors if isinstance(f, int)]
            whole = length(dim, sizes)
            if len(numbers) == 1 and whole != size and not size * numbers[0] % whole:
                own = size * numbers[0] // whole
                factors = tuple(own if isinstance(f, int) else f for f in dim.expression.factors)
                layout[at] = type(dim)(Product(factors), dim.reads)
        elif isinstance(dim.expression, Sum):  # rows that are no one's: as many more as there are
            more = [part for part in dim.expression.parts if isinstance(part, int)]
            if len(more) == 1 and (own := int(size) - length(dim, sizes) + more[0]) > 0:
                parts = tuple(own if isinstance(part, int) else part for part in dim.expression.parts)
                layout[at] = type(dim)(Sum(parts), dim.reads)
    return spell(tuple(layout))


def _tied(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[str, ...]:
    try:
        model = build_on_meta(model_class, resize(config, {}, tie_word_embeddings=True))
    except Exception:  # a class that does not tie may object in any way
        return ()
    return tuple(model.get_expanded_tied_weights_keys(all_submodels=True))
