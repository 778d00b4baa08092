"""`hf-ws plan`: what would be made, from `config.json` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_ws.cli.options import Flags, Json, Source, with_flags

if TYPE_CHECKING:
    from hf_ws.plan import Plan


@with_flags()
def plan(
    source: Source,
    flags: Flags,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan, for `hf-ws subclone --plan`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what would be made of SOURCE.

    Prints sizes, parameters and bytes, and what is kept of each axis and of the layers. Reads config.json and no
    weights; only --calibration runs the source's model, to say which neurons stay.
    """
    from hf_ws.auto import AutoSubclone

    made = AutoSubclone.plan(source, **flags.arguments())
    if save is not None:
        made.save(save)
    print(json.dumps(summary(made), indent=2) if as_json else described(made))


def described(plan: Plan) -> str:
    """A plan, and before it the shapes that it was chosen from, if sizes were searched for."""
    from hf_ws.search.table import table

    return "\n\n".join(part for part in (table(plan.search), str(plan)) if part)


def summary(plan: Plan) -> dict[str, Any]:
    """A plan without its indices, as a machine would read it."""
    before, after = plan.parameters
    return {
        "source": plan.source,
        "revision": plan.revision,
        "model_class": plan.model_class,
        "method": plan.method,
        "method_args": dict(plan.method_args),
        "seed": plan.seed,
        "layers": {stack: list(kept) for stack, kept in plan.layers.items()},
        "settled": plan.is_settled,
        "sizes": {"source": dict(plan.source_sizes), "target": dict(plan.target_sizes)},
        "parameters": {"source": before, "target": after},
        "search": dict(plan.search),
        "target_config": dict(plan.target_config),
        "version": plan.version,
    }
