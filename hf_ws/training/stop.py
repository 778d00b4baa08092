"""SIGTERM: finish the step, write a whole checkpoint, stop. A second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback

from hf_ws.errors import StoppedError


class Stopper(TrainerCallback):
    """Stops a run whose process is told to end, with a checkpoint to resume from.

    Several processes stop at the same step, as soon as one is told. Each tells the others at every step and listens to
    the step before, so that nobody waits.
    """

    def __init__(self) -> None:
        self.told = False
        self._before: Any = None
        self._news: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signal while the block runs; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = signal.signal(signal.SIGTERM, self._catch)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._before)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        signal.signal(signal.SIGTERM, self._before)  # a second one does what it always did

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint and the end."""
        if self._agreed() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def _agreed(self) -> bool:
        processes = PartialState()
        if processes.num_processes == 1:
            return self.told
        heard = self._news is not None and bool(self._news.item())
        self._news = reduce(torch.tensor(float(self.told), device=processes.device), "sum")
        return heard

    def check(self, step: int, steps: int) -> None:
        """Raise if the run was stopped before its last step.

        Raises:
            StoppedError: With the step.
        """
        if step < steps:
            raise StoppedError(
                f"stopped by SIGTERM at step {step} of {steps}; checkpoint-{step} is whole, and the same command "
                "with --resume goes on from it"
            )
