"""Padding of encoder-decoders: what is counted is what sequences without any, one at a time, give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_ws import AutoSubclone, calibrate
from hf_ws.errors import CalibrationError
from hf_ws.evidence import Evidence
from tests import families

WANTS = ("mean_abs", "rms", "variance", "moments", "similarity")
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    "decoder_start_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
FSMT = BART | {
    "langs": ["en", "de"],
    "src_vocab_size": 64,
    "tgt_vocab_size": 64,
    "tie_word_embeddings": False,
}
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
}  # fmt: skip
LONG = 9
LENGTHS = (
    (9, 4),
    (5, 9),
    (6, 6),
)  # of the source and the target of each pair; the longest of both are as long


def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval().double()


def pairs(name: str) -> list[tuple[Tensor, Tensor]]:
    return [
        (families.tokens(1, source, seed=i) % 60 + 3, families.tokens(1, target, seed=10 + i) % 60 + 3)
        for i, (source, target) in enumerate(LENGTHS)
    ]


def padded(rows: list[Tensor], length: int, filler: int) -> Tensor:
    return torch.cat([torch.nn.functional.pad(row, (0, length - row.shape[1]), value=filler) for row in rows])


def forms(name: str, told: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """One padded batch, and the same in batches of one; the decoder's padding is told by its mask, or its labels."""
    sources, targets = zip(*pairs(name), strict=True)
    batch = {
        "input_ids": padded([*sources], LONG, 5),
        "attention_mask": padded([torch.ones_like(row) for row in sources], LONG, 0),
    }
    if told == "labels":
        batch["labels"] = padded([*targets], LONG, -100)
        alone = [{"input_ids": s, "labels": t} for s, t in zip(sources, targets, strict=True)]
    else:
        batch["decoder_input_ids"] = padded([*targets], LONG, 5)
        batch["decoder_attention_mask"] = padded([torch.ones_like(row) for row in targets], LONG, 0)
        alone = [{"input_ids": s, "decoder_input_ids": t} for s, t in zip(sources, targets, strict=True)]
    return batch, alone


def same(one: Evidence, other: Evidence) -> None:
    assert one.keys() == other.keys()
    for statistic in ("mean_abs", "rms", "variance"):
        for key, values in one.statistics[statistic].items():
            torch.testing.assert_close(values, other.statistics[statistic][key], rtol=1e-9, atol=1e-12)
    assert one.moments.keys() == other.moments.keys()
    for key, found in one.moments.items():
        assert found.count == other.moments[key].count
        torch.testing.assert_close(found.mean, other.moments[key].mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.second, other.moments[key].second, rtol=1e-5, atol=1e-6)
    assert one.similarity == pytest.approx(other.similarity, rel=1e-9)


@pytest.mark.parametrize("told", ["mask", "labels"])
@pytest.mark.parametrize("name", MODELS)
def test_neither_the_encoders_nor_the_decoders_padding_counts(name: str, told: str) -> None:
    source = model(name)
    batch, alone = forms(name, told)
    same(calibrate(source, [batch], wants=WANTS), calibrate(source, alone, wants=WANTS))


def test_nor_does_it_where_sequences_lie_crosswise() -> None:
    """XLNet runs [tokens, sequences, width]."""
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    torch.manual_seed(0)
    source = XLNetLMHeadModel(config).eval().double()
    rows = [row for row, _ in pairs("xlnet")]
    batch = {
        "input_ids": padded(rows, LONG, 5),
        "attention_mask": padded([torch.ones_like(row) for row in rows], LONG, 0),
    }
    same(
        calibrate(source, [batch], wants=WANTS),
        calibrate(source, [{"input_ids": r} for r in rows], wants=WANTS),
    )


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_nor_does_it_where_the_start_is_run(name: str) -> None:
    source = model(name)
    batch, alone = forms(name, "mask")
    options: dict[str, Any] = {"hidden": 16, "method": "subclone", "dtype": "float64"}
    one, other = (
        AutoSubclone.from_pretrained(
            source, calibration=data, compensation=["least_squares_drifted"], **options
        ).hf_ws_plan.values
        for data in ([batch], alone)
    )
    assert one.keys() == other.keys() != set()
    for key, fitted in one.items():
        torch.testing.assert_close(
            torch.from_numpy(fitted.value), torch.from_numpy(other[key].value), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("where", ["a weight", "what it computes"])
def test_a_source_that_is_not_finite_is_named(where: str) -> None:
    source = families.model("llama")
    with torch.no_grad():
        if where == "a weight":
            source.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
        else:
            source.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(
        CalibrationError, match=r"not finite on the calibration data, first seen at model.layers.1.mlp.down"
    ):
        AutoSubclone.from_pretrained(source, hidden=32, calibration=families.tokens())
