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
    for at, dim in enumerate(layout):
        if not dim.axes:
            continue
        index = positions(dim, source, target, maps)
        tensor = _along(tensor, at, index)
        if dim.reads:
            copies = np.bincount(index, minlength=1)[index]
            if copies.max() > 1:
                shape = [1] * tensor.ndim
                shape[at] = -1
                tensor = tensor / torch.from_numpy(copies).to(tensor.dtype).view(shape)
    return tensor


def _along(tensor: Tensor, at: int, index: np.ndarray) -> Tensor:
    """The positions `index` of dimension `at`: a view where they are evenly spaced."""
    if len(index) == tensor.shape[at] and np.array_equal(index, np.arange(len(index))):
        return tensor
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if step > 0 and (np.diff(index) == step).all():
        return tensor[(slice(None),) * at + (slice(int(index[0]), int(index[-1]) + 1, step),)]
    return tensor[(slice(None),) * at + (torch.from_numpy(np.ascontiguousarray(index)),)]
