"""A tokenizer with fewer tokens, from its `tokenizer.json`: what Transformers loads, and all that it needs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_ws.errors import OutputError, PlanError
from hf_ws.vocabulary import bpe, unigram, wordpiece

if TYPE_CHECKING:
    from hf_ws.vocabulary.choose import Vocabulary


class Algorithm(NamedTuple):
    """How one kind of tokenizer is trimmed."""

    keep: Callable[[Mapping[str, Any], Mapping[int, int], Collection[int], int], set[int]]
    """(model, counts, ids that must stay, size) -> ids that stay; more than `size` where fewer cannot do."""
    cut: Callable[[Mapping[str, Any], Mapping[int, int]], dict[str, Any]]
    """(model, each kept id's new one) -> model."""


ALGORITHMS: dict[str, Algorithm] = {
    "BPE": Algorithm(bpe.keep, bpe.cut),
    "Unigram": Algorithm(unigram.keep, unigram.cut),
    "WordPiece": Algorithm(wordpiece.keep, wordpiece.cut),
}
"""By the name that `tokenizer.json` calls a model's type."""

_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_WITHOUT_IDS = (_JSON, _CONFIG, "special_tokens_map.json", "chat_template")
_OF_THE_LOADING = ("is_local", "local_files_only")


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary | Sequence[int]
) -> PreTrainedTokenizerBase:
    """A tokenizer of the same class that knows the kept tokens only, numbered densely in their old order.

    Args:
        tokenizer: The source's; not changed.
        vocabulary: What `choose_vocabulary` chose, or the kept ids, ascending.

    Raises:
        PlanError: a tokenizer that cannot be trimmed.
        OutputError: Transformers does not load the new one as it was meant.
    """
    with tempfile.TemporaryDirectory() as folder:
        return write_tokenizer(tokenizer, vocabulary, folder)


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary | Sequence[int], folder: str | Path
) -> PreTrainedTokenizerBase:
    """Write what `trim_tokenizer` gives to a folder, load it back and check its tokens. Raises as that does."""
    kept = vocabulary if isinstance(vocabulary, Sequence) else vocabulary.kept
    new = {old: i for i, old in enumerate(kept)}
    values, algorithm = read(tokenizer)
    try:
        values = with_ids(values, new.__getitem__) | {"model": algorithm.cut(values["model"], new)}
    except KeyError as error:
        raise PlanError(
            f"the kept ids leave out {error.args[0]}, a special or added token; choose them with choose_vocabulary"
        ) from None
    folder = Path(folder)
    written = tokenizer.save_pretrained(folder)
    for file in map(Path, written):
        if not file.name.startswith(_WITHOUT_IDS):  # vocab.txt and the like: the old tokens once more
            file.unlink(missing_ok=True)
    _write(folder / _JSON, values)
    settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in _OF_THE_LOADING}
    if decoder := settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {str(new[int(i)]): token for i, token in decoder.items()}
    _write(folder / _CONFIG, settings)
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    wanted = {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new}
    if (found := loaded.get_vocab()) != wanted:
        token = min(t for t in found.keys() | wanted.keys() if found.get(t) != wanted.get(t))
        raise OutputError(
            f"the trimmed {type(tokenizer).__name__} is not loaded back as it was meant: {token!r} has id "
            f"{found.get(token)}, not {wanted.get(token)}. This is a fault of hf_ws or of this version of "
            "Transformers: please report it"
        )
    return loaded


def read(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], Algorithm]:
    """A tokenizer as JSON, and how its kind is trimmed.

    Raises:
        PlanError: a tokenizer written in Python, or of a kind that is not in `ALGORITHMS`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(
            f"{type(tokenizer).__name__} has no tokenizer.json, and only such tokenizers are trimmed; "
            "leave vocab as it is"
        )
    values: dict[str, Any] = json.loads(backend.to_str())
    kind = values["model"]["type"]
    if kind not in ALGORITHMS:
        raise PlanError(
            f"{type(tokenizer).__name__} is a {kind} tokenizer; trimmed are {', '.join(ALGORITHMS)}; "
            "leave vocab as it is"
        )
    return values, ALGORITHMS[kind]


def with_ids(values: Mapping[str, Any], new: Callable[[int], int]) -> dict[str, Any]:
    """A tokenizer's JSON with every id outside its model replaced by `new(id)`."""
    changed = dict(values)
    changed["added_tokens"] = [{**token, "id": new(token["id"])} for token in values["added_tokens"]]
    if values.get("padding"):
        changed["padding"] = {**values["padding"], "pad_id": new(values["padding"]["pad_id"])}
    if values.get("post_processor"):
        changed["post_processor"] = _processor(values["post_processor"], new)
    return changed


def _processor(values: Mapping[str, Any], new: Callable[[int], int]) -> dict[str, Any]:
    changed = dict(values)
    if values["type"] == "Sequence":
        changed["processors"] = [_processor(one, new) for one in values["processors"]]
    elif values["type"] == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**token, "ids": [new(i) for i in token["ids"]]}
            for name, token in values["special_tokens"].items()
        }
    elif values["type"] in ("BertProcessing", "RobertaProcessing"):
        changed |= {name: [values[name][0], new(values[name][1])] for name in ("sep", "cls")}
    return changed


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
