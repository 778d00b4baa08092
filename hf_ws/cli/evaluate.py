"""`hf-ws eval`: how well a model predicts text, and how far it is from its teacher."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hf_ws.cli.options import Json, quiet_unless_seen, sources
from hf_ws.errors import PlanError


def eval_(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder or Hub id of a causal language model.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|stdlib",
            help="Text: a file, folder or glob, or a dataset's Hub name; may be repeated. [default: stdlib]",
        ),
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="The split of a Hub dataset.")] = "train",
    column: Annotated[str, typer.Option(metavar="NAME", help="The column or key of the text.")] = "text",
    dataset_config: Annotated[
        str | None, typer.Option(metavar="NAME", help="The configuration of a Hub dataset.")
    ] = None,
    all_text: Annotated[
        bool, typer.Option("--all-text", help="All of it, not only what training on it holds out.")
    ] = False,
    documents_apart: Annotated[
        bool,
        typer.Option(
            "--documents-apart", help="No token sees another document of its sequence, as training has it."
        ),
    ] = False,
    block: Annotated[int, typer.Option(metavar="N", help="Tokens in a sequence.")] = 512,
    max_blocks: Annotated[
        int, typer.Option(metavar="N", help="Sequences used at most, evenly spread; 0 for all.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sequences at a time.")] = 8,
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say how far the model is from this one too.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of the weights, such as bfloat16; auto for the models' own.")
    ] = "float32",
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Tasks of the package lm_eval instead, such as hellaswag,arc_easy."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Examples of every task at most, with --tasks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL on text: loss, perplexity and bits per byte, and with --teacher how often and how far they differ.

    What follows +- is the standard error over sequences.
    """
    from hf_ws import evaluation

    quiet_unless_seen()
    if tasks is None:
        if limit is not None:
            raise PlanError("--limit is of --tasks; of text, --max-blocks takes less")
        found = evaluation.evaluate(
            model,
            sources(data) or "stdlib",
            teacher=teacher,
            block=block,
            all_text=all_text,
            documents_apart=documents_apart,
            max_blocks=max_blocks,
            batch_size=batch_size,
            dtype=dtype,
            split=split,
            column=column,
            config_name=dataset_config,
        )
        print(json.dumps(found.as_dict(), indent=2) if as_json else found)
        return
    if data or teacher:
        raise PlanError("--tasks bring data of their own and know no teacher; leave out --data and --teacher")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    results = evaluation.run_tasks(model, names, batch_size=batch_size, limit=limit, dtype=dtype)
    print(json.dumps(results, indent=2) if as_json else table(results))


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line for each metric of each task."""
    rows = [
        (
            task,
            name,
            f"{value:.4f}" + (f" +- {error:.4f}" if (error := metrics.get(f"{name}_stderr")) else ""),
        )
        for task, metrics in results.items()
        for name, value in metrics.items()
        if not name.endswith("_stderr")
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)] if rows else [0, 0]
    return "\n".join(f"{task:<{widths[0]}}  {name:<{widths[1]}}  {value}" for task, name, value in rows)
