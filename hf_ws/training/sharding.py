"""The teacher, and the head taken apart, on the engines that split models over processes."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ws.errors import PlanError


def on_cpu() -> bool:
    """Whether the run takes no accelerator, because it was told so or there is none."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return told or not torch.accelerator.is_available()


def engine() -> dict[str, Any]:
    """How processes find each other, as `PartialState` wants it said; DeepSpeed on CPUs only comes when named gloo."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return {"backend": "gloo"} if on_cpu() else {}
    return {"cpu": on_cpu()}


def split_on_cpu(accelerator: Accelerator) -> bool:
    """Let FSDP2 run on CPUs, where Accelerate would take DDP in its place without a word; whether it was asked for."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if not asked or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise PlanError("on CPUs only FSDP2 runs; set fsdp_version: 2, or take recipes/accelerate/cpu2.yaml")
    state: Any = accelerator.state
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = plugin
    return True


def spread(teacher: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """The teacher where it is to run: split as the student is under FSDP2, else whole on each process's device.

    A teacher that was loaded over several devices stays there.
    """
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, teacher)
    if getattr(teacher, "hf_device_map", None) is None:
        teacher.to(accelerator.device)
    return teacher


def logits_whole(accelerator: Accelerator) -> bool:
    """Whether logits must be made whole: ZeRO-3 takes a head's weights away before their gradient comes."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and bool(is_deepspeed_zero3_enabled())
