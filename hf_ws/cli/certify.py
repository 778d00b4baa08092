"""`hf-ws certify`: prove the layouts of model classes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_ws.cli.options import Json
from hf_ws.errors import CheckpointError, HfWsError, PlanError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_ws.layouts.catalogue import Verdict


class Kind(StrEnum):
    """The kinds of `hf_ws.layouts.catalogue.KINDS`, which is not imported for a `--help`."""

    seq2seq = "seq2seq"
    masked_lm = "masked-lm"
    causal_lm = "causal-lm"
    speech = "speech"
    vision = "vision"
    multimodal = "multimodal"
    base = "base"


def certify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Model types (llama), classes (BertForMaskedLM), folders, Hub ids."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every model type that Transformers has.")] = False,
    kind: Annotated[
        Kind | None, typer.Option("--kind", help="With --all: only types of this kind, by its class.")
    ] = None,
    layouts: Annotated[bool, typer.Option("--layouts", help="Print the layout of every tensor.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page that docs/architectures.md is.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes at a time, with --all.")] = 1,
    as_json: Json = False,
) -> None:
    """Prove the layouts of model classes; exits with 3 if any named one is refused.

    One line each: the verdict, the time, the largest error, the class and the axes that may change; axes that may
    not, with the reason.

    Each class is built in miniature, its axes are permuted and duplicated wherever they are said to occur, and its
    output must not move. No weights are read, and nothing is downloaded but the config of a Hub id.
    """
    from transformers import logging

    from hf_ws.layouts import catalogue

    if bool(names) == every:
        raise PlanError("name at least one model type, class, folder or Hub id, or say --all")
    # For the processes that this one starts: miniatures are too small for threads, and classes are talkative.
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    logging.set_verbosity_error()
    found = []
    for verdict in (
        catalogue.verdicts(list(catalogue.types(kind and kind.value)), kind and kind.value, jobs)
        if every
        else map(_verdict, names or ())
    ):
        found.append(verdict)
        if not as_json and not markdown:
            print("\n".join(_lines(verdict, layouts)), flush=True)
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in found], indent=2))
    elif markdown:
        from hf_ws.cli.architectures import page

        print(page(found), end="")
    elif every:
        print(_summary(found))
    if not every and any(verdict.verdict == "refused" for verdict in found):
        raise typer.Exit(CheckpointError.exit_code)


def _lines(verdict: Verdict, layouts: bool) -> Iterator[str]:
    yield str(verdict)
    if layouts:
        yield from (f"    {name}: {layout}" for name, layout in (verdict.layouts or {}).items())


def _summary(found: list[Verdict]) -> str:
    counts = {
        word: sum(v.verdict == word for v in found) for word in ("certified", "certified in part", "refused")
    }
    return f"{len(found)} types: " + ", ".join(f"{count} {word}" for word, count in counts.items())


def _verdict(name: str) -> Verdict:
    from hf_ws.layouts import catalogue

    try:
        return catalogue.verdict_of(name, *_class_and_config(name))
    except HfWsError as error:
        return catalogue.Verdict(name, None, "refused", reason=" ".join(str(error).split()))


def _class_and_config(name: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that a name means, with the config it is proven for."""
    import transformers

    from hf_ws import store
    from hf_ws.layouts import catalogue

    if name in (known := catalogue.types()) and not Path(name).is_dir():
        return catalogue.default_of(name, known[name])
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        config_class = getattr(found, "config_class", None)
        if config_class is None:
            raise UnsupportedArchitectureError(f"{name} has no config class; name a class with a task")
        return found, config_class()
    config = store.load_config(name)
    return store.model_class(config), config
