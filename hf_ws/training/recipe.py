"""What every recipe does: settings, training, and a line on what came out."""

from __future__ import annotations

import sys

from accelerate import PartialState

from hf_ws.errors import HfWsError, PlanError
from hf_ws.training.config import config_from_flags
from hf_ws.training.tasks import TASKS
from hf_ws.training.trainer import train


def run(task: str, about: str | None) -> int:
    """Train as the command line says; the exit code.

    Args:
        task: A name in `hf_ws.training.tasks.TASKS`.
        about: What `--help` says before the settings.
    """
    try:
        config = config_from_flags(None, about or "")
        if config.output is None:
            raise PlanError("no place for the result; set output to a new folder")
        history = train(config, task=task)
    except HfWsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    state = PartialState()
    if state.is_main_process:
        if history.evaluations:
            first, last = history.evaluations[0][1], history.final_loss
            print(
                f"held-out loss {first:.3f} -> {last:.3f} nats per {TASKS[task].predicts}, {history.seconds:.0f} s"
            )
        print(f"the run is in {config.output}")
    state.destroy_process_group()
    return 0
