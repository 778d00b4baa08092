"""Steps whose gradient is not finite: left out, counted, and the end of the run where too many come in a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback

from hf_ws.errors import DivergenceError

SCALED = 50
"""Steps in a row that fp16's loss scaler may leave out: it halves the scale each time, and began at 2^16."""


class Guard(TrainerCallback):
    """Leaves out a step whose gradient is not finite: weights and moments stay as they were.

    Under fp16 the loss scaler does so itself, and is watched. Every process does the same, whichever saw it.

    Args:
        allowed: Steps in a row that may be left out; 0 looks at no gradient.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.accelerator: Any = None
        self.in_a_row = self.since_log = 0
        self._left_out = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take the gradients away, and with them the step, where one is not finite."""
        self._left_out = bool(self.allowed) and not args.fp16 and not self._finite(model.parameters())
        if self._left_out:
            for parameter in model.parameters():
                parameter.grad = None  # which an optimizer passes over, decay and all

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count.

        Raises:
            DivergenceError: More in a row than allowed.
        """
        skipped = self._left_out or bool(args.fp16 and self.accelerator.optimizer_step_was_skipped)
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.since_log += skipped
        allowed = max(self.allowed, SCALED) if args.fp16 else self.allowed
        if skipped and self.in_a_row > allowed:
            raise DivergenceError(
                f"{self.in_a_row} steps in a row had gradients that are not finite, the last at step "
                f"{state.global_step + 1}, and {allowed} are allowed; lower learning_rate "
                f"({args.learning_rate:g}), or check the data and the start. Checkpoints written before are whole"
            )

    def told(self) -> int:
        """How many steps were left out since this was last asked."""
        count, self.since_log = self.since_log, 0
        return count

    @staticmethod
    @torch.no_grad()
    def _finite(parameters: Iterable[Tensor]) -> bool:
        flags = []
        for parameter in parameters:
            gradient: Any = parameter.grad
            if gradient is not None:
                own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                flags.append(own.isfinite().all().to(PartialState().device))
        bad = (~torch.stack(flags)).sum().float() if flags else torch.zeros((), device=PartialState().device)
        if PartialState().num_processes > 1:
            bad = reduce(bad, "sum")
        return not bool(bad.item())
