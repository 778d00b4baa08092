"""`hf-ws compare`: train several starts on the same batches and say how much sooner each gets there."""

from __future__ import annotations

from dataclasses import dataclass, fields
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


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What is trained, on what, how long."""

    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the table, picture and runs go.")]
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Optimizer steps of every run; of a race's last ones.")
    ] = None
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="The starts, with options such as 'subclone(rescale=false)'.")
    ] = "random,weight_selection,subclone"
    race: Annotated[
        bool,
        typer.Option(
            "--race", help="Find the best of many: train all a little, the better part longer, and so on."
        ),
    ] = False
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Of a race: training time of its last runs, in place of --steps."),
    ] = None
    best: Annotated[
        int | None,
        typer.Option(metavar="K", help="Of a race: let only the K best before training enter it."),
    ] = None
    shapes: Annotated[
        int, typer.Option(metavar="K", help="With --params or --ratio: try the K nearest shapes.")
    ] = 1
    data: Annotated[
        list[str] | None,
        _text("Text to train on, or a dataset's Hub name; may be repeated. [default: stdlib]"),
    ] = None
    held_out: Annotated[
        list[str] | None, _text("Text to evaluate on; by default one text in twenty of the data.")
    ] = None
    learning_rates: Annotated[
        str, typer.Option(metavar="A,B", help="Each start takes the best of these peaks.")
    ] = "3e-4,1e-3,3e-3"
    search_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Choose the rate on a run this short, not on the full run."),
    ] = None
    seeds: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Of starts and batches. [default: 0; 0,1,2 in a race]"),
    ] = None
    block: Annotated[int, typer.Option(metavar="N", help="Tokens in a sequence.")] = 512
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sequences in a batch.")] = 8
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Distil every start from this model too.")
    ] = None
    kd_weight: Annotated[float, typer.Option(metavar="X", help="Of distillation in the loss, 0 to 1.")] = 0.5
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A further training setting, such as schedule=constant."),
    ] = None
    save_models: Annotated[bool, typer.Option("--save-models", help="Keep every trained model.")] = False

    def settings(self) -> dict[str, Any]:
        """The fields of `hf_ws.compare.setup.Setup` that these flags mean. Raises PlanError."""
        from hf_ws.compare.spelling import parted

        return {
            "methods": parted(self.methods),
            "shapes": self.shapes,
            "data": sources(self.data) or "stdlib",
            "held_out": sources(self.held_out),
            "block": self.block,
            "learning_rates": _list("--learning-rates", self.learning_rates, float),
            "seeds": None if self.seeds is None else _list("--seeds", self.seeds, int),
            "teacher": self.teacher,
            "save_models": self.save_models,
            **({"batch_size": self.batch_size, "kd_weight": self.kd_weight} | _training(self.train)),
        }


@with_flags(but=OWN)
def compare(source: Source, flags: Flags, runs: Runs, as_json: Json = False) -> None:
    """Train several starts on the same batches and compare them.

    Writes a table and a picture of loss against tokens, with the tokens that each start needs to reach the random
    start's final loss. With --race, the better half goes on to runs twice as long until two are left, and the winner is
    named with its confidence. Run again with the same --output, it goes on where it stopped.
    """
    asked = {
        name: value for name, value in flags.arguments().items() if name not in OWN and value is not None
    }
    del asked["method_args"]
    settings = runs.settings() | {"calibration": asked.pop("calibration", None), "sizes": asked}
    settings["output"] = runs.output
    _check(runs)
    from hf_ws import compare as of

    result: Any
    if runs.race:
        result = of.race(source, steps=runs.steps, seconds=runs.seconds, best=runs.best, **settings)
    else:
        result = of.compare(source, steps=runs.steps or 0, search_steps=runs.search_steps, **settings)
    name = "race" if runs.race else "compare"
    if as_json:
        print((runs.output / f"{name}.json").read_text(encoding="utf-8"), end="")
    else:
        written = f"{name}.md, {name}.png, {name}.json, and each run in arms/."
        print(f"{result}\n\nWritten to {runs.output}: {written}")


def _check(runs: Runs) -> None:
    """Raises PlanError for a flag of a race without one, or the other way round."""
    only = ("search_steps",) if runs.race else ("seconds", "best")
    if wrong := [name for name in only if getattr(runs, name) is not None]:
        what = "has no place in a race" if runs.race else "is of a race; add --race"
        raise PlanError(f"--{wrong[0].replace('_', '-')} {what}")
    if not runs.race and runs.steps is None:
        raise PlanError("--steps is missing: say how many optimizer steps every run has")


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
