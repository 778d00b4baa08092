"""Sums on disk, so that a calibration that was killed goes on, and one that is done is not run again."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from hf_ws.errors import CalibrationError
from hf_ws.evidence.files import read, write
from hf_ws.evidence.sums import Sums, share

EVERY = 30.0  # seconds between two writes
SHARE = 20.0  # how many times as long as a write takes, for it to cost 5 % at most


class Cache:
    """The file of a calibration, and while it runs under several processes one more for each.

    Args:
        path: Where the sums lie.
        fingerprint: What they must be of.

    Raises:
        CalibrationError: the file is of something else.
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, str]) -> None:
        rank, processes = share()
        self._path, self._fingerprint = Path(path), fingerprint
        self._own = self._path
        if processes > 1:
            self._own = self._path.with_name(f"{self._path.name}.{rank}-of-{processes}")
        self._written, self._took = time.monotonic(), 0.0

    def load(self) -> tuple[Sums, int, bool]:
        """The sums so far, of how many of this process's batches, and whether they are of all batches everywhere."""
        whole, done, complete = self._read(self._path)
        if _everywhere(complete):
            return whole, done, True
        if self._own != self._path:
            whole, done, _ = self._read(self._own)
        return whole, done, False

    def keep(self, sums: Sums, done: int) -> None:
        """Write the sums, unless that was done a short while ago."""
        now = time.monotonic()
        if now - self._written >= max(EVERY, SHARE * self._took):
            write(self._own, sums, {"fingerprint": self._fingerprint, "done": done, "complete": False})
            self._written = time.monotonic()
            self._took = self._written - now

    def finish(self, sums: Sums) -> None:
        """Write the sums of all processes, and let go of their own files."""
        if share()[0] == 0:
            write(self._path, sums, {"fingerprint": self._fingerprint, "done": 0, "complete": True})
        if self._own != self._path:
            self._own.unlink(missing_ok=True)

    def _read(self, path: Path) -> tuple[Sums, int, bool]:
        if not path.is_file():
            return Sums(), 0, False
        tensors, header = read(path)
        theirs = header.get("fingerprint", {})
        if wrong := [name for name, own in self._fingerprint.items() if theirs.get(name) != own]:
            raise CalibrationError(
                f"cache {path} is of other {' and '.join(wrong)}; remove it, or name another file"
            )
        return Sums(tensors), int(header["done"]), bool(header["complete"])


def _everywhere(here: bool) -> bool:
    """Whether it holds in every process."""
    _, processes = share()
    if processes == 1:
        return here
    answers = [False] * processes
    dist.all_gather_object(answers, here)
    return all(answers)
