"""What listens to a training run: the recorder of its figures and checkpoints, and the progress bar."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from hf_ws.distill import LOSSES, STATE_LOSSES
from hf_ws.errors import DivergenceError
from hf_ws.training import run_folder
from hf_ws.training.guard import Guard
from hf_ws.training.job import Job
from hf_ws.training.placed import Streamed


class Recorder(TrainerCallback):
    """Keeps the rows, writes them as they come, marks checkpoints whole, and stops a run that diverges."""

    KEYS = ("loss", "ce_loss", "kd_loss", *LOSSES, *STATE_LOSSES, "learning_rate", "grad_norm")
    EVAL_KEYS = (
        "eval_loss",
        "eval_perplexity",
        "eval_bits_per_byte",
        "eval_accuracy",
        "eval_word_error_rate",
    )

    def __init__(self, job: Job, folder: Path | None, rows: list[dict[str, Any]]) -> None:
        self.job = job
        self.folder = folder
        self.rows = rows
        self.streamed: Streamed | None = None
        self.guard = Guard(job.config.nonfinite_steps)
        self.use_cache = getattr(job.model.config, "use_cache", None)
        self.started = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate where asked; log before every save, so that a loss that is not finite is never saved."""
        last = state.global_step >= state.max_steps
        if self.job.held_out is not None and args.eval_strategy != "no":
            control.should_evaluate |= last or state.global_step in self.job.config.eval_at
        control.should_log |= last or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write one row, then judge it."""
        numbers = {key: logs[key] for key in (*self.KEYS, *self.EVAL_KEYS) if key in logs}
        if not numbers.keys() & {"loss", "eval_loss"}:
            return  # the Trainer's closing summary
        step = state.global_step
        row = {"step": step, "tokens": step * self.job.tokens_per_step, **numbers}
        if "loss" in row and (left_out := self.guard.told()):
            row["left_out"] = left_out
        row["seconds"] = round(time.monotonic() - self.started, 3)
        self.rows.append(row)
        if self.folder and state.is_world_process_zero:
            run_folder.write_metrics(self.folder, [row], append=True)
        # Under fp16 the loss scaler meets infinite gradients, skips those steps and goes on: no divergence.
        watched = ["loss", "eval_loss"] if args.fp16 else ["loss", "eval_loss", "grad_norm"]
        if row.get("left_out") and not args.fp16:  # whose loss and gradient are in these figures
            watched = ["eval_loss"]
        bad = [f"{key} is {row[key]}" for key in watched if not math.isfinite(row.get(key, 0.0))]
        if bad:
            raise DivergenceError(
                f"{' and '.join(bad)} at step {step} (or up to {args.logging_steps - 1} before); "
                f"lower learning_rate ({self.job.config.learning_rate:g}), lengthen warmup_steps, or check "
                "the start. Checkpoints written before are whole"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint whole, once every process has written its part."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self.streamed is not None:
                run_folder.keep_stream_state(checkpoint, self.streamed.state_at(state.global_step))
            run_folder.mark_whole(checkpoint)


class Bar(ProgressCallback):
    """The Trainer's bar, with the loss on it in place of a printed line a log."""

    training_bar: Any
    prediction_bar: Any

    def close(self) -> None:
        """Take the bars away, also after an error, which the Trainer leaves them standing at."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()
        self.training_bar = self.prediction_bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc="training", unit=" steps", leave=False)
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest losses."""
        if self.training_bar is not None:
            shown = {"loss": "loss", "eval_loss": "held_out"}
            self.training_bar.set_postfix(
                {shown[k]: f"{v:.3f}" for k, v in logs.items() if k in shown}, refresh=False
            )

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Show evaluations that take over two seconds."""
        if state.is_world_process_zero:
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(
                    total=len(eval_dataloader), desc="evaluating", leave=False, delay=2
                )
            self.prediction_bar.update(1)
