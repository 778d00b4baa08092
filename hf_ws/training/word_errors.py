"""Word error rate: how many words of a text would have to be changed, put in or taken out, for each it should have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """The rate over all pairs of what was written and what was said; above 1 where much too much was written.

    Words are what spaces part, as they are written: case and punctuation count.
    """
    edits = words = 0
    for written, said in pairs:
        edits += distance(written.split(), said.split())
        words += len(said.split())
    return edits / max(words, 1)


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The least number of replacements, insertions and deletions between two sequences (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, word in enumerate(one, start=1):
        before, row = row, [number]
        for at, target in enumerate(other, start=1):
            row.append(min(before[at] + 1, row[-1] + 1, before[at - 1] + (word != target)))
    return row[-1]
