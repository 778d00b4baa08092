"""`hf-ws certify`: prove the layouts of model classes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_ws.cli.options import Json
from hf_ws.errors import CheckpointError, HfWsError, PlanError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Verdict:
    """What came of one proof."""

    name: str
    model_class: str | None
    proven: bool
    axes: tuple[str, ...] = ()
    largest_error: float | None = None
    """What the worst of the proofs moved the output by, as a share of its largest value."""
    seconds: float = 0.0
    reason: str | None = None
    """Why it was refused."""
    layouts: dict[str, str] | None = None

    def __str__(self) -> str:
        start = f"{self.name}: {'proven' if self.proven else 'refused'}  {self.seconds:.1f} s"
        if not self.proven:
            return f"{start}  {' '.join((self.reason or '').split())}"
        return f"{start}  error {self.largest_error:.0e}  {self.model_class}: {' '.join(self.axes)}"


def certify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Model types (llama), classes (BertForMaskedLM), folders, Hub ids."
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every causal and masked language model that Transformers has.")
    ] = False,
    layouts: Annotated[bool, typer.Option("--layouts", help="Print the layout of every parameter.")] = False,
    as_json: Json = False,
) -> None:
    """Prove the layouts of model classes; exits with 3 if any is refused.

    One line each: the verdict, the time, the largest error, the class and its axes.

    Each class is built in miniature, its axes are permuted and duplicated wherever they are said to occur, and its
    output must not move. No weights are read, and nothing is downloaded but the config of a Hub id.
    """
    if bool(names) == every:
        raise PlanError("name at least one model type, class, folder or Hub id, or say --all")
    verdicts = []
    for name in names or _all_types():
        verdict = _verdict(name)
        verdicts.append(verdict)
        if not as_json:
            print(verdict, flush=True)
            if layouts:
                print(
                    "".join(f"    {key}: {layout}\n" for key, layout in (verdict.layouts or {}).items()),
                    end="",
                )
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    if not all(verdict.proven for verdict in verdicts):
        raise typer.Exit(CheckpointError.exit_code)


def _verdict(name: str) -> Verdict:
    from hf_ws.layouts import certify as certify_class

    found, start = None, time.perf_counter()
    try:
        found, config = _class_and_config(name)
        certificate = certify_class(found, config)
    except Exception as error:  # whatever a class makes of a miniature
        reason = str(error) if isinstance(error, HfWsError) else f"{type(error).__name__}: {error}"
        model_class = found.__name__ if found else None
        return Verdict(name, model_class, False, seconds=time.perf_counter() - start, reason=reason)
    return Verdict(
        name,
        found.__name__,
        True,
        axes=certificate.axes,
        largest_error=max(certificate.errors.values()),
        seconds=time.perf_counter() - start,
        layouts=dict(certificate.layouts),
    )


def _class_and_config(name: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that a name means, with the config it is proven for."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    from hf_ws import store

    if name in CONFIG_MAPPING and not Path(name).is_dir():
        config = CONFIG_MAPPING[name]()
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
            return MODEL_FOR_MASKED_LM_MAPPING[type(config)], config
        return store.model_class(config), config
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        config_class = getattr(found, "config_class", None)
        if config_class is None:
            raise UnsupportedArchitectureError(f"{name} has no config class; name a class with a task")
        return found, config_class()
    config = store.load_config(name)
    return store.model_class(config), config


def _all_types() -> list[str]:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
    return [name for name, config in CONFIG_MAPPING.items() if any(config in mapping for mapping in mappings)]
