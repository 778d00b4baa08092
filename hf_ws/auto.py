"""`AutoSubclone`: a checkpoint of one size in, a stock model of another size out.

from hf_ws import AutoSubclone

model = AutoSubclone.from_pretrained("gpt2-large", hidden=512)
plan = AutoSubclone.plan("gpt2-large", hidden=512, layers=12)      # reads config.json only
print(plan)
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_ws import search, store
from hf_ws.asked import Ask, dtype_of
from hf_ws.axes import LAYERS, kind_of
from hf_ws.depth import LayerPolicy, kept_layers
from hf_ws.derive import derive_config, read_request
from hf_ws.errors import PlanError, unknown
from hf_ws.evidence import calibrate, calibration_inputs
from hf_ws.layouts import certify as certify_class
from hf_ws.layouts.census import census, check_census, check_same_parts
from hf_ws.layouts.stacks import led
from hf_ws.methods import METHODS, Method, Request
from hf_ws.plan import Plan, Rank
from hf_ws.sizes import sizes_of
from hf_ws.transfer import apply, settle

logger = logging.getLogger(__name__)

SourceLike: TypeAlias = str | Path | PreTrainedModel


class AutoSubclone:
    """Start a model of one size from the pretrained weights of another; not to be instantiated."""

    def __init__(self) -> None:
        raise TypeError(
            "AutoSubclone is not instantiated; call AutoSubclone.from_pretrained(source, hidden=...)"
        )

    @classmethod
    def from_pretrained(
        cls,
        source: SourceLike,
        *,
        hidden: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        ffn: int | None = None,
        vocab: int | None = None,
        experts: int | None = None,
        params: str | int | None = None,
        ratio: float | None = None,
        method: str | Method = "subclone",
        method_args: Mapping[str, Any] | None = None,
        layer_policy: str | LayerPolicy | Sequence[int] | None = None,
        calibration: Any = None,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        model_class: type[PreTrainedModel] | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **config_fields: Any,
    ) -> PreTrainedModel:
        """A stock Transformers model of the wanted size, started from the source's weights.

        Sizes that are not given follow from those that are; see `derive_config`. The model is in evaluation mode,
        as `from_pretrained` gives it, and `save_pretrained` writes a checkpoint that needs nothing of this library.

        Args:
            source: A Hub id, a folder, or a live model. Only read.
            hidden: Width of the residual stream.
            layers: Number of layers.
            heads: Query heads.
            kv_heads: Key/value heads.
            head_dim: Channels in a head.
            ffn: Neurons of a feed-forward block.
            vocab: Rows of the token embedding.
            experts: Routed experts in a layer.
            params: Parameters in all ("125M", "1.5B", 125_000_000) in place of sizes, which are searched for (see
                `hf_ws.search`) and kept in the plan; sizes that are given hold for every shape.
            ratio: The same as a part of the source's parameters, above 0, up to 1.
            method: A name in `METHODS`, or a callable that takes a `Request` and returns a `Plan`.
            method_args: The method's own options, such as `{"rescale": False}`.
            layer_policy: A name in `POLICIES`, a callable `(depth, keep) -> layers`, or the list of source layers
                to keep; the method's own policy if None.
            calibration: Token ids [sequences, tokens], texts, a `datasets` dataset, or an iterable of model inputs;
                methods that rank by activation look at it.
            seed: Of everything random: drawn indices and freshly initialised weights.
            dtype: Of the target's weights, as in Transformers (`torch.bfloat16`, `"bfloat16"`); the source's if None.
            device: Where the target goes, and where calibration runs; the CPU if None.
            model_class: The class to load instead of the one that the checkpoint's `architectures` names.
            revision: Branch, tag or commit of a Hub id.
            token: For gated or private repositories, as in Transformers.
            cache_dir: Where downloads are kept.
            local_files_only: Download nothing.
            config_fields: Fields of the config class in its own spelling; one that names a size (`n_embd=512`,
                `hidden_size=512`) means the same as ours.

        Raises:
            SizeError: a size no legal target has, or that the method cannot reach.
            PlanError: an unknown method, option, policy or config field.
            UnsupportedArchitectureError: a class that is unknown, needs remote code, or is not proven.
            CheckpointError: a source that cannot be read or is not what its config says.
            CalibrationError: calibration data that is empty or unusable.
        """
        ask = Ask.of(locals())
        with store.open_source(source, model_class=model_class, **ask.where) as opened:
            plan = _settled_plan(opened, _label(source), ask)
            model = apply(plan, opened, device=device)
        model.hf_ws_plan = plan  # how it was made, for whoever saves or distils it; no part of the checkpoint
        return model

    @classmethod
    def plan(
        cls,
        source: SourceLike,
        *,
        hidden: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        ffn: int | None = None,
        vocab: int | None = None,
        experts: int | None = None,
        params: str | int | None = None,
        ratio: float | None = None,
        method: str | Method = "subclone",
        method_args: Mapping[str, Any] | None = None,
        layer_policy: str | LayerPolicy | Sequence[int] | None = None,
        calibration: Any = None,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        model_class: type[PreTrainedModel] | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **config_fields: Any,
    ) -> Plan:
        """What `from_pretrained` with the same arguments would do, from `config.json` alone.

        What a method ranks stays open (`Rank`) until the weights are read; `plan.apply(source)` settles it. Only
        with `calibration` is the source's model run here, and the plan comes back settled.

        Args and errors are those of `from_pretrained`.
        """
        ask = Ask.of(locals())
        if calibration is not None:
            with store.open_source(source, model_class=model_class, **ask.where) as opened:
                return _settled_plan(opened, _label(source), ask)
        if isinstance(source, PreTrainedModel):
            return _open_plan(source.config, type(source), _label(source), None, ask)
        config = store.load_config(source, **ask.where)
        found = store.model_class(config, model_class)
        return _open_plan(config, found, _label(source), config._commit_hash, ask)


def apply_plan(
    plan: Plan,
    source: SourceLike | None = None,
    *,
    calibration: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """`Plan.apply`: the model that a plan describes."""
    if source is None and plan.revision is None and not Path(plan.source).is_dir():
        raise PlanError(
            f"this plan was made for {plan.source}, which is no folder here: give the source to apply it"
        )
    with store.open_source(
        plan.source if source is None else source,
        model_class=plan.model_class,
        revision=plan.revision if source in (None, plan.source) else None,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    ) as opened:
        if calibration is not None and not plan.wants_data:
            raise PlanError(f"this {plan.method} plan ranks nothing by activation: leave calibration= out")
        settled = _settled(plan, opened, Ask(calibration=calibration, device=device))
        if (asked := dtype_of(dtype)) is not None:
            values = {**plan.target_config, "dtype": str(asked).removeprefix("torch.")}
            settled = replace(settled, target_config=values)
        model = apply(settled, opened, device=device)
    model.hf_ws_plan = settled
    return model


def _open_plan(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], name: str, revision: str | None, ask: Ask
) -> Plan:
    """The plan of the sizes asked for, or of the shape that comes nearest a goal; reads no weights."""
    if ask.goal is None:
        return _planned(config, model_class, name, revision, ask)
    space, planned = _space(config, model_class, name, revision, ask)
    return search.search(space, ask.goal, planned)


def _settled_plan(opened: store.Source, name: str, ask: Ask) -> Plan:
    """The plan with nothing open; of a goal with calibration data, that of the shape whose start is best."""
    if ask.goal is None or ask.calibration is None:
        plan = _open_plan(opened.config, opened.model_class, name, opened.revision, ask)
        return _settled(plan, opened, ask)
    space, planned = _space(opened.config, opened.model_class, name, opened.revision, ask)
    counted, kept = search.parted(calibration_inputs(opened.config, ask.calibration, _tokenizer(opened)))
    measure, source = search.measure_of(opened.model_class, kept), _source_on(opened, ask.device)
    evidence: list[Any] = []  # the same for every shape, so of the first that wants any

    def scored(plan: Plan) -> tuple[Plan, float]:
        if plan.wants_data and not evidence:
            evidence.append(calibrate(source, counted))
        plan = settle(plan, opened, *(evidence if plan.wants_data else ()))
        return plan, search.score(apply(plan, opened, device=ask.device), kept, source, measure)

    by = f"the {measure} of the start on one sequence in four of the calibration data"
    return search.search(space, ask.goal, planned, scored, by)


def _space(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], name: str, revision: str | None, ask: Ask
) -> tuple[search.Space, Callable[[search.Shape], Plan]]:
    """What a goal searches, and how a shape of it is planned."""
    sizes, fields = read_request(config, ask.sizes, ask.fields)
    if isinstance(ask.layer_policy, Sequence) and not isinstance(ask.layer_policy, str):
        sizes = {LAYERS: len(ask.layer_policy), **sizes}
    space = search.Space(
        config, certify_class(model_class, config), census(model_class, config), sizes, fields
    )

    def planned(shape: search.Shape) -> Plan:
        own = replace(ask, sizes=shape.asked, fields=fields, goal=None)
        return _planned(config, model_class, name, revision, own)

    return space, planned


def _source_on(opened: store.Source, device: torch.device | str | None) -> PreTrainedModel:
    model = opened.model()  # a live source stays where its owner put it
    return model if opened.files is None else model.to(device or "cpu")


def _planned(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], name: str, revision: str | None, ask: Ask
) -> Plan:
    """The plan that the method makes of these arguments; reads no weights."""
    method = _method(ask.method, ask.method_args)
    certificate = certify_class(model_class, config)
    sizes, fields = read_request(config, ask.sizes, ask.fields)
    depths = sizes_of(config)
    stacks = [axis for axis in depths if kind_of(axis) == LAYERS]
    grows = bool(getattr(method, "grows", False))
    policy = getattr(method, "layer_policy", "first") if ask.layer_policy is None else ask.layer_policy
    if isinstance(policy, Sequence) and not isinstance(policy, str) and LAYERS not in stacks:
        raise PlanError(
            f"layer_policy names layers, but there are several stacks: {', '.join(stacks)}; name a policy"
        )
    kept = {
        axis: kept_layers(
            policy if axis == LAYERS or isinstance(policy, str) or callable(policy) else "first",
            depths[axis],
            sizes.pop(axis, None),
            grows,
        )
        for axis in stacks
    }
    for axis in led(certificate.stacks) & kept.keys():
        kept[axis] = _behind_the_first(axis, kept[axis], depths[axis])
    target = derive_config(config, kept=kept, **fields, **sizes)
    target.architectures = [model_class.__name__]
    target.dtype = ask.dtype or config.dtype
    before, after = census(model_class, config), census(model_class, target)
    request = Request(
        source=name,
        revision=revision,
        source_config=config,
        target_config=target,
        certificate=certificate,
        layers=kept,
        parameters=(sum(map(math.prod, before.values())), sum(map(math.prod, after.values()))),
        method=_name(ask.method),
        method_args=ask.method_args,
        seed=ask.seed,
        calibrated=ask.calibration is not None,
    )
    request.check_fixed()
    if not grows:
        request.check_growth()
    plan = method(request, **ask.method_args)
    if not isinstance(plan, Plan):
        raise PlanError(f"method {_name(ask.method)} returned a {type(plan).__name__}, wanted is a Plan")
    if not plan.is_fresh("*"):
        check_census(before, config, certificate)
        check_same_parts(before, after, kept, certificate)
        check_census(after, target, certificate.kept(kept))
    return plan


def _behind_the_first(axis: str, kept: Sequence[int], depth: int) -> tuple[int, ...]:
    """The kept layers of a stack whose first layer has other shapes: that one first, then only others."""
    if depth == 1 and len(kept) > 1:
        raise PlanError(
            f"{axis}={len(kept)}: its one layer is unlike any that could follow it; leave it at 1"
        )
    return (0, *(max(1, layer) for layer in kept[1:]))


def _settled(plan: Plan, opened: store.Source, ask: Ask) -> Plan:
    """The plan with nothing open, the source's model run over the calibration data if that is what it takes."""
    if plan.is_settled:
        return settle(plan, opened)
    evidence = None
    if ask.calibration is not None and plan.wants_data:
        evidence = calibrate(_source_on(opened, ask.device), ask.calibration, tokenizer=_tokenizer(opened))
    elif ask.calibration is None and any(
        isinstance(m, Rank) and m.score == "magnitude" for m in plan.maps.values()
    ):
        logger.warning(
            "no calibration data: ranked by weight magnitude. Importance by activation is the better start; "
            "pass calibration= with some text"
        )
    return settle(plan, opened, evidence)


def _label(source: SourceLike) -> str:
    return type(source).__name__ if isinstance(source, PreTrainedModel) else str(source)


def _tokenizer(opened: store.Source) -> PreTrainedTokenizerBase | None:
    if opened.files is None or not list(opened.files.glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(opened.files, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever keeps it from loading matters only if there are texts to tokenize
        logger.warning("the source's tokenizer cannot be loaded: %s", " ".join(str(error).split()))
        return None


def _name(method: str | Method) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


def _method(method: str | Method, arguments: Mapping[str, Any]) -> Method:
    if not callable(method) and not (isinstance(method, str) and method in METHODS):
        raise unknown("method", method, METHODS)
    found = method if callable(method) else METHODS[method]
    try:
        inspect.signature(found).bind(None, **arguments)
    except TypeError as error:
        options = ", ".join(list(inspect.signature(found).parameters)[1:]) or "none"
        raise PlanError(f"method {_name(method)}: {error}; its options are: {options}") from None
    return found
