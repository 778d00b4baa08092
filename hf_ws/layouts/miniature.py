"""A model of the same kind, small enough to be run in milliseconds, whose axes all have different lengths.

The config is the caller's own with its sizes replaced, so flags and per-layer kinds are those of the model at hand.
There are two sets of sizes: what has a given length in both is no accident.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.axes import (
    HEAD_DIM,
    HEADS,
    VOCAB,
)
from hf_ws.layouts import zoo
from hf_ws.layouts.lengths import GROUPED, SIZES, lengths
from hf_ws.layouts.zoo import media, vision
from hf_ws.layouts.zoo.draw import floats
from hf_ws.sizes import (
    layer_axes,
    layer_kinds,
    near,
    nodes,
    places,
    resize,
    scope_of,
    sizes_of,
)

RESERVED = 24
"""Ids below this are padding, start, end and the like in a miniature: text has none of them."""


TIGHTER = 3
"""In how many ways a miniature may be made: as free as can be, hidden = heads x head_dim, a kv head for each head."""


def miniatures(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """A miniature for each set of sizes, as free as the model class lets them be.

    Raises:
        Exception: whatever the class raised in the last attempt.
    """
    for tight in range(TIGHTER):
        try:
            pair = miniature(config, 0, tight), miniature(config, 1, tight)
            for small in pair:
                build_on_meta(model_class, small)
        except Exception:  # a class may raise anything; whatever it is, it refused these sizes
            if tight == TIGHTER - 1:
                raise
        else:
            return pair
    raise AssertionError("unreachable")


def miniature(config: PreTrainedConfig, variant: int = 0, tight: int = 0) -> PreTrainedConfig:
    """A config of the same kind with one of the two sets of sizes, and one layer of every kind there is."""
    own = {name: value for path, node in nodes(config) for name, value in _fields_of(node, path, variant)}
    shrunk = resize(config, {}, None, **own) if own else config
    tight = max(tight, *(zoo.TIGHT.get(node.model_type, 0) for _, node in nodes(config)), 0)
    listed = {axis for axis, found in places(shrunk).items() if found[0].index is not None}
    opened = {a for a, size in sizes_of(shrunk).items() if sizes_of(config).get(a) in (None, size)} - listed
    fixed = {axis: size for axis, size in _fixed(shrunk, own) if axis not in opened}
    sizes = lengths(shrunk, SIZES[variant], fixed, tight)
    kept = {}
    for axis in layer_axes(shrunk):
        kinds = layer_kinds(shrunk, axis)
        layers = sorted({kinds.index(kind) for kind in kinds})
        again = layers[0 if _node_of(shrunk, axis).model_type in zoo.LED else -1]
        more = fixed.get(axis, _least_layers(shrunk, axis)) - len(layers)
        kept[axis] = sorted(layers + [again] * more)
        sizes[axis] = len(kept[axis])
    single = {name: value for name, value in own.items() if not isinstance(value, list | tuple | dict)}
    return resize(shrunk, sizes, kept, **single, **dict(_rotations(shrunk, sizes)))


def _rotations(config: PreTrainedConfig, sizes: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
    """Rotary parameters whose lists go by a head's pairs: sections (time, height, width), and longrope's factors."""
    for path, node in nodes(config):
        scope = scope_of(config, path)
        head_dim, rope = near(f"{scope}{HEADS}", HEAD_DIM, sizes), getattr(node, "rope_parameters", None)
        spelled = repr((rope, node.ignore_keys_at_rope_validation)) if rope else ""
        sections, factors = "mrope_section" in spelled, "short_factor" in spelled
        if head_dim is None or rope is None or not (sections or factors):
            continue
        rope = deepcopy(rope)
        for own in [own for own in rope.values() if isinstance(own, dict)] or [rope]:
            pairs = int(sizes[head_dim] * own.get("partial_rotary_factor", 1)) // 2
            if sections:
                own["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
            for name in {"short_factor", "long_factor"} & own.keys():
                own[name] = (own[name] * pairs)[:pairs]
        yield ".".join((*path, "rope_parameters")), rope


def _least_layers(config: PreTrainedConfig, axis: str) -> int:
    """Two in a stage, for its first may differ; else three, or as many as a backbone gives the features of."""
    if places(config)[axis][0].index is not None:
        return 2
    return max(3, len(getattr(_node_of(config, axis), "out_indices", None) or ()))


def _node_of(config: PreTrainedConfig, axis: str) -> PreTrainedConfig:
    """The config of the tree that an axis has its field in."""
    return next(node for path, node in nodes(config) if path == places(config)[axis][0].path)


def _fixed(config: PreTrainedConfig, own: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The sizes that a family's miniature cannot do without."""
    sizes = sizes_of(config)
    for axis, found in places(config).items():
        if any(".".join((*place.path, place.field)) in own for place in found):
            yield axis, sizes[axis]


def _fields_of(config: PreTrainedConfig, path: tuple[str, ...], variant: int) -> Iterator[tuple[str, Any]]:
    """Fields that a miniature needs although they are no axis, for one config of the tree."""
    before = "".join(f"{name}." for name in path)
    limits = {"num_experts_per_tok": 2, "rotary_dim": 4, "n_group": GROUPED, "topk_group": 2, "index_topk": 4}
    limits |= {"zero_expert_num": 3, "max_2d_position_embeddings": 30}
    limits |= {"mamba_chunk_size": 4, "chunk_size": 4, "use_cache": False}
    limits |= {
        "scale_decoder_outputs": False
    }  # by a number computed from the width, which widening must not change
    values = {name: vars(config).get(config.attribute_map.get(name, name)) for name in limits}
    fields = {name: min(value, limits[name]) for name, value in values.items() if isinstance(value, int)}
    fields |= _token_ids(config)
    fields |= _image_fields(config)
    if not path:
        fields["tie_word_embeddings"] = False  # apart, the table writes and the head reads
    for name, value in (fields | dict(zoo.FIELDS.get(config.model_type, {}))).items():
        name = config.attribute_map.get(name, name)
        if isinstance(value, zoo.Open):
            if getattr(config, name, None) is not None:
                continue
            value = value[0]
        value = value[variant] if isinstance(value, zoo.Each) else value(config) if callable(value) else value
        yield f"{before}{name}", value


SIDE = 64
"""Pixels a side of an image for nets that halve it stage by stage; others get four patches."""


def _image_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Small images, and few of them."""
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    staged = hasattr(config, "depths") or hasattr(config, "hidden_sizes")
    side = 4 * patch if isinstance(patch, int) and not staged else SIDE
    fields: dict[str, Any] = {}
    if isinstance(image := getattr(config, "image_size", None), int):
        fields["image_size"] = min(image, side)
    elif isinstance(image, list | tuple):
        fields["image_size"] = [min(v, side) for v in image]
    if isinstance(frames := getattr(config, "num_frames", None), int):
        fields["num_frames"] = min(frames, 4)
    return fields


_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def _token_ids(config: PreTrainedConfig) -> dict[str, Any]:
    """Every special token's id made small; equal names get equal ids, in whatever config of the tree."""
    ids: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")) and value is not None:
            number = _IDS.get(name, 3 + sum(map(ord, name)) % (RESERVED - 3))
            ids[name] = [number] if isinstance(value, list | tuple) else number
    return ids


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory: shapes and names only. What a class writes into its config (LeViT) stays there."""
    with torch.device("meta"), unfilled():
        return model_class(deepcopy(config))


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Modules of torch made here have the memory they find: for tensors without any, or that are written at once."""
    with contextlib.ExitStack() as stack:
        for name in ("kaiming_uniform_", "xavier_uniform_", "uniform_", "normal_", "trunc_normal_"):
            stack.enter_context(mock.patch.object(nn.init, name, _as_it_is))
        yield


def _as_it_is(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


def apart(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a head of its own where the class ties it in spite of its config: a table writes, a head reads."""
    head = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if isinstance(head, nn.Module) and len(names) > 1:
        head.weight = nn.Parameter(weight.detach().clone())
    return model


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a miniature's `forward` is called with: drawn from one seed, floats in float64."""
    if (own := zoo.INPUTS.get(model.config.model_type)) is not None:
        return dict(own(model))
    wanted = _parameters(type(model))
    if "input_ids" in wanted and not wanted.keys().isdisjoint(("pixel_values", "input_features")):
        both = dict(media.media_and_text(model))
        if "decoder_input_ids" in wanted and model.config.is_encoder_decoder:
            both.setdefault("decoder_input_ids", ids(model.config, seed=2))
        return both
    made: dict[str, Tensor] = {}
    if "input_ids" in wanted:
        made["input_ids"] = ids(model.config)
        if "attention_mask" in wanted:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        if "decoder_input_ids" in wanted and model.config.is_encoder_decoder:
            made["decoder_input_ids"] = ids(model.config, seed=2)
        elif "encoder_hidden_states" in wanted and (width := _read_width(model)):
            made["encoder_hidden_states"] = floats(2, 5, width)
    elif not wanted.keys().isdisjoint(("pixel_values", "pixel_values_videos", "grid_thw")):
        return vision.pictures(model)
    return made


def _parameters(model_class: type[PreTrainedModel]) -> Mapping[str, inspect.Parameter]:
    """What `forward` takes by name; a class that hands `*args` on takes what its parent takes."""
    forwards = [vars(base)["forward"] for base in model_class.__mro__ if "forward" in vars(base)]
    taken = [inspect.signature(forward).parameters for forward in forwards]
    plain = [own for own in taken if all(p.kind != p.VAR_POSITIONAL for p in own.values())]
    return (plain or taken)[0]


def _read_width(model: PreTrainedModel) -> int | None:
    """How wide the states are that a decoder on its own attends to; None where it attends to none."""
    keys = ("encoder_attn.k_proj.weight", "cross_attn.key_proj.weight")
    return next((p.shape[1] for name, p in model.named_parameters() if name.endswith(keys)), None)


def ids(config: PreTrainedConfig, seed: int = 1, length: int = 9) -> Tensor:
    """Token ids [2, length], none of them reserved."""
    sizes = sizes_of(config)
    vocab = sizes.get(VOCAB) or min(size for axis, size in sizes.items() if axis.endswith(VOCAB))
    return torch.randint(RESERVED, vocab, (2, length), generator=torch.Generator().manual_seed(seed))
