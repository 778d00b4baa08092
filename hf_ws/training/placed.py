"""The rows of a run in their order, and what is asked of them for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from hf_ws.training.tasks import Task

if TYPE_CHECKING:
    import datasets

    from hf_ws.training.teacher_cache import TeacherCache


class Placed(TorchDataset[dict[str, Any]]):
    """Rows in an order, each with its `place` in it: what is drawn for a row by chance follows from that.

    With a cache, each has what the teacher says of it besides; with a task that mixes rows, an `other` to train on.
    """

    def __init__(
        self,
        task: Task,
        rows: datasets.Dataset,
        order: Sequence[int],
        cache: TeacherCache | None = None,
        *,
        training: bool,
    ) -> None:
        self.task, self.rows, self.order, self.cache, self.training = task, rows, order, cache, training

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = self.order[place]
        taught = {} if self.cache is None else self.cache[number]
        row = {**self.rows[number], **taught, "place": place, "training": self.training}
        if self.training and self.task.mixes:
            # Of all rows and not of the batch, so that it does not matter how batches are cut.
            row["other"] = self.rows[int(torch.randint(len(self.rows), (), generator=self.task.drawn(row)))]
        return row


def measured(task: Task) -> Callable[[Any], dict[str, float]] | None:
    """The task's metrics as the Trainer asks for them; None where it has none, so that no prediction is gathered."""
    if type(task).metrics is Task.metrics:
        return None
    return lambda seen: task.metrics(seen.predictions, seen.label_ids)


def likeliest(logits: Any, _: Tensor) -> Tensor:
    """What is gathered over the held-out rows in place of the logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
