"""Reading is suspicious, writing is all or nothing; `from_pretrained` is the oracle of what was read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from hf_ws.errors import CheckpointError, OutputError, PlanError, UnsupportedArchitectureError
from hf_ws.store import (
    check_output,
    copy_side_files,
    load_config,
    model_class,
    new_folder,
    open_source,
)
from hf_ws.store.shards import INDEX, SINGLE, open_shards

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def _save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def _llama(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **fields}))


def _gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=4)


def _bert() -> BertConfig:
    return BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )


def _mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2))


def _without_prefix(folder: Path) -> Path:
    _save(GPT2LMHeadModel(_gpt2()), folder)
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(folder / SINGLE).items()}
    # The oldest checkpoints also carry the causal mask, which the class ignores.
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: _save(_llama(), folder),
    "llama_bf16": lambda folder: _save(_llama().bfloat16(), folder),
    "llama_sharded": lambda folder: _save(_llama(), folder, max_shard_size="20KB"),
    "llama_tied": lambda folder: _save(_llama(tie_word_embeddings=True), folder),
    "gpt2": lambda folder: _save(GPT2LMHeadModel(_gpt2()), folder),
    "gpt2_without_prefix": _without_prefix,
    "bert": lambda folder: _save(BertForMaskedLM(_bert()), folder),
    "mixtral": lambda folder: _save(_mixtral(), folder),
}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("originals")
    for name, build in MODELS.items():
        build(root / name)
    return root


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the models, for a test to damage."""
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


def _edit_config(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def _edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def _digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- reading


@pytest.mark.parametrize("name", MODELS)
def test_serves_what_from_pretrained_loads(originals: Path, name: str) -> None:
    folder = originals / name
    before = _digest(folder)
    with open_source(folder) as source:
        oracle = source.model_class.from_pretrained(folder, dtype="auto").state_dict()
        assert list(source.tensors) == list(oracle)
        for key, expected in oracle.items():
            served = source.tensor(key)
            assert source.tensors[key] == (source.tensors[key].__class__)(
                tuple(expected.shape), expected.dtype
            )
            assert served.dtype == expected.dtype
            assert torch.equal(served, expected)
        live = source.model().state_dict()
        assert all(torch.equal(live[key], expected) for key, expected in oracle.items())
        assert source.model() is source.model()
        assert not source.model().training
    assert (source.name, source.revision, source.files) == (name, None, folder)
    assert _digest(folder) == before


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mixtral"}))
def test_opening_reads_headers_only(originals: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded")
    )
    with open_source(originals / name) as source:
        key = next(iter(source.tensors))
        assert source.tensor(key).shape == source.tensors[key].shape


def test_a_tensor_costs_page_cache_not_memory(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(64 << 20, dtype=torch.bfloat16)}, tmp_path / SINGLE)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

    shards = open_shards(tmp_path)
    before = anonymous()
    tensor = shards.tensor("weight")
    assert float(tensor.sum()) == 0
    assert anonymous() - before < 40  # MB, of 128
    shards.close()
    assert float(tensor[-1]) == 0  # still mapped


def test_tied_names_share_one_tensor_whichever_is_stored(copy: Callable[[str], Path]) -> None:
    folder = copy("llama_tied")
    assert "lm_head.weight" not in load_file(folder / SINGLE)

    def keep_the_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    expected = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    with open_source(_edit_weights(folder, keep_the_head)) as source:
        assert torch.equal(source.tensor("model.embed_tokens.weight"), expected)
        assert torch.equal(source.tensor("lm_head.weight"), expected)


def test_spare_heads_are_listed_and_left_out(tmp_path: Path) -> None:
    folder = _save(BertForPreTraining(_bert()), tmp_path / "bert")
    _edit_config(folder, architectures=["BertForMaskedLM"])
    with open_source(folder) as source:
        assert {"cls.seq_relationship.weight", "bert.pooler.dense.weight"} <= set(source.unused)
        assert not set(source.unused) & set(source.tensors)
        assert source.model().state_dict().keys() == source.tensors.keys()


def test_old_names_are_renamed_as_transformers_does(copy: Callable[[str], Path]) -> None:
    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            aged = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
            tensors[aged] = tensors.pop(name)

    folder = copy("bert")
    expected = load_file(folder / SINGLE)
    with open_source(_edit_weights(folder, age)) as source:
        oracle = BertForMaskedLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(source.tensor(name), value) for name, value in oracle.items())
        assert all(torch.equal(source.tensor(name), value) for name, value in expected.items())


def test_another_class_may_be_asked_for(originals: Path) -> None:
    with open_source(originals / "llama", model_class=LlamaModel) as source:
        assert source.unused == ("lm_head.weight",)
        assert isinstance(source.model(), LlamaModel)
    with open_source(originals / "gpt2", model_class="GPT2Model") as source:
        assert source.model_class is GPT2Model
        assert "wte.weight" in source.tensors


def test_a_live_model_is_a_source(originals: Path) -> None:
    model = _llama(tie_word_embeddings=True)
    source = open_source(model)
    assert source.model() is model
    assert (source.name, source.files, source.model_class) == ("LlamaForCausalLM", None, LlamaForCausalLM)
    assert all(torch.equal(source.tensor(name), value) for name, value in model.state_dict().items())
    assert source.fingerprint == open_source(model).fingerprint
    with torch.no_grad():
        model.model.norm.weight[0] = 2
    assert source.fingerprint != open_source(model).fingerprint


def test_the_fingerprint_tells_checkpoints_apart(originals: Path, copy: Callable[[str], Path]) -> None:
    first = open_source(originals / "llama").fingerprint
    assert first == open_source(copy("llama")).fingerprint
    tuned = _edit_weights(copy("llama_bf16"), lambda tensors: tensors["lm_head.weight"].add_(1))
    assert (
        len({first, open_source(tuned).fingerprint, open_source(originals / "llama_bf16").fingerprint}) == 3
    )


def test_links_into_a_cache_are_followed(originals: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(originals / "llama_sharded", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    with open_source(snapshot) as source:
        assert torch.equal(source.tensor("lm_head.weight"), source.model().lm_head.weight)


def test_an_unknown_tensor_name_is_an_error(originals: Path) -> None:
    with (
        open_source(originals / "llama") as source,
        pytest.raises(CheckpointError, match=r"no tensor 'nope'; it has"),
    ):
        source.tensor("nope")


# ---- config


def test_config_is_cleaned_of_what_chooses_code(copy: Callable[[str], Path]) -> None:
    evil = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = _edit_config(
        copy("llama"),
        auto_map=evil,
        attn_implementation="evil/kernel",
        _attn_implementation="evil/kernel",
        transformers_weights="../evil.safetensors",
    )
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    config = load_config(folder)
    assert config.to_dict().keys() == AutoConfig.for_model("llama").to_dict().keys()
    assert config._attn_implementation is None
    with open_source(str(folder)) as source:
        assert source.model().config._attn_implementation in ("sdpa", "eager")
        assert not hasattr(source.model().config, "auto_map")


def test_the_dtype_of_old_configs_is_kept(copy: Callable[[str], Path]) -> None:
    folder = copy("llama_bf16")
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert load_config(folder).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"model_type": "evil", "auto_map": {}},
            UnsupportedArchitectureError,
            "remote code, which is never run",
        ),
        (
            {"model_type": "lama"},
            UnsupportedArchitectureError,
            "'lama' is not in Transformers .*near names: llama",
        ),
        ({"model_type": None}, CheckpointError, "no model_type"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            CheckpointError,
            r"quantized \(gptq\).*dequantise",
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            CheckpointError,
            r"quantized \(fp8\)",
        ),
        ({"num_attention_heads": 5}, CheckpointError, "not a valid llama config"),
        ({"hidden_size": "wide"}, CheckpointError, "not a valid llama config"),
    ],
)
def test_config_refusals(
    copy: Callable[[str], Path], fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = _edit_config(copy("llama"), **fields)
    with pytest.raises(error, match=message):
        load_config(folder)
    with pytest.raises(error, match=message):
        open_source(folder)


def test_places_that_are_no_model(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="not a folder on this machine"):
        load_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a folder on this machine"):
        load_config("./absent")
    with pytest.raises(CheckpointError, match="neither a folder here nor a Hub id"):
        load_config("bad id!")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        load_config(copy("llama") / SINGLE)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PlanError, match="merge it first"):
        load_config(tmp_path)
    with pytest.raises(PlanError, match="give a PreTrainedModel"):
        open_source(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_model_class_is_the_one_named() -> None:
    config = LlamaConfig(**LLAMA)
    assert model_class(config) is LlamaForCausalLM
    assert model_class(config, "LlamaModel") is LlamaModel
    assert model_class(config, LlamaModel) is LlamaModel
    config.architectures = ["LlamaModel"]
    assert model_class(config) is LlamaModel
    config.architectures = ["LlamaForCausalML"]
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'LlamaForCausalML' .*did you mean LlamaForCausalLM"
    ):
        model_class(config)
    with pytest.raises(UnsupportedArchitectureError, match="not a PreTrainedModel"):
        model_class(config, torch.nn.Linear)  # type: ignore[arg-type]


# ---- refusals

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
    copy: Callable[[str], Path], change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_source(_edit_weights(copy("llama"), change))


def test_converted_weights_that_do_not_fit_the_config(copy: Callable[[str], Path]) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    with pytest.raises(CheckpointError, match=r"1 missing: 'model\.norm\.weight'"):
        open_source(_edit_weights(copy("mixtral"), drop))


def test_tied_names_with_two_values_are_refused(copy: Callable[[str], Path]) -> None:
    folder = _edit_config(copy("llama"), tie_word_embeddings=True)
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
def test_damaged_files(copy: Callable[[str], Path], name: str) -> None:
    damage, message = DAMAGES[name]
    folder = copy("llama")
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
def test_an_index_may_name_only_files_beside_it(copy: Callable[[str], Path], name: str) -> None:
    folder = _edit_index(copy("llama_sharded"), lambda index: index["weight_map"].update({Q_PROJ: name}))
    with pytest.raises(CheckpointError, match="a shard must be a"):
        open_source(folder)


def test_shards_and_index_must_agree(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama_sharded")
    shards = sorted(folder.glob("*.safetensors"))
    good = (folder / INDEX).read_text()

    def expect(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            open_source(folder)
        (folder / INDEX).write_text(good)

    _edit_index(folder, lambda index: index["weight_map"].update(ghost=shards[0].name))
    expect("no shard has 'ghost'")
    _edit_index(folder, lambda index: index["weight_map"].pop(Q_PROJ))
    expect(f"the index does not list '{Q_PROJ}'")
    home = json.loads(good)["weight_map"][Q_PROJ]
    elsewhere = next(shard.name for shard in shards if shard.name != home)
    _edit_index(folder, lambda index: index["weight_map"].update({Q_PROJ: elsewhere}))
    expect("in another shard than the index says")
    _edit_index(folder, lambda index: index.update(weight_map=[]))
    expect("weight_map must map")

    _edit_index(folder, lambda index: index.pop("metadata"))
    open_source(folder).close()
    save_file({**load_file(folder / elsewhere), Q_PROJ: torch.zeros(24, 24)}, folder / elsewhere)
    expect("is in two shards")
    shards[0].unlink()
    shards[1].unlink()
    expect(rf"lacks 2 of {len(shards)} shards: '{shards[0].name}', '{shards[1].name}'")


# ---- writing


def test_a_new_folder_appears_whole_with_ordinary_modes(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with new_folder(tmp_path / "deep" / "out") as staging:
            _llama().save_pretrained(staging)
            assert not (tmp_path / "deep" / "out").exists()
    finally:
        os.umask(previous)
    files = list((tmp_path / "deep" / "out").iterdir())
    assert {path.name for path in files} == {"config.json", "generation_config.json", SINGLE}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with safe_open(tmp_path / "deep" / "out" / SINGLE, framework="pt") as file:
        assert Q_PROJ in file.keys()  # noqa: SIM118 - not a dict


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
