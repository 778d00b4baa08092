"""Data that is more than one text a row: pairs of texts, images with labels, sound with its text."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from hf_ws.errors import DataError
from hf_ws.training.texts import files_of, from_hub

if TYPE_CHECKING:
    import datasets

    from hf_ws.training.config import TrainConfig

logger = logging.getLogger(__name__)

FOLDERS = {
    "imagefolder": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audiofolder": (".wav", ".flac", ".mp3", ".ogg"),
}
"""How a folder that holds such files is read."""

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""How a file's rows are read, by the end of its name."""


def rows_of(config: TrainConfig, columns: list[str]) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows to train on, and those held out, with these columns alone.

    From `train_files` (.jsonl, .parquet, .csv; or one folder of images in a folder a class, or of sounds with their
    metadata.csv) or `dataset`; held out is what `eval_files` or `eval_split` names, else one row in twenty, by the hash
    of what is in it. Images and sounds come as files, {"bytes", "path"}, not decoded.

    Raises:
        DataError: No such data, a column that is missing, nothing in it.
    """
    if config.train_files:
        rows = _from_files(config, config.train_files, columns)
    elif config.dataset:
        rows = from_hub(config.dataset, config.dataset_split, config.dataset_config)
    else:
        raise DataError("no data to train on; set train_files or dataset")
    rows = _with(rows, columns, "the training data")
    if config.eval_files:
        return rows, _with(_from_files(config, config.eval_files, columns), columns, "the held-out data")
    if config.eval_split:
        held_out = from_hub(str(config.dataset), config.eval_split, config.dataset_config)
        return rows, _with(held_out, columns, "the held-out data")
    return split_rows(rows)


def split_rows(rows: datasets.Dataset, one_in: int = 20) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train on and rows held out; a row stays on its side whatever else is there.

    Raises:
        DataError: All rows fall on one side, as a handful of them may.
    """
    bar = tqdm(rows, desc="splitting", unit=" rows", delay=2, leave=False)
    held_out = [int(fingerprint(row), 16) % one_in == 0 for row in bar]
    train, others = ([i for i, held in enumerate(held_out) if held == side] for side in (False, True))
    if not train or not others:
        raise DataError(f"{len(rows)} rows are too few to hold some out; give more, or name eval_files")
    return rows.select(train), rows.select(others)


def usable(rows: datasets.Dataset, *, shifts: bool) -> datasets.Dataset:
    """Rows of token ids, all of one length, without text, and without the rows in which nothing is predicted.

    These are dropped with a warning that counts them: a batch of them alone would have no loss.

    Args:
        rows: With `input_ids` and `labels`.
        shifts: Whether position t predicts label t + 1, so that the first label is no aim.

    Raises:
        DataError: Rows of several lengths, or nothing left.
    """
    texts = [name for name, kind in rows.features.items() if getattr(kind, "dtype", None) == "string"]
    rows = rows.remove_columns(texts)
    kept: list[int] = []
    at, length = 0, None
    for batch in rows.with_format("numpy").iter(1000):
        for number, (ids, labels) in enumerate(
            zip(batch["input_ids"], batch["labels"], strict=True), start=at
        ):
            length = len(ids) if length is None else length
            if len(ids) != length or len(labels) != length:
                raise DataError(
                    f"row {number} has {len(ids)} tokens and {len(labels)} labels, the rows before have {length}; "
                    "give rows of one length, as `pack` makes them"
                )
            if (np.asarray(labels)[int(shifts) :] != -100).any():
                kept.append(number)
        at += len(batch["input_ids"])
    if not kept:
        raise DataError(
            f"{len(rows)} rows came and in none a label is predicted: all are -100, or rows are too short"
        )
    if len(kept) == len(rows):
        return rows
    logger.warning(
        "%d of %d rows are dropped: no label in them is predicted", len(rows) - len(kept), len(rows)
    )
    return rows.select(kept)


def fingerprint(value: Any) -> str:
    """A hash of what a row holds, whatever it is: numbers, text, tensors, images."""
    seen = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict) and part.keys() == {"bytes", "path"}:  # a file, wherever it lies
            seen.update(part["bytes"] or _content(part["path"]))
        elif isinstance(part, dict):
            for name in sorted(part):
                seen.update(str(name).encode())
                add(part[name])
        elif isinstance(part, list) and part and all(type(one) in (int, float) for one in part):
            seen.update(np.asarray(part).tobytes())  # of sound these are many
        elif isinstance(part, list | tuple):
            for one in part:
                add(one)
        elif hasattr(part, "tobytes"):  # an image or an array
            seen.update(part.tobytes())
        elif hasattr(part, "numpy"):
            seen.update(part.numpy().tobytes())
        else:
            seen.update(repr(part).encode("utf-8", "replace"))

    add(value)
    return seen.hexdigest()


def _content(path: str | None) -> bytes:
    try:
        return Path(path or "").read_bytes()
    except OSError as error:
        raise DataError(f"{path or 'a file without a name'} cannot be read: {error.strerror}") from error


def _from_files(config: TrainConfig, names: list[str], columns: list[str]) -> datasets.Dataset:
    folder = Path(names[0]).expanduser()
    if len(names) == 1 and folder.is_dir():
        kind = "imagefolder" if config.image_column in columns else "audiofolder"
        if any(file.is_file() and file.suffix.lower() in FOLDERS[kind] for file in folder.rglob("*")):
            return _loaded(names, kind, data_dir=str(folder))
    files = [file for name in names for file in files_of(name, tuple(READERS))]
    kinds = {READERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise DataError(
            f"{', '.join(names)} hold {', '.join(sorted({f.suffix for f in files}))} files; give files of one kind: "
            + ", ".join(READERS)
        )
    return _loaded(names, str(kinds.pop()), data_files=[str(file) for file in files])


def _loaded(names: list[str], kind: str, **options: Any) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(kind, split="train", **options)
    except Exception as error:  # whatever the reader of that kind raises
        raise DataError(f"{', '.join(names)} cannot be read: {' '.join(str(error).split())}") from error


def _with(rows: datasets.Dataset, columns: list[str], what: str) -> datasets.Dataset:
    """The rows with these columns alone, files not decoded. Raises DataError."""
    import datasets

    lacking = [name for name in columns if name not in rows.column_names]
    if lacking:
        raise DataError(
            f"{what} has no column {', '.join(map(repr, lacking))}, only {', '.join(rows.column_names)}"
        )
    if not len(rows):
        raise DataError(f"{what} has no rows; give some")
    rows = rows.select_columns(columns)
    for name in columns:
        feature = rows.features[name]
        if isinstance(feature, datasets.Image | datasets.Audio):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows
