"""Reading a source: `from_pretrained` is the oracle of what was read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from hf_ws.errors import CheckpointError, PlanError, UnsupportedArchitectureError
from hf_ws.store import load_config, model_class, open_source
from hf_ws.store.shards import SINGLE, open_shards
from tests.tiny_checkpoints import (
    LLAMA,
    MODELS,
    bert,
    digest,
    edit_config,
    edit_weights,
    llama,
    make,
    save,
)


@pytest.mark.parametrize("name", MODELS)
def test_serves_what_from_pretrained_loads(tmp_path: Path, name: str) -> None:
    folder = make(name, tmp_path)
    before = digest(folder)
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
    assert digest(folder) == before


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mixtral"}))
def test_opening_reads_headers_only(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded")
    )
    with open_source(make(name, tmp_path)) as source:
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


def test_tied_names_share_one_tensor_whichever_is_stored(tmp_path: Path) -> None:
    folder = make("llama_tied", tmp_path)
    assert "lm_head.weight" not in load_file(folder / SINGLE)

    def keep_the_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    expected = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    with open_source(edit_weights(folder, keep_the_head)) as source:
        assert torch.equal(source.tensor("model.embed_tokens.weight"), expected)
        assert torch.equal(source.tensor("lm_head.weight"), expected)


def test_spare_heads_are_listed_and_left_out(tmp_path: Path) -> None:
    folder = save(BertForPreTraining(bert()), tmp_path / "bert")
    edit_config(folder, architectures=["BertForMaskedLM"])
    with open_source(folder) as source:
        assert {"cls.seq_relationship.weight", "bert.pooler.dense.weight"} <= set(source.unused)
        assert not set(source.unused) & set(source.tensors)
        assert source.model().state_dict().keys() == source.tensors.keys()


def test_old_names_are_renamed_as_transformers_does(tmp_path: Path) -> None:
    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            aged = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
            tensors[aged] = tensors.pop(name)

    folder = make("bert", tmp_path)
    expected = load_file(folder / SINGLE)
    with open_source(edit_weights(folder, age)) as source:
        oracle = BertForMaskedLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(source.tensor(name), value) for name, value in oracle.items())
        assert all(torch.equal(source.tensor(name), value) for name, value in expected.items())


def test_another_class_may_be_asked_for(tmp_path: Path) -> None:
    with open_source(make("llama", tmp_path), model_class=LlamaModel) as source:
        assert source.unused == ("lm_head.weight",)
        assert isinstance(source.model(), LlamaModel)
    with open_source(make("gpt2", tmp_path), model_class="GPT2Model") as source:
        assert source.model_class is GPT2Model
        assert "wte.weight" in source.tensors


def test_a_live_model_is_a_source(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    source = open_source(model)
    assert source.model() is model
    assert (source.name, source.files, source.model_class) == ("LlamaForCausalLM", None, LlamaForCausalLM)
    assert all(torch.equal(source.tensor(name), value) for name, value in model.state_dict().items())
    assert source.fingerprint == open_source(model).fingerprint
    with torch.no_grad():
        model.model.norm.weight[0] = 2
    assert source.fingerprint != open_source(model).fingerprint


def test_the_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    first = open_source(make("llama", tmp_path)).fingerprint
    assert first == open_source(make("llama", tmp_path)).fingerprint
    tuned = edit_weights(make("llama_bf16", tmp_path), lambda tensors: tensors["lm_head.weight"].add_(1))
    assert (
        len({first, open_source(tuned).fingerprint, open_source(make("llama_bf16", tmp_path)).fingerprint})
        == 3
    )


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(make("llama_sharded", tmp_path), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    with open_source(snapshot) as source:
        assert torch.equal(source.tensor("lm_head.weight"), source.model().lm_head.weight)


def test_an_unknown_tensor_name_is_an_error(tmp_path: Path) -> None:
    with (
        open_source(make("llama", tmp_path)) as source,
        pytest.raises(CheckpointError, match=r"no tensor 'nope'; it has"),
    ):
        source.tensor("nope")


def test_config_is_cleaned_of_what_chooses_code(tmp_path: Path) -> None:
    evil = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = edit_config(
        make("llama", tmp_path),
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


def test_the_dtype_of_old_configs_is_kept(tmp_path: Path) -> None:
    folder = make("llama_bf16", tmp_path)
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
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = edit_config(make("llama", tmp_path), **fields)
    with pytest.raises(error, match=message):
        load_config(folder)
    with pytest.raises(error, match=message):
        open_source(folder)


def test_places_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder on this machine"):
        load_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a folder on this machine"):
        load_config("./absent")
    with pytest.raises(CheckpointError, match="neither a folder here nor a Hub id"):
        load_config("bad id!")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        load_config(make("llama", tmp_path) / SINGLE)
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
