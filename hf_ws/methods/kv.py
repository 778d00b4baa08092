"""Key/value heads: fewer by merging neighbours, more by copying.

Heads that share keys and values are groups of neighbours, so merging neighbouring key/value heads, or copying each next
to itself, leaves every query head where it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hf_ws.axes import HEADS, KV_HEADS, Dim, Expression, Product, Sum, kind_of, parse, sibling
from hf_ws.errors import PlanError, SizeError
from hf_ws.maps import Dense, Gather, Merge

if TYPE_CHECKING:
    from hf_ws.methods.request import Request

MERGES = ("mean", "least_squares")
"""How several key/value heads become one."""


def copied(request: Request) -> dict[str, Gather]:
    """The maps of key/value heads that become more, each copied next to itself, and of their query heads: all stay.

    Every query head finds the keys and values that it had, so the function stays.

    Raises:
        SizeError: a number that is no multiple, or fewer query heads at the same time.
    """
    maps: dict[str, Gather] = {}
    for heads, groups in _changed(request):
        before, after = request.before[groups], request.after[groups]
        if after < before:
            continue
        if after % before or request.after[heads] != request.before[heads]:
            raise SizeError(
                f"{groups}={after}: key/value heads become more by copying the source's {before} next to themselves, "
                f"as many times each and under the same query heads; ask for a multiple, and leave {heads} at "
                f"{request.before[heads]}"
            )
        maps[groups] = Gather(tuple(i * before // after for i in range(after)), before)
        maps[heads] = Gather(tuple(range(request.before[heads])), request.before[heads])
    return maps


def merged(request: Request, how: str) -> dict[str, Dense | Merge]:
    """The maps of key/value heads that become fewer, each the sum of its share of neighbours.

    Source: GQA (2305.13245), section 2.1: the mean of the heads that are merged. Heads that were never trained to be
    alike have little in common channel by channel; least squares first finds what they have (`hf_ws.merges`).

    Args:
        request: What is asked.
        how: A name in `MERGES`.

    Raises:
        PlanError: an unknown name, or heads that lie so that they cannot be added up.
        SizeError: a number that does not divide the source's.
    """
    if how not in MERGES:
        raise PlanError(f"kv_merge={how!r} is unknown; known are {', '.join(MERGES)}, or None to select")
    maps: dict[str, Dense | Merge] = {}
    for heads, groups in _changed(request):
        before, after = request.before[groups], request.after[groups]
        if after > before:
            continue
        if before % after:
            legal = [n for n in range(1, before) if before % n == 0]
            raise SizeError(
                f"{groups}={after} is no divisor of the source's {before}: as many heads are merged into each; "
                f"nearest legal: {groups}={min(legal, key=lambda n: abs(n - after))}"
            )
        if how == "least_squares":
            maps |= dict.fromkeys(request.places(groups), Merge(after, before))
            continue
        for name, text in request.certificate.layouts.items():
            if any(groups in dim.axes and not _apart(dim.expression, heads, groups) for dim in parse(text)):
                raise PlanError(
                    f"{name} ({text}) stores key/value heads among their query heads, and they cannot be merged there; "
                    "leave out kv_merge to select them"
                )
        shares = np.kron(
            np.eye(after), np.ones((1, before // after))
        )  # whose turn it is to be read is all of them's
        maps[groups] = Dense(
            shares * after / before, shares, by=f"means of {before // after} neighbours of the"
        )
    return maps


def _changed(request: Request) -> list[tuple[str, str]]:
    """The axes of query and of key/value heads, where the latter change although they are not the former."""
    return [
        (heads, groups)
        for heads in request.axes
        if kind_of(heads) == HEADS and (groups := sibling(heads, KV_HEADS)) in request.certificate.occurring
        if request.before[groups] != request.after[groups]
    ]


def _apart(expression: Expression, heads: str, groups: str) -> bool:
    """Whether key/value heads are a plain factor of every part that they occur in, with no query heads in it."""
    if isinstance(expression, Sum):
        return all(_apart(part, heads, groups) for part in expression.parts if groups in Dim(part).axes)
    factors = expression.factors if isinstance(expression, Product) else (expression,)
    return groups in factors and heads not in Dim(expression).axes
