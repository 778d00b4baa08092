"""Causal language modelling: every token of a block is predicted from those before it."""

from __future__ import annotations

from hf_ws.training.tasks.base import Task


class CausalLM(Task):
    """Decoders on packed text."""

    auto_class = "AutoModelForCausalLM"
    shifts = True
