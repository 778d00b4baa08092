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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws import store
from hf_ws.axes import AXES, LAYERS, kind_of
from hf_ws.compensation import COMPENSATIONS
from hf_ws.depth import Context, LayerPolicy, behind_the_first, kept_layers
from hf_ws.depth import wants_of as policy_wants
from hf_ws.derive import derive_config, read_request
from hf_ws.errors import PlanError, UnsupportedArchitectureError, unknown
from hf_ws.evidence import Observation, observe
from hf_ws.layouts import Certificate
from hf_ws.layouts import certify as certify_class
from hf_ws.layouts.census import Shapes, census, check_census, check_same_parts, wanting_the_first
from hf_ws.layouts.stacks import led
from hf_ws.methods import METHODS, Method, Request
from hf_ws.plan import Plan, Rank
from hf_ws.scores import wants_of as score_wants
from hf_ws.sizes import sizes_of
from hf_ws.transfer import apply, settle, wanted

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
        method: str | Method = "subclone",
        method_args: Mapping[str, Any] | None = None,
        layer_policy: str | LayerPolicy | Sequence[int] | None = None,
        calibration: Any = None,
        compensation: Sequence[str] | None = None,
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
            method: A name in `METHODS`, or a callable that takes a `Request` and returns a `Plan`.
            method_args: The method's own options, such as `{"rescale": False}`.
            layer_policy: A name in `POLICIES`, a callable `(depth, keep) -> layers` (see `hf_ws.depth`), or the list
                of source layers to keep; the method's own policy if None.
            calibration: Token ids [sequences, tokens], texts, a `datasets` dataset, an iterable of model inputs, or
                the `Evidence` that `calibrate` gave; methods that rank by activation, or turn the stream, look at it.
            compensation: Names in `COMPENSATIONS`: what is done with that data against what the maps lose, in this
                order; the method's own if None.
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
        ask = _Ask.of(locals())
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
        method: str | Method = "subclone",
        method_args: Mapping[str, Any] | None = None,
        layer_policy: str | LayerPolicy | Sequence[int] | None = None,
        calibration: Any = None,
        compensation: Sequence[str] | None = None,
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
        ask = _Ask.of(locals())
        if calibration is not None:
            with store.open_source(source, model_class=model_class, **ask.where) as opened:
                return _settled_plan(opened, _label(source), ask)
        if isinstance(source, PreTrainedModel):
            return _planned(source.config, type(source), _label(source), None, ask)
        config = store.load_config(source, **ask.where)
        return _planned(
            config, store.model_class(config, model_class), _label(source), config._commit_hash, ask
        )


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
        settled = _settled(plan, opened, _observed(opened, _Ask(calibration=calibration, device=device)))
        if (asked := _dtype(dtype)) is not None:
            values = {**plan.target_config, "dtype": str(asked).removeprefix("torch.")}
            settled = replace(settled, target_config=values)
        model = apply(settled, opened, device=device)
    model.hf_ws_plan = settled
    return model


def certify(model: type[PreTrainedModel] | PreTrainedConfig | PreTrainedModel) -> Certificate:
    """Prove the layouts of a model class, or of the class that a config belongs to.

    Args:
        model: A class (its default config is taken), a config, or a live model.

    Raises:
        UnsupportedArchitectureError: the class could not be proven, with the axis that failed.
    """
    if isinstance(model, PreTrainedConfig):
        return certify_class(store.model_class(model), model)
    if isinstance(model, PreTrainedModel):
        return certify_class(type(model), model.config)
    config_class = getattr(model, "config_class", None)
    if config_class is None:
        raise UnsupportedArchitectureError(f"{model!r} is neither a config nor a Transformers model class")
    return certify_class(model, config_class())


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """The arguments of a call, sorted."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    method: str | Method = "subclone"
    method_args: Mapping[str, Any] = field(default_factory=dict)
    layer_policy: str | LayerPolicy | Sequence[int] | None = None
    calibration: Any = None
    compensation: Sequence[str] | None = None
    seed: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise PlanError(f"seed={self.seed!r}: wanted is a whole number, 0 to {2**63 - 1}")
        try:
            torch.empty(0, device=self.device or "cpu")
        except (AssertionError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise PlanError(f"device={self.device!r} cannot be used here: {reason}") from None

    @property
    def policy(self) -> str | LayerPolicy | Sequence[int]:
        """The layer policy asked for, or the method's own."""
        if self.layer_policy is not None:
            return self.layer_policy
        return getattr(_method(self.method, self.method_args), "layer_policy", "first")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> _Ask:
        source, dtype = arguments["source"], arguments["dtype"]
        live = source.dtype if isinstance(source, PreTrainedModel) else None
        return cls(
            dtype=_dtype(dtype) or live,
            sizes={axis: arguments[axis] for axis in AXES if arguments.get(axis) is not None},
            fields=arguments["config_fields"],
            method_args=arguments["method_args"] or {},
            compensation=arguments["compensation"],
            where={name: arguments[name] for name in ("revision", "token", "cache_dir", "local_files_only")},
            **{name: arguments[name] for name in ("method", "layer_policy", "calibration", "seed", "device")},
        )


def _settled_plan(opened: store.Source, name: str, ask: _Ask) -> Plan:
    """The plan with nothing open; one pass over the calibration data collects what policy and method want."""
    observed = _observed(opened, ask)
    plan = _planned(opened.config, opened.model_class, name, opened.revision, ask, observed)
    return _settled(plan, opened, observed)


def _observed(opened: store.Source, ask: _Ask) -> Observation | None:
    """The source on the calibration data, run when something is first asked of it; None without data."""
    if ask.calibration is None:
        return None
    wants = (*(policy_wants(ask.policy) or ()), *getattr(_method(ask.method, ask.method_args), "wants", ()))
    if (score := ask.method_args.get("score")) is not None:
        wants += score_wants(score)
    if _compensation(ask, _method(ask.method, ask.method_args)):
        wants += ("moments",)
    return observe(opened, ask.calibration, wants, ask.device)


def _planned(
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    name: str,
    revision: str | None,
    ask: _Ask,
    observed: Observation | None = None,
) -> Plan:
    """The plan that the method makes of these arguments; only a layer policy may run the source's model."""
    method = _method(ask.method, ask.method_args)
    certificate = certify_class(model_class, config)
    sizes, fields = read_request(config, ask.sizes, ask.fields)
    depths = sizes_of(config)
    stacks = [axis for axis in depths if kind_of(axis) == LAYERS]
    grows = bool(getattr(method, "grows", False))
    policy = ask.policy
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
            None if observed is None else Context(axis, observed, policy_wants(policy) or ()),
        )
        for axis in stacks
    }
    for axis in led(certificate.stacks) & kept.keys():
        kept[axis] = behind_the_first(axis, kept[axis], depths[axis])

    def derived() -> tuple[PreTrainedConfig, Shapes]:
        target = derive_config(config, kept=kept, **fields, **sizes)
        target.architectures = [model_class.__name__]
        target.dtype = ask.dtype or config.dtype
        return target, census(model_class, target)

    before, (target, after) = census(model_class, config), derived()
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
        parameters=(sum(map(math.prod, before.values())), sum(map(math.prod, after.values()))),
        method=_name(ask.method),
        method_args=ask.method_args,
        seed=ask.seed,
        calibrated=ask.calibration is not None,
        compensation=_compensation(ask, method),
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


def _settled(plan: Plan, opened: store.Source, observed: Observation | None) -> Plan:
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
    return settle(plan, opened, evidence)


def _compensation(ask: _Ask, method: Method) -> tuple[str, ...]:
    """What is to be done against what the maps lose: what is asked, or the method's own."""
    if ask.compensation is None:
        return tuple(getattr(method, "compensation", ()))
    for name in ask.compensation:
        if name not in COMPENSATIONS:
            raise unknown("compensation", name, COMPENSATIONS)
    return tuple(ask.compensation)


def _label(source: SourceLike) -> str:
    return type(source).__name__ if isinstance(source, PreTrainedModel) else str(source)


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


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PlanError(
            f"dtype={dtype!r} is unknown; allowed are float32, bfloat16, float16, float64 and auto"
        )
    return found
