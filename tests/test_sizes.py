"""Sizes against what the built model really has, and derived configs against what the class accepts."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from hf_ws import derive, derive_config, sizes
from hf_ws.errors import PlanError, SizeError
from hf_ws.layouts.miniature import build_on_meta
from hf_ws.sizes import sizes_of
from tests import families

GPT2_LARGE = GPT2Config(n_embd=1280, n_head=20, n_layer=36)
LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32
)
QWEN3_1B7 = Qwen3Config(
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    num_hidden_layers=28,
    vocab_size=151936,
)


@contextmanager
def unchanged(config: PreTrainedConfig) -> Iterator[None]:
    before, fields = config.to_dict(), repr(vars(config))
    yield
    assert config.to_dict() == before
    assert repr(vars(config)) == fields


# ------------------------------------------------------------------------------------------------ sizes_of


def _activation_widths(model: PreTrainedModel, widths: set[int]) -> list[Any]:
    """Hooks that note how wide what enters an activation function of a layer is."""
    hooks = []
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        if any(part.isdigit() for part in name.split(".")) and kind.endswith(
            ("activation", "gelu", "silu", "relu", "tanh")
        ):
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: widths.add(inputs[0].shape[-1])))
    return hooks


@pytest.mark.parametrize("family", families.FAMILIES)
def test_sizes_are_those_of_the_running_model(family: str) -> None:
    config = families.config(family)
    config._attn_implementation = config._experts_implementation = "eager"
    model = families.model_class(family)(config).eval()
    widths: set[int] = set()
    hooks = _activation_widths(model, widths)
    wants_cache = {"use_cache": True} if family in families.DECODERS or family in families.VARIANTS else {}
    with torch.no_grad():
        out = model(families.tokens(), output_hidden_states=True, output_attentions=True, **wants_cache)
    for hook in hooks:
        hook.remove()

    found = sizes_of(config)
    table = model.get_input_embeddings().weight
    assert found["hidden"] == out.hidden_states[1].shape[-1]
    assert found["layers"] == len(out.hidden_states) - 1
    assert found["heads"] == out.attentions[0].shape[1]
    assert found["vocab"] == table.shape[0]
    assert found.get("embedding", found["hidden"]) == table.shape[1]
    if wants_cache:
        _, kv_heads, _, head_dim = out.past_key_values.layers[0].keys.shape
        assert found["head_dim"] == head_dim
        assert kv_heads == (
            found["heads"] if family == "falcon_40b" else found["kv_heads"]
        )  # it caches copies
    else:
        assert (found["kv_heads"], found["head_dim"]) == (found["heads"], found["hidden"] // found["heads"])
    assert widths == {found[axis] for axis in ("ffn", "moe_ffn") if axis in found and _used(axis, family)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and ("position" in name or "wpe" in name):
            assert module.num_embeddings - getattr(module, "offset", 0) == found["positions"]


def _used(axis: str, family: str) -> bool:
    """Whether any layer has a block of this kind: all of a plain Qwen3-MoE's layers have experts."""
    return not (axis == "ffn" and family == "qwen3_moe")


def test_a_config_that_spells_no_known_size_has_none_and_gives_none() -> None:
    assert sizes_of(PreTrainedConfig()).keys() <= {"labels"}
    with pytest.raises(SizeError, match=r"hidden=64: PreTrainedConfig has no hidden; it has labels"):
        derive_config(PreTrainedConfig(), hidden=64)


# ------------------------------------------------------------------------------------------------ what follows


def test_gpt2_large_to_512_has_eight_heads_of_64() -> None:
    with unchanged(GPT2_LARGE):
        small = derive_config(GPT2_LARGE, hidden=512)
    assert isinstance(small, GPT2Config)
    assert (small.n_embd, small.n_head, small.n_layer) == (512, 8, 36)
    assert sizes_of(small)["ffn"] == 2048


def test_published_siblings_follow_from_their_width() -> None:
    small = derive_config(LLAMA_7B, hidden=2048)
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (16, 16, 128)
    assert small.intermediate_size == 5504
    small = derive_config(QWEN3_1B7, hidden=1024)  # the width of Qwen3-0.6B, whose ffn is 3072 too
    assert (small.intermediate_size, small.head_dim) == (3072, 128)
    assert (small.num_attention_heads, small.num_key_value_heads) == (8, 4)


def test_a_config_without_a_request_comes_back_equal() -> None:
    for config in (GPT2_LARGE, LLAMA_7B, QWEN3_1B7):
        same, source = derive_config(config).to_dict(), config.to_dict()
        assert {k: v for k, v in same.items() if k != "transformers_version"} == {
            k: v for k, v in source.items() if k != "transformers_version"
        }


@pytest.mark.parametrize("family", families.FAMILIES)
def test_half_as_wide_keeps_the_head_and_halves_the_rest(family: str) -> None:
    config = families.config(family)
    with unchanged(config):
        small = derive_config(config, hidden=sizes_of(config)["hidden"] // 2)
    before, after = sizes_of(config), sizes_of(small)
    assert after["head_dim"] == before["head_dim"]
    assert (after["hidden"] * 2, after["heads"] * 2) == (before["hidden"], before["heads"])
    assert after["kv_heads"] * 2 == before["kv_heads"] or before["kv_heads"] == after["kv_heads"] == 1
    for axis in ("layers", "vocab", "positions", "experts", "labels"):
        assert after.get(axis) == before.get(axis), axis
    assert after.get("embedding") in (before.get("embedding"), after["hidden"])
    assert type(small) is type(config)


@given(groups=st.integers(1, 8), width=st.integers(1, 8), heads=st.integers(1, 64))
def test_kv_heads_keep_their_ratio_or_come_as_near_as_is_legal(groups: int, width: int, heads: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * groups * width, num_attention_heads=groups * width, num_key_value_heads=groups
    )
    got = derive_config(config, hidden=4 * heads).num_key_value_heads
    assert heads % got == 0
    assert heads // got <= width  # no group gets wider: whole groups could not be selected
    assert not any(heads % d == 0 and heads / d <= width for d in range(1, got))


def test_a_mixtral_may_have_fewer_heads_alone() -> None:
    """Its head_dim may be left open in the config, and would then follow hidden / heads."""
    source = MixtralConfig()
    assert source.head_dim is None
    assert sizes_of(derive_config(source, heads=16))["head_dim"] == 128
    assert derive_config(source, layers=3).head_dim is None


def test_labels_may_be_given_by_name() -> None:
    names, numbers = {0: "bad", 1: "fair", 2: "good"}, {"bad": 0, "fair": 1, "good": 2}
    for ask in ({"id2label": names}, {"label2id": numbers}, {"num_labels": 3, "id2label": names}):
        small = derive_config(BertConfig(num_labels=4), **ask)
        assert (small.num_labels, small.id2label, small.label2id) == (3, names, numbers)
    with pytest.raises(PlanError, match="labels is given twice: 5, and 3 in id2label"):
        derive_config(BertConfig(num_labels=4), num_labels=5, id2label=names)


@given(ffn=st.integers(1, 3000), hidden=st.integers(1, 60).map(lambda n: 4 * n))
def test_ffn_keeps_its_ratio_to_the_nearest_whole_unit(ffn: int, hidden: int) -> None:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=ffn, num_attention_heads=24, num_key_value_heads=24
    )
    unit = max(power for power in (1, 2, 4, 8, 16, 32, 64) if ffn % power == 0)
    got = derive_config(config, hidden=hidden).intermediate_size
    assert got % unit == 0
    assert got >= unit
    assert abs(got - ffn * hidden / 96) <= unit / 2 or got == unit


def test_what_is_asked_for_is_never_rounded() -> None:
    small = derive_config(
        LLAMA_7B, hidden=2048, ffn=5001, heads=16, kv_heads=2, head_dim=50, vocab=777, layers=3
    )
    assert (small.hidden_size, small.intermediate_size, small.head_dim, small.vocab_size) == (
        2048,
        5001,
        50,
        777,
    )
    assert (small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers) == (16, 2, 3)


def test_a_head_dim_that_the_class_computes_follows_the_heads() -> None:
    assert sizes_of(derive_config(GPT2_LARGE, heads=10))["head_dim"] == 128
    assert sizes_of(derive_config(GPT2_LARGE, hidden=640, heads=5))["head_dim"] == 128
    both = derive_config(GPT2_LARGE, hidden=640, head_dim=32)
    assert both.n_head == 20


# ------------------------------------------------------------------------------------------------ layer lists

KEPT = (0, 2, 3)


def _structure(model: nn.Module, layer: nn.Module) -> list[tuple[str, str]]:
    skip = ("layer_idx", "layer_id")
    return [
        (
            name,
            type(module).__name__
            + repr({k: v for k, v in vars(module).items() if type(v) in (bool, str) and k not in skip}),
        )
        for name, module in layer.named_modules()
    ]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_each_kept_layer_is_built_as_it_was(family: str) -> None:
    config = families.config(family)
    with unchanged(config):
        shallow = derive_config(config, kept=KEPT)
    source, target = (build_on_meta(families.model_class(family), c) for c in (config, shallow))
    stacks = [
        name
        for name, module in source.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == 4
    ]
    stack = min(stacks, key=len)
    layers = target.get_submodule(stack)
    assert len(layers) == len(KEPT)
    for layer, kept in zip(layers, KEPT, strict=True):
        assert _structure(target, layer) == _structure(source, source.get_submodule(stack)[kept])


def test_layer_types_follow() -> None:
    config = Gemma2Config(num_hidden_layers=6)
    assert len(set(config.layer_types)) == 2
    small = derive_config(config, kept=[0, 3, 5])
    assert small.layer_types == [config.layer_types[i] for i in (0, 3, 5)]


def test_layers_without_rotary_positions_follow() -> None:
    config = SmolLM3Config(num_hidden_layers=8, no_rope_layer_interval=4)
    small = derive_config(config, kept=[0, 3, 6, 7])
    assert config.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]
    assert small.no_rope_layers == [1, 0, 1, 0]


def test_gpt_neos_runs_of_attention_types_follow() -> None:
    config = GPTNeoConfig(num_layers=6, attention_types=[[["global", "local"], 3]])
    small = derive_config(config, kept=[0, 2, 5])
    assert small.attention_layers == ["global", "global", "local"]
    assert small.num_layers == 3
    assert GPTNeoConfig.from_dict(small.to_dict()).attention_layers == small.attention_layers


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({"mlp_only_layers": [1, 4]}, {1, 4}),
        ({"decoder_sparse_step": 2}, {0, 2, 4}),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 3}, {0, 1, 3, 4}),
    ],
)
def test_dense_layers_of_a_mixture_stay_dense(fields: dict[str, Any], dense: set[int]) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 16, "intermediate_size": 24, "num_experts": 2}
    config = Qwen3MoeConfig(num_hidden_layers=6, num_experts_per_tok=1, **sizes, **fields)
    for kept in ([0, 1, 2], [1, 3, 5], [2, 3, 4]):
        model = build_on_meta(families.model_class("qwen3_moe"), derive_config(config, kept=kept))
        is_dense = [not hasattr(layer.mlp, "experts") for layer in model.model.layers]
        assert is_dense == [i in dense for i in kept], kept


def test_a_depth_alone_keeps_the_first_layers() -> None:
    config = GPTNeoConfig(num_layers=6, attention_types=[[["global", "local"], 3]])
    assert derive_config(config, layers=3).attention_layers == config.attention_layers[:3]


# ------------------------------------------------------------------------------------------------ own spelling


@pytest.mark.parametrize(
    ("config", "own", "ours"),
    [
        (GPT2_LARGE, {"n_embd": 512}, {"hidden": 512}),
        (GPT2_LARGE, {"hidden_size": 512}, {"hidden": 512}),
        (GPT2_LARGE, {"n_layer": 12, "n_inner": 999}, {"layers": 12, "ffn": 999}),
        (GPT2_LARGE, {"num_attention_heads": 10}, {"heads": 10}),
        (LLAMA_7B, {"hidden_size": 1024, "num_key_value_heads": 4}, {"hidden": 1024, "kv_heads": 4}),
        (MixtralConfig(), {"num_local_experts": 4}, {"experts": 4}),
        (MixtralConfig(), {"num_experts": 4}, {"experts": 4}),
        (families.config("distilbert"), {"dim": 32, "hidden_dim": 50}, {"hidden": 32, "ffn": 50}),
        (GPT2_LARGE, {"hidden": 512, "n_embd": 512}, {"hidden": 512}),
    ],
)
def test_a_size_in_the_configs_own_words_means_the_same(
    config: PreTrainedConfig, own: Any, ours: Any
) -> None:
    assert derive_config(config, **own).to_dict() == derive_config(config, **ours).to_dict()


def test_other_fields_are_passed_on_under_any_of_their_names() -> None:
    small = derive_config(
        GPT2_LARGE, n_positions=128, resid_pdrop=0.25, tie_word_embeddings=False, num_labels=7
    )
    assert (small.n_positions, small.resid_pdrop, small.tie_word_embeddings, small.num_labels) == (
        128,
        0.25,
        False,
        7,
    )
    assert derive_config(GPT2_LARGE, max_position_embeddings=128).n_positions == 128


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("n_embed", "n_embd"),
        ("hiden", "hidden"),
        ("resid_drop", "resid_pdrop"),
        ("hidden_sizes", "hidden_size"),
    ],
)
def test_a_misspelt_field_is_met_with_the_right_one(field: str, meant: str) -> None:
    with pytest.raises(PlanError, match=rf"GPT2Config has no field '{field}'; did you mean '{meant}'\?"):
        derive_config(GPT2_LARGE, **{field: 512})


def test_a_field_like_no_other_is_met_with_the_sizes_that_there_are() -> None:
    with pytest.raises(PlanError, match=r"GPT2Config has no field 'zzz'; its sizes are .*hidden, .*ffn"):
        derive_config(GPT2_LARGE, zzz=1)


def test_a_size_given_twice_is_refused() -> None:
    with pytest.raises(PlanError, match=r"hidden is given twice: hidden=512 and n_embd=384"):
        derive_config(GPT2_LARGE, hidden=512, n_embd=384)
    with pytest.raises(PlanError, match=r"hidden is given twice: hidden=512 and hidden_size=384"):
        derive_config(GPT2_LARGE, n_embd=512, hidden_size=384)


# ------------------------------------------------------------------------------------------------ refusals


def test_the_nearest_legal_widths_are_named() -> None:
    message = r"^hidden=500 is not a whole number of heads of 64 channels; nearest legal: hidden=448 or 512$"
    with pytest.raises(SizeError, match=message):
        derive_config(GPT2_LARGE, hidden=500)


def test_every_violation_is_listed() -> None:
    with pytest.raises(SizeError) as caught:
        derive_config(GPT2_LARGE, hidden=0, layers=-2, ffn="many")
    for part in ("hidden=0", "layers=-2", "ffn='many'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("axis", ["hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab"])
@pytest.mark.parametrize("size", [0, -1, True, 1.5, "32", 2**40, float("nan")], ids=repr)
def test_a_size_that_no_model_has_is_refused(axis: str, size: Any) -> None:
    with unchanged(LLAMA_7B), pytest.raises(SizeError, match=rf"^{axis}={size!r}"):
        derive_config(LLAMA_7B, **{axis: size})


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "4", 2**40], ids=repr)
def test_a_number_of_experts_that_no_model_has_is_refused(size: Any) -> None:
    with pytest.raises(SizeError, match=rf"^experts={size!r}"):
        derive_config(MixtralConfig(), experts=size)


def test_a_size_out_of_range_is_told_the_range() -> None:
    with pytest.raises(SizeError, match=r"hidden=1099511627776 is out of range: allowed are 1 to 2147483647"):
        derive_config(GPT2_LARGE, hidden=2**40)


def test_an_axis_that_the_class_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(SizeError, match=r"experts=3: GPT2Config has no experts; it has hidden, heads"):
        derive_config(GPT2_LARGE, experts=3)


def test_kv_heads_that_do_not_divide_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(
        SizeError, match=r"heads=32 is no multiple of kv_heads=5; nearest legal: kv_heads=4 or 8"
    ):
        derive_config(LLAMA_7B, kv_heads=5)


def test_a_class_without_kv_heads_of_its_own_has_as_many_as_heads() -> None:
    with pytest.raises(SizeError, match="kv_heads"):
        derive_config(GPT2_LARGE, kv_heads=10)


def test_an_odd_head_cannot_turn_in_pairs() -> None:
    with pytest.raises(SizeError, match=r"^head_dim=5 is odd, .*; nearest legal: head_dim=4 or 6$"):
        derive_config(LLAMA_7B, head_dim=5)


def test_a_head_dim_alone_leaves_the_number_of_heads_where_the_class_can() -> None:
    small = derive_config(LLAMA_7B, head_dim=64)
    assert (small.hidden_size, small.num_attention_heads, small.head_dim) == (4096, 32, 64)


def test_a_size_that_follows_another_is_refused_where_it_differs() -> None:
    with pytest.raises(SizeError, match=r"ffn cannot be 100 here: it follows the other sizes and is 256"):
        derive_config(families.config("bloom"), ffn=100)
    assert sizes_of(derive_config(families.config("bloom"), ffn=256))["ffn"] == 256


@pytest.mark.parametrize("kept", [[4], [-1], [0, 1, 9], [], [True], [1.5], ["0"]], ids=repr)
def test_kept_layers_that_are_not_there_are_refused(kept: Any) -> None:
    with pytest.raises(SizeError, match=r"kept layers .*: allowed are 0 to 3, at least one"):
        derive_config(families.config("llama"), kept=kept)


def test_layers_and_kept_must_agree() -> None:
    with pytest.raises(SizeError, match=r"layers=3, but 1 layers are kept: \[1\]"):
        derive_config(families.config("llama"), layers=3, kept=[1])


def test_a_vocabulary_that_loses_its_end_token_is_refused_unless_it_gets_another() -> None:
    with pytest.raises(SizeError, match=r"vocab=100 leaves out .*eos_token_id=50256; give eos_token_id="):
        derive_config(GPT2_LARGE, vocab=100)
    small = derive_config(GPT2_LARGE, vocab=100, bos_token_id=0, eos_token_id=1)
    assert (small.vocab_size, small.eos_token_id) == (100, 1)


def test_fewer_experts_than_each_token_visits_are_refused_unless_it_visits_fewer() -> None:
    with pytest.raises(
        SizeError, match=r"experts=1 is less than the 2 that each token is sent to; nearest legal: experts=2"
    ):
        derive_config(MixtralConfig(), experts=1)
    assert derive_config(MixtralConfig(), experts=1, num_experts_per_tok=1).num_local_experts == 1


@pytest.mark.parametrize(
    "config",
    [GPTJConfig(n_embd=64, n_head=2, rotary_dim=16), CodeGenConfig(n_embd=128, n_head=4, rotary_dim=16)],
)
def test_a_head_smaller_than_its_rotary_part_is_refused_unless_that_shrinks_too(
    config: PreTrainedConfig,
) -> None:
    with pytest.raises(SizeError, match=r"head_dim=8 is less than rotary_dim=16; give rotary_dim= as well"):
        derive_config(config, head_dim=8, heads=config.n_embd // 8)
    assert derive_config(config, head_dim=8, heads=config.n_embd // 8, rotary_dim=4).rotary_dim == 4


def test_falcons_layouts_keep_their_kv_heads() -> None:
    shared = FalconConfig(hidden_size=64, num_attention_heads=8)
    assert sizes_of(derive_config(shared, hidden=32)) == {
        **sizes_of(shared),
        "hidden": 32,
        "heads": 4,
        "ffn": 128,
    }
    grouped = FalconConfig(
        hidden_size=64, num_attention_heads=8, num_kv_heads=4, new_decoder_architecture=True
    )
    small = derive_config(grouped, hidden=32)
    assert (small.num_attention_heads, small.num_kv_heads) == (4, 2)


# ------------------------------------------------------------------------------------------------ any size

ASKED = st.fixed_dictionaries(
    {},
    optional={
        "hidden": st.integers(1, 20).map(lambda n: 8 * n),
        "layers": st.integers(1, 4),
        "heads": st.integers(1, 16),
        "kv_heads": st.integers(1, 8),
        "head_dim": st.integers(1, 20),
        "ffn": st.integers(1, 200),
        "vocab": st.integers(3, 200),
    },
)


@pytest.mark.parametrize("family", families.FAMILIES)
@settings(max_examples=8)
@given(asked=ASKED)
def test_any_request_is_refused_or_gives_a_config_that_builds(family: str, asked: dict[str, int]) -> None:
    config = families.config(family)
    with unchanged(config):
        try:
            with mock.patch.object(derive, "_hints", return_value=()):  # many attempts, not what is tested
                derived = derive_config(config, **asked)
        except SizeError:
            return
    assert {axis: sizes_of(derived)[axis] for axis in asked} == asked
    model = build_on_meta(families.model_class(family), derived)
    assert model.get_input_embeddings().weight.shape[0] == sizes_of(derived)["vocab"]
    again = type(derived).from_dict(derived.to_dict())
    assert again.to_dict() == derived.to_dict()


def test_the_examples_in_the_docstrings_run() -> None:
    for module in (sizes, derive):
        assert doctest.testmod(module, raise_on_error=True).attempted > 0
