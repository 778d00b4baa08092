"""Clips of sound, read from what a row of data holds."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np

from hf_ws.errors import DataError


def clip_of(value: Any, where: str, near: Path | None = None) -> tuple[np.ndarray, int | None]:
    """One clip: samples [time] of float32 from -1 to 1, channels averaged, and how many there are a second.

    Args:
        value: A path; {"bytes", "path"} of a file; {"array", "sampling_rate"}; or samples alone, of no known rate.
        where: What it is called in an error.
        near: The folder that a path is looked for in, where it is not found from here.

    Raises:
        DataError: No such file, or none that can be read. WAV is read as it is, anything else by soundfile if that
            is installed.
    """
    if isinstance(value, str):
        value = {"bytes": None, "path": value}
    if isinstance(value, dict) and "array" in value:
        return _as_float(np.asarray(value["array"]), where), int(value["sampling_rate"])
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        name, content = value.get("path") or "a clip without a name", value.get("bytes")
        if content is None:
            content = _content(name, where, near)
        return _decoded(content, f"{where}: {name}")
    if value is None or isinstance(value, dict):
        raise DataError(f"{where} holds no sound; give a path, samples, or mend the row")
    return _as_float(np.asarray(value), where), None


def _content(name: str, where: str, near: Path | None) -> bytes:
    path = Path(name).expanduser()
    if near is not None and not path.is_file():
        path = near / name
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{where}: {name} cannot be read: {error.strerror}; mend or remove the row"
        ) from error


def _decoded(content: bytes, what: str) -> tuple[np.ndarray, int]:
    try:
        with wave.open(io.BytesIO(content)) as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return _by_soundfile(content, what)
    if width not in (1, 2, 4):
        return _by_soundfile(content, what)
    samples = np.frombuffer(raw[: len(raw) // (width * channels) * width * channels], f"<i{width}")
    if width == 1:  # the only width that counts from 0
        samples = (samples.view(np.uint8).astype(np.int16) - 128).astype(np.int8)
    return _as_float(samples.reshape(-1, channels).T, what), rate


def _by_soundfile(content: bytes, what: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError as error:
        raise DataError(
            f"{what} is no WAV of whole numbers; pip install soundfile reads other kinds, or convert it"
        ) from error
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{what} cannot be read as sound: {error}; mend or remove it") from error
    return _as_float(samples.T, what), int(rate)


def _as_float(samples: np.ndarray, what: str) -> np.ndarray:
    """[time] or [channels, time] of whole numbers at full scale, or of floats, as [time] of float32."""
    if not np.issubdtype(samples.dtype, np.number) or samples.ndim not in (1, 2) or not samples.size:
        raise DataError(f"{what} holds {samples.dtype} of shape {samples.shape}, no samples of sound")
    if np.issubdtype(samples.dtype, np.integer):
        # Arrays of tables come back wider than they were written: what is beyond 16 bits is of 32.
        wide = samples.dtype.itemsize > 2 and np.abs(samples.astype(np.int64)).max() > 32768
        scale = 128 if samples.dtype.itemsize == 1 else 2**31 if wide else 32768
        samples = samples / scale
    made = samples.astype(np.float32)
    if not np.isfinite(made).all():
        raise DataError(f"{what} holds samples that are not finite")
    return made.mean(0) if made.ndim == 2 else made
