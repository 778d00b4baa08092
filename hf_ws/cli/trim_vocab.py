"""`hf-ws trim-vocab`: the same model with a smaller vocabulary, its tokenizer rewritten to match."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_ws.cli.options import Source, quiet_unless_seen, sources
from hf_ws.errors import PlanError

if TYPE_CHECKING:
    from hf_ws.methods import Request
    from hf_ws.plan import Plan


def trim(request: Request) -> Plan:
    """The method of this command: everything but the vocabulary stays."""
    return request.plan(request.fixed_maps())


def trim_vocab(
    source: Source,
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The folder to write; it must not exist, or be empty.")
    ],
    vocab: Annotated[int, typer.Option(metavar="N", help="Tokens to keep, special ones included.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|stdlib",
            help="Text like what the model is for: a file, folder or glob, or a dataset's Hub name; may be repeated.",
        ),
    ],
    split: Annotated[str, typer.Option(metavar="NAME", help="The split of a Hub dataset.")] = "train",
    column: Annotated[str, typer.Option(metavar="NAME", help="The column or key of the text.")] = "text",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the new weights, such as bfloat16; the source's by default."),
    ] = None,
    model_class: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Instead of the class that the checkpoint names.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a Hub id.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where downloads are kept.")] = None,
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Download nothing.")] = False,
) -> None:
    """Keep the tokens that text uses most, and write model and tokenizer to OUTPUT.

    Every text can still be written, if with more tokens; of the tokens that stay, all logits are what they were. Make
    it smaller with `hf-ws subclone OUTPUT`: then OUTPUT can teach it, for it has the same vocabulary.
    """
    from hf_ws import hub, store
    from hf_ws.auto import AutoSubclone
    from hf_ws.distill.teacher import load_tokenizer
    from hf_ws.training.data import load_text
    from hf_ws.vocabulary import choose_vocabulary

    local = source if Path(source).expanduser().is_dir() else None
    store.check_output(output, local)
    quiet_unless_seen()
    where: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    documents = load_text(sources(data), split=split, column=column)
    with store.open_source(source, model_class=model_class, **where) as opened:
        tokenizer = load_tokenizer(opened.files) if opened.files else None
        if tokenizer is None:
            raise PlanError(f"{source} has no tokenizer that could be loaded, so no vocabulary can be chosen")
        vocabulary = choose_vocabulary(
            tokenizer,
            (document.text for document in documents),
            vocab,
            config=opened.config,
            generation_config=opened.generation_config(),
        )
    model = AutoSubclone.from_pretrained(
        source, vocab=vocabulary, method=trim, dtype=dtype, model_class=model_class, **where
    )
    name = source if local is None else Path(source).resolve().name
    named = [word for one in data for word in ("--data", Path(one).name)]
    command = shlex.join(["hf-ws", "trim-vocab", name, output.resolve().name, "--vocab", str(vocab), *named])
    folder = hub.source_folder(source, **where | {"revision": model.hf_ws_plan.revision})
    hub.save(model, output, source_folder=folder, command=command)
    print(
        f"{model.hf_ws_plan}\n\nThe text used {vocabulary.used:,} of {vocabulary.size:,} tokens; "
        f"{vocabulary.coverage:.2%} of its tokens are kept as they are.\n"
        f"Written to {output}: model and tokenizer, loaded back and checked."
    )
