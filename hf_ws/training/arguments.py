"""The settings of a run in the words of Transformers' Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from hf_ws.errors import PlanError
from hf_ws.training.config import TrainConfig
from hf_ws.training.job import Job
from hf_ws.training.sharding import engine, on_cpu


def arguments(job: Job, place: Path, *, resumed: bool) -> TrainingArguments:
    """What the Trainer is told.

    Args:
        job: What is run.
        place: Where checkpoints go.
        resumed: Whether the run goes on from one, so that nothing is evaluated before it.

    Raises:
        PlanError: The launcher was told another precision.
    """
    config, steps, processes = job.config, job.steps, PartialState().num_processes
    eval_every = max(1, steps // 10) if config.eval_every is None else config.eval_every
    evaluates = job.held_out is not None and bool(eval_every or config.eval_at)
    precision = _precision(config)
    cosine = config.schedule == "cosine"
    return TrainingArguments(
        output_dir=str(place),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=min(config.batch_size, len(job.held_out or ()) // processes or 1),
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr_ratio} if cosine else {},
        warmup_steps=steps // 50 if config.warmup_steps is None else config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        **(_checkpointing() if config.gradient_checkpointing else {}),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=engine().get("cpu", False),
        ddp_backend=engine().get("backend"),
        seed=config.seed,
        train_sampling_strategy="sequential",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=eval_every or steps,
        eval_on_start=evaluates and not resumed,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or steps,
        save_total_limit=config.keep_checkpoints,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would log a NaN as 0.0
        report_to="none",  # they are given as callbacks that can do no harm
        disable_tqdm=not config.progress,
        dataloader_pin_memory=not on_cpu(),
        dataloader_num_workers=config.workers,
        ddp_find_unused_parameters=False,
        label_names=["labels"],
        remove_unused_columns=False,  # the task makes the batch
    )


def _checkpointing() -> dict[str, Any]:
    """Computes activations again, by the name that this release of Transformers has for it."""
    old = "activation_checkpointing" not in TrainingArguments.__dataclass_fields__
    word = "gradient_checkpointing" if old else "activation_checkpointing"
    return {word: True, f"{word}_kwargs": {"use_reentrant": False}}


def _precision(config: TrainConfig) -> str:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").replace("no", "fp32")
    if config.precision == "auto":
        has_bf16 = not on_cpu() and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return "bf16" if launched == "fp32" and has_bf16 else launched
    if launched not in ("fp32", config.precision):
        raise PlanError(
            f"precision={config.precision}, but the launcher was told {launched}; "
            f"drop one, or launch with --mixed_precision {config.precision.replace('fp32', 'no')}"
        )
    return config.precision
