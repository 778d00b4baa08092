"""The loss on calibration data, whole or with some layers left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_ws.errors import CalibrationError
from hf_ws.evidence import sites
from hf_ws.evidence.sums import Sums, share
from hf_ws.layouts import Certificate


@torch.no_grad()
def loss_without(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    certificate: Certificate,
    layers: Collection[int | str] = (),
) -> float:
    """The mean loss over what is predicted, in nats, with these layers passing on what they get.

    Under `accelerate launch` every process calls it, runs its share of the batches, and gets the same number.

    Args:
        model: Run in evaluation mode; left as it was.
        batches: Keyword inputs; labels among them, or of a causal language model token ids alone.
        certificate: The model's layouts.
        layers: Source layers, as `layer_key` calls them.

    Raises:
        CalibrationError: the model gives no loss on this data.
    """
    modules = dict(model.named_modules())
    skipped = [name for name, (site, _) in sites.blocks(model, certificate).items() if site.layer in layers]
    hooks = [modules[name].register_forward_hook(_passed_on, with_kwargs=True) for name in skipped]
    training = {module: module.training for module in model.modules()}
    rank, processes = share()
    sums = Sums()
    model.eval()
    try:
        for inputs in batches[rank::processes]:
            moved = with_labels(model, placed(model, inputs))
            loss, count = summed_loss(model, model(**moved), moved["labels"])
            sums.add("loss", float(loss))
            sums.add("count", float(count))
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was
    sums.gather(processes)
    return sums.number("loss") / max(sums.number("count"), 1.0)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model is given its inputs; one that is offloaded moves them itself, from the CPU."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def placed(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the model's device; pictures and sounds in its precision."""
    device = device_of(model)
    return {
        name: value.to(device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _passed_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A layer's input in place of its output."""
    before = args[0] if args else kwargs.get("hidden_states")
    several = isinstance(output, tuple | list)
    after = output[0] if several else output
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
        raise CalibrationError(
            "a layer whose output has another shape than its input cannot be skipped; name another layer_policy"
        )
    return type(output)((before, *output[1:])) if several else before


def with_labels(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs that give a loss: their own labels, or of a causal language model the tokens, padding left out.

    Raises:
        CalibrationError: there are no labels, and what they are does not follow from the inputs.
    """
    if "labels" in inputs:
        return dict(inputs)
    if not _is_causal(model) or "input_ids" not in inputs:
        raise CalibrationError(
            f"{type(model).__name__} gives no loss without labels; give the calibration data as the model's inputs, "
            "labels among them"
        )
    labels = inputs["input_ids"]
    if (mask := inputs.get("attention_mask")) is not None:
        labels = labels.masked_fill(mask == 0, -100)
    return {**inputs, "labels": labels}


def summed_loss(model: PreTrainedModel, output: Any, labels: Tensor) -> tuple[Tensor, int]:
    """A batch's loss, summed over what is predicted, and how much that is.

    Raises:
        CalibrationError: the model's output has no loss.
    """
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise CalibrationError(f"{type(model).__name__} gives no loss, labels or not; choose what needs none")
    predicted = labels[..., 1:] if _is_causal(model) else labels  # nothing predicts the first token
    count = int((predicted != -100).sum())
    return loss.to(torch.promote_types(loss.dtype, torch.float32)) * max(count, 1), count


def _is_causal(model: PreTrainedModel) -> bool:
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
