"""One pass over calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ws.errors import CalibrationError, unknown
from hf_ws.evidence import sites
from hf_ws.evidence.collect import Collector
from hf_ws.evidence.data import calibration_inputs
from hf_ws.evidence.finish import finish
from hf_ws.evidence.loss import summed_loss, with_labels
from hf_ws.evidence.record import STATISTICS, Evidence
from hf_ws.evidence.sums import Sums, share
from hf_ws.layouts import Certificate, certify
from hf_ws.sizes import sizes_of


def calibrate(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    certificate: Certificate | None = None,
    wants: tuple[str, ...] = ("mean_abs",),
) -> Evidence:
    """Run `model` over `data` and average what it does.

    Under `accelerate launch` every process calls it with the same data, runs its share, and gets the same averages.

    Args:
        model: Run as it is, in evaluation mode; left as it was, gradients included.
        data: Token ids [sequences, tokens]; or a list of texts, or a `datasets` dataset with a `text` or an
            `input_ids` column; or any iterable of the model's keyword inputs. Padding is left out where an
            `attention_mask` says so.
        tokenizer: Needed for texts.
        certificate: The model's layouts, if they are at hand.
        wants: Which of `STATISTICS`; `mean_abs` is always there. `moments` cost memory and time in the square of
            each width. `taylor` runs backwards too and holds the activations of a whole batch; it takes the loss of
            the labels in the data, of a causal language model without any that of the next token.

    Raises:
        CalibrationError: there is no data, texts came without a tokenizer, an unknown statistic is wanted, or
            `taylor` of a model that gives no loss.
    """
    wants = _checked(wants)
    certificate = certificate or certify(type(model), model.config)
    rank, processes = share()
    sums = Sums()
    collector = Collector(model, certificate, wants, sums)
    training = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)  # Taylor terms are of activations: no weight's gradient is computed
    try:
        with torch.set_grad_enabled("taylor" in wants), collector:
            # All batches in every process: one that stopped alone would leave the others waiting.
            batches = calibration_inputs(model.config, data, tokenizer, certificate)
            own = batches[rank::processes]
            for inputs in tqdm(own, desc="calibrating", unit="batch", delay=2, disable=rank > 0):
                _run(model, inputs, collector, wants, certificate)
    finally:
        for module, was in training.items():
            module.training = was
        for parameter, did in trained.items():
            parameter.requires_grad_(did)
    sums.gather(processes)
    readers = [site for own in sites.readers(model, certificate).values() for site in own]
    blocks = [site for site, _ in sites.blocks(model, certificate).values()]
    return finish(sums, [*readers, *blocks], sizes_of(model.config), wants)


def _checked(wants: tuple[str, ...]) -> tuple[str, ...]:
    """Every statistic that is wanted, in the order of `STATISTICS`."""
    for name in (wants,) if isinstance(wants, str) else wants:
        if name not in STATISTICS:
            raise CalibrationError(str(unknown("statistic", name, STATISTICS)))
    return tuple(name for name in STATISTICS if name in ("mean_abs", *wants))


def _run(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    collector: Collector,
    wants: tuple[str, ...],
    certificate: Certificate,
) -> None:
    """One batch, forwards and, for Taylor terms, backwards."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    collector.mask = moved.get("attention_mask")
    if "taylor" in wants:
        moved = with_labels(model, moved)
    # Without labels no logits are looked at: of one token they cost nothing, of all they are larger than all else.
    spare = "labels" not in moved and "logits_to_keep" in signature(model.forward).parameters
    collector.only_last = spare and "moments" in wants and certificate.head is not None
    output = model(**moved, **({"logits_to_keep": 1} if spare and not collector.only_last else {}))
    if "taylor" in wants:
        _backward(model, output, moved["labels"], collector.leaves)
    collector.end_batch()


def _backward(model: PreTrainedModel, output: Any, labels: Tensor, leaves: list[Tensor]) -> None:
    """Gradients of the loss summed over tokens, into the watched activations and nothing else."""
    loss, _ = summed_loss(model, output, labels)
    if not loss.requires_grad:
        raise CalibrationError(
            f"{type(model).__name__} gives a loss that depends on none of its neurons and heads"
        )
    torch.autograd.backward(loss, inputs=leaves)
    for leaf in leaves:
        leaf.grad = None
