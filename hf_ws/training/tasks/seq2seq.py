"""Encoder-decoders: text with spans cut out, or pairs of texts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hf_ws.errors import DataError, PlanError
from hf_ws.training.records import rows_of
from hf_ws.training.tasks.base import Rows, Task

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Seq2Seq(Task):
    """Encoder-decoders, on pairs where `source_column` and `target_column` are set, else on packed text.

    Of packed text `mask_probability` of the tokens are cut out in spans of `mean_span` tokens. With a tokenizer that
    has sentinels (`<extra_id_0>`) each span leaves one, and what is predicted is each sentinel and what it stands for:
    T5, Raffel et al. 2019 (arXiv 1910.10683), section 3.1.4. With a mask token each span leaves one of those, and the
    whole text is predicted: BART, Lewis et al. 2019 (arXiv 1910.13461), text infilling.
    """

    auto_class = "AutoModelForSeq2SeqLM"

    @property
    def _pairs(self) -> bool:
        return self.config.source_column is not None

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.processor is None:
            raise DataError(
                "text came without a tokenizer; take a model folder that holds one, or give tokenizer="
            )
        return cast("PreTrainedTokenizerBase", self.processor)

    def read(self) -> Rows:
        """Blocks, or tokenised pairs."""
        if not self._pairs:
            return super().read()
        config = self.config
        columns = config.source_column, config.target_column
        if None in columns:
            raise PlanError(f"source_column={columns[0]!r}, target_column={columns[1]!r}; pairs want both")
        train, held_out = rows_of(config, [name for name in columns if name])
        return Rows(self._tokenised(train), self._tokenised(held_out))

    def usable(self, rows: datasets.Dataset) -> datasets.Dataset:
        """All of them: they are padded to one length."""
        return rows

    def length(self, rows: datasets.Dataset) -> int:
        """A pair counts as a whole block."""
        return self.config.block if self._pairs else super().length(rows)

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `decoder_input_ids` and `labels`, padded at the end."""
        made = rows if "target" in rows[0] else [self._corrupted(row) for row in rows]
        padding = self.model_config.pad_token_id or 0
        sources, targets = [row["input_ids"] for row in made], [row["target"] for row in made]
        labels = padded(targets, -100)
        return {
            "input_ids": padded(sources, padding),
            "attention_mask": padded([torch.ones_like(ids) for ids in sources], 0),
            "decoder_input_ids": begun(labels, self.model_config, padding),
            "labels": labels,
        }

    def _tokenised(self, rows: datasets.Dataset) -> datasets.Dataset:
        config, tokenizer = self.config, self._tokenizer
        pairs = _with_text(rows, [str(config.source_column), str(config.target_column)])

        def ids(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
            source, target = (batch[str(name)] for name in (config.source_column, config.target_column))
            options = {"truncation": True, "max_length": config.block}
            return {
                "input_ids": tokenizer(source, **options)["input_ids"],
                "target": tokenizer(text_target=target, **options)["input_ids"],
            }

        made = pairs.map(ids, batched=True, remove_columns=pairs.column_names, keep_in_memory=True)
        made = made.filter(
            lambda row: len(row["input_ids"]) > 0 and len(row["target"]) > 0, keep_in_memory=True
        )
        if not len(made):
            raise DataError(f"{len(rows)} pairs came and none has text on both sides; give some to train on")
        if len(made) < len(rows):
            logger.warning(
                "%d of %d pairs lack text on a side; they are left out", len(rows) - len(made), len(rows)
            )
        return made.with_format("torch")

    def _corrupted(self, row: dict[str, Any]) -> dict[str, Tensor]:
        ids = row["input_ids"]
        sentinels, mask = self._marks()
        spans = _spans(len(ids), self.config.mask_probability, self.config.mean_span, self.drawn(row))
        source, target, at = [], [], 0
        for number, (start, end) in enumerate(spans):
            mark = ids.new_tensor([sentinels[number] if sentinels else mask])
            source += [ids[at:start], mark]
            target += [mark, ids[start:end]]
            at = end
        end_token = ids.new_tensor([self._tokenizer.eos_token_id])
        source += [ids[at:], end_token]
        return {
            "input_ids": torch.cat(source),
            "target": torch.cat([*target, end_token] if sentinels else [ids, end_token]),
        }

    def _marks(self) -> tuple[list[int], int | None]:
        """The ids of sentinels, and of a mask token."""
        tokenizer = self._tokenizer
        names = [f"<extra_id_{i}>" for i in range(1000)]
        known = tokenizer.get_vocab()
        sentinels = [known[name] for name in names if known.get(name, self.ids) < self.ids]
        wanted = _count(self.config.block, self.config.mask_probability, self.config.mean_span)[1]
        if not sentinels and tokenizer.mask_token_id is None:
            raise DataError(
                "the tokenizer has neither sentinels (<extra_id_0>, ...) nor a mask token to put in place of spans; "
                "train on pairs with source_column and target_column, or take another tokenizer"
            )
        if sentinels and len(sentinels) < wanted:
            raise DataError(
                f"a block of {self.config.block} tokens loses {wanted} spans and the tokenizer has {len(sentinels)} "
                "sentinels; set a shorter block, a smaller mask_probability or a longer mean_span"
            )
        return sentinels, tokenizer.mask_token_id


def _with_text(rows: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """The rows with text in all of these columns: a tokenizer makes tokens of an empty text too. Raises DataError."""
    kept = []
    for number, row in enumerate(rows.select_columns(columns)):
        for name in columns:
            if not isinstance(row[name], str | None):
                raise DataError(
                    f"row {number}: column {name!r} holds {type(row[name]).__name__}, not text; name another"
                )
        if all((row[name] or "").strip() for name in columns):
            kept.append(number)
    return rows.select(kept)


def _count(length: int, share: float, mean: float) -> tuple[int, int]:
    """How many tokens are cut out of so many, and in how many spans."""
    tokens = min(max(round(length * share), 1), length - 1)
    return tokens, min(max(round(tokens / mean), 1), tokens, length - tokens)


def _spans(length: int, share: float, mean: float, draw: torch.Generator) -> list[tuple[int, int]]:
    """Where spans start and end: always as many tokens in as many spans, so that all batches are of one size."""
    tokens, count = _count(length, share, mean)
    inside, between = (_parts(total, count, draw) for total in (tokens, length - tokens))
    spans, at = [], 0
    for kept, cut in zip(between, inside, strict=True):
        spans.append((at + kept, at + kept + cut))
        at += kept + cut
    return spans


def _parts(total: int, count: int, draw: torch.Generator) -> list[int]:
    """`total` in `count` parts of at least one, every way as likely."""
    cuts = (torch.randperm(total - 1, generator=draw)[: count - 1] + 1).sort().values.tolist()
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def begun(labels: Tensor, config: PreTrainedConfig, padding: int) -> Tensor:
    """What a decoder reads to predict `labels` [rows, tokens]: the start token, then the labels one later."""
    configs = (config, config.get_text_config(decoder=True))
    named = [getattr(c, name, None) for name in ("decoder_start_token_id", "bos_token_id") for c in configs]
    start = next((token for token in named if token is not None), padding)
    shifted = labels.roll(1, dims=-1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == -100, padding)


def padded(rows: list[Tensor], value: int) -> Tensor:
    """Rows of ids as one table, filled up at the end."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
