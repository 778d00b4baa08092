"""What a training run needs, loaded and checked before any work: models, blocks, and the fit between them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers.utils import cached_file

from hf_ws.distill.teacher import load_model, load_teacher
from hf_ws.errors import CheckpointError, DataError, DistillationError, PlanError
from hf_ws.hub import PLAN_FILE
from hf_ws.plan import Plan
from hf_ws.training import adapters
from hf_ws.training.config import TrainConfig
from hf_ws.training.data import Packed
from hf_ws.training.kernels import kernels_for
from hf_ws.training.records import fingerprint
from hf_ws.training.run_folder import START
from hf_ws.training.start import Start, saved_plan, teacher_by_default
from hf_ws.training.stream import Stream, behind
from hf_ws.training.tasks import TASKS, Rows, Task
from hf_ws.training.tasks.causal_lm import keeps_apart
from hf_ws.training.teacher_cache import TeacherCache
from hf_ws.training.vocabularies import print_of_tokenizer

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_SAMPLE = 64  # blocks that a data set is known by


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked. `tokens_per_step` counts all processes."""

    config: TrainConfig
    steps: int
    tokens_per_step: int
    model: PreTrainedModel
    tokenizer: Any
    """Saved beside the model: a tokenizer, or another processor."""
    task: Task
    teacher: PreTrainedModel | None
    blocks: datasets.Dataset
    held_out: datasets.Dataset | None
    bytes_per_token: float | None
    plan: Plan | None = None
    """How the student was made, where that is known."""
    parts: tuple[tuple[int, float], ...] = ()
    """Of a mixture, the rows of each source and its weight."""
    cache: TeacherCache | None = None
    """What the teacher said, in its place."""
    stream: Stream | None = None
    """Where the rows of the run come from if not from `blocks`, which then are its first ones."""

    @property
    def base(self) -> str | None:
        """What adapters of the student are adapters of: a folder or Hub id; None if nobody knows."""
        config = self.config
        if config.subclone:
            return str(Path(config.output) / START) if config.output else config.subclone.source
        return config.model or self.model.name_or_path or None

    def fingerprints(self) -> dict[str, Any]:
        """What besides the settings decides what is learned."""
        return {
            "task": type(self.task).__name__,
            "data": print_of_rows(self.blocks),
            "start": print_of_model(self.model),
            "teacher": None if self.teacher is None else print_of_model(self.teacher),
            "teacher_cache": None if self.cache is None else asdict(self.cache.contents),
            "processes": PartialState().num_processes,
        }

    def order(self) -> Tensor:
        """The block taken at each place of the run, [steps x blocks in a step].

        One shuffle of all the blocks after another, each from the seed alone: a longer run begins like a
        shorter one, and the start of one batch does not depend on how many processes share it. Of a mixture, each
        source is shuffled so, and whichever is furthest behind its weight comes next.
        """
        wanted = self.steps * self.tokens_per_step // self.task.length(self.blocks)
        sizes, weights = zip(*(self.parts or ((len(self.blocks), 1.0),)), strict=True)
        source, turn = _turns([weight / sum(weights) for weight in weights], wanted)
        order = torch.zeros(wanted, dtype=torch.long)
        for number, (size, start) in enumerate(zip(sizes, np.cumsum([0, *sizes[:-1]]), strict=True)):
            generator = torch.Generator().manual_seed(self.config.seed + 7919 * number)
            rounds = -(-int((source == number).sum()) // size)
            own = torch.cat([torch.randperm(size, generator=generator) for _ in range(max(rounds, 1))])
            order[source == number] = own[turn[source == number]] + int(start)
        return order


def _turns(shares: list[float], count: int) -> tuple[Tensor, Tensor]:
    """Which source each place takes from, and the how manieth of that source it is."""
    if len(shares) == 1:
        return torch.zeros(count, dtype=torch.long), torch.arange(count)
    taken, source, turn = [0] * len(shares), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for place in range(count):
        source[place] = at = behind(shares, taken)
        turn[place] = taken[at]
        taken[at] += 1
    return torch.from_numpy(source), torch.from_numpy(turn)


def prepare(
    config: TrainConfig,
    *,
    task: str = "clm",
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    teacher: PreTrainedModel | str | Path | None = None,
    train_blocks: Packed | datasets.Dataset | Tensor | None = None,
    eval_blocks: Packed | datasets.Dataset | Tensor | None = None,
) -> Job:
    """Load what is named and check that it fits together, the cheap things first.

    Raises:
        PlanError, CheckpointError, DataError, DistillationError: Naming what is wrong and what to do.
    """
    start, named = _named(config, task, model)
    kind = TASKS[task]
    if config.streaming and kind.unit != "tokens":
        raise PlanError(f"streaming reads text, and the task {task} takes other data; leave it out")
    tokenizer = tokenizer or (kind.load_processor(named) if named else None)
    student = model.config if model is not None else start.config if start else _read_config(str(named))
    kernels_for(student.model_type, config.liger)  # refused, where it is, before any work
    teacher = (config.teacher if teacher is None else teacher) if config.distils else None
    cache = _open_cache(config, task, teacher, student, tokenizer)
    if start and teacher is None and cache is None and config.distils:
        teacher = teacher_by_default(start, str(named))
    for rows in (train_blocks, eval_blocks):
        _check_packed(rows, tokenizer)
    doing = kind(config, student, tokenizer)
    if teacher is not None:
        _check_teacher(teacher, model, doing)
    data = _rows(doing, train_blocks, eval_blocks)
    stream = data.stream
    blocks, held_out = doing.ready(data.train), None if data.held_out is None else doing.ready(data.held_out)
    per_step = config.batch_size * config.grad_accum * PartialState().num_processes
    length = _check_rows(doing, blocks, per_step)
    if held_out is not None:
        held_out = _whole_batches(held_out, config)
    if start:
        loaded = start.make(doing, blocks, saved_plan(config.output, config.resume))
    else:
        loaded = load_model(str(named), kind.auto_class, torch.float32) if model is None else model.float()
    if config.lora:
        adapters.check_targets(loaded, config.lora)
    taught_by = None if teacher is None else load_teacher(teacher, kind.auto_class)
    if taught_by is not None and doing.unit == "tokens":
        check_positions(taught_by.config, length, "the teacher")
    if "position_ids" in blocks.column_names and not keeps_apart(loaded):
        logger.warning(
            "%s does not keep documents apart: tokens see those before them", type(loaded).__name__
        )
        blocks, held_out = (rows and rows.remove_columns("position_ids") for rows in (blocks, held_out))
        stream = stream and replace(stream, apart=False)
    job = Job(
        config=config,
        steps=config.steps or max(1, (config.tokens or 0) // (per_step * length)),
        tokens_per_step=per_step * length,
        model=loaded,
        tokenizer=doing.processor,
        task=doing,
        teacher=taught_by,
        blocks=blocks,
        held_out=held_out,
        bytes_per_token=data.bytes_per_token,
        parts=data.parts,
        plan=plan_of(loaded, named if model is None else None),
        cache=cache,
        stream=stream,
    )
    if cache is not None:
        cache.check_blocks(blocks, job.order(), progress=config.progress and PartialState().is_main_process)
    return job


def _check_packed(rows: Any, tokenizer: Any) -> None:
    """Refuse blocks of ids that mean something else to the tokenizer that is saved with the model."""
    made_with = rows.tokenizer if isinstance(rows, Packed) else None
    if made_with and hasattr(tokenizer, "get_vocab") and made_with != print_of_tokenizer(tokenizer):
        raise DataError(
            "the blocks were packed with a tokenizer that gives other ids than the model's; pack the text again with "
            "the model's own"
        )


def _named(config: TrainConfig, task: str, model: PreTrainedModel | None) -> tuple[Start | None, str | None]:
    """The start to be made, if one is, and where tokenizer and weights are. Raises PlanError."""
    if config.subclone and model is not None:
        raise PlanError("a live model and subclone= both given; give one of the two")
    if config.subclone:
        start = Start.of(config.subclone, TASKS[task].auto_class)
        return start, start.located()
    if model is None and config.model is None:
        raise PlanError(
            "no model to train: set model= to a folder or Hub id, or subclone= to make one; or give a live one"
        )
    return None, config.model


def _check_rows(task: Task, rows: datasets.Dataset, per_step: int) -> int:
    """The length of a row. Raises DataError where rows are too few or too long."""
    if len(rows) < per_step:
        kind, shorter = ("blocks", " or a shorter block") if task.unit == "tokens" else ("rows", "")
        raise DataError(
            f"{len(rows)} {kind} came and one step takes {per_step} (batch_size x grad_accum x processes); "
            f"give more data, a smaller batch{shorter}"
        )
    length = task.length(rows)
    if task.unit == "tokens":
        check_positions(task.model_config, length, "the model")
    return length


def _open_cache(
    config: TrainConfig, task: str, teacher: Any, student: PreTrainedConfig, tokenizer: Any
) -> TeacherCache | None:
    """The cache that the settings name. Raises DistillationError where it is not what the run wants."""
    if config.teacher_cache is None or not config.distils:
        return None
    named = f"teacher_cache={config.teacher_cache}"
    if teacher is not None:
        raise DistillationError(
            f"a teacher and {named} both given; drop one: the cache stands for the teacher"
        )
    if task != "clm":
        raise DistillationError(f"{named} is for the task clm, and this one is {task}; take a live teacher")
    cache = TeacherCache(config.teacher_cache)
    cache.check_settings(config, student, tokenizer)
    return cache


def print_of_rows(rows: datasets.Dataset) -> str:
    """A fingerprint of rows: how many, and what is in some spread over them."""
    step = max(1, len(rows) // _SAMPLE)
    seen = fingerprint([rows[i] for i in range(0, len(rows), step)])
    return f"{len(rows)} rows, {seen[:16]}"


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


def _check_teacher(teacher: PreTrainedModel | str | Path, model: PreTrainedModel | None, task: Task) -> None:
    if teacher is model:
        raise DistillationError("the teacher is the student itself; give another model, or a copy")
    if not isinstance(teacher, str | Path):
        task.taught_by(teacher.config)
        return
    try:
        theirs = _read_config(str(teacher))
    except CheckpointError as error:
        raise DistillationError(f"the teacher cannot be used: {error}") from error
    task.taught_by(theirs, task.load_processor(str(teacher)))


def _rows(task: Task, train: Any, held_out: Any) -> Rows:
    """The rows to train on and those held out, given or read."""
    if train is None:
        own = task.read()
        if held_out is None:
            return own
        return replace(own, **dict(zip(("held_out", "bytes_per_token"), _given(task, held_out), strict=True)))
    return Rows(_given(task, train)[0], *((None, None) if held_out is None else _given(task, held_out)))


def _given(task: Task, rows: Any) -> tuple[datasets.Dataset, float | None]:
    dataset, bytes_per_token = as_dataset(rows)
    return (dataset if isinstance(rows, Packed) else task.usable(dataset)), bytes_per_token


def as_dataset(blocks: Packed | datasets.Dataset | Tensor) -> tuple[datasets.Dataset, float | None]:
    """Blocks as a dataset that gives tensors, and their bytes per token where known."""
    import datasets

    if isinstance(blocks, Packed):
        return blocks.dataset, blocks.bytes_per_token
    if isinstance(blocks, Tensor):
        if blocks.ndim != 2 or not len(blocks):
            raise DataError(f"token ids of shape {tuple(blocks.shape)} came; give [blocks, tokens]")
        blocks = datasets.Dataset.from_dict({"input_ids": blocks.cpu().numpy()})
    if not len(blocks):
        raise DataError("a dataset without rows came; give some")
    if "input_ids" in blocks.column_names and not {"labels", "target"} & {*blocks.column_names}:
        blocks = blocks.add_column("labels", blocks.with_format("arrow")[:]["input_ids"])
    return blocks.with_format("torch") if "input_ids" in blocks.column_names else blocks, None


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


def check_positions(config: PreTrainedConfig, length: int, what: str) -> None:
    """Refuse blocks with more tokens than "the model" or "the teacher" has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        error = DistillationError if what == "the teacher" else DataError
        raise error(
            f"blocks of {length} tokens came and {what} has {positions} positions; set block={positions}"
        )
