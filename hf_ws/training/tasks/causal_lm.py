"""Causal language modelling: every token of a block is predicted from those before it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hf_ws.training.tasks.base import Task

_VISIBLE = 1e-5  # of the largest logit: what a change elsewhere may move one by


class CausalLM(Task):
    """Decoders on packed text."""

    auto_class = "AutoModelForCausalLM"
    shifts = True

    @property
    def documents_apart(self) -> bool:
        """Whether blocks say where their documents begin."""
        return self.config.documents_apart


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether positions that begin anew keep the model's tokens from attending to what is before, seen by trying."""
    was_training = model.training
    model.eval()
    device = model.device
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (2, 10), generator=torch.Generator().manual_seed(0)
    )
    ids[1, 5:] = ids[0, 5:]
    positions = torch.arange(5).repeat(2, 2)
    try:
        logits = model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False).logits[
            :, 5:
        ]
    except (TypeError, ValueError, RuntimeError, IndexError):  # a class without positions, or with other ones
        return False
    finally:
        model.train(was_training)
    return bool((logits[0] - logits[1]).abs().max() <= _VISIBLE * logits.abs().max())
