"""A miniature with its weights, its inputs and what it gives for them, and how far that moves when axes are mapped.

What a map does not touch is neither gathered nor written again: of most maps that is nearly all of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.axes import HIDDEN, kind_of, parse
from hf_ws.layouts import run
from hf_ws.layouts.head import head_of
from hf_ws.layouts.infer import Inferred, tensors_of
from hf_ws.layouts.miniature import inputs
from hf_ws.layouts.outputs import Maps, distance, renumbered, seen
from hf_ws.layouts.scaled import scaled
from hf_ws.layouts.select import select
from hf_ws.layouts.stacks import generic
from hf_ws.sizes import sizes_of

TOLERANCE = 2e-5
"""Of the largest output. Norms compute in float32 whatever the model's dtype; float64 elsewhere is far below this."""

TRIES, WORK = 150, 100_000_000
"""How many combinations of explanations are tried before an axis is given up, and how many parameters that may run."""


class Bench:
    """A miniature with its weights, its inputs and what it gives for them."""

    def __init__(self, model_class: type[PreTrainedModel], inferred: Inferred) -> None:
        self.model_class, self.inferred = model_class, inferred
        self.sizes = sizes_of(inferred.miniature)
        self.model = run.build(model_class, inferred.miniature)
        self.plain = frozenset(name for name, p in self.model.named_parameters() if bool((p == 1).all()))
        """The parameters that a class starts at one."""
        run.perturbed(self.model)
        self.tables = self.silence(self.model, self.sizes)
        self.state = {name: tensor.detach().clone() for name, tensor in tensors_of(self.model).items()}
        self._loaded = dict(self.state)
        self._parameters = dict(self.model.named_parameters())
        self._patterns = {name: generic(name, inferred.stacks) for name in self.state}
        self.inputs = inputs(self.model)
        self.output = run.run(self.model, self.inputs)

    @staticmethod
    def silence(model: PreTrainedModel, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Take computed position tables out of a model of these sizes."""
        return run.without_tables(model, {size for axis, size in sizes.items() if kind_of(axis) == HIDDEN})

    @property
    def tries(self) -> int:
        """How many explanations a model of this size is tried with."""
        return min(TRIES, max(8, WORK // sum(tensor.numel() for tensor in self.state.values())))

    @property
    def layers(self) -> list[int | str]:
        """The key of every layer that has tensors, in their order."""
        return list(dict.fromkeys(layer for _, layer in self._patterns.values() if layer is not None))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Give the model this state: `run.load`, but for the parameters that it has already.

        Raises:
            RuntimeError: a tensor of another shape than the parameter's.
        """
        buffers = {}
        for name, tensor in state.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                buffers[name] = tensor
            elif self._loaded[name] is not tensor:
                if parameter.shape != tensor.shape:
                    raise RuntimeError(f"{name} is {tuple(parameter.shape)}, not {tuple(tensor.shape)}")
                parameter.copy_(tensor)
                self._loaded[name] = tensor
        run.load(self.model, buffers)

    def transferred(
        self, layouts: Mapping[str, str], target: Mapping[str, int], maps: Maps
    ) -> dict[str, Tensor]:
        """The state with these maps applied; what no map touches is the state's own tensor."""
        made = {}
        for name, tensor in self.state.items():
            pattern, layer = self._patterns[name]
            layout = parse(layouts[pattern])
            own = {
                axis.partition("@")[0]: m
                for axis, m in maps.items()
                if axis.partition("@")[2] in ("", str(layer))
            }
            touched = target is not self.sizes or any(axis in own for dim in layout for axis in dim.axes)
            made[name] = select(tensor, layout, self.sizes, target, own) if touched else tensor
        return made

    def permuted(self, layouts: Mapping[str, str], maps: Maps) -> float:
        """How far the output moves when these axes are permuted; infinity where the shapes do not even fit."""
        try:
            self.load(self.transferred(layouts, self.sizes, maps))
            along = seen(maps, self.inferred.miniature, self.sizes)
            given = renumbered(self.inputs, along, self.sizes)
            return distance(run.run(self.model, given), self.output, along)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return float("inf")

    def head(self) -> dict[str, Any]:
        """The matrix that gives the logits, and the norm that it reads."""
        self.load(self.state)
        return head_of(self.model, self.inputs, self.plain, self.inferred.stacks)

    def scaled(self, layouts: Mapping[str, str]) -> dict[str, str]:
        """The embeddings that the class multiplies by the root of the stream's length."""
        self.load(self.state)
        return scaled(self.model, self.inputs, layouts, self.sizes, self.inferred.stacks)

    def unread(self) -> tuple[str, ...]:
        """Tensors that have no influence on the output: no gradient, and none when they change either.

        A class may take gradients of a part of itself for not wanted (LayoutLMv3), or in training alone (Reformer).
        """
        self.load(self.state)
        with torch.enable_grad():
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)
            torch.manual_seed(1)
            given = run.run(self.model, self.inputs)
            total = sum(
                (value * torch.randn_like(value)).sum() for value in given.values() if value.requires_grad
            )
            with contextlib.suppress(AssertionError):
                if isinstance(total, Tensor):
                    total.backward()
        dead = [
            n for n, p in self.model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)
        ]
        movers = set(self._movers(dead))
        return tuple(
            dict.fromkeys(generic(name, self.inferred.stacks)[0] for name in dead if name not in movers)
        )

    def _movers(self, names: list[str]) -> list[str]:
        """Those of these tensors that move the output when they change, by halves: mostly there is none."""
        self.load(self.state | {name: self.state[name] * 1.5 for name in names})
        if not names or not distance(run.run(self.model, self.inputs), self.output, {}) > 0:
            return []
        middle = len(names) // 2
        return names if not middle else self._movers(names[:middle]) + self._movers(names[middle:])
