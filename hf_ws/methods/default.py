"""Which method is taken where none is named."""

from __future__ import annotations

from transformers import PreTrainedConfig

from hf_ws.sizes import nodes


def default_method(config: PreTrainedConfig, calibrated: bool) -> str:
    """The best start measured in BENCHMARKS.md for a source with this config, with calibration data or without.

    `rotation` with data. It would untie a tied head, and so make a model of more parameters than sizes say: there
    `subclone` is taken unless it is asked for, with `default_compensation`. Without data `subclone` too, by weight
    magnitude: before training `weight_selection` is ahead of it, a hundred steps later far behind.
    """
    tied = any(getattr(node, "tie_word_embeddings", False) for _, node in nodes(config))
    return "rotation" if calibrated and not tied else "subclone"


def default_compensation(method: str, calibrated: bool) -> tuple[str, ...] | None:
    """What goes with `default_method`; None for the method's own.

    `subclone` by itself is the published method, without any. Both least squares put it half way to `rotation`, before
    training and after.
    """
    return ("least_squares", "least_squares_hidden") if calibrated and method == "subclone" else None


def default_layer_policy(calibrated: bool) -> tuple[str, ...] | None:
    """The layer policies of `default_method`, as a method carries them; None for the method's own."""
    return ("lowest_loss", "block_influence", "middle_dropped") if calibrated else None
