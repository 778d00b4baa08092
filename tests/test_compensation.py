"""Compensation: what the kept neurons say of the others is put back, exactly where they say all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_ws import AutoSubclone
from hf_ws.errors import CalibrationError, PlanError
from tests import families

IDS = families.tokens(16, 32)
FFN = 96

IN = {"gpt2": "c_fc", "opt": "fc1", "llama": "gate_proj", "qwen3": "gate_proj"}
OUT = {"gpt2": "c_proj", "opt": "fc2", "llama": "down_proj", "qwen3": "down_proj"}


def shrunk(source: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return AutoSubclone.from_pretrained(
        source, ffn=FFN - 24, method="subclone", calibration=IDS, dtype="float64", **options
    )


def distance(one: PreTrainedModel, other: PreTrainedModel) -> float:
    wanted = families.logits(other, IDS)
    return float((families.logits(one, IDS) - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def doubled(family: str) -> PreTrainedModel:
    """A source in which 24 neurons of each layer say what 24 others do, half as loud."""
    source = families.model(family).double()
    copies, originals = torch.arange(24), torch.arange(24, 48)
    for name, module in source.named_modules():
        if name.endswith((IN[family], "up_proj")) and "attn" not in name:
            weight = module.weight if family != "gpt2" else module.weight.T
            scale = 0.5 if name.endswith("up_proj") else 1.0  # of gate x up, half
            weight[copies] = scale * weight[originals]
            if module.bias is not None:
                module.bias[copies] = scale * module.bias[originals]
    return source


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
def test_what_others_say_is_put_back(family: str, rescale: bool) -> None:
    """Without the quieter copies nothing is lost: what reads the originals makes up for them, and no gain is on it."""
    source = doubled(family)
    kept = {"rescale": False, "score": _last}
    plain = shrunk(source, method_args=kept)
    fitted = shrunk(source, method_args={**kept, "rescale": rescale}, compensation=["least_squares"])
    # The ridge, a thousandth of the mean square, is what keeps this from being exact.
    assert distance(fitted, source) < 0.05 * distance(plain, source)


def test_no_refit_of_the_default_start_has_a_gain() -> None:
    source = families.model("llama")
    plan = AutoSubclone.from_pretrained(source, hidden=32, ffn=64, calibration=IDS).hf_ws_plan
    assert len(plan.refits) == 2 * 4
    assert {plan.gains.get(name, 1.0) for name in plan.refits} == {1.0}
    assert not {name.replace(f".{i}.", ".*.") for name in plan.refits for i in range(4)} & plan.gains.keys()


def _last(known: object, axis: str, layer: object) -> torch.Tensor:
    """A score under which the first 24 go."""
    return torch.arange({"ffn": FFN, "hidden": 64, "heads": 8, "kv_heads": 4}[axis]).double()


@torch.no_grad()
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("compensation", [["mean_bias"], ["least_squares", "mean_bias"]])
def test_what_never_changes_goes_into_the_bias(compensation: list[str], rescale: bool) -> None:
    """Neurons of GPT-2 that always say the same leave without a trace."""
    source = families.model("gpt2").double()
    for block in source.transformer.h:
        block.mlp.c_fc.weight[:, :24] = 0
        block.mlp.c_fc.bias[:24] = 1.0 + torch.rand(24).double()
    args = {"rescale": False, "score": _last}
    plain = shrunk(source, method_args=args)
    made = shrunk(source, method_args=args, compensation=compensation)
    assert distance(plain, source) > 1e-2
    assert distance(made, source) < 1e-5  # evidence keeps second moments in float32
    if rescale:  # with gains the mean of what each block adds is kept all the same
        louder = shrunk(source, method_args={**args, "rescale": True}, compensation=["mean_bias"])
        assert _added(louder) == pytest.approx(_added(source), rel=0.05)


def _added(model: PreTrainedModel) -> float:
    """The mean of what the first feed-forward block gives."""
    seen: list[torch.Tensor] = []
    hook = model.transformer.h[0].mlp.register_forward_hook(lambda _, __, output: seen.append(output))
    families.logits(model, IDS)
    hook.remove()
    return float(seen[0].mean((0, 1)).norm())


def test_an_unknown_compensation_is_named() -> None:
    with pytest.raises(PlanError, match="compensation 'undo' is unknown; known are least_squares, "):
        AutoSubclone.plan(families.model("llama"), ffn=64, compensation=["undo"])
    with pytest.raises(PlanError, match=r"\['rms', 'rms'\] names one twice; each is done once"):
        AutoSubclone.plan(families.model("llama"), hidden=32, compensation=["rms", "rms"])


def test_the_order_of_the_names_changes_nothing() -> None:
    """Each would undo what is done before it if it were not done in one order."""
    source, names = (
        families.model("gpt2"),
        ["output", "least_squares_drifted", "mean_bias", "rms", "least_squares"],
    )
    one, other = (shrunk(source, hidden=32, compensation=asked) for asked in (names, names[::-1]))
    assert one.hf_ws_plan == other.hf_ws_plan
    assert one.hf_ws_plan.compensated == (
        "least_squares",
        "rms",
        "mean_bias",
        "least_squares_drifted",
        "output",
    )
    biased = [name for name, refit in one.hf_ws_plan.refits.items() if refit.rest is not None]
    assert biased == list(one.hf_ws_plan.refits)


def test_without_data_there_is_nothing_to_fit() -> None:
    with pytest.raises(CalibrationError, match="least_squares is settled by what the model does on data"):
        AutoSubclone.from_pretrained(families.model("llama"), ffn=64, compensation=["least_squares"])
