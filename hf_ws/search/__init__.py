"""Search: `params="125M"` or `ratio=0.4` in place of sizes.

The legal shapes within a tenth of the goal are listed from the config, nearest first (`shapes.distance`: parameters,
and the source's proportions of width, depth and feed-forward block). Of these the nearest with each number of layers
are planned, those within a twentieth unless they are few. Without calibration data the nearest is taken; with it, each
start is made and scored on the part of the data that its statistics have not seen, and the best is taken. The plan
keeps the table.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tqdm import tqdm

from hf_ws.errors import SizeError
from hf_ws.plan import Plan
from hf_ws.search.goal import Goal
from hf_ws.search.score import measure_of, parted, score
from hf_ws.search.shapes import CLOSE, Shape, Space, distance
from hf_ws.search.table import BY_DISTANCE, record, table

logger = logging.getLogger(__name__)

CANDIDATES, FEW = 8, 3
"""Shapes that are planned at most; and as few as that, shapes further from the goal than a twentieth join them."""

__all__ = [
    "CANDIDATES",
    "Goal",
    "Shape",
    "Space",
    "candidates",
    "measure_of",
    "nearest",
    "parted",
    "score",
    "search",
    "table",
]


def nearest(shapes: Sequence[Shape], count: int) -> list[Shape]:
    """The nearest shape of each number of layers, `count` at most; then, if these are fewer, the nearest others."""
    first: dict[tuple[int, ...], Shape] = {}
    for shape in shapes:
        depth = tuple(size for axis, size in shape.asked.items() if axis.endswith("layers"))
        first.setdefault(depth, shape)
    chosen = list(first.values())[:count]
    others = [shape for shape in shapes if shape not in chosen]
    return sorted([*chosen, *others[: count - len(chosen)]], key=lambda shape: shape.distance)


def candidates(
    space: Space, goal: Goal, planned: Callable[[Shape], Plan], count: int = CANDIDATES
) -> list[Plan]:
    """Plans of the shapes nearest a goal, nearest first, whose methods can carry them out.

    Args:
        space: What may be searched.
        goal: How many parameters.
        planned: The plan of a shape; may raise SizeError for one that this method or class refuses.
        count: Plans at most.

    Raises:
        SizeError: no shape near the goal, or none that can be planned; then what was wrong with the first.
    """
    made: list[Plan] = []
    wrong: SizeError | None = None
    wanted, shapes = goal.wanted(space.parameters), space.near(goal)
    close = [shape for shape in shapes if abs(math.log(shape.parameters / wanted)) <= CLOSE]
    bar = tqdm(total=count, desc="planning shapes", unit=" shapes", delay=2, leave=False)
    tried: list[Shape] = []
    for near in (close, shapes):
        first = nearest(near, count)
        for shape in [*first, *(shape for shape in near if shape not in first)][: 4 * count]:
            if len(made) == count or shape in tried:
                continue
            tried.append(shape)
            try:
                made.append(planned(shape))
                bar.update()
            except SizeError as error:
                wrong = wrong or error
        if len(made) >= min(FEW, count):
            break
    bar.close()
    if not made and wrong is not None:
        raise wrong
    return sorted(made, key=lambda p: distance(p.source_sizes, p.target_sizes, p.parameters[1], wanted))


def search(
    space: Space,
    goal: Goal,
    planned: Callable[[Shape], Plan],
    scored: Callable[[Plan], tuple[Plan, float]] | None = None,
    by: str = "",
) -> Plan:
    """The plan of the best shape near a goal; the table goes to the log, and into the plan.

    Args:
        space: What may be searched.
        goal: How many parameters.
        planned: As in `candidates`.
        scored: A plan settled, and how good its start is (the less the better); without it, the nearest shape is taken.
        by: What the score is, in a few words.

    Raises:
        SizeError: as `candidates`.
    """
    plans, scores = candidates(space, goal, planned), []
    if scored is None:
        chosen, by = 0, BY_DISTANCE
    else:
        for i, plan in enumerate(tqdm(plans, desc="scoring starts", unit=" starts", leave=False)):
            plans[i], value = scored(plan)
            scores.append(value if math.isfinite(value) else math.inf)
        chosen = min(range(len(plans)), key=lambda i: (scores[i], i))
    found = record(goal, goal.wanted(space.parameters), plans, chosen, by, scores)
    logger.info("shapes near %s:\n%s", goal, table(found))
    return replace(plans[chosen], search=found)
