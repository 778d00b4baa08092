"""Trackers of experiments (trackio, tensorboard, wandb, ...), none of which may end a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from hf_ws.errors import PlanError

logger = logging.getLogger(__name__)


def trackers(names: Iterable[str]) -> list[Guarded]:
    """The trackers of these names, "all" being those installed; one that cannot be had is left out with a word.

    Raises:
        PlanError: A name that Transformers does not know.
    """
    asked = [
        name for one in names for name in (get_available_reporting_integrations() if one == "all" else [one])
    ]
    found = []
    for name in dict.fromkeys(asked):
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise PlanError(f"report_to has {name!r}; allowed: {known}, or all for those installed")
        try:
            found.append(Guarded(name, INTEGRATION_TO_CALLBACK[name]()))
        except Exception as error:  # the package is missing, or whatever it raises as it starts
            _leave_out(name, error)
    return found


def _leave_out(name: str, error: Exception) -> None:
    logger.warning(
        "report_to: %s is left out from here on (%s: %s); the run goes on, and metrics.jsonl has every figure",
        name, type(error).__name__, error,
    )  # fmt: skip


class Guarded(TrainerCallback):
    """A tracker's callback, which is asked no more once it has failed."""

    def __init__(self, name: str, callback: TrainerCallback) -> None:
        self.name, self.callback = name, callback

    def _pass_on(self, event: str, *arguments: Any, **options: Any) -> None:
        if self.callback is None:
            return
        try:
            getattr(self.callback, event)(*arguments, **options)
        except (
            Exception
        ) as error:  # a server that is away, a quota, a full disk: never a reason to stop training
            self.callback = None
            _leave_out(self.name, error)


def _passed_on(event: str) -> Any:
    return lambda self, *arguments, **options: self._pass_on(event, *arguments, **options)


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Guarded, _event, _passed_on(_event))
