"""The safetensors files of one folder, read by header and mapped, never copied.

Neither the index nor a header is believed on its own: names, shards, sizes and offsets must agree before a
single weight is handed out.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from safetensors import SafetensorError, safe_open

from hf_ws.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

HEADER_LIMIT = 100_000_000  # the format's own
SAMPLE = 4096  # bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as its header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@final
class Shards:
    """Every tensor of a folder's weights, by its name on disk. Close it to let go of the mapped files."""

    def __init__(self, stored: dict[str, Stored], digest: bytes) -> None:
        self.stored = stored
        self.digest = digest
        self._handles: dict[Path, Any] = {}
        self._open = ExitStack()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, mapped from its file: it costs page cache, not memory. Do not modify it."""
        file = self.stored[name].file
        try:
            if file not in self._handles:
                self._handles[file] = self._open.enter_context(safe_open(file, framework="pt", device="cpu"))
            return self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read: {error}") from error

    def close(self) -> None:
        """Let go of the files; tensors already handed out stay valid."""
        self._handles.clear()
        self._open.close()


def open_shards(folder: Path) -> Shards:
    """Check the weights of `folder` against their own headers and index; no weight is read.

    Raises:
        CheckpointError: Weights that are absent, ambiguous, pickled, damaged, or at odds with their index.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{folder} holds both {SINGLE} and {INDEX}, two saves of which one is stale; "
            "remove the one you do not want"
        )
    if not index.exists():
        if not single.exists():
            _refuse_missing(folder)
        return _read([single], None)
    weight_map = read_index(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards: {some(missing)}; fetch them again"
        )
    return _read([folder / name for name in names], weight_map)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard name, each a plain `*.safetensors` file name of the same folder."""
    if path.stat().st_size > HEADER_LIMIT:
        raise CheckpointError(f"{path} is larger than {HEADER_LIMIT} bytes; that is no index")
    weight_map = parse_json(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{path}: weight_map must map tensor names to shard names; fetch the index again"
        )
    unsafe = sorted({name for name in weight_map.values() if not _is_plain(name)})
    if unsafe:
        raise CheckpointError(
            f"{path} points to {some(unsafe)}; a shard must be a *.safetensors file in the same folder. "
            "Do not use this checkpoint unless you know who made it"
        )
    return weight_map


def some(names: Collection[object], limit: int = 6) -> str:
    """The first few of `names` for a message, quoted so that no control character gets through."""
    shown = ", ".join(repr(name) for name in list(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _is_plain(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and not set(name) & set("/\\:")
        and name[0] != "."
    )


def _refuse_missing(folder: Path) -> NoReturn:
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}"
        + (
            f"; {some(others)} is not read: convert it to safetensors, or rename it"
            if others
            else "; it has no weights"
        )
    )


def _read(files: list[Path], weight_map: dict[str, str] | None) -> Shards:
    stored: dict[str, Stored] = {}
    digest = hashlib.sha256()
    for file in files:
        for name, entry in _read_header(file, digest).items():
            if name in stored:
                raise CheckpointError(
                    f"tensor {name!r} is in two shards: {stored[name].file.name} and {file.name}"
                )
            stored[name] = entry
    if weight_map is not None:
        _check_index(weight_map, stored)
    if not stored:
        raise CheckpointError(f"{files[0]} holds no tensor")
    return Shards(stored, digest.digest())


def _check_index(weight_map: dict[str, str], stored: dict[str, Stored]) -> None:
    absent = [name for name in weight_map if name not in stored]
    unlisted = [name for name in stored if name not in weight_map]
    moved = [
        name for name in stored if weight_map.get(name, stored[name].file.name) != stored[name].file.name
    ]
    if absent or unlisted or moved:
        raise CheckpointError(
            f"{INDEX} and the shards disagree: "
            + "; ".join(
                f"{what} {some(names)}"
                for what, names in (
                    ("no shard has", absent),
                    ("the index does not list", unlisted),
                    ("in another shard than the index says", moved),
                )
                if names
            )
            + "; fetch the checkpoint again"
        )


def _read_header(path: Path, digest: hashlib._Hash) -> dict[str, Stored]:
    """The tensors of one file, after every check that can be made without reading them; feeds `digest`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would hang, a device has no end
            raise CheckpointError(f"{path} is not a regular file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if status.st_size < 8 or not 0 < length <= min(HEADER_LIMIT, status.st_size - 8):
                raise CheckpointError(
                    f"{path} is no safetensors file, or is cut short: {status.st_size} bytes, "
                    f"header of {length}; fetch it again"
                )
            header = file.read(length)
            # Two fine-tunes of one model share every header, so a little of the data is taken too.
            digest.update(f"{path.name} {status.st_size} ".encode() + header)
            for start in (
                8 + length,
                (8 + length + status.st_size) // 2,
                max(8 + length, status.st_size - SAMPLE),
            ):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    entries = {name: entry for name, entry in parse_json(header, path).items() if name != "__metadata__"}
    ends = [_check_entry(path, name, entry) for name, entry in entries.items()]
    if 8 + length + max(ends, default=0) != status.st_size:
        raise CheckpointError(
            f"{path} is {status.st_size} bytes, its header says {8 + length + max(ends, default=0)}: "
            "cut short or damaged; fetch it again"
        )
    try:
        with safe_open(path, framework="pt"):  # the format's own checks: overlaps, holes, sizes
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from error
    return {
        name: Stored(path, tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in entries.items()
    }


def _check_entry(path: Path, name: str, entry: Any) -> int:
    """Where the entry's data ends, counted from the end of the header."""
    if not name or not name.isprintable():
        raise CheckpointError(f"{path} names a tensor {name!r}; names must be printable")
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header's entry for {name!r} is malformed; fetch it again"
        ) from error
    if dtype not in DTYPES:
        quantized = (
            " without a quantization_config, so its scales are unknown" if str(dtype).startswith("F8") else ""
        )
        raise CheckpointError(
            f"{path}: tensor {name!r} is stored as {dtype}{quantized}; "
            f"dequantise the checkpoint to bf16 first (read: {', '.join(DTYPES)})"
        )
    numbers = [start, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: tensor {name!r} has shape {shape!r} and offsets {start!r}, {end!r}")
    if end - start != prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} and {dtype} takes {end - start} bytes"
        )
    return end


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The object in a JSON file; a key that is there twice is refused: readers disagree about it."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"{key!r} is there twice")
            result[key] = value
        return result

    try:
        parsed = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}; fetch it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, got {type(parsed).__name__}")
    return parsed
