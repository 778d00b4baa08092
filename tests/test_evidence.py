"""Calibration against what Transformers itself reports, and against hooks placed by hand."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_ws import calibrate, evidence
from hf_ws.errors import CalibrationError
from hf_ws.evidence import Evidence
from tests import families

IDS = families.tokens(rows=3, length=8)


def same(one: Evidence, other: Evidence, tolerance: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for key, values in one.items():
        torch.testing.assert_close(values, other[key], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return families.model("llama").double()


def seen_by(model: PreTrainedModel, *names: str, ids: Tensor = IDS, **inputs: Tensor) -> list[Tensor]:
    """What enters each of these modules, by hooks placed by name: [tokens, width] each."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids, **inputs)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names]


# name of what reads the neurons, and of what reads the heads' contexts, in layer i
PLACES: dict[str, tuple[str, str]] = {
    "llama": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"),
    "qwen3": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"),
    "phi3": ("model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"),
    "gpt2": ("transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj"),
    "gpt_neo": ("transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.attention.out_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "gpt_neox.layers.{}.attention.dense"),
    "opt": ("model.decoder.layers.{}.fc2", "model.decoder.layers.{}.self_attn.out_proj"),
    "bloom": ("transformer.h.{}.mlp.dense_4h_to_h", "transformer.h.{}.self_attention.dense"),
    "bert": ("bert.encoder.layer.{}.output.dense", "bert.encoder.layer.{}.attention.output.dense"),
    "distilbert": (
        "distilbert.transformer.layer.{}.ffn.lin2",
        "distilbert.transformer.layer.{}.attention.out_lin",
    ),
}


@pytest.mark.parametrize("family", PLACES)
def test_neurons_and_heads_are_measured_where_they_are_read(family: str) -> None:
    model = families.model(family).double()
    evidence = calibrate(model, IDS)
    neurons, heads = PLACES[family]
    for layer in range(families.LAYERS):
        into_ffn, into_output = seen_by(model, neurons.format(layer), heads.format(layer))
        torch.testing.assert_close(evidence["ffn", layer], into_ffn.abs().mean(0), rtol=1e-12, atol=0)
        by_head = into_output.abs().mean(0).view(8, -1).mean(1)
        torch.testing.assert_close(evidence["heads", layer], by_head, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe_mixed", "mpt", "bert", "falcon"])
def test_the_residual_stream_is_what_transformers_calls_hidden_states(family: str) -> None:
    model = families.model(family).double()
    model.config._experts_implementation = "eager"  # the fast one has no float64
    evidence = calibrate(model, IDS)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    # The last entry of `hidden_states` is after the final norm in decoders: all the others are block outputs.
    for layer, state in enumerate(states[1:-1]):
        torch.testing.assert_close(
            evidence["hidden", layer], state.abs().mean((0, 1)).double(), rtol=1e-12, atol=0
        )
    blocks = [evidence["hidden", layer] for layer in range(families.LAYERS)]
    torch.testing.assert_close(evidence["hidden", None], sum(blocks[1:], blocks[0]), rtol=1e-12, atol=0)


def test_the_last_block_counts_before_the_final_norm(llama: PreTrainedModel) -> None:
    (into_norm,) = seen_by(llama, "model.norm")
    torch.testing.assert_close(
        calibrate(llama, IDS)["hidden", 3], into_norm.abs().mean(0), rtol=1e-12, atol=0
    )


def test_evidence_is_float64_even_of_a_half_precision_model() -> None:
    model = families.model("llama").bfloat16()
    assert all(values.dtype == torch.float64 for values in calibrate(model, IDS).values())


def test_sums_do_not_depend_on_how_the_rows_are_batched(llama: PreTrainedModel) -> None:
    rows = families.tokens(rows=19, length=5)  # more than two batches of calibration
    (into_ffn,) = seen_by(llama, "model.layers.1.mlp.down_proj", ids=rows)
    torch.testing.assert_close(calibrate(llama, rows)["ffn", 1], into_ffn.abs().mean(0), rtol=1e-12, atol=0)


def test_repeating_the_data_changes_nothing(llama: PreTrainedModel) -> None:
    same(calibrate(llama, IDS), calibrate(llama, torch.cat([IDS, IDS])))


# ------------------------------------------------------------------------------------------------ padding


def test_padding_is_left_out(llama: PreTrainedModel) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 5:], mask[2, 3:] = 0, 0
    found = calibrate(llama, [{"input_ids": IDS, "attention_mask": mask}])
    (into_ffn,) = seen_by(llama, "model.layers.2.mlp.down_proj", attention_mask=mask)
    expected = into_ffn[mask.flatten().bool()].abs().mean(0)
    torch.testing.assert_close(found["ffn", 2], expected, rtol=1e-12, atol=0)


def test_what_is_written_into_padding_is_inert(llama: PreTrainedModel) -> None:
    mask = torch.ones_like(IDS)
    mask[:, 6:] = 0
    other = IDS.where(mask.bool(), torch.tensor(7))
    padded = [{"input_ids": ids, "attention_mask": mask} for ids in (IDS, other)]
    same(calibrate(llama, padded[:1]), calibrate(llama, padded[1:]))
    same(calibrate(llama, padded[:1]), calibrate(llama, IDS[:, :6]))


# ------------------------------------------------------------------------------------------------ forms of data

WORDS = [f"w{i}" for i in range(families.VOCAB)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word i has id i."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


LONG = families.tokens(rows=1, length=48)
TEXTS = [" ".join(WORDS[i] for i in part.tolist()) for part in LONG[0].split([20, 3, 25])]


def _by_name(ids: Tensor) -> Iterator[dict[str, Tensor]]:
    for row in ids:
        yield {"input_ids": row[None]}


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "list of rows": lambda ids: ids.tolist(),
    "list of tensors": lambda ids: list(ids),
    "array": lambda ids: ids.numpy(),
    "int32": lambda ids: ids.int(),
    "dataset": lambda ids: datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
    "torch dataset": lambda ids: datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "x": [0] * len(ids)}
    ).with_format("torch"),
    "list of inputs": lambda ids: [{"input_ids": ids}],
    "generator of inputs": _by_name,
    "one batch": lambda ids: {"input_ids": ids},
    "batch encoding": lambda ids: UserDict({"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_token_ids_gives_the_same_numbers(llama: PreTrainedModel, form: str) -> None:
    same(calibrate(llama, FORMS[form](IDS)), calibrate(llama, IDS))


TEXT_FORMS: dict[str, Callable[[list[str]], Any]] = {
    "list": lambda texts: texts,
    "one": " ".join,
    "dataset": lambda texts: datasets.Dataset.from_dict({"text": texts}),
}


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_every_form_of_text_gives_the_same_numbers(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, form: str
) -> None:
    same(calibrate(llama, TEXT_FORMS[form](TEXTS), tokenizer=tokenizer), calibrate(llama, LONG))


def test_longer_text_than_a_block_is_cut_into_rows(llama: PreTrainedModel) -> None:
    short = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0")),
        model_max_length=16,
    )
    short.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    same(calibrate(llama, TEXTS, tokenizer=short), calibrate(llama, LONG.view(3, 16)))


def test_rows_of_different_lengths_are_cut_to_the_shortest(llama: PreTrainedModel) -> None:
    ragged = [IDS[0].tolist(), IDS[1, :6].tolist(), IDS[2, :7].tolist()]
    same(calibrate(llama, ragged), calibrate(llama, IDS[:, :6]))


# ------------------------------------------------------------------------------------------------ what is left behind


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = families.model("gpt2").train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, IDS)
    assert model.training is training
    for module in model.modules():
        assert module.training is training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_in_training_is_measured_without_dropout() -> None:
    model = families.model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    same(calibrate(model.train(), IDS), calibrate(model.eval(), IDS))


def test_the_model_is_left_as_it_was_when_the_data_breaks_half_way() -> None:
    model = families.model("llama").train()

    def broken() -> Iterator[dict[str, Tensor]]:
        yield {"input_ids": IDS}
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        calibrate(model, broken())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the calibration data is empty; give at least one sequence"),
        (iter(()), "the calibration data is empty"),
        (datasets.Dataset.from_dict({"text": []}), "the calibration data is empty"),
        (datasets.Dataset.from_dict({"input_ids": []}), "the calibration data is empty"),
        (
            datasets.Dataset.from_dict({"content": ["a"]}),
            r"dataset has columns \['content'\]; it needs text or input_ids",
        ),
        (
            torch.zeros(0, 4, dtype=torch.long),
            r"shape \(0, 4\) and type torch.int64; wanted are whole numbers",
        ),
        (torch.zeros(4, 0, dtype=torch.long), r"shape \(4, 0\)"),
        (
            torch.ones(2, 4),
            r"shape \(2, 4\) and type torch.float32; wanted are whole numbers \[sequences, tokens\]",
        ),
        (np.ones((2, 4)), r"shape \(2, 4\) and type torch.float64"),
        (torch.ones(4, dtype=torch.long), r"shape \(4,\)"),
        (torch.ones(1, 2, 4, dtype=torch.long), r"shape \(1, 2, 4\)"),
        ([1, 2, 3], "a list that holds a int; wanted are rows of token ids"),
        ([[]], r"shape \(1, 0\)"),
        ([[1.0, 2.0]], "type torch.float64"),
        (7, "calibration data is a int; wanted are token ids, texts, a dataset or model inputs"),
        (None, "calibration data is a NoneType"),
        ((word for word in ["some", "text"]), "gives a str; an iterable gives the model's inputs by name"),
        (
            ["some text"],
            "calibration texts need a tokenizer, and the source has none; pass token ids instead",
        ),
        (torch.full((2, 4), 160), r"token ids run from 160 to 160, the model knows 0 to 159"),
        (torch.full((2, 4), -1), r"token ids run from -1 to -1, the model knows 0 to 159"),
        ([{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}], "attention_mask .* leaves no token"),
    ],
)
def test_data_that_says_nothing_is_refused(llama: PreTrainedModel, data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(llama, data)


@pytest.mark.parametrize("texts", [[""], ["", " "]])
def test_texts_without_a_token_are_refused(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    with pytest.raises(
        CalibrationError, match="the calibration texts hold no tokens; give at least one sentence"
    ):
        calibrate(llama, texts, tokenizer=tokenizer)


def test_a_part_that_is_frozen_in_evaluation_mode_stays_so() -> None:
    model = families.model("llama").train()
    model.model.layers[1].eval()
    calibrate(model, IDS)
    assert model.training
    assert model.model.layers[0].mlp.training
    assert not model.model.layers[1].mlp.training


def test_a_stream_gives_the_same_numbers(llama: PreTrainedModel) -> None:
    def rows() -> Iterator[dict[str, list[int]]]:
        for row in IDS.tolist():
            yield {"input_ids": row}

    stream = datasets.IterableDataset.from_generator(rows)
    assert stream.column_names is None
    same(calibrate(llama, stream), calibrate(llama, IDS))


def test_labels_change_nothing(llama: PreTrainedModel) -> None:
    same(calibrate(llama, [{"input_ids": IDS, "labels": IDS}]), calibrate(llama, IDS))


def test_logits_are_not_made(llama: PreTrainedModel) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = llama.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    calibrate(llama, IDS)
    hook.remove()
    assert shapes == [(3, 1, families.VOCAB)]


def test_sequences_longer_than_the_position_table(tokenizer: PreTrainedTokenizerFast) -> None:
    model = families.model("gpt2")
    with pytest.raises(CalibrationError, match="have 65 tokens, the model knows 64 positions; cut them"):
        calibrate(model, families.tokens(rows=1, length=65))
    calibrate(model, [" ".join(TEXTS)] * 4, tokenizer=tokenizer)  # texts are cut for it


def test_processes_see_a_share_each_and_add_up_to_the_whole(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Two processes of which each has its own batches, and three of which the last has none."""
    ids = families.tokens(rows=2 * evidence.BATCH, length=8)
    whole = calibrate(llama, ids)
    for processes in (2, 3):
        torch.multiprocessing.spawn(_calibrate_a_share, (processes, llama, ids, tmp_path), processes)
        for rank in range(processes):
            same(torch.load(tmp_path / f"{processes}-{rank}.pt"), whole)


def _calibrate_a_share(rank: int, processes: int, model: PreTrainedModel, ids: Tensor, folder: Path) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/meet-{processes}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=processes)
    torch.save(dict(calibrate(model, ids)), folder / f"{processes}-{rank}.pt")
    torch.distributed.destroy_process_group()
