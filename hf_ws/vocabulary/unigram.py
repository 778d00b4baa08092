"""Unigram (SentencePiece): of all ways to spell a text the likeliest, pieces being independent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hf_ws.vocabulary.wordpiece import most_used


def keep(model: Mapping[str, Any], counts: Mapping[int, int], always: Collection[int], size: int) -> set[int]:
    """The ids that stay: single letters (or bytes, where these stand in for letters), and the most used pieces.

    A piece with a letter that is no piece itself stays too, and so does the least likely one: what is unknown counts
    as 10 below it. Of equally rare pieces the one with the lower id stays.

    Every text whose pieces are all kept has the same pieces as before: the likeliest of all ways is still there.

    Args:
        model: The `model` of a `tokenizer.json`.
        counts: Uses of each id in a text.
        always: Ids that stay whatever their count.
        size: Pieces to keep; more stay where fewer could not spell every text.
    """
    pieces, scores = [piece for piece, _ in model["vocab"]], [score for _, score in model["vocab"]]
    known = {*pieces}
    spare = {f"<0x{byte:02X}>" for byte in range(256)}
    falls_back = bool(model.get("byte_fallback")) and known >= spare
    fixed = {i for i, piece in enumerate(pieces) if falls_back and piece in spare}
    if not falls_back:
        fixed = {i for i, piece in enumerate(pieces) if len(piece) == 1 or not known >= {*piece}}
    fixed |= {*always, scores.index(min(scores))}
    fixed |= {model["unk_id"]} if model["unk_id"] is not None else set()
    return fixed | most_used({*range(len(pieces))} - fixed, counts, size - len(fixed))


def cut(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The model with these pieces, in their old order; a piece's id is its place."""
    vocab = [entry for i, entry in enumerate(model["vocab"]) if i in new]
    unknown = model["unk_id"]
    return {**model, "vocab": vocab, "unk_id": None if unknown is None else new[unknown]}
