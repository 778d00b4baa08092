"""A model's head taken apart from its body, so that its logits never need be whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_ws.distill.tokens import Head


def head_of(model: PreTrainedModel) -> Head | None:
    """The matrix that gives the model's logits, and what its config says comes after; None if it has no such matrix."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    weight = (
        module.weight.full_tensor() if isinstance(module.weight, DTensor) else module.weight
    )  # a shard's whole
    return Head(weight, module.bias, float(scale), cap)


@contextmanager
def beheaded(model: PreTrainedModel, reads: Callable[[Tensor], None]) -> Iterator[None]:
    """Give to `reads` what the head would read, and make no logits: the model's are of one token, and mean nothing."""
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        reads(hidden)
        return hidden[..., :1].clone()

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def is_known(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether the model's logits are what `head_of` makes of what the head reads, as these inputs show.

    A class may do more to its logits than its config tells, or read the head twice.
    """
    head, read = head_of(model), list[Tensor]()
    if head is None:
        return False
    was_training = model.training
    model.eval()
    try:
        logits = model(**inputs).logits
        with beheaded(model, read.append):
            model(**inputs)
    finally:
        model.train(was_training)
    if len(read) != 1 or read[0].shape[:-1] != logits.shape[:-1]:
        return False
    made = head.logits(head.product(read[0])).to(logits.dtype)
    return bool((made - logits).abs().max() <= 1e-3 * logits.abs().max())
