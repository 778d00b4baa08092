"""Rotary frequencies of a narrower head: those that Transformers gives the source against those it gives the target."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_ws import AutoSubclone, SizeError
from tests import families

SCALED = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
}


def source(kind: str) -> PreTrainedModel:
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **SCALED[kind]}
    config = families.config("llama", head_dim=64, rope_parameters=rope, max_position_embeddings=4096)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("keep", [16, 32, 48])
def test_every_kept_pair_turns_as_it_did(kind: str, keep: int) -> None:
    """When pairs are left out evenly, exactly; yarn's ramp moves by part of a pair. Else it is the nearest there is."""
    whole = source(kind)
    narrow = AutoSubclone.from_pretrained(whole, head_dim=keep, method="weight_selection")
    kept = [i for i in narrow.hf_ws_plan.maps["head_dim"].index if i < 32]
    before, after = whole.model.rotary_emb.inv_freq[kept], narrow.model.rotary_emb.inv_freq
    off = (before / after).log().abs().max()
    evenly = 64 % keep == 0
    step = (whole.model.rotary_emb.inv_freq[:-1] / whole.model.rotary_emb.inv_freq[1:]).log().max()
    assert off <= (1e-6 if evenly and kind != "yarn" else step)
    assert narrow.model.rotary_emb.attention_scaling == whole.model.rotary_emb.attention_scaling
    assert narrow(torch.arange(3, 40)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("phi", {"hidden": 64, "heads": 8, "head_dim": 8}),
        ("stablelm", {"hidden": 64, "heads": 8, "head_dim": 8}),
        ("gptj", {"hidden": 32, "heads": 8, "head_dim": 4}),
    ],
)
def test_where_a_part_of_each_head_turns_a_narrower_head_is_refused(family: str, asked: dict) -> None:
    message = rf"{family} turns only a part of each head's \d+ channels.*leave head_dim as it is"
    with pytest.raises(SizeError, match=message):
        AutoSubclone.plan(families.model(family), **asked)


def test_where_each_pair_has_a_factor_of_its_own_only_head_dim_stays() -> None:
    factors = [1.0 + i / 8 for i in range(32)]
    rope = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"rope_theta": 10_000.0, "short_factor": factors, "long_factor": factors}
    whole = AutoModelForCausalLM.from_config(
        families.config("llama", head_dim=64, rope_parameters=rope, max_position_embeddings=256)
    )
    narrow = AutoSubclone.from_pretrained(whole, hidden=32)
    assert torch.equal(narrow.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    with pytest.raises(
        SizeError, match=r"head_dim=32: longrope has a factor for each rotary pair of 64 channels"
    ):
        AutoSubclone.plan(whole, head_dim=32)
