"""Proof for axes whose order is no symmetry: positions, and layers where a tensor has something for each.

Of positions a target keeps the first. What a table holds for a layer (Gemma 3n's embeddings of each token for each
layer) reaches the stream in that layer: changing it may not move what any earlier layer gives, and must move what this
one gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_ws.axes import coordinates, parse
from hf_ws.layouts import run
from hf_ws.layouts.outputs import distance
from hf_ws.sizes import resize, sizes_of

if TYPE_CHECKING:
    from hf_ws.layouts.bench import Bench


def shortened(bench: Bench, layouts: Mapping[str, str], axis: str) -> float:
    """How far the output moves when the last positions are cut off a model that never reached them."""
    keep = bench.sizes[axis] * 2 // 3
    try:
        target = resize(bench.inferred.miniature, {axis: keep})
        model = run.frame(bench.model_class, target)
        bench.silence(model, sizes_of(target))
        cut = bench.transferred(layouts, sizes_of(target), {axis: np.arange(keep)})
        run.load(model, cut)
        return distance(run.run(model, bench.inputs), bench.output, {})
    except Exception:  # whatever the class objects to, fewer positions are not proven
        return float("inf")


def moved_before(bench: Bench, layouts: Mapping[str, str], axis: str) -> float:
    """How far changing a layer's part moves an earlier layer; infinity where it moves another but not its own.

    A tensor that moves nothing at all is not read, and its layout rests on its shape.
    """
    worst = 0.0
    for name, text in layouts.items():
        for at, dim in enumerate(parse(text)):
            if axis not in dim.axes:
                continue
            layers = torch.from_numpy(coordinates(dim, bench.sizes)[axis])
            for layer in range(bench.sizes[axis]):
                part = (
                    (layers == layer)
                    .double()
                    .view([-1 if d == at else 1 for d in range(bench.state[name].ndim)])
                )
                moves = _moves(bench, {**bench.state, name: bench.state[name] * (1 + 0.5 * part)}, axis)
                worst = max([worst, *moves[:layer]])
                if max(moves) > 0 and moves[layer] == 0:
                    return float("inf")
    return worst


def _moves(bench: Bench, state: Mapping[str, Tensor], axis: str) -> list[float]:
    """How far this state moves what each layer gives."""
    before, after = _given(bench, bench.state, axis), _given(bench, state, axis)
    return [float((before[i] - after[i]).abs().max() / before[i].abs().max()) for i in sorted(before)]


def _given(bench: Bench, state: Mapping[str, Tensor], axis: str) -> dict[int, Tensor]:
    """What each layer gives with this state, by its number."""
    given: dict[int, Tensor] = {}
    hooks = []
    for stack in (stack for stack, own in bench.inferred.stacks.items() if own == axis):
        for number, module in enumerate(bench.model.get_submodule(stack).children()):

            def note(_: Any, __: Any, output: Any, number: int = number) -> None:
                given[number] = next(value for _, value in run.tensors("", output))

            hooks.append(module.register_forward_hook(note))
    bench.load(state)
    run.run(bench.model, bench.inputs)
    for hook in hooks:
        hook.remove()
    return given
