"""What is done layer by layer: rates that fall towards the input, and compilation. Layers are the certificate's stacks.

Source: rates by layer: discriminative fine-tuning, Howard and Ruder 2018 (arXiv 1801.06146), section 3.2; as a decay
per layer in ELECTRA, Clark et al. 2020 (arXiv 2003.10555), appendix B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_ws.layouts import certify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Stacks = Mapping[str, nn.ModuleList]


def stacks_of(model: PreTrainedModel) -> Stacks:
    """The module lists that hold the model's layers, by name.

    Raises:
        UnsupportedArchitectureError: A class that is not proven.
    """
    names = certify(type(model), model.config).stacks
    found = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in found.items() if isinstance(module, nn.ModuleList)}


def rates(model: PreTrainedModel, inputs: Mapping[str, Any], decay: float) -> dict[str, float]:
    """What each parameter's rate is multiplied by.

    1 for what comes after the layers, decay for the last layer, decay^2 for the one before, and decay^(layers + 1) for
    what comes before the first, embeddings among it (a head that is tied to them too). Of several stacks each counts
    from its own end.

    Args:
        model: Run once on `inputs`, to see what it calls before its layers and what after.
        inputs: A small batch; `labels` are left out.
        decay: Above 0, up to 1.

    Raises:
        UnsupportedArchitectureError: A class that is not proven, so that its layers are not known.
    """
    stacks = stacks_of(model)
    order = _order(model, {name: value for name, value in inputs.items() if name != "labels"})
    every = dict(model.named_parameters(remove_duplicate=False))
    lowest: dict[torch.Tensor, float] = {}  # of what has several names, the name nearest to the input counts
    for name, parameter in every.items():
        rate = decay ** _steps(name, stacks, order)
        lowest[parameter] = min(rate, lowest.get(parameter, 1.0))
    return {name: lowest[parameter] for name, parameter in model.named_parameters()}


def regroup(optimizer: Any, model: nn.Module, factors: Mapping[str, float]) -> None:
    """Split an optimizer's groups by rate, the highest first, for that is the one that is logged."""
    by_parameter = {parameter: factors[name] for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for factor in sorted({by_parameter[parameter] for parameter in group["params"]}, reverse=True):
            chosen = [parameter for parameter in group["params"] if by_parameter[parameter] == factor]
            groups.append({**group, "params": chosen, "lr": group["lr"] * factor})
    optimizer.param_groups.clear()
    for group in sorted(groups, key=lambda one: -one["lr"]):
        optimizer.add_param_group(group)


def compiled(model: PreTrainedModel) -> None:
    """Compile every layer by itself: layers that are alike share their code, and hooks between them still work.

    Raises:
        UnsupportedArchitectureError: A class that is not proven, so that its layers are not known.
    """
    for layers in stacks_of(model).values():
        for layer in layers:
            layer.forward = torch.compile(layer.forward)


def _steps(name: str, stacks: Stacks, order: Mapping[str, int]) -> int:
    """How far a parameter is from the end: 0 after the layers, 1 in the last one."""
    inside = [stack for stack in stacks if name.startswith(f"{stack}.")]
    if inside:
        stack = max(inside, key=len)
        return len(stacks[stack]) - int(name.removeprefix(f"{stack}.").split(".")[0])
    near = [stack for stack in stacks if name.startswith(f"{stack.rpartition('.')[0]}.")] or list(stacks)
    called = order.get(name.rpartition(".")[0], len(order))
    if all(called < order.get(f"{stack}.0", 0) for stack in near):
        return max((len(stacks[stack]) + 1 for stack in near), default=0)
    return 0


@torch.no_grad()
def _order(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, int]:
    """When each module is called first."""
    order: dict[str, int] = {}

    def called(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            order.setdefault(name, len(order))

        return hook

    hooks = [module.register_forward_pre_hook(called(name)) for name, module in model.named_modules()]
    was_training = model.training
    model.eval()
    try:
        model(**inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return order
