"""Compensation of a cut residual stream: the levels of its norms, and the matrices that read it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    IBertConfig,
    IBertForMaskedLM,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_ws import AutoSubclone
from tests import families

IDS = families.tokens(16, 32)
SIZES = {
    "llama": {"hidden": 32, "heads": 8, "kv_heads": 4, "ffn": 96},
    "gpt2": {"hidden": 32, "heads": 4, "ffn": 96},
}
SIZES |= {"qwen3": SIZES["llama"], "gemma": SIZES["llama"]}


def _first(known: object, axis: str, layer: object) -> Tensor:
    """A score under which the last go."""
    return -torch.arange({"ffn": 96, "hidden": 64, "heads": 8, "kv_heads": 4}[axis]).double()


def shrunk(
    source: PreTrainedModel, family: str, *compensation: str, rescale: bool = False
) -> PreTrainedModel:
    args = {"rescale": rescale, "score": _first}
    options = {"method": "subclone", "method_args": args, "dtype": "float64", **SIZES[family]}
    return AutoSubclone.from_pretrained(source, calibration=IDS, compensation=compensation, **options)


def distance(one: PreTrainedModel, other: PreTrainedModel) -> float:
    wanted = families.logits(other, IDS)
    return float((families.logits(one, IDS) - wanted).abs().max() / wanted.abs().max())


def writers(source: PreTrainedModel) -> list[Tensor]:
    """What writes the stream, its channels last."""
    found = []
    for name, module in source.named_modules():
        if isinstance(module, nn.Embedding):
            found.append(module.weight)
        elif name.endswith(("o_proj", "down_proj")):
            found.append(module.weight.T)
        elif name.endswith("c_proj"):
            found += [module.weight, module.bias]
    return found


@torch.no_grad()
def silenced(family: str) -> PreTrainedModel:
    """A source whose last 32 channels, and, where they go, last 4 heads, are silent; the channels' mean is zero."""
    epsilon = "layer_norm_epsilon" if family == "gpt2" else "rms_norm_eps"
    source = families.model(family, tie_word_embeddings=family == "gpt2", **{epsilon: 1e-12}).double()
    for own in writers(source):
        own[..., 32:] = 0
        own[..., :32] -= own[..., :32].mean(-1, keepdim=True)
    for name, own in source.named_parameters():
        if "ln_" in name and name.endswith("bias"):
            own[32:] = 0
        if name.endswith("attn.c_proj.weight"):  # [inputs, channels]
            own[32:] = 0
    return source


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_without_silent_channels_nothing_is_lost(family: str) -> None:
    source = silenced(family)
    assert distance(shrunk(source, family), source) > 0.05  # the norms are too quiet by the root of two
    # What is left: Llama's norms compute in float32, and second moments are kept in it.
    assert distance(shrunk(source, family, "rms"), source) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_norm_is_as_loud_as_its_kept_channels_were(family: str) -> None:
    """Its gain is multiplied by the ratio of what its input says to be kept; measured by hooks, in float64."""
    source = families.model(family).double()
    made = shrunk(source, family, "rms")
    plain = shrunk(source, family)
    offset = 1.0 if family == "gemma" else 0.0
    centred = family == "gpt2"
    seen: dict[str, Tensor] = {}
    norms = [name for name, m in source.named_modules() if "norm" in type(m).__name__.lower()]
    for name in norms:
        source.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1))
        )
    families.logits(source, IDS)
    assert norms
    for name in norms:
        kept, whole = seen[name][:, :32], seen[name]
        level = (_energy(kept, centred) / _energy(whole, centred)).sqrt()
        before, after = (model.get_submodule(name).weight + offset for model in (plain, made))
        torch.testing.assert_close(after, level * before, rtol=1e-5, atol=1e-6)


def test_norms_that_are_not_of_the_stream_are_left(caplog: pytest.LogCaptureFixture) -> None:
    """One that takes pictures alone, a channel a group (Wav2Vec2), and of the stream, ones with scales (I-BERT)."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    convolved = {
        "conv_dim": (16, 16),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
    }
    torch.manual_seed(0)
    hearing = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            **sizes, **convolved, vocab_size=30, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4
        )
    )
    reading = IBertForMaskedLM(IBertConfig(**sizes, vocab_size=families.VOCAB))
    for source, data in ((hearing, {"input_values": torch.randn(2, 400)}), (reading, {"input_ids": IDS})):
        options = {"hidden": 16, "method": "subclone", "calibration": [data]}
        plain, made = (
            AutoSubclone.from_pretrained(source, compensation=own, **options) for own in ((), ("rms",))
        )
        changed = [n for n, own in made.named_parameters() if not torch.equal(own, plain.get_parameter(n))]
        assert changed == ([] if source is hearing else ["lm_head.layer_norm.weight"])
    assert "Wav2Vec2ForCTC: rms has no norm to set" in caplog.text
    assert "IBertForMaskedLM: rms leaves 'ibert.embeddings.LayerNorm.weight'" in caplog.text


def _energy(stream: Tensor, centred: bool) -> Tensor:
    return stream.var(1, unbiased=False).mean() if centred else stream.square().mean()


@pytest.mark.parametrize("rescale", [False, True])
def test_what_other_channels_say_is_put_back(rescale: bool) -> None:
    """Where each channel that goes says what one that stays does, its readers make up for it."""
    source = families.model("llama").double()
    with torch.no_grad():
        for own in writers(source):
            own[..., 32:] = 0.5 * own[..., :32]
    plain = shrunk(source, "llama", "rms", rescale=rescale)
    made = shrunk(source, "llama", "rms", "least_squares_hidden", rescale=rescale)
    assert distance(plain, source) > 0.05
    assert distance(made, source) < 0.05 * distance(plain, source)  # the ridge is a thousandth


def test_the_readers_of_a_turned_stream_stay() -> None:
    source = families.model("llama", tie_word_embeddings=False)
    plain, made = (
        AutoSubclone.from_pretrained(
            source, calibration=IDS, compensation=own, method="rotation", **SIZES["llama"]
        )
        for own in ((), ("least_squares_hidden", "rms"))
    )
    assert all(map(torch.equal, plain.parameters(), made.parameters()))


def test_a_tied_head_is_not_refitted() -> None:
    """It is the embedding too: that keeps what was selected."""
    source = families.model("llama", tie_word_embeddings=True).double()
    made = shrunk(source, "llama", "least_squares_hidden")
    assert torch.equal(made.lm_head.weight, source.lm_head.weight[:, :32])
    assert not torch.equal(
        made.model.layers[0].mlp.up_proj.weight, source.model.layers[0].mlp.up_proj.weight[:, :32]
    )
