"""`AutoSubclone`: a checkpoint of one size in, a stock model of another size out.

from hf_ws import AutoSubclone

model = AutoSubclone.from_pretrained("gpt2-large", hidden=512)
plan = AutoSubclone.plan("gpt2-large", hidden=512, layers=12)      # reads config.json only
print(plan)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from hf_ws import store
from hf_ws.asked import Ask, dtype_of
from hf_ws.depth import LayerPolicy
from hf_ws.errors import PlanError
from hf_ws.evidence import observe
from hf_ws.methods import Method
from hf_ws.plan import Plan
from hf_ws.planning import open_plan, settled, settled_plan
from hf_ws.transfer import apply
from hf_ws.vocabulary import Vocabulary

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
        vocab: int | Vocabulary | None = None,
        experts: int | None = None,
        params: str | int | None = None,
        ratio: float | None = None,
        method: str | Method | None = None,
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
            vocab: Rows of the token embedding: what `choose_vocabulary` chose, or a number, which keeps the first ids.
            experts: Routed experts in a layer.
            params: Parameters in all ("125M", "1.5B", 125_000_000) in place of sizes, which are searched for (see
                `hf_ws.search`) and kept in the plan; sizes that are given hold for every shape.
            ratio: The same as a part of the source's parameters, above 0, up to 1.
            method: A name in `METHODS`, or a callable that takes a `Request` and returns a `Plan`. If None, the best
                that was measured: "rotation" with `calibration`, under which a tied head stays tied; else "subclone".
            method_args: The method's own options, such as `{"rescale": False}`.
            layer_policy: A name in `POLICIES`, a callable `(depth, keep) -> layers` (see `hf_ws.depth`), or the list
                of source layers to keep. If None the method's own; of "rotation", and where no method is named,
                "lowest_loss" with `calibration`.
            calibration: Token ids [sequences, tokens], texts, a `datasets` dataset, an iterable of model inputs, or
                the `Evidence` that `calibrate` gave; methods that rank by activation, or turn the stream, look at it.
            compensation: Names in `COMPENSATIONS`: what is done with that data against what the maps lose; the
                method's own if None.
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
            plan = settled_plan(opened, _label(source), ask)
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
        vocab: int | Vocabulary | None = None,
        experts: int | None = None,
        params: str | int | None = None,
        ratio: float | None = None,
        method: str | Method | None = None,
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
        with `calibration` is the source's model run here, and the plan comes back settled; without, its layers are
        those of a policy that needs no data.

        Args and errors are those of `from_pretrained`.
        """
        ask = Ask.of(locals())
        if calibration is not None:
            with store.open_source(source, model_class=model_class, **ask.where) as opened:
                return settled_plan(opened, _label(source), ask)
        if isinstance(source, PreTrainedModel):
            return open_plan(source.config, type(source), _label(source), None, ask)
        config = store.load_config(source, **ask.where)
        found = store.model_class(config, model_class)
        return open_plan(config, found, _label(source), config._commit_hash, ask)


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
        observed = None if calibration is None else observe(opened, calibration, (), device)
        done = settled(plan, opened, observed)
        if (asked := dtype_of(dtype)) is not None:
            values = {**plan.target_config, "dtype": str(asked).removeprefix("torch.")}
            done = replace(done, target_config=values)
        model = apply(done, opened, device=device)
    model.hf_ws_plan = done
    return model


def _label(source: SourceLike) -> str:
    return type(source).__name__ if isinstance(source, PreTrainedModel) else str(source)
