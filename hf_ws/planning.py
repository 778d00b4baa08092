"""From what is asked to a settled plan: sizes derived, layers chosen, a plan made, and what it ranks settled."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws import compensation as compensations
from hf_ws import search, store
from hf_ws.asked import Ask
from hf_ws.axes import LAYERS, VOCAB, kind_of
from hf_ws.depth import Context, LayerPolicy, behind_the_first, blends_of, kept_layers
from hf_ws.depth import wants_of as policy_wants
from hf_ws.derive import derive_config, read_request
from hf_ws.errors import CalibrationError, PlanError
from hf_ws.evidence import Observation, calibration_inputs, observe, tokenizer_of
from hf_ws.layouts import certify as certify_class
from hf_ws.layouts.census import Shapes, census, check_census, check_same_parts, wanting_the_first
from hf_ws.layouts.stacks import led
from hf_ws.maps import called
from hf_ws.methods import Request
from hf_ws.plan import Plan, Rank
from hf_ws.scores import wants_of as score_wants
from hf_ws.sizes import sizes_of
from hf_ws.transfer import apply, settle, wanted
from hf_ws.vocabulary import warn_of_first_ids

logger = logging.getLogger(__name__)


def open_plan(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], name: str, revision: str | None, ask: Ask
) -> Plan:
    """The plan of the sizes asked for, or of the shape that comes nearest a goal; reads no weights."""
    ask = ask.decided()
    if ask.goal is None:
        return _planned(config, model_class, name, revision, ask)
    space, planned = _space(config, model_class, name, revision, ask)
    return search.search(space, ask.goal, planned)


def settled_plan(opened: store.Source, name: str, ask: Ask) -> Plan:
    """The plan with nothing open; of a goal with calibration data, that of the shape whose start is best.

    One pass over the data collects what policy and method want.
    """
    where = (opened.config, opened.model_class, name, opened.revision)
    ask = ask.decided()
    if ask.goal is None or ask.calibration is None:
        observed = _observed(opened, ask)
        plan = open_plan(*where, ask) if ask.goal is not None else _planned(*where, ask, observed)
        return settled(plan, opened, observed)
    certificate = certify_class(opened.model_class, opened.config)
    given = calibration_inputs(opened.config, ask.calibration, tokenizer_of(opened), certificate)
    counted, kept = search.parted(given)
    seen = _observed(opened, replace(ask, calibration=counted))
    space, planned = _space(*where, ask, seen)
    source = opened.model() if opened.files is None else opened.model().to(ask.device or "cpu")
    measure = search.measure_of(opened.model_class, kept)

    def scored(plan: Plan) -> tuple[Plan, float]:
        plan = settled(plan, opened, seen)
        return plan, search.score(apply(plan, opened, device=ask.device), kept, source, measure)

    by = f"the {measure} of the start on one sequence in four of the calibration data"
    return search.search(space, ask.goal, planned, scored, by)


def _space(
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    name: str,
    revision: str | None,
    ask: Ask,
    observed: Observation | None = None,
) -> tuple[search.Space, Callable[[search.Shape], Plan]]:
    """What a goal searches, and how a shape of it is planned."""
    sizes, fields = read_request(config, ask.sizes, ask.fields)
    if ask.listed is not None:
        sizes = {LAYERS: len(ask.listed), **sizes}
    asked, other = sizes, fields
    if ask.vocabulary is not None:
        asked, other = sizes | ask.vocabulary.sizes(config), ask.vocabulary.fields(config) | fields
    space = search.Space(
        config, certify_class(model_class, config), census(model_class, config), asked, other
    )

    def planned(shape: search.Shape) -> Plan:
        sizes = {axis: size for axis, size in shape.asked.items() if ask.vocabulary is None or axis != VOCAB}
        own = replace(ask, sizes=sizes, fields=fields, goal=None)
        return _planned(config, model_class, name, revision, own, observed)

    return space, planned


def _observed(opened: store.Source, ask: Ask) -> Observation | None:
    """The source on the calibration data, run when something is first asked of it; None without data."""
    if ask.calibration is None:
        return None
    wants = (*(policy_wants(ask.policies[0]) or ()), *getattr(ask.chosen, "wants", ()))
    if (score := ask.method_args.get("score")) is not None:
        wants += score_wants(score)
    wants += compensations.wants_of(compensations.chosen(ask.compensation, ask.chosen))
    return observe(opened, ask.calibration, wants, ask.device)


def _planned(
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    name: str,
    revision: str | None,
    ask: Ask,
    observed: Observation | None = None,
) -> Plan:
    """The plan that the method makes of these arguments; only a layer policy may run the source's model."""
    method = ask.chosen
    certificate = certify_class(model_class, config)
    sizes, fields = read_request(config, ask.sizes, ask.fields)
    depths = sizes_of(config)
    if ask.vocabulary is not None:
        sizes, fields = sizes | ask.vocabulary.sizes(config), ask.vocabulary.fields(config) | fields
    grows = bool(getattr(method, "grows", False))
    kept = _kept(ask.policies, depths, sizes, grows, observed)
    for axis in led(certificate.stacks) & kept.keys():
        kept[axis] = behind_the_first(axis, kept[axis], depths[axis])

    def derived() -> tuple[PreTrainedConfig, Shapes]:
        target = derive_config(config, kept=kept, **fields, **sizes)
        target.architectures = [model_class.__name__]
        target.dtype = ask.dtype or config.dtype
        return target, census(model_class, target)

    before, (target, after) = census(model_class, config), derived()
    if ask.vocabulary is None:
        warn_of_first_ids(sizes.get(VOCAB), depths.get(VOCAB))
    for axis in wanting_the_first(before, after, kept, certificate):
        kept[axis] = behind_the_first(axis, kept[axis], depths[axis])
        target, after = derived()
    request = Request(
        source=name,
        revision=revision,
        model_class=model_class,
        source_config=config,
        target_config=target,
        certificate=certificate,
        layers=kept,
        blends=blends_of(kept, certificate.stacks, before),
        parameters=(sum(map(math.prod, before.values())), sum(map(math.prod, after.values()))),
        method=called(ask.method or method),
        method_args=ask.method_args,
        seed=ask.seed,
        calibrated=ask.calibration is not None,
        compensation=compensations.chosen(ask.compensation, method),
        vocabulary=ask.vocabulary,
    )
    request.check_kinds()
    request.check_fixed()
    if not grows:
        request.check_growth()
    plan = method(request, **ask.method_args)
    if not isinstance(plan, Plan):
        raise PlanError(f"method {called(ask.method)} returned a {type(plan).__name__}, wanted is a Plan")
    if not plan.is_fresh("*"):
        check_census(before, config, certificate)
        check_same_parts(before, after, kept, certificate)
        check_census(after, target, certificate.kept(kept))
    return plan


def _kept(
    policies: tuple[str | LayerPolicy | Sequence[int], ...],
    depths: Mapping[str, int],
    sizes: dict[str, int],
    grows: bool,
    observed: Observation | None,
) -> dict[str, Any]:
    """The layers kept, by the axis that counts them; how many are asked for is taken out of `sizes`.

    They are those of the first policy that can be had of this source and this data.
    """
    stacks = [axis for axis in depths if kind_of(axis) == LAYERS]
    if isinstance(policies[0], Sequence) and not isinstance(policies[0], str) and LAYERS not in stacks:
        raise PlanError(
            f"layer_policy names layers, but there are several stacks: {', '.join(stacks)}; name a policy"
        )

    def kept(axis: str, policy: str | LayerPolicy | Sequence[int], *others: Any) -> tuple[int, ...]:
        everywhere = isinstance(policy, str) or callable(policy)
        try:
            return kept_layers(
                policy if axis == LAYERS or everywhere else "first",
                depths[axis],
                sizes.get(axis),
                grows,
                None if observed is None else Context(axis, observed, policy_wants(policy) or ()),
            )
        except CalibrationError as error:
            if not others:
                raise
            if observed is not None:
                logger.warning("%s; %s is taken", error, others[0])
            return kept(axis, *others)

    found = {axis: kept(axis, *policies) for axis in stacks}
    for axis in stacks:
        sizes.pop(axis, None)
    return found


def settled(plan: Plan, opened: store.Source, observed: Observation | None) -> Plan:
    """The plan with nothing open, the source's model run over the calibration data if that is what it takes."""
    if plan.is_settled:
        return settle(plan, opened)
    evidence = None
    if observed is not None and plan.wants_data:
        evidence = observed.evidence(wanted(plan))
    elif observed is None and any(isinstance(m, Rank) and m.score == "magnitude" for m in plan.maps.values()):
        logger.warning(
            "no calibration data: ranked by weight magnitude. Importance by activation is the better start; "
            "pass calibration= with some text"
        )
    return settle(plan, opened, evidence, observed)
