"""Key/value heads that are merged, or copied: Transformers' own output is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_ws import AutoSubclone, Plan, PlanError, SizeError
from tests import families
from tests.test_real import DEMO, loss, source_model, text

GROUPED = [
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "stablelm",
        "starcoder2",
    ),
    *("cohere", "granite", "smollm3", "mixtral", "qwen3_moe", "llama_tied"),
]
"""8 query heads over 4 key/value heads; in phi3 queries, keys and values are one tensor."""


APART = ["llama", "mistral", "qwen2", "gemma2", "starcoder2", "cohere", "granite", "smollm3", "llama_tied"]
"""Those with a matrix each for queries, keys and values, nothing between, and whole heads that turn, or none."""


def made(source: PreTrainedModel, **asked: object) -> PreTrainedModel:
    return AutoSubclone.from_pretrained(source, **{"method": "subclone", **asked})


def merged(source: PreTrainedModel, how: str = "mean", **asked: object) -> PreTrainedModel:
    return made(source, method_args={"kv_merge": how}, **asked)


def difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """Of their logits in float64, as a share of the largest."""
    a, b = families.logits(one), families.logits(other)
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", [*GROUPED, "falcon_40b"])
def test_more_key_value_heads_are_copies_and_the_same_function(family: str) -> None:
    source = families.model(family)
    field = "num_kv_heads" if "falcon" in family else "num_key_value_heads"
    grown = made(source, kv_heads=8)
    assert (getattr(source.config, field), getattr(grown.config, field)) == (4, 8)
    assert difference(grown, source) < 2e-5


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("method", ["subclone", "weight_selection"])
def test_the_mean_of_copies_is_what_was_copied(family: str, method: str) -> None:
    source = families.model(family)
    back = merged(made(source, kv_heads=8), kv_heads=4, method=method)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), source.parameters(), strict=True))


@pytest.mark.parametrize("family", [*GROUPED, "falcon_40b"])
def test_growing_then_selecting_comes_back(family: str) -> None:
    """The first copy of each is taken, and half of the query heads, as from the source."""
    source = families.model(family)
    grown = made(source, kv_heads=8)
    half = {"hidden": source.config.hidden_size // 2, "heads": 4, "method": "weight_selection"}
    back, straight = made(grown, kv_heads=4, **half), made(source, kv_heads=4, **half)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), straight.parameters(), strict=True))


def test_a_merged_head_is_the_mean_and_all_query_heads_stay() -> None:
    source = families.model("qwen2")
    target = merged(source, kv_heads=2)
    for before, after in zip(source.model.layers, target.model.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            weight, bias = getattr(before.self_attn, name).weight, getattr(before.self_attn, name).bias
            mean = weight.view(2, 2, -1, weight.shape[1]).mean(1).reshape(-1, weight.shape[1])
            torch.testing.assert_close(getattr(after.self_attn, name).weight, mean)
            torch.testing.assert_close(
                getattr(after.self_attn, name).bias, bias.view(2, 2, -1).mean(1).flatten()
            )
        assert torch.equal(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)
        assert torch.equal(before.self_attn.o_proj.weight, after.self_attn.o_proj.weight)


def test_heads_of_one_group_that_agree_are_merged_without_loss() -> None:
    """Also where query heads go at the same time: dead ones."""
    source = families.model("llama")
    grown = made(source, kv_heads=8)
    with torch.no_grad():
        for layer in (*grown.model.layers, *source.model.layers):
            layer.self_attn.o_proj.weight.view(64, 8, 16)[:, 1::2] = 0.0
    target = AutoSubclone.from_pretrained(
        grown,
        heads=4,
        kv_heads=4,
        method="subclone",
        method_args={"kv_merge": "mean", "rescale": False, "score": "magnitude"},
    )
    assert difference(target, source) < 2e-5


def test_a_merging_plan_is_saved_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = families.model("llama")
    plan = AutoSubclone.plan(source, kv_heads=1, method="subclone", method_args={"kv_merge": "mean"})
    assert "1 means of 4 neighbours of the 4" in str(plan)
    plan.save(tmp_path / "plan.json")
    models = [one.apply(source) for one in (plan, Plan.load(tmp_path / "plan.json"))]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    models[0].save_pretrained(tmp_path / "made")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.num_key_value_heads == 1


@pytest.mark.parametrize("family", APART)
def test_least_squares_finds_what_heads_have_in_common(family: str) -> None:
    """Copies are merged without loss, whatever basis each was put into: the function is the source's."""
    source = families.model(family)
    grown = scrambled(made(source, kv_heads=8))
    assert difference(grown, source) < 2e-5
    assert difference(merged(grown, "least_squares", kv_heads=4), source) < 2e-5
    assert difference(merged(grown, "mean", kv_heads=4), source) > 0.05


@torch.no_grad()
def scrambled(model: PreTrainedModel) -> PreTrainedModel:
    """The same function, each head's values in another basis, and each pair of its keys turned and scaled."""
    draw = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        own = layer.self_attn
        channels = own.v_proj.weight.shape[0] // 8
        half = channels // 2
        for head in range(8):
            rows = slice(head * channels, (head + 1) * channels)
            basis = torch.eye(channels) + 0.3 * torch.randn(channels, channels, generator=draw)
            angle = torch.rand(half, generator=draw) * 6.0
            scale = 0.5 + torch.rand(half, generator=draw)
            turn = torch.zeros(channels, channels)
            first, second = torch.arange(half), torch.arange(half) + half
            if model.config.model_type == "cohere":  # pairs of neighbours
                first, second = 2 * torch.arange(half), 2 * torch.arange(half) + 1
            turn[first, first] = turn[second, second] = scale * angle.cos()
            turn[second, first], turn[first, second] = scale * angle.sin(), -scale * angle.sin()
            for module, by in (
                (own.v_proj, basis),
                (own.k_proj, turn),
                (own.q_proj, torch.linalg.inv(turn).T),
            ):
                module.weight[rows] = by @ module.weight[rows]
                if module.bias is not None:
                    module.bias[rows] = by @ module.bias[rows]
            own.o_proj.weight[:, rows] = own.o_proj.weight[:, rows] @ torch.linalg.inv(basis)
    return model


def test_a_least_squares_plan_is_saved_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = families.model("qwen2")
    plan = AutoSubclone.plan(source, kv_heads=1, method="subclone", method_args={"kv_merge": "least_squares"})
    assert "1 least-squares merges of 4 neighbours each" in str(plan)
    model = plan.apply(source)
    assert "1 least-squares merges of 4 neighbours of the 4" in str(model.hf_ws_plan)
    model.hf_ws_plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json").apply(source)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_on_real_weights_least_squares_loses_a_tenth_of_what_the_mean_loses() -> None:
    """With all query heads there; and with half of them it is ahead of selecting whole groups."""
    ids, source = text(DEMO)[16:], source_model(DEMO)
    whole = loss(source, ids)
    mean, fitted = (loss(merged(source, how, kv_heads=1), ids) for how in ("mean", "least_squares"))
    assert fitted - whole < 0.1 * (mean - whole)
    half = {"kv_heads": 1, "heads": 2, "calibration": text(DEMO)[:16]}
    assert loss(merged(source, "least_squares", **half), ids) < loss(made(source, **half), ids)


def test_rotation_merges_over_the_inputs_that_it_saw() -> None:
    """With second moments at hand, which data-free methods do not ask for."""
    ids, source = text(DEMO), source_model(DEMO)
    free = merged(source, "least_squares", kv_heads=1)
    seen = merged(source, "least_squares", kv_heads=1, method="rotation", calibration=ids[:16])
    assert loss(seen, ids[16:]) < loss(free, ids[16:])


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (
            {"kv_heads": 3, "heads": 6, "hidden": 48},
            SizeError,
            r"kv_heads=3 is no divisor of the source's 4: .*nearest legal: kv_heads=2",
        ),
        (
            {"kv_heads": 2, "how": "median"},
            PlanError,
            r"kv_merge='median' is unknown; known are mean, least_squares, or None to select",
        ),
    ],
)
def test_what_cannot_be_merged(asked: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merged(families.model("llama"), **asked)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen3", r"q_norm.weight \(head_dim\) is not one of four matrices"),
        ("phi3", r"qkv_proj.weight .* is not one of four matrices of queries, keys, values and output"),
        ("olmo2", r"q_norm.weight .* is not one of four matrices.*take kv_merge='mean', or None to select"),
        ("stablelm", r"stablelm turns only a part of each head's 16 channels, so its keys cannot be merged"),
    ],
)
def test_what_least_squares_cannot_merge(family: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        merged(families.model(family), "least_squares", kv_heads=2)


def test_heads_that_lie_among_their_queries_are_not_merged() -> None:
    with pytest.raises(
        PlanError, match=r"stores key/value heads among their query heads, and they cannot be merged"
    ):
        merged(families.model("falcon_40b"), kv_heads=2)


def test_without_merging_a_wider_group_is_refused_and_merging_is_named() -> None:
    with pytest.raises(
        SizeError, match=r"kv_heads=4, or merge kv heads with method_args={'kv_merge': 'least_squares'}"
    ):
        made(families.model("llama"), kv_heads=2)


def test_copies_are_whole_and_under_the_same_query_heads() -> None:
    source = families.model("llama", num_attention_heads=12, hidden_size=96)
    with pytest.raises(
        SizeError, match=r"become more by copying the source's 4 next to themselves.*leave heads at 12"
    ):
        made(source, kv_heads=6)
    with pytest.raises(SizeError, match=r"cannot grow heads from 8 to 16, kv_heads from 4 to 8"):
        made(families.model("llama"), kv_heads=8, heads=16)
