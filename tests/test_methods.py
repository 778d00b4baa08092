"""Each method against what its paper says, worked out with numpy on live models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from hf_ws import AutoSubclone, Plan
from hf_ws.depth import POLICIES, LayerPolicy, wants_of
from hf_ws.errors import CalibrationError, CheckpointError, PlanError, SizeError
from hf_ws.layouts.irregular import alibi_index, rotary_index
from hf_ws.methods import METHODS, Request
from hf_ws.methods.weight_selection import uniform
from hf_ws.plan import Gather, Rank
from tests import families

IDS = families.tokens(rows=4, length=16)


def subclone(source: PreTrainedModel, **ask: Any) -> PreTrainedModel:
    return AutoSubclone.from_pretrained(source, **{"method": "subclone", **ask})


def index_of(model: PreTrainedModel, key: str) -> list[int]:
    return list(model.hf_ws_plan.maps[key].index)


def arrays(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {name: value.detach().float().numpy() for name, value in model.state_dict().items()}


def equal(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_array_equal(one, other, strict=True)


def rows_of(heads: list[int], head_dim: int) -> np.ndarray:
    return np.concatenate([np.arange(h * head_dim, (h + 1) * head_dim) for h in heads])


# ------------------------------------------------------------------------------------------------ which indices

SHRINK = st.integers(1, 400).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


@given(SHRINK)
def test_uniform_indices_ascend_and_stay_inside(sizes: tuple[int, int]) -> None:
    size, keep = sizes
    index = uniform(size, keep)
    assert len(index) == keep
    assert (np.diff(index) > 0).all()
    assert 0 <= index[0] <= index[-1] < size


@given(st.integers(1, 60), st.integers(1, 60))
def test_uniform_indices_of_a_whole_ratio_are_its_multiples(keep: int, ratio: int) -> None:
    assert uniform(ratio * keep, keep).tolist() == [j * ratio for j in range(keep)]


@given(SHRINK.filter(lambda sizes: sizes[0] % sizes[1]))
def test_uniform_indices_of_any_other_ratio_are_nearest_to_even_spacing(sizes: tuple[int, int]) -> None:
    size, keep = sizes
    index = uniform(size, keep)
    assert (index[0], index[-1]) == (0, size - 1)
    for j, i in enumerate(index.tolist()):  # |i - j (size - 1) / (keep - 1)| <= 1/2, in whole numbers
        assert 2 * abs(i * (keep - 1) - j * (size - 1)) <= keep - 1


@given(st.integers(1, 400))
def test_uniform_indices_of_equal_sizes_are_all_of_them(size: int) -> None:
    assert uniform(size, size).tolist() == list(range(size))


STATIC = {name: policy for name, policy in POLICIES.items() if wants_of(policy) is None}


@pytest.mark.parametrize("policy", STATIC.values(), ids=STATIC)
@given(st.integers(1, 64).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth))))
def test_a_policy_keeps_what_it_was_asked_to(policy: LayerPolicy, sizes: tuple[int, int]) -> None:
    depth, keep = sizes
    kept = policy(depth, keep)
    assert list(kept) == sorted(set(kept))
    assert len(kept) == keep
    assert 0 <= kept[0] <= kept[-1] < depth


def test_the_first_layers_are_the_first() -> None:
    assert POLICIES["first"](36, 24) == tuple(range(24))


def test_gpt2_large_to_medium_drops_the_middle_third() -> None:
    assert POLICIES["middle_dropped"](36, 24) == (*range(12), *range(24, 36))


@given(st.integers(1, 64).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth))))
def test_what_is_dropped_is_one_run_with_as_much_before_it_as_after(sizes: tuple[int, int]) -> None:
    depth, keep = sizes
    dropped = sorted(set(range(depth)) - set(POLICIES["middle_dropped"](depth, keep)))
    if dropped:
        assert dropped == list(range(dropped[0], dropped[-1] + 1))
        before, after = dropped[0], depth - 1 - dropped[-1]
        assert before - after in (0, 1)


# ------------------------------------------------------------------------------------------------ weight selection

HIDDEN = np.arange(32) * 2  # 64 to 32
FFN = np.round(np.arange(64) * 95 / 63).astype(int)  # 96 to 64, both ends kept


def test_llama_is_selected_index_by_index() -> None:
    source = families.model("llama")
    target = subclone(source, hidden=32, method="weight_selection")
    before, after = arrays(source), arrays(target)
    queries, keys = (
        rows_of([0, 1, 4, 5], 16),
        rows_of([0, 2], 16),
    )  # every second kv head, with both its queries
    equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, HIDDEN])
    equal(after["lm_head.weight"], before["lm_head.weight"][:, HIDDEN])
    equal(after["model.norm.weight"], before["model.norm.weight"][HIDDEN])
    for layer in range(4):
        own = f"model.layers.{layer}."
        for name, rows in {"q": queries, "k": keys, "v": keys}.items():
            key = f"{own}self_attn.{name}_proj.weight"
            equal(after[key], before[key][rows][:, HIDDEN])
        key = f"{own}self_attn.o_proj.weight"
        equal(after[key], before[key][HIDDEN][:, queries])
        for name in ("gate", "up"):
            key = f"{own}mlp.{name}_proj.weight"
            equal(after[key], before[key][FFN][:, HIDDEN])
        key = f"{own}mlp.down_proj.weight"
        equal(after[key], before[key][HIDDEN][:, FFN])
        for name in ("input_layernorm", "post_attention_layernorm"):
            equal(after[f"{own}{name}.weight"], before[f"{own}{name}.weight"][HIDDEN])
    assert len(after) == 3 + 4 * 9


def test_gpt2_is_selected_with_q_k_and_v_apart() -> None:
    source = families.model("gpt2")  # Conv1D: stored [in, out]; hidden 64 = 8 heads x 8
    target = subclone(source, hidden=32, method="weight_selection")
    before, after = arrays(source), arrays(target)
    heads = rows_of([0, 2, 4, 6], 8)
    fused = np.concatenate([part * 64 + heads for part in range(3)])
    for name in ("wte", "wpe"):
        equal(after[f"transformer.{name}.weight"], before[f"transformer.{name}.weight"][:, HIDDEN])
    for layer in range(4):
        own = f"transformer.h.{layer}."
        equal(after[f"{own}attn.c_attn.weight"], before[f"{own}attn.c_attn.weight"][HIDDEN][:, fused])
        equal(after[f"{own}attn.c_attn.bias"], before[f"{own}attn.c_attn.bias"][fused])
        equal(after[f"{own}attn.c_proj.weight"], before[f"{own}attn.c_proj.weight"][heads][:, HIDDEN])
        equal(after[f"{own}attn.c_proj.bias"], before[f"{own}attn.c_proj.bias"][HIDDEN])
        equal(after[f"{own}mlp.c_fc.weight"], before[f"{own}mlp.c_fc.weight"][HIDDEN][:, FFN])
        equal(after[f"{own}mlp.c_fc.bias"], before[f"{own}mlp.c_fc.bias"][FFN])
        equal(after[f"{own}mlp.c_proj.weight"], before[f"{own}mlp.c_proj.weight"][FFN][:, HIDDEN])
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_proj.bias"):
            equal(after[own + name], before[own + name][HIDDEN])
    assert target.lm_head.weight is target.transformer.wte.weight


def test_neox_heads_move_with_their_q_k_and_v() -> None:
    source = families.model("gpt_neox")  # hidden 128 = 8 heads x (q, k, v) x 16
    target = subclone(source, hidden=64, method="weight_selection")
    key = "gpt_neox.layers.2.attention.query_key_value.weight"
    before, after = arrays(source)[key], arrays(target)[key]
    equal(after, before.reshape(8, 3, 16, 128)[::2][..., ::2].reshape(192, 64))


def test_consecutive_keeps_the_first_of_everything() -> None:
    source = families.model("llama")
    target = subclone(
        source, hidden=32, layers=2, method="weight_selection", method_args={"selection": "consecutive"}
    )
    before, after = arrays(source), arrays(target)
    for name, values in after.items():
        equal(values, before[name][tuple(slice(n) for n in values.shape)])


def test_layers_after_the_last_kept_one_are_never_read() -> None:
    source = families.model("llama")
    with torch.no_grad():
        for parameter in source.model.layers[2:].parameters():
            parameter.fill_(float("nan"))
    target = subclone(source, hidden=32, layers=2, method="weight_selection")
    assert all(bool(p.isfinite().all()) for p in target.parameters())


def _random(consistent: bool, seed: int = 0, family: str = "llama") -> PreTrainedModel:
    args = {"selection": "random", "consistent": consistent}
    return subclone(families.model(family), hidden=32, method="weight_selection", method_args=args, seed=seed)


def test_a_consistent_draw_is_one_index_for_every_tensor() -> None:
    target = _random(consistent=True)
    before, after = arrays(families.model("llama")), arrays(target)
    hidden = index_of(target, "hidden")
    assert hidden == sorted(set(hidden))
    assert hidden not in (list(range(32)), HIDDEN.tolist())
    equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, hidden])
    equal(after["lm_head.weight"], before["lm_head.weight"][:, hidden])
    for layer in range(4):
        equal(
            after[f"model.layers.{layer}.input_layernorm.weight"],
            before[f"model.layers.{layer}.input_layernorm.weight"][hidden],
        )
    groups = [head // 2 for head in index_of(target, "heads")]
    assert groups == [g for g in index_of(target, "kv_heads") for _ in range(2)]


def test_an_inconsistent_draw_is_another_for_each_parameter() -> None:
    target = _random(consistent=False)
    names = [name for name, _ in target.named_parameters()]
    drawn = [tuple(index_of(target, f"hidden@{name}")) for name in names]
    assert len(set(drawn)) == len(names)
    before, after = arrays(families.model("llama")), arrays(target)
    for name in (
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.3.input_layernorm.weight",
    ):
        equal(after[name], before[name][index_of(target, f"hidden@{name}")])


def test_an_inconsistent_draw_still_gives_tied_embeddings_one_tensor() -> None:
    target = _random(consistent=False, family="gpt2")
    assert target.lm_head.weight is target.transformer.wte.weight


@pytest.mark.parametrize("consistent", [True, False])
def test_a_draw_depends_on_the_seed_alone(consistent: bool) -> None:
    torch.manual_seed(1)
    one = arrays(_random(consistent))
    torch.manual_seed(2)
    again, other = arrays(_random(consistent)), arrays(_random(consistent, seed=1))
    assert all((one[name] == again[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"selection": "sideways"},
            r"selection='sideways' is unknown; known are uniform, consecutive, random",
        ),
        ({"consistent": False}, r"consistent=False goes with selection='random', not 'uniform'"),
        ({"rescale": True}, r"method weight_selection: .*'rescale'; its options are: selection, consistent"),
    ],
)
def test_an_option_that_is_none_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        AutoSubclone.plan(families.model("llama"), hidden=32, method="weight_selection", method_args=args)


@pytest.mark.parametrize("method", ["weight_selection", "subclone"])
def test_more_queries_to_a_kv_head_than_the_source_has_are_refused(method: str) -> None:
    message = r"8 query heads over 2 kv heads are 4 to a group, the source has 2: .* at least kv_heads=4"
    with pytest.raises(SizeError, match=message):
        AutoSubclone.plan(families.model("llama"), kv_heads=2, method=method)


# ------------------------------------------------------------------------------------------------ classifiers


def _classifier(cls: type[PreTrainedModel], family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return cls(families.config(family, num_labels=4)).eval()


@pytest.mark.parametrize(
    ("cls", "family", "head"),
    [
        (LlamaForSequenceClassification, "llama", "score"),
        (BertForSequenceClassification, "bert", "classifier"),
    ],
)
@pytest.mark.parametrize("method", ["weight_selection", "subclone"])
def test_a_classifier_is_kept_for_its_labels_and_fresh_for_others(
    cls: type[PreTrainedModel], family: str, head: str, method: str
) -> None:
    source = _classifier(cls, family)
    with torch.no_grad():
        source.get_submodule(head).weight.fill_(5.0)
    kept = subclone(source, hidden=32, method=method).get_submodule(head)
    fresh = subclone(source, hidden=32, method=method, num_labels=3).get_submodule(head)
    assert bool((kept.weight >= 5.0).all())
    assert fresh.weight.shape == (3, 32)
    assert 0.005 < float(fresh.weight.detach().std()) < 0.05  # the class's own start, not what memory held


# ------------------------------------------------------------------------------------------------ subclone
# A source whose loud channels, neurons and kv groups we choose: the indices are known before the method runs.

CHANNELS = sorted((5 * i + 3) % 64 for i in range(32))
NEURONS = {layer: sorted(((7 * i + 5 * layer) % 96) for i in range(64)) for layer in range(4)}
GROUPS = {0: [1, 3], 1: [0, 3], 2: [2, 3], 3: [0, 1]}


@pytest.fixture(scope="module")
def loud() -> LlamaForCausalLM:
    model = families.model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, CHANNELS] *= 1000
        for layer, block in enumerate(model.model.layers):
            block.mlp.up_proj.weight[NEURONS[layer]] *= 10
            block.self_attn.v_proj.weight[rows_of(GROUPS[layer], 16)] *= 10
    return model


def test_the_loud_channels_neurons_and_groups_are_kept(loud: LlamaForCausalLM) -> None:
    target = subclone(loud, hidden=32, calibration=IDS)
    assert index_of(target, "hidden") == CHANNELS
    for layer in range(4):
        assert index_of(target, f"ffn@{layer}") == NEURONS[layer]
        assert index_of(target, f"kv_heads@{layer}") == GROUPS[layer]
        assert index_of(target, f"heads@{layer}") == [2 * g + i for g in GROUPS[layer] for i in (0, 1)]


def test_the_loud_heads_of_a_fused_qkv_are_kept() -> None:
    model = families.model("gpt2")
    heads = [1, 4, 5, 7]
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, 128 + rows_of(heads, 8)] *= 100  # only v makes a head loud
            block.attn.c_attn.bias[:128] *= 100
    target = subclone(model, hidden=32, layers=2, calibration=IDS)
    assert target.hf_ws_plan.layers == {"layers": (0, 3)}
    for layer in range(2):
        assert index_of(target, f"heads@{layer}") == heads


def test_the_louder_queries_inside_a_group_are_kept() -> None:
    model = families.model("llama")  # kv groups stay, each gives up one of its two query heads
    target = subclone(model, heads=4, kv_heads=4, calibration=IDS)
    contexts: list[Tensor] = []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: contexts.append(args[0])
    )
    with torch.no_grad():
        model(IDS)
    hook.remove()
    loudness = contexts[0].abs().mean((0, 1)).view(4, 2, 16).mean(-1)
    assert index_of(target, "heads@1") == [2 * g + int(pair.argmax()) for g, pair in enumerate(loudness)]
    assert index_of(target, "kv_heads@1") == [0, 1, 2, 3]


def test_matrices_are_slices_times_the_root_of_the_fan_in_ratio(loud: LlamaForCausalLM) -> None:
    target = subclone(loud, hidden=32, layers=2, calibration=IDS)
    before, after = arrays(loud), arrays(target)
    hidden = index_of(target, "hidden")
    to_hidden, to_heads, to_ffn = (np.float32(math.sqrt(r)) for r in (64 / 32, 128 / 64, 96 / 64))

    def slices(one: np.ndarray, other: np.ndarray) -> None:
        np.testing.assert_allclose(one, other, rtol=3e-7, atol=0)

    equal(
        after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, hidden]
    )  # looked up, not read
    slices(after["lm_head.weight"], before["lm_head.weight"][:, hidden] * to_hidden)
    equal(after["model.norm.weight"], before["model.norm.weight"][hidden])
    for layer, old in enumerate((0, 3)):
        one, other = f"model.layers.{layer}.", f"model.layers.{old}."
        ffn, heads, keys = (index_of(target, f"{axis}@{layer}") for axis in ("ffn", "heads", "kv_heads"))
        for name, rows in {"q": heads, "k": keys, "v": keys}.items():
            expected = before[f"{other}self_attn.{name}_proj.weight"][rows_of(rows, 16)][:, hidden]
            slices(after[f"{one}self_attn.{name}_proj.weight"], expected * to_hidden)
        expected = before[f"{other}self_attn.o_proj.weight"][hidden][:, rows_of(heads, 16)]
        slices(after[f"{one}self_attn.o_proj.weight"], expected * to_heads)
        for name in ("gate", "up"):
            slices(
                after[f"{one}mlp.{name}_proj.weight"],
                before[f"{other}mlp.{name}_proj.weight"][ffn][:, hidden] * to_hidden,
            )
        slices(
            after[f"{one}mlp.down_proj.weight"],
            before[f"{other}mlp.down_proj.weight"][hidden][:, ffn] * to_ffn,
        )
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            equal(after[one + name], before[other + name][hidden])


def test_without_rescaling_every_value_is_the_sources_own(loud: LlamaForCausalLM) -> None:
    scaled = subclone(loud, hidden=32, calibration=IDS)
    plain = subclone(loud, hidden=32, calibration=IDS, method_args={"rescale": False})
    assert dict(plain.hf_ws_plan.maps) == dict(scaled.hf_ws_plan.maps)
    hidden, before, after = index_of(plain, "hidden"), arrays(loud), arrays(plain)
    for layer in range(4):
        ffn = index_of(plain, f"ffn@{layer}")
        key = f"model.layers.{layer}.mlp.down_proj.weight"
        equal(after[key], before[key][hidden][:, ffn])
    gains = {name: arrays(scaled)[name] / after[name] for name in after}
    for name, gain in gains.items():
        expected = {"down": math.sqrt(1.5), "embed": 1.0, "norm": 1.0}
        wanted = next((value for part, value in expected.items() if part in name), math.sqrt(2))
        np.testing.assert_allclose(gain, wanted, rtol=1e-6)


def test_biases_and_norms_are_exact_slices_and_a_tied_heads_gain_goes_to_the_final_norm() -> None:
    source = families.model("gpt2")
    target = subclone(source, hidden=32, calibration=IDS)
    before, after = arrays(source), arrays(target)
    hidden = index_of(target, "hidden")
    equal(after["transformer.wte.weight"], before["transformer.wte.weight"][:, hidden])
    assert target.lm_head.weight is target.transformer.wte.weight
    for name in ("weight", "bias"):
        expected = before[f"transformer.ln_f.{name}"][hidden] * np.float32(math.sqrt(2))
        np.testing.assert_allclose(after[f"transformer.ln_f.{name}"], expected, rtol=3e-7)
    for layer in range(4):
        own = f"transformer.h.{layer}."
        for name in (
            "ln_1.weight",
            "ln_1.bias",
            "ln_2.weight",
            "ln_2.bias",
            "attn.c_proj.bias",
            "mlp.c_proj.bias",
        ):
            equal(after[own + name], before[own + name][hidden])
        equal(after[f"{own}mlp.c_fc.bias"], before[f"{own}mlp.c_fc.bias"][index_of(target, f"ffn@{layer}")])


def test_an_untied_head_takes_its_own_gain() -> None:
    source = families.model("gpt2_untied")
    target = subclone(source, hidden=32, calibration=IDS)
    before, after, hidden = arrays(source), arrays(target), index_of(target, "hidden")
    expected = before["lm_head.weight"][:, hidden] * np.float32(math.sqrt(2))
    np.testing.assert_allclose(after["lm_head.weight"], expected, rtol=3e-7)
    equal(after["transformer.ln_f.weight"], before["transformer.ln_f.weight"][hidden])


def test_a_norm_that_multiplies_by_one_plus_its_gain_is_left_alone() -> None:
    source = families.model("gemma")  # tied, and 1 + gain: no factor can move there
    target = subclone(source, hidden=32, calibration=IDS)
    hidden = index_of(target, "hidden")
    equal(arrays(target)["model.norm.weight"], arrays(source)["model.norm.weight"][hidden])
    # Its class multiplies the embedding by sqrt(hidden): what enters the stream stays, and the head has its gain.
    rows, whole = (model.get_input_embeddings()(IDS).detach() for model in (target, source))
    torch.testing.assert_close(rows, whole[..., hidden], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        target.lm_head.weight.detach(),
        2**0.5 * source.lm_head.weight.detach()[:, hidden],
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gains_lose_no_more_than_the_stored_type_does(dtype: torch.dtype) -> None:
    source = families.model("llama").to(dtype)
    target = subclone(source, hidden=32)
    weight, made = (m.model.layers[0].mlp.gate_proj.weight.detach() for m in (source, target))
    kept = weight[index_of(target, "ffn@0")][:, index_of(target, "hidden")].double()
    assert made.dtype == dtype
    torch.testing.assert_close(
        made.double(), (kept * math.sqrt(2)).to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=0
    )


def test_dropping_layers_alone_is_the_source_with_those_blocks_passed_by() -> None:
    for family, stack in (("llama", "model.layers"), ("gpt2", "transformer.h")):
        source = families.model(family).double()
        for keep, kept in ((3, (0, 1, 3)), (2, (0, 3)), (1, (0,))):
            target = subclone(source, layers=keep)
            assert target.hf_ws_plan.layers == {"layers": kept}
            dropped = [b for i, b in enumerate(source.get_submodule(stack)) if i not in kept]
            hooks = [
                b.register_forward_hook(
                    lambda _, args, out: args[0] if isinstance(out, Tensor) else (args[0],)
                )
                for b in dropped
            ]
            with torch.no_grad():
                expected = source(IDS, use_cache=False).logits
            for hook in hooks:
                hook.remove()
            torch.testing.assert_close(families.logits(target, IDS), expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ ranking


def test_equal_scores_keep_the_lower_indices() -> None:
    source = families.model("llama")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.fill_(0.5)
    target = subclone(source, hidden=32)
    assert index_of(target, "hidden") == list(range(32))
    assert index_of(target, "ffn@2") == list(range(64))
    assert index_of(target, "kv_heads@3") == [0, 1]
    assert index_of(target, "heads@3") == [0, 1, 2, 3]


def test_without_calibration_the_heavy_weights_are_kept_and_it_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = families.model("llama")
    with torch.no_grad():
        source.model.embed_tokens.weight[:, CHANNELS] *= 100
        for layer, block in enumerate(source.model.layers):
            block.mlp.down_proj.weight[:, NEURONS[layer]] *= 100
            block.self_attn.k_proj.weight[rows_of(GROUPS[layer], 16)] *= 100
            block.self_attn.o_proj.weight[:, rows_of([2 * g for g in GROUPS[layer]], 16)] *= 100
    target = subclone(source, hidden=32)
    assert index_of(target, "hidden") == CHANNELS
    for layer in range(4):
        assert index_of(target, f"ffn@{layer}") == NEURONS[layer]
        assert index_of(target, f"kv_heads@{layer}") == GROUPS[layer]
    said = [record for record in caplog.records if record.name.startswith("hf_ws")]
    assert [record.levelname for record in said] == ["WARNING"]
    assert "no calibration data: ranked by weight magnitude" in said[0].getMessage()


def test_with_calibration_or_nothing_to_rank_it_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    source = families.model("llama")
    subclone(source, hidden=32, calibration=IDS)
    subclone(source, layers=2)
    subclone(source, hidden=32, method="weight_selection")
    subclone(source, hidden=32, method="random")
    assert not [record for record in caplog.records if record.name.startswith("hf_ws")]


def test_the_score_may_be_named(caplog: pytest.LogCaptureFixture) -> None:
    source = families.model("llama")
    by_weight = subclone(source, hidden=32, calibration=IDS, method_args={"score": "magnitude"})
    assert index_of(by_weight, "hidden") == index_of(subclone(source, hidden=32), "hidden")
    assert index_of(by_weight, "hidden") != index_of(subclone(source, hidden=32, calibration=IDS), "hidden")
    with pytest.raises(
        CalibrationError, match="scores by activation need calibration data; pass calibration="
    ):
        subclone(source, hidden=32, method_args={"score": "activation"})
    with pytest.raises(PlanError, match=r"score 'tayler' is unknown; known are activation, .*mean 'taylor'"):
        AutoSubclone.plan(source, hidden=32, method="subclone", method_args={"score": "tayler"})


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, CheckpointError, "cannot be ranked by .* the weights hold NaN or infinity"),
        (
            IDS,
            CalibrationError,
            r"not finite on the calibration data, first seen at model.layers.2.mlp.down_proj",
        ),
    ],
    ids=["magnitude", "activation"],
)
def test_scores_that_are_not_finite_are_refused(
    calibration: Tensor | None, error: type[Exception], message: str
) -> None:
    source = families.model("llama")
    with torch.no_grad():
        source.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(error, match=message):
        subclone(source, ffn=64, calibration=calibration)


def test_experts_that_are_never_heavy_are_dropped_with_their_router_rows() -> None:
    source = families.model("mixtral")
    keep = [1, 2, 5]
    with torch.no_grad():
        for block in source.model.layers:
            block.mlp.gate.weight[keep] *= 100
    target = subclone(source, experts=3, method_args={"rescale": False})
    for layer in range(4):
        assert index_of(target, f"experts@{layer}") == keep
        for name in ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            key = f"model.layers.{layer}.{name}"
            equal(arrays(target)[key], arrays(source)[key][keep])


# ------------------------------------------------------------------------------------------------ a smaller head


@pytest.mark.parametrize("method", ["weight_selection", "subclone"])
@pytest.mark.parametrize("keep", [16, 12, 8, 6, 4, 2])
def test_a_smaller_head_keeps_the_pairs_that_turn_as_fast(keep: int, method: str) -> None:
    config = LlamaConfig(**{**_LLAMA, "head_dim": 16})
    source = LlamaForCausalLM(config)
    target = subclone(source, head_dim=keep, method=method)
    before, after = (m.model.rotary_emb.inv_freq.double() for m in (source, target))
    index = index_of(target, "head_dim")
    first, second = index[: keep // 2], index[keep // 2 :]
    assert [i + 8 for i in first] == second  # Llama turns channel i with channel i + half
    for pair, frequency in zip(first, after, strict=True):
        distance = (before.log() - frequency.log()).abs()
        assert distance[pair] <= distance.min() + 1e-6
    if 16 % keep == 0:
        torch.testing.assert_close(before[first], after, rtol=1e-6, atol=0)


_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def test_a_smaller_head_scores_positions_as_the_source_does_on_the_kept_pairs() -> None:
    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**{**_LLAMA, "head_dim": 16}))
    target = subclone(source, head_dim=8, method="weight_selection")
    dropped = sorted(set(range(16)) - set(index_of(target, "head_dim")))
    silent = LlamaForCausalLM(source.config)
    silent.load_state_dict(source.state_dict())
    with torch.no_grad():
        for block in silent.model.layers:
            block.self_attn.q_proj.weight.view(4, 16, 24)[:, dropped] = 0
            block.self_attn.v_proj.weight.view(2, 16, 24)[:, dropped] = 0
            block.self_attn.q_proj.weight *= math.sqrt(2)  # attention divides by the root of the head's width
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        families.logits(target, ids), families.logits(silent, ids), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("model_type", "index"),
    [
        ("llama", (0, 2, 4, 6, 8, 10, 12, 14)),  # i with i + 8
        ("cohere", (0, 1, 4, 5, 8, 9, 12, 13)),  # 2i with 2i + 1
        ("cohere2", (0, 1, 4, 5, 8, 9, 12, 13)),
        ("ernie4_5", (0, 1, 4, 5, 8, 9, 12, 13)),
        ("gpt2", (0, 2, 4, 6, 8, 10, 12, 14)),  # nothing turns
    ],
)
def test_pairs_are_those_that_the_class_turns(model_type: str, index: tuple[int, ...]) -> None:
    assert rotary_index(CONFIG_MAPPING[model_type](), 16, 8) == index


def test_a_family_whose_pairs_cannot_be_told_is_refused() -> None:
    with pytest.raises(SizeError, match="which channels of a roformer turn together is not known"):
        rotary_index(CONFIG_MAPPING["roformer"](), 16, 8)


def test_a_smaller_head_where_only_a_part_turns_is_refused() -> None:
    with pytest.raises(SizeError, match=r"head_dim=8: phi turns only a part of each head's 16 channels"):
        AutoSubclone.plan(families.model("phi"), method="subclone", hidden=64, heads=8)


# ------------------------------------------------------------------------------------------------ random


def test_a_random_start_is_what_its_class_makes() -> None:
    source = families.model("llama", initializer_range=0.5)
    target = subclone(source, hidden=256, ffn=300, layers=6, method="random")
    assert target.config.num_hidden_layers == 6
    assert target.model.layers[5].mlp.up_proj.weight.shape == (300, 256)
    for name, parameter in target.named_parameters():
        if parameter.ndim == 1:
            assert bool((parameter == 1).all()), name
        else:
            assert 0.45 < float(parameter.detach().std()) < 0.55, name
            assert abs(float(parameter.detach().mean())) < 0.02, name


def test_a_random_start_scales_what_its_class_scales() -> None:
    target = subclone(families.model("gpt2"), hidden=256, method="random")
    fresh = type(target)(target.config)  # divides by sqrt(2 x layers); in Transformers 5.10 it forgets to
    for name in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc"):
        made, wanted = (
            float(m.transformer.h[0].get_submodule(name).weight.detach().std()) for m in (target, fresh)
        )
        assert made == pytest.approx(wanted, rel=0.1), name
    assert target.lm_head.weight is target.transformer.wte.weight
    for name, parameter in target.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


def test_a_random_start_depends_on_the_seed_alone_and_leaves_the_generator_be() -> None:
    source = families.model("llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = arrays(subclone(source, hidden=32, method="random", seed=5))
    assert torch.equal(torch.rand(4), expected)
    again, other = (arrays(subclone(source, hidden=32, method="random", seed=seed)) for seed in (5, 6))
    for name in one:
        equal(one[name], again[name])
    assert (one["lm_head.weight"] != other["lm_head.weight"]).any()


def test_only_a_method_that_grows_may_grow() -> None:
    source = families.model("llama")
    for method in ("weight_selection", "subclone"):
        message = rf"{method} cannot grow ffn from 96 to 100; ask for at most the source's size"
        with pytest.raises(SizeError, match=message):
            AutoSubclone.plan(source, ffn=100, method=method)
        with pytest.raises(
            SizeError, match=r"layers=5 is more than the source's 4, and this method cannot grow"
        ):
            AutoSubclone.plan(source, layers=5, method=method)


# ------------------------------------------------------------------------------------------------ your own


def last_channels(request: Request, *, seen: list[Any] | None = None) -> Plan:
    """Keep the last channels; everything else as weight selection does."""
    base = METHODS["weight_selection"](request)
    width, keep = request.before["hidden"], request.after["hidden"]
    return request.plan(dict(base.maps) | {"hidden": Gather(tuple(range(width - keep, width)), width)})


def test_a_method_of_your_own_is_as_good_as_ours() -> None:
    source = families.model("llama")
    target = subclone(source, hidden=32, method=last_channels, method_args={"seen": None})
    equal(arrays(target)["model.norm.weight"], arrays(source)["model.norm.weight"][32:])
    assert target.hf_ws_plan.method == "last_channels"


def test_a_method_that_returns_no_plan_is_refused() -> None:
    def lost(request: Request) -> dict[str, int]:
        return {}

    with pytest.raises(PlanError, match="method lost returned a dict, wanted is a Plan"):
        AutoSubclone.plan(families.model("llama"), hidden=32, method=lost)


def test_a_method_that_gains_what_it_should_not_is_refused() -> None:
    def wrong(request: Request) -> Plan:
        return replace(METHODS["weight_selection"](request), gains={"model.norm.weight": math.nan})

    with pytest.raises(PlanError, match=r"gain nan for model.norm.weight"):
        AutoSubclone.plan(families.model("llama"), hidden=32, method=wrong)


@pytest.mark.parametrize(
    "policy",
    [[1, 2], (1, 2), range(1, 3), lambda depth, keep: (1, 2)],
    ids=lambda policy: type(policy).__name__,
)
def test_layers_may_be_named_or_chosen_by_a_callable(policy: Any) -> None:
    source = families.model("llama")
    ask = {"layers": 2} if callable(policy) else {}
    target = subclone(source, layer_policy=policy, method="weight_selection", **ask)
    for new, old in enumerate((1, 2)):
        for name in ("mlp.up_proj.weight", "input_layernorm.weight"):
            equal(arrays(target)[f"model.layers.{new}.{name}"], arrays(source)[f"model.layers.{old}.{name}"])


def test_the_users_policy_wins_over_the_methods_own() -> None:
    source = families.model("llama")
    assert AutoSubclone.plan(source, method="subclone", layers=2).layers == {"layers": (0, 3)}
    assert AutoSubclone.plan(source, method="subclone", layers=2, layer_policy="first").layers == {
        "layers": (0, 1)
    }
    assert AutoSubclone.plan(source, layers=2, method="weight_selection").layers == {"layers": (0, 1)}
    assert AutoSubclone.plan(
        source, layers=2, layer_policy="middle_dropped", method="weight_selection"
    ).layers == {"layers": (0, 3)}


# ------------------------------------------------------------------------------------------------ the target


@pytest.mark.parametrize("method", METHODS)
def test_the_target_is_ready_and_shares_no_memory_with_the_source(method: str) -> None:
    source = families.model("gpt2")
    before = {name: value.clone() for name, value in source.state_dict().items()}
    for ask in ({}, {"layers": 3}, {"hidden": 32}):
        target = subclone(source, method=method, calibration=families.tokens(), **ask)
        assert not target.training
        with torch.no_grad():
            for parameter in target.parameters():
                assert parameter.requires_grad
                assert not hasattr(parameter, "_is_hf_initialized")
                assert parameter.is_contiguous()
                parameter.fill_(7.0)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("auto", torch.float32),
        (None, torch.float32),
    ],
)
def test_the_target_has_the_type_that_was_asked_for(dtype: Any, expected: torch.dtype) -> None:
    for method in METHODS:
        target = subclone(
            families.model("llama"), hidden=32, dtype=dtype, method=method, calibration=families.tokens()
        )
        assert {p.dtype for p in target.parameters()} == {expected}
        assert target.config.dtype == expected


# ------------------------------------------------------------------------------------------------ ALiBi


def _slopes(family: str, heads: int) -> Tensor:
    """What Transformers multiplies the distance by, in each head."""
    if family == "mpt":
        return build_mpt_alibi_tensor(heads, 2)[:, 0, 0].abs()
    return build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]


@pytest.mark.parametrize("method", ["weight_selection", "subclone"])
@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon_1b"])
@pytest.mark.parametrize("keep", [8, 7, 6, 5, 4, 3, 2, 1])
def test_a_head_keeps_its_alibi_slope(family: str, keep: int, method: str) -> None:
    source = families.model(family)
    target = subclone(source, hidden=8 * keep, method=method)
    heads = target.hf_ws_plan.axis_map("heads", 0).index
    assert target.hf_ws_plan.axis_map("kv_heads", 0).index == heads
    assert len(set(heads)) == keep
    torch.testing.assert_close(_slopes(family, keep), _slopes(family, 8)[list(heads)], rtol=0, atol=0)


@given(st.integers(1, 130).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size))))
def test_the_slopes_of_fewer_heads_are_among_those_of_more(sizes: tuple[int, int]) -> None:
    size, keep = sizes
    index = alibi_index(families.config("bloom"), size, keep)
    for family in ("bloom", "mpt"):
        torch.testing.assert_close(
            _slopes(family, keep), _slopes(family, size)[list(index)], rtol=1e-5, atol=0
        )


def test_every_draw_of_an_inconsistent_selection_keeps_the_slopes() -> None:
    args = {"selection": "random", "consistent": False}
    maps = AutoSubclone.plan(
        families.model("bloom"), hidden=32, method="weight_selection", method_args=args
    ).maps
    assert sorted(key for key in maps if key.startswith(("heads", "kv_heads"))) == ["heads", "kv_heads"]


def test_heads_that_share_one_key_keep_their_slopes() -> None:
    source = families.model("falcon", alibi=True)
    assert index_of(subclone(source, hidden=32), "heads") == [1, 3, 5, 7]


@pytest.mark.parametrize("method", ["weight_selection", "subclone"])
def test_grouped_heads_with_slopes_are_refused(method: str) -> None:
    source = families.model("falcon_40b", alibi=True)
    with pytest.raises(SizeError, match=r"heads=4: falcon gives each head a slope by its number"):
        subclone(source, hidden=32, method=method)
    assert torch.equal(families.logits(source), families.logits(subclone(source, method=method)))


# ------------------------------------------------------------------------------------------------ a method's mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": Rank(64, 96, "tayler")}, r"score 'tayler' is unknown; known are activation, l2_activation"),
        (
            {"heads": Rank(4, 8, "magnitude"), "kv_heads": None},
            r"heads is ranked and its kv_heads have no map",
        ),
    ],
)
def test_an_open_plan_that_cannot_be_settled_is_refused(changes: dict[str, Any], message: str) -> None:
    def own(request: Request) -> Plan:
        maps = dict(METHODS["weight_selection"](request).maps) | changes
        return request.plan({key: value for key, value in maps.items() if value is not None})

    with pytest.raises(PlanError, match=message):
        subclone(families.model("llama"), hidden=32, kv_heads=4, heads=4, method=own)


# ------------------------------------------------------------------------------------------------ the class's own


def test_a_config_that_transformers_does_not_list_is_as_good() -> None:
    class OwnConfig(LlamaConfig):
        model_type = "not_listed"

    class Own(LlamaForCausalLM):
        config_class = OwnConfig

    config = OwnConfig(**families.config("llama").to_dict() | {"model_type": "not_listed"})
    target = subclone(Own(config), hidden=32)
    assert (type(target), type(target.config)) == (Own, OwnConfig)


def test_token_ids_asked_for_hold_in_generation_too(tmp_path: Path) -> None:
    source = families.model("llama")
    source.config.eos_token_id = source.generation_config.eos_token_id = [150, 151]
    source.save_pretrained(tmp_path)
    for given_source in (source, tmp_path):
        target = subclone(given_source, vocab=100, eos_token_id=7)
        assert target.generation_config.eos_token_id == 7
        assert target.generation_config.bos_token_id == source.generation_config.bos_token_id
        assert source.generation_config.eos_token_id == [150, 151]


# ------------------------------------------------------------------------------------------------ no method named


@pytest.mark.parametrize(
    ("family", "calibration", "method"),
    [("llama", IDS, "rotation"), ("gpt2", IDS, "rotation"), ("llama", None, "subclone")],
)
def test_the_method_by_default(family: str, calibration: Any, method: str) -> None:
    """GPT-2's head is the embedding, and stays it."""
    source = families.model(family)
    options: dict[str, Any] = {"hidden": 32, "calibration": calibration}
    assert AutoSubclone.plan(source, **options).method == method
    target = AutoSubclone.from_pretrained(source, **options)
    assert target.hf_ws_plan.method == method
    assert target.config.tie_word_embeddings == source.config.tie_word_embeddings
    args = {"untie": False} if method == "rotation" else {}
    named = AutoSubclone.from_pretrained(source, **options, method=method, method_args=args)
    for name, value in arrays(target).items():
        np.testing.assert_array_equal(value, arrays(named)[name])


def test_what_goes_with_the_method_by_default_may_be_left_out() -> None:
    source = families.model("gpt2")
    options: dict[str, Any] = {"hidden": 32, "calibration": IDS}
    target = AutoSubclone.from_pretrained(source, **options, compensation=[])
    assert not target.hf_ws_plan.refits
    assert not AutoSubclone.from_pretrained(source, **options, method="subclone").hf_ws_plan.refits
    assert AutoSubclone.from_pretrained(source, **options).hf_ws_plan.refits


def test_options_of_no_method_are_refused() -> None:
    with pytest.raises(
        PlanError, match="method_args gives score, and no method is named; name the one whose"
    ):
        AutoSubclone.plan(families.model("llama"), hidden=32, method_args={"score": "activation"})
