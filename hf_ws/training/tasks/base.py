"""What every task has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_ws.errors import DataError, HfWsError
from hf_ws.training.data import (
    Document,
    Packed,
    check_ids,
    load_text,
    pack,
    split_held_out,
    text_files,
    warn_of_repeats,
)
from hf_ws.training.records import usable
from hf_ws.training.stream import Source, Stream
from hf_ws.training.texts import is_local
from hf_ws.training.vocabularies import common_ids

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig

    from hf_ws.training.config import TrainConfig

_NO_TEXT = "no text to train on; set train_files (files, folders, globs, or stdlib), dataset or mixture"


@dataclass(frozen=True)
class Rows:
    """The data of a run."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    bytes_per_token: float | None = None
    """Of the held-out text, where a loss per byte means something."""
    parts: tuple[tuple[int, float], ...] = ()
    """Of a mixture, how many training rows each source has, one after the other, and its weight."""
    stream: Stream | None = None
    """Where rows to train on come from, if they are read while it is trained; `train` is the first of them."""


class Task:
    """Text in blocks, as the tasks on text share it.

    Args:
        config: The settings of the run.
        model_config: The student's.
        processor: The tokenizer, or what else makes the model's inputs; None where rows come ready.
    """

    auto_class: ClassVar[str]
    """The class of Transformers that loads the model."""
    shifts: ClassVar[bool] = False
    """Whether position t predicts label t + 1."""
    unit: ClassVar[str] = "tokens"
    """What the length of a row counts."""
    predicts: ClassVar[str] = "token"
    """What the loss is the mean over."""
    mixes: bool = False
    """Whether rows to train on come with an `other` row of the data, to be mixed with."""

    def __init__(self, config: TrainConfig, model_config: PreTrainedConfig, processor: Any = None) -> None:
        self.config, self.model_config, self.processor = config, model_config, processor
        self.vocabulary: int | None = None  # of ids that a teacher knows too

    @property
    def ids(self) -> int:
        """How many ids, from 0 on, rows may hold."""
        return self.vocabulary or int(self.model_config.get_text_config().vocab_size)

    def taught_by(self, teacher: PreTrainedConfig, processor: Any = None) -> None:
        """Refuse a teacher that speaks of something else; what `for_teacher` makes follows from it.

        Args:
            teacher: Its config.
            processor: What is beside it; None where that is not known.

        Raises:
            DistillationError: Saying what differs.
        """
        self.vocabulary = common_ids(self.model_config, teacher, self.processor, processor)

    def for_teacher(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the teacher takes, of what the student takes."""
        return inputs

    def ready(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows as `batch` takes them, checked to suit the model. Raises DataError."""
        check_ids(
            rows,
            self.ids,
            "the vocabulary that the teacher shares" if self.vocabulary else "the model's vocabulary",
        )
        return rows

    def metrics(self, chosen: Any, labels: Any) -> dict[str, float]:
        """What is recorded of held-out rows beside the loss, by name.

        Args:
            chosen: What the model takes to be likeliest, in the shape of the labels.
            labels: -100 where nothing is predicted.
        """
        return {}

    @property
    def measures(self) -> bool:
        """Whether there is anything in `metrics`, for which predictions are gathered."""
        return type(self).metrics is not Task.metrics

    @property
    def writes(self) -> bool:
        """Whether what is measured is what the model writes by itself (see `written`), and not what it predicts."""
        return False

    def written(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """What the model makes of held-out rows by itself, [rows, tokens], -100 after the end of each.

        Raises:
            TypeError: The task measures what a model predicts: `writes` is False.
        """
        raise TypeError(f"{type(self).__name__} measures what a model predicts, and not what it writes")

    @classmethod
    def load_processor(cls, source: str) -> Any:
        """What is beside a model in its folder, or at its Hub id; None if nothing is."""
        from hf_ws.distill.teacher import load_tokenizer

        return load_tokenizer(source)

    @property
    def documents_apart(self) -> bool:
        """Whether blocks say where their documents begin."""
        return False

    def read(self) -> Rows:
        """The data that the settings name. Raises DataError."""
        import datasets

        if self.config.streaming:
            return self._streamed()
        if not self.config.mixture:
            train, held_out = self._read()
            return Rows(train.dataset, held_out.dataset, held_out.bytes_per_token)
        sources = [self._read(name) for name in self.config.mixture]
        kept_back = [own for _, own in (sources[:1] if self.config.eval_files else sources)]
        tokens = sum(own.tokens for own in kept_back)
        weights = (float(weight) for weight in self.config.mixture.values() if not isinstance(weight, list))
        return Rows(
            datasets.concatenate_datasets([train.dataset for train, _ in sources]),
            datasets.concatenate_datasets([own.dataset for own in kept_back]),
            sum(own.bytes_per_token * own.tokens for own in kept_back) / tokens,
            tuple((len(train), weight) for (train, _), weight in zip(sources, weights, strict=True)),
        )

    def _read(self, source: str | None = None) -> tuple[Packed, Packed]:
        """The blocks to train on and those held out; of one source of a mixture if that is named."""
        documents, held_out = self._documents(source)
        warn_of_repeats(documents, held_out)
        train = self._packed(documents)
        try:
            return train, self._packed(held_out)
        except HfWsError as error:
            raise DataError(f"held-out text{f' of {source}' if source else ''}: {error}") from error

    def _streamed(self) -> Rows:
        """The stream, its first blocks, and held-out blocks from its beginning."""
        from accelerate import PartialState

        config = self.config
        self._check_processor()
        stream = Stream(
            sources=self._sources(),
            tokenizer=self.processor,
            block=config.block,
            window=config.shuffle_buffer,
            seed=config.seed,
            apart=self.documents_apart,
            holds_out=not (config.eval_files or config.eval_split),
            vocabulary=self.ids,
        )
        if config.eval_files:
            documents = text_files(
                config.eval_files, column=config.text_column, skip_bad=config.skip_bad_rows
            )
        else:
            read = replace(stream, sources=(self._hub(config.eval_split),)) if config.eval_split else stream
            documents = read.held_out(config.max_eval_blocks * config.block)
        per_step = config.batch_size * config.grad_accum * PartialState().num_processes
        first = stream.sample(max(per_step, config.subclone.calibration if config.subclone else 0))
        held_out = self._packed(documents)
        return Rows(first, held_out.dataset, held_out.bytes_per_token, stream=stream)

    def _sources(self) -> tuple[Source, ...]:
        """What a stream reads. Raises DataError."""
        config = self.config
        if config.dataset:
            return (self._hub(config.dataset_split),)
        if not config.train_files and not config.mixture:
            raise DataError(_NO_TEXT)
        options: dict[str, Any] = {"skip_bad": config.skip_bad_rows}
        if config.train_files:
            return (Source.of_files(config.train_files, config.text_column, **options),)
        return tuple(
            Source.of_files([name], config.text_column, weight=float(weight), **options)
            if is_local(name)
            else Source.of_hub(name, config.text_column, weight=float(weight), **options)
            for name, weight in config.mixture.items()
            if not isinstance(weight, list)
        )

    def _hub(self, split: str) -> Source:
        config = self.config
        options: dict[str, Any] = {"config_name": config.dataset_config, "skip_bad": config.skip_bad_rows}
        return Source.of_hub(str(config.dataset), config.text_column, split=split, **options)

    def usable(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Rows that came ready, less those in which nothing is predicted. Raises DataError if no batch can be made."""
        return usable(rows, shifts=self.shifts) if {"input_ids", "labels"} <= {*rows.column_names} else rows

    def length(self, rows: datasets.Dataset) -> int:
        """How many `unit`s a row counts for in a run of so many tokens."""
        return len(rows[0]["input_ids"])

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """What the model takes of these rows, and `labels`.

        Each row has its `place` in the run besides, and whether it is for `training`.
        """
        names = [name for name in rows[0] if name not in ("place", "training")]
        return {name: torch.stack([row[name] for row in rows]) for name in names}

    def drawn(self, row: dict[str, Any]) -> torch.Generator:
        """The chance of one row, from the seed and its place."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + int(row["place"]))

    def _documents(self, source: str | None = None) -> tuple[list[Document], list[Document]]:
        """To train on, and held out."""
        config = self.config
        self._check_processor()
        options: dict[str, Any] = {"column": config.text_column, "skip_bad": config.skip_bad_rows}
        if source is not None:
            documents = load_text(source, **options)
        elif config.train_files:
            documents = text_files(config.train_files, **options)
        elif config.dataset:
            documents = self._from_hub(config.dataset_split)
        else:
            raise DataError(_NO_TEXT)
        if config.eval_files:
            return documents, text_files(config.eval_files, **options)
        if config.eval_split:
            return documents, self._from_hub(config.eval_split)
        return split_held_out(documents)

    def _from_hub(self, split: str) -> list[Document]:
        config = self.config
        return load_text(
            config.dataset,
            split=split,
            column=config.text_column,
            config_name=config.dataset_config,
            skip_bad=config.skip_bad_rows,
        )

    def _check_processor(self) -> None:
        if self.processor is None:
            raise DataError(
                "text came without a tokenizer; take a model folder that holds one, or give tokenizer="
            )

    def _packed(self, documents: list[Document]) -> Packed:
        from accelerate import PartialState

        show = self.config.progress and PartialState().is_main_process
        return pack(documents, self.processor, self.config.block, apart=self.documents_apart, progress=show)
