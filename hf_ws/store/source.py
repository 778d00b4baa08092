"""A source: the weights that are read, under the names a live module gives them.

Tensors come straight from the mapped files wherever Transformers would only rename them. Where it converts
(the experts of a Mixtral are merged), `from_pretrained` loads the model and its own tensors are served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, final

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hf_ws.errors import CheckpointError, PlanError, UnsupportedArchitectureError
from hf_ws.store import config as configs
from hf_ws.store.names import match_names, may_be_absent, out_of_place, ties
from hf_ws.store.place import CONFIG, fetch_weights, locate
from hf_ws.store.shards import Shards, open_shards, some


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What can be said of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@final
class Source:
    """A checkpoint or live model, checked against its config and ready to be read; a context manager.

    Attributes:
        name: The Hub id, the folder's name, or the class of a live model.
        revision: The commit of a Hub id, else None.
        config: The config, cleaned of what would choose code.
        model_class: The class whose parameters `tensors` names.
        tensors: Shape and dtype of every entry of the live module's `state_dict()`, tied names included.
        fingerprint: A sha256 over config, tensor names, shapes, dtypes and offsets, and a sample of the data.
        files: The folder, for what lies beside the weights; None for a live model.
        unused: Names on disk that this class has no place for, such as another task's head.
    """

    def __init__(
        self,
        *,
        name: str,
        revision: str | None,
        config: PreTrainedConfig,
        model_class: type[PreTrainedModel],
        fingerprint: str,
        files: Path | None,
        shards: Shards | None = None,
        stored: dict[str, str] | None = None,
        unused: tuple[str, ...] = (),
        may_drop: bool = False,
        model: PreTrainedModel | None = None,
    ) -> None:
        self.name, self.revision, self.config, self.model_class = name, revision, config, model_class
        self.fingerprint, self.files, self.unused = fingerprint, files, unused
        self._shards, self._model, self._may_drop = shards, model, may_drop
        self._stored = stored  # name in memory -> name on disk; None when the model itself is served
        if shards is None or stored is None:
            infos = {
                name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self.model().state_dict().items()
            }
        else:
            on_disk = ((name, shards.stored[disk]) for name, disk in stored.items())
            infos = {name: TensorInfo(entry.shape, entry.dtype) for name, entry in on_disk}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(infos)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the precision it is stored in, tied names giving the same one. Do not modify it."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.name} has no tensor {name!r}; it has {some(list(self.tensors), 3)}")
        if self._shards is None or self._stored is None:
            return self._state[name]
        return self._shards.tensor(self._stored[name])

    @cached_property
    def _state(self) -> Mapping[str, torch.Tensor]:
        return self.model().state_dict()  # once: asking for it takes longer than copying a small tensor

    def model(self) -> PreTrainedModel:
        """The live model, in evaluation mode on CPU, loaded by Transformers once and kept.

        Raises:
            CheckpointError: Missing, left-over or mis-shaped tensors.
        """
        if self._model is None:
            self._model = self._load()
        return self._model

    def generation_config(self) -> GenerationConfig | None:
        """A copy of its generation settings; None where it has none of its own."""
        if self.files is None:
            own = getattr(self.model(), "generation_config", None)
            return None if own is None else GenerationConfig.from_dict(own.to_dict())
        if (self.files / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.files)
        return None

    def close(self) -> None:
        """Let go of the files; tensors and the model already handed out stay valid."""
        if self._shards is not None:
            self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self) -> PreTrainedModel:
        try:
            model, info = self.model_class.from_pretrained(
                self.files,
                config=deepcopy(self.config),
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.name} cannot be loaded as {self.model_class.__name__}: {error}"
            ) from error
        # Not the cache folder that was loaded: the name goes into what is saved.
        model.name_or_path = model.config.name_or_path = self.config.name_or_path
        unused = [] if self._may_drop else out_of_place(model, info["unexpected_keys"])
        _refuse_mismatch(
            self.name,
            model,
            missing=sorted(info["missing_keys"]),
            unused=sorted(unused),
            wrong=info["mismatched_keys"],
        )
        state = model.state_dict()
        _refuse_untied(
            self.name, [pair for pair in ties(model).items() if not torch.equal(*map(state.get, pair))]
        )
        return model


def open_source(
    source: str | Path | PreTrainedModel,
    *,
    model_class: type[PreTrainedModel] | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Source:
    """Open a Hub id, a folder or a live model, and check all of it that can be checked by names and shapes.

    Values are not read, so a NaN passes. Parts that the class has no place for, such as another task's head,
    are listed in `Source.unused`; left-over tensors inside the layers are refused.

    Raises:
        CheckpointError: Weights that are missing, left over, mis-shaped, damaged, quantized or pickled.
        PlanError: An adapter instead of a model.
        UnsupportedArchitectureError: A class that Transformers does not have.
    """
    if isinstance(source, nn.Module):
        return _open_live(source, model_class)
    place = locate(
        source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    config = configs.read_config(place)
    found = configs.model_class(config, model_class)
    fetch_weights(place)
    with torch.device("meta"):
        meta = _build(place.name, found, config)
    shards = open_shards(place.folder)
    # Another class than the checkpoint's own was asked for on purpose: what it has no place for may go.
    may_drop = model_class is not None and found.__name__ not in (config.architectures or ())
    stored, unused = _lay_out(place.name, meta, shards, may_drop)
    return Source(
        name=place.name,
        revision=place.revision,
        config=config,
        model_class=found,
        fingerprint=hashlib.sha256((place.folder / CONFIG).read_bytes() + shards.digest).hexdigest(),
        files=place.folder,
        shards=shards,
        stored=stored,
        unused=unused,
        may_drop=may_drop,
    )


def _build(name: str, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return model_class(deepcopy(config))  # building writes into the config
    except Exception as error:  # whatever a class makes of sizes that do not go together
        raise CheckpointError(
            f"{name}: {model_class.__name__} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error


def _lay_out(
    name: str, meta: PreTrainedModel, shards: Shards, may_drop: bool
) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """Name on disk of every parameter (None: Transformers must convert), and names without a parameter."""
    match = match_names(meta, shards.stored)
    if match is None:
        return None, ()
    memory = meta.state_dict()
    found = dict(match.stored)
    for one, other in ties(meta).items():
        if one in found and other in found:
            both = [(one, other)]
            _refuse_untied(
                name, [p for p in both if not torch.equal(*(shards.tensor(match.stored[n]) for n in p))]
            )
        elif one in found or other in found:
            found[one] = found[other] = found.get(one) or found[other]
    absent = [key for key in memory if key not in found]
    missing = [key for key in absent if not may_be_absent(meta, key)]
    wrong = [
        (key, shards.stored[disk].shape, tuple(memory[key].shape))
        for key, disk in found.items()
        if shards.stored[disk].shape != tuple(memory[key].shape)
    ]
    _refuse_mismatch(name, meta, missing, [] if may_drop else out_of_place(meta, match.unused), wrong)
    for key, disk in found.items():
        if memory[key].dtype.is_floating_point and not shards.stored[disk].dtype.is_floating_point:
            raise CheckpointError(
                f"{name}: tensor {key!r} is stored as {shards.stored[disk].dtype}, a float was expected; "
                "it looks quantized: dequantise the checkpoint first"
            )
    # What the class makes for itself when absent has to come from a live model.
    return (None if absent else {key: found[key] for key in memory}), match.unused


def _refuse_mismatch(
    name: str,
    model: PreTrainedModel,
    missing: list[str],
    unused: list[str],
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    if not (missing or unused or wrong):
        return
    shapes = [f"{key} is {list(came)} on disk and {list(want)} by the config" for key, came, want in wrong]
    raise CheckpointError(
        f"{name} does not hold the weights of the {type(model).__name__} that its config describes: "
        + "; ".join(
            text
            for text, names in (
                (f"{len(missing)} missing: {some(missing)}", missing),
                (f"{len(unused)} left over: {some(unused)}", unused),
                (f"{len(wrong)} mis-shaped: {some(shapes)}", wrong),
            )
            if names
        )
        + ". Correct config.json, fetch the checkpoint again, or pass model_class="
    )


def _refuse_untied(name: str, pairs: list[tuple[str, str]]) -> None:
    if pairs:
        raise CheckpointError(
            f"{name}: the config ties {pairs[0][0]} to {pairs[0][1]}, but the file holds two "
            "different tensors; set tie_word_embeddings to false in config.json, or remove the stale one"
        )


def _open_live(model: nn.Module, model_class: type[PreTrainedModel] | str | None) -> Source:
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise PlanError(
            f"a {type(model).__name__} was given; give a PreTrainedModel without adapters "
            "(a PEFT model: `merge_and_unload()` first)"
        )
    if model_class is not None and model_class not in (type(model), type(model).__name__):
        raise UnsupportedArchitectureError(
            f"the live model is a {type(model).__name__}; model_class={model_class}"
        )
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise CheckpointError(f"the live {type(model).__name__} is quantized; `dequantize()` it first")
    state = model.state_dict()
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    if absent:
        raise CheckpointError(
            f"the live {type(model).__name__} has no data for {some(absent)}; load it whole first"
        )
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in state.items():
        sample = tensor.detach().flatten()[:64].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample.numpy().tobytes())
    return Source(
        name=type(model).__name__,
        revision=None,
        config=model.config,
        model_class=type(model),
        fingerprint=digest.hexdigest(),
        files=None,
        model=model,
    )
