"""`hf-ws cache-teacher`: ask the teacher once, so that training needs it no more."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ws.cli.options import Json, pairs, quiet_unless_seen
from hf_ws.errors import PlanError


def _number(help: str) -> Any:
    return typer.Option(metavar="N", help=help)


def cache_teacher(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The folder to write; it must not exist, or be empty.")
    ],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The settings of the run, YAML; flags win over it.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Folder or Hub id of the teacher.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Folder or Hub id of the student; its tokenizer is used, and must be the teacher's.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|stdlib", help="Text of the run: a file, folder or glob; may be repeated."),
    ] = None,
    block: Annotated[int | None, _number("Tokens in a sequence.")] = None,
    batch_size: Annotated[int | None, _number("Sequences in a batch.")] = None,
    steps: Annotated[
        int | None, _number("Steps of the run; without, every block of the data is asked.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="The run's kd_temperature. [default: 1]")
    ] = None,
    k: Annotated[int, _number("Likeliest tokens kept.")] = 32,
    every_block: Annotated[
        bool, typer.Option("--every-block", help="Ask every block of the data, however short the run.")
    ] = False,
    train: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="A further setting of the run, such as seed=1; may be repeated."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what a teacher says of a run's text to OUTPUT: of every token the k likeliest, and the rest as one.

    Training with --teacher-cache OUTPUT and the same settings needs no teacher. What was interrupted goes on where it
    stopped when the same command is given again.
    """
    from accelerate import PartialState

    from hf_ws.training import TrainConfig
    from hf_ws.training import cache_teacher as ask

    flags = {
        "teacher": teacher, "model": model, "train_files": data, "block": block, "batch_size": batch_size,
        "steps": steps, "kd_temperature": temperature,
    }  # fmt: skip
    quiet_unless_seen()
    given = _settings(config, flags, train)
    if not {"steps", "tokens"} & given.keys():
        every_block, given["steps"] = True, 1
    made = ask(TrainConfig(**given), output, k=k, every_block=every_block)
    if not PartialState().is_main_process:
        return
    if as_json:
        print(json.dumps({**asdict(made.contents), "tokens": made.tokens, "bytes": made.bytes}, indent=2))
        return
    print(
        f"Written to {output}: {made.tokens:,} tokens, {made.bytes:,} bytes, {made.contents.bytes_per_token} a token.\n"
        f"Train from it: the same settings and --teacher-cache {output}, without --teacher"
    )


def _settings(config: Path | None, flags: dict[str, Any], train: list[str] | None) -> dict[str, Any]:
    """Those of the run: the file's, then the flags', then --train's. Raises PlanError for one that does not exist."""
    from hf_ws.training import TrainConfig, load_config_file

    given = load_config_file(config) if config else {}
    given |= {name: value for name, value in flags.items() if value not in (None, [])}
    given |= pairs("--train", train)
    if unknown := sorted(given.keys() - {one.name for one in fields(TrainConfig)}):
        raise PlanError(f"--train {unknown[0]}: no such setting of a run; see recipes/clm.py --help")
    return given
