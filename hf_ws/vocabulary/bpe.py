"""Byte-pair encoding, on bytes or on letters, with byte fallback or without."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from hf_ws.errors import PlanError

Pair = tuple[str, str]


def keep(model: Mapping[str, Any], counts: Mapping[int, int], always: Collection[int], size: int) -> set[int]:
    """The ids that stay: while there are more than `size`, the least used token that no other is made of goes.

    Its uses become uses of the two tokens that it was merged from, for these are what its texts are spelled with
    from then on. So what a kept token is made of is kept, down to the single bytes or letters. Of equally rare
    tokens the one with the higher id goes, which was merged later.

    Every text whose tokens are all kept is merged as before: the merges that make a token of it are those that make
    the token alone, they are all kept, and in the same order.

    Args:
        model: The `model` of a `tokenizer.json`.
        counts: Uses of each id in a text.
        always: Ids that stay whatever their count.
        size: Tokens to keep; more stay where fewer could not spell every text.

    Raises:
        PlanError: a kind of BPE that is not supported.
    """
    if model.get("continuing_subword_prefix"):
        raise PlanError(
            f"this tokenizer is a BPE with continuing_subword_prefix={model['continuing_subword_prefix']!r}, whose "
            "merges are not trimmed; leave vocab as it is"
        )
    parts = _parts(model)
    fixed = {*always, *_alphabet(model, parts)}
    used, users = Counter(counts), Counter(part for made_of in parts.values() for part in made_of)
    kept = {*model["vocab"].values(), *always}
    leaves = [(used[i], -i) for i in kept if not users[i] and i not in fixed]
    heapq.heapify(leaves)
    while len(kept) > size and leaves:
        count, negative = heapq.heappop(leaves)
        kept.remove(-negative)
        for part in parts.get(-negative, ()):
            used[part] += count
            users[part] -= 1
            if not users[part] and part not in fixed:
                heapq.heappush(leaves, (used[part], -part))
    return kept


def cut(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The model with these tokens, by old id their new one, and the merges among them."""
    vocab = {token: new[i] for token, i in model["vocab"].items() if i in new}
    merges = [[a, b] for a, b in model["merges"] if a in vocab and b in vocab and a + b in vocab]
    return {**model, "vocab": vocab, "merges": merges}


def _alphabet(model: Mapping[str, Any], parts: Mapping[int, tuple[int, ...]]) -> set[int]:
    """What no merge makes and every text may need: single letters, or only bytes where these stand in for letters."""
    vocab, end = model["vocab"], model.get("end_of_word_suffix") or ""
    unknown = {vocab[model["unk_token"]]} if model.get("unk_token") in vocab else set()
    fallback = {vocab[name] for name in (f"<0x{byte:02X}>" for byte in range(256)) if name in vocab}
    if model.get("byte_fallback") and len(fallback) == 256:
        return fallback | unknown
    letters = {
        i for token, i in vocab.items() if i not in parts and len(token.removesuffix(end) or token) == 1
    }
    return letters | fallback | unknown


def _parts(model: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """The two tokens that are merged last to make each token."""
    vocab, end = model["vocab"], model.get("end_of_word_suffix") or ""
    ranks: dict[Pair, int] = {(a, b): rank for rank, (a, b) in enumerate(model["merges"])}
    ways: dict[str, list[Pair]] = {}
    for pair in ranks:
        ways.setdefault("".join(pair), []).append(pair)
    parts = {}
    for token, pairs in ways.items():
        last = pairs[0] if len(pairs) == 1 else _last_merge(token, ranks, end) or pairs[0]
        parts[vocab[token]] = (vocab[last[0]], vocab[last[1]])
    return parts


def _last_merge(token: str, ranks: Mapping[Pair, int], end: str) -> Pair | None:
    """The merge that completes a token when it is encoded alone; None if it is never reached."""
    symbols = [*token]
    if end and token.endswith(end):
        word = token.removesuffix(end)
        symbols = [*word[:-1], word[-1:] + end]
    last: Pair | None = None
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        last = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))  # the leftmost of the lowest rank
        if last not in ranks:
            return None
        at = pairs.index(last)
        symbols[at : at + 2] = ["".join(last)]
    return last
