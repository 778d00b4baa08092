"""Masked language modelling: some tokens are hidden, and predicted from those around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hf_ws.errors import DataError
from hf_ws.training.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MaskedLM(Task):
    """Encoders on packed text.

    `mask_probability` of a block's tokens are predicted; of these 80 % are replaced by the mask token, 10 % by any
    token, 10 % stay. Special tokens are left alone.

    Source: BERT, Devlin et al. 2018 (arXiv 1810.04805), section 3.1; masks drawn anew at every pass as in RoBERTa
    (arXiv 1907.11692), section 4.1.
    """

    auto_class = "AutoModelForMaskedLM"

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Masked `input_ids` and `labels`, both [rows, block]."""
        tokenizer = cast("PreTrainedTokenizerBase | None", self.processor)
        if tokenizer is None or tokenizer.mask_token_id is None:
            raise DataError("masked language modelling wants a tokenizer with a mask token; give tokenizer=")
        made = [self._masked(row, tokenizer) for row in rows]
        return {name: torch.stack([row[name] for row in made]) for name in ("input_ids", "labels")}

    def _masked(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        ids, draw = row["input_ids"].clone(), self.drawn(row)
        usable = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        # A fixed share and not a coin for each token: every block has something to predict, and the same amount.
        count = max(1, round(self.config.mask_probability * int(usable.sum())))
        order = torch.rand(len(ids), generator=draw).masked_fill_(~usable, 2.0).argsort()
        chosen = order[: min(count, int(usable.sum()))]
        labels = torch.full_like(ids, -100)
        labels[chosen] = ids[chosen]
        fate = torch.rand(len(chosen), generator=draw)
        ids[chosen[fate < 0.8]] = tokenizer.mask_token_id
        other = chosen[fate >= 0.9]
        ids[other] = torch.randint(min(len(tokenizer), self.ids), (len(other),), generator=draw)
        return {"input_ids": ids, "labels": labels}
