"""Which matrix gives the logits, and which norm it reads: found by following the tensor through a miniature."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.layouts import run
from hf_ws.layouts.stacks import generic


def head_of(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    ones: Collection[str],
    stacks: Mapping[str, str],
) -> dict[str, Any]:
    """The matrix that gives the logits, and the norm right before it.

    Args:
        model: A miniature that can be run.
        inputs: What it is run with.
        ones: The names of the parameters that its class starts at one.
        stacks: The layer axis of each module list that holds layers.

    Returns:
        `head`, a parameter's name, and `head_norm`, the names of that norm's gain and bias: empty if there is none, or
        its gain is not a factor. Nothing at all for a model without such a matrix.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        return {}
    read: list[Tensor] = []
    written: list[tuple[str, Tensor]] = []
    hooks = [head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))]
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            hooks.append(
                module.register_forward_hook(lambda _, __, output, name=name: written.append((name, output)))
            )
    run.run(model, inputs)
    for hook in hooks:
        hook.remove()
    matrices = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    if not read or not matrices or matrices[0] not in dict(model.named_parameters()):
        return {}
    names = [
        name
        for name, output in written
        if isinstance(output, Tensor) and output.data_ptr() == read[0].data_ptr()
    ]
    # A class that starts its gains at zero multiplies by one plus the gain (Gemma): no factor can move there.
    own = dict(model.get_submodule(names[-1]).named_parameters()) if names else {}
    # Nor where it is the last layer's own: a gain holds for a tensor of every layer (BART).
    outside = bool(names) and generic(f"{names[-1]}.weight", stacks)[1] is None
    plain = outside and f"{names[-1]}.weight" in ones
    return {"head": matrices[0], "head_norm": tuple(f"{names[-1]}.{n}" for n in own) if plain else ()}
