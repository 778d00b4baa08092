"""Reading from the Hub, through the real client against a small Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from hf_ws.errors import CheckpointError
from hf_ws.store.place import locate
from hf_ws.store.shards import SINGLE
from tests.hub_server import HubServer, serve
from tests.tiny_checkpoints import edit_index, make

CLIENT = """
import hashlib, json, sys
from hf_ws.errors import HfWsError
from hf_ws.store import open_source

def report(source, options):
    try:
        with open_source(source, **options) as opened:
            names = sorted(opened.tensors)
            data = b"".join(opened.tensor(name).numpy().tobytes() for name in names)
            return {
                "name": opened.name,
                "revision": opened.revision,
                "names": names,
                "data": hashlib.sha256(data).hexdigest(),
                "files": sorted(path.name for path in opened.files.iterdir()),
                "model_name": opened.model().name_or_path,
            }
    except HfWsError as error:
        return {"error": type(error).__name__, "text": str(error)}

print(json.dumps([report(*case) for case in json.loads(sys.argv[1])]))
"""


def _ask(hub: HubServer, home: Path, *cases: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Open each source in one fresh process that knows only this Hub."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(cases)],
        env=environment | hub.environment(home),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    tiny = make("llama", root)
    (tiny / "tokenizer.json").write_text("{}")
    (tiny / "evil.py").write_text("raise SystemExit")
    (tiny / "consolidated.safetensors").write_bytes(b"another format's copy of the weights")
    pickled = make("gpt2", root)
    (pickled / SINGLE).rename(pickled / "pytorch_model.bin")
    unsafe = make("llama_sharded", root)
    edit_index(unsafe, lambda index: index["weight_map"].update({"lm_head.weight": "../x.safetensors"}))
    adapter, empty = root / "adapter", root / "empty"
    for folder in (adapter, empty):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (empty / "README.md").write_text("nothing")
    return {
        "user/tiny": tiny,
        "user/gated": tiny,
        "user/pickled": pickled,
        "user/unsafe": unsafe,
        "user/adapter": adapter,
        "user/empty": empty,
    }


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[HubServer]:
    with serve(folders, gated=frozenset({"user/gated"})) as server:
        yield server


def test_a_hub_id_is_read_at_one_commit_and_then_offline(
    hub: HubServer, folders: dict[str, Path], tmp_path: Path
) -> None:
    cases = [
        ("user/tiny", {}),
        ("user/tiny", {"local_files_only": True}),
        ("user/tiny", {"revision": "main"}),
    ]
    first, *others = _ask(hub, tmp_path, *cases)
    stored = load_file(folders["user/tiny"] / SINGLE)
    data = hashlib.sha256(b"".join(stored[name].numpy().tobytes() for name in sorted(stored)))
    assert first == {
        "name": "user/tiny",
        "revision": hub.commit("user/tiny"),
        "names": sorted(stored),
        "data": data.hexdigest(),
        "files": ["config.json", "generation_config.json", SINGLE, "tokenizer.json"],
        "model_name": "user/tiny",
    }
    assert others == [first, first]
    fetched = [request for request in hub.requests if request.startswith("GET /user")]
    assert len(fetched) == len(set(fetched)) == 4
    # The first request learns the commit; later files are asked for at that commit, whatever main is by then.
    assert all(f"/resolve/{hub.commit('user/tiny')}/" in request for request in fetched[1:])


def test_every_hub_failure_says_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    expected = {
        "user/absent": ({}, "CheckpointError", "user/absent is not on the Hub, or is private"),
        "user/gated": ({}, "CheckpointError", "user/gated is gated; accept its terms"),
        "user/tiny": ({"revision": "v9"}, "CheckpointError", "user/tiny has no revision 'v9'"),
        "user/unseen": (
            {"local_files_only": True},
            "CheckpointError",
            "is no folder here and not in the local cache",
        ),
        "user/empty": ({}, "CheckpointError", "user/empty has no config.json"),
        "user/adapter": ({}, "PlanError", "user/adapter holds an adapter"),
        "user/pickled": ({}, "CheckpointError", "only .bin files, which are not read; convert"),
        "user/unsafe": ({}, "CheckpointError", "points to '../x.safetensors'"),
    }
    answers = _ask(hub, tmp_path, *((source, options) for source, (options, _, _) in expected.items()))
    for answer, (source, (_, error, text)) in zip(answers, expected.items(), strict=True):
        assert answer.get("error") == error, (source, answer)
        assert text in answer["text"]
    assert not any(".bin" in request for request in hub.requests if request.startswith("GET /user"))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(source: str, name: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append((name, local_files_only))
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("hf_ws.store.place.hf_hub_download", unreachable)
    with pytest.raises(
        CheckpointError, match=r"typo is no folder here and not in the local cache.*check the spelling"
    ):
        locate("user/typo")
    assert asked == [("config.json", False), ("adapter_config.json", True)]
