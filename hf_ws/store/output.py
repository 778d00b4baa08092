"""Write all or nothing: a folder appears under its name only when every byte of it is on disk."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from hf_ws.errors import OutputError
from hf_ws.store.place import SIDE_FILES

_NEVER = (".py", ".pyc", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: str | Path, source_folder: str | Path | None = None) -> None:
    """Refuse an output that could not be written, before any work is done.

    Raises:
        OutputError: A file or a folder that is not empty, the source itself or a place inside it, or a parent
            that cannot be written to.
    """
    target = Path(path).expanduser().resolve()
    if source_folder is not None and target.is_relative_to(Path(source_folder).expanduser().resolve()):
        raise OutputError(f"output {target} lies in the source folder {source_folder}; give another place")
    if target.exists() and not target.is_dir():
        raise OutputError(f"output {target} is a file; give the name of a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(f"output {target} exists and is not empty; remove it or give another name")
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"output {target}: {parent} is a file; give another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {target}: {parent} cannot be written to; give another place")


@contextmanager
def new_folder(path: str | Path, source_folder: str | Path | None = None) -> Iterator[Path]:
    """Yield a staging folder that becomes `path` when the block ends well, and vanishes when it does not.

    Files get the mode that the umask gives, and are on disk before the rename. A killed process leaves at
    most a hidden `.<name>.hfws-*` folder beside the target, never the target itself.

    Raises:
        OutputError: What `check_output` refuses, a full disk, or a target that somebody else made meanwhile.
    """
    check_output(path, source_folder)
    target = Path(path).expanduser().resolve()
    staging = target.with_name(f".{target.name}.hfws-{secrets.token_hex(4)}")
    made = [folder for folder in target.parents if not folder.exists()]  # innermost first
    try:
        try:
            staging.mkdir(parents=True)
            yield staging
            _settle(staging)
            staging.rename(target)  # replaces an empty folder, refuses any other
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # somebody else may have put something there
                    folder.rmdir()
            raise
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        if error.errno in _FULL:
            raise OutputError(
                f"output {target}: no space left ({error.strerror}); nothing was written"
            ) from error
        if str(staging) in (str(error.filename or "")[: len(str(staging))], str(error.filename2)):
            raise OutputError(
                f"output {target} cannot be written: {error.strerror}; nothing was written"
            ) from error
        raise
    except SafetensorError as error:
        if any(f"os error {code}" in str(error) for code in _FULL):
            raise OutputError(f"output {target}: no space left; nothing was written") from error
        raise


def copy_side_files(source_folder: str | Path, target_folder: str | Path) -> list[str]:
    """Copy tokenizer, processor, chat template and licence byte for byte; the names copied, sorted.

    Only known names are copied: no code, no pickle, no weights; the model writes its own generation config.
    """
    names = sorted(
        file.name
        for file in Path(source_folder).iterdir()
        if file.is_file()
        and file.suffix not in _NEVER
        and any(fnmatchcase(file.name, pattern) for pattern in SIDE_FILES)
    )
    for name in names:
        shutil.copyfile(Path(source_folder) / name, Path(target_folder) / name)
    return names


def _settle(staging: Path) -> None:
    """Give every file its ordinary mode (safetensors writes 0600), and put files and folders on disk."""
    mode = staging.stat().st_mode & 0o666  # mkdir was given 0777 less the umask
    for folder, _, files in os.walk(staging, topdown=False):
        for name in files:
            file = Path(folder, name)
            file.chmod(mode)
            _sync(file)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
