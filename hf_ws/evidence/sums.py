"""What calibration adds up: named tensors, of which any two lots may be added.

Everything that is collected is a sum over tokens. So batches, processes, and the two halves of a run that was
interrupted all come together by addition.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import Tensor

from hf_ws.errors import OutputError

logger = logging.getLogger(__name__)

SPARE = 0.25  # the share of the machine's memory that sums leave free
PANEL = 512  # rows of a square that are added to at a time


class Sums(dict[str, Tensor]):
    """Float64 sums by a key of words with `|` between them: `abs|model.layers.0.mlp.down_proj:ffn`."""

    def add(self, key: str, value: Tensor | float) -> None:
        """Add to one sum; the first value that comes is taken over, and may be changed later."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        if key in self:
            self[key].add_(tensor)
        else:
            self[key] = tensor

    def number(self, key: str) -> float:
        """A sum of numbers; zero if nothing was added."""
        return float(self[key]) if key in self else 0.0

    def under(self, word: str) -> dict[str, Tensor]:
        """The sums whose key begins with this word, by the rest of their keys."""
        return {key[len(word) + 1 :]: value for key, value in self.items() if key.startswith(f"{word}|")}

    def gather(self, processes: int) -> None:
        """Add up what all processes have, in the same order everywhere; one sum at a time, for some are large."""
        if processes == 1:
            return
        listed: list[list[str]] = [[] for _ in range(processes)]
        dist.all_gather_object(listed, list(self))
        for key in dict.fromkeys(key for keys in listed for key in keys):
            parts: list[Tensor | None] = [None] * processes
            dist.all_gather_object(parts, self.pop(key, None))
            for part in parts:
                if part is not None:
                    self.add(key, part)


def add_square(sums: Tensor, rows: Tensor, came_as: torch.dtype | None = None) -> None:
    """Add rows^T rows to `sums` [width, width], of which only what lies up to the diagonal is kept: `mirrored`.

    In place, a panel at a time: the product alone would be as large again, and half of it is the other half.

    Args:
        sums: Float32 or more.
        rows: [tokens, width], of the same type.
        came_as: The type that the rows had before they were made wide.
    """
    with _narrow_products(rows, came_as):
        for start in range(0, len(sums), PANEL):
            stop = min(start + PANEL, len(sums))
            panel, left = sums[start:stop, :stop], rows[:, start:stop].mT
            if rows.device == sums.device:
                panel.addmm_(left, rows[:, :stop])
            else:
                panel.add_((left @ rows[:, :stop]).to(sums))


@contextmanager
def _narrow_products(rows: Tensor, came_as: torch.dtype | None) -> Iterator[None]:
    """Float32 products by the fast units for narrower numbers, where that is exact: of rows that were such numbers. The
    units add up in float32 all the same."""
    narrow = {"cpu": "bf16", "cuda": "tf32"}.get(rows.device.type)  # tf32 holds what float16 and bfloat16 do
    if narrow is None or came_as not in (
        (torch.bfloat16,) if narrow == "bf16" else (torch.bfloat16, torch.float16)
    ):
        yield
        return
    unit: Any = torch.backends.mkldnn.matmul if narrow == "bf16" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before, unit.fp32_precision = unit.fp32_precision, narrow
    try:
        yield
    finally:
        unit.fp32_precision = before


def mirrored(sums: Tensor) -> Tensor:
    """What `add_square` added to, whole: in place."""
    for start in range(PANEL, len(sums), PANEL):
        rest = slice(start, start + PANEL)
        sums[:start, rest] = sums[rest, :start].mT
    return sums


def zeros(size: int, dtype: torch.dtype) -> Tensor:
    """A matrix [size, size] to add to: in memory, or where that is scarce in a file that goes when the matrix goes.

    The file lies where temporary files do (`TMPDIR`). The system writes it out and reads it back as it needs memory, so
    second moments of wide models take the time of a disk in place of the process's life.

    Raises:
        OutputError: there is no room on the disk either.
    """
    count = size * size
    needed = count * dtype.itemsize
    memory = psutil.virtual_memory()
    if memory.available - needed > SPARE * memory.total:
        return torch.zeros(size, size, dtype=dtype)
    handle, name = tempfile.mkstemp(prefix="hf_ws-moments-")
    try:
        if hasattr(os, "posix_fallocate"):  # else a full disk ends the process, when the matrix is written to
            os.posix_fallocate(handle, 0, needed)
        return torch.from_file(name, shared=True, size=count, dtype=dtype).view(size, size)
    except OSError as error:
        raise OutputError(
            f"second moments of {size} channels take {needed / 1e9:.2f} GB; {memory.available / 1e9:.2f} GB of memory "
            f"are left, and {Path(name).parent} has no room: {error}; calibrate with fewer `wants`, or set TMPDIR"
        ) from error
    finally:
        os.close(handle)
        Path(name).unlink()


def share() -> tuple[int, int]:
    """Which of how many processes this is; one that was launched with others and not joined to them is alone."""
    if not dist.is_available() or not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            logger.warning(
                "%s processes were launched and are not joined: each calibrates on all the data; join them first, with "
                "accelerate.PartialState()",
                os.environ["WORLD_SIZE"],
            )
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
