"""Types whose configs or classes have something that a miniature of the default does not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BridgeTowerConfig,
    BridgeTowerModel,
    MobileBertConfig,
    MobileBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    ProphetNetConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    SqueezeBertConfig,
    SqueezeBertForMaskedLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)
from transformers.models.prophetnet.modeling_prophetnet import (
    ProphetNetNgramSelfAttention,
    compute_all_stream_relative_buckets,
)

from hf_ws import AutoSubclone, Plan
from hf_ws.errors import HfWsError, PlanError, SizeError, UnsupportedArchitectureError
from hf_ws.layouts import catalogue, infer
from hf_ws.layouts.certify import certificate_of
from hf_ws.layouts.prove import TOLERANCE
from tests.test_zoo import Case

pytestmark = pytest.mark.filterwarnings("ignore")  # what a class of Transformers warns of


def planned(model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, **ask: Any) -> Plan:
    """A plan from nothing but a config of full size."""
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    return AutoSubclone.plan(folder, method="weight_selection", **ask)


def test_a_bridge_with_more_layers_than_a_tower_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(SizeError, match=r"layers=5 is less than cross\.layers=6.*nearest legal: layers=6"):
        planned(BridgeTowerModel, BridgeTowerConfig(), tmp_path, layers=5)


def test_a_bridge_may_be_shorter_together_with_its_towers(tmp_path: Path) -> None:
    plan = planned(BridgeTowerModel, BridgeTowerConfig(), tmp_path, layers=5, **{"cross.layers": 4})
    assert plan.target_config["num_hidden_layers"] == 4
    assert plan.target_config["text_config"]["num_hidden_layers"] == 5
    assert plan.target_config["vision_config"]["num_hidden_layers"] == 5


def test_what_links_two_layers_of_a_bridge_goes_with_the_second() -> None:
    """BridgeTower's links are one less than its layers."""
    tower = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}
    config = BridgeTowerConfig(
        hidden_size=24,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=4,
        text_config=tower | {"vocab_size": 61},
        vision_config={"hidden_size": 64, "num_hidden_layers": 4, "image_size": 32, "patch_size": 16},
    )
    source = BridgeTowerModel(config)
    for number, link in enumerate(source.cross_modal_text_link_tower):
        torch.nn.init.constant_(link.LayerNorm.weight, number)
    plan = AutoSubclone.plan(
        source, method="weight_selection", layer_policy="middle_dropped", **{"cross.layers": 3}
    )
    kept = plan.layers["cross.layers"]
    assert kept == (0, 1, 3)
    target = plan.apply(source)
    assert target.config.num_hidden_layers == 3
    links = [float(link.LayerNorm.weight[0].detach()) for link in target.cross_modal_text_link_tower]
    assert links == [layer - 1 for layer in kept[1:]]


def zamba2(blocks: int = 1) -> Zamba2ForCausalLM:
    """Eight layers, of which 1, 3, 5 and 6 have a shared transformer and an adapter of it, filled with its number."""
    kinds = ["linear_attention", "hybrid"] * 3 + ["hybrid", "linear_attention"]
    config = Zamba2Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=8,
        layers_block_type=kinds,
        num_attention_heads=4,
        intermediate_size=48,
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=16,
        adapter_rank=4,
        num_mem_blocks=blocks,
    )
    torch.manual_seed(0)
    return Zamba2ForCausalLM(config)


def adapter(model: Zamba2ForCausalLM, layer: int, use: int) -> torch.Tensor:
    return model.model.layers[layer].shared_transformer.feed_forward.gate_up_proj_adapter_list[use][0].weight


def test_a_shared_layer_keeps_the_adapters_of_those_that_still_share_it() -> None:
    source = zamba2()
    kept = [0, 1, 2, 4, 6, 7]  # without 3 and 5: of the adapters the first and the last
    target = AutoSubclone.from_pretrained(
        source, method="weight_selection", layers=6, layer_policy=lambda *_, **__: kept
    )
    assert target.config.hybrid_layer_ids == [1, 4]
    assert torch.equal(adapter(target, 1, 0), adapter(source, 1, 0))
    assert torch.equal(adapter(target, 1, 1), adapter(source, 1, 3))
    text = torch.arange(20).view(2, 10)
    assert target(text).logits.isfinite().all()


def test_a_layer_whose_adapter_is_another_block_s_is_not_dropped() -> None:
    """Two blocks take turns: without layer 3 the rest would change theirs."""
    with pytest.raises(PlanError, match="lacks"):
        AutoSubclone.plan(
            zamba2(blocks=2),
            method="weight_selection",
            layers=7,
            layer_policy=lambda *_, **__: [0, 1, 2, 4, 5, 6, 7],
        )


def test_zamba2_of_full_size_is_what_its_miniature_shows(tmp_path: Path) -> None:
    assert planned(Zamba2ForCausalLM, Zamba2Config(), tmp_path, layers=50).target_sizes["layers"] == 50


REFUSED: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, int], type[HfWsError], str]] = {
    "a recurrence of another width than the stream": (
        RecurrentGemmaForCausalLM,
        RecurrentGemmaConfig(lru_width=4096),
        {"hidden": 1280},
        UnsupportedArchitectureError,
        r"linear_y\.weight is \[4096, 2560\].*a field of the config makes it a model of another kind",
    ),
    "no bottleneck": (
        MobileBertForMaskedLM,
        MobileBertConfig(use_bottleneck=False),
        {"layers": 12},
        UnsupportedArchitectureError,
        "no miniature of it can be built and run",
    ),
    "unequal groups": (
        SqueezeBertForMaskedLM,
        SqueezeBertConfig(q_groups=2, k_groups=4),
        {"hidden": 384},
        SizeError,
        r"hidden stays 768, not 384: nothing explains how \S+key\.weight depends on it",
    ),
    "groups in one projection alone": (
        SqueezeBertForMaskedLM,
        SqueezeBertConfig(intermediate_groups=2),
        {"ffn": 384},
        SizeError,
        r"ffn stays 1536, not 384: nothing explains how \S+output\.conv1d\.weight depends on it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_unlike_the_default_is_refused_before_weights_are_read(case: str, tmp_path: Path) -> None:
    model_class, config, ask, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        planned(model_class, config, tmp_path, **ask)


def test_groups_of_another_number_leave_free_what_they_do_not_touch(tmp_path: Path) -> None:
    plan = planned(SqueezeBertForMaskedLM, SqueezeBertConfig(q_groups=2, k_groups=4), tmp_path, ffn=384)
    assert plan.target_config["intermediate_size"] == 4 * 384


TURNS = "(2 audio_config.waves 2 + audio_config.still.hidden)"


@pytest.mark.parametrize(
    "wrong",
    [
        "(audio_config.waves 4 + audio_config.still.hidden)",
        "(4 audio_config.waves + audio_config.still.hidden)",
        "(audio_config.still.hidden + 2 audio_config.waves 2)",
    ],
)
def test_music_flamingo_turns_pairs_of_channels_and_no_others(wrong: str) -> None:
    """By the window's number, then by the time in it; duplication shows which frequency each has."""
    model_class, config = catalogue.default_of("musicflamingo", catalogue.types()["musicflamingo"])
    inferred = infer(model_class, config)
    right = certificate_of(model_class, inferred)
    assert "audio_config.hidden" in right.axes
    assert right.errors["reads"] <= TOLERANCE
    assert TURNS in right.layouts["model.multi_modal_projector.linear_1.weight"]
    layouts = {name: text.replace(TURNS, wrong) for name, text in right.layouts.items()}
    seeded = certificate_of(model_class, replace(inferred, layouts=layouts, choices={}))
    assert "audio_config.hidden" not in seeded.axes
    assert "audio_config.still.hidden" in seeded.fixed


def test_prophetnet_mixes_heads_and_positions() -> None:
    """Why its decoder's heads stay: what the stock class adds to one head's scores was computed for all of them.

    Of the biases by distance, only head 0 has any, and the same at each position. So the scores of the main stream
    get them in head 0 alone; those of the n-gram streams get them in every head, at one position in as many.
    """
    config = ProphetNetConfig(hidden_size=24, num_decoder_attention_heads=3, ngram=2, num_buckets=4)
    attention = ProphetNetNgramSelfAttention(config).double().eval()
    torch.nn.init.zeros_(attention.relative_pos_embeddings.weight)
    with torch.no_grad():
        attention.relative_pos_embeddings.bias.copy_(
            (torch.arange(4 * 3) % 3 == 0).double()
        )  # buckets, then heads
    positions = torch.arange(1, 7)[None]
    main, ahead = compute_all_stream_relative_buckets(config.num_buckets, 16, positions)
    with torch.no_grad():
        scores = attention.get_main_relative_pos_embeddings(
            torch.zeros(1, 6, 24).double(), torch.zeros(1, 3, 6, 6), positions, main
        )
        ngram = attention.get_predict_relative_pos_embeddings(
            torch.zeros(1, 6, 2, 24).double(), torch.zeros(1, 2, 3, 6, 12), positions, ahead
        )
    assert [bool(scores[:, head].any()) for head in range(3)] == [True, False, False]
    assert scores[:, 0].all()
    assert ngram.shape == (1, 2, 3, 6, 12)
    for head in range(3):  # rows are positions
        assert ngram[0, :, head].any(-1).double().mean() == pytest.approx(1 / 3)


def test_every_layer_of_one_kind_may_go(caplog: pytest.LogCaptureFixture) -> None:
    """Kimi Linear with a linear layer alone: nothing is planned for the attention that is gone."""
    source = Case("kimi_linear").source
    sizes = {"hidden": source.config.hidden_size * 2 // 3, "heads": source.config.num_attention_heads}
    ids = torch.arange(24, 72).view(4, 12)
    made = AutoSubclone.from_pretrained(
        source, layers=1, layer_policy="first", method="subclone", calibration=ids, **sizes
    )
    assert made.config.layer_types == ["linear_attention"]
    assert made.hf_ws_plan.gains
    assert made(ids).logits.isfinite().all()


@pytest.mark.parametrize("method", ["subclone", "rotation", "weight_selection"])
def test_the_last_layers_with_an_axis_of_their_own_are_named(method: str) -> None:
    """Gemma 4 numbers heads of another width by the layers that have them."""
    source = Case("gemma4_unified_text").source
    with pytest.raises(
        PlanError, match=r"has head_dim\.1, as layers 1, 2 of the source have; keep one of them"
    ):
        AutoSubclone.plan(source, layers=1, layer_policy="first", method=method)
    assert AutoSubclone.plan(source, layers=1, layer_policy="last", method=method).layers == {"layers": (2,)}
