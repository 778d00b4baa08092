"""One tensor of the target from one tensor of the source: the only place that indexes weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hf_ws.axes import Layout, positions


def select(
    tensor: Tensor,
    layout: Layout,
    source: Mapping[str, int],
    target: Mapping[str, int],
    maps: Mapping[str, np.ndarray],
) -> Tensor:
    """The target's tensor: along every dimension, the positions that the maps name.

    What the maps copy k times is divided by k where it is read, so that the sum over copies stays what it was
    (Net2Net, 1511.05641, section 3.2). Selection alone copies values bit for bit.

    Args:
        tensor: The source's tensor, not changed; may be a memory-mapped file.
        layout: Its dimensions.
        source: Sizes of the source's axes.
        target: Sizes of the target's axes.
        maps: The source index of each target index, by axis.

    Returns:
        A tensor that may be a view of the source: clone it before writing to it.
    """
    gathered: dict[int, np.ndarray] = {}
    shares: list[tuple[int, np.ndarray]] = []
    for at, dim in enumerate(layout):
        if not dim.axes:
            continue
        index = positions(dim, source, target, maps)
        if dim.reads and (copies := np.bincount(index)[index]).max() > 1:
            shares.append((at, copies))
        if (step := _step(index)) is None:
            gathered[at] = index
        else:
            tensor = tensor[(slice(None),) * at + (slice(int(index[0]), int(index[-1]) + 1, step),)]
    tensor = _gather(tensor, gathered)
    for at, copies in shares:
        share = torch.from_numpy(copies).to(tensor.dtype)
        tensor = tensor / share.view([-1 if d == at else 1 for d in range(tensor.ndim)])
    return tensor


def _step(index: np.ndarray) -> int | None:
    """The distance between neighbours where it is one and positive, so that a slice will do."""
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    return step if step > 0 and (np.diff(index) == step).all() else None


def _gather(tensor: Tensor, gathered: Mapping[int, np.ndarray]) -> Tensor:
    """The positions named in each dimension; two neighbouring ones in one go, without a copy in between."""
    indices = {at: torch.from_numpy(np.ascontiguousarray(index)) for at, index in gathered.items()}
    at = list(indices)
    if len(at) == 2 and at[1] == at[0] + 1:
        return tensor[(slice(None),) * at[0] + (indices[at[0]][:, None], indices[at[1]])]
    for place, index in indices.items():
        tensor = tensor[(slice(None),) * place + (index,)]
    return tensor
