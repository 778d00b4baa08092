"""Train a model, from a teacher too if there is one.

    history = train(TrainConfig(model="student", output="run", train_files=["stdlib"], steps=1000))
    history = train(TrainConfig(steps=200), model=live_model, train_blocks=blocks, eval_blocks=held_out)

Transformers' `Trainer` does the work (precision, accumulation, schedule, processes, checkpoints, trackers).
What is added here: the distillation loss, an order of batches that depends on the seed alone, checkpoints
that are known to be whole, a stop when the loss is no longer finite, and the record (see `hf_ws.training.run_folder`).
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor
from transformers import ProgressCallback, Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

from hf_ws.errors import OutputError, PlanError, ResumeError
from hf_ws.training import adapters, layers, report, result, run_folder
from hf_ws.training.arguments import arguments
from hf_ws.training.callbacks import Bar, Recorder
from hf_ws.training.config import TrainConfig
from hf_ws.training.data import Packed
from hf_ws.training.job import Job, prepare
from hf_ws.training.kernels import kernels_in
from hf_ws.training.objective import Objective
from hf_ws.training.placed import Placed, Streamed, likeliest, measured
from hf_ws.training.sharding import engine, logits_whole, on_cpu, split_on_cpu, spread
from hf_ws.training.stop import Stopper
from hf_ws.training.trackers import trackers

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

# Settings that may differ when a run is continued: what they name is known by its fingerprint, or they change
# what is recorded and not what is learned.
_FREE = {"model", "teacher", "output", "save_model", "resume", "eval_files", "max_eval_blocks", "threads"}
_FREE |= {"eval_split", "workers", "teacher_cache", "preset"}  # what the second fills is compared
_FREE |= {"eval_every", "eval_at", "log_every", "save_every", "keep_checkpoints", "report_to", "progress"}


@dataclass(frozen=True)
class History:
    """What a run recorded: `rows` are the lines of `metrics.jsonl`, `model_folder` what was saved."""

    rows: list[dict[str, Any]]
    tokens_per_step: int
    model_folder: Path | None = None

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Training tokens seen and held-out loss in nats per token, in order."""
        return [(row["tokens"], row["eval_loss"]) for row in self.rows if row.get("eval_loss") is not None]

    @property
    def final_loss(self) -> float:
        """The last held-out loss in nats per token; NaN if there was no evaluation."""
        return self.evaluations[-1][1] if self.evaluations else math.nan

    @property
    def seconds(self) -> float:
        """Time spent training and evaluating."""
        return float(self.rows[-1]["seconds"]) if self.rows else 0.0


def train(
    config: TrainConfig,
    *,
    task: str = "clm",
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    teacher: PreTrainedModel | str | Path | None = None,
    train_blocks: Packed | datasets.Dataset | Tensor | None = None,
    eval_blocks: Packed | datasets.Dataset | Tensor | None = None,
) -> History:
    """Train, and leave the record in `config.output` if that is given.

    An object given here takes the place of what the settings name. The same seed gives the same batches in
    the same order to every model trained on the same blocks, whatever the number of processes, as long as
    processes x batch_size x grad_accum stays the same.

    Args:
        config: The settings.
        task: A name in `hf_ws.training.tasks.TASKS`.
        model: A live model; it is trained in place, in float32, and left in eval mode. With `lora` the adapters stay
            in its modules, unless they are merged.
        tokenizer: Needed where text comes as text; saved beside the model. Another processor for other data.
        teacher: A live model, folder or Hub id. Not loaded if `kd_weight` is 0.
        train_blocks: Blocks that `pack` made, or token ids [blocks, tokens].
        eval_blocks: Held-out blocks. With neither these nor text there is no evaluation.

    Raises:
        PlanError, CheckpointError, DataError, DistillationError, OutputError, ResumeError: Before any work.
        DivergenceError: The loss is no longer finite; checkpoints written before are whole and stay.
        StoppedError: SIGTERM came; there is a checkpoint of the last step. Only where there is an `output`.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    state = PartialState(**engine())
    if state.num_processes == 1 and on_cpu() and "MASTER_ADDR" in os.environ:
        logger.warning(
            "one process runs: `accelerate launch --cpu` leaves several to mpirun; see recipes/accelerate"
        )
    folder = Path(config.output).expanduser() if config.output else None
    if folder:
        run_folder.check_run_folder(folder, config.resume)
    job = prepare(
        config,
        task=task,
        model=model,
        tokenizer=tokenizer,
        teacher=teacher,
        train_blocks=train_blocks,
        eval_blocks=eval_blocks,
    )
    return _train(job, folder)


def _train(job: Job, folder: Path | None) -> History:
    record = {
        key: value for key, value in asdict(job.config).items() if key not in _FREE
    } | job.fingerprints()
    checkpoint: Path | None = None
    damaged: list[Path] = []
    if folder and (folder / run_folder.MARK).is_file():
        run_folder.check_same_run(folder, record, asdict(TrainConfig(steps=1)))
        if left := result.finished(folder, job):
            result.restore(left, job)
            return History(run_folder.read_metrics(folder), job.tokens_per_step, left)
        checkpoint, damaged = run_folder.last_whole_checkpoint(folder)
    state = PartialState()
    state.wait_for_everyone()  # nobody writes before everybody has looked
    rows: list[dict[str, Any]] = []
    if folder and state.is_main_process:
        rows = run_folder.begin(folder, record, checkpoint, damaged)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if folder and state.is_main_process:
            result.keep_start(folder, job)
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf_ws-")))
        recorder = Recorder(job, folder, rows)
        if stack.enter_context(kernels_in(job.model, job.config.liger)) and job.teacher is not None:
            stack.enter_context(kernels_in(job.teacher, "auto"))
        trainer = _trainer(job, place, recorder, checkpoint)
        _run(trainer, recorder, checkpoint)
        saved = result.save(trainer, folder, job, recorder.rows) if folder and job.config.save_model else None
    return History(recorder.rows, job.tokens_per_step, saved)


class _Trainer(Trainer):
    """Transformers' Trainer with our objective, and more in each log."""

    def __init__(self, *, job: Job, stopper: Stopper, **options: Any) -> None:
        super().__init__(**options)
        self.job, self.stopper = job, stopper
        self.doing = "training"
        if job.task.writes and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise PlanError(
                "word_errors wants the whole model in every process; leave it out, or launch with DDP"
            )
        teacher = None if job.teacher is None else spread(job.teacher, self.accelerator)
        batch = job.task.batch([Placed(job.task, job.blocks, [0], training=True)[0]])
        batch = {name: value.to(self.args.device) for name, value in batch.items()}
        self.objective = Objective(
            job.config,
            job.model,
            teacher,
            job.plan,
            shifts=job.task.shifts,
            batch=batch,
            for_teacher=job.task.for_teacher,
        )
        if logits_whole(self.accelerator):
            self.objective.apart = False
        # The objective takes the count of labels, so nothing is divided again.
        self.model_accepts_loss_kwargs = True
        decay = job.config.layer_lr_decay
        self._rates = layers.rates(job.model, batch, decay) if decay else {}
        if job.config.compile:
            layers.compiled(job.model)
        self._parts: dict[str, Tensor] = {}
        self._batches = 0

    def create_accelerator_and_postprocess(self) -> None:
        """As Transformers does it; and FSDP2 where it was asked for and there are only CPUs."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled |= split_on_cpu(self.accelerator)

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """As Transformers does it, which takes older checkpoints away only after; a full disk is said to be one.

        Raises:
            OutputError: The checkpoint could not be written; older ones are as they were.
        """
        self.doing = "saving"
        try:
            super()._save_checkpoint(*arguments, **options)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch's writer has no error of its own: RuntimeErrors name the file it is written in, or the writer
            writers = ("inline_container", "PytorchStreamWriter")
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in writers):
                raise
            step = self.state.global_step
            raise OutputError(
                f"checkpoint-{step} in {self.args.output_dir} could not be written: {error}. Older checkpoints are "
                "whole; make room, and the same command with --resume goes on from the last of them"
            ) from error
        self.doing = "training"

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """As Transformers does it; where the task is to write, with what the model writes in place of logits."""
        writes = self.job.task.writes and not prediction_loss_only
        found = super().prediction_step(model, inputs, prediction_loss_only or writes, ignore_keys)
        if not writes:
            return found
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            written = self.job.task.written(self.accelerator.unwrap_model(model), inputs)
        return found[0], written, inputs["labels"]

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """As Transformers does it."""
        self.doing = "evaluating"
        figures = super().evaluate(*arguments, **options)
        self.doing = "training"
        return figures

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, with a rate for each layer where that is asked for."""
        made = self.optimizer is None
        super().create_optimizer(model)
        if made and self._rates:
            layers.regroup(self.optimizer, self.job.model, self._rates)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What the objective makes of the batch; in evaluation, cross-entropy alone."""
        if not model.training:
            loss, _, outputs = self.objective(model, inputs)
            return (loss, outputs) if return_outputs else loss
        progress = self.state.global_step / self.state.max_steps
        loss, parts, outputs = self.objective(model, inputs, progress=progress, items=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is of the tokens of all processes, whose gradients are then averaged and not summed.
            loss = loss * self.accelerator.num_processes
            parts = {name: part * self.accelerator.num_processes for name, part in parts.items()}
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0) + part.detach()
        self._batches += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss since the last log, and perplexity and bits per byte to an evaluation."""
        if "loss" in logs and self._batches:
            steps = self._batches / self.args.gradient_accumulation_steps
            for name, total in self._parts.items():
                logs[name] = self.accelerator.reduce(total / steps, "mean").item()
            self._parts, self._batches = {}, 0
            self._tr_loss.zero_()  # the Trainer takes the sum from itself, which a loss that is no number survives
        if "eval_loss" in logs:
            if self.job.task.predicts == "token":
                logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
            if self.job.bytes_per_token:
                logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2) / self.job.bytes_per_token
        super().log(logs, start_time)


def _trainer(job: Job, place: Path, recorder: Recorder, checkpoint: Path | None) -> _Trainer:
    stopper, held_out = Stopper(), job.held_out
    rows: Placed | Streamed
    if job.stream:
        per_step = job.tokens_per_step // job.task.length(job.blocks)
        state, step = run_folder.stream_state(checkpoint) if checkpoint else (None, 0)
        rows = recorder.streamed = Streamed(job.task, job.stream, job.steps, per_step, state, step)
    else:
        rows = Placed(job.task, job.blocks, job.order().tolist(), job.cache, training=True)
    trainer = _Trainer(
        job=job,
        stopper=stopper,
        model=adapters.wrapped(job) if job.config.lora else job.model,
        args=arguments(job, place, resumed=checkpoint is not None),
        # The whole run is one pass over the blocks in their order: no epoch ends inside it, so neither a
        # remainder batch nor an epoch's own shuffle can make two runs differ.
        train_dataset=rows,
        eval_dataset=held_out and Placed(job.task, held_out, range(len(held_out)), training=False),
        data_collator=job.task.batch,
        compute_metrics=measured(job.task),
        preprocess_logits_for_metrics=None if job.task.writes else likeliest,
        # In this order: the recorder logs where the stopper saves, and then trackers are told.
        callbacks=[stopper, recorder.guard, recorder, *trackers(job.config.report_to)],
    )
    recorder.guard.accelerator = trainer.accelerator
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if job.config.progress:
        trainer.add_callback(Bar)
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of Transformers' own for files it reads and writes, which would tear ours apart."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _run(trainer: _Trainer, recorder: Recorder, checkpoint: Path | None) -> None:
    model = recorder.job.model
    try:
        with trainer.stopper.listening() if recorder.folder else nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.stopper.check(trainer.state.global_step, trainer.state.max_steps)
    except UnpicklingError as error:
        raise ResumeError(
            f"{checkpoint} holds more than numbers, and is not opened: no run of this library wrote it; remove it"
        ) from error
    except torch.OutOfMemoryError as error:
        error.add_note(
            f"memory ran out at step {trainer.state.global_step} while {trainer.doing}; checkpoints written before are "
            "whole. Lower batch_size and raise grad_accum, or set gradient_checkpointing"
        )
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Bar):
                callback.close()
        # The Trainer switches the cache off and leaves it so, which would be saved with the model.
        if recorder.use_cache is None:
            vars(model.config).pop("use_cache", None)
        else:
            model.config.use_cache = recorder.use_cache
        model.eval()
        if recorder.folder and trainer.is_world_process_zero():
            task = recorder.job.task
            try:
                report.draw(recorder.folder, recorder.rows, task.unit, task.predicts)
            except OSError as error:  # no picture is worth the error that may be on its way
                logger.warning("%s could not be drawn: %s", run_folder.PICTURE, error)
