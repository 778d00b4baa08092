"""Text in, blocks of token ids out.

    train_texts, held_out = split_held_out(load_text("stdlib"))
    blocks = pack(train_texts, tokenizer, block=512)

Texts are joined end to end with an end-of-text token after each and cut into blocks of one length, so no
position is padding. Which texts are held out follows from a hash, never from an order or a random state.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from hf_ws.errors import DataError
from hf_ws.training.texts import Document, load_text, text_files
from hf_ws.training.vocabularies import print_of_tokenizer

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Document", "Packed", "check_ids", "is_held_out", "load_text", "pack", "split_held_out", "text_files",
    "warn_of_repeats",
]  # fmt: skip

logger = logging.getLogger(__name__)

ONE_IN = 20
"""One document in so many is held out."""

_BATCH = 64  # texts tokenised in one call: enough for the tokenizer's threads, few enough for a lively bar
_CHARACTERS = 2**21  # in one call: the ids come back as Python's numbers, which take 36 bytes each


@dataclass(frozen=True)
class Packed:
    """Blocks of token ids.

    `dataset` has the columns `input_ids` and `labels`, each [block] long; the first label of a block is -100,
    for nothing in the block predicts it. `bytes_per_token` is the UTF-8 length of the texts over the number
    of their tokens, end-of-text tokens included, as the loss includes them.
    """

    dataset: datasets.Dataset
    bytes_per_token: float
    tokens: int
    dropped_tokens: int
    dropped_texts: int
    tokenizer: str | None = None
    """The fingerprint of the tokenizer's map from token to id."""

    def __len__(self) -> int:
        return len(self.dataset)


def is_held_out(name: str, one_in: int = ONE_IN) -> bool:
    """Whether the document of this name is held out: whether the hash of the name is a multiple of `one_in`."""
    return _hash(name) % one_in == 0


def split_held_out(documents: list[Document], one_in: int = ONE_IN) -> tuple[list[Document], list[Document]]:
    """The documents to train on, and those held out: the ones whose name's hash is a multiple of `one_in`.

    So a document stays on its side whatever else is there. Where that leaves a side empty (one long file),
    each document is cut instead, at a line's end, and its last part is held out.
    """
    held_out = [is_held_out(document.name, one_in) for document in documents]
    if any(held_out) and not all(held_out):
        chosen = list(zip(documents, held_out, strict=True))
        return [document for document, held in chosen if not held], [
            document for document, held in chosen if held
        ]
    heads, tails = [], []
    for document in documents:
        cut = document.text.rfind("\n", 0, len(document.text) * (one_in - 1) // one_in) + 1
        cut = cut or len(document.text) * (one_in - 1) // one_in
        heads.append(Document(document.name, document.text[:cut]))
        tails.append(Document(document.name, document.text[cut:]))
    return heads, tails


def warn_of_repeats(train: list[Document], held_out: list[Document], share: float = 1e-3) -> None:
    """Log how many texts come more than once, and how many held-out texts are trained on too.

    A share of the characters up to `share` is let pass: a few licences or modules of one line are in every corpus.
    """
    ours, theirs = (
        [_hash(document.text.strip()) for document in documents] for documents in (train, held_out)
    )
    trained = set(ours)
    for name, documents, repeated, what in (
        ("training", train, _seen_before(ours), "come more than once"),
        ("held-out", held_out, _seen_before(theirs), "come more than once"),
        ("held-out", held_out, [mark in trained for mark in theirs], "are in the training text too"),
    ):
        sizes = [len(document.text.strip()) for document in documents]
        found = [size for size, again in zip(sizes, repeated, strict=True) if again and size]
        if sum(found) > share * sum(sizes):
            part = 100 * sum(found) / sum(sizes)
            logger.warning(
                "%d of %d %s texts (%.1f %% of the characters) %s",
                len(found),
                len(documents),
                name,
                part,
                what,
            )


def _seen_before(marks: list[int]) -> list[bool]:
    first = {mark: at for at, mark in reversed(list(enumerate(marks)))}
    return [first[mark] != at for at, mark in enumerate(marks)]


def pack(
    texts: Iterable[str | Document],
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    *,
    apart: bool = False,
    progress: bool = True,
) -> Packed:
    """Tokenise the texts and lay them end to end in blocks of `block` tokens; drop and count the remainder.

    A progress bar appears when this takes over two seconds.

    Args:
        texts: What to pack; those without text are left out and counted.
        tokenizer: With an end-of-text token, which follows every text.
        block: Tokens in a block.
        apart: Add `position_ids` that begin anew with each text (and each block), by which Transformers keeps a token
            from attending to another text.
        progress: Show the bar.

    Raises:
        DataError: No text, less than one block, or a tokenizer without an end-of-text token.
    """
    if block < 2:
        raise DataError(f"block={block}; a block needs at least 2 tokens, one to predict the next from")
    end = end_of_text(tokenizer)
    contents = [text.text if isinstance(text, Document) else text for text in texts]
    kept = [text for text in contents if text.strip()]
    if not kept:
        raise DataError(f"{len(contents)} texts came and none has any text; give some to train on")
    pieces, size = [], 0
    bar = tqdm(total=len(kept), desc="tokenising", unit=" texts", delay=2, disable=not progress)
    for one, length in tokenised(kept, tokenizer, end):
        pieces.append(one)
        size += length
        bar.update()
    bar.close()
    ids = np.concatenate(pieces)
    if len(ids) < block:
        raise DataError(
            f"{len(kept)} texts of {len(ids)} tokens came, less than one block of {block}; give more text"
        )
    whole = ids[: len(ids) // block * block].reshape(-1, block)
    labels = whole.copy()
    labels[:, 0] = -100
    columns = {"input_ids": whole, "labels": labels}
    if apart:
        positions = _positions([len(piece) for piece in pieces], block)
        columns["position_ids"] = positions[: whole.size].reshape(-1, block)
    dropped = len(ids) - whole.size, len(contents) - len(kept)
    return Packed(blocks_of(columns), size / len(ids), whole.size, *dropped, print_of_tokenizer(tokenizer))


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that parts texts. Raises DataError where the tokenizer has none."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-text token; set `tokenizer.eos_token` to part the texts")
    return int(end)


def tokenised(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The ids of every text, `end` after them, and how many bytes of UTF-8 it has."""
    start = 0
    while start < len(texts):
        stop, characters = start, 0
        while stop < min(start + _BATCH, len(texts)) and characters < _CHARACTERS:
            characters += len(texts[stop])
            stop += 1
        # A lone surrogate has no UTF-8 form and would stop the tokenizer.
        raw = [text.encode("utf-8", "replace") for text in texts[start:stop]]
        encoded = tokenizer([one.decode() for one in raw], add_special_tokens=False, verbose=False)
        for one, ids in zip(raw, encoded["input_ids"], strict=True):
            yield np.array([*ids, end], dtype=np.int32), len(one)
        start = stop


def blocks_of(columns: dict[str, np.ndarray]) -> datasets.Dataset:
    """Columns of ids [blocks, block] as a dataset that gives tensors."""
    import datasets

    # int32 halves the memory; the torch format gives int64 back, as embeddings want.
    length = next(iter(columns.values())).shape[1]
    column = datasets.Sequence(datasets.Value("int32"), length=length)
    features = datasets.Features(dict.fromkeys(columns, column))
    return datasets.Dataset.from_dict(columns, features=features).with_format("torch")


def _positions(lengths: list[int], block: int) -> np.ndarray:
    """The place of every token in its text, or in its block where the text began before that."""
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    every = np.arange(len(starts), dtype=np.int32)
    return np.minimum(every - starts, every % block).astype(np.int32)


def check_ids(blocks: datasets.Dataset, vocabulary: int, whose: str = "the model's vocabulary") -> None:
    """Refuse blocks with a token id that the model has no embedding for.

    Raises:
        DataError: Naming the first such block and id.
    """
    row = 0
    for batch in blocks.with_format("numpy").iter(1000):
        for name in ("input_ids", "target"):
            rows = [np.asarray(ids) for ids in batch.get(name, ())]  # of one length, or not
            ids = np.concatenate(rows) if rows else np.zeros(0)
            wrong = (ids < 0) | (ids >= vocabulary)
            if wrong.any():
                at = int(np.repeat(np.arange(len(rows)), [len(one) for one in rows])[wrong.argmax()])
                raise DataError(
                    f"row {row + at} holds token id {ids[wrong][0]}, but {whose} has {vocabulary}; tokenise with the "
                    "model's own tokenizer"
                )
        row += len(next(iter(batch.values())))


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode("utf-8", "replace")).hexdigest(), 16)
