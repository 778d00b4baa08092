"""Which embeddings a class multiplies by the root of the stream's length, as Gemma and the scaled BART kin do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.axes import HIDDEN, kind_of, parse
from hf_ws.layouts import run
from hf_ws.layouts.certify import Certificate
from hf_ws.layouts.miniature import inputs, miniatures
from hf_ws.sizes import sizes_of

_SCALED: dict[tuple[type[PreTrainedModel], str], dict[str, str]] = {}


def scaled(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, certificate: Certificate
) -> dict[str, str]:
    """The embeddings of which sqrt(length of the stream) times a row goes into the stream, by name, with that axis.

    Seen by doubling an embedding: what enters the first layer then grows by so many of its rows. Remembered.
    """
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _SCALED:
        small = miniatures(model_class, config)[0]
        with run.plain_arithmetic(small):
            model = run.perturbed(run.build(model_class, small))
            _SCALED[key] = _found(model, certificate)
    return _SCALED[key]


def _found(model: PreTrainedModel, certificate: Certificate) -> dict[str, str]:
    given, sizes = inputs(model), sizes_of(model.config)
    firsts = [
        m for name, m in model.named_modules() if name.endswith(".0") and name[:-2] in certificate.stacks
    ]
    found = {}
    for name, module in model.named_modules():
        layout = parse(certificate.layouts.get(f"{name}.weight", ""))
        if not isinstance(module, nn.Embedding) or len(layout) != 2:
            continue
        axis = layout[1].expression
        if not isinstance(axis, str) or kind_of(axis) != HIDDEN:
            continue
        rows: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda m, ids, rows=rows: rows.append(m.weight[ids[0]]))
        before = _entering(model, given, firsts)
        hook.remove()
        module.weight.mul_(2)
        after = _entering(model, given, firsts)
        module.weight.div_(2)
        grown = [b - a for a, b in zip(before, after, strict=True)]
        if any(_is_scaled(more, own, sizes[axis]) for more in grown for own in rows):
            found[f"{name}.weight"] = axis
    return found


def _entering(model: PreTrainedModel, given: Mapping[str, Tensor], firsts: list[nn.Module]) -> list[Tensor]:
    """What enters the first layer of each stack that runs."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        if isinstance(stream, Tensor):
            seen.append(stream.clone())

    hooks = [first.register_forward_pre_hook(note, with_kwargs=True) for first in firsts]
    run.run(model, given)
    for hook in hooks:
        hook.remove()
    return seen


def _is_scaled(grown: Tensor, rows: Tensor, size: int) -> bool:
    return grown.shape == rows.shape and torch.allclose(grown, math.sqrt(size) * rows, rtol=1e-6, atol=1e-9)
