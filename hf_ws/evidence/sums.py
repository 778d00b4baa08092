"""What calibration adds up: named tensors, of which any two lots may be added.

Everything that is collected is a sum over tokens. So batches, processes, and the two halves of a run that was
interrupted all come together by addition.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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


def share() -> tuple[int, int]:
    """Which of how many processes this is."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
