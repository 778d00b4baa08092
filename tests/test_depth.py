"""Layer policies that look at data, against layers made useless by hand and against plain loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_ws import AutoSubclone
from hf_ws.depth import POLICIES, Context, wants_of
from hf_ws.errors import CalibrationError, PlanError
from hf_ws.evidence import calibrate, loss_without
from hf_ws.layouts import certify
from tests import families

IDS = families.tokens(rows=3, length=10)
WITH_DATA = [name for name, policy in POLICIES.items() if wants_of(policy) is not None]
THREE = ("angular_distance", "block_influence")  # and the middle dropped: what lowest_loss chooses from
DROPPING = [name for name in WITH_DATA if name != "merge_neighbours"]


def kept(
    source: PreTrainedModel, policy: Any, layers: int = 2, data: Any = IDS
) -> dict[str, tuple[int, ...]]:
    plan = AutoSubclone.plan(source, method="subclone", layers=layers, layer_policy=policy, calibration=data)
    return dict(plan.layers)


def idle(model: PreTrainedModel, *layers: int) -> PreTrainedModel:
    """These layers of a Llama pass on what they get."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # sure of what it says
        for layer in layers:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    return model


def taught(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Data whose every token is the one that the model holds for likeliest: no other model does better on it."""
    with torch.no_grad():
        likeliest = model(IDS).logits.argmax(-1)
    return [{"input_ids": IDS, "labels": torch.cat([IDS[:, :1], likeliest[:, :-1]], 1)}]


@pytest.mark.parametrize("policy", DROPPING)
@pytest.mark.parametrize("dead", [(1, 2), (2, 3), (0, 1)])
def test_layers_that_do_nothing_are_dropped(policy: str, dead: tuple[int, int]) -> None:
    source = idle(families.model("llama"), *dead)
    alive = tuple(sorted({0, 1, 2, 3} - {*dead}))
    assert kept(source, policy, data=taught(source)) == {"layers": alive}
    target = AutoSubclone.from_pretrained(source, layers=2, layer_policy=policy, calibration=taught(source))
    torch.testing.assert_close(families.logits(target), families.logits(source), rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", ["block_influence", "loss_increase"])
def test_idle_layers_need_not_be_neighbours(policy: str) -> None:
    source = idle(families.model("llama"), 0, 2)
    assert kept(source, policy, data=taught(source)) == {"layers": (1, 3)}


@dataclass
class Told:
    """Evidence as a policy reads it, made up."""

    similarity: dict[Any, float] = field(default_factory=dict)
    angles: dict[str, Tensor] = field(default_factory=dict)

    def evidence(self, wants: tuple[str, ...]) -> Told:
        return self

    def loss(self, skipped: set[int | str]) -> float:
        return math.fsum(self.similarity[layer] for layer in skipped)


@pytest.mark.parametrize("policy", DROPPING)
@given(data=st.data())
def test_a_policy_keeps_what_it_was_asked_to(policy: str, data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, 12))
    keep = data.draw(st.integers(1, depth))
    numbers = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=depth, max_size=depth))
    steps = torch.tensor([0.0, *numbers], dtype=torch.float64).cumsum(0)
    told = Told(dict(enumerate(numbers)), {"layers": (steps[:, None] - steps).abs()})
    found = POLICIES[policy](depth, keep, Context("layers", told))
    assert list(found) == sorted(set(found))
    assert len(found) == keep
    assert 0 <= found[0] <= found[-1] < depth
    dropped = sorted({*range(depth)} - {*found})
    if policy == "angular_distance":  # one run, and none turns the stream less
        runs = [math.fsum(numbers[i : i + depth - keep]) for i in range(keep + 1)]
        assert math.fsum(numbers[i] for i in dropped) == min(runs)
        assert not dropped or dropped == list(range(dropped[0], dropped[-1] + 1))
    elif policy == "lowest_loss":  # no choice of the three costs less
        others = [tuple(range((keep + 1) // 2)) + tuple(range(depth - keep // 2, depth))]
        others += [POLICIES[name](depth, keep, Context("layers", told)) for name in THREE]
        assert found in others
        assert told.loss({*dropped}) == min(told.loss({*range(depth)} - {*other}) for other in others)
    elif policy == "block_influence":
        assert min((numbers[i] for i in dropped), default=1.0) >= max(numbers[i] for i in found)
    else:  # losses that add up: the greedy choice is the best
        assert math.fsum(numbers[i] for i in dropped) == math.fsum(sorted(numbers)[: depth - keep])


@pytest.mark.parametrize("policy", WITH_DATA)
def test_without_data_a_policy_that_looks_at_it_is_refused(policy: str) -> None:
    source = families.model("llama")
    message = f"layer_policy {policy} looks at calibration data, and there is none; pass calibration=, or one of first"
    with pytest.raises(CalibrationError, match=message):
        AutoSubclone.plan(source, layers=2, layer_policy=policy)
    assert AutoSubclone.plan(source, hidden=32, layer_policy=policy).layers == {"layers": (0, 1, 2, 3)}


def test_a_callable_may_look_at_the_evidence() -> None:
    source = families.model("llama")

    def loudest(depth: int, keep: int, context: Context) -> tuple[int, ...]:
        loud = [
            float(context.evidence.statistic("variance", "hidden", layer).sum()) for layer in range(depth)
        ]
        return tuple(sorted(sorted(range(depth), key=lambda layer: -loud[layer])[:keep]))

    loudest.wants = ("variance",)
    found = calibrate(source, IDS, wants=("variance",))
    loud = [float(found.statistic("variance", "hidden", layer).sum()) for layer in range(4)]
    expected = sorted(torch.tensor(loud).topk(2).indices.tolist())
    assert kept(source, loudest) == {"layers": tuple(expected)}


def test_where_no_loss_can_be_had_the_default_is_block_influence_and_says_why(caplog) -> None:
    source = families.model("bert")
    plan = AutoSubclone.plan(source, layers=2, calibration=IDS)
    assert plan.layers == kept(source, "block_influence")
    assert "gives no loss without labels" in caplog.text
    assert "block_influence is taken" in caplog.text
    caplog.clear()
    source = families.model("llama")
    plan = AutoSubclone.plan(source, layers=2, calibration=calibrate(source, IDS))
    assert plan.layers == kept(source, "block_influence")
    assert "block_influence is taken" in caplog.text
    bare = calibrate(source, IDS, wants=("moments",))
    assert AutoSubclone.plan(source, layers=2, calibration=bare).layers == {"layers": (0, 3)}
    assert "middle_dropped is taken" in caplog.text


def test_the_default_is_the_choice_with_the_lowest_loss() -> None:
    source = idle(families.model("llama"), 0, 1)  # what the middle drop would keep and lose is not the least
    plan = AutoSubclone.plan(source, layers=2, calibration=taught(source))
    assert plan.layers == {"layers": (2, 3)}
    assert kept(source, None, data=taught(source)) == {"layers": (0, 3)}  # subclone, as published


def test_layers_may_be_numbers_of_numpy_and_nothing_else() -> None:
    source = families.model("llama")
    plan = AutoSubclone.plan(source, layers=2, layer_policy=lambda depth, keep: np.arange(keep) * 2)
    assert plan.layers == {"layers": (0, 2)}
    assert all(type(layer) is int for layer in plan.layers["layers"])
    with pytest.raises(
        PlanError, match="layer_policy gave None; wanted are the numbers of the layers to keep"
    ):
        AutoSubclone.plan(source, layers=2, layer_policy=lambda depth, keep: None)


def test_skipping_is_dropping() -> None:
    """The loss with layers skipped is that of a model which never had them."""
    source = families.model("llama").double()
    smaller = AutoSubclone.from_pretrained(source, layer_policy=[0, 3], method="weight_selection").double()
    with torch.no_grad():
        expected = float(smaller(IDS, labels=IDS).loss)
    found = loss_without(source, [{"input_ids": IDS}], certify(type(source), source.config), {1, 2})
    assert found == pytest.approx(expected, rel=1e-6)
    assert not any(module._forward_hooks for module in source.modules())


def test_each_stack_of_an_encoder_decoder_is_asked_by_itself() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 4, "num_heads": 8, "vocab_size": 160}
    source = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    with torch.no_grad():
        for stack, dead in ((source.encoder, (1, 2)), (source.decoder, (1, 3))):
            for layer in dead:
                for part in stack.block[layer].layer:
                    inner = getattr(part, "SelfAttention", None) or getattr(part, "EncDecAttention", None)
                    (inner.o if inner is not None else part.DenseReluDense.wo).weight.zero_()
    data = [{"input_ids": IDS, "labels": IDS[:, :7].clone()}]
    for policy in ("block_influence", "loss_increase"):
        assert kept(source, policy, data=data) == {"encoder.layers": (0, 3), "decoder.layers": (0, 2)}


def test_the_layer_that_any_first_layer_must_be_stays_the_first() -> None:
    """T5's first layer alone has the position biases: the last layers come behind it."""
    source = T5ForConditionalGeneration(T5Config(d_model=64, d_kv=8, d_ff=96, num_layers=4, vocab_size=160))
    plan = AutoSubclone.plan(source, layers=2, layer_policy="last")
    assert dict(plan.layers) == {"encoder.layers": (0, 3), "decoder.layers": (0, 3)}


def test_the_source_runs_once_for_policy_and_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def counted(*args: Any, wants: tuple[str, ...], **options: Any) -> Any:
        calls.append(wants)
        return calibrate(*args, wants=wants, **options)

    monkeypatch.setattr("hf_ws.evidence.observation.calibrate", counted)
    source = families.model("llama")
    asked = {"method_args": {"score": "variance"}, "layer_policy": "block_influence"}
    AutoSubclone.from_pretrained(
        source, method="subclone", hidden=32, layers=2, calibration=iter([{"input_ids": IDS}]), **asked
    )
    assert len(calls) == 1
    assert {"similarity", "variance"} <= {*calls[0]}
    AutoSubclone.from_pretrained(source, hidden=32, method="weight_selection", calibration=IDS)
    assert len(calls) == 1


def test_evidence_in_place_of_data() -> None:
    source = families.model("llama")
    found = calibrate(source, IDS, wants=("similarity", "angles"))
    for policy in ("block_influence", "angular_distance"):
        assert kept(source, policy, data=found) == kept(source, policy)
    with pytest.raises(
        CalibrationError, match="calibration= is evidence, and here the data itself is needed"
    ):
        kept(source, "loss_increase", data=found)
    with pytest.raises(
        CalibrationError, match=r"this evidence holds mean_abs, not similarity; collect it with"
    ):
        kept(source, "block_influence", data=calibrate(source, IDS, wants=("mean_abs",)))
    with pytest.raises(
        CalibrationError, match="this evidence is of a model with hidden=64, the source has 32"
    ):
        AutoSubclone.plan(
            families.model("llama", hidden_size=32),
            method="subclone",
            hidden=16,
            calibration=calibrate(source, IDS),
        )


def test_a_model_without_a_loss_is_refused() -> None:
    source = families.model("bert")
    with pytest.raises(CalibrationError, match="BertForMaskedLM gives no loss without labels"):
        kept(source, "loss_increase")
    assert len(kept(source, "loss_increase", data=[{"input_ids": IDS, "labels": IDS}])["layers"]) == 2
