"""The start that a run makes for itself: from a source's name to a student, once.

Sizes are checked from the source's `config.json` before anything else is read. Every process calibrates on its share,
and chooses by what all of them saw; the plan is kept in the run's folder, so a resumed run makes the same start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from hf_ws import store
from hf_ws.auto import AutoSubclone
from hf_ws.errors import PlanError
from hf_ws.hub import PLAN_FILE
from hf_ws.methods import default_method
from hf_ws.plan import Plan
from hf_ws.training.blocks import Subclone

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_ws.training.tasks import Task

logger = logging.getLogger(__name__)

_BATCH = 8  # calibration blocks in a forward pass


@dataclass(frozen=True)
class Start:
    """A start that was asked for and can be made."""

    asked: Subclone
    model_class: str
    config: PreTrainedConfig
    """The student's."""
    plan: Plan
    """Indices that a method ranks may still be open."""

    @classmethod
    def of(cls, asked: Subclone, auto_class: str) -> Start:
        """What the block asks for, for a task whose models `auto_class` loads.

        Raises:
            PlanError, SizeError, CheckpointError: As `AutoSubclone.plan`.
        """
        import transformers

        config = store.load_config(asked.source, **asked.where)
        mapping = getattr(transformers, auto_class)._model_mapping
        name = asked.model_class
        if name is None:
            if type(config) not in mapping:
                raise PlanError(
                    f"subclone.source {asked.source!r} is a {config.model_type}, which {auto_class} does not have; "
                    "take another recipe, or name subclone.model_class"
                )
            found = mapping[type(config)]
            name = str((found[0] if isinstance(found, tuple) else found).__name__)
        first = asked  # of the method that the data will choose, and of no data yet
        if asked.method is None and not asked.method_args:
            method, options = default_method(asked.calibration > 0)
            first = replace(asked, method=method, method_args=dict(options))
        plan = AutoSubclone.plan(asked.source, **cls._arguments(first, name))
        return cls(asked, name, type(config).from_dict(dict(plan.target_config)), plan)

    @staticmethod
    def _arguments(asked: Subclone, model_class: str) -> dict[str, Any]:
        return asked.arguments() | {"model_class": model_class, "dtype": "float32"}

    def located(self) -> str:
        """Where the source's tokenizer and weights are: the source as it is named, or the folder of its revision."""
        if not (self.asked.revision or self.asked.local_files_only):
            return self.asked.source
        with store.open_source(self.asked.source, model_class=self.model_class, **self.asked.where) as opened:
            return str(opened.files)

    def make(self, task: Task, blocks: datasets.Dataset, saved: Path | None) -> PreTrainedModel:
        """The student, in float32 on the CPU, its plan in `hf_ws_plan`.

        Args:
            task: Makes the source's inputs of the blocks.
            blocks: To train on; evenly spread ones are calibrated on.
            saved: The plan of the run that is resumed, which is carried out again as it is.

        Raises:
            CalibrationError, CheckpointError, PlanError: As `AutoSubclone.from_pretrained`.
        """
        plan = self.plan
        if saved is not None:
            plan = Plan.load(saved)
        elif self.asked.calibration:
            plan = AutoSubclone.plan(
                self.asked.source,
                calibration=list(self._inputs(task, blocks)),
                device=PartialState().device,
                **self._arguments(self.asked, self.model_class),
            )
        return plan.apply(self.asked.source, local_files_only=self.asked.local_files_only)

    def _inputs(self, task: Task, blocks: datasets.Dataset) -> Iterator[dict[str, Tensor]]:
        count = min(self.asked.calibration, len(blocks))
        chosen = [i * len(blocks) // count for i in range(count)]
        for begin in range(0, count, _BATCH):
            rows = [blocks[i] | {"place": i} for i in chosen[begin : begin + _BATCH]]
            batch = task.batch(rows)
            yield {name: value for name, value in batch.items() if name not in ("labels", "position_ids")}


def saved_plan(output: str | None, resume: bool) -> Path | None:
    """The plan that a run which is resumed was started with, if it got as far as to write it."""
    file = Path(output).expanduser() / PLAN_FILE if output and resume else None
    return file if file and file.is_file() else None


def teacher_by_default(start: Start, located: str) -> str:
    """Where the student was made here and nobody named a teacher, its source teaches."""
    logger.warning(
        "the teacher is %s, which the start is made of; set teacher for another, kd_weight: 0 for none",
        start.asked.source,
    )
    return located
