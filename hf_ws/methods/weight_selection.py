"""Weight selection: keep evenly spaced indices of every axis, and the first layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from hf_ws.axes import HEADS, KV_HEADS, kind_of, sibling
from hf_ws.errors import PlanError
from hf_ws.methods.request import Request
from hf_ws.plan import AxisMap, Gather, Plan

Choose = Callable[[int, int], np.ndarray]
"""Of `size` indices the `keep` to keep, ascending."""


def weight_selection(
    request: Request,
    *,
    selection: Literal["uniform", "consecutive", "random"] = "uniform",
    consistent: bool = True,
) -> Plan:
    """The same indices of an axis everywhere; no data, no rescaling.

    Source: Weight Selection (2311.18823), section 3, and its reference code. The differences: heads are kept whole
    with their kv head (the code blends neighbouring heads), and fused tensors are split before selecting. Heads
    with ALiBi slopes are not spaced evenly: those are kept whose slopes the target has. A language model's head is
    selected like the embedding; a classifier whose labels change is fresh.

    Args:
        request: What is asked.
        selection: Which indices: evenly spaced, the first ones, or drawn from the seed.
        consistent: With `random`, one draw for an axis; False draws again for each parameter, as in the paper's
            ablation, where it is clearly worse.

    Raises:
        PlanError: an unknown selection, or inconsistency without `random`.
        SizeError: query heads that no selection of whole kv groups gives.
    """
    rng = np.random.default_rng(request.seed)
    choosers: dict[str, Choose] = {
        "uniform": uniform,
        "consecutive": lambda size, keep: np.arange(keep),
        "random": lambda size, keep: np.sort(rng.permutation(size)[:keep]),
    }
    if selection not in choosers:
        raise PlanError(f"selection={selection!r} is unknown; known are {', '.join(choosers)}")
    if not consistent and selection != "random":
        raise PlanError(f"consistent=False goes with selection='random', not {selection!r}")
    request.check_heads()
    fixed = request.fixed_maps()
    maps = _maps(request, choosers[selection]) | fixed
    if not consistent:
        for name, *_ in request.certificate.spelled(request.layers):
            own = _maps(request, choosers["random"])
            maps |= {f"{axis}@{name}": axis_map for axis, axis_map in own.items() if axis not in fixed}
    return request.plan(maps)


def uniform(size: int, keep: int) -> np.ndarray:
    """Evenly spaced indices [keep]: every (size / keep)-th when that is whole, else spread over both ends."""
    if size % keep == 0:
        return np.arange(keep) * (size // keep)
    return np.round(np.linspace(0, size - 1, keep)).astype(np.int64)


def _maps(request: Request, choose: Choose) -> dict[str, AxisMap]:
    before, after = request.before, request.after
    maps: dict[str, AxisMap] = {}
    for axis in request.axes:
        if kind_of(axis) == KV_HEADS:
            continue
        if kind_of(axis) != HEADS:
            if after[axis] <= before[axis]:
                maps[axis] = Gather(tuple(choose(before[axis], after[axis]).tolist()), before[axis])
            continue
        kv_heads = sibling(axis, KV_HEADS)
        width, keep = before[axis] // before[kv_heads], after[axis] // after[kv_heads]
        groups, inside = choose(before[kv_heads], after[kv_heads]), choose(width, keep)
        maps[kv_heads] = Gather(tuple(groups.tolist()), before[kv_heads])
        maps[axis] = Gather(tuple((groups[:, None] * width + inside).ravel().tolist()), before[axis])
    return maps
