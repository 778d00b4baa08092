"""Where a source lies: a folder on this machine, or a Hub repository brought here at one pinned commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_ws.errors import CheckpointError, PlanError
from hf_ws.store.shards import INDEX, SINGLE, read_index

T = TypeVar("T")

CONFIG = "config.json"
ADAPTER = "adapter_config.json"

TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.txt",
    "tokenizer.model*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)

# What belongs to a model besides weights and config: never code, never a pickle.
SIDE_FILES = (
    *TOKENIZER_FILES,
    "chat_template.*",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
    "LICENSE*",
)


@dataclass(frozen=True)
class Place:
    """A folder that holds at least `config.json`."""

    name: str  # the Hub id, or the folder's name
    folder: Path
    revision: str | None = None  # the commit, for a Hub id
    download: dict[str, Any] = field(default_factory=dict, repr=False)  # how to bring the rest of a Hub id


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Place:
    """Find the folder of `source`; of a Hub id only `config.json` is brought here.

    Raises:
        CheckpointError: No such folder or repository, no permission, no connection, or no `config.json`.
        PlanError: An adapter, not a model.
    """
    if not isinstance(source, str | Path) or not str(source):
        raise PlanError(f"source={source!r}; wanted is a Hub id, a folder or a PreTrainedModel")
    folder = Path(source).expanduser()
    if folder.is_dir():
        _refuse_adapter(source, (folder / ADAPTER).is_file())
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG}; give the folder that `save_pretrained` wrote")
        return Place(folder.resolve().name, folder)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that holds it and its {CONFIG}")
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CheckpointError(
            f"{source} is not a folder on this machine; give an existing folder or a Hub id"
        )

    download: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}

    def fetch(name: str) -> Path:
        return Path(str(hf_hub_download(source, name, revision=revision, **download)))

    try:
        config = _ask_hub(source, revision, lambda: fetch(CONFIG))
    except CheckpointError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            # A Hub that did not answer, after all retries, is not asked again: only the cache is.
            download["local_files_only"] |= isinstance(error.__cause__, LocalEntryNotFoundError)
            _refuse_adapter(source, _exists(lambda: fetch(ADAPTER)))
        raise
    # The cache names a snapshot's folder after its commit; the rest is taken from that commit, no later one.
    return Place(source, config.parent, config.parent.name, download)


def fetch_weights(place: Place) -> None:
    """Bring the weights and side files of a Hub place into its folder; a local place is left alone."""
    if place.revision is None:
        return

    def fetch(*patterns: str) -> None:
        options: dict[str, Any] = {
            "revision": place.revision,
            "allow_patterns": list(patterns),
            **place.download,
        }
        _ask_hub(place.name, place.revision, lambda: snapshot_download(place.name, **options))

    fetch(CONFIG, ADAPTER, INDEX, "generation_config.json", *SIDE_FILES)
    _refuse_adapter(place.name, (place.folder / ADAPTER).is_file())
    # The index says which files make up the model, and its names are checked before any is asked for.
    indexed = (place.folder / INDEX).is_file()
    fetch(*sorted(set(read_index(place.folder / INDEX).values())) if indexed else [SINGLE])
    if not indexed and not (place.folder / SINGLE).is_file():
        api = HfApi(token=place.download["token"])
        offline = place.download["local_files_only"]
        names = [] if offline else _ask_hub(place.name, None, lambda: api.list_repo_files(place.name))
        kinds = sorted(
            {Path(name).suffix for name in names} & {".bin", ".pt", ".pth", ".h5", ".gguf", ".msgpack"}
        )
        raise CheckpointError(
            f"{place.name} has neither {SINGLE} nor {INDEX}"
            + (f", only {', '.join(kinds)} files, which are not read" if kinds else "")
            + "; convert it to safetensors first"
        )


def _refuse_adapter(source: str | Path, is_adapter: bool) -> None:
    if is_adapter:
        raise PlanError(
            f"{source} holds an adapter ({ADAPTER}), not a model of its own; merge it first with "
            "`PeftModel.merge_and_unload()`, save the result and give that folder"
        )


def _exists(fetch: Callable[[], Path]) -> bool:
    try:
        return fetch().is_file()
    except (EntryNotFoundError, OSError):
        return False


def _ask_hub(source: str, revision: str | None, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except HFValidationError as error:
        raise CheckpointError(
            f"{source!r} is neither a folder here nor a Hub id ('owner/name'): {error}"
        ) from error
    except (EntryNotFoundError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        _explain(source, revision, error)


def _explain(source: str, revision: str | None, error: Exception) -> NoReturn:
    at = f"{source} at revision {revision}" if revision else source
    status = getattr(getattr(error, "response", None), "status_code", None)
    # The order matters: a gated repository is also a missing one, and "not cached" hides its real cause.
    if isinstance(error, GatedRepoError):
        text = f"{source} is gated; accept its terms on its Hub page, then `hf auth login` or pass token="
    elif isinstance(error, RepositoryNotFoundError) or status == 401:
        text = (
            f"{source} is not on the Hub, or is private, and no such folder is here; check the spelling, "
            "or `hf auth login` or pass token="
        )
    elif isinstance(error, RevisionNotFoundError):
        text = f"{source} has no revision {revision!r}; give a branch, tag or commit that it has"
    elif isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        text = (
            f"{at} is no folder here and not in the local cache, and the Hub could not be asked "
            f"({error.__cause__ or error}); check the spelling, connect, or drop local_files_only if you gave it"
        )
    elif isinstance(error, EntryNotFoundError):
        text = f"{at} has no {CONFIG}; it is not a Transformers model"
    else:
        text = f"{at} could not be read from the Hub ({status or type(error).__name__}): {error}"
    raise CheckpointError(text) from error
