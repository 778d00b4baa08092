"""Miniatures of multimodal models: see `hf_ws.layouts.zoo`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hf_ws.layouts.zoo.draw import Each, Open


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
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]],
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
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _TILES),
    "granite4_vision": _TILES
    | {
        "vision_config.hidden_size": Each(192, 320),  # heads of 64 in the Q-Former, which is as wide
        "vision_config.num_attention_heads": Each(12, 10),
        "text_config.num_hidden_layers": 8,  # one for each of the projectors
        "deepstack_layer_map": [[-2, 0], [-1, 1], [-2, 2], [-1, 3]],
        "spatial_target_layers": [4, 5, 6, 7],
    },
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
    "align": {
        "projection_dim": 82
    },  # the last width of the vision part, of which squeezes are fractions: stays
    "align_vision_model": {
        "width_coefficient": 1.0,
        "image_size": 64,
        "depth_divisor": 2,
        "in_channels": [32, 6, 4, 10, 12, 14, 16],
        "out_channels": [6, 4, 10, 12, 14, 16, 82],
    },
    "aria": {"projector_patch_to_query_dict": {16: 5}, "max_value_projector_patch_to_query_dict": 5},
    "muse_glimmer": {"projector_hidden_size": 52},
    "muse_spark": {"projector_hidden_size": 52},
    "muse_spark_text": {"moe_hidden_size": 44},
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
            "encoder_attention_heads": Each(12, 8),  # half of them, and half the neurons, see the text
            "decoder_attention_heads": Each(6, 10),
            "encoder_ffn_dim": Each(96, 112),
            "d_model": Each(192, 160),  # normed in 32 groups
        },
    ),
    "gemma3": {"mm_tokens_per_image": 4},
    "glm5_next_text": {"index_topk": 16},  # a multiple of what it pools
    "inkling_vision": {"patch_size": 8},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_id": 5},
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": Each(36, 30), "shape_size": Each(48, 24), "input_size": 64},
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
    "deepseek_vl_hybrid": {"text_config.hidden_size": 480},  # two towers give half of it each
    "nemotron_h_omni": {"image_token_id": Open(5), "audio_token_id": Open(6)},
    "clvp": {  # at least 32 channels of a head turn
        "text_config.hidden_size": Each(240, 432),
        "text_config.num_attention_heads": Each(6, 9),
        "speech_config.hidden_size": Each(200, 288),
        "speech_config.num_attention_heads": Each(5, 6),
    },
    "molmo2": {"image_patch_id": 5},
    "molmo2_vision": {"num_position_embeddings": 16},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "neomme": {"head_dim": Each(16, 32)},  # a quarter of it rotates in pairs of pairs
    "ovis2": {"visual_indicator_token_ids": [6, 7, 8, 9, 10], "vocab_size": 300},
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), {"vision_start_token_id": Open(7)}),
    **dict.fromkeys(("step3p5", "step3p7"), {"sliding_window": Open(4)}),
    "t5gemma2_text": {"dropout_rate": Open(0.0)},
    "tipsv2_vision_model": {"num_attention_heads": Each(10, 12)},  # as wide as the text
    "videoprism_vision_model": {"image_size": 36, "num_attention_heads": Each(10, 12)},  # so are these
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8},
    "vipllava": {"vision_feature_layers": [-2, -3, -1, 2, 1]},
}


TIGHT = dict.fromkeys(("pix2struct_text_model", "pix2struct_vision_model"), 1) | {"unlimited_ocr_text": 2}
