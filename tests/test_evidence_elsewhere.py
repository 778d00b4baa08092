"""Calibration of models that lie elsewhere, run in several processes, or are not made of the usual blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    DbrxConfig,
    DbrxForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MobileBertConfig,
    MobileBertForMaskedLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
)

import hf_ws
from hf_ws import AutoSubclone, Evidence, calibrate
from hf_ws.errors import CalibrationError
from hf_ws.evidence.sums import share
from tests import families

IDS = families.tokens(rows=3, length=8)
PICTURES = [
    {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([0, 1]),
    }
]


def convnext() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=32)
    return ConvNextForImageClassification(config).eval()


def swin() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return SwinForImageClassification(SwinConfig(image_size=32, patch_size=2, **sizes)).eval()


# --- elsewhere ---


def test_a_model_offloaded_to_disk_gives_what_it_gives_in_memory(tmp_path: Path) -> None:
    model = families.model("llama")
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(4)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    found, whole = (calibrate(one, IDS, wants=("moments",)) for one in (offloaded, model))
    assert found.fingerprint["weights"] == whole.fingerprint["weights"]
    for key, values in whole.items():
        torch.testing.assert_close(found[key], values, rtol=1e-9, atol=1e-12)


def test_another_folder_holds_the_same_model(tmp_path: Path) -> None:
    cache, seen = tmp_path / "sums.safetensors", []
    for name in ("one", "other"):
        families.model("llama").save_pretrained(tmp_path / name)
        source = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        seen.append(calibrate(source, IDS, cache=cache).fingerprint)  # another model's cache is refused
    assert seen[0] == seen[1]


def test_evidence_of_other_weights_is_told(caplog: pytest.LogCaptureFixture) -> None:
    source, told = families.model("llama"), "evidence of other weights than the source's"
    found = calibrate(source, IDS)
    AutoSubclone.plan(source, hidden=32, calibration=found, layer_policy="first")
    assert told not in caplog.text
    with torch.no_grad():
        source.model.layers[1].mlp.down_proj.weight.mul_(2)
    AutoSubclone.plan(source, hidden=32, calibration=found, layer_policy="first")
    assert told in caplog.text


def test_processes_that_are_not_joined_are_told(monkeypatch, caplog) -> None:
    assert share() == (0, 1)
    assert not caplog.text
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert share() == (0, 1)
    assert "2 processes were launched and are not joined" in caplog.text


def test_evidence_is_public_and_one_want_needs_no_brackets() -> None:
    found = calibrate(families.model("llama"), IDS, wants="rms")  # type: ignore[arg-type]
    assert found.wants == ("mean_abs", "rms")
    assert isinstance(found, Evidence)
    assert "Evidence" in hf_ws.__all__


# --- other blocks ---


def test_blocks_that_put_out_lists_are_seen_and_skipped() -> None:
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=160, n_embd=32, n_layer=4, n_head=4, n_positions=32)
    source = OpenAIGPTLMHeadModel(config).eval()
    found = calibrate(source, IDS, wants=("similarity", "angles"))
    with torch.no_grad():
        states = source(IDS, output_hidden_states=True).hidden_states
    for layer in range(4):
        cosine = F.cosine_similarity(states[layer].double(), states[layer + 1].double(), dim=-1).mean()
        assert found.similarity[layer] == pytest.approx(float(cosine), abs=1e-6)
    target = AutoSubclone.from_pretrained(source, layers=2, calibration=IDS, layer_policy="loss_increase")
    assert target.config.n_layer == 2


def test_pictures_keep_their_channels_second() -> None:
    source = convnext()
    found = calibrate(source, PICTURES, wants=("moments", "similarity"))
    norm = source.convnext.encoder.stages[1].downsampling_layer[0]
    seen = []
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].movedim(1, -1).flatten(0, -2)))
    with torch.no_grad():
        source(PICTURES[0]["pixel_values"])
    hook.remove()
    rows = seen[0].double()
    moments = found.moments["convnext.encoder.stages.1.downsampling_layer.0.weight"]
    torch.testing.assert_close(moments.second.double(), rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-7)
    assert len(found.similarity) == 4


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        (convnext, {"hidden.0": 8, "hidden.1": 16}),
        (swin, {"hidden": 8, "heads.0": 1, "heads.1": 2}),
    ],
)
@pytest.mark.parametrize("compensation", [None, ["rms"]])
def test_stages_fall_back_to_selection_and_still_run(source: Any, sizes: Any, compensation: Any) -> None:
    found = AutoSubclone.from_pretrained(
        source(), calibration=PICTURES, compensation=compensation, method="rotation", **sizes
    )
    assert torch.isfinite(found(PICTURES[0]["pixel_values"]).logits).all()


def test_where_no_stream_is_seen_neurons_and_heads_are(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 160, "hidden_size": 32, "embedding_size": 16, "intra_bottleneck_size": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    source = MobileBertForMaskedLM(MobileBertConfig(**sizes, **layers)).eval()
    assert {axis for axis, _ in calibrate(source, IDS)} == {"bottleneck.heads", "ffn"}
    assert AutoSubclone.from_pretrained(source, ffn=16, calibration=IDS).config.intermediate_size == 16
    AutoSubclone.from_pretrained(source, hidden=24, method="subclone", calibration=IDS)
    assert "hidden: no activation to be seen, ranked by weight magnitude" in caplog.text
    albert = AlbertForMaskedLM(AlbertConfig(**sizes, **layers, num_hidden_groups=1)).eval()
    with pytest.raises(
        CalibrationError, match=r"no layers that are counted \(ALBERT\); then leave calibration out"
    ):
        calibrate(albert, IDS)


def test_experts_in_one_matrix_are_routed_to() -> None:
    torch.manual_seed(0)
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    sizes: dict[str, Any] = {"vocab_size": 160, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}
    source = DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=ffn)).eval()
    found = calibrate(source, IDS, wants=("routes",))
    logits = source(IDS, output_router_logits=True).router_logits
    for layer in range(2):
        chosen = logits[layer].softmax(-1).topk(2).indices
        expected = torch.bincount(chosen.flatten(), minlength=4).double() / IDS.numel()
        torch.testing.assert_close(found.routes[layer], expected)


def test_a_router_that_chooses_by_zeros_is_read() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1}
    config = Llama4TextConfig(**sizes, **layers, **experts, intermediate_size_mlp=48, pad_token_id=0)
    source = Llama4ForCausalLM(config).eval()
    found = calibrate(source, IDS, wants=("routes",))
    rows: list[torch.Tensor] = []
    router = source.model.layers[1].feed_forward.router
    hook = router.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        source(IDS)
    hook.remove()
    scores = rows[0] @ router.weight.detach().T
    chosen = scores.topk(2).indices
    expected = torch.bincount(chosen.flatten(), minlength=4).double() / IDS.numel()
    torch.testing.assert_close(found.routes[1], expected)
    weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen).sigmoid())
    torch.testing.assert_close(found.route_weights[1], weights.double().mean(0), rtol=1e-5, atol=1e-7)
