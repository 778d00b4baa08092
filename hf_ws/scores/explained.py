"""Importance by what the others do not say."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ws.axes import EXPERTS, HEADS, HIDDEN, KV_HEADS, kind_of, sibling
from hf_ws.errors import CalibrationError
from hf_ws.evidence import place
from hf_ws.scores.activation import activation
from hf_ws.scores.elimination import RIDGE, missed
from hf_ws.scores.known import Known
from hf_ws.sizes import sizes_of


def explained(known: Known, axis: str, layer: int | str | None) -> Tensor:
    """What is lost with an index although least squares makes up for it from those that are kept.

    Of neurons and heads: how far the output of what reads them moves, when they go one after the other
    (`hf_ws.scores.elimination`). Of query heads in groups the groups go first, then the heads of each. Goes with
    `compensation=["least_squares"]`.

    Of the residual stream: how much of it was not yet explained when a channel was chosen, one after the other. The
    next is always that which, by least squares and with those before it, leaves least of the stream's second moments
    unexplained. These are summed over the places where the stream is normed, each divided by its trace so that all
    count alike, as for `rotation`. It is what a basis of the stream can do that has to be a selection, as under a
    tied head, and goes with `compensation=["least_squares_hidden"]`.

    What only repeats others comes last, however loud it is. Where no second moments are seen, and of experts, by
    activation.

    Source: of the stream, greedy column subset selection, Farahat et al. (2011), "An efficient greedy method for
    unsupervised feature selection".

    Raises:
        CalibrationError: there is no evidence.
    """
    if kind_of(axis) == HIDDEN:
        found = _of_stream(known, axis)
    else:
        found = None if kind_of(axis) == EXPERTS or layer is None else _of_units(known, axis, layer)
    return activation(known, axis, layer) if found is None else found


explained.wants = ("mean_abs", "moments", "routes")  # type: ignore[attr-defined]


def _of_units(known: Known, axis: str, layer: int | str) -> Tensor | None:
    """Of neurons or heads, float64 [size]; None where what reads them was not seen."""
    if known.evidence is None:
        raise CalibrationError(f"explained needs calibration data to rank {axis}; pass calibration=")
    sizes, readers = sizes_of(known.source.config), []
    for own, name, at, dim in known.reading(axis):
        if own != layer:
            continue
        if name not in known.evidence.moments:
            return None
        where = place(dim, axis, sizes)
        order = where.argsort(stable=True)[int((where < 0).sum()) :]
        weight = known.source.tensor(name).double().cpu().movedim(at, -1).flatten(0, -2)[:, order]
        second = known.evidence.moments[name].second.double()[order][:, order]
        weight[:, second.diagonal() == 0] = 0  # what never moved is not missed, whatever reads it
        ridge = RIDGE * second.diagonal().mean().clamp(min=1e-30)
        readers.append((weight.T @ weight, second + ridge * torch.eye(len(second), dtype=second.dtype)))
    if not readers:
        return None
    single = missed(readers, sizes[axis])
    groups = sizes.get(sibling(axis, KV_HEADS), sizes[axis]) if kind_of(axis) == HEADS else sizes[axis]
    if groups == sizes[axis]:
        return single
    inside = single.view(groups, -1) + 1e-30
    return (missed(readers, groups)[:, None] * inside / inside.mean(1, keepdim=True)).flatten()


def _of_stream(known: Known, axis: str) -> Tensor | None:
    """Of channels, float64 [size]; None where no norm with a gain was seen."""
    if known.evidence is None:
        raise CalibrationError(f"explained needs calibration data to rank {axis}; pass calibration=")
    layouts = known.certificate.layouts
    places = {
        id(moments): moments.second.double()
        for name, moments in known.evidence.moments.items()
        if layouts.get(known.certificate.pattern(name)) == axis
    }
    if not places:
        return None
    whole = torch.stack([second / second.trace().clamp(min=1e-300) for second in places.values()]).sum(0)
    left = (whole + whole.T) / 2
    chosen = torch.zeros(len(left), dtype=torch.bool)
    scores, tiny = torch.zeros(len(left), dtype=torch.float64), 1e-12 * float(left.diagonal().max())
    for _ in range(len(left)):
        own = left.diagonal()
        gain = (left.square().sum(0) / own.clamp(min=tiny)).masked_fill(chosen, -1.0)
        best = int(gain.argmax())
        chosen[best] = True
        scores[best] = own.sum().clamp(min=0)
        if own[best] > tiny:
            left = left - torch.outer(left[:, best], left[best]) / own[best]
    return scores
