"""Compensations that run the start on the calibration data: its last norm, and what writes a drifted stream."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BeitConfig,
    BeitForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from hf_ws import AutoSubclone, Plan
from hf_ws.axes import HIDDEN
from hf_ws.errors import CalibrationError
from hf_ws.evidence import calibrate
from hf_ws.methods import Request
from hf_ws.plan import Gather
from tests import families

IDS = families.tokens(16, 32)
NARROW = {
    "llama": {"hidden": 32, "heads": 8, "kv_heads": 4, "layers": 2},
    "gpt2": {"hidden": 32, "heads": 4, "layers": 2},
}
NARROW |= dict.fromkeys(("gemma", "qwen3", "olmo2"), NARROW["llama"]) | dict.fromkeys(
    ("gptj", "opt"), NARROW["gpt2"]
)


def start(source: PreTrainedModel, *compensation: str, data: Any = IDS, **options: Any) -> PreTrainedModel:
    options = {"method": "subclone", **options}
    return AutoSubclone.from_pretrained(source, calibration=data, compensation=compensation, **options)


def divergence(source: PreTrainedModel, made: PreTrainedModel) -> float:
    """KL of the calibration data, in nats a token."""
    wanted, given = (families.logits(model, IDS).log_softmax(-1) for model in (source, made))
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


# ------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("name", ["output", "least_squares_drifted"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_at_full_size_nothing_changes(family: str, name: str) -> None:
    source = families.model(family)
    assert all(map(torch.equal, start(source, name).parameters(), source.parameters()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma", "gptj"])
def test_predictions_come_nearer_to_the_source(family: str) -> None:
    source = families.model(family)
    plain, made = start(source, **NARROW[family]), start(source, "output", **NARROW[family])
    changed = [
        name
        for (name, a), b in zip(plain.named_parameters(), made.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert {name.rpartition(".")[0] for name in changed} <= {"model.norm", "transformer.ln_f"}
    assert changed
    assert divergence(source, made) < divergence(source, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_gain_that_was_spoilt_is_found_again(family: str) -> None:
    """The one fault of the start is a last norm three times too loud: that is taken back, in every channel."""
    source = families.model(family)
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f"}[family]

    def too_loud(request: Request) -> Plan:
        return request.plan({}, gains={f"{norm}.weight": 3.0})

    spoilt, made = start(source, method=too_loud), start(source, "output", method=too_loud)
    assert divergence(source, spoilt) > 0.1
    assert divergence(source, made) < 1e-4
    own, wanted = (model.get_submodule(norm).weight.detach() for model in (made, source))
    torch.testing.assert_close(own, wanted, rtol=0.1, atol=0.05, check_dtype=False)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gemma2", {}, "scales or caps it"),
        ("olmo", {}, "reads none that has one"),
    ],
)
def test_what_output_cannot_set_is_named(family: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CalibrationError, match=why):
        start(families.model(family, **changes), "output", ffn=64)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_start_of_any_type_is_fitted(family: str, dtype: str) -> None:
    source = families.model(family).to(getattr(torch, dtype))
    options = {**NARROW[family], "method": "subclone", "dtype": dtype}
    plain, made = start(source, **options), start(source, "output", **options)
    assert made.dtype == getattr(torch, dtype)
    assert divergence(source, made) < divergence(source, plain)


def test_without_logits_or_words_there_is_nothing_to_compare() -> None:
    source = families.model("llama")
    with pytest.raises(CalibrationError, match="gives none"):
        start(AutoModel.from_config(source.config), "output", ffn=64)
    with pytest.raises(CalibrationError, match="the words are not the same"):
        start(source, "output", vocab=100)


@pytest.mark.parametrize("name", ["output", "least_squares_drifted"])
def test_evidence_is_not_enough(name: str) -> None:
    source = families.model("llama")
    evidence = calibrate(source, IDS)
    with pytest.raises(CalibrationError, match="here the data itself is needed"):
        start(source, name, ffn=64, data=evidence)


# ------------------------------------------------------------------------------------------------- drifted


@pytest.mark.parametrize("method", ["subclone", "rotation"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "opt"])
def test_the_stream_comes_nearer_to_the_sources(family: str, method: str) -> None:
    source = families.model(family).double()
    options = {**NARROW[family], "method": method, "layer_policy": "first", "dtype": "float64"}
    plain, made = start(source, **options), start(source, "least_squares_drifted", **options)
    assert _drift(source, made) < 0.9 * _drift(source, plain)


def _drift(source: PreTrainedModel, made: PreTrainedModel) -> float:
    """Mean square between what enters the last norms, the source's in the start's channels."""
    axis_map = made.hf_ws_plan.maps[HIDDEN]
    theirs, own = (_enters_last(model) for model in (source, made))
    wanted = (
        theirs[:, axis_map.as_array]
        if isinstance(axis_map, Gather)
        else theirs @ torch.from_numpy(axis_map.write).double().T
    )
    return float((own - wanted).square().mean())


def _enters_last(model: PreTrainedModel) -> Tensor:
    norm = [
        module
        for name, module in model.named_modules()
        if name.endswith(("model.norm", "ln_f", "decoder.final_layer_norm"))
    ][-1]
    return _given(model, norm)


def _given(model: PreTrainedModel, module: torch.nn.Module) -> Tensor:
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    families.logits(model, IDS)
    hook.remove()
    return seen[0].double()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_writer_is_the_least_squares_solution(family: str) -> None:
    """Against PyTorch's lstsq on the rows themselves, the penalty as rows of their own."""
    source = families.model(family).double()
    options = {**NARROW[family], "method": "subclone", "dtype": "float64"}
    plain, made = start(source, **options), start(source, "least_squares_drifted", **options)
    writer, norm = {
        "llama": ("model.layers.0.self_attn.o_proj", "model.layers.0.post_attention_layernorm"),
        "gpt2": ("transformer.h.0.attn.c_proj", "transformer.h.0.ln_2"),
    }[family]
    read = _given(plain, plain.get_submodule(writer))
    kept = made.hf_ws_plan.maps[HIDDEN].as_array
    missing = _given(source, source.get_submodule(norm))[:, kept] - _given(plain, plain.get_submodule(norm))
    penalty = (1e-3 * read.square().sum(0).mean()).sqrt() * torch.eye(read.shape[1]).double()
    if family == "gpt2":  # with a bias, on which there is no penalty
        read = torch.cat([read, torch.ones(len(read), 1).double()], 1)
        penalty = torch.cat([penalty, torch.zeros(len(penalty), 1).double()], 1)
    rows, wanted = torch.cat([read, penalty]), torch.cat([missing, missing.new_zeros(len(penalty), 32)])
    change = torch.linalg.lstsq(rows, wanted).solution
    before, after = (model.get_submodule(writer) for model in (plain, made))
    moved = after.weight - before.weight
    found = moved if family == "gpt2" else moved.T
    torch.testing.assert_close(found, change[: len(found)], rtol=1e-6, atol=1e-9)
    if family == "gpt2":
        torch.testing.assert_close(after.bias - before.bias, change[-1], rtol=1e-6, atol=1e-9)


def test_what_the_class_multiplies_is_divided_out() -> None:
    """Granite multiplies what a block adds: as good as one that has the number in its matrices."""
    sizes = {
        "vocab_size": families.VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    one, other = (
        GraniteForCausalLM(GraniteConfig(**sizes, residual_multiplier=by)).eval().double()
        for by in (0.25, 1.0)
    )
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
    made = [start(model, "least_squares_drifted", hidden=32, dtype="float64") for model in (one, other)]
    assert len(made[0].hf_ws_plan.values) == 2 * 3
    torch.testing.assert_close(*(families.logits(model) for model in made), rtol=1e-6, atol=1e-8)


BEIT = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8, "num_labels": 5,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_channels_that_hardly_sound_are_let_alone(dtype: str) -> None:
    torch.manual_seed(0)
    source = BeitForImageClassification(BeitConfig(**BEIT, layer_scale_init_value=0.2)).eval()
    with torch.no_grad():
        for name, own in source.named_parameters():
            if "lambda" in name:
                own[:4] *= 1e-7
    source.to(getattr(torch, dtype))
    plain, made = (
        start(source, *own, data=[PICTURES], hidden=24) for own in ((), ("least_squares_drifted",))
    )
    assert made.hf_ws_plan.values.keys() & {"beit.layers.0.mlp.fc2.weight", "beit.layers.1.mlp.fc2.weight"}
    moved = {
        name: float((own.detach() - plain.get_parameter(name).detach()).abs().max())
        for name, own in made.named_parameters()
    }
    assert 0 < max(moved.values()) < 10


SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4,
    "decoder_start_token_id": 0, "num_experts": 4,
}  # fmt: skip
WORDS = torch.arange(24).view(2, 12)
PICTURES = {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
IN_ANOTHER_ORDER = {
    "experts": (
        lambda: SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SEQ2SEQ)),
        {"input_ids": WORDS, "decoder_input_ids": WORDS},
        16,
        ".experts.",
    ),
    "windows": (
        lambda: SwinForImageClassification(
            SwinConfig(image_size=32, patch_size=2, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        PICTURES,
        12,
        "layers.0.blocks.0.attention.o_proj",
    ),
    "one token": (
        lambda: CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, image_size=32,
                patch_size=8,
            )
        ),
        PICTURES,
        16,
        "layers.1.mlp.fc2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_ANOTHER_ORDER)
def test_what_comes_to_the_norm_in_another_order_is_left_alone(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, batch, hidden, left = IN_ANOTHER_ORDER[name]
    torch.manual_seed(0)
    source = build().eval()
    with caplog.at_level(logging.WARNING, "hf_ws"):
        values = start(source, "least_squares_drifted", data=[batch], hidden=hidden).hf_ws_plan.values
    assert values
    assert not [key for key in values if left in key]
    warned = next(line for line in caplog.messages if "least_squares_drifted leaves" in line)
    assert left in warned


def test_a_saved_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    source = families.model("gpt2")
    done = ("least_squares_hidden", "rms", "least_squares_drifted", "output")
    first = start(source, *done, **NARROW["gpt2"])
    assert first.hf_ws_plan.compensated == done
    first.hf_ws_plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == first.hf_ws_plan
    assert all(map(torch.equal, first.parameters(), again.apply(source).parameters()))
