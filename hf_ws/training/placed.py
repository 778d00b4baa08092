"""The rows of a run in their order, and what is asked of them for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from hf_ws.training.stream import Stream
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


class Streamed(TorchDataset[dict[str, Any]]):
    """The rows of a stream as a run of so many steps takes them, each with its `place`.

    They come in their order, once, so batches have to be asked for one after the other. Of several processes the first
    one reads and tells the others, which ask at the same time.

    Args:
        task: Makes batches of the rows.
        stream: Read from the start, or from `state` on, which is that of step `begun`.
        steps: In the whole run.
        per_step: Rows in a step, of all processes.
        state: What `state_at` gave.
        begun: The step it was asked for.
    """

    def __init__(
        self,
        task: Task,
        stream: Stream,
        steps: int,
        per_step: int,
        state: dict[str, Any] | None = None,
        begun: int = 0,
    ) -> None:
        self.task, self.steps, self.per_step = task, steps, per_step
        self._columns = ("input_ids", "labels", *(("position_ids",) if stream.apart else ()))
        self._block = stream.block
        self._blocks = stream.blocks(state)
        self._place = begun * per_step
        self._states: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        """The rows of a batch, of consecutive places."""
        processes = PartialState()
        begins = self._place + processes.process_index * len(places)
        if places != [*range(begins, begins + len(places))]:
            raise RuntimeError(f"places {places} of a stream were asked for and {begins} comes next")
        count = len(places) * processes.num_processes
        table = torch.zeros(count, len(self._columns), self._block, dtype=torch.int64)
        for row in range(count):
            if processes.is_main_process:
                self._read(table[row])
            self._place += 1
            if processes.is_main_process and self._place % self.per_step == 0:
                self._states[self._place // self.per_step] = self._blocks.state()
        if processes.num_processes > 1:
            table = broadcast(table.to(processes.device)).cpu()
        mine = table[processes.process_index * len(places) :][: len(places)]
        return [
            {**dict(zip(self._columns, row, strict=True)), "place": place, "training": True}
            for place, row in zip(places, mine, strict=True)
        ]

    def _read(self, row: Tensor) -> None:
        block = next(self._blocks)
        for number, name in enumerate(self._columns):
            row[number] = torch.from_numpy(block[name])

    def state_at(self, step: int) -> dict[str, Any]:
        """Where the stream is after this step, though batches have been read ahead. Ask on the first process."""
        self._states = {at: state for at, state in self._states.items() if at >= step}
        return self._states[step]


def measured(task: Task) -> Callable[[Any], dict[str, float]] | None:
    """The task's metrics as the Trainer asks for them; None where it has none, so that no prediction is gathered."""
    if not task.measures:
        return None
    return lambda seen: task.metrics(seen.predictions, seen.label_ids)


def likeliest(logits: Any, _: Tensor) -> Tensor:
    """What is gathered over the held-out rows in place of the logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
