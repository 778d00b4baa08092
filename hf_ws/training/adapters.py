"""Adapters of low rank (LoRA), by peft: put into the student's modules, saved apart, merged if asked.

The student stays the object it was: its modules keep their names, so that whatever looks at them by name (the head,
the states that a teacher's are compared with, rates by layer) finds them as before.
"""

from __future__ import annotations

import difflib
import os
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_ws.errors import PlanError
from hf_ws.training.blocks import ALL_LINEAR, Lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from hf_ws.training.job import Job

NAME = "default"
"""What peft calls an adapter that has no other name."""


def check_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Refuse adapters for modules that the model does not have.

    Raises:
        PlanError: A name that is the end of no linear module, a head that is tied, adapters already
            there, or DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise PlanError(
            "lora under DeepSpeed: its checkpoints hold all weights, not adapters; launch with "
            "recipes/accelerate/fsdp2.yaml, or ddp.yaml, cpu2.yaml, single.yaml"
        )
    if getattr(model, "peft_config", None) or any("lora_" in name for name, _ in model.named_parameters()):
        raise PlanError("the model has adapters already; merge them first with PeftModel.merge_and_unload()")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for wanted in lora.names:
        found = [name for name in linear if f".{name}".endswith(f".{wanted}")]
        if not found:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            near = difflib.get_close_matches(wanted, ends, n=1)
            raise PlanError(
                f"lora.targets has {wanted!r}, which is no linear module of this {type(model).__name__}"
                f"{f'; did you mean {near[0]!r}?' if near else ''}; it has {', '.join(ends)}; or say {ALL_LINEAR}"
            )
        for name in found:
            if model.get_submodule(name) is model.get_output_embeddings() and _is_tied(model):
                raise PlanError(
                    f"lora.targets has {wanted!r}, the head, whose weight is the embedding's too; leave it out"
                )
    if not linear:
        raise PlanError(f"this {type(model).__name__} has no linear modules to put adapters on")


def wrapped(job: Job) -> PeftModel:
    """The student with fresh adapters in its modules; all its other weights are frozen.

    They are drawn on the CPU from the run's seed, and change nothing until they are trained.
    """
    return _adapted(job, job.model)


def _adapted(job: Job, model: PreTrainedModel) -> PeftModel:
    """A model of the student's class with fresh adapters in its modules."""
    from peft import LoraConfig, get_peft_model

    lora = job.config.lora
    assert lora is not None
    modules = [module for _, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.names or ALL_LINEAR,
        fan_in_fan_out=sum(isinstance(module, Conv1D) for module in modules) > len(modules) / 2,
        revision=getattr(model.config, "_commit_hash", None),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks by the name that Transformers is about to drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.default_generator.manual_seed(job.config.seed)
        adapted = get_peft_model(model, config)
    adapted.peft_config[NAME].base_model_name_or_path = job.base
    # No embedding is targeted or resized; peft would ask the Hub to find that out, at every checkpoint.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def load(job: Job, folder: Path) -> None:
    """Put the adapters that a finished run saved into the student."""
    adapted = wrapped(job)
    adapted.load_adapter(str(folder), NAME, is_trainable=True)


def merged(adapted: Any) -> PreTrainedModel:
    """The student with W + (alpha / r) B A in place of each W: a stock model again, the object it was before.

    Raises:
        ArithmeticError: A merged weight is not finite.
    """
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ArithmeticError(f"the adapters cannot be merged: {error}") from error


def merged_apart(job: Job, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A stock model of its own, on the CPU, with the adapters merged; the student may be split over processes.

    Args:
        job: With the student's class and config.
        weights: All of the adapted student's, whole, by name.

    Raises:
        ArithmeticError: A merged weight is not finite.
    """
    with torch.device("meta"):
        plain = type(job.model)(job.model.config)
        adapted = _adapted(job, plain)
    adapted.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = job.model.generation_config
    return merged(adapted)


def _is_tied(model: PreTrainedModel) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is table.weight
