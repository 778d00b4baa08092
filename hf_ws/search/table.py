"""What a search found, as rows that a plan keeps and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_ws.axes import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS
from hf_ws.plan import Plan
from hf_ws.search.goal import Goal
from hf_ws.search.shapes import distance, own_axes

BY_DISTANCE = "the nearest to the goal and to the source's proportions"


def record(
    goal: Goal, wanted: int, plans: Sequence[Plan], chosen: int, by: str, scores: Sequence[float] = ()
) -> dict[str, Any]:
    """What `Plan.search` holds: the goal, what decided, and a row for each shape."""
    rows: list[dict[str, Any]] = []
    for i, plan in enumerate(plans):
        row = {"parameters": plan.parameters[1], "sizes": shown_sizes(plan.target_sizes)}
        row["distance"] = round(distance(plan.source_sizes, plan.target_sizes, plan.parameters[1], wanted), 4)
        if scores:
            row["score"] = scores[i] if math.isfinite(scores[i]) else None
        rows.append(row)
    return {"goal": str(goal), "wanted": wanted, "by": by, "chosen": chosen, "shapes": rows}


def shown_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of the text part that tell a shape."""
    kinds = (HIDDEN, LAYERS, HEADS, KV_HEADS, FFN)
    return {axis: sizes[axis] for kind in kinds for axis in own_axes(sizes, kind)}


def table(search: Mapping[str, Any]) -> str:
    """The shapes of a search, a line each, the chosen one marked; "" for a plan whose sizes were given."""
    if not search:
        return ""
    rows = search["shapes"]
    scored = "score" in rows[0]
    head = ["", "parameters", *rows[0]["sizes"], "distance", *(["score"] if scored else [])]
    lines = [head]
    for i, row in enumerate(rows):
        cells = ["*" if i == search["chosen"] else "", f"{row['parameters']:,}"]
        cells += [f"{size:,}" for size in row["sizes"].values()] + [f"{row['distance']:.3f}"]
        lines.append(cells + (["-" if row["score"] is None else f"{row['score']:.4f}"] if scored else []))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return f"{text}\n\n{search['goal']}: {search['wanted']:,} parameters wanted. * by {search['by']}."
