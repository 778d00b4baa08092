"""Layers that are merged into one: the sums against hand-made ones, and which layers a policy merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_ws import AutoSubclone, Plan
from hf_ws.depth import Context, merged
from hf_ws.depth.merge_neighbours import merge_neighbours
from hf_ws.errors import PlanError
from tests import families
from tests.test_depth import Told

IDS = families.tokens(rows=4, length=16)


def summed(depth: int, keep: int) -> tuple[int, ...]:
    """Of four layers the first, and the second with what the third and fourth differ by."""
    assert (depth, keep) == (4, 2)
    return merged((0, 1), {1: {1: -1.0, 2: 1.0, 3: 1.0}})


def layer(model: PreTrainedModel, number: int) -> dict[str, torch.Tensor]:
    prefix = {"llama": "model.layers", "gpt2": "transformer.h", "gemma": "model.layers"}[
        model.config.model_type
    ]
    start = f"{prefix}.{number}."
    return {name[len(start) :]: p for name, p in model.state_dict().items() if name.startswith(start)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_the_sum_is_that_of_laco(family: str) -> None:
    source = families.model(family).double()
    made = AutoSubclone.from_pretrained(source, layers=2, layer_policy=summed, method="weight_selection")
    one, two, three = (layer(source, number) for number in (1, 2, 3))
    found = layer(made, 1)
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        wanted = one[name] + (two[name] - one[name]) + (three[name] - one[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(layer(made, 0)[name], tensor) for name, tensor in layer(source, 0).items())


@pytest.mark.parametrize("method", ["subclone", "rotation"])
def test_layers_that_do_not_differ_stay_as_they_are(method: str) -> None:
    source = families.model("llama", tie_word_embeddings=False).double()
    with torch.no_grad():
        for number in (2, 3):
            for tensor, own in zip(layer(source, number).values(), layer(source, 1).values(), strict=True):
                tensor.copy_(own)
    options = {
        "calibration": IDS,
        "method": method,
        "dtype": "float64",
        "hidden": 48,
        "heads": 8,
        "kv_heads": 4,
    }
    made = AutoSubclone.from_pretrained(source, layers=2, layer_policy=summed, **options)
    wanted = AutoSubclone.from_pretrained(source, layer_policy=[0, 1], **options)
    for one, other in zip(made.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(data=st.data())
def test_a_run_is_its_first_and_what_the_others_differ_by(data: st.DataObject) -> None:
    """With the weights of layer i the i-th unit vector, so that what is made shows each layer's share."""
    depth = data.draw(st.integers(1, 10))
    keep = data.draw(st.integers(1, depth))
    numbers = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=depth, max_size=depth))
    found = merge_neighbours(depth, keep, Context("layers", Told(dict(enumerate(numbers)))))
    starts = sorted([*range(keep)[:2], *sorted(range(2, depth), key=numbers.__getitem__)[: max(0, keep - 2)]])
    runs = [range(a, b) for a, b in zip(starts, [*starts[1:], depth], strict=True)]
    theta = torch.eye(depth)
    assert len(found) == keep
    for target, (own, run) in enumerate(zip(found, runs, strict=True)):
        made = sum(share * theta[i] for i, share in found.blends.get(target, {own: 1.0}).items())
        assert torch.equal(made, theta[run[0]] + sum(theta[i] - theta[run[0]] for i in run[1:]))
        assert made[own] != 0  # what is fitted goes by a layer that is in the sum
        assert target not in found.blends or made.count_nonzero() > 1


def test_a_saved_plan_merges_again(tmp_path: Path) -> None:
    source = families.model("llama")
    made = AutoSubclone.from_pretrained(
        source, layers=2, layer_policy="merge_neighbours", calibration=IDS, method="subclone"
    )
    assert made.hf_ws_plan.blends
    made.hf_ws_plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made.hf_ws_plan
    assert all(map(torch.equal, made.parameters(), again.apply(source).parameters()))


def test_layers_with_other_tensors_are_not_merged() -> None:
    """Dense and routed ones, and T5's first with the others: it alone has position biases."""
    source = families.model("qwen3_moe_mixed")
    with pytest.raises(
        PlanError, match="layers 1, 2, 3 of layers have not the same tensors and cannot be merged"
    ):
        AutoSubclone.plan(source, layers=2, layer_policy=summed)
    t5 = T5ForConditionalGeneration(T5Config(d_model=64, d_kv=8, d_ff=96, num_layers=4, vocab_size=160))
    with pytest.raises(PlanError, match=r"layers 0, 1 of (en|de)coder.layers have not the same tensors"):
        AutoSubclone.plan(t5, layers=3, layer_policy=lambda *_: merged((0, 2, 3), {0: {0: 0.0, 1: 1.0}}))
    plan = AutoSubclone.plan(t5, layers=2, layer_policy=summed)
    assert plan.blends.keys() == {"encoder.layers.1", "decoder.layers.1"}


def test_the_plan_says_what_is_summed() -> None:
    plan = AutoSubclone.plan(families.model("llama"), layers=2, layer_policy=summed, method="subclone")
    assert "  0 to 1; 1 is a sum of 1, 2, 3\n" in str(plan)
