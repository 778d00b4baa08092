"""What models of several modalities are called with: images or sound, and text that has a place for each feature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.axes import VOCAB
from hf_ws.sizes import nodes, sizes_of

GRID = 4
"""Patches a side of the image that a tower without a fixed image size gets."""

FRAMES = 64
"""Frames of sound."""

_RESERVED = 24
"""See `hf_ws.layouts.miniature.RESERVED`."""

_GETTERS = {
    "image": ("get_image_features", ("pixel_values",)),
    "audio": ("get_audio_features", ("input_features", "input_values")),
}


def media_and_text(model: PreTrainedModel, **more: Tensor) -> dict[str, Tensor]:
    """Two images, or two sounds, or both, and two texts with as many placeholders as the towers give features."""
    wanted = inspect.signature(model.forward).parameters
    made = {name: value for name, value in (media(model) | more).items() if name in wanted}
    if "input_features_mask" not in _known(getattr(model, "get_audio_features", model.forward)):
        made.pop("input_features_mask", None)  # it is not about frames, but about features
    runs: list[tuple[int, int]] = []
    kinds = {}
    for at, (kind, (getter, main)) in enumerate(_GETTERS.items(), start=1):
        token = placeholder(model.config, kind)
        owner = model if hasattr(model, getter) else getattr(model, "model", None)
        if token is not None and hasattr(owner, getter) and any(name in made for name in main):
            runs.append((token, count(getattr(owner, getter), made) // 2))
            kinds[token] = 1 if kind == "image" else at + 1
    made["input_ids"] = words(model.config, runs)
    if "attention_mask" in wanted:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
    types = torch.zeros_like(made["input_ids"])
    for token, number in kinds.items():
        types[made["input_ids"] == token] = number
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in wanted:
            made[name] = types
    if "decoder_input_ids" in wanted and model.config.get_text_config().is_encoder_decoder:
        made["decoder_input_ids"] = words(model.config, [])
    if "return_loss" in wanted:
        made["return_loss"] = torch.tensor(True)  # the only place where a temperature counts
    return made


def placeholder(config: PreTrainedConfig, kind: str) -> int | None:
    """The id that stands for an image's, or a sound's, features in a text."""
    names = (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id")
    found = (getattr(node, name, None) for _, node in nodes(config) for name in names)
    return next((token for token in found if token is not None), None)


def count(getter: Any, made: Mapping[str, Tensor]) -> int:
    """How many features a tower gives for these inputs."""
    inner = getattr(getattr(getter.__self__, "model", None), getter.__name__, None)
    if inner is not None:  # a class with a head hands on whatever it is given
        return count(inner, made)
    known = _known(getter)
    with torch.no_grad():
        features = getter(**{name: value for name, value in made.items() if name in known})
    found = getattr(features, "pooler_output", features)
    found = features.last_hidden_state if found is None else found
    return sum(tensor.numel() // tensor.shape[-1] for tensor in _tensors(found))


def _known(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(inspect.unwrap(method)).parameters


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for inner in value:
            yield from _tensors(inner)


def words(config: PreTrainedConfig, runs: list[tuple[int, int]]) -> Tensor:
    """Two texts with these placeholders, so many of each, after their second word."""
    generator = torch.Generator().manual_seed(1)
    sizes = sizes_of(config)
    vocab = sizes.get(VOCAB) or min(size for axis, size in sizes.items() if axis.endswith(VOCAB))
    texts = torch.randint(_RESERVED, vocab, (2, 9), generator=generator)
    places = [torch.full((2, number), token) for token, number in runs]
    between = [texts[:, 2 + i : 3 + i] for i in range(len(places))]
    inner = [part for pair in zip(places, between, strict=True) for part in pair]
    eos = getattr(config.get_text_config(), "eos_token_id", None)
    end = [torch.full((2, 1), eos)] if isinstance(eos, int) and eos < _RESERVED else []  # CLIP pools there
    return torch.cat([texts[:, :2], *inner, texts[:, 2 + len(places) :], *end], dim=1)


def media(model: PreTrainedModel) -> dict[str, Tensor]:
    """Images and sounds in whatever form the model's towers take them."""
    wanted = {*inspect.signature(model.forward).parameters}
    made: dict[str, Tensor] = {}
    if "pixel_values" in wanted:
        inner = getattr(
            model, model.base_model_prefix, model
        )  # a class with a head does not say what is optional
        getter = _known(getattr(inner, "get_image_features", model.forward))
        optional = {name for name, known in getter.items() if known.default is None}
        made |= images(model.config, wanted - (optional & {"image_sizes"}))
    if "input_features" in wanted:
        made |= sounds(model.config)
    return made


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tower(config: PreTrainedConfig, *fields: str) -> PreTrainedConfig | None:
    """The config of the tree that has one of these fields, a part before the whole; None if none has."""
    found = [
        node for _, node in nodes(config) if any(getattr(node, name, None) is not None for name in fields)
    ]
    return next((node for node in found if node is not config), found[0] if found else None)


def images(config: PreTrainedConfig, wanted: set[str]) -> dict[str, Tensor]:
    """Two images: as pixels, or cut into patches where the model says how they lie."""
    node = getattr(config, "vision_config", None) or tower(config, "image_size", "patch_size")
    if node is None:
        return {}
    if not hasattr(node, "patch_size"):  # two towers, one after the other
        node = tower(node, "patch_size") or node
    channels = getattr(node, "num_channels", None) or getattr(node, "in_channels", None) or 3
    patch = int(_side(getattr(node, "patch_size", 1)) or 1)
    if "image_grid_thw" in wanted:
        depth: int = getattr(node, "temporal_patch_size", 0) or getattr(node, "patch_temporal", 1) or 1
        pixels = noise(2 * GRID * GRID, channels * depth * patch * patch)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, GRID, GRID]] * 2)}
    if "spatial_shapes" in wanted:
        pixels = noise(2, GRID * GRID, channels * patch * patch)
        mask, shapes = torch.ones(2, GRID * GRID, dtype=torch.long), torch.tensor([[GRID, GRID]] * 2)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    side = _side(getattr(node, "image_size", None) or getattr(config, "image_size", None) or GRID * patch)
    made = {"pixel_values": noise(2, channels, side, side)}
    if "pixel_attention_mask" in wanted:  # several images a text, all of one size
        made["pixel_values"] = made["pixel_values"][:, None]
    if getattr(config, "image_grid_pinpoints", None):  # the whole, and its only tile
        made["pixel_values"] = noise(2, 2, channels, side, side)
    if "image_sizes" in wanted:
        made["image_sizes"] = torch.tensor([[side, side]] * 2)
    if "target_sizes" in wanted:
        made["target_sizes"] = torch.tensor([[side // patch, side // patch]] * 2)
    return made


def _side(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


_BANDS = ("num_mel_bins", "input_dim", "n_mels", "feature_size", "input_feat_size")


def sounds(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Two sounds: bands by frames for a tower that starts with convolutions, as Whisper's, else frames by bands."""
    node = tower(config, *_BANDS)
    if node is None:
        return {}
    bands = next(getattr(node, name) for name in _BANDS if getattr(node, name, None) is not None)
    frames = 2 * node.max_source_positions if getattr(node, "max_source_positions", None) else FRAMES
    upright = hasattr(node, "max_source_positions") or node.model_type in _UPRIGHT
    sound = noise(2, bands, frames) if upright else noise(2, frames, bands)
    mask = torch.ones(2, frames, dtype=torch.long)
    return {"input_features": sound, "input_features_mask": mask, "feature_attention_mask": mask}


_UPRIGHT = ("glmasr_encoder", "clvp_decoder", "dots3_note_audio_encoder")
"""Towers that start with convolutions although they have no table of positions."""
