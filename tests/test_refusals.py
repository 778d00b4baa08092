"""Bad input, through the front door: refused by name before anything is written, the source untouched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_ws import AutoSubclone, certify
from hf_ws.errors import (
    CalibrationError,
    CheckpointError,
    HfWsError,
    PlanError,
    SizeError,
    UnsupportedArchitectureError,
)
from hf_ws.layouts.census import census, check_census
from tests import families
from tests.tiny_checkpoints import digest, edit_config, edit_weights, make


def _stable(value: Any) -> str:
    """A test's id without addresses: two workers must collect the same names."""
    return re.sub(r" at 0x\w+", "", str(value))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama: 2 layers, hidden 24 of 4 heads over 2 kv heads, ffn 40, vocabulary 61."""
    return make("llama", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "source"))


def refused(folder: Path, error: type[HfWsError], message: str, plans_too: bool = True, **ask: Any) -> None:
    """Refused by `from_pretrained`, and by `plan` where the config alone tells; nothing on disk moves."""
    around = folder.parent
    before = digest(around)
    working = sorted(Path.cwd().iterdir())
    with pytest.raises(error, match=message) as caught:
        AutoSubclone.from_pretrained(folder, **ask)
    assert "\n" not in str(caught.value)
    if plans_too:
        with pytest.raises(error, match=message):
            AutoSubclone.plan(folder, **ask)
    assert digest(around) == before
    assert sorted(Path.cwd().iterdir()) == working


# ------------------------------------------------------------------------------------------------ the checkpoint


def test_an_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="lama")
    refused(
        folder, UnsupportedArchitectureError, r"model type 'lama' is not in Transformers .*near names: llama"
    )


def test_remote_code(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')\n")
    edit_config(folder, model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    refused(folder, UnsupportedArchitectureError, "comes with remote code, which is never run")


def test_an_unknown_class(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaForCausalML"])
    message = r"class 'LlamaForCausalML' .* is not in Transformers .*did you mean .*LlamaForCausalLM"
    refused(folder, UnsupportedArchitectureError, message)
    refused(folder, UnsupportedArchitectureError, "class 'Nothing' .*model_class=", model_class="Nothing")
    refused(
        folder,
        UnsupportedArchitectureError,
        "model_class=Linear is not a PreTrainedModel",
        model_class=nn.Linear,
    )


class OddConfig(PreTrainedConfig):
    model_type = "odd"
    hidden_size: int = 12
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    vocab_size: int = 31


class Odd(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.weird = nn.Parameter(torch.zeros(config.hidden_size, 911))
        self.post_init()


def test_a_live_model_of_an_unknown_class() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="Odd has no forward of its own"):
        AutoSubclone.from_pretrained(Odd(OddConfig()), hidden=6)
    with pytest.raises(UnsupportedArchitectureError, match="neither a config nor a Transformers model class"):
        certify(nn.Linear)


def test_a_quantized_source(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, CheckpointError, r"is quantized \(gptq\).* dequantise")


def test_an_adapter_folder(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    refused(folder, PlanError, "adapter.*merge")


def test_a_live_model_that_is_no_transformer() -> None:
    for source in (nn.Linear(2, 2), 3, None, ""):
        with pytest.raises(HfWsError):
            AutoSubclone.from_pretrained(source, hidden=8)
        with pytest.raises(HfWsError):
            AutoSubclone.plan(source, hidden=8)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(23)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"1 missing: 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (_reshape, r"1 mis-shaped: 'model\.norm\.weight is \[23\] on disk and \[24\] by the config'"),
    ],
)
def test_missing_and_misshaped_tensors(folder: Path, change: Callable[[Any], None], message: str) -> None:
    refused(edit_weights(folder, change), CheckpointError, message, plans_too=False, hidden=12)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(
        folder,
        CheckpointError,
        r"has neither model\.safetensors nor .*; it has no weights",
        plans_too=False,
        hidden=12,
    )


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, r"config\.json")


def test_a_config_that_is_broken(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')
    refused(folder, CheckpointError, r"config\.json")


def test_a_source_that_is_nowhere(tmp_path: Path) -> None:
    for source in (tmp_path / "missing", "nobody/no-such-model"):
        for call in (AutoSubclone.from_pretrained, AutoSubclone.plan):
            with pytest.raises(CheckpointError, match=r"missing|no-such-model"):
                call(source, hidden=12, local_files_only=True)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("axis", ["hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab"])
@pytest.mark.parametrize("size", [0, -1, True, 1.5, "32", 2**40], ids=repr)
def test_sizes_that_no_model_has(saved: Path, axis: str, size: Any) -> None:
    refused(saved, SizeError, rf"{axis}={size!r}", **{axis: size})


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            {"hidden": 20},
            r"hidden=20 is not a whole number of heads of 6 channels; nearest legal: hidden=18 or 24",
        ),
        ({"kv_heads": 3}, r"heads=4 is no multiple of kv_heads=3; nearest legal: kv_heads=2 or 4"),
        ({"head_dim": 3}, r"head_dim=3 is odd"),
        ({"hidden": 48}, r"subclone cannot grow hidden from 24 to 48, heads from 4 to 8"),
        (
            {"vocab": 62},
            r"subclone cannot grow vocab from 61 to 62; ask for at most the source's size",
        ),
        ({"max_position_embeddings": 0}, r"positions=0"),
        (
            {"layers": 3},
            r"layers=3 is more than the source's 2, .* ask for at most 2, or for a method that grows, such as random",
        ),
        ({"heads": 4, "kv_heads": 1}, r"4 query heads over 1 kv heads are 4 to a group, the source has 2"),
        ({"experts": 2}, r"experts=2: LlamaConfig has no experts; it has hidden, heads"),
        ({"layer_policy": [0, 2]}, r"layers \[0, 2\]: allowed are 0 to 1, at least one of them"),
        ({"layer_policy": [-1]}, r"layers \[-1\]: allowed are 0 to 1"),
        ({"layer_policy": []}, r"layers \[\]: allowed are 0 to 1, at least one of them"),
        ({"layer_policy": [True, 1]}, r"layers \[True, 1\]: allowed are 0 to 1"),
        ({"layer_policy": [0.0]}, r"layers \[0\.0\]: allowed are 0 to 1"),
        ({"layer_policy": [1, 0]}, r"layers \[1, 0\] are not in ascending order, or repeat"),
        ({"layer_policy": [0, 0]}, r"layers \[0, 0\] are not in ascending order, or repeat"),
        ({"layer_policy": [0], "layers": 2}, r"layers=2, but layer_policy names 1: \[0\]"),
        ({"layer_policy": lambda depth, keep: (5,), "layers": 1}, r"layers \[5\]: allowed are 0 to 1"),
    ],
    ids=_stable,
)
def test_sizes_that_this_source_cannot_give(saved: Path, ask: dict[str, Any], message: str) -> None:
    refused(saved, SizeError, message, **ask)


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"hiden": 12}, r"LlamaConfig has no field 'hiden'; did you mean 'hidden'\?"),
        ({"hidden": 12, "hidden_size": 18}, r"hidden is given twice: hidden=12 and hidden_size=18"),
        (
            {"method": "subclon"},
            r"method 'subclon' is unknown; known are random, .*did you mean 'subclone'",
        ),
        ({"method": 3}, r"method 3 is unknown"),
        ({"method": {}}, r"method \{\} is unknown"),
        (
            {"method": "subclone", "method_args": {"rescal": False}},
            r"method subclone: .*'rescal'; its options are: rescale, score",
        ),
        (
            {"method": "subclone", "method_args": {"score": "tayler"}},
            r"score 'tayler' is unknown; known are activation, l2_activation",
        ),
        ({"layer_policy": "firts", "layers": 1}, r"layer_policy 'firts' is unknown; .*did you mean 'first'"),
        ({"layer_policy": 1, "layers": 1}, r"layer_policy 1 is unknown"),
        (
            {"layer_policy": lambda depth, keep: (0, 1), "layers": 1},
            r"kept 2 layers, 1 were asked for: \[0, 1\]",
        ),
        ({"seed": -1}, r"seed=-1: wanted is a whole number"),
        ({"seed": "7"}, r"seed='7': wanted is a whole number"),
        ({"device": "warp"}, r"device='warp' cannot be used here"),
        ({"dtype": "int8"}, r"dtype='int8' is unknown; allowed are float32, bfloat16"),
        ({"dtype": torch.int8}, r"dtype=torch.int8 is unknown"),
        ({"dtype": "float33"}, r"dtype='float33' is unknown"),
    ],
    ids=_stable,
)
def test_words_that_mean_nothing(saved: Path, ask: dict[str, Any], message: str) -> None:
    refused(saved, PlanError, message, **ask)


# ------------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "the calibration data is empty; give at least one sequence"),
        (torch.zeros(0, 8, dtype=torch.long), r"shape \(0, 8\)"),
        (torch.rand(2, 8), "type torch.float32; wanted are whole numbers"),
        (torch.full((1, 4), 61), "token ids run from 61 to 61, the model knows 0 to 60"),
        (["text without a tokenizer"], "calibration texts need a tokenizer, and the source has none"),
        (7, "calibration data is a int"),
    ],
)
def test_calibration_data_that_says_nothing(saved: Path, calibration: Any, message: str) -> None:
    refused(saved, CalibrationError, message, hidden=12, calibration=calibration)


# -------------------------------------------------------------------------------------- the source is only read


def test_the_source_is_never_changed(folder: Path) -> None:
    before = digest(folder)
    for method in ("subclone", "weight_selection", "random"):
        target = AutoSubclone.from_pretrained(folder, hidden=12, method=method)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.add_(1)
    assert digest(folder) == before


def test_a_live_source_keeps_its_config() -> None:
    source = BertModel(
        BertConfig(
            vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
        )
    )
    before = json.dumps(source.config.to_dict(), sort_keys=True, default=str)
    AutoSubclone.from_pretrained(source, hidden=12, layers=1)
    assert json.dumps(source.config.to_dict(), sort_keys=True, default=str) == before


# ------------------------------------------------------------------------------------------------ another kind of model


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            {"attention_bias": True},
            r"has parameters that its source lacks: .*k_proj\.bias, .* and 5 more; leave",
        ),
        ({"tie_word_embeddings": True}, r"would lose: lm_head\.weight; leave the config field"),
    ],
)
def test_fields_that_change_what_the_model_is_made_of(saved: Path, ask: dict[str, Any], message: str) -> None:
    refused(saved, PlanError, message, hidden=12, **ask)
    AutoSubclone.from_pretrained(
        saved, hidden=12, method="random", **ask
    )  # which takes nothing from the source


def test_a_bias_is_not_left_behind() -> None:
    source = families.model("llama_tied")  # has biases
    with pytest.raises(PlanError, match=r"would lose: .*k_proj\.bias"):
        AutoSubclone.plan(source, attention_bias=False)


def test_tied_embeddings_may_be_untied() -> None:
    source = families.model("llama_tied")
    target = AutoSubclone.from_pretrained(source, tie_word_embeddings=False)
    assert target.lm_head.weight is not target.model.embed_tokens.weight
    assert torch.equal(families.logits(source), families.logits(target))


def test_heads_that_their_storage_does_not_allow() -> None:
    with pytest.raises(SizeError, match=r"qkv_proj.weight: heads=6 is stored in 4 equal blocks"):
        AutoSubclone.plan(families.model("codegen"), hidden=48)


def test_heads_that_would_grow_name_the_width_that_goes_with_them() -> None:
    with pytest.raises(SizeError, match=r"cannot grow head_dim from 8 to 16; .*heads=4 goes with hidden=32"):
        AutoSubclone.plan(families.model("gpt2"), heads=4)


def test_a_layer_kind_the_miniature_did_not_have() -> None:
    certificate = certify(families.model("qwen3_moe_mixed"))
    dense = {name: text for name, text in certificate.layouts.items() if "experts" not in name}
    config = families.config("qwen3_moe_mixed")
    shapes = census(families.model_class("qwen3_moe_mixed"), config)
    check_census(shapes, config, certificate)
    with pytest.raises(
        UnsupportedArchitectureError, match=r"experts.*the proven layouts have no such parameter"
    ):
        check_census(shapes, config, replace(certificate, layouts=dense))
