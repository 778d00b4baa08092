"""What a training run needs, loaded and checked before any work: models, blocks, and the fit between them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers.utils import cached_file

from hf_ws.distill.teacher import check_vocabulary, load_causal_lm, load_teacher, load_tokenizer
from hf_ws.errors import CheckpointError, DataError, DistillationError, HfWsError, PlanError
from hf_ws.hub import PLAN_FILE
from hf_ws.plan import Plan
from hf_ws.training.config import TrainConfig
from hf_ws.training.data import Document, Packed, check_ids, load_text, pack, split_held_out, text_files

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SAMPLE = 64  # blocks that a data set is known by


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked. `tokens_per_step` counts all processes."""

    config: TrainConfig
    steps: int
    tokens_per_step: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    teacher: PreTrainedModel | None
    blocks: datasets.Dataset
    held_out: datasets.Dataset | None
    bytes_per_token: float | None
    plan: Plan | None = None
    """How the student was made, where that is known."""

    def fingerprints(self) -> dict[str, Any]:
        """What besides the settings decides what is learned."""
        return {
            "data": print_of_blocks(self.blocks),
            "start": print_of_model(self.model),
            "teacher": None if self.teacher is None else print_of_model(self.teacher),
            "processes": PartialState().num_processes,
        }

    def order(self) -> Tensor:
        """The block taken at each place of the run, [steps x blocks in a step].

        One shuffle of all the blocks after another, each from the seed alone: a longer run begins like a
        shorter one, and the start of one batch does not depend on how many processes share it.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        wanted = self.steps * self.tokens_per_step // len(self.blocks[0]["input_ids"])
        rounds = -(-wanted // len(self.blocks))
        return torch.cat([torch.randperm(len(self.blocks), generator=generator) for _ in range(rounds)])[
            :wanted
        ]


def prepare(
    config: TrainConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedModel | str | Path | None = None,
    train_blocks: Packed | datasets.Dataset | Tensor | None = None,
    eval_blocks: Packed | datasets.Dataset | Tensor | None = None,
) -> Job:
    """Load what is named and check that it fits together, the cheap things first.

    Raises:
        PlanError, CheckpointError, DataError, DistillationError: Naming what is wrong and what to do.
    """
    if model is None and config.model is None:
        raise PlanError("no model to train: set model= to a folder or Hub id, or give a live one")
    tokenizer = tokenizer or (load_tokenizer(config.model) if config.model else None)
    student = model.config if model is not None else _read_config(str(config.model))
    teacher = (config.teacher if teacher is None else teacher) if config.distils else None
    if teacher is not None:
        _check_teacher(teacher, model, student, tokenizer)
    if train_blocks is None:
        train_blocks, own = _read_blocks(config, tokenizer)
        eval_blocks = own if eval_blocks is None else eval_blocks
    blocks, _ = as_dataset(train_blocks)
    held_out, bytes_per_token = (None, None) if eval_blocks is None else as_dataset(eval_blocks)
    per_step = config.batch_size * config.grad_accum * PartialState().num_processes
    if len(blocks) < per_step:
        raise DataError(
            f"{len(blocks)} blocks came and one step takes {per_step} (batch_size x grad_accum x processes); "
            "give more text, a smaller batch or a shorter block"
        )
    for one in (blocks, held_out):
        if one is not None:
            check_ids(one, student.get_text_config().vocab_size)
    length = len(blocks[0]["input_ids"])
    _check_positions(student, length, "the model")
    if held_out is not None:
        held_out = _whole_batches(held_out, config)
    loaded = load_causal_lm(str(config.model), torch.float32) if model is None else model.float()
    taught_by = None if teacher is None else load_teacher(teacher)
    if taught_by is not None:
        _check_positions(taught_by.config, length, "the teacher")
    return Job(
        config=config,
        steps=config.steps or max(1, (config.tokens or 0) // (per_step * length)),
        tokens_per_step=per_step * length,
        model=loaded,
        tokenizer=tokenizer,
        teacher=taught_by,
        blocks=blocks,
        held_out=held_out,
        bytes_per_token=bytes_per_token,
        plan=plan_of(loaded, config.model if model is None else None),
    )


def print_of_blocks(blocks: datasets.Dataset) -> str:
    """A fingerprint of blocks: how many, how long, and the ids of some spread over them."""
    step = max(1, len(blocks) // _SAMPLE)
    some = np.asarray(blocks.with_format("numpy")[::step]["input_ids"], dtype=np.int64)
    return f"{len(blocks)} blocks of {some.shape[1]}, {hashlib.sha256(some.tobytes()).hexdigest()[:16]}"


def print_of_model(model: PreTrainedModel) -> str:
    """A fingerprint of a model: its class, the shape of every parameter and the first few numbers of each."""
    seen = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:8].float().cpu().numpy()
        seen.update(f"{name} {tuple(parameter.shape)}".encode() + some.tobytes())
    return f"{type(model).__name__}, {seen.hexdigest()[:16]}"


def plan_of(model: PreTrainedModel, source: str | Path | None) -> Plan | None:
    """The plan that a model was made by: its own, or the one in its folder or repository."""
    if isinstance(plan := getattr(model, "hf_ws_plan", None), Plan):
        return plan
    if source is None:
        return None
    file = cached_file(
        str(source), PLAN_FILE, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if file is None else Plan.load(file)


def _read_config(source: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source} has no config that can be read: {error}") from error


def _check_teacher(
    teacher: PreTrainedModel | str | Path,
    model: PreTrainedModel | None,
    student: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if teacher is model:
        raise DistillationError("the teacher is the student itself; give another model, or a copy")
    if not isinstance(teacher, str | Path):
        check_vocabulary(student, teacher)
        return
    try:
        theirs = _read_config(str(teacher))
    except CheckpointError as error:
        raise DistillationError(f"the teacher cannot be used: {error}") from error
    check_vocabulary(student, theirs, tokenizer, load_tokenizer(teacher))


def _read_blocks(config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Packed, Packed]:
    """The training and held-out blocks of the text that the settings name."""
    if tokenizer is None:
        raise DataError(
            "text came without a tokenizer; take a model folder that holds one, or give tokenizer="
        )
    column = config.text_column
    documents: list[Document]
    if config.train_files:
        documents = text_files(config.train_files, column=column)
    elif config.dataset:
        documents = load_text(
            config.dataset, split=config.dataset_split, column=column, config_name=config.dataset_config
        )
    else:
        raise DataError("no text to train on; set train_files (files, folders, globs, or stdlib) or dataset")
    if config.eval_files:
        held_out = text_files(config.eval_files, column=column)
    else:
        documents, held_out = split_held_out(documents)
    show = config.progress and PartialState().is_main_process
    packed = pack(documents, tokenizer, config.block, progress=show)
    try:
        return packed, pack(held_out, tokenizer, config.block, progress=show)
    except HfWsError as error:
        raise DataError(f"held-out text: {error}") from error


def as_dataset(blocks: Packed | datasets.Dataset | Tensor) -> tuple[datasets.Dataset, float | None]:
    """Blocks as a dataset that gives tensors, and their bytes per token where known."""
    import datasets

    if isinstance(blocks, Packed):
        return blocks.dataset, blocks.bytes_per_token
    if isinstance(blocks, Tensor):
        if blocks.ndim != 2 or not len(blocks):
            raise DataError(f"token ids of shape {tuple(blocks.shape)} came; give [blocks, tokens]")
        blocks = datasets.Dataset.from_dict({"input_ids": blocks.cpu().numpy()})
    if "input_ids" not in blocks.column_names or not len(blocks):
        raise DataError(
            f"a dataset of {len(blocks)} rows with {blocks.column_names} came; give blocks with `input_ids`"
        )
    if "labels" not in blocks.column_names:
        blocks = blocks.add_column("labels", blocks.with_format("arrow")[:]["input_ids"])
    return blocks.with_format("torch"), None


def _whole_batches(held_out: datasets.Dataset, config: TrainConfig) -> datasets.Dataset:
    """At most `max_eval_blocks`, evenly spread, in whole batches of all processes (or one smaller batch).

    Where the last batch is short, several processes fill it up with blocks seen before, and their mean loss is
    no longer that of one process.
    """
    processes = PartialState().num_processes
    keep = min(len(held_out), config.max_eval_blocks or len(held_out))
    whole = config.batch_size * processes
    keep -= keep % (whole if keep >= whole else processes)
    if not keep:
        raise DataError(f"{len(held_out)} held-out blocks for {processes} processes; give more held-out text")
    return held_out.select([i * len(held_out) // keep for i in range(keep)])


def _check_positions(config: PreTrainedConfig, length: int, what: str) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        error = DistillationError if what == "the teacher" else DataError
        raise error(
            f"blocks of {length} tokens came and {what} has {positions} positions; set block={positions}"
        )
