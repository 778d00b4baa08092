"""Safetensors files with a JSON header, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_ws.errors import CalibrationError, OutputError


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header; what was there before stays until the new file is whole.

    Raises:
        OutputError: the file cannot be written.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, beside, {"hf_ws": json.dumps(header)}
        )
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"evidence cannot be written to {path}: {error}") from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `write` wrote.

    Raises:
        CalibrationError: there is no such file, or it is something else.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["hf_ws"])
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CalibrationError(f"{path} is no saved evidence: {type(error).__name__}: {error}") from error
