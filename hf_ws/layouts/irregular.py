"""What inference cannot see: the only table in this library that names families.

A fused tensor's length says what is in it, not in which order. Each row says it for one family, and why. A row that
is wrong cannot pass the certificate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_ws.errors import SizeError
from hf_ws.sizes import nodes, scope_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """How one family stores what one module writes."""

    model_type: str
    module: str
    """End of the module's name."""
    writes: str
    """The dimension that the module writes, in the layout language; `*` is the first number in the module's name."""
    why: str
    when: Callable[[PreTrainedConfig], bool] = lambda config: True


IRREGULAR = (
    Row(
        model_type="gpt_neox",
        module="query_key_value",
        writes="(heads 3 head_dim)",
        why="the output is viewed as heads first, then split into q, k, v inside each head",
    ),
    Row(
        model_type="bloom",
        module="query_key_value",
        writes="(heads 3 head_dim)",
        why="the output is viewed as heads first, then split into q, k, v inside each head",
    ),
    Row(
        model_type="persimmon",
        module="query_key_value",
        writes="(heads 3 head_dim)",
        why="the output is viewed as heads first, then split into q, k, v inside each head",
    ),
    Row(
        model_type="codegen",
        module="qkv_proj",
        writes="(heads:4 3 heads head_dim)",
        why="stored in four blocks, one for each core of the machine it was trained on; q, v, k in each",
    ),
    Row(
        model_type="falcon",
        module="query_key_value",
        writes="(kv_heads (heads head_dim + head_dim + head_dim))",
        why="the 40B layout: for each kv head its query heads, its key, its value",
        when=lambda config: config.new_decoder_architecture,
    ),
    Row(
        model_type="falcon",
        module="query_key_value",
        writes="(heads head_dim + head_dim + head_dim)",
        why="the 7B layout: one key and one value that all heads share",
        when=lambda config: config.multi_query and not config.new_decoder_architecture,
    ),
    Row(
        model_type="falcon",
        module="query_key_value",
        writes="(heads 3 head_dim)",
        why="the 1B layout: q, k, v inside each head",
        when=lambda config: not config.multi_query and not config.new_decoder_architecture,
    ),
    *(
        Row(
            model_type="blt",
            module=module,
            writes="encoder_config.hidden",
            why="called as a norm of the heads is, but it norms the stream before the projection",
        )
        for module in ("q_norm", "k_norm")
    ),
    Row(
        model_type="blt",
        module="patch_embedding_projection",
        writes="(2 encoder_config.hidden)",
        why="several places of the stream for each patch, end to end",
    ),
    *(
        Row(
            model_type="levit",
            module=f"{module}.{part}",
            writes=f"({scope}heads.* ({keys} + {scope}v_dim.*))",
            why="split inside each head, of which the values are several times as wide as the keys",
        )
        for module, scope, keys in (
            ("queries_keys_values", "", "head_dim.* + head_dim.*"),
            ("keys_values", "down.", "down.head_dim.*"),
        )
        for part in ("linear", "batch_norm")
    ),
)

MIXED: Mapping[tuple[str, str], str] = {
    ("prophetnet", "decoder.heads"): (
        "the stock class reads the biases of its n-gram attention in another order of heads and positions than it made"
    ),
}
"""Axes that no layout can prove, for the class itself mixes them with another; by family, and why."""

HEAD_BIASES: Mapping[str, str] = {
    "bloom": "transformers.models.bloom.modeling_bloom.build_alibi_tensor",
    "falcon": "transformers.models.falcon.modeling_falcon.build_alibi_tensor",
    "mpt": "transformers.models.mpt.modeling_mpt.build_mpt_alibi_tensor",
}
"""Where ALiBi gives a head a slope by its number. Heads are proven interchangeable with the slopes set to zero."""


def alibi_index(config: PreTrainedConfig, size: int, keep: int) -> tuple[int, ...] | None:
    """The heads whose slopes the target gives to its own, where ALiBi gives slopes by number; None elsewhere.

    Head i of 2**k has the slope 2 ** -(8 (i + 1) / 2**k), and what is over 2**k the odd halves between (2108.12409).
    So the slopes of fewer heads are always among those of more: every kept head can keep its own.
    """
    if config.model_type not in HEAD_BIASES or not getattr(config, "alibi", True) or keep > size:
        return None
    number = {exponent: head for head, exponent in enumerate(_slope_exponents(size))}
    return tuple(number[exponent] for exponent in _slope_exponents(keep))


def _slope_exponents(heads: int) -> list[float]:
    power = 2 ** (heads.bit_length() - 1)
    return [8 * (i + 1) / power for i in range(power)] + [
        4 * (2 * i + 1) / power for i in range(heads - power)
    ]


def row_for(config: PreTrainedConfig, module: str) -> Row | None:
    """The row for this module of this model, if it is irregular; its axes are those of the part that it is about."""
    for (path, node), row in product(nodes(config), IRREGULAR):
        if row.model_type == node.model_type and f".{module}".endswith(f".{row.module}") and row.when(node):
            scope, number = scope_of(config, path), re.search(r"\d+", module)
            writes = row.writes.replace("*", number.group() if number else "")
            return replace(row, writes=re.sub(r"(?<![\w.])(?=[a-z_])", scope, writes))
    return None


def rotary_index(config: PreTrainedConfig, size: int, keep: int) -> tuple[int, ...]:
    """Which channels of a head are kept: evenly spaced, in rotary models by pair, so each keeps its frequency.

    Pair j of `size` turns at base ** (-2j / size): the nearest frequency for pair j of `keep` is pair j * size / keep.

    Raises:
        SizeError: a rotary model that turns only a part of each head, or whose pairs cannot be told.
    """
    if size == keep:
        return tuple(range(size))
    turn = _turn(config)
    if turn is None:
        return tuple(round(j * size / keep) for j in range(keep))
    values = config.to_dict()
    if values.get("rotary_dim") or [p for p in _nested(values) if p not in (None, 1, 1.0)]:
        raise SizeError(
            f"head_dim={keep}: {config.model_type} turns only a part of each head's {size} channels, and which of "
            "the rest belong together is not known; leave head_dim as it is"
        )
    channel = {place: at for at, place in enumerate(_pairs(turn, size))}
    return tuple(channel[round(pair * size / keep), second] for pair, second in _pairs(turn, keep))


def _turn(config: PreTrainedConfig) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The function by which a rotary family swaps the channels of each pair; None where nothing turns."""
    try:
        modeling = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        modeling = None
    for name in ("rotate_half", "rotate_every_two"):
        if hasattr(modeling, name):
            return getattr(modeling, name)
    if any("rotary" in name or "rope" in name for name in config.to_dict()):
        raise SizeError(
            f"head_dim: which channels of a {config.model_type} turn together is not known; leave it as it is"
        )
    return None


def _pairs(turn: Callable[[torch.Tensor], torch.Tensor], size: int) -> list[tuple[int, bool]]:
    """For each channel of a head the number of its pair, and whether it is the second of it."""
    partners = turn(torch.arange(1.0, size + 1).view(1, 1, 1, size)).abs().flatten().long().sub(1).tolist()
    firsts = [at for at, partner in enumerate(partners) if at < partner]
    return [(firsts.index(min(at, partner)), at > partner) for at, partner in enumerate(partners)]


def _nested(values: Any) -> list[Any]:
    """Every `partial_rotary_factor` in a config's dict, however deep."""
    if not isinstance(values, dict):
        return []
    own = [values["partial_rotary_factor"]] if "partial_rotary_factor" in values else []
    return own + [found for value in values.values() for found in _nested(value)]
