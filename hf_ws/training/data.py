"""Text in, blocks of token ids out.

    train_texts, held_out = split_held_out(load_text("stdlib"))
    blocks = pack(train_texts, tokenizer, block=512)

Texts are joined end to end with an end-of-text token after each and cut into blocks of one length, so no
position is padding. Which texts are held out follows from a hash, never from an order or a random state.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from hf_ws.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
STDLIB = "stdlib"  # stands for the sources of Python's own standard library, a corpus on every machine
_GLOB = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BATCH = 64  # texts tokenised in one call: enough for the tokenizer's threads, few enough for a lively bar


@dataclass(frozen=True)
class Document:
    """One text, and the name it is split by: a path relative to what was asked for, or the text itself."""

    name: str
    text: str


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

    def __len__(self) -> int:
        return len(self.dataset)


def load_text(
    source: Any, *, split: str = "train", column: str = "text", config_name: str | None = None
) -> list[Document]:
    """The documents of a source.

    Args:
        source: "stdlib"; a file, folder or glob; a list of `Path`s; a list of texts; a `datasets` dataset; or
            the Hub name of one.
        split: The split read of a Hub dataset.
        column: The column or key that holds the text in datasets, JSON lines and Parquet.
        config_name: The configuration of a Hub dataset that has several.

    Raises:
        DataError: Nothing there, or no text in it.
    """
    if isinstance(source, str | Path):
        text = str(source)
        if (
            text == STDLIB
            or _GLOB.search(text)
            or Path(text).expanduser().exists()
            or isinstance(source, Path)
        ):
            return text_files([text], column=column)
        if not _HUB_NAME.fullmatch(text):
            raise DataError(
                f"{text!r} is neither a file or folder here nor a dataset's Hub name ('owner/name')"
            )
        return _from_hub(text, split, column, config_name)
    if hasattr(source, "column_names"):
        return _from_rows(source, "the dataset", column)
    items = list(source)
    if items and all(isinstance(item, Path) for item in items):
        return text_files(items, column=column)
    if any(not isinstance(item, str) for item in items):
        kinds = ", ".join(sorted({type(item).__name__ for item in items}))
        raise DataError(f"a list of {kinds} came; give texts as str, or files as pathlib.Path")
    return _some([Document(text, text) for text in items], "the list of texts")


def text_files(
    paths: Iterable[str | Path], *, suffixes: Sequence[str] = SUFFIXES, column: str = "text"
) -> list[Document]:
    """The documents in files, folders (searched through for `suffixes`) and globs, each sorted by path.

    A `.jsonl` or `.parquet` file gives a document a row; any other file is one document, read as UTF-8 with
    what is not UTF-8 replaced.

    Raises:
        DataError: A path that does not exist, a folder or glob without such files, a row without `column`.
    """
    names = [str(path) for path in paths]
    documents: list[Document] = []
    for path in names:
        documents += [
            document for name, file in _files(path, suffixes) for document in _read(name, file, column)
        ]
    return _some(documents, ", ".join(names) or "no path")


def split_held_out(documents: list[Document], one_in: int = 20) -> tuple[list[Document], list[Document]]:
    """The documents to train on, and those held out: the ones whose name's hash is a multiple of `one_in`.

    So a document stays on its side whatever else is there. Where that leaves a side empty (one long file),
    each document is cut instead, at a line's end, and its last part is held out.
    """
    held_out = [_hash(document.name) % one_in == 0 for document in documents]
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
    import datasets

    if block < 2:
        raise DataError(f"block={block}; a block needs at least 2 tokens, one to predict the next from")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-text token; set `tokenizer.eos_token` to part the texts")
    contents = [text.text if isinstance(text, Document) else text for text in texts]
    kept = [text for text in contents if text.strip()]
    if not kept:
        raise DataError(f"{len(contents)} texts came and none has any text; give some to train on")
    pieces, size = [], 0
    bar = tqdm(total=len(kept), desc="tokenising", unit=" texts", delay=2, disable=not progress)
    for start in range(0, len(kept), _BATCH):
        # A lone surrogate has no UTF-8 form and would stop the tokenizer.
        raw = [text.encode("utf-8", "replace") for text in kept[start : start + _BATCH]]
        size += sum(map(len, raw))
        encoded = tokenizer([one.decode() for one in raw], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        pieces += [np.array([*ids, end], dtype=np.int32) for ids in encoded]
        bar.update(len(raw))
    bar.close()
    ids = np.concatenate(pieces)
    if len(ids) < block:
        raise DataError(
            f"{len(kept)} texts of {len(ids)} tokens came, less than one block of {block}; give more text"
        )
    whole = ids[: len(ids) // block * block].reshape(-1, block)
    labels = whole.copy()
    labels[:, 0] = -100
    # int32 halves the memory; the torch format gives int64 back, as embeddings want.
    column = datasets.Sequence(datasets.Value("int32"), length=block)
    columns = {"input_ids": whole, "labels": labels}
    if apart:
        columns["position_ids"] = _positions([len(piece) for piece in pieces], block)[: whole.size].reshape(
            -1, block
        )
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(dict.fromkeys(columns, column)))
    return Packed(
        dataset.with_format("torch"),
        size / len(ids),
        whole.size,
        len(ids) - whole.size,
        len(contents) - len(kept),
    )


def _positions(lengths: list[int], block: int) -> np.ndarray:
    """The place of every token in its text, or in its block where the text began before that."""
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    every = np.arange(len(starts), dtype=np.int32)
    return np.minimum(every - starts, every % block).astype(np.int32)


def check_ids(blocks: datasets.Dataset, vocabulary: int) -> None:
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
                    f"row {row + at} holds token id {ids[wrong][0]}, but the model's vocabulary has "
                    f"{vocabulary}; tokenise with the model's own tokenizer"
                )
        row += len(next(iter(batch.values())))


def files_of(path: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that a file, folder or glob stands for, sorted. Raises DataError if there is none."""
    return [file for _, file in _files(path, suffixes)]


def _files(path: str, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """The files that `path` stands for, each with the name it is split by."""
    if path == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = sorted(f for f in root.rglob("*.py") if "site-packages" not in f.parts and f.stat().st_size)
        return [(file.relative_to(root).as_posix(), file) for file in found]
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(f for f in place.rglob("*") if f.suffix in suffixes and f.is_file())
        if not found:
            raise DataError(f"{place} holds no {', '.join(suffixes)} file; name another folder, or the files")
        return [(file.relative_to(place).as_posix(), file) for file in found]
    if place.is_file():
        return [(place.name, place)]
    found = sorted(f for f in map(Path, glob.glob(str(place), recursive=True)) if f.is_file())  # noqa: PTH207
    if not found:
        raise DataError(f"{path} does not exist; give files, folders, globs or {STDLIB!r}")
    return [(file.as_posix(), file) for file in found]


def _read(name: str, file: Path, column: str) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        yield from _read_json_lines(name, file, column)
    elif file.suffix == ".parquet":
        import datasets

        try:
            rows = datasets.Dataset.from_parquet(str(file), keep_in_memory=True)
        except Exception as error:  # whatever the reader raises
            raise DataError(f"{file} cannot be read as Parquet ({error}); mend or leave it out") from error
        yield from _from_rows(rows, str(file), column, name)
    else:
        yield Document(name, file.read_text(encoding="utf-8", errors="replace"))


def _read_json_lines(name: str, file: Path, column: str) -> Iterator[Document]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{file}, line {number}: not JSON ({error.msg}); mend or remove the line"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get(column, ""), str | None):
                raise DataError(
                    f"{file}, line {number}: no text under {column!r}; name the key that holds it"
                )
            if column not in row:
                raise DataError(f"{file}, line {number}: no key {column!r}, only {', '.join(row) or 'none'}")
            yield Document(f"{name}:{number}", row[column] or "")


def _from_rows(rows: Any, what: str, column: str, name: str = "") -> list[Document]:
    if column not in (rows.column_names or []):
        raise DataError(
            f"{what} has no column {column!r}, only {', '.join(rows.column_names or [])}; name its text"
        )
    documents = []
    for number, row in enumerate(rows.select_columns([column])):
        text = row[column]
        if not isinstance(text, str | None):
            raise DataError(f"{what}, row {number}: column {column!r} holds {type(text).__name__}, not text")
        documents.append(Document(f"{name}:{number}" if name else text or "", text or ""))
    return _some(documents, what)


def _from_hub(name: str, split: str, column: str, config_name: str | None) -> list[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # whatever the Hub client of the day raises
        raise DataError(
            f"{name!r} is not a file or folder here, and could not be loaded as a dataset: {error}"
        ) from error
    return _from_rows(rows, f"dataset {name}", column)


def _some(documents: list[Document], what: str) -> list[Document]:
    if not any(document.text.strip() for document in documents):
        raise DataError(f"{what}: {len(documents)} documents and no text in them; give some to train on")
    return documents


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode("utf-8", "replace")).hexdigest(), 16)
