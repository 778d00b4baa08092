"""Which tokens of a batch are padding: an encoder's are not a decoder's.

Not told apart is what a class lays out by a rule of its own: LED pads to whole windows, ProphetNet's decoder runs
several streams, experts that are modules of their own (Switch, NLLB-MoE) see tokens in their order; padding counts
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Masks(NamedTuple):
    """Which tokens of a batch count, [sequences, tokens]; None where it is not known. Of a model that is not both, the
    encoder's and the decoder's are the same."""

    encoder: Tensor | None
    decoder: Tensor | None

    def among(self, places: Sequence[int], are_encoders: bool) -> Tensor | None:
        """Which of the tokens seen count, flat; None where there is no mask of so many: then all do.

        Args:
            places: The shape of what is seen but for its width, mostly [sequences, tokens]. Some classes run
                [tokens, sequences] (XLNet, FSMT, Longformer's attention); with as many of the one as of the other, that
                is not seen.
            are_encoders: Whose they are; a decoder may see the encoder's too, and else has its own.
        """
        masks = (self.encoder,) if are_encoders else (self.decoder, self.encoder)
        found = next((mask for mask in masks if mask is not None and mask.numel() == math.prod(places)), None)
        if found is None:
            return None
        crosswise = tuple(places) == tuple(found.shape[::-1]) != tuple(found.shape)
        return (found.mT if crosswise else found).reshape(-1).bool()


def masks_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Masks:
    """The masks of a batch. A decoder that is given none has its padding where the labels have none to predict."""
    mask = batch.get("attention_mask")
    if encoder_of(model) is None:
        return Masks(mask, mask)
    if mask is None and (ids := batch.get("input_ids")) is not None:
        mask = torch.ones_like(ids)
    own = batch.get("decoder_attention_mask")
    if own is None and (labels := batch.get("labels")) is not None:
        own = labels != -100
    if own is None and (ids := batch.get("decoder_input_ids")) is not None:
        own = torch.ones_like(ids)
    return Masks(mask, own)


def encoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The encoder of a model that has a decoder too."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else None
