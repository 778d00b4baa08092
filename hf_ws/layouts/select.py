"""One tensor of the target from one tensor of the source: the only place that indexes weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hf_ws.axes import Dim, Layout, Product, Sum, length, positions
from hf_ws.maps import Blocks

Sides = tuple[np.ndarray, np.ndarray]
"""A dense map of an axis: what writes it is multiplied by the first matrix, what reads it by the second; each [target
length, source length]."""


def select(
    tensor: Tensor,
    layout: Layout,
    source: Mapping[str, int],
    target: Mapping[str, int],
    maps: Mapping[str, np.ndarray | Sides | Blocks],
) -> Tensor:
    """The target's tensor: along every dimension, the positions that the maps name, or the sums that they make.

    What the maps copy k times is divided by k where it is read, so that the sum over copies stays what it was
    (Net2Net, 1511.05641, section 3.2). Selection alone copies values bit for bit; dense maps are applied in at least
    single precision.

    Args:
        tensor: The source's tensor, not changed; may be a memory-mapped file.
        layout: Its dimensions.
        source: Sizes of the source's axes.
        target: Sizes of the target's axes.
        maps: By axis, the source index of each target index, the two sides of a dense map, or heads that are mixed.

    Returns:
        A tensor that may be a view of the source: clone it before writing to it.
    """
    for axis, heads in maps.items():
        if isinstance(heads, Blocks):
            (at,) = [at for at, dim in enumerate(layout) if axis in dim.axes]
            tensor = remade(tensor, at, heads)
            source, maps = {**source, axis: target[axis]}, {**maps, axis: np.arange(target[axis])}
    dense = {axis: sides for axis, sides in maps.items() if isinstance(sides, tuple)}
    if dense:
        tensor = _mixed(tensor, layout, source, dense)
        whole = {axis: np.arange(target[axis]) for axis in dense}  # they have the target's length by now
        source, maps = {**source, **{axis: target[axis] for axis in dense}}, {**maps, **whole}
    gathered: dict[int, np.ndarray] = {}
    shares: list[tuple[int, np.ndarray]] = []
    for at, dim in enumerate(layout):
        if not dim.axes:
            continue
        index = positions(dim, source, target, maps)  # type: ignore[arg-type]  # no dense one is left
        if dim.reads and (copies := np.bincount(index)[index]).max() > 1:
            shares.append((at, copies))
        if (step := _step(index)) is None:
            gathered[at] = index
        else:
            tensor = tensor[(slice(None),) * at + (slice(int(index[0]), int(index[-1]) + 1, step),)]
    tensor = _gather(tensor, gathered)
    for at, copies in shares:
        share = torch.from_numpy(copies).to(tensor)
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


def _mixed(tensor: Tensor, layout: Layout, source: Mapping[str, int], dense: Mapping[str, Sides]) -> Tensor:
    """The tensor with its dense axes mapped, one after the other."""
    for at, dim in enumerate(layout):
        for axis in (axis for axis in dim.axes if axis in dense):
            tensor = mix(tensor, at, dim, source, axis, dense[axis][dim.reads])
            source = {**source, axis: len(dense[axis][0])}
        source = {**source, **{axis: sides[0].shape[1] for axis, sides in dense.items()}}
    return tensor


def mix(tensor: Tensor, at: int, dim: Dim, sizes: Mapping[str, int], axis: str, matrix: np.ndarray) -> Tensor:
    """A tensor of which one axis in dimension `at` is multiplied by a matrix [target length, source length].

    Args:
        tensor: In the sizes given.
        at: The dimension.
        dim: What it consists of: the axis, a product with the axis as one factor, or a sum of such and others.
        sizes: Of the axes in `dim`.
        axis: The one that is mapped.
        matrix: What maps it.

    Raises:
        ValueError: the axis is no plain factor.
    """
    if isinstance(dim.expression, Sum):
        parts = [Dim(part, dim.reads) for part in dim.expression.parts]
        split = tensor.split([length(part, sizes) for part in parts], dim=at)
        own = [
            mix(piece, at, part, sizes, axis, matrix) if axis in part.axes else piece
            for piece, part in zip(split, parts, strict=True)
        ]
        return torch.cat(
            [piece.to(torch.promote_types(tensor.dtype, torch.float32)) for piece in own], dim=at
        )
    factors = dim.expression.factors if isinstance(dim.expression, Product) else (dim.expression,)
    if factors.count(axis) != 1:
        raise ValueError(f"{axis} is no plain factor of {dim.expression}; no dense map can be applied to it")
    place = factors.index(axis)
    before, after = (length(Dim(Product(part)), sizes) for part in (factors[:place], factors[place + 1 :]))
    shape = tensor.shape
    parted = tensor.reshape(*shape[:at], before, sizes[axis], after, *shape[at + 1 :])
    return along(parted, at + 1, matrix).reshape(*shape[:at], -1, *shape[at + 1 :])


def along(tensor: Tensor, at: int, matrix: np.ndarray) -> Tensor:
    """A tensor whose dimension `at` is multiplied by a matrix [target length, source length]."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    by = torch.from_numpy(np.ascontiguousarray(matrix)).to(tensor.device, wide)
    return torch.tensordot(by, tensor.to(wide), dims=([1], [at])).movedim(0, at)


def remade(tensor: Tensor, at: int, heads: Blocks) -> Tensor:
    """A tensor whose dimension `at`, heads of some channels each, is made of other heads as `heads` says."""
    channels = heads.blocks.shape[-1]
    moved = tensor.movedim(at, 0).to(torch.promote_types(tensor.dtype, torch.float32))
    parts = moved.reshape(-1, channels, *moved.shape[1:])[list(heads.index)]
    parts = parts.reshape(*heads.blocks.shape[:2], channels, -1)
    made = torch.einsum("tgab,tgbn->tan", torch.from_numpy(heads.blocks).to(parts), parts)
    return made.reshape(-1, *moved.shape[1:]).movedim(0, at)
