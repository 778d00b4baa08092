"""Tables of text."""

from __future__ import annotations


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
