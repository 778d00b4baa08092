"""The folder of a training run, and which of its checkpoints can be trusted.

    run.json          what the run was started with; a run is only continued with the same
    metrics.jsonl     one JSON object a line: step, tokens, loss, learning_rate, eval_loss, seconds, ...
    loss.png          the same as a picture
    train.md          what was trained, on what, and what came of it; also in the card of the model
    checkpoint-N/     weights, optimizer, schedule, random state, the place in a stream; and whole.json, written last
    model/            the trained model and its tokenizer, there only when training has ended
    adapter/          with `lora`: the trained adapters; model/ is there besides if they were to be merged
    hf_ws_plan.json   with `subclone`: how the start was made; beside the trained model too
    start/            with both: the start, without which the adapters are nothing

A checkpoint is whole when `whole.json` is there and every file it lists has the size and hash it had.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

from hf_ws.errors import OutputError, ResumeError
from hf_ws.store import check_output

logger = logging.getLogger(__name__)

MARK = "run.json"
METRICS = "metrics.jsonl"
PICTURE = "loss.png"
SUMMARY = "train.md"
MODEL, ADAPTER, START = "model", "adapter", "start"
_MANIFEST = "whole.json"
_STREAM = "stream.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def check_run_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that is neither new, nor empty, nor a run of ours that is to be resumed.

    Raises:
        OutputError: With what is there and what to do.
    """
    if (folder / MARK).is_file():
        if not resume:
            raise OutputError(
                f"output {folder} holds a run already; --resume (resume=True) continues it, or name a new folder"
            )
        return
    check_output(folder)


def check_same_run(folder: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings, data, start or number of processes.

    A setting that the record lacks came into the library after the run began, which went by its default.

    Raises:
        ResumeError: Naming each setting that changed, or that the record cannot be read.
    """
    try:
        before = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeError(f"{folder / MARK} cannot be read ({error}); start in a new folder") from error
    now = json.loads(json.dumps(settings))
    before = json.loads(json.dumps({key: defaults[key] for key in now.keys() & defaults.keys()})) | before
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        what = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise ResumeError(
            f"the run in {folder} was started otherwise: {what}. Set it back, or name a new folder"
        )


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file whole or not at all."""
    staging = path.with_name(f".{path.name}.part")
    staging.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    staging.replace(path)


def keep_stream_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write where the stream goes on after a checkpoint. Call it on one process, before `mark_whole`."""
    write_json(checkpoint / _STREAM, state)


def stream_state(checkpoint: Path) -> tuple[dict[str, Any], int]:
    """Where the stream goes on after a whole checkpoint, and the checkpoint's step."""
    return json.loads((checkpoint / _STREAM).read_text(encoding="utf-8")), _step(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def mark_whole(checkpoint: Path) -> None:
    """Record every file of a finished checkpoint. Call it on one process, after all have written."""
    files = {
        file.relative_to(checkpoint).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != _MANIFEST
    }
    write_json(checkpoint / _MANIFEST, files)


def why_broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is whole."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was never finished"
    except ValueError:
        return f"{_MANIFEST} is damaged"
    for name, record in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != record["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {record['bytes']}"
        if _sha256(file) != record["sha256"]:
            return f"{name} has changed since it was written"
    return None


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, if any, and the newer ones that are not; each of those is logged."""
    found = [
        (int(match[1]), path) for path in folder.glob("*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    skipped: list[Path] = []
    for _, checkpoint in sorted(found, reverse=True):
        reason = why_broken(checkpoint)
        if reason is None:
            return checkpoint, skipped
        logger.warning("%s is skipped: %s", checkpoint, reason)
        skipped.append(checkpoint)
    return None, skipped


def begin(
    folder: Path, record: dict[str, Any], checkpoint: Path | None, damaged: list[Path]
) -> list[dict[str, Any]]:
    """Make the folder ready, and return the rows that hold up to the checkpoint. Call it on one process.

    Damaged checkpoints are renamed, so that rotation does not count them in place of a whole one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for one in damaged:
        aside = one.with_name(f"damaged-{one.name}")
        shutil.rmtree(aside, ignore_errors=True)
        one.rename(aside)
    step = _step(checkpoint) if checkpoint else -1
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    write_metrics(folder, rows, append=False)
    write_json(folder / MARK, record)
    return rows


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a line cut short by a kill is left out."""
    rows = []
    file = folder / METRICS
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def write_metrics(folder: Path, rows: list[dict[str, Any]], *, append: bool) -> None:
    """Write rows as JSON lines; what is not finite becomes null, for JSON has no NaN. Raises OutputError."""
    lines = [
        json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
        for row in rows
    ]
    try:
        with (folder / METRICS).open("a" if append else "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise OutputError(
            f"{folder / METRICS} could not be written: {error}. Checkpoints written before are whole; make room, and "
            "the same command with --resume goes on from the last of them"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
