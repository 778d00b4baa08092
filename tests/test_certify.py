"""The proof has teeth: every family passes, and every planted mistake is caught."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_ws import UnsupportedArchitectureError, certify
from hf_ws.layouts.certify import TOLERANCE, prove
from hf_ws.layouts.infer import Inferred, infer
from tests import families


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_proven(family: str) -> None:
    certificate = certify(families.config(family, architectures=[families.model_class(family).__name__]))
    assert max(certificate.errors.values()) <= TOLERANCE
    named = {name for name, _ in families.model(family).named_parameters()}
    assert {certificate.pattern(name) for name in named} <= set(certificate.layouts)


MISTAKES = {
    "swapped factor order": ("llama", "self_attn.q_proj.weight", "(head_dim heads) <hidden"),
    "swapped order where it is read": ("llama", "self_attn.o_proj.weight", "hidden <(head_dim heads)"),
    "forgotten reader": ("llama", "mlp.down_proj.weight", "hidden ffn"),
    "reader on the wrong side": ("gpt2", "mlp.c_fc.weight", "hidden <ffn"),
    "an axis left out": ("llama", "input_layernorm.weight", "135"),
    "q taken for a k": (
        "phi3",
        "qkv_proj.weight",
        "(kv_heads head_dim + heads head_dim + kv_heads head_dim) <hidden",
    ),
    "interleaved taken for stacked": ("gpt_neox", "query_key_value.weight", "(3 heads head_dim) <hidden"),
    "stacked taken for interleaved": ("gpt2", "c_attn.weight", "<hidden (heads 3 head_dim)"),
    "groups taken for stacked": (
        "falcon_40b",
        "query_key_value.weight",
        "(heads head_dim + kv_heads head_dim + kv_heads head_dim) <hidden",
    ),
    "blocks forgotten": ("codegen", "qkv_proj.weight", "(3 heads head_dim) <hidden"),
    "gate and up interleaved": ("mixtral", "experts.gate_up_proj", "experts (ffn 2) <hidden"),
    "expert tensor transposed": ("mixtral", "experts.down_proj", "experts <hidden ffn"),
    "experts not named": ("qwen3_moe", "mlp.gate.weight", "7 <hidden"),
    "a bias left behind": ("bert", "intermediate.dense.bias", "88"),
    "head not counted as reading": ("llama", "lm_head.weight", "vocab hidden"),
}


@pytest.mark.parametrize(("family", "parameter", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_a_planted_mistake_is_caught(family: str, parameter: str, wrong: str) -> None:
    model_class = families.model_class(family)
    inferred = infer(model_class, families.config(family))
    (pattern,) = [name for name in inferred.layouts if name.endswith(parameter)]
    assert inferred.layouts[pattern] != wrong
    seeded = Inferred({**inferred.layouts, pattern: wrong}, inferred.stacks, inferred.miniature)
    with pytest.raises(UnsupportedArchitectureError, match=r"not proven: .*moved the output by"):
        prove(model_class, seeded)


def test_a_class_with_an_unknown_part_is_refused_by_name() -> None:
    class Strange(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.extra = nn.Parameter(torch.zeros(config.hidden_size, 23))

    with pytest.raises(
        UnsupportedArchitectureError, match=r"Strange: no axis explains dimension 1 of model\.extra"
    ):
        certify(Strange)


def test_a_class_whose_function_breaks_the_symmetry_is_refused() -> None:
    """A model that treats its first channel specially has no interchangeable channels, whatever the shapes say."""

    class Special(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * self.model.norm.weight[0]
            return out

    with pytest.raises(UnsupportedArchitectureError, match=r"Special: .*not proven: hidden"):
        certify(Special)


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


@pytest.mark.parametrize("model_type", ["minimax_m2", "glm4_moe", "apertus"])
def test_a_class_with_state_outside_its_parameters_is_refused(model_type: str) -> None:
    """A router's correction bias is a buffer: transferred parameters alone would be another function."""
    with pytest.raises(
        UnsupportedArchitectureError, match=r"keeps part of its state in buffers \(model\.layers\.\d"
    ):
        certify(CONFIG_MAPPING[model_type]())


def test_a_live_model_may_be_certified() -> None:
    source = families.model("llama")
    assert certify(source) == certify(source.config)
