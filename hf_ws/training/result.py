"""What a run leaves: the trained model or its adapters, the start they belong to, and the plan of that start."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_ws.distill.teacher import load_model
from hf_ws.hub import CARD_FILE, PLAN_FILE, model_card, nameable
from hf_ws.store import new_folder
from hf_ws.training import adapters, report
from hf_ws.training.run_folder import ADAPTER, MODEL, START, SUMMARY

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_ws.training.job import Job

logger = logging.getLogger(__name__)


def finished(folder: Path, job: Job) -> Path | None:
    """What a run that has ended left; None if it has not ended, or was not to leave any."""
    lora = job.config.lora
    last = folder / (ADAPTER if lora and not lora.merge else MODEL)
    return last if last.is_dir() else None


def keep_start(folder: Path, job: Job) -> None:
    """Write what a run that made its own start cannot do without. Call it on one process, before training.

    The plan, by which a resumed run makes the same start; with adapters, which are nothing without it, the start.
    """
    if not job.config.subclone or job.plan is None:
        return
    nameable(job.plan).save(folder / PLAN_FILE)
    if job.config.lora and not (folder / START).is_dir():
        with new_folder(folder / START) as staging:
            job.model.save_pretrained(staging)
            _beside(staging, job)


def save(trainer: Trainer, folder: Path, job: Job, rows: report.Rows) -> Path:
    """Write what was trained, whole or not at all. Every process takes part: its shards may be spread."""
    told = report.summary(job, rows)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora, writes = job.config.lora, trainer.is_world_process_zero()
    if lora:
        if writes:
            shutil.rmtree(folder / ADAPTER, ignore_errors=True)  # of a run that ended before it had merged
            with new_folder(folder / ADAPTER) as staging:
                model.save_pretrained(staging, state_dict=weights)
                _beside(staging, job, told)
        if lora.merge and trainer.is_fsdp_enabled:
            model, weights = adapters.merged_apart(job, weights) if writes else model, None
        elif lora.merge:
            model, weights = adapters.merged(model), None
    target = folder / (ADAPTER if lora and not lora.merge else MODEL)
    if writes and target.name == MODEL:
        with new_folder(target) as staging:
            model.save_pretrained(staging, state_dict=weights)
            _beside(staging, job, told)
    if writes:
        (folder / SUMMARY).write_text(told, encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return target


def restore(result: Path, job: Job) -> None:
    """Give the student the weights that a finished run left."""
    logger.warning("the run in %s is finished; nothing to do", result.parent)
    if result.name == ADAPTER:
        adapters.load(job, result)
    else:
        trained = load_model(result, job.task.auto_class, torch.float32)
        job.model.load_state_dict(trained.state_dict())
    job.model.eval()


def _beside(staging: Path, job: Job, told: str | None = None) -> None:
    """What belongs to the weights: the tokenizer, the plan that their start was made by, and a card that tells both."""
    tokenizer: Any = job.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    if job.plan is None:
        return
    nameable(job.plan).save(staging / PLAN_FILE)
    if told is not None:
        name = Path(str(job.config.output)).expanduser().resolve().name
        card = str(model_card(job.plan, name=name, training=told))
        (staging / CARD_FILE).write_text(card, encoding="utf-8")
