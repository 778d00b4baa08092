"""Experts whose matrices are one tensor each, run one expert at a time so that their neurons can be seen.

Hooks stop at the module, and inside it Transformers' fast ways sort the tokens by expert. Here each expert is run on
its tokens, in any dtype, with the class's own activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

See = Callable[[Tensor, Tensor, int], Tensor | None]
"""Given the neurons [pairs, neurons], the token of each pair [pairs] and the number of tokens; what it returns takes
the neurons' place."""


def can_be_watched(module: nn.Module) -> bool:
    """Whether Transformers lets another function run these experts, and says enough of them to write one."""
    return (
        hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")
    )


@contextmanager
def watched(modules: Mapping[nn.Module, See]) -> Iterator[None]:
    """While it lasts, these modules show their neurons."""
    owned: list[Any] = [module.config for module in modules]
    owned += [getattr(config, part, None) for config in owned for part in config.sub_configs]
    before = {id(config): (config, config._experts_implementation) for config in owned if config is not None}

    def run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _run(module, hidden_states, top_k_index, top_k_weights, modules.get(module))

    name = f"hf_ws_{id(run)}"
    ALL_EXPERTS_FUNCTIONS[name] = run
    try:
        for module in modules:
            module.config._experts_implementation = name  # type: ignore[union-attr]
        yield
    finally:
        for config, implementation in before.values():
            config._experts_implementation = implementation
        del ALL_EXPERTS_FUNCTIONS[name]


def _run(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, see: See | None) -> Tensor:
    """What experts make of tokens [tokens, hidden], whose choices and their weights are [tokens, chosen]."""
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        if expert >= module.num_experts:  # "none"
            continue
        token, chosen = torch.where(index == expert)
        if module.has_gate:
            neurons = module._apply_gate(_linear(module, "gate_up_proj", expert, hidden[token]))
        else:
            neurons = module.act_fn(_linear(module, "up_proj", expert, hidden[token]))
        if see is not None and (other := see(neurons, token, len(hidden))) is not None:
            neurons = other
        after = _linear(module, "down_proj", expert, neurons)
        if getattr(module, "has_post_expert_norm", False):
            after = module.post_expert_norm(after)
        out = out.index_add(0, token, (after * weights[token, chosen, None]).to(out.dtype))
    return out


def _linear(module: Any, name: str, expert: int, values: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(values, weight.T if module.is_transposed else weight, bias)
