"""Which neurons or heads are missed least, when what reads the others makes up for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 1e-3
"""Added to the inputs' second moments, here and by the refits of `hf_ws.compensation`, as a share of their mean: keeps
what hardly moves from being blown up."""

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
    states = [(gram.clone(), torch.linalg.inv(second)) for gram, second in readers]
    costs, floor = torch.zeros(count, dtype=torch.float64), 0.0
    left, stays = torch.arange(count), torch.ones(count, dtype=torch.bool)
    goes = max(1, ROUND * count // len(readers[0][0]))
    while stays.any():
        if 4 * int(stays.sum()) < 3 * len(stays):
            states = [_of(state, stays.nonzero().flatten(), len(left)) for state in states]
            left, stays = left[stays], stays[stays]
        here = stays.nonzero().flatten()
        some = here[_costs(states, len(left), here).argsort(stable=True)[: 2 * goes]].sort().values
        inner, open_ = (
            [_of(state, some, len(left)) for state in states],
            torch.ones(len(some), dtype=torch.bool),
        )
        for _ in range(min(goes, len(some))):
            among = open_.nonzero().flatten().flip(0)  # of equals the last goes
            own = _costs(inner, len(some), among)
            worst = among[own.argmin()]
            costs[left[some[worst]]] = floor = max(math.nextafter(floor, math.inf), float(own.min()))
            open_[worst] = stays[some[worst]] = False
            _remove(inner, worst[None], len(some))
        _remove(states, some[~open_], len(left))
    return costs


def _costs(states: Sequence[State], count: int, units: Tensor) -> Tensor:
    """tr(W_g (H^-1)_gg^-1 W_g^T) of some of the units, summed over matrices [units]."""
    total = torch.zeros(len(units), dtype=torch.float64)
    for state in states:
        width = len(state[0]) // count
        of_gram, of_inverse = (
            whole.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[units]
            for whole in state
        )
        total += torch.linalg.solve(of_inverse, of_gram).diagonal(dim1=1, dim2=2).sum(1)
    return total


def _rows(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def _of(state: State, units: Tensor, count: int) -> State:
    """What concerns some units only: a copy."""
    rows = _rows(units, len(state[0]) // count)
    return state[0][rows][:, rows], state[1][rows][:, rows]


def _remove(states: Sequence[State], units: Tensor, count: int) -> None:
    """Make them, in place, those of the refit without these units, whose own rows become zero."""
    for gram, inverse in states:
        gone = _rows(units, len(gram) // count)
        across = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # W - W_gone across is the refit
        half = gram[gone] - 0.5 * gram[gone][:, gone] @ across
        gram.addmm_(across.T, half, alpha=-1).addmm_(half.T, across, alpha=-1)
        inverse.addmm_(inverse[:, gone], across, alpha=-1)
