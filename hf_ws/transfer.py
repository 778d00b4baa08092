"""Carry out a plan: settle what it leaves open, then make the target tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_ws.axes import EXPERTS, HEADS, KV_HEADS, kind_of, sibling
from hf_ws.compensation import COMPENSATIONS, Running
from hf_ws.compensation import wants_of as compensation_wants
from hf_ws.errors import CalibrationError, CheckpointError, PlanError
from hf_ws.evidence import Evidence, Observation
from hf_ws.layouts import Certificate, certify, generic, tensors_of
from hf_ws.layouts.miniature import build_on_meta
from hf_ws.making import Maker
from hf_ws.maps import Merge
from hf_ws.merges import settle_merge
from hf_ws.plan import AxisMap, Dense, Gather, Plan, Rank, Turn
from hf_ws.scores import Known, score_of, wants_of
from hf_ws.sizes import sizes_of
from hf_ws.store import Source
from hf_ws.turns import settle_turn
from hf_ws.vocabulary import kept_tokens, renumbered

logger = logging.getLogger(__name__)


def settle(
    plan: Plan, source: Source, evidence: Evidence | None = None, observed: Observation | None = None
) -> Plan:
    """The plan with every `Rank` turned into the indices that score highest on this source.

    Ties go to the lower index, so two runs keep the same neurons. Indices stay in ascending order, which changes
    nothing in the function and keeps equal sizes bit-identical.

    Args:
        plan: What is to be settled.
        source: The opened source.
        evidence: What calibration found, where the plan wants it.
        observed: The source on the data itself, for compensations that run the start on it.

    Raises:
        CalibrationError: something needs calibration data and there is none.
    """
    certificate = _certificate(plan, source)
    maps: dict[str, AxisMap] = dict(plan.maps)
    scores: dict[tuple[str, int | str | None, Any], Tensor] = {}

    known = Known(source, certificate, evidence, plan.seed)

    def score(axis: str, layer: int | str | None, rank: Rank) -> Tensor:
        key = (axis, layer, rank.score)
        if key not in scores:
            scores[key] = _scored(known, axis, layer, rank)
        return scores[key]

    turns = {key: m for key, m in maps.items() if isinstance(m, Turn)}
    gains = dict(plan.gains)
    for axis, turn in turns.items():
        maps[axis], levels = settle_turn(plan, certificate, axis, turn, _needed(evidence, axis))
        gains |= levels
    order = sorted(
        maps, key=lambda key: kind_of(key.partition("@")[0]) == HEADS
    )  # kv groups first: their heads follow
    for key in tqdm(order, desc="ranking", delay=2):
        axis_map = maps[key]
        if not isinstance(axis_map, Rank):
            continue
        axis, _, scope = key.partition("@")
        layer = plan.source_layer(scope) if scope else None
        if kind_of(axis) == KV_HEADS:
            of_heads = score(sibling(axis, HEADS), layer, axis_map)
            kept = _top(of_heads.view(axis_map.size, -1).mean(1), axis_map.keep)
        elif kind_of(axis) == HEADS:
            grouping = sibling(axis, KV_HEADS)
            groups = maps.get(f"{grouping}@{scope}", maps.get(grouping))
            if not isinstance(groups, Gather | Dense | Merge):
                raise PlanError(
                    f"{key} is ranked and its {grouping} have no map; a method gives both or neither"
                )
            kept = _heads(score(axis, layer, axis_map), groups, axis_map.keep)
        else:
            kept = _top(score(axis, layer, axis_map), axis_map.keep)
        maps[key] = Gather(kept, axis_map.size, axis_map.by)
    for key in [key for key, axis_map in maps.items() if isinstance(axis_map, Merge)]:
        maps |= settle_merge(plan, source, certificate, evidence, key, maps)
    settled = plan.with_maps(maps, gains=gains, fingerprint=source.fingerprint)
    for name in plan.compensation:
        settled = _compensated(name, settled, source, certificate, _needed(evidence, name), observed)
    return replace(settled, compensation=(), compensated=(*plan.compensated, *plan.compensation))


def _compensated(
    name: str,
    plan: Plan,
    source: Source,
    certificate: Certificate,
    evidence: Evidence,
    observed: Observation | None,
) -> Plan:
    """The plan after one compensation."""
    done = COMPENSATIONS[name]
    if not getattr(done, "runs", False):
        return done(plan, source, certificate, evidence)
    if observed is None:
        raise CalibrationError(
            f"{name} runs the start on the calibration data, and there is only evidence of it"
        )
    running = Running(observed, partial(apply, source=source))
    return done(plan, source, certificate, evidence, running)


def _needed(evidence: Evidence | None, what: str) -> Evidence:
    if evidence is None:
        raise CalibrationError(
            f"{what} is settled by what the model does on data, and there is none: pass calibration=, a few dozen "
            "texts or rows of token ids"
        )
    return evidence


def wanted(plan: Plan) -> tuple[str, ...]:
    """What `calibrate` has to collect for this plan to be settled."""
    turned = any(isinstance(m, Turn) for m in plan.maps.values())
    found = dict.fromkeys([*(["moments"] if turned else []), *compensation_wants(plan.compensation)])
    for key, rank in plan.maps.items():
        if isinstance(rank, Rank):
            routed = (
                kind_of(key.partition("@")[0]) == EXPERTS
            )  # what our scores ask of experts, and only of them
            wants = wants_of(rank.score)
            found |= dict.fromkeys(n for n in wants if callable(rank.score) or (n == "routes") == routed)
    return tuple(found)


def _scored(known: Known, axis: str, layer: int | str | None, rank: Rank) -> Tensor:
    """What a score says of one axis, checked: float64 [size]."""
    if known.evidence is None and wants_of(rank.score):
        raise CalibrationError(
            f"scores by {rank.by} need calibration data; pass calibration=, or score='magnitude'"
        )
    found = score_of(rank.score)(known, axis, layer)
    size, where = (
        sizes_of(known.source.config)[axis],
        "the whole model" if layer is None else f"layer {layer}",
    )
    if not isinstance(found, Tensor) or found.shape != (size,):
        came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise PlanError(
            f"score {rank.by} gave {came} for {axis} of {where}; wanted is a tensor of shape {(size,)}"
        )
    if not found.isfinite().all():
        raise CheckpointError(
            f"{known.source.name}: {axis} of {where} cannot be ranked by {rank.by}, some scores are no finite numbers; "
            "the weights hold NaN or infinity, or the activations overflow"
        )
    return found.double().cpu()


def _top(scores: Tensor, keep: int) -> tuple[int, ...]:
    best = scores.argsort(descending=True, stable=True)[:keep]
    return tuple(sorted(best.tolist()))


def _heads(scores: Tensor, groups: Gather | Dense | Merge, keep: int) -> tuple[int, ...]:
    """In each kept kv group, or in each that neighbours are merged into, the heads that score highest."""
    kept, of = (
        (groups.index, groups.size) if isinstance(groups, Gather) else (range(len(groups)), len(groups))
    )
    inside = scores.view(of, -1)
    width = inside.shape[1]
    return tuple(g * width + i for g in kept for i in _top(inside[g], keep // len(groups)))


def apply(plan: Plan, source: Source, *, device: torch.device | str | None = None) -> PreTrainedModel:
    """The target: a stock model of the plan's class with the source's weights, in evaluation mode.

    Tensors are read one at a time, so the memory needed is the target's own. A parameter the plan calls fresh is
    initialised by the model class, from the plan's seed.

    Args:
        plan: A settled plan.
        source: What the plan was made for; only read.
        device: Where the target's tensors go; the CPU if None.

    Raises:
        PlanError: the plan is not settled, or was made for another source.
    """
    if not plan.is_settled:
        raise PlanError("this plan leaves indices open; settle it first")
    config = type(source.config).from_dict(dict(plan.target_config))
    config.dtype = dtype = config.dtype or _dtype(source)  # a config may leave open what its tensors have
    model = build_on_meta(source.model_class, config)
    tensors = _tensors(plan, source, model, dtype, device)
    _fill(model, tensors, plan.seed, dtype or torch.get_default_dtype())
    _generation(model, source, plan)
    return model.to(device or "cpu").eval()


def _certificate(plan: Plan, source: Source) -> Certificate:
    sizes = sizes_of(source.config)
    if wrong := [axis for axis in plan.source_sizes if plan.source_sizes[axis] != sizes.get(axis)]:
        raise PlanError(
            f"this plan was made for {plan.source} with {_spelled(plan.source_sizes, wrong)}, but {source.name} has "
            f"{_spelled(sizes, wrong)}; make the plan again"
        )
    if plan.fingerprint not in (None, source.fingerprint):
        raise PlanError(
            f"this plan was made for {plan.source} with fingerprint {plan.fingerprint}, but {source.name} has "
            f"{source.fingerprint}; make the plan again"
        )
    certificate = certify(source.model_class, source.config)
    if source.model_class.__name__ != plan.model_class or dict(certificate.layouts) != dict(plan.layouts):
        raise PlanError(
            f"this plan was made for a {plan.model_class} whose parameters lie otherwise than in {source.name} "
            f"({source.model_class.__name__}) under this version of Transformers; make the plan again"
        )
    return certificate


def _spelled(sizes: Mapping[str, int], axes: Iterable[str]) -> str:
    return ", ".join(f"{axis}={sizes.get(axis)}" for axis in axes)


def _dtype(source: Source) -> torch.dtype | None:
    return next((info.dtype for info in source.tensors.values() if info.dtype.is_floating_point), None)


def _tensors(
    plan: Plan,
    source: Source,
    model: PreTrainedModel,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Every tensor of the target that the source has a part in."""
    certificate = _certificate(plan, source)
    maker = Maker(plan, source, certificate, dtype)
    stacks = certificate.stacks.kept(plan.layers)
    tensors: dict[str, Tensor] = {}
    for name, parameter in tqdm(list(tensors_of(model).items()), desc="transferring", unit="tensor", delay=2):
        pattern, layer = generic(name, stacks)
        if plan.is_fresh(pattern) or name in (model._keys_to_ignore_on_save or ()):
            continue  # the second are computed, and no checkpoint holds them
        made, weight = maker.made(name, pattern, layer)
        shared = made.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        kept_type = weight.dtype if not parameter.is_floating_point() else dtype or weight.dtype
        made = made.to(device=device or "cpu", dtype=kept_type, copy=shared)
        assert made.shape == parameter.shape, (
            f"{name}: made {tuple(made.shape)}, wanted {tuple(parameter.shape)}"
        )
        tensors[name] = made.contiguous()
    return tensors


def _fill(model: PreTrainedModel, tensors: dict[str, Tensor], seed: int, dtype: torch.dtype) -> None:
    """Give a model on the meta device its tensors, and let its class initialise the rest.

    What is fresh is drawn on the CPU, so that every device gets the same numbers.
    """
    for name, leader in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if (
            name in tensors
        ):  # the first of a tied tensor's names need not be the one that the others follow (CSM)
            tensors.setdefault(leader, tensors[name])
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()  # now, lest the other names of a tied tensor be allocated
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(
                    module, name, torch.nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="cpu"))
                )
            else:  # Transformers' mark for what its initialisation must leave
                parameter._is_hf_initialized = True
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            else:
                buffer._is_hf_initialized = True
    for (
        module
    ) in model.modules():  # some classes write single elements in place, whatever the tensor's mark says
        own = [*module.parameters(), *module.buffers()]
        module._is_hf_initialized = bool(own) and all(hasattr(t, "_is_hf_initialized") for t in own)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: no accelerator's is forked
        model.initialize_weights()
    model.tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        vars(tensor).pop("_is_hf_initialized", None)


def _generation(model: PreTrainedModel, source: Source, plan: Plan) -> None:
    """The source's generation settings, where the class generates and the source has some; ids as the plan has them."""
    if not model.can_generate():
        return
    new = {old: i for i, old in enumerate(kept_tokens(plan) or ())}
    if (given := source.generation_config()) is not None:
        for name, value in renumbered(given.to_dict(), new).items() if new else ():
            setattr(given, name, value)
        model.generation_config = given
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        before = {name: getattr(source.config, name, None)}
        before |= renumbered(before, new)
        if (asked := getattr(model.config, name, None)) != before[name]:
            setattr(model.generation_config, name, asked)
