"""Writing is all or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from hf_ws.errors import OutputError
from hf_ws.store import check_output, copy_side_files, new_folder
from hf_ws.store.shards import SINGLE
from tests.tiny_checkpoints import (
    llama,
)


def test_a_new_folder_appears_whole_with_ordinary_modes(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with new_folder(tmp_path / "deep" / "out") as staging:
            llama().save_pretrained(staging)
            assert not (tmp_path / "deep" / "out").exists()
    finally:
        os.umask(previous)
    files = list((tmp_path / "deep" / "out").iterdir())
    assert {path.name for path in files} == {"config.json", "generation_config.json", SINGLE}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with safe_open(tmp_path / "deep" / "out" / SINGLE, framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise error

    with pytest.raises(error), new_folder(tmp_path / "deep" / "out") as staging:
        write(staging)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_a_taken_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("x")
    assert (tmp_path / "out" / "a").read_text() == "x"

    def race(folder: Path) -> None:
        (folder / "b").write_text("mine")
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "b").write_text("theirs")

    with pytest.raises(OutputError, match="nothing was written"), new_folder(tmp_path / "late") as staging:
        race(staging)
    assert (tmp_path / "late" / "b").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "late"}


def test_outputs_that_are_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "alias").symlink_to(source)
    for path, message in {
        tmp_path: "not empty",
        tmp_path / "file": "is a file",
        tmp_path / "file" / "below": "is a file",
        source: "lies in the source folder",
        source / "student": "lies in the source folder",
        tmp_path / "alias" / "student": "lies in the source folder",
        tmp_path / "other" / ".." / "source" / "x": "lies in the source folder",
    }.items():
        with pytest.raises(OutputError, match=message):
            check_output(path, source)
        with pytest.raises(OutputError, match=message), new_folder(path, source):
            pytest.fail("the block ran")
    check_output(tmp_path / "fresh" / "deeper", source)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write anywhere
    with pytest.raises(OutputError, match="cannot be written to"):
        check_output(tmp_path / "fresh")


FULL_DISK = """
import resource, signal, sys, torch
from safetensors.torch import save_file
from hf_ws.errors import OutputError
from hf_ws.store import new_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with new_folder(sys.argv[1]) as staging:
        if sys.argv[2] == "safetensors":
            save_file({"a": torch.zeros(1_000_000)}, staging / "a.safetensors")
        else:
            (staging / "a.txt").write_bytes(bytes(1_000_000))
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("writer", ["safetensors", "python"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, writer: str) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "out"), writer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == OutputError.exit_code, done.stderr
    assert "no space left" in done.stdout
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from hf_ws.store import new_folder
with new_folder(sys.argv[1]) as staging:
    (staging / "a").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_write_never_shows_the_target(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out"):
        pass


def test_side_files_are_copied_by_name_and_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    wanted = ["LICENSE", "chat_template.jinja", "merges.txt", "spiece.model", "tokenizer.json", "vocab.json"]
    others = [
        "config.json",
        "generation_config.json",
        SINGLE,
        "pytorch_model.bin",
        "chat_template.py",
        "a.py",
    ]
    for name in [*wanted, *others, "tokenizer.model.pkl", ".env"]:
        (source / name).write_bytes(os.urandom(20))
    (source / "vocab.json").chmod(0o600)
    assert copy_side_files(source, target) == sorted(wanted)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        name: (source / name).read_bytes() for name in wanted
    }
