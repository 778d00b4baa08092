"""The widths that nets for pictures compute from others: data for `hf_ws.fields`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig as Config

from hf_ws.axes import FFN, GROUPS, HEAD_DIM, HEADS, HIDDEN, ROPE_DIM, UNIT, V_DIM, WAVES

_COORDINATES = (
    ("ref_point_head.layers.0.weight", "<(4 waves 2)"),
    ("reference_points_head.layers.0.weight", "<(4 waves 2)"),
)
_CENTRE = (
    ("query_scale.layers.1.weight", "(2 waves 2)"),
    ("query_scale.layers.1.bias", "(2 waves 2)"),
    ("pos_sine_proj.weight", "<(2 waves 2)"),
)

BOX_SINES: dict[str, tuple[tuple[str, str], ...]] = {
    "conditional_detr": _CENTRE,
    "dab-detr": _CENTRE + _COORDINATES,
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino", "lw_detr", "rf_detr"), _COORDINATES),
}
"""What reads the sines and cosines of a box, or multiplies them, and how these lie: by coordinate, by pairs."""


def _of_stages(size: Callable[[Config, int], int], kind: str = FFN) -> dict[str, Callable[[Config], Any]]:
    """A size in every stage, of that stage's width: in a ResNet the narrow middle of a bottleneck is its `ffn`."""

    def derived(stage: int) -> Callable[[Config], int | None]:
        return lambda c: size(c, c.hidden_sizes[stage]) if stage < len(c.hidden_sizes) else None

    return {f"{kind}.{stage}": derived(stage) for stage in range(6)}


def listed(kind: str, sizes: Callable[[Config], Sequence[int]]) -> dict[str, Callable[[Config], Any]]:
    """So many sizes of a kind, by their numbers."""

    def derived(at: int) -> Callable[[Config], int | None]:
        return lambda c: dict(enumerate(sizes(c))).get(at)

    return {f"{kind}.{at}": derived(at) for at in range(16)}


def rule(family: str, name: str) -> Callable[..., int]:
    """A function of a family's modeling module, by which it rounds its widths."""
    return lambda *args: getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)(
        *args
    )


_V2_CHANNELS = (16, 24, 32, 64, 96, 160, 320)


def _mobilenet_v1(config: Config) -> list[int]:
    widths = (int(32 * 2**stage * config.depth_multiplier) for stage in range(6))
    return [max(width, config.min_depth) for width in widths]


def _mobilenet_v2(config: Config) -> list[int]:
    return [rule("mobilenet_v2", "apply_depth_multiplier")(config, width) for width in _V2_CHANNELS]


def _mobilenet_v2_head(config: Config) -> int:
    narrow = config.finegrained_output and config.depth_multiplier < 1.0
    return 1280 if narrow else rule("mobilenet_v2", "apply_depth_multiplier")(config, 1280)


def _mobilenet_v2_expanded(config: Config) -> list[int]:
    made = rule("mobilenet_v2", "make_divisible")
    expanded = (round(width * config.expand_ratio) for width in _mobilenet_v2(config)[:-1])
    return [made(width, config.depth_divisible_by, config.min_depth) for width in expanded]


def _mobilevitv2(config: Config) -> list[int]:
    made, factor = rule("mobilevitv2", "make_divisible"), config.width_multiplier
    stem = made(min(max(32 * factor, 16), 64), 8, 16)
    return [stem, made(64 * factor, 16), *(made(width * factor, 8) for width in (128, 256, 384, 512))]


def _mobilevitv2_units(config: Config) -> list[int]:
    widths = (width * config.width_multiplier for width in config.base_attn_unit_dims)
    return [rule("mobilevitv2", "make_divisible")(width, 8) for width in widths]


def _doubled(config: Config, widths: Sequence[int]) -> list[int]:
    """The wide middle of inverted bottlenecks."""
    return [rule("mobilevitv2", "make_divisible")(round(w * config.expand_ratio), 8) for w in widths]


def _lcnet(config: Config) -> list[int]:
    nominal = [config.stem_channels, *(block[2] for stage in config.block_configs for block in stage)]
    made = rule("pp_lcnet", "make_divisible")
    return [made(width * config.scale, config.divisor) for width in dict.fromkeys(nominal)]


def _efficientnet(config: Config) -> list[int]:
    return [rule("efficientnet", "round_filters")(config, width) for width in config.out_channels]


def _efficientnet_expanded(config: Config) -> list[int]:
    """In the first block of each stage, and in the others."""
    stem = rule("efficientnet", "round_filters")(config, config.in_channels[0])
    ratios, widths = config.expand_ratios, [stem, *_efficientnet(config)]
    pairs = dict.fromkeys((at + own, ratio) for at, ratio in enumerate(ratios) for own in (0, 1) if ratio > 1)
    return [widths[at] * ratio for at, ratio in pairs]


def _efficientnet_squeezed(config: Config) -> list[int]:
    stem = rule("efficientnet", "round_filters")(config, config.in_channels[0])
    widths = (stem, *_efficientnet(config))
    return [max(1, int(width * config.squeeze_expansion_ratio)) for width in widths]


def _bit(width: float) -> int:
    return rule("bit", "make_div")(width)


def _swin_head_dims(factor: int) -> dict[str, Callable[[Config], Any]]:
    """Stages each so many times as wide as the one before, with heads of their own."""

    def derived(stage: int) -> Callable[[Config], int | None]:
        return lambda c: (
            c.embed_dim * factor**stage // c.num_heads[stage] if stage < len(c.num_heads) else None
        )

    return {f"{HEAD_DIM}.{stage}": derived(stage) for stage in range(8)}


WIDTHS: dict[str, dict[str, Callable[[Config], Any]]] = {
    **dict.fromkeys(
        ("swin", "swinv2", "donut-swin", "maskformer-swin", "dinat", "hiera"), _swin_head_dims(2)
    ),
    "swin2sr": _swin_head_dims(1),
    "mobilevit": _of_stages(lambda config, width: width // config.num_attention_heads, HEAD_DIM),
    "resnet": _of_stages(lambda config, width: width // 4),
    "rt_detr_resnet": {
        **_of_stages(lambda config, width: width // 4),
        "embedder.ffn": lambda config: config.embedding_size // 2,
    },
    "regnet": {
        **_of_stages(lambda config, width: width // config.groups_width, GROUPS),
        **_of_stages(lambda config, width: round(width / 4)),
        "stem.ffn": lambda config: round(config.embedding_size / 4),
    },
    "bit": {  # norms in groups of channels
        **_of_stages(lambda config, width: _bit(width * config.width_factor) // config.num_groups, UNIT),
        **_of_stages(
            lambda config, width: _bit(_bit(width * config.width_factor) / 4) // config.num_groups,
            "middle.unit",
        ),
        "stem.unit": lambda config: config.embedding_size // config.num_groups,
    },
    "sam3_vision_model": listed(
        "upscale.ffn", lambda c: [c.backbone_config.hidden_size // part for part in (2, 4)]
    ),
    "groupvit_vision_model": listed(
        "assign.ffn", lambda c: [int(ratio * c.hidden_size) for ratio in c.assign_mlp_ratio]
    ),
    "lightglue": {
        ROPE_DIM: lambda config: (
            config.descriptor_dim // config.num_attention_heads // 2
        ),  # of learned positions
        FFN: lambda config: None,  # what it reads is two streams end to end, and it is as wide
    },
    "xclip": {
        "prompt.heads": lambda config: config.prompt_num_attention_heads,
        "prompt.head_dim": lambda config: config.projection_dim // config.prompt_num_attention_heads,
    },
    "xclip_vision_model": {
        "mit.head_dim": lambda config: config.mit_hidden_size // config.mit_num_attention_heads,
    },
    "bridgetower_vision_model": {
        "attn.heads": lambda config: config.hidden_size // 64,
        "attn.head_dim": lambda config: 64,
        FFN: lambda config: 4 * config.hidden_size,
    },
    "levit": {
        **listed(
            FFN, lambda c: [width * ratio for width, ratio in zip(c.hidden_sizes, c.mlp_ratio, strict=True)]
        ),
        **listed(V_DIM, lambda c: [k * ratio for k, ratio in zip(c.key_dim, c.attention_ratio, strict=True)]),
        **listed("stem.ffn", lambda c: [c.hidden_sizes[0] // part for part in (8, 4, 2)]),
        # what halves the picture between two stages
        **listed(f"down.{HEADS}", lambda c: [width // c.key_dim[0] for width in c.hidden_sizes[:-1]]),
        **listed(f"down.{HEAD_DIM}", lambda c: c.key_dim[:1] * (len(c.hidden_sizes) - 1)),
        **listed(f"down.{V_DIM}", lambda c: [4 * c.key_dim[0]] * (len(c.hidden_sizes) - 1)),
    },
    "hgnet_v2": {
        **listed("squeeze.ffn", lambda config: [width // 2 for width in config.stage_out_channels]),
        "stem.ffn": lambda config: config.stem_channels[1] // 2,
    },
    "mgp-str": {UNIT: lambda config: config.hidden_size // 8},  # a convolution in eight groups
    **{key: {UNIT: lambda config: config.hidden_dim // 32} for key in ("mask2former", "oneformer")},
    "deformable_detr": {UNIT: lambda config: config.d_model // 32},  # features normed in 32 groups
    **{
        key: {
            UNIT: lambda config: config.hidden_size // 2,
            "attn.heads": lambda config: config.num_attention_heads,
            "attn.head_dim": lambda config: (
                config.hidden_size // config.attention_downsample_rate // config.num_attention_heads
            ),
            "upscale.ffn.0": lambda config: config.hidden_size // 4,
            "upscale.ffn.1": lambda config: config.hidden_size // 8,
        }
        for key in (
            "sam_mask_decoder",
            "sam_hq_mask_decoder",
            "sam2_mask_decoder",
            "sam3_tracker_mask_decoder",
        )
    },
    "perceiver": {"decoder.v_dim": lambda config: config.d_model // 8},  # of its eight heads
    "swiftformer": {"stem.ffn": lambda config: config.embed_dims[0] // 2},
    **{
        family: {"csp.ffn": lambda config: round(config.encoder_hidden_dim * config.hidden_expansion // 2)}
        for family in ("d_fine", "deimv2")
    },
    "mobilenet_v1": listed(HIDDEN, _mobilenet_v1),
    "mobilenet_v2": {
        **listed(HIDDEN, _mobilenet_v2),
        **listed(FFN, _mobilenet_v2_expanded),
        "stem.hidden": lambda config: rule("mobilenet_v2", "apply_depth_multiplier")(config, 32),
        "head.hidden": _mobilenet_v2_head,
    },
    "mobilevitv2": {
        **listed(HIDDEN, _mobilevitv2),
        **listed(FFN, lambda config: _doubled(config, _mobilevitv2(config))),
        **listed("transformer.hidden", _mobilevitv2_units),
        **listed(
            "transformer.ffn",
            lambda config: [int(w * config.ffn_multiplier // 16 * 16) for w in _mobilevitv2_units(config)],
        ),
    },
    "pp_lcnet": {
        "stem.embedding": lambda config: None,  # the first of the widths, but for the scale
        **listed(HIDDEN, _lcnet),
        **listed(FFN, lambda config: [width // config.reduction for width in _lcnet(config)]),
    },
    "efficientnet": {
        **listed(HIDDEN, _efficientnet),
        **listed(FFN, _efficientnet_expanded),
        **listed("squeeze.ffn", _efficientnet_squeezed),
        "embeddings.hidden": lambda config: rule("efficientnet", "round_filters")(
            config, config.in_channels[0]
        ),
        "top.hidden": lambda config: rule("efficientnet", "round_filters")(config, 1280),
    },
    **{family: {WAVES: lambda config: config.d_model // 4} for family in BOX_SINES},
    **{
        key: {
            WAVES: lambda config: config.d_model // 4,
            "projector.ffn": lambda config: int(config.d_model * config.hidden_expansion),
        }
        for key in ("lw_detr", "rf_detr")
    },
    **{
        family: {
            WAVES: lambda config: config.d_model // 4,
            UNIT: lambda config: config.d_model // 32,
            "fusion_layer.heads": lambda config: config.encoder_attention_heads // 2,
            "fusion_layer.head_dim": lambda config: (
                config.encoder_ffn_dim // 2 // (config.encoder_attention_heads // 2)
            ),
            "enhancer.heads": lambda config: config.encoder_attention_heads // 2,
            "enhancer.head_dim": lambda config: config.d_model // (config.encoder_attention_heads // 2),
            "enhancer.ffn": lambda config: config.encoder_ffn_dim // 2,
        }
        for family in ("grounding-dino", "mm-grounding-dino")
    },
    "dab-detr": {WAVES: lambda config: config.hidden_size // 4},
    **{
        key: {WAVES: lambda config: config.hidden_size // config.num_attention_heads // 2}
        for key in ("mlcd", "mlcd_vision_model")
    },
}
"""By family, sizes that have no field of their own."""
