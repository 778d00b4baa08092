"""Fields of a config that repeat or follow others: data, by model type."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from hf_ws.widths import rule


class Whole(NamedTuple):
    """A function of the whole family's dict, for a field in one of its parts."""

    of: Callable[[dict[str, Any]], Any]


def _joined(v: dict[str, Any]) -> list[int]:
    """The channels of a first tower, of which the last are the stream of the second."""
    towers = v["vision_config"]
    return [*towers["sam_config"]["downsample_channels"][:-1], towers["encoder_config"]["hidden_size"]]


def _axial(widths: list[int], hidden: int) -> list[int]:
    """How wide the rows' part of a position is, and the columns': together as wide as the stream."""
    if sum(widths) == hidden:
        return widths
    shares = [max(1, hidden * width // sum(widths)) for width in widths]
    return [*shares[:-1], hidden - sum(shares[:-1])]


def _coordinate(v: dict[str, Any]) -> int:
    """How wide each of a box's four edges is: with height and width they are the stream."""
    edge: int = v["coordinate_size"]
    return round(v["hidden_size"] * edge / (4 * edge + 2 * v["shape_size"]))


_DETECTOR = ("geometry_encoder", "detr_encoder", "detr_decoder")


def _halving(v: dict[str, Any]) -> list[list[Any]]:
    """What stands between LeViT's stages: attention with so many heads of such a width."""
    (width, *_), own = v["key_dim"], v["hidden_sizes"][:-1]
    return [["Subsample", width, hidden // width, 4, 2, 2] for hidden in own]


FOLLOWERS: dict[tuple[str, str], str | Callable[[dict[str, Any]], Any] | Whole] = {
    **{
        (family, "vision_config.sam_config.downsample_channels"): Whole(_joined)
        for family in ("deepseek_ocr2", "unlimited_ocr")
    },
    ("clvp", "text_config.projection_dim"): "projection_dim",
    ("clvp", "speech_config.projection_dim"): "projection_dim",
    ("pp_formulanet", "vision_config.decoder_hidden_size"): "text_config.d_model",
    ("nemotron_h_omni", "vision_hidden_size"): "vision_config.hidden_size",
    ("granite4_vision", "qformer_config.hidden_size"): "vision_config.hidden_size",
    ("granite4_vision", "qformer_config.num_attention_heads"): Whole(
        lambda v: v["vision_config"]["hidden_size"] // 64
    ),
    ("hrm_text", "num_hidden_layers"): lambda v: (
        v["num_layers_per_stack"] * v["H_cycles"] * (v["L_cycles"] + 1)
    ),
    ("falcon", "num_kv_heads"): "num_attention_heads",
    **{(family, "attention_hidden_size"): lambda v: 2 * v["hidden_size"] for family in ("zamba", "zamba2")},
    ("longcat_flash", "qk_head_dim"): lambda v: v["qk_nope_head_dim"] + v["qk_rope_head_dim"],
    ("longcat_flash", "head_dim"): "qk_rope_head_dim",
    ("falcon_h1", "mamba_d_ssm"): lambda v: v["mamba_d_ssm"] and v["mamba_n_heads"] * v["mamba_d_head"],
    ("recurrent_gemma", "lru_width"): "hidden_size",
    ("pocket_tts", "flow_head_config.condition_dim"): "hidden_size",
    ("gradium_phonon_tts", "flow_head_config.condition_dim"): "hidden_size",
    ("dbrx", "ffn_config.hidden_size"): "d_model",
    ("t5gemma2", "decoder.hidden_size"): "encoder.text_config.hidden_size",
    ("t5gemma2", "decoder.vocab_size"): "encoder.text_config.vocab_size",
    ("t5gemma2", "vocab_size"): "encoder.text_config.vocab_size",
    ("blt", "vocab_size"): "encoder_config.vocab_size",
    ("blt", "decoder_config.vocab_size"): "encoder_config.vocab_size",
    ("blt", "decoder_config.hidden_size"): "encoder_config.hidden_size",
    ("blt", "encoder_config.hidden_size_global"): "global_config.hidden_size",
    ("blt", "decoder_config.hidden_size_global"): "global_config.hidden_size",
    ("xlstm", "embedding_dim"): "hidden_size",
    ("reformer", "axial_pos_embds_dim"): lambda v: _axial(v["axial_pos_embds_dim"], v["hidden_size"]),
    ("layoutlmv3", "coordinate_size"): lambda v: _coordinate(v),
    ("layoutlmv3", "shape_size"): lambda v: v["hidden_size"] // 2 - 2 * v["coordinate_size"],
    ("xlstm", "num_blocks"): "num_hidden_layers",
    ("mimi", "upsample_groups"): "hidden_size",
    ("mimi_decoder", "upsample_groups"): "hidden_size",
    ("pocket_tts_audio_tokenizer", "upsample_groups"): "hidden_size",
    ("encodec", "codebook_dim"): "hidden_size",
    ("nemotron3_5_transcribe_asr_audio", "num_key_value_heads"): "num_attention_heads",
    ("nemotron3_5_transcribe_word_timestamp", "num_key_value_heads"): "num_attention_heads",
    ("nemotron3_diarization_audio", "num_key_value_heads"): "num_attention_heads",
    ("gradium_phonon_tts", "num_key_value_heads"): "num_attention_heads",  # its file format has no groups
    ("musicflamingo", "head_dim"): "audio_config.hidden_size",
    ("moonshine_streaming", "num_key_value_heads"): "num_attention_heads",
    ("granite_speech5_ctc", "vocab_size"): "encoder_config.vocab_size",
    ("moonshine", "encoder_num_key_value_heads"): "encoder_num_attention_heads",
    ("moonshine", "decoder_num_key_value_heads"): "decoder_num_attention_heads",
    ("neucodec", "quantization_dim"): lambda v: v["hidden_size"] + v["semantic_model_config"]["hidden_size"],
    ("xcodec2", "quantization_dim"): lambda v: v["hidden_size"] + v["semantic_model_config"]["hidden_size"],
    ("granite_speech5_encoder", "num_key_value_heads"): "num_attention_heads",
    ("canary", "decoder_config.hidden_size"): "encoder_config.hidden_size",
    ("dia", "decoder_config.cross_hidden_size"): "encoder_config.hidden_size",
    ("fun_asr_nano", "adaptor_config.hidden_size"): "text_config.hidden_size",
    ("fun_asr_nano", "adaptor_config.intermediate_size"): lambda v: v["hidden_size"] // 4,
    ("vibevoice", "diffusion_head_config.hidden_size"): "text_config.hidden_size",
    ("voxtral", "audio_config.intermediate_size"): lambda v: 4 * v["hidden_size"],
    ("canary", "vocab_size"): "decoder_config.vocab_size",
    ("qwen3_asr", "audio_config.output_dim"): "text_config.hidden_size",
    ("qwen2_vl", "vision_config.hidden_size"): "text_config.hidden_size",
    ("qwen2_5_omni_thinker", "vision_config.out_hidden_size"): "text_config.hidden_size",
    ("qwen2_5_omni_thinker", "audio_config.output_dim"): "text_config.hidden_size",
    ("qwen3_omni_moe_thinker", "audio_config.output_dim"): "text_config.hidden_size",
    **{
        ("paligemma", own): "text_config.hidden_size"
        for own in ("projection_dim", "vision_config.projection_dim")
    },
    **{
        (family, "vision_config.hidden_size"): "text_config.hidden_size"
        for family in ("tipsv2", "videoprism")
    },
    ("sam_hq", "mask_decoder_config.vit_dim"): "vision_config.hidden_size",
    **{
        (family, part): "mask_decoder_config.hidden_size"
        for family, parts in (
            *(
                (family, ("vision_config.output_channels", "prompt_encoder_config.hidden_size"))
                for family in ("sam", "sam_hq")
            ),
            *(
                (family, ("vision_config.fpn_hidden_size", "prompt_encoder_config.hidden_size"))
                for family in ("sam2", "sam2_video", "sam3_tracker", "sam3_tracker_video")
            ),
            (
                "sam3",
                ("vision_config.fpn_hidden_size", *(f"{part}_config.hidden_size" for part in _DETECTOR)),
            ),
            (
                "sam3_lite_text",
                ("vision_config.fpn_hidden_size", *(f"{part}_config.hidden_size" for part in _DETECTOR)),
            ),
        )
        for part in parts
    },
    **{
        (family, "text_config.projection_size"): "vision_config.hidden_size"
        for family in ("siglip", "siglip2")
    },
    ("pocket_tts_audio_tokenizer_decoder", "upsample_groups"): "hidden_size",
    ("pix2struct", "vision_config.hidden_size"): "text_config.hidden_size",
    **{
        (family, "vision_config.num_pos_feats"): lambda v: v["output_channels"] // 2
        for family in ("sam", "sam_hq")
    },
    ("xcodec", "codebook_dim"): (
        lambda v: v["acoustic_model_config"]["hidden_size"] + v["semantic_model_config"]["hidden_size"]
    ),
    ("granite_speech", "projector_config.encoder_hidden_size"): "encoder_config.hidden_dim",
    ("granite_speech_plus", "projector_config.encoder_hidden_size"): "encoder_config.hidden_dim",
    **{
        (family, "vision_config.out_hidden_size"): "text_config.hidden_size"
        for family in (
            *(
                "cohere_compass",
                "cosmos3_omni",
                "exaone4_5",
                "glm46v",
                "glm4v",
                "glm4v_moe",
                "glm5_next",
                "glm_ocr",
            ),
            *(
                "glmga",
                "granite_docling",
                "hunyuan_vl",
                "qwen2_5_vl",
                "qwen3_5",
                "qwen3_5_moe",
                "qwen3_omni_moe_thinker",
            ),
            *("qwen3_vl", "qwen3_vl_moe", "qwen4_exp"),
        )
    },
    **{
        (family, f"{part}.text_hidden_size"): "text_config.hidden_size"
        for family, part in (
            *(("hunyuan_vl", "vision_config"), ("inkling2", "vision_config"), ("molmo2", "adapter_config")),
            *(("inkling_mm_model", "vision_config"), ("inkling_mm_model", "audio_config")),
        )
    },
    **{
        (family, "qformer_config.encoder_hidden_size"): "vision_config.hidden_size"
        for family in ("blip-2", "instructblip", "instructblipvideo", "granite4_vision")
    },
    ("molmo2", "adapter_config.hidden_size"): "vision_config.hidden_size",
    ("ovis2", "hidden_size"): "text_config.hidden_size",
    ("idefics2", "perceiver_config.hidden_size"): "text_config.hidden_size",
    ("janus", "vision_config.projection_dim"): "text_config.hidden_size",
    **{
        (family, "out_hidden_size"): lambda v: (
            v["vision_config"]["hidden_size"] * v["vision_config"]["merge_size"] ** 2
        )
        for family in ("muse_glimmer", "muse_spark")
    },
    ("llama4_vision_model", "intermediate_size"): lambda v: int(
        v["hidden_size"] // v["pixel_shuffle_ratio"] ** 2
    ),
    ("glmasr_encoder", "intermediate_size"): lambda v: 4 * v["hidden_size"],
    ("kimi_k25", "projection_hidden_size"): "vision_config.hidden_size",
    ("muse_spark_audio", "num_hidden_layers"): lambda v: len(v["hidden_sizes"]),  # its stages
    ("muse_spark", "audio_config.out_hidden_size"): "text_config.hidden_size",
    ("dots3_note", "vision_config.adapter_in_dim"): "vision_config.hidden_size",
    ("dots3_note", "vision_config.adapter_out_dim"): "text_config.hidden_size",
    ("dots3_note", "audio_config.adapter_input_size"): "audio_config.hidden_size",
    ("dots3_note", "audio_config.adapter_out_dim"): "text_config.hidden_size",
    ("nemotron3_diarization", "head_config.audio_hidden_size"): "audio_config.hidden_size",
    ("hgnet_v2", "hidden_sizes"): "stage_out_channels",
    ("hgnet_v2", "depths"): "stage_num_blocks",
    ("efficientnet", "hidden_dim"): lambda v: rule("efficientnet", "round_filters")(
        SimpleNamespace(**v), 1280
    ),
    ("hgnet_v2", "stage_in_channels"): lambda v: [v["stem_channels"][-1], *v["stage_out_channels"][:-1]],
    ("pp_doclayout_v3", "x4_feat_dim"): lambda v: v["backbone_config"]["stage_out_channels"][0],
    ("bridgetower", "vision_config.num_hidden_layers"): "text_config.num_hidden_layers",  # bridged one by one
    ("levit", "down_ops"): _halving,
    ("xclip", "vision_config.mit_hidden_size"): "projection_dim",
    ("groupvit_vision_model", "num_hidden_layers"): lambda v: sum(v["depths"]),
    ("textnet", "stem_out_channels"): lambda v: v["hidden_sizes"][0],
    ("sam2_hiera_det_model", "hidden_size"): lambda v: v["embed_dim_per_stage"][0],
    ("sam2_hiera_det_model", "num_attention_heads"): lambda v: v["num_attention_heads_per_stage"][0],
    ("sam2_vision_model", "backbone_channel_list"): lambda v: v["backbone_config"]["embed_dim_per_stage"][
        ::-1
    ],
    ("efficientloftr", "out_features"): lambda v: [*v["out_features"][:-1], v["hidden_size"]],
    **{
        (family, "encoder_in_channels"): lambda v: [*v["backbone_config"]["stage_out_channels"][1:]]
        for family in ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4")
    },
    **{
        (family, "encoder_in_channels"): lambda v: [*v["backbone_config"]["hidden_sizes"][1:]]
        for family in ("rt_detr", "rt_detr_v2")
    },
    **{
        (family, "decoder_in_channels"): lambda v: [v["encoder_hidden_dim"]] * len(v["decoder_in_channels"])
        for family in ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4", "rt_detr", "rt_detr_v2")
    },
}
"""Fields that repeat another, by family, and are no axis of their own; both may be in parts of that family's config.

Or follow from others: then a function of that config's dict.
"""
