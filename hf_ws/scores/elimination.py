"""Which neurons or heads are missed least, when what reads the others makes up for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUND = 64
"""Inputs that go between two updates of everything; they are the best of twice as many, chosen one by one."""

State = tuple[Tensor, Tensor]
"""Of one matrix W that reads units with second moments H: W^T W and H^-1, [count * width, count * width] both."""


def missed(readers: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """What each of `count` neurons or heads costs when it goes, float64 [count]; the first to go cost least.

    The cost is how far, in the mean square over the data, the output of the matrices that read it moves, after least
    squares on what is left: of a unit g, tr(W_g (H^-1)_gg^-1 W_g^T) with H the inputs' second moments. The unit that
    costs least goes, and the matrices and H^-1 become those of the refit on the rest. One that costs less than
    another that went before counts as much as that and a trace more, so that the order stays.

    Source: Optimal Brain Surgeon (Hassibi and Stork 1993), for whole structures as in ZipLM (2302.04089), section 3.1.

    Args:
        readers: Of every matrix that reads them W^T W and H, [count * width, count * width], unit by unit; float64.
        count: Units.
    """
    states = [(gram, torch.linalg.inv(second)) for gram, second in readers]
    left, costs, floor = torch.arange(count), torch.zeros(count, dtype=torch.float64), 0.0
    goes = max(1, ROUND * count // len(readers[0][0]))
    while len(left):
        own = _costs(states, len(left))
        some = own.argsort(stable=True)[: 2 * goes].sort().values  # in their order: ties go to the last
        inner = [_of(state, some, len(left)) for state in states]
        stays = torch.ones(len(left), dtype=torch.bool)
        for _ in range(min(goes, len(some))):
            own = _costs(inner, len(some))
            worst = len(some) - 1 - int(own.flip(0).argmin())
            costs[left[some[worst]]] = floor = max(math.nextafter(floor, math.inf), float(own[worst]))
            stays[some[worst]] = False
            alone = torch.arange(len(some)) != worst
            inner, some = [_without(state, alone) for state in inner], some[alone]
        states, left = [_without(state, stays) for state in states], left[stays]
    return costs


def _costs(states: Sequence[State], count: int) -> Tensor:
    """tr(W_g (H^-1)_gg^-1 W_g^T) of each unit, summed over matrices [count]."""
    total = torch.zeros(count, dtype=torch.float64)
    for state in states:
        width = len(state[0]) // count
        of_gram, of_inverse = (
            whole.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            for whole in state
        )
        total += torch.linalg.solve(of_inverse, of_gram).diagonal(dim1=1, dim2=2).sum(1)
    return total


def _of(state: State, units: Tensor, count: int) -> State:
    """What concerns some units only."""
    width = len(state[0]) // count
    rows = (units[:, None] * width + torch.arange(width)).flatten()
    return state[0][rows][:, rows], state[1][rows][:, rows]


def _without(state: State, stays: Tensor) -> State:
    """The same of the refit on the units that stay."""
    gram, inverse = state
    rest = stays.repeat_interleave(len(gram) // len(stays))
    across = torch.linalg.solve(
        inverse[~rest][:, ~rest], inverse[~rest][:, rest]
    )  # W_K - W_D across is the refit
    cross = across.T @ gram[~rest][:, rest]
    moved = across.T @ (gram[~rest][:, ~rest] @ across)
    return gram[rest][:, rest] - cross - cross.T + moved, inverse[rest][:, rest] - inverse[rest][
        :, ~rest
    ] @ across
