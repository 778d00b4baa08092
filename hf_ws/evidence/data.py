"""Calibration data in any of its forms, as the model's keyword inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_ws.axes import POSITIONS, VOCAB
from hf_ws.errors import CalibrationError
from hf_ws.layouts import Certificate
from hf_ws.sizes import sizes_of

BLOCK, BATCH = 512, 8  # tokens in a calibration sequence made from text, and sequences in a forward pass


def calibration_inputs(
    config: PreTrainedConfig,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    certificate: Certificate | None = None,
) -> list[dict[str, Tensor]]:
    """Calibration data in any of its forms as keyword inputs of the model, checked; args and errors of `calibrate`.

    Texts are cut, and ids refused, at the end of the position table; a certificate tells whether there is one.
    """
    tabled = certificate is None or POSITIONS in certificate.occurring
    longest = sizes_of(config).get(POSITIONS) if tabled else None
    batches = list(inputs_of(data, tokenizer, longest))
    for inputs in batches:
        check_ids(inputs.get("input_ids"), config, longest)
    return batches


def inputs_of(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, longest: int | None
) -> Iterator[dict[str, Tensor]]:
    """Keyword inputs of the model, one batch at a time."""
    if hasattr(data, "column_names"):
        columns = data.column_names or list(next(iter(data), {}))  # a stream may not know its own
        if "input_ids" not in columns and "text" not in columns:
            raise CalibrationError(
                f"the calibration dataset has columns {columns}; it needs text or input_ids"
            )
        column = "input_ids" if "input_ids" in columns else "text"
        data = [row[column] for row in data.select_columns(column)]
    if isinstance(data, str | Mapping):
        data = [data]
    if isinstance(data, list) and data and isinstance(data[0], str):
        data = _tokenize(data, tokenizer, longest)
    if isinstance(data, list) and data and not isinstance(data[0], Mapping):
        if not all(hasattr(row, "__len__") for row in data):
            raise CalibrationError(
                f"calibration data is a list that holds a {type(data[0]).__name__}; wanted are rows of token ids"
            )
        lengths = {len(row) for row in data}
        if len(lengths) > 1:
            data = [row[: min(lengths)] for row in data]
        data = torch.as_tensor(np.asarray(data))
    if isinstance(data, np.ndarray) and data.dtype != object:
        data = torch.as_tensor(data)
    if isinstance(data, Tensor):
        if data.ndim != 2 or not data.numel() or data.is_floating_point():
            raise CalibrationError(
                f"calibration token ids have shape {tuple(data.shape)} and type {data.dtype}; "
                "wanted are whole numbers [sequences, tokens], at least one of each"
            )
        yield from ({"input_ids": batch} for batch in data.long().split(BATCH))
        return
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration data is a {type(data).__name__}; wanted are token ids, texts, a dataset or model inputs"
        )
    count = 0
    for inputs in data:
        if not isinstance(inputs, Mapping):
            raise CalibrationError(
                f"the calibration data gives a {type(inputs).__name__}; an iterable gives the model's inputs by name"
            )
        count += 1
        yield dict(inputs)
    if not count:
        raise CalibrationError(
            "the calibration data is empty; give at least one sequence, better a few dozen"
        )


def check_ids(ids: Any, config: PreTrainedConfig, longest: int | None) -> None:
    """Raise CalibrationError for token ids or positions that the model does not know."""
    vocab = sizes_of(config).get(VOCAB, 0)
    if ids is not None and vocab and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise CalibrationError(
            f"calibration token ids run from {int(ids.min())} to {int(ids.max())}, the model knows 0 to {vocab - 1}; "
            "tokenize with the source's own tokenizer"
        )
    if ids is not None and longest is not None and ids.shape[-1] > longest:
        raise CalibrationError(
            f"calibration sequences have {ids.shape[-1]} tokens, the model knows {longest} positions; cut them"
        )


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase | None, longest: int | None) -> Tensor:
    """Token ids [sequences, BLOCK], the texts end to end; one shorter row if there is less."""
    if tokenizer is None:
        raise CalibrationError(
            "calibration texts need a tokenizer, and the source has none; pass token ids instead"
        )
    ids = torch.tensor([i for row in tokenizer(texts, verbose=False)["input_ids"] for i in row])
    if not len(ids):
        raise CalibrationError("the calibration texts hold no tokens; give at least one sentence")
    block = min(BLOCK, len(ids), getattr(tokenizer, "model_max_length", BLOCK), longest or BLOCK)
    return ids[: len(ids) // block * block].view(-1, block).long()
