"""WordPiece: of each word the longest piece that is known, then the longest of the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def keep(model: Mapping[str, Any], counts: Mapping[int, int], always: Collection[int], size: int) -> set[int]:
    """The ids that stay: single letters, at a word's begin and inside it, and the most used pieces.

    A piece with a letter that is no piece itself stays too, for nothing else could spell it. Of equally rare pieces
    the one with the lower id stays.

    Every text whose pieces are all kept has the same pieces as before: the longest of all is the longest of some.

    Args:
        model: The `model` of a `tokenizer.json`.
        counts: Uses of each id in a text.
        always: Ids that stay whatever their count.
        size: Pieces to keep; more stay where fewer could not spell every text.
    """
    vocab, prefix = model["vocab"], model["continuing_subword_prefix"]

    def letters(piece: str) -> list[str]:
        first, *rest = [*(piece.removeprefix(prefix) or piece)]
        return [
            prefix + first if piece != prefix and piece.startswith(prefix) else first,
            *(prefix + c for c in rest),
        ]

    spelled = {piece: letters(piece) for piece in vocab if piece}
    fixed = {vocab[piece] for piece, own in spelled.items() if len(own) == 1 or not vocab.keys() >= {*own}}
    fixed |= {*always, *(i for piece, i in vocab.items() if piece == model["unk_token"])}
    return fixed | most_used({*vocab.values()} - fixed, counts, size - len(fixed))


def cut(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The model with these pieces, by old id their new one."""
    return {**model, "vocab": {piece: new[i] for piece, i in model["vocab"].items() if i in new}}


def most_used(ids: Collection[int], counts: Mapping[int, int], number: int) -> set[int]:
    """So many of these ids, those with the highest counts, then those with the lowest ids."""
    return {*sorted(ids, key=lambda i: (-counts.get(i, 0), i))[: max(0, number)]}
