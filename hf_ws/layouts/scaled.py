"""Which embeddings a class multiplies by the root of the stream's length, as Gemma and the scaled BART kin do."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ws.axes import HIDDEN, kind_of, parse
from hf_ws.layouts import run

_EMBEDDING = nn.functional.embedding


def scaled(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layouts: Mapping[str, str],
    sizes: Mapping[str, int],
    stacks: Collection[str],
) -> dict[str, str]:
    """The embeddings of which sqrt(length of the stream) times a row goes into the stream, by name, with that axis.

    Seen by doubling an embedding: what enters the first layer then grows by so many of its rows.

    Args:
        model: A miniature that can be run, in float64.
        inputs: What it is run with.
        layouts: Of every tensor.
        sizes: Of every axis.
        stacks: The module lists that hold layers.
    """
    firsts = [m for name, m in model.named_modules() if name.endswith(".0") and name[:-2] in stacks]
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        layout = parse(layouts.get(f"{name}.weight", ""))
        if not isinstance(module, nn.Embedding) or len(layout) != 2:
            continue
        axis = layout[1].expression
        if not isinstance(axis, str) or kind_of(axis) != HIDDEN:
            continue
        before, rows = _entering(model, inputs, firsts, module)
        module.weight.mul_(2)
        after, _ = _entering(model, inputs, firsts, module)
        module.weight.div_(2)
        # what FastSpeech2 predicts from its embeddings is how long its decoder's input is
        grown = [b - a for a, b in zip(before, after, strict=True) if a.shape == b.shape]
        if any(_is_scaled(more, own, sizes[axis]) for more in grown for own in rows):
            found[f"{name}.weight"] = axis
    return found


def _entering(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], firsts: list[nn.Module], table: nn.Embedding
) -> tuple[list[Tensor], list[Tensor]]:
    """What enters the first layer of each stack that runs, and the rows that are looked up in a table."""
    seen: list[Tensor] = []
    rows: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        if isinstance(stream, Tensor):
            seen.append(stream.clone())

    def look_up(ids: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
        found = _EMBEDDING(ids, weight, *args, **kwargs)  # type: ignore[arg-type]
        if weight is table.weight:
            rows.append(found.clone())
        return found

    hooks = [first.register_forward_pre_hook(note, with_kwargs=True) for first in firsts]
    with mock.patch("torch.nn.functional.embedding", look_up):
        run.run(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen, rows


def _is_scaled(grown: Tensor, rows: Tensor, size: int) -> bool:
    return grown.shape == rows.shape and torch.allclose(grown, math.sqrt(size) * rows, rtol=1e-6, atol=1e-9)
