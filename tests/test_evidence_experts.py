"""Neurons inside fused experts, against what Transformers' own function for them computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from hf_ws import AutoSubclone, calibrate
from hf_ws.compensation.least_squares import fitted
from hf_ws.evidence.fused import can_be_watched, watched

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=3)
    ),
    "one of five": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=5, num_experts_per_tok=1)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(  # turned matrices, biases, halves interleaved, a gate of its own
        GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)
    ),
}
IDS = torch.arange(24).view(2, 12) * 7 % 64
PADDED = torch.ones_like(IDS).index_fill(1, torch.tensor([9, 10, 11]), 0)


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@contextmanager
def seen_in(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """The neurons of each layer's experts, [tokens, chosen, neurons], from Transformers' function for few tokens."""
    model.set_experts_implementation("batched_mm")
    layers: list[list[Tensor]] = []
    for experts in (m for m in model.modules() if can_be_watched(m)):
        seen: list[Tensor] = []
        gate = experts._apply_gate

        def kept(values: Tensor, gate=gate, seen=seen) -> Tensor:
            seen.append(gate(values))
            if seen[-1].requires_grad:
                seen[-1].retain_grad()
            return seen[-1]

        experts._apply_gate = kept
        layers.append(seen)
    yield layers
    for experts in (m for m in model.modules() if can_be_watched(m)):
        del experts._apply_gate


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_neurons_inside_experts_are_seen(name: str, mask: Tensor | None) -> None:
    """In float64, which the way that is Transformers' own choice on a CPU cannot do."""
    model = model_of(name)
    data = {"input_ids": IDS} if mask is None else {"input_ids": IDS, "attention_mask": mask}
    found = calibrate(model, [data], wants=["mean_abs", "rms", "variance", "taylor"])
    axis = next(axis for axis, layer in found.statistics["mean_abs"] if axis in ("ffn", "moe_ffn"))
    kept = torch.ones(IDS.numel(), dtype=torch.bool) if mask is None else mask.flatten().bool()
    with seen_in(model) as layers:
        labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
        loss = model(**data, labels=labels).loss
        scale = (labels[:, 1:] != -100).sum()  # the evidence's loss is the sum over a sequence's tokens
        (loss * scale).backward()
    for layer, (neurons,) in enumerate(layers):
        own = neurons.view(IDS.numel(), -1, neurons.shape[-1])[kept].flatten(0, 1).detach()
        gradient = neurons.grad.view(IDS.numel(), -1, neurons.shape[-1])[kept].flatten(0, 1)
        expected = {
            "mean_abs": own.abs().mean(0),
            "rms": own.square().mean(0).sqrt(),
            "variance": own.var(0, correction=0),
            "taylor": (own * gradient).abs().mean(0),
        }
        for statistic, values in expected.items():
            seen = found.statistic(statistic, axis, layer)
            torch.testing.assert_close(seen, values, rtol=1e-6 if statistic == "taylor" else 1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_watched_experts_compute_what_they_did(name: str) -> None:
    """And are let go when something fails on the way."""
    model = model_of(name)
    model.set_experts_implementation("batched_mm")
    seen: list[Tensor] = []
    modules = {
        m: lambda values, tokens, count: seen.append(tokens) for m in model.modules() if can_be_watched(m)
    }

    def watch_and_fail(expected: Tensor) -> None:
        with watched(modules):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-12)
            raise ZeroDivisionError

    with torch.no_grad():
        expected = model(IDS).logits
        with pytest.raises(ZeroDivisionError):
            watch_and_fail(expected)
        count = len(seen)
        assert torch.equal(model(IDS).logits, expected)
    assert len(seen) == count > 0
    assert model.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("kind", [NemotronHExperts, AriaExperts])
def test_experts_without_a_gate_or_turned(kind: type[nn.Module]) -> None:
    sizes = {"hidden_size": 16, "moe_intermediate_size": 12, "n_routed_experts": 4}
    if kind is AriaExperts:
        config = AriaTextConfig(
            hidden_size=16, num_attention_heads=4, intermediate_size=12, moe_num_experts=4
        )
    else:
        config = NemotronHConfig(**sizes)
    experts = kind(config).double()
    assert can_be_watched(experts)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    hidden, index, weights = (
        torch.randn(6, 16).double(),
        torch.tensor([[0, 2]] * 3 + [[3, 1]] * 3),
        torch.rand(6, 2),
    )
    config._experts_implementation = "batched_mm"
    expected = experts(hidden, index, weights.double())
    seen: list[Tensor] = []
    with watched({experts: lambda values, tokens, count: seen.append(values)}):
        torch.testing.assert_close(experts(hidden, index, weights.double()), expected)
    assert sum(map(len, seen)) == 12


def test_neurons_of_experts_are_ranked_by_what_they_do() -> None:
    """Large weights that never fire lose to small ones that do."""
    model = model_of("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj[:, :12] = 0.0  # silent, whatever the rest of their weights
            layer.mlp.experts.gate_up_proj[:, 24:36] *= 100.0
    plan = AutoSubclone.plan(model, ffn=12, method="subclone", calibration=IDS)
    assert [found.index for key, found in plan.maps.items() if key.startswith("ffn")] == [
        tuple(range(12, 24))
    ] * 2


def test_least_squares_refits_what_reads_neurons_of_experts() -> None:
    """Neurons that follow others, alike in all experts of a layer, may go: the others' readers make up for them."""
    model = model_of("mixtral").float()
    with torch.no_grad():
        for layer in model.model.layers:
            gate, up = layer.mlp.experts.gate_up_proj[:, :24], layer.mlp.experts.gate_up_proj[:, 24:]
            gate[:, 12:] = gate[:, :12]
            up[:, 12:] = (
                torch.linspace(-0.5, 0.5, 12)[:, None] * up[:, :12]
            )  # weaker, so these are ranked last
    ids = torch.arange(1024).view(8, 128) * 7 % 64
    asked = {"ffn": 12, "method": "subclone", "method_args": {"rescale": False}, "calibration": ids}
    plain = AutoSubclone.from_pretrained(model, **asked)
    refitted = AutoSubclone.from_pretrained(model, compensation=["least_squares"], **asked)
    names = {f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)}
    assert refitted.hf_ws_plan.refits.keys() == names
    with torch.no_grad():
        wanted, of_plain, of_fitted = (one(IDS).logits for one in (model, plain, refitted))
    lost = [(one - wanted).abs().max() for one in (of_plain, of_fitted)]
    assert lost[1] < 0.01 * lost[0]


def test_least_squares_over_experts_is_least() -> None:
    """Against NumPy's least squares on the neurons of all tokens and experts."""
    model = model_of("qwen3_moe")
    ids = torch.arange(2048).view(16, 128) * 7 % 64
    found = calibrate(model, ids, wants=["moments"]).moments["model.layers.1.mlp.experts.down_proj"]
    with torch.no_grad(), seen_in(model) as layers:
        model(ids)
    (neurons,) = layers[1]
    assert found.count == len(neurons) == 2048 * 3
    kept = torch.arange(0, 24, 2)
    read = torch.from_numpy(fitted(found.second.double(), kept)).double()
    best = torch.linalg.lstsq(neurons[:, kept], neurons).solution
    residual = [float((neurons - neurons[:, kept] @ one).square().sum()) for one in (best, read)]
    assert residual[0] <= residual[1] < residual[0] * (1 + 1e-4)
