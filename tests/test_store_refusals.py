"""Weights that are damaged, unsafe or not what the config says are refused before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ws.errors import CheckpointError
from hf_ws.store import open_source
from hf_ws.store.shards import INDEX, SINGLE
from tests.tiny_checkpoints import (
    edit_config,
    edit_index,
    edit_weights,
    make,
)

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[Q_PROJ]


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ][:20].contiguous()


def _third_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ.replace("1", "2")] = tensors[Q_PROJ].clone()


def _bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ.replace("weight", "bias")] = torch.zeros(24)


def _wrapped(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def _fp8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].to(torch.float8_e4m3fn)


def _int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, rf"1 missing: '{Q_PROJ}'"),
        (_reshape, rf"{Q_PROJ} is \[20, 24\] on disk and \[24, 24\] by the config"),
        (_third_layer, r"1 left over: 'model\.layers\.2"),
        (_bias, r"1 left over: .*q_proj\.bias"),
        (_wrapped, r"21 missing: "),
        (_fp8, r"F8_E4M3 without a quantization_config"),
        (_int8, r"is stored as torch\.int8, a float was expected"),
    ],
)
def test_weights_that_do_not_fit_the_config(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_source(edit_weights(make("llama", tmp_path), change))


def test_converted_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    with pytest.raises(CheckpointError, match=r"1 missing: 'model\.norm\.weight'"):
        open_source(edit_weights(make("mixtral", tmp_path), drop))


def test_tied_names_with_two_values_are_refused(tmp_path: Path) -> None:
    folder = edit_config(make("llama", tmp_path), tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        open_source(folder)


def _cut(folder: Path) -> None:
    with (folder / SINGLE).open("r+b") as file:
        file.truncate((folder / SINGLE).stat().st_size - 100)


def _header(text: str) -> Callable[[Path], object]:
    content = len(text).to_bytes(8, "little") + text.encode() + bytes(8)
    return lambda folder: (folder / SINGLE).write_bytes(content)


def _pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def _pipe(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


ENTRY = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (_cut, "cut short or damaged"),
    "tiny": (lambda folder: (folder / SINGLE).write_bytes(b"12345"), "is no safetensors file"),
    "endless header": (lambda folder: (folder / SINGLE).write_bytes(b"\xff" * 64), "is no safetensors file"),
    "no tensors": (_header("{}"), "header says"),
    "list": (_header("[1]"), "JSON object was expected"),
    "deep": (_header("[" * 100_000), "not valid JSON"),
    "twice": (_header("{" + ENTRY + "," + ENTRY + "}"), "'a' is there twice"),
    "size": (_header('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'), "takes 8 bytes"),
    "negative": (_header('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'), r"has shape \[-2\]"),
    "dtype": (_header('{"a":{"dtype":"F6_E2M3","shape":[2],"data_offsets":[0,8]}}'), "is stored as F6_E2M3"),
    "malformed": (_header('{"a":3}'), "malformed"),
    "escape": (_header('{"\\u001b[2J":3}'), "must be printable"),
    "hole": (_header('{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'), "is damaged"),
    "pickle": (_pickled, r"'pytorch_model\.bin' is not read: convert it to safetensors"),
    "pipe": (_pipe, "not a regular file"),
    "nothing": (lambda folder: (folder / SINGLE).unlink(), "no weights"),
    "stale": (lambda folder: (folder / INDEX).write_text("{}"), "two saves of which one is stale"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = make("llama", tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/../x.safetensors",
        "C:\\x.safetensors",
        "x.bin",
        ".safetensors",
    ],
)
def test_an_index_may_name_only_files_beside_it(tmp_path: Path, name: str) -> None:
    folder = edit_index(
        make("llama_sharded", tmp_path), lambda index: index["weight_map"].update({Q_PROJ: name})
    )
    with pytest.raises(CheckpointError, match="a shard must be a"):
        open_source(folder)


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    folder = make("llama_sharded", tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    good = (folder / INDEX).read_text()

    def expect(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            open_source(folder)
        (folder / INDEX).write_text(good)

    edit_index(folder, lambda index: index["weight_map"].update(ghost=shards[0].name))
    expect("no shard has 'ghost'")
    edit_index(folder, lambda index: index["weight_map"].pop(Q_PROJ))
    expect(f"the index does not list '{Q_PROJ}'")
    home = json.loads(good)["weight_map"][Q_PROJ]
    elsewhere = next(shard.name for shard in shards if shard.name != home)
    edit_index(folder, lambda index: index["weight_map"].update({Q_PROJ: elsewhere}))
    expect("in another shard than the index says")
    edit_index(folder, lambda index: index.update(weight_map=[]))
    expect("weight_map must map")

    edit_index(folder, lambda index: index.pop("metadata"))
    open_source(folder).close()
    save_file({**load_file(folder / elsewhere), Q_PROJ: torch.zeros(24, 24)}, folder / elsewhere)
    expect("is in two shards")
    shards[0].unlink()
    shards[1].unlink()
    expect(rf"lacks 2 of {len(shards)} shards: '{shards[0].name}', '{shards[1].name}'")
