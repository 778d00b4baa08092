"""How config classes spell the sizes of their axes, and what they compute of them: data for `hf_ws.sizes`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from transformers import PreTrainedConfig as Config
from transformers.models.xlstm.configuration_xlstm import round_up_to_next_multiple_of

from hf_ws.axes import (
    EMBEDDING,
    EXPERTS,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    KV_RANK,
    LABELS,
    LAYERS,
    MOE_FFN,
    NOPE_DIM,
    POSITIONS,
    PROJECTION,
    Q_RANK,
    RANK,
    ROPE_DIM,
    SHARED_FFN,
    STATE,
    UNIT,
    V_DIM,
    VOCAB,
    WAVES,
)
from hf_ws.widths import BOX_SINES, WIDTHS, listed

FIELDS: dict[str, tuple[str, ...]] = {
    HIDDEN: (
        "hidden_size",
        "n_embd",
        "d_model",
        "dim",
        "embed_dim",
        "emb_dim",
        "hidden_sizes",
        "embed_dims",
        "stage_out_channels",
        "embed_dim_per_stage",
        "descriptor_dim",
        "pooler_output_size",
    ),
    LAYERS: (
        "num_layers_per_stack",
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "depth",
        "stage_num_blocks",
        "depths",
        "block_sizes",
        "blocks_per_stage",
        "layers",
        "resampler_depth",
        "conf_num_hidden_layers",
    ),
    HEADS: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "attention_heads",
        "num_attention_heads_per_stage",
        "conf_num_attention_heads",
        "resampler_n_heads",
        "o_groups",
        "num_cross_attention_heads",
    ),
    KV_HEADS: ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_groups"),
    HEAD_DIM: (
        "head_dim",
        "d_kv",
        "attention_head_dim",
        "d_head",
        "dim_head",
        "attention_head_size",
        "resampler_head_dim",
        "kv_channels",
    ),
    FFN: (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "d_ff",
        "dff",
        "mlp_dim",
        "hidden_dim",
        "d_inner",
        "dim_ff",
        "feed_forward_size",
        "dim_feedforward",
        "stage_mid_channels",
    ),
    MOE_FFN: ("moe_intermediate_size", "expert_ffn_hidden_size"),
    SHARED_FFN: ("shared_expert_intermediate_size", "shared_intermediate_size"),
    INNER: ("attention_hidden_size", "ple_embed_dim"),
    EXPERTS: ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    STATE: ("state_size", "mamba_d_state", "ssm_state_size"),
    RANK: ("time_step_rank", "mamba_dt_rank"),
    Q_RANK: ("q_lora_rank",),
    KV_RANK: ("kv_lora_rank",),
    ROPE_DIM: ("qk_rope_head_dim",),
    NOPE_DIM: ("qk_nope_head_dim",),
    V_DIM: ("v_head_dim",),
    VOCAB: ("vocab_size", "tgt_vocab_size"),
    POSITIONS: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"),
    EMBEDDING: ("embedding_size", "word_embed_proj_dim"),
    PROJECTION: ("projection_dim",),
    LABELS: ("num_labels",),
    "encoder.layers": ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"),
    "decoder.layers": ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
    "encoder.heads": (
        "encoder_attention_heads",
        "encoder_num_attention_heads",
        "num_encoder_attention_heads",
    ),
    "decoder.heads": (
        "decoder_attention_heads",
        "decoder_num_attention_heads",
        "num_decoder_attention_heads",
        "decoder_self_attention_heads",
    ),
    "encoder.kv_heads": ("encoder_num_key_value_heads",),
    "decoder.kv_heads": ("decoder_num_key_value_heads",),
    "encoder.ffn": ("encoder_ffn_dim", "encoder_intermediate_size", "encoder_feedforward_dim"),
    "decoder.ffn": ("decoder_ffn_dim", "decoder_intermediate_size"),
    "encoder.hidden": ("encoder_hidden_dim",),
    "decoder.hidden": ("decoder_hidden_size",),
    "cross_attn.heads": ("decoder_cross_attention_heads",),
    "mamba.heads": ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    "mamba.head_dim": ("mamba_d_head", "mamba_head_dim", "mamba_headdim"),
    "linear.heads": ("linear_num_value_heads", "linear_num_heads"),
    "linear.kv_heads": ("linear_num_key_heads",),
    "linear.head_dim": ("linear_key_head_dim", "linear_head_dim"),
    "linear.v_dim": ("linear_value_head_dim",),
    "swa.heads": ("swa_num_attention_heads",),
    "swa.kv_heads": ("swa_num_key_value_heads",),
    "swa.head_dim": ("swa_head_dim",),
    "mamba.kv_heads": (
        "mamba_n_groups",
        "mamba_ngroups",
        "n_groups",
    ),  # heads of a group share its B and C as others share k, v
    "dense.ffn": ("intermediate_size_mlp",),
    "encoder.vocab": ("src_vocab_size",),
    "shape.vocab": ("shape_vocab_size",),
    "shape.embedding": ("shape_embed_dim",),
    "pronunciation.vocab": ("pronunciation_vocab_size",),
    "pronunciation.embedding": ("pronunciation_embed_dim",),
    "visual.embedding": ("visual_embedding_dim", "visual_feat_dim"),
    "language.layers": ("l_layers",),
    "vision.layers": ("r_layers",),
    "cross.layers": ("x_layers",),
    "mit.layers": ("mit_num_hidden_layers",),
    "mit.heads": ("mit_num_attention_heads",),
    "mit.ffn": ("mit_intermediate_size",),
    "spatial.layers": ("num_spatial_layers",),
    "temporal.layers": ("num_temporal_layers",),
    "auxiliary.layers": ("num_auxiliary_layers",),
    "per_layer.hidden": ("hidden_size_per_layer_input",),
    "per_layer.vocab": ("vocab_size_per_layer_input",),
    "entity.vocab": ("entity_vocab_size",),
    "entity.embedding": ("entity_emb_size",),
    "neck.hidden": ("neck_hidden_sizes",),
    "index.heads": ("index_n_heads", "indexer_n_heads"),
    "index.head_dim": ("index_head_dim", "indexer_head_dim"),
    "decoder.positions": ("max_target_positions",),
    "stem.embedding": ("stem_channels",),
    "head.ffn": ("class_expand",),
    "latents.hidden": ("d_latents",),
    "latents.heads": ("num_self_attention_heads",),
    "latents.layers": ("num_self_attends_per_block",),
}
"""How config classes spell each axis. Of several names in one config the first counts; the others follow it."""

BY_MODALITY = frozenset({("ernie4_5_vl_moe_text", "moe_intermediate_size")})
"""Lists with an entry for words and one for patches, in every layer: however many layers there are."""

_MASKED: dict[str, tuple[str, ...]] = {
    HIDDEN: ("hidden_dim", "feature_size", "mask_feature_size", "conv_dim", "mask_dim")
}

OWN_FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "clipseg": {"decoder.hidden": ("reduce_dim",)},  # its decoder is not as wide as the text part
    "mask2former": _MASKED,
    "oneformer": _MASKED,
    "bridgetower": {"cross.layers": ("num_hidden_layers",)},  # of the bridge between its towers
    "mobilebert": {  # a layer works on a narrower copy of the stream
        "bottleneck.hidden": ("intra_bottleneck_size",),
        "bottleneck.heads": ("num_attention_heads",),
    },
    "levit": {
        HEAD_DIM: ("key_dim",),
        LAYERS: (),
    },  # a list of attentions, MLPs and what halves: none is a layer
}
"""Fields that mean another axis in some families than in the others."""


@cache
def fields_for(family: str) -> dict[str, tuple[str, ...]]:
    """How the config class of a family spells each axis."""
    own = OWN_FIELDS.get(family, {})
    taken = {name for names in own.values() for name in names}
    return {axis: tuple(n for n in names if n not in taken) for axis, names in FIELDS.items()} | own


SIZE_FIELDS = frozenset(name for names in FIELDS.values() for name in names)


def _falcon_kv_heads(config: Config) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


_TIME_SINES: dict[str, tuple[tuple[str, str], ...]] = {
    "parakeet_encoder": (("relative_k_proj.weight", "<(waves 2)"),),
    "nemotron_asr_streaming_encoder": (("relative_k_proj.weight", "<(waves 2)"),),
    "gemma3n_audio": (("pos_proj.weight", "<(2 waves)"),),
    "gemma4_audio": (("relative_k_proj.weight", "<(2 waves)"),),
    "wav2vec2-conformer": (("linear_pos.weight", "<(waves 2)"),),
    "fastspeech2_conformer": (("linear_pos.weight", "<(waves 2)"),),
    "seamless_m4t": (("linear_pos.weight", "<(waves 2)"),),
    "voxtral_realtime_text": (("ada_rms_norm.linear1.weight", "<(2 waves)"),),
    "xlnet": (("rel_attn.r", "(2 waves)"),),
    "funnel": (("r_kernel", "(2 waves)"),),
    "bros": (("bbox_projection.weight", "<(16 waves)"), ("inv_freq", "waves")),  # of eight numbers
}

_ANGLES = (("class_pos_emb", "<waves"),)

SINES = _TIME_SINES | BOX_SINES | dict.fromkeys(("mlcd", "mlcd_vision_model"), _ANGLES)
"""What reads the sines and cosines of a position, a delay or a box, and how these lie: by pairs, or first all sines.
What they are multiplied by lies as they do.

A wave's frequency goes by its number, so its order is no symmetry; a target with fewer takes every second, or so.
"""


STREAMS: dict[str, dict[str, tuple[str, ...]]] = {
    "bit": {EMBEDDING: ("stem.unit",)},
    **dict.fromkeys(("d_fine", "deimv2"), {HIDDEN: ("decoder.heads", "decoder.head_dim")}),
    "mobilebert": {
        HIDDEN: (EMBEDDING, "head.hidden")
    },  # the head reads the first as the table of tokens wrote them
    "reformer": {HIDDEN: ("axial.embedding.0", "axial.embedding.1")},  # a position's row, and its column
    "layoutlmv3": {HIDDEN: ("coordinate.embedding", "shape.embedding")},
    "musicflamingo": {"audio_config.hidden": ("audio_config.waves", "audio_config.still.hidden")},
}
"""Streams whose channels are not free, as the axes that they consist of, where these do not go by the same name."""


def _turned(config: Config) -> int:
    """How many pairs of a sound's channels turn with its window's number, and as many with the time in that."""
    return (int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)) + 1) // 2


HEADED = ("fun_asr_nano_encoder",)
"""Families whose stream is heads side by side, for it is added to values, or split into heads, as it is."""


def _by_ratio(config: Config) -> int:
    """The neurons of a class that counts them in channels; two thirds, rounded up to a multiple of 8, if gated."""
    wide = int(config.hidden_size * config.mlp_ratio)
    return (int(wide * 2 / 3) + 7) // 8 * 8 if getattr(config, "use_swiglu_ffn", False) else wide


_AS_WIDE = {
    HEAD_DIM: lambda config: config.hidden_size // config.num_attention_heads
}  # with heads of their own

DERIVED: dict[str, dict[str, Callable[[Config], int]]] = {
    "clipseg": {"decoder.head_dim": lambda c: c.reduce_dim // c.decoder_num_attention_heads},
    **WIDTHS,
    **{family: {WAVES: lambda config: config.hidden_size // 2} for family in _TIME_SINES},
    "bloom": {FFN: lambda config: 4 * config.hidden_size},
    "granite4_vision": {
        "qformer_config.heads": lambda config: config.qformer_config.num_attention_heads,
        "qformer_config.head_dim": lambda config: 64,
    },
    "fun_asr_nano": {
        "adaptor_config.ffn": lambda config: config.adaptor_config.intermediate_size,
        "adaptor_config.head_dim": lambda config: (
            config.adaptor_config.hidden_size // config.adaptor_config.num_attention_heads
        ),
    },
    "musicflamingo": {
        "audio_config.waves": _turned,
        "audio_config.still.hidden": lambda config: config.audio_config.hidden_size - 4 * _turned(config),
    },
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "vitdet", "vjepa2", "pixio"), {FFN: _by_ratio}),
    "mpt": {FFN: lambda config: config.expansion_ratio * config.d_model},
    "falcon": {KV_HEADS: _falcon_kv_heads},
    "mobilebert": {"head.hidden": lambda config: config.hidden_size - config.embedding_size},
    "reformer": listed("axial.embedding", lambda config: config.axial_pos_embds_dim),
    "layoutlmv3": {
        "coordinate.embedding": lambda config: config.coordinate_size,
        "shape.embedding": lambda config: config.shape_size,
    },
    "lilt": {  # a narrower stream for boxes, whose heads are as many
        "layout.hidden": lambda config: config.hidden_size // config.channel_shrink_ratio,
        "layout.head_dim": lambda c: c.hidden_size // c.num_attention_heads // c.channel_shrink_ratio,
        "layout.ffn": lambda config: config.intermediate_size // config.channel_shrink_ratio,
        "layout.embedding": lambda config: config.hidden_size // 6,
    },
    "canine": {
        UNIT: lambda config: config.hidden_size // config.num_hash_functions
    },  # a table for each function
    "bros": {WAVES: lambda config: config.dim_bbox_sinusoid_emb_1d // 2},
    "squeezebert": {
        UNIT: lambda config: config.hidden_size // config.q_groups,
        HEAD_DIM: lambda config: config.hidden_size // config.num_attention_heads,
    },
    "convbert": {HEAD_DIM: lambda config: config.hidden_size // config.num_attention_heads},
    "mimo_v2_flash": {f"{KV_HEADS}.1": lambda config: 2 * config.num_key_value_heads},  # of a window
    "zamba": {
        "mamba.head_dim": lambda config: config.mamba_expand * config.hidden_size // config.n_mamba_heads
    },
    "xmod": {PROJECTION: lambda config: config.hidden_size // config.adapter_reduction_factor},
    "xlstm": {
        HEAD_DIM: lambda config: config.qk_head_dim,
        V_DIM: lambda config: config.v_head_dim,
        FFN: lambda config: round_up_to_next_multiple_of(
            config.hidden_size * config.ffn_proj_factor, config.ffn_round_up_to_multiple_of
        ),
    },
    "tipsv2_vision_model": _AS_WIDE,
    "videoprism_vision_model": {
        **_AS_WIDE,
        "head.heads": lambda config: config.num_attention_heads,  # which share out the MLP's width
        "head.head_dim": lambda config: config.intermediate_size // config.num_attention_heads,
    },
    **{
        # a convolution over positions in groups of channels: any channel of a group, but the same one of each group
        family: {UNIT: lambda config: config.hidden_size // config.num_conv_pos_embedding_groups}
        for family in (
            *(
                "data2vec-audio",
                "hubert",
                "sew",
                "sew-d",
                "speecht5",
                "unispeech",
                "unispeech-sat",
                "wav2vec2",
            ),
        )
    },
    "wav2vec2-conformer": {
        UNIT: lambda config: config.hidden_size // config.num_conv_pos_embedding_groups,
        WAVES: lambda config: config.hidden_size // 2,
    },
}
"""Sizes that a family computes from other fields although it may have a field of that name.

Where there is a `unit`, every `hidden` in a tensor is so many units, side by side.
"""


MULTIPLES: dict[tuple[str, str], Callable[[Config], int]] = {
    ("convbert", "num_attention_heads"): lambda config: config.head_ratio,  # the rest is convolved
    ("deepseek_v4", "num_attention_heads"): lambda c: c.num_attention_heads // c.o_groups,  # mixed by group
    ("diffllama", "num_attention_heads"): lambda config: 2,  # of two heads the difference is taken
    ("diffllama", "num_key_value_heads"): lambda config: 2,
    **{  # the gate and what it lets through
        (family, "ffn_dim"): lambda config: 2 for family in ("kyutai_speech_to_text", "moshi", "moshi_depth")
    },
    ("recurrent_gemma", "intermediate_size"): lambda config: 2,
    ("squeezebert", "num_attention_heads"): lambda config: (
        config.q_groups
    ),  # each reads channels of its group
    ("squeezebert", "intermediate_size"): lambda config: config.intermediate_groups,
    ("qwen4_exp_text", "ple_embed_dim"): lambda config: config.heads_per_ngram * (config.ngram_size - 1),
    ("zaya", "num_attention_heads"): lambda config: 2,  # half of the values are those of the token before
    ("zaya", "num_key_value_heads"): lambda config: 2,
}
"""Fields that say so many times the length of an axis: of what must go together there are that many."""

HALVES = ("attn_config", "ffn_config")
"""Sub-configs that are about one stack's attention or FFN, whose sizes are that stack's own (DBRX)."""

MIXERS = ("mamba", "linear", "index", "swa")
"""Scopes of what is in a layer beside its attention, or instead of it."""

PARTS = ("encoder", "decoder", "cross_attn", "bottleneck", "layout", *MIXERS)
"""Scopes that are no sub-config: fields of one config say whose they are. They share what they do not have apart."""
