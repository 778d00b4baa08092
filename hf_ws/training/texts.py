"""Where text comes from: files, folders and globs, datasets, lists.

documents = load_text("stdlib")
documents = text_files(["books/", "more.jsonl"])
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ws.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
STDLIB = "stdlib"  # stands for the sources of Python's own standard library, a corpus on every machine
_PART = f"{STDLIB}:"  # and with a name after it for one package of it
_GLOB = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Document:
    """One text, and the name it is split by: a path relative to what was asked for, or the text itself."""

    name: str
    text: str


class BadRows:
    """What is done about rows that hold no text: the first one ends the reading, or they are skipped and counted."""

    def __init__(self, skip: bool = False) -> None:
        self.skip, self.count, self.first = skip, 0, ""

    def met(self, fault: str) -> None:
        """Raise DataError, or count."""
        if not self.skip:
            raise DataError(f"{fault}; mend or remove it, or set skip_bad_rows")
        self.first = self.first or fault
        self.count += 1

    def report(self) -> None:
        """Say how many there were."""
        if self.count:
            logger.warning("%d bad rows are skipped, the first: %s", self.count, self.first)


def load_text(
    source: Any,
    *,
    split: str = "train",
    column: str = "text",
    config_name: str | None = None,
    skip_bad: bool = False,
) -> list[Document]:
    """The documents of a source.

    Args:
        source: "stdlib", or a package of it ("stdlib:email"); a file, folder or glob; a list of `Path`s; a list of
            texts; a `datasets` dataset; or the Hub name of one.
        split: The split read of a Hub dataset.
        column: The column or key that holds the text in datasets, JSON lines and Parquet.
        config_name: The configuration of a Hub dataset that has several.
        skip_bad: Leave out rows that hold no text, with a warning that counts them.

    Raises:
        DataError: Nothing there, or no text in it.
    """
    if isinstance(source, str | Path):
        if is_local(source):
            return text_files([source], column=column, skip_bad=skip_bad)
        return _from_rows(
            from_hub(str(source), split, config_name), f"dataset {source}", column, skip_bad=skip_bad
        )
    if hasattr(source, "column_names"):
        return _from_rows(source, "the dataset", column, skip_bad=skip_bad)
    items = list(source)
    if items and all(isinstance(item, Path) for item in items):
        return text_files(items, column=column, skip_bad=skip_bad)
    if any(not isinstance(item, str) for item in items):
        kinds = ", ".join(sorted({type(item).__name__ for item in items}))
        raise DataError(f"a list of {kinds} came; give texts as str, or files as pathlib.Path")
    return _some([Document(text, text) for text in items], "the list of texts")


def is_local(source: str | Path) -> bool:
    """Whether a name is of something on this machine, and not of a dataset of the Hub.

    Raises:
        DataError: It is neither.
    """
    text = str(source)
    if isinstance(source, Path) or text == STDLIB or text.startswith(_PART) or _GLOB.search(text):
        return True
    if Path(text).expanduser().exists():
        return True
    if not _HUB_NAME.fullmatch(text):
        raise DataError(f"{text!r} is neither a file or folder here nor a dataset's Hub name ('owner/name')")
    return False


def text_files(
    paths: Iterable[str | Path],
    *,
    suffixes: Sequence[str] = SUFFIXES,
    column: str = "text",
    skip_bad: bool = False,
) -> list[Document]:
    """The documents in files, folders (searched through for `suffixes`) and globs, each sorted by path.

    A `.jsonl` or `.parquet` file gives a document a row; any other file is one document, read as UTF-8 with
    what is not UTF-8 replaced.

    Raises:
        DataError: A path that does not exist, a folder or glob without such files, a row without `column`.
    """
    names, bad = [str(path) for path in paths], BadRows(skip_bad)
    documents = [
        document
        for name, file in named_files(names, suffixes)
        for document in read_file(name, file, column, bad)
    ]
    bad.report()
    return _some(documents, ", ".join(names) or "no path")


def files_of(path: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that a file, folder or glob stands for, sorted. Raises DataError if there is none."""
    return [file for _, file in named_files([path], suffixes)]


def named_files(paths: Iterable[str], suffixes: Sequence[str] = SUFFIXES) -> Iterator[tuple[str, Path]]:
    """The files that these stand for, each with the name that its documents are split by. Raises DataError."""
    for path in paths:
        yield from _files(path, suffixes)


def _files(path: str, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    if path == STDLIB or path.startswith(_PART):
        return _standard_library(path.removeprefix(STDLIB)[1:])
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
    root = Path(*itertools.takewhile(lambda part: not _GLOB.search(part), place.parts))
    return [(file.relative_to(root).as_posix(), file) for file in found]


def _standard_library(package: str) -> list[tuple[str, Path]]:
    """Its sources, or those of one package; the names are the same, so what is held out is too. Raises DataError."""
    root = Path(sysconfig.get_paths()["stdlib"])
    place = root / package
    found = sorted(f for f in place.rglob("*.py") if "site-packages" not in f.parts and f.stat().st_size)
    if not found or ".." in place.parts:
        known = ", ".join(sorted(file.parent.name for file in root.glob("*/__init__.py")))
        raise DataError(f"{_PART}{package}: the standard library has no such package; it has {known}")
    return [(file.relative_to(root).as_posix(), file) for file in found]


def read_file(
    name: str, file: Path, column: str, bad: BadRows, longest: int | None = None
) -> Iterator[Document]:
    """The documents of one file, a row at a time.

    Args:
        name: What the file is called in the names of its documents.
        file: Where it is.
        column: The key or column of its text, where it is a table.
        bad: Asked about rows that hold no text.
        longest: Characters of a document that is a whole file; a longer file comes in pieces, cut at a line's end
            where there is one. None for no limit.

    Raises:
        DataError: The file cannot be read, or a row of it.
    """
    try:
        if file.suffix == ".jsonl":
            yield from _read_json_lines(name, file, column, bad)
        elif file.suffix == ".parquet":
            yield from _read_parquet(name, file, column, bad)
        elif longest is None:
            yield Document(name, file.read_text(encoding="utf-8", errors="replace"))
        else:
            yield from _read_pieces(name, file, longest)
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror or error}; mend it or leave it out"
        ) from error


def _read_pieces(name: str, file: Path, longest: int) -> Iterator[Document]:
    with file.open(encoding="utf-8", errors="replace") as source:
        number, kept = 0, ""
        while more := source.read(longest):
            kept += more
            while len(kept) > longest:
                cut = kept.rfind("\n", 0, longest) + 1 or longest
                yield Document(f"{name}:{number}", kept[:cut])
                number, kept = number + 1, kept[cut:]
        yield Document(f"{name}:{number}" if number else name, kept)


def _read_json_lines(name: str, file: Path, column: str, bad: BadRows) -> Iterator[Document]:
    with file.open(encoding="utf-8-sig", errors="replace") as lines:  # JSON has no room for a byte order mark
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except RecursionError:
                bad.met(f"{where}: not JSON (nested too deep)")
                continue
            except ValueError as error:  # JSONDecodeError, and that of a number of too many digits
                bad.met(f"{where}: not JSON ({getattr(error, 'msg', error)})")
                continue
            if not isinstance(row, dict) or not isinstance(row.get(column, ""), str | None):
                bad.met(f"{where}: no text under {column!r}")
            elif column not in row:
                bad.met(f"{where}: no key {column!r}, only {', '.join(row) or 'none'}")
            else:
                yield Document(f"{name}:{number}", row[column] or "")


def _read_parquet(name: str, file: Path, column: str, bad: BadRows) -> Iterator[Document]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            _check_column(table.schema_arrow.names, str(file), column)
            batches = table.iter_batches(batch_size=1000, columns=[column])
            rows = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, text in enumerate(rows):
                if isinstance(text, str | None):
                    yield Document(f"{name}:{number}", text or "")
                else:
                    bad.met(f"{file}, row {number}: column {column!r} holds {type(text).__name__}, not text")
    except ArrowException as error:
        raise DataError(f"{file} cannot be read as Parquet ({error}); mend or leave it out") from error


def _check_column(names: Sequence[str], what: str, column: str) -> None:
    if column not in names:
        raise DataError(f"{what} has no column {column!r}, only {', '.join(names)}; name its text")


def _from_rows(rows: Any, what: str, column: str, *, skip_bad: bool = False) -> list[Document]:
    _check_column(rows.column_names or [], what, column)
    bad, documents = BadRows(skip_bad), []
    for number, row in enumerate(rows.select_columns([column])):
        if document := document_of(row, f"{what}, row {number}", column, bad):
            documents.append(document)
    bad.report()
    return _some(documents, what)


def document_of(row: dict[str, Any], where: str, column: str, bad: BadRows) -> Document | None:
    """The text of a dataset's row, which is its name too; None for a bad row that is to be skipped."""
    text = row.get(column, 0)  # 0 is what a text can never be
    if isinstance(text, str | None):
        return Document(text or "", text or "")
    found = (
        f"holds {type(text).__name__}, not text" if column in row else f"is not there, only {', '.join(row)}"
    )
    bad.met(f"{where}: column {column!r} {found}")
    return None


def from_hub(name: str, split: str, config_name: str | None, *, streaming: bool = False) -> Any:
    """The rows of a dataset of the Hub.

    Raises:
        DataError: With what the client says; and what to do where the dataset is a script, which is never run.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # whatever the Hub client of the day raises
        script = "scripts are no longer supported" in str(error)
        advice = (
            "; it is made by a script, which is not run: take its Parquet copy, or another" if script else ""
        )
        raise DataError(
            f"{name!r} is not a file or folder here, and could not be loaded as a dataset: {error}{advice}"
        ) from error


def _some(documents: list[Document], what: str) -> list[Document]:
    if not any(document.text.strip() for document in documents):
        raise DataError(f"{what}: no text in {len(documents)} documents; give some that have text")
    return documents
