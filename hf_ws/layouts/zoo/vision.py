"""Miniatures of vision models: see `hf_ws.layouts.zoo`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.layouts.zoo.draw import Each, floats, ids

SIDE = 64
"""Pixels a side where no config says it."""

GRID = 4
"""Patches a side where images come cut into patches."""

_WIDE = Each(192, 160)
_DECODER = {"hidden_size": _WIDE, "num_attention_heads": Each(6, 10)}  # an eighth of the width counts as well
_MASKS = {"num_queries": 7, "num_attention_heads": Each(6, 10), "hidden_dim": _WIDE}


def _all_stages(count: int) -> dict[str, Any]:
    """A backbone that gives the features of every stage, as the model above it wants."""
    return {"backbone_config.out_features": None, "backbone_config.out_indices": [*range(1, count + 1)]}


def _square_strides(config: PreTrainedConfig) -> list[Any]:
    """Blocks that halve the height halve the width too: the default is for lines of text."""
    stages = config.backbone_config.block_configs
    square = [[[k, i, o, 1 if s == 1 else 2, *more] for k, i, o, s, *more in own] for own in stages]
    for stage in square[1:]:
        stage[0][3] = 2
    return square


_RATIOS = {"longratio": 7, "midratio": 5, "shortratio": 3}

_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{f"vertical_long_to_small_conv_{name}": [[k, 1], 1, [k // 2, 0]] for name, k in _RATIOS.items()},
    **{f"horizontal_small_to_long_conv_{name}": [[1, k], 1, [0, k // 2]] for name, k in _RATIOS.items()},
    **{f"symmetric_conv_long_{name}": [[k, k], 1, [k // 2, k // 2]] for name, k in _RATIOS.items()},
}
"""Kernels, strides and paddings: the class has none by default."""


_GROUPS = {
    "num_queries": 7,
    "d_model": Each(240, 288),
    "hidden_expansion": 0.4,  # or twice what comes of it would be as wide as the stream
    "decoder_self_attention_heads": Each(12, 18),
    "decoder_cross_attention_heads": Each(10, 9),
}

DEFAULTS: dict[str, dict[str, Any]] = {
    name: {"backbone_config": {"model_type": "resnet", "out_features": list(stages)}}
    for name, stages in (
        ("conditional_detr", ["stage4"]),
        ("dab-detr", ["stage4"]),
        ("deformable_detr", ["stage2", "stage3", "stage4"]),
        ("detr", ["stage4"]),
        ("table-transformer", ["stage4"]),
    )
} | {"lw_detr": {"projector_scale_factors": [1.0]}}
"""A backbone of Transformers' own in the place of one from timm, which need not be installed; a scale to look at."""

FIELDS: dict[str, dict[str, Any]] = {
    "mgp-str": {"num_bpe_labels": 61, "num_wordpiece_labels": 67},
    **{
        name: {"window_size": 2}  # the last stage is no smaller
        for name in ("donut-swin", "maskformer-swin", "swin", "swinv2")
    },
    **{name: {"num_queries": 7} for name in ("conditional_detr", "dab-detr", "detr", "table-transformer")},
    "deformable_detr": {
        "num_queries": 7,
        "d_model": Each(192, 160),  # a GroupNorm of 32 groups
        "encoder_attention_heads": Each(6, 10),
        "decoder_attention_heads": Each(12, 8),
    },
    **{
        name: {"num_queries": 7}
        for name in ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4", "rt_detr", "rt_detr_v2")
    },
    "lw_detr": _GROUPS,
    "rf_detr": _GROUPS,
    # a GroupNorm of 32 groups over each width
    "mask2former": _MASKS | {"feature_size": _WIDE, "mask_feature_size": _WIDE},
    "oneformer": _MASKS
    | {
        "conv_dim": _WIDE,
        "mask_dim": _WIDE,
        "task_seq_len": 9,
        "text_encoder_context_length": 9,
    },
    "swin2sr": {"window_size": 4, "image_size": 8},
    # a GroupNorm over widths that are rounded to eights
    "bit": {"num_groups": 2, "hidden_sizes": Each([96, 160, 224, 288], [128, 192, 256, 352])},
    # a first stage as wide as the stem has a branch that needs this
    "textnet": {"hidden_sizes": Each([40, 40, 56, 72, 88], [48, 48, 64, 84, 104])},
    "regnet": {"groups_width": 6, "hidden_sizes": Each([42, 66, 78, 102], [30, 54, 90, 114])},
    **dict.fromkeys(
        ("resnet", "rt_detr_resnet"),
        {"hidden_sizes": Each([96, 160, 224, 288], [128, 192, 256, 352])},  # a quarter of each counts as well
    ),
    "cvt": {"depth": [2, 2, 3]},  # the last stage needs as many as there are stages
    # all widths follow one number: here one at which no two of them are the same, or one twice another
    "efficientnet": {
        "width_coefficient": Each(0.53, 0.71),
        "depth_divisor": 1,
        "squeeze_expansion_ratio": 0.3,
    },
    "mobilenet_v1": {"depth_multiplier": Each(0.27, 0.35), "min_depth": 1},
    "mobilenet_v2": {
        "depth_multiplier": Each(0.53, 0.71),
        "depth_divisible_by": 1,
        "min_depth": 1,
        "finegrained_output": False,
    },
    "pp_lcnet": {"scale": Each(0.53, 0.71), "divisor": 1, "reduction": 3},
    "mobilevit": {
        "image_size": 128,  # several patches in the last stage
        # four times these is rounded to eights
        "neck_hidden_sizes": Each([16, 32, 48, 64, 80, 96, 160], [24, 40, 56, 88, 104, 120, 200]),
    },
    "mobilevitv2": {
        "image_size": 128,
        "width_multiplier": Each(0.95, 0.35),
        "base_attn_unit_dims": Each([72, 104, 168], [168, 232, 340]),
        "expand_ratio": 3.0,
    },
    "hgnet_v2": {"stem_channels": Each([3, 20, 28], [3, 36, 52])},
    "xclip": {"projection_dim": Each(96, 120), "prompt_num_attention_heads": Each(6, 10)},
    "xclip_vision_model": {"mit_num_attention_heads": Each(12, 8)},
    "bridgetower": {"num_hidden_layers": 2},  # of its bridge; its towers have one more at least
    "bridgetower_vision_model": {"hidden_size": Each(192, 320)},  # heads of 64
    "levit": {
        # not what the heads are wide that halve the picture, which are as many as fit
        "hidden_sizes": Each([128, 200, 165], [176, 312, 171]),
        "key_dim": Each([24, 16, 32], [28, 16, 40]),
    },
    "sam2_hiera_det_model": {"blocks_per_stage": lambda config: config.blocks_per_stage},  # numbered through
    **dict.fromkeys(
        ("sam2_vision_model", "sam3_vision_model"),
        {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    ),
    **dict.fromkeys(
        ("sam_mask_decoder", "sam_hq_mask_decoder", "sam2_mask_decoder"),
        _DECODER,
    ),
    # an MLP has as many layers as there are such layers, of which the first and the last have names of their own
    "sam3_tracker_mask_decoder": _DECODER | {"num_hidden_layers": 2},
    "swiftformer": {"depths": [3, 3, 3, 3]},  # the last of each is of another kind
    "seggpt": {"image_size": [128, 64], "pretrain_image_size": 64, "merge_index": 0},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4},
    "vivit": {"num_frames": 4},
    "pp_ocrv6_small_det": _all_stages(4)
    | {
        "layer_list_out_channels": [96, 96, 192, 384],
        "backbone_config.block_configs": _square_strides,
    },
    "pp_ocrv6_medium_det": _all_stages(4)
    | {
        "backbone_config.block_configs": _square_strides,
        "kernel_list": [3, 2, 2],
        "scale_factor_list": [1, 2, 4, 8],
        "intraclass_block_config": _INTRACLASS,
    },
    "perceiver": {
        "image_size": 8,
        "num_latents": 11,
        "d_latents": Each(160, 192),
        "num_self_attention_heads": Each(5, 8),
        "d_model": Each(136, 144),  # the decoder has eight heads
        "num_cross_attention_heads": Each(4, 6),
    },
    "uvdoc": _all_stages(6),
    "lw_detr_vit": {"image_size": 128},  # several patches in a window
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 30, "no_token_index": 31},
    "dinov3_vit": {"num_register_tokens": 4},
    "efficientloftr": {
        "coarse_matching_threshold": 0.0,
        "coarse_matching_border_removal": 0,
        "rope_parameters.partial_rotary_factor": Each(7.5, 3.0),  # half the number of heads
    },
    "inkling2_vision": {"patch_size": 4},
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 32},
}


def pictures(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two images, or two films, in the form that a model without text wants them in."""
    wanted = inspect.signature(model.forward).parameters
    node = picture_config(model.config)
    channels = _first(node, "num_channels", "in_channels", "in_chans") or 3
    patch = _side(_first(node, "patch_size") or 4)
    if not wanted.keys().isdisjoint(("grid_thw", "image_grid_thw")):
        depth = _first(node, "temporal_patch_size", "patch_temporal") or 1
        made = {
            "pixel_values": floats(2 * GRID * GRID, channels * depth * patch * patch),
            "grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
            "merge_sizes": torch.tensor([2, 1]),
        }
        made |= {"hidden_states": made["pixel_values"], "image_grid_thw": made["grid_thw"]}
    elif "spatial_shapes" in wanted:
        made = {
            "pixel_values": floats(2, GRID * GRID, channels * patch * patch),
            "pixel_attention_mask": torch.ones(2, GRID * GRID, dtype=torch.long),
            "spatial_shapes": torch.tensor([[GRID, GRID]] * 2),
        }
    else:
        made = _whole_pictures(node, channels, patch)
        if not any(name.endswith("mask_token") for name, _ in model.named_parameters()):
            made.pop("bool_masked_pos" if "num_frames" not in vars(node) else "", None)
    return {name: value for name, value in made.items() if name in wanted}


def _whole_pictures(node: PreTrainedConfig, channels: int, patch: int) -> dict[str, Tensor]:
    size = _first(node, "image_size", "crop_size") or SIDE
    height, width = (size, size) if isinstance(size, int) else size
    frames = _first(node, "num_frames", "frames_per_clip")
    made = {"pixel_values": floats(2, channels, height, width)}
    if frames is not None:
        made["pixel_values"] = made["pixel_values_videos"] = floats(2, frames, channels, height, width)
    count = (height // patch) * (width // patch)
    if frames is not None:
        count *= frames // _side(_first(node, "tubelet_size") or 1)
    made["bool_masked_pos"] = (torch.arange(count) % 3 == 0).expand(2, count)
    made["target_sizes"] = torch.tensor([[height // patch, width // patch]] * 2)
    return made


def picture_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the tree that says what an image is like."""
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]
    names = ("image_size", "crop_size", "patch_size", "num_channels")
    return next((part for name in names for part in parts if getattr(part, name, None) is not None), config)


def _first(config: PreTrainedConfig, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _side(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _pairs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two pairs of pictures."""
    return {"pixel_values": floats(2, 2, 3, SIDE, SIDE)}


def _line(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two pictures of a line of text."""
    return {"pixel_values": floats(2, 3, 96, 96)}


def _prompted(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two pictures, and a picture and its segmentation that show what is asked for."""
    height, width = model.config.image_size[0] // 2, model.config.image_size[1]
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: floats(2, 3, height, width, seed=at) for at, name in enumerate(names)}


def _single_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two pictures cut into patches that keep their two dimensions."""
    side = _side(model.config.patch_size)
    grid = torch.tensor([[1, GRID, GRID]] * 2)
    return {"pixel_values": floats(2 * GRID * GRID, 3, side, side), "grid_thw": grid}


def _merged_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two pictures cut into squares of several patches."""
    side = _side(model.config.patch_size)
    side *= model.config.spatial_merge_size
    pixels = floats(2 * GRID * GRID, side, side, 3)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, GRID, GRID]] * 2)}


def _strip(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two pictures whose patches lie one after the other in one strip."""
    side = _side(model.config.patch_size)
    strip = floats(1, 3, side, 2 * GRID * GRID * side)
    return {"pixel_values": strip, "target_sizes": torch.tensor([[GRID, GRID]] * 2)}


def _placed_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two pictures in patches, and where each patch lies."""
    side = _side(model.config.patch_size)
    at = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
    pixels = floats(2, GRID * GRID, 3 * side * side)
    return {"pixel_values": pixels, "pixel_position_ids": at.expand(2, -1, -1)}


def _asked(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two pictures and the task in words."""
    tokens = ids(model.config.text_encoder_vocab_size, 2, model.config.task_seq_len)
    return pictures(model) | {"task_inputs": tokens.double()}


def _named_films(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two films, and what may happen in them in words."""
    films, frames = model.config.vision_config, model.config.vision_config.num_frames
    pixels = floats(2, frames, 3, films.image_size, films.image_size)
    return {"input_ids": ids(model.config.text_config.vocab_size, 3, 9), "pixel_values": pixels}


def _perceived(model: PreTrainedModel) -> dict[str, Tensor]:
    """Pictures, text or numbers: what a Perceiver takes depends on its preprocessor."""
    wanted, config = inspect.signature(model.forward).parameters, model.config
    if "pixel_values" in wanted:
        return {"pixel_values": floats(2, 3, config.image_size, config.image_size)}
    if "input_ids" in wanted:
        return {"input_ids": ids(config.vocab_size)}
    return {"inputs": floats(2, 9, config.d_model)}


INPUTS: dict[str, Callable[[PreTrainedModel], Mapping[str, Tensor]]] = {
    "efficientloftr": _pairs,
    "lightglue": _pairs,
    "xclip": _named_films,
    "perceiver": _perceived,
    "seggpt": _prompted,
    "kimi_k25_vision": _single_patches,
    "inkling2_vision": _merged_patches,
    "minicpm_ocr_vision": _strip,
    "minicpmv4_7_vision": _strip,
    "gemma4_vision": _placed_patches,
    "oneformer": _asked,
    "pp_ocrv5_mobile_rec": _line,
    "pp_ocrv5_server_rec": _line,
    "pp_ocrv6_small_rec": _line,
    "pp_ocrv6_tiny_rec": _line,
}
