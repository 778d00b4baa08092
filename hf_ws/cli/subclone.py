"""`hf-ws subclone`: write a model of another size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_ws.cli.options import Flags, Source, calibration_texts, quiet_unless_seen, with_flags
from hf_ws.cli.plan import described
from hf_ws.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WITH_PLAN = ("calibration", "dtype", "cache_dir", "local_files_only")
"""The flags that a saved plan leaves open."""


def _shard_size(text: str) -> str:
    if not re.fullmatch(r"0*[1-9]\d*(KB|MB|GB|TB)", text.upper()):
        raise typer.BadParameter(f"{text!r}; wanted is a number and a unit, such as 5GB")
    return text.upper()


@with_flags()
def subclone(
    source: Source,
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The folder to write; it must not exist, or be empty.")
    ],
    flags: Flags,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Carry out this saved plan, instead of sizes and a method."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of a weights file.", callback=_shard_size)
    ] = "50GB",
) -> None:
    """Make a model of another size and write it to OUTPUT.

    The folder appears whole or not at all. It holds a stock Transformers checkpoint, the source's tokenizer files, the
    plan and a model card, and was loaded back and checked before it got its name.
    """
    from hf_ws import hub, store

    local = source if Path(source).expanduser().is_dir() else None
    store.check_output(output, local)
    quiet_unless_seen()
    model = _made(source, flags, plan)
    made_plan = model.hf_ws_plan
    where = flags.where | {"revision": made_plan.revision}
    name = source if local is None else Path(source).resolve().name
    replayed = f" --plan {shlex.quote(plan.name)}" if plan else ""
    command = (
        f"hf-ws subclone {shlex.quote(name)} {shlex.quote(output.resolve().name)}{replayed} {flags.spelled()}"
    )
    hub.save(
        model,
        output,
        source_folder=hub.source_folder(source, **where),
        max_shard_size=max_shard_size,
        command=command.rstrip(),
    )
    print(f"{described(made_plan)}\n\n{_next_steps(output, made_plan.model_class, source)}")


def _made(source: str, flags: Flags, plan: Path | None) -> PreTrainedModel:
    from hf_ws.auto import AutoSubclone
    from hf_ws.plan import Plan

    if plan is None:
        return AutoSubclone.from_pretrained(source, **flags.arguments())
    if clash := flags.given(but=WITH_PLAN):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in clash)
        raise PlanError(f"--plan already says what {named} would; drop it, or drop --plan")
    loaded = Plan.load(plan)
    if flags.calibration and not loaded.wants_data:
        raise PlanError(
            f"{plan} ranks nothing by activation; make the plan with --calibration, or drop it here"
        )
    options = {name: getattr(flags, name) for name in WITH_PLAN}
    return loaded.apply(source, **options | {"calibration": calibration_texts(flags.calibration)})


def _next_steps(output: Path, model_class: str, source: str) -> str:
    files = list(output.iterdir())
    size = sum(file.stat().st_size for file in files)
    train = shlex.join(["--model", str(output), "--teacher", source, "--output", f"{output}-trained"])
    lines = [
        f"Written to {output}: {len(files)} files, {size:,} bytes, loaded back and checked.",
        f"Load it:      {model_class}.from_pretrained({str(output)!r})",
    ]
    if model_class.endswith(("ForCausalLM", "LMHeadModel")):
        lines.append(
            f"Train it on:  accelerate launch recipes/clm.py {train} --train-files YOUR_TEXT --steps 1000"
        )
    return "\n".join(lines)
