"""Speech to text, by models that listen and write: Whisper and its kin."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_ws.errors import DataError, DistillationError
from hf_ws.training.corpora import DIALTONES, dialtones
from hf_ws.training.records import rows_of, split_rows
from hf_ws.training.sound import clip_of
from hf_ws.training.tasks.base import Rows, Task
from hf_ws.training.tasks.seq2seq import begun, padded
from hf_ws.training.vocabularies import common_ids
from hf_ws.training.word_errors import word_error_rate

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig

    from hf_ws.training.config import TrainConfig

logger = logging.getLogger(__name__)

_LISTENED_TO = 20_000  # clips that are read before a run; all those of a large set would take hours


class Speech(Task):
    """Sound and its text, as columns `audio_column` and `text_column`, or `dialtones`.

    The model's own feature extractor makes what the encoder takes, and its tokenizer the labels. Text that is longer
    than the decoder is left out, with the count logged; so is a clip longer than the encoder, which would lose its end.

    Source: Whisper, Radford et al. 2022 (arXiv 2212.04356), section 2.
    """

    auto_class = "AutoModelForSpeechSeq2Seq"
    unit = "samples"

    def __init__(self, config: TrainConfig, model_config: PreTrainedConfig, processor: Any = None) -> None:
        super().__init__(config, model_config, processor)
        if processor is None or not all(
            hasattr(processor, part) for part in ("feature_extractor", "tokenizer")
        ):
            raise DataError(
                "the model's folder has no processor of sound and text; save its processor there, or give tokenizer="
            )
        self.extractor, self.words = processor.feature_extractor, processor.tokenizer
        self.rate = int(self.extractor.sampling_rate)
        self.longest = getattr(self.extractor, "n_samples", None)
        frames, positions = (
            getattr(self.extractor, "nb_max_frames", None),
            getattr(model_config, "max_source_positions", None),
        )
        if frames and positions and frames != 2 * positions:
            raise DataError(
                f"the feature extractor makes {frames} frames and the model takes {2 * positions}; "
                "they must be one model's"
            )
        if config.language:
            self._speak(config.language)
        self.near: Path | None = None
        if config.train_files:
            place = Path(config.train_files[0]).expanduser()
            self.near = place if place.is_dir() else place.parent

    @classmethod
    def load_processor(cls, source: str) -> Any:
        """The feature extractor and tokenizer beside a model; None if they are not there."""
        from transformers import AutoProcessor

        try:
            return AutoProcessor.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError):
            return None

    def read(self) -> Rows:
        """Clips and their text."""
        config = self.config
        if config.train_files == [DIALTONES]:
            if (config.audio_column, config.text_column) != ("audio", "text"):
                raise DataError(
                    "dialtones has the columns audio and text; leave audio_column and text_column"
                )
            return Rows(*split_rows(dialtones(self.rate)))
        return Rows(*rows_of(config, [config.audio_column, config.text_column]))

    def length(self, rows: datasets.Dataset) -> int:
        """A clip."""
        return 1

    def taught_by(self, teacher: PreTrainedConfig, processor: Any = None) -> None:
        """Refuse a teacher that hears or writes otherwise."""
        words = getattr(processor, "tokenizer", None)
        self.vocabulary = common_ids(self.model_config, teacher, self.words, words)
        for name in ("num_mel_bins", "max_source_positions"):
            ours, theirs = getattr(self.model_config, name, None), getattr(teacher, name, None)
            if ours != theirs:
                raise DistillationError(
                    f"the teacher has {name} {theirs}, the student {ours}: one cannot listen to what the other does; "
                    "take a teacher that agrees, or none"
                )

    def ready(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows that the model can take, with their two columns alone."""
        audio, text = self.config.audio_column, self.config.text_column
        lacking = [name for name in (audio, text) if name not in rows.column_names]
        if lacking:
            raise DataError(f"the data has no column {lacking[0]!r}, only {', '.join(rows.column_names)}")
        texts = [row[text] for row in rows.select_columns([text])]
        wrong = next((i for i, one in enumerate(texts) if not isinstance(one, str | None)), None)
        if wrong is not None:
            raise DataError(f"row {wrong}: column {text!r} holds {type(texts[wrong]).__name__}, not text")
        targets = [self._ids(one or "") for one in texts]
        self._check_ids(targets)
        most = getattr(self.model_config, "max_target_positions", None) or max(map(len, targets))
        silent = {i for i, one in enumerate(texts) if not (one or "").strip()}
        long = {i for i, ids in enumerate(targets) if len(ids) > most} | self._too_long(rows)
        kept = [i for i in range(len(rows)) if i not in silent | long]
        if len(kept) < len(rows):
            logger.warning(
                "of %d clips %d have no text, and %d are longer than the model; they are left out",
                len(rows), len(silent), len(long - silent),
            )  # fmt: skip
        if not kept:
            raise DataError(
                f"{len(rows)} clips came and none has text and a length that suits the model; give some"
            )
        return rows.select_columns([audio, text]).select(kept)

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """What the encoder takes, `decoder_input_ids` and `labels` [rows, tokens]."""
        sounds = [self._clip(row, f"the row at place {row.get('place', '?')}") for row in rows]
        # Whisper's always makes as many frames; others pad to the longest.
        options = {} if self.longest else {"padding": True, "return_attention_mask": True}
        features = self.extractor(sounds, sampling_rate=self.rate, return_tensors="pt", **options)
        labels = padded([torch.tensor(self._ids(row[self.config.text_column])) for row in rows], -100)
        return dict(features) | {
            "decoder_input_ids": begun(labels, self.model_config, self.model_config.pad_token_id or 0),
            "labels": labels,
        }

    @property
    def measures(self) -> bool:
        """Where wrong words are counted."""
        return self.config.word_errors

    @property
    def writes(self) -> bool:
        """As above: the likeliest token after the right ones says little of what comes of a clip."""
        return self.config.word_errors

    def metrics(self, chosen: Any, labels: Any) -> dict[str, float]:
        """Words that are wrong, for each that was said."""
        texts = (
            [self.words.decode(row[row >= 0], skip_special_tokens=True) for row in table]
            for table in (chosen, labels)
        )
        return {"word_error_rate": word_error_rate(zip(*texts, strict=True))}

    @torch.no_grad()
    def written(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The likeliest token after token, from the tokens that begin every text, to its end or the longest label."""
        labels = inputs["labels"]
        config, end = self.model_config, self.words.eos_token_id
        begin = begun(labels[:, :1], config, config.pad_token_id or 0)
        prefix = [token for token in getattr(self.words, "prefix_tokens", []) if token != begin[0, 0]]
        tokens = torch.cat([begin, labels.new_tensor(prefix).expand(len(labels), -1)], dim=1)
        heard = {name: value for name, value in inputs.items() if name not in ("labels", "decoder_input_ids")}
        heard["encoder_outputs"] = model.get_encoder()(**heard)
        done = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        found = [labels.new_tensor(prefix).expand(len(labels), -1)]
        for _ in range(labels.shape[1] - len(prefix)):
            logits = model(**heard, decoder_input_ids=tokens, use_cache=False).logits[:, -1]
            chosen = logits.argmax(-1)
            found.append(chosen.masked_fill(done, -100)[:, None])
            done |= chosen == end
            if done.all():
                break
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        return torch.cat(found, dim=1)

    def _ids(self, text: str) -> list[int]:
        """What is predicted: the start token is what the decoder reads first, and no part of it."""
        ids = self.words(text).input_ids
        start = getattr(self.model_config, "decoder_start_token_id", None)
        return ids[1:] if ids and ids[0] == start else ids

    def _check_ids(self, targets: list[list[int]]) -> None:
        for i, ids in enumerate(targets):
            if max(ids, default=0) >= self.ids:
                raise DataError(
                    f"row {i} holds token id {max(ids)}, but the model's vocabulary has {self.ids}; "
                    "take the model's own processor"
                )

    def _clip(self, row: dict[str, Any], where: str) -> np.ndarray:
        samples, rate = clip_of(row[self.config.audio_column], where, self.near)
        if rate not in (None, self.rate):
            raise DataError(
                f"{where}: the sound has {rate} samples a second and the model takes {self.rate}; resample it "
                f"(ffmpeg -i in.wav -ar {self.rate} out.wav)"
            )
        return samples

    def _too_long(self, rows: datasets.Dataset) -> set[int]:
        """The clips, of the first many, that the encoder cannot take whole. Raises DataError for what is no sound."""
        first = range(min(len(rows), _LISTENED_TO))
        bar = tqdm(
            first, desc="listening", unit=" clips", delay=2, leave=False, disable=not self.config.progress
        )
        lengths = ((i, len(self._clip(rows[i], f"row {i}"))) for i in bar)
        return {i for i, length in lengths if self.longest and length > self.longest}

    def _speak(self, language: str) -> None:
        """Have the tokenizer mark this language. Raises DataError."""
        if not hasattr(self.words, "set_prefix_tokens"):
            raise DataError(f"language={language!r}, but this tokenizer marks no language; leave it out")
        try:
            self.words.set_prefix_tokens(language=language, task="transcribe")
            self._ids("")
        except ValueError as error:
            raise DataError(f"language={language!r}: {error}") from error
