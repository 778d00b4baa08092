"""Sizes that leave out something that other fields of a config speak of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig as Config

from hf_ws.axes import EXPERTS, LAYERS, VOCAB

LEAST: dict[tuple[str, str], tuple[str, str]] = {
    ("bridgetower", LAYERS): ("cross.layers", "each layer of the bridge reads one of either tower"),
}
"""An axis of a family that is as long as another at least, and why: the class builds a shorter one, and goes wrong."""


def limits(
    config: Config, target: Mapping[str, int], asked: Mapping[str, int], fields: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with these sizes, one sentence each.

    Args:
        config: The source's config.
        target: The sizes of the target's axes.
        asked: Those of them that were asked for.
        fields: Other fields that the target shall have, in the class's own spelling.
    """

    def value(name: str) -> Any:
        return fields.get(name, getattr(config, name, None))

    per_token = value("num_experts_per_tok")
    if EXPERTS in target and isinstance(per_token, int) and target[EXPERTS] < per_token:
        yield f"experts={target[EXPERTS]} is less than the {per_token} that each token is sent to"
    if VOCAB in asked:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = value(name) if isinstance(value(name), list) else [value(name)]
            if any(isinstance(i, int) and i >= asked[VOCAB] for i in ids):
                yield f"vocab={asked[VOCAB]} leaves out {name}={value(name)}; give {name}= as well"
    for (family, axis), (other, why) in LEAST.items():
        if config.model_type == family and target[axis] < target[other]:
            yield (
                f"{axis}={target[axis]} is less than {other}={target[other]}, and {why}; "
                f"nearest legal: {axis}={target[other]}"
            )
