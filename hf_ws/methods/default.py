"""Which method is taken where none is named."""

from __future__ import annotations

from transformers import PreTrainedConfig

from hf_ws.sizes import nodes


def default_method(config: PreTrainedConfig, calibrated: bool) -> str:
    """The best start measured in BENCHMARKS.md for a source with this config, with calibration data or without.

    `rotation` with data. It would untie a tied head, and so make a model of more parameters than sizes say: there
    `subclone` is taken unless it is asked for. Without data `weight_selection`: importance that is read off weights
    alone has been a worse guide than none.
    """
    if not calibrated:
        return "weight_selection"
    tied = any(getattr(node, "tie_word_embeddings", False) for _, node in nodes(config))
    return "subclone" if tied else "rotation"
