"""Rotation: keep the directions in which the residual stream moves most, whichever channels they run across."""

from __future__ import annotations

from typing import Any

from hf_ws.axes import HIDDEN, kind_of
from hf_ws.errors import UnsupportedArchitectureError
from hf_ws.layouts.turn import Turning, can_be_untied, turning
from hf_ws.maps import Turn
from hf_ws.methods.kv import merged
from hf_ws.methods.request import Request, logger
from hf_ws.methods.subclone import ranked_maps
from hf_ws.plan import Plan
from hf_ws.scores import Score


def rotation(
    request: Request, *, score: str | Score | None = None, kv_merge: str | None = None, untie: bool = True
) -> Plan:
    """One orthonormal basis for the whole stream; heads and neurons by what the others cannot make up for.

    The basis is that of the leading eigenvectors of the stream's second moments, where it is normed in each kept
    layer; every place counts alike, whatever its size (each is divided by its trace). RMSNorm commutes with such a
    map, LayerNorm with one that leaves the mean over channels alone, once the gains have moved into what reads them
    (SliceGPT, sections 3.1 to 3.3, gives every layer a basis of its own and so needs matrices in the residual path; one
    basis for all keeps the stock class). What a norm multiplies by makes up for the energy that
    was left out. A tied head is untied: it reads the last norm's gain, the embedding does not.

    A stream that cannot be turned, as in classes that norm the sum (BERT) or what a block adds to it (Gemma 2),
    is selected from by importance instead, and a warning says why.

    The basis is in the data: whoever settles the plan has to pass `calibration=`.

    Source: SliceGPT (2401.15024), with one basis for all layers.

    Args:
        request: What is asked.
        score: As for `subclone`; by default `"explained"`, which foresees the least squares that come after.
        kv_merge: As for `subclone`.
        untie: Whether a tied head may be untied, for so many parameters more as the head has. If not, the basis of a
            tied model has to be a selection: its channels are kept by the score.

    Raises:
        PlanError: an unknown score or merge.
        SizeError: query heads that no selection of whole kv groups gives.
    """
    merges = merged(request, kv_merge) if kv_merge else {}
    taken = {key.partition("@")[0] for key in merges}
    request.check_heads(but=taken)
    turned: list[Turning] = []
    tied = request.tied_axes
    for axis in (axis for axis in request.certificate.axes if kind_of(axis) == HIDDEN):
        if request.before[axis] == request.after[axis] or (axis in tied and not untie):
            continue
        try:
            if axis not in request.axes:
                raise UnsupportedArchitectureError(
                    f"{request.model_class.__name__}: {axis} cannot be turned, a part of it works on groups of channels"
                )
            turned.append(turning(request.model_class, request.source_config, request.certificate, axis))
        except UnsupportedArchitectureError as error:
            logger.warning("%s; its channels are selected by importance instead", error)
    if any(found.axis in tied for found in turned):
        if can_be_untied(request.model_class, request.source_config):
            request = request.untied()
        else:
            logger.warning(
                "%s: its head cannot be untied from the embedding; its channels are selected by importance instead",
                request.model_class.__name__,
            )
            turned = [found for found in turned if found.axis not in tied]
    maps: dict[str, Any] = {
        found.axis: Turn(request.after[found.axis], request.before[found.axis], found.centred)
        for found in turned
    }
    maps |= ranked_maps(request, score or "explained", given={*maps, *taken}) | merges
    folds = {name: fold for found in turned for name, fold in found.folds.items()}
    mapped = {key.partition("@")[0] for key in maps} if turned else set()
    gains = request.fan_in_gains(without=mapped) | request.embedding_gains()
    return request.plan(maps, folds=folds, gains=gains)


rotation.layer_policy = ("lowest_loss", "block_influence", "middle_dropped")  # type: ignore[attr-defined]
rotation.compensation = ("least_squares", "least_squares_hidden")  # type: ignore[attr-defined]
rotation.wants = ("mean_abs", "moments", "routes")  # type: ignore[attr-defined]
