"""One pass over calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ws.errors import CalibrationError, unknown
from hf_ws.evidence import sites
from hf_ws.evidence.cache import Cache
from hf_ws.evidence.collect import Collector
from hf_ws.evidence.data import calibration_inputs
from hf_ws.evidence.fingerprint import fingerprint
from hf_ws.evidence.finish import finish
from hf_ws.evidence.loss import placed, summed_loss, with_labels
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
    wants: Sequence[str] = ("moments", "similarity"),
    cache: str | Path | None = None,
) -> Evidence:
    """Run `model` over `data` and average what it does.

    Under `accelerate launch` every process calls it with the same data, runs its share, and gets the same averages.

    Args:
        model: Run as it is, in evaluation mode; left as it was, gradients included.
        data: Token ids [sequences, tokens]; or a list of texts, or a `datasets` dataset with a `text` or an
            `input_ids` column; or any iterable of the model's keyword inputs. Padding is left out where an
            `attention_mask` says so; of a decoder with an encoder, its `decoder_attention_mask`, or labels of -100.
        tokenizer: Needed for texts.
        certificate: The model's layouts, if they are at hand.
        wants: Which of `STATISTICS`; `mean_abs` is always there. `similarity` is what the default layer policy looks
            at, `moments` what rotation and the compensations do; these cost memory and time in the square of each
            width. `taylor` runs backwards too and holds the activations of a whole batch; it takes the loss of the
            labels in the data, of a causal language model without any that of the next token.
        cache: A file that the sums are written to every now and then, and read from: a calibration that was killed
            goes on where it was, and one that is done is not run again.

    Raises:
        CalibrationError: there is no data, texts came without a tokenizer, an unknown statistic is wanted,
            `taylor` of a model that gives no loss, numbers that are not finite, or the cache is of another model, data,
            code or `wants`.
        OutputError: the cache cannot be written.
    """
    wants = _checked(wants)
    certificate = certificate or certify(type(model), model.config)
    # All batches in every process: one that stopped alone would leave the others waiting.
    batches = calibration_inputs(model.config, data, tokenizer, certificate)
    of = fingerprint(model, batches, wants)
    kept = None if cache is None else Cache(cache, of)
    sums, done, complete = (Sums(), 0, False) if kept is None else kept.load()
    if not complete:
        _collect(model, batches, Collector(model, certificate, wants, sums), done, kept)
        sums.gather(share()[1])
        if kept is not None:
            kept.finish(sums)
    return finish(sums, sites.every(model, certificate), sizes_of(model.config), wants, of)


def _checked(wants: Sequence[str]) -> tuple[str, ...]:
    """Every statistic that is wanted, in the order of `STATISTICS`."""
    wants = (wants,) if isinstance(wants, str) else wants
    for name in wants:
        if name not in STATISTICS:
            raise CalibrationError(str(unknown("statistic", name, STATISTICS)))
    return tuple(name for name in STATISTICS if name in ("mean_abs", *wants))


def _collect(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    collector: Collector,
    done: int,
    cache: Cache | None,
) -> None:
    """Run this process's share of the batches, less those that are done; the model is left as it was."""
    training = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    if "taylor" in collector.wants:  # of activations: no weight's gradient is computed
        model.requires_grad_(False)  # only then: on a CPU torch runs frozen bfloat16 weights more slowly
    rank, processes = share()
    own = batches[rank::processes]
    bar = tqdm(own, desc="calibrating", unit="batch", delay=2, disable=rank > 0)
    try:
        with torch.set_grad_enabled("taylor" in collector.wants), collector:
            for number, inputs in enumerate(bar, 1):
                if number > done:
                    _run(model, inputs, collector)
                    if cache is not None:
                        cache.keep(collector.sums, number)
    finally:
        for module, was in training.items():
            module.training = was
        for parameter, did in trained.items():
            parameter.requires_grad_(did)


def _run(model: PreTrainedModel, inputs: Mapping[str, Tensor], collector: Collector) -> None:
    """One batch, forwards and, for Taylor terms, backwards."""
    moved = placed(model, inputs)
    collector.begin_batch(moved)
    taylor = "taylor" in collector.wants
    if taylor:
        moved = with_labels(model, moved)
    # Without labels no logits are looked at: of one token they cost nothing, of all they are larger than all else.
    spare = "labels" not in moved and "logits_to_keep" in signature(model.forward).parameters
    collector.only_last = spare and "moments" in collector.wants and collector.sees_head
    output = model(**moved, **({"logits_to_keep": 1} if spare and not collector.only_last else {}))
    if taylor:
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
