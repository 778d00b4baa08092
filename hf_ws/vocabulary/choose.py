"""Which tokens stay, by how often a text uses them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_ws.axes import VOCAB, kind_of
from hf_ws.errors import CalibrationError, PlanError, SizeError
from hf_ws.plan import Gather, Plan
from hf_ws.sizes import nodes, sizes_of
from hf_ws.vocabulary.ids import renumbered, token_ids
from hf_ws.vocabulary.rewrite import read, with_ids

logger = logging.getLogger(__name__)

BY_COUNT = "corpus counts"
"""What a plan says of a vocabulary that was chosen here (`Gather.by`)."""

FOLLOWS = "per_layer.vocab"
"""A table that is asked for the same ids (Gemma 3n), if perhaps not for the last of them."""

_BATCH = 64  # texts tokenised in one call


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a smaller model knows; `AutoSubclone.from_pretrained(..., vocab=this)` makes it."""

    kept: tuple[int, ...]
    """The source's id of each new id, ascending."""
    size: int
    """How many ids the source has."""
    used: int = 0
    """Of the counted text's tokens, how many distinct there were."""
    coverage: float = 1.0
    """The share of the counted text's tokens that are kept; the rest takes several each."""

    def __post_init__(self) -> None:
        kept = np.asarray(self.kept)
        if not len(kept) or kept[0] < 0 or kept[-1] >= self.size or (np.diff(kept) <= 0).any():
            raise PlanError(
                f"a vocabulary's kept ids must ascend within 0 to {self.size - 1}, and be at least one"
            )

    def __len__(self) -> int:
        return len(self.kept)

    def sizes(self, config: PreTrainedConfig) -> dict[str, int]:
        """The lengths that the axes of a source's config get.

        Raises:
            PlanError: a source of another vocabulary, or with several.
        """
        found = sizes_of(config)
        others = [axis for axis in found if kind_of(axis) == VOCAB and axis not in (VOCAB, FOLLOWS)]
        if found.get(VOCAB) != self.size:
            raise PlanError(
                f"this vocabulary was chosen among {self.size} ids, but the source's vocab is {found.get(VOCAB)}; "
                "choose it anew with the source's own tokenizer and config"
            )
        if others or any(hasattr(node, "vocabulary_map") for _, node in nodes(config)):
            more = ", ".join(others) or "vocabulary_map, which gives ids to pictures"
            raise PlanError(
                f"{type(config).__name__} has more than one vocabulary ({more}), and none is trimmed alone"
            )
        sizes = {VOCAB: len(self.kept)}
        if FOLLOWS in found:
            sizes[FOLLOWS] = int(np.searchsorted(self.kept, found[FOLLOWS]))
        return sizes

    def fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The fields of a source's config that name token ids, with the new ones, sub-configs before a dot."""
        new = {old: i for i, old in enumerate(self.kept)}
        return {
            ".".join((*path, name)): value
            for path, node in nodes(config)
            for name, value in renumbered(node.to_dict(), new).items()
        }


def choose_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    size: int,
    *,
    config: PreTrainedConfig | None = None,
    generation_config: Any = None,
) -> Vocabulary:
    """The tokens to keep for texts like these, `size` in all.

    Special and added tokens stay, what a config names, and what it takes to spell any text: single bytes or letters,
    and what kept tokens are merged from. The rest goes by how often these texts use it. What they do not use at all
    fills up by its id, which in most tokenizers goes by how common it was in the text that they were made on.

    Args:
        tokenizer: The source's.
        texts: As many as there are; a few million tokens for a vocabulary of some thousands.
        size: Rows of the new token embedding.
        config: The source's, for a vocabulary that is longer than the tokenizer knows, and for the ids it names.
        generation_config: The source's, for the ids it names.

    Raises:
        PlanError: a tokenizer that cannot be trimmed.
        SizeError: more tokens than the source has, or fewer than must stay.
        CalibrationError: no text.
    """
    values, algorithm = read(tokenizer)
    own = tokenizer.get_vocab()
    rows = max(own.values()) + 1 if config is None else sizes_of(config)[VOCAB]
    if (highest := max(own.values())) >= rows:
        raise PlanError(
            f"the tokenizer gives ids up to {highest}, the model has {rows}; give those that go together"
        )
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= rows:
        raise SizeError(f"vocab={size!r}: wanted is a whole number from 1 to the source's {rows}")
    counts = _counts(tokenizer, texts)
    always: set[int] = {*tokenizer.all_special_ids}
    with_ids(values, lambda i: always.add(i) or i)  # type: ignore[func-returns-value]
    for node in () if config is None else (node for _, node in nodes(config)):
        always |= token_ids(node.to_dict())
    always |= token_ids(generation_config.to_dict()) if generation_config is not None else set()
    kept = algorithm.keep(values["model"], counts, {i for i in always if i < rows}, size)
    if len(kept) > size:
        raise SizeError(
            f"vocab={size} is too few: {len(kept)} tokens must stay (special and added ones, single letters or bytes, "
            f"and what these are made of); ask for at least that"
        )
    spare = (i for i in range(rows) if i not in kept)
    kept |= {i for i, _ in zip(spare, range(size - len(kept)), strict=False)}  # rows without a token
    total = sum(counts.values())
    covered = sum(count for i, count in counts.items() if i in kept)
    return Vocabulary(tuple(sorted(kept)), rows, len(counts), covered / total)


def kept_tokens(plan: Plan) -> tuple[int, ...] | None:
    """The ids that a plan keeps because they were chosen here; None where the tokenizer stays as it is."""
    found = plan.maps.get(VOCAB)
    return found.index if isinstance(found, Gather) and found.by == BY_COUNT else None


def warn_of_first_ids(size: int | None, source: int | None) -> None:
    """Say what a bare number of tokens does, and what to do instead; None where nothing is asked, or known."""
    if size is not None and source is not None and size < source:
        logger.warning(
            "vocab=%d keeps the first ids, and the tokenizer stays as it is; to keep the tokens that a text uses, with "
            "the tokenizer rewritten to match, give vocab=choose_vocabulary(tokenizer, texts, %d), or `hf-ws "
            "trim-vocab` the source first",
            size,
            size,
        )


def _counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Mapping[int, int]:
    """How often the texts use each id, special tokens around a text left out."""
    if isinstance(texts, str):
        texts = [texts]
    texts = list(texts)
    if wrong := next((text for text in texts if not isinstance(text, str)), None):
        raise CalibrationError(f"a {type(wrong).__name__} came to choose a vocabulary by; wanted are texts")
    total = np.zeros(1, dtype=np.int64)
    for begin in tqdm(range(0, len(texts), _BATCH), desc="counting", delay=2):
        rows = tokenizer(texts[begin : begin + _BATCH], add_special_tokens=False, verbose=False)["input_ids"]
        found = np.bincount(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
        longer = max(len(total), len(found))
        total = np.pad(total, (0, longer - len(total))) + np.pad(found, (0, longer - len(found)))
    if not total.any():
        raise CalibrationError(
            "the texts to choose a vocabulary by hold no tokens; give some that the model is for"
        )
    return {int(i): int(total[i]) for i in np.flatnonzero(total)}
