"""Miniatures of multimodal models: see `hf_ws.layouts.zoo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.layouts.zoo.draw import Each, Open, floats
from hf_ws.layouts.zoo.media import media_and_text, noise, words


def _rope_of_three(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary positions with the three sections that the model assumes where the config does not say."""
    return {"mrope_section": [24, 20, 20], **config.rope_parameters}


def _rope_by_kind(config: PreTrainedConfig) -> dict[str, Any]:
    one = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [24, 20, 20]}
    return {"full_attention": one, "sliding_attention": one} | config.rope_parameters


def _tiles(config: PreTrainedConfig) -> list[list[int]]:
    return [[4 * config.vision_config.patch_size] * 2]


_THREE = {"rope_parameters": _rope_of_three}
_TILES = {"image_grid_pinpoints": _tiles}
_WHOLE = {
    "hidden_size": Each(135, 150),
    "num_attention_heads": Each(15, 6),
    "num_key_value_heads": Each(5, 3),
}
"""The hidden size is a multiple of the heads although these have a width of their own."""
_QUERIES = {"num_query_tokens": 4, "image_token_id": 5}

_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [24, 20, 20]}

DEFAULTS: dict[str, dict[str, Any]] = {
    "aya_vision": {  # 14 heads do not divide its 1152 channels
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "num_attention_heads": 16,
        },
        "alignment_intermediate_size": 28672,
    },
    "cohere_compass": {
        "text_config": {
            "model_type": "cohere_compass_text",
            "rope_parameters": {"full_attention": _SECTIONS, "sliding_attention": _SECTIONS},
        }
    },
}

FIELDS: dict[str, dict[str, Any]] = {
    "aya_vision": {"alignment_intermediate_size": 64},  # halved by its gate: no axis
    "deepseek_vl_hybrid": {"text_config.hidden_size": 480},  # two towers give half of it each
    "chameleon": {"vocabulary_map": Open({"<image>": 5}), "image_token_id": 5},
    "emu3": {"vocabulary_map": Open({"<image>": 5, "<|extra_200|>": 6}), "image_token_id": 5},
    "deepseek_ocr2_text": {
        "mlp_layer_types": Open(["dense"] + ["sparse"] * 31),
        "num_experts_per_tok": Open(2),
        "n_group": Open(1),
        "topk_group": Open(1),
    },
    "diffusion_gemma_text": {
        "num_experts": Open(128),
        "top_k_experts": 2,
        "moe_intermediate_size": Open(704),
    },
    "hunyuan_vl_text": {
        "head_dim": Open(128),
        "rope_parameters": lambda c: {"mrope_section": [16, 16, 16, 16], **c.rope_parameters},
    },
    **dict.fromkeys(
        ("glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text", "paddleocr_vl_text"), _THREE
    ),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), _TILES),
    **dict.fromkeys(("gemma3_text", "muse_glimmer_text"), _WHOLE),
    **dict.fromkeys(  # where it is 2 they pool, as they first did, at the largest id
        ("clip_text_model", "clipseg_text_model", "groupvit_text_model", "xclip_text_model"),
        {"eos_token_id": 3},
    ),
    **dict.fromkeys(("blip-2", "instructblip"), _QUERIES),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), {"image_token_id": 5}),
    **dict.fromkeys(
        ("minicpmv4_6_vision", "minicpmv4_7_vision", "minicpm_ocr_vision"), {"insert_layer_id": 1}
    ),
    "align_vision_model": {
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "image_size": 64,
        "depth_divisor": 2,
        "in_channels": [32, 6, 4, 10, 12, 14, 16],
        "num_block_repeats": [1] * 7,
        "out_channels": Each(
            [6, 4, 10, 12, 14, 16, 82], [6, 4, 10, 12, 14, 16, 76]
        ),  # as wide as the projection
    },
    "aria": {"projector_patch_to_query_dict": {16: 5}, "max_value_projector_patch_to_query_dict": 5},
    "cohere_compass_text": {"rope_parameters": _rope_by_kind},
    "ernie4_5_vl_moe_text": {  # height and width get the same share of a head
        "hidden_size": Each(240, 180),
        "num_attention_heads": Each(10, 15),
        "num_key_value_heads": Each(5, 3),
        **_THREE,
    },
    **dict.fromkeys(
        ("grounding-dino", "mm-grounding-dino"),
        {
            "num_queries": 7,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": Each(80, 96),
            "d_model": 64,  # normed in 32 groups
        },
    ),
    "gemma3": {"mm_tokens_per_image": 4},
    "glm5_next_text": {"index_topk": 16},  # a multiple of what it pools
    "inkling_vision": {"patch_size": 8},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_id": 5},
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": Each(40, 28), "shape_size": Each(40, 28), "input_size": 64},
    "llama4_vision_model": {
        "projector_input_dim": 52,
        "projector_output_dim": 52,
        "vision_output_dim": 52,
    },
    "mllama_vision_model": {
        "intermediate_layers_indices": [0, 1],
        "num_global_layers": 2,
        "vision_output_dim": Each(432, 720),  # the last layer's hidden size and those of the two in between
    },
    "molmo2": {"image_patch_id": 5},
    "molmo2_vision": {"num_position_embeddings": 16},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "neomme": {"head_dim": Each(16, 32)},  # a quarter of it rotates in pairs of pairs
    "ovis2": {"visual_indicator_token_ids": [6, 7, 8, 9, 10]},
    "perceiver": {
        "d_latents": 96,
        "d_model": Each(144, 176),
        "num_latents": 6,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 8,
    },
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), {"vision_start_token_id": Open(7)}),
    **dict.fromkeys(("step3p5", "step3p7"), {"sliding_window": Open(4)}),
    "t5gemma2_text": {"dropout_rate": Open(0.0)},
    "tipsv2_vision_model": {"num_attention_heads": Each(10, 12)},  # as wide as the text
    "videoprism_vision_model": {"image_size": 36, "num_attention_heads": Each(10, 12)},  # so are these
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8},
    "vipllava": {"vision_feature_layers": [-2, -3, -1, 2, 1]},
}


TIGHT = dict.fromkeys(("pix2struct_text_model", "pix2struct_vision_model"), 1)


def _patches(model: PreTrainedModel) -> dict[str, Tensor]:
    """Fuyu takes an image as the rows of its patches."""
    config = model.config
    return media_and_text(model, pixel_values=noise(2, 4, config.num_channels * config.patch_size**2))


def _square_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    patch = model.config.vision_config.patch_size
    return media_and_text(model, pixel_values=noise(32, 3, patch, patch))


def _two_resolutions(model: PreTrainedModel) -> dict[str, Tensor]:
    side = model.config.high_res_vision_config.image_size
    return media_and_text(model, high_res_pixel_values=noise(2, 3, side, side))


def _question(model: PreTrainedModel) -> dict[str, Tensor]:
    """A question to the Q-Former besides the text."""
    config, many = model.config, model.config.num_query_tokens
    side, video = config.vision_config.image_size, config.model_type == "instructblipvideo"
    question = words(config.qformer_config, [])
    asked = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    made = media_and_text(model, pixel_values=noise(2, *([2] if video else []), 3, side, side), **asked)
    made["input_ids"] = words(config, [(5, 2 * many if video else many)])
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    return made


def _queries(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    return {
        "query_embeds": noise(2, 4, config.hidden_size),
        "encoder_hidden_states": noise(2, 5, config.encoder_hidden_size, seed=2),
    }


def _tiled(model: PreTrainedModel) -> dict[str, Tensor]:
    """Mllama: the text attends to tiles of an image."""
    node = model.config.vision_config
    tiles = node.max_num_tiles
    made = media_and_text(
        model,
        pixel_values=noise(2, 1, tiles, node.num_channels, node.image_size, node.image_size),
        aspect_ratio_ids=torch.tensor([[1], [2]]),
        aspect_ratio_mask=torch.ones(2, 1, tiles, dtype=torch.long),
    )
    made["cross_attention_mask"] = torch.ones(*made["input_ids"].shape, 1, tiles, dtype=torch.long)
    return made


def _trajectory(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    return {
        "states": noise(2, 5, config.state_dim),
        "actions": noise(2, 5, config.act_dim, seed=2),
        "rewards": noise(2, 5, 1, seed=3),
        "returns_to_go": noise(2, 5, 1, seed=4),
        "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5),
    }


def _places_in_text(model: PreTrainedModel) -> dict[str, Tensor]:
    """Kosmos-2 marks the places of the image's features."""
    made = media_and_text(model)
    mask = torch.zeros_like(made["input_ids"])
    mask[:, 1 : 1 + model.config.latent_query_num] = 1
    return made | {"image_embeds_position_mask": mask}


def _page(model: PreTrainedModel) -> dict[str, Tensor]:
    """Words with their boxes on a page, and the page."""
    side = model.config.input_size
    made = media_and_text(model, pixel_values=noise(2, 3, side, side))
    corner = torch.arange(made["input_ids"].shape[1]).repeat(2, 1)
    return made | {"bbox": torch.stack([corner, corner + 1, corner + 3, corner + 2], dim=-1)}


def _merged_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inkling 2 takes pixels channels last, so many patches a side at once."""
    node = model.config.vision_config
    side = node.spatial_merge_size * node.patch_size
    return media_and_text(model, pixel_values=noise(32, side, side, node.num_channels))


def _one_row(model: PreTrainedModel) -> dict[str, Tensor]:
    """MiniCPM-V lays the patches of all images in a row."""
    patch = model.config.vision_config.patch_size
    return media_and_text(
        model, pixel_values=noise(1, 3, patch, 32 * patch), target_sizes=torch.tensor([[4, 4]] * 2)
    )


def _flat_patches(model: PreTrainedModel) -> dict[str, Tensor]:
    return media_and_text(model, pixel_values=noise(8, 3 * model.config.patch_size**2))


def _several(model: PreTrainedModel) -> dict[str, Tensor]:
    """Idefics: each word says which of the images it sees."""
    side = model.config.vision_config.image_size
    made = media_and_text(model, pixel_values=noise(2, 1, 3, side, side))
    return made | {"image_attention_mask": torch.ones(*made["input_ids"].shape, 1, dtype=torch.long)}


def _pooled(model: PreTrainedModel) -> dict[str, Tensor]:
    """Molmo 2: which four patches make a word, for an image and for no tiles of it."""
    node = model.config.vision_config
    pixels = noise(2, 1, 16, 3 * node.patch_size**2)
    corners = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    return media_and_text(
        model,
        pixel_values=pixels,
        image_token_pooling=torch.cat([corners, 16 + corners]),
        image_grids=torch.tensor([[2, 2, 0, 0]] * 2),
        image_num_crops=torch.ones(2, dtype=torch.long),
    )


def _rows_and_columns(model: PreTrainedModel) -> dict[str, Tensor]:
    """Pix2Struct's patches say first in which row and column they stand."""
    node = model.config.vision_config
    at = torch.stack([torch.arange(9) // 3 + 1, torch.arange(9) % 3 + 1], dim=-1).repeat(2, 1, 1)
    made = torch.cat([at.double(), noise(2, 9, node.patch_embed_hidden_size)], dim=-1)
    return {"flattened_patches": made, "decoder_input_ids": words(model.config, [])}


def _tiles_of_pages(model: PreTrainedModel) -> dict[str, Tensor]:
    """Granite Docling: one tile of each page, none of it padding."""
    side = model.config.vision_config.image_size
    mask = torch.ones(2, 1, dtype=torch.bool)
    return media_and_text(model, pixel_values=noise(2, 1, 3, side, side), pixel_attention_mask=mask)


def _captioned(model: PreTrainedModel) -> dict[str, Tensor]:
    """A vision encoder and a text decoder, each of its own family."""
    node = model.config.encoder
    return {
        "pixel_values": noise(2, node.num_channels, node.image_size, node.image_size),
        "decoder_input_ids": words(model.config, []),
    }


def _boxed(model: PreTrainedModel) -> dict[str, Tensor]:
    """UDOP: where each word stands in the picture, between zero and one."""
    side, text = model.config.image_size, words(model.config, [])
    boxes = floats(*text.shape, 4).sigmoid().sort(dim=-1).values
    return {
        "input_ids": text,
        "bbox": boxes,
        "pixel_values": noise(2, 3, side, side),
        "decoder_input_ids": text,
    }


def _film(model: PreTrainedModel) -> dict[str, Tensor]:
    """TVP: a film and what to look for in it; it does not bear two."""
    side = model.config.max_img_size
    return {
        "input_ids": words(model.config, [])[:1],
        "pixel_values": noise(1, model.config.num_frames, 3, side, side),
    }


def _captioned_film(model: PreTrainedModel) -> dict[str, Tensor]:
    node = model.config.vision_config
    film = noise(2, node.num_frames, 3, node.image_size, node.image_size)
    return {"input_ids": words(model.config, []), "pixel_values_videos": film}


def _merged_by_image(model: PreTrainedModel) -> dict[str, Tensor]:
    """VideoLLaMA 3: each image says how many of its patches go together."""
    return media_and_text(model, image_merge_sizes=torch.tensor([2, 2]))


def _encoded_image(model: PreTrainedModel) -> dict[str, Tensor]:
    """T5Gemma 2: the encoder sees the image, of which its config says how many tokens it becomes."""
    node = model.config.encoder
    side, text = (
        node.vision_config.image_size,
        words(model.config, [(node.image_token_id, node.mm_tokens_per_image)]),
    )
    return {
        "input_ids": text,
        "pixel_values": noise(2, 3, side, side),
        "decoder_input_ids": words(model.config, []),
    }


def _array(model: PreTrainedModel) -> dict[str, Tensor]:
    """Perceiver: numbers that no preprocessor has seen."""
    return {"inputs": noise(2, 9, model.config.d_model)}


def _one_sound(model: PreTrainedModel) -> dict[str, Tensor]:
    """Qwen2 Audio puts a sound in the place of one token."""
    made = media_and_text(model)
    made["input_ids"] = words(model.config, [(model.config.audio_token_id, 1)])
    return made | {"attention_mask": torch.ones_like(made["input_ids"])}


def _text(model: PreTrainedModel) -> dict[str, Tensor]:
    """Text alone: the images' codes would go by names in the vocabulary."""
    made = words(model.config, [])
    return {"input_ids": made, "attention_mask": torch.ones_like(made)}


INPUTS: dict[str, Callable[[PreTrainedModel], Mapping[str, Tensor]]] = {
    "neomme": _flat_patches,
    **dict.fromkeys(("chameleon", "emu3"), _text),
    "paddleocr_vl": _square_patches,
    "perceiver": _array,
    "qwen2_audio": _one_sound,
    "t5gemma2": _encoded_image,
    "tvp": _film,
    "udop": _boxed,
    "video_llama_3": _merged_by_image,
    "videoprism": _captioned_film,
    "blip_2_qformer": _queries,
    "decision_transformer": _trajectory,
    "deepseek_vl_hybrid": _two_resolutions,
    "fuyu": _patches,
    "idefics": _several,
    "inkling2": _merged_patches,
    "instructblip": _question,
    "instructblipvideo": _question,
    "kimi_k25": _square_patches,
    "kosmos-2": _places_in_text,
    "layoutlmv3": _page,
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), _one_row),
    "mllama": _tiled,
    "molmo2": _pooled,
    "pix2struct": _rows_and_columns,
    "granite_docling": _tiles_of_pages,
    "vision-encoder-decoder": _captioned,
}
