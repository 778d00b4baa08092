"""The proof has teeth: in families built in different ways, a wrong explanation of the right length proves nothing.

Each mistake replaces one layout of a type's proven ones; nothing else may be tried in its place.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
from transformers import PreTrainedModel

from hf_ws import UnsupportedArchitectureError
from hf_ws.axes import length, parse
from hf_ws.layouts import Certificate, Inferred, catalogue, infer
from hf_ws.layouts.certify import certificate_of
from hf_ws.sizes import sizes_of

READS = "reads"

VISION, TOWER = "vision_config.", "model.vision_tower.encoder.layers.*."
PROJECTED = "(vision_config.head_dim vision_config.heads) <vision_config.hidden"

MISTAKES = {
    "llama": ("self_attn.o_proj.weight", "hidden <(head_dim heads)", "heads"),
    "llama, a norm left out": ("post_attention_layernorm.weight", "{hidden}", "hidden"),
    "llama, wrong side": ("mlp.up_proj.weight", "<ffn hidden", READS),
    "gpt2, q, k and v interleaved": ("attn.c_attn.weight", "<hidden (heads 3 head_dim)", "heads"),
    "gpt_neox, q, k and v stacked": ("query_key_value.weight", "(3 heads head_dim) <hidden", "heads"),
    "falcon, the shared key first": (
        "query_key_value.weight",
        "(head_dim + heads head_dim + head_dim) <hidden",
        "heads",
    ),
    "mixtral, gate and up interleaved": ("experts.gate_up_proj", "experts (ffn 2) <hidden", "ffn"),
    "gpt_oss, gate and up stacked": ("experts.gate_up_proj", "experts <hidden (2 ffn)", "ffn"),
    "gpt_oss, sinks left out": ("self_attn.sinks", "{heads}", "heads"),
    "gpt_oss, a router's bias left out": ("router.bias", "{experts}", "experts"),
    "deepseek_v3, the rotated part first": (
        "kv_a_proj_with_mqa.weight",
        "(rope_dim + kv_rank) <hidden",
        "kv_rank",
    ),
    "deepseek_v3, heads not outermost": (
        "kv_b_proj.weight",
        "(heads nope_dim + heads v_dim) <kv_rank",
        "heads",
    ),
    "mamba2, the steps first": (
        "in_proj.weight",
        "(heads + heads head_dim + heads head_dim + kv_heads state + kv_heads state) <hidden",
        "heads",
    ),
    "mamba2, states before channels": (
        "mixer.conv1d.weight",
        "(kv_heads state + kv_heads state + heads head_dim) 1 4",
        "state",
    ),
    "qwen3_next, parts before heads": (
        "in_proj_ba.weight",
        "(linear.heads + linear.heads) <hidden",
        "linear.heads",
    ),
    "qwen3_next, the gate apart": ("self_attn.q_proj.weight", "(2 heads head_dim) <hidden", "heads"),
    "bert, wrong side": ("intermediate.dense.weight", "<ffn hidden", READS),
    "bert, a bias left out": ("attention.output.dense.bias", "{hidden}", "hidden"),
    "deberta-v2, swapped factors": ("query_proj.weight", "(head_dim heads) <hidden", "heads"),
    "t5, buckets without heads": ("relative_attention_bias.weight", "32 {heads}", "heads"),
    "bart, the encoder's heads": (
        "encoder_attn.v_proj.weight",
        "(decoder.head_dim decoder.heads) <hidden",
        "decoder.heads",
    ),
    "bart, a table left out": ("encoder.embed_positions.weight", "(2 + positions) {hidden}", "hidden"),
    "convnext, a factor inside": (
        "stages.2.layers.*.pwconv1.weight",
        "(hidden.2 4) <hidden.2",
        "hidden.2",
    ),
    "convnext, a width left out": (
        "stages.1.downsampling_layer.1.weight",
        "hidden.1 <{hidden.0} 2 2",
        "hidden.0",
    ),
    "vit, swapped factors": ("attention.o_proj.weight", "hidden <(head_dim heads)", "heads"),
    "llava, the tower's heads": (f"{TOWER}self_attn.q_proj.weight", PROJECTED, f"{VISION}heads"),
    "llava, the bridge left out": (
        "multi_modal_projector.linear_1.weight",
        "hidden <{vision_config.hidden}",
        f"{VISION}hidden",
    ),
}
"""By type: the end of a tensor's name, its wrong layout ({axis}: a number that happens to be that long), and the axis
that must not be proven with it."""


@cache
def proven(model_type: str) -> tuple[type[PreTrainedModel], Inferred, Certificate]:
    """A type with its proven layouts, and no others to choose from."""
    model_class, config = catalogue.default_of(model_type, catalogue.types()[model_type])
    inferred = infer(model_class, config)
    certificate = certificate_of(model_class, inferred)
    return model_class, replace(inferred, layouts=dict(certificate.layouts), choices={}), certificate


def claims(certificate: Certificate, axis: str) -> bool:
    return certificate.reads if axis == READS else axis in certificate.axes


@pytest.mark.filterwarnings("ignore")  # what a class of Transformers warns of
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_explanation_proves_nothing(mistake: str) -> None:
    ending, wrong, axis = MISTAKES[mistake]
    model_class, inferred, certificate = proven(mistake.partition(",")[0])
    assert claims(certificate, axis)  # with the right one it is
    sizes = sizes_of(inferred.miniature)
    wrong = re.sub(r"{([\w.]+)}", lambda axis: str(sizes[axis[1]]), wrong)
    patterns = [name for name in inferred.layouts if name.endswith(ending)]
    assert patterns
    for name in patterns:
        right = inferred.layouts[name]
        assert right != wrong
        assert [length(d, sizes) for d in parse(right)] == [length(d, sizes) for d in parse(wrong)]
    layouts = {**inferred.layouts, **dict.fromkeys(patterns, wrong)}
    try:
        seeded = certificate_of(model_class, replace(inferred, layouts=layouts))
    except UnsupportedArchitectureError:
        return  # nothing at all is proven
    assert not claims(seeded, axis)


def test_the_mistakes_are_of_many_families() -> None:
    assert len({mistake.partition(",")[0] for mistake in MISTAKES}) >= 12
