"""`hf-ws compare`: train several starts on the same batches and say how much sooner each gets there."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ws.cli.options import Flags, Json, Source, pairs, sources, with_flags
from hf_ws.errors import PlanError

OWN = frozenset({"method", "method_arg", "seed", "dtype", "revision", "cache_dir", "local_files_only"})
"""Flags of `subclone` that have no place here: there are several methods and seeds, and training is in float32."""

DECIDED = frozenset(
    {
        "model",
        "output",
        "save_model",
        "resume",
        "progress",
        "train_files",
        "eval_files",
        "dataset",
        "dataset_config",
    }
    | {"dataset_split", "text_column", "block", "steps", "tokens", "learning_rate", "seed", "teacher"}
)
"""Training settings that a comparison decides itself, or that are flags of their own here."""


def _text(help: str) -> Any:
    return typer.Option(metavar="FILE|stdlib", help=help)


@with_flags(but=OWN)
def compare(
    source: Source,
    flags: Flags,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the table, picture and runs go.")],
    steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps of every run.")],
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="The starts.")
    ] = "random,weight_selection,subclone",
    data: Annotated[
        list[str] | None,
        _text("Text to train on, or a dataset's Hub name; may be repeated. [default: stdlib]"),
    ] = None,
    held_out: Annotated[
        list[str] | None, _text("Text to evaluate on; by default one text in twenty of the data.")
    ] = None,
    learning_rates: Annotated[
        str, typer.Option(metavar="A,B", help="Each start takes the best of these peaks.")
    ] = "3e-4,1e-3,3e-3",
    search_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Choose the rate on a run this short, not on the full run."),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="A,B", help="Of the starts and of the order of batches.")
    ] = "0",
    block: Annotated[int, typer.Option(metavar="N", help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sequences in a batch.")] = 8,
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Distil every start from this model too.")
    ] = None,
    kd_weight: Annotated[float, typer.Option(metavar="X", help="Of distillation in the loss, 0 to 1.")] = 0.5,
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A further training setting, such as schedule=constant."),
    ] = None,
    save_models: Annotated[bool, typer.Option("--save-models", help="Keep every trained model.")] = False,
    as_json: Json = False,
) -> None:
    """Train several starts on the same batches and compare them.

    Writes a table and a picture of loss against tokens, with the tokens that each start needs to reach the random
    start's final loss. Run again with the same --output, it goes on where it stopped.
    """
    from hf_ws.compare import compare as compare_starts

    asked = {
        name: value for name, value in flags.arguments().items() if name not in OWN and value is not None
    }
    calibration = asked.pop("calibration", None)
    del asked["method_args"]
    result = compare_starts(
        source,
        output=output,
        steps=steps,
        sizes=asked,
        methods=_list("--methods", methods, str),
        data=sources(data) or "stdlib",
        held_out=sources(held_out),
        calibration=calibration,
        block=block,
        learning_rates=_list("--learning-rates", learning_rates, float),
        search_steps=search_steps,
        seeds=_list("--seeds", seeds, int),
        teacher=teacher,
        save_models=save_models,
        **{"batch_size": batch_size, "kd_weight": kd_weight} | _training(train),
    )
    if as_json:
        print((output / "compare.json").read_text(encoding="utf-8"), end="")
    else:
        print(
            f"{result}\n\nWritten to {output}: compare.md, compare.png, compare.json, and each run in arms/."
        )


def _list(option: str, text: str, kind: type[int] | type[float] | type[str]) -> list[Any]:
    """The parts of `a,b,c`. Raises PlanError naming the one that is none of its kind."""
    what = {int: "a whole number", float: "a number", str: "a name"}[kind]
    found = []
    for part in text.split(","):
        try:
            found.append(kind(part.strip()))
        except ValueError:
            raise PlanError(f"{option} {text}: {part!r} is not {what}; part them by commas") from None
    return found


def _training(given: list[str] | None) -> dict[str, Any]:
    """Settings of a training run by key. Raises PlanError for one that does not exist, or has a flag here."""
    from hf_ws.training.config import TrainConfig

    found = pairs("--train", given)
    known = {one.name for one in fields(TrainConfig)} - DECIDED
    for name in found:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise PlanError(f"--train {name}: no such setting of a comparison; {hint}")
    return found
