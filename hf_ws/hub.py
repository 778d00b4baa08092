"""Write a model as a folder that can be published: stock checkpoint, tokenizer, plan, model card.

    model = AutoSubclone.from_pretrained("gpt2-large", hidden=512)
    save(model, "student", source_folder=source_folder("gpt2-large"))

The folder appears whole or not at all, needs nothing of this library to be loaded, and names no place on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from transformers import AutoTokenizer, PreTrainedModel

from hf_ws import store
from hf_ws.axes import VOCAB
from hf_ws.errors import OutputError, PlanError
from hf_ws.methods import METHODS
from hf_ws.plan import Plan
from hf_ws.search.table import table
from hf_ws.store.place import TOKENIZER_FILES, locate
from hf_ws.vocabulary import kept_tokens, write_tokenizer

PLAN_FILE, CARD_FILE = "hf_ws_plan.json", "README.md"

TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}
"""The Hub's name of a task by the end of the class's name; the first that fits."""

COPIED = ("language", "license", "license_name", "license_link")
"""What a source's card says that holds for its student too."""


def save(
    model: PreTrainedModel,
    path: str | Path,
    *,
    source_folder: str | Path | None = None,
    max_shard_size: int | str = "50GB",
    command: str | None = None,
) -> Path:
    """Write a model that `AutoSubclone` or `Plan.apply` made, whole or not at all.

    Before the folder gets its name the checkpoint is loaded back by its stock class, and every key must match.

    Args:
        model: With the plan it was made by, in `model.hf_ws_plan`.
        path: A folder that does not exist, or is empty.
        source_folder: Where the source's tokenizer, processor, licence and card lie; see `source_folder`.
        max_shard_size: Of a weights file, as in Transformers.
        command: The command line that made the model, for its card.

    Returns:
        The folder.

    Raises:
        OutputError: a place that cannot be written, or a checkpoint that its own class does not load back whole.
        PlanError: a model without a plan.
    """
    plan = getattr(model, "hf_ws_plan", None)
    if not isinstance(plan, Plan):
        raise PlanError(
            f"this {type(model).__name__} carries no plan, so no card can say how it was made; "
            "give a model from AutoSubclone.from_pretrained or Plan.apply, or use model.save_pretrained"
        )
    plan = nameable(plan)
    folder = Path(path).expanduser()
    with store.new_folder(folder, source_folder) as staging:
        if source_folder is not None:
            store.copy_side_files(source_folder, staging)
            if (kept := kept_tokens(plan)) is not None:
                _trim(source_folder, kept, staging)
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        plan.save(staging / PLAN_FILE)
        card = model_card(plan, name=folder.resolve().name, command=command, **card_facts(source_folder))
        (staging / CARD_FILE).write_text(str(card), encoding="utf-8")
        _check_reload(type(model), staging, folder)
    return folder


def _trim(source: str | Path, kept: Sequence[int], staging: Path) -> None:
    """In place of the source's tokenizer the one with the kept tokens."""
    for pattern in TOKENIZER_FILES:
        for file in staging.glob(pattern):
            file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    write_tokenizer(tokenizer, kept, staging)


def source_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a source that was opened before; of a Hub id also its card is brought there, if it has one.

    Raises:
        CheckpointError: no such source.
    """
    where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    place = locate(source, revision=revision, **where)
    if place.revision is not None:
        # A source without a card, or a card that cannot be had now, is no reason to lose the work.
        with suppress(EntryNotFoundError, HTTPError, OSError):
            hf_hub_download(place.name, CARD_FILE, revision=place.revision, **where)
    return place.folder


def card_facts(folder: str | Path | None) -> dict[str, Any]:
    """Language and licence, as the card in a source's folder gives them; empty where it gives none."""
    if folder is None or not (Path(folder) / CARD_FILE).is_file():
        return {}
    try:
        found = metadata_load(Path(folder) / CARD_FILE) or {}
    except (ValueError, yaml.YAMLError):  # somebody else's file, and only a courtesy
        return {}
    facts = {name: found.get(name) for name in COPIED}
    return {name: value for name, value in facts.items() if isinstance(value, str | list)}


def model_card(
    plan: Plan,
    *,
    name: str | None = None,
    license: str | None = None,
    command: str | None = None,
    training: str | None = None,
    **facts: Any,
) -> ModelCard:
    """The card of a model that a plan describes: what it came from, what was kept, how to make it again.

    Args:
        plan: How the model was made. A local source is called by its folder's name, never by its path.
        name: The model's.
        license: Its licence; that of the source.
        command: The command line that made it.
        training: How it was trained since, in Markdown; None for a start that was not.
        facts: Further metadata, such as `language` or `license_link`.
    """
    plan = nameable(plan)
    transferred = not plan.is_fresh("*")
    before, after = plan.parameters
    change = ["pruned"] if after < before else ["grown"] if after > before else []
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=next((task for end, task in TASKS.items() if plan.model_class.endswith(end)), None),
        tags=["hf_ws", *(change if transferred else [])],
        **facts,
    )
    if plan.revision and transferred:  # only a Hub id has a revision
        data.base_model = plan.source
        data["base_model_relation"] = "finetune"  # of the Hub's kinds the nearest to a model of another size
    body = "\n\n".join(
        _sections(plan, name or f"{Path(plan.source).name}-{_short(after)}", command, training)
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def nameable(plan: Plan) -> Plan:
    """The plan without a path of this machine: a folder is called by its name."""
    return plan if plan.revision else replace(plan, source=Path(plan.source).resolve().name)


def _sections(plan: Plan, name: str, command: str | None, training: str | None) -> list[str]:
    source = f"[{plan.source}](https://huggingface.co/{plan.source})" if plan.revision else f"`{plan.source}`"
    start = f"started from the weights of {source}"
    if plan.is_fresh("*"):
        start = f"of another size than {source}, freshly initialised"
    use = (
        f"from transformers import {plan.model_class}\n\n"
        f"model = {plan.model_class}.from_pretrained({name!r})  # this folder, or its Hub id"
    )
    since = "It was trained on since." if training else "It is a start for training."
    replay = f"from hf_ws import Plan\n\nmodel = Plan.load({PLAN_FILE!r}).apply({plan.source!r})"
    return [
        f"# {name}",
        f"A `{plan.model_class}` of {plan.parameters[1]:,} parameters, {start}. {since}",
        f"## Use\n\n```python\n{use}\n```",
        *([training] if training else []),
        f"## Size\n\n```\n{plan}\n```",
        *([f"Chosen from these shapes:\n\n```\n{table(plan.search)}\n```"] if plan.search else []),
        "## What was kept\n\n" + "\n".join(f"- {line}" for line in _kept(plan)),
        "## How it was made" if training is None else "## How its start was made",
        *([f"```\n{command}\n```", "or from the plan in this folder:"] if command else []),
        f"```python\n{replay}\n```",
        f"With {_versions(plan)}.",
        *_cited(plan.method),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(plan, training is not None)),
    ]


def _kept(plan: Plan) -> list[str]:
    if plan.is_fresh("*"):
        return [f"Nothing: every weight was drawn by the model class from seed {plan.seed}."]
    lines = [
        f"{stack.capitalize()} {', '.join(map(str, kept))} of the source's {plan.source_sizes[stack]}, counted from 0."
        for stack, kept in plan.layers.items()
    ]
    lines.append("On each axis the indices that the table names; every one is listed in `hf_ws_plan.json`.")
    if plan.gains:
        lines.append(
            f"Rescaled: {', '.join(f'`{key}` x {gain:.4g}' for key, gain in sorted(plan.gains.items()))}."
        )
    if plan.fresh:
        lines.append(f"Freshly initialised: {', '.join(f'`{key}`' for key in plan.fresh)}.")
    return lines


def _limits(plan: Plan, trained: bool) -> list[str]:
    untrained = (
        "Untrained at this size: what it says now is worse than what its source says. Train it before use."
    )
    lines = [] if trained else [untrained]
    if not plan.is_fresh("*"):
        lines.append("It inherits its source's biases, gaps and terms of use.")
    if kept_tokens(plan) is not None:
        lines.append(
            "Its tokenizer knows some of the source's tokens; their ids are other than the source's."
        )
    elif plan.target_sizes[VOCAB] < plan.source_sizes[VOCAB]:
        lines.append(
            f"It knows token ids below {plan.target_sizes[VOCAB]}; the source's tokenizer also gives higher ones."
        )
    return lines


def _cited(method: str) -> list[str]:
    """The paper that a method's docstring names as its source."""
    found = re.search(
        r"Source: (.+?) \((\d{4}\.\d{4,5})\)", getattr(METHODS.get(method), "__doc__", None) or ""
    )
    if not found:
        return []
    title, number = found.groups()
    return [f"## Cite\n\n{title}: [arXiv {number}](https://arxiv.org/abs/{number})"]


def _versions(plan: Plan) -> str:
    packages: Mapping[str, str] = {"hf_ws": plan.version} | {
        name: version(name) for name in ("transformers", "torch", "safetensors")
    }
    return ", ".join(f"{name} {number}" for name, number in packages.items())


def _short(count: int) -> str:
    """A count as model names give it: 124M, 1.1B."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}".rstrip("0").rstrip(".") + letter
    return str(count)


def _check_reload(model_class: type[PreTrainedModel], staging: Path, folder: Path) -> None:
    """Load the checkpoint as its reader will; refuse it if anything in it is not what the class wants."""
    _, found = model_class.from_pretrained(
        staging, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if wrong := {kind: sorted(map(str, names)) for kind, names in found.items() if names}:
        raise OutputError(
            f"{folder}: {model_class.__name__} does not load this checkpoint back whole "
            f"({'; '.join(f'{kind}: {names[:3]}' for kind, names in wrong.items())}); nothing was written. "
            "This is a fault of hf_ws or of this version of Transformers: please report it"
        )
