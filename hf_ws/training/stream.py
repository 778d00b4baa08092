"""Text that is read while it is trained on: from the Hub, or from files too large for memory.

    stream = Stream((Source.of_hub("owner/name"),), tokenizer, block=512)
    blocks = stream.blocks()
    row, state = next(blocks), blocks.state()
    stream.blocks(state)  # goes on after that row

A state is a few numbers: where in the source the current window of texts begins, in the words of `datasets`' own
`state_dict`; which text of the window is next; how many of its tokens are taken. All that follows is made again from
these and the seed. The shuffle buffer of `datasets` forgets what it holds when it is resumed, so texts are shuffled
here: window after window, each of which can be read again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hf_ws.errors import DataError, HfWsError
from hf_ws.training.data import blocks_of, end_of_text, is_held_out, tokenised
from hf_ws.training.texts import BadRows, Document, document_of, from_hub, named_files, read_file

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WAITS = (1.0, 5.0, 25.0)
"""Seconds before a source that broke off is opened again."""

_LONGEST = 2**20  # characters of a file that is one text; longer ones come in pieces
_WINDOW = 2**26  # characters of a window at most, however few texts they are
_SHARDS = 256  # groups that files are read in, at most: what is opened for a group grows with their number
_CHARACTERS = 8  # a token has hardly more, so as many held-out characters a token are enough


@dataclass(frozen=True)
class Source:
    """Rows that are read one after the other, and what their text is called."""

    name: str
    rows: datasets.IterableDataset
    column: str = "text"
    bad: BadRows = field(default_factory=BadRows)
    weight: float = 1.0

    @classmethod
    def of_files(
        cls, paths: Sequence[str], column: str = "text", *, skip_bad: bool = False, weight: float = 1.0
    ) -> Self:
        """The documents of files, folders and globs, as `text_files` names them; long plain files in pieces.

        Raises:
            DataError: A path that does not exist, or holds no such file.
        """
        import datasets

        files = [(name, str(file)) for name, file in named_files(paths)]
        count = min(len(files), _SHARDS)
        groups = [files[i * len(files) // count : (i + 1) * len(files) // count] for i in range(count)]
        rows = datasets.IterableDataset.from_generator(
            _documents, gen_kwargs={"groups": groups, "column": column, "skip_bad": skip_bad}
        )
        return cls(", ".join(paths), rows, weight=weight)

    @classmethod
    def of_hub(
        cls,
        name: str,
        column: str = "text",
        *,
        split: str = "train",
        config_name: str | None = None,
        skip_bad: bool = False,
        weight: float = 1.0,
    ) -> Self:
        """A dataset of the Hub, of which nothing is kept on disk. Raises DataError."""
        rows = from_hub(name, split, config_name, streaming=True)
        return cls(f"dataset {name}", rows, column, BadRows(skip_bad), weight)

    def shard(self, number: int) -> datasets.IterableDataset:
        """One of the `rows.num_shards` parts that are read each on its own."""
        return self.rows.shard(num_shards=self.rows.num_shards, index=number)

    def document(self, row: dict[str, Any]) -> Document | None:
        """The text of a row; None for a bad one that is to be skipped. Raises DataError."""
        if row.keys() == {"name", "text"}:  # of files
            return Document(**row)
        return document_of(row, self.name, self.column, self.bad)


def _documents(groups: list[list[tuple[str, str]]], column: str, skip_bad: bool) -> Iterator[dict[str, str]]:
    bad = BadRows(skip_bad)
    for name, file in (one for group in groups for one in group):
        for document in read_file(name, Path(file), column, bad, _LONGEST):
            yield {"name": document.name, "text": document.text}
    bad.report()


def behind(shares: Sequence[float], taken: Sequence[int]) -> int:
    """Which source is furthest behind its share of what has been taken, and so comes next."""
    return int(np.argmax(np.asarray(shares) * (sum(taken) + 1) - np.asarray(taken)))


@dataclass(frozen=True)
class Stream:
    """Blocks of tokens without end: round after round over each source, a text of which comes once a round.

    Args:
        sources: Taken by weight: whichever is furthest behind comes next.
        tokenizer: With an end-of-text token.
        block: Tokens in a block.
        window: Texts that are shuffled among each other; 1 for the order as it comes.
        seed: Of the shuffling.
        apart: Whether blocks say where their documents begin (see `pack`).
        holds_out: Whether the texts that the hash holds out are left out.
        vocabulary: Ids that the model has.
    """

    sources: tuple[Source, ...]
    tokenizer: PreTrainedTokenizerBase
    block: int
    window: int = 10_000
    seed: int = 0
    apart: bool = False
    holds_out: bool = True
    vocabulary: int = 2**31

    def blocks(self, state: dict[str, Any] | None = None) -> Blocks:
        """The blocks from the start, or from a state on."""
        return Blocks(self, state)

    def sample(self, count: int) -> datasets.Dataset:
        """The first blocks as rows in memory: so many, or fewer where every source ends before.

        Raises:
            DataError: The sources have no text, or less than one block.
        """
        blocks = self.blocks()
        rows: list[dict[str, np.ndarray]] = []
        while len(rows) < count:
            row = next(blocks)
            if min(part.place["round"] for part in blocks.parts) > 0:
                break
            rows.append(row)
        if not rows:
            names = ", ".join(source.name for source in self.sources)
            raise DataError(f"{names}: less text than one block of {self.block} tokens; give more text")
        return blocks_of({name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def held_out(self, tokens: int) -> list[Document]:
        """Enough held-out texts for so many tokens, from the beginning of every source.

        Raises:
            DataError: A source has none.
        """
        return [
            document
            for source in self.sources
            for document in self._held_out(source, tokens * _CHARACTERS // len(self.sources))
        ]

    def _held_out(self, source: Source, characters: int) -> list[Document]:
        found: list[Document] = []
        for row in source.rows:
            document = source.document(row)
            if document and document.text.strip() and (not self.holds_out or is_held_out(document.name)):
                found.append(document)
                characters -= len(document.text)
                if characters <= 0:
                    break
        if not found:
            raise DataError(f"{source.name}: too few texts to hold some out; give more, or name eval_files")
        return found


class Blocks(Iterator[dict[str, np.ndarray]]):
    """The blocks of a stream, one after the other: `input_ids`, `labels`, `position_ids` if asked for, each [block]."""

    def __init__(self, stream: Stream, state: dict[str, Any] | None = None) -> None:
        state = state or {"taken": [0] * len(stream.sources), "parts": [None] * len(stream.sources)}
        total = sum(source.weight for source in stream.sources)
        self.shares = [source.weight / total for source in stream.sources]
        self.taken = list(state["taken"])
        self.parts = [
            _Part(stream, number, part)
            for number, part in zip(range(len(self.taken)), state["parts"], strict=True)
        ]

    def __next__(self) -> dict[str, np.ndarray]:
        number = behind(self.shares, self.taken)
        self.taken[number] += 1
        return self.parts[number].block()

    def state(self) -> dict[str, Any]:
        """Where the next block begins, as JSON holds it."""
        return {"taken": [*self.taken], "parts": [part.state() for part in self.parts]}


class _Part:
    """The blocks of one source."""

    def __init__(self, stream: Stream, number: int, state: dict[str, Any] | None) -> None:
        state = state or {"place": None, "text": 0, "token": 0}
        self.stream, self.source = stream, stream.sources[number]
        self.windows = _Windows(stream, number, state["place"])
        self.place = self.windows.place
        self.text, self.token = state["text"], state["token"]
        self.ids = np.zeros(0, np.int32)
        self.texts = self._texts(self.text)
        if self.token:
            self.text, self.ids = next(self.texts)

    def state(self) -> dict[str, Any]:
        ended = self.token >= len(self.ids) > 0
        return {
            "place": self.place,
            "text": self.text + ended,
            "token": 0 if ended else self.token,
        }

    def block(self) -> dict[str, np.ndarray]:
        size, filled = self.stream.block, 0
        ids, positions = np.empty(size, np.int32), np.empty(size, np.int32)
        while filled < size:
            if self.token >= len(self.ids):
                (self.text, self.ids), self.token = next(self.texts), 0
            take = min(size - filled, len(self.ids) - self.token)
            ids[filled : filled + take] = self.ids[self.token : self.token + take]
            positions[filled : filled + take] = np.arange(take)
            self.token, filled = self.token + take, filled + take
        if ids.max() >= self.stream.vocabulary:
            raise DataError(
                f"{self.source.name} holds token id {ids.max()}, but the model's vocabulary has "
                f"{self.stream.vocabulary}; tokenise with the model's own tokenizer"
            )
        labels = ids.copy()
        labels[0] = -100
        made = {"input_ids": ids, "labels": labels}
        return made | {"position_ids": positions} if self.stream.apart else made

    def _texts(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """The token ids of the texts, each with its number in its window; `place` is where that begins."""
        end = end_of_text(self.stream.tokenizer)
        while True:
            self.place, texts = next(self.windows)
            made = tokenised(texts[first:], self.stream.tokenizer, end)
            for number, (ids, _) in enumerate(made, start=first):
                yield number, ids
            first = 0


class _Windows(Iterator[tuple[dict[str, Any], list[str]]]):
    """The texts of a source, shuffled window by window, each with the place where it begins.

    No window goes over the end of a round, so a source that is smaller than a window is shuffled whole.
    """

    def __init__(self, stream: Stream, number: int, place: dict[str, Any] | None) -> None:
        self.stream, self.number, self.source = stream, number, stream.sources[number]
        self.place = place or {"round": 0, "shard": 0, "rows": None, "window": 0}
        self._live: Iterator[dict[str, Any]] | None = None
        self._shard, self._open = 0, self.source.rows

    def __next__(self) -> tuple[dict[str, Any], list[str]]:
        for wait in (*WAITS, None):
            try:
                return self._filled()
            except HfWsError:
                raise
            except Exception as error:  # whatever the reader of that source raises
                self._live = None  # opened again where this window begins
                if wait is None:
                    raise DataError(
                        f"{self.source.name}: reading broke off ({type(error).__name__}: {error}), also after "
                        f"{len(WAITS)} further tries; the same command with --resume goes on from the last checkpoint"
                    ) from error
                logger.warning(
                    "%s: reading broke off (%s: %s); trying again in %g s",
                    self.source.name, type(error).__name__, error, wait,
                )  # fmt: skip
                time.sleep(wait)
        raise AssertionError  # the last try returns or raises

    def _filled(self) -> tuple[dict[str, Any], list[str]]:
        """The next window with text in it."""
        while True:
            place, texts, ended = self.place, *self._read()
            begun = place["shard"] or place["rows"]
            if ended:
                self._live = None
                self.place = {"round": place["round"] + 1, "shard": 0, "rows": None}
            else:
                self.place = {
                    "round": place["round"], "shard": self._shard, "rows": self._open.state_dict()
                }  # fmt: skip
            self.place["window"] = place["window"] + 1
            if texts:
                return place, [texts[i] for i in self._order(len(texts), 1, place["window"])]
            if ended and not begun:
                raise DataError(f"{self.source.name}: no text in it to train on; give some")

    def _read(self) -> tuple[list[str], bool]:
        """Texts until the window is full, and whether the round ended before."""
        self._live = self._live or self._rest_of_round()
        texts, characters = [], 0
        for row in self._live:
            document = self.source.document(row)
            if document and document.text.strip():
                if self.stream.holds_out and is_held_out(document.name):
                    continue
                texts.append(document.text)
                characters += len(document.text)
                if len(texts) == self.stream.window or characters >= _WINDOW:
                    return texts, False
        self.source.bad.report()
        return texts, True

    def _rest_of_round(self) -> Iterator[dict[str, Any]]:
        shards, rows = self._order(self.source.rows.num_shards, 0, self.place["round"]), self.place["rows"]
        for shard in range(self.place["shard"], len(shards)):
            self._shard, self._open = shard, self.source.shard(int(shards[shard]))
            if rows is not None:
                self._open.load_state_dict(rows)
                rows = None
            yield from self._open

    def _order(self, count: int, what: int, number: int) -> np.ndarray:
        """An order of shards or texts, from the seed alone."""
        if self.stream.window == 1:
            return np.arange(count)
        return np.random.default_rng([self.stream.seed, self.number, what, number]).permutation(count)
