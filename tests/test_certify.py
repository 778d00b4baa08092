"""The proof has teeth: every family passes, and every planted mistake is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_ws import UnsupportedArchitectureError, certify
from hf_ws.layouts.catalogue import verdict_of
from hf_ws.layouts.certify import certificate_of
from hf_ws.layouts.infer import Inferred, generic, infer, tensors_of
from hf_ws.layouts.miniature import build_on_meta
from hf_ws.layouts.prove import TOLERANCE
from hf_ws.sizes import fitted
from tests import families


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_proven(family: str) -> None:
    certificate = certify(families.config(family, architectures=[families.model_class(family).__name__]))
    turned = {"head_dim"}  # no symmetry where rotary positions turn pairs of channels
    assert max(error for axis, error in certificate.errors.items() if axis not in turned) <= TOLERANCE
    assert certificate.fixed.keys() <= turned
    assert certificate.reads
    named = {name for name, _ in families.model(family).named_parameters()}
    assert {certificate.pattern(name) for name in named} <= set(certificate.layouts)


MISTAKES = {
    "swapped factor order": ("heads", "llama", "self_attn.q_proj.weight", "(head_dim heads) <hidden"),
    "swapped order where it is read": (
        "heads",
        "llama",
        "self_attn.o_proj.weight",
        "hidden <(head_dim heads)",
    ),
    "forgotten reader": ("reads", "llama", "mlp.down_proj.weight", "hidden ffn"),
    "reader on the wrong side": ("reads", "gpt2", "mlp.c_fc.weight", "hidden <ffn"),
    "an axis left out": ("hidden", "llama", "input_layernorm.weight", "135"),
    "q taken for a k": (
        "heads",
        "phi3",
        "qkv_proj.weight",
        "(kv_heads head_dim + heads head_dim + kv_heads head_dim) <hidden",
    ),
    "interleaved taken for stacked": (
        "heads",
        "gpt_neox",
        "query_key_value.weight",
        "(3 heads head_dim) <hidden",
    ),
    "stacked taken for interleaved": ("heads", "gpt2", "c_attn.weight", "<hidden (heads 3 head_dim)"),
    "groups taken for stacked": (
        "heads",
        "falcon_40b",
        "query_key_value.weight",
        "(heads head_dim + kv_heads head_dim + kv_heads head_dim) <hidden",
    ),
    "blocks forgotten": ("heads", "codegen", "qkv_proj.weight", "(3 heads head_dim) <hidden"),
    "gate and up interleaved": ("ffn", "mixtral", "experts.gate_up_proj", "experts (ffn 2) <hidden"),
    "expert tensor transposed": ("reads", "mixtral", "experts.down_proj", "experts <hidden ffn"),
    "experts not named": ("experts", "qwen3_moe", "mlp.gate.weight", "7 <hidden"),
    "a bias left behind": ("ffn", "bert", "intermediate.dense.bias", "88"),
    "head not counted as reading": ("reads", "llama", "lm_head.weight", "vocab hidden"),
}
"""A wrong layout, and what is not proven with it."""


@pytest.mark.parametrize(("wronged", "family", "parameter", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_a_planted_mistake_is_caught(wronged: str, family: str, parameter: str, wrong: str) -> None:
    model_class = families.model_class(family)
    inferred = infer(model_class, families.config(family))
    (pattern,) = [name for name in inferred.layouts if name.endswith(parameter)]
    assert inferred.layouts[pattern] != wrong
    seeded = Inferred({**inferred.layouts, pattern: wrong}, inferred.stacks, inferred.miniature)
    certificate = certificate_of(model_class, seeded)
    assert certificate.errors[wronged] > 100 * TOLERANCE
    if wronged == "reads":
        assert not certificate.reads
        return
    assert wronged not in certificate.axes
    assert "permuting it moved the output by" in certificate.fixed[wronged]
    if wronged == "heads":  # what a head's channels are is known only where the heads are
        assert "head_dim" not in certificate.axes or certificate.errors["head_dim"] <= TOLERANCE
        assert "kv_heads" not in certificate.axes


def test_a_planted_mistake_is_mended_where_another_explanation_is_proven() -> None:
    model_class = families.model_class("llama")
    inferred = infer(model_class, families.config("llama"))
    name = "model.layers.*.self_attn.q_proj.weight"
    choice = inferred.choices[name]
    wrong_first = replace(choice, dims=(tuple(reversed(choice.dims[0])), *choice.dims[1:]))
    assert wrong_first.text() != inferred.layouts[name]
    seeded = Inferred(
        {**inferred.layouts, name: wrong_first.text()},
        inferred.stacks,
        inferred.miniature,
        {**inferred.choices, name: wrong_first},
    )
    assert certificate_of(model_class, seeded).layouts == inferred.layouts


def test_nothing_is_certified_where_no_axis_is_proven() -> None:
    """Everything that the output shows is multiplied by one weight, whose place every permutation changes."""
    model_class = families.model_class("llama")
    inferred = infer(model_class, families.config("llama"))
    sizes = {name: tuple(tensor.shape) for name, tensor in _miniature(model_class, inferred).items()}
    pattern = {name: generic(name, inferred.stacks)[0] for name in sizes}
    numbers = {pattern[name]: " ".join(map(str, shape)) for name, shape in sizes.items()}
    numbers["model.norm.weight"] = "hidden"
    numbers["lm_head.weight"] = "vocab 135"
    with pytest.raises(UnsupportedArchitectureError, match=r"not proven: .*moved the output by"):
        certificate_of(model_class, Inferred(numbers, inferred.stacks, inferred.miniature))


def _miniature(model_class: type, inferred: Inferred) -> dict[str, torch.Tensor]:
    return tensors_of(build_on_meta(model_class, inferred.miniature))


def test_an_axis_on_which_a_part_depends_in_an_unknown_way_stays() -> None:
    class Strange(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.extra = nn.Parameter(torch.zeros(config.intermediate_size // 3 + 5, 23))

    certificate = certify(Strange)
    assert certificate.fixed["ffn"] == "nothing explains how model.extra depends on it"
    assert "ffn" not in certificate.axes
    assert "hidden" in certificate.axes
    assert certificate.unread == ("model.extra",)


def test_a_class_whose_function_breaks_the_symmetry_keeps_that_axis() -> None:
    """A model that treats its first channel specially has no interchangeable channels, whatever the shapes say."""

    class Special(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * self.model.norm.weight[0]
            return out

    certificate = certify(Special)
    assert "hidden" not in certificate.axes
    assert "permuting it moved the output by" in certificate.fixed["hidden"]
    assert {"ffn", "heads"} <= set(certificate.axes)


def test_a_default_with_a_tensor_that_no_miniature_has_is_refused() -> None:
    """Only a model of many layers has the parameter: the proof holds, and does not speak of it."""

    class Deep(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            if config.num_hidden_layers > 8:
                self.model.deep = nn.Parameter(torch.zeros(config.hidden_size))

    certify(Deep)
    found = verdict_of("deep", Deep, LlamaConfig())
    assert (found.verdict, found.axes) == ("refused", ())
    assert found.reason is not None
    assert "Deep: model.deep is [4096], but the proven layouts have no such parameter" in found.reason
    assert verdict_of("deep", Deep, LlamaConfig(num_hidden_layers=8)).verdict == "certified"


def test_parts_of_a_default_that_do_not_fit_together_are_made_to() -> None:
    """Stock Qwen2-VL by default makes pictures 3584 wide for a text of 8192: no published one does."""
    config = CONFIG_MAPPING["qwen2_vl"]()
    assert config.vision_config.hidden_size != config.text_config.hidden_size
    made = fitted(config)
    assert made.vision_config.hidden_size == made.text_config.hidden_size == config.text_config.hidden_size
    assert fitted(made) is made


def test_a_classifier_is_proven_with_its_labels() -> None:
    certificate = certify(BertForSequenceClassification)
    assert certificate.layouts["classifier.weight"] == "labels <hidden"
    assert "labels" in certificate.errors


def test_the_proof_leaves_the_world_as_it_was() -> None:
    before, state = torch.get_default_dtype(), torch.get_rng_state()
    certify(families.config("bloom", vocab_size=170))
    assert torch.get_default_dtype() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_head_and_its_norm_are_found() -> None:
    llama, gpt2, gemma, olmo = (certify(families.config(f)) for f in ("llama", "gpt2", "gemma", "olmo"))
    assert (llama.head, llama.head_norm) == ("lm_head.weight", ("model.norm.weight",))
    assert gpt2.head_norm == ("transformer.ln_f.weight", "transformer.ln_f.bias")
    assert gemma.head_norm == ()  # multiplies by one plus its gain: no factor can move there
    assert olmo.head_norm == ()  # has no gain
    assert gpt2.tied == ("lm_head.weight",)


@pytest.mark.parametrize(("model_type", "where"), [("minimax_m2", "mlp"), ("glm4_moe", "mlp.gate")])
def test_state_in_buffers_has_a_layout_too(model_type: str, where: str) -> None:
    """A router's correction bias is a buffer: transferred parameters alone would be another function."""
    certificate = certify(CONFIG_MAPPING[model_type]())
    assert certificate.layouts[f"model.layers.*.{where}.e_score_correction_bias"] == "experts"
    assert "experts" in certificate.axes


def test_a_live_model_may_be_certified() -> None:
    source = families.model("llama")
    assert certify(source) == certify(source.config)
