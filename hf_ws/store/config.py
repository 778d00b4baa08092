"""A source's config and model class, from `config.json` alone. No code of the checkpoint ever runs."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_ws.errors import CheckpointError, UnsupportedArchitectureError
from hf_ws.store.place import CONFIG, Place, locate
from hf_ws.store.shards import parse_json

# These choose code or files rather than sizes: a config may not bring its own kernels, classes or paths.
_DROPPED = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "transformers_weights",
        "fusion_config",
    }
)


def load_config(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PreTrainedConfig:
    """The config of a Hub id or a folder, cleaned of everything that would choose code.

    Raises:
        CheckpointError: No such source, no or a broken `config.json`, or a quantized checkpoint.
        PlanError: An adapter (merge it first).
        UnsupportedArchitectureError: A model type that Transformers does not have.
    """
    where = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    return read_config(locate(source, **where))  # type: ignore[arg-type]


def read_config(place: Place) -> PreTrainedConfig:
    """`load_config` for a place that was found already."""
    path = place.folder / CONFIG
    raw = parse_json(path.read_bytes(), path)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        _refuse_type(place.name, model_type, "auto_map" in raw)
    method = _quantization(raw)
    if method:
        raise CheckpointError(
            f"{place.name} is quantized ({method}); its weights are not the model's. "
            "Load it in Transformers, dequantise, save, and give that folder, or use the unquantized original"
        )
    if model_type == "mistral" and "layer_types" in raw:
        model_type = "ministral"  # as AutoConfig reads it; a mistral config would lose the layer types
    try:
        config = CONFIG_MAPPING[model_type].from_dict({**_clean(raw), "model_type": model_type})
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a valid {model_type} config: {error}") from error
    config.name_or_path = place.name if place.revision else str(place.folder)
    config._commit_hash = place.revision
    return config


def model_class(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | str | None = None
) -> type[PreTrainedModel]:
    """The class asked for, or the one that `config.architectures` names, or else the causal-LM or base class.

    Raises:
        UnsupportedArchitectureError: A class that Transformers does not have.
    """
    if isinstance(model_class, type):
        if not issubclass(model_class, PreTrainedModel):
            raise UnsupportedArchitectureError(
                f"model_class={model_class.__name__} is not a PreTrainedModel class"
            )
        return model_class
    name = model_class or (config.architectures or [None])[0]
    if name is not None:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
            near = get_close_matches(str(name), [known for known in dir(transformers) if "For" in known], 3)
            origin = "model_class=" if model_class else "architectures in config.json"
            raise UnsupportedArchitectureError(
                f"class {name!r} ({origin}) is not in Transformers {transformers.__version__}; "
                + (f"did you mean {' or '.join(near)}? " if near else "")
                + "Pass model_class= with a class that it has"
            )
        # Some configs name a neighbour's class (mistral for ministral); their own family's class is meant.
        own = getattr(found, "config_class", None)
        if model_class or own is None or isinstance(config, own):
            return found
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnsupportedArchitectureError(
        f"Transformers {transformers.__version__} has no model for a {config.model_type!r} config; "
        "pass model_class="
    )


def _refuse_type(name: str, model_type: object, has_code: bool) -> None:
    if model_type is None:
        raise CheckpointError(f"{name}: config.json has no model_type, so it is not a Transformers model")
    near = get_close_matches(str(model_type), list(CONFIG_MAPPING), 3)
    raise UnsupportedArchitectureError(
        f"{name}: model type {model_type!r} is not in Transformers {transformers.__version__}"
        + (" and comes with remote code, which is never run" if has_code else "")
        + (f"; near names: {', '.join(near)}" if near else "")
        + ". Upgrade Transformers if a newer release has it, or convert the checkpoint to a known type"
    )


def _quantization(raw: dict[str, Any]) -> str | None:
    """The quantization method a config declares, at the top or in a sub-config."""
    found = raw.get("quantization_config") or raw.get("compression_config")
    if found:
        return str(found.get("quant_method", "method not named")) if isinstance(found, dict) else str(found)
    return next(
        (method for sub in raw.values() if isinstance(sub, dict) and (method := _quantization(sub))), None
    )


def _clean(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _clean(value) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in _DROPPED
    }
