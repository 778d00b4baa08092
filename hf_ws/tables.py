"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table of four columns: words, two of numbers, words."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        first, *numbers, last = [
            cell.ljust(w) if i in (0, 3) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join([first, *numbers, last]).rstrip()

    return [line(head), line(["-" * w for w in widths]), *map(line, rows)]


def bytes_each(dtype: Any) -> int:
    """Bytes of a number of a config's dtype; single precision where it names none."""
    return {"float64": 8, "bfloat16": 2, "float16": 2}.get(str(dtype).removeprefix("torch."), 4)


def merged(sums: Sequence[Sequence[str]]) -> str:
    """Says which target layers are sums, given the source layers in each; none where it is one alone."""
    return "".join(f"; {i} is a sum of {', '.join(parts)}" for i, parts in enumerate(sums) if parts)
