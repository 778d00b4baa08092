"""Merge the layers that turn the residual stream least into the one before them."""

from __future__ import annotations

from hf_ws.depth.block_influence import block_influence
from hf_ws.depth.context import Context
from hf_ws.depth.kept import Kept, merged


def merge_neighbours(depth: int, keep: int, context: Context) -> Kept:
    """The first layer and those that turn the stream most; each takes in the layers up to the next.

    A layer l that takes in m others has the weights theta_l + sum over k of (theta_{l+k} - theta_l), k = 1 to m: what
    each of them differs by from l is added to l.

    Source: LaCo (2402.11187), section 3. There a run is merged where the output stays nearly the same, from the top
    down; here, where the number of layers is given, it is block influence (2403.03853) that says where runs begin.

    Raises:
        CalibrationError: a layer whose input and output cannot be compared.
    """
    influential = [layer for layer in block_influence(depth, keep, context) if layer]
    by_influence = sorted(
        influential, key=lambda layer: (context.evidence.similarity[context.key(layer)], layer)
    )
    starts = sorted([0, *by_influence[: keep - 1]])
    blends = {}
    for target, (start, end) in enumerate(zip(starts, [*starts[1:], depth], strict=True)):
        others = range(start + 1, end)
        if others:
            blends[target] = {start: 1.0 - len(others)} | dict.fromkeys(others, 1.0)
    return merged(starts, blends)


merge_neighbours.wants = ("similarity",)  # type: ignore[attr-defined]
