"""The source and the start, run side by side on the calibration data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ws.evidence import Observation, device_of, placed
from hf_ws.evidence.masks import Masks, encoder_of, masks_of
from hf_ws.layouts.norms import is_norm
from hf_ws.plan import Plan


@dataclass(frozen=True)
class Running:
    """What a compensation that runs the start is given."""

    observed: Observation
    """The source, and the data."""
    build: Callable[[Plan], PreTrainedModel]
    """Makes the start that a settled plan describes."""

    def start(self, plan: Plan) -> PreTrainedModel:
        """The start in at least single precision, where the source is, in evaluation mode."""
        values = dict(plan.target_config)
        if str(values.get("dtype")).removeprefix("torch.") in ("bfloat16", "float16"):
            values["dtype"] = "float32"
        made = self.build(replace(plan, target_config=values, compensation=()))
        return made.to(device_of(self.observed.model))

    def batch(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The first batch, where the model is."""
        return placed(model, self.observed.batches[0])

    def inputs(self, model: PreTrainedModel, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """For each batch, what these modules are given first: float64 [tokens, width] by name, padding left out.

        A pass ends when all have been seen.
        """
        for batch in self.observed.batches:
            moved = placed(model, batch)
            yield _rows(model, seen(model, moved, names), masks_of(model, moved))


class _SeenError(Exception):
    """All that was asked for has been seen."""


def seen(
    model: PreTrainedModel, batch: Mapping[str, Tensor], names: Collection[str], copied: bool = True
) -> dict[str, Tensor]:
    """The first input of each of these modules in one pass over a batch; those that did not run are left out."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if given is not None:
                found.setdefault(name, given.detach().clone() if copied else given.detach())
            if len(found) == len(names):
                raise _SeenError

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names
    ]
    was = model.training
    try:
        with torch.no_grad(), contextlib.suppress(_SeenError):
            model.eval()(**batch)
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    return found


def called(model: PreTrainedModel, names: Collection[str], batch: Mapping[str, Tensor]) -> list[str]:
    """These modules in the order in which they run, as often as they do."""
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.append(name)

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def read_by(model: PreTrainedModel, reader: str, batch: Mapping[str, Tensor]) -> str | None:
    """The name of the norm, with a gain, whose output is what a module reads; None if it reads something else."""
    written: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, output: written.__setitem__(name, output)

    norms = {
        name: module
        for name, module in model.named_modules()
        if is_norm(module) and getattr(module, "weight", None) is not None
    }
    hooks = [module.register_forward_hook(keep(name)) for name, module in norms.items()]
    given = seen(model, batch, {reader}, copied=False).get(reader)
    for hook in hooks:
        hook.remove()
    own = [
        name
        for name, output in written.items()
        if given is not None and (output.data_ptr(), output.shape) == (given.data_ptr(), given.shape)
    ]
    return own[-1] if own else None


def plainly_gives(model: PreTrainedModel, head: str, batch: Mapping[str, Tensor]) -> bool:
    """Whether the model's logits are what its head gives, neither scaled nor capped."""
    given: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_hook(lambda _, __, output: given.append(output))
    was = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(**batch).logits
    finally:
        model.train(was)
        hook.remove()
    return bool(given) and given[-1].shape == logits.shape and torch.equal(given[-1].float(), logits.float())


def _rows(model: PreTrainedModel, found: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    encoder, rows = encoder_of(model), {}
    of_encoder = {name for name, module in model.named_modules() if module is encoder}
    for name, values in found.items():
        flat = values.reshape(-1, values.shape[-1])
        kept = masks.among(values.shape[:-1], any(name.startswith(f"{prefix}.") for prefix in of_encoder))
        rows[name] = (flat if kept is None else flat[kept]).double().cpu()
    return rows
