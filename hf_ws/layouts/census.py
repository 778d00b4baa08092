"""What parameters a model of full size has, and whether the plan's layouts speak of all of them.

A miniature is proven; this compares it with the models that are meant. It catches what a miniature cannot show (a
kind of layer it does not have) and config fields that add a part to the target, or take one away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.axes import length, parse, split_key
from hf_ws.errors import PlanError, SizeError, UnsupportedArchitectureError
from hf_ws.layouts.certify import Certificate
from hf_ws.layouts.infer import tensors_of
from hf_ws.layouts.miniature import build_on_meta
from hf_ws.layouts.stacks import before, generic, sharing
from hf_ws.sizes import sizes_of

Shapes = Mapping[str, tuple[int, ...]]


def census(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    """The shape of every tensor of `model_class(config)`; what is tied is there once.

    Raises:
        SizeError: the class refuses a config of these sizes.
    """
    try:
        model = build_on_meta(model_class, deepcopy(config))
    except Exception as error:  # a class may raise anything; whatever it is, it cannot be built
        raise SizeError(
            f"{model_class.__name__} cannot be built with these sizes: {' '.join(str(error).split())}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


def check_census(shapes: Shapes, config: PreTrainedConfig, certificate: Certificate) -> None:
    """Refuse a model with a parameter that no layout spells, or spells in another shape.

    Raises:
        UnsupportedArchitectureError: with the parameter's name.
        SizeError: a size that its storage does not allow.
    """
    sizes = sizes_of(config)
    spelled: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        text = certificate.layouts.get(certificate.pattern(name))
        if text is not None and text not in spelled:
            try:
                spelled[text] = tuple(length(dim, sizes) for dim in parse(text))
            except ValueError as error:
                raise SizeError(f"{certificate.model_class}: {name}: {error}") from error
        if text is None or spelled[text] != shape:
            wanted = "no such parameter" if text is None else f"{text}, which is {list(spelled[text])}"
            raise UnsupportedArchitectureError(
                f"{certificate.model_class}: {name} is {list(shape)}, but the proven layouts have {wanted}; a field of "
                "the config makes it a model of another kind"
            )


def wanting_the_first(
    source: Shapes, target: Shapes, kept: Mapping[str, Sequence[int]], certificate: Certificate
) -> list[str]:
    """The layer axes whose first layer always has something (T5's biases) that the one kept in its place has not."""
    stacks, found = certificate.stacks.kept(kept), dict[str, None]()
    for name in target:
        pattern, layer = generic(name, stacks)
        if layer is None or "*" not in pattern:
            continue
        axis, number = split_key(layer)
        if axis in kept and number == 0 and kept[axis][0] != 0:
            theirs = before(name, layer, certificate.stacks, kept)
            if theirs not in source and name in source:
                found[axis] = None
    return [*found]


def check_same_parts(
    source: Shapes, target: Shapes, kept: Mapping[str, Sequence[int]], certificate: Certificate
) -> None:
    """Refuse a target that has no place for something in the kept layers of its source, or the reverse.

    Raises:
        PlanError: with the parameters' names.
    """
    stacks = certificate.stacks.kept(kept)
    wanted: set[str] = set()
    for name in target:
        layer = generic(name, stacks)[1]
        wanted.add(name if layer is None else before(name, layer, certificate.stacks, kept))
    had = set()
    for name in source:
        layer = generic(name, certificate.stacks)[1]
        stack, number = ("", 0) if layer is None else split_key(layer)
        users = {number, sharing(name, certificate.stacks, layer) if layer is not None else None} - {None}
        if stack not in kept or users <= {*kept[stack]}:
            had.add(name)
    new = sorted(name for name in wanted - had if name not in certificate.tied)
    for names, wrong in ((new, "has parameters that its source lacks"), (sorted(had - wanted), "would lose")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise PlanError(
                f"the target {wrong}: {', '.join(names[:3])}{more}; leave the config field that changes this as the "
                "source has it"
            )
