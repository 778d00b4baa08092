"""How good a start is before any training, on calibration data that its statistics have not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_ws.distill import head
from hf_ws.distill.forward_kl import forward_kl
from hf_ws.distill.logits import logits_in_chunks
from hf_ws.distill.outcomes import FLOOR
from hf_ws.errors import CalibrationError, PlanError
from hf_ws.evidence import placed

Inputs = Mapping[str, Tensor]

_ONE_IN = 4
LOSS, KL = "loss", "KL from the source"
"""What is measured: the model's own loss; or, where the data has no labels to predict, how far its outputs are."""


def parted(batches: Sequence[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    """Calibration data to count on, and one sequence in four to score on; of batches of several shapes, one in four.

    Raises:
        CalibrationError: a single sequence, or batch.
    """
    shapes = {tuple(sorted((name, value.shape[1:]) for name, value in batch.items())) for batch in batches}
    alike = len(shapes) == 1 and all(len({len(v) if v.ndim else 0 for v in b.values()}) == 1 for b in batches)
    count = sum(len(next(iter(batch.values()))) for batch in batches) if alike else len(batches)
    if count < 2:
        raise CalibrationError(
            f"a search by calibration keeps one {'sequence' if alike else 'batch'} in four to score on, and there is "
            "one in all; give more text, or leave calibration out"
        )
    scored = torch.arange(count) % _ONE_IN == _ONE_IN - 1
    scored[-1] |= count < _ONE_IN
    if not alike:
        sides: tuple[list[Inputs], list[Inputs]] = ([], [])
        for batch, own in zip(batches, scored.tolist(), strict=True):
            sides[own].append(batch)
        return sides
    names, size = list(batches[0]), len(next(iter(batches[0].values())))
    whole = [torch.cat([batch[name] for batch in batches]) for name in names]

    def those(own: Tensor) -> list[Inputs]:
        pieces = zip(*(value[own.to(value.device)].split(size) for value in whole), strict=True)
        return [dict(zip(names, rows, strict=True)) for rows in pieces]

    return those(~scored), those(scored)


def measure_of(model_class: type[PreTrainedModel], batches: Sequence[Inputs]) -> str:
    """What can be measured with such data."""
    causal = model_class.__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    plain = causal and all("input_ids" in batch for batch in batches)
    return LOSS if plain or all("labels" in batch for batch in batches) else KL


@torch.no_grad()
def score(model: PreTrainedModel, batches: Sequence[Inputs], source: PreTrainedModel, measure: str) -> float:
    """The mean of a measure over what is predicted, in nats; the less the better.

    Args:
        model: The start; left in evaluation mode.
        batches: Keyword inputs.
        source: Run beside it where the measure is `KL`.
        measure: `LOSS` or `KL`.

    Raises:
        PlanError: a model without logits, or with logits of another shape than its source's.
    """
    model.eval()
    total, count = 0.0, 0
    apart: bool | None = None
    for batch in batches:
        inputs = placed(model, batch)
        if measure == KL:
            value, n = _divergence(model, inputs, source)
        elif "labels" in inputs:
            value, n = float(model(**inputs).loss), int((inputs["labels"] != -100).sum())
        else:
            if apart is None:
                one = {name: value[:1] for name, value in inputs.items()}
                apart = head.is_known(model, {**one, "use_cache": False})
            value, n = _next_token(model, {**inputs, "use_cache": False}, apart)
        total, count = total + value * n, count + n
    return total / count if count else math.nan


def _next_token(model: PreTrainedModel, inputs: dict[str, Any], apart: bool) -> tuple[float, int]:
    """Cross-entropy of every token but the first, where the mask has them, and how many these are."""
    labels = inputs["input_ids"].roll(-1, dims=1)
    counts = inputs.get("attention_mask", torch.ones_like(labels)).bool().roll(-1, dims=1)
    counts[:, -1] = False
    losses, at = [], 0
    for logits in logits_in_chunks(model, inputs, apart=apart):
        own = labels.flatten()[at : at + len(logits)]
        losses.append(nll_loss(logits.log_softmax(-1), own, reduction="none"))
        at += len(logits)
    kept = torch.cat(losses)[counts.flatten()]
    return (float(kept.double().mean()) if len(kept) else 0.0), len(kept)


def _divergence(model: PreTrainedModel, inputs: dict[str, Any], source: PreTrainedModel) -> tuple[float, int]:
    """KL(source || model) of their logits, over the places that the mask has, and how many these are."""
    theirs = source.eval()(**placed(source, inputs))
    q, p = (getattr(output, "logits", None) for output in (model(**inputs), theirs))
    if q is None or p is None or q.shape != p.shape:
        raise PlanError(
            f"{type(model).__name__} gives no logits to compare with its source's, so no start of it can be scored; "
            "leave calibration out of the search, or give the sizes themselves"
        )
    flat = (one.flatten(0, -2).float().log_softmax(-1).clamp(min=FLOOR) for one in (q, p))
    apart = forward_kl(*(one.to(model.device) for one in flat))
    mask = inputs.get("attention_mask")
    if mask is not None and mask.numel() == len(apart):
        apart = apart[mask.flatten().bool()]
    return (float(apart.double().mean()) if len(apart) else 0.0), len(apart)
