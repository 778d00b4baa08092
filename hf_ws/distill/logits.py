"""A model's logits, some tokens at a time, where it is only asked and not trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.distill.head import beheaded, head_of


@torch.no_grad()
def logits_in_chunks(
    model: PreTrainedModel, inputs: dict[str, Any], *, apart: bool, chunk: int = 512
) -> Iterator[Tensor]:
    """Logits in float32, [at most `chunk` tokens, vocab] at a time, those of one sequence after those of another.

    Args:
        model: In eval mode.
        inputs: What it takes, on its device.
        apart: Whether its head can be taken apart, as `head.is_known` tells; else logits are whole in its own dtype.
        chunk: Tokens in float32 at one time.
    """
    if not apart:
        for rows in model(**inputs).logits.flatten(0, -2).split(chunk):
            yield rows.float()
        return
    read: list[Tensor] = []
    with beheaded(model, read.append):
        model(**inputs)
    made = head_of(model)
    assert made is not None
    for rows in read[0].flatten(0, -2).split(chunk):
        yield made.logits(made.product(rows)).float()
